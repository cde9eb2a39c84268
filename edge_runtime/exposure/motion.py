"""How far the camera moved between two frames, by phase correlation, and where it now looks.

Pure: it reads no clock, file or socket.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_GRID = 256  # pixels of the reduced frame's longest side
_BAND = 0.1  # of the low-pass filter in cycles per reduced pixel: noise dominates above it
_BINS = 6  # of a colour histogram, per channel

KNOWN_PEAK = 0.35
"""Below this the motion is unknown. Matched frames reach 0.8; unrelated ones have about 0.1."""

ERROR = 1 / 1024
"""Error that one registration of frames related by pure motion is charged with, per axis and as a
share of the image's longest side: 1 pixel at 1024. The largest one measured is 0.8."""

_CLEAN_PEAK = 0.8  # pure motion reaches it; beyond 1 degree of rotation, frames do not
_SLOPE = 0.2  # error added per unit that the peak is lower, as a share of the longest side
_STILL = 1 / 2048  # motion below it (half a pixel at 1024) counts as none
_BLOCKS = 64  # along the longest side: 16 pixels at 1024
_TEXTURED = 8.0  # grey levels between neighbouring blocks from which on motion shows
_MOVED = 0.06  # of a block (1 pixel at 1024): less is no motion
_REGIONS = 3  # per side; those in which nothing moved must be the majority
_ENOUGH = 4  # textured blocks for a region to be judged
_KEYS = 12  # key frames kept
_TRIES = 4  # key frames that a frame is compared with at most
_OVERLAP = 0.25  # a shift by this share of a side calls for a nearer key frame

_CHANGED_PEAK = 0.15
_CHANGED_COLOURS = 0.5


class Position(NamedTuple):
    """Where a frame lies in the scene, in pixels of the resized image.

    Attributes:
        y, x: of the frame's top left corner, from that of the first frame of its part.
        error: the true place is not further away than this, per axis.
        part: frames of different parts have no known motion between them.
    """

    y: float
    x: float
    error: float
    part: int = 0


class Look(NamedTuple):
    """What is kept of a frame to register others against it.

    Attributes:
        spectrum: complex64, the windowed grey frame's half spectrum.
        blocks: float32 ``[rows, columns]``, mean grey of blocks of 16 pixels at 1024.
        colours: float32 ``[bins]``, a coarse colour histogram that sums to 1. Brightness is scaled
            to a fixed mean first, so that light alone changes it little.
        grid: ``(rows, columns)`` of the reduced frame.
        size: ``(h, w)`` of the resized image.
    """

    spectrum: np.ndarray
    blocks: np.ndarray
    colours: np.ndarray
    grid: tuple[int, int]
    size: tuple[int, int]


class Motion(NamedTuple):
    """How far the content moved from one frame to another, in pixels of the resized image.

    Attributes:
        dx: to the right.
        dy: downwards.
        peak: height of the correlation's peak: 1 for the same frame shifted, near 0 for unrelated
            frames.
    """

    dx: float
    dy: float
    peak: float

    @property
    def known(self) -> bool:
        """True if `dx` and `dy` can be relied on within :data:`ERROR`."""
        return self.peak >= KNOWN_PEAK


