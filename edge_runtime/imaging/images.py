"""Photos in, masks out, with the same numbers as segment_anything but without torch.

All coordinates are those of the upright image.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_common.errors import ImageError
from engines.geometry import resized_shape

if TYPE_CHECKING:
    from PIL import Image

# Formats whose decoders are pure codecs. Others that Pillow reads may start other programs.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_CHUNK_BYTES = 8 << 20


def is_photo(path: Path) -> bool:
    """True if a file is a photo, judging by its name."""
    from PIL import Image

    formats = _formats()
    return Image.registered_extensions().get(path.suffix.lower()) in formats and path.is_file()


def load_image(path: str | os.PathLike[str], max_megapixels: float = 100) -> np.ndarray:
    """Read a photo as upright RGB.

    The EXIF orientation is applied. Grey becomes RGB; 16 bits are scaled to 8 over their full
    range (0 to 65535); palettes and CMYK are converted as Pillow does. Colour profiles are not
    applied, as in SAM's own examples. Transparent pixels are drawn on white, so that the model and
    the nodes see the same as a viewer and no hidden colours. Only the first frame of an animation
    is read.

    Args:
        path: of the file.
        max_megapixels: refuse larger images before decoding them.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ImageError: when the file is missing, no image, damaged, truncated, too large, or holds
            numbers with no known range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    too_large = f"the limit is {max_megapixels:g} megapixels"
    reduce = "make it smaller first (the model itself sees a reduced copy)"
    try:
        with warnings.catch_warnings():
            # Pillow warns about images within our limit, and about metadata we do not need.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                width, height = image.size
                if width * height > max_megapixels * 1e6:
                    raise ImageError(
                        f"{path} is {width} x {height} pixels, {too_large}", mend=reduce
                    )
                image.load()
                with contextlib.suppress(Exception):  # damaged metadata around sound pixels
                    ImageOps.exif_transpose(image, in_place=True)
                return as_rgb(image, str(path))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is far too large; {too_large}", mend=reduce) from error
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not an image this program reads",
            mend="convert it to JPEG, PNG, WebP or TIFF",
        ) from None
    except MemoryError as error:
        raise ImageError(
            f"{path} does not fit into memory", mend="make it smaller first"
        ) from error
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from error
        raise ImageError(f"{path} is damaged or truncated: {error}") from error


def as_rgb(image: Image.Image, name: str) -> np.ndarray:
    """A Pillow image as uint8 ``[H, W, 3]``, converted as :func:`load_image` says.

    Raises:
        ImageError: it holds numbers with no known range; ``name`` says which image.
    """
    return np.array(_rgb(image, name))


def resize_longest(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize so that the longest side is ``image_size``, as ``ResizeLongestSide.apply_image``.

    Args:
        image: uint8 ``[H, W, 3]``.
        image_size: side of the model's square, in pixels.

    Returns:
        uint8 ``[h, w, 3]`` with ``(h, w) = resized_shape(H, W, image_size)``; no side is 0.

    Raises:
        ImageError: when ``image`` is not uint8 RGB with at least one pixel.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            f"image is {image.dtype} {image.shape}, expected uint8 (height, width, 3) in RGB order"
        )
    height, width = resized_shape(image.shape[0], image.shape[1], image_size)
    if (height, width) == image.shape[:2]:
        return image.copy()
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.array(resized)


def transform_coords(
    points: np.ndarray, original: tuple[int, int], resized: tuple[int, int]
) -> np.ndarray:
    """Move points from the original image to the resized one, as ``apply_coords`` of SAM does.

    Args:
        points: ``[..., 2]``, (x, y) in pixels of the original image.
        original: ``(H, W)``.
        resized: ``(h, w)``.

    Returns:
        float64 ``[..., 2]``.
    """
    moved = np.array(points, dtype=np.float64)
    moved[..., 0] *= resized[1] / original[1]
    moved[..., 1] *= resized[0] / original[0]
    return moved


