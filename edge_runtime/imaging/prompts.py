"""Points and boxes on a photo, as users write them, grouped into objects."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from edge_common.errors import PromptError


class Point(msgspec.Struct, frozen=True):
    """A click, in pixels of the upright photo. `label` is 1 on the object and 0 beside it."""

    x: float
    y: float
    label: int = 1


class Box(msgspec.Struct, frozen=True):
    """A box around an object, in pixels of the upright photo."""

    x0: float
    y0: float
    x1: float
    y1: float


class Prompt(msgspec.Struct, frozen=True):
    """All points and the box of one object."""

    points: tuple[Point, ...] = ()
    box: Box | None = None


def parse_point(text: str) -> Point:
    """``X,Y`` or ``X,Y,LABEL``.

    Raises:
        PromptError: it is something else.
    """
    parts = _numbers(text)
    if parts is None or len(parts) not in (2, 3):
        raise PromptError(
            f"--point {text!r}: expected X,Y or X,Y,LABEL, such as 120,80 or 120,80,0"
        )
    label = parts[2] if len(parts) == 3 else 1.0
    if label not in (0.0, 1.0):
        raise PromptError(
            f"--point {text!r}: the label is {label:g}; 1 is on the object, 0 is not part of it"
        )
    return Point(parts[0], parts[1], int(label))


def parse_box(text: str) -> Box:
    """``X0,Y0,X1,Y1``.

    Raises:
        PromptError: it is something else, or empty.
    """
    parts = _numbers(text)
    if parts is None or len(parts) != 4:
        raise PromptError(f"--box {text!r}: expected X0,Y0,X1,Y1, such as 20,30,180,150")
    box = Box(*parts)
    if not (box.x0 < box.x1 and box.y0 < box.y1):
        raise PromptError(
            f"--box {text!r} is empty: expected the left top corner, then the right bottom one"
        )
    return box


def _numbers(text: str) -> list[float] | None:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return values if all(math.isfinite(value) for value in values) else None


def group(sequence: Sequence[Point | Box | None]) -> list[Prompt]:
    """Prompts in the order they were given, one :class:`Prompt` for each object.

    Without a marker (None), each box and each point with label 1 begins an object, and a point with
    label 0 belongs to the object before it. With markers, everything between two is one object.

    Raises:
        PromptError: no prompt at all, a marker with nothing after it, two boxes for one object, or
            no point or box that says where an object is.
    """
    if not any(item is not None for item in sequence):
        raise PromptError(
            "there is no prompt",
            mend="say what to segment: at least one --point X,Y or --box X0,Y0,X1,Y1",
        )
    objects: list[list[Point | Box]] = []
    if None in sequence:
        if sequence[0] is not None:
            raise PromptError(
                "there are prompts before the first --object",
                mend="put one --object before each object's prompts",
            )
        for item in sequence:
            if item is None:
                objects.append([])
            else:
                objects[-1].append(item)
    else:
        for item in sequence:
            assert item is not None
            if isinstance(item, Point) and item.label == 0:
                if not objects:
                    raise PromptError(
                        f"the point {item.x:g},{item.y:g} with label 0 belongs to the object "
                        "before it, and there is none",
                        mend="give a point on the object, or a box, first",
                    )
                objects[-1].append(item)
            else:
                objects.append([item])
    return [_prompt(number, items) for number, items in enumerate(objects, 1)]


def _prompt(number: int, items: list[Point | Box]) -> Prompt:
    boxes = [item for item in items if isinstance(item, Box)]
    points = tuple(item for item in items if isinstance(item, Point))
    if len(boxes) > 1:
        raise PromptError(f"object {number} has {len(boxes)} boxes; it can have one")
    if not boxes and not any(point.label == 1 for point in points):
        raise PromptError(
            f"nothing says where object {number} is", mend="give a point with label 1, or a box"
        )
    return Prompt(points, boxes[0] if boxes else None)


def check(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Refuse prompts outside a photo of ``size = (H, W)``.

    Raises:
        PromptError: naming the prompt and the photo's size.
    """
    height, width = size
    for prompt in prompts:
        for point in prompt.points:
            if not (0 <= point.x < width and 0 <= point.y < height):
                raise PromptError(
                    f"the point {point.x:g},{point.y:g} is outside the photo, which is "
                    f"{width} x {height} pixels (x from 0 to {width - 1}, y from 0 to "
                    f"{height - 1}, after turning it upright)"
                )
        box = prompt.box
        inside = box is None or (  # corners may lie on the border
            min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height
        )
        if box and not inside:
            raise PromptError(
                f"the box {box.x0:g},{box.y0:g},{box.x1:g},{box.y1:g} reaches outside the photo, "
                f"which is {width} x {height} pixels (after turning it upright)"
            )
