"""Cuts a resized image into the model's attention windows.

Windows that hold no pixel of the image are left out: their tokens are constants that the tail
knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.geometry import Geometry


@dataclass(frozen=True)
class Windows:
    """The windows of one image that hold image pixels, in index order.

    Attributes:
        pixels: uint8 ``[n, w, w, 3]``, 0 outside the image.
        extent: int64 ``[n, 2]``, rows and columns of each window that lie inside the image, each
            >= 1. It separates black pixels from padding, because SAM pads after it normalises.
        window: int64 ``[n]``, index of each window in the square.
        present: bool ``[windows]``, which windows of the square hold image pixels.
        size: ``(h, w)`` of the resized image.
    """

    pixels: np.ndarray
    extent: np.ndarray
    window: np.ndarray
    present: np.ndarray
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.window)

    def area(self) -> np.ndarray:
        """int64 ``[n]``: image pixels in each window; they sum to the image's area."""
        return self.extent[:, 0] * self.extent[:, 1]


def cut(image: np.ndarray, geometry: Geometry) -> Windows:
    """Cut an image whose longest side is ``geometry.image_size``. Pixels are copied unchanged.

    Args:
        image: uint8 ``[h, w, 3]``, as :func:`edge_runtime.imaging.images.resize_longest` makes it.
        geometry: of the bundle that will compute the windows.

    Raises:
        ValueError: the image is not uint8 RGB, or not of that size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (h, w, 3)")
    height, width = image.shape[:2]
    if max(height, width) != geometry.image_size or min(height, width) < 1:
        raise ValueError(
            f"image is {height} x {width} pixels, expected its longest side to be "
            f"{geometry.image_size}: resize it first"
        )
    side, w = geometry.windows_per_side, geometry.window_pixels
    start = np.arange(side, dtype=np.int64) * w
    rows = np.clip(height - start, 0, w)
    cols = np.clip(width - start, 0, w)
    used_rows, used_cols = int((rows > 0).sum()), int((cols > 0).sum())

    canvas = np.zeros((used_rows * w, used_cols * w, 3), np.uint8)
    canvas[:height, :width] = image
    pixels = canvas.reshape(used_rows, w, used_cols, w, 3).swapaxes(1, 2).reshape(-1, w, w, 3)

    present = np.logical_and.outer(rows > 0, cols > 0).reshape(-1)
    extent = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)[present]
    return Windows(pixels, extent, np.flatnonzero(present), present, (height, width))
