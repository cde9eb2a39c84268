"""The memory limits of this process, and the memory that it uses. Imports little."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """One limit.

    Args:
        name: for people. raise_: how to raise it.
        most: bytes allowed. used: bytes in use.
        promised: whether allocated memory counts before it is used.
        shared: whether memory shared with workers counts.
    """

    name: str
    raise_: str
    most: int
    used: int
    promised: bool = False
    shared: bool = False


class MemoryLimits:
    """Reads the limits of this process; finds none where the system does not report usage.

    Args:
        groups: where control groups (version 2) are mounted.
        group: this process's, as in /proc/self/cgroup; None reads it there.
    """

    def __init__(self, groups: Path = _GROUPS, group: str | None = None) -> None:
        # Open files can be read even when no descriptors are left.
        self._statm = _open(Path("/proc/self/statm")) if sys.platform == "linux" else None
        self._groups: list[tuple[str, FileIO, FileIO, FileIO]] = []
        name = Path(_own_group() if group is None else group)
        for each in (name, *name.parents) if name.parts else ():
            folder = groups / str(each).lstrip("/")
            files = [_open(folder / f"memory.{what}") for what in ("max", "current", "stat")]
            if all(files):
                self._groups.append((str(each), *files))  # type: ignore[arg-type]

    def close(self) -> None:
        for file in (self._statm, *(file for _, *files in self._groups for file in files)):
            if file:
                file.close()

    def resident(self) -> int | None:
        """Bytes that this process uses; None if the system does not say. Fast."""
        return self._sizes()[1] if self._statm else None

    def own(self) -> list[Limit]:
        """Limits of this process alone. Fast."""
        data = resource.getrlimit(resource.RLIMIT_DATA)[0]
        space = resource.getrlimit(resource.RLIMIT_AS)[0]
        none = resource.RLIM_INFINITY
        if self._statm is None or data == space == none:
            return []
        sizes = self._sizes()
        found = []
        if data != none:
            text = "raise it (ulimit -d, LimitDATA= of the service)"
            found.append(Limit("RLIMIT_DATA", text, data, sizes[5], promised=True))
        if space != none:
            text = "raise it (ulimit -v, LimitAS= of the service)"
            found.append(Limit("RLIMIT_AS", text, space, sizes[0], promised=True, shared=True))
        return found

    def _sizes(self) -> list[int]:
        """The fields of statm, in bytes."""
        assert self._statm
        page = os.sysconf("SC_PAGE_SIZE")
        return [int(word) * page for word in os.pread(self._statm.fileno(), 256, 0).split()]

    def all(self) -> list[Limit]:
        """All limits: also those of the control groups, which include workers."""
        found = self.own()
        for name, most, current, stat in self._groups:
            with contextlib.suppress(OSError, ValueError):
                limit = int(os.pread(most.fileno(), 64, 0))  # "max" is none
                lines = os.pread(stat.fileno(), 1 << 16, 0).decode().splitlines()
                table = dict(line.split() for line in lines)
                # The system frees cached files when memory is needed.
                cached = int(table["active_file"]) + int(table["inactive_file"])
                used = max(0, int(os.pread(current.fileno(), 64, 0)) - cached)
                text = "raise it (MemoryMax= of the service, --memory of the container)"
                found.append(Limit(f"memory.max of {name}", text, limit, used, shared=True))
        return found


def _open(path: Path) -> FileIO | None:
    with contextlib.suppress(OSError):
        return FileIO(path)
    return None


def _own_group() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:]
    return ""


def memory_limit() -> int | None:
    """Bytes that this process may use: the machine's memory, or a limit if that is less."""
    limits = MemoryLimits()
    found = [limit.most for limit in limits.all()]
    limits.close()
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
