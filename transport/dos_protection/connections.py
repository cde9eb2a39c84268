"""The connections of one socket, followed by their descriptors and kept within limits.

libzmq's monitor reports the descriptor of every connection. While a connection is followed, a
duplicate of its descriptor reads the kernel's counters and can end exactly this connection.
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import zmq

from transport.dos_protection import tcp
from transport.dos_protection.byte_accounting import Connection, too_many_bytes
from transport.dos_protection.connection_limits import Handshakes, too_many_connections
from transport.dos_protection.limits import ConnectionLimits, Reason
from transport.wire_size import frame_bytes

LET_IN_AT = "X-Since"
"""Property of every message: when its connection was let in (`time.monotonic`). The authenticator
sets it; a peer can't override it."""
_REFRESH_S = 0.002
_RATE_S = 1.0
_EXPLAINED: dict[Reason, str] = {
    "endless": "it sent {} without ending a message, or too fast to be read",
    "slow": "it does not read its replies, or too slowly; {} wait",
    "total": "all connections together hold too much, and its share is {}",
    "crowd": "there are too many connections, of all or of this one's",
    "revoked": "its key is no longer authorised",
    "banished": "its key is kept out for a while",
}


class Dropped(NamedTuple):
    """A connection that was dropped, and the bytes that it held."""

    connection: Connection
    reason: Reason
    bytes: int

    def __str__(self) -> str:
        user, address = self.connection.user, self.connection.address
        why = _EXPLAINED[self.reason].format(f"{self.bytes / 1e6:.1f} MB")
        return f"connection of {f'{user} at {address}' if user else address} dropped: {why}"


def pause_after(begun: float, least_s: float) -> float:
    """When to do again what began at `begun`, at the earliest: many connections take long to check,
    and may take a fifth of the time, or 0.1 s of pause at most."""
    now = time.monotonic()
    return now + max(least_s, min(0.1, 5 * (now - begun)))


