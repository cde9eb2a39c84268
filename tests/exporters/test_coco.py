"""COCO's mask formats."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from edge_common.errors import ConfigError, ImageError
from exporters.coco import (
    CocoFile,
    counts_from_mask,
    decode,
    decode_counts,
    encode_counts,
    mask_from_counts,
)


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)))
@settings(max_examples=60, deadline=None)
def test_masks_survive_run_length_encoding_and_compression(mask):
    counts = counts_from_mask(mask)
    assert sum(counts) == mask.size
    assert np.array_equal(mask_from_counts(counts, *mask.shape), mask)
    assert decode_counts(encode_counts(counts)) == counts


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_compressed_counts_survive_a_round_trip(counts):
    assert decode_counts(encode_counts(counts)) == counts


def test_a_string_made_by_pycocotools_decodes():
    """`pycocotools.mask.encode` returns this for 5 x 6 with rows 1..2, columns 2..4 set."""
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    assert counts_from_mask(mask) == [11, 2, 3, 2, 3, 2, 7]
    assert encode_counts([11, 2, 3, 2, 3, 2, 7]) == ";230004"
    assert np.array_equal(decode({"size": [5, 6], "counts": ";230004"}, 5, 6), mask)


def test_polygons_fill_their_interior():
    mask = decode([[10, 5, 30, 5, 30, 25, 10, 25]], 40, 50)
    wanted = np.zeros((40, 50), bool)
    wanted[5:25, 10:30] = True
    assert np.array_equal(mask, wanted)
    two = decode([[1, 1, 8, 1, 8, 8], [20, 20, 30, 20, 30, 30]], 40, 50)
    assert two[2, 6]
    assert two[22, 28]


def test_a_slanted_polygon_gives_pycocotools_s_pixels():
    """`frPyObjects([[2.5, 1.2, 8.7, 3.3, 5.1, 8.8, 0.4, 6]], 10, 10)`, decoded."""
    rows = [
        "..........",
        "..##......",
        "..####....",
        "..#######.",
        ".#######..",
        ".######...",
        ".######...",
        "...###....",
        "..........",
        "..........",
    ]
    wanted = np.array([[c == "#" for c in row] for row in rows])
    assert np.array_equal(decode([[2.5, 1.2, 8.7, 3.3, 5.1, 8.8, 0.4, 6]], 10, 10), wanted)


@pytest.mark.parametrize("bad", [[[1, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, float("nan")]]])
def test_malformed_polygons_are_refused(bad):
    with pytest.raises(ValueError, match="polygon"):
        decode(bad, 4, 4)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": [4, 4], "counts": [3, 4]},
        {"size": [4, 4], "counts": "~~"},
        {"size": [3, 4], "counts": [12]},
        {"size": [4, 4], "counts": [-1, 17]},
    ],
)
def test_malformed_masks_are_refused(bad):
    with pytest.raises(ValueError, match=r"run lengths|mask is"):
        decode(bad, 4, 4)


def write(tmp_path, annotations, name="a.png"):
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(tmp_path / "a.png")
    content = {"images": [{"id": 7, "file_name": name}], "annotations": annotations}
    (tmp_path / "ann.json").write_text(json.dumps(content))
    return tmp_path / "ann.json"


def test_a_file_yields_images_with_their_masks_and_no_crowds(tmp_path):
    square = {"size": [8, 10], "counts": [0, 16, 64]}
    path = write(
        tmp_path,
        [
            {"image_id": 7, "segmentation": square, "iscrowd": 0},
            {"image_id": 7, "segmentation": square, "iscrowd": 1},
        ],
    )
    (sample,) = CocoFile(path, tmp_path)
    assert sample.image.shape == (8, 10, 3)
    assert len(sample.masks) == 1
    assert sample.masks[0][:, :2].all()
    assert sample.masks[0].sum() == 16


def test_errors_name_the_defect(tmp_path):
    square = {"size": [8, 10], "counts": [0, 16, 64]}
    with pytest.raises(ConfigError, match="cannot read"):
        CocoFile(tmp_path / "none.json", tmp_path)
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a COCO annotation file"):
        CocoFile(tmp_path / "odd.json", tmp_path)
    path = write(tmp_path, [{"image_id": 7, "segmentation": square}], "gone.png")
    with pytest.raises(ImageError, match=r"gone\.png"):
        list(CocoFile(path, tmp_path))
    path = write(tmp_path, [{"image_id": 7, "segmentation": {"size": [8, 10], "counts": [3]}}])
    with pytest.raises(ConfigError, match="malformed"):
        list(CocoFile(path, tmp_path))
    with pytest.raises(ConfigError, match="no image"):
        CocoFile(write(tmp_path, []), tmp_path)
