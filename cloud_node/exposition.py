"""A node's numbers as Prometheus reads them.

Names and meanings are in `FAMILIES`, from which `docs/node.md` is checked. Labels are reasons and
outcomes, which this program has a fixed list of; nothing that an edge sends or is called becomes
one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cloud_node.metrics import Histogram, Metrics

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "edge_runtime_node_"


@dataclass(frozen=True)
class Family:
    """One metric. `value`: its numbers by label if there is one `label`, a histogram, or one
    number. What ends in ``_total`` is a counter, which never falls."""

    name: str
    help: str
    value: Callable[[Metrics], float | Histogram | Mapping[str, float]]
    label: str = ""


FAMILIES = (
    Family(
        "requests_total",
        "Requests by how they ended: result, a code of a refusal, cancelled, revoked, lost (its "
        "connection had ended) or unread (the edge does not read its replies)",
        lambda m: m.requests,
        "outcome",
    ),
    Family("windows_total", "Windows computed and answered", lambda m: m.windows),
    Family("batch_windows", "Windows of each batch that succeeded", lambda m: m.batch_windows),
    Family(
        "wait_seconds",
        "Of each answered request, from its arrival to its result, less the time inside the engine",
        lambda m: m.wait_seconds,
    ),
    Family(
        "compute_seconds",
        "Of each batch that succeeded, inside the engine",
        lambda m: m.compute_seconds,
    ),
    Family(
        "waiting_requests", "Admitted and not yet taken by a worker", lambda m: m.waiting_requests
    ),
    Family("waiting_bytes", "What these hold", lambda m: m.waiting_bytes),
    Family("connections", "Open TCP connections", lambda m: m.connections),
    Family("clients", "Edges (keys) that have a connection", lambda m: m.clients),
    Family(
        "handshakes_refused_total",
        "Connections not let in, by reason",
        lambda m: m.handshakes_refused,
        "reason",
    ),
    Family(
        "connections_dropped_total",
        "Connections ended by the node, by reason",
        lambda m: m.connections_dropped,
        "reason",
    ),
    Family("workers", "Workers there should be", lambda m: m.lanes),
    Family("workers_ready", "Workers that can compute", lambda m: m.workers_ready),
    Family(
        "worker_restarts_total", "Workers that died and were replaced", lambda m: m.worker_restarts
    ),
    Family(
        "rebinds_total",
        "Times that all connections were dropped because the process held too much",
        lambda m: m.rebinds,
    ),
    Family("ready", "1 if edges may be sent here, as /readyz tells, else 0", lambda m: m.ready),
)


def registry(metrics: Metrics, version: str) -> CollectorRegistry:
    """What there is to collect: `metrics`, and memory, CPU time and descriptors of this process."""
    found = CollectorRegistry(auto_describe=False)
    found.register(_Node(metrics, version))
    ProcessCollector(registry=found)
    return found


def exposition(registry: CollectorRegistry) -> bytes:
    """All numbers as of now, in Prometheus's text format."""
    return generate_latest(registry)


class _Node(Collector):
    def __init__(self, metrics: Metrics, version: str) -> None:
        self._metrics = metrics
        self._build = {"version": version, "python": platform.python_version()}

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(f"{PREFIX}build", "What runs here", self._build)
        for family in FAMILIES:
            yield _family(family, self._metrics)


def _family(family: Family, metrics: Metrics) -> Metric:
    name, value = PREFIX + family.name, family.value(metrics)
    found: Metric
    if isinstance(value, Histogram):
        counts, buckets = 0, []
        for edge, count in zip([*map(str, value.edges), "+Inf"], value.counts, strict=True):
            counts += count
            buckets.append((edge, counts))
        return HistogramMetricFamily(name, family.help, buckets, value.sum)
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    if not isinstance(value, Mapping):
        return kind(name, family.help, value)
    found = kind(name, family.help, labels=[family.label])
    for label, number in sorted(value.items()):
        found.add_metric([label], number)
    return found
