"""What a connection may make a process hold: the arithmetic, the descriptors, and real attacks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from echo_node import ENVIRONMENT, LIMITS, EchoNode, Honest
from faults import zmtp
from faults.zmtp import Budget
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import meter as metering
from transport import sockets
from transport.messages import Limits
from transport.meter import SINCE, Accounts, Bounds, MemoryWatch, Meter, bounds, message_bytes

MIB = 1 << 20
BOUNDS = Bounds(
    unseen=1000, unheard=500, unsent=1000, total=10_000, stall_s=10, handshakes=3, connections=5
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="metering is by Linux's TCP_INFO")


def opened(number: int = 1, address: str = "10.0.0.{}", **changes: Any) -> Accounts:
    """Accounts 1 to `number`, all past their handshakes."""
    accounts = Accounts(Bounds(**{**vars(BOUNDS), **changes}))
    for fd in range(1, number + 1):
        accounts.open(fd, address.format(fd), 0.0)
        speak(accounts, fd, f"user{fd}")
    return accounts


def speak(accounts: Accounts, fd: int, user: str = "", route: bytes = b"", size: int = 0) -> None:
    """The first message of a connection."""
    account = accounts.accounts[fd]
    accounts.name(account, user, route or b"%d" % fd)
    accounts.delivered(account, size)


def told(accounts: Accounts, now: float = 1.0) -> list[tuple[int, str]]:
    return [(breach.fd, breach.reason) for breach in accounts.judge(now)]


def test_what_is_delivered_is_not_held() -> None:
    accounts = opened()
    for turn in range(1, 100):
        accounts.delivered(accounts.accounts[1], 900)
        accounts.sample(1, 900 * turn, 0, 0, turn / 1000)
        assert not told(accounts)
    accounts.sample(1, 900 * 99 + 900, 0, 0, 0.1)
    assert not told(accounts)
    accounts.sample(1, 900 * 99 + 1200, 0, 0, 0.1)
    assert told(accounts) == [(1, "endless")]
    assert not told(accounts)  # once


def test_before_its_first_message_a_connection_may_hold_less() -> None:
    accounts = Accounts(BOUNDS)
    for fd in (1, 2, 3):
        accounts.open(fd, "10.0.0.1", 0.0)
        accounts.sample(fd, 300, 0, 0, 0.0, 300)
    speak(accounts, 1)
    for fd, size in ((1, 900), (2, 490), (3, 510)):
        accounts.sample(fd, size, 0, 0, 0.0, 300)
    assert told(accounts) == [(3, "endless")]


def test_what_the_kernel_still_queues_is_not_held_here() -> None:
    accounts = opened()
    accounts.sample(1, 50_000, 0, 49_500, 0.0)
    assert not told(accounts)
    accounts.sample(1, 50_000, 0, 0, 0.0)
    assert told(accounts) == [(1, "endless")]


def test_heartbeats_are_forgiven_and_idleness_is_no_credit() -> None:
    accounts = opened()
    for second in range(1, 100_000, 7):
        accounts.sample(1, 90 * second, 0, 0, float(second))
        assert not told(accounts, float(second))
    accounts.sample(1, 90 * 100_000 + 2000, 0, 0, 100_000.0)
    assert told(accounts, 100_000.0) == [(1, "endless")]


def test_hours_of_silence_cover_no_attack() -> None:
    accounts = opened()
    accounts.sample(1, 0, 0, 0, 86_400.0)
    accounts.sample(1, 2000, 0, 0, 86_400.1)
    assert told(accounts, 86_400.1) == [(1, "endless")]


def test_a_slow_reader() -> None:
    accounts = opened(2)
    for fd in (1, 2):
        accounts.handed(fd, 900, 0.0)
        accounts.sample(fd, 0, 300, 0, 0.0)
    assert not told(accounts)
    accounts.handed(1, 1000, 0.0)
    accounts.handed(2, 400, 0.0)
    assert told(accounts) == [(1, "slow")]


def test_what_waits_is_known_of_each_user_and_of_all() -> None:
    accounts = opened(3)
    speak(accounts, 3, "user1")  # a second connection of the same
    for fd in (1, 2, 3):
        accounts.handed(fd, 500, 0.0)
    assert (accounts.unsent, dict(accounts.unsent_of)) == (1500, {"user1": 1000, "user2": 500})
    accounts.sample(1, 0, 300, 0, 0.1)
    accounts.sample(2, 0, 600, 0, 0.1)
    assert (accounts.unsent, dict(accounts.unsent_of)) == (700, {"user1": 700})
    accounts.open(1, "10.0.0.9", 0.2)  # the number is another connection's now
    accounts.close(3)
    assert (accounts.unsent, dict(accounts.unsent_of)) == (0, {})


@pytest.mark.parametrize(("total", "gone"), [(2000, [(1, "slow")]), (5000, [])])
def test_who_reads_a_trickle_must_go_only_while_much_waits(
    total: int, gone: list[tuple[int, str]]
) -> None:
    accounts = opened(2, total=total, pace=10)
    found, acked = [], [0, 0]
    for second in range(30):
        for fd, reads in ((1, 9), (2, 11)):  # bytes a second
            account = accounts.accounts.get(fd)
            if account is None:
                continue
            if account.unsent < 400:
                accounts.handed(fd, 200, second)
            acked[fd - 1] += reads
            accounts.sample(fd, 0, acked[fd - 1], 0, second)
        found += told(accounts, second)
        for fd, _ in found:
            accounts.close(fd)
    assert found == gone


def test_who_trickles_goes_one_by_one() -> None:
    accounts = opened(3, total=1500, pace=100)
    for fd in (1, 2, 3):
        accounts.handed(fd, 400 + fd, 0.0)
    assert not told(accounts, 4.9)
    assert told(accounts, 5.0) == [(3, "slow")]
    accounts.close(3)
    assert told(accounts, 5.1) == [(2, "slow")]
    accounts.close(2)
    accounts.handed(1, 500, 5.2)
    accounts.sample(1, 0, 400, 0, 5.3)  # all but a little of what waited
    accounts.sample(1, 0, 402, 0, 5.4)
    assert not told(accounts, 5.4)


def test_who_takes_all_there_is_does_not_trickle_however_little_it_is() -> None:
    accounts = opened(2, total=1000, pace=100)
    accounts.handed(2, 900, 0.0)  # much waits, but of the other
    accounts.handed(1, 2, 0.0)
    for tenth in range(1, 100):
        accounts.handed(1, 2, tenth / 10)  # before the one before it is acknowledged
        accounts.sample(1, 0, 2 * tenth, 0, tenth / 10)
        assert (1, "slow") not in told(accounts, tenth / 10)


def test_the_rate_at_which_all_read() -> None:
    accounts = opened(2)
    accounts.judge(0.0)
    assert accounts.rate == 0
    accounts.handed(1, 900, 0.0)
    accounts.handed(2, 900, 0.0)
    for tenth in range(1, 11):
        accounts.sample(1, 0, 30 * tenth, 0, tenth / 10)
        accounts.sample(2, 0, 20 * tenth, 0, tenth / 10)
        accounts.judge(tenth / 10)
    assert accounts.rate == pytest.approx(500)
    accounts.sample(1, 0, 400, 0, 2.0)
    accounts.judge(2.0)
    assert accounts.rate == pytest.approx(100), "it has become slower"
    accounts.sample(1, 0, 900, 0, 2.1)
    accounts.sample(2, 0, 900, 0, 2.1)
    accounts.judge(2.1)
    accounts.judge(100.0)
    assert accounts.rate == pytest.approx(100), "having nothing to read, they are no slower"


def test_the_pace_is_taken_only_while_there_is_something_to_read() -> None:
    accounts = opened(2, total=1000, pace=100)
    accounts.handed(2, 900, 0.0)  # much waits, but of the other
    acked = 0
    for second in range(0, 60, 6):
        accounts.handed(1, 20, second)
        assert not told(accounts, second)
        acked += 20
        accounts.sample(1, 0, acked, 0, second + 1)
        accounts.sample(2, 0, 600 * (second + 6), 0, second + 5)
        accounts.handed(2, 900, second + 5)
        assert not told(accounts, second + 5)


def test_a_reader_that_stops_altogether() -> None:
    accounts = opened(2)
    for second in range(30):
        accounts.handed(1, 10, second)
        accounts.sample(1, 0, 300 + 10 * second, 0, second)  # reads what was sent a second before
        accounts.sample(2, 0, 300, 0, second)  # was sent nothing
        assert not told(accounts, second)
    accounts.handed(2, 10, 30)
    accounts.sample(2, 0, 300, 0, 39)
    assert not told(accounts, 39)
    accounts.sample(2, 0, 300, 0, 41)
    accounts.sample(1, 0, 700, 0, 41)
    assert told(accounts, 41) == [(2, "slow")]


def test_together_too_much_costs_whoever_holds_most() -> None:
    accounts = opened(4, total=2500)
    for fd, size in enumerate((700, 650, 650, 600), start=1):
        accounts.accounts[fd].user = "greedy" if fd > 1 else "modest"
        accounts.sample(fd, size, 0, 0, 0.0)
    assert told(accounts) == [(2, "total")]
    assert not told(accounts)


def test_replies_are_booked_where_requests_came_from() -> None:
    accounts = opened(2)
    assert accounts.routes == {b"1": 1, b"2": 2}
    accounts.close(1)
    accounts.open(1, "10.0.0.1", 0.0)
    speak(accounts, 1, "user1", b"route")
    accounts.close(2)
    assert accounts.routes == {b"route": 1}
    accounts.open(2, "10.0.0.1", 0.0)
    speak(accounts, 2, "user1", b"route")  # the same edge, connected anew
    accounts.close(1)
    assert accounts.routes == {b"route": 2}
    accounts.close(2)
    assert accounts.routes == {}


def opening(accounts: Accounts, fd: int, address: str, now: float = 0.0) -> int | None:
    """The handshake that is one too many after this connection, which is then over."""
    accounts.open(fd, address, now)
    surplus = accounts.surplus(address)
    if surplus:
        accounts.settle(surplus)
    return surplus.fd if surplus else None


def test_too_many_handshakes_of_one_address_cost_its_oldest() -> None:
    accounts = Accounts(dataclasses.replace(BOUNDS, handshakes=6, connections=100))
    assert [opening(accounts, fd, "2001:db8::1") for fd in range(3)] == [None] * 3
    assert opening(accounts, 10, "10.0.0.1") is None
    assert opening(accounts, 3, "2001:db8::2") == 0, "a /64 is one address"
    accounts.sample(1, 0, 300, 0, 1.0, 300)  # is through
    assert opening(accounts, 4, "2001:db8::1") is None
    speak(accounts, 2, "user")  # too
    accounts.close(3)
    assert [opening(accounts, fd, "2001:db8::1") for fd in range(5, 8)] == [None, None, 4]
    assert opening(accounts, 11, "10.0.0.1") is None


def test_too_many_handshakes_in_all_cost_the_oldest() -> None:
    accounts = Accounts(dataclasses.replace(BOUNDS, handshakes=6, connections=100))
    found = [opening(accounts, fd, f"10.0.0.{fd // 2}") for fd in range(10)]
    assert found == [None] * 6 + [0, 1, 2, 3]
    accounts.judge(60.0)  # libzmq itself ends handshakes: what is there after that is through
    assert not accounts.pending
    assert [opening(accounts, fd, f"10.0.0.{fd}", 60.0) for fd in range(10, 16)] == [None] * 6


def test_a_handshake_that_takes_too_many_bytes() -> None:
    accounts = Accounts(dataclasses.replace(BOUNDS, unheard=MIB, total=MIB))
    accounts.open(1, "10.0.0.1", 0.0)
    accounts.open(2, "10.0.0.2", 0.0)
    accounts.sample(1, 70_000, 0, 0, 0.1, 64)
    accounts.sample(2, 70_000, 0, 0, 0.1, 300)  # had finished it
    assert told(accounts) == [(1, "endless")]
    assert not told(accounts)


@pytest.mark.parametrize(
    ("address", "party"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_network_is_one_party(address: str, party: str) -> None:
    assert metering.network(address) == party


def test_too_many_connections() -> None:
    accounts = Accounts(BOUNDS)
    for fd in range(1, 8):
        accounts.open(fd, "10.0.0.1", fd / 10)
        speak(accounts, fd, "" if fd == 5 else "many" if fd > 2 else f"one{fd}")
    assert told(accounts) == [(5, "crowd"), (3, "crowd")]


def test_too_many_connections_of_one_party_cost_its_oldest() -> None:
    accounts = Accounts(dataclasses.replace(BOUNDS, handshakes=10, connections=100, each=3))
    for fd in range(1, 8):
        accounts.open(fd, f"10.0.0.{fd}", fd / 10)
        speak(accounts, fd, "many" if fd != 4 else "other")
    for fd in range(11, 17):  # through, and silent
        accounts.open(fd, "10.6.6.6" if fd != 13 else "10.0.0.1", fd / 10)
        accounts.sample(fd, 0, 300, 0, 2.0, 300)
    for fd in range(21, 27):  # not through
        accounts.open(fd, "10.6.6.6", fd / 10)
    assert told(accounts, 3.0) == [(fd, "crowd") for fd in (1, 2, 3, 11, 12)]
    assert not told(accounts, 3.0)
    accounts.close(7)  # whose place may be taken
    accounts.open(7, "10.0.0.9", 3.0)
    speak(accounts, 7, "many")
    assert not told(accounts, 3.0)


@linux
def test_one_key_has_only_so_many_connections(start: Callable[..., EchoNode]) -> None:
    node = start()
    honest = Honest(node)
    pair = node.authorise("many")

    async def scene() -> None:
        peers = [await node.peer(pair) for _ in range(70)]  # of which none says anything
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 6 and s["connections"] == 1 + 64)
        for peer in peers[-64:]:
            await peer.send_message([b"1 10"])
            assert await asyncio.wait_for(peer.read_message(), 60)
        for _ in range(6):
            peers.append(await node.peer(pair))
            await peers[-1].send_message([b"1 10"])
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 12 and s["connections"] == 1 + 64)
        for peer in peers:
            await peer.close()

    asyncio.run(asyncio.wait_for(scene(), 120))
    assert node.stats()["dropped"] == {"crowd": 12}
    honest.more(10)
    honest.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_honest_peer_is_never_at_fault(data: st.DataObject) -> None:
    """Messages up to the largest, as many waiting as the mark allows, read at any pace."""
    limits, backlog = Limits(2, 9000), 4
    accounts = Accounts(bounds(limits, limits, backlog=backlog))
    accounts.open(1, "10.0.0.1", 0.0)
    speak(accounts, 1)
    largest, received, now = message_bytes(limits), 0, 0.0
    waiting: list[int] = []
    for _ in range(data.draw(st.integers(1, 60))):
        pause = data.draw(st.floats(0, 2))
        now += pause
        received += int(pause * 90)  # heartbeats
        size = data.draw(st.integers(1, largest))
        partial = data.draw(st.integers(0, size))
        accounts.sample(1, received + partial, 0, 0, now)
        assert not accounts.judge(now)
        received += size
        waiting.append(size)
        while len(waiting) > backlog or (waiting and data.draw(st.booleans())):
            accounts.delivered(accounts.accounts[1], waiting.pop(0))
        accounts.sample(1, received, 0, 0, now)
        assert not accounts.judge(now)


def test_bounds_leave_descriptors_for_others() -> None:
    limits = Limits(2, 2 * MIB)
    few = bounds(limits, limits, backlog=8, files=1024)
    assert 2 * few.connections < 1024 - 100
    assert few.handshakes < few.connections
    assert bounds(limits, limits, backlog=8, files=20).connections >= 1
    assert few.unseen > 9 * 2 * MIB


# -- descriptors ----------------------------------------------------------------------------------


@pytest.fixture
def pairs() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """(server's end, client's end) of TCP connections."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def make() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            client.settimeout(30)
            served = stack.enter_context(listener.accept()[0])
            served.settimeout(30)
            return served, client

        yield make


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@linux
def test_the_kernel_tells_bytes(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "_SLACK", 4000)
    served, client = pairs()
    meter = Meter(bounds(Limits(1, 1000), Limits(1, 1000), backlog=2))
    meter.opened(served.fileno(), 0.0)
    account = meter._accounts.accounts[served.fileno()]
    assert account.address == "127.0.0.1"
    client.sendall(bytes(50_000))
    while account.received < 50_000:
        assert not meter.poll(0.0)
    assert account.queued == 50_000  # nobody has read it: it is TCP's, which bounds it
    assert account.inside == 0
    served.recv(50_000, socket.MSG_WAITALL)
    assert not meter.poll(0.0)
    assert account.inside == 50_000
    client.sendall(bytes(20_000))
    served.recv(20_000, socket.MSG_WAITALL)
    (breach,) = meter.poll(0.0)
    assert breach.reason == "endless"
    assert client.recv(1) == b""  # shut down
    assert served.recv(1) == b""  # the owner notices too
    assert meter.dropped == {"endless": 1}
    meter.close()


