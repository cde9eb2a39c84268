"""Connections are followed by their descriptors."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from unconnected import LIMITS

from transport.dos_protection import Connections, MemoryWatch, tcp
from transport.dos_protection.connections import LET_IN_AT
from transport.wire_size import frame_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted by Linux's TCP_INFO")


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    """(server's end, client's end) of TCP connections to `port`, one of two ports."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]

        def make(port: int = 0) -> Pair:
            address = listeners[port].getsockname()
            client = stack.enter_context(socket.create_connection(address))
            served = stack.enter_context(listeners[port].accept()[0])
            for end in (client, served):
                end.settimeout(10)
            return served, client

        yield make


@pytest.fixture
def make() -> Iterator[Callable[..., Connections]]:
    """Connections with `LIMITS` and the given changes, closed after the test."""
    with contextlib.ExitStack() as stack:

        def made(**limits: Any) -> Connections:
            connections = Connections(dataclasses.replace(LIMITS, **limits))
            stack.callback(connections.close)
            return connections

        yield made


def gone(connections: Connections) -> list[int]:
    return [dropped.connection.fd for dropped in connections.check(0.0)]


def reasons(connections: Connections) -> dict[str, int]:
    return collections.Counter(dropped.reason for dropped in connections.check(0.0))


def routes(connections: Connections) -> dict[bytes, int]:
    return {route: each.fd for route, each in connections._by_route.items()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@linux
def test_bytes_are_those_that_the_kernel_counts(make: Any, pairs: Any) -> None:
    served, client = pairs()
    connections = make(undelivered=60_000, total=100_000)
    connections.opened(served.fileno(), 0.0)
    connection = connections._open[served.fileno()]
    assert connection.address == "127.0.0.1"
    served.sendall(bytes(300))  # the size of the server's part of a handshake
    client.sendall(bytes(50_000))
    while connection.received < 50_000:
        assert not connections.check(0.0)
    assert connection.authenticated
    assert connection.undelivered == 0, "all of it is in the kernel's queue"
    assert len(served.recv(50_000, socket.MSG_WAITALL)) == 50_000  # as libzmq does
    assert not connections.check(0.0)
    assert connection.undelivered == 50_000
    client.sendall(bytes(20_000))
    while connection.received < 70_000:
        assert not connections.check(0.0)
    served.recv(20_000, socket.MSG_WAITALL)
    assert [each.reason for each in connections.check(0.0)] == ["endless"]
    assert client.recv(300, socket.MSG_WAITALL) == bytes(300)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""  # shut down
    assert served.recv(1) == b""  # the owner notices too


@linux
def test_a_reused_number_is_another_connection(make: Any, pairs: Any) -> None:
    first, first_client = pairs()
    connections = make()
    before = descriptors()
    connections.opened(first.fileno(), 0.0)
    number = first.fileno()
    deliver(connections, number, b"first", "one")
    second, second_client = pairs()
    os.dup2(second.fileno(), number)  # closes it and gives its number to another connection
    connections.opened(number, 1.0)
    assert not routes(connections)
    assert first_client.recv(1) == b""  # the duplicate of the first is closed too
    second_client.sendall(bytes(500))
    while connections._open[number].received < 500:
        connections.check(1.0)
    connections.closed(number)
    assert len(connections) == 0
    assert descriptors() == before + 2


class Frame:
    """A frame of a message from this descriptor and user, admitted at this time."""

    def __init__(self, fd: int, user: str = "", since: float = 9.0) -> None:
        self._told = {zmq.SRCFD: fd, "User-Id": user, LET_IN_AT: str(since)}

    def __len__(self) -> int:
        return 100

    def get(self, option: Any) -> Any:
        return self._told[option]


def deliver(connections: Connections, fd: int, route: bytes, user: str, since: float = 9.0) -> None:
    connections.received(Frame(fd, user, since), route)  # type: ignore[arg-type]


@linux
def test_a_message_may_be_read_before_the_event_of_its_connection(make: Any, pairs: Any) -> None:
    first, _ = pairs()
    number = first.fileno()
    second, _ = pairs()
    connections = make()
    events = [lambda: connections.opened(number, 1.0)]
    connections.read_events = lambda: [event() for event in events] and events.clear()
    deliver(connections, number, b"first", "one", since=2.0)
    assert (connections.users(), routes(connections)) == ({"one"}, {b"first": number})
    os.dup2(second.fileno(), number)
    events += [lambda: connections.closed(number), lambda: connections.opened(number, 3.0)]
    deliver(connections, number, b"second", "another", since=4.0)
    assert (connections.users(), routes(connections)) == ({"another"}, {b"second": number})
    ended = connections.closed(number)
    assert (ended.user, ended.route) == ("another", b"second")


@linux
def test_a_late_message_is_not_charged_to_the_next_connection_of_the_number(
    make: Any, pairs: Any
) -> None:
    first, _ = pairs()
    number = first.fileno()
    connections = make()
    connections.opened(number, 1.0)
    deliver(connections, number, b"first", "one", since=2.0)
    connections.closed(number)
    deliver(connections, number, b"first", "one", since=2.0)
    assert not connections.users()
    connections.opened(number, 3.0)
    for route in (b"first", b"other"):
        deliver(connections, number, route, "one", since=2.0)
    connections.received(Frame(number, "one", since=2.0), b"other", banned=True)  # type: ignore[arg-type]
    assert not connections.users()
    assert not connections._open[number].dropped
    deliver(connections, number, b"second", "another", since=4.0)
    deliver(connections, number, b"first", "one", since=2.0)
    assert (connections.users(), routes(connections)) == ({"another"}, {b"second": number})
    assert connections._open[number].delivered == frame_bytes(100)


@linux
def test_a_connection_that_ended_before_its_event_was_read(make: Any, pairs: Any) -> None:
    first, _ = pairs()
    number = first.fileno()
    connections = make()
    first.close()
    assert connections.opened(number, 0.0)
    deliver(connections, number, b"first", "one", since=2.0)
    assert connections.closed(number) is None
    assert not routes(connections)


@linux
@pytest.mark.parametrize("now", ["nothing", "a pipe", "a file"])
def test_a_descriptor_that_is_no_connection_now_is_ignored(make: Any, pairs: Any, now: str) -> None:
    served, _ = pairs()
    number = served.fileno()
    read, write = os.pipe()
    if now == "nothing":
        served.close()
    else:
        os.dup2(read if now == "a pipe" else os.open(os.devnull, os.O_RDONLY), number)
    before = descriptors()
    connections = make()
    assert connections.opened(number, 0.0)
    assert len(connections) == 0
    assert not connections.check(0.0)
    assert descriptors() == before
    connections.closed(number)
    os.close(read)
    os.close(write)


@linux
def test_a_connection_does_not_end_with_its_predecessor(make: Any, pairs: Any) -> None:
    """ACCEPTED is read late: the number already belongs to another connection."""
    first, _ = pairs()
    number = first.fileno()
    second, second_client = pairs()
    os.dup2(second.fileno(), number)
    connections = make()
    connections.opened(number, 0.0)  # the event of the first, the descriptor of the second
    connections.closed(number)
    connections.opened(number, 0.0)
    connections.drop({""}, "revoked")  # it has sent no message yet
    assert reasons(connections) == {"revoked": 1}
    assert second_client.recv(1) == b""


@pytest.fixture
def no_descriptors(pairs: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which this process has no free descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextlib.contextmanager
    def short() -> Iterator[None]:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return short


@linux
def test_without_descriptors_new_connections_are_reset(
    make: Any, pairs: Any, no_descriptors: Any
) -> None:
    connections = make()
    first, _ = pairs()
    connections.opened(first.fileno(), 0.0)
    newcomer, client = pairs()
    with no_descriptors():
        kept = connections.opened(newcomer.fileno(), 0.0)
    assert not kept
    assert client.recv(1) == b""
    assert newcomer.fileno() > 0


@linux
def test_without_descriptors_a_connection_of_another_port_is_left_alone(
    make: Any, pairs: Any, no_descriptors: Any
) -> None:
    connections = make()
    first, _ = pairs()
    connections.opened(first.fileno(), 0.0)
    other, client = pairs(1)
    with no_descriptors():
        assert not connections.opened(other.fileno(), 0.0)
    other.sendall(b"x")
    assert client.recv(1) == b"x"


@linux
def test_a_dropped_connection_is_reset_and_leaves_the_kernel(make: Any, pairs: Any) -> None:
    served, client = pairs()
    connections = make()
    connections.opened(served.fileno(), 0.0)
    connections.drop({""}, "revoked")
    served.close()  # as libzmq does
    connections.close()
    closed = 7  # TCP_CLOSE. After FIN it would be TCP_CLOSE_WAIT, and FIN_WAIT2 at the other end.
    give_up = time.monotonic() + 10
    while (state := client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]) != closed:
        assert time.monotonic() < give_up, state
        time.sleep(0.01)


@linux
def test_an_old_kernel_reports_no_byte_counts(
    make: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_TCP_INFO_BYTES", 1000)  # more than any kernel returns
    served, _ = pairs()
    connections = make()
    connections.opened(served.fileno(), 0.0)
    assert not connections.check(0.0)
    assert not connections.metered
    assert not connections.refresh()
    assert connections.closed(served.fileno()).authenticated, "nothing is known of its handshake"


def test_without_byte_counts_connections_are_still_counted(make: Any, pairs: Any) -> None:
    connections = make(handshakes=20, connections=3)
    connections.metered = False
    ends = [pairs() for _ in range(5)]
    for served, _ in ends:
        connections.opened(served.fileno(), 0.0)
    connections.sent(10_000, 0.0, route=b"route")
    assert connections.unread() == 0
    assert reasons(connections) == {"crowd": 2}


@linux
def test_too_many_handshakes_drop_the_oldest_unfinished_one(make: Any, pairs: Any) -> None:
    connections = make(handshakes=4)
    ends = [pairs() for _ in range(5)]
    for served, _ in ends:
        if served is ends[1][0]:
            served.sendall(bytes(300))  # has finished, though no check has counted it yet
        connections.opened(served.fileno(), 0.0)
    assert gone(connections) == [ends[0][0].fileno(), ends[2][0].fileno()]
    for number in (0, 2):
        assert ends[number][1].recv(1) == b""
    assert not connections.check(0.0)


@linux
def test_only_a_banned_user_loses_its_connections(make: Any, pairs: Any) -> None:
    connections = make()
    ends = [pairs() for _ in range(4)]
    for number, (served, _) in enumerate(ends):
        connections.opened(served.fileno(), 0.0)
        if number < 3:
            deliver(connections, served.fileno(), b"%d" % number, "bad" if number < 2 else "good")
    connections.drop(["bad"], "banished")
    connections.drop(["bad"], "banished")
    assert gone(connections) == [ends[number][0].fileno() for number in (0, 1)]
    assert [client.recv(1) for _, client in ends[:2]] == [b"", b""]
    # The fourth connection had sent no message before.
    banned: Any = Frame(ends[3][0].fileno(), "bad")
    connections.received(banned, b"3", banned=True)
    assert ends[3][1].recv(1) == b""
    assert reasons(connections) == {"banished": 1}


def test_memory_watch_reports_each_rise_once() -> None:
    values = iter([10, 99, 101, 150, 90, None, 120])
    watch = MemoryWatch(100, lambda: next(values))
    assert [watch.breached() for _ in range(7)] == [None, None, 101, None, None, None, 120]
