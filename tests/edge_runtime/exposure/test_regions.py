"""Regions that never leave the edge: which windows they cover, and that no node gets those."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_common.errors import ConfigError
from edge_runtime.config import check_region
from edge_runtime.exposure.regions import windows_in
from edge_runtime.imaging.images import resize_longest
from edge_runtime.predictor import OffloadPredictor
from engines.bundle import Bundle, shipped_bundle
from engines.windows import cut

GEOMETRY = Bundle.load(shipped_bundle()).geometry


@given(st.data())
def test_no_pixel_of_a_region_is_outside_its_windows(data: st.DataObject) -> None:
    """Judged by the pixels: what changes in the region changes only these windows."""
    height, width = (data.draw(st.integers(4, 400)) for _ in range(2))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    black = np.zeros((height, width, 3), np.uint8)
    white = black.copy()
    white[y0:y1, x0:x1] = 255
    one, other = (
        cut(resize_longest(image, GEOMETRY.image_size), GEOMETRY) for image in (black, white)
    )
    differ = {
        int(window)
        for window, a, b in zip(one.window, one.pixels, other.pixels, strict=True)
        if not np.array_equal(a, b)
    }
    assert differ <= windows_in([(x0, y0, x1, y1)], (height, width), one.size, GEOMETRY)


def test_only_the_windows_of_the_region_stay() -> None:
    w = GEOMETRY.window_pixels
    size = (GEOMETRY.image_size, GEOMETRY.image_size)
    assert windows_in([(2, 2, w - 2, w - 2)], size, size, GEOMETRY) == {0}
    assert windows_in([], size, size, GEOMETRY) == frozenset()


@pytest.mark.process
def test_nodes_get_no_window_of_a_region(shared_fleet: Any, photo: np.ndarray) -> None:
    config = shared_fleet.config()
    height, width = photo.shape[:2]
    corner, whole = (0, 0, 5, 5), (0, 0, width, height)
    with (
        OffloadPredictor(config, threads=1) as remote,
        OffloadPredictor(bundle=shared_fleet.bundle, threads=1) as local,
    ):
        local.set_image(photo)
        for region, kept in ((corner, {0}), (whole, set(range(6)))):
            remote.set_image(photo, keep_local=[region])
            assert remote.report is not None
            assert set(remote.report.home) == kept
            assert not kept & {w for node in remote.report.nodes for w in node.windows}
            assert remote.report.largest_share <= 0.5
            np.testing.assert_array_equal(remote.features, local.features)
        with pytest.raises(ConfigError, match="keep_local holds"):
            remote.set_image(photo, keep_local=[(5, 5, 5, 9)])


def test_a_region_between_pixels_keeps_the_pixels_that_it_touches() -> None:
    """Enlarged sixteen times, a pixel of the photo shines half a pixel further."""
    small = np.zeros((16, 64, 3), np.uint8)
    lit = small.copy()
    lit[4, 15] = 255
    one, other = (cut(resize_longest(i, GEOMETRY.image_size), GEOMETRY) for i in (small, lit))
    differ = {
        int(window)
        for window, a, b in zip(one.window, one.pixels, other.pixels, strict=True)
        if not np.array_equal(a, b)
    }
    region = (15.2, 4.2, 15.4, 4.4)
    assert differ <= windows_in([region], (16, 64), one.size, GEOMETRY)
    with pytest.raises(ConfigError, match="four numbers"):
        check_region(5)  # type: ignore[arg-type]


@pytest.mark.process
def test_a_repeat_with_other_regions_shows_no_party_more(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    with OffloadPredictor(shared_fleet.config(), threads=1) as predictor:
        assert predictor.offloader is not None
        geometry = predictor.bundle.geometry
        windows = cut(resize_longest(photo, geometry.image_size), geometry)
        whole = predictor.offloader.place_photo(windows).placement
        for kept in range(len(windows)):
            part = predictor.offloader.place_photo(windows, {kept}).placement
            assert kept in part.home
            for party, mine in part.assignment.items():
                assert set(mine) == set(whole.assignment[party]) - {kept}
            assert part.second.items() <= whole.second.items()