def look_at(image: np.ndarray) -> Look:
    """What to keep of a frame. Make it once per frame.

    Args:
        image: uint8 ``[h, w, 3]``, resized as for :func:`engines.windows.cut`.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (h, w, 3)")
    height, width = image.shape[:2]
    scale = min(1.0, _GRID / max(height, width))
    grid = max(1, round(height * scale)), max(1, round(width * scale))
    small = Image.fromarray(np.ascontiguousarray(image)).resize(
        grid[::-1], Image.Resampling.BOX, reducing_gap=1.0
    )
    grey = np.asarray(small.convert("L"), np.float32)
    mean = float(grey.mean())
    # Without its mean: otherwise the window's own shape would match itself at no motion.
    spectrum = np.fft.rfft2((grey - mean) * _window(grid)).astype(np.complex64)
    level = np.asarray(small, np.float32) * (110 / max(mean, 8.0) * _BINS / 256)
    bins = np.minimum(level.astype(np.int32), _BINS - 1)
    index = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
    colours = np.bincount(index.ravel(), minlength=_BINS**3).astype(np.float32) / index.size
    block = max(1, max(grid) // _BLOCKS)
    rows, columns = (max(1, side // block) for side in grid)
    whole = grey[: rows * block, : columns * block]
    blocks = whole.reshape(rows, -1, columns, whole.shape[1] // columns).mean((1, 3))
    return Look(spectrum, blocks, colours, grid, (height, width))


def still(earlier: Look, later: Look) -> bool:
    """True if the camera has not moved, whatever moves before it.

    Blocks with texture hardly differ in most parts of the picture. The difference of two blocks
    over that of neighbouring ones is about the motion in blocks, for motion of less than a block.
    """
    if earlier.size != later.size:
        return False
    rows, columns = (side - 1 for side in earlier.blocks.shape)
    here, change = earlier.blocks[:rows, :columns], later.blocks - earlier.blocks
    slopes = np.abs(earlier.blocks[1:, :columns] - here), np.abs(earlier.blocks[:rows, 1:] - here)
    slope, size = np.maximum(*slopes), np.abs(change[:rows, :columns])
    judged, unmoved = [], np.zeros((rows, columns), bool)
    for ys in np.array_split(np.arange(rows), _REGIONS):
        for xs in np.array_split(np.arange(columns), _REGIONS):
            at = np.ix_(ys, xs)
            textured = slope[at] >= _TEXTURED
            if np.count_nonzero(textured) >= _ENOUGH:
                judged.append(np.median(size[at][textured] / slope[at][textured]) <= _MOVED)
                unmoved[at] = judged[-1]
    if len(judged) < _REGIONS or sum(judged) <= len(judged) / 2:
        return False
    for each in slopes:  # stripes don't show motion along them
        textured = unmoved & (each >= _TEXTURED)
        if np.count_nonzero(textured) < _ENOUGH:
            return False
        if np.median(size[textured] / each[textured]) > _MOVED:
            return False
    return True


def motion(earlier: Look, later: Look) -> Motion:
    """How far the content moved between two frames of the same size.

    The peak of the phase correlation, low-passed so that it has a Gaussian shape, and a parabola
    through the logarithms around it. Motion above half of a side cannot be told from motion the
    other way; so register frames that overlap by more than that.

    Returns:
        a peak of 0, so that nothing is known, if the sizes differ or a frame has no texture.
    """
    if earlier.size != later.size:
        return Motion(0.0, 0.0, 0.0)
    cross = later.spectrum * earlier.spectrum.conj()
    size = np.abs(cross)
    if not float(size.max()) > 1e-3:
        return Motion(0.0, 0.0, 0.0)
    weight, total = _weight(earlier.grid)
    surface = np.fft.irfft2(cross * (weight / (size + 1e-6)), s=earlier.grid) / total
    rows, columns = earlier.grid
    y, x = divmod(int(surface.argmax()), columns)
    top = float(surface[y, x])
    dy = y + _vertex(surface[y - 1, x], top, surface[(y + 1) % rows, x])
    dx = x + _vertex(surface[y, x - 1], top, surface[y, (x + 1) % columns])
    dy -= rows if dy > rows / 2 else 0
    dx -= columns if dx > columns / 2 else 0
    height, width = earlier.size
    # Frames that overlap in part can't reach 1: the window fades out what they share. Undo that.
    fade = _fade(abs(dy) / rows) * _fade(abs(dx) / columns)
    return Motion(dx * width / columns, dy * height / rows, min(1.0, top / max(fade, 2 / 3)))


def changed(earlier: Look, later: Look) -> bool:
    """True if the picture really changed, as at a cut: neither place nor colours match.

    It errs towards False, which is safe: the scene then goes on, so the budget of the old scene
    goes on too, and a new picture is charged to it as unknown motion. A wrong True would grant a
    fresh budget for content that parties have seen already.
    """
    alike = float(np.minimum(earlier.colours, later.colours).sum())
    return 1 - alike > _CHANGED_COLOURS and motion(earlier, later).peak < _CHANGED_PEAK


class Tracker:
    """Finds each frame's place in the scene. One per scene.

    Error: frames that differ by a shift are placed within 1 pixel (at 1024, measured). Rotation and
    zoom lower the peak, and the error grows as it falls; but one degree of rotation or 2 % of zoom
    is not noticed, and moves the corners by up to 10 pixels.

    A frame is registered against a key frame, not against the one before it, so that errors do not
    add up while the camera stays near. A new key frame is made when the overlap gets small; its
    error is that of the old one plus that of the registration. If no key frame matches, the motion
    is unknown and a new part of the scene begins.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[Look, Position]] = []
        self._last: tuple[Look, Position] | None = None
        self._parts = 0

    def follow(self, look: Look) -> Position:
        """The place of the next frame. Frames must come in order.

        Motion below half a pixel (at 1024) from a key frame counts as none, so that a still camera
        shows nothing new. What that leaves out is a strip of at most 1.5 pixels along a window.
        """
        found = self._register(look)
        if found is None:
            position = Position(0.0, 0.0, 0.0, self._parts)
            self._parts += 1
            self._add(look, position)
        else:
            position, moved = found
            if moved > _OVERLAP:
                self._add(look, position)
        self._last = (look, position)
        return position

    def _register(self, look: Look) -> tuple[Position, float] | None:
        """Position and, as a share of a side, how far from the key frame that gave it."""
        if self._last is None:
            return None
        last = self._last[1]

        def distance(key: tuple[Look, Position]) -> float:
            at = key[1]
            return abs(at.y - last.y) + abs(at.x - last.x) + (1e6 if at.part != last.part else 0)

        nearest = sorted(self._keys, key=distance)[:_TRIES]
        best: tuple[Position, float] | None = None
        # Through the last frame only if no key frame matches: its error is larger.
        for earlier, at in nearest:
            if still(earlier, look):
                return at, 0.0
        for earlier, at in [*nearest, self._last]:
            if best is not None and earlier is self._last[0]:
                break
            shift = motion(earlier, look)
            if not shift.known:
                continue
            moved = max(abs(shift.dy) / look.size[0], abs(shift.dx) / look.size[1])
            if earlier is self._last[0]:
                moved = 1.0  # nothing older matches, so this frame becomes a key frame
            longest = max(look.size)
            if shift.peak >= _CLEAN_PEAK and max(abs(shift.dy), abs(shift.dx)) <= _STILL * longest:
                return at, 0.0
            error = ERROR + _SLOPE * max(0.0, _CLEAN_PEAK - shift.peak)
            there = Position(at.y - shift.dy, at.x - shift.dx, at.error + error * longest, at.part)
            if best is None or there.error < best[0].error:
                best = there, moved
            if shift.peak >= _CLEAN_PEAK and moved <= _OVERLAP:
                break
        return best

    def _add(self, look: Look, position: Position) -> None:
        if len(self._keys) >= _KEYS:
            # The first key frame stays: it has no error, and cameras come back to it.
            del self._keys[1]
        self._keys.append((look, position))