@linux
def test_a_reused_number_is_another_connection(pairs: Any) -> None:
    first, first_client = pairs()
    meter = Meter(BOUNDS)
    before = descriptors()
    meter.opened(first.fileno(), 0.0)
    number = first.fileno()
    second, second_client = pairs()
    os.dup2(second.fileno(), number)  # closed, and its number given to another one
    meter.opened(number, 1.0)
    assert first_client.recv(1) == b""  # the duplicate of the first is closed too
    second_client.sendall(bytes(500))
    while meter._accounts.accounts[number].received < 500:
        meter.poll(1.0)
    meter.closed(number)
    assert meter.connections == 0
    assert descriptors() == before + 2


class Frame:
    """Of a message that came by this descriptor, from this user, let in at this time."""

    def __init__(self, fd: int, user: str = "", since: float = 9.0) -> None:
        self._told = {zmq.SRCFD: fd, "User-Id": user, SINCE: str(since)}

    def __len__(self) -> int:
        return 100

    def get(self, option: Any) -> Any:
        return self._told[option]


def delivered(meter: Meter, fd: int, route: bytes, user: str, since: float = 9.0) -> None:
    meter.delivered(Frame(fd, user, since), route)  # type: ignore[arg-type]


@linux
def test_a_message_may_be_read_before_the_news_of_its_connection(pairs: Any) -> None:
    first, _ = pairs()
    number = first.fileno()
    second, _ = pairs()
    meter = Meter(BOUNDS)
    news = [lambda: meter.opened(number, 1.0)]
    meter.catch_up = lambda: [tell() for tell in news] and news.clear()
    delivered(meter, number, b"first", "one", since=2.0)
    assert (meter.users(), meter._accounts.routes) == ({"one"}, {b"first": number})
    os.dup2(second.fileno(), number)
    news += [lambda: meter.closed(number), lambda: meter.opened(number, 3.0)]
    delivered(meter, number, b"second", "another", since=4.0)
    assert (meter.users(), meter._accounts.routes) == ({"another"}, {b"second": number})
    ended = meter.closed(number)
    assert (ended.user, ended.route) == ("another", b"second")
    meter.close()


