"""Draws procedural scenes that look more like photos than those of :mod:`exporters.scenes`.

They have large objects of several materials, silhouettes, thin structures, holes, low contrast,
light and shadow, and the defects of cameras.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

_TILES = 120
_TILE = 320
_LAYOUTS = ("large", "scattered", "horizon", "regions", "wall")
_LAYOUT_SHARES = (0.38, 0.24, 0.16, 0.13, 0.09)

Labelled = tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], ...]]


# --- surfaces ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """Grey textures float32 [_TILES, _TILE, _TILE], mean 0, unit deviation: clouds, cloth, wood,
    grass, fur, foliage, plaster, speckles.
    """
    rng = np.random.default_rng(20260317)
    makers = (_clouds, _clouds, _cloth, _wood, _strokes, _strokes, _foliage, _speckles)
    tiles = np.empty((_TILES, _TILE, _TILE), np.float32)
    for i in range(_TILES):
        tile = makers[i % len(makers)](rng)
        tiles[i] = (tile - tile.mean()) / max(float(tile.std()), 1e-3)
    return np.clip(tiles, -3, 3)


def _clouds(rng: np.random.Generator, slope: float | None = None) -> np.ndarray:
    """Noise whose amplitude falls with frequency as f^-slope, as in photos of nature."""
    slope = float(rng.uniform(0.6, 2.0)) if slope is None else slope
    fy, fx = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]
    if rng.random() < 0.4:  # stretched along one direction
        fy = fy * rng.uniform(1, 5)
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    spectrum = rng.standard_normal((2, *frequency.shape)) * frequency**-slope
    return np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (_TILE, _TILE)).astype(np.float32)


def _coordinates(rng: np.random.Generator, warp: float) -> tuple[np.ndarray, np.ndarray]:
    """Turned and gently bent coordinates of a tile, in pixels."""
    yy, xx = np.mgrid[0:_TILE, 0:_TILE].astype(np.float32)
    bend = _clouds(rng, 2.2)
    bend *= warp / max(float(bend.std()), 1e-6)
    angle = rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return xx * c + yy * s + bend, yy * c - xx * s


def _cloth(rng: np.random.Generator) -> np.ndarray:
    """Weave, plaid or folds."""
    u, v = _coordinates(rng, rng.uniform(1, 8))
    period = np.exp(rng.uniform(np.log(3), np.log(30)))
    weave = np.sin(u * 6.28 / period) * (1 if rng.random() < 0.4 else np.sin(v * 6.28 / period))
    if rng.random() < 0.4:
        weave = np.sign(weave - rng.uniform(-0.6, 0.6))
    folds = _clouds(rng, 1.8)
    return weave + folds / max(float(folds.std()), 1e-6) * rng.uniform(0, 1.5)


def _wood(rng: np.random.Generator) -> np.ndarray:
    """Rings and grain."""
    u, _ = _coordinates(rng, rng.uniform(8, 30))
    rings = np.sin(u * 6.28 / rng.uniform(7, 40))
    grain = ndimage.gaussian_filter(rng.standard_normal((_TILE, _TILE)), (0.6, rng.uniform(4, 14)))
    return rings + grain / max(float(grain.std()), 1e-6) * rng.uniform(0.2, 0.8)


def _strokes(rng: np.random.Generator) -> np.ndarray:
    """Grass or fur: short lines of about one direction."""
    canvas = Image.new("L", (_TILE, _TILE), 128)
    draw = ImageDraw.Draw(canvas)
    lean, spread = rng.uniform(0, np.pi), rng.uniform(0.1, 0.6)
    length, width = rng.uniform(6, 40), int(rng.integers(1, 4))
    count = int(1.2 * _TILE * _TILE / (length * width))
    at, angle = rng.uniform(-20, _TILE + 20, (count, 2)), lean + rng.normal(0, spread, count)
    ends = at + length * np.stack([np.cos(angle), np.sin(angle)], 1)
    for (x0, y0), (x1, y1), shade in zip(at, ends, rng.integers(0, 256, count), strict=True):
        draw.line((x0, y0, x1, y1), fill=int(shade), width=width)
    return np.asarray(canvas, np.float32)


def _foliage(rng: np.random.Generator) -> np.ndarray:
    """Leaves, pebbles or scales that cover one another, of sizes spread by a power law."""
    canvas = Image.new("L", (_TILE, _TILE), 128)
    draw = ImageDraw.Draw(canvas)
    least = rng.uniform(1.5, 5)
    count = int(2.5 * _TILE * _TILE / (least * least * 12))
    radii = np.minimum(least * rng.random(count) ** -0.5, 40)
    at, thin = rng.uniform(0, _TILE, (count, 2)), rng.uniform(0.4, 1, (count, 2))
    for (x, y), r, (a, b), shade in zip(at, radii, thin, rng.integers(0, 256, count), strict=True):
        draw.ellipse((x - r * a, y - r * b, x + r * a, y + r * b), fill=int(shade))
    return np.asarray(canvas, np.float32)


def _speckles(rng: np.random.Generator) -> np.ndarray:
    """Plaster, skin or stone: blurred noise, sometimes thresholded, sometimes as relief."""
    tile = ndimage.gaussian_filter(rng.standard_normal((_TILE, _TILE)), rng.uniform(0.7, 4))
    kind = rng.random()
    if kind < 0.35:
        tile = np.maximum(tile / max(float(tile.std()), 1e-6), rng.uniform(0, 1.8))
    elif kind < 0.6:
        tile = ndimage.sobel(tile, axis=int(rng.integers(2)))
    return tile


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random piece of the bank at a random scale, float32 [size, size]."""
    tile = _bank()[rng.integers(_TILES)]
    side = float(np.clip(size * np.exp(rng.uniform(np.log(0.45), np.log(1.7))), 24, _TILE))
    x, y = rng.uniform(0, _TILE - side + 1e-6, 2)
    piece = Image.fromarray(tile).resize(
        (size, size),
        Image.Resampling.BILINEAR,
        box=(x, y, min(x + side, _TILE), min(y + side, _TILE)),
    )
    grain = np.asarray(piece, np.float32)
    return grain.T if rng.random() < 0.5 else grain


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Brightness falling off in some direction, float32 [size, size] in about -1..1."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return (np.cos(angle) * line[None] + np.sin(angle) * line[:, None]).astype(np.float32)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise float32 [size, size] of about unit deviation with ``cells`` bumps a side."""
    small = Image.fromarray(rng.standard_normal((cells + 3, cells + 3)).astype(np.float32))
    big = small.resize((size, size), Image.Resampling.BICUBIC, box=(1, 1, cells + 2, cells + 2))
    return np.asarray(big, np.float32)


