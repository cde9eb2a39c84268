"""Memory watch: the last resort before the kernel kills the process.

Attack: anything that the other limits miss, or that the kernel does not count.
Counted: resident memory of the process, if the system reports it.
Done: the owner closes its sockets, which frees all that libzmq holds, and opens them again.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_common.memory_limits import MemoryLimits


class MemoryWatch:
    """Detects that this process holds more than `ceiling` bytes."""

    def __init__(self, ceiling: int, read: Callable[[], int | None] | None = None) -> None:
        self.ceiling = ceiling
        self._read = read or MemoryLimits(group="").resident
        self._above = False

    def breached(self) -> int | None:
        """The bytes held if they have risen above the ceiling since the last call, else None."""
        held = self._read()
        above = held is not None and held > self.ceiling
        risen = above and not self._above
        self._above = above
        return held if risen else None
