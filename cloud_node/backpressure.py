"""Back-pressure: a result is computed only if it can be sent soon.

Results that nobody reads fill the memory, and a result that can't be sent was computed for nothing.
So requests wait in the queue, where deadlines and refusals see them, while enough results are on
their way: to their edge, or to all edges together. Pure arithmetic.
"""

from __future__ import annotations

_LEAST_BYTES = 32 << 20


def has_room(
    size: int, *, own: int, everybody: int, unacked: int, total: int, largest: int, lanes: int
) -> bool:
    """Whether `size` bytes of results of one edge may be added.

    Whatever the numbers, a single result has room once nothing else is on its way, if `unacked`
    holds two and `total` four of the largest results.

    Args:
        own: bytes on their way to this edge, or being computed for it. everybody: to all edges.
        unacked: at which an edge counts as one that does not read.
        total: at which connections are dropped because all together hold too much.
        largest: bytes of the largest result.
        lanes: batches that compute at the same time.
    """
    if own + size > unacked * 3 // 4:
        return False
    allowed = min(total // 2, max(_LEAST_BYTES, (2 * lanes + 2) * largest))
    # An edge that has nothing on its way gets past others that have and don't read it.
    return everybody + size <= (allowed if own else allowed * 3 // 2)
