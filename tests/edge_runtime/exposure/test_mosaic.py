"""The mosaic: shares are never below the truth, and its record survives hostile bytes."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_common.errors import PlacementError
from edge_runtime.exposure.mosaic import Mosaic, Rect
from edge_runtime.exposure.motion import Position

SIZE = (90, 160)
OFFSET = 400  # of the canvas that holds the truth


@st.composite
def walks(draw: st.DrawFn) -> list[tuple[int, int, float, float, Rect, int]]:
    """True corner of each frame, the estimate's errors, a window and the party that sees it."""
    steps = []
    y = x = 0
    for _ in range(draw(st.integers(1, 12))):
        y = max(-200, min(200, y + draw(st.integers(-40, 40))))
        x = max(-200, min(200, x + draw(st.integers(-40, 40))))
        y0, x0 = draw(st.integers(0, SIZE[0] - 1)), draw(st.integers(0, SIZE[1] - 1))
        rect = (y0, x0, min(SIZE[0], y0 + 30), min(SIZE[1], x0 + 30))
        errors = draw(st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
        steps.append((y, x, *errors, rect, draw(st.integers(0, 2))))
    return steps


@settings(max_examples=60, deadline=None)
@given(walks(), st.sampled_from([160, 1024]))
def test_a_share_is_never_below_the_truth_and_not_far_above(
    walk: list[tuple[int, int, float, float, Rect, int]], image_size: int
) -> None:
    mosaic = Mosaic(image_size)
    truth = np.zeros((4, 1000, 1000), bool)
    for y, x, ey, ex, rect, party in walk:
        at = Position(y + ey, x + ex, max(abs(ey), abs(ex)))
        before = mosaic.share_after(str(party), at, [rect])
        mosaic.show(at, SIZE)
        expected = mosaic.share_after(str(party), at, [rect])
        mosaic.see(str(party), at, [rect])
        assert mosaic.share(str(party)) == pytest.approx(expected)
        assert before >= expected - 1e-9
        top, left = OFFSET + y, OFFSET + x
        truth[3, top : top + SIZE[0], left : left + SIZE[1]] = True
        y0, x0, y1, x1 = rect
        truth[party, top + y0 : top + y1, left + x0 : left + x1] = True
    for party in range(3):
        true = truth[party].sum() / truth[3].sum()
        share = mosaic.share(str(party))
        assert true <= share + 1e-12
        wide = 2 * (3 + mosaic.cell)  # added to each side of a window, taken off the frame
        loss = 1 - wide * 2 / SIZE[0] - wide * 2 / SIZE[1]
        assert share <= len(walk) * (30 + 2 * wide) ** 2 / (SIZE[0] * SIZE[1] * loss)
    again = Mosaic.from_bytes(mosaic.to_bytes())
    assert [again.share(str(k)) for k in range(3)] == [mosaic.share(str(k)) for k in range(3)]
    assert again.to_bytes() == mosaic.to_bytes()


def test_an_exact_position_on_whole_cells_gives_the_exact_share() -> None:
    mosaic = Mosaic(1024)
    at = Position(0.0, 0.0, 0.0)
    mosaic.show(at, (576, 1024))
    mosaic.see("a", at, [(0, 0, 224, 224), (224, 448, 448, 672)])
    assert mosaic.share("a") == 2 * 224 * 224 / (576 * 1024)
    assert mosaic.share("b") == 0
    mosaic.see("a", at, [(0, 0, 224, 224)])  # nothing new
    assert mosaic.share("a") == 2 * 224 * 224 / (576 * 1024)
    mosaic.see("a", Position(0.0, 0.0, 1.0), [(0, 0, 224, 224)])  # one cell wider on each side
    assert mosaic.share("a") * 144 * 256 == 2 * 56 * 56 + 4 * 56 + 4
    assert mosaic.unseen(at, [(0, 0, 8, 8), (300, 0, 308, 8)], ["a", "b"]).tolist() == [
        [0, 4],
        [4, 4],
    ]


def test_parts_with_unknown_motion_between_them_add_up() -> None:
    """The total does not grow: the second part may show the same content."""
    mosaic = Mosaic(1024)
    for part in range(3):
        at = Position(0.0, 0.0, 0.0, part)
        mosaic.show(at, (512, 1024))
        mosaic.see("a", at, [(0, 0, 256, 512)])
        assert mosaic.share("a") == pytest.approx(0.25 * (part + 1))
    # A pan in one part does not dilute what was seen in another one.
    mosaic.show(Position(0.0, 1024.0, 0.0, 2), (512, 1024))
    assert mosaic.share("a") == pytest.approx(0.25 + 0.25 + 0.125)


def test_many_parts_are_folded_and_nothing_is_forgotten() -> None:
    mosaic = Mosaic(1024)
    for part in range(100):
        at = Position(0.0, 0.0, 0.0, part)
        mosaic.show(at, (512, 1024))
        mosaic.see("a", at, [(0, 0, 8, 512)])
        mosaic.see("b", at, [(0, 0, 512, 1024)])
        again = Mosaic.from_bytes(mosaic.to_bytes())
        assert again.share("a") == pytest.approx(mosaic.share("a"))
    assert mosaic.share("a") == pytest.approx(100 / 128)
    assert mosaic.share("b") == 1
    assert len(mosaic.to_bytes()) < 20_000


def test_a_scene_beyond_the_limit_charges_in_full_and_shows_no_more() -> None:
    mosaic = Mosaic(160)
    at = Position(0.0, 0.0, 0.0)
    mosaic.show(at, SIZE)
    mosaic.see("a", at, [(0, 0, 45, 80)])
    far = Position(1e6, 1e6, 0.0)
    mosaic.show(far, SIZE)
    assert mosaic.share("a") == 0.25
    assert mosaic.unseen(far, [(0, 0, 45, 80)], ["a"]).tolist() == [[45 * 80]]
    mosaic.see("a", far, [(0, 0, 45, 80)])
    assert mosaic.share("a") == 0.5
    assert Mosaic.from_bytes(mosaic.to_bytes()).share("a") == 0.5


def test_damaged_records_give_a_clear_error() -> None:
    mosaic = Mosaic(1024)
    at = Position(0.0, 0.0, 0.0)
    mosaic.show(at, (576, 1024))
    mosaic.see("a", at, [(0, 0, 224, 224)])
    good = mosaic.to_bytes()
    fields = msgspec.msgpack.decode(good)
    part = fields["parts"][0]
    bad: list[bytes] = [b"", b"\x00", good[:-1], good[: len(good) // 2], good + b"\x00"]
    changes = [
        {"version": 2},
        {"cell": 0},
        {"spent": [math.nan]},
        {"spent": [-1.0]},
        {"spent": []},
        {"parties": ["a"] * 65, "spent": [0.0] * 65},
        {"parts": [part] * 2},
        {"parts": [part | {"key": k} for k in range(9)]},
        {"parts": [part | {"shape": [1 << 20, 1 << 20]}]},
        {"parts": [part | {"shape": [-1, -1]}]},
        {"parts": [part | {"shape": [part["shape"][0] - 8, part["shape"][1]]}]},
        {"parts": [part | {"extra": [-1]}]},
        {"parts": [part | {"extra": []}]},
        {"parts": [part | {"origin": [1 << 50, 0]}]},
        {"parts": [part | {"planes": part["planes"][:-6]}]},
        {"parts": [part | {"planes": b"no zlib"}]},
    ]
    bad += [msgspec.msgpack.encode(fields | change) for change in changes]
    for data in bad:
        with pytest.raises(PlacementError, match="the record of a scene is damaged"):
            Mosaic.from_bytes(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.binary(max_size=64))
def test_mutated_records_are_read_or_refused(at: int, byte: int, junk: bytes) -> None:
    mosaic = Mosaic(64)
    here = Position(0.0, 0.0, 0.0)
    mosaic.show(here, (36, 64))
    mosaic.see("a", here, [(0, 0, 16, 16)])
    data = bytearray(mosaic.to_bytes())
    data[at % len(data)] = byte
    for attempt in (bytes(data), junk):
        try:
            read = Mosaic.from_bytes(attempt)
        except PlacementError:
            continue
        assert 0 <= read.share("a") <= 1
        read.see("a", here, [(0, 0, 16, 16)])


def test_parties_are_limited_and_may_come_late() -> None:
    mosaic = Mosaic(64)
    at = Position(0.0, 0.0, 0.0)
    mosaic.show(at, (36, 64))
    for k in range(64):
        mosaic.see(f"p{k}", at, [(0, 0, 16, 16)])
    shown, seen = mosaic.picture("p63")
    assert shown.all()
    assert seen.sum() == 256
    with pytest.raises(PlacementError, match="more than 64 parties"):
        mosaic.see("one more", at, [(0, 0, 16, 16)])
