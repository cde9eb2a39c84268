"""Poison requests: which requests are suspected after a worker's death, and for how long."""

from __future__ import annotations

import numpy as np

from cloud_node.poison import PoisonTracker


def feeds(value: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.full((2, 3), value, np.uint8), "window": np.arange(2)}


def test_the_same_tensors_are_the_same_request() -> None:
    tracker = PoisonTracker()
    assert tracker.deaths("a", feeds(), 0.0) == 0
    assert tracker.died("a", feeds(), 0.0, alone=False) == 1
    assert tracker.deaths("a", feeds(), 1.0) == 1
    for other in (feeds(1), {**feeds(), "window": np.arange(2)[::-1]}):
        assert tracker.deaths("a", other, 1.0) == 0
    assert tracker.deaths("b", feeds(), 1.0) == 0


def test_shape_and_type_distinguish_requests() -> None:
    tracker = PoisonTracker()
    tracker.died("a", {"x": np.zeros(8, np.uint8)}, 0.0, alone=False)
    assert tracker.deaths("a", {"x": np.zeros((2, 4), np.uint8)}, 0.0) == 0
    assert tracker.deaths("a", {"x": np.zeros(4, np.uint16)}, 0.0) == 0
    assert tracker.deaths("a", {"y": np.zeros(8, np.uint8)}, 0.0) == 0


def test_only_a_death_during_a_lone_request_convicts_it() -> None:
    tracker = PoisonTracker()
    assert tracker.died("a", feeds(), 0.0, alone=False) == 1
    assert tracker.died("a", feeds(), 1.0, alone=False) == 1
    assert tracker.died("a", feeds(), 2.0, alone=True) == 2
    assert tracker.deaths("a", feeds(), 3.0) == 2


def test_a_request_that_was_computed_is_no_longer_suspect() -> None:
    tracker = PoisonTracker()
    tracker.died("a", feeds(), 0.0, alone=False)
    tracker.survived("a", feeds())
    tracker.survived("a", feeds(1))
    assert tracker.deaths("a", feeds(), 1.0) == 0


def test_suspicions_expire_and_their_number_is_limited() -> None:
    tracker = PoisonTracker()
    tracker.died("a", feeds(), 0.0, alone=True)
    assert tracker.deaths("a", feeds(), 599.0) == 2
    assert tracker.deaths("a", feeds(), 601.0) == 0
    for value in range(1000):
        tracker.died("a", {"x": np.array([value])}, 700.0, alone=False)
    assert len(tracker._deaths) <= 256
    assert tracker.deaths("a", {"x": np.array([999])}, 700.0) == 1
