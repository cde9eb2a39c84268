"""How much a connection, a party and all connections together may hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transport.messages import Limits
from transport.wire_size import SLOWEST_LINK, message_bytes

Reason = Literal["endless", "slow", "total", "crowd", "revoked", "banished"]
"""Why a connection was dropped. ``endless``: it sent more than may wait, without ending a message
or faster than the program reads, or too much in its handshake. ``slow``: it does not read what it
asked for. ``total``: all connections together held too much, and it held the most. ``crowd``: there
were too many connections or handshakes. ``revoked``: its key was revoked. ``banished``: its key is
banned because it broke a rule."""

_SLACK = 1 << 20
_HANDSHAKES = 8192  # at most: each takes up to 20 kB


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one socket's connections.

    Args:
        undelivered: bytes received from one connection and not delivered to the program.
        unacked: bytes sent to one connection and not acknowledged.
        total: both, of all connections together.
        stall_s: how long a connection may acknowledge nothing of what waits for it.
        slow: bytes that slow readers may hold together. More than this blocks other edges.
        least_rate: a connection that acknowledges fewer bytes per second is a slow reader.
        handshakes: unfinished handshakes; half as many from one address.
        connections: open connections.
        per_party: connections of one user; also of one address, before their first message. An edge
            needs one connection per process, and many edges may share an address.
    """

    undelivered: int
    unacked: int
    total: int
    slow: int
    stall_s: float = 10.0
    least_rate: float = SLOWEST_LINK / 4
    handshakes: int = 2048
    connections: int = 4096
    per_party: int = 64

    def lowered(
        self, total: int, connections: int, inbound: Limits, outbound: Limits
    ) -> ConnectionLimits:
        """Limits for a process with less memory: at most these, and room for a few of the largest
        messages."""
        return dataclasses.replace(
            self,
            undelivered=min(self.undelivered, max(3 * message_bytes(inbound), total // 2)),
            unacked=min(self.unacked, max(2 * message_bytes(outbound), total // 2)),
            total=min(self.total, total),
            slow=min(self.slow, max(2 * message_bytes(outbound), total // 4)),
            handshakes=min(self.handshakes, max(2, connections // 2)),
            connections=min(self.connections, connections),
        )


def connection_limits(
    inbound: Limits,
    outbound: Limits,
    *,
    backlog: int,
    total: int = 1 << 30,
    files: int | None = None,
    results: int = 4,
) -> ConnectionLimits:
    """Limits that no honest peer reaches.

    Args:
        inbound: limits of received messages. outbound: of sent messages.
        backlog: how many of the largest messages may wait in libzmq while one more arrives.
        total: bytes of all connections together; raised if a few of the largest messages need more.
        files: most descriptors this process may have (a connection takes two); None: enough.
        results: how many of the largest messages may be on their way to one peer, up to half of
            `total`.
    """
    largest_in, largest_out = message_bytes(inbound), message_bytes(outbound)
    total = max(total, 3 * largest_in + 4 * largest_out + _SLACK)
    spare = 4096 if files is None else max(16, (files - min(128, files // 4)) // 2)
    return ConnectionLimits(
        undelivered=(backlog + 1) * largest_in + _SLACK,
        unacked=max(32 << 20, 4 * largest_out, min(results * largest_out, total // 2)),
        total=total,
        # What is on its way to all edges is held down to this when they read slowly
        # (cloud_node/backpressure.py), so slow readers must not fill it.
        slow=min(total // 4, max(2 * largest_out, 32 << 20)),
        handshakes=min(_HANDSHAKES, spare // 2),
        connections=spare,
    )
