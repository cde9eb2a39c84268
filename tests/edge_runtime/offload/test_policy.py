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
                    assert action.rows and not frame.done.issuperset(action.rows)
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
