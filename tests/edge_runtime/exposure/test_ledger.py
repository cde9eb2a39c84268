"""The exposure ledger: every send needs a permit, and windows that may have left count as seen."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import SECRET, names, touching, windows_of

from edge_common.errors import PlacementError
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import Placement, place


def tiny_square(k: int = 3, limit: float = 0.5) -> Placement:
    areas, windows = windows_of(144, 144, 32, 5)
    return place(areas, windows, 5, names(k), limit, SECRET, b"photo")


def test_a_permit_allows_one_send_of_its_windows_to_its_node() -> None:
    placement = tiny_square()
    ledger = ExposureLedger(placement)
    for node, mine in placement.assignment.items():
        permit = ledger.reserve(node, mine)
        for other in (("another", mine), (node, mine[:-1]), (node, mine[::-1])):
            with pytest.raises(PlacementError, match="no permit"):
                permit.check(*other)
        permit.check(node, mine)
        permit.commit(100)
        with pytest.raises(PlacementError, match="no permit"):
            permit.check(node, mine)
        with pytest.raises(PlacementError, match="no permit"):
            permit.commit(100)
        assert ledger.seen(node) == set(mine)
        assert ledger.bytes_sent(node) == 100
    assert ledger.exposure() == placement.exposure
    assert len(json.loads(msgspec.json.encode(ledger.entries))) == 6


def test_only_windows_that_may_have_left_count_as_seen() -> None:
    placement = tiny_square()
    ledger = ExposureLedger(placement)
    node, mine = next(iter(placement.assignment.items()))
    share = placement.exposure[node]
    permit = ledger.reserve(node, mine)
    assert (ledger.seen(node), ledger.exposure()[node]) == (set(), 0)
    permit.release()
    permit.release()  # a second release changes nothing
    with pytest.raises(PlacementError, match="no permit"):
        permit.commit(1)
    again = ledger.reserve(node, mine, "again")
    again.commit(100)
    assert (ledger.seen(node), ledger.exposure()[node]) == (set(mine), share)
    told = [(e.event, e.reason, e.bytes, e.share_of_image) for e in ledger.entries]
    assert told == [
        ("reserved", "dispatch", 0, share),
        ("released", "dispatch", 0, 0),
        ("reserved", "again", 0, share),
        ("committed", "again", 100, share),
    ]


def test_the_ledger_refuses_and_records_excessive_exposure() -> None:
    placement = tiny_square()
    ledger = ExposureLedger(placement)
    a, b, _ = placement.assignment
    with pytest.raises(PlacementError, match=r"above 0\.5"):
        ledger.reserve(a, placement.assignment[b], reason="retry")
    touching_one = next(
        w
        for w in placement.assignment[b]
        if any(touching(w, mine, 5, 4) for mine in placement.assignment[a])
    )
    with pytest.raises(PlacementError, match="touches"):
        ledger.reserve(a, [touching_one])
    with pytest.raises(PlacementError, match="not one of the nodes"):
        ledger.reserve("stranger", [0])
    with pytest.raises(PlacementError, match="not part of this image"):
        ledger.reserve(a, [99])
    assert [entry.event for entry in ledger.entries] == ["refused"] * 4
    assert ledger.exposure()[a] == 0


@pytest.mark.parametrize("committed", [False, True])
def test_earlier_extra_windows_count_and_released_ones_do_not(committed: bool) -> None:
    """Three windows of a third each. Each node owns one and may see two."""
    placement = place([1] * 3, [0, 2, 4], 5, names(3), 0.7, SECRET, b"x")
    placement = msgspec.structs.replace(placement, second={})  # which would take the room
    ledger = ExposureLedger(placement)
    a, b, c = placement.assignment
    extra = ledger.reserve(a, placement.assignment[b], "retry")
    if committed:
        extra.commit(1)
    with pytest.raises(PlacementError, match=r"see 1\.000 of the image, above 0\.7"):
        ledger.reserve(a, placement.assignment[c], "retry")
    ledger.reserve(a, placement.assignment[b], "once more")  # nothing new
    if not committed:
        for permit in ledger.permits:
            permit.release()
        ledger.reserve(a, placement.assignment[c], "retry")


def test_second_choices_are_permitted_and_others_leave_room_for_them() -> None:
    placement = tiny_square(6, 0.5)
    assert len(placement.second) >= 3
    window, second = next(iter(placement.second.items()))
    ledger = ExposureLedger(placement)
    near = next(w for w in placement.areas if touching(w, window, 5, 8))
    if near not in placement.assignment[second]:
        with pytest.raises(PlacementError, match="touches"):
            ledger.reserve(second, [near])  # would take the place of its second choice
    for w, node in placement.second.items():
        ledger.reserve(node, [w], "retry").commit(1)
    for node, mine in placement.assignment.items():
        ledger.reserve(node, mine).commit(1)
    assert max(ledger.exposure().values()) <= 0.5


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.floats(0.05, 1.0),
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.lists(st.integers(0, 26), max_size=6),
            st.sampled_from(["commit", "release", "wait"]),
        ),
        max_size=40,
    ),
)
def test_no_sequence_of_requests_breaches_area_separation_or_home(
    k: int, limit: float, trace: list[tuple[int, list[int], str]]
) -> None:
    areas, windows = windows_of(144, 144, 32, 5)
    placement = place(areas, windows, 5, names(k), limit, SECRET, b"x", keep_home=True)
    ledger = ExposureLedger(placement)
    shown: dict[str, set[int]] = {name: set() for name in names(k)}
    waiting = []
    requests = [(f"node-{n}", w, then) for n, w, then in trace]
    requests += [(node, list(mine), "commit") for node, mine in placement.assignment.items()]
    requests += [(node, [window], "commit") for window, node in placement.second.items()]
    for i, (node, asked, then) in enumerate(requests):
        try:
            permit = ledger.reserve(node, asked)
        except PlacementError:
            assert i < len(trace)  # the placement's first and second choices are always permitted
            continue
        if then == "release":
            permit.release()
        elif then == "wait":
            waiting.append(permit)
        else:
            permit.commit(1)
            shown[node] |= set(asked)
    for permit in waiting:  # a reserved permit may be used at any time
        permit.commit(1)
        shown[permit.node] |= set(permit.windows)
    area = dict(zip(windows, areas, strict=True))
    for node, seen in shown.items():
        assert ledger.seen(node) == seen
        assert sum(area[w] for w in seen) / sum(areas) <= limit
        assert not seen & set(placement.home)
        if placement.separation:
            assert not any(
                touching(a, b, 5, placement.separation) for a in seen for b in seen if a < b
            )