@linux
def test_what_a_connection_has_left_is_not_booked_to_the_next_one_of_its_number(
    pairs: Any,
) -> None:
    first, _ = pairs()
    number = first.fileno()
    meter = Meter(BOUNDS)
    meter.opened(number, 1.0)
    delivered(meter, number, b"first", "one", since=2.0)
    meter.closed(number)
    delivered(meter, number, b"first", "one", since=2.0)
    assert not meter.users()
    meter.opened(number, 3.0)
    for route in (b"first", b"other"):
        delivered(meter, number, route, "one", since=2.0)
    meter.unwanted(Frame(number, "one", since=2.0))  # type: ignore[arg-type]
    assert not meter.users()
    assert not meter._accounts.accounts[number].dropped
    delivered(meter, number, b"second", "another", since=4.0)
    delivered(meter, number, b"first", "one", since=2.0)
    assert (meter.users(), meter._accounts.routes) == ({"another"}, {b"second": number})
    assert meter._accounts.accounts[number].credit == metering.frame_bytes(100)
    meter.close()


@linux
def test_a_connection_that_had_ended_before_its_beginning_was_told(pairs: Any) -> None:
    first, _ = pairs()
    number = first.fileno()
    meter = Meter(BOUNDS)
    first.close()
    assert meter.opened(number, 0.0)
    delivered(meter, number, b"first", "one", since=2.0)
    assert meter.closed(number) == ("", False, 0, 0, "", b"")
    assert not meter._accounts.routes


