"""Process settings of programs that hold images or keys, and the end of such a process.

Imports little, because it runs before anything that takes time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import asyncio

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_FILES = 65_536
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 64 << 20
_MAPPED_BYTES = 32 << 20  # the most that glibc takes
_SMALL_BYTES = 128 << 10  # its defaults for both


def disable_core_dumps() -> None:
    """Write no core file of this process, and pipe none to a collector.

    On Linux this also closes its memory and descriptors to other processes of the same user, so
    call it before anything that takes time.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # The limit has no effect where core_pattern is a pipe (systemd-coredump, apport).
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_file_limit() -> int:
    """Raise this process's limit on open files, to 65,536 at most; returns the new limit.

    The usual 1,024 protect programs that use select(); nothing here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS has a limit of its own below the hard one
        return soft
    return wanted


def keep_freed_memory() -> None:
    """Let the allocator keep 64 MiB of freed memory. Call this before threads start.

    Messages of megabytes are allocated and freed all the time. By default the kernel maps and
    clears new pages for most of them, which costs a busy node a tenth of its time. Works with glibc
    only; `malloc_trim` returns the memory to the system.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Each thread's own arena would keep another 64 MiB.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_freed_memory_back() -> None:
    """Undo `keep_freed_memory`: under a tight limit on memory, nothing can be kept.

    Messages with pages of their own also leave no gaps behind.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _SMALL_BYTES)
        libc.malloc_trim(0)


def die_with_parent(parent: int) -> None:
    """End this process when its parent ends, even if the parent is killed; Linux only.

    When memory runs out, the kernel ends it before the parent. Call this before
    `disable_core_dumps`, which takes away the right to do so.

    Args:
        parent: pid of the parent when it started this process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before prctl took effect
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def exit_on_stop_signals() -> None:
    """Exit with status 0 at SIGTERM, SIGINT or SIGHUP, until `set_on_stop_signals` is called."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(0)

    for number in _stop_signals():
        signal.signal(number, leave)


def set_on_stop_signals(stop: asyncio.Event) -> None:
    """Set `stop` at the first SIGTERM, SIGINT or SIGHUP; end the process at a second one.

    A second SIGHUP is ignored, because the shell and the system each send one when a terminal is
    closed. Call this in the event loop.
    """
    import asyncio

    loop = asyncio.get_running_loop()

    def end_now(number: int, _: object) -> None:
        os._exit(128 + number)

    def begin_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            # Python's own answer to Ctrl-C is an exception at any place, and Ray then waits for
            # ever. The kernel spares the first process of a container from the default action.
            first = os.getpid() == 1
            signal.signal(number, end_now if first else signal.SIG_DFL)

    for number in _stop_signals():
        loop.add_signal_handler(number, begin_stop)


def _stop_signals() -> list[signal.Signals]:
    """SIGHUP is included unless it is ignored, as under nohup."""
    hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangup]
