"""Reads samples from a COCO annotation file and its folder of images, one image at a time.

Masks (polygons, run lengths, compressed run lengths) equal those of pycocotools pixel for pixel.
Crowd regions are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_common.errors import ConfigError, ImageError
from exporters.evaluate import Sample


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed string: 6 bits a character, differences to the last but
    one run.

    Raises ValueError if the string ends inside a number or holds an invalid character.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} in compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end amid a number")
    return counts


def encode_counts(counts: Sequence[int]) -> str:
    """The inverse of :func:`decode_counts`."""
    out = []
    for i, count in enumerate(counts):
        value = int(count) - (int(counts[i - 2]) if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            out.append(chr(48 + (bits | (32 if more else 0))))
    return "".join(out)


def mask_from_counts(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """bool [height, width] from run lengths, zeros first, down the columns; ValueError when they
    don't fit.
    """
    lengths = np.asarray(counts, np.int64)
    if (lengths < 0).any() or int(lengths.sum()) != height * width:
        raise ValueError(f"run lengths cover {int(lengths.sum())} of {height * width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T


def counts_from_mask(mask: np.ndarray) -> list[int]:
    """Run lengths of a bool mask [height, width], the inverse of :func:`mask_from_counts`."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [not mask[-1, -1]]])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], borders])).tolist()


def mask_from_polygon(polygon: Sequence[float], height: int, width: int) -> np.ndarray:
    """bool [height, width] inside the corners x0, y0, x1, ...; the rule of COCO's ``rleFrPoly``.

    The outline is drawn at five times the resolution; a column of pixels changes sides where the
    outline crosses its middle. ValueError for an odd number of values or fewer than three corners.
    """
    scale = 5
    corners = np.asarray(polygon, np.float64)
    if corners.ndim != 1 or len(corners) % 2 or len(corners) < 6 or not np.isfinite(corners).all():
        raise ValueError(f"a polygon of {corners.size} coordinates")
    xy = np.trunc(scale * corners.reshape(-1, 2) + 0.5).astype(np.int64)
    us, vs = [], []
    for (xs, ys), (xe, ye) in zip(xy, np.roll(xy, -1, 0), strict=True):
        dx, dy = abs(xe - xs), abs(ye - ys)
        flip = (dx >= dy and xs > xe) or (dx < dy and ys > ye)
        if flip:
            xs, xe, ys, ye = xe, xs, ye, ys
        along = np.arange(max(dx, dy) + 1)
        along = along[::-1] if flip else along
        if dx >= dy:
            slope = (ye - ys) / dx if dx else 0.0
            us.append(along + xs)
            vs.append(np.trunc(ys + slope * along + 0.5).astype(np.int64))
        else:
            us.append(np.trunc(xs + (xe - xs) / dy * along + 0.5).astype(np.int64))
            vs.append(along + ys)
    u, v = np.concatenate(us), np.concatenate(vs)
    moved = u[1:] != u[:-1]
    u0, u1, v0, v1 = u[:-1][moved], u[1:][moved], v[:-1][moved], v[1:][moved]
    column = (np.where(u1 < u0, u1, u1 - 1) + 0.5) / scale - 0.5
    row = np.ceil(np.clip((np.minimum(v0, v1) + 0.5) / scale - 0.5, 0, height))
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    places = (column[kept] * height + row[kept]).astype(np.int64)
    toggles = np.bincount(places, minlength=height * width + 1)[: height * width]
    return (np.cumsum(toggles) % 2 == 1).reshape(width, height).T


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask bool [height, width] of an annotation's ``segmentation``; ValueError when it is
    malformed.
    """
    if isinstance(segmentation, dict):
        h, w = segmentation["size"]
        counts = segmentation["counts"]
        runs = decode_counts(counts) if isinstance(counts, str) else counts
        mask = mask_from_counts(runs, int(h), int(w))
        if mask.shape != (height, width):
            raise ValueError(f"mask is {h} x {w}, image {height} x {width}")
        return mask
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        mask |= mask_from_polygon(polygon, height, width)
    return mask


class CocoFile:
    """An annotation file, checked, with the images to take from it.

    Args:
        annotations: JSON file with ``images`` and ``annotations``.
        folder: where the images lie.
        limit: number of images, in the file's order; None takes all.
        min_area: objects of fewer pixels are left out.
    """

    def __init__(
        self, annotations: Path, folder: Path, limit: int | None = None, min_area: int = 1
    ) -> None:
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8"))
            images = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
            objects: dict[int, list[Any]] = {}
            for a in content["annotations"]:
                if not a.get("iscrowd") and a.get("segmentation"):
                    objects.setdefault(int(a["image_id"]), []).append(a["segmentation"])
        except OSError as err:
            raise ConfigError(f"cannot read {annotations}: {err.strerror}") from None
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"{annotations} is not a COCO annotation file ({type(err).__name__}: {err}); "
                "expected JSON with 'images' and 'annotations'"
            ) from None
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder} is not a directory", mend="give the folder of the images")
        self._folder, self._objects, self._min_area = Path(folder), objects, min_area
        self._images = [(i, name) for i, name in images.items() if i in objects][:limit]
        if not self._images:
            raise ConfigError(f"{annotations} has no image with annotated objects")

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Sample]:
        for number, name in self._images:
            path = self._folder / Path(name).name
            try:
                with Image.open(path) as file:
                    image = np.asarray(file.convert("RGB"))
            except FileNotFoundError:
                raise ImageError(f"{path} is named by the annotations but does not exist") from None
            except (OSError, ValueError, SyntaxError) as err:
                raise ImageError(f"cannot read {path}: {err}") from None
            height, width = image.shape[:2]
            try:
                masks = [decode(s, height, width) for s in self._objects[number]]
            except (ValueError, KeyError, TypeError) as err:
                raise ConfigError(f"an annotation of {name} is malformed: {err}") from None
            yield Sample(image, [m for m in masks if m.sum() >= self._min_area], "coco")