@linux
@pytest.mark.parametrize("now", ["nothing", "a pipe", "a file"])
def test_a_number_that_is_no_connection_any_more(pairs: Any, now: str) -> None:
    served, _ = pairs()
    number = served.fileno()
    read, write = os.pipe()
    if now == "nothing":
        served.close()
    else:
        os.dup2(read if now == "a pipe" else os.open(os.devnull, os.O_RDONLY), number)
    before = descriptors()
    meter = Meter(BOUNDS)
    assert meter.opened(number, 0.0)
    assert meter.connections == 0
    assert not meter.poll(0.0)
    assert descriptors() == before
    meter.closed(number)
    os.close(read)
    os.close(write)


@linux
def test_a_successor_is_not_shut_for_its_predecessor(pairs: Any) -> None:
    """ACCEPTED is read late, when the number is another connection's already."""
    first, _ = pairs()
    number = first.fileno()
    second, second_client = pairs()
    os.dup2(second.fileno(), number)
    meter = Meter(BOUNDS)
    meter.opened(number, 0.0)  # the first's news, the second's descriptor
    meter.closed(number)
    meter.opened(number, 0.0)
    assert meter.revoke([])  # nobody has said yet whose it is
    assert second_client.recv(1) == b""
    meter.close()


@linux
def test_without_descriptors_newcomers_are_shut(pairs: Any) -> None:
    meter = Meter(BOUNDS)
    first, _ = pairs()
    meter.opened(first.fileno(), 0.0)
    newcomer, client = pairs()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(newcomer.fileno())
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        kept = meter.opened(newcomer.fileno(), 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not kept
    assert client.recv(1) == b""
    assert newcomer.fileno() > 0
    assert meter.dropped == {"crowd": 1}
    meter.close()


def test_where_the_kernel_tells_nothing_connections_are_still_counted(pairs: Any) -> None:
    meter = Meter(dataclasses.replace(BOUNDS, handshakes=20, connections=3))
    meter.metered = False
    ends = [pairs() for _ in range(5)]
    for served, _ in ends:
        meter.opened(served.fileno(), 0.0)
    meter.handed(10_000, 0.0, route=b"route")
    assert [breach.reason for breach in meter.poll(0.0)] == ["crowd", "crowd"]
    meter.close()


@linux
def test_too_many_handshakes_cost_the_oldest_that_is_under_way(pairs: Any) -> None:
    meter = Meter(dataclasses.replace(BOUNDS, handshakes=4))
    ends = [pairs() for _ in range(5)]
    for served, _ in ends:
        if served is ends[1][0]:
            served.sendall(bytes(300))  # is through, though nobody has looked
        meter.opened(served.fileno(), 0.0)
    assert [breach.fd for breach in meter.poll(0.0)] == [ends[0][0].fileno(), ends[2][0].fileno()]
    for number in (0, 2):
        assert ends[number][1].recv(1) == b""
    assert meter.dropped == {"crowd": 2}
    assert not meter.poll(0.0)
    meter.close()


@linux
def test_many_handshakes_are_looked_at_in_turns(
    pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "_AT_ONCE", 2)
    looked: list[int] = []
    counts = metering._counts
    monkeypatch.setattr(metering, "_counts", lambda end: looked.append(end) or counts(end))
    meter = Meter(dataclasses.replace(BOUNDS, handshakes=100, connections=100))
    ends = [pairs() for _ in range(9)]
    for served, _ in ends:
        meter.opened(served.fileno(), 0.0)
    for _ in range(4 * 5):
        meter.poll(0.0)
    assert len(looked) == 4 * 9  # each as often as any other
    ends[0][0].sendall(bytes(300))
    while len(meter._accounts.pending) == 9:
        meter.poll(0.0)
    looked.clear()
    meter.poll(0.0)
    assert ends[0][0].getpeername() in [end.getpeername() for end in looked]  # always, from now on
    meter.close()


@linux
def test_a_banished_user_loses_its_connections_and_nobody_else(pairs: Any) -> None:
    meter = Meter(BOUNDS)
    ends = [pairs() for _ in range(4)]
    for number, (served, _) in enumerate(ends):
        meter.opened(served.fileno(), 0.0)
        if number < 3:
            delivered(meter, served.fileno(), b"%d" % number, "bad" if number < 2 else "good")
    assert [breach.fd for breach in meter.banish("bad")] == [ends[n][0].fileno() for n in (0, 1)]
    assert not meter.banish("bad")
    assert [client.recv(1) for _, client in ends[:2]] == [b"", b""]
    # The fourth had said nothing until now.
    meter.unwanted(Frame(ends[3][0].fileno(), "bad"))  # type: ignore[arg-type]
    assert ends[3][1].recv(1) == b""
    assert meter.dropped == {"banished": 3}
    meter.close()


def test_memory_watch_tells_each_rise_once() -> None:
    values = iter([10, 99, 101, 150, 90, None, 120])
    watch = MemoryWatch(100, lambda: next(values))
    assert [watch.breached() for _ in range(7)] == [None, None, 101, None, None, None, 120]
    assert watch.breaches == 2


# -- attacks by authenticated peers on a real process ---------------------------------------------

FLOOD = """
import asyncio, resource
from faults.zmtp import Budget, half_open
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
asyncio.run(half_open({}, hold_s=120, budget=Budget(count=2000, seconds=120)))
"""


@linux
@pytest.mark.parametrize("part", [MIB, 64])
def test_an_endless_message_costs_its_sender_the_connection(
    start: Callable[..., EchoNode], part: int
) -> None:
    node = start()
    honest = Honest(node)
    honest.more(20)
    before = node.stats()

    async def attack() -> zmtp.Tally:
        peer = await node.peer(node.authorise("hostile"))
        budget = Budget(bytes=1 << 30, count=10**7, seconds=60)
        async with peer:
            return await zmtp.endless_multipart(peer, part_bytes=part, budget=budget)

    tally = asyncio.run(attack())
    assert tally.closed == 1, "it was let do as it liked"
    stats = node.wait_for(lambda s: s["events"].get("dropped endless"))
    allowed = bounds(LIMITS.request, LIMITS.result, backlog=sockets.BACKLOG).unseen
    assert allowed < 30 * MIB
    assert tally.sent < allowed + 256 * MIB  # what a busy machine let pass between two looks
    honest.more(20)
    after = node.wait_for(lambda s: s["connections"] == 1)
    # The allocator may keep what was freed. Small frames take twice what they are on the wire.
    assert after["rss"] < before["rss"] + 3 * allowed
    assert stats["dropped"] == {"endless": 1}
    assert "without ending a message" in node.log
    honest.close()


@linux
def test_without_the_meter_the_same_attack_fills_the_memory(
    start: Callable[..., EchoNode],
) -> None:
    """The attack works, else the test before proves nothing."""
    node = start(metered=False)
    before = node.stats()["rss"]

    async def attack() -> None:
        async with await node.peer(node.authorise("hostile")) as peer:
            tally = await zmtp.endless_multipart(
                peer, part_bytes=MIB, budget=Budget(bytes=256 * MIB, seconds=60)
            )
            assert not tally.closed
            node.wait_for(lambda s: s["rss"] > before + 200 * MIB)

    asyncio.run(attack())


@linux
def test_a_connection_that_breaks_while_its_inbox_is_full_stops_nothing(
    start: Callable[..., EchoNode],
) -> None:
    """libzmq would abort, had it a mark at which to stop reading, at the next heartbeat."""
    node = start(deaf=True, bounds={"unheard": 1 << 30})
    mark = 4
    with zmq.Context() as ctx:
        pair = node.authorise("hostile")
        client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
        client.sndtimeo = 30_000
        for _ in range(mark + 2):
            client.send(bytes(3 * MIB))
        node.wait_for(lambda s: s["held"] > (mark - 1) * 3 * MIB)
        client.close()
    time.sleep(3.5)  # in which some heartbeats would be due
    node.stats()


FROZEN = """
import json, sys, time, zmq
from echo_node import LIMITS
from transport import sockets
from transport.keys import KeyPair
endpoint, key, public, secret = json.loads(sys.argv[1])
client = sockets.client(zmq.Context(), endpoint, key, KeyPair("edge", public, secret), LIMITS)
client.send(b"1 10")
client.recv()
print(flush=True)
time.sleep(60)
"""


@linux
def test_an_edge_that_freezes_loses_its_connection(start: Callable[..., EchoNode]) -> None:
    node = start()
    pair = node.authorise("edge")
    told = json.dumps([node.endpoint, node.key.public, pair.public, pair.secret])
    folder = os.path.dirname(__file__)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{folder}"}
    with subprocess.Popen(
        [sys.executable, "-c", FROZEN, told], stdout=subprocess.PIPE, env=environment
    ) as edge:
        try:
            assert edge.stdout
            assert edge.stdout.readline() == b"\n"
            time.sleep(1.5)  # a heartbeat
            assert node.stats()["connections"] == 1
            edge.send_signal(signal.SIGSTOP)
            node.wait_for(lambda s: s["connections"] == 0)
        finally:
            edge.kill()


@linux
def test_many_endless_messages_together_are_bounded(start: Callable[..., EchoNode]) -> None:
    node = start(bounds={"total": 64 * MIB, "unheard": 1 << 30})
    honest = Honest(node)
    hostile = node.authorise("hostile")

    async def attack() -> list[zmtp.Tally]:
        peers = [await node.peer(hostile) for _ in range(8)]
        budget = Budget(bytes=20 * MIB, seconds=60)  # each alone is within its bound
        tallies = await asyncio.gather(
            *(zmtp.endless_multipart(peer, part_bytes=MIB // 2, budget=budget) for peer in peers)
        )
        node.wait_for(lambda s: s["dropped"].get("total", 0) >= 4)
        honest.more(10)
        for peer in peers:
            await peer.close()
        return list(tallies)

    asyncio.run(attack())
    assert set(node.stats()["dropped"]) == {"total"}
    assert "all connections together" in node.log
    honest.close()


@linux
def test_a_peer_that_does_not_read_costs_its_connection(start: Callable[..., EchoNode]) -> None:
    node = start()
    honest = Honest(node)
    honest.more(5)

    async def attack() -> None:
        peer = await node.peer(node.authorise("hostile"), receive_buffer=4096)
        async with peer:
            give_up = time.monotonic() + 60
            with contextlib.suppress(OSError):
                while time.monotonic() < give_up:
                    await peer.send_message([b"4 1000000"])
                    await asyncio.sleep(0.02)
                pytest.fail("it was let do as it liked")

    asyncio.run(attack())
    stats = node.wait_for(lambda s: s["dropped"].get("slow"))
    assert stats["peak"] < 64 * MIB
    assert "does not read its replies" in node.log
    honest.more(10)
    honest.close()


@linux
def test_a_peer_that_stops_reading_is_dropped_in_time(start: Callable[..., EchoNode]) -> None:
    node = start(bounds={"stall_s": 1.0})
    honest = Honest(node)

    async def attack() -> None:
        peer = await node.peer(node.authorise("hostile"), receive_buffer=4096)
        async with peer:
            await peer.send_message([b"8 1000000"])  # within all bounds, but never read
            while not node.stats()["dropped"].get("slow"):
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(attack(), 60))
    honest.more(10)
    honest.close()


@linux
def test_a_flood_of_half_open_connections_keeps_nobody_out(
    start: Callable[..., EchoNode],
) -> None:
    node = start(files=1024)
    pair = node.authorise("honest")

    def ask() -> None:
        with zmq.Context() as ctx:
            client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
            client.rcvtimeo, client.sndtimeo = 5_000, 60_000
            for _ in range(12):  # a connection that is cut takes its messages along
                client.send(b"1 1000")
                with contextlib.suppress(zmq.Again):
                    client.recv()
                    break
            else:
                pytest.fail("nobody was served within a minute")
            client.close()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 4096:
        pytest.skip(f"a flood needs 2000 descriptors of its own; the limit is {hard}")
    flood = subprocess.Popen([sys.executable, "-c", FLOOD.format(node.address)], env=ENVIRONMENT)
    try:
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 2000)
        for _ in range(3):
            ask()
            assert flood.poll() is None, "the flood was over before anybody was served"
    finally:
        flood.kill()
        flood.wait()
    node.wait_for(lambda s: s["connections"] == 0)


@linux
def test_who_behaves_is_not_charged(start: Callable[..., EchoNode]) -> None:
    """After hundreds of messages, what is counted in agrees with what was delivered."""
    node = start()
    honest = Honest(node)
    honest.more(300)
    stats = node.stats()
    assert not stats["dropped"]
    assert stats["peak"] < 16 * MIB
    honest.close()
    node.wait_for(lambda s: s["connections"] == 0 and s["held"] == 0)