class Connections:
    """Follows the connections of one socket, from its monitor's events to `close`. Not thread-safe.

    `peer_events.follow` and `link.watch` feed it the monitor's events. The receiver of messages
    calls `received`, the sender calls `sent`.

    Attributes:
        limits: may be replaced at any time.
        metered: whether the kernel counts bytes.
        read_rate: bytes per second that all peers together acknowledged lately.
        read_events: reads the monitor's events that wait. Set by `peer_events.follow`.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.metered = tcp.AVAILABLE
        self.read_events: Callable[[], None] = lambda: None
        self.read_rate = 0.0
        self._rate_since, self._acked, self._idle = -math.inf, 0, False
        self._open: dict[int, Connection] = {}
        self._by_route: dict[bytes, Connection] = {}
        self._handshakes = Handshakes()
        self._dropped: list[Dropped] = []  # since the last `check`
        self._port = 0
        self._refresh_at = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def users(self) -> set[str]:
        """Users of the open connections that sent a message."""
        return {each.user for each in self._by_route.values()}

    def unread(self, user: str | None = None) -> int:
        """Bytes sent to a user, or to all, and not acknowledged; 0 where nothing is metered."""
        every = self._by_route.values()
        return sum(each.unacked for each in every if user is None or each.user == user)

    # Events from the monitor

    def opened(self, fd: int, now: float) -> bool:
        """A connection was made (ACCEPTED, CONNECTED). Returns False if it was dropped at once, for
        want of descriptors.

        libzmq may have closed the descriptor already, and another connection may have its number.
        Then an event that ends this entry follows.
        """
        self.closed(fd)
        try:
            end = tcp.duplicate(fd)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return True  # it has ended already
            with contextlib.suppress(OSError):
                tcp.reset_borrowed(fd, self._port)
            return False
        address = ""
        with contextlib.suppress(OSError, IndexError, TypeError):
            address = str(end.getpeername()[0])
            self._port = self._port or end.getsockname()[1]
        self._add(Connection(fd, address, now, end), now)
        return True

    def _add(self, connection: Connection, now: float) -> None:
        self._open[connection.fd] = connection
        self._handshakes.add(connection)
        while surplus := self._handshakes.surplus(connection.address, self.limits):
            self._count(surplus, now)
            self._handshakes.finish(surplus)
            if not surplus.authenticated:
                self._drop(surplus, "crowd", surplus.received)

    def closed(self, fd: int) -> Connection | None:
        """A connection has ended. Returns it with its last counters, None if it was not known."""
        connection = self._open.pop(fd, None)
        if connection is None:
            return None
        self._count(connection, time.monotonic())
        if connection.end is not None:
            connection.end.close()
        connection.authenticated = connection.authenticated or not self.metered
        self._handshakes.finish(connection)
        if self._by_route.get(connection.route) is connection:
            del self._by_route[connection.route]
        return connection

    def close(self) -> None:
        """Forget all connections: their socket closes or disconnects."""
        for fd in list(self._open):
            self.closed(fd)

    # Calls from the program

    def received(self, frame: zmq.Frame, route: bytes = b"", *, banned: bool = False) -> None:
        """A message was received with ``copy=False``; a ROUTER got it from the peer `route`.

        Args:
            banned: its user is banned: drop the connection.
        """
        connection = self._sender(frame, route)
        if connection is None:
            return
        if banned:
            self._drop(connection, "banished")
        else:
            connection.delivered += frame_bytes(len(frame))

    def _sender(self, frame: zmq.Frame, route: bytes) -> Connection | None:
        """The connection that a message came by; None if it has ended or is none of TCP."""
        try:
            fd = int(frame.get(zmq.SRCFD))
        except (zmq.ZMQError, TypeError, ValueError):
            return None
        connection = self._open.get(fd)
        if connection is None or connection.route != route:
            # It may be the first message of a connection whose event waits to be read, or the last
            # one of a connection whose number is another one's now. The authenticator reads all
            # events before it lets a connection in, so that its entry is older than LET_IN_AT, and
            # the entry of the next connection with its number is newer.
            self.read_events()
            connection = self._open.get(fd)
            if connection is None or self._let_in_before(connection, frame):
                return None
            connection.user, connection.route = str(frame.get("User-Id")), route
            self._by_route[route] = connection
        if not connection.authenticated:
            connection.authenticated = True
            self._handshakes.finish(connection)
        return connection

    @staticmethod
    def _let_in_before(connection: Connection, frame: zmq.Frame) -> bool:
        with contextlib.suppress(zmq.ZMQError):  # no authenticator has set it
            return float(frame.get(LET_IN_AT)) < connection.opened
        return False

    def sent(self, size: int, now: float, *, route: bytes) -> None:
        """A message of so many bytes was handed to the socket for this peer."""
        connection = self._by_route.get(route)
        if self.metered and connection:
            connection.hand_over(frame_bytes(size), now)

    def drop(self, users: Collection[str], reason: Reason) -> None:
        """Drop all connections of these users. The next `check` returns them."""
        for each in self._open.values():
            if each.user in users:
                self._drop(each, reason, each.held)

    def check(self, now: float) -> list[Dropped]:
        """Count bytes, drop the connections that break a limit, and return all that were dropped
        since the last call."""
        self._count_all(now)
        self._measure_rate(now)
        self._handshakes.finish_old(now)
        live = [each for each in self._open.values() if not each.dropped]
        for each, reason, size in too_many_bytes(live, self.limits, now):
            self._drop(each, reason, size)
        live = [each for each in live if not each.dropped]
        for each in too_many_connections(live, self.limits):
            self._drop(each, "crowd")
        dropped, self._dropped = self._dropped, []
        return dropped

    def refresh(self) -> bool:
        """Count bytes now. Returns False if that was done a moment ago."""
        begun = time.monotonic()
        if not self.metered or begun < self._refresh_at:
            return False
        self._count_all(begun)
        self._refresh_at = pause_after(begun, _REFRESH_S)
        return True

    def _count_all(self, now: float) -> None:
        for each in self._open.values():
            self._count(each, now)

    def _count(self, connection: Connection, now: float) -> None:
        """Read the kernel's counters of a connection."""
        if connection.end is None or not self.metered:
            return
        with contextlib.suppress(OSError):
            counters = tcp.counters(connection.end)
            if counters is None:
                self.metered = False
                return
            self._acked += counters[1] - connection.acked
            connection.count(*counters, now)
            connection.in_queue = tcp.in_queue(connection.end)
            if connection.authenticated:
                self._handshakes.finish(connection)

    def _measure_rate(self, now: float) -> None:
        self._idle = self._idle or not self.unread()
        seconds = now - self._rate_since
        if seconds >= _RATE_S:
            rate = self._acked / seconds
            # If there was nothing to read for a while, the peers might have read more.
            self.read_rate = max(self.read_rate, rate) if self._idle else rate
            self._rate_since, self._acked, self._idle = now, 0, False

    def _drop(self, connection: Connection, reason: Reason, held: float = 0) -> None:
        """The one place where connections are dropped."""
        if connection.dropped:
            return
        connection.dropped = True
        self._dropped.append(Dropped(connection, reason, int(held)))
        if connection.end is not None:
            with contextlib.suppress(OSError):  # it has ended already
                tcp.reset(connection.end)
