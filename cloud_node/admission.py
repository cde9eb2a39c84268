"""Checks that a request fits the stage exactly, before an engine sees it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_common.errors import EngineError
from engines.bundle import Stage
from engines.engine import check_feeds
from engines.geometry import Geometry


class Refusal(Exception):
    """The reason why a request gets no result; docs/protocol.md lists codes and `retry_ms`."""

    def __init__(self, code: str, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_ms = retry_ms


def check_stage(requested: str, stage: Stage, label: str) -> None:
    """Refuse a request for the stage of another bundle."""
    if requested != stage.sha256:
        raise Refusal(
            "wrong_bundle",
            f"this node serves {label} (stack {stage.sha256[:12]}), the request is for stack "
            f"{requested[:12]}: use the bundle that this node's was made from, or another node",
        )


def check_windows(feeds: Mapping[str, np.ndarray], stage: Stage, geometry: Geometry) -> int:
    """Refuse tensors that don't fit the stage: names, dtypes, shapes, index and extent ranges.

    The graphs use window index and extent as table indices, and an engine may read out of bounds.

    Returns:
        the number of windows.
    """
    try:
        check_feeds(stage.inputs, feeds)
    except EngineError as error:
        raise Refusal("invalid", str(error)) from None
    window = feeds["window"]
    if len(window) > geometry.windows:
        raise Refusal(
            "invalid", f"{len(window)} windows, this bundle's images have {geometry.windows}"
        )
    _check_range("window", window, 0, geometry.windows - 1)
    if "extent" in feeds:
        _check_range("extent", feeds["extent"], 1, geometry.window_pixels)
    return len(window)


def _check_range(name: str, values: np.ndarray, least: int, most: int) -> None:
    if values.min() < least or values.max() > most:
        raise Refusal("invalid", f"input {name} has values outside {least} to {most}")
