"""How well each node does: how fast it is, how much it may be sent, and when it must rest.

Pure: the time is passed in (`now`, seconds, monotonic). Only the edge's own clock decides. The
times that a node reports about itself are used for nothing but the number of pieces (`chunks`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, Literal

import msgspec

State = Literal["healthy", "resting", "ejected", "probing", "quarantined"]

LINK_CODES = frozenset({"connection_lost", "unreachable", "link_refused"})
_OUTLYING = 4.5
"""Round trips this many median deviations above the median are stragglers (3 sigma if normal)."""
_PERIOD_REPLIES = 8
"""A node that is never idle gives one measurement of its speed every so many replies."""
_PIECE_S = 0.002
"""What another piece costs the edge: a permit, a message, a decision."""


class Settings(msgspec.Struct, frozen=True):
    """What the scheduler goes by. Times in seconds.

    Attributes:
        samples: requests that the estimates of a node rest on; `enough`: the least number before
            a request can be called late or a node an outlier.
        percentile: of the round trips, after which a request is late; but never before `margin`
            times the typical one.
        tokens: of the hedge bucket and of the retry bucket when full; at half they stop.
            `refill` comes back with every success.
        failures: in a row until a node is ejected, for `ejection_s` times the number of ejections.
        outlier: a node this many times slower than the median of its peers is ejected too.
        tolerance: latency may grow by this factor over the least before the limit shrinks.
        quarantine_s: doubles with every quarantine of the node.
    """

    samples: int = 40
    enough: int = 10
    percentile: float = 0.95
    margin: float = 1.2
    tokens: float = 10.0
    refill: float = 0.1
    backoff_s: float = 0.1
    longest_backoff_s: float = 10.0
    failures: int = 5
    ejection_s: float = 30.0
    longest_ejection_s: float = 300.0
    outlier: float = 5.0
    first_limit: float = 2.0
    most_limit: float = 16.0
    tolerance: float = 1.5
    quarantine_s: float = 60.0
    longest_quarantine_s: float = 3600.0


class Times(msgspec.Struct, frozen=True):
    """One successful request. `total_s` is the whole round trip by the edge's clock.

    `queue_s` and `compute_s` are what the node says.
    """

    windows: int
    bytes_up: int
    bytes_down: int
    upload_s: float
    queue_s: float
    compute_s: float
    download_s: float
    total_s: float


class Tokens:
    """A bucket that limits extra sends (gRPC A6): full at first, usable above half."""

    def __init__(self, settings: Settings) -> None:
        self.left = self._most = settings.tokens
        self._refill = settings.refill

    @property
    def free(self) -> bool:
        return self.left > self._most / 2

    def spend(self, tokens: float = 1.0) -> None:
        self.left = max(0.0, self.left - tokens)

    def refill(self) -> None:
        self.left = min(self._most, self.left + self._refill)


class NodeHealth:
    """One node, as the edge has come to know it. Memory is bounded by `Settings.samples`.

    Every request ends in exactly one of `succeeded`, `failed` and `cancelled`.

    Attributes:
        limit: requests that may be under way at once (a float; rounded down where it is applied).
        under_way: requests that have been sent and have not ended; `load`: their windows.
        answered_at: when it last succeeded, and `in_time`: that this reply was not much late.
        failures: in a row. Several requests that fail together count once.
        reason: why it last failed, was ejected or quarantined; empty if it never was.
    """

    def __init__(
        self,
        name: str,
        party: str,
        settings: Settings = Settings(),  # noqa: B008  (frozen)
        random: Random | None = None,
    ) -> None:
        self.name = name
        self.party = party
        self.settings = settings
        self.limit = settings.first_limit
        self.under_way = self.load = 0
        self.answered_at = -math.inf
        self.in_time = True
        self.failures = 0
        self.reason = ""
        self._random = random or Random()
        self._rest_until = self._ejected_until = self._quarantined_until = -math.inf
        self._link_until = -math.inf
        self._ejections = self._quarantines = 0
        self._unproven = False  # something went wrong, and no request has succeeded since
        self._period = [0.0, 0.0, 0.0]  # start, windows and replies since the node was idle
        self._forget()

    def _forget(self) -> None:
        self._trips: deque[tuple[int, int, float]] = deque(maxlen=self.settings.samples)
        self._times: deque[Times] = deque(maxlen=self.settings.samples)
        self._speeds: deque[float] = deque(maxlen=self.settings.samples // 2)
        # Of the trips: fixed part, per window, and per window that was under way before.
        self._model: tuple[float, float, float] | None = None
        self._least: tuple[float, float, float] | None = None  # the same when least busy, of all
        self._late: float | None = None  # late_s as a multiple of expected_s

    # What happens to it

    def sent(self, now: float, windows: int) -> int:
        """A request was sent. Returns how many windows were under way before it."""
        if not self.under_way:
            self._period = [now, 0.0, 0.0]
        ahead = self.load
        self.under_way += 1
        self.load += windows
        return ahead

    def succeeded(self, now: float, times: Times, ahead: int = 0) -> None:
        """A request came back. `ahead` is what :meth:`sent` returned."""
        late = self.late_s(times.windows, ahead)
        self.in_time = late is None or times.total_s <= 1.5 * late
        self._times.append(times)
        self._measured(times.windows, ahead, times.total_s)
        self._adapt()
        self._ended(now, times.windows, True)
        self.answered_at = now
        self.failures = 0
        self._unproven = False
        self._rest_until = -math.inf

    def failed(self, now: float, code: str, retry_after_s: float = 0.0, windows: int = 0) -> float:
        """A request of so many windows failed.

        Args:
            code: of the :class:`.connection.NodeError`. A wrong answer quarantines the node.
            retry_after_s: what the node asked for, if it did.

        Returns:
            The instant before which the work should not be repeated without a retry token: the
            node's full-jitter back-off, or later if the node asked for it.
        """
        rests = min(retry_after_s, self.settings.longest_ejection_s)
        if now >= max(self._rest_until, self._ejected_until, self._quarantined_until):
            # otherwise part of the same incident
            self.failures += 1
            self.limit = max(1.0, self.limit * 0.7)
            most = self.settings.backoff_s * 2.0 ** min(self.failures - 1, 30)
            rests = max(rests, self._random.uniform(0, min(most, self.settings.longest_backoff_s)))
        self._rest_until = max(self._rest_until, now + rests)
        self.reason = code
        self._unproven = True
        self._ended(now, windows, False)
        if code == "wrong_answer":
            self.quarantine(now, code)
        return self._rest_until

    def cancelled(
        self, now: float, windows: int = 0, waited_s: float = 0.0, ahead: int = 0
    ) -> None:
        """A request was given up, for instance because a hedge was faster.

        This is neither a success nor a failure. But a request that was waited for longer than is
        usual would have taken at least that long, and counts so in the estimates: otherwise a node
        that has become slow would never be noticed, since hedges always win.
        """
        expected = self.expected_s(windows, ahead)
        slow = bool(windows) and expected is not None and waited_s > expected
        if slow:
            self._measured(windows, ahead, waited_s)
        self._ended(now, windows, slow)

    def quarantine(self, now: float, reason: str) -> None:
        """Send nothing to it, for twice as long each time. Afterwards one request probes it."""
        if self.state(now) != "quarantined":
            s = self.settings
            longest = s.quarantine_s * 2.0 ** min(self._quarantines, 30)
            self._quarantined_until = now + min(longest, s.longest_quarantine_s)
            self._quarantines += 1
        self.reason = reason
        self._unproven = True

    def eject(self, now: float, reason: str) -> None:
        """Send nothing to it for a while. :meth:`Fleet.check` decides who is ejected."""
        s = self.settings
        if now - self._ejected_until > s.longest_ejection_s:
            self._ejections = 0
        self._ejections += 1
        self._ejected_until = now + min(s.ejection_s * self._ejections, s.longest_ejection_s)
        self.reason = reason
        self._unproven = True
        self._forget()  # what it was like before says nothing about it afterwards

    def release(self, now: float) -> None:
        """End quarantine, ejection and back-off by hand. One request probes the node."""
        self._rest_until = self._ejected_until = self._quarantined_until = now
        self._link_until = now
        self._quarantines = self._ejections = 0

    def link_down(self, now: float, grace_s: float) -> None:
        """The connection is lost. It may be back soon: until then others are asked instead."""
        if self.state(now) in ("healthy", "probing"):
            self.reason = "connection_lost"
        self._link_until = now + grace_s

    def link_up(self, now: float) -> None:
        """The connection is back: a rest for which the link was the reason is over."""
        self._link_until = -math.inf
        if self.reason in LINK_CODES:
            self._rest_until = self._ejected_until = now

    # What is known about it

    def ready_at(self, now: float) -> float:
        """When it may be sent to again; `now` if it may be already, apart from its limit."""
        rests = max(self._rest_until, self._link_until)
        return max(now, rests, self._ejected_until, self._quarantined_until)

    def state(self, now: float) -> State:
        if now < self._quarantined_until:
            return "quarantined"
        if now < self._ejected_until:
            return "ejected"
        if now < self._rest_until or now < self._link_until:
            return "resting"
        return "probing" if self._unproven else "healthy"

    def room(self, now: float) -> int:
        """How many more requests it may be sent now. While it is probing, one at a time."""
        most = {"healthy": int(self.limit), "probing": 1}.get(self.state(now), 0)
        return max(0, most - self.under_way)

    def may_send(self, now: float) -> bool:
        return self.room(now) > 0

    def expected_s(self, windows: int, ahead: int = 0) -> float | None:
        """Typical round trip of a request; None while unknown.

        A fixed part plus a part per window. The latter contains the bytes over the measured rate,
        since all windows have the same number of bytes.

        Args:
            ahead: windows that are under way to this node before it.
        """
        return None if self._model is None else _on(self._model, windows, ahead)

    def late_s(self, windows: int, ahead: int = 0) -> float | None:
        """After how long such a request is late; None while too little is known.

        The percentile of the round trips, each relative to what is typical for its windows.
        It stays below where stragglers begin: otherwise one straggler in twenty would move the
        percentile to its own time.
        """
        if self._model is None or len(self._trips) < self.settings.enough:
            return None
        if self._late is None:
            fixed, each, per_ahead = self._model
            ratios = sorted(
                total / max(1e-6, fixed + each * n + per_ahead * before)
                for n, before, total in self._trips
            )
            middle = ratios[len(ratios) // 2]
            late = ratios[math.ceil(self.settings.percentile * len(ratios)) - 1]
            most = middle + _OUTLYING * _median(abs(ratio - middle) for ratio in ratios)
            self._late = max(min(late, most), self.settings.margin * middle)
        return self._late * _on(self._model, windows, ahead)

    @property
    def speed(self) -> float | None:
        """Windows per second while it had work, median; None while unknown."""
        return _median(self._speeds) if self._speeds else None

    def stages(self) -> tuple[float, float, float, float] | None:
        """Seconds per window of upload, compute and download, and the fixed part of compute.

        Of upload and download the lower fifth, for requests that share the link wait for each
        other. None while unknown.
        """
        if not self._times:
            return None
        up, down = (
            sorted(getattr(t, stage) / t.windows for t in self._times)[len(self._times) // 5]
            for stage in ("upload_s", "download_s")
        )
        work = [
            (t.windows, max(0.0, min(t.compute_s, t.total_s - t.upload_s))) for t in self._times
        ]
        fixed, each = _fit(work)
        return up, each, down, fixed

    def rates(self) -> tuple[float, float] | None:
        """Bytes per second up and down, of the quicker requests; None while unknown."""
        stages = self.stages()
        if stages is None:
            return None
        up, down = (
            _median([getattr(t, name) / t.windows for t in self._times])
            for name in ("bytes_up", "bytes_down")
        )
        return up / max(stages[0], 1e-9), down / max(stages[2], 1e-9)

    def typical_windows(self) -> int:
        """Windows of its usual request; 0 until there are enough samples to compare it by."""
        enough = len(self._trips) >= self.settings.enough
        return int(_median([n for n, _, _ in self._trips])) if enough else 0

    def _measured(self, windows: int, ahead: int, total_s: float) -> None:
        self._trips.append((windows, ahead, max(total_s, 1e-6)))
        self._late = None
        # First from the requests with the least ahead of them, then what the others took longer.
        least = sorted(before for _, before, _ in self._trips)[len(self._trips) // 4]
        fixed, each = _fit(
            [(n, total) for n, before, total in self._trips if before <= least], 0.25
        )
        longer = [
            (total - fixed - each * n) / (before - least)
            for n, before, total in self._trips
            if before > least
        ]
        self._model = fixed, each, max(0.0, _median(longer)) if longer else 0.0

    def _adapt(self) -> None:
        """Let the limit follow the latency's gradient (Netflix's gradient2), with two changes.

        It does not move while less than half of it is used. The latency it compares with is the
        least one, taken anew only at the lowest limit, where it is the node's own and not that of
        our queue. An average would follow the queue, and the limit would creep up for ever.
        """
        windows = int(_median(n for n, _, _ in self._trips))
        line = (*_fit([(n, total) for n, _, total in self._trips]), 0.0)
        typical = _on(line, windows)
        if self._least is None or self.limit <= self.settings.first_limit:
            self._least = line
        least = _on(self._least, windows)
        if typical < least:
            self._least, least = line, typical
        if self.under_way >= self.limit / 2:
            gradient = min(1.0, max(0.5, self.settings.tolerance * least / typical))
            wanted = self.limit * gradient + 1
            self.limit = min(self.settings.most_limit, 0.8 * self.limit + 0.2 * wanted)

    def _ended(self, now: float, windows: int, measured: bool) -> None:
        """A request ended. `measured` is whether its time says something about the speed."""
        self.under_way = max(0, self.under_way - 1)
        self.load = max(0, self.load - windows) if self.under_way else 0
        start, done, replies = self._period
        if not measured:
            self._period = [now, 0.0, 0.0]
            return
        done, replies = done + windows, replies + 1
        if self.under_way == 0 or replies >= _PERIOD_REPLIES:
            if now > start:
                self._speeds.append(done / (now - start))
            start, done, replies = now, 0.0, 0.0
        self._period = [start, done, replies]


class Fleet:
    """All nodes, and the token buckets they share.

    Args:
        nodes: in a fixed order, by which ties are broken.

    Attributes:
        nodes: by name.
        hedge, retry: a hedge spends a token; so does a failure.
    """

    def __init__(
        self,
        nodes: Iterable[NodeHealth],
        settings: Settings = Settings(),  # noqa: B008
    ) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.settings = settings
        self.hedge = Tokens(settings)
        self.retry = Tokens(settings)

    def succeeded(self, now: float, name: str, times: Times, ahead: int = 0) -> None:
        self.nodes[name].succeeded(now, times, ahead)
        self.hedge.refill()
        self.retry.refill()

    def failed(
        self, now: float, name: str, code: str, retry_after_s: float = 0.0, windows: int = 0
    ) -> float:
        """See :meth:`NodeHealth.failed`. Also spends a token, and ejects if it is time to."""
        node = self.nodes[name]
        before = node.failures
        until = node.failed(now, code, retry_after_s, windows)
        if node.failures > before:
            self.retry.spend()
        self.check(now)
        return until

    def check(self, now: float) -> list[str]:
        """Eject the nodes that fail again and again or are far slower than their peers.

        With fewer than three nodes none is ejected. Otherwise at most a third of them, at least
        one, and never one without which no working node would be left. Nodes that fail and are not
        ejected rest with growing back-off.

        Returns:
            The names of the ejected.
        """
        s = self.settings
        here = [n for n in self.nodes.values() if n.state(now) not in ("ejected", "quarantined")]
        ejected = sum(n.state(now) == "ejected" for n in self.nodes.values())
        most = max(1, len(self.nodes) // 3) if len(self.nodes) >= 3 else 0
        found = [(n, n.reason) for n in here if n.failures >= s.failures]
        found.sort(key=lambda pair: -pair[0].failures)
        for node in here:
            windows = node.typical_windows()
            peers = [p.expected_s(windows) or 0.0 for p in here if p.typical_windows()]
            own = node.expected_s(windows)
            if windows and own and len(peers) >= 3 and node.failures < s.failures:
                peers.remove(own)
                if own > s.outlier * _median(peers):
                    found.append((node, f"{own / _median(peers):.0f} times slower than its peers"))
        out: list[str] = []
        for node, reason in found[: max(0, most - ejected)]:
            if any(n.failures < s.failures for n in here if n is not node and n.name not in out):
                node.eject(now, reason)
                out.append(node.name)
        return out

    def snapshot(self, now: float) -> dict[str, Any]:
        """Plain data for status and metrics. Times in seconds, rates in bytes per second."""
        nodes = {}
        for name, node in self.nodes.items():
            windows = node.typical_windows()
            nodes[name] = {
                "party": node.party,
                "state": node.state(now),
                "reason": node.reason,
                "ready_in_s": node.ready_at(now) - now,
                "limit": node.limit,
                "under_way": node.under_way,
                "failures": node.failures,
                "speed": node.speed,
                "windows": windows,
                "expected_s": node.expected_s(windows) if windows else None,
                "late_s": node.late_s(windows) if windows else None,
                "rates": node.rates(),
            }
        return {
            "nodes": nodes,
            "hedge_tokens": self.hedge.left,
            "retry_tokens": self.retry.left,
        }


def split(rows: Sequence[int], nodes: Sequence[NodeHealth]) -> dict[str, tuple[int, ...]]:
    """Divide a party's rows among its usable nodes, in proportion to their measured speed.

    A node of unknown speed gets the share of an average one. Deterministic: ties go to the node
    that comes first, and each node gets neighbouring rows.
    """
    known = [node.speed for node in nodes if node.speed]
    speeds = [node.speed or (sum(known) / len(known) if known else 1.0) for node in nodes]
    counts = [0] * len(nodes)
    for _ in rows if nodes else ():
        counts[min(range(len(nodes)), key=lambda i: (counts[i] + 1) / speeds[i])] += 1
    out, at = {}, 0
    for node, count in zip(nodes, counts, strict=True):
        out[node.name] = tuple(rows[at : at + count])
        at += count
    return out


def chunks(n: int, node: NodeHealth, most: int = 0, pieces: int = 4) -> list[int]:
    """Into what sizes to cut a request of n windows so that its stages overlap.

    With U, C and D the seconds that upload, compute and download of all n windows take, c equal
    pieces take about ``(U + C + D) / c + (c - 1) / c * max(U, C, D) + c * overhead``: the first
    piece passes all three stages, the others follow at the pace of the slowest stage. The overhead
    is the fixed part of compute and the edge's own work. The best c of 1 to 4 is taken, and 1
    while nothing is measured.

    Args:
        most: windows in one piece, where there is a limit; 0 for none.
        pieces: cut into no more than these, if `most` allows it.

    Returns:
        Sizes that differ by at most one and add up to n; the larger come first.
    """
    if n <= 0:
        return []
    best = 1
    if stages := node.stages():
        parts, overhead = [n * each for each in stages[:3]], stages[3] + _PIECE_S
        best = min(
            range(1, max(1, min(4, n, pieces)) + 1),
            key=lambda c: sum(parts) / c + (c - 1) / c * max(parts) + c * overhead,
        )
    count = max(best, math.ceil(n / most) if most else 1)
    return [n // count + (i < n % count) for i in range(count)]


def smoothed(before: float | None, now: float, weight: float) -> float:
    """The exponential moving average after another value; `weight` is that of the new one."""
    return now if before is None else before + weight * (now - before)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _fit(points: Iterable[tuple[int, float]], fixed_share: float = 0.0) -> tuple[float, float]:
    """A line through (windows, seconds) that outliers don't move: fixed part and slope, both >= 0.

    Theil's incomplete method (1950): the median slope of the pairs (i, i + n/2). Where the sizes
    differ too little to tell a slope, `fixed_share` of the typical time is taken as fixed.
    """
    ordered = sorted(points)
    half = len(ordered) // 2
    if ordered[-1][0] >= 1.5 * ordered[0][0]:
        pairs = zip(ordered, ordered[half:], strict=False)
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x2 > x1]
        if slopes:
            slope = _median(slopes)
            fixed = _median(y - slope * x for x, y in ordered)
            if slope >= 0 and fixed >= 0:
                return fixed, slope
    typical = _median(y / x for x, y in ordered)
    return fixed_share * typical * ordered[half][0], (1 - fixed_share) * typical


def _on(model: tuple[float, float, float], windows: int, ahead: int = 0) -> float:
    return max(1e-6, model[0] + model[1] * windows + model[2] * ahead)
