"""A registry of Prometheus metrics for one long-running process."""

from __future__ import annotations

import platform
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "exposition", "labelled_counter", "new_registry"]

disable_created_metrics()  # one more series for each counter and histogram, of no use here


def new_registry(namespace: str, version: str) -> CollectorRegistry:
    """A registry with ``NAMESPACE_build_info`` and the memory, CPU time and open files of this
    process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    info = Info("build", "Version that runs", namespace=namespace, registry=registry)
    info.info({"version": version, "python": platform.python_version()})
    return registry


def labelled_counter(
    name: str, help: str, label: str, values: Iterable[str], registry: CollectorRegistry
) -> Counter:
    """A counter that shows 0 for each known value of its label from the start.

    Without this, Prometheus sees no increase at the first event of a kind.
    """
    counter = Counter(name, help, [label], registry=registry)
    for value in values:
        counter.labels(value)
    return counter


def exposition(registry: CollectorRegistry) -> bytes:
    """All metrics as of now, in Prometheus's text format."""
    return generate_latest(registry)
