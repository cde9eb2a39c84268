"""The front of a node: it connects the listener, the queue and the pool of workers.

Its event loop never computes and never waits long, so info, cancellations and refusals are
answered while workers compute. Window contents are in memory only, and in no log line.
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
from cloud_node.listener import Listener
from cloud_node.memory import Budget, Memory, Needs, TooLittle, check_threads
from cloud_node.metrics import Metrics
from cloud_node.poison import PoisonTracker
from cloud_node.pool import Pool, PoolClosed, Slot, WorkerDied, WorkerEvent
from cloud_node.queue import Job, Queue
from edge_common.errors import ConfigError, EngineError, ProtocolError
from edge_common.files import write_atomically
from edge_common.logs import LogLimiter, log_defect
from edge_common.memory_limits import MemoryLimits
from edge_common.process import give_freed_memory_back
from engines.bundle import TensorSpec
from transport.dos_protection import MemoryWatch
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
from transport.sockets import start_sending
from transport.wire_size import message_bytes

log = logging.getLogger(__name__)

_FLUSH_S = 0.5
"""Time for the last replies of a stopping node to leave."""
_RUNS_S = 5.0
"""Time for the last runs of a closed pool to end."""
_TICK_S = 0.1
_ROOM_S = 0.005
"""How soon to check again whether an edge has read replies, while no request may run."""
_ISOLATE_S = 60.0
"""How long a client shares no batch with others after its request failed in the engine."""
_RESTART_S = 1.0  # of a worker, before one has been measured
# Sent but never raised: each raise would extend their tracebacks.
_STOPPING = Refusal("shutdown", "the node is stopping")
_FAILED = Refusal("engine", "the node failed; its log has the details")
_POISON = Refusal("engine", "workers died over this request before; it is not tried again")
_LATE = Refusal("deadline", "the deadline passed while the request waited")


@dataclass(frozen=True)
class _Work:
    """The server's part of a queued request: views of its frame, and the key for its result."""

    peer: bytes
    feeds: dict[str, np.ndarray]
    seal: bytes


