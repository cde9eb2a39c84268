"""What the edge knows about a node: estimates, limits, rest, ejection and quarantine."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.offload.health import Fleet, NodeHealth, Settings, Times, chunks, split


def times(windows: int, total: float, up: float = 0.3, down: float = 0.3) -> Times:
    """A request of which upload and download take these shares."""
    stages = (up * total, 0.0, (1 - up - down) * total, down * total)
    return Times(windows, 1000 * windows, 2000 * windows, *stages, total_s=total)


def feed(node: NodeHealth, totals: list[tuple[int, float]], now: float = 0.0) -> float:
    """Let requests succeed one after another. Returns when the last one did."""
    for windows, total in totals:
        node.sent(now, windows)
        now += total
        node.succeeded(now, times(windows, total))
    return now


def node_of(seconds: float, name: str = "a", windows: int = 4, count: int = 20) -> NodeHealth:
    node = NodeHealth(name, name, random=Random(0))
    feed(node, [(windows, seconds)] * count)
    return node


def test_latency_and_rate_are_told_apart() -> None:
    node = NodeHealth("a", "a")
    assert node.expected_s(4) is None
    assert node.speed is None
    feed(node, [(n, 0.05 + 0.01 * n) for n in (2, 8) * 10])
    assert node.expected_s(20) == pytest.approx(0.25)
    assert node.expected_s(4, ahead=0) == pytest.approx(0.09)


def test_windows_ahead_make_a_request_take_longer() -> None:
    node = NodeHealth("a", "a")
    for at in range(20):
        for ahead in (0, 2, 4):
            assert node.sent(at, 2) == ahead
        for ahead in (0, 2, 4):
            total = 0.1 + 0.01 * ahead
            node.succeeded(at + total, times(2, total), ahead)
    assert node.expected_s(2) == pytest.approx(0.1)
    assert node.expected_s(2, ahead=10) == pytest.approx(0.2)


def test_stragglers_move_no_estimate() -> None:
    slow = [(4, 1.0) if i % 20 == 7 else (4, 0.1 + 0.001 * (i % 5)) for i in range(40)]
    node = NodeHealth("a", "a")
    feed(node, slow)
    assert node.expected_s(4) == pytest.approx(0.1, abs=0.005)
    assert node.late_s(4) == pytest.approx(0.12, abs=0.01)
    assert node.speed == pytest.approx(40, rel=0.1)


def test_late_is_the_95th_percentile_of_what_varies_widely() -> None:
    node = NodeHealth("a", "a")
    feed(node, [(4, 0.1 + 0.005 * i) for i in range(40)])
    assert node.late_s(4) == pytest.approx(0.1 + 0.005 * 37)
    assert NodeHealth("b", "b").late_s(4) is None
    assert node_of(0.1, count=9).late_s(4) is None


def test_a_request_given_up_after_long_counts_as_at_least_that_slow() -> None:
    node = node_of(0.1)
    for _ in range(40):
        node.sent(5.0, 4)
        node.cancelled(5.01, 4, 0.01)
    assert node.expected_s(4) == pytest.approx(0.1)
    for _ in range(40):
        node.sent(5.0, 4)
        node.cancelled(5.4, 4, 0.4)
    assert node.expected_s(4) == pytest.approx(0.4)
    assert (node.under_way, node.load, node.failures) == (0, 0, 0)


def test_what_a_node_says_about_itself_changes_no_expectation() -> None:
    honest, liar = NodeHealth("a", "a"), NodeHealth("b", "b")
    for i in range(20):
        for node, claim in ((honest, 0.05), (liar, [-1e9, 1e9, 0.0][i % 3])):
            node.sent(i, 4)
            node.succeeded(i + 0.1, Times(4, 1, 1, 0.02, claim, claim, 0.03, total_s=0.1))
    assert liar.expected_s(4) == honest.expected_s(4)
    assert liar.late_s(4) == honest.late_s(4)
    assert liar.speed == honest.speed
    assert sum(chunks(9, liar)) == 9


def test_back_off_is_full_jitter_and_doubles() -> None:
    longest = []
    for failures in range(1, 10):
        rests = []
        for seed in range(200):
            node = NodeHealth("a", "a", random=Random(seed))
            now = 0.0
            for _ in range(failures):
                node.sent(now, 1)
                now = node.failed(now, "late", windows=1)
                before = now
            node.sent(before, 1)
            rests.append(node.failed(before, "late", windows=1) - before)
        longest.append(max(rests))
        assert min(rests) < 0.1 * max(rests)
    for failures, rest in enumerate(longest, 1):
        assert 0.9 * min(10.0, 0.1 * 2**failures) < rest <= min(10.0, 0.1 * 2**failures)


def test_a_node_is_believed_when_it_says_when_to_ask_again_within_limits() -> None:
    node = NodeHealth("a", "a")
    node.sent(0.0, 1)
    assert node.failed(0.0, "refused", 2.0, windows=1) == 2.0
    assert node.state(1.9) == "resting"
    assert node.state(2.0) == "probing"
    assert node.failed(3.0, "refused", 1e9) == 3.0 + 300


def test_requests_that_fail_together_count_once_and_a_success_ends_the_rest() -> None:
    node = node_of(0.1)
    for _ in range(2):
        node.sent(9.0, 4)
    node.failed(9.0, "connection_lost", 0.5, windows=4)
    node.failed(9.0, "connection_lost", windows=4)
    assert node.failures == 1
    assert (node.state(9.1), node.room(9.1)) == ("resting", 0)
    assert (node.state(9.9), node.room(9.9)) == ("probing", 1)
    node.sent(9.9, 4)
    assert not node.may_send(9.9)
    node.succeeded(10.0, times(4, 0.1))
    assert node.state(10.0) == "healthy"
    assert node.failures == 0


def test_a_link_that_is_back_ends_a_rest_for_its_sake_only() -> None:
    for code, ready in (("connection_lost", True), ("refused", False)):
        node = NodeHealth("a", "a")
        node.failed(0.0, code, 5.0)
        node.link_up(1.0)
        assert node.may_send(1.0) == ready


def test_a_node_whose_link_is_lost_is_asked_again_when_it_is_back_or_after_the_grace() -> None:
    node = NodeHealth("a", "a")
    node.sent(0.0, 1)
    node.link_down(1.0, 1.0)
    assert (node.state(1.5), node.ready_at(1.5)) == ("resting", 2.0)
    node.failed(1.0, "connection_lost", windows=1)
    assert node.failures == 1  # the request that was lost with the link still counts
    assert node.state(2.0) == "probing"
    node.link_down(3.0, 1.0)
    node.link_up(3.1)
    assert node.may_send(3.1)


def test_quarantine_doubles_and_is_released_by_hand() -> None:
    node = NodeHealth("a", "a")
    now = 0.0
    for wanted in [60, 120, 240, 480, 960, 1920, 3600, 3600]:
        node.quarantine(now, "forged")
        node.quarantine(now, "forged")  # the same one
        assert node.ready_at(now) - now == wanted
        assert not node.may_send(now + wanted - 1)
        now += wanted
        assert node.state(now) == "probing"
    node.quarantine(now, "forged")
    node.release(now)
    assert node.state(now) == "probing"
    node.failed(now, "wrong_answer")
    assert node.ready_at(now) - now == 60
    assert node.reason == "wrong_answer"


def test_the_limit_grows_while_latency_stays_and_only_if_it_is_used() -> None:
    idle, used = NodeHealth("a", "a"), NodeHealth("b", "b")
    for i in range(300):
        feed(idle, [(4, 0.1)], now=i)
        while used.room(i):
            used.sent(i, 4)
        for _ in range(used.under_way):
            used.succeeded(i + 0.1, times(4, 0.1))
    assert idle.limit < 4
    assert used.limit == 16


def test_the_limit_finds_the_level_of_a_node_that_serves_two_at_once() -> None:
    node, seen = NodeHealth("a", "a"), []
    for i in range(3000):
        while node.room(i):
            node.sent(i, 4)
        took = 0.1 * max(1.0, node.under_way / 2)
        node.succeeded(i + took, times(4, took))
        seen.append(node.limit)
    assert max(seen[200:]) < 8
    assert min(seen[200:]) >= 2


def test_timeouts_shrink_the_limit() -> None:
    node = node_of(0.1)
    for i in range(100):
        node.sent(100.0 * i, 4)
        node.failed(100.0 * i, "late", windows=4)
    assert node.limit == 1.0


def fleet_of(*seconds: float) -> Fleet:
    return Fleet(node_of(each, name) for name, each in zip("abcdefghi", seconds, strict=False))


@pytest.mark.parametrize(
    ("seconds", "out"),
    [
        ((0.1, 0.1, 1.0), ["c"]),
        ((0.1, 0.12, 0.3), []),  # slow, but no outlier
        ((0.1, 1.0), []),  # nobody to compare with
        ((1.0, 1.0, 1.0), []),
        ((0.1, 0.1, 0.1, 0.1, 1.0, 1.0), ["e", "f"]),
        ((0.1, 0.1, 0.1, 1.0, 1.0), ["d"]),  # a third of five is one
    ],
)
def test_outliers_are_ejected_by_count(seconds: tuple[float, ...], out: list[str]) -> None:
    fleet = fleet_of(*seconds)
    assert fleet.check(50.0) == out
    assert fleet.check(50.0) == []
    assert [n for n in fleet.nodes if fleet.nodes[n].state(50.0) == "ejected"] == out


def test_an_ejected_node_is_probed_and_comes_back_and_longer_ejected_each_time() -> None:
    fleet = fleet_of(0.1, 0.1, 1.0)
    node = fleet.nodes["c"]
    now, rests = 50.0, []
    for _ in range(12):
        fleet.check(now)
        rests.append(node.ready_at(now) - now)
        now = node.ready_at(now)
        assert (node.state(now), node.room(now)) == ("probing", 1)
        now = feed(node, [(4, 1.0)] * 20, now)
        assert node.state(now) == "healthy"
    assert rests == [30.0 * min(count, 10) for count in range(1, 13)]


def test_failures_in_a_row_eject_but_never_all() -> None:
    fleet = fleet_of(0.1, 0.1, 0.1)
    now = 50.0
    for _ in range(40):
        for name, node in fleet.nodes.items():
            if node.may_send(now):
                node.sent(now, 4)
                fleet.failed(now, name, "unreachable", windows=4)
        states = [node.state(now) for node in fleet.nodes.values()]
        assert states.count("ejected") <= 1
        now += 11.0
    assert any(node.failures > 5 for node in fleet.nodes.values())
    # Those that are not ejected are tried again after ten seconds at most.
    assert sum(node.ready_at(now) - now <= 10 for node in fleet.nodes.values()) >= 2


def test_a_bucket_stops_at_half() -> None:
    fleet = fleet_of(0.1, 0.1)
    for spent in range(5):
        assert fleet.retry.free, spent
        fleet.failed(100.0 * spent, "a", "late")
    assert not fleet.retry.free
    fleet.nodes["b"].sent(500.0, 4)
    fleet.succeeded(500.1, "b", times(4, 0.1))
    assert fleet.retry.left == pytest.approx(5.1)
    assert fleet.retry.free


def test_snapshot_is_plain_data() -> None:
    import json

    fleet = Fleet([node_of(0.1), NodeHealth("new", "p")])
    shown = json.loads(json.dumps(fleet.snapshot(5.0)))
    assert shown["nodes"]["a"]["speed"] == pytest.approx(40)
    assert shown["nodes"]["a"]["rates"] == pytest.approx([4000 / 0.03, 8000 / 0.03])
    assert shown["nodes"]["new"]["late_s"] is None


def test_memory_is_bounded() -> None:
    node = node_of(0.1, count=500)
    kept = (value for value in vars(node).values() if hasattr(value, "__len__"))
    assert max(len(value) for value in kept) <= Settings().samples


def test_rows_are_divided_by_speed() -> None:
    fast, slow, new = node_of(0.1, "fast"), node_of(0.3, "slow"), NodeHealth("new", "p")
    assert split(range(8), [fast, slow]) == {"fast": tuple(range(6)), "slow": (6, 7)}
    assert split(range(4), [NodeHealth("x", "p"), new]) == {"x": (0, 1), "new": (2, 3)}
    assert len(split(range(12), [fast, slow, new])["new"]) == 4
    assert split([5], []) == {}


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 40))
def test_every_row_goes_to_one_node(seconds: list[float], count: int) -> None:
    nodes = [node_of(each, str(i), count=2) for i, each in enumerate(seconds)]
    shares = split(range(count), nodes)
    assert sorted(row for rows in shares.values() for row in rows) == list(range(count))
    assert all(node.may_send(99.0) for node in nodes)


def staged(up: float, compute: float, down: float) -> NodeHealth:
    node = NodeHealth("a", "a")
    for windows in (4, 8) * 10:
        node.sent(0.0, windows)
        stages = [windows * up, 0.0, windows * compute, windows * down]
        node.succeeded(1.0, Times(windows, 1, 1, *stages, total_s=sum(stages)))
    return node


def test_requests_are_cut_where_stages_can_overlap() -> None:
    assert chunks(8, NodeHealth("a", "a")) == [8]
    assert chunks(8, staged(0.02, 0.02, 0.02)) == [2, 2, 2, 2]
    assert chunks(9, staged(0.02, 0.02, 0.02), pieces=2) == [5, 4]
    assert chunks(8, staged(0.00001, 0.02, 0.00001)) == [8]  # nothing to overlap
    assert chunks(8, NodeHealth("a", "a"), most=3) == [3, 3, 2]
    assert chunks(0, staged(1, 1, 1)) == []


def test_the_last_node_that_works_is_not_ejected() -> None:
    fleet = fleet_of(0.1, 0.1, 0.1)
    fleet.nodes["a"].quarantine(50.0, "forged")
    fleet.nodes["b"].quarantine(50.0, "forged")
    fleet.nodes["c"].failures = 9
    assert fleet.check(51.0) == []
    fleet.nodes["b"].release(51.0)
    assert fleet.check(51.0) == ["c"]
    for node in (everywhere := fleet_of(0.1, 0.1, 0.1)).nodes.values():
        node.failures = 9
    assert everywhere.check(51.0) == []  # where all fail, all are tried again
