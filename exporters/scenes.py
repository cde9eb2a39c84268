"""Draws procedural scenes with exact masks, on which ``tiny`` is trained and evaluated.

A scene is an RGB image and a label map, both a pure function of ``(seed, size, kind)``. Labels are
drawn without antialiasing, so masks are exact; the image is softened afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from exporters import photolike_scenes

KINDS = ("objects", "partition", "alike", "parts")
SHARES = (0.26, 0.28, 0.34, 0.12)
PHOTO_LIKE = "photo-like"
HELD_OUT = 1_000_000_000  # seeds from here on are never trained on
_BANK = 160
_TILE = 320


@dataclass(frozen=True)
class Scene:
    """image uint8 [s, s, 3]; labels uint8 [s, s]; the background is label 0 and an object like the
    others. Each of ``wholes`` names the labels that are the parts of one larger object.
    """

    image: np.ndarray
    labels: np.ndarray
    kind: str
    wholes: tuple[tuple[int, ...], ...] = ()


def _noise(rng: np.random.Generator, size: int, cells: float) -> np.ndarray:
    """Smooth noise float32 [size, size], mean 0, about unit range, with ``cells`` bumps along a
    side.
    """
    n = max(2, round(cells)) + 3
    small = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
    big = small.resize((size, size), Image.Resampling.BICUBIC, box=(1, 1, n - 1, n - 1))
    return np.asarray(big) * 0.6


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """Grey textures float32 [_BANK, _TILE, _TILE], mean 0, unit deviation: noise, stripes, checks,
    dots, relief.
    """
    rng = np.random.default_rng(20240607)
    yy, xx = np.mgrid[0:_TILE, 0:_TILE].astype(np.float32)
    tiles = np.empty((_BANK, _TILE, _TILE), np.float32)
    for i in range(_BANK):
        kind = i % 8
        angle, period = rng.uniform(0, np.pi), float(np.exp(rng.uniform(np.log(5), np.log(40))))
        u = (xx * np.cos(angle) + yy * np.sin(angle)) * 2 * np.pi / period
        v = (yy * np.cos(angle) - xx * np.sin(angle)) * 2 * np.pi / period
        if kind in (0, 1):
            tile = sum(_noise(rng, _TILE, _TILE / s) * s**0.5 for s in (4, 9, 20, 45))
        elif kind == 2:
            tile = _noise(rng, _TILE, _TILE / period)
        elif kind == 3:
            tile = np.sin(u + 1.5 * _noise(rng, _TILE, 6))
        elif kind == 4:
            tile = np.sign(np.sin(u) * np.sin(v)) if rng.random() < 0.5 else np.sign(np.sin(u))
        elif kind == 5:
            tile = np.maximum(np.sin(u) + np.sin(v), rng.uniform(0.2, 1.2))
        elif kind == 6:
            relief = sum(_noise(rng, _TILE, _TILE / s) for s in (5, 9, 16))
            tile = ndimage.sobel(relief, axis=int(rng.integers(2)))
        else:
            tile = rng.standard_normal((_TILE, _TILE)).astype(np.float32)
            tile = ndimage.gaussian_filter(tile, rng.uniform(0.5, 1.5))
        tile = np.asarray(tile, np.float32)
        tiles[i] = (tile - tile.mean()) / max(float(tile.std()), 1e-3)
    return np.clip(tiles, -2.5, 2.5)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random piece of the bank, float32 [size, size], unit deviation."""
    tile = _bank()[rng.integers(_BANK)]
    y, x = rng.integers(0, _TILE - size + 1, 2) if size <= _TILE else (0, 0)
    piece = tile[y : y + size, x : x + size]
    if size > _TILE:
        piece = np.asarray(Image.fromarray(tile).resize((size, size), Image.Resampling.BICUBIC))
    if rng.random() < 0.5:
        piece = piece.T
    return piece


def _colour(rng: np.random.Generator, grey: bool) -> np.ndarray:
    """A colour float32 [3] in 0..255."""
    if grey:
        return np.full(3, rng.uniform(10, 245), np.float32)
    colour = rng.uniform(0, 255, 3)
    return (colour * rng.uniform(0.4, 1) + rng.uniform(0, 255) * rng.uniform(0, 0.4)).astype(
        np.float32
    )


def _distinct(
    rng: np.random.Generator, grey: bool, others: list[np.ndarray], apart: float
) -> np.ndarray:
    """A colour at least ``apart`` (largest channel difference) from ``others``, if 12 draws find
    one.
    """
    best, best_gap = _colour(rng, grey), -1.0
    for _ in range(12):
        colour = _colour(rng, grey)
        gap = min((float(np.abs(colour - o).max()) for o in others), default=255.0)
        if gap > best_gap:
            best, best_gap = colour, gap
        if gap >= apart:
            break
    return best


