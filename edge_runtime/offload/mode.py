"""Chooses for each frame whether nodes compute the window layers or this machine does. Pure."""

from __future__ import annotations

import msgspec

from edge_runtime.config import Mode
from edge_runtime.offload.health import smoothed

_SMOOTHING = 0.3
_HYSTERESIS = 0.2
"""The other place must be faster by this share before the choice changes."""
_MEASURE_AGAIN = 100
"""After this many frames on the edge, the nodes get one, because their time may have changed."""


class Choice(msgspec.Struct, frozen=True):
    """Where one frame is computed, and why.

    Attributes:
        place: ``nodes`` or ``edge``.
        nodes_ms, edge_ms: predicted time of the window layers; None while it is not known.
        reason: for people.
    """

    place: str
    nodes_ms: float | None
    edge_ms: float | None
    reason: str


class ModeChooser:
    """Compares the measured times of both places.

    Args:
        mode: ``offload`` and ``local`` leave no choice. With ``auto``, nodes are used until both
            times are known, and then the faster place. A small difference changes nothing.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._nodes_ms: float | None = None
        self._edge_ms: float | None = None
        self._place = "edge" if mode == "local" else "nodes"
        self._since = 0  # frames since the nodes were last measured

    def choose(
        self, *, edge_ms: float | None = None, edge_slowdown: float = 1.0, usable_nodes: int = 1
    ) -> Choice:
        """Choose for the next frame.

        Args:
            edge_ms: an estimate for this machine, used until a whole frame was measured there.
            edge_slowdown: weighs this machine's time, above 1 for one that is hot or on battery.
            usable_nodes: how many nodes could be asked now.
        """
        edge = edge_ms if self._edge_ms is None else self._edge_ms
        edge = None if edge is None else edge * edge_slowdown
        nodes = self._nodes_ms
        if self.mode != "auto":
            return Choice(self._place, nodes, edge, f"mode is {self.mode}")
        if not usable_nodes:
            return Choice("edge", nodes, edge, "no node can be used now")
        if edge is None or nodes is None:
            self._place = "nodes"
            return Choice("nodes", nodes, edge, "nothing to compare with yet")
        if self._since >= _MEASURE_AGAIN:
            self._since = 0  # one frame, even if it fails or says nothing about the time
            return Choice("nodes", nodes, edge, "the nodes' time is measured again")
        ours, others = (edge, nodes) if self._place == "edge" else (nodes, edge)
        if others < ours * (1 - _HYSTERESIS):
            self._place = "nodes" if self._place == "edge" else "edge"
        faster = "nodes" if nodes < edge else "the edge"
        reason = f"nodes {nodes:.0f} ms, edge {edge:.0f} ms: {faster} would be faster"
        if (faster == "nodes") != (self._place == "nodes"):
            reason += ", but not by enough to change"
        return Choice(self._place, nodes, edge, reason)

    def measured(self, place: str, ms: float) -> None:
        """A frame's window layers took `ms` milliseconds there."""
        if place == "nodes":
            self._nodes_ms = smoothed(self._nodes_ms, ms, _SMOOTHING)
            self._since = 0
        else:
            self._edge_ms = smoothed(self._edge_ms, ms, _SMOOTHING)
            self._since += 1
