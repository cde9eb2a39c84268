"""Placement: the exposure budget, separation, secrecy and the ledger that grants sends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_common.errors import PlacementError
from edge_runtime.exposure.colouring import KeyedRandom
from edge_runtime.exposure.placement import (
    DEFAULT_MAX_EXPOSURE,
    Placement,
    best_share,
    place,
)

SECRET = bytes(range(32))
TINY = (144, 32)  # sides of the padded square and of a window, in pixels
VIT = (1024, 224)


def windows_of(height: int, width: int, window: int, side: int) -> tuple[list[int], list[int]]:
    """Areas and indices of the windows of an image of that size."""
    areas, indices = [], []
    for row, column in product(range(side), range(side)):
        area = max(0, min(window, height - row * window)) * max(
            0, min(window, width - column * window)
        )
        if area:
            areas.append(area)
            indices.append(row * side + column)
    return areas, indices


def touching(a: int, b: int, side: int, neighbours: int) -> bool:
    rows, columns = abs(a // side - b // side), abs(a % side - b % side)
    near = rows <= 1 and columns <= 1 and a != b
    return near if neighbours == 8 else near and rows + columns == 1


def pairs_touching(placement: Placement, neighbours: int) -> int:
    return sum(
        touching(a, b, placement.side, neighbours)
        for mine in placement.assignment.values()
        for a in mine
        for b in mine
        if a < b
    )


def names(k: int) -> list[str]:
    return [f"node-{i}" for i in range(k)]


@st.composite
def images(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """A resized image: the longest side fills the square, the other has one pixel or more."""
    square, window = draw(st.sampled_from([TINY, VIT]))
    short = draw(st.integers(1, square))
    height, width = draw(st.permutations([short, square]))
    side = -(-square // window)
    return (*windows_of(height, width, window, side), side)


@st.composite
def scattered(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Any subset of any small grid, with any areas. Real images are a part of these."""
    side = draw(st.integers(1, 6))
    indices = draw(st.lists(st.integers(0, side * side - 1), min_size=1, unique=True))
    areas = draw(st.lists(st.integers(1, 5000), min_size=len(indices), max_size=len(indices)))
    return areas, indices, side


def check(placement: Placement, areas: list[int], windows: list[int], limit: float) -> None:
    """Check the properties of every placement, computed from the assignment alone."""
    area = dict(zip(windows, areas, strict=True))
    sent = [w for mine in placement.assignment.values() for w in mine]
    assert sorted([*sent, *placement.home]) == sorted(windows)  # each window exactly once
    for node, mine in placement.assignment.items():
        share = sum(area[w] for w in mine) / sum(areas)
        assert share == placement.exposure[node]
        assert share <= limit
    for neighbours in (8, 4):
        if placement.separation >= neighbours:
            assert pairs_touching(placement, neighbours) == 0
    assert placement.touching == pairs_touching(placement, 8)
    # If every second choice is used at once, budget and separation still hold.
    for node, mine in placement.assignment.items():
        held = [*mine, *(w for w, second in placement.second.items() if second == node)]
        assert len(set(held)) == len(held)
        assert sum(area[w] for w in held) / sum(areas) <= limit
        if placement.separation:
            assert not any(
                touching(a, b, placement.side, placement.separation)
                for a in held
                for b in held
                if a < b
            )
    assert not set(placement.second) & set(placement.home)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(images(), scattered()),
    st.integers(1, 8),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.binary(min_size=1, max_size=8),
)
def test_partition_is_exact_and_no_node_exceeds_its_budget(
    image: tuple[list[int], list[int], int], k: int, limit: float, home: bool, digest: bytes
) -> None:
    areas, windows, side = image
    try:
        placement = place(areas, windows, side, names(k), limit, SECRET, digest, home)
    except PlacementError:
        assert not home  # with a local fallback, every budget can be met
        assert best_share(areas, windows, side, k) > limit  # type: ignore[operator]
        return
    check(placement, areas, windows, limit)
    if not home:
        assert placement.home == ()


