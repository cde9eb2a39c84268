"""Read the metrics of a node in the same process."""

from __future__ import annotations

from cloud_node.metrics import NAMESPACE, Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """One number, such as ``value(metrics, "requests_total", outcome="result")``."""
    found = metrics.registry.get_sample_value(f"{NAMESPACE}_{name}", labels)
    assert found is not None, (name, labels)
    return found


def nonzero(metrics: Metrics, name: str) -> dict[str, float]:
    """The values of a labelled metric that are not 0, by label."""
    return {
        next(iter(sample.labels.values())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"{NAMESPACE}_{name}" and sample.value
    }
