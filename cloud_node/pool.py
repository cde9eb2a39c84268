"""The workers of a node, one per device, as the event loop sees them.

The server knows only :class:`Pool` and :class:`Slot`, for workers of this machine and for replicas
on Ray alike. Replacing a worker that died is the pool's task.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from cloud_node.shared_memory import Arena, Layout
from cloud_node.worker_messages import (
    STAGE,
    Closed,
    Done,
    Failed,
    Logged,
    Open,
    Ready,
    Run,
    RunFailed,
    decode_from_worker,
    encode,
)
from edge_common.children import Child
from edge_common.errors import ConfigError, EdgeRuntimeError, EngineError
from engines.bundle import Bundle
from engines.engine import Device

log = logging.getLogger(__name__)

Outputs = dict[str, np.ndarray]


class WorkerDied(EdgeRuntimeError):
    """The worker crashed, was killed or hung. Its batches are lost.

    `began`: whether the worker may have started this batch. If not, the batch cannot be the cause.
    """

    def __init__(self, message: str, *, began: bool = True) -> None:
        super().__init__(message)
        self.began = began


class PoolClosed(EdgeRuntimeError):
    """The pool is closing or closed and accepts no more work."""

    def __init__(self, message: str = "the pool of workers is closed") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class WorkerEvent:
    """A change of the worker of ``lane``.

    Attributes:
        kind: ``started``: its process (or replica) runs and opens the engine; ``ready``: it is
            warm; ``died``: it ended or was killed, ready or not; ``stopped``: it ended because the
            pool was closed.
        lane: number of the lane, from 0.
        device: as configured, such as ``cuda:1``.
        restarts: how often the worker of this lane has been replaced.
        pid: of its process, 0 if that is not on this machine.
        seconds: for ``ready``, since ``started``; for ``died``, until it is started again.
        text: for ``ready``, the engine; for ``died``, the reason in one line.
    """

    kind: Literal["started", "ready", "died", "stopped"]
    lane: int
    device: str
    restarts: int
    pid: int = 0
    seconds: float = 0.0
    text: str = ""


OnEvent = Callable[[WorkerEvent], None]
"""Called in the event loop; must not block."""


class Slot(ABC):
    """Room for one batch: fill `inputs`, `run`, use the outputs, `release`. For one task at a time.

    Attributes:
        inputs: every input of the stage, with `Pool.max_batch` rows. Write to them before `run`
            only; they start with undefined contents.
        compute_us: time inside the engine of the last successful run.
    """

    inputs: dict[str, np.ndarray]
    compute_us: int = 0

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.inputs = dict(inputs)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._running = self._released = False

    @abstractmethod
    async def run(self, n: int) -> Outputs:
        """Run the stage on the first ``n`` rows of `inputs`.

        May be called again on the same slot after an EngineError, for example with other rows, but
        not after success or WorkerDied. A cancelled run continues in the worker; its outputs are
        lost.

        Returns:
            every output, n rows each, read-only, valid until `release`.

        Raises:
            EngineError: this batch failed; the worker lives.
            WorkerDied: the worker died, or hung and was killed; release the slot.
            PoolClosed: the pool was closed before the outputs were there.
        """

    @abstractmethod
    def _recycle(self) -> None:
        """Reuse the memory: the slot is released and nothing runs in it."""

    def release(self) -> None:
        """Give the slot back, at any time and from any thread; a second call does nothing.

        Do not use `inputs` and outputs afterwards.
        """
        if threading.get_ident() == self._thread:
            self._release()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the pool
                self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        if self._released:
            return
        self._released = True
        self.inputs = {}
        if not self._running:
            self._recycle()


class Pool(ABC):
    """Workers that all run the same stage.

    Attributes:
        max_batch: most rows of a batch.
        lanes: how many batches compute at the same time once all workers are ready.
    """

    max_batch: int
    lanes: int

    @property
    @abstractmethod
    def ready(self) -> int:
        """How many lanes have a warm worker now."""

    @abstractmethod
    async def start(self, on_event: OnEvent) -> None:
        """Start the workers; returns when every lane is warm.

        Raises:
            EdgeRuntimeError: a worker could not start; the others were ended again.
        """

    @abstractmethod
    async def follow(self) -> None:
        """Wait until the pool is closed. Raises if a defect ends the supervision of workers."""

    @abstractmethod
    async def acquire(self) -> Slot:
        """Wait for a slot of the least busy worker. Callers are served in order.

        A worker may have one more slot than it computes, so that its device never waits. Release
        a slot soon: use its outputs at once, or copy them.

        Raises:
            PoolClosed: the pool was closed, before or while waiting.
        """

    @abstractmethod
    async def close(self, drain_s: float) -> None:
        """End the workers. Runs in progress get ``drain_s`` to end first.

        A second call, also during the first, ends the wait. Outputs stay valid until released.
        """


class QueuedPool(Pool):
    """The common part of local pools and Ray pools: settings, the queue for slots, closing.

    Args:
        bundle: whose stack the workers run.
        threads: CPU threads of each worker; None: all cores.
        max_batch: most rows of a batch; None: the windows of an image.

    Raises:
        EdgeRuntimeError: the bundle or the settings cannot be used.
    """

    def __init__(self, bundle: Bundle, threads: int | None, max_batch: int | None) -> None:
        windows = bundle.geometry.windows
        self.max_batch = windows if max_batch is None else max_batch
        if self.max_batch < windows:
            raise ConfigError(
                f"max_batch is {max_batch}, expected at least {windows}, the windows of an image "
                "of this bundle"
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1, or none for all cores")
        self.closed = asyncio.Event()
        self._bundle, self._threads = bundle, threads
        self._started = self._hurry = False
        self._no_runs = asyncio.Event()
        self._on_event: OnEvent = lambda event: None
        self._waiters: deque[asyncio.Future[None]] = deque()

    def _open_message(self, device: Device, places: int, *, noop: bool = False) -> Open:
        stage = self._bundle.stage(STAGE)
        return Open(
            bundle=str(self._bundle.path.resolve()),
            stage=stage.sha256,
            device=device,
            threads=self._threads,
            layout=Layout(stage.inputs, stage.outputs, self.max_batch, places, places),
            log_level=log.getEffectiveLevel(),
            noop=noop,
        )

    def _begin(self, on_event: OnEvent) -> None:
        if self._started or self.closed.is_set():
            raise RuntimeError("a pool is started once")
        self._started = True
        self._on_event = on_event

    @abstractmethod
    def _free_slot(self) -> Slot | None:
        """A slot of the least busy worker, None if there is none now."""

    @property
    @abstractmethod
    def _runs(self) -> int:
        """Batches under way."""

    async def acquire(self) -> Slot:
        woken = False
        while True:
            if self.closed.is_set():
                raise PoolClosed
            if (woken or not self._waiters) and (slot := self._free_slot()):
                return slot
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._waiters.appendleft if woken else self._waiters.append)(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)
                if not waiter.cancelled():
                    self.wake()  # it was this caller's turn
                raise
            woken = True

    def wake(self, count: int = 1) -> None:
        """Let the first callers that wait for a slot try again."""
        while self._waiters and count > 0:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def run_ended(self) -> None:
        """Call this when a run has ended."""
        if self._hurry or not self._runs:
            self._no_runs.set()
        else:
            self._no_runs.clear()

    def report(self, event: WorkerEvent) -> None:
        """Pass an event on."""
        try:
            self._on_event(event)
        except Exception:
            log.exception("a listener to worker events failed")

    async def _end_runs(self, drain_s: float) -> None:
        """Close the pool to callers, and wait for runs in progress."""
        self._hurry = self._hurry or self.closed.is_set() or drain_s <= 0
        self.closed.set()
        self.wake(len(self._waiters))
        self.run_ended()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._no_runs.wait(), max(drain_s, 0.001))


class QueuedSlot(Slot):
    """A slot that runs one batch at a time, until one has succeeded."""

    _succeeded = False

    async def run(self, n: int) -> Outputs:
        if self._released or self._succeeded:
            raise RuntimeError("a slot runs nothing more after success or release")
        rows = len(next(iter(self.inputs.values())))
        if not 1 <= n <= rows:
            raise ValueError(f"{n} rows, expected 1 to {rows}")
        self._check()
        if self._running:
            raise RuntimeError("a slot runs one batch at a time")
        future = self._send(n)
        self._running = True
        return await future

    @abstractmethod
    def _check(self) -> None:
        """Raise WorkerDied or PoolClosed if the slot's worker is gone."""

    @abstractmethod
    def _send(self, n: int) -> asyncio.Future[Outputs]:
        """Give the batch to the worker."""

    def ended(self, *, succeeded: bool = False) -> None:
        """Call this when the worker no longer uses the slot's memory."""
        self._running, self._succeeded = False, succeeded
        if self._released:
            self._recycle()