_NATURAL = np.array(
    [
        [205, 160, 130], [150, 100, 75], [95, 65, 45], [70, 95, 50], [120, 135, 80],
        [150, 180, 210], [90, 120, 165], [180, 175, 165], [110, 105, 100], [60, 55, 55],
        [225, 220, 210], [160, 130, 90], [170, 60, 50], [200, 150, 60], [45, 60, 80],
    ],
    np.float32,
)  # fmt: skip


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour float32 [3]: mostly of nature, sometimes any, sometimes nearly black or white."""
    kind = rng.random()
    if kind < 0.5:
        colour = _NATURAL[rng.integers(len(_NATURAL))] * rng.uniform(0.4, 1.25)
        colour = colour + rng.normal(0, 12, 3)
    elif kind < 0.82:
        colour = rng.uniform(0, 255, 3) * rng.uniform(0.4, 1) + rng.uniform(0, 100)
    else:
        colour = np.full(3, rng.uniform(2, 45) if kind < 0.93 else rng.uniform(205, 252))
        colour = colour + rng.normal(0, 5, 3)
    return np.clip(colour, 0, 255).astype(np.float32)


def _material(rng: np.random.Generator, colour: np.ndarray, size: int) -> np.ndarray:
    """A surface float32 [size, size, 3] of about this colour."""
    surface = np.empty((size, size, 3), np.float32)
    surface[:] = colour
    liveliness = float(np.exp(rng.uniform(np.log(0.15), np.log(1.6))))
    for _ in range(int(rng.integers(0, 3))):
        tint = np.float32(rng.uniform(3, 26) * liveliness) * rng.uniform(0.5, 1, 3)
        if rng.random() < 0.15:
            tint = tint * rng.choice([-1, 1], 3)
        surface += _texture(rng, size)[..., None] * tint.astype(np.float32)
    if rng.random() < 0.6:  # patches of another hue
        tint = rng.normal(0, 14, 3) * liveliness
        surface += _smooth(rng, size, int(rng.integers(1, 7)))[..., None] * tint.astype(np.float32)
    if rng.random() < 0.5:
        surface += (_ramp(rng, size) * np.float32(rng.uniform(5, 45)))[..., None]
    return surface


# --- shapes --------------------------------------------------------------------------------------


def _polygon(size: int, corners: np.ndarray) -> np.ndarray:
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=1)
    return np.asarray(canvas, bool)


def _lines(size: int, path: np.ndarray, width: float) -> np.ndarray:
    canvas = Image.new("L", (size, size))
    points = [(float(x), float(y)) for x, y in path]
    ImageDraw.Draw(canvas).line(points, fill=1, width=max(1, round(width)), joint="curve")
    return np.asarray(canvas, bool)


def _turned(
    rng: np.random.Generator, points: np.ndarray, centre: np.ndarray, r: float
) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) * r + centre


def _blob(rng: np.random.Generator, size: int, centre: np.ndarray, r: float) -> np.ndarray:
    """A smooth or ragged outline."""
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    length = np.ones(90)
    rough = rng.uniform(0.1, 0.4)
    for k in range(2, int(rng.integers(4, 14))):
        length += rng.normal(0, rough / k) * np.cos(k * angles + rng.uniform(0, 6.3))
    length = np.clip(length, 0.3, 1.9)
    flat = rng.uniform(0.5, 1)
    points = np.stack([np.cos(angles) * length, flat * np.sin(angles) * length], 1)
    return _polygon(size, _turned(rng, points, centre, r))


def _angular(rng: np.random.Generator, size: int, centre: np.ndarray, r: float) -> np.ndarray:
    """Boxes, triangles, irregular polygons; boxes often upright."""
    k = int(rng.choice([3, 4, 4, 4, 5, 6, 8]))
    if k == 4:
        flat = rng.uniform(0.3, 1)
        points = np.array([[-1, -flat], [1, -flat], [1, flat], [-1, flat]]) * 0.85
        points[:2] *= 1 if rng.random() < 0.6 else rng.uniform(0.4, 1)
        if rng.random() < 0.6:
            return _polygon(size, points[:, :: int(rng.choice([-1, 1]))] * r + centre)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, k)) if k > 4 else np.arange(k) * 2 * np.pi / k
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.6, 1.1, (k, 1))
    return _polygon(size, _turned(rng, points, centre, r))


def _creature(rng: np.random.Generator, size: int, centre: np.ndarray, r: float) -> np.ndarray:
    """A body with a head and limbs."""
    mask = _blob(rng, size, centre, r * 0.75)
    lean = rng.uniform(0, 2 * np.pi)
    for i in range(int(rng.integers(2, 7))):
        angle = lean + rng.normal(0, 1.4)
        way = np.array([np.cos(angle), np.sin(angle)])
        if i == 0:
            mask |= _blob(rng, size, centre + way * r * 0.85, r * rng.uniform(0.25, 0.45))
        else:
            knee = centre + way * r * rng.uniform(0.7, 1.0)
            foot = knee + np.array([np.cos(angle + 0.6), np.sin(angle + 0.6)]) * r * 0.6
            mask |= _lines(size, np.array([centre, knee, foot]), r * rng.uniform(0.08, 0.35))
    return mask


def _cloudy(rng: np.random.Generator, size: int, centre: np.ndarray, r: float) -> np.ndarray:
    """A ragged region: smooth noise above a threshold that rises away from the centre."""
    line = np.arange(size, dtype=np.float32)
    away = np.hypot(line[:, None] - centre[1], line[None] - centre[0]) / max(r, 1)
    field = 0.35 * _smooth(rng, size, int(rng.integers(4, 10)))
    field = field + 0.12 * _smooth(rng, size, int(rng.integers(12, 26)))
    labels, count = ndimage.label(away + field < 0.95)
    if not count:
        return np.zeros((size, size), bool)
    return np.asarray(labels == 1 + int(np.bincount(labels.ravel())[1:].argmax()))


def _thin(rng: np.random.Generator, size: int, centre: np.ndarray, r: float) -> np.ndarray:
    """A curve, sometimes branching or closed, of a width of 2 % to 6 % of the picture."""
    width = size * rng.uniform(0.016, 0.06)
    angle = np.cumsum(rng.normal(0, 0.35, 24)) + rng.uniform(0, 6.3)
    path = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1), 0)
    path = (path - path.mean(0)) / max(float(np.abs(path - path.mean(0)).max()), 1e-6)
    if rng.random() < 0.15:
        turn = np.linspace(0, 2 * np.pi, 40)
        path = np.stack([np.cos(turn), rng.uniform(0.4, 1) * np.sin(turn)], 1)
    path = path * max(r, 0.2 * size) * 1.3 + centre
    mask = _lines(size, path, width)
    for _ in range(int(rng.integers(0, 4))):
        start = path[rng.integers(len(path))]
        turn = np.cumsum(rng.normal(0, 0.3, 8)) + rng.uniform(0, 6.3)
        branch = start + np.cumsum(np.stack([np.cos(turn), np.sin(turn)], 1), 0) * r * 0.15
        mask |= _lines(size, branch, width * rng.uniform(0.5, 1))
    return mask


_SHAPES = (_blob, _angular, _creature, _cloudy, _thin)
_SHAPE_SHARES = (0.32, 0.2, 0.22, 0.16, 0.1)


def _shape(rng: np.random.Generator, size: int, share: float) -> np.ndarray:
    """A silhouette bool [size, size] that covers very roughly this share of the picture."""
    r = size * float(np.sqrt(share / 2.2))
    slack = 0.5 if share < 0.25 else 0.18
    centre = np.array([0.5, 0.5]) * size + rng.uniform(-slack, slack, 2) * size
    make = _SHAPES[int(rng.choice(len(_SHAPES), p=_SHAPE_SHARES))]
    if share > 0.25 and make is _thin:
        make = _creature
    mask = make(rng, size, centre, r)
    if rng.random() < 0.15:
        for _ in range(int(rng.integers(1, 4))):
            inside = centre + rng.uniform(-0.5, 0.5, 2) * r
            mask = mask & ~_blob(rng, size, inside, r * rng.uniform(0.1, 0.4))
    return mask


# --- painting ------------------------------------------------------------------------------------


def _soft(mask: np.ndarray, radius: float) -> np.ndarray:
    """``mask`` blurred, float32 [s, s] in 0..1."""
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _light(rng: np.random.Generator, mask: np.ndarray, surface: np.ndarray) -> None:
    """Shade ``surface`` as if ``mask`` were a rounded body lit from one side."""
    size = len(mask)
    height = _soft(mask, size * rng.uniform(0.015, 0.09))
    gy, gx = np.gradient(height)
    angle, gain = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.2, 1.3)
    side = np.clip((np.cos(angle) * gx + np.sin(angle) * gy) * gain, -1, 1)
    rim = (height - 1) * rng.uniform(0, 0.7)
    surface *= np.clip(1 + 0.55 * side + rim, 0.1, 1.7)[..., None]


class _Canvas:
    """A picture being painted: pixels, labels and wholes."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.colours = [_colour(rng)]
        self.image = _material(rng, self.colours[0], size)
        self.labels = np.zeros((size, size), np.uint8)
        self.wholes: list[tuple[int, ...]] = []
        self.top = 0

    def colour(self, near: np.ndarray | None = None) -> np.ndarray:
        """A colour for the next object: usually apart from the latest, sometimes hardly so."""
        rng = self.rng
        if near is not None and rng.random() < 0.28:
            return np.clip(near + rng.normal(0, 14, 3), 0, 255).astype(np.float32)
        for _ in range(6):
            colour = _colour(rng)
            if min(float(np.abs(colour - c).max()) for c in self.colours[-3:]) > 35:
                break
        self.colours.append(colour)
        return colour

    def paint(self, mask: np.ndarray, surface: np.ndarray) -> None:
        """Lay ``surface`` over the picture where ``mask`` is, with a soft edge."""
        alpha = _soft(mask, self.rng.uniform(0.3, 0.9) * self.size / 192)[..., None]
        self.image += alpha * (surface - self.image)

    def add(self, mask: np.ndarray, parts: float = 0.4) -> None:
        """Lay an object over the picture; with probability ``parts`` made of several materials."""
        rng, size = self.rng, self.size
        if mask.sum() < 0.003 * mask.size or self.top > 240:
            return
        if rng.random() < 0.3:  # its shadow
            shift = rng.integers(-size // 16, size // 16 + 1, 2)
            shadow = np.roll(_soft(mask, size * rng.uniform(0.01, 0.05)), shift, (0, 1))
            self.image *= (1 - shadow * np.float32(rng.uniform(0.15, 0.6)))[..., None]
        near = self.image[mask].mean(0)
        dark = rng.random() < 0.12
        colour = rng.uniform(3, 40, 3).astype(np.float32) if dark else self.colour(near)
        surface = (
            _material(rng, colour, size)
            if not dark
            else colour + _texture(rng, size)[..., None] * np.float32(rng.uniform(0, 6))
        )
        self.top += 1
        label = self.top
        self.labels[mask] = label
        pieces = [label]
        if rng.random() < parts:
            apart = rng.random() < 0.5  # parts with labels of their own, or one object
            for piece in self._pieces(mask):
                surface = np.where(piece[..., None], _material(rng, self.colour(), size), surface)
                if apart and piece.sum() > 0.004 * mask.size and self.top < 240:
                    self.top += 1
                    self.labels[piece] = self.top
                    pieces.append(self.top)
        if rng.random() < 0.12:  # veins
            vein = _soft(
                _thin(rng, size, np.array([size, size]) * rng.uniform(0.3, 0.7, 2), size / 3), 0.8
            )
            surface = surface * (1 - vein * np.float32(rng.uniform(0.2, 0.7)))[..., None]
        if rng.random() < 0.6:
            _light(rng, mask, surface)
        self.paint(mask, surface)
        if len(pieces) > 1:
            self.wholes.append(tuple(pieces))

    def _pieces(self, mask: np.ndarray) -> list[np.ndarray]:
        """Regions inside ``mask`` that carry another material: bands, cuts, patches, spots."""
        rng, size = self.rng, self.size
        ys, xs = np.nonzero(mask)
        kind, count = rng.random(), int(rng.integers(1, 4))
        extent = max(float(np.ptp(xs)), float(np.ptp(ys)), 4.0)
        if kind < 0.4:  # cut straight across
            ramp = _ramp(rng, size) + 0.1 * rng.uniform(0, 1) * _smooth(rng, size, 5)
            levels = np.sort(rng.choice(ramp[mask], 2))
            return [mask & (ramp > levels[0])] + [mask & (ramp > levels[1])] * (count > 1)
        if kind < 0.6:  # patches
            field = _smooth(rng, size, int(rng.integers(2, 9)))
            return [mask & (field > rng.uniform(0, 0.8))]
        pieces = []
        for _ in range(count + 1):
            at = int(rng.integers(len(xs)))
            make = (_blob, _angular)[int(rng.integers(2))]
            where = np.array([xs[at], ys[at]], float)
            pieces.append(mask & make(rng, size, where, extent * rng.uniform(0.08, 0.28)))
        return pieces

    def defocus(self) -> None:
        """Blur what has been painted so far, as behind the plane of focus."""
        if self.rng.random() < 0.5:
            sigma = self.rng.uniform(0.5, 4) * self.size / 192
            self.image = ndimage.gaussian_filter(self.image, (sigma, sigma, 0))


def _large(canvas: _Canvas) -> None:
    """One object of a third to nine tenths of the picture, and a few small ones."""
    rng, size = canvas.rng, canvas.size
    for _ in range(int(rng.integers(0, 4))):
        canvas.add(_shape(rng, size, rng.uniform(0.01, 0.12)))
    canvas.defocus()
    canvas.add(_shape(rng, size, rng.uniform(0.35, 0.95)), parts=0.6)
    for _ in range(int(rng.integers(0, 4))):
        canvas.add(_shape(rng, size, rng.uniform(0.008, 0.06)), parts=0.2)


def _scattered(canvas: _Canvas) -> None:
    """Objects of all sizes that cover one another."""
    rng = canvas.rng
    for i in range(int(rng.integers(3, 12))):
        if i == 2:
            canvas.defocus()
        canvas.add(_shape(rng, canvas.size, float(np.exp(rng.uniform(np.log(0.01), np.log(0.4))))))


def _horizon(canvas: _Canvas) -> None:
    """Sky and ground, and what stands before them."""
    rng, size = canvas.rng, canvas.size
    sky = np.array([rng.uniform(120, 215), rng.uniform(150, 225), rng.uniform(180, 250)])
    haze = np.linspace(0, 1, size, dtype=np.float32)[:, None, None] * rng.uniform(-60, 60)
    canvas.image = (canvas.image - canvas.image.mean((0, 1))) * np.float32(rng.uniform(0, 0.5))
    canvas.image = (canvas.image + sky.astype(np.float32) + haze).astype(np.float32)
    line = size * rng.uniform(0.3, 0.9) + _smooth(rng, size, 4)[0] * size * rng.uniform(0, 0.06)
    canvas.add(np.arange(size)[:, None] > line, parts=0.2)
    canvas.defocus()
    for _ in range(int(rng.integers(1, 5))):
        share = float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
        canvas.add(_shape(rng, size, share))


def _regions(canvas: _Canvas) -> None:
    """The whole picture divided into ragged regions, contrasts often low."""
    rng, size = canvas.rng, canvas.size
    count = int(rng.integers(2, 12))
    seeds = rng.uniform(0, size, (count, 2)).astype(np.float32)
    line = np.arange(size, dtype=np.float32)
    rough = size * rng.uniform(0, 0.06)
    yy = line[:, None] + rough * _smooth(rng, size, 8) + 0.3 * rough * _smooth(rng, size, 25)
    xx = line[None] + rough * _smooth(rng, size, 8) + 0.3 * rough * _smooth(rng, size, 25)
    distance = (yy[..., None] - seeds[:, 0]) ** 2 + (xx[..., None] - seeds[:, 1]) ** 2
    distance = distance + rng.uniform(0, (size * 0.2) ** 2, count).astype(np.float32)
    nearest = distance.argmin(2)
    contrast = float(rng.choice([0.35, 0.7, 1.0]))
    for k in range(count):
        mask = nearest == k
        if k == 0 or not mask.any():
            continue
        canvas.top += 1
        canvas.labels[mask] = canvas.top
        colour = canvas.colours[0] + contrast * (canvas.colour() - canvas.colours[0])
        canvas.paint(mask, _material(rng, colour, size))


def _wall(canvas: _Canvas) -> None:
    """Rows of bricks, tiles, windows or cells of about one look."""
    rng, size = canvas.rng, canvas.size
    rows = int(rng.integers(2, 8))
    height, width = size / rows, size / rng.uniform(1.5, 7)
    offset = rng.choice([0.0, 0.5])
    gap = float(min(height, width) * rng.uniform(0.02, 0.16))
    look, vary = canvas.colour(), float(rng.choice([4.0, 12.0, 30.0]))
    surface = _material(rng, look, size)
    if rng.random() < 0.6:  # mortar or frames of the bricks' own hue
        away = rng.uniform(30, 90) * (1 if look.mean() < 90 else -1)
        canvas.image += look + np.float32(away) - canvas.colours[0]
    slope, jitter = rng.uniform(-0.06, 0.06), rng.uniform(0, 0.05)
    for row in range(-1, rows + 1):
        for column in range(-1, int(size / width) + 2):
            if rng.random() < 0.06 or canvas.top > 60:
                continue
            y0, x0 = row * height, (column + offset * (row % 2)) * width
            corners = np.array(
                [[x0, y0], [x0 + width, y0], [x0 + width, y0 + height], [x0, y0 + height]]
            )
            middle = corners.mean(0)
            corners = middle + (corners - middle) * (1 - 2 * gap / np.array([width, height]))
            corners = corners + rng.normal(0, jitter, (4, 2)) * min(width, height)
            corners[:, 1] += slope * (corners[:, 0] - size / 2)
            mask = _polygon(size, corners)
            if mask.sum() < 0.003 * mask.size:
                continue
            canvas.top += 1
            canvas.labels[mask] = canvas.top
            canvas.paint(mask, surface + rng.normal(0, vary, 3).astype(np.float32))
    if rng.random() < 0.3:
        canvas.add(_shape(rng, size, rng.uniform(0.05, 0.4)))


def camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add the defects of a camera: uneven light, blur, noise, white balance, JPEG; uint8."""
    size = len(image)
    if rng.random() < 0.5:
        image = image * (1 + _ramp(rng, size) * np.float32(rng.uniform(0, 0.35)))[..., None]
    if rng.random() < 0.35:  # vignetting
        line = np.linspace(-1, 1, size, dtype=np.float32)
        image = image * (1 - rng.uniform(0.05, 0.3) * (line[:, None] ** 2 + line**2))[..., None]
    if rng.random() < 0.5:
        image = image * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.3:  # contrast of the whole picture
        image = 128 + (image - 128) * np.float32(rng.uniform(0.45, 1.2)) + rng.uniform(-25, 25)
    image = np.clip(image, 0, 255)
    sigma = float(rng.uniform(0.2, 1.2)) * size / 192
    image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    if rng.random() < 0.75:
        shape = (size, size, 1 if rng.random() < 0.4 else 3)
        noise = rng.standard_normal(shape, np.float32)
        if rng.random() < 0.4:
            noise = ndimage.gaussian_filter(noise, (0.7, 0.7, 0)) * 1.8
        image = image + noise * (
            rng.uniform(0, 6) + np.sqrt(image) * np.float32(rng.uniform(0, 0.7))
        )
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        pixels = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, 2)
    if rng.random() < 0.5:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(35, 95)))
        pixels = np.asarray(Image.open(file).convert("RGB"))
    return pixels


_PAINTERS = dict(zip(_LAYOUTS, (_large, _scattered, _horizon, _regions, _wall), strict=True))


def paint(rng: np.random.Generator, size: int) -> Labelled:
    """A photo-like picture uint8 [size, size, 3], its labels uint8 [size, size], and its wholes."""
    canvas = _Canvas(rng, size)
    layout = _LAYOUTS[int(rng.choice(len(_LAYOUTS), p=_LAYOUT_SHARES))]
    _PAINTERS[layout](canvas)
    return camera(rng, canvas.image), canvas.labels, tuple(canvas.wholes)
