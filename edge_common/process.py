"""What a process that holds images or keys in memory does to itself at start."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4
_FILES = 65_536
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 64 << 20
_MAPPED_BYTES = 32 << 20  # the most that glibc takes
_SMALL_BYTES = 128 << 10  # its defaults for both


def disable_core_dumps() -> None:
    """No core file of this process, whether the system writes it or pipes it to a collector.

    On Linux other processes of the same user can't look into its memory and descriptors either, so
    call this before anything that takes time.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # The limit does not hold where core_pattern is a pipe (systemd-coredump, apport); this
        # does.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_file_limit() -> int:
    """Allow this process as many open files as it may have, 65536 at most; how many that is.

    The usual 1024 are a caution for programs that use select(), which nothing here does.
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
    """Let the allocator keep 64 MiB of what is freed, instead of giving it back at once.

    Messages are megabytes each, allocated and freed all the time: by default most are mapped anew
    and cleared by the kernel page by page, which costs a busy node a tenth of its time. To be
    called before threads start. Only where glibc is; `malloc_trim` gives back what is kept.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # In the arenas of threads it keeps 64 MiB at a time, which the kernel takes back whole.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_freed_memory_back() -> None:
    """Undo `keep_freed_memory`, at its cost: under a tight limit, what is kept is what is missing,
    and messages that each have their own pages leave no gaps behind."""
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _SMALL_BYTES)
        libc.malloc_trim(0)
