"""Connections without sockets. The test supplies the kernel's counters."""

from __future__ import annotations

from typing import Any

from transport.dos_protection import ConnectionLimits, Connections
from transport.dos_protection.byte_accounting import Connection

LIMITS = ConnectionLimits(
    undelivered=1000,
    unacked=1000,
    total=10_000,
    slow=2_500,
    stall_s=10,
    handshakes=3,
    connections=5,
)


class Unconnected(Connections):
    """`Connections` with kernel counters chosen by the test.

    Args:
        number: of connections, 1 to `number`, that have sent a message, each of another user.
        limits: changes to `LIMITS`.
    """

    def __init__(self, number: int = 0, **limits: Any) -> None:
        super().__init__(ConnectionLimits(**{**vars(LIMITS), **limits}))
        for fd in range(1, number + 1):
            self.add(fd, f"10.0.0.{fd}")
            self.speak(fd, f"user{fd}")

    def add(self, fd: int, address: str, now: float = 0.0) -> None:
        self.closed(fd)
        self._add(Connection(fd, address, now), now)

    def speak(self, fd: int, user: str = "", route: bytes = b"") -> None:
        """Record the first message of a connection."""
        connection = self._open[fd]
        connection.user, connection.route = user, route or b"%d" % fd
        connection.authenticated = True
        self._by_route[connection.route] = connection
        self._handshakes.finish(connection)

    def count(
        self, fd: int, now: float, *, received: int = 0, acked: int = 0, sent: int = 0
    ) -> None:
        self._acked += acked - self._open[fd].acked
        self._open[fd].count(received, acked, sent, now)

    def deliver(self, fd: int, size: int) -> None:
        self._open[fd].delivered += size

    def hand_over(self, fd: int, size: int, now: float) -> None:
        self._open[fd].hand_over(size, now)

    def told(self, now: float = 1.0) -> list[tuple[int, str]]:
        """The drops of the next check: descriptors and reasons."""
        return [(dropped.connection.fd, dropped.reason) for dropped in self.check(now)]
