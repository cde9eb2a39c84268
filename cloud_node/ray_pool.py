"""Workers on several machines: a node's batches run by replicas of Ray Serve.

For a provider to whom one machine is not enough. :class:`RayPool` deploys the stack as an
application of Ray Serve, which places its replicas on the hosts of a Ray cluster, replaces those
that die, hang or lose their GPU, and adds and removes some with the load where it is allowed to.
Serve was chosen over bare actors for that: actors with ``max_restarts`` come back, but nobody
checks that they are well, sends work to the idle one or adds more, and all of it would be home-made
here. What Serve costs is the packages of its HTTP front (``ray[serve]``: 66 packages, about 400 MB;
Ray alone: 14), which is never started: no proxy, no dashboard; batches go from this process to the
replicas by Ray's own calls.

It promises that a cluster is used only if it keeps objects in memory (no spilling, and no store on
a disk on any host of a replica), that a replica serves only once it holds the very stack of this
node, warm, and that what crosses between hosts is plain arrays. Ray itself passes pickles between
its processes: whoever reaches its ports runs code, so its network is the provider's own and private
(docs/ray.md). Nothing of an edge but arrays that were checked goes there. One copy more than with
worker processes is the price of each direction, from and to Ray's store in shared memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloud_node import worker as wire
from cloud_node.pool import OnEvent, Pool, PoolClosed, Slot, WorkerDied, WorkerEvent
from cloud_node.shared_memory import Layout
from edge_common import errors
from edge_common.errors import ConfigError, EdgeRuntimeError, EngineError
from edge_common.process import disable_core_dumps
from engines.bundle import Bundle, Tensors
from engines.engine import Device

log = logging.getLogger(__name__)

_DEPLOYMENT = "stack"
_HANG_FACTOR = 10
_POLL_S = 0.5
_HEALTH_PERIOD_S = 2.0
_GRACE_S = 5.0
"""For Ray to end replicas that have nothing to do."""

_CONNECT_S = 10.0

_START_GRACE_S = 60.0
"""For a start that was called off to notice."""

_BUSY = 0.6
"""Of what a replica may be given; the average that autoscaling aims at."""

_AUTOSCALING: dict[str, float] = {"upscale_delay_s": 15.0, "downscale_delay_s": 300.0}

_LEAST_STORE = 80 << 20
"""Ray refuses smaller object stores."""

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})

_FAILURE = re.compile(r"<<edge-runtime (?P<kind>\w+): (?P<text>.*?)>>", re.DOTALL)

_MEND_SPILLING = (
    "start its head with `ray start --head --system-config="
    """'{"automatic_object_spilling_enabled": false}'` and every host with """
    "`--object-spilling-directory=/dev/shm`"
)


class RayPool(Pool):
    """Replicas of a stack on a Ray cluster.

    The bundle must lie at the same path on every host that may get a replica, edge-runtime and Ray
    must be installed there in the same versions.

    Args:
        bundle: whose stack the replicas run.
        address: ``auto``: the cluster that this machine is a host of; ``HOST:PORT``: likewise, of
            which this is the head's address; ``local``: start one on this machine alone, for as
            long as the pool lives.
        device: as :data:`engines.engine.Device`; each replica gets one GPU of its own unless it is
            ``cpu``, or ``auto`` and the cluster has no GPU.
        replicas: how many; two numbers: at least and at most, between which Ray scales.
        threads: CPU threads of each replica, which are reserved with Ray; None: one is reserved,
            all cores are used.
        max_batch: most rows of a batch, at least the windows of an image; None: just as many.
        hang_s: a replica that computes for this long is replaced, unless its slowest run so far
            took more than a tenth of it: then ten times as long as that.
        start_s: how long start-up may take, on all hosts together.
        name: of the application in Ray Serve; None: made of this host's name and the stack. An
            application of that name that is there already, left behind by a front that was killed,
            is replaced.

    Attributes:
        lanes: replicas that run now, but no fewer than are asked for at least.
        name: see above.

    Raises:
        EdgeRuntimeError: for a bundle that can't be served or settings that can't be, or without
            Ray.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        address: str = "auto",
        device: Device = "auto",
        replicas: int | tuple[int, int] = 1,
        threads: int | None = None,
        max_batch: int | None = None,
        hang_s: float = 30.0,
        start_s: float = 600.0,
        name: str | None = None,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "workers on Ray were asked for, but Ray is not installed: "
                "`pip install 'ray[serve]'`, or serve with local workers"
            )
        if address.startswith("ray://"):
            raise ConfigError(
                f"Ray address {address!r}, expected auto, local or HOST:PORT: a node takes part in "
                "the cluster. Join this machine to it with `ray start --address=HOST:6379 "
                "--num-cpus=0`, then use auto"
            )
        least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
        if not 1 <= least <= most:
            raise ConfigError(
                f"replicas {least} to {most}, expected at least 1 and no more at least than at most"
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1, or none for all cores")
        windows = bundle.geometry.windows
        self.max_batch = windows if max_batch is None else max_batch
        if self.max_batch < windows:
            raise ConfigError(
                f"max_batch is {max_batch}, expected at least {windows}, the windows of an image "
                "of this bundle"
            )
        stage = bundle.stage(wire.STAGE)
        self.lanes = least
        self.name = name or f"edge-runtime-{socket.gethostname()}-{stage.sha256[:12]}"
        self._bundle = bundle
        self._outputs: Tensors = stage.outputs
        self._address, self._device, self._threads = address, device, threads
        self._least, self._most = least, most
        self._hang_s, self._start_s = hang_s, start_s
        self._layout = Layout(stage.inputs, stage.outputs, self.max_batch, 1, 1)
        _ = self._layout.size  # refuses a stack whose rows have no fixed size
        self._depth = 1
        self._text = ""
        self._handle: Any = None
        self._cluster = _Cluster()
        self._ready = self._restarts = 0
        self._filling: set[_RaySlot] = set()
        self._spare: list[dict[str, np.ndarray]] = []
        self._lent = 0
        self._flights: dict[int, _Flight] = {}
        self._ids = itertools.count(1)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._on_event: OnEvent = lambda event: None
        self._closed = asyncio.Event()
        self._drained = asyncio.Event()
        self._look = asyncio.Event()
        self._called_off = threading.Event()
        self._hurry = self._started = False
        self._starting: asyncio.Future[str] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._threads_of_ray = ThreadPoolExecutor(4, thread_name_prefix="ray")

    @property
    def ready(self) -> int:
        return self._ready

    # Start

    async def start(self, on_event: OnEvent) -> None:
        if self._started or self._closed.is_set():
            raise RuntimeError("a pool is started once")
        self._started = True
        self._on_event = on_event
        loop = asyncio.get_running_loop()
        began = loop.time()
        for lane in range(self._least):
            self._tell("started", lane)
        try:
            # Not in the main thread, whose signal handlers Ray would replace.
            self._starting = loop.run_in_executor(None, self._deploy)
            done, _ = await asyncio.wait({self._starting}, timeout=self._start_s)
            if not done:
                raise EngineError(
                    f"the {self._least} replicas on Ray were not ready within {self._start_s:g} s: "
                    "`ray status` shows whether hosts or GPUs are missing, and the logs of Ray "
                    "Serve on its hosts what they are busy with"
                )
            self._depth = 1 if self._starting.result() == "cpu" else 2
        except BaseException:
            await self.close(0)
            raise
        if self._closed.is_set():
            raise PoolClosed("the pool of workers was closed while it started")
        self._text = f"{self._starting.result()} of {self._cluster.place}"
        self._set_ready(self._least, loop.time() - began)
        self._watching = loop.create_task(self._watch(), name="replicas")

    def _deploy(self) -> str:
        """Connect, deploy, wait for every replica; returns what they compute on."""
        self._cluster.join(self._address, self._layout, self._least, self._most)
        if self._called_off.is_set():
            raise PoolClosed("the pool of workers was closed while it started")
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # set up by the import, chatty
        gpus = self._gpus()
        device = "gpu" if gpus else "cpu"
        depth = 1 if device == "cpu" else 2
        request = wire.Open(
            bundle=str(self._bundle.path.resolve()),
            stage=self._bundle.stage(wire.STAGE).sha256,
            device=self._device,
            threads=self._threads,
            layout=self._layout,
            log_level=log.getEffectiveLevel(),
        )
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        scale: dict[str, Any] = {"num_replicas": self._least}
        if self._most > self._least:
            scale = {
                "autoscaling_config": {
                    "min_replicas": self._least,
                    "max_replicas": self._most,
                    "target_ongoing_requests": _BUSY * depth,
                    **_AUTOSCALING,
                }
            }
        stack: Any = serve.deployment(
            Replica,
            name=_DEPLOYMENT,
            max_ongoing_requests=depth,
            ray_actor_options={"num_cpus": self._threads or 1, "num_gpus": gpus},
            health_check_period_s=_HEALTH_PERIOD_S,
            health_check_timeout_s=max(30.0, self._hang_s),
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=_GRACE_S,
            max_constructor_retry_count=1,  # until one was ready: somebody has to mend something
            logging_config=quiet,
            **scale,
        )
        try:
            serve.start(proxy_location="Disabled", logging_config=quiet)
            if self.name in serve.status().applications:
                log.warning("the application %s is on the cluster already: replaced", self.name)
            self._cluster.deployed = self.name
            handle = serve.run(stack.bind(request, self._hang_s), name=self.name, route_prefix=None)
            # The way there and back, before anybody counts on it.
            self._handle = handle
            kind, _, _ = handle.about.remote().result(timeout_s=self._start_s)
        except EdgeRuntimeError:
            raise
        except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            raise _replica_failure(f"{error}\n{self._message()}") from None
        return str(kind)

    def _message(self) -> str:
        """What Ray Serve says of the deployment."""
        from ray import serve

        with contextlib.suppress(Exception):  # only more words for an error
            return str(serve.status().applications[self.name].deployments[_DEPLOYMENT].message)
        return ""

    def _gpus(self) -> int:
        """GPUs of each replica.

        Raises:
            EngineError: the cluster has less than is needed.
        """
        import ray

        have = ray.cluster_resources()
        gpus = 0 if self._device == "cpu" else 1
        if self._device == "auto" and not have.get("GPU"):
            gpus = 0
        wanted = {"CPU": (self._threads or 1) * self._least, "GPU": gpus * self._least}
        for kind, number in wanted.items():
            if have.get(kind, 0) < number:
                raise EngineError(
                    f"{self._least} replicas with device {self._device} need {number} {kind}s, the "
                    f"Ray cluster at {self._cluster.place} has {have.get(kind, 0):g}: join more "
                    "hosts with `ray start`, or ask for fewer replicas, fewer threads or another "
                    "device"
                )
        return gpus

    # What is up

    async def _watch(self) -> None:
        """Follow the number of replicas until the pool is closed."""
        loop = asyncio.get_running_loop()
        failing = False
        while not self._closed.is_set():
            self._look.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look.wait(), _POLL_S)
            try:
                found = await loop.run_in_executor(self._threads_of_ray, self._running)
            except Exception as error:
                if not failing:
                    log.error("Ray Serve does not tell of its replicas: %s", type(error).__name__)
                failing = True
                continue
            failing = False
            if not self._closed.is_set():
                self._set_ready(found)
            if self._look.is_set():  # no faster than twice a second: the controller has work
                await asyncio.sleep(_POLL_S / 2)

    def _running(self) -> int:
        from ray import serve

        application = serve.status().applications.get(self.name)
        if application is None or _DEPLOYMENT not in application.deployments:
            return 0
        states: dict[Any, int] = dict(application.deployments[_DEPLOYMENT].replica_states)
        return states.get("RUNNING", 0)

    def _set_ready(self, now: int, seconds: float = 0.0) -> None:
        before, self._ready = self._ready, now
        self.lanes = max(now, self._least)
        for lane in range(before, now):
            log.info("replica %d of %s: ready", lane, self.name)
            self._tell("ready", lane, seconds, self._text)
        for lane in reversed(range(now, before)):
            if lane < self._least:
                self._restarts += 1
                log.error("a replica of %s is gone; Ray replaces it", self.name)
                self._tell("died", lane, text="Ray Serve counts it no more, and replaces it")
            else:
                log.info("a replica of %s is gone", self.name)
                self._tell("stopped", lane)
        for _ in range(max(0, now - before) * self._depth):
            self.wake()

    def _tell(
        self,
        kind: Literal["started", "ready", "died", "stopped"],
        lane: int,
        seconds: float = 0.0,
        text: str = "",
    ) -> None:
        event = WorkerEvent(kind, lane, self._device, self._restarts, seconds=seconds, text=text)
        try:
            self._on_event(event)
        except Exception:
            log.exception("a listener to worker events failed")

    # Slots

    async def follow(self) -> None:
        if self._watching is not None:
            await asyncio.wait({self._watching})
            self._watching.result()

    async def acquire(self) -> Slot:
        woken = False
        while True:
            if self._closed.is_set():
                raise PoolClosed("the pool of workers is closed")
            if (woken or not self._waiters) and len(self._filling) < self._ready * self._depth:
                slot = _RaySlot(self, self._spare.pop() if self._spare else self._room())
                self._filling.add(slot)
                return slot
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

    def _room(self) -> dict[str, np.ndarray]:
        return {
            spec.name: np.zeros((self.max_batch, *map(int, spec.shape[1:])), spec.numpy_dtype)
            for spec in self._layout.inputs
        }

    def wake(self, everyone: bool = False) -> None:
        """Let the first in the queue for a slot look again."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everyone:
                    return

    def fly(self, slot: _RaySlot, rows: int) -> asyncio.Future[dict[str, np.ndarray]]:
        """Send the batch of a slot off."""
        if self._closed.is_set():
            raise PoolClosed("the pool of workers is closed")
        future: asyncio.Future[dict[str, np.ndarray]] = asyncio.get_running_loop().create_future()
        number = next(self._ids)
        task = asyncio.get_running_loop().create_task(self._fly(number, slot, rows))
        self._flights[number] = _Flight(future, task)
        return future

    async def _fly(self, number: int, slot: _RaySlot, rows: int) -> None:
        outputs: dict[str, np.ndarray] = {}
        failure: Exception | None = None
        try:
            outputs = self._lend(slot, *await self._ask(slot.room, rows))
        except EdgeRuntimeError as error:
            failure = error
        except Exception as error:  # a mistake here or in Ray must not leave anybody waiting
            log.exception("a run on Ray failed in an unknown way")
            failure = EngineError(f"{type(error).__name__} in the pool of replicas")
        flight = self._flights.pop(number)
        if isinstance(failure, WorkerDied):
            self._look.set()
            if self._closed.is_set():
                failure = PoolClosed("the pool of workers is closed")
        slot.land(through=failure is None)
        if not flight.future.done():
            if failure is None:
                flight.future.set_result(outputs)
            else:
                flight.future.set_exception(failure)
        self.wake()
        self._landed()

    def _lend(
        self, slot: _RaySlot, outputs: dict[str, np.ndarray], compute_us: int
    ) -> dict[str, np.ndarray]:
        slot.compute_us = compute_us
        self._filling.discard(slot)
        self._spare.append(slot.room)
        slot.room = {}
        self._lent += 1
        slot.lent = True
        for array in outputs.values():
            array.flags.writeable = False
        return outputs

    async def _ask(
        self, room: dict[str, np.ndarray], rows: int
    ) -> tuple[dict[str, np.ndarray], int]:
        """Have one replica run `rows` rows.

        Raises:
            EngineError: it ran and failed.
            WorkerDied: it did not survive.
        """
        from ray import exceptions

        try:
            batch = await asyncio.get_running_loop().run_in_executor(
                self._threads_of_ray, _put, {name: a[:rows] for name, a in room.items()}
            )
            answer = await self._handle.run.remote(batch)
        except exceptions.RayTaskError as error:
            kind = type(error.cause).__name__ if error.cause is not None else "an error"
            raise EngineError(f"{kind} in a replica on Ray") from None
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError):
            raise EngineError(
                "Ray's object store on this host is full: give `ray start` a greater "
                "--object-store-memory, or lower max_batch"
            ) from None
        except exceptions.RayError as error:
            raise WorkerDied(
                f"a replica on Ray died: the batch is lost ({type(error).__name__})"
            ) from None
        except Exception as error:
            if type(error).__module__.startswith("ray.serve"):  # it gave the application up
                raise WorkerDied(f"no replica on Ray took it ({type(error).__name__})") from None
            raise
        if isinstance(answer, str):
            raise EngineError(answer)
        outputs, compute_us = answer
        for spec in self._outputs:
            found = outputs.get(spec.name)
            if found is None or (found.dtype, found.shape[1:], len(found)) != (
                spec.numpy_dtype,
                tuple(spec.shape[1:]),
                rows,
            ):
                raise EngineError(f"a replica on Ray returned {spec.name} in another form")
        return outputs, compute_us

    def recycle(self, slot: _RaySlot) -> None:
        """What a released slot still holds is free again."""
        self._filling.discard(slot)
        if slot.room:
            self._spare.append(slot.room)
            slot.room = {}
        self._lent -= slot.lent
        slot.lent = False
        self.wake()

    def _landed(self) -> None:
        if self._hurry or not self._flights:
            self._drained.set()
        else:
            self._drained.clear()

    # End

    async def close(self, drain_s: float) -> None:
        self._hurry = self._hurry or self._closed.is_set() or drain_s <= 0
        self._closed.set()
        self._called_off.set()
        self._look.set()
        self.wake(everyone=True)
        self._landed()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drained.wait(), max(drain_s, 0.001))
        for flight in self._flights.values():
            if not flight.future.done():
                flight.future.set_exception(PoolClosed("the pool of workers is closed"))
        self._ready = 0
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        remove = loop.run_in_executor(None, self._cluster.remove)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(remove, _START_GRACE_S)
        if self._starting is not None and not self._starting.done():
            # It sees that its application is gone, or that it was called off.
            await asyncio.wait({self._starting}, timeout=_START_GRACE_S)
            await loop.run_in_executor(None, self._cluster.remove)
        if self._starting is not None and self._starting.done():
            self._starting.exception()
        tasks = [flight.task for flight in self._flights.values()]
        if self._handle is not None:
            with contextlib.suppress(Exception):  # only its own upkeep, which ends with Ray too
                await self._handle.shutdown_async()
        if self._watching is not None:
            tasks.append(self._watching)
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_GRACE_S)
            for task in left:
                task.cancel()
        # Outputs that somebody still reads lie in a store that outlives this process: it would
        # give their place to others. At the end of this process nobody reads them.
        if self._lent and not self._cluster.ours:
            log.warning("results are still being sent: the connection to Ray stays until the end")
        else:
            await loop.run_in_executor(None, self._cluster.leave)
        self._threads_of_ray.shutdown(wait=False)


class _Flight:
    """A batch that is on its way: who waits for it, and the task that carries it."""

    def __init__(
        self, future: asyncio.Future[dict[str, np.ndarray]], task: asyncio.Task[None]
    ) -> None:
        self.future = future
        self.task = task


class _RaySlot(Slot):
    """Memory of this process for one batch; `room` is empty once it is given back."""

    def __init__(self, pool: RayPool, room: dict[str, np.ndarray]) -> None:
        super().__init__(room)
        self.room = room
        self.lent = False
        self._pool = pool
        self._through = False

    async def run(self, n: int) -> dict[str, np.ndarray]:
        if self._running or self._through or self._released:
            raise RuntimeError("a slot runs one batch at a time, and none after success or release")
        if not 1 <= n <= self._pool.max_batch:
            raise ValueError(f"{n} rows, expected 1 to {self._pool.max_batch}")
        future = self._pool.fly(self, n)
        self._running = True
        return await future

    def land(self, *, through: bool) -> None:
        """Nobody reads the batch any more."""
        self._running, self._through = False, through
        if self._released:
            self._recycle()

    def _recycle(self) -> None:
        self._pool.recycle(self)


class _Cluster:
    """This process's part in a Ray cluster. Its methods block; they are called in any thread.

    Attributes:
        ours: it was started here, and ends here.
        deployed: the application to remove at the end.
        place: where it is, for people.
    """

    def __init__(self) -> None:
        self.ours = False
        self.deployed: str | None = None
        self.place = "this machine"
        self._joined = False
        self._folders: list[str] = []
        self._lock = threading.Lock()

    def join(self, address: str, layout: Layout, least: int, most: int) -> None:
        """Connect to a cluster, or start one.

        Raises:
            EdgeRuntimeError: there is none, or it may write what it holds to disks.
        """
        # Else Ray answers a SIGTERM to this process with a stack trace.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        if address == "local":
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to Ray's makers
            # Ray asks for a token on its ports, which are open on every address. It would keep
            # one in the user's home.
            if "RAY_AUTH_TOKEN_PATH" not in os.environ:
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        _into_our_log()
        if ray.is_initialized():
            raise RuntimeError("this process is part of a Ray cluster already")
        if address == "local":
            self.ours = True
            self._start(layout, least, most)
        else:
            self.place = address
            self._connect(address)
        self._joined = True
        self._check_spilling()

    def _start(self, layout: Layout, least: int, most: int) -> None:
        import ray

        # With spilling off Ray still puts objects that don't fit its store into files of this
        # folder: in memory, therefore.
        memory = tempfile.mkdtemp(prefix="edge-runtime-ray-", dir="/dev/shm")
        session = tempfile.mkdtemp(prefix="edge-runtime-ray-")
        self._folders = [memory, session]
        store = most * 4 * layout.size * 5 // 4
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, most),
                object_store_memory=max(_LEAST_STORE, store),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_spilling_directory=memory,
                _temp_dir=str(Path(session, "ray")),  # which Ray opens to all users
                _node_ip_address="127.0.0.1",
                _system_config={
                    "automatic_object_spilling_enabled": False,
                    "enable_metrics_collection": False,
                },
            )
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            raise EngineError(f"Ray cannot be started on this machine: {error}") from None

    def _connect(self, address: str) -> None:
        import ray

        host, colon, port = address.rpartition(":")
        try:
            if colon and port.isdecimal():  # Ray would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).strip().split("\n")[0]
            raise EngineError(
                f"no Ray cluster is reached at {address} ({reason}): join this machine to the "
                "cluster with `ray start --address=HOST:6379 --num-cpus=0`, have the same version "
                "of Ray and of Python on all its hosts, or correct the Ray address"
            ) from None

    def _check_spilling(self) -> None:
        """The setting is the head's, for the whole cluster; replicas check their own host."""
        from ray._private.state import state

        try:
            settings = dict(state.get_system_config())
        except Exception as error:  # not part of Ray's stable interface
            raise EngineError(
                f"Ray does not tell whether it writes objects to disks ({type(error).__name__}): "
                "use the version of Ray that edge-runtime names"
            ) from None
        if settings.get("automatic_object_spilling_enabled", True) is not False:
            raise ConfigError(
                f"the Ray cluster at {self.place} writes objects to disks when memory is short, "
                f"and windows of edges' images are never to be on one: {_MEND_SPILLING}"
            )

    def remove(self) -> None:
        """Take the application off the cluster. Never raises."""
        with self._lock:
            name, self.deployed = self.deployed, None
            if name is None:
                return
            from ray import serve

            try:
                serve.delete(name)
            except Exception as error:
                log.error(
                    "the application %s may still be on the Ray cluster (%s): the next start of "
                    "this node replaces it",
                    name,
                    type(error).__name__,
                )

    def leave(self) -> None:
        """Disconnect; end the cluster if it was started here. Never raises."""
        with self._lock:
            if self._joined or self.ours:
                import ray

                try:
                    # Not serve.shutdown() first: what then still listens to Serve's controller
                    # meets a Ray that is gone, which ends the process.
                    ray.shutdown()
                except Exception as error:
                    log.error("leaving Ray failed: %s", type(error).__name__)
            self._joined = self.ours = False
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
            self._folders = []


