"""Points and boxes as users type them."""

from __future__ import annotations

import pytest

from edge_common.errors import PromptError
from edge_runtime.imaging import prompts
from edge_runtime.imaging.prompts import Box, Point, Prompt


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
    assert prompts.parse_point(text) == expected


@pytest.mark.parametrize("text", ["", "1", "1,2,3,4", "a,b", "1,2,", "nan,2", "1,inf", "1;2"])
def test_a_malformed_point_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PromptError, match=r"expected X,Y .* 120,80"):
        prompts.parse_point(text)


@pytest.mark.parametrize("label", ["2", "-1", "0.5"])
def test_only_labels_0_and_1_are_accepted(label: str) -> None:
    with pytest.raises(PromptError, match="the label is"):
        prompts.parse_point(f"1,2,{label}")


def test_boxes_are_read() -> None:
    assert prompts.parse_box("1,2,3,4.5") == Box(1, 2, 3, 4.5)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "1,2,3,4,5"])
def test_a_malformed_box_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="expected X0,Y0,X1,Y1"):
        prompts.parse_box(text)


@pytest.mark.parametrize("text", ["3,2,1,4", "1,4,3,2", "1,2,1,4"])
def test_an_empty_box_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="is empty"):
        prompts.parse_box(text)


def test_each_point_or_box_is_an_object_and_a_negative_point_joins_the_last_one() -> None:
    a, b, box, off = Point(1, 1), Point(2, 2), Box(0, 0, 5, 5), Point(3, 3, 0)
    found = prompts.group([a, off, b, box, off])
    assert found == [Prompt((a, off)), Prompt((b,)), Prompt((off,), box)]


def test_an_object_marker_joins_all_prompts_up_to_the_next_marker() -> None:
    a, b, box = Point(1, 1), Point(2, 2), Box(0, 0, 5, 5)
    assert prompts.group([None, a, b, None, b, box]) == [Prompt((a, b)), Prompt((b,), box)]


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
def test_contradictory_prompts_are_refused(
    sequence: list[Point | Box | None], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        prompts.group(sequence)


@pytest.mark.parametrize("point", [Point(0, 0), Point(19, 9), Point(19.9, 9.9)])
def test_points_inside_the_photo_are_accepted(point: Point) -> None:
    prompts.check([Prompt((point,))], (10, 20))


@pytest.mark.parametrize(
    "point", [Point(-1, 0), Point(0, -0.5), Point(20, 0), Point(0, 10), Point(9, 19, 0)]
)
def test_points_outside_the_photo_are_refused_with_its_size(point: Point) -> None:
    with pytest.raises(PromptError, match="outside the photo, which is 20 x 10 pixels"):
        prompts.check([Prompt((Point(1, 1), point))], (10, 20))


def test_a_box_may_touch_the_border_but_not_cross_it() -> None:
    prompts.check([Prompt(box=Box(0, 0, 20, 10))], (10, 20))
    for box in (Box(-1, 0, 5, 5), Box(0, -1, 5, 5), Box(0, 0, 21, 5), Box(0, 0, 5, 11)):
        with pytest.raises(PromptError, match="which is 20 x 10 pixels"):
            prompts.check([Prompt(box=box)], (10, 20))