@settings(max_examples=40, deadline=None)
@given(st.one_of(images(), scattered()), st.integers(1, 8), st.binary(min_size=1, max_size=8))
def test_separation_is_kept_wherever_the_number_of_nodes_allows(
    image: tuple[list[int], list[int], int], k: int, digest: bytes
) -> None:
    areas, windows, side = image
    placement = place(areas, windows, side, names(k), 1.0, SECRET, digest)
    check(placement, areas, windows, 1.0)
    if k >= 4:
        assert placement.separation == 8
    elif k >= 2:
        assert placement.separation >= 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_three_or_fewer_nodes_still_avoid_corners_when_a_colouring_exists(
    rows: int, columns: int, k: int
) -> None:
    windows = [r * 3 + c for r in range(rows) for c in range(columns)]
    exists = any(
        all(
            colours[i] != colours[j]
            for i in range(len(windows))
            for j in range(i)
            if touching(windows[i], windows[j], 3, 8)
        )
        for colours in product(range(k), repeat=len(windows))
    )
    placement = place([7] * len(windows), windows, 3, names(k), 1.0, SECRET, b"x")
    assert (placement.separation == 8) == exists


@settings(max_examples=30, deadline=None)
@given(images(), st.integers(2, 6), st.randoms(use_true_random=False), st.binary(max_size=8))
def test_order_of_nodes_and_of_windows_does_not_matter(
    image: tuple[list[int], list[int], int], k: int, shuffler: object, digest: bytes
) -> None:
    areas, windows, side = image
    expected = place(areas, windows, side, names(k), 1.0, SECRET, digest)
    nodes, order = names(k), list(range(len(windows)))
    shuffler.shuffle(nodes)  # type: ignore[attr-defined]
    shuffler.shuffle(order)  # type: ignore[attr-defined]
    again = place(
        [areas[i] for i in order], [windows[i] for i in order], side, nodes, 1.0, SECRET, digest
    )
    assert again == expected


@pytest.mark.process
def test_same_photo_gets_the_same_placement_in_another_process() -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    here = place(areas, windows, 5, names(3), 0.5, SECRET, b"photo")
    code = (
        "import msgspec, sys; from edge_runtime.exposure.placement import place;"
        f"p = place({areas}, {windows}, 5, {names(3)[::-1]}, 0.5, bytes(range(32)), b'photo');"
        "sys.stdout.buffer.write(msgspec.json.encode(p))"
    )
    for seed in ("0", "1"):  # Python's own hashes differ between these two
        there = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        )
        assert msgspec.json.decode(there.stdout, type=Placement) == here


@pytest.mark.parametrize("k", [3, 4])
def test_a_repeat_under_another_budget_shows_no_node_more(k: int) -> None:
    areas, windows = windows_of(108, 144, 32, 5)
    area = dict(zip(windows, areas, strict=True))
    for i in range(8):
        first = place(areas, windows, 5, names(k), 0.5, SECRET, bytes([i]))
        seen = {node: set(mine) for node, mine in first.assignment.items()}
        for budget in (0.37, 0.35, 0.34, 0.3, 0.2):
            again = place(areas, windows, 5, names(k), budget, SECRET, bytes([i]), keep_home=True)
            for node, mine in again.assignment.items():
                seen[node] |= set(mine)
        union = max(sum(area[w] for w in mine) / sum(areas) for mine in seen.values())
        assert union == max(first.exposure.values())


def test_a_machine_with_a_new_name_gets_the_same_placement() -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    keys = ["key of one", "key of two", "key of three"]

    def who_saw(names: list[str]) -> dict[str, tuple[int, ...]]:
        ids = dict(zip(names, keys, strict=True))
        found = place(areas, windows, 5, names, 0.5, SECRET, b"photo", ids=ids).assignment
        return {ids[name]: mine for name, mine in found.items()}

    assert who_saw(["alpha", "beta", "gamma"]) == who_saw(["zeta", "beta", "alpha"])


@pytest.mark.parametrize("k", [3, 4, 5])
def test_secret_and_photo_each_change_the_placement(k: int) -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    by_photo = {
        str(place(areas, windows, 5, names(k), 0.5, SECRET, bytes([i])).assignment)
        for i in range(30)
    }
    by_secret = {
        str(place(areas, windows, 5, names(k), 0.5, bytes([i]) * 32, b"photo").assignment)
        for i in range(30)
    }
    assert len(by_photo) > 15  # 4 nodes: 192 corner-free placements in all, few of them even
    assert len(by_secret) > 15


def test_random_numbers_do_not_repeat() -> None:
    random = KeyedRandom(SECRET, b"photo")
    assert len({random.below(1 << 64) for _ in range(1000)}) == 1000