def _paint(rng: np.random.Generator, colour: np.ndarray, size: int, strength: float) -> np.ndarray:
    """A textured, shaded surface float32 [size, size, 3] of this mean colour."""
    surface: np.ndarray = np.broadcast_to(colour, (size, size, 3)).astype(np.float32)
    if rng.random() < 0.75:
        tint = rng.uniform(0.6, 1.0, 3).astype(np.float32) if rng.random() < 0.5 else np.ones(3)
        surface = surface + _texture(rng, size)[..., None] * (tint * strength).astype(np.float32)
    if rng.random() < 0.5:
        surface = surface + (_ramp(rng, size) * rng.uniform(5, 30))[..., None]
    return surface


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Illumination falling off across the image, float32 [size, size] in about -1..1."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return (np.cos(angle) * line[None] + np.sin(angle) * line[:, None]).astype(np.float32)


def _outline(
    rng: np.random.Generator, cy: float, cx: float, radius: float, kind: str
) -> np.ndarray:
    """Corner points float64 [k, 2] (x, y) of a shape around a centre."""
    turn = rng.uniform(0, 2 * np.pi)
    stretch = rng.uniform(0.45, 1.0)
    if kind == "disc":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        pts = np.stack([np.cos(angles), np.sin(angles)], 1)
        pts *= 1 + rng.normal(0, 0.012)
    elif kind == "ellipse":
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        pts = np.stack([np.cos(angles), stretch * np.sin(angles)], 1)
    elif kind == "box":
        pts = np.array([[-1, -stretch], [1, -stretch], [1, stretch], [-1, stretch]]) * 0.8
    elif kind == "polygon":
        k = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * np.pi, k)) if k > 4 else np.arange(k) * 2 * np.pi / k
        length = rng.uniform(0.6, 1.0, k)
        pts = np.stack([np.cos(angles) * length, np.sin(angles) * length * stretch], 1)
    elif kind == "star":
        k = int(rng.integers(4, 8))
        angles = np.arange(2 * k) * np.pi / k
        length = np.where(np.arange(2 * k) % 2, rng.uniform(0.35, 0.7), 1.0)
        pts = np.stack([np.cos(angles) * length, np.sin(angles) * length], 1)
    else:  # blob
        angles = np.linspace(0, 2 * np.pi, 56, endpoint=False)
        length = np.ones(56)
        for k in range(2, 6):
            length += rng.normal(0, 0.28 / k) * np.cos(k * angles + rng.uniform(0, 6.3))
        length = np.clip(length, 0.3, 1.7)
        pts = np.stack([np.cos(angles) * length, stretch * np.sin(angles) * length], 1)
    c, s = np.cos(turn), np.sin(turn)
    return pts @ np.array([[c, s], [-s, c]]) * radius + np.array([cx, cy])


def _fill(size: int, corners: np.ndarray) -> np.ndarray:
    """The polygon as bool [size, size]."""
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=1)
    return np.asarray(canvas, bool)


_SHAPES = ("disc", "ellipse", "box", "polygon", "star", "blob", "blob")


