"""Workers on several machines: the stack as an application of Ray Serve.

Serve places the replicas on the hosts of a Ray cluster, checks their health, replaces them, and
scales with the load. Its HTTP front is not used. Ray may write objects to disk, so tensors are
encrypted before Ray gets them; docs/ray.md describes what this protects.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloud_node.pool import (
    HANG_FACTOR,
    OnEvent,
    Outputs,
    PoolClosed,
    QueuedPool,
    QueuedSlot,
    Slot,
    WorkerDied,
    WorkerEvent,
)
from cloud_node.worker import WarmEngine
from cloud_node.worker_messages import Failed, Open
from edge_common.errors import ConfigError, EdgeRuntimeError, EngineError
from edge_common.process import disable_core_dumps
from engines.bundle import Bundle, Tensors
from engines.engine import Device

log = logging.getLogger(__name__)

_DEPLOYMENT = "stack"
_POLL_S = 0.5
_HEALTH_PERIOD_S = 2.0
_GRACE_S = 5.0
"""Time for Ray to end idle replicas."""

_CONNECT_S = 10.0
_START_GRACE_S = 60.0
"""Time for a start in progress to notice that the pool is closed."""

_TARGET_LOAD = 0.6
"""Autoscaling aims at this share of the batches that a replica may be given."""
_AUTOSCALING: dict[str, float] = {"upscale_delay_s": 15.0, "downscale_delay_s": 300.0}
_MIN_STORE = 80 << 20
"""Ray refuses smaller object stores."""

Sealed = dict[str, tuple[str, tuple[int, ...], bytes, np.ndarray]]
"""Encrypted tensors by name: dtype, shape, nonce, and bytes as an array: Ray copies no arrays."""


def seal(tensors: Mapping[str, np.ndarray], key: bytes, *, result: bool) -> Sealed:
    """Encrypt tensors with AES-GCM.

    Args:
        key: for one batch and its result only.
        result: whether these are the outputs, so that neither passes for the other.
    """
    cipher, sealed = AESGCM(key), Sealed()
    for name, array in tensors.items():
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        dtype, nonce = array.dtype.str, secrets.token_bytes(12)
        data = cipher.encrypt(nonce, content, _header(name, dtype, array.shape, result))
        sealed[name] = dtype, array.shape, nonce, np.frombuffer(data, np.uint8)
    return sealed


def unseal(sealed: Sealed, key: bytes, *, result: bool) -> dict[str, np.ndarray]:
    """The tensors again, read-only.

    Raises:
        ValueError: they are not what was sealed with this key.
    """
    cipher, tensors = AESGCM(key), {}
    for name, (dtype, shape, nonce, data) in sealed.items():
        try:
            content = cipher.decrypt(nonce, data.data, _header(name, dtype, shape, result))
        except InvalidTag:
            raise ValueError("sealed tensors were changed") from None
        tensors[name] = np.frombuffer(content, dtype).reshape(shape)
    return tensors


def _header(name: str, dtype: str, shape: tuple[int, ...], result: bool) -> bytes:
    return f"{name} {dtype} {shape} {result}".encode()


class RayPool(QueuedPool):
    """Replicas of a stack on a Ray cluster.

    Use one per process: Ray may crash in a process that joins a cluster again.

    The bundle must be at the same path on every host that may run a replica, and edge-runtime and
    Ray must be installed there in the same versions.

    Args:
        bundle, max_batch: see :class:`QueuedPool`.
        address: ``auto``: the cluster that this machine belongs to; ``HOST:PORT``: the same, by the
            address of its head; ``local``: start one on this machine that ends with the pool.
        device: see :data:`engines.engine.Device`. Each replica gets one GPU unless it is ``cpu``,
            or ``auto`` on a cluster without GPUs.
        replicas: how many; two numbers are the limits between which Ray scales.
        threads: CPU threads of each replica, which are reserved with Ray. None reserves one and
            uses all cores.
        hang_s: a replica that computes for this long is replaced, unless this is less than ten
            times its slowest run so far.
        start_s: how long the start may take, on all hosts together.
        name: of the application in Ray Serve; None: made of this host's name and the stack. It
            replaces an application of that name, which a killed front may have left behind.

    Attributes:
        lanes: replicas that run now, but at least the lower limit.
        name: see above.

    Raises:
        EdgeRuntimeError: the bundle or the settings cannot be used, or Ray is not installed.
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
        super().__init__(bundle, threads, max_batch)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "workers on Ray were asked for, but Ray is not installed",
                mend="`pip install 'ray[serve]'`, or serve with local workers",
                code="not_installed",
            )
        if address.startswith("ray://"):
            raise ConfigError(
                f"Ray address {address!r}, expected auto, local or HOST:PORT: a node must be a "
                "host of the cluster",
                mend="join this machine to it with `ray start --address=HOST:6379 --num-cpus=0`, "
                "then use auto",
            )
        least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
        if not 1 <= least <= most:
            raise ConfigError(
                f"replicas {least} to {most}, expected at least 1, the smaller number first"
            )
        self._request = self._open_message(device, 1)
        _ = self._request.layout.size  # refuses a stack whose rows have no fixed size
        self.lanes = least
        self.name = name or f"edge-runtime-{socket.gethostname()}-{self._request.stage[:12]}"
        self._outputs: Tensors = self._request.layout.outputs
        self._address, self._device = address, device
        self._least, self._most = least, most
        self._hang_s, self._start_s = hang_s, start_s
        self._depth = 1
        self._computes_on = ""
        self._handle: Any = None
        self._cluster = _Cluster()
        self._ready = self._restarts = 0
        self._slots: set[_RaySlot] = set()  # given out, and without outputs
        self._pending: dict[asyncio.Task[None], asyncio.Future[Outputs]] = {}
        self._poll = asyncio.Event()
        self._called_off = threading.Event()
        self._starting: asyncio.Future[str] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._threads_of_ray = ThreadPoolExecutor(4, thread_name_prefix="ray")

    @property
    def ready(self) -> int:
        return self._ready

    # Start

    async def start(self, on_event: OnEvent) -> None:
        self._begin(on_event)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for lane in range(self._least):
            self._report("started", lane)
        try:
            # Not in the main thread, where Ray would replace the signal handlers.
            self._starting = loop.run_in_executor(None, self._deploy)
            done, _ = await asyncio.wait({self._starting}, timeout=self._start_s)
            if not done:
                raise EngineError(
                    f"the {self._least} replicas on Ray were not ready within {self._start_s:g} s",
                    mend="`ray status` shows whether hosts or GPUs are missing, and the logs of "
                    "Ray Serve on its hosts show what they are doing",
                )
            self._depth = 1 if self._starting.result() == "cpu" else 2
        except BaseException:
            await self.close(0)
            raise
        if self.closed.is_set():
            raise PoolClosed("the pool of workers was closed while it started")
        self._computes_on = f"{self._starting.result()} of {self._cluster.place}"
        self._set_ready(self._least, loop.time() - began)
        self._watching = loop.create_task(self._watch(), name="replicas")

    def _deploy(self) -> str:
        """Connect, deploy and wait for every replica; returns what they compute on."""
        self._cluster.join(self._address, self._request.layout.size, self._most)
        if self._called_off.is_set():
            raise PoolClosed("the pool of workers was closed while it started")
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the import set it to INFO
        gpus = self._gpus()
        depth = 2 if gpus else 1
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        scale: dict[str, Any] = {"num_replicas": self._least}
        if self._most > self._least:
            scale = {
                "autoscaling_config": {
                    "min_replicas": self._least,
                    "max_replicas": self._most,
                    "target_ongoing_requests": _TARGET_LOAD * depth,
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
            max_constructor_retry_count=1,  # a first start that fails needs a person
            logging_config=quiet,
            **scale,
        )
        failures: Any = ray.remote(num_cpus=0)(Failures).remote()
        try:
            serve.start(proxy_location="Disabled", logging_config=quiet)
            if self.name in serve.status().applications:
                log.warning("the application %s is on the cluster already: replaced", self.name)
            self._cluster.deployed = self.name
            application = stack.bind(self._request, self._hang_s, failures)
            self._handle = serve.run(application, name=self.name, route_prefix=None)
            kind, _, _ = self._handle.about.remote().result(timeout_s=self._start_s)
        except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            with contextlib.suppress(ray.exceptions.RayError):
                if failed := ray.get(failures.first.remote(), timeout=_CONNECT_S):
                    raise failed[1].error().within(f"on the host {failed[0]}") from None
            lines = str(error).split("\n")
            raise EngineError(
                f"replicas on Ray cannot start: {lines[0].strip() or type(error).__name__}",
                mend="read the logs of Ray Serve on the hosts",
            ) from None
        return str(kind)

    def _gpus(self) -> int:
        """GPUs of each replica.

        Raises:
            EngineError: the cluster has too few.
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
                    f"Ray cluster at {self._cluster.place} has {have.get(kind, 0):g}",
                    mend="join more hosts with `ray start`, or ask for fewer replicas, fewer "
                    "threads or another device",
                )
        return gpus

    # Replicas

    async def follow(self) -> None:
        if self._watching is not None:
            await asyncio.wait({self._watching})
            self._watching.result()

    async def _watch(self) -> None:
        """Follow the number of replicas until the pool is closed."""
        loop = asyncio.get_running_loop()
        failing = False
        while not self.closed.is_set():
            self._poll.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._poll.wait(), _POLL_S)
            try:
                running = await loop.run_in_executor(self._threads_of_ray, self._running)
            except Exception as error:
                if not failing:
                    log.error("Ray Serve gives no status of its replicas: %s", type(error).__name__)
                failing = True
                continue
            failing = False
            if not self.closed.is_set():
                self._set_ready(running)
            if self._poll.is_set():  # Serve's controller has other work: ask it less often
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
            self._report("ready", lane, seconds, self._computes_on)
        for lane in reversed(range(now, before)):
            if lane < self._least:
                self._restarts += 1
                log.error("a replica of %s is gone; Ray replaces it", self.name)
                self._report("died", lane, text="Ray Serve no longer counts it, and replaces it")
            else:
                log.info("a replica of %s is gone", self.name)
                self._report("stopped", lane)
        self.wake((now - before) * self._depth)

    def _report(
        self,
        kind: Literal["started", "ready", "died", "stopped"],
        lane: int,
        seconds: float = 0.0,
        text: str = "",
    ) -> None:
        device, restarts = self._device, self._restarts
        self.report(WorkerEvent(kind, lane, device, restarts, seconds=seconds, text=text))

    # Batches

    def _free_slot(self) -> Slot | None:
        if len(self._slots) >= self._ready * self._depth:
            return None
        inputs = {
            spec.name: np.zeros((self.max_batch, *map(int, spec.shape[1:])), spec.numpy_dtype)
            for spec in self._request.layout.inputs
        }
        slot = _RaySlot(self, inputs)
        self._slots.add(slot)
        return slot

    @property
    def _runs(self) -> int:
        return len(self._pending)

    def send(self, slot: _RaySlot, inputs: dict[str, np.ndarray]) -> asyncio.Future[Outputs]:
        """Have a replica run a batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outputs] = loop.create_future()
        task = loop.create_task(self._run(slot, inputs, future))
        self._pending[task] = future
        return future

    async def _run(
        self, slot: _RaySlot, inputs: dict[str, np.ndarray], future: asyncio.Future[Outputs]
    ) -> None:
        outputs: Outputs = {}
        failure: Exception | None = None
        try:
            outputs, slot.compute_us = await self._ask(inputs)
        except WorkerDied as error:
            self._poll.set()
            failure = PoolClosed() if self.closed.is_set() else error
        except EdgeRuntimeError as error:
            failure = error
        except Exception as error:  # a defect, here or in Ray, must leave no caller waiting
            log.exception("a run on Ray failed in an unknown way")
            failure = EngineError(f"{type(error).__name__} in the pool of replicas")
        task = asyncio.current_task()
        assert task is not None
        del self._pending[task]
        slot.ended(succeeded=failure is None)
        if not future.done():
            if failure is None:
                future.set_result(outputs)
            else:
                future.set_exception(failure)
        if failure is None:
            self.forget(slot)
        self.run_ended()

    async def _ask(self, inputs: dict[str, np.ndarray]) -> tuple[Outputs, int]:
        """Have one replica run a batch; returns its outputs and microseconds.

        Raises:
            EngineError: it ran and failed.
            WorkerDied: the replica did not survive.
        """
        from ray import exceptions

        rows = len(next(iter(inputs.values())))
        key = secrets.token_bytes(16)
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            batch = await in_thread(self._threads_of_ray, _put, inputs, key)
            answer = await self._handle.run.remote(batch, key)
        except exceptions.RayTaskError as error:
            kind = type(error.cause).__name__ if error.cause is not None else "an error"
            raise EngineError(f"{kind} in a replica on Ray") from None
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError):
            raise EngineError(
                "Ray's object store on this host is full",
                mend="give `ray start` a greater --object-store-memory, or lower max_batch",
                code="out_of_memory",
            ) from None
        except exceptions.RayError as error:
            raise WorkerDied(
                f"a replica on Ray died: the batch is lost ({type(error).__name__})"
            ) from None
        except Exception as error:
            if type(error).__module__.startswith("ray.serve"):  # no replica was there
                raise WorkerDied(f"no replica on Ray took it ({type(error).__name__})") from None
            raise
        if isinstance(answer, Failed):
            raise answer.error()
        sealed, compute_us = answer
        try:
            outputs = await in_thread(self._threads_of_ray, _open, sealed, key)
        except ValueError as error:
            raise EngineError(f"a replica on Ray returned another form: {error}") from None
        for spec in self._outputs:
            found = outputs.get(spec.name)
            expected = spec.numpy_dtype, (rows, *spec.shape[1:])
            if found is None or (found.dtype, found.shape) != expected:
                raise EngineError(f"a replica on Ray returned {spec.name} in another form")
        return outputs, compute_us

    def forget(self, slot: _RaySlot) -> None:
        """A slot has its outputs or was released: there is room for another one."""
        if slot in self._slots:
            self._slots.discard(slot)
            self.wake()

    # End

    async def close(self, drain_s: float) -> None:
        self._called_off.set()
        self._poll.set()
        await self._end_runs(drain_s)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(PoolClosed())
        self._ready = 0
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        in_thread = asyncio.get_running_loop().run_in_executor
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(in_thread(None, self._cluster.remove), _START_GRACE_S)
        if self._starting is not None:
            if not self._starting.done():
                # The starting task notices its cancellation, or that its application has ended.
                await asyncio.wait({self._starting}, timeout=_START_GRACE_S)
                await in_thread(None, self._cluster.remove)
            if self._starting.done():
                self._starting.exception()
        if self._handle is not None:
            with contextlib.suppress(Exception):  # only its own cleaning up
                await self._handle.shutdown_async()
        if tasks := [*self._pending, *([self._watching] if self._watching else [])]:
            _, left = await asyncio.wait(tasks, timeout=_GRACE_S)
            for task in left:
                task.cancel()
        await in_thread(None, self._cluster.leave)
        self._threads_of_ray.shutdown(wait=False)