def test_every_window_goes_to_every_node_equally_often() -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    draws = 240
    counts = {(w, n): 0 for w in windows for n in names(3)}
    for i in range(draws):
        placement = place(areas, windows, 5, names(3), 0.5, SECRET, i.to_bytes(4, "big"))
        for node, mine in placement.assignment.items():
            for w in mine:
                counts[w, node] += 1
    # 80 expected; 5 standard deviations of a binomial are 37. The seeds are fixed, so it never
    # flickers.
    assert all(abs(count - draws / 3) < 37 for count in counts.values())


def every_aspect(square: int, window: int) -> Iterator[tuple[list[int], list[int]]]:
    for short in range(square, 0, -square // 16):
        yield windows_of(short, square, window, 5)


# Largest share that any node sees, worst over all aspect ratios from a strip to a square, at the
# separation that this number of nodes allows. The docs repeat these figures.
@pytest.mark.parametrize(
    ("k", "worst"), [(2, 0.57), (3, 0.45), (4, 0.35), (5, 0.24), (6, 0.23), (7, 0.23), (8, 0.23)]
)
@pytest.mark.parametrize("geometry", [TINY, VIT])
def test_largest_share_over_all_aspect_ratios(
    geometry: tuple[int, int], k: int, worst: float
) -> None:
    shares = [
        best_share(areas, windows, 5, k, 8 if k >= 4 else 4)
        for areas, windows in every_aspect(*geometry)
    ]
    assert max(s for s in shares if s is not None) <= worst
    assert None not in shares


@pytest.mark.parametrize("geometry", [TINY, VIT])
@pytest.mark.parametrize("aspect", [1, 4 / 5, 3 / 4, 2 / 3, 9 / 16])
def test_three_nodes_see_at_most_37_percent_of_an_ordinary_photo(
    geometry: tuple[int, int], aspect: float
) -> None:
    square, window = geometry
    areas, windows = windows_of(round(square * aspect), square, window, 5)
    for i in range(20):
        placement = place(areas, windows, 5, names(3), DEFAULT_MAX_EXPOSURE, SECRET, bytes([i]))
        assert max(placement.exposure.values()) <= 0.37
        assert placement.separation == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(2, 3))
def test_shares_are_near_the_smallest_possible(sizes: list[int], k: int) -> None:
    windows = [i * 2 for i in range(len(sizes))]  # no two windows touch: pure bin packing
    best = min(
        max(sum(s for s, c in zip(sizes, colours, strict=True) if c == node) for node in range(k))
        for colours in product(range(k), repeat=len(sizes))
    )
    placement = place(sizes, windows, 16, names(k), 1.0, SECRET, b"x")
    assert max(placement.exposure.values()) <= best / sum(sizes) + 0.01


def test_an_odd_shape_is_split_evenly_between_two_nodes() -> None:
    placement = place([2, 2, 2, 3, 3], [0, 1, 2, 3, 4], 5, names(2), 0.5, SECRET, b"x")
    check(placement, [2, 2, 2, 3, 3], [0, 1, 2, 3, 4], 0.5)
    assert set(placement.exposure.values()) == {0.5}


