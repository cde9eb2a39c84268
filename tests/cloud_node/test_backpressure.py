"""Whether a result may be computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_node.backpressure import has_room

MIB = 1 << 20
RESULT = 10 * MIB


def room(**changes: Any) -> bool:
    numbers: dict[str, Any] = {
        "size": RESULT,
        "own": 0,
        "everybody": 0,
        "unacked": 4 * RESULT,
        "total": 256 * MIB,
        "largest": RESULT,
        "lanes": 2,
    }
    return has_room(**{**numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"own": 2 * RESULT, "everybody": 2 * RESULT}, True),
        ({"own": 3 * RESULT, "everybody": 3 * RESULT}, False),  # enough waits for this edge
        ({"own": 1, "everybody": 5 * RESULT}, True),
        ({"own": 1, "everybody": 5 * RESULT + 1}, False),  # and enough for all
        ({"own": 0, "everybody": 5 * RESULT + 1}, True),  # an edge without any gets past them
        ({"own": 0, "everybody": 8 * RESULT}, True),
        ({"own": 0, "everybody": 8 * RESULT + 1}, False),
        ({"own": 1, "everybody": 7 * RESULT, "lanes": 3}, True),  # each lane has its share
        ({"own": 1, "everybody": 118 * MIB, "lanes": 9}, True),
        ({"own": 1, "everybody": 119 * MIB, "lanes": 9}, False),  # half of what all may hold
        ({"size": MIB, "largest": MIB, "own": 1, "everybody": 31 * MIB}, True),
        ({"size": MIB, "largest": MIB, "own": 1, "everybody": 32 * MIB}, False),
    ],
)
def test_room(changes: dict[str, Any], may: bool) -> None:
    assert room(**changes) is may


@given(
    largest=st.integers(1, 1 << 28),
    part=st.floats(0.01, 1),
    lanes=st.integers(1, 16),
    more=st.integers(0, 1 << 30),
)
def test_one_result_has_room_once_nothing_else_is_on_its_way(
    largest: int, part: float, lanes: int, more: int
) -> None:
    size = max(1, int(part * largest))
    limits = {"unacked": 2 * largest, "total": 4 * largest + more}
    assert room(size=size, largest=largest, lanes=lanes, **limits)
