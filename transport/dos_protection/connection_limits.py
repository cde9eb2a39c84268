"""Connection limits: how many connections and unfinished handshakes there may be.

Attacks: half-open connections by the thousand, more connections than the process has descriptors.
Counted: unfinished handshakes, of all and of each address; connections, of all and of each party.
Done: the oldest handshake is dropped for a new one; a party above its limit loses its oldest
connection. Above the limit for all, handshakes go first, then connections that sent no message.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator

from transport.dos_protection.byte_accounting import Connection, network
from transport.dos_protection.limits import ConnectionLimits

_HANDSHAKE_S = 4.0  # libzmq ends a handshake that takes longer than HANDSHAKE_IVL, 3 s


class Handshakes:
    """Unfinished handshakes, the oldest first: all, and by address."""

    def __init__(self) -> None:
        self._all: dict[Connection, None] = {}
        self._of: dict[str, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Connection) -> None:
        self._all[connection] = None
        self._of.setdefault(network(connection.address), {})[connection] = None

    def finish(self, connection: Connection) -> None:
        """It is over, in whichever way. Does nothing the second time."""
        if connection in self._all:
            del self._all[connection]
            party = network(connection.address)
            del self._of[party][connection]
            if not self._of[party]:
                del self._of[party]

    def finish_old(self, now: float) -> None:
        """Those that last longer than libzmq allows have succeeded."""
        while self._all and now - (oldest := next(iter(self._all))).opened > _HANDSHAKE_S:
            oldest.authenticated = True
            self.finish(oldest)

    def surplus(self, address: str, limits: ConnectionLimits) -> Connection | None:
        """The handshake to drop after a connection from this address, if there are too many."""
        party = self._of.get(network(address), {})
        if len(party) > max(1, limits.handshakes // 2):
            return next(iter(party))
        if len(self._all) > limits.handshakes:
            return next(iter(self._all))
        return None


def too_many_connections(
    connections: Collection[Connection], limits: ConnectionLimits
) -> Iterator[Connection]:
    """Connections to drop, the oldest of the largest party first."""
    # Counted from the newest: the largest party reaches the highest rank.
    rank: dict[Connection, int] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for each in sorted(connections, key=lambda one: -one.opened):
        sizes[each.party] += each.authenticated
        rank[each] = sizes[each.party]
    surplus = [each for each in rank if each.authenticated and rank[each] > limits.per_party]
    yield from sorted(surplus, key=lambda one: one.opened)
    excess = len(connections) - len(surplus) - limits.connections
    if excess > 0:
        left = rank.keys() - set(surplus)
        order = sorted(
            left, key=lambda one: (one.authenticated, bool(one.user), -rank[one], one.opened)
        )
        yield from order[:excess]
