"""The engine on TensorRT and TensorRT-RTX: one plan, opened on one GPU.

:mod:`engines.selection` decides which plan may serve. :mod:`engines.libraries` handles differences
between the libraries.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from edge_common.errors import EngineError, PlanError
from edge_common.text import one_line
from engines import cuda, libraries
from engines.bundle import TensorSpec
from engines.engine import Engine, check_feeds, check_out
from engines.libraries import Library
from engines.plan import Plan

_logger = logging.getLogger(__name__)

# Causes from engines.libraries.invalidity that building again removes. The others lie in driver,
# GPU and memory.
_REBUILD_HELPS = {"version mismatch", "unsupported cc", "malformed engine"}
# Each holds an execution context. Stages see few different shapes.
_MAX_GRAPHS = 8

_Shapes = Mapping[str, tuple[int, ...]]
_T = TypeVar("_T")


class TrtEngine(Engine):
    """One plan, opened on one GPU. Threads may share it; it serves them one after the other.

    Opening allocates buffers and working memory for the greatest shapes of the plan; :meth:`close`
    frees them. Engines may be closed in any order. A batch larger than the plan allows runs in
    parts. A shape that occurs again is captured as a CUDA graph, if cuda-python is installed and
    there is enough memory. Errors contain the library's own message.

    Args:
        plan: accepted by :func:`engines.plan.check` for this GPU and library.
        library: the library that built it.
        ordinal: number of the GPU.
        graphs: whether to use CUDA graphs; None uses them if cuda-python is installed.

    Attributes:
        notes: facts that matter to its times, such as why there are no CUDA graphs.

    Raises:
        PlanError: the plan is damaged, or the library refuses it.
        EngineError: there is no GPU, no pycuda or too little memory, or graphs were asked for and
            cannot be used.
    """

    def __init__(
        self, plan: Plan, library: Library, *, ordinal: int = 0, graphs: bool | None = None
    ) -> None:
        self._open(_Loaded(plan, library, ordinal), graphs)

    def _open(self, loaded: _Loaded, graphs: bool | None) -> None:
        """Take over one use of ``loaded``."""
        record = loaded.plan.record
        self.inputs, self.outputs = record.inputs, record.outputs
        self.notes: list[str] = []
        self._loaded = loaded
        self._graphs = graphs
        self._batch = _batch(self.inputs, self.outputs)
        # Reentrant, because releasing takes it too: when the process ends, other threads may be in
        # the middle of a run.
        self._lock = threading.RLock()
        self._worker = _Worker(loaded, graphs, self.notes, self._lock)
        # This also releases engines that were not closed, and at the end of the process.
        self._release = weakref.finalize(self, self._worker.release)

    def another(self) -> TrtEngine:
        """An engine of the same plan for another thread. They share the weights and nothing else.

        Raises:
            EngineError: there is too little memory, or this engine was closed.
        """
        with self._lock:
            self._check_open()
            self._loaded.retain()
        engine = TrtEngine.__new__(TrtEngine)
        engine._open(self._loaded, self._graphs)
        return engine

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        with self._lock:
            self._check_open()
            dims = check_feeds(self.inputs, feeds)
            if out is None:
                out = self._room(dims)
            else:
                check_out(self.outputs, dims, out)
            for rows, part, sizes in self._parts(feeds, dims):
                self._worker.run(part, sizes, {n: a[rows] for n, a in out.items()})
        return {spec.name: out[spec.name] for spec in self.outputs}

    def device_times(self, feeds: Mapping[str, np.ndarray], warmup: int, runs: int) -> list[float]:
        """Milliseconds that the GPU takes for the plan, by CUDA events, once per run.

        Copies to and from the GPU are left out. From the third run of a shape on, the CUDA graph is
        timed if :meth:`run` would use one, so warm up at least twice.

        Args:
            feeds: as for :meth:`run`, but no larger than the plan allows at once.
            warmup: runs that are not timed, before the others.

        Raises:
            EngineError: as :meth:`run`.
        """
        with self._lock:
            self._check_open()
            dims = check_feeds(self.inputs, feeds)
            self._check_limits(dims)
            for _ in range(warmup):
                self._worker.run(feeds, dims, self._room(dims))
            return self._worker.times(feeds, dims, runs)

    def close(self) -> None:
        self._release()

    def _room(self, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {s.name: np.empty(_shape(s, dims), s.numpy_dtype) for s in self.outputs}

    def _check_open(self) -> None:
        if not self._release.alive:
            raise EngineError(f"{self._loaded.plan.path.name} was closed")

    def _check_limits(self, dims: Mapping[str, int]) -> None:
        for name, size in dims.items():
            least, greatest = self._loaded.limits[name]
            if not least <= size <= greatest:
                plan = self._loaded.plan
                raise EngineError(
                    f"{name} is {size}, but {plan.path} was built for {least} to {greatest}",
                    mend="use a size in that range, or ONNX Runtime",
                )

    def _parts(
        self, feeds: Mapping[str, np.ndarray], dims: dict[str, int]
    ) -> Iterator[tuple[Any, Mapping[str, np.ndarray], dict[str, int]]]:
        """Cut feeds along the batch into nearly equal parts that the plan accepts.

        Yields the rows of the outputs (``...`` for all), the feeds and the sizes of each part.
        """
        batch = self._batch
        count = math.ceil(dims[batch] / self._loaded.limits[batch][1]) if batch else 1
        if batch is None or count <= 1:
            self._check_limits(dims)
            yield ..., feeds, dims
            return
        cut = {spec.name for spec in self.inputs if spec.shape[:1] == (batch,)}
        edges = [dims[batch] * part // count for part in range(count + 1)]
        for start, stop in pairwise(edges):
            sizes = {**dims, batch: stop - start}
            self._check_limits(sizes)
            part = {n: a[start:stop] if n in cut else a for n, a in feeds.items()}
            yield slice(start, stop), part, sizes


class _Loaded:
    """A plan loaded into the library, shared by the engines of :meth:`TrtEngine.another`.

    It counts its users, the first included; the last :meth:`release` frees it.
    """

    def __init__(self, plan: Plan, library: Library, ordinal: int) -> None:
        data = plan.read()
        self.plan = plan
        self.library = library
        self.cuda = cuda.context(ordinal)
        self.log = _log(library)
        self._users = 1
        self._lock = threading.RLock()  # garbage collection may call release inside retain
        with self.cuda.active():
            self._runtime: Any = self._attempt(lambda: library.module.Runtime(self.log))
            if self._runtime is None:
                raise EngineError(f"{library.name} does not start here{self.log.said()}")
            try:
                self.engine: Any = self._deserialise(data)
                self.limits = self._check()
            except BaseException:
                self.engine = self._runtime = None
                raise

    def _attempt(self, call: Callable[[], _T]) -> _T | None:
        """The result of a call into the library; None if it raised, which is logged."""
        self.log.forget()
        try:
            return call()
        except Exception as error:
            self.log.log(self.log.ERROR, str(error))
            return None

    def _deserialise(self, data: bytes) -> Any:
        causes = libraries.invalidity(self.library, self._runtime, data)
        engine = None
        if causes is None:
            engine = self._attempt(lambda: self._runtime.deserialize_cuda_engine(data))
        if engine is not None:
            return engine
        if causes is None and self.cuda.free_bytes()[0] < len(data):
            # The library does not report this reliably.
            raise self.cuda.no_memory(len(data), f"the plan {self.plan.path}")
        mend = self.plan.rebuild
        if causes is not None and _REBUILD_HELPS.isdisjoint(causes):
            mend = "`edge-runtime doctor` checks GPU and driver: building it again would not help"
        raise PlanError(
            f"{self.library.name} refuses {self.plan.path}"
            f"{': ' + ', '.join(causes) if causes else self.log.said()}",
            mend=mend,
        )

    def _check(self) -> dict[str, tuple[int, int]]:
        """Least and greatest size of every dynamic dimension.

        Raises:
            PlanError: the engine contradicts the record.
        """
        record = self.plan.record
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        said = {spec.name for spec in (*record.inputs, *record.outputs)}
        if names != said:
            raise self._contradiction(f"tensors {', '.join(sorted(names))}", ", ".join(said))
        limits: dict[str, tuple[int, int]] = {}
        for specs, mode in ((record.inputs, "INPUT"), (record.outputs, "OUTPUT")):
            for spec in specs:
                found = self._describe(spec.name)
                shape = tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
                if found != (expected := f"{mode} DEVICE {spec.dtype} {shape}"):
                    raise self._contradiction(f"{spec.name} as {found}", expected)
        for spec in record.inputs:
            if all(isinstance(dim, int) for dim in spec.shape):
                continue
            least, _, greatest = self.engine.get_tensor_profile_shape(spec.name, 0)
            for dim, low, high in zip(spec.shape, least, greatest, strict=True):
                if isinstance(dim, str):
                    before = limits.get(dim, (low, high))
                    limits[dim] = max(low, before[0]), min(high, before[1])
        for spec in record.outputs:
            for dim in spec.shape:
                if isinstance(dim, str) and dim not in limits:
                    raise self._contradiction(f"{spec.name} of a size {dim} of its own", "none")
        return limits

    def _describe(self, name: str) -> str:
        engine = self.engine
        dtype = libraries.DTYPES.get(engine.get_tensor_dtype(name).name, "unknown")
        where = f"{engine.get_tensor_mode(name).name} {engine.get_tensor_location(name).name}"
        return f"{where} {dtype} {tuple(engine.get_tensor_shape(name))}"

    def _contradiction(self, found: str, expected: str) -> PlanError:
        return PlanError(
            f"{self.plan.path} has {found}, but its record says {expected}", mend=self.plan.rebuild
        )

    def retain(self) -> None:
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Call it inside ``cuda.active()``."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.engine = None
                self._runtime = None

    def new_context(self, buffers: Mapping[str, cuda.Buffer], memory: Any, size: int) -> Any:
        """An execution context that uses ``buffers`` and ``memory``."""
        with self._lock:
            context = self._attempt(lambda: libraries.make_context(self.library, self.engine))
        if context is None:
            raise self.failed("made no execution context")
        self.log.forget()
        try:
            if size:
                libraries.give_memory(context, int(memory), size)
            for name, buffer in buffers.items():
                if not context.set_tensor_address(name, buffer.address):
                    raise self.failed(f"refuses the memory for {name}")
            return context
        finally:
            del context  # otherwise an error's traceback could keep it beyond the engine's end

    def failed(self, what: str) -> EngineError:
        """An error with the library's own message."""
        return EngineError(
            f"{self.library.name} {what} ({self.plan.path.name}){self.log.said()}",
            mend="look for an earlier error in the log, or use ONNX Runtime",
        )


