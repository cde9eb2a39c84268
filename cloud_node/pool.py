"""What runs a node's batches: a pool of workers, one per device, seen from the event loop.

:class:`Pool` and :class:`Slot` are all that the server knows of workers, whether they are processes
of this machine or replicas elsewhere. A pool promises that a batch ends in outputs, in an
:class:`~edge_common.errors.EngineError` (the batch failed, the worker lives) or in a
:class:`WorkerDied` (the worker did not survive it, and is replaced without being asked). Which
requests make a batch is left to the server.
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

from cloud_node import worker as wire
from cloud_node.shared_memory import Arena, Layout
from cloud_node.worker_process import Process
from edge_common import errors
from edge_common.errors import ConfigError, EdgeRuntimeError, EngineError
from engines.bundle import Bundle
from engines.engine import Device

log = logging.getLogger(__name__)


class WorkerDied(EdgeRuntimeError):
    """The worker crashed, was killed or hung; what it was given is lost, the next runs again.

    `began`: whether the worker may have been at this very batch; one that it had not come to yet
    can't be what ended it.
    """

    def __init__(self, message: str, *, began: bool = True) -> None:
        super().__init__(message)
        self.began = began


class PoolClosed(EdgeRuntimeError):
    """The pool is closing or closed and takes no more work."""


@dataclass(frozen=True)
class WorkerEvent:
    """Something happened to the worker of ``lane``.

    Attributes:
        kind: ``started``: its process (or replica) runs, the engine is being opened; ``ready``: it
            is warm; ``died``: it ended or was killed, ready or not; ``stopped``: it ended because
            the pool was closed.
        lane: number of the lane, from 0.
        device: as configured, such as ``cuda:1``.
        restarts: how often the worker of this lane was replaced so far.
        pid: of its process, 0 if it has none here.
        seconds: for ``ready``, since ``started``; for ``died``, until it is started again.
        text: for ``ready``, what computes; for ``died``, why, in one line.
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
        inputs: every input of the stage, with room for `Pool.max_batch` rows, writable until `run`
            is called; what they hold at first is undefined.
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
    async def run(self, n: int) -> dict[str, np.ndarray]:
        """Run the stage on the first ``n`` rows of `inputs`.

        May be called again on the same slot after an EngineError (with other rows, say), never
        after success or WorkerDied. A cancelled run goes on in the worker, its outputs are lost.

        Returns:
            every output, n rows each, read-only, valid until `release`.

        Raises:
            EngineError: this batch failed; the worker lives.
            WorkerDied: the worker died or was killed because it hung; release the slot.
            PoolClosed: the pool was closed before the outputs were there.
        """

    @abstractmethod
    def _recycle(self) -> None:
        """Take the memory back: the slot was released and nothing runs in it."""

    def release(self) -> None:
        """Give the slot back, at any time and from any thread; twice is allowed.

        `inputs` and outputs must not be used from then on.
        """
        if threading.get_ident() == self._thread:
            self._release()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the pool
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
        max_batch: most rows a slot takes.
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
            EdgeRuntimeError: a worker could not start; everything started was ended again.
        """

    @abstractmethod
    async def follow(self) -> None:
        """Wait until whatever looks after the workers has ended, as it does once the pool is
        closed. Raises what it ended by if that was a defect: nobody replaces workers any more."""

    @abstractmethod
    async def acquire(self) -> Slot:
        """Wait for a slot of the worker that is least busy.

        A busy worker gives out one more slot than it computes where that keeps its device from
        waiting. A slot counts until it is released: use its outputs at once, or copy them.

        Raises:
            PoolClosed: the pool was closed, before or while waiting.
        """

    @abstractmethod
    async def close(self, drain_s: float) -> None:
        """End the workers, runs in progress first, but wait at most ``drain_s`` for those.

        Called again, also while it waits, it waits no longer. Outputs that are not released stay
        valid.
        """


_DEVICE = re.compile(r"(?P<device>[a-z]+)(:(?P<ordinal>[0-9]{1,3}))?")


def parse_device(text: str) -> tuple[Device, int]:
    """``cuda:1`` as ``("cuda", 1)``; without a number, the first.

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
    """CUDA_VISIBLE_DEVICES for a worker that is to see one GPU only, as its first.

    Args:
        ordinal: of that GPU among those this process sees.
        visible: CUDA_VISIBLE_DEVICES of this process.

    Raises:
        ConfigError: this process doesn't see that many.
    """
    if visible is None:
        return str(ordinal)
    seen = [name.strip() for name in visible.split(",") if name.strip()]
    if ordinal >= len(seen):
        raise ConfigError(
            f"device number {ordinal}, but CUDA_VISIBLE_DEVICES={visible} shows {len(seen)}: "
            "change either; numbers count from 0"
        )
    return seen[ordinal]