class Server:
    """Serves the stack of one bundle until it is stopped.

    Args:
        prepared: bundle, address and keys.
        pool: workers, not started. The server starts and closes it.
        metrics: default: new ones.
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
        self._poison = PoisonTracker()
        self._retries: list[list[Job]] = []  # batches to run again
        self._open: dict[Job, None] = {}  # admitted, without an outcome
        windows = prepared.bundle.geometry.windows
        self._window_bytes = -(-prepared.limits.result.total_bytes // windows)  # of a result
        self._unread: dict[str, int] = {}  # bytes given to libzmq that it still holds, by client
        self._unread_total = 0
        self._runs: set[asyncio.Task[None]] = set()
        self._log_limiter = LogLimiter(10.0, keys=1024)
        self._start_s = _RESTART_S  # of the last worker
        self._draining = self._bound = False

    async def run(self, stop: asyncio.Event) -> None:
        """Warm up, bind, announce, and serve until `stop` is set. Then finish admitted requests,
        within the drain limit.

        Raises:
            EdgeRuntimeError: the address cannot be bound, the ready file cannot be written, no
                worker starts, or there is too little memory.
        """
        self._loop = asyncio.get_running_loop()
        self._broken = self._loop.create_future()  # fails if the node cannot continue
        self._work = asyncio.Event()  # there may be something to dispatch
        self._listener = Listener(
            self._prepared,
            self.metrics,
            self._handle,
            self._on_revoked,
            self._on_connection_ended,
            lanes=self._pool.lanes,
        )
        check_threads()
        self._listener.try_address()
        stopping = asyncio.create_task(stop.wait(), name="stop")
        tasks: set[asyncio.Future[Any]] = set()
        try:
            starting = asyncio.create_task(self._pool.start(self._on_worker_event), name="start")
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            starting.result()
            self._listener.open()
            self._limits = MemoryLimits()
            self._watch = MemoryWatch(self._held(), self._limits.resident)
            self._measure()
            tasks = {
                asyncio.create_task(self._dispatch(), name="dispatch"),
                asyncio.create_task(self._tick(), name="tick"),
                asyncio.create_task(self._pool.follow(), name="pool"),
                self._listener.broken,
                self._broken,
            }
            self._bound = True
            self._update_gauges()
            with self._announced():
                await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(tasks)
            for task in tasks:  # a task that ends early has a defect: raise it
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
                await self._listener.close(_FLUSH_S if self._bound else 0)

    async def _drain(self, tasks: Iterable[asyncio.Future[Any]]) -> None:
        """Wait until edges have the replies to all admitted requests, but no longer than the drain
        limit, nor when one of `tasks` has ended."""
        self._draining = True
        self._update_gauges()
        log.info(
            "stopping: %d requests wait, %d run",
            len(self._queue),
            self._queue.running,
            extra={"event": "stopping"},
        )
        give_up = self._loop.time() + self._prepared.config.drain_s
        while self._open or self._listener.unread() or self._unread:
            if self._loop.time() >= give_up or any(task.done() for task in tasks):
                return
            await asyncio.sleep(min(0.02, max(0.0, give_up - self._loop.time())))

    # Incoming messages

    def _handle(self, frame: zmq.Frame, to: bytes, name: str) -> bool:
        """Handle a message; returns whether it was of use, for the limit on messages."""
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
            elif not isinstance(message, VersionsSpoken):  # which needs no answer
                kind = type(message).__name__
                raise ProtocolError(f"a node takes no {kind} message")
        except UnknownVersionError as error:
            self._log_refusal(name, "version", str(error))
            self._send(to, name, encode(VersionsSpoken(VERSIONS)))
        except ProtocolError as error:
            self._refuse_new(to, name, message_id, Refusal("malformed", str(error)))
        except Refusal as refusal:
            self._refuse_new(to, name, message_id, refusal)
        except Exception:  # a defect, which the listener logs
            if not any((job.client, job.id) == (name, message_id) for job in self._open):
                self._refuse_new(to, name, message_id, _FAILED)
            raise
        return False

    def _refuse_new(self, peer: bytes, name: str, id: bytes, refusal: Refusal) -> None:
        """Refuse a request that was not admitted."""
        outcome = self._refuse(peer, name, id, refusal)
        self.metrics.requests.labels(outcome).inc()

    def _admit(self, peer: bytes, name: str, request: Request, frame: zmq.Frame) -> None:
        prepared, now = self._prepared, self._loop.time()
        check_stage(request.stage, prepared.stage, prepared.label)
        if self._draining:
            raise Refusal("shutdown", "the node is stopping")
        feeds = decode_tensors(request, frame, prepared.limits.request)
        windows = check_windows(feeds, prepared.stage, prepared.bundle.geometry)
        deaths = self._poison.deaths(name, feeds, now)
        if deaths > 1:
            raise Refusal(_POISON.code, str(_POISON))
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
            self._on_connection_ended(name, peer)

    def _shed(self, jobs: Iterable[Job], now: float) -> None:
        for old in jobs:
            wait = self._queue.estimate(old.client, old.windows, now)
            hint = self._queue.retry_ms(wait)
            self._finish(old, Refusal("overloaded", "shed: the queue is full", hint))

    def _on_connection_ended(self, name: str, route: bytes) -> None:
        dropped = self._queue.drop(name, "lost", lambda job: job.work.peer == route)
        self._finish_all(dropped)
        log.debug("a connection of %s has ended with %d waiting requests", name, len(dropped))

    def _on_revoked(self, names: Iterable[str]) -> None:
        for name in names:
            self._finish_all(self._queue.drop(name, "revoked"))

    def _on_worker_event(self, event: WorkerEvent) -> None:
        ready, now = self._pool.ready, self._loop.time()
        if event.kind == "died":
            self.metrics.worker_restarts.inc()
            if not ready:
                self._queue.hold_until(now + event.seconds + self._start_s)
        elif event.kind == "ready":
            self._start_s = event.seconds
            self._queue.hold_until(-math.inf)
        self._update_gauges()

    # Batches

    async def _dispatch(self) -> None:
        """Give waiting requests to workers, without end."""
        while True:
            await self._work.wait()
            try:
                slot = await self._pool.acquire()
            except PoolClosed:
                return
            try:
                jobs = await self._next_batch()
            except BaseException:
                slot.release()
                raise
            if not jobs:
                slot.release()
                continue
            run = asyncio.create_task(self._run(slot, jobs), name="run")
            self._runs.add(run)
            run.add_done_callback(self._on_run_done)

    def _on_run_done(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        if not run.cancelled() and (error := run.exception()) and not self._broken.done():
            self._broken.set_exception(error)  # stops the node, which ends all open requests

    async def _next_batch(self) -> list[Job]:
        """The next batch; empty if there is none now."""
        while True:
            now = self._loop.time()
            self._expire(now)
            if self._retries:
                return self._retries.pop(0)
            wait = self._queue.wait(now)
            if wait is not None and wait <= 0:
                if not (jobs := self._queue.take(now, self._may_run)):
                    self._work.clear()  # until an edge has read replies
                    self._loop.call_later(_ROOM_S, self._work.set)
                return jobs
            self._work.clear()
            if wait is None:
                return []
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._work.wait(), wait)

    def _may_run(self, client: str, running: int, windows: int) -> bool:
        """True if there is room for the results of `windows` of a client with `running` windows,
        beside the results that it has not read yet."""
        return self._has_room(client, running, windows) or (
            self._listener.refresh() and self._has_room(client, running, windows)
        )

    def _has_room(self, client: str, running: int, windows: int) -> bool:
        # The kernel's figures include what libzmq has encrypted or is writing. On systems without
        # such figures, the bytes that wait in libzmq are known at least.
        own = max(self._listener.unread(client), self._unread.get(client, 0))
        everybody = max(self._listener.unread(), self._unread_total)
        return has_room(
            windows * self._window_bytes,
            own=own + running * self._window_bytes,
            everybody=everybody + self._queue.running_windows * self._window_bytes,
            unacked=self._listener.limits.unacked,
            total=self._listener.limits.total,
            largest=self._prepared.limits.result.total_bytes,
            rate=self._listener.read_rate,
        )

    async def _run(self, slot: Slot, jobs: Sequence[Job]) -> None:
        """Run a batch. Each of its requests gets an outcome, or is run again."""
        try:
            await self._compute(slot, jobs)
        except Exception as error:  # a defect here; the edges get an answer anyway
            again = {job for batch in self._retries for job in batch}
            for job in jobs:
                if job not in again:
                    self._finish(job, _FAILED)
            log_defect(log, "a batch could not be completed", error)
        finally:
            slot.release()
            self._work.set()

    async def _compute(self, slot: Slot, jobs: Sequence[Job]) -> None:
        try:
            outputs = await slot.run(_fill(slot.inputs, jobs))
        except EngineError as error:
            self._on_batch_failed(jobs, error)
        except WorkerDied as error:
            if error.began:
                self._on_worker_died(jobs)
            else:  # the batch was only waiting there
                self._retries.append(list(jobs))
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
        self._queue.record_batch(windows, seconds)
        self.metrics.windows.inc(windows)
        self.metrics.batch_windows.observe(windows)
        self.metrics.compute_seconds.observe(seconds)
        first = 0
        for job in jobs:
            rows = slice(first, first + job.windows)
            first += job.windows
            if job.alone:
                self._poison.survived(job.client, job.work.feeds)
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

    def _on_batch_failed(self, jobs: Sequence[Job], error: Exception) -> None:
        """Run each request of a failed batch alone, to find the one that fails."""
        if len(jobs) > 1:
            log.warning("a batch of %d requests failed; each is run alone", len(jobs))
            self._retries.extend([job] for job in jobs)
            return
        (job,) = jobs
        # The engine's own text names tensors and shapes, never contents.
        self._log_refusal(job.client, "engine failed", f"{job.windows} windows: {error}")
        self._queue.isolate(job.client, self._loop.time() + _ISOLATE_S)
        self._finish(job, Refusal("engine", "the node's engine failed; its log has the details"))

    def _on_worker_died(self, jobs: Sequence[Job]) -> None:
        """Refuse the requests that a worker computed when it died."""
        now = self._loop.time()
        others = self._pool.ready > 0
        for job in jobs:
            deaths = self._poison.died(job.client, job.work.feeds, now, job.alone)
            self._queue.isolate(job.client, now + _ISOLATE_S)
            if deaths > 1:
                log.error("two workers died over one request of %s: it is refused", job.client)
                self._finish(job, _POISON)
                continue
            wait = self._queue.estimate(job.client, job.windows, now)
            hint = self._queue.retry_ms(wait if others else max(wait, self._start_s + 0.5))
            text = "the process that computed this ended; another one is being started"
            self._finish(job, Refusal("worker_died", text, hint))

    def _finish(self, job: Job, refusal: Refusal = _FAILED) -> None:
        """Give an admitted request its one outcome: `job.outcome` if that is known, otherwise send
        `refusal` to its edge. A second call does nothing."""
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

    # Regular work

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if len(self._open) != len(self._queue) + self._queue.running:
                raise RuntimeError("an admitted request neither waits nor runs")
            self._expire(self._loop.time())
            if self._queue or self._retries:
                self._work.set()
            self._update_gauges()
            self._fit_memory()
            if held := self._watch.breached():
                await self._rebind(held, f"{self._watch.ceiling >> 20} MiB")
            elif limit := self._memory.breached():
                await self._rebind(limit.used, f"is good under {limit.name}")

    def _expire(self, now: float) -> None:
        self._finish_all(self._queue.expire(now), _LATE)
        if self._retries:
            jobs = [job for batch in self._retries for job in batch]
            self._finish_all((job for job in jobs if job.outcome or job.due <= now), _LATE)
            left = [[job for job in batch if job in self._open] for batch in self._retries]
            self._retries = [batch for batch in left if batch]

    def _update_gauges(self) -> None:
        """Update the gauges, the state and the number of workers for the estimates."""
        metrics, ready = self.metrics, self._pool.ready
        self._queue.lanes = max(1, ready)
        metrics.waiting_requests.set(len(self._queue))
        metrics.waiting_bytes.set(self._queue.bytes)
        metrics.workers_ready, metrics.workers = ready, self._pool.lanes
        self._listener.update_gauges()
        if self._draining:
            metrics.state = "draining"
        elif not self._bound:
            metrics.state = "starting"
        else:
            metrics.state = "ready" if ready == self._pool.lanes else "degraded"

    def _measure(self) -> None:
        """Note how much memory the node takes without requests, and fit the rest to the limits.

        Raises:
            TooLittle: too little is left.
        """
        config, limits, pool = self._prepared.config, self._prepared.limits, self._pool
        start_sending()
        sizes = message_bytes(limits.request), message_bytes(limits.result)
        shared: int = getattr(pool, "shared_bytes", 0)
        # One batch computes and one is filled, of as many images as a batch holds. Results are in
        # shared memory, if there is any.
        images = -(-pool.max_batch // self._prepared.bundle.geometry.windows)
        needs = Needs(
            *sizes,
            batches=2 * pool.lanes * images * (sizes[0] if shared else sum(sizes)),
            shared=shared,
        )
        self._idle = self._held()
        most = self._listener.limits
        wanted = Budget(config.queue_bytes, most.total, most.connections)
        self._memory = Memory(wanted, needs, self._limits)
        self._watch.ceiling = self._ceiling()
        self._fit_memory()

    def _fit_memory(self) -> None:
        """Keep queue and listener within the limits on memory.

        Raises:
            TooLittle: they allow too little, and the node does not serve yet.
        """
        try:
            if not self._memory.update():
                return
        except TooLittle as error:
            if not self._bound:
                raise
            log.error("a limit has changed, and this process may fail because of it: %s", error)
        if self._memory.lowered:
            give_freed_memory_back()
        budget = self._memory.budget
        self._shed(self._queue.set_limit(budget.queue), self._loop.time())
        self._listener.lower_limits(budget.transit, budget.connections)
        self._watch.ceiling = self._ceiling()

    def _held(self) -> int:
        """Bytes that this process holds; 0 if the system does not say."""
        return self._limits.resident() or 0

    def _ceiling(self) -> int:
        config, limits = self._prepared.config, self._prepared.limits
        if config.memory_ceiling is not None:
            return config.memory_ceiling
        batches = 4 * self._pool.lanes * (limits.request.total_bytes + limits.result.total_bytes)
        shared: int = getattr(self._pool, "shared_bytes", 0)
        # Waiting in the queue, and in libzmq.
        allowed = self._queue.most_bytes + self._listener.limits.total + batches + shared
        return self._idle + allowed * 5 // 4

    async def _rebind(self, held: int, most: str) -> None:
        log.error(
            "%d MiB are held, more than %s: all connections are dropped; edges connect again by "
            "themselves",
            *(held >> 20, most),
            extra={"event": "rebind"},
        )
        self.metrics.rebinds.inc()
        self._finish_all(self._queue.drop_all())
        begun = self._loop.time()
        await self._listener.reopen()
        log.info(
            "bound anew after %.2f s, %d MB held",
            *(self._loop.time() - begun, self._held() >> 20),
            extra={"event": "rebound"},
        )

    # Outgoing messages

    def _refuse(self, peer: bytes, name: str, id: bytes, refusal: Refusal) -> str:
        """Send a refusal; returns its code."""
        for attempt in (refusal, _FAILED):
            try:
                message = refuse(id, attempt.code, str(attempt), attempt.retry_ms)
                self._log_refusal(name, attempt.code, message.message)
                self._send(peer, name, encode(message))
                return attempt.code
            except Exception as error:  # a defect: try a plain refusal
                log_defect(log, "a refusal could not be sent", error)
        return _FAILED.code

    def _send(self, peer: bytes, name: str, frame: memoryview) -> str:
        """Send without waiting; returns the outcome of the request if that failed, else an empty
        text."""
        size = frame.nbytes
        if self._unread.get(name, 0) + size > self._listener.limits.unacked:
            outcome: str = "unread"
        else:
            if size > HEADER_BYTES:
                # libzmq frees the frame once it has left, in any thread.
                weakref.finalize(frame.obj, self._on_frame_freed, name, size).atexit = False
                self._unread[name] = self._unread.get(name, 0) + size
                self._unread_total += size
            outcome = self._listener.send(peer, frame)
        if outcome == "sent":
            return ""
        why = "it disconnected" if outcome == "lost" else "it does not read its replies"
        self._log_limited(name, outcome, f"a reply to an edge was dropped: {why}")
        return outcome

    def _on_frame_freed(self, name: str, size: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._subtract_unread, name, size)

    def _subtract_unread(self, name: str, size: int) -> None:
        before = self._unread.pop(name, 0)
        if before > size:
            self._unread[name] = before - size
        self._unread_total -= min(before, size)
        self._work.set()  # there may be room for more results

    def _log_refusal(self, client: str, code: str, text: str) -> None:
        self._log_limited(client, code, f"refused {client} ({code}): {text}")

    def _log_limited(self, client: str, code: str, text: str) -> None:
        """Log one line in ten seconds for each client and reason. Never raises, because an edge
        waits for its answer."""
        with contextlib.suppress(Exception):
            skipped = self._log_limiter.take((client, code), self._loop.time())
            if skipped is not None:
                more = f" (and {skipped} more times since the last such line)" if skipped else ""
                fields = {"event": "refused", "client": client, "code": code}
                log.info("%s%s", text, more, extra=fields)

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
        """During the block, announce the node in the ready file; also log where it listens."""
        prepared = self._prepared
        ready = {
            "endpoint": self._listener.endpoint,
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
    """The version of edge-runtime; empty if it is not installed as a package."""
    try:
        return importlib.metadata.version("edge-runtime")
    except importlib.metadata.PackageNotFoundError:
        return ""


def software() -> str:
    """Name and version of this program, for edges."""
    return f"cloud-node {version()}".rstrip()


def _fill(inputs: Mapping[str, np.ndarray], jobs: Iterable[Job]) -> int:
    """Copy the rows of requests into a batch, one after another; returns their number."""
    first = 0
    for job in jobs:
        for name, array in job.work.feeds.items():
            inputs[name][first : first + job.windows] = array
        first += job.windows
    return first


def _tensor_info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, spec.dtype, spec.shape)
