"""How a worker process begins: ``python -m cloud_node.worker_start SOCKET PARENT``.

It ends with its parent, and closes itself to other processes before it imports anything that takes
time. Only then does the parent hand it the memory that windows will be in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from edge_common.process import disable_core_dumps

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Become a worker; returns the exit status.

    Args:
        argv: descriptor of the socket, and the parent's pid.
    """
    control, parent = map(int, argv)
    _die_with(parent)
    disable_core_dumps()  # last: without privileges, a closed process can't change what is above
    from cloud_node.worker import work

    return work(control)


def _die_with(parent: int) -> None:
    """End with the parent, even when it is killed; go before it when memory runs out."""
    if sys.platform != "linux":
        return  # the closed socket ends it, if a little later
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before that took effect
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