_DEPTH = 2
"""Slots of a worker at once: one computes, another is filled and waits, so that no GPU need."""

_GRACE_S = 5.0
"""For a worker to end by itself once it has no more to do."""

_GONE_S = 15.0
"""For a killed worker to be gone when the pool is closed; a driver may hold it up."""

_STEADY_S = 60.0
"""A worker that was ready this long was sound: the next is started as soon as the first was."""

_HANG_FACTOR = 10


class LocalPool(Pool):
    """Worker processes on this machine, one per device.

    They are started by :meth:`start`, and again whenever one dies: after ``retry_s[0]`` seconds,
    then twice that and so on up to ``retry_s[1]``, for as long as it takes. All end with this
    process, however it ends: on Linux with the very thread that called `start`, which must live as
    long as the pool.

    Args:
        bundle: whose stack the workers run.
        devices: one worker for each, as :func:`parse_device` reads them.
        threads: CPU threads of each worker; None means all cores.
        max_batch: most rows of a batch, at least the windows of an image; None: just as many.
        hang_s: a worker that is silent for this long while it has work is killed, unless its
            slowest run so far took more than a tenth of it: then ten times as long as that.
        start_s: how long opening and warm-up may take.
        retry_s: see above.
        noop: run no engine at all, see :class:`cloud_node.worker.Open`.

    Attributes:
        shared_bytes: memory shared with all workers together, at most.

    Raises:
        EdgeRuntimeError: for a bundle that can't be served or settings that can't be.
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
        windows = bundle.geometry.windows
        self.max_batch = windows if max_batch is None else max_batch
        if self.max_batch < windows:
            raise ConfigError(
                f"max_batch is {max_batch}, expected at least {windows}, the windows of an image "
                "of this bundle"
            )
        if not devices:
            raise ConfigError("no devices, expected at least one, such as auto")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1, or none for all cores")
        stage = bundle.stage(wire.STAGE)
        layout = Layout(stage.inputs, stage.outputs, self.max_batch, _DEPTH, _DEPTH)
        self.shared_bytes = layout.size * len(devices)
        self.hang_s, self.start_s, self.retry_s = hang_s, start_s, retry_s
        self._lanes: list[_Lane] = []
        for number, text in enumerate(devices):
            device, ordinal = parse_device(text)
            environment = dict(os.environ)
            if ordinal:  # ONNX Runtime can be told in no other way
                name = "CUDA_VISIBLE_DEVICES"
                environment[name] = visible_devices(ordinal, environment.get(name))
            request = wire.Open(
                bundle=str(bundle.path.resolve()),
                stage=stage.sha256,
                device=device,
                threads=threads,
                layout=layout,
                log_level=log.getEffectiveLevel(),
                noop=noop,
            )
            self._lanes.append(_Lane(self, number, text, request, environment))
        self.lanes = len(self._lanes)
        self.closed = asyncio.Event()
        self._started = False
        self._drained = asyncio.Event()
        self._hurry = False
        self._on_event: OnEvent = lambda event: None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> int:
        return sum(lane.ready for lane in self._lanes)

    async def start(self, on_event: OnEvent) -> None:
        if self._started or self.closed.is_set():
            raise RuntimeError("a pool is started once")
        self._started = True
        self._on_event = on_event
        loop = asyncio.get_running_loop()
        warm: list[asyncio.Future[None]] = [loop.create_future() for _ in self._lanes]
        self._tasks = [
            loop.create_task(lane.supervise(future), name=f"worker {lane.number}")
            for lane, future in zip(self._lanes, warm, strict=True)
        ]
        try:
            await asyncio.wait(warm, return_when=asyncio.FIRST_EXCEPTION)
            found = [future.exception() for future in warm if future.done()]
            for error in found:
                if error is not None:
                    raise error
        except BaseException:
            await self.close(0)
            raise
        finally:
            for future in warm:  # the first error is the one to tell
                if future.done() and not future.cancelled():
                    future.exception()

    async def follow(self) -> None:
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def acquire(self) -> Slot:
        woken = False
        while True:
            if self.closed.is_set():
                raise PoolClosed("the pool of workers is closed")
            if woken or not self._waiters:
                lane = max(self._lanes, key=lambda lane: lane.room)
                if lane.room > 0:
                    return lane.slot()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._waiters.appendleft if woken else self._waiters.append)(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)
                if not waiter.cancelled():
                    self.wake()  # it was this one's turn
                raise
            woken = True

    def wake(self, everyone: bool = False) -> None:
        """Let the first in the queue for a slot look again."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everyone:
                    return

    def landed(self) -> None:
        """A run came to its end."""
        if self._hurry or not any(lane.flights for lane in self._lanes):
            self._drained.set()
        else:
            self._drained.clear()

    def tell(self, event: WorkerEvent) -> None:
        try:
            self._on_event(event)
        except Exception:
            log.exception("a listener to worker events failed")

    async def close(self, drain_s: float) -> None:
        self._hurry = self._hurry or self.closed.is_set() or drain_s <= 0
        self.closed.set()
        self.wake(everyone=True)
        try:
            self.landed()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drained.wait(), max(drain_s, 0.001))
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
                log.error("%s was killed and is not gone: see the GPU's driver", task.get_name())
                task.cancel()
        finally:
            for lane in self._lanes:
                lane.stop(at_once=True)


