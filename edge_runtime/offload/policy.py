"""Decides what to do for one frame: where its windows go, when to repeat, to hedge or to give up.

Pure: :func:`decide` looks at the frame and the nodes and returns actions. The dispatcher carries
them out, and reports what happens to :class:`FrameState`, which keeps the frame, the nodes' health
and the token buckets in step. It calls :func:`decide` again after every event (of any frame, since
a node's slot may have become free) and at `wake_at`.

Rows are the frame's windows by position, 0 to n - 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from edge_runtime.offload.health import Fleet, NodeHealth, Times, chunks

Kind = Literal["first", "retry", "hedge"]

FINAL = frozenset(
    {
        "wrong_bundle",
        "wrong_version",
        "wrong_answer",
        "quarantined",
        "not_authorised",
        "placement",  # the ledger refused the permit
    }
)
"""After these failures a frame does not go to the same node again; after a refused permit, these
rows do not."""
_HEDGES = 2
"""Requests of a frame that may be hedged; a third of them where they are many."""
_SPREAD = 2
"""Nodes among which the rows of a hedge are divided, at most."""
_TRIES = 5
"""So many failures of a row end the frame if nothing but waiting is left."""
_WORTH = 0.8
"""The edge takes over what a node has if that ends the wait after this share of it."""


class Attempt(msgspec.Struct, frozen=True):
    """A request that is under way since `at`. `ahead`: see :meth:`.health.NodeHealth.sent`."""

    node: str
    rows: tuple[int, ...]
    kind: Kind
    at: float
    ahead: int = 0


class Failure(msgspec.Struct, frozen=True):
    """A request that failed at `at`. Before `not_before`, repeating it needs a retry token."""

    node: str
    rows: tuple[int, ...]
    code: str
    at: float
    not_before: float


class Send(msgspec.Struct, frozen=True):
    """Send these rows to that node. `hedge` is the share of a hedge token that it costs."""

    node: str
    rows: tuple[int, ...]
    kind: Kind
    hedge: float = 0.0


class Local(msgspec.Struct, frozen=True):
    """Compute these rows on the edge. Skip those that a node has returned by then."""

    rows: tuple[int, ...]


class Cancel(msgspec.Struct, frozen=True):
    """Give up this request: its rows are done, or a new copy takes its place."""

    attempt: Attempt


class Fail(msgspec.Struct, frozen=True):
    """The frame cannot be completed. End everything that is under way (:meth:`FrameState.end`)."""

    reason: str
    code: str


Action = Send | Local | Cancel | Fail


class Decision(msgspec.Struct, frozen=True):
    """What to do now. Without an event, nothing changes before `wake_at`; None if never."""

    actions: tuple[Action, ...]
    wake_at: float | None


@dataclass
class FrameState:
    """One frame.

    Attributes:
        n: rows.
        assigned: row -> the node that is to compute it. Rows that are neither here nor in `home`
            go to any node that may see them.
        home: rows that only the edge may compute.
        may: whether a row may be sent to a node now; asks the exposure ledger.
        nodes_until: nothing is expected from nodes after this.
        until: the frame's deadline.
        local: whether the edge computes other rows than `home`: ``never``; ``fallback``: those for
            which no node is left; ``worker``: also where that shortens the frame.
        local_s: seconds per window on the edge; None while unknown.
        most: windows per request; 0 for no limit.
        local_rows: being computed on the edge, or queued there, or computed.
        requests: that were sent, without hedges; `hedges`: how many of them were hedged.
    """

    n: int
    assigned: dict[int, str]
    may: Callable[[int, str], bool]
    nodes_until: float
    until: float
    home: Collection[int] = frozenset()
    local: Literal["never", "fallback", "worker"] = "never"
    local_s: float | None = None
    most: int = 0
    done: set[int] = field(default_factory=set)
    under_way: list[Attempt] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    local_rows: set[int] = field(default_factory=set)
    requests: int = 0
    hedges: float = 0.0

    @property
    def complete(self) -> bool:
        return len(self.done) == self.n

    def sent(self, send: Send, fleet: Fleet, now: float) -> Attempt:
        """Call it when a :class:`Send` is carried out."""
        ahead = fleet.nodes[send.node].sent(now, len(send.rows))
        attempt = Attempt(send.node, send.rows, send.kind, now, ahead)
        self.under_way.append(attempt)
        if send.kind == "hedge":
            fleet.hedge.spend(send.hedge)
            self.hedges += send.hedge
        else:
            self.requests += 1
        return attempt

    def answered(self, attempt: Attempt, times: Times, fleet: Fleet, now: float) -> tuple[int, ...]:
        """A checked reply has come. Returns the rows to take from it: those not yet done."""
        self.under_way.remove(attempt)
        fleet.succeeded(now, attempt.node, times, attempt.ahead)
        return self.take(attempt.rows)

    def lost(
        self, attempt: Attempt, code: str, fleet: Fleet, now: float, retry_after_s: float = 0.0
    ) -> None:
        """The request failed."""
        self.under_way.remove(attempt)
        windows = len(attempt.rows)
        not_before = fleet.failed(now, attempt.node, code, retry_after_s, windows)
        self.failed.append(Failure(attempt.node, attempt.rows, code, now, not_before))

    def refused(self, send: Send, now: float) -> None:
        """The ledger refused the permit for a :class:`Send`, so nothing was sent."""
        self.failed.append(Failure(send.node, send.rows, "placement", now, now))

    def cancelled(self, attempt: Attempt, fleet: Fleet, now: float) -> None:
        """The request was given up."""
        self.under_way.remove(attempt)
        node = fleet.nodes[attempt.node]
        node.cancelled(now, len(attempt.rows), now - attempt.at, attempt.ahead)

    def take(self, rows: Iterable[int]) -> tuple[int, ...]:
        """Rows have been computed, by a node or on the edge. Returns those not yet done."""
        new = tuple(row for row in rows if row not in self.done)
        self.done.update(new)
        return new

    def end(self, fleet: Fleet, now: float) -> None:
        """The frame is over. Requests whose time was up failed; others are given up."""
        for attempt in [*self.under_way]:
            if now >= self.nodes_until:
                self.lost(attempt, "late", fleet, now)
            else:
                self.cancelled(attempt, fleet, now)


def decide(frame: FrameState, fleet: Fleet, now: float) -> Decision:
    """What to do for the frame now.

    * A row goes to its node at once, in pieces (`chunks`), as the node's concurrency limit allows.
      If that node is resting, ejected or quarantined, it goes to another that may see it.
    * After a failure it goes at once to another node that may see it, if a retry token is left.
      Otherwise it waits for the node's back-off, if there is time; then home, if that is allowed.
    * A request is hedged if it is late (`late_s`), the frame waits for nothing else as long, and
      all of its rows may be sent to nodes that are known to answer: where all nodes are slow, none
      is. Other parties come first. A row never has more than one extra copy.
    * Rows for which no permitted way is left fail the frame at once; others at the deadline.
    """
    return _Plan(frame, fleet, now).decision()


class _Plan:
    def __init__(self, frame: FrameState, fleet: Fleet, now: float) -> None:
        self.frame, self.fleet, self.now = frame, fleet, now
        self.actions: list[Action] = []
        self.wake = {frame.nodes_until, frame.until}
        self.left = [row for row in range(frame.n) if row not in frame.done]
        self.live = [a for a in frame.under_way if not frame.done.issuperset(a.rows)]
        self.room = {name: node.room(now) for name, node in fleet.nodes.items()}
        self.load = {name: node.load for name, node in fleet.nodes.items()}
        self.planned: Counter[str] = Counter()  # rows about to be sent
        queued = frame.local_rows - frame.done
        self.here = [r for r in self.left if r in frame.home and r not in frame.local_rows]
        self.home_s = (len(queued) + len(self.here)) * (frame.local_s or 0.0)

    def decision(self) -> Decision:
        frame = self.frame
        self.actions = [Cancel(a) for a in frame.under_way if a not in self.live]
        if not self.left:
            return Decision(tuple(self.actions), None)
        rest = [r for r in self.left if r not in frame.home and r not in frame.local_rows]
        if self.now >= frame.until or (self.now >= frame.nodes_until and self._stays(rest)):
            return self._fail(self._waiting(), "late")
        if self.now >= frame.nodes_until:
            self.here += rest
        else:
            sent = {row for attempt in self.live for row in attempt.rows}
            stuck = self._place([row for row in rest if row not in sent])
            if stuck:
                return self._fail(*stuck)
            self._hedge()
            if frame.local == "worker":
                self._work()
        if self.here:
            self.actions.append(Local(tuple(sorted(self.here))))
        return Decision(tuple(self.actions), min(t for t in self.wake if t > self.now))

    def _stays(self, rows: Sequence[int]) -> bool:
        return bool(rows) and self.frame.local == "never"

    def _to_edge(self, row: int) -> None:
        self.here.append(row)
        self.home_s += self.frame.local_s or 0.0

    # Rows that nobody has

    def _place(self, rows: list[int]) -> tuple[str, str] | None:
        """Send rows, or leave them until later. Returns reason and code if there is no way."""
        last = {row: failure for failure in self.frame.failed for row in failure.rows}
        tries = Counter(row for failure in self.frame.failed for row in failure.rows)
        groups: dict[tuple[str, Kind], list[int]] = {}
        lost: list[int] = []
        for row in rows:
            choice = self._choose(row, last.get(row), tries[row])
            if isinstance(choice, NodeHealth):
                kind: Kind = "retry" if row in last else "first"
                groups.setdefault((choice.name, kind), []).append(row)
                self.planned[choice.name] += 1
            elif choice == "home":
                self._to_edge(row)
            elif choice == "fail":
                lost.append(row)
        if lost:
            code = last[lost[0]].code if lost[0] in last else "offload"
            return self._no_way(lost), code
        if self.frame.local == "worker":
            self._relieve(groups)
        self.planned.clear()
        for (name, kind), mine in groups.items():
            node = self.fleet.nodes[name]
            for size in chunks(len(mine), node, self.frame.most, self.room[name]):
                if self.room[name] > 0:
                    self._send(name, mine[:size], kind)
                    mine = mine[size:]
        return None

    def _send(self, name: str, rows: Sequence[int], kind: Kind, hedge: float = 0.0) -> None:
        self.room[name] -= 1
        self.actions.append(Send(name, tuple(rows), kind, hedge))
        self.live.append(Attempt(name, tuple(rows), kind, self.now, self.load[name]))
        if (late := self.fleet.nodes[name].late_s(len(rows), self.load[name])) is not None:
            self.wake.add(self.now + late)
        self.load[name] += len(rows)

    def _choose(self, row: int, last: Failure | None, tries: int) -> NodeHealth | str:
        """A node to send to (or, if it is full, to wait for), or "home", "wait" or "fail"."""
        frame, fleet, now = self.frame, self.fleet, self.now
        planned = frame.assigned.get(row)
        barred = {
            failure.node
            for failure in frame.failed
            if failure.code in FINAL and (failure.code != "placement" or row in failure.rows)
        }
        if last is None and planned in fleet.nodes and planned not in barred:
            node = fleet.nodes[planned]
            if node.state(now) == "healthy" and frame.may(row, planned):
                return node
        ways: list[tuple[float, NodeHealth]] = []
        for node in fleet.nodes.values():
            when = node.ready_at(now)
            if last and (node.name == last.node or not fleet.retry.free):
                when = max(when, last.not_before)
            in_time = when + (node.expected_s(1) or 0.0) < frame.nodes_until or when <= now
            if in_time and node.name not in barred and frame.may(row, node.name):
                ways.append((when, node))
        ready = [node for when, node in ways if when <= now and self.room[node.name] > 0]
        if ready:
            tried = {f.node for f in frame.failed if row in f.rows}
            return min(ready, key=lambda node: (node.name in tried, self._end(node, 1)))
        soonest = min((when for when, _ in ways), default=None)
        if frame.local != "never":
            at_home = now + self.home_s + (frame.local_s or frame.until)
            if soonest is None or tries >= 2:  # at most one back-off in a row
                return "home"
            if at_home <= soonest + min((n.expected_s(1) or 0.0) for _, n in ways):
                return "home"
        if soonest is None or tries >= _TRIES:
            return "fail"
        if soonest > now:
            self.wake.add(soonest)
        return "wait"

    def _end(self, node: NodeHealth, more: int) -> float:
        """About when a node will be ready with what it has and more rows."""
        rows = self.load[node.name] + self.planned[node.name] + more
        return self.now + rows / (node.speed or self._usual_speed())

    def _usual_speed(self) -> float:
        known = [node.speed for node in self.fleet.nodes.values() if node.speed]
        return sum(known) / len(known) if known else 1.0

    def _relieve(self, groups: dict[tuple[str, Kind], list[int]]) -> None:
        """Move rows that have not been sent to the edge, as long as that shortens the frame."""
        each = self.frame.local_s
        known = [key for key in groups if self.fleet.nodes[key[0]].speed]
        while each and (full := [key for key in known if groups[key]]):
            slowest = max(full, key=lambda key: self._end(self.fleet.nodes[key[0]], 0))
            if self.now + self.home_s + each >= self._end(self.fleet.nodes[slowest[0]], 0):
                return
            self.planned[slowest[0]] -= 1
            self._to_edge(groups[slowest].pop())

    # Rows that a node has

    def _expected_end(self, attempt: Attempt) -> float | None:
        """When an attempt should end. If it is overdue: after as long again as it has taken."""
        expected = self.fleet.nodes[attempt.node].expected_s(len(attempt.rows), attempt.ahead)
        if expected is None:
            return None
        end = attempt.at + expected
        return end if end > self.now else self.now + (self.now - attempt.at)

    def _missing(self, attempt: Attempt) -> list[int]:
        """Its rows that are not done, nor with the edge."""
        taken = self.frame.done | self.frame.local_rows | {*self.here}
        return [row for row in attempt.rows if row not in taken]

    def _holders(self, rows: Collection[int]) -> list[Attempt]:
        """The attempts that have any of these rows, the latest last."""
        return sorted((a for a in self.live if not set(rows).isdisjoint(a.rows)), key=_sent_at)

    def _hedge(self) -> None:
        frame, fleet, now = self.frame, self.fleet, self.now
        late: list[Attempt] = []
        others = now  # when the requests that are not late should have ended
        for attempt in self.live:
            limit = fleet.nodes[attempt.node].late_s(len(attempt.rows), attempt.ahead)
            if limit is not None and attempt.at + limit <= now:
                late.append(attempt)
            elif limit is not None:
                self.wake.add(attempt.at + limit)
                end = self._expected_end(attempt) or now
                others = max(others, min(end, attempt.at + limit))
        hedges = frame.hedges
        for attempt in sorted(late, key=_sent_at):
            rows = self._missing(attempt)
            holders = self._holders(rows)
            if hedges >= max(_HEDGES, frame.requests // 3) or not fleet.hedge.free:
                return
            if not rows or holders[-1] != attempt or any(a not in late for a in holders):
                continue
            # A third copy is never made: where the second one is late too, the first is given up.
            given_up = holders[0] if len(holders) > 1 else None
            groups = self._spread(rows, attempt)
            times = [
                fleet.nodes[name].expected_s(len(mine), self.load[name])
                for name, mine in groups.items()
            ]
            start = others - max((each or 0.0 for each in times), default=0.0)
            if groups and start > now:
                self.wake.add(start)  # the frame still waits longer for others
                continue
            if groups and given_up:
                self.actions.append(Cancel(given_up))
                self.live.remove(given_up)
            for name, mine in groups.items():
                self._send(name, mine, "hedge", 1 / len(groups))
                hedges += 1 / len(groups)

    def _spread(self, rows: list[int], attempt: Attempt) -> dict[str, list[int]]:
        """Rows of a hedge by node; nothing if one of them has nowhere to go.

        Only to nodes that are not slow too: they have answered in time since then, or they have
        nothing to do and their last answer was in time.
        """
        nodes = self.fleet.nodes
        able = [
            node
            for name, node in nodes.items()
            if node.state(self.now) == "healthy"
            and self.room[name] > 0
            and name != attempt.node
            and node.in_time
            and (node.answered_at >= attempt.at or not self.load[name])
        ]
        party = nodes[attempt.node].party
        groups: dict[str, list[int]] = {}
        for row in rows:
            open_to = [n for n in able if n.name in groups or len(groups) < _SPREAD]
            open_to = [n for n in open_to if self.frame.may(row, n.name)]
            if not open_to:
                return {}
            best = min(
                open_to,
                key=lambda n: (n.party == party, self._end(n, len(groups.get(n.name, ())) + 1)),
            )
            groups.setdefault(best.name, []).append(row)
        return groups

    def _work(self) -> None:
        """Have the idle edge take over the request that is expected to end last."""
        each = self.frame.local_s
        if not each or self.home_s or self.here:
            return
        end, at, rows = self.now, self.now, list[int]()
        for attempt in self.live:
            missing = self._missing(attempt)
            holders = self._holders(missing)
            ends = [e for e in map(self._expected_end, holders) if e is not None]
            if len(ends) == len(holders) and ends and min(ends) > end:
                end, at, rows = min(ends), holders[-1].at, missing
        takes = each * len(rows) / _WORTH
        if rows and self.now + takes < end:
            self.here += rows
        elif rows:  # overdue by then, it will be expected to take as long again
            self.wake.add(max(end, at + takes))

    # Errors

    def _waiting(self) -> str:
        waiting = [f"node {a.node} ({len(a.rows)} windows)" for a in self.live]
        if here := self.frame.local_rows - self.frame.done:
            waiting.append(f"the edge ({len(here)} windows)")
        return f"the deadline passed while waiting for {' and '.join(waiting) or 'a usable node'}"

    def _no_way(self, rows: list[int]) -> str:
        """Why these rows cannot be computed, node by node."""
        why = []
        for name, node in self.fleet.nodes.items():
            final = [f.code for f in self.frame.failed if f.node == name and f.code in FINAL]
            state = node.state(self.now)
            if final:
                why.append(f"{name} failed ({final[0]})")
            elif not all(self.frame.may(row, name) for row in rows):
                why.append(f"{name} may not see them")
            elif state in ("healthy", "probing"):
                why.append(f"{name} has too little time left")
            else:
                why.append(f"{name} is {state} ({node.reason})")
        return f"no node can compute {len(rows)} windows in time: {', '.join(why) or 'no nodes'}"

    def _fail(self, reason: str, code: str) -> Decision:
        cancels = [action for action in self.actions if isinstance(action, Cancel)]
        return Decision((*cancels, Fail(reason, code)), None)


def _sent_at(attempt: Attempt) -> float:
    return attempt.at
