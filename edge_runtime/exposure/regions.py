"""Regions of an image that never leave the edge."""

from __future__ import annotations

import math
from collections.abc import Iterable

from edge_runtime.config import Region
from engines.geometry import Geometry


def windows_in(
    regions: Iterable[Region],
    original: tuple[int, int],
    resized: tuple[int, int],
    geometry: Geometry,
) -> frozenset[int]:
    """The windows that hold any pixel of a region.

    Args:
        regions: x0, y0, x1, y1 in pixels of the original image.
        original, resized: (height, width) of the image and of its resized copy.
    """
    down, across = resized[0] / original[0], resized[1] / original[1]
    # A pixel of the resized image mixes its neighbours: up to one of its own pixels away, and where
    # the image was enlarged, half a pixel of the original.
    y, x = max(1.0, down / 2), max(1.0, across / 2)
    found = set()
    for x0, y0, x1, y1 in regions:
        left, right = math.floor(x0) * across - x, math.ceil(x1) * across + x
        top, bottom = math.floor(y0) * down - y, math.ceil(y1) * down + y
        for window in range(geometry.windows):
            wy0, wx0, wy1, wx1 = geometry.window_rect(window)
            if wx0 < right and left < wx1 and wy0 < bottom and top < wy1:
                found.add(window)
    return frozenset(found)