def upscale(
    low_res: np.ndarray, image_size: int, resized: tuple[int, int], original: tuple[int, int]
) -> np.ndarray:
    """Logits at the original size, as ``Sam.postprocess_masks``.

    Bilinear with ``align_corners=False`` and no antialiasing, to the padded square, cropped to the
    resized image, and again to the original size.

    Args:
        low_res: float32 ``[..., 4g, 4g]``, the decoder's logits.
        image_size: side of the padded square, in pixels.
        resized: ``(h, w)`` of the resized image.
        original: ``(H, W)``.

    Returns:
        float32 ``[..., H, W]``.
    """
    out = np.empty((*low_res.shape[:-2], *original), np.float32)
    for index, rows, logits in _upscaled(low_res, image_size, resized, original):
        out[index][rows] = logits
    return out


def upscale_mask(
    low_res: np.ndarray,
    image_size: int,
    resized: tuple[int, int],
    original: tuple[int, int],
    threshold: float = 0.0,
) -> np.ndarray:
    """``upscale(...) > threshold`` without ever holding the logits at full size.

    Returns:
        bool ``[..., H, W]``.
    """
    out = np.empty((*low_res.shape[:-2], *original), np.bool_)
    for index, rows, logits in _upscaled(low_res, image_size, resized, original):
        np.greater(logits, threshold, out=out[index][rows])
    return out


def _upscaled(
    low_res: np.ndarray, image_size: int, resized: tuple[int, int], original: tuple[int, int]
) -> Iterator[tuple[tuple[int, ...], slice, np.ndarray]]:
    """Pieces of the upscaled logits: index among the leading dimensions, rows, ``[rows, W]``.

    The pieces share one buffer: use each before asking for the next.
    """
    low = low_res.shape[-1]
    if low_res.ndim < 2 or low_res.shape[-2] != low:
        raise ValueError(f"low_res has shape {low_res.shape}, expected [..., 4g, 4g]")
    (h, w), (height, width) = resized, original
    to_rows, to_cols = _taps(low, image_size, h), _taps(low, image_size, w)
    rows0, rows1, row_weight = _taps(h, height, height)
    to_width = _taps(w, width, width)
    step = max(1, _CHUNK_BYTES // (4 * width))
    buffer = np.empty((2, min(step, height), width), np.float32)
    for index in np.ndindex(low_res.shape[:-2]):
        square = _lerp_columns(np.asarray(low_res[index], np.float32), to_cols)
        square = _lerp_rows(square, to_rows)
        wide = _lerp_columns(square, to_width)
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            count = rows.stop - rows.start
            first, second = buffer[0, :count], buffer[1, :count]
            weight = row_weight[rows, None]
            np.take(wide, rows0[rows], axis=0, out=first, mode="clip")
            np.take(wide, rows1[rows], axis=0, out=second, mode="clip")
            first *= 1 - weight
            second *= weight
            first += second
            yield index, rows, first


_Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def _taps(size: int, new_size: int, count: int) -> _Taps:
    """The two source indices and the second's weight, for the first ``count`` of ``new_size``.

    Computed in float32 and fused, as in torch: for ten thousand pixels, the rounding of a source
    position changes a logit more than anything else here does.
    """
    if size == new_size:
        index = np.arange(count)
        return index, index, np.zeros(count, np.float32)
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = (scale * (np.arange(count) + 0.5) - 0.5).clip(min=0).astype(np.float32)
    first = np.minimum(position.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    weight = (position - first.astype(np.float32)).clip(0, 1)
    return first, second, weight


def _lerp_columns(image: np.ndarray, taps: _Taps) -> np.ndarray:
    first, second, weight = taps
    out = image[:, first]
    out *= 1 - weight
    other = image[:, second]
    other *= weight
    out += other
    return out


def _lerp_rows(image: np.ndarray, taps: _Taps) -> np.ndarray:
    first, second, weight = taps
    return image[first] * (1 - weight)[:, None] + image[second] * weight[:, None]


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey_from_integers(image, name).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point pixels", mend="convert it to 8 or 16 bits first"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        paper.alpha_composite(layer)
        return paper.convert("RGB")
    return image.convert("RGB")


def _grey_from_integers(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} holds grey values from {values.min()} to {values.max()}, expected 16 bits "
            "(0 to 65535)",
            mend="convert it to 8 or 16 bits first",
        )
    # Rounded to the nearest of 256 levels: 65535 = 257 x 255.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
