"""What the front may hold under the limits on memory that it runs under.

A `malloc` that fails inside libzmq ends the process, and nothing can catch that. So the limits are
read (RLIMIT_DATA, RLIMIT_AS, memory.max of control groups) and `divide` makes of the room that is
left the bounds of what peers can fill: the queue, libzmq, the number of connections. It is plain
arithmetic; `Memory` feeds it, again and again, since limits may change. Promises that no bound is
above what was asked for, that all together leave room for the batches under way and for what
arrives before somebody looks, and that a node for which not even a few requests fit says so instead
of starting. What is not promised: room that other processes of a control group take later, or that
a limit takes away which is lowered below what is in use.

To be imported before anything large: it needs no numpy.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass, replace

from edge_common.errors import ConfigError
from edge_common.memory_limits import Limit, MemoryLimits
from edge_common.settings import size_text

log = logging.getLogger(__name__)

_OVERSHOOT = 32 << 20
# What may arrive between two looks of the meter: 20 ms at 1.6 GB/s, more than one thread decrypts.
_SLACK = 16 << 20
# A thread's stack, and what Python takes now and then.
_COPIES = 3
# A frame under encryption: what comes, what goes and one between.
_CONNECTIONS = 4
_CONNECTION = 20 << 10
# What libzmq and this process hold of a connection, unfinished handshakes included.
_IMPORTS, _LIBRARIES = 64 << 20, 96 << 20
# What the front takes before it has read its configuration, and the libraries it maps.
_THREADS = 8
# Of libzmq and pyzmq, those counted twice that end before others begin: their stacks are kept.


@dataclass(frozen=True)
class Budget:
    """Bounds of what peers can fill.

    Args:
        queue: bytes that may wait for a worker.
        transit: bytes in libzmq, both ways.
        connections: how many.
    """

    queue: int
    transit: int
    connections: int


@dataclass(frozen=True)
class Needs:
    """What the bundle asks for, in bytes.

    Args:
        request, result: the largest, as they travel.
        batches: of the requests and results that are being computed.
        shared: memory shared with workers.
    """

    request: int
    result: int
    batches: int
    shared: int = 0

    @property
    def least(self) -> Budget:
        """Without which a node gets nothing done: two requests wait, one comes while two are read,
        two results leave."""
        transit = 3 * self.request + 2 * self.result + (1 << 20)
        return Budget(2 * (self.request + 4096), transit, _CONNECTIONS)

    def fixed(self, limit: Limit) -> int:
        """What no bound of a `Budget` is about."""
        shared = self.shared if limit.shared else 0
        return self.batches + shared + _COPIES * max(self.request, self.result)

    def each(self, limit: Limit) -> int:
        """Of a connection: a message that is announced has its memory before its bytes."""
        return self.request if limit.promised else _CONNECTION


class TooLittle(ConfigError):
    """Not even a few of the largest requests fit."""


def divide(limit: Limit, used: int, wanted: Budget, needs: Needs) -> Budget:
    """What of `wanted` fits under a limit.

    Args:
        limit: of which `used` bytes are taken by what is always there.

    Raises:
        TooLittle: next to nothing; says how much it takes.
    """
    room, each = limit.most - used, needs.each(limit)
    least = _smaller(wanted, needs.least)
    # An eighth for what falls between allocations of different sizes.
    content = least.queue + least.transit + least.connections * each
    enough = needs.fixed(limit) + content * 8 // 7 + 1
    left = (room - _reserve(room) - needs.fixed(limit)) * 7 // 8
    if left < content:
        least_limit = used + min(2 * enough, enough + _OVERSHOOT + _SLACK)
        raise TooLittle(
            f"{limit.name} is {size_text(_down(limit.most))}, of which {size_text(_up(used))} are "
            f"in use before any request; expected at least {size_text(_up(least_limit))}, for two "
            f"requests with all windows of an image to wait and {least.connections} connections: "
            f"{limit.raise_}, or serve a smaller model"
        )
    both = min(
        wanted.queue + wanted.transit,
        max(
            least.queue + least.transit,
            left - min(wanted.connections * each, max(least.connections * each, left // 4)),
        ),
    )
    # What waits in the queue gains less from room: what is refused there comes again, what is on
    # the way costs an edge its connection.
    transit = min(wanted.transit, max(least.transit, both * 3 // 4))
    transit = min(transit, both - least.queue)
    queue = min(wanted.queue, both - transit)
    transit = min(wanted.transit, both - queue)
    return Budget(queue, transit, min(wanted.connections, (left - both) // each))


def _reserve(room: int) -> int:
    """Of so much room, what is left free. Where messages are small, so is what gets ahead of the
    meter, and such a node needs little else."""
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
    """Say so if there is no room for `size` bytes more, which by itself is for what is to be
    imported; libraries fail in words of their own, or by a signal.

    Raises:
        TooLittle: how much it takes, and how to give it.
    """
    limits = MemoryLimits(group="")
    try:
        for limit in limits.own():
            # Only what maps files counts those that are to be imported.
            files = _LIBRARIES if limit.name == "RLIMIT_AS" and size == _IMPORTS else 0
            least = limit.used + size + files
            if limit.most < least:
                raise TooLittle(
                    f"{limit.name} is {size_text(_down(limit.most))}, expected at least "
                    f"{size_text(_up(least))} to start with, and more to serve: {limit.raise_}"
                )
    finally:
        limits.close()


def check_threads() -> None:
    """As `check_room`, for the threads of a node's sockets."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    check_room(_THREADS * (stack if stack != resource.RLIM_INFINITY else 8 << 20) + _SLACK)


class Memory:
    """Follows the limits of a node that is warm: make it before requests come.

    Args:
        wanted: what is to hold where there is room.
        needs: of what is served.
        limits: to read.

    Attributes:
        budget: what holds.
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
        """Whether less holds than was wanted."""
        return self.budget != self._wanted

    def look(self) -> bool:
        """Read the limits again; whether the budget is another one.

        Raises:
            TooLittle: see there; the budget is the least there is.
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
            self._tell(tight)
        return self.budget != before

    def _tell(self, tight: Limit | None) -> None:
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
        """Whether so little is left that nothing more should be taken in. Fast."""
        return any(self._short(limit, 2) for limit in (*self._found, *self._limits.own()))

    def breached(self) -> Limit | None:
        """A limit that was all but reached when `look` was called last, if none was before."""
        near = [limit for limit in self._found if self._short(limit, 6)]
        risen = bool(near) and not self._above
        self._above = bool(near)
        return near[0] if risen else None

    def _short(self, limit: Limit, part: int) -> bool:
        """Whether less is left than this part of what is to be left free."""
        room = limit.most - self._idle.get(limit.name, limit.used)
        return limit.most - limit.used < _reserve(room) // part

    def close(self) -> None:
        self._limits.close()


def _down(size: int) -> int:
    return size - size % (1 << 20) if size >= 1 << 20 else size
