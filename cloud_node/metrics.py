"""The metrics of a node. Only its event loop writes them."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import Counter, Gauge, Histogram

from edge_common.metrics import labelled_counter, new_registry
from transport.dos_protection import Reason
from transport.peer_events import REFUSALS

State = Literal["starting", "ready", "degraded", "draining"]
"""``degraded``: some worker is down; ``draining``: told to stop, finishing admitted requests."""

NAMESPACE = "edge_runtime_node"
OUTCOMES = (
    *("result", "malformed", "wrong_bundle", "invalid", "duplicate", "deadline", "overloaded"),
    *("worker_died", "engine", "shutdown", "cancelled", "revoked", "lost", "unread"),
)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one node, in a registry of their own.

    Labels are outcomes and reasons from fixed lists. No label comes from an edge.

    Attributes:
        registry: to show them with `edge_common.metrics.exposition`.
        state: of the node.
        workers: how many there should be. workers_ready: how many of them can compute.
    """

    def __init__(self, version: str = "") -> None:
        self.state: State = "starting"
        self.workers = self.workers_ready = 0
        registry = self.registry = new_registry(NAMESPACE, version)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"{NAMESPACE}_{name}", help, registry=registry)

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"{NAMESPACE}_{name}", help, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{NAMESPACE}_{name}", help, buckets=buckets, registry=registry)

        self.requests = labelled_counter(
            f"{NAMESPACE}_requests_total",
            "Requests by outcome: result, the code of a refusal, cancelled, revoked, lost (the "
            "connection had ended) or unread (the edge does not read its replies)",
            "outcome",
            OUTCOMES,
            registry,
        )
        self.windows = counter("windows_total", "Windows computed and answered")
        self.batch_windows = histogram(
            "batch_windows", "Windows of each successful batch", _WINDOWS
        )
        self.wait_seconds = histogram(
            "wait_seconds",
            "From the arrival of an answered request to its result, without the engine's time",
            _SECONDS,
        )
        self.compute_seconds = histogram(
            "compute_seconds", "Engine time of each successful batch", _SECONDS
        )
        self.waiting_requests = gauge("waiting_requests", "Requests in the queue")
        self.waiting_bytes = gauge("waiting_bytes", "Bytes in the queue")
        self.connections = gauge("connections", "Open TCP connections")
        self.clients = gauge("clients", "Edges (keys) with an open connection")
        self.handshakes_refused = labelled_counter(
            f"{NAMESPACE}_handshakes_refused_total",
            "Connections refused, by reason",
            "reason",
            REFUSALS,
            registry,
        )
        self.connections_dropped = labelled_counter(
            f"{NAMESPACE}_connections_dropped_total",
            "Connections closed by the node, by reason",
            "reason",
            (*get_args(Reason), "full"),
            registry,
        )
        gauge("workers", "Workers that should run").set_function(lambda: self.workers)
        gauge("workers_ready", "Workers that can compute").set_function(lambda: self.workers_ready)
        self.worker_restarts = counter("worker_restarts_total", "Workers that died and restarted")
        self.rebinds = counter(
            "rebinds_total", "Times that memory ran short and all connections were dropped"
        )
        gauge("ready", "1 if the node accepts requests, as /readyz says, else 0").set_function(
            lambda: self.ready
        )

    @property
    def ready(self) -> bool:
        """True if edges may be sent here: bound, not stopping, and a worker can compute."""
        return self.state in ("ready", "degraded") and self.workers_ready > 0

    @property
    def summary(self) -> str:
        """The state in words."""
        return f"{self.state}, {self.workers_ready} of {self.workers} workers"
