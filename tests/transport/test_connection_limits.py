"""Limits on the number of connections and unfinished handshakes."""

from __future__ import annotations

from unconnected import Unconnected


def opening(peers: Unconnected, fd: int, address: str, now: float = 0.0) -> list[int]:
    """The handshakes that are dropped because of this one."""
    before = {each for each, connection in peers._open.items() if connection.dropped}
    peers.add(fd, address, now)
    return [each for each, one in peers._open.items() if one.dropped and each not in before]


def test_too_many_handshakes_of_one_address_drop_its_oldest() -> None:
    peers = Unconnected(handshakes=6, connections=100)
    assert [opening(peers, fd, "2001:db8::1") for fd in range(3)] == [[]] * 3
    assert opening(peers, 10, "10.0.0.1") == []
    assert opening(peers, 3, "2001:db8::2") == [0], "a /64 is one address"
    peers.count(1, 1.0, sent=300)  # has finished, as the check before the drop finds out
    peers.speak(2, "user")  # this one has finished too
    peers.closed(3)
    assert [opening(peers, fd, "2001:db8::1") for fd in range(4, 8)] == [[], [], [], [4]]
    assert opening(peers, 11, "10.0.0.1") == []


def test_too_many_handshakes_in_total_drop_the_oldest() -> None:
    peers = Unconnected(handshakes=6, connections=100)
    found = [opening(peers, fd, f"10.0.0.{fd // 2}") for fd in range(10)]
    assert found == [[]] * 6 + [[0], [1], [2], [3]]
    assert peers.told(3.9) == [(fd, "crowd") for fd in range(4)]
    assert len(peers._handshakes) == 6
    peers.check(4.1)  # libzmq has ended the failed handshakes, so the others have succeeded
    assert not len(peers._handshakes)
    assert peers._open[9].authenticated
    assert [opening(peers, fd, f"10.0.0.{fd}", 60.0) for fd in range(10, 16)] == [[]] * 6


def test_too_many_connections_drop_silent_ones_first_and_then_the_largest_party() -> None:
    peers = Unconnected(handshakes=100)
    for fd in range(1, 8):
        peers.add(fd, "10.0.0.1", fd / 10)
        peers.speak(fd, "" if fd == 5 else "many" if fd > 2 else f"one{fd}")
    assert peers.told() == [(5, "crowd"), (3, "crowd")]
    peers.add(8, "10.0.0.9", 1.0)
    assert peers.told() == [(8, "crowd")], "a handshake is dropped first"
    for fd in (3, 4, 5):
        peers.closed(fd)
    peers.add(9, "10.0.0.9", 1.0)
    peers.count(9, 1.0, sent=300)  # authenticated, and silent
    peers.closed(8)
    assert not peers.told()
    peers.add(10, "10.0.0.9", 2.0)
    assert peers.told(2.0) == [(10, "crowd")], "a handshake is dropped before a silent connection"


def test_too_many_connections_of_one_party_drop_its_oldest() -> None:
    peers = Unconnected(handshakes=100, connections=100, per_party=3)
    for fd in range(1, 8):
        peers.add(fd, f"10.0.0.{fd}", fd / 10)
        peers.speak(fd, "many" if fd != 4 else "other")
    for fd in range(11, 17):  # authenticated, and silent
        peers.add(fd, "10.6.6.6" if fd != 13 else "10.0.0.1", fd / 10)
        peers.count(fd, 2.0, sent=300)
    for fd in range(21, 27):  # unfinished handshakes have their own limits
        peers.add(fd, "10.6.6.6", fd / 10)
    assert peers.told(3.0) == [(fd, "crowd") for fd in (1, 2, 3, 11, 12)]
    assert not peers.told(3.0)
    peers.closed(7)  # its place is free again
    peers.add(7, "10.0.0.9", 3.0)
    peers.speak(7, "many")
    assert not peers.told(3.0)