def _into_our_log() -> None:
    """Have Ray's warnings in this process be lines of the node's log, which may be JSON: the import
    has given Ray a handler of its own."""
    ray = logging.getLogger("ray")
    ray.handlers.clear()
    ray.propagate = True
    ray.setLevel(logging.WARNING)
    # That SIGTERM is left to the node, and that there is a token: both as they are meant to be.
    for name in ("worker", "authentication.authentication_token_setup"):
        logging.getLogger(f"ray._private.{name}").setLevel(logging.ERROR)


def _put(feeds: dict[str, np.ndarray]) -> Any:
    import ray

    return ray.put(feeds)


def _replica_failure(text: str) -> EdgeRuntimeError:
    """What a replica said of why it could not start, out of what Ray says of it."""
    found = _FAILURE.search(text)
    if not found:
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no reason"
        return EngineError(f"replicas on Ray cannot start: {last}")
    kind = getattr(errors, found["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, EdgeRuntimeError)):
        kind = EngineError
    return kind(found["text"])


# What runs on the hosts of the cluster


class Replica:
    """The stack on one device, in a process that Ray Serve starts, watches and replaces.

    Never raises out of :meth:`run`: an exception would be logged and passed on with its traceback.
    """

    def __init__(self, request: wire.Open, hang_s: float) -> None:
        disable_core_dumps()
        host = socket.gethostname()
        try:
            _check_store()
            self._bundle = Bundle.load(request.bundle)
            self._engine, self._kind = wire.open_engine(request, self._bundle)
            rounds = 1 if self._kind == "cpu" else 2  # TensorRT captures graphs on the second
            self._slowest_s = max(
                wire.warm_up(self._engine, self._bundle, rows)
                for _ in range(rounds)
                for rows in sorted({1, request.layout.rows})
            )
        except EdgeRuntimeError as error:
            text = f"on the host {host}: {error}"
            raise RuntimeError(f"<<edge-runtime {type(error).__name__}: {text}>>") from None
        except MemoryError:
            text = f"on the host {host}: there is not enough memory for the engine"
            raise RuntimeError(f"<<edge-runtime EngineError: {text}>>") from None
        self._hang_s = hang_s
        self._began: float | None = None
        self._lock = threading.Lock()  # Serve has one thread for each batch that waits

    def about(self) -> tuple[str, str, int]:
        """What computes here; host and process."""
        return self._kind, socket.gethostname(), os.getpid()

    def run(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int] | str:
        """Outputs and microseconds; or why it failed. Ends the process if it can't go on."""
        with self._lock:
            self._began = time.monotonic()
            try:
                start = time.perf_counter()
                outputs = self._engine.run(feeds)
                seconds = time.perf_counter() - start
                self._slowest_s = max(self._slowest_s, seconds)
                return outputs, round(seconds * 1e6)
            except Exception as error:
                known = isinstance(error, EdgeRuntimeError)
                text = str(error) if known else f"{type(error).__name__} in the engine"
                try:  # a GPU may be unusable from now on
                    wire.warm_up(self._engine, self._bundle, 1)
                except Exception:
                    os._exit(1)
                return text[:2000]
            finally:
                self._began = None

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that fails this three times in a row."""
        began = self._began
        longest = max(self._hang_s, _HANG_FACTOR * self._slowest_s)
        if began is not None and time.monotonic() - began > longest:
            raise RuntimeError(f"hung: no result within {longest:.0f} s")


def _check_store(read: Callable[[Path], str] = lambda path: path.read_text()) -> None:
    """Refuse a host whose object store may lie on a disk.

    The raylet, parent of every process that Ray starts, was told where to.

    Raises:
        ConfigError: it does, or that can't be seen.
    """
    told = dict(
        argument.lstrip("-").partition("=")[::2]
        for argument in read(Path(f"/proc/{os.getppid()}/cmdline")).split("\0")
    )
    mounts = [line.split()[1:3] for line in read(Path("/proc/self/mounts")).splitlines()]
    for name in ("plasma_directory", "fallback_directory"):
        folder = told.get(name)
        if folder is None:
            raise ConfigError(
                f"Ray does not tell its {name}, so it may be on a disk: use the version of Ray "
                "that edge-runtime names"
            )
        path = Path(os.path.realpath(folder))
        over = [m for m in mounts if path == Path(m[0]) or Path(m[0]) in path.parents]
        kind = max(over, key=lambda m: len(m[0]))[1] if over else "no file system"
        if kind not in _IN_MEMORY:
            raise ConfigError(
                f"Ray keeps objects in {folder} ({kind}) when memory is short, expected a folder "
                f"in memory, as windows of edges' images are never to be on a disk: "
                f"{_MEND_SPILLING}"
            )
