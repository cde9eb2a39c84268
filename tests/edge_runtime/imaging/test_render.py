"""Rendered pictures show the right content. Their look is not tested."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edge_runtime.imaging import render
from edge_runtime.imaging.images import resize_longest
from edge_runtime.imaging.prompts import Box, Point, Prompt
from edge_runtime.offload.report import NodeReport, OffloadReport
from engines.geometry import Geometry
from engines.windows import Windows, cut

GEOMETRY = Geometry(image_size=40, patch_size=4, window_size=4, embed_dim=8, out_chans=4)


def cut_of(photo: np.ndarray) -> Windows:
    return cut(resize_longest(photo, GEOMETRY.image_size), GEOMETRY)


def report(shares: dict[str, tuple[int, ...]], home: tuple[int, ...] = ()) -> OffloadReport:
    nodes = tuple(NodeReport(name, windows, 0.3) for name, windows in shares.items())
    sent = sum(len(w) for w in shares.values())
    return OffloadReport(nodes, home, 0.3, 0.3, 4, 9, sent, 0, 0, 0.0, ())


def test_the_mask_is_tinted_and_the_rest_is_unchanged() -> None:
    photo = np.full((60, 80, 3), 100, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:40] = True
    picture = render.overlay(photo, [mask], [Prompt((Point(70, 5),))])
    drawn = np.array(picture).astype(int)
    scale = picture.width // 80
    assert picture.size == (80 * scale, 60 * scale)
    assert picture.width >= 1000
    inside = drawn[45 * scale, 20 * scale]
    assert abs(inside - (100 + (np.array(render.colour(1)) - 100) * 0.42)).max() <= 2
    assert (drawn[55 * scale :, 60 * scale :] == 100).all()
    line = drawn[30 * scale, 8 * scale : 12 * scale]
    assert abs(line - render.colour(1)).sum(-1).min() < 60
    assert abs(inside - render.colour(1)).sum() > 120


def test_a_click_is_drawn_at_its_place() -> None:
    photo = np.full((60, 80, 3), 100, np.uint8)
    prompts = [Prompt((Point(20, 30), Point(60, 15, 0)))]
    picture = np.array(render.overlay(photo, [np.zeros((60, 80), bool)], prompts)).astype(int)
    scale = picture.shape[1] // 80
    rows, columns = np.nonzero((picture != 100).any(-1))
    assert {bool(x < 40 * scale) for x in columns} == {True, False}
    for x, y, strong in ((20, 30, 1), (60, 15, 0)):  # green on the object, red beside it
        near = (abs(columns - (x + 0.5) * scale) < 3 * scale) & (
            abs(rows - (y + 0.5) * scale) < 3 * scale
        )
        centre = (columns[near].min() + columns[near].max()) / 2
        assert centre == pytest.approx((x + 0.5) * scale, abs=1.5)
        mean = picture[rows[near], columns[near]].mean(0)
        assert mean.argmax() == strong


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7), (1300, 900), (10, 3000)])
@pytest.mark.parametrize("nodes", [1, 3, 40, 400])
def test_any_photo_can_be_drawn_and_no_drawing_is_large(size: tuple[int, int], nodes: int) -> None:
    photo = np.zeros((*size, 3), np.uint8)
    prompts = [Prompt((Point(0, 0),)), Prompt(box=Box(0, 0, size[1], size[0]))]
    step = -(-max(size) // 2048)
    masks = [np.ones(size, bool)[::step, ::step]] * 2
    picture = render.overlay(photo, masks, prompts)
    assert max(picture.size) <= 2048
    windows = cut_of(photo)
    shown = tuple(windows.window.tolist())
    sheet = render.what_each_node_saw(
        photo, windows, GEOMETRY, report({f"node{k}": shown for k in range(nodes)}, home=(0,))
    )
    assert max(sheet.size) <= 2400


def test_a_panel_shows_the_windows_sent_and_black_elsewhere() -> None:
    rng = np.random.default_rng(1)
    photo = rng.integers(50, 255, (32, 40, 3), np.uint8)
    windows = cut_of(photo)
    assert len(windows) == 6
    panel = render._panel(
        render._reassembled(windows, GEOMETRY), windows, GEOMETRY, (0, 4), (400, 320), 10.0
    )
    drawn = np.array(panel)
    assert np.array_equal(drawn[5:155:10, 5:155:10], photo[:15, :15])
    assert np.array_equal(drawn[165:315:10, 165:315:10], photo[16:31, 16:31])
    assert not drawn[5:155, 165:315].any()
    assert not drawn[165:315, 5:155].any()
    assert not drawn[5:155, 325:395].any()
    for border in (drawn[:, 0], drawn[:, -1], drawn[0], drawn[-1]):  # of the photo's own windows
        assert (border == render._GRID).all()


def test_long_names_are_written_in_full() -> None:
    for size, width in ((26, 520), (18, 260)):
        font = render._fitting("What " + "m" * 64 + " saw", size, width)
        assert font.getlength("What " + "m" * 64 + " saw") <= width or font.size == 7
        assert render._fitting("What alpha saw", size, width).size == size


def test_of_many_nodes_only_those_that_saw_windows_are_shown() -> None:
    windows = cut_of(np.full((32, 40, 3), 200, np.uint8))
    some = {"a": (0, 4), "b": (1, 3), "c": (2, 5)}
    sheets = [
        render.what_each_node_saw(
            np.full((32, 40, 3), 200, np.uint8),
            windows,
            GEOMETRY,
            report({**some, **{f"idle{k}": () for k in range(idle)}}),
        )
        for idle in (10, 1000)
    ]
    assert sheets[0].size == sheets[1].size  # the photo, a, b, c, and the number of the other nodes


def test_the_outline_has_the_requested_width_inside_the_mask() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[20:80, 20:80] = 255
    for width in (2, 5, 10):
        line = np.array(render._outline(Image.fromarray(mask), width))
        assert not line[mask == 0].any()
        assert np.count_nonzero(line[50, :50] > 127) == pytest.approx(width, abs=1)
        assert not line[50, 20 + width : 80 - width].any()


def test_a_mask_is_drawn_the_same_at_any_place() -> None:
    """Rendering works only on the region around a mask."""
    photo = np.full((900, 1300, 3), 100, np.uint8)
    prompts = [Prompt(box=Box(0, 0, 1, 1))]
    pieces = []
    for x, y in ((200, 300), (701, 502)):
        mask = np.zeros((900, 1300), bool)
        mask[y : y + 90, x : x + 70] = True
        drawn = np.array(render.overlay(photo, [mask], prompts))
        pieces.append(drawn[y - 20 : y + 110, x - 20 : x + 90])
        drawn[y - 20 : y + 110, x - 20 : x + 90] = 100
        drawn[:20, :20] = 100  # the prompt
        assert (drawn == 100).all()
    assert np.array_equal(*pieces)


def test_the_sheet_has_a_panel_per_node_and_one_for_the_edge() -> None:
    photo = np.full((32, 40, 3), 200, np.uint8)
    windows = cut_of(photo)
    three = render.what_each_node_saw(
        photo, windows, GEOMETRY, report({"a": (0, 4), "b": (1, 3), "c": (2, 5)})
    )
    home = render.what_each_node_saw(
        photo, windows, GEOMETRY, report({"a": (0, 4), "b": (1, 3), "c": (2,)}, home=(5,))
    )
    assert home.width == three.width
    assert home.height > 1.8 * three.height  # a fifth panel starts a second row
    drawn = np.array(three)
    assert (drawn == 0).all(-1).any()
    assert (drawn == 200).all(-1).any()


def test_many_objects_have_many_colours() -> None:
    colours = [render.colour(k) for k in range(1, 41)]
    assert len(set(colours)) == 40
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    picture = render.label_image(labels)
    assert np.array_equal(np.array(picture), labels)
    assert picture.convert("RGB").getpixel((1, 0)) == render.colour(1)
    assert picture.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    many = np.array([[0, 300]], np.uint16)
    assert np.array_equal(np.array(render.label_image(many)), many)
