"""The arithmetic of the bytes that a connection may make a process hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unconnected import LIMITS, Unconnected

from transport.dos_protection import Connections, connection_limits
from transport.dos_protection.byte_accounting import Connection, network
from transport.messages import Limits
from transport.wire_size import frame_bytes, message_bytes

MIB = 1 << 20


def test_delivered_bytes_do_not_count_as_held() -> None:
    peers = Unconnected(1)
    for turn in range(1, 100):
        peers.deliver(1, 900)
        peers.count(1, turn / 1000, received=900 * turn)
        assert not peers.told()
    peers.count(1, 0.1, received=900 * 99 + 900)
    assert not peers.told()
    peers.count(1, 0.1, received=900 * 99 + 1200)
    assert peers.told() == [(1, "endless")]
    assert not peers.told()  # reported once


def test_heartbeats_do_not_count_and_silence_gives_no_credit() -> None:
    peers = Unconnected(1)
    for second in range(1, 100_000, 7):
        peers.count(1, float(second), received=90 * second)
        assert not peers.told(float(second))
    peers.count(1, 100_000.0, received=90 * 100_000 + 2000)
    assert peers.told(100_000.0) == [(1, "endless")]


def test_hours_of_silence_do_not_excuse_an_attack() -> None:
    peers = Unconnected(1)
    peers.count(1, 86_400.0)
    peers.count(1, 86_400.1, received=2000)
    assert peers.told(86_400.1) == [(1, "endless")]


def test_a_peer_that_reads_too_slowly_is_dropped() -> None:
    peers = Unconnected(2)
    for fd in (1, 2):
        peers.hand_over(fd, 900, 0.0)
        peers.count(fd, 0.0, acked=300)
    assert not peers.told()
    peers.hand_over(1, 1000, 0.0)
    peers.hand_over(2, 400, 0.0)
    assert peers.told() == [(1, "slow")]


def test_unread_bytes_are_known_per_user_and_in_total() -> None:
    peers = Unconnected(3)
    peers.speak(3, "user1")  # a second connection of the same user
    for fd in (1, 2, 3):
        peers.hand_over(fd, 500, 0.0)
    assert [peers.unread(user) for user in (None, "user1", "user2")] == [1500, 1000, 500]
    peers.count(1, 0.1, acked=300)
    peers.count(2, 0.1, acked=600)
    assert [peers.unread(user) for user in (None, "user1", "user2")] == [700, 700, 0]
    peers.add(1, "10.0.0.9", 0.2)  # the number now belongs to another connection
    peers.closed(3)
    assert peers.unread() == peers.unread("user1") == 0


@pytest.mark.parametrize(("slow", "gone"), [(300, [(1, "slow")]), (1000, [])])
def test_a_slow_reader_is_dropped_only_if_slow_readers_hold_much(
    slow: int, gone: list[tuple[int, str]]
) -> None:
    peers = Unconnected(2, slow=slow, least_rate=10)
    found, acked = [], [0, 0]
    for second in range(30):
        for fd, reads in ((1, 9), (2, 11)):  # bytes per second
            connection = peers._open.get(fd)
            if connection is None:
                continue
            if connection.unacked < 400:
                peers.hand_over(fd, 200, second)
            acked[fd - 1] += reads
            peers.count(fd, second, acked=acked[fd - 1])
        found += peers.told(second)
        for fd, _ in found:
            peers.closed(fd)
    assert found == gone


def test_of_slow_readers_the_largest_go_until_the_rest_holds_little() -> None:
    peers = Unconnected(4, slow=400, least_rate=100)
    for fd in (1, 2, 3):
        peers.hand_over(fd, 300 + fd, 0.0)
    assert not peers.told(2.9)
    assert peers.told(3.0) == [(3, "slow"), (2, "slow")]
    assert not peers.told(5.9)  # 301 bytes are little
    peers.hand_over(4, 500, 5.9)
    assert not peers.told(8.8)  # so far only the first is known to be slow
    assert peers.told(8.9) == [(4, "slow")]


def test_slow_readers_count_together_whenever_their_windows_end() -> None:
    peers = Unconnected(3, slow=400, least_rate=100)
    for fd in (1, 2, 3):
        peers.hand_over(fd, 150, fd / 10)
    assert not peers.told(3.1)
    assert not peers.told(3.2)
    assert peers.told(3.3) == [(1, "slow")]


def test_a_reader_that_recovers_is_slow_no_more() -> None:
    peers = Unconnected(1, slow=300, least_rate=100)
    peers.hand_over(1, 290, 0.0)
    assert not peers.told(3.0)
    peers.count(1, 5.0, acked=290)
    peers.hand_over(1, 310, 5.0)
    assert not peers.told(7.9)
    assert peers.told(8.0) == [(1, "slow")]


def test_a_peer_that_reads_everything_is_never_slow() -> None:
    peers = Unconnected(2, total=1000, slow=0, least_rate=100)
    peers.hand_over(2, 900, 0.0)  # many bytes wait, but for the other peer, which reads fast enough
    peers.hand_over(1, 2, 0.0)
    for tenth in range(1, 100):
        for fd, size in ((1, 2), (2, 20)):
            peers.hand_over(fd, size, tenth / 10)  # before the last one is acknowledged
            peers.count(fd, tenth / 10, acked=size * tenth)
        assert not peers.told(tenth / 10)


def test_the_reading_rate_counts_only_while_bytes_wait() -> None:
    peers = Unconnected(2, total=1000, slow=0, least_rate=100)
    peers.hand_over(2, 900, 0.0)  # many bytes wait, but for the other peer
    acked = 0
    for second in range(0, 60, 6):
        peers.hand_over(1, 20, second)
        assert not peers.told(second)
        acked += 20
        peers.count(1, second + 1, acked=acked)
        peers.count(2, second + 5, acked=600 * (second + 6))
        peers.hand_over(2, 900, second + 5)
        assert not peers.told(second + 5)


def test_a_reader_that_stops_completely_is_dropped() -> None:
    peers = Unconnected(3)  # the third gets no bytes, and its counters are never read
    for second in range(30):
        peers.hand_over(1, 10, second)
        peers.count(1, second, acked=300 + 10 * second)  # reads the bytes of the second before
        peers.count(2, second, acked=300)  # gets no bytes
        assert not peers.told(second)
    peers.hand_over(2, 10, 30)
    peers.count(2, 39, acked=300)
    assert not peers.told(39)
    peers.count(2, 41, acked=300)
    peers.count(1, 41, acked=700)
    assert peers.told(41) == [(2, "slow")]


def test_more_messages_do_not_excuse_a_reader_that_has_stopped() -> None:
    peers = Unconnected(1)
    for second in range(11):
        peers.hand_over(1, 10, second)
        peers.count(1, second)
        assert not peers.told(second)
    assert peers.told(10.1) == [(1, "slow")]


def test_beyond_the_total_the_party_that_holds_most_is_dropped() -> None:
    peers = Unconnected(4, total=2500)
    for fd, size in enumerate((700, 650, 640, 600), start=1):
        peers._open[fd].user = "greedy" if fd > 1 else "modest"
        peers.count(fd, 0.0, received=size)
    assert peers.told() == [(2, "total")]
    assert not peers.told()


def test_the_total_reading_rate() -> None:
    peers = Unconnected(2)
    peers.check(0.0)
    assert peers.read_rate == 0
    for fd in (1, 2):
        peers.hand_over(fd, 900, 0.0)
    for tenth in range(1, 11):
        peers.count(1, tenth / 10, acked=30 * tenth)
        peers.count(2, tenth / 10, acked=20 * tenth)
        peers.check(tenth / 10)
    assert peers.read_rate == pytest.approx(500)
    peers.count(1, 2.0, acked=400)
    peers.check(2.0)
    assert peers.read_rate == pytest.approx(100), "it has become slower"
    for fd in (1, 2):
        peers.count(fd, 2.1, acked=900)
    peers.check(2.1)
    peers.check(100.0)
    assert peers.read_rate == pytest.approx(100), "with nothing to read they are no slower"


def test_a_handshake_with_too_many_bytes_is_dropped() -> None:
    peers = Unconnected(undelivered=MIB, total=MIB)
    peers.add(1, "10.0.0.1")
    peers.add(2, "10.0.0.2")
    peers.count(1, 0.1, received=70_000, sent=64)
    peers.count(2, 0.1, received=70_000, sent=300)  # had finished its handshake
    assert peers.told() == [(1, "endless")]
    assert not peers.told()


def test_the_reason_of_a_drop_has_its_size() -> None:
    peers = Unconnected(2)
    peers.count(1, 0.0, received=3_000_000)
    peers.hand_over(2, 2_000_000, 0.0)
    endless, slow = map(str, peers.check(0.0))
    assert endless == (
        "connection of user1 at 10.0.0.1 dropped: it sent 3.0 MB without ending a message, or too "
        "fast to be read"
    )
    assert "it does not read its replies, or too slowly; 2.0 MB wait" in slow


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
def test_an_ipv6_network_counts_as_one_party(address: str, party: str) -> None:
    assert network(address) == party


@settings(max_examples=60)
@given(st.data())
def test_an_honest_peer_breaks_no_limit(data: st.DataObject) -> None:
    """Messages up to the largest size, as many waiting as the backlog allows, read at any speed."""
    limits, backlog = Limits(2, 9000), 4
    peers = Connections(connection_limits(limits, limits, backlog=backlog))
    connection = Connection(1, "10.0.0.1", 0.0, user="edge", authenticated=True)
    peers._add(connection, 0.0)
    largest, received, now = message_bytes(limits), 0, 0.0
    waiting: list[int] = []
    for _ in range(data.draw(st.integers(1, 60))):
        pause = data.draw(st.floats(0, 2))
        now += pause
        received += int(pause * 90)  # heartbeats
        size = data.draw(st.integers(1, largest))
        partial = data.draw(st.integers(0, size))
        connection.count(received + partial, 0, 0, now)
        assert not peers.check(now)
        received += size
        waiting.append(size)
        while len(waiting) > backlog or (waiting and data.draw(st.booleans())):
            connection.delivered += waiting.pop(0)
        connection.count(received, 0, 0, now)
        assert not peers.check(now)


def test_limits_leave_descriptors_for_other_uses() -> None:
    limits = Limits(2, 2 * MIB)
    few = connection_limits(limits, limits, backlog=8, files=1024)
    assert 2 * few.connections < 1024 - 100
    assert few.handshakes < few.connections
    assert connection_limits(limits, limits, backlog=8, files=20).connections >= 1
    assert few.undelivered > 9 * 2 * MIB


def test_lowered_limits_still_allow_a_few_messages_and_are_never_raised() -> None:
    small, large = Limits(2, MIB), Limits(2, 4 * MIB)
    wide = connection_limits(small, large, backlog=8, files=1024)
    tight = wide.lowered(1, 3, small, large)
    assert tight.undelivered == 3 * message_bytes(small)
    assert tight.unacked == 2 * message_bytes(large)
    assert (tight.total, tight.handshakes, tight.connections) == (1, 2, 3)
    assert wide.lowered(1 << 40, 1 << 20, small, large) == wide


def test_sizes_equal_those_on_the_wire() -> None:
    # https://rfc.zeromq.org/spec/26/: a MESSAGE command of 8 + 8 + 16 + 1 bytes around the payload.
    assert [frame_bytes(size) for size in (0, 222, 223)] == [35, 257, 265]
    assert LIMITS.per_party == 64
