"""Prompts, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import segmentation
from edge_runtime.segmentation import Box, Point, Prompt
from engines.errors import ConfigError, PromptError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("120,80", Point(120, 80, 1)),
        ("120.5,0", Point(120.5, 0, 1)),
        ("3,4,0", Point(3, 4, 0)),
        ("3,4,1", Point(3, 4, 1)),
    ],
)
def test_points_are_read(text: str, expected: Point) -> None:
    assert segmentation.parse_point(text) == expected


@pytest.mark.parametrize("text", ["", "1", "1,2,3,4", "a,b", "1,2,", "nan,2", "1,inf", "1;2"])
def test_what_is_no_point_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PromptError, match=r"expected X,Y .* 120,80"):
        segmentation.parse_point(text)


@pytest.mark.parametrize("label", ["2", "-1", "0.5"])
def test_only_labels_0_and_1_are_taken(label: str) -> None:
    with pytest.raises(PromptError, match="the label is"):
        segmentation.parse_point(f"1,2,{label}")


def test_boxes_are_read() -> None:
    assert segmentation.parse_box("1,2,3,4.5") == Box(1, 2, 3, 4.5)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "1,2,3,4,5"])
def test_what_is_no_box_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="expected X0,Y0,X1,Y1"):
        segmentation.parse_box(text)


@pytest.mark.parametrize("text", ["3,2,1,4", "1,4,3,2", "1,2,1,4"])
def test_an_empty_box_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="is empty"):
        segmentation.parse_box(text)


def test_each_point_and_box_is_an_object_and_a_negative_point_joins_the_one_before() -> None:
    a, b, box, off = Point(1, 1), Point(2, 2), Box(0, 0, 5, 5), Point(3, 3, 0)
    found = segmentation.group([a, off, b, box, off])
    assert found == [Prompt((a, off)), Prompt((b,)), Prompt((off,), box)]


def test_markers_join_everything_up_to_the_next() -> None:
    a, b, box = Point(1, 1), Point(2, 2), Box(0, 0, 5, 5)
    assert segmentation.group([None, a, b, None, b, box]) == [Prompt((a, b)), Prompt((b,), box)]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], "say what to segment"),
        ([None], "say what to segment"),
        ([Point(1, 1, 0)], "label 0 belongs to the object before it"),
        ([Point(1, 1), None, Point(2, 2)], "before the first --object"),
        ([None, None, Point(1, 1)], "nothing says where object 1 is"),
        ([None, Point(1, 1, 0)], "nothing says where object 1 is"),
        ([None, Box(0, 0, 1, 1), Box(0, 0, 2, 2)], "has 2 boxes"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(
    sequence: list[Point | Box | None], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        segmentation.group(sequence)


@pytest.mark.parametrize("point", [Point(0, 0), Point(19, 9), Point(19.9, 9.9)])
def test_points_inside_the_photo_pass(point: Point) -> None:
    segmentation.check([Prompt((point,))], (10, 20))


@pytest.mark.parametrize(
    "point", [Point(-1, 0), Point(0, -0.5), Point(20, 0), Point(0, 10), Point(9, 19, 0)]
)
def test_points_outside_the_photo_are_refused_with_its_size(point: Point) -> None:
    with pytest.raises(PromptError, match="outside the photo, which is 20 x 10 pixels"):
        segmentation.check([Prompt((Point(1, 1), point))], (10, 20))


def test_a_box_may_touch_the_border_and_not_cross_it() -> None:
    segmentation.check([Prompt(box=Box(0, 0, 20, 10))], (10, 20))
    for box in (Box(-1, 0, 5, 5), Box(0, -1, 5, 5), Box(0, 0, 21, 5), Box(0, 0, 5, 11)):
        with pytest.raises(PromptError, match="which is 20 x 10 pixels"):
            segmentation.check([Prompt(box=box)], (10, 20))


def test_bounds_are_the_smallest_box() -> None:
    mask = np.zeros((6, 8), bool)
    assert segmentation.bounds(mask) is None
    mask[2, 3] = mask[4, 5] = True
    assert segmentation.bounds(mask) == [3, 2, 6, 5]


def test_json_keeps_lists_of_numbers_on_one_line() -> None:
    report = {"a": [1, 2.5, -3e-9], "b": {"c": [[1, 2], []]}, "d": ["x", "y"], "e": "[\n 1,\n 2\n]"}
    text = segmentation.dumps(report)
    assert json.loads(text) == report
    assert '"a": [1, 2.5, -3e-09]' in text


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "result"
    with segmentation.whole_folder(folder) as scratch:
        (scratch / "a").write_text("new")
        assert not folder.exists()
    assert (folder / "a").read_text() == "new"
    assert os.listdir(folder.parent) == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "a").write_text("old")

    def fail() -> None:
        with segmentation.whole_folder(folder) as scratch:
            (scratch / "a").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (folder / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_an_error_leaves_no_parent_folders_either(tmp_path: Path) -> None:
    def fail() -> None:
        with segmentation.whole_folder(tmp_path / "a" / "b" / "result"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_replacing_a_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").touch()
    with segmentation.whole_folder(folder) as scratch:
        (scratch / "new").touch()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["result"]


def test_only_results_are_ever_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    segmentation.check_folder(folder, overwrite=False)
    folder.mkdir()
    segmentation.check_folder(folder, overwrite=False)
    (folder / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other things"):
            segmentation.check_folder(folder, overwrite=overwrite)
    (folder / segmentation.RESULT).touch()  # some other program's, for all we know
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds other things than results, such as thesis"):
            segmentation.check_folder(folder, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        segmentation.check_folder(folder / "thesis.tex" / "results", overwrite=True)
    with pytest.raises(ConfigError, match="in the way"):
        segmentation.check_folder(folder / "thesis.tex", overwrite=True)
    (folder / "thesis.tex").unlink()
    for name in ("mask-1.png", "mask-2-3.png", "masks.png", "overlay.png"):
        (folder / name).touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        segmentation.check_folder(folder, overwrite=False)
    segmentation.check_folder(folder, overwrite=True)
    (folder / "mask-3.png").mkdir()
    with pytest.raises(ConfigError, match=r"such as mask-3\.png"):
        segmentation.check_folder(folder, overwrite=True)
