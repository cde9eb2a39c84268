from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.geometry import Geometry
from engines.windows import Windows, cut

GEOMETRIES = {
    "partly padded": Geometry(image_size=40, patch_size=4, window_size=4, embed_dim=8, out_chans=4),
    "no padding": Geometry(image_size=32, patch_size=4, window_size=4, embed_dim=8, out_chans=4),
    "one window": Geometry(image_size=12, patch_size=2, window_size=6, embed_dim=8, out_chans=4),
}


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, Geometry]:
    geometry = draw(st.sampled_from(list(GEOMETRIES.values())))
    short = draw(st.integers(1, geometry.image_size))
    shape = (short, geometry.image_size) if draw(st.booleans()) else (geometry.image_size, short)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # No pixel is 0 here: 0 must mean "outside the image".
    return rng.integers(1, 256, (*shape, 3), dtype=np.uint8), geometry


def reassemble(windows: Windows, geometry: Geometry) -> np.ndarray:
    image = np.zeros((*windows.size, 3), np.uint8)
    for pixels, (rows, cols), index in zip(
        windows.pixels, windows.extent, windows.window, strict=True
    ):
        y, x, _, _ = geometry.window_rect(int(index))
        image[y : y + rows, x : x + cols] = pixels[:rows, :cols]
    return image


@settings(deadline=None)
@given(images())
@example((np.full((1, 40, 3), 9, np.uint8), GEOMETRIES["partly padded"]))
@example((np.full((40, 17, 3), 9, np.uint8), GEOMETRIES["partly padded"]))
@example((np.full((40, 40, 3), 9, np.uint8), GEOMETRIES["partly padded"]))
def test_windows_hold_exactly_the_image(case: tuple[np.ndarray, Geometry]) -> None:
    image, geometry = case
    windows = cut(image, geometry)
    n, w = len(windows), geometry.window_pixels
    assert windows.pixels.shape == (n, w, w, 3)
    assert windows.pixels.dtype == np.uint8
    assert windows.extent.dtype == windows.window.dtype == np.int64
    assert windows.size == image.shape[:2]
    np.testing.assert_array_equal(reassemble(windows, geometry), image)
    # Everything beyond the extent is 0 and everything within is not: no pixel of the image is 0.
    rows, cols = np.arange(w)[:, None], np.arange(w)
    inside = (rows < windows.extent[:, :1, None]) & (cols < windows.extent[:, 1:, None])
    np.testing.assert_array_equal(windows.pixels.all(-1), inside)
    np.testing.assert_array_equal(windows.area(), inside.sum((1, 2)))
    assert windows.area().sum() == image.shape[0] * image.shape[1]


@settings(deadline=None)
@given(images())
def test_a_window_is_present_if_it_has_a_pixel(case: tuple[np.ndarray, Geometry]) -> None:
    image, geometry = case
    windows = cut(image, geometry)
    height, width = image.shape[:2]
    for index in range(geometry.windows):
        y, x, _, _ = geometry.window_rect(index)
        assert windows.present[index] == (y < height and x < width)
    assert windows.present.dtype == np.bool_
    assert windows.present.shape == (geometry.windows,)
    np.testing.assert_array_equal(windows.window, np.flatnonzero(windows.present))


def test_a_wide_photo_needs_15_of_sams_25_windows() -> None:
    sam = Geometry(image_size=1024, patch_size=16, window_size=14, embed_dim=768, out_chans=256)
    windows = cut(np.zeros((576, 1024, 3), np.uint8), sam)
    assert len(windows) == 15
    # 576 = 2 * 224 + 128: the last row of windows ends inside the image, at a patch. The last
    # column is the square's own 128.
    np.testing.assert_array_equal(windows.extent[-1], [128, 128])
    # 570 ends inside a patch.
    assert cut(np.zeros((570, 1024, 3), np.uint8), sam).extent[-1, 0] == 122


def test_the_caller_s_image_is_not_changed() -> None:
    image = np.full((40, 40, 3), 7, np.uint8)
    cut(image, GEOMETRIES["partly padded"]).pixels[:] = 0
    assert (image == 7).all()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((40, 40, 3), np.float32), "uint8"),
        (np.zeros((40, 40, 4), np.uint8), "expected uint8"),
        (np.zeros((40, 40), np.uint8), "expected uint8"),
        (np.zeros((39, 20, 3), np.uint8), "longest side"),
        (np.zeros((41, 40, 3), np.uint8), "longest side"),
        (np.zeros((0, 40, 3), np.uint8), "longest side"),
    ],
)
def test_images_of_other_shapes_are_refused(image: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cut(image, GEOMETRIES["partly padded"])
