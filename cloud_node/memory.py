"""How much the front process may hold under the memory limits that it runs under.

A `malloc` that fails inside libzmq ends the process. So `divide` splits the room under each limit
among everything that peers can fill: queue, libzmq, connections. `Memory` repeats that, since
limits may change. Import this before anything large: it needs no numpy.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass, replace

from edge_common.errors import ConfigError
from edge_common.memory_limits import Limit, MemoryLimits
from edge_common.settings import size_text

log = logging.getLogger(__name__)

# Bytes that may arrive between two checks of the connections: 20 ms at 1.6 GB/s, faster than one
# thread decrypts.
_OVERSHOOT = 32 << 20
_SLACK = 16 << 20  # a thread's stack, and what Python takes now and then
_COPIES = 3  # of a frame under encryption: incoming, outgoing and one in between
_CONNECTIONS = 4
_CONNECTION = 20 << 10  # of libzmq and this process, also during a handshake
# Memory of the front before it has read its configuration, and of the libraries it maps.
_IMPORTS, _LIBRARIES = 64 << 20, 96 << 20
_THREADS = 8  # of libzmq and pyzmq; the stacks of threads that end are kept


@dataclass(frozen=True)
class Budget:
    """The most that peers may fill.

    Args:
        queue: bytes that wait for a worker.
        transit: bytes in libzmq, both ways.
        connections: open connections.
    """

    queue: int
    transit: int
    connections: int


@dataclass(frozen=True)
class Needs:
    """The memory requirements of a bundle, in bytes.

    Args:
        request, result: the largest, as they travel.
        batches: requests and results that are being computed.
        shared: memory shared with workers.
    """

    request: int
    result: int
    batches: int
    shared: int = 0

    @property
    def least(self) -> Budget:
        """The least budget of a working node: two requests wait, one arrives while two are read,
        and two results leave."""
        transit = 3 * self.request + 2 * self.result + (1 << 20)
        return Budget(2 * (self.request + 4096), transit, _CONNECTIONS)

    def fixed(self, limit: Limit) -> int:
        """Bytes that no `Budget` includes."""
        shared = self.shared if limit.shared else 0
        return self.batches + shared + _COPIES * max(self.request, self.result)

    def each(self, limit: Limit) -> int:
        """Bytes of one connection. libzmq allocates a message when a peer announces it."""
        return self.request if limit.promised else _CONNECTION


class TooLittle(ConfigError):
    """The memory limit has no room for a few of the largest requests."""


def divide(limit: Limit, used: int, wanted: Budget, needs: Needs) -> Budget:
    """The largest part of `wanted` that fits under a limit.

    Args:
        limit: the limit. used: bytes of it that the idle process takes.

    Raises:
        TooLittle: not even `Needs.least` fits; the message says how much is enough.
    """
    room, each = limit.most - used, needs.each(limit)
    least = _smaller(wanted, needs.least)
    # An eighth is left for fragmentation.
    content = least.queue + least.transit + least.connections * each
    enough = needs.fixed(limit) + content * 8 // 7 + 1
    left = (room - _reserve(room) - needs.fixed(limit)) * 7 // 8
    if left < content:
        least_limit = used + min(2 * enough, enough + _OVERSHOOT + _SLACK)
        raise TooLittle(
            f"{limit.name} is {size_text(_down(limit.most))}, of which {size_text(_up(used))} are "
            f"in use before any request; expected at least {size_text(_up(least_limit))}, for two "
            f"requests with all windows of an image to wait and {least.connections} connections",
            mend=f"{limit.raise_}, or serve a smaller model",
        )
    both = min(
        wanted.queue + wanted.transit,
        max(
            least.queue + least.transit,
            left - min(wanted.connections * each, max(least.connections * each, left // 4)),
        ),
    )
    # Libzmq gets three quarters: without room there an edge loses its connection, without room in
    # the queue a request is only refused.
    transit = min(wanted.transit, max(least.transit, both * 3 // 4))
    transit = min(transit, both - least.queue)
    queue = min(wanted.queue, both - transit)
    transit = min(wanted.transit, both - queue)
    return Budget(queue, transit, min(wanted.connections, (left - both) // each))


def _reserve(room: int) -> int:
    """The part of so much room that is left free. A node with little room has small messages, and
    little arrives between two checks."""
    return min(_OVERSHOOT + _SLACK, max(0, room) // 2)


def _smaller(one: Budget, other: Budget) -> Budget:
    return Budget(
        min(one.queue, other.queue),
        min(one.transit, other.transit),
        min(one.connections, other.connections),
    )


def _up(size: int) -> int:
    return -(-size // (1 << 20)) * (1 << 20)


def check_room(size: int = _IMPORTS) -> None:
    """Check that `size` more bytes fit, by default the libraries that are imported next. Otherwise
    they would fail with unclear errors or a signal.

    Raises:
        TooLittle: they don't; the message says how much is enough, and how to raise the limit.
    """
    limits = MemoryLimits(group="")
    try:
        for limit in limits.own():
            # Only RLIMIT_AS counts mapped files.
            files = _LIBRARIES if limit.name == "RLIMIT_AS" and size == _IMPORTS else 0
            least = limit.used + size + files
            if limit.most < least:
                raise TooLittle(
                    f"{limit.name} is {size_text(_down(limit.most))}, expected at least "
                    f"{size_text(_up(least))} to start with, and more to serve",
                    mend=limit.raise_,
                )
    finally:
        limits.close()


def check_threads() -> None:
    """`check_room` for the threads of a node's sockets."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    check_room(_THREADS * (stack if stack != resource.RLIM_INFINITY else 8 << 20) + _SLACK)


