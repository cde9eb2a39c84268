"""Motion between frames: measured on pictures whose true motion is known."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edge_runtime
from edge_runtime.exposure.motion import (
    ERROR,
    Look,
    Position,
    Tracker,
    changed,
    look_at,
    motion,
    still,
)

PHOTO = Path(edge_runtime.__file__).parent / "photos" / "coins.png"
SIZE = (288, 512)  # of a frame; errors are stated for a longest side of 1024
AT = (150, 200)  # of the first frame in its picture
PICTURES = ("texture", "blobs", "coins")
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@cache
def picture(name: str, seed: int = 0) -> np.ndarray:
    """A large picture to cut frames from, uint8 ``[640, 960, 3]``."""
    random = np.random.default_rng(seed)
    if name == "coins":
        return np.array(Image.open(PHOTO).convert("RGB").resize((960, 640), _BICUBIC))
    out = np.zeros((640, 960, 3), np.float32)
    sizes = (4, 8, 16, 32, 64, 128) if name == "texture" else (64, 128, 256)
    for size in sizes:
        grid = random.normal(size=(640 // size + 2, 960 // size + 2, 3)).astype(np.float32)
        for c in range(3):
            layer = Image.fromarray(grid[..., c]).resize((960, 640), _BICUBIC)
            out[..., c] += np.asarray(layer) * size**0.7
    if name == "blobs":  # objects with sharp edges on a smooth ground
        ys, xs = np.mgrid[:640, :960]
        for _ in range(60):
            y, x, r = random.integers(0, 640), random.integers(0, 960), random.integers(10, 60)
            out[(ys - y) ** 2 + (xs - x) ** 2 < r * r] += random.normal(size=3) * 80
    low, high = out.min(), out.max()
    return ((out - low) / (high - low) * 255).astype(np.uint8)


def frame(
    source: np.ndarray,
    dy: float = 0,
    dx: float = 0,
    degrees: float = 0,
    zoom: float = 1,
    noise: float = 3,
    seed: int = 1,
) -> np.ndarray:
    """The frame at :data:`AT` + (dy, dx), turned and zoomed about its centre, with noise."""
    height, width = SIZE
    c, s = np.cos(np.deg2rad(degrees)) / zoom, np.sin(np.deg2rad(degrees)) / zoom
    middle_x, middle_y = AT[1] + dx + width / 2, AT[0] + dy + height / 2
    turned = Image.fromarray(source).transform(
        (width, height),
        Image.Transform.AFFINE,
        (
            *(c, -s, middle_x - c * width / 2 + s * height / 2),
            *(s, c, middle_y - s * width / 2 - c * height / 2),
        ),
        _BILINEAR,
    )
    random = np.random.default_rng(seed)
    return np.clip(np.asarray(turned) + random.normal(0, noise, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def look(source: np.ndarray, *args: float, **kwargs: float) -> Look:
    return look_at(frame(source, *args, **kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PICTURES)
def test_known_shifts_are_found_within_the_stated_error(name: str) -> None:
    source = picture(name)
    first = look(source)
    random = np.random.default_rng(3)
    errors = []
    for n, most in enumerate([2, 10, 40, 70] * 5):  # up to a quarter of the height
        dy, dx = random.integers(-most, most + 1, 2).tolist()
        found = motion(first, look(source, dy, dx, seed=n + 5))
        assert found.known
        errors.append(max(abs(found.dx + dx), abs(found.dy + dy)))
    assert max(errors) <= ERROR * SIZE[1]
    assert np.median(errors) <= ERROR * SIZE[1] / 2


def test_a_shift_by_parts_of_a_pixel_is_found() -> None:
    source = picture("texture")
    first = look(source)
    for dy, dx in [(0.5, 0.0), (-0.25, 3.5), (1.75, -0.6)]:
        found = motion(first, look(source, dy, dx, seed=2))
        assert (found.dy, found.dx) == pytest.approx((-dy, -dx), abs=ERROR * SIZE[1] / 2)


def test_matched_frames_reach_a_high_peak_and_unrelated_ones_do_not() -> None:
    kinds = [("texture", 0), ("texture", 1), ("blobs", 0), ("blobs", 1), ("coins", 0)]
    looks = [look(picture(*kind)) for kind in kinds]
    matched = [
        motion(a, look(picture(*b), 5, 2, seed=9)) for a, b in zip(looks, kinds, strict=True)
    ]
    assert min(m.peak for m in matched) >= 0.8
    unrelated = [motion(a, b) for i, a in enumerate(looks) for b in looks[:i]]
    assert np.median([m.peak for m in unrelated]) < 0.15
    assert not any(m.known for m in unrelated)


@pytest.mark.parametrize("name", PICTURES)
def test_turning_and_zooming_lower_the_peak_so_that_the_error_grows(name: str) -> None:
    """The corners move, which no shift describes; windows by half of that on the average."""
    source = picture(name)
    for kwargs in ({"degrees": 4.0}, {"zoom": 1.07}):
        tracker = Tracker()
        tracker.follow(look(source))
        position = tracker.follow(look(source, seed=2, **kwargs))
        if position.part == 0:  # else the motion is unknown
            moved = np.deg2rad(kwargs.get("degrees", 0)) + kwargs.get("zoom", 1) - 1
            assert position.error >= moved * np.hypot(*SIZE) / 4


def test_frames_without_texture_or_of_another_size_are_unknown() -> None:
    grey = look_at(np.full((*SIZE, 3), 90, np.uint8))
    assert not motion(grey, grey).known
    other = look_at(np.zeros((512, 512, 3), np.uint8))
    assert not motion(grey, other).known
    assert changed(grey, other)
    tiny = look_at(np.zeros((1, 64, 3), np.uint8))
    assert not motion(tiny, tiny).known
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            look_at(bad)


def with_object(image: np.ndarray, x: int, share: float = 0.5) -> np.ndarray:
    """A large object in front, as of a person who walks by."""
    image = image.copy()
    height, width = image.shape[:2]
    image[int(height * 0.1) :, x : x + int(width * share)] = (200, 40, 30)
    return image


@pytest.mark.parametrize("name", PICTURES)
def test_only_cuts_are_changes(name: str) -> None:
    source = picture(name)
    first = look(source)
    same = [
        look(source, degrees=90, seed=2),
        look(source, degrees=25, seed=2),
        look(source, zoom=1.5, seed=2),
        look(source, zoom=0.7, seed=2),
        look(source, 100, 150, seed=2),
        look_at((frame(source, seed=2) * 0.5).astype(np.uint8)),
        look_at(np.minimum(frame(source, seed=2) * 1.4, 255).astype(np.uint8)),
        look_at(with_object(frame(source, seed=2), 100)),
    ]
    assert not any(changed(first, other) for other in same)


def test_most_cuts_are_changes() -> None:
    """Between pictures of different colours; grey ones of like brightness are not told apart."""
    tints = [(1, 0.9, 0.5), (0.4, 0.7, 1), (0.6, 1, 0.4), (1, 0.5, 0.7)]
    looks = [look(picture("coins"))]
    for seed, tint in enumerate(tints):
        source = (picture("texture" if seed % 2 else "blobs", seed) * np.array(tint)).astype(
            np.uint8
        )
        looks.append(look(source))
    pairs = [(a, b) for i, a in enumerate(looks) for b in looks[:i]]
    assert sum(changed(a, b) for a, b in pairs) >= len(pairs) * 0.7


def test_a_shaking_camera_is_followed_without_drift() -> None:
    source = picture("texture")
    tracker, random = Tracker(), np.random.default_rng(4)
    at = np.zeros(2)
    for n in range(25):
        found = tracker.follow(look(source, *at, seed=n))
        assert found.part == 0
        assert max(abs(found.y - at[0]), abs(found.x - at[1])) <= max(found.error, 0.75)
        assert found.error <= 6 * SIZE[1] / 1024
        at = np.clip(at + random.integers(-12, 13, 2), -40, 40)


def test_a_pan_there_and_back_stays_within_its_growing_error() -> None:
    source = picture("texture")
    tracker = Tracker()
    errors = []
    for n, x in enumerate([*range(-190, 240, 16), *range(242, -190, -16)]):
        found = tracker.follow(look(source, 0, x, seed=n))
        assert found.part == 0
        assert abs(found.x - (x + 190)) <= max(found.error, 0.75)
        assert abs(found.y) <= max(found.error, 0.75)
        errors.append(found.error)
    assert max(errors) > errors[1] * 2  # far from the first frame
    assert errors[-1] <= 2 * ERROR * SIZE[1]  # and near it again


def test_a_still_camera_with_noise_and_a_moving_object_keeps_its_place() -> None:
    source = picture("texture")
    tracker = Tracker()
    assert tracker.follow(look(source)) == Position(0.0, 0.0, 0.0, 0)
    for n in range(20):
        assert tracker.follow(look(source, seed=n + 2)) == Position(0.0, 0.0, 0.0, 0)
    for n in range(5):
        moving = look_at(with_object(frame(source, seed=n), 60 * n, share=0.15))
        found = tracker.follow(moving)
        assert found.part == 0
        assert max(abs(found.y), abs(found.x)) <= 1


def test_an_interruption_begins_a_part_and_the_camera_finds_back() -> None:
    source, other = picture("texture"), picture("blobs")
    tracker = Tracker()
    assert tracker.follow(look(source)).part == 0
    assert tracker.follow(look(other)) == Position(0.0, 0.0, 0.0, 1)
    again = tracker.follow(look(other, 10, 5, seed=2))
    assert (again.part, again.y, again.x) == pytest.approx((1, 10, 5), abs=1)
    back = tracker.follow(look(source, 0, 20, seed=3))
    assert (back.part, back.y, back.x) == pytest.approx((0, 0, 20), abs=1)
    assert tracker.follow(look(picture("blobs", 5))).part == 2


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.15])
def test_a_camera_is_still_whatever_moves_before_it(name: str, share: float) -> None:
    """An object of that share of the picture crosses it; the place stays exactly the same."""
    side, other = int((share * SIZE[0] * SIZE[1]) ** 0.5), picture("texture", 8)
    follower = Tracker()
    for i in range(10):
        shown = frame(picture(name), seed=i)
        x = 40 * i % (SIZE[1] - side)
        shown[50 : 50 + side, x : x + side] = other[:side, 20 * i : 20 * i + side]
        found = follower.follow(look_at(shown))
        assert (found.y, found.x, found.error, found.part) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(("dy", "dx"), [(0, 2), (2, 0), (4, 4), (20, 0), (0, 100)])
def test_a_camera_that_moves_is_not_still(name: str, dy: int, dx: int) -> None:
    one = look(picture(name))
    assert still(one, look(picture(name), seed=2))
    assert not still(one, look(picture(name), dy, dx))


@pytest.mark.parametrize("name", PICTURES)
def test_a_camera_that_turns_or_zooms_is_not_still(name: str) -> None:
    one = look(picture(name))
    assert not still(one, look(picture(name), degrees=1.5))
    assert not still(one, look(picture(name), zoom=1.03))


def test_a_camera_that_moves_along_stripes_is_not_still() -> None:
    rng = np.random.default_rng(0)
    large = np.repeat(rng.integers(0, 256, 24, dtype=np.uint8), 24)[:, None].repeat(1200, 1)
    ground = rng.integers(0, 256, (12, 75), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    large[384:] = ground
    shown = np.stack([large] * 3, axis=-1)
    one = look_at(np.ascontiguousarray(shown[:, :1024]))
    assert still(one, one)
    assert not still(one, look_at(np.ascontiguousarray(shown[:, 40:1064])))
