"""Back-pressure: whether the node may compute a result now."""

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
        "rate": 1e9,
    }
    return has_room(**{**numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"own": 2 * RESULT, "everybody": 2 * RESULT}, True),
        ({"own": 3 * RESULT, "everybody": 3 * RESULT}, False),  # enough results wait for this edge
        ({"own": 1, "everybody": 118 * MIB}, True),
        ({"own": 1, "everybody": 119 * MIB}, False),  # enough results wait for all edges
        # an edge with no waiting result is still served
        ({"own": 0, "everybody": 119 * MIB}, True),
        ({"own": 0, "everybody": 183 * MIB}, False),
        # the edge reads these bytes in 3 s
        ({"own": 1, "everybody": 30 * MIB, "rate": 1e6}, False),
        ({"own": 1, "everybody": 30 * MIB, "rate": 20e6}, True),
        # the edge's reading rate is unknown
        ({"own": 1, "everybody": 20 * MIB, "rate": 0.0}, True),
    ],
)
def test_may_compute_follows_waiting_bytes_and_rate(changes: dict[str, Any], may: bool) -> None:
    assert room(**changes) is may


@given(
    largest=st.integers(1, 1 << 28),
    part=st.floats(0.01, 1),
    rate=st.floats(0, 1e10),
    more=st.integers(0, 1 << 30),
)
def test_a_result_of_any_size_may_be_computed_when_nothing_waits(
    largest: int, part: float, rate: float, more: int
) -> None:
    size = max(1, int(part * largest))
    limits = {"unacked": 2 * largest, "total": 4 * largest + more}
    assert room(size=size, largest=largest, rate=rate, **limits)