class Memory:
    """Follows the memory limits of a node. Make it when the node is warm and idle.

    Args:
        wanted: the budget where there is enough room.
        needs: of the bundle.
        limits: to read.

    Attributes:
        budget: the budget now.
    """

    def __init__(self, wanted: Budget, needs: Needs, limits: MemoryLimits | None = None) -> None:
        self.budget = wanted
        self._wanted, self._needs = wanted, needs
        self._limits = limits or MemoryLimits()
        self._found = self._limits.all()
        self._idle = {limit.name: limit.used for limit in self._found}
        self._seen: list[tuple[str, int]] = []
        self._above = False

    @property
    def lowered(self) -> bool:
        """True if the budget is less than was wanted."""
        return self.budget != self._wanted

    def update(self) -> bool:
        """Read the limits. Returns whether the budget has changed.

        Raises:
            TooLittle: as `divide`; the budget is the least then.
        """
        limits = self._found = self._limits.all()
        seen = [(limit.name, limit.most) for limit in limits]
        if seen == self._seen:
            return False
        self._seen, before = seen, self.budget
        self.budget = self._wanted
        tight: Limit | None = None
        try:
            for limit in limits:
                idle = self._idle.setdefault(limit.name, limit.used)
                fits = _smaller(self.budget, divide(limit, idle, self._wanted, self._needs))
                if fits != self.budget:
                    self.budget, tight = fits, replace(limit, used=idle)
        except TooLittle:
            self.budget = _smaller(self._wanted, self._needs.least)
            raise
        if self.budget != before:
            self._log(tight)
        return self.budget != before

    def _log(self, tight: Limit | None) -> None:
        if tight is None:
            log.info("limits on memory leave room for all that is configured")
            return
        log.warning(
            "%s is %s, of which %s are in use before any request: %s may wait in the queue, not "
            "%s; %s be on the way, not %s; %d connections be open, not %d. To serve more at once, "
            "%s",
            *(tight.name, size_text(_down(tight.most)), size_text(_up(tight.used))),
            *(size_text(_down(self.budget.queue)), size_text(self._wanted.queue)),
            *(size_text(_down(self.budget.transit)), size_text(self._wanted.transit)),
            *(self.budget.connections, self._wanted.connections),
            tight.raise_,
            extra={"event": "memory"},
        )

    def scarce(self) -> bool:
        """True if so little memory is left that no request should be admitted. Fast."""
        return any(self._short(limit, 2) for limit in (*self._found, *self._limits.own()))

    def breached(self) -> Limit | None:
        """A limit that was almost reached at the last `update`, if none was at the one before."""
        near = [limit for limit in self._found if self._short(limit, 6)]
        risen = bool(near) and not self._above
        self._above = bool(near)
        return near[0] if risen else None

    def _short(self, limit: Limit, part: int) -> bool:
        """True if less is left than this part of the reserve."""
        room = limit.most - self._idle.get(limit.name, limit.used)
        return limit.most - limit.used < _reserve(room) // part

    def close(self) -> None:
        self._limits.close()


def _down(size: int) -> int:
    return size - size % (1 << 20) if size >= 1 << 20 else size
