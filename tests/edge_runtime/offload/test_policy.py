"""Decisions for a frame, on simulated nodes in simulated time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.offload.health import Fleet, NodeHealth, Times
from edge_runtime.offload.policy import (
    Attempt,
    Cancel,
    Fail,
    Failure,
    FrameState,
    Local,
    Send,
    decide,
)


class Node:
    """Uploads, computes and returns one request after another; the three stages overlap.

    Args:
        each: seconds per window of upload, compute and download.
        slow: share of the replies that take ten times as long.
        factor: how much slower the node is from the beginning.
    """

    def __init__(
        self,
        seed: int,
        each: tuple[float, float, float] = (0.004, 0.01, 0.004),
        slow: float = 0.0,
        factor: float = 1.0,
    ) -> None:
        self.random = Random(seed)
        self.each, self.slow, self.factor = each, slow, factor
        self.free = [0.0, 0.0, 0.0]
        self.slowed = 0  # windows in slow replies

    def stages(self, now: float, windows: int) -> tuple[tuple[float, float, float, float], str]:
        """Seconds of upload, queue, compute and download, and the code of a failure or ""."""
        at, took, queue = now, [], 0.0
        for stage, each in enumerate(self.each):
            start = max(at, self.free[stage])
            if stage == 1:
                queue, at = start - at, start
            end = start + self.factor * (0.005 + each * windows) * self.random.uniform(0.9, 1.1)
            self.free[stage] = end
            took.append(end - at)
            at = end
        if self.random.random() < self.slow:
            took[2] += 9 * (at - now)
            self.slowed += windows
        return (took[0], queue, took[1], took[2]), ""


class Script(Node):
    """A node whose failures are scripted: `fails(now)` gives seconds and code, or None."""

    def __init__(self, seed: int, fails: Callable[[float], tuple[float, str] | None]) -> None:
        super().__init__(seed)
        self.fails = fails

    def stages(self, now: float, windows: int) -> tuple[tuple[float, float, float, float], str]:
        if (failure := self.fails(now)) is not None:
            return (0.0, 0.0, 0.0, failure[0]), failure[1]
        return super().stages(now, windows)


class Simulation:
    """Runs frames one after another. It keeps the promises of the dispatcher, and checks them."""

    def __init__(self, behaviours: dict[str, Node], **frame: object) -> None:
        self.behaviours = behaviours
        self.now = 100.0
        nodes = [NodeHealth(name, name, random=Random(name)) for name in behaviours]
        self.fleet = Fleet(nodes)
        self.frame_settings = {"nodes_until": 5.0, "until": 5.0, **frame}
        self.may: Callable[[int, str], bool] = lambda row, node: True
        self.sends: list[tuple[float, Send]] = []
        self.at_home = 0
        self.outcomes: list[str] = []

    def run(self, n: int = 12) -> float:
        """One frame whose rows are dealt out in turn. Returns its seconds."""
        started, names = self.now, [*self.behaviours]
        times = {"nodes_until", "until"}
        given = {k: v + started if k in times else v for k, v in self.frame_settings.items()}
        home = given.get("home", frozenset())
        assigned = {row: names[row % len(names)] for row in range(n) if row not in home}
        frame = FrameState(n=n, assigned=assigned, may=self.may, **given)
        events: list[tuple[float, int, Callable[[], None]]] = []
        order = itertools.count()
        home_free = self.now

        def answer(attempt: Attempt, stages: tuple[float, ...], code: str) -> None:
            if attempt not in frame.under_way:
                return  # was cancelled
            if code:
                return frame.lost(attempt, code, self.fleet, self.now)
            n = len(attempt.rows)
            times = Times(n, n, n, *stages, total_s=self.now - attempt.at)
            counted.extend(frame.answered(attempt, times, self.fleet, self.now))

        def compute(row: int) -> None:
            counted.extend(frame.take([row]))

        counted: list[int] = []
        for _ in range(10_000):
            decision = decide(frame, self.fleet, self.now)
            for action in decision.actions:
                if isinstance(action, Send):
                    assert set(action.rows) - frame.done
                    assert all(self.may(row, action.node) for row in action.rows)
                    assert not set(action.rows) & set(frame.home)
                    assert self.fleet.nodes[action.node].may_send(self.now)
                    if action.kind != "hedge":
                        assert not set(action.rows) & {r for a in frame.under_way for r in a.rows}
                    self.sends.append((self.now, action))
                    attempt = frame.sent(action, self.fleet, self.now)
                    copies = [r for a in frame.under_way for r in a.rows]
                    assert max(copies.count(r) for r in copies) <= 2
                    stages, code = self.behaviours[action.node].stages(self.now, len(action.rows))
                    end = self.now + sum(stages)
                    if end >= frame.nodes_until:
                        end, code = frame.nodes_until, "late"
                    then = partial(answer, attempt, stages, code)
                    heapq.heappush(events, (end, next(order), then))
                elif isinstance(action, Local):
                    assert not set(action.rows) & (frame.local_rows | frame.done)
                    assert frame.local != "never" or set(action.rows) <= set(frame.home)
                    frame.local_rows.update(action.rows)
                    for row in action.rows:
                        home_free = max(home_free, self.now) + (frame.local_s or 0.0)
                        heapq.heappush(events, (home_free, next(order), partial(compute, row)))
                        self.at_home += 1
                elif isinstance(action, Cancel):
                    frame.cancelled(action.attempt, self.fleet, self.now)
                elif isinstance(action, Fail):
                    assert action.reason
                    self.outcomes.append(action.code)
                    return self.ended(frame, started)
            if frame.complete:
                assert sorted(counted) == list(range(n))
                self.outcomes.append("complete")
                return self.ended(frame, started)
            wake = decision.wake_at
            assert wake is not None
            assert wake > self.now
            if events and events[0][0] <= wake:
                self.now, _, event = heapq.heappop(events)
                event()
            else:
                self.now = wake
        raise AssertionError("the frame does not end")

    def ended(self, frame: FrameState, started: float) -> float:
        frame.end(self.fleet, self.now)
        assert not frame.under_way
        assert all(node.under_way == 0 for node in self.fleet.nodes.values())
        assert self.now <= frame.until
        return self.now - started

    def extra(self) -> float:
        """Windows sent beside the first sends, per window of those."""
        rows = [(s.kind == "first", len(s.rows)) for _, s in self.sends]
        first = sum(n for is_first, n in rows if is_first)
        return (sum(n for _, n in rows) - first) / first


def p99(times: list[float]) -> float:
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


def simulation(nodes: int, slow: float = 0.0, seed: int = 0, **frame: object) -> Simulation:
    return Simulation({f"n{i}": Node(10 * seed + i, slow=slow) for i in range(nodes)}, **frame)


def times_of(it: Simulation, frames: int, n: int = 25) -> list[float]:
    """Seconds of each frame, after 30 from which the edge learns."""
    for _ in range(30):
        it.run(n)
    it.sends.clear()
    for node in it.behaviours.values():
        node.slowed = 0
    times = [it.run(n) for _ in range(frames)]
    assert set(it.outcomes) == {"complete"}
    return times


def of_kind(it: Simulation, kind: str) -> list[Send]:
    return [send for _, send in it.sends if send.kind == kind]


def test_a_clean_run_sends_every_row_once() -> None:
    it = simulation(5)
    times_of(it, 200)
    assert it.extra() <= 0.005
    assert not of_kind(it, "retry")


@pytest.mark.parametrize("local_s", [None, 0.02])
def test_stragglers_do_not_hold_frames_up(local_s: float | None) -> None:
    local = "worker" if local_s else "never"
    clean = times_of(simulation(3, local=local, local_s=local_s), 300)
    it = simulation(3, slow=0.05, local=local, local_s=local_s)
    slow = times_of(it, 300)
    # Each of about ten replies is slow in one case of twenty. Without hedges: eight times.
    assert p99(slow) <= (1.75 if local_s else 2.5) * p99(clean)
    # One copy of what is slow, and hardly another.
    assert it.extra() <= 0.07
    hedged = sum(len(send.rows) for send in of_kind(it, "hedge"))
    assert hedged <= 1.2 * sum(node.slowed for node in it.behaviours.values())


def test_where_all_are_slow_sends_do_not_multiply() -> None:
    it = simulation(5)
    times_of(it, 1)
    it.sends.clear()
    for node in it.behaviours.values():
        node.factor = 5.0
    for _ in range(100):
        it.run(25)
    assert it.extra() <= 0.05
    assert set(it.outcomes) == {"complete"}


def test_tokens_stop_hedges() -> None:
    it = simulation(3, slow=0.5)
    for _ in range(300):
        it.run(25)
    spent = sum(send.hedge for send in of_kind(it, "hedge"))
    replies = len(it.sends)
    assert 0 < spent <= 6 + 0.1 * replies


def dead(now: float) -> tuple[float, str]:
    return 0.001, "connection_lost"


def test_one_dead_node_costs_few_sends_and_no_frame() -> None:
    it = Simulation({"a": Node(1), "b": Node(2), "dead": Script(3, dead)})
    for _ in range(60):
        it.run()
    assert set(it.outcomes) == {"complete"}
    assert it.fleet.nodes["dead"].state(it.now) in ("resting", "ejected")
    assert sum(send.node == "dead" for _, send in it.sends) <= 12


def test_a_flapping_node_fails_no_frame() -> None:
    def flaps(now: float) -> tuple[float, str] | None:
        return dead(now) if int(now / 0.5) % 2 else None

    it = Simulation({"a": Node(1), "b": Node(2), "flaps": Script(3, flaps)})
    for _ in range(300):
        it.run()
    assert set(it.outcomes) == {"complete"}
    assert sum(send.node == "flaps" for _, send in it.sends) > 20  # it is used when it works


@pytest.mark.parametrize("permitted", [True, False])
def test_a_failure_is_repeated_elsewhere_at_once_or_on_the_same_node_later(permitted: bool) -> None:
    failures = iter([(0.01, "connection_lost")])
    it = Simulation({"a": Script(1, lambda now: next(failures, None)), "b": Node(2)})
    it.may = lambda row, node: permitted or node == ("a", "b")[row % 2]
    it.run(4)
    assert it.outcomes == ["complete"]
    (again,) = [(at, s) for at, s in it.sends if s.kind == "retry"]
    assert again[1].node == ("b" if permitted else "a")
    assert (again[0] == pytest.approx(100.01)) == permitted


def test_without_retry_tokens_another_node_gets_the_rows_after_the_back_off() -> None:
    it = Simulation({"a": Script(1, dead), "b": Node(2)})
    it.fleet.retry.left = 5.0
    it.run(4)
    assert it.outcomes == ["complete"]
    assert it.sends[2][0] > 100.001
    assert it.sends[2][1].node == "b"


def test_a_wrong_answer_is_never_asked_for_again() -> None:
    it = Simulation({"liar": Script(1, lambda now: (0.01, "wrong_answer")), "b": Node(2)})
    it.may = lambda row, node: node == ("liar", "b")[row % 2]
    it.run(4)
    assert it.outcomes == ["wrong_answer"]
    assert sum(send.node == "liar" for _, send in it.sends) == 1
    assert it.fleet.nodes["liar"].state(it.now) == "quarantined"


@pytest.mark.parametrize("local", ["never", "fallback", "worker"])
def test_where_all_are_dead_the_edge_computes_or_the_frame_fails(local: str) -> None:
    it = Simulation(
        {name: Script(1, dead) for name in "abc"}, local=local, local_s=0.05, nodes_until=2.5
    )
    for _ in range(5):
        it.run()
    assert set(it.outcomes) == ({"connection_lost", "offload", "late"} & set(it.outcomes)
                                if local == "never" else {"complete"})  # fmt: skip


def test_silent_nodes_are_given_up_at_their_deadline_and_count_as_failed() -> None:
    silent = {name: Script(1, lambda now: (1e9, "late")) for name in "abc"}
    it = Simulation(silent, local="fallback", local_s=0.05, nodes_until=2.5)
    assert it.run() == pytest.approx(2.5 + 12 * 0.05)
    assert it.outcomes == ["complete"]
    assert all(node.failures for node in it.fleet.nodes.values())
    it = Simulation(silent)
    assert it.run() == pytest.approx(5.0)
    assert it.outcomes == ["late"]


def test_rows_that_stay_home_are_computed_at_home_only() -> None:
    it = simulation(3, home=frozenset({0, 5}), local_s=0.01)
    it.run()
    assert it.at_home == 2
    assert it.outcomes == ["complete"]


def test_the_edge_takes_part_where_that_is_faster() -> None:
    alone = times_of(simulation(2), 20)
    it = simulation(2, local="worker", local_s=0.02)
    together = times_of(it, 20)
    assert it.at_home
    assert sum(together) < 0.85 * sum(alone)
    slow_edge = simulation(2, local="worker", local_s=2.0)
    times_of(slow_edge, 20)
    assert not slow_edge.at_home


def test_a_row_is_hedged_to_another_party_if_one_may_see_it() -> None:
    nodes = [NodeHealth(name, party) for name, party in (("a", "x"), ("b", "x"), ("c", "y"))]
    fleet = Fleet(nodes)
    for node in nodes:
        for _ in range(20):
            node.sent(0.0, 4)
            node.succeeded(0.1, Times(4, 1, 1, 0.0, 0.0, 0.1, 0.0, total_s=0.1))
    frame = FrameState(4, dict.fromkeys(range(4), "a"), lambda row, node: True, 9.0, 9.0, most=4)
    for action in decide(frame, fleet, 1.0).actions:
        frame.sent(action, fleet, 1.0)
    decision = decide(frame, fleet, 1.0)
    assert not decision.actions
    assert decision.wake_at == pytest.approx(1.0 + nodes[0].late_s(4))
    hedges = [s for s in decide(frame, fleet, 1.3).actions if isinstance(s, Send)]
    assert hedges == [Send("c", (0, 1, 2, 3), "hedge", 1.0)]


def test_a_refused_permit_leads_elsewhere() -> None:
    fleet = Fleet([NodeHealth("a", "a"), NodeHealth("b", "b")])
    frame = FrameState(2, {0: "a", 1: "a"}, lambda row, node: True, 9.0, 9.0)
    (send,) = decide(frame, fleet, 1.0).actions
    frame.refused(send, 1.0)
    (again,) = decide(frame, fleet, 1.0).actions
    assert (again.node, again.kind) == ("b", "retry")
    assert fleet.nodes["a"].failures == 0


def test_a_refused_permit_keeps_no_other_row_from_the_node() -> None:
    fleet = Fleet([NodeHealth("a", "a"), NodeHealth("b", "b")])
    frame = FrameState(2, {0: "a", 1: "a"}, lambda row, node: node == "a" or row == 0, 9.0, 9.0)
    frame.refused(Send("a", (0,), "first"), 1.0)
    sends = {(s.node, s.rows) for s in decide(frame, fleet, 1.0).actions if isinstance(s, Send)}
    assert sends == {("b", (0,)), ("a", (1,))}


def test_an_error_names_every_node_and_why() -> None:
    fleet = Fleet([NodeHealth("a", "a"), NodeHealth("b", "b"), NodeHealth("c", "c")])
    fleet.nodes["a"].quarantine(1.0, "forged")
    frame = FrameState(1, {0: "a"}, lambda row, node: node != "b", 9.0, 9.0)
    frame.failed.append(Failure("c", (0,), "wrong_bundle", 1.0, 1.0))
    (fail,) = decide(frame, fleet, 1.0).actions
    assert isinstance(fail, Fail)
    for part in ("a is quarantined (forged)", "b may not see them", "c failed (wrong_bundle)"):
        assert part in fail.reason
    assert fail.code == "wrong_bundle"


CODES = ["connection_lost", "late", "refused", "wrong_answer", "not_authorised"]


@settings(max_examples=150)
@given(data=st.data())
def test_every_frame_ends_whatever_happens(data: st.DataObject) -> None:
    random = Random(data.draw(st.integers(0, 2**32)))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    def fails(now: float) -> tuple[float, str] | None:
        if random.random() >= share:
            return None
        return random.choice([0.001, 0.1, 3.0, 1e9]), random.choice(CODES)

    count = data.draw(st.integers(1, 5))
    local = data.draw(st.sampled_from(["never", "fallback", "worker"]))
    it = Simulation(
        {f"n{i}": Script(i, fails) for i in range(count)},
        local=local,
        local_s=data.draw(st.sampled_from([0.001, 0.05, 1.0])),
        home=data.draw(st.sets(st.integers(0, 6), max_size=3)),
        most=data.draw(st.integers(0, 4)),
        nodes_until=data.draw(st.sampled_from([2.5, 5.0])),
    )
    open_to = data.draw(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4))))
    it.may = lambda row, node: (row, int(node[1:])) in open_to or share == 0.1
    for _ in range(data.draw(st.integers(1, 15))):
        it.run(7)  # asserts all the promises
        if random.random() < 0.2:
            it.now += random.uniform(0, 40)
        for node in it.fleet.nodes.values():
            assert 1 <= node.limit <= 16