def _shade_edge(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, strength: float
) -> None:
    """Darken or lighten the rim of ``mask`` in ``image``, as relief and light do."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return
    y0, y1, x0, x1 = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    sub = np.pad(mask[y0:y1, x0:x1], 1)
    depth = ndimage.distance_transform_edt(sub)[1:-1, 1:-1]
    width = rng.uniform(0.7, 2.5)
    rim = np.exp(-((np.maximum(depth - 1, 0) / width) ** 2)) * (depth > 0)
    if rng.random() < 0.5:
        line_y = np.linspace(-1, 1, y1 - y0)[:, None]
        line_x = np.linspace(-1, 1, x1 - x0)[None]
        angle = rng.uniform(0, 2 * np.pi)
        rim = rim * (0.3 + np.cos(angle) * line_x + np.sin(angle) * line_y)
    image[y0:y1, x0:x1] += (rim * strength)[..., None].astype(np.float32)


def _objects(
    rng: np.random.Generator, size: int, grey: bool, parts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Occluding shapes on a background; with ``parts``, shapes carry others that belong to them."""
    colours = [_colour(rng, grey)]
    image = _paint(rng, colours[0], size, rng.uniform(4, 30)).copy()
    labels = np.zeros((size, size), np.uint8)
    count = int(rng.integers(2, 6)) if parts else int(rng.integers(2, 11))
    for label in range(1, count + 1):
        radius = size * float(np.exp(rng.uniform(np.log(0.07), np.log(0.30))))
        if parts:
            radius = size * float(rng.uniform(0.12, 0.32))
        cy, cx = rng.uniform(0, size, 2)
        mask = _fill(size, _outline(rng, cy, cx, radius, _SHAPES[int(rng.integers(len(_SHAPES)))]))
        if not parts and rng.random() < 0.06:  # a ring or frame
            mask &= ~_fill(size, _outline(rng, cy, cx, radius * rng.uniform(0.3, 0.55), "disc"))
        colour = _distinct(rng, grey, colours[-4:], 45)
        colours.append(colour)
        labels[mask] = label
        image[mask] = _paint(rng, colour, size, rng.uniform(3, 26))[mask]
        if parts:
            for _ in range(int(rng.integers(2, 7))):
                py, px = (
                    cy + rng.uniform(-0.7, 0.7) * radius,
                    cx + rng.uniform(-0.7, 0.7) * radius,
                )
                inner = _fill(
                    size,
                    _outline(
                        rng,
                        py,
                        px,
                        radius * rng.uniform(0.12, 0.45),
                        _SHAPES[int(rng.integers(len(_SHAPES)))],
                    ),
                )
                core = ndimage.binary_erosion(mask, iterations=2)
                inner &= core
                blend = np.float32(rng.uniform(0.3, 0.85))
                part = _paint(rng, _colour(rng, grey), size, rng.uniform(3, 22))[inner]
                image[inner] = image[inner] * (1 - blend) + part * blend
        if rng.random() < (0.7 if parts else 0.3):
            _shade_edge(rng, image, mask, rng.uniform(15, 70) * rng.choice([-1, -1, 1]))
    return image, labels


