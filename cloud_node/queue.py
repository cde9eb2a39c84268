"""Requests that wait for a worker: admission, fair order, removal.

Pure: times are passed in, in seconds of any one clock. The order is start-time fair queueing
(Goyal, Vin and Chen, 1996), in windows: each client has a virtual time that advances by the windows
it was given, and the client with the least time is next.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cloud_node.admission import Refusal

OVERHEAD_BYTES = 4096
"""A request's bytes beside its tensors: a limit on bytes also limits the number of requests."""

_DECAY = 0.8  # weight of past batches in the estimate, at each new one
_MIN_RETRY_MS, _MAX_RETRY_MS, _UNKNOWN_RETRY_MS = 10, 10_000, 100
_COMPACT_AT = 64


@dataclass(eq=False)
class Job:
    """A request on its way through the node.

    Args:
        client: name of its key. id: chosen by the client.
        windows: how many it holds. size: bytes of its tensors.
        arrived: time of arrival. due: its deadline.
        work: for the server; the queue does not use it.
        alone: it must not share a batch.

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
    entry: int = 0  # number of its valid entry in the order, 0 if it has none
    waiting: dict[bytes, Job] = field(default_factory=dict)
    running: dict[bytes, Job] = field(default_factory=dict)
    size: int = 0
    windows: int = 0
    isolated_until: float = -math.inf

    @property
    def oldest(self) -> Job:
        return next(iter(self.waiting.values()))


def _size(job: Job) -> int:
    return job.size + OVERHEAD_BYTES


class Queue:
    """The queue of one node.

    Waiting requests never exceed `most_bytes`, and one client gets half of it while others wait.
    If two clients always have requests waiting, neither gets more than a batch and two
    requests ahead of the other. A client that returns after a pause has neither credit nor debt.
    Every admitted request leaves exactly once: taken into a batch, or returned by a method that
    removes it.

    Args:
        max_batch: most windows of a batch, at least those of the largest request.
        most_bytes: limit on waiting requests together.
        most_requests: limit on the requests of one client, waiting and running.
        max_wait_s: how long a batch may wait to be filled.

    Attributes:
        lanes: number of workers that compute, for the estimates.
        bytes, windows: of waiting requests.
        running_windows: of requests taken and not finished.
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
        self._deadlines: list[tuple[float, int]] = []
        self._jobs: dict[int, Job] = {}  # waiting, by number
        self._number = 0
        self._now = 0.0  # virtual time of the client served last
        self._latest = 0.0  # largest virtual time of any client
        self._waiting_since = 0.0
        self._running = 0
        self.running_windows = 0
        self._forget_at = _COMPACT_AT
        self._seconds = self._counted = 0.0  # of past batches: time and windows
        self._held_until = -math.inf

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        """Requests taken and not finished."""
        return self._running

    def admit(self, job: Job, now: float) -> list[Job]:
        """Add a request.

        Returns:
            requests of other clients that were removed to make room.

        Raises:
            Refusal: it may not wait; nothing has changed.
        """
        client = self._clients.get(job.client) or _Client(job.client)
        if job.id in client.waiting or job.id in client.running:
            raise Refusal("duplicate", "a request of this id is waiting or running already")
        if job.due <= now:
            raise Refusal("deadline", "the deadline had passed when the request arrived")
        wait = self.estimate(job.client, job.windows, now)
        if len(client.waiting) + len(client.running) >= self.most_requests:
            raise Refusal(
                "overloaded",
                f"{self.most_requests} requests of this edge are waiting or running already",
                self.retry_ms(wait),
            )
        # An idle node takes any request: it may be faster now than the estimate says.
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
            self._waiting_since = now
            self._now = self._latest
        if job.client not in self._clients:
            self._forget_clients(now)
            self._clients[job.client] = client
        self._number += 1
        job._number = self._number
        if not client.waiting:
            client.time = max(client.time, self._now)
            self._enter(client)
        client.waiting[job.id] = job
        client.size += _size(job)
        client.windows += job.windows
        self.bytes += _size(job)
        self.windows += job.windows
        self._jobs[job._number] = job
        heapq.heappush(self._deadlines, (job.due, job._number))
        return shed

    def wait(self, now: float) -> float | None:
        """Seconds until `take` should be called for a free worker; None if nothing waits."""
        if not self._jobs:
            return None
        if self.windows >= self.max_batch:
            return 0.0
        return max(0.0, self._waiting_since + self.max_wait_s - now)

    def take(
        self,
        now: float,
        may_run: Callable[[str, int, int], bool] = lambda client, running, windows: True,
    ) -> list[Job]:
        """The next batch, in fair order; empty if no request may run. Call `expire` first.

        Its requests are running until `finish`. A request too large for the rest of the batch is
        passed over and comes first in the next one. The clients that pass it get at most a batch
        ahead of it.

        Args:
            may_run: called with a client, its running windows and those of its next request. False
                keeps this client waiting, but no others.
        """
        batch: list[Job] = []
        room = self.max_batch
        passed: list[_Client] = []
        held: list[_Client] = []
        while room > 0 and (client := self._first()):
            job = client.oldest
            running = sum(other.windows for other in client.running.values())
            if not may_run(client.name, running, job.windows):
                heapq.heappop(self._order)
                held.append(client)
                continue
            if not passed:
                self._now = max(self._now, client.time)
            elif client.time > passed[0].time + self.max_batch:
                break
            heapq.heappop(self._order)
            alone = job.alone or client.isolated_until > now
            if job.windows > room or (alone and batch):
                passed.append(client)
                continue
            self._remove(job)
            client.running[job.id] = job
            client.time += job.windows
            self._latest = max(self._latest, client.time)
            self._running += 1
            self.running_windows += job.windows
            batch.append(job)
            room -= job.windows
            if client.waiting:
                self._enter(client)
            if alone:
                break
        for client in held:
            client.time = max(client.time, self._now)  # no credit for the time it was held
        for client in (*passed, *held):
            self._enter(client)
        # The rest has waited for this batch. Requests that may not run wait for something else.
        self._waiting_since = -math.inf if batch else now
        return batch

    def finish(self, job: Job) -> None:
        """End a running request; its id may be used again. Does nothing for other requests."""
        client = self._clients.get(job.client)
        if client and client.running.get(job.id) is job:
            del client.running[job.id]
            self._running -= 1
            self.running_windows -= job.windows

    def cancel(self, client: str, id: bytes) -> list[Job]:
        """Like `drop`, for the request with this id."""
        found = self._clients.get(client)
        job = found and (found.waiting.get(id) or found.running.get(id))
        return self._drop([job], "cancelled") if job else []

    def drop(
        self, client: str, outcome: str, which: Callable[[Job], bool] = lambda job: True
    ) -> list[Job]:
        """Drop requests of a client: waiting ones are removed and returned, running ones marked.

        Args:
            which: selects requests; default: all of the client.
        """
        found = self._clients.get(client)
        jobs = (*found.running.values(), *found.waiting.values()) if found else ()
        return self._drop([job for job in jobs if which(job)], outcome)

    def expire(self, now: float) -> list[Job]:
        """Remove and return requests whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self._jobs.get(heapq.heappop(self._deadlines)[1])
            if job:
                late.append(self._remove(job))
        return late

    def clear(self) -> list[Job]:
        """Remove and return all waiting requests."""
        return [self._remove(job) for job in list(self._jobs.values())]

    def drop_all(self) -> list[Job]:
        """Like `drop`, for all clients: their connections have ended."""
        return [job for client in list(self._clients) for job in self.drop(client, "lost")]

    def set_limit(self, most_bytes: int) -> list[Job]:
        """Change the limit on waiting bytes. Removes and returns what is now too much: the oldest
        request of the client with the most bytes, again and again."""
        self.most_bytes = most_bytes
        shed = []
        while self.bytes > most_bytes:
            heaviest = max(self._clients.values(), key=lambda client: client.size)
            shed.append(self._remove(heaviest.oldest))
        return shed

    def isolate(self, client: str, until: float) -> None:
        """Run each request of this client in its own batch until then."""
        if found := self._clients.get(client):
            found.isolated_until = max(found.isolated_until, until)

    def record_batch(self, windows: int, seconds: float) -> None:
        """Note for the estimates how long a worker took for a batch."""
        self._counted = self._counted * _DECAY + windows
        self._seconds = self._seconds * _DECAY + seconds

    def hold_until(self, until: float) -> None:
        """Note for the estimates that no worker computes before then."""
        self._held_until = until

    def estimate(self, client: str, windows: int, now: float) -> float:
        """Seconds that a request of this client would take until its result, if it came now."""
        known = self._clients.get(client) or _Client(client)
        held = max(0.0, self._held_until - now)
        if not self._counted:
            return held
        own = known.windows + windows
        # Requests of other clients come first only up to this client's own share.
        ahead = sum(
            min(other.windows, own)
            for other in self._clients.values()
            if other.waiting and other is not known
        )
        total = own + ahead + self.running_windows
        return held + total * self._seconds / self._counted / max(1, self.lanes)

    def retry_ms(self, seconds: float) -> int:
        """The hint for a refused edge: when to try again, for a wait of so many seconds."""
        if not self._counted and seconds <= 0:
            return _UNKNOWN_RETRY_MS
        return max(_MIN_RETRY_MS, min(_MAX_RETRY_MS, math.ceil(seconds * 1000)))

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
            client.entry = 0
        # The entry of a removed request would otherwise stay until its deadline, up to a day.
        if len(self._deadlines) > 2 * len(self._jobs) + _COMPACT_AT:
            self._deadlines = [(j.due, number) for number, j in self._jobs.items()]
            heapq.heapify(self._deadlines)
        return job

    def _enter(self, client: _Client) -> None:
        """Enter a client into the order, at its virtual time."""
        self._number += 1
        client.entry = self._number
        heapq.heappush(self._order, (client.time, self._number, client))
        if len(self._order) > 2 * len(self._clients) + _COMPACT_AT:  # most are no longer valid
            self._order = [entry for entry in self._order if entry[2].entry == entry[1]]
            heapq.heapify(self._order)

    def _first(self) -> _Client | None:
        """The client that is next."""
        while self._order:
            _, entry, client = self._order[0]
            if client.entry == entry and client.waiting:
                return client
            heapq.heappop(self._order)
        return None

    def _forget_clients(self, now: float) -> None:
        """Forget clients without requests, debt or isolation."""
        if len(self._clients) < self._forget_at:
            return
        self._clients = {
            name: c
            for name, c in self._clients.items()
            if c.waiting or c.running or c.time > self._now or c.isolated_until > now
        }
        self._forget_at = max(_COMPACT_AT, 2 * len(self._clients))