class _RaySlot(QueuedSlot):
    """Memory of this process for one batch."""

    def __init__(self, pool: RayPool, inputs: dict[str, np.ndarray]) -> None:
        super().__init__(inputs)
        self._pool = pool

    def _check(self) -> None:
        if self._pool.closed.is_set():
            raise PoolClosed

    def _send(self, n: int) -> asyncio.Future[Outputs]:
        return self._pool.send(self, {name: array[:n] for name, array in self.inputs.items()})

    def _recycle(self) -> None:
        self._pool.forget(self)


class _Cluster:
    """This process's part in a Ray cluster. The methods block; call them in any thread.

    Attributes:
        ours: it was started here, and ends here.
        deployed: the application to remove at the end.
        place: where it is, for people.
    """

    def __init__(self) -> None:
        self.ours = False
        self.deployed: str | None = None
        self.place = "this machine"
        self._folder: str | None = None
        self._joined = False
        self._lock = threading.Lock()

    def join(self, address: str, batch_bytes: int, most: int) -> None:
        """Connect to a cluster, or start one for `most` replicas.

        Raises:
            EdgeRuntimeError: that failed.
        """
        # Otherwise Ray answers a SIGTERM to this process with a stack trace.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        if address == "local":
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # send nothing to Ray's makers
            # Ray's ports are open on all addresses of this machine, and ask for a token. Given one
            # in the environment, Ray does not store one in the user's home.
            if "RAY_AUTH_TOKEN_PATH" not in os.environ:
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        # The import makes Ray install its own handler, but the node's log may be JSON.
        logger = logging.getLogger("ray")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.ERROR)
        if ray.is_initialized():
            raise RuntimeError("this process is part of a Ray cluster already")
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            if address == "local":
                self.ours = True
                self._folder = tempfile.mkdtemp(prefix="edge-runtime-ray-")
                options |= {
                    "num_cpus": max(os.cpu_count() or 1, most),
                    "object_store_memory": max(_MIN_STORE, most * 5 * batch_bytes),
                    "include_dashboard": False,
                    "_temp_dir": str(Path(self._folder, "ray")),  # Ray opens it to all users
                }
            else:
                self.place = address
                host, colon, port = address.rpartition(":")
                if colon and port.isdecimal():  # Ray would try for minutes
                    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
            ray.init(address=address, **options)
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).strip().split("\n")[0]
            if self.ours:
                raise EngineError(f"Ray cannot be started on this machine: {reason}") from None
            raise EngineError(
                f"no Ray cluster is reached at {address} ({reason})",
                mend="join this machine to the cluster with `ray start --address=HOST:6379 "
                "--num-cpus=0`, have the same version of Ray and of Python on all its hosts, or "
                "correct the Ray address",
            ) from None
        self._joined = True

    def remove(self) -> None:
        """Remove the application from the cluster. Never raises."""
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
                    # Do not call serve.shutdown() first: threads that still listen to Serve's
                    # controller would lose Ray and end this process.
                    ray.shutdown()
                except Exception as error:
                    log.error("leaving Ray failed: %s", type(error).__name__)
            self._joined = self.ours = False
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None


