"""The metrics of a node, as Prometheus reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from node_metrics import value
from prometheus_client.parser import text_string_to_metric_families

from cloud_node.metrics import NAMESPACE, Metrics, State
from edge_common.metrics import exposition
from transport.dos_protection import Reason
from transport.peer_events import REFUSALS

DOCUMENT = Path(__file__).parents[2] / "docs" / "node.md"
PROTOCOL = DOCUMENT.with_name("protocol.md").read_text()


@pytest.mark.parametrize("state", get_args(State))
@pytest.mark.parametrize("workers", [0, 1])
def test_ready_means_bound_running_and_able_to_compute(state: State, workers: int) -> None:
    metrics = Metrics()
    metrics.state, metrics.workers_ready = state, workers
    assert metrics.ready == (state in ("ready", "degraded") and workers > 0)
    assert value(metrics, "ready") == metrics.ready


def test_workers_are_shown() -> None:
    metrics = Metrics()
    metrics.workers, metrics.workers_ready = 3, 2
    assert (value(metrics, "workers"), value(metrics, "workers_ready")) == (3, 2)


def test_outcomes_and_reasons_are_exported_as_zero_from_the_start() -> None:
    """Otherwise Prometheus misses the first increase of each series."""
    metrics = Metrics()
    codes = re.findall(r"^\| `(\w+)` \|", PROTOCOL.split("## Refusals")[1], re.MULTILINE)
    for outcome in ("result", "cancelled", "revoked", "lost", "unread", *codes):
        assert value(metrics, "requests_total", outcome=outcome) == 0
    for reason in REFUSALS:
        assert value(metrics, "handshakes_refused_total", reason=reason) == 0
    for reason in (*get_args(Reason), "full"):
        assert value(metrics, "connections_dropped_total", reason=reason) == 0


def test_two_nodes_in_one_process_have_metrics_of_their_own() -> None:
    first, second = Metrics(), Metrics()
    first.windows.inc(7)
    assert (value(first, "windows_total"), value(second, "windows_total")) == (7, 0)


def test_the_document_lists_all_metrics_and_labels() -> None:
    """No series is a creation time, and no label comes from an edge."""
    text = exposition(Metrics("1.2.3").registry).decode()
    found, labels = set(), set()
    for family in text_string_to_metric_families(text):
        if family.name.startswith(NAMESPACE):
            total = "_total" if family.type == "counter" else ""
            found.add(family.name.removeprefix(f"{NAMESPACE}_") + total)
            labels |= {label for sample in family.samples for label in sample.labels}
    listed = set(re.findall(rf"^\| `{NAMESPACE}_(\w+)", DOCUMENT.read_text(), re.MULTILINE))
    assert found == listed
    assert labels == {"outcome", "reason", "le", "version", "python"}
