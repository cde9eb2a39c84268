from __future__ import annotations

import msgspec
import pytest

from engines.geometry import Geometry, resized_shape

SAM = Geometry(image_size=1024, patch_size=16, window_size=14, embed_dim=1280, out_chans=256)


def test_sam_s_geometry_has_the_published_numbers() -> None:
    assert (SAM.grid, SAM.windows_per_side, SAM.windows) == (64, 5, 25)
    assert (SAM.window_pixels, SAM.tokens_per_window, SAM.low_res) == (224, 196, 256)


def test_sam_windows_are_16_full_8_partial_and_one_corner() -> None:
    shapes = [SAM.valid_tokens(i) for i in range(25)]
    assert shapes.count((14, 14)) == 16
    assert shapes.count((14, 8)) == shapes.count((8, 14)) == 4
    assert shapes[24] == (8, 8)


def test_rectangles_tile_the_square() -> None:
    area = 0
    for i in range(SAM.windows):
        y0, x0, y1, x1 = SAM.window_rect(i)
        rows, cols = SAM.valid_tokens(i)
        assert (y1 - y0, x1 - x0) == (rows * 16, cols * 16)
        area += (y1 - y0) * (x1 - x0)
    assert area == 1024**2
    assert SAM.window_rect(7) == (224, 448, 448, 672)


@pytest.mark.parametrize("index", [-1, 25])
def test_no_window_is_outside_the_square(index: int) -> None:
    with pytest.raises(IndexError):
        SAM.window_rect(index)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patch_size": 15}, "multiple"),
        ({"window_size": 65}, "larger than the grid"),
        ({"window_size": 1}, "4096 windows"),
        ({"embed_dim": 0}, "at least 1"),
    ],
)
def test_contradictory_geometries_are_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Geometry(**{**msgspec.structs.asdict(SAM), **change})


def test_resized_shape_never_rounds_a_side_to_zero() -> None:
    assert resized_shape(1, 10_000, 1024) == (1, 1024)
    assert resized_shape(10_000, 1, 1024) == (1024, 1)
    assert resized_shape(1, 1, 1024) == (1024, 1024)
    assert resized_shape(3000, 4000, 1024) == (768, 1024)
    with pytest.raises(ValueError, match="no size"):
        resized_shape(0, 5, 1024)