@st.composite
def small(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Up to eight windows of a small grid, with areas that rarely divide evenly."""
    side = draw(st.integers(2, 4))
    indices = draw(st.sets(st.integers(0, side * side - 1), min_size=1, max_size=8).map(sorted))
    most = draw(st.sampled_from([3, 20, 5000]))
    areas = draw(st.lists(st.integers(1, most), min_size=len(indices), max_size=len(indices)))
    return areas, indices, side


def smallest_share(
    image: tuple[list[int], list[int], int], k: int, separation: int
) -> float | None:
    """Try every colouring."""
    areas, windows, side = image
    conflicts = [
        (i, j)
        for i in range(len(windows))
        for j in range(i)
        if separation and touching(windows[i], windows[j], side, separation)
    ]
    loads = [
        max(sum(a for a, c in zip(areas, colours, strict=True) if c == node) for node in range(k))
        for colours in product(range(k), repeat=len(windows))
        if all(colours[i] != colours[j] for i, j in conflicts)
    ]
    return min(loads) / sum(areas) if loads else None


@settings(max_examples=100, deadline=None)
@given(small(), st.integers(1, 3), st.sampled_from([0, 4, 8]))
def test_small_shapes_are_placed_as_evenly_as_possible(
    image: tuple[list[int], list[int], int], k: int, separation: int
) -> None:
    areas, windows, side = image
    best = smallest_share(image, k, separation)
    assert best_share(areas, windows, side, k, separation) == best
    if best is not None:  # a budget that can be met with this separation is met and keeps it
        placement = place(areas, windows, side, names(k), best, SECRET, b"x")
        check(placement, areas, windows, best)
        assert placement.separation >= separation


@pytest.mark.parametrize("geometry", [TINY, VIT])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
def test_no_feasible_budget_is_refused(geometry: tuple[int, int], k: int) -> None:
    for areas, windows in every_aspect(*geometry):
        assert best_share(areas, windows, 5, k) == smallest_by_counts(areas, k)


def smallest_by_counts(areas: list[int], k: int) -> float:
    """Windows of one area are interchangeable: find the loads that the nodes can reach, area by
    area."""
    reachable = {(0,) * k}
    most = -(-sum(areas) // k) + max(areas)  # filling the emptiest node first never takes more
    for area in sorted(areas, reverse=True):
        reachable = {
            tuple(sorted((*loads[:node], loads[node] + area, *loads[node + 1 :])))
            for loads in reachable
            for node in range(k)
            if loads[node] + area <= most
        }
    return min(max(loads) for loads in reachable) / sum(areas)


@settings(max_examples=40, deadline=None)
@given(images(), st.integers(1, 5), st.floats(0.02, 0.9))
def test_the_suggestion_in_the_error_suffices(
    image: tuple[list[int], list[int], int], k: int, limit: float
) -> None:
    areas, windows, side = image
    try:
        place(areas, windows, side, names(k), limit, SECRET, b"x")
        return
    except PlacementError as error:
        message = str(error)
    share = float(re.search(r"--max-exposure ([\d.]+)", message)[1])  # type: ignore[index]
    check(place(areas, windows, side, names(k), share, SECRET, b"x"), areas, windows, share)
    if more := re.search(r"suffice: (\d+) nodes", message):
        enough = names(int(more[1]))
        check(place(areas, windows, side, enough, limit, SECRET, b"x"), areas, windows, limit)
    else:
        assert max(areas) / sum(areas) > limit  # one window alone is too much for any node


def test_area_takes_precedence_over_separation_and_this_is_reported() -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    four = best_share(areas, windows, 5, 4, 8)
    assert four is not None
    tight = place(areas, windows, 5, names(4), four - 0.01, SECRET, b"x")
    assert tight.separation == 4
    assert 0 < tight.touching < 25
    half = place([3, 1, 1, 1], [0, 1, 2, 3], 4, names(2), 0.5, SECRET, b"x")
    assert half.separation == 0
    assert half.touching == 2
    assert sorted(half.exposure.values()) == [0.5, 0.5]


def test_the_edge_computes_only_windows_that_no_node_may_see() -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    placement = place(areas, windows, 5, names(2), 0.3, SECRET, b"x", keep_home=True)
    check(placement, areas, windows, 0.3)
    assert min(placement.exposure.values()) > 0.25
    nothing = place(areas, windows, 5, names(2), 0.001, SECRET, b"x", keep_home=True)
    assert list(nothing.home) == windows


@pytest.mark.parametrize(("most", "home"), [(8, (4,)), (6, (2,)), (5, (0,)), (3, (0, 4))])
def test_the_edge_takes_the_smallest_window_that_suffices(most: int, home: tuple[int, ...]) -> None:
    found = place([5, 3, 1], [0, 2, 4], 5, ["a"], most / 9, SECRET, b"x", keep_home=True)
    assert found.home == home


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nodes": []}, "no nodes"),
        ({"nodes": ["a", "a"]}, "must differ"),
        ({"max_exposure": 0.0}, "above 0"),
        ({"max_exposure": 1.5}, "at most 1"),
        ({"max_exposure": float("nan")}, "above 0"),
        ({"secret": b"short"}, "at least 16"),
        ({"windows": [1, 1]}, "distinct"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, object], says: str) -> None:
    good: dict[str, object] = {
        "areas": [1, 1],
        "windows": [0, 1],
        "side": 2,
        "nodes": ["a", "b"],
        "max_exposure": 0.5,
        "secret": SECRET,
        "image_hash": b"x",
    }
    with pytest.raises(PlacementError, match=says):
        place(**{**good, **change})  # type: ignore[arg-type]