@dataclass
class _Ready:
    """An execution context whose shapes are set, and the graph captured from it, if any.

    Contexts are only referenced through this object, so that :meth:`drop` frees them. Otherwise an
    error's traceback could keep one longer than the engine it belongs to.
    """

    context: Any
    graph: cuda.Graph | None = None

    def drop(self) -> None:
        self.context = None
        if self.graph is not None:
            self.graph.free()
            self.graph = None


class _Worker:
    """A stream, its buffers and execution contexts. The caller must hold ``lock``."""

    def __init__(
        self, loaded: _Loaded, graphs: bool | None, notes: list[str], lock: threading.RLock
    ) -> None:
        record = loaded.plan.record
        self._loaded = loaded
        self._cuda = loaded.cuda
        self._inputs, self._outputs = record.inputs, record.outputs
        self._notes = notes
        self._lock = lock
        self._graph_driver: Any = None
        self._ready: OrderedDict[tuple[int, ...], _Ready] = OrderedDict()
        self._runs: dict[tuple[int, ...], int] = {}
        self._set: tuple[int, ...] | None = None  # the shapes that the main context is set to
        self._buffers: dict[str, cuda.Buffer] = {}
        self._stream: Any = None
        self._stack = ExitStack()
        try:
            if graphs is not False:
                self._find_graphs(required=graphs is True)
            with self._cuda.active():
                self._allocate()
        except BaseException:
            self.release()
            raise

    def _find_graphs(self, *, required: bool) -> None:
        self._graph_driver = cuda.graph_driver()
        if self._graph_driver is None:
            command = "pip install cuda-python"
            if required:
                raise EngineError(
                    "CUDA graphs were asked for, but cuda-python is not installed",
                    mend=command,
                    code="not_installed",
                )
            self._notes.append(f"no CUDA graphs: cuda-python is not installed: `{command}`")

    def _allocate(self) -> None:
        loaded, stage = self._loaded, self._loaded.plan.record.stage
        self._stream = self._cuda.stream()
        self._stack.callback(self._stream.free)
        for side, specs in (("input", self._inputs), ("output", self._outputs)):
            for spec in specs:
                greatest = _shape(spec, {name: high for name, (_, high) in loaded.limits.items()})
                what = f"{side} {spec.name} of the {stage}"
                buffer = cuda.Buffer(self._cuda, _size(spec, greatest), what)
                self._stack.callback(buffer.free)
                self._buffers[spec.name] = buffer
        self._size = libraries.device_memory(loaded.library, loaded.engine)
        self._memory = self._cuda.allocate(self._size, f"the {stage}'s working memory")
        self._stack.callback(self._memory.free)
        self._main = self._new_context()
        self._stack.callback(self._main.drop)

    def _new_context(self) -> _Ready:
        return _Ready(self._loaded.new_context(self._buffers, self._memory, self._size))

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        dims: Mapping[str, int],
        out: Mapping[str, np.ndarray],
    ) -> None:
        """Run the plan once on ``feeds``, whose sizes ``dims`` fit its limits, into ``out``."""
        with self._cuda.active():
            self._run(feeds, dims, out)

    def _run(
        self,
        feeds: Mapping[str, np.ndarray],
        dims: Mapping[str, int],
        out: Mapping[str, np.ndarray],
    ) -> None:
        self._loaded.log.forget()
        key, shapes = tuple(dims.values()), self._shapes(dims)
        ready = self._prepare(key, shapes)
        with self._settled():
            self._upload(feeds)
            self._enqueue(ready)
            for spec in self._outputs:
                size = _size(spec, shapes[spec.name])
                self._buffers[spec.name].download(size, self._stream)
        for spec in self._outputs:  # the next run overwrites the buffers
            np.copyto(out[spec.name], self._view(spec, shapes[spec.name]))
        self._runs[key] = self._runs.get(key, 0) + 1
        if key in self._ready and ready.graph is None:
            self._capture(key, ready)

    def times(
        self, feeds: Mapping[str, np.ndarray], dims: Mapping[str, int], runs: int
    ) -> list[float]:
        """Milliseconds of ``runs`` runs on the same feeds, copies left out."""
        with self._cuda.active():
            self._loaded.log.forget()
            ready = self._prepare(tuple(dims.values()), self._shapes(dims))
            with self._settled():
                self._upload(feeds)
            return [self._time(ready) for _ in range(runs)]

    def _time(self, ready: _Ready) -> float:
        with cuda.Timer(self._cuda, self._stream) as timer:
            with self._settled():
                timer.start()
                self._enqueue(ready)
                timer.stop()
            return timer.milliseconds()

    def _shapes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {spec.name: _shape(spec, dims) for spec in (*self._inputs, *self._outputs)}

    def _prepare(self, key: tuple[int, ...], shapes: _Shapes) -> _Ready:
        """The context to run these shapes. From their second run on it is their own, for a graph.

        A context with a graph keeps its shapes, because the graph may read data of the library that
        depends on them.
        """
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        if self._graph_driver is not None and self._runs.get(key):
            try:
                while len(self._ready) >= _MAX_GRAPHS:
                    self._ready.popitem(last=False)[1].drop()
                self._ready[key] = self._new_context()
                self._set_shapes(self._ready[key], shapes)
                return self._ready[key]
            except EngineError as error:
                self._no_graphs(key, str(error))
        if self._set != key:
            self._set = None
            self._set_shapes(self._main, shapes)
            self._set = key
        return self._main

    def _set_shapes(self, ready: _Ready, shapes: _Shapes) -> None:
        for spec in self._inputs:
            if not ready.context.set_input_shape(spec.name, shapes[spec.name]):
                raise self._loaded.failed(f"refuses {spec.name} of shape {shapes[spec.name]}")
        try:
            unknown = ready.context.infer_shapes()
        except RuntimeError as error:
            raise self._loaded.failed(f"finds no output shapes: {error}") from error
        if unknown:
            raise self._loaded.failed(f"lacks the shape of {', '.join(unknown)}")
        for spec in self._outputs:
            if (found := tuple(ready.context.get_tensor_shape(spec.name))) != shapes[spec.name]:
                raise self._loaded.failed(
                    f"makes {spec.name} {found}, expected {shapes[spec.name]}"
                )

    def _upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        for spec in self._inputs:
            array = feeds[spec.name]
            np.copyto(self._view(spec, array.shape), array)
            self._buffers[spec.name].upload(array.nbytes, self._stream)

    def _enqueue(self, ready: _Ready) -> None:
        if ready.graph is not None:
            ready.graph.launch(self._stream)
        elif not ready.context.execute_async_v3(self._stream.handle):
            raise self._loaded.failed("did not run the plan")

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Wait for the stream after the block, also if it fails, before buffers are used again."""
        try:
            yield
        except BaseException:
            self._wait()
            raise
        self._stream.synchronize()

    def _wait(self) -> None:
        """Wait for the stream after a failure; its own errors are only logged."""
        try:
            if self._stream is not None:
                self._stream.synchronize()
        except self._cuda.driver.Error as error:
            _logger.debug("%s: %s", self._loaded.plan.path, error)

    def _capture(self, key: tuple[int, ...], ready: _Ready) -> None:
        """Capture what ``ready`` has just run."""
        try:
            if not libraries.capturable(ready.context, self._stream.handle):
                raise EngineError(f"{self._loaded.library.name} cannot capture this plan")
            ready.graph = cuda.Graph(self._graph_driver, self._stream, lambda: self._enqueue(ready))
        # RuntimeError: cuda-python looks up driver functions when they are first called.
        except (EngineError, RuntimeError) as error:
            self._no_graphs(key, str(error))

    def _no_graphs(self, key: tuple[int, ...], reason: str) -> None:
        """Capture no more graphs; those captured before stay in use."""
        if key in self._ready:
            self._ready.pop(key).drop()
        self._graph_driver = None
        self._notes.append(f"no CUDA graphs: {reason}")
        _logger.warning("%s runs without CUDA graphs: %s", self._loaded.plan.path, reason)

    def _view(self, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as a view of its host buffer."""
        raw = self._buffers[spec.name].host[: _size(spec, shape)]
        return raw.view(spec.numpy_dtype).reshape(shape)

    def release(self) -> None:
        """Free everything and the use of the loaded plan; failures are logged."""
        try:
            with self._lock, self._cuda.active():
                try:
                    self._wait()
                    while self._ready:
                        self._ready.popitem()[1].drop()
                    self._stack.close()
                finally:
                    self._loaded.release()
        except EngineError as error:
            _logger.warning("%s was not released: %s", self._loaded.plan.path, error)


