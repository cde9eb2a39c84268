"""What a node counts and measures, as plain numbers.

The server writes them, in its event loop, and nobody else; how they are shown is left to whoever
reads them. No number tells of one client, and none of what is in a window.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from transport.dos_protection import Reason
from transport.peer_events import REFUSALS

State = Literal["starting", "ready", "degraded", "draining"]
"""``degraded``: some worker is down; ``draining``: told to stop, finishing what was admitted."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OUTCOMES = (
    *("result", "malformed", "wrong_bundle", "invalid", "duplicate", "deadline", "overloaded"),
    *("worker_died", "engine", "shutdown", "cancelled", "revoked", "lost", "unread"),
)
"""How requests end, see `Metrics.requests`."""
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """How often values came, by size.

    Attributes:
        edges: upper edges of the classes, each inclusive; one more class has no edge.
        counts: of each class, not cumulated.
        sum: of all values.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.edges, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


def _counter(*known: str) -> collections.Counter[str]:
    """Counts by label, the known ones 0 from the start: for Prometheus, a counter that begins
    at 1 has not risen."""
    return collections.Counter(dict.fromkeys(known, 0))


@dataclass
class Metrics:
    """Counters (since start), histograms, and gauges (as of now, or a tenth of a second ago).

    Attributes:
        requests: by outcome: ``result``, a code of `docs/protocol.md` for a refusal,
            ``cancelled``, ``revoked``, ``lost`` (its connection had ended before the result was
            there, or was closed by a rebind) or ``unread`` (the edge does not read its replies).
        windows: computed and answered.
        batch_windows: of each batch that succeeded.
        wait_seconds: of each answered request, from arrival to result, less compute_seconds.
        compute_seconds: of each batch that succeeded, inside the engine.
        handshakes_refused: by reason, see `transport.peer_events.REFUSALS`.
        connections_dropped: by reason, see `transport.dos_protection.Reason`; ``full`` for want of
            descriptors.
        worker_restarts: workers that died and were replaced.
        rebinds: times that the socket was closed and bound anew because the process held too much.
        waiting_requests, waiting_bytes: admitted and not yet taken by a worker.
        connections: open TCP connections. clients: users of these.
        workers_ready: of `lanes`, how many can compute.
    """

    requests: collections.Counter[str] = field(default_factory=lambda: _counter(*OUTCOMES))
    windows: int = 0
    batch_windows: Histogram = field(default_factory=lambda: Histogram(WINDOWS))
    wait_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    compute_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    handshakes_refused: collections.Counter[str] = field(
        default_factory=lambda: _counter(*REFUSALS)
    )
    connections_dropped: collections.Counter[str] = field(
        default_factory=lambda: _counter(*get_args(Reason), "full")
    )
    worker_restarts: int = 0
    rebinds: int = 0
    waiting_requests: int = 0
    waiting_bytes: int = 0
    connections: int = 0
    clients: int = 0
    workers_ready: int = 0
    lanes: int = 0
    state: State = "starting"

    @property
    def ready(self) -> bool:
        """Whether edges may be sent here: bound, not stopping, and a worker can compute."""
        return self.state in ("ready", "degraded") and self.workers_ready > 0
