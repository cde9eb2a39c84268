"""Sizes of messages as they travel, and the slowest link that the sockets allow for."""

from __future__ import annotations

from transport.messages import Limits

SLOWEST_LINK = 1_000_000
"""Bytes per second of the slowest link that counts as alive (8 Mbit/s)."""
_CURVE_BYTES = 33
"""CURVE adds this to a frame, besides ZMTP's 2 or 9 bytes. https://rfc.zeromq.org/spec/26/"""


def frame_bytes(size: int) -> int:
    """Bytes on a CURVE connection for a frame of `size` bytes."""
    return size + _CURVE_BYTES + (2 if size + _CURVE_BYTES < 256 else 9)


def message_bytes(limits: Limits) -> int:
    """Bytes on a CURVE connection for the largest legal message of one direction."""
    return frame_bytes(limits.message_bytes)