_DEVICE = re.compile(r"(?P<device>[a-z]+)(:(?P<ordinal>[0-9]{1,3}))?")


def parse_device(text: str) -> tuple[Device, int]:
    """``cuda:1`` as ``("cuda", 1)``; the number defaults to 0.

    Raises:
        ConfigError: it is no device.
    """
    found = _DEVICE.fullmatch(text)
    if not found or found["device"] not in get_args(Device):
        raise ConfigError(
            f"device {text!r}, expected one of {', '.join(get_args(Device))}, and for a machine "
            "with several GPUs the number of one after a colon, such as cuda:1"
        )
    if found["device"] == "cpu" and found["ordinal"]:
        raise ConfigError(f"device {text!r}, expected cpu without a number")
    return cast(Device, found["device"]), int(found["ordinal"] or 0)


def visible_devices(ordinal: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a worker that sees one GPU only.

    Args:
        ordinal: of that GPU among those that this process sees.
        visible: CUDA_VISIBLE_DEVICES of this process.

    Raises:
        ConfigError: this process sees fewer GPUs.
    """
    if visible is None:
        return str(ordinal)
    seen = [name.strip() for name in visible.split(",") if name.strip()]
    if ordinal >= len(seen):
        raise ConfigError(
            f"device number {ordinal}, but CUDA_VISIBLE_DEVICES={visible} shows {len(seen)}",
            mend="change either; numbers count from 0",
        )
    return seen[ordinal]


_DEPTH = 2
"""Slots of a worker: while one computes, another is filled, so that a GPU never waits."""

_GRACE_S = 5.0
"""Time for an idle worker to end without a signal."""

_GONE_S = 15.0
"""Time for a killed worker to end. A driver may delay it."""

_STEADY_S = 60.0
"""After this time a worker counts as healthy: its successor starts after the shortest delay."""

HANG_FACTOR = 10
"""A run may take this many times as long as the slowest one so far."""


class LocalPool(QueuedPool):
    """Worker processes on this machine, one per device.

    A worker that dies is started again after ``retry_s[0]`` seconds, then after twice that, up to
    ``retry_s[1]``, without end. All workers end with this process, and on Linux with the thread
    that called `start`.

    Args:
        bundle, threads, max_batch: see :class:`QueuedPool`.
        devices: one worker for each, see :func:`parse_device`.
        hang_s: a worker that computes for this long without a result is killed, unless this is
            less than ten times its slowest run so far.
        start_s: how long opening and warm-up may take.
        retry_s: see above.
        noop: run no engine at all, see :class:`cloud_node.worker_messages.Open`.

    Attributes:
        shared_bytes: memory shared with all workers together, at most.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        devices: Sequence[str] = ("auto",),
        threads: int | None = None,
        max_batch: int | None = None,
        hang_s: float = 30.0,
        start_s: float = 600.0,
        retry_s: tuple[float, float] = (0.5, 30.0),
        noop: bool = False,
    ) -> None:
        super().__init__(bundle, threads, max_batch)
        if not devices:
            raise ConfigError("no devices, expected at least one, such as auto")
        self.hang_s, self.start_s, self.retry_s = hang_s, start_s, retry_s
        self._lanes: list[_Lane] = []
        for number, text in enumerate(devices):
            device, ordinal = parse_device(text)
            environment = dict(os.environ)
            if ordinal:  # ONNX Runtime accepts no other way
                name = "CUDA_VISIBLE_DEVICES"
                environment[name] = visible_devices(ordinal, environment.get(name))
            request = self._open_message(device, _DEPTH, noop=noop)
            self._lanes.append(_Lane(self, number, text, request, environment))
        self.lanes = len(self._lanes)
        self.shared_bytes = request.layout.size * self.lanes
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> int:
        return sum(lane.ready for lane in self._lanes)

    @property
    def _runs(self) -> int:
        return sum(len(lane.runs) for lane in self._lanes)

    async def start(self, on_event: OnEvent) -> None:
        self._begin(on_event)
        loop = asyncio.get_running_loop()
        warm: list[asyncio.Future[None]] = [loop.create_future() for _ in self._lanes]
        self._tasks = [
            loop.create_task(lane.supervise(future), name=f"worker {lane.number}")
            for lane, future in zip(self._lanes, warm, strict=True)
        ]
        try:
            await asyncio.wait(warm, return_when=asyncio.FIRST_EXCEPTION)
            for error in [future.exception() for future in warm if future.done()]:
                if error is not None:
                    raise error
        except BaseException:
            await self.close(0)
            raise
        finally:
            for future in warm:  # only the first error is raised; the others count as retrieved
                if future.done() and not future.cancelled():
                    future.exception()

    async def follow(self) -> None:
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    def _free_slot(self) -> Slot | None:
        lane = max(self._lanes, key=lambda lane: lane.free)
        return lane.slot() if lane.free > 0 else None

    async def close(self, drain_s: float) -> None:
        try:
            await self._end_runs(drain_s)
            for lane in self._lanes:
                lane.stop(at_once=self._hurry)
            if not self._tasks:
                return
            _, left = await asyncio.wait(self._tasks, timeout=_GRACE_S)
            for lane in self._lanes:
                lane.stop(at_once=True)
            if left:
                _, left = await asyncio.wait(left, timeout=_GONE_S)
            for task in left:
                log.error("%s was killed but still exists: see the GPU's driver", task.get_name())
                task.cancel()
        finally:
            for lane in self._lanes:
                lane.stop(at_once=True)


