"""Writes the photo of the demo and its reference masks: ``python -m exporters.demo_photo``.

It copies scikit-image's ``coins`` to ``edge_runtime/photos/coins.png`` and writes the masks of
:mod:`exporters.coins` beside it as a label image. It needs scikit-image, which ``make venv``
installs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from exporters.coins import coins

PHOTOS = Path(__file__).parent.parent / "edge_runtime" / "photos"


def labels() -> np.ndarray:
    """The reference as uint8 ``[303, 384]``: 0 for the background, k for the k-th coin."""
    _, masks = coins()
    image = np.zeros(masks[0].shape, np.uint8)
    for number, mask in enumerate(masks, 1):
        image[mask] = number
    return image


def demo_photo() -> tuple[np.ndarray, list[np.ndarray]]:
    """The committed photo as RGB uint8 [303, 384, 3] and one bool mask [303, 384] per coin."""
    from PIL import Image

    with Image.open(PHOTOS / "coins.png") as file:
        photo = np.asarray(file.convert("RGB"))
    with Image.open(PHOTOS / "coins-reference.png") as file:
        numbers = np.asarray(file)
    return photo, [numbers == k for k in range(1, int(numbers.max()) + 1)]


def main() -> None:
    """Write both files."""
    import skimage
    from PIL import Image

    source = Path(skimage.__file__).parent / "data" / "coins.png"
    shutil.copyfile(source, PHOTOS / "coins.png")
    reference = labels()
    Image.fromarray(reference).save(PHOTOS / "coins-reference.png", optimize=True)
    print(f"{PHOTOS}: coins.png and coins-reference.png with {reference.max()} coins")


if __name__ == "__main__":
    main()