def _fade(shift: float) -> float:
    """Overlap of a Hann window with itself shifted by this share of its length, relative to 0."""
    if shift >= 1:
        return 0.0
    angle = 2 * np.pi * shift
    return float((1 - shift) * (2 / 3 + np.cos(angle) / 3) + np.sin(angle) / (2 * np.pi))


def _vertex(before: float, peak: float, after: float) -> float:
    """Offset of a Gaussian's top from its highest sample, in (-0.5, 0.5)."""
    if min(before, after) <= 0 or peak <= 0:
        return 0.0
    a, b, c = np.log([before, peak, after])
    bend = a - 2 * b + c
    return float(np.clip((a - c) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0


_cache: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, float]] = {}


def _tables(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Hann window, Gaussian weight of the half spectrum, and the peak of a perfect match."""
    if grid not in _cache:
        rows, columns = grid
        window = np.outer(np.hanning(rows + 2)[1:-1], np.hanning(columns + 2)[1:-1])
        fy, fx = np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None]
        weight = np.exp(-(fy**2 + fx**2) / (2 * _BAND**2)).astype(np.float32)
        weight[0, 0] = 0.0
        total = float(np.fft.irfft2(weight, s=grid)[0, 0])
        if len(_cache) >= 8:
            _cache.clear()
        _cache[grid] = window.astype(np.float32), weight, total or 1.0
    return _cache[grid]


def _window(grid: tuple[int, int]) -> np.ndarray:
    return _tables(grid)[0]


def _weight(grid: tuple[int, int]) -> tuple[np.ndarray, float]:
    return _tables(grid)[1:]
