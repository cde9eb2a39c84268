"""Between the values of a tensor and the array that carries it.

numpy has no bfloat16, so tensors of that type travel as the uint16 of their bits: the upper half of
a float32. This module rounds to them as PyTorch and the GPUs do, to nearest with ties to even, and
promises that no NaN turns into an infinity on the way. All other types are numpy's own.
"""

from __future__ import annotations

import numpy as np

_BF16_EXPONENT = 0x7F80  # all ones: infinity or NaN


def to_wire(array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` as the numpy array that carries type ``dtype``; bfloat16 as uint16, rounded."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    values = array.astype(np.float32)
    bits = values.view(np.uint32)
    # Half of the last kept bit, less one where that bit is even: ties then stay below the carry.
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    quiet = bits >> 16 | 0x40  # a NaN whose payload lies in the lower half would become infinite
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def from_wire(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of an array that carries type ``dtype``."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def all_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether an array that carries type ``dtype`` holds neither NaN nor infinity."""
    if dtype == "bfloat16":
        return not bool(((array & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