def _batch(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> str | None:
    """The dimension along which feeds may be cut: the first of every output and no other one."""
    leading = {spec.shape[0] for spec in outputs if spec.shape}
    if len(leading) != 1:
        return None
    name = leading.pop()
    elsewhere = {dim for spec in (*inputs, *outputs) for dim in spec.shape[1:]}
    return name if isinstance(name, str) and name not in elsewhere else None


def _shape(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)


def _size(spec: TensorSpec, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * spec.numpy_dtype.itemsize


@lru_cache
def _log(library: Library) -> Any:
    """A logger for the library that writes to Python's log and keeps one error of each thread.

    It is never freed: the library keeps the first logger it is given for messages that belong to no
    plan, and warns about others.
    """
    base = library.module.ILogger
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}

    class Log(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self._errors = threading.local()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            text = one_line(message)
            if level == logging.ERROR and self._error() is None:
                # The first error is the cause; those that follow are consequences.
                self._errors.first = text[:400].rstrip(". ")
            _logger.log(level, "%s: %s", library.name, text)

        def _error(self) -> str | None:
            return getattr(self._errors, "first", None)

        def forget(self) -> None:
            """Forget this thread's error."""
            self._errors.first = None

        def said(self) -> str:
            """The first error of this thread since :meth:`forget`, after a colon."""
            return f": {self._error() or 'no reason given'}"

    return Log()
