"""Reference masks of scikit-image's photo ``coins``, by its own documented recipe.

The recipe is the example "Comparing edge-based and region-based segmentation" of scikit-image's
gallery (BSD-3-Clause, by the scikit-image team): Sobel elevation map, markers from both ends of the
histogram, watershed, holes filled. ``python -m exporters.coins OUT.png`` draws the masks.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy import ndimage


def coins() -> tuple[np.ndarray, list[np.ndarray]]:
    """The photo as RGB uint8 [303, 384, 3] and one bool mask [303, 384] per coin, in reading order
    of labels.
    """
    from skimage import data, filters, segmentation

    grey = data.coins()
    elevation = filters.sobel(grey)
    markers = np.zeros_like(grey, np.int32)
    markers[grey < 30] = 1
    markers[grey > 150] = 2
    found = ndimage.binary_fill_holes(segmentation.watershed(elevation, markers) - 1)
    labels, count = ndimage.label(found)
    masks = [labels == k for k in range(1, count + 1)]
    return np.repeat(grey[..., None], 3, 2), [m for m in masks if m.sum() >= 100]


def main() -> None:
    """Write the photo with the outlines of the reference masks."""
    from PIL import Image

    photo, masks = coins()
    for mask in masks:
        photo[mask & ~ndimage.binary_erosion(mask)] = (255, 60, 0)
    Image.fromarray(photo).save(sys.argv[1])
    print(f"{len(masks)} coins, areas {sorted(int(m.sum()) for m in masks)}")


if __name__ == "__main__":
    main()