@dataclass
class _Flight:
    """A run that the worker has not answered yet."""

    slot: _LocalSlot
    rows: int
    future: asyncio.Future[dict[str, np.ndarray]]


class _Lane:
    """One device: its memory, the process that computes there now, and what is under way.

    Batches and results belong to the lane and not to the process, so that outputs outlive it; those
    that a dead process was given are used again only once it is gone.
    """

    def __init__(
        self,
        pool: LocalPool,
        number: int,
        device: str,
        request: wire.Open,
        environment: dict[str, str],
    ) -> None:
        self.number = number
        self.ready = False
        self.flights: dict[int, _Flight] = {}
        self.process: Process | None = None
        self._pool = pool
        self._device = device
        self._request = request
        self._environment = environment
        self._name = f"worker {number} ({device})"
        self._ids = itertools.count(1)
        self._arena: Arena | None = None
        self._places = list(range(_DEPTH))  # that no slot has
        self._depth = _DEPTH
        self._out: set[_LocalSlot] = set()  # of the process that runs now
        self._warm: asyncio.Future[None] | None = None
        self._failure: EdgeRuntimeError | None = None
        self._restarts = 0
        self._began = self._readied = 0.0
        self._slowest_s = self._silent_s = 0.0

    # Slots

    @property
    def room(self) -> int:
        """How many more slots of the worker may be out."""
        if not self.ready:
            return 0
        return min(self._depth - len(self._out), len(self._places))

    def slot(self) -> _LocalSlot:
        assert self._arena is not None
        assert self.process is not None
        place = self._places.pop()
        slot = _LocalSlot(self, self.process, place, self._arena.batches[place])
        self._out.add(slot)
        return slot

    def check(self, slot: _LocalSlot) -> None:
        """Raise WorkerDied or PoolClosed when the slot's worker is no more."""
        if slot.process is not self.process or not self.ready:
            raise self._loss(began=False)

    def run(self, slot: _LocalSlot, rows: int) -> asyncio.Future[dict[str, np.ndarray]]:
        assert self.process is not None
        future = asyncio.get_running_loop().create_future()
        number = next(self._ids)
        if not self.flights:
            self._silent_s = 0.0
        self.flights[number] = _Flight(slot, rows, future)
        self.process.send(wire.Run(number, slot.place, slot.place, rows))
        return future

    def recycle(self, slot: _LocalSlot) -> None:
        """The place of a released slot is free again."""
        self._out.discard(slot)
        self._places.append(slot.place)
        self._pool.wake()

    def _done(self, message: wire.Done) -> None:
        assert self._arena is not None
        flight = self.flights[message.id]  # until it is known how it ended
        self._slowest_s = max(self._slowest_s, message.compute_us / 1e6)
        outputs = {n: a[: flight.rows] for n, a in self._arena.results[flight.slot.place].items()}
        for array in outputs.values():
            array.flags.writeable = False
        flight.slot.compute_us, flight.slot.through = message.compute_us, True
        if not flight.future.done():
            flight.future.set_result(outputs)
        del self.flights[message.id]
        flight.slot.land()
        self._pool.landed()

    def _run_failed(self, message: wire.RunFailed) -> None:
        flight = self.flights[message.id]
        if not flight.future.done():
            flight.future.set_exception(EngineError(message.text))
        del self.flights[message.id]
        flight.slot.land()
        self._pool.landed()

    def _loss(self, *, began: bool) -> EdgeRuntimeError:
        if self._pool.closed.is_set():
            return PoolClosed("the pool of workers is closed")
        return WorkerDied(f"{self._name} died: the batch is lost", began=began)

    # The process

    async def supervise(self, warm: asyncio.Future[None]) -> None:
        """Keep a worker running until the pool is closed; ``warm`` tells of the first."""
        self._warm = warm
        delay, longest = self._pool.retry_s
        failures = 0
        try:
            self._arena = Arena.create(self._request.layout)
            while not self._pool.closed.is_set():
                error = await self._live(self._arena)
                if self._pool.closed.is_set():
                    break
                if not warm.done():  # it never ran: somebody has to mend something
                    warm.set_exception(error)
                    return
                failures = 0 if self._readied else failures + 1
                if self._readied and asyncio.get_running_loop().time() - self._readied > _STEADY_S:
                    delay = self._pool.retry_s[0]
                log.error(
                    "%s: %s%s. It is started again in %.1f s",
                    self._name,
                    f"{failures} failed starts in a row, the last because " if failures > 1 else "",
                    error,
                    delay,
                )
                self._tell("died", delay, str(error))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._pool.closed.wait(), delay)
                delay = min(2 * delay, longest)
                self._restarts += 1
            self._tell("stopped")
        except EdgeRuntimeError as error:
            if warm.done():
                raise
            warm.set_exception(error)
        except Exception:
            log.exception("%s is given up", self._name)
            raise
        finally:
            if not warm.done():
                warm.set_exception(PoolClosed("the pool of workers was closed while it started"))
            if self._arena is not None:
                self._arena.close()

    async def _live(self, arena: Arena) -> EdgeRuntimeError:
        """Start a worker and see it to its end; returns why it ended."""
        loop = asyncio.get_running_loop()
        self._failure, self._readied, self._began = None, 0.0, loop.time()
        try:
            process = await Process.start(self._request, arena.fd, self._environment, self._heard)
        except OSError as error:
            return EngineError(f"the process cannot be started: {error.strerror or error}")
        self.process = process
        try:
            self._tell("started")
            if self._pool.closed.is_set():
                process.kill("the pool was closed")
            await self._watch(process)
            lost = self._lose()
            how = await process.reap(_GRACE_S)
            for flight in lost:  # nobody writes there any more
                flight.slot.land()
        except BaseException:  # cancelled: the loop ends without a word to the pool; or a defect
            process.end_now()
            self._lose()
            raise
        finally:
            self.process = None
        return self._failure or EngineError(f"the worker {process.reason or how}")

    def _lose(self) -> list[_Flight]:
        """The worker is no more: neither will what it was given come to anything."""
        lost, self.flights = list(self.flights.values()), {}
        self.ready = False
        self._out.clear()
        for place, flight in enumerate(lost):
            if not flight.future.done():
                flight.future.set_exception(self._loss(began=place == 0))
        self._pool.landed()
        return lost

    async def _watch(self, process: Process) -> None:
        """Wait for the end of a worker; kill it when it hangs.

        Only time in which this process ran counts: both may have been stopped together.
        """
        loop = asyncio.get_running_loop()
        tick = min(1.0, self._pool.hang_s / 10, self._pool.start_s / 10)
        self._silent_s, last = 0.0, loop.time()
        while not process.lost.done():
            await asyncio.wait({process.lost}, timeout=tick)
            now = loop.time()
            if self.flights or not self.ready:
                self._silent_s += min(now - last, 2 * tick)
            last = now
            if not self.ready:
                if self._silent_s > self._pool.start_s:
                    process.kill(f"was not ready within {self._pool.start_s:g} s")
            elif self._silent_s > max(self._pool.hang_s, _HANG_FACTOR * self._slowest_s):
                process.kill(f"hung: no result within {self._silent_s:.1f} s")

    def _heard(self, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Logged):
            logging.getLogger(message.name).log(message.level, "%s: %s", self._name, message.text)
            return
        self._silent_s = 0.0
        if isinstance(message, wire.Done):
            self._done(message)
        elif isinstance(message, wire.RunFailed):
            self._run_failed(message)
        elif isinstance(message, wire.Failed):
            kind = getattr(errors, message.kind, None)
            if not (isinstance(kind, type) and issubclass(kind, EdgeRuntimeError)):
                kind = EngineError
            self._failure = kind(message.text)
        elif isinstance(message, wire.Ready) and not self._pool.closed.is_set():
            self._get_ready(message)

    def _get_ready(self, message: wire.Ready) -> None:
        self._readied = asyncio.get_running_loop().time()
        self._slowest_s = message.slowest_s
        # The CPU computes for so long that a batch had better be put together as late as can be.
        self._depth = 1 if message.kind == "cpu" else _DEPTH
        self.ready = True
        seconds = self._readied - self._began
        log.info("%s: ready on %s after %.1f s", self._name, message.kind, seconds)
        self._tell("ready", seconds, message.kind)
        if self._warm is not None and not self._warm.done():
            self._warm.set_result(None)
        for _ in range(self._depth):
            self._pool.wake()

    def stop(self, *, at_once: bool) -> None:
        """End the process: when it has nothing to do by its own will, else by force."""
        if self.process is None:
            return
        if at_once or self.flights or not self.ready:
            self.process.kill("was ended with the pool")
        else:
            self.process.leave()

    def _tell(
        self,
        kind: Literal["started", "ready", "died", "stopped"],
        seconds: float = 0.0,
        text: str = "",
    ) -> None:
        pid = self.process.pid if self.process else 0
        event = WorkerEvent(kind, self.number, self._device, self._restarts, pid, seconds, text)
        self._pool.tell(event)


class _LocalSlot(Slot):
    """A place for a batch and its result in a lane's memory, for one worker process.

    `through`: it has outputs.
    """

    def __init__(
        self, lane: _Lane, process: Process, place: int, inputs: dict[str, np.ndarray]
    ) -> None:
        super().__init__(inputs)
        self.process, self.place = process, place
        self.through = False
        self._lane = lane
        self._rows = len(next(iter(inputs.values())))

    async def run(self, n: int) -> dict[str, np.ndarray]:
        if self._released or self.through:
            raise RuntimeError("a slot runs nothing more after success or release")
        if not 1 <= n <= self._rows:
            raise ValueError(f"{n} rows, expected 1 to {self._rows}")
        self._lane.check(self)
        if self._running:
            raise RuntimeError("a slot runs one batch at a time")
        future = self._lane.run(self, n)
        self._running = True
        return await future

    def land(self) -> None:
        """The worker is through with it, successfully or not."""
        self._running = False
        if self._released:
            self._recycle()

    def _recycle(self) -> None:
        self._lane.recycle(self)
