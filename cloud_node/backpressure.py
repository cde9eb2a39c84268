"""Back-pressure: a result is computed only if it can be sent soon.

Unread results fill the memory, and a result that can't be sent was computed for nothing. So while
enough results wait to be sent, to one edge or to all, requests stay in the queue, where deadlines
and refusals apply. Enough means the bytes that the edges read in a few seconds.
"""

from __future__ import annotations

_DRAIN_S = 3.0
_LEAST_BYTES = 32 << 20


def has_room(
    size: int, *, own: int, everybody: int, unacked: int, total: int, largest: int, rate: float
) -> bool:
    """True if `size` bytes of results for one edge may be added.

    A single result always has room once nothing else waits, if `unacked`
    holds two and `total` four of the largest results.

    Args:
        own: bytes being sent to this edge or computed for it. everybody: for all edges.
        unacked: an edge with more unacknowledged bytes counts as not reading.
        total: connections are dropped if all together hold more.
        largest: bytes of the largest result.
        rate: bytes per second that all edges together read lately.
    """
    if own + size > unacked * 3 // 4:
        return False
    allowed = min(total // 2, max(2 * largest, _LEAST_BYTES, int(rate * _DRAIN_S)))
    # An edge that has nothing on its way gets past others that have and don't read it.
    return everybody + size <= (allowed if own else allowed * 3 // 2)
