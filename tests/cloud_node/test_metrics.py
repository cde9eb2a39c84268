"""The numbers of a node and how Prometheus gets them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_node.exposition import FAMILIES, PREFIX, exposition, registry
from cloud_node.metrics import Histogram, Metrics, State
from transport.meter import Reason
from transport.sockets import REFUSALS

DOCUMENT = Path(__file__).parents[2] / "docs" / "node.md"
PROTOCOL = DOCUMENT.with_name("protocol.md").read_text()


def samples(metrics: Metrics) -> dict[str, float]:
    """By name and label: ``name{label}``."""
    text = exposition(registry(metrics, "1.2.3")).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = ",".join(f"{k}={v}" for k, v in sample.labels.items())
            found[f"{sample.name}{{{label}}}" if label else sample.name] = sample.value
    return found


def test_a_histogram_counts_by_upper_edges_inclusive() -> None:
    histogram = Histogram((1, 10))
    for value in (0, 1, 1.5, 10, 11, 1000):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.count == 6
    assert histogram.sum == 1023.5


@pytest.mark.parametrize("state", get_args(State))
@pytest.mark.parametrize("workers", [0, 1])
def test_ready_is_bound_not_stopping_and_able_to_compute(state: State, workers: int) -> None:
    metrics = Metrics(state=state, workers_ready=workers)
    assert metrics.ready == (state in ("ready", "degraded") and workers > 0)
    assert samples(metrics)[f"{PREFIX}ready"] == metrics.ready


def test_every_number_gets_out() -> None:
    metrics = Metrics(windows=7, waiting_requests=2, waiting_bytes=300, connections=4, clients=3)
    metrics.requests.update(result=5, overloaded=1)
    metrics.handshakes_refused["wrong_key"] = 9
    metrics.connections_dropped["endless"] = 1
    metrics.worker_restarts, metrics.rebinds, metrics.lanes, metrics.workers_ready = 1, 2, 3, 2
    metrics.batch_windows.observe(4)
    metrics.batch_windows.observe(1000)
    metrics.wait_seconds.observe(0.003)
    metrics.compute_seconds.observe(0.2)
    found = samples(metrics)
    expected = {
        "requests_total{outcome=result}": 5,
        "requests_total{outcome=overloaded}": 1,
        "windows_total": 7,
        "batch_windows_bucket{le=2}": 0,
        "batch_windows_bucket{le=4}": 1,
        "batch_windows_bucket{le=128}": 1,
        "batch_windows_bucket{le=+Inf}": 2,
        "batch_windows_count": 2,
        "batch_windows_sum": 1004,
        "wait_seconds_bucket{le=0.0025}": 0,
        "wait_seconds_bucket{le=0.005}": 1,
        "wait_seconds_sum": 0.003,
        "compute_seconds_bucket{le=0.25}": 1,
        "waiting_requests": 2,
        "waiting_bytes": 300,
        "connections": 4,
        "clients": 3,
        "handshakes_refused_total{reason=wrong_key}": 9,
        "connections_dropped_total{reason=endless}": 1,
        "workers": 3,
        "workers_ready": 2,
        "worker_restarts_total": 1,
        "rebinds_total": 2,
        "ready": 0,
    }
    for name, value in expected.items():
        assert found[PREFIX + name] == value, name
    (build,) = [name for name in found if name.startswith(f"{PREFIX}build_info{{")]
    assert "version=1.2.3" in build
    assert found["process_resident_memory_bytes"] > 0


def test_every_field_is_shown() -> None:
    """A number that is counted and never told would be a mistake."""
    shown = set()

    class Spy(Metrics):
        def __getattribute__(self, name: str) -> object:
            shown.add(name)
            return super().__getattribute__(name)

    spy = Spy()
    exposition(registry(spy, "x"))
    fields = set(Metrics.__dataclass_fields__)
    assert fields <= shown


def test_labels_come_from_the_program_alone() -> None:
    assert {family.label for family in FAMILIES} == {"", "outcome", "reason"}


def test_outcomes_and_reasons_are_told_before_they_happen() -> None:
    """Else the first of a kind is no rise of its counter."""
    found = samples(Metrics())
    codes = re.findall(r"^\| `(\w+)` \|", PROTOCOL.split("## Refusals")[1], re.MULTILINE)
    for outcome in ("result", "cancelled", "revoked", "lost", "unread", *codes):
        assert found[f"{PREFIX}requests_total{{outcome={outcome}}}"] == 0
    for reason in REFUSALS:
        assert found[f"{PREFIX}handshakes_refused_total{{reason={reason}}}"] == 0
    for reason in (*get_args(Reason), "full"):
        assert found[f"{PREFIX}connections_dropped_total{{reason={reason}}}"] == 0


def test_two_nodes_in_one_process_have_numbers_of_their_own() -> None:
    first, second = Metrics(windows=1), Metrics(windows=2)
    assert samples(first)[f"{PREFIX}windows_total"] == 1
    assert samples(second)[f"{PREFIX}windows_total"] == 2


def test_the_document_lists_the_metrics_there_are() -> None:
    listed = set(re.findall(rf"^\| `{PREFIX}(\w+)", DOCUMENT.read_text(), re.MULTILINE))
    assert listed == {family.name for family in FAMILIES} | {"build_info"}
