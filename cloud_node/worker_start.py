"""The start of a worker process: ``python -m cloud_node.worker_start SOCKET PARENT``.

It closes itself to other processes before it imports anything that takes time. Only then does its
parent send it the shared memory.
"""

from __future__ import annotations

import sys

from edge_common.process import die_with_parent, disable_core_dumps


def main(argv: list[str]) -> int:
    """Become a worker; returns the exit status.

    Args:
        argv: descriptor of the socket, and the parent's pid.
    """
    control, parent = map(int, argv)
    die_with_parent(parent)
    disable_core_dumps()
    from cloud_node.worker import work

    return work(control)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
