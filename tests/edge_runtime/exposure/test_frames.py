"""Frames of a scene: the budget holds over all of them, and a still camera shows nothing new."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import SECRET, names, touching

from edge_common.errors import PlacementError
from edge_runtime.exposure.frames import FramePlacer
from edge_runtime.exposure.mosaic import Mosaic
from edge_runtime.exposure.motion import Position
from edge_runtime.exposure.placement import Placement
from engines.geometry import Geometry

SMALL = Geometry(64, 4, 4, 8, 8)  # 4 x 4 windows of 16 pixels, cells of one pixel
VIT_H = Geometry(1024, 16, 14, 1280, 256)
SIZE = (576, 1024)
START = Position(0.0, 0.0, 0.0)


def placer(budget: float = 0.37, geometry: Geometry = VIT_H, key: bytes = b"scene") -> FramePlacer:
    return FramePlacer(geometry, budget, SECRET, key)


def check(placement: Placement, parties: list[str], local: set[int]) -> None:
    """Each window exactly once, at home where it must be, apart, and seconds that keep apart."""
    sent = [w for mine in placement.assignment.values() for w in mine]
    assert sorted([*sent, *placement.home]) == sorted(placement.areas)
    assert set(placement.assignment) == set(parties)
    assert local & set(placement.areas) <= set(placement.home)
    separation = 8 if len(parties) >= 4 else 4 if len(parties) >= 2 else 0
    assert placement.separation >= separation
    for name in parties:
        held = [*placement.assignment[name]]
        held += [w for w, second in placement.second.items() if second == name]
        assert len(set(held)) == len(held)
        assert not set(held) & set(placement.home)
        if separation:
            pairs = combinations(held, 2)
            assert not any(touching(a, b, placement.side, separation) for a, b in pairs)


class Truth:
    """What each party has truly seen, pixel by pixel, at positions that the placer is not told."""

    def __init__(self) -> None:
        self.seen: dict[str, np.ndarray] = {}
        self.shown = np.zeros((800, 800), bool)

    def frame(self, y: int, x: int, height: int, width: int) -> None:
        self.at = 400 + y, 400 + x
        self.size = height, width
        self.shown[400 + y : 400 + y + height, 400 + x : 400 + x + width] = True

    def see(self, party: str, windows: list[int] | tuple[int, ...]) -> None:
        canvas = self.seen.setdefault(party, np.zeros_like(self.shown))
        for window in windows:
            y0, x0, y1, x1 = SMALL.window_rect(window)
            y1, x1 = min(y1, self.size[0]), min(x1, self.size[1])
            y, x = self.at
            canvas[y + y0 : y + y1, x + x0 : x + x1] = True

    def largest(self) -> float:
        return max((c.sum() / self.shown.sum() for c in self.seen.values()), default=0.0)


frames = st.lists(
    st.tuples(
        st.integers(-12, 12),  # motion
        st.integers(-12, 12),
        st.sampled_from(["known", "known", "known", "rough", "unknown", "still"]),
        st.sets(st.integers(0, 6)),  # parties that are away
        st.sets(st.integers(0, 15), max_size=3),  # windows that stay local
        st.booleans(),  # seconds are used
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(frames, st.integers(1, 7), st.floats(0.05, 1.0), st.integers(20, 64), st.booleans())
def test_no_walk_takes_any_party_over_its_budget(
    walk: list[tuple[int, int, str, set[int], set[int], bool]],
    count: int,
    budget: float,
    height: int,
    restarts: bool,
) -> None:
    """Nor do unknown motion, errors of the estimate, parties that vanish, seconds or restarts."""
    under_test, truth = placer(budget, SMALL), Truth()
    y = x = part = 0
    origin = 0, 0
    everybody = names(count)
    for n, (dy, dx, kind, away, local, seconds) in enumerate(walk):
        if kind != "still":
            y, x = max(-200, min(200, y + dy)), max(-200, min(200, x + dx))
        if kind == "unknown":
            part, origin = part + 1, (y, x)
        error = 2.0 if kind == "rough" else 0.0
        sign = 1 if n % 2 else -1
        at = Position(y - origin[0] + sign * error, x - origin[1] - error, error, part)
        present = [name for k, name in enumerate(everybody) if k not in away]
        truth.frame(y, x, height, 64)
        # The position may also be withheld altogether.
        known = None if kind == "unknown" and dx > 0 else at
        placement = under_test.place((height, 64), known, present, local)
        check(placement, present, local)
        for name, mine in placement.assignment.items():
            truth.see(name, mine)
        assert truth.largest() <= budget + 1e-9
        if seconds:
            for window, name in placement.second.items():
                assert under_test.use(placement, name, [window])  # all of them at once
                truth.see(name, [window])
        assert truth.largest() <= budget + 1e-9
        assert all(under_test.mosaic.share(name) <= budget + 1e-9 for name in everybody)
        if restarts and n % 5 == 4:
            kept = Mosaic.from_bytes(under_test.mosaic.to_bytes())
            under_test = FramePlacer(SMALL, budget, SECRET, b"scene", kept)
            part, origin = part + 1, (y, x)  # nobody knows where the camera looks now


@pytest.mark.parametrize("parties", [3, 4, 5, 6, 9])
def test_a_still_camera_keeps_every_window_with_its_party(parties: int) -> None:
    under_test = placer()
    first = under_test.place(SIZE, START, names(parties))
    shares = [under_test.mosaic.share(name) for name in names(parties)]
    assert first.home == ()
    assert shares == pytest.approx([first.exposure[name] for name in names(parties)])
    for _ in range(20):
        again = under_test.place(SIZE, START, names(parties)[::-1])
        assert again.assignment == first.assignment
        assert again.second == first.second
    # Nor does it matter how often the camera looks away a little and comes back.
    for step in range(20):
        under_test.place(SIZE, Position(0.0, step % 3 - 1.0, 1.0), names(parties))
    assert under_test.place(SIZE, START, names(parties)).assignment == first.assignment
    after = [under_test.mosaic.share(name) for name in names(parties)]
    assert max(after) < max(shares) * 1.2


def test_a_party_that_comes_back_gets_its_windows_again() -> None:
    under_test = placer()
    first = under_test.place(SIZE, START, names(6))
    without = under_test.place(SIZE, START, names(5))
    assert "node-5" not in without.assignment
    for name in names(5):
        assert set(first.assignment[name]) <= set(without.assignment[name])
    again = under_test.place(SIZE, START, names(6))
    assert again.assignment == first.assignment


def test_the_same_secret_and_key_place_alike_and_others_do_not() -> None:
    def run(key: bytes, order: int = 1) -> list[dict[str, tuple[int, ...]]]:
        under_test = placer(key=key)
        return [
            under_test.place(SIZE, Position(0.0, 40.0 * t, 0.0), names(5)[::order]).assignment
            for t in range(12)
        ]

    assert run(b"a") == run(b"a", -1)
    assert len({str(run(bytes([k]))) for k in range(8)}) > 4


def test_windows_that_stay_local_are_never_sent_nor_charged() -> None:
    under_test = placer()
    for t in range(30):
        placement = under_test.place(SIZE, Position(0.0, 0.0, 0.0), names(4), [0, 6, 7])
        check(placement, names(4), {0, 6, 7})
        placement = under_test.place(SIZE, Position(0.0, 8.0 * t, 1.0), names(4), [2])
        check(placement, names(4), {2})


def test_seconds_are_permitted_once_and_only_to_the_second() -> None:
    under_test = placer(0.5)
    placement = under_test.place(SIZE, START, names(5))
    assert len(placement.second) >= 3
    window, second = next(iter(placement.second.items()))
    third = next(
        name for name in names(5) if name != second and window not in placement.assignment[name]
    )
    before = under_test.mosaic.share(second)
    assert not under_test.use(placement, third, [window])
    assert not under_test.use(placement, second, [window, *placement.assignment[second]])
    assert under_test.mosaic.share(second) == before
    assert under_test.use(placement, second, [window])
    assert under_test.mosaic.share(second) > before
    for t in range(40):
        under_test.place(SIZE, Position(0.0, 20.0 * t, 0.0), names(5))
    assert not under_test.use(placement, second, [window])  # forgotten


def test_an_earlier_frame_cannot_use_room_that_a_later_one_took() -> None:
    under_test = placer()
    early = under_test.place(SIZE, START, names(5))
    for t in range(10):
        under_test.place(SIZE, Position(20.0 * t, 20.0 * t, 0.0), names(5))
    permitted = [under_test.use(early, name, [w]) for w, name in early.second.items()]
    assert not all(permitted)
    assert all(under_test.mosaic.share(name) <= 0.37 for name in names(5))


def test_another_size_of_frame_is_unknown_motion() -> None:
    under_test = placer(1.0)
    under_test.place(SIZE, START, names(5))
    share = under_test.mosaic.share("node-0")
    under_test.place((1024, 576), START, names(5))
    assert under_test.mosaic.share("node-0") > 1.5 * share


def test_a_frame_without_parties_is_computed_at_home() -> None:
    placement = placer().place(SIZE, START, [])
    assert len(placement.home) == 15
    assert placement.assignment == {}
    assert len(placer().place(SIZE, None, ["only"]).assignment["only"]) > 0


def test_bad_arguments() -> None:
    with pytest.raises(PlacementError, match="must differ"):
        placer().place(SIZE, START, ["a", "a"])
    for budget in (0.0, 1.5, float("nan")):
        with pytest.raises(PlacementError, match="above 0"):
            placer(budget)


@pytest.mark.parametrize(
    ("camera", "parties", "most"), [("pan", 5, 0.12), ("pan", 6, 0.01), ("sweep", 9, 0.02)]
)
def test_few_windows_stay_at_home_while_the_camera_moves(
    camera: str, parties: int, most: float
) -> None:
    """A short form of docs/results/scenes.py: `most` is above what it measures."""
    under_test, home = placer(), 0
    for t in range(100):
        angle = 2 * np.pi * t / 200
        y, x = (0, 16 * t) if camera == "pan" else (512 * np.sin(2 * angle), 1024 * np.sin(angle))
        at = Position(float(np.rint(y)), float(np.rint(x)), 0.0)
        placement = under_test.place(SIZE, at, names(parties))
        check(placement, names(parties), set())
        home += len(placement.home)
    assert home / 1500 <= most
    assert all(under_test.mosaic.share(name) <= 0.37 for name in names(parties))