@dataclass
class _Pending:
    """A run that the worker has not answered yet."""

    slot: _LocalSlot
    rows: int
    future: asyncio.Future[Outputs]


class _Lane:
    """One device: its shared memory, the process that computes there now, and its runs.

    The memory belongs to the lane, so outputs outlive a process. Places that a dead process may
    still write to are reused only after it has ended.
    """

    def __init__(
        self,
        pool: LocalPool,
        number: int,
        device: str,
        request: Open,
        environment: dict[str, str],
    ) -> None:
        self.number = number
        self.ready = False
        self.runs: dict[int, _Pending] = {}
        self.process: Child | None = None
        self._pool = pool
        self._device = device
        self._request = request
        self._environment = environment
        self._name = f"worker {number} ({device})"
        self._ids = itertools.count(1)
        self._arena: Arena | None = None
        self._free_places = list(range(_DEPTH))
        self._depth = _DEPTH
        self._slots: set[_LocalSlot] = set()  # of the present process, given out
        self._warm: asyncio.Future[None] | None = None
        self._failure: EdgeRuntimeError | None = None
        self._restarts = 0
        self._started_at = self._ready_at = 0.0
        self._slowest_s = self._silent_s = 0.0

    # Slots

    @property
    def free(self) -> int:
        """How many more slots of the worker can be given out."""
        if not self.ready:
            return 0
        return min(self._depth - len(self._slots), len(self._free_places))

    def slot(self) -> _LocalSlot:
        assert self._arena is not None
        assert self.process is not None
        place = self._free_places.pop()
        slot = _LocalSlot(self, self.process, place, self._arena.batches[place])
        self._slots.add(slot)
        return slot

    def check(self, slot: _LocalSlot) -> None:
        """Raise WorkerDied or PoolClosed if the slot's worker is gone."""
        if slot.process is not self.process or not self.ready:
            raise self._died(began=False)

    def run(self, slot: _LocalSlot, rows: int) -> asyncio.Future[Outputs]:
        assert self.process is not None
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        number = next(self._ids)
        if not self.runs:
            self._silent_s = 0.0
        self.runs[number] = _Pending(slot, rows, future)
        self.process.send(encode(Run(number, slot.place, rows)))
        return future

    def recycle(self, slot: _LocalSlot) -> None:
        """The place of a released slot is free again."""
        self._slots.discard(slot)
        self._free_places.append(slot.place)
        self._pool.wake()

    def _end_run(self, message: Done | RunFailed) -> None:
        assert self._arena is not None
        run = self.runs[message.id]
        succeeded = isinstance(message, Done)
        if isinstance(message, Done):
            self._slowest_s = max(self._slowest_s, message.compute_us / 1e6)
            outputs = {n: a[: run.rows] for n, a in self._arena.results[run.slot.place].items()}
            for array in outputs.values():
                array.flags.writeable = False
            run.slot.compute_us = message.compute_us
            if not run.future.done():
                run.future.set_result(outputs)
        elif not run.future.done():
            run.future.set_exception(message.failure.error())
        del self.runs[message.id]  # not before: if anything fails above, the run is lost
        run.slot.ended(succeeded=succeeded)
        self._pool.run_ended()

    def _died(self, *, began: bool) -> EdgeRuntimeError:
        if self._pool.closed.is_set():
            return PoolClosed()
        return WorkerDied(f"{self._name} died: the batch is lost", began=began)

    # The process

    async def supervise(self, warm: asyncio.Future[None]) -> None:
        """Keep a worker running until the pool is closed; ``warm`` is for the first one."""
        self._warm = warm
        delay, longest = self._pool.retry_s
        failures = 0
        try:
            self._arena = Arena.create(self._request.layout)
            while not self._pool.closed.is_set():
                error = await self._run_process(self._arena)
                if self._pool.closed.is_set():
                    break
                if not warm.done():  # it has never worked: a person has to correct something
                    warm.set_exception(error)
                    return
                failures = 0 if self._ready_at else failures + 1
                steady = asyncio.get_running_loop().time() - self._ready_at > _STEADY_S
                if self._ready_at and steady:
                    delay = self._pool.retry_s[0]
                log.error(
                    "%s: %s%s. It is started again in %.1f s",
                    self._name,
                    f"{failures} failed starts in a row, the last because " if failures > 1 else "",
                    error,
                    delay,
                )
                self._report("died", delay, str(error))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._pool.closed.wait(), delay)
                delay = min(2 * delay, longest)
                self._restarts += 1
            self._report("stopped")
        except EdgeRuntimeError as error:
            if warm.done():
                raise
            warm.set_exception(error)
        except Exception:
            log.exception("%s is no longer supervised", self._name)
            raise
        finally:
            if not warm.done():
                warm.set_exception(PoolClosed("the pool of workers was closed while it started"))
            if self._arena is not None:
                self._arena.close()

    async def _run_process(self, arena: Arena) -> EdgeRuntimeError:
        """Start a worker and wait for its end; returns why it ended."""
        self._failure, self._ready_at = None, 0.0
        self._started_at = asyncio.get_running_loop().time()
        try:
            process = await Child.start(
                "cloud_node.worker_start", self._on_message, self._environment
            )
        except OSError as error:
            return EngineError(f"the process cannot be started: {error.strerror or error}")
        self.process = process
        try:
            self._report("started")
            if self._pool.closed.is_set():
                process.kill("was ended with the pool")
            await self._watch(process)
            lost = self._fail_runs()
            end = await process.reap(_GRACE_S)
            for run in lost:  # the process has ended and no longer writes anywhere
                run.slot.ended()
        except BaseException:  # the event loop ends without `close`, or there is a defect
            process.end_now()
            self._fail_runs()
            raise
        finally:
            self.process = None
        return self._failure or EngineError(f"the worker {process.reason or end}")

    def _fail_runs(self) -> list[_Pending]:
        """Fail all runs of a worker that is lost."""
        lost, self.runs = list(self.runs.values()), {}
        self.ready = False
        self._slots.clear()
        for position, run in enumerate(lost):
            if not run.future.done():
                run.future.set_exception(self._died(began=position == 0))
        self._pool.run_ended()
        return lost

    async def _watch(self, process: Child) -> None:
        """Wait for the end of a worker; kill it when it hangs.

        Only time in which this process ran counts, because both may have been stopped together.
        """
        loop = asyncio.get_running_loop()
        tick = min(1.0, self._pool.hang_s / 10, self._pool.start_s / 10)
        self._silent_s, last = 0.0, loop.time()
        while not process.lost.done():
            await asyncio.wait({process.lost}, timeout=tick)
            now = loop.time()
            if self.runs or not self.ready:
                self._silent_s += min(now - last, 2 * tick)
            last = now
            if not self.ready:
                if self._silent_s > self._pool.start_s:
                    process.kill(f"was not ready within {self._pool.start_s:g} s")
            elif self._silent_s > max(self._pool.hang_s, HANG_FACTOR * self._slowest_s):
                process.kill(f"hung: no result within {self._silent_s:.1f} s")

    def _on_message(self, process: Child, body: bytes) -> None:
        message = decode_from_worker(body)
        if isinstance(message, Logged):
            logging.getLogger(message.name).log(message.level, "%s: %s", self._name, message.text)
            return
        self._silent_s = 0.0
        if isinstance(message, Closed):
            assert self._arena is not None
            process.send_descriptor(encode(self._request), self._arena.fd)
        elif isinstance(message, (Done, RunFailed)):
            self._end_run(message)
        elif isinstance(message, Failed):
            self._failure = message.error()
        elif not self._pool.closed.is_set():
            self._become_ready(message)

    def _become_ready(self, message: Ready) -> None:
        self._ready_at = asyncio.get_running_loop().time()
        self._slowest_s = message.slowest_s
        # A CPU computes for so long that its next batch should be put together as late as possible.
        self._depth = 1 if message.kind == "cpu" else _DEPTH
        self.ready = True
        seconds = self._ready_at - self._started_at
        log.info("%s: ready on %s after %.1f s", self._name, message.kind, seconds)
        self._report("ready", seconds, message.kind)
        if self._warm is not None and not self._warm.done():
            self._warm.set_result(None)
        self._pool.wake(self._depth)

    def stop(self, *, at_once: bool) -> None:
        """End the process: by itself if it is idle, otherwise by force."""
        if self.process is None:
            return
        if at_once or self.runs or not self.ready:
            self.process.kill("was ended with the pool")
        else:
            self.process.leave()

    def _report(
        self,
        kind: Literal["started", "ready", "died", "stopped"],
        seconds: float = 0.0,
        text: str = "",
    ) -> None:
        pid = self.process.pid if self.process else 0
        event = WorkerEvent(kind, self.number, self._device, self._restarts, pid, seconds, text)
        self._pool.report(event)


class _LocalSlot(QueuedSlot):
    """A place in a lane's memory for a batch and its result, for one worker process."""

    def __init__(
        self, lane: _Lane, process: Child, place: int, inputs: dict[str, np.ndarray]
    ) -> None:
        super().__init__(inputs)
        self.process, self.place = process, place
        self._lane = lane

    def _check(self) -> None:
        self._lane.check(self)

    def _send(self, n: int) -> asyncio.Future[Outputs]:
        return self._lane.run(self, n)

    def _recycle(self) -> None:
        self._lane.recycle(self)
