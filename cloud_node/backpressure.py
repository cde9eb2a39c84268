"""Whether a result may be computed: whether there will be room for it on its way to its edge.

What is computed and not read lies in memory, and what cannot be sent was computed for nothing. So
requests wait, where deadlines and refusals see them, while enough is on the way: to their edge, or
to all edges together, measured by what these can read in a few seconds. Pure arithmetic.
"""

from __future__ import annotations

_DRAIN_S = 3.0
_LEAST_BYTES = 32 << 20


def has_room(
    size: int, *, own: int, everybody: int, unsent: int, total: int, largest: int, rate: float
) -> bool:
    """Whether `size` bytes of results of one edge may be added.

    Promises that whatever the numbers, a single result finds room once nothing else is on the way,
    if `unsent` holds two and `total` four of them.

    Args:
        own: bytes on the way to this edge, or being computed for it. everybody: to all.
        unsent: at which an edge is taken for one that does not read. total: at which connections
            are cut because all together hold too much.
        largest: bytes of the largest result.
        rate: bytes a second that all together have been reading of late.
    """
    if own + size > unsent * 3 // 4:
        return False
    allowed = min(total // 2, max(2 * largest, _LEAST_BYTES, int(rate * _DRAIN_S)))
    # Who has nothing yet gets past those who have and don't read it.
    return everybody + size <= (allowed if own else allowed * 3 // 2)
