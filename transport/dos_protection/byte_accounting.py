"""Byte accounting: the bytes that each connection makes libzmq hold.

Attacks: a message that never ends, messages faster than the program reads, results never read.
Counted: bytes received and not delivered, bytes sent and not acknowledged. libzmq keeps both and
limits neither; the kernel's counters (`tcp`) show them.
Done: the connection is dropped, and libzmq at once frees its memory for it.
"""

from __future__ import annotations

import collections
import functools
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transport.dos_protection.limits import ConnectionLimits, Reason

_FORGIVEN_PER_S = 256.0
# Heartbeats are received and never delivered: two a second of about 40 bytes. A patient attacker
# gains no more than this rate.
_SERVER_HANDSHAKE_BYTES = 280
# A server sends a greeting, WELCOME and READY, 301 bytes, to an admitted client, and 246 bytes to a
# refused one.
_HANDSHAKE_BYTES = 64 << 10  # either side of a handshake sends less than a kilobyte
_RATE_WINDOW_S = 3.0


@dataclass(slots=True, eq=False)
class Connection:
    """One TCP connection and its bytes, as of the last `count`.

    Attributes:
        end: duplicate of its descriptor. address: the peer's, without port.
        user: name of its key; empty before its first message. route: its routing id, likewise.
        authenticated: whether its handshake is finished.
        delivered: bytes since the last `count`. unacked: see `ConnectionLimits`.
        in_queue: bytes that the kernel has received and libzmq has not read.
        received, sent, acked: the kernel's counters.
    """

    fd: int
    address: str
    opened: float
    end: socket.socket | None = None
    user: str = ""
    route: bytes = b""
    authenticated: bool = False
    dropped: bool = False
    received: int = 0
    sent: int = 0
    acked: int = 0
    delivered: int = 0
    in_queue: int = 0
    unacked: int = 0
    _undelivered: float = 0.0  # with what is in the queue
    _counted: float = 0.0
    _progress: float = 0.0  # when it last acknowledged something, or had nothing to acknowledge
    _window: tuple[float, int, int] = (0.0, 0, 0)  # start, acked and unacked at its start
    _slow: bool = False

    def __post_init__(self) -> None:
        self._counted = self._progress = self.opened

    @property
    def undelivered(self) -> float:
        """See `ConnectionLimits`. TCP bounds the kernel's queue, and it is not this process's
        memory: with it, a node with many busy edges would seem to hold a hundred MB more."""
        return max(0.0, self._undelivered - self.in_queue)

    @property
    def held(self) -> float:
        return self.undelivered + self.unacked

    @property
    def party(self) -> str:
        """Whom to hold responsible: the user or, before the first message, the network."""
        return f"user {self.user}" if self.user else network(self.address)

    def hand_over(self, size: int, now: float) -> None:
        """`size` bytes were handed to libzmq for this connection."""
        if not self.unacked:
            self._progress = now
            self._window, self._slow = (now, self.acked, size), False
        self.unacked += size

    def count(self, received: int, acked: int, sent: int, now: float) -> None:
        """Take in the kernel's counters."""
        came = received - self.received
        forgiven = (now - self._counted) * _FORGIVEN_PER_S
        self._undelivered = max(0.0, self._undelivered + came - self.delivered - forgiven)
        if acked != self.acked:
            self.unacked = max(0, self.unacked - (acked - self.acked))
            self._progress = now
        if not self.unacked:
            self._progress = now
        self.received, self.acked, self.sent, self.delivered = received, acked, sent, 0
        self.authenticated = self.authenticated or sent >= _SERVER_HANDSHAKE_BYTES
        self._counted = now

    def stalled(self, limits: ConnectionLimits, now: float) -> bool:
        if self.unacked > limits.unacked:
            return True
        return self.unacked > 0 and now - self._progress > limits.stall_s

    def is_slow(self, least: float, now: float) -> bool:
        """Whether it acknowledged less than this rate in its last whole window, though more
        waited."""
        start, acked, waited = self._window
        if self.unacked and now - start >= _RATE_WINDOW_S:
            self._slow = self.acked - acked < min(waited, least * (now - start))
            self._window = now, self.acked, self.unacked
        return self._slow and self.unacked > 0


Excess = tuple[Connection, Reason, float]
"""A connection to drop, and the bytes that it holds."""


def too_many_bytes(
    connections: Iterable[Connection], limits: ConnectionLimits, now: float
) -> Iterator[Excess]:
    """Connections that hold too much."""
    within: list[Connection] = []
    for each in connections:
        if not each.authenticated:
            if each.received > _HANDSHAKE_BYTES:
                yield each, "endless", each.received
            continue
        if each.undelivered > limits.undelivered:
            yield each, "endless", each.undelivered
        elif each.stalled(limits, now):
            yield each, "slow", each.unacked
        else:
            within.append(each)
    yield from _slow_readers(within, limits, now)
    yield from _largest([each for each in within if not each.dropped], limits.total)


def _slow_readers(
    connections: list[Connection], limits: ConnectionLimits, now: float
) -> Iterator[Excess]:
    """Connections below the least rate, the largest first, until the rest holds little enough."""
    slow = [each for each in connections if each.is_slow(limits.least_rate, now)]
    held = sum(each.unacked for each in slow)
    for each in sorted(slow, key=lambda one: -one.unacked):
        if held <= limits.slow:
            return
        held -= each.unacked
        yield each, "slow", each.unacked


def _largest(connections: list[Connection], total: int) -> Iterator[Excess]:
    """The largest connections of the party that holds most, until the rest fits into `total`."""
    shares: collections.Counter[str] = collections.Counter()
    for each in connections:
        shares[each.party] += int(each.held)
    excess = shares.total() - total
    while excess > 0:
        party = shares.most_common(1)[0][0]
        largest = max((c for c in connections if c.party == party), key=lambda one: one.held)
        connections.remove(largest)
        shares[party] -= int(largest.held)
        excess -= int(largest.held)
        yield largest, "total", largest.held


@functools.lru_cache(4096)
def network(address: str) -> str:
    """The addresses that one party can have: an IPv4 address, an IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    mapped = parsed.ipv4_mapped
    return str(mapped or ipaddress.ip_network((int(parsed), 64), strict=False))