def _put(inputs: dict[str, np.ndarray], key: bytes) -> Any:
    """Put a batch into Ray's object store."""
    import ray

    return ray.put(seal(inputs, key, result=False))


def _open(sealed: Sealed, key: bytes) -> Outputs:
    return unseal(sealed, key, result=True)


# The code that runs on the hosts of the cluster


class Failures:
    """An actor that keeps why replicas could not start."""

    def __init__(self) -> None:
        self._failures: list[tuple[str, Failed]] = []

    def add(self, host: str, failed: Failed) -> None:
        self._failures.append((host, failed))

    def first(self) -> tuple[str, Failed] | None:
        return self._failures[0] if self._failures else None


class Replica:
    """The stack on one device, in a process that Ray Serve starts, watches and replaces.

    Args:
        failures: the actor to which a failed start is reported.
    """

    def __init__(self, request: Open, hang_s: float, failures: Any = None) -> None:
        disable_core_dumps()
        try:
            self._engine = WarmEngine(request)
        except EdgeRuntimeError as error:
            if failures is not None:
                import ray

                with contextlib.suppress(ray.exceptions.RayError):  # the front has ended
                    failed = Failed.of(error)
                    ray.get(failures.add.remote(socket.gethostname(), failed), timeout=_CONNECT_S)
            raise RuntimeError(f"the engine cannot be opened: {error}") from None
        self._hang_s = hang_s
        self._began: float | None = None
        self._lock = threading.Lock()  # Serve has a thread for each batch that waits

    def about(self) -> tuple[str, str, int]:
        """The kind of engine, the host and the process."""
        return self._engine.kind, socket.gethostname(), os.getpid()

    def run(self, batch: Sealed, key: bytes) -> tuple[Sealed, int] | Failed:
        """Outputs and microseconds; or why the batch failed. Ends the process if it is unusable.

        Never raises, because Ray would log an exception with its traceback.
        """
        with self._lock:
            self._began = time.monotonic()
            try:
                outputs, compute_us = self._engine.run(unseal(batch, key, result=False))
                return seal(outputs, key, result=True), compute_us
            except EngineError as error:
                if not self._engine.works():
                    os._exit(1)
                return Failed.of(error)
            except Exception as error:
                return Failed("EngineError", f"{type(error).__name__} in a replica")
            finally:
                self._began = None

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica after three failures in a row."""
        began = self._began
        longest = max(self._hang_s, HANG_FACTOR * self._engine.slowest_s)
        if began is not None and time.monotonic() - began > longest:
            raise RuntimeError(f"hung: no result within {longest:.0f} s")
