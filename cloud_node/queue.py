"""Requests that wait for a worker: who gets in, who is next, who has to go.

Pure and without a clock: times are passed in, in seconds of any one clock. Promises that what waits
never exceeds its bounds (bytes in all, half of them for one client while others wait, a number of
requests for each), that every request admitted leaves exactly once (taken into a batch, or handed
back because it was shed, expired, cancelled or revoked), and that clients share the workers by
windows: of two that always have something waiting, neither gets more than a batch and two requests
ahead of the other, whatever they send and on however many connections. What a request holds, and
who is told what, is left to the server.

Fairness is start-time fair queueing (Goyal, Vin and Chen, 1996): every client has a virtual time
that advances by the windows it was given, and the client whose time is least is next. Who comes
back after a pause starts at the present of the others: no credit is saved up, no debt forgiven.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cloud_node.admission import Refusal

OVERHEAD_BYTES = 4096
"""What a request holds beside its tensors: frames, views and the entries here. So a bound on bytes
is one on the number of requests too."""

_MEMORY = 0.8  # of past batches in the estimate, at each new one
_LEAST_MS, _MOST_MS, _UNKNOWN_MS = 10, 10_000, 100
_SWEEP = 64


@dataclass(eq=False)
class Job:
    """A request on its way through the node.

    Args:
        client: whose it is: the name of its key.
        id: as the client chose it.
        windows: how many it holds. size: bytes of its tensors.
        arrived, due: when, and when it is too late.
        work: what to do; nothing here looks at it.
        alone: shares no batch.

    Attributes:
        outcome: how it ended, once that is known: ``cancelled``, ``revoked``, ``lost``, or what its
            edge was sent. It may still be running then.
    """

    client: str
    id: bytes
    windows: int
    size: int
    arrived: float
    due: float
    work: Any = None
    alone: bool = False
    outcome: str = ""
    _number: int = 0


@dataclass(eq=False)
class _Client:
    name: str
    time: float = 0.0  # virtual
    turn: int = 0  # number of its valid entry in the order
    waiting: dict[bytes, Job] = field(default_factory=dict)
    running: dict[bytes, Job] = field(default_factory=dict)
    size: int = 0
    windows: int = 0
    apart_until: float = -math.inf

    @property
    def oldest(self) -> Job:
        return next(iter(self.waiting.values()))


def _size(job: Job) -> int:
    return job.size + OVERHEAD_BYTES


class Queue:
    """The queue of one node.

    Args:
        max_batch: most windows of a batch, at least those of the largest request.
        most_bytes: that may wait.
        most_requests: of one client, waiting and running.
        max_wait_s: how long a batch may wait to be filled.

    Attributes:
        lanes: workers that compute; the estimates go by it.
        bytes, windows: that wait.
        running_windows: that were taken and are not finished.
    """

    def __init__(
        self, *, max_batch: int, most_bytes: int, most_requests: int, max_wait_s: float
    ) -> None:
        self.max_batch = max_batch
        self.most_bytes = most_bytes
        self.most_requests = most_requests
        self.max_wait_s = max_wait_s
        self.lanes = 1
        self.bytes = 0
        self.windows = 0
        self._clients: dict[str, _Client] = {}
        self._order: list[tuple[float, int, _Client]] = []
        self._dues: list[tuple[float, int]] = []
        self._jobs: dict[int, Job] = {}  # those that wait, by number
        self._number = 0
        self._present = 0.0  # virtual time of who was served last
        self._future = 0.0  # the latest virtual time there is
        self._since = 0.0  # when the first of those that wait came
        self._running = 0
        self.running_windows = 0
        self._sweep_at = _SWEEP
        self._seconds = self._counted = 0.0
        self._held_until = -math.inf

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        """Requests taken and not finished."""
        return self._running

    def admit(self, job: Job, now: float) -> list[Job]:
        """Let a request wait.

        Returns:
            requests of others that had to go for it.

        Raises:
            Refusal: it may not wait, and why; nothing has changed.
        """
        client = self._clients.get(job.client) or _Client(job.client)
        if job.id in client.waiting or job.id in client.running:
            raise Refusal("duplicate", "a request of this id is waiting or running already")
        if job.due <= now:
            raise Refusal("deadline", "the deadline had passed when the request arrived")
        wait = self._estimate(client, job.windows, now)
        if len(client.waiting) + len(client.running) >= self.most_requests:
            raise Refusal(
                "overloaded",
                f"{self.most_requests} requests of this edge are waiting or running already",
                self.retry_ms(wait),
            )
        # A node without work takes whatever comes: it may have become faster than it was.
        busy = self._jobs or self._running or self._held_until > now
        if busy and now + wait > job.due:
            raise Refusal(
                "overloaded",
                f"it would wait {wait:.2f} s and has {job.due - now:.2f} s",
                self.retry_ms(wait - (job.due - now)),
            )
        shed = self._make_room(client, _size(job), wait)
        for old in shed:
            self._remove(old)
        if not self._jobs:
            self._since = now
            self._present = self._future
        if job.client not in self._clients:
            self._sweep(now)
            self._clients[job.client] = client
        self._number += 1
        job._number = self._number
        if not client.waiting:
            client.time = max(client.time, self._present)
            self._list(client)
        client.waiting[job.id] = job
        client.size += _size(job)
        client.windows += job.windows
        self.bytes += _size(job)
        self.windows += job.windows
        self._jobs[job._number] = job
        heapq.heappush(self._dues, (job.due, job._number))
        return shed

    def wait(self, now: float) -> float | None:
        """Seconds until `take` should be called if a worker is free; None if nothing waits."""
        if not self._jobs:
            return None
        if self.windows >= self.max_batch:
            return 0.0
        return max(0.0, self._since + self.max_wait_s - now)

    def take(
        self,
        now: float,
        may_run: Callable[[str, int, int], bool] = lambda client, running, windows: True,
    ) -> list[Job]:
        """The next batch, empty if nobody's may run; now these are running, until `finish`.

        Args:
            may_run: whether a client, which has so many windows running, may have so many more. Its
                requests wait until it may; others are not held up by it.

        In fair order. What does not fit into the rest of the batch is passed over and first in the
        next one, so that a large request neither starves nor makes batches small. Who gets past it
        so, gets no more than a batch ahead of it.

        Call `expire` first.
        """
        batch: list[Job] = []
        room = self.max_batch
        passed: list[_Client] = []
        waiting: list[_Client] = []
        while room > 0 and (client := self._first()):
            job = client.oldest
            running = sum(other.windows for other in client.running.values())
            if not may_run(client.name, running, job.windows):
                heapq.heappop(self._order)
                waiting.append(client)
                continue
            if not passed:
                self._present = max(self._present, client.time)
            elif client.time > passed[0].time + self.max_batch:
                break  # it has been let past often enough
            heapq.heappop(self._order)
            apart = job.alone or client.apart_until > now
            if job.windows > room or (apart and batch):
                passed.append(client)
                continue
            self._remove(job)
            client.running[job.id] = job
            client.time += job.windows
            self._future = max(self._future, client.time)
            self._running += 1
            self.running_windows += job.windows
            batch.append(job)
            room -= job.windows
            if client.waiting:
                self._list(client)
            if apart:
                break
        for client in waiting:
            client.time = max(client.time, self._present)  # its own doing: no credit for it
        for client in (*passed, *waiting):
            self._list(client)
        # What is left of a batch has waited; what may not run waits for something else.
        self._since = -math.inf if batch else now
        return batch

    def finish(self, job: Job) -> None:
        """A running request has had its outcome; its id may be used again. Others are ignored."""
        client = self._clients.get(job.client)
        if client and client.running.get(job.id) is job:
            del client.running[job.id]
            self._running -= 1
            self.running_windows -= job.windows

    def cancel(self, client: str, id: bytes) -> list[Job]:
        """As `drop`, of the request of this id."""
        found = self._clients.get(client)
        job = found and (found.waiting.get(id) or found.running.get(id))
        return self._drop([job], "cancelled") if job else []

    def drop(
        self, client: str, outcome: str, whose: Callable[[Job], bool] = lambda job: True
    ) -> list[Job]:
        """Forget requests of a client, all or some: those that wait are removed and returned, those
        that run are marked."""
        found = self._clients.get(client)
        jobs = (*found.running.values(), *found.waiting.values()) if found else ()
        return self._drop([job for job in jobs if whose(job)], outcome)

    def expire(self, now: float) -> list[Job]:
        """Remove and return what is too late."""
        late = []
        while self._dues and self._dues[0][0] <= now:
            job = self._jobs.get(heapq.heappop(self._dues)[1])
            if job:
                late.append(self._remove(job))
        return late

    def clear(self) -> list[Job]:
        """Remove and return all that waits."""
        return [self._remove(job) for job in list(self._jobs.values())]

    def forget(self) -> list[Job]:
        """As `drop`, of everybody's requests, whose connections have ended."""
        return [job for client in list(self._clients) for job in self.drop(client, "lost")]

    def bound(self, most_bytes: int) -> list[Job]:
        """No more than so many bytes wait from now on; removes and returns what is too much, the
        oldest first of whoever has the most."""
        self.most_bytes = most_bytes
        shed = []
        while self.bytes > most_bytes:
            heaviest = max(self._clients.values(), key=lambda client: client.size)
            shed.append(self._remove(heaviest.oldest))
        return shed

    def set_apart(self, client: str, until: float) -> None:
        """Until then, each request of this client has a batch of its own."""
        if found := self._clients.get(client):
            found.apart_until = max(found.apart_until, until)

    def measured(self, windows: int, seconds: float) -> None:
        """A worker took so long for a batch."""
        self._counted = self._counted * _MEMORY + windows
        self._seconds = self._seconds * _MEMORY + seconds

    def hold(self, until: float) -> None:
        """No worker computes before then, as far as is known; the estimates go by it."""
        self._held_until = until

    def estimate(self, client: str, windows: int, now: float) -> float:
        """Seconds until such a request of this client would be done, if it came now."""
        return self._estimate(self._clients.get(client) or _Client(client), windows, now)

    def retry_ms(self, seconds: float) -> int:
        """A hint to try again after so long."""
        if not self._counted and seconds <= 0:
            return _UNKNOWN_MS
        return max(_LEAST_MS, min(_MOST_MS, math.ceil(seconds * 1000)))

    def _estimate(self, client: _Client, windows: int, now: float) -> float:
        held = max(0.0, self._held_until - now)
        if not self._counted:
            return held
        own = client.windows + windows
        # What others have waiting comes first only as far as it is their turn.
        ahead = sum(
            min(other.windows, own)
            for other in self._clients.values()
            if other.waiting and other is not client
        )
        total = own + ahead + self.running_windows
        return held + total * self._seconds / self._counted / max(1, self.lanes)

    def _drop(self, jobs: list[Job], outcome: str) -> list[Job]:
        for job in jobs:
            job.outcome = job.outcome or outcome
        return [self._remove(job) for job in jobs if job._number in self._jobs]

    def _make_room(self, client: _Client, size: int, wait: float) -> list[Job]:
        others = len(self._jobs) > len(client.waiting)
        if others and client.size + size > self.most_bytes // 2 and client.waiting:
            raise Refusal(
                "overloaded", "this edge's requests fill half of the queue", self.retry_ms(wait)
            )
        shed: list[Job] = []
        excess = self.bytes + size - self.most_bytes
        if excess <= 0:
            return shed
        sizes = {c.name: c.size for c in self._clients.values() if c.waiting}
        left = {name: iter(self._clients[name].waiting.values()) for name in sizes}
        while excess > 0:
            heaviest = max(sizes, key=lambda name: sizes[name], default="")
            if sizes.get(heaviest, 0) <= client.size + size:
                raise Refusal("overloaded", "the queue is full", self.retry_ms(wait))
            old = next(left[heaviest])
            sizes[heaviest] -= _size(old)
            excess -= _size(old)
            shed.append(old)
        return shed

    def _remove(self, job: Job) -> Job:
        client = self._clients[job.client]
        del client.waiting[job.id], self._jobs[job._number]
        client.size -= _size(job)
        client.windows -= job.windows
        self.bytes -= _size(job)
        self.windows -= job.windows
        if not client.waiting:
            client.turn = 0
        # An entry of a request long gone stays until its deadline, and that may be a day away.
        if len(self._dues) > 2 * len(self._jobs) + _SWEEP:
            self._dues = [(j.due, number) for number, j in self._jobs.items()]
            heapq.heapify(self._dues)
        return job

    def _list(self, client: _Client) -> None:
        self._number += 1
        client.turn = self._number
        heapq.heappush(self._order, (client.time, self._number, client))
        if len(self._order) > 2 * len(self._clients) + _SWEEP:  # most are of requests cancelled
            self._order = [e for e in self._order if e[2].turn == e[1]]
            heapq.heapify(self._order)

    def _first(self) -> _Client | None:
        """Whose turn it is."""
        while self._order:
            _, turn, client = self._order[0]
            if client.turn == turn and client.waiting:
                return client
            heapq.heappop(self._order)
        return None

    def _sweep(self, now: float) -> None:
        """Forget clients about whom there is nothing to remember."""
        if len(self._clients) < self._sweep_at:
            return
        self._clients = {
            name: c
            for name, c in self._clients.items()
            if c.waiting or c.running or c.time > self._present or c.apart_until > now
        }
        self._sweep_at = max(_SWEEP, 2 * len(self._clients))
