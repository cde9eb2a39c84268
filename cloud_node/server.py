"""The front of a node: between the door, where edges come and go, the queue and the pool.

It never touches an engine, and its event loop waits for nothing longer than the copy of one batch's
rows: messages that ask for little (info, cancel, whatever has to be refused) are answered while
workers compute. Every request that is admitted has exactly one outcome, whatever raises: until then
it stays in `Server._open`. Window contents live in memory only, from arrival to reply, and no log
line holds any.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from cloud_node.admission import Refusal, check_stage, check_windows
from cloud_node.backpressure import has_room
from cloud_node.config import Prepared
from cloud_node.listener import Door
from cloud_node.memory import Budget, Memory, Needs, TooLittle, check_threads
from cloud_node.metrics import Metrics
from cloud_node.poison import Suspects
from cloud_node.pool import Pool, PoolClosed, Slot, WorkerDied, WorkerEvent
from cloud_node.queue import Job, Queue
from edge_common.errors import ConfigError, EngineError, ProtocolError
from edge_common.files import write_atomically
from edge_common.memory_limits import MemoryLimits
from edge_common.process import give_freed_memory_back
from engines.bundle import TensorSpec
from transport.messages import (
    HEADER_BYTES,
    NO_ID,
    VERSIONS,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Request,
    Result,
    StageInfo,
    TensorInfo,
    UnknownVersionError,
    VersionsSpoken,
    decode_header,
    decode_tensors,
    encode,
    refuse,
)
from transport.meter import MemoryWatch, message_bytes
from transport.sockets import start_sending

log = logging.getLogger(__name__)

_FLUSH_S = 0.5
"""How long a stopping node lets its last replies leave."""
_RUNS_S = 5.0
"""How long it waits for the last runs of a pool that is closed; each should end at once."""
_TICK_S = 0.1
_ROOM_S = 0.005
"""How soon to look whether an edge has read something, while none may run."""
_APART_S = 60.0
"""How long a client whose request failed in the engine shares no batch with others."""
_RESTART_S = 1.0  # of a worker, as long as nothing is known
_LOG_AGAIN_S = 10.0
_LOG_KEYS = 1024
# Told and never raised: each time would add to their tracebacks.
_STOPPING = Refusal("shutdown", "the node is stopping")
_FAILED = Refusal("engine", "the node failed; its log says more")


@dataclass(frozen=True)
class _Work:
    """What a queued request holds: views of the frame it came in, and the key for its result."""

    peer: bytes
    feeds: dict[str, np.ndarray]
    seal: bytes


class Server:
    """Serves the stack of one bundle until told to stop.

    Args:
        prepared: what to serve, where, to whom.
        pool: workers, not started; closed at the end.
        metrics: to count in.
    """

    def __init__(self, prepared: Prepared, pool: Pool, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics(version())
        self._prepared = prepared
        self._pool = pool
        self._queue = Queue(
            max_batch=pool.max_batch,
            most_bytes=prepared.config.queue_bytes,
            most_requests=prepared.config.client_requests,
            max_wait_s=prepared.config.max_wait_ms / 1000,
        )
        self._suspects = Suspects()
        self._again: list[list[Job]] = []  # batches to be run again
        self._open: dict[Job, None] = {}  # admitted and without an outcome
        windows = prepared.bundle.geometry.windows
        self._window_bytes = -(-prepared.limits.result.total_bytes // windows)  # of a result
        self._unread: dict[str, int] = {}  # bytes sent and not left, by client
        self._unread_total = 0
        self._runs: set[asyncio.Task[None]] = set()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        self._start_s = _RESTART_S  # of the last worker
        self._draining = self._bound = False

    async def run(self, stop: asyncio.Event) -> None:
        """Warm up, bind, announce, serve until `stop` is set; then finish what was admitted, within
        the drain limit, and leave.

        Raises:
            EdgeRuntimeError: the address can't be bound, the ready file not written, no worker
                started, too little memory.
        """
        self._loop = asyncio.get_running_loop()
        self._broken = self._loop.create_future()  # fails if the node cannot go on
        self._work = asyncio.Event()  # there may be something to dispatch
        self._door = Door(
            self._prepared,
            self.metrics,
            self._handle,
            self._revoked,
            self._left_behind,
            lanes=self._pool.lanes,
        )
        check_threads()
        self._door.try_address()
        stopping = asyncio.create_task(stop.wait(), name="stop")
        tasks: set[asyncio.Future[Any]] = set()
        try:
            starting = asyncio.create_task(self._pool.start(self._heard), name="start")
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            starting.result()
            self._door.open()
            self._limits = MemoryLimits()
            self._watch = MemoryWatch(self._held(), self._limits.resident)
            self._measure()
            tasks = {
                asyncio.create_task(self._dispatch(), name="dispatch"),
                asyncio.create_task(self._tick(), name="tick"),
                asyncio.create_task(self._pool.follow(), name="pool"),
                self._door.broken,
                self._broken,
            }
            self._bound = True
            self._look()
            with self._announced():
                await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(tasks)
            for task in tasks:  # none ends by itself unless something is broken: let it show
                if task.done():
                    task.result()
        finally:
            self._draining = True
            stopping.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            try:
                for job in self._queue.clear():
                    self._finish(job, _STOPPING)
                await self._pool.close(0)
                if self._runs:
                    await asyncio.wait(self._runs, timeout=_RUNS_S)
            finally:
                for job in list(self._open):
                    self._finish(job, _STOPPING)
                await self._door.close(_FLUSH_S if self._bound else 0)

    async def _drain(self, tasks: Iterable[asyncio.Future[Any]]) -> None:
        """Finish what was admitted, or as much of it as the limit allows and as long as all `tasks`
        run; a reply is finished once its edge has it."""
        self._draining = True
        self._look()
        log.info(
            "stopping: %d requests wait, %d run",
            len(self._queue),
            self._queue.running,
            extra={"event": "stopping"},
        )
        give_up = self._loop.time() + self._prepared.config.drain_s
        while self._open or self._door.waiting() or self._unread:
            if self._loop.time() >= give_up or any(task.done() for task in tasks):
                return
            await asyncio.sleep(min(0.02, max(0.0, give_up - self._loop.time())))

    # What arrives

    def _handle(self, frame: zmq.Frame, to: bytes, name: str) -> bool:
        """Take in a message; whether it asked for something that is done, or that need not be."""
        message_id = NO_ID
        try:
            message = decode_header(frame)
            message_id = getattr(message, "id", NO_ID)
            if isinstance(message, InfoRequest):
                self._send(to, name, encode(self._info(message)))
            elif isinstance(message, Request):
                self._admit(to, name, message, frame)
                return True
            elif isinstance(message, Cancel):
                self._finish_all(self._queue.cancel(name, message.id))
                return True
            elif not isinstance(message, VersionsSpoken):  # which is never answered
                kind = type(message).__name__
                raise ProtocolError(f"a node takes no {kind} message")
        except UnknownVersionError as error:
            self._log_refusal(name, "version", str(error))
            self._send(to, name, encode(VersionsSpoken(VERSIONS)))
        except ProtocolError as error:
            self._turn_away(to, name, message_id, Refusal("malformed", str(error)))
        except Refusal as refusal:
            self._turn_away(to, name, message_id, refusal)
        except Exception:  # a defect, which the door logs
            if not any((job.client, job.id) == (name, message_id) for job in self._open):
                self._turn_away(to, name, message_id, _FAILED)
            raise
        return False

    def _turn_away(self, peer: bytes, name: str, id: bytes, refusal: Refusal) -> None:
        """Refuse what was not admitted."""
        outcome = self._refuse(peer, name, id, refusal)
        self.metrics.requests.labels(outcome).inc()

    def _admit(self, peer: bytes, name: str, request: Request, frame: zmq.Frame) -> None:
        prepared, now = self._prepared, self._loop.time()
        check_stage(request.stage, prepared.stage, prepared.label)
        if self._draining:
            raise Refusal("shutdown", "the node is stopping")
        feeds = decode_tensors(request, frame, prepared.limits.request)
        windows = check_windows(feeds, prepared.stage, prepared.bundle.geometry)
        deaths = self._suspects.deaths(name, feeds, now)
        if deaths > 1:
            raise Refusal("engine", "workers died over this very request; it is not tried again")
        job = Job(
            client=name,
            id=request.id,
            windows=windows,
            size=sum(array.nbytes for array in feeds.values()),
            arrived=now,
            due=now + request.deadline_ms / 1000,
            work=_Work(peer, feeds, request.seal),
            alone=deaths > 0,
        )
        self._expire(now)
        if self._memory.scarce():
            hint = self._queue.retry_ms(self._queue.estimate(name, windows, now))
            raise Refusal("overloaded", "the node is short of memory", hint)
        shed = self._queue.admit(job, now)
        self._open[job] = None
        self._work.set()
        self._shed(shed, now)
        if self._send(peer, name, encode(Accepted(request.id))) == "lost":
            self._left_behind(name, peer)

    def _shed(self, jobs: Iterable[Job], now: float) -> None:
        for old in jobs:
            wait = self._queue.estimate(old.client, old.windows, now)
            hint = self._queue.retry_ms(wait)
            self._finish(old, Refusal("overloaded", "shed: the queue is full", hint))

    def _left_behind(self, name: str, route: bytes) -> None:
        """A connection has ended: nobody can be given what it asked for."""
        waited = self._queue.drop(name, "lost", lambda job: job.work.peer == route)
        self._finish_all(waited)
        log.debug("%s has left; %d of its requests waited", name, len(waited))

    def _revoked(self, names: Iterable[str]) -> None:
        for name in names:
            self._finish_all(self._queue.drop(name, "revoked"))

    def _heard(self, event: WorkerEvent) -> None:
        """Something happened to a worker."""
        ready, now = self._pool.ready, self._loop.time()
        if event.kind == "died":
            self.metrics.worker_restarts.inc()
            if not ready:
                self._queue.hold(now + event.seconds + self._start_s)
        elif event.kind == "ready":
            self._start_s = event.seconds
            self._queue.hold(-math.inf)
        self._look()

    # Batches

    async def _dispatch(self) -> None:
        """Give the workers what waits for as long as the node lives."""
        while True:
            await self._work.wait()
            try:
                slot = await self._pool.acquire()
            except PoolClosed:
                return
            try:
                jobs = await self._form()
            except BaseException:
                slot.release()
                raise
            if not jobs:
                slot.release()
                continue
            run = asyncio.create_task(self._run(slot, jobs), name="run")
            self._runs.add(run)
            run.add_done_callback(self._ran)

    def _ran(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        if not run.cancelled() and (error := run.exception()):
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """The node cannot go on: have it stop, which settles all that is open."""
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _form(self) -> list[Job]:
        """The next batch; empty if there is none now."""
        while True:
            now = self._loop.time()
            self._expire(now)
            if self._again:
                return self._again.pop(0)
            wait = self._queue.wait(now)
            if wait is not None and wait <= 0:
                if not (jobs := self._queue.take(now, self._may_run)):
                    self._work.clear()  # until somebody has read
                    self._loop.call_later(_ROOM_S, self._work.set)
                return jobs
            self._work.clear()
            if wait is None:
                return []
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._work.wait(), wait)

    def _may_run(self, client: str, running: int, windows: int) -> bool:
        """Whether there is room for the results of so many windows of a client, which has so many
        running, beside those it has not read yet."""
        return self._has_room(client, running, windows) or (
            self._door.look_again() and self._has_room(client, running, windows)
        )

    def _has_room(self, client: str, running: int, windows: int) -> bool:
        # What the kernel tells includes what libzmq has encrypted or is writing; where the kernel
        # doesn't tell, what waits in libzmq is known at least.
        own = max(self._door.waiting(client), self._unread.get(client, 0))
        everybody = max(self._door.waiting(), self._unread_total)
        return has_room(
            windows * self._window_bytes,
            own=own + running * self._window_bytes,
            everybody=everybody + self._queue.running_windows * self._window_bytes,
            unsent=self._door.unsent,
            total=self._door.total,
            largest=self._prepared.limits.result.total_bytes,
            rate=self._door.rate,
        )

    async def _run(self, slot: Slot, jobs: Sequence[Job]) -> None:
        """See a batch to its end: every one of its requests has its outcome, or is run again."""
        try:
            await self._compute(slot, jobs)
        except Exception as error:  # a defect here; the edges get an answer all the same
            again = {job for waiting in self._again for job in waiting}
            for job in jobs:
                if job not in again:
                    self._finish(job, _FAILED)
            _log_defect("a batch could not be seen to its end", error)
        finally:
            slot.release()
            self._work.set()

    async def _compute(self, slot: Slot, jobs: Sequence[Job]) -> None:
        try:
            outputs = await slot.run(_fill(slot.inputs, jobs))
        except EngineError as error:
            self._failed(jobs, error)
        except WorkerDied as error:
            if error.began:
                self._died(jobs)
            else:  # it was next in turn only
                self._again.append(list(jobs))
        except PoolClosed:
            for job in jobs:
                self._finish(job, _STOPPING)
        else:
            self._answer(jobs, outputs, slot.compute_us)

    def _answer(
        self, jobs: Sequence[Job], outputs: Mapping[str, np.ndarray], compute_us: int
    ) -> None:
        now, windows = self._loop.time(), sum(job.windows for job in jobs)
        seconds = compute_us / 1e6
        self._queue.measured(windows, seconds)
        self.metrics.windows.inc(windows)
        self.metrics.batch_windows.observe(windows)
        self.metrics.compute_seconds.observe(seconds)
        first = 0
        for job in jobs:
            rows = slice(first, first + job.windows)
            first += job.windows
            if job.alone:
                self._suspects.survived(job.client, job.work.feeds)
            if job.outcome:
                self._finish(job)
                continue
            queue_us = max(0, round((now - job.arrived) * 1e6) - compute_us)
            work: _Work = job.work
            result = Result(job.id, queue_us, compute_us)
            frame = encode(result, {k: v[rows] for k, v in outputs.items()}, work.seal)
            job.outcome = self._send(work.peer, job.client, frame) or "result"
            self._finish(job)
            self.metrics.wait_seconds.observe(queue_us / 1e6)
            log.debug(
                "%d windows for %s: queued %d us, computed %d us in a batch of %d",
                *(job.windows, job.client, queue_us, compute_us, windows),
                extra={"event": "result", "client": job.client},
            )

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        """A batch failed: whose fault it was shows when each of its requests is run alone."""
        if len(jobs) > 1:
            log.warning("a batch of %d requests failed; each is run alone", len(jobs))
            self._again.extend([job] for job in jobs)
            return
        (job,) = jobs
        # The engine's own words: they name tensors and shapes, never contents.
        self._log_refusal(job.client, "engine failed", f"{job.windows} windows: {error}")
        self._queue.set_apart(job.client, self._loop.time() + _APART_S)
        self._finish(job, Refusal("engine", "the node's engine failed; its log says more"))

    def _died(self, jobs: Sequence[Job]) -> None:
        """A worker died over these."""
        now = self._loop.time()
        others = self._pool.ready > 0
        for job in jobs:
            deaths = self._suspects.died(job.client, job.work.feeds, now, job.alone)
            self._queue.set_apart(job.client, now + _APART_S)
            if deaths > 1:
                log.error("two workers died over one request of %s: it is refused", job.client)
                text = "workers died over this very request; it is not tried again"
                self._finish(job, Refusal("engine", text))
                continue
            wait = self._queue.estimate(job.client, job.windows, now)
            hint = self._queue.retry_ms(wait if others else max(wait, self._start_s + 0.5))
            text = "the process that computed this ended; another one is being started"
            self._finish(job, Refusal("worker_died", text, hint))

    def _finish(self, job: Job, refusal: Refusal = _FAILED) -> None:
        """Give an admitted request the one outcome it has: `job.outcome` if that is known, else its
        edge is sent `refusal`. Nothing happens the second time."""
        if job not in self._open:
            return
        if not job.outcome:
            job.outcome = self._refuse(job.work.peer, job.client, job.id, refusal)
        self._queue.finish(job)
        del self._open[job]
        self.metrics.requests.labels(job.outcome).inc()

    def _finish_all(self, jobs: Iterable[Job], refusal: Refusal = _FAILED) -> None:
        for job in jobs:
            self._finish(job, refusal)

    # What has to be done now and then

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if len(self._open) != len(self._queue) + self._queue.running:
                raise RuntimeError("a request that was admitted neither waits nor runs")
            self._expire(self._loop.time())
            if self._queue or self._again:
                self._work.set()
            self._look()
            self._fit()
            if held := self._watch.breached():
                await self._rebind(held, f"{self._watch.ceiling >> 20} MiB")
            elif limit := self._memory.breached():
                await self._rebind(limit.used, f"is good under {limit.name}")

    def _expire(self, now: float) -> None:
        late = Refusal("deadline", "the deadline passed while waiting its turn")
        self._finish_all(self._queue.expire(now), late)
        if self._again:
            jobs = [job for batch in self._again for job in batch]
            self._finish_all((job for job in jobs if job.outcome or job.due <= now), late)
            left = [[job for job in batch if job in self._open] for batch in self._again]
            self._again = [batch for batch in left if batch]

    def _look(self) -> None:
        """Bring the gauges up to date, and what follows from the number of workers."""
        metrics, ready = self.metrics, self._pool.ready
        self._queue.lanes = max(1, ready)
        metrics.waiting_requests.set(len(self._queue))
        metrics.waiting_bytes.set(self._queue.bytes)
        metrics.workers_ready, metrics.workers = ready, self._pool.lanes
        self._door.look()
        if self._draining:
            metrics.state = "draining"
        elif not self._bound:
            metrics.state = "starting"
        else:
            metrics.state = "ready" if ready == self._pool.lanes else "degraded"

    def _measure(self) -> None:
        """Note what the node takes without requests, and fit the rest to the limits.

        Raises:
            TooLittle: next to nothing is left.
        """
        config, limits, pool = self._prepared.config, self._prepared.limits, self._pool
        start_sending()
        sizes = message_bytes(limits.request), message_bytes(limits.result)
        shared: int = getattr(pool, "shared_bytes", 0)
        # As many windows as a batch may hold, one batch computing and one filled. Results are in
        # shared memory, if there is any.
        images = -(-pool.max_batch // self._prepared.bundle.geometry.windows)
        needs = Needs(
            *sizes,
            batches=2 * pool.lanes * images * (sizes[0] if shared else sum(sizes)),
            shared=shared,
        )
        self._idle = self._held()
        wanted = Budget(config.queue_bytes, self._door.total, self._door.connections)
        self._memory = Memory(wanted, needs, self._limits)
        self._watch.ceiling = self._ceiling()
        self._fit()

    def _fit(self) -> None:
        """Have queue and door hold no more than limits on memory allow.

        Raises:
            TooLittle: they allow next to nothing, and nobody is served yet.
        """
        try:
            if not self._memory.look():
                return
        except TooLittle as error:
            if not self._bound:
                raise
            log.error("a limit has changed, and this process may end of it: %s", error)
        if self._memory.lowered:
            give_freed_memory_back()
        budget = self._memory.budget
        self._shed(self._queue.bound(budget.queue), self._loop.time())
        self._door.bound(budget.transit, budget.connections)
        self._watch.ceiling = self._ceiling()

    def _held(self) -> int:
        """Bytes that this process holds; 0 where the system doesn't tell."""
        return self._limits.resident() or 0

    def _ceiling(self) -> int:
        config, limits = self._prepared.config, self._prepared.limits
        if config.memory_ceiling is not None:
            return config.memory_ceiling
        batches = 4 * self._pool.lanes * (limits.request.total_bytes + limits.result.total_bytes)
        shared: int = getattr(self._pool, "shared_bytes", 0)
        # Waiting in the queue, and in libzmq.
        allowed = self._queue.most_bytes + self._door.total + batches + shared
        return self._idle + allowed * 5 // 4

    async def _rebind(self, held: int, most: str) -> None:
        log.error(
            "%d MiB are held, more than %s: all connections are dropped; edges connect again by "
            "themselves",
            *(held >> 20, most),
            extra={"event": "rebind"},
        )
        self.metrics.rebinds.inc()
        # Their connections end here, and with them the way back.
        self._finish_all(self._queue.forget())
        begun = self._loop.time()
        await self._door.reopen()
        log.info(
            "bound anew after %.2f s, %d MB held",
            *(self._loop.time() - begun, self._held() >> 20),
            extra={"event": "rebound"},
        )

    # What leaves

    def _refuse(self, peer: bytes, name: str, id: bytes, refusal: Refusal) -> str:
        """Send a refusal; returns its code."""
        for words in (refusal, _FAILED):
            try:
                message = refuse(id, words.code, str(words), words.retry_ms)
                self._log_refusal(name, words.code, message.message)
                self._send(peer, name, encode(message))
                return words.code
            except Exception as error:  # then in other words
                _log_defect("a refusal could not be sent", error)
        return _FAILED.code

    def _send(self, peer: bytes, name: str, frame: memoryview) -> str:
        """Send without waiting; what became of it unless it was sent."""
        size = frame.nbytes
        if self._unread.get(name, 0) + size > self._door.unsent:
            outcome: str = "unread"
        else:
            if size > HEADER_BYTES:
                # libzmq frees it once it has left, in whichever thread.
                weakref.finalize(frame.obj, self._left_soon, name, size).atexit = False
                self._unread[name] = self._unread.get(name, 0) + size
                self._unread_total += size
            outcome = self._door.send(peer, frame)
        if outcome == "sent":
            return ""
        why = "it left" if outcome == "lost" else "it does not read its replies"
        self._log_seldom(name, outcome, f"a reply to an edge was dropped: {why}")
        return outcome

    def _left_soon(self, name: str, size: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the pool
            self._loop.call_soon_threadsafe(self._left, name, size)

    def _left(self, name: str, size: int) -> None:
        before = self._unread.pop(name, 0)
        if before > size:
            self._unread[name] = before - size
        self._unread_total -= min(before, size)
        self._work.set()  # there may be room for more

    def _log_refusal(self, client: str, code: str, text: str) -> None:
        self._log_seldom(client, code, f"refused {client} ({code}): {text}")

    def _log_seldom(self, client: str, code: str, text: str) -> None:
        """One line for each client and reason in a while, however often it happens. Never raises:
        an edge waits for what comes after."""
        with contextlib.suppress(Exception):
            key, now = (client, code), self._loop.time()
            last, skipped = self._told.get(key, (-math.inf, 0))
            if now - last < _LOG_AGAIN_S:
                self._told[key] = last, skipped + 1
                return
            if key not in self._told and len(self._told) >= _LOG_KEYS:
                self._told.clear()
            self._told[key] = now, 0
            more = f" (and {skipped} more times since the last such line)" if skipped else ""
            log.info("%s%s", text, more, extra={"event": "refused", "client": client, "code": code})

    def _info(self, message: InfoRequest) -> Info:
        stage = self._prepared.stage
        served = StageInfo(
            stage.sha256,
            self._prepared.label,
            tuple(_tensor_info(spec) for spec in stage.inputs),
            tuple(_tensor_info(spec) for spec in stage.outputs),
        )
        return Info(message.id, VERSIONS, (served,), software())

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        """Say where the node listens, on the log and in the ready file while it serves."""
        prepared = self._prepared
        ready = {
            "endpoint": self._door.endpoint,
            "public_key": prepared.keypair.public,
            "bundle": prepared.label,
            "stack_sha256": prepared.stage.sha256,
            "authorised_keys": len(prepared.allowed),
            "pid": os.getpid(),
        }
        if not prepared.allowed:
            log.warning(
                "NO EDGE IS AUTHORISED, so none can connect. An edge's owner runs `edge-runtime "
                "keys edge --node NAME` and sends you NAME.pub; then run `%s` (no restart needed)",
                prepared.allowed.command("NAME.pub"),
            )
        log.info("ready %s", json.dumps(ready), extra={"event": "ready", **ready})
        path = prepared.config.ready_file
        if path:
            write_atomically(path, json.dumps(ready) + "\n", error=ConfigError)
        try:
            yield
        finally:
            if path:
                path.unlink(missing_ok=True)


@functools.cache
def version() -> str:
    """Of what runs here; empty where it is not installed."""
    try:
        return importlib.metadata.version("edge-runtime")
    except importlib.metadata.PackageNotFoundError:
        return ""


def software() -> str:
    """Name and version of this node, as told to edges."""
    return f"cloud-node {version()}".rstrip()


def _log_defect(text: str, error: BaseException) -> None:
    """Log a defect. Never raises: the caller has more to do, even if logging fails."""
    with contextlib.suppress(Exception):
        log.error("%s: %s", text, type(error).__name__, exc_info=error)


def _fill(inputs: Mapping[str, np.ndarray], jobs: Iterable[Job]) -> int:
    """Copy the requests' rows into a batch, one after another; how many there are."""
    first = 0
    for job in jobs:
        for name, array in job.work.feeds.items():
            inputs[name][first : first + job.windows] = array
        first += job.windows
    return first


def _tensor_info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, spec.dtype, spec.shape)
