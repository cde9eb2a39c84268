"""Conversion between values and the numpy arrays that store them; only bfloat16 needs any.

numpy has no bfloat16, so arrays of that type hold its bits as uint16: the upper half of a float32.
"""

from __future__ import annotations

import numpy as np

_BF16_EXPONENT = 0x7F80  # all ones: infinity or NaN


def to_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert values to the array that stores type ``dtype``.

    Values are rounded to bfloat16 as PyTorch and GPUs do: to nearest, ties to even. A NaN stays a
    NaN.
    """
    if dtype != "bfloat16":
        return array.astype(dtype)
    values = array.astype(np.float32)
    bits = values.view(np.uint32)
    # Add half of the last kept bit, minus one where that bit is even, so that ties round to even.
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    quiet = bits >> 16 | 0x40  # otherwise a NaN with a payload in the lower half becomes infinite
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of an array that stores type ``dtype``."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def all_finite(array: np.ndarray, dtype: str) -> bool:
    """True if an array that stores type ``dtype`` holds neither NaN nor infinity."""
    if dtype == "bfloat16":
        return not bool(((array & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