def _partition(rng: np.random.Generator, size: int, grey: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cells around random seeds with warped borders, each of its own colour; sometimes objects on
    top.
    """
    count = int(rng.integers(3, 15))
    seeds = rng.uniform(0, size, (count, 2)).astype(np.float32)
    line = np.arange(size, dtype=np.float32)
    warp = rng.choice([0.0, 3.0, 9.0]) * size / 192
    wy, wx = _noise(rng, size, rng.uniform(3, 9)) * warp, _noise(rng, size, 5) * warp
    yy, xx = line[:, None] + wy, line[None] + wx
    stretch = rng.uniform(0.6, 1.6)
    bias = rng.uniform(0, (size * 0.12) ** 2, count).astype(np.float32)
    distance = (yy[..., None] - seeds[:, 0]) ** 2 * stretch + (xx[..., None] - seeds[:, 1]) ** 2
    labels = (distance + bias).argmin(2).astype(np.uint8)
    image = np.empty((size, size, 3), np.float32)
    colours: list[np.ndarray] = []
    for label in range(count):
        mask = labels == label
        near = colours if count < 7 else colours[-5:]
        colours.append(_distinct(rng, grey, near, 40))
        image[mask] = _paint(rng, colours[-1], size, rng.uniform(2, 22))[mask]
    return image, labels


def _alike(rng: np.random.Generator, size: int, grey: bool) -> tuple[np.ndarray, np.ndarray]:
    """Many small, similar objects on a background of varying brightness."""
    base = _distinct(rng, grey, [], 0)
    drift = _ramp(rng, size) * rng.uniform(0, 60) + _noise(
        rng, size, rng.uniform(1, 4)
    ) * rng.uniform(0, 35)
    apart = float(rng.uniform(25, 90))
    for _ in range(20):
        look = _colour(rng, grey)
        if apart <= np.abs(look - base).max() <= apart + 70:
            break
    image = _paint(rng, base, size, rng.uniform(0, 10)) + drift[..., None]
    labels = np.zeros((size, size), np.uint8)
    radius = size * float(rng.uniform(0.045, 0.115))
    spread = float(rng.choice([0.05, 0.15, 0.3]))
    shape = _SHAPES[int(rng.integers(len(_SHAPES)))] if rng.random() < 0.55 else "disc"
    surface = _paint(rng, look, size, rng.uniform(0, 18)) + drift[..., None] * rng.uniform(0, 1)
    relief = float(rng.choice([0.0, 8.0, 16.0, 28.0]))
    rim = float(rng.uniform(0, 60)) * rng.choice([-1, 1]) if rng.random() < 0.75 else 0.0
    vary = float(rng.choice([0.0, 6.0, 15.0]))
    gap = float(rng.uniform(-0.12, 0.5))
    centres: list[tuple[float, float, float]] = []
    if rng.random() < 0.5:
        pitch = radius * (2.1 + max(gap, 0.0) * 1.5)
        steps = np.arange(pitch * 0.6, size, pitch)
        places = [(y, x) for y in steps for x in steps]
        jitter = pitch * rng.uniform(0, 0.16)
        candidates = np.array(places) + rng.normal(0, 1, (len(places), 2)) * jitter
        candidates = candidates[rng.random(len(places)) < rng.uniform(0.6, 1.0)]
    else:
        candidates = rng.uniform(0, size, (int(rng.integers(30, 160)), 2))
    for cy, cx in candidates:
        r = radius * float(np.exp(rng.normal(0, spread)))
        if all((cy - y) ** 2 + (cx - x) ** 2 > ((r + q) * (1 + gap)) ** 2 for y, x, q in centres):
            centres.append((float(cy), float(cx), r))
        if len(centres) == 60:
            break
    touching = gap < 0.05
    for label, (cy, cx, r) in enumerate(centres, 1):
        mask = _fill(size, _outline(rng, cy, cx, r, shape))
        labels[mask] = label
        image[mask] = surface[mask] + rng.normal(0, 1) * vary
        if relief:
            ys, xs = np.nonzero(mask)
            if len(ys):
                piece = _texture(rng, size)
                depth = ((ys - cy) ** 2 + (xs - cx) ** 2) < (0.8 * r) ** 2
                image[ys, xs] += (piece[ys, xs] * depth * relief)[:, None]
        if rim or touching:
            strength = rim if abs(rim) > 25 or not touching else -40.0
            _shade_edge(rng, image, mask, strength)
    if rng.random() < 0.25:  # cast shadows beside the objects
        inside = labels > 0
        dy, dx = rng.integers(-3, 4, 2)
        shadow = np.roll(inside, (dy, dx), (0, 1)) & ~inside
        image[shadow] -= rng.uniform(10, 45)
    return image, labels


def make_scene(seed: int, size: int = 192, kind: str | None = None) -> Scene:
    """The scene of this seed.

    Args:
        seed: any non-negative integer; seeds from :data:`HELD_OUT` on are kept from training.
        size: side in pixels.
        kind: one of :data:`KINDS` or :data:`PHOTO_LIKE`; None draws one of :data:`KINDS` with the
            probabilities :data:`SHARES`.
    """
    rng = np.random.default_rng([seed, 7])
    if kind == PHOTO_LIKE:
        image, labels, wholes = photolike_scenes.paint(rng, size)
        return Scene(image, labels, kind, wholes)
    drawn = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
    kind = drawn if kind is None else kind
    grey = bool(rng.random() < (0.6 if kind == "alike" else 0.2))
    if kind == "partition":
        image, labels = _partition(rng, size, grey)
    elif kind == "alike":
        image, labels = _alike(rng, size, grey)
    else:
        image, labels = _objects(rng, size, grey, parts=kind == "parts")
    if rng.random() < 0.4:
        image = image * (1 + _ramp(rng, size) * rng.uniform(0, 0.3))[..., None]
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1)) * size / 192))
    image = np.asarray(picture, np.float32)
    sigma = rng.uniform(0, 9) if rng.random() < 0.7 else 0.0
    if sigma:
        shape = (size, size, 1) if grey or rng.random() < 0.3 else (size, size, 3)
        image = image + rng.standard_normal(shape, np.float32) * np.float32(sigma)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), labels, kind)


def objects_of(labels: np.ndarray, min_share: float = 0.0035) -> list[int]:
    """Labels that cover at least ``min_share`` of the pixels, background included, ascending."""
    counts = np.bincount(labels.ravel(), minlength=256)
    return [int(k) for k in np.flatnonzero(counts >= max(1, min_share * labels.size)) if k < 255]


def depth_of(labels: np.ndarray) -> np.ndarray:
    """Distance (pixels, uint8, capped) of every pixel to the nearest border between labels or to
    the image's edge.
    """
    same = np.zeros((labels.shape[0] + 2, labels.shape[1] + 2), bool)
    inner = np.ones(labels.shape, bool)
    inner[1:] &= labels[1:] == labels[:-1]
    inner[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    same[1:-1, 1:-1] = inner
    depth = ndimage.distance_transform_edt(same)[1:-1, 1:-1]
    return np.minimum(depth, 255).astype(np.uint8)


def click_of(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel of ``mask`` (bool [h, w]) farthest from its border; the image's edge
    counts as border.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return 0, 0
    inside = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(xs[0] + x), int(ys[0] + y)
