"""The GPU: facts about it, its memory, streams and graphs.

:func:`facts` asks the driver through ctypes and needs no pycuda. The rest uses pycuda, imported
when first needed.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from edge_common.errors import EngineError
from engines.driver import driver_version

# cuda.h: CUresult and CUdevice_attribute.
_NO_DEVICE = 100
_ATTRIBUTE_INTEGRATED = 18
_ATTRIBUTE_COMPUTE_CAPABILITY = 75, 76
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream

_contexts: dict[int, Context] = {}
_contexts_lock = threading.Lock()


@dataclass(frozen=True)
class Facts:
    """One GPU, as the driver describes it.

    Attributes:
        name: as the driver spells it, such as ``Orin`` or ``NVIDIA L4``.
        compute_capability: such as ``8.7``.
        driver: version of the kernel module; of L4T if a Jetson's module has none; otherwise the
            newest CUDA that the driver supports, such as ``CUDA 12.6``.
        cuda: the newest CUDA that the driver supports, such as ``12.6``.
        memory_bytes: all memory; on an integrated GPU the board's, shared with the CPU.
        integrated: whether it shares memory with the CPU, as on a Jetson.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str
    memory_bytes: int
    integrated: bool


def device_count() -> int:
    """How many NVIDIA GPUs this process may use; 0 without a driver."""
    try:
        return _count(_driver())
    except EngineError:
        return 0


def facts(ordinal: int = 0) -> Facts:
    """Describe GPU number ``ordinal``.

    Raises:
        EngineError: there is no driver or no such GPU, or the driver fails.
    """
    cuda = _driver()
    count = _count(cuda)
    if count == 0:
        raise _no_gpu()
    if not 0 <= ordinal < count:
        raise EngineError(
            f"there is no GPU {ordinal}: this process may use {count}, numbered from 0",
            mend="choose one of these, or let CUDA_VISIBLE_DEVICES show more",
            code="no_gpu",
        )
    device = ctypes.c_int()
    _ask(cuda, "cuDeviceGet", ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    _ask(cuda, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _ask(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    version = ctypes.c_int()
    _ask(cuda, "cuDriverGetVersion", ctypes.byref(version))

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        _ask(cuda, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    major, minor = map(attribute, _ATTRIBUTE_COMPUTE_CAPABILITY)
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Facts(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=f"{major}.{minor}",
        driver=driver_version() or f"CUDA {newest}",
        cuda=newest,
        memory_bytes=memory.value,
        integrated=bool(attribute(_ATTRIBUTE_INTEGRATED)),
    )


def _no_gpu() -> EngineError:
    return EngineError(
        "no NVIDIA GPU is visible to this process",
        mend="see `nvidia-smi` (on a Jetson `tegrastats`) and CUDA_VISIBLE_DEVICES, or start a "
        "container with --gpus all or --runtime nvidia",
        code="no_gpu",
    )


@lru_cache(maxsize=1)
def _driver() -> Any:
    """``libcuda``, initialised."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"no NVIDIA driver is installed here ({error})",
            mend="install it, or start a container with --gpus all or --runtime nvidia",
            code="no_gpu",
        ) from None
    _ask(cuda, "cuInit", 0)
    return cuda


def _count(cuda: Any) -> int:
    count = ctypes.c_int()
    _ask(cuda, "cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _ask(cuda: Any, function: str, *arguments: Any) -> None:
    code = getattr(cuda, function)(*arguments)
    if code == _NO_DEVICE:
        raise _no_gpu()
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode("utf-8", "replace")
        raise EngineError(
            f"the NVIDIA driver failed in {function}: {reason} (error {code})",
            mend="see `nvidia-smi` and `dmesg`",
        )


class Context:
    """One GPU, ready for work. Made by :func:`context`.

    It holds the GPU's primary context, which the CUDA runtime inside other libraries uses too. They
    keep it until the process ends, so it is not released earlier.

    Attributes:
        facts: which GPU it is.
    """

    def __init__(self, ordinal: int) -> None:
        self.facts = facts(ordinal)
        self.driver: Any = _pycuda()
        try:
            self.driver.init()
            self._primary = self.driver.Device(ordinal).retain_primary_context()
        except self.driver.Error as error:
            raise self._failed(error) from error
        # pycuda by itself releases a primary context as if it had created it.
        self._finalizer = weakref.finalize(self, _give_back, self._primary)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU current in the calling thread during the block.

        Raises:
            EngineError: in place of any error of CUDA.
        """
        try:
            self._primary.push()
            try:
                yield
            finally:
                self._primary.pop()
        except self.driver.Error as error:
            raise self._failed(error) from error

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of the GPU's memory. Only inside :meth:`active`."""
        free, total = self.driver.mem_get_info()
        return free, total

    def stream(self) -> Stream:
        """A new stream that waits for no other. Only inside :meth:`active`."""
        return Stream(self.driver.Stream(_NON_BLOCKING))

    def allocate(self, size: int, what: str) -> Any:
        """Device memory, as pycuda's allocation. Only inside :meth:`active`.

        Raises:
            EngineError: there is too little; it names ``what``, the size and what is free.
        """
        try:
            return self.driver.mem_alloc(max(size, 1))
        except self.driver.MemoryError as error:
            raise self.no_memory(size, what) from error

    def allocate_host(self, size: int, what: str, *, mapped: bool) -> np.ndarray:
        """Pinned host memory, uint8 ``[size]``, visible to the GPU too if ``mapped``.

        ``base.free()`` of the array frees it. Raises as :meth:`allocate`.
        """
        flags = self.driver.host_alloc_flags.DEVICEMAP if mapped else 0
        try:
            array: np.ndarray = self.driver.pagelocked_empty(
                max(size, 1), np.uint8, mem_flags=flags
            )
        except self.driver.MemoryError as error:
            raise self.no_memory(size, what) from error
        return array

    def no_memory(self, size: int, what: str) -> EngineError:
        """The error when memory runs out. Only inside :meth:`active`."""
        free, total = self.free_bytes()
        return EngineError(
            f"out of memory on {self.facts.name}: {what} needs {_mib(size)}, "
            f"{_mib(free)} of {_mib(total)} are free",
            mend="stop other programs that use the GPU, build the stack for fewer windows "
            "(`edge-runtime build --max-windows`), or run on the CPU",
            code="out_of_memory",
        )

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(
            f"{self.facts.name} failed: {error}",
            mend="see `dmesg`; after an illegal access this process can no longer use the GPU: "
            "start it again, or run on the CPU",
        )


class Stream:
    """A queue of work for the GPU. Use it inside :meth:`Context.active`.

    pycuda destroys a stream with its last reference, which may be in an error's traceback; this one
    is destroyed by :meth:`free`.
    """

    def __init__(self, stream: Any) -> None:
        self.pycuda: Any = stream

    @property
    def handle(self) -> int:
        """The ``CUstream``."""
        return int(self.pycuda.handle)

    def synchronize(self) -> None:
        """Wait for all work on it."""
        self.pycuda.synchronize()

    def free(self) -> None:
        """Wait, then destroy it."""
        self.pycuda = None


class Timer:
    """Two events on a stream, as a context manager. Only inside :meth:`Context.active`."""

    def __init__(self, context: Context, stream: Stream) -> None:
        self._stream = stream
        self._events: Any = context.driver.Event(), context.driver.Event()

    def start(self) -> None:
        """Time what is enqueued from here on."""
        self._events[0].record(self._stream.pycuda)

    def stop(self) -> None:
        """Do not time what is enqueued from here on."""
        self._events[1].record(self._stream.pycuda)

    def milliseconds(self) -> float:
        """The measured time, after the stream's work is done."""
        return float(self._events[0].time_till(self._events[1]))

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._events = None  # as with streams


class Buffer:
    """Memory for one tensor, on host and device. Only inside :meth:`Context.active`.

    On a GPU with its own memory: pinned host memory, device memory, and copies between them. On an
    integrated GPU: one piece of memory that both use, without copies.

    Attributes:
        host: uint8 ``[size]``, for the CPU.
        address: for the GPU.
    """

    def __init__(self, context: Context, size: int, what: str) -> None:
        self._driver = context.driver
        self._device: Any = None
        mapped = context.facts.integrated
        self.host = context.allocate_host(size, what, mapped=mapped)
        try:
            if mapped:
                self.address = int(self.host.base.get_device_pointer())  # type: ignore[union-attr]
            else:
                self._device = context.allocate(size, what)
                self.address = int(self._device)
        except BaseException:
            self.free()
            raise

    def upload(self, size: int, stream: Stream) -> None:
        """Enqueue the copy of the first ``size`` bytes to the GPU, if one is needed."""
        if self._device is not None and size:
            self._driver.memcpy_htod_async(self.address, self.host[:size], stream.pycuda)

    def download(self, size: int, stream: Stream) -> None:
        """Enqueue the copy of the first ``size`` bytes from the GPU, if one is needed."""
        if self._device is not None and size:
            self._driver.memcpy_dtoh_async(self.host[:size], self.address, stream.pycuda)

    def free(self) -> None:
        """Free the memory. Call it once."""
        if self._device is not None:
            self._device.free()
        self.host.base.free()  # type: ignore[union-attr]


class Graph:
    """Work captured from a stream, to be launched as a whole. Only inside :meth:`Context.active`.

    Args:
        driver: from :func:`graph_driver`.
        stream: the stream to capture; nothing else may use it meanwhile.
        enqueue: puts the work on the stream, where it is captured and does not run.

    Raises:
        EngineError: the work cannot be captured; the stream is then as before.
    """

    def __init__(self, driver: Any, stream: Stream, enqueue: Callable[[], None]) -> None:
        self._driver = driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked("cuStreamBeginCapture", driver.cuStreamBeginCapture(stream.handle, mode))
        ended: tuple[Any, ...] = ()
        try:
            try:
                enqueue()
            finally:
                ended = driver.cuStreamEndCapture(stream.handle)
            graph = _checked("cuStreamEndCapture", ended)
            self._graph = _checked("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
        finally:
            if len(ended) > 1 and ended[1] is not None and int(ended[1]):
                driver.cuGraphDestroy(ended[1])

    def launch(self, stream: Stream) -> None:
        """Enqueue the work."""
        _checked("cuGraphLaunch", self._driver.cuGraphLaunch(self._graph, stream.handle))

    def free(self) -> None:
        """Free the graph. Call it once."""
        self._driver.cuGraphExecDestroy(self._graph)


def context(ordinal: int = 0) -> Context:
    """GPU number ``ordinal``; the same object throughout the process.

    Raises:
        EngineError: as :func:`facts`; also if pycuda is not installed or does not work.
    """
    with _contexts_lock:
        if ordinal not in _contexts:
            _contexts[ordinal] = Context(ordinal)
        return _contexts[ordinal]


def graph_driver() -> Any | None:
    """cuda-python's driver module, for CUDA graphs, which pycuda lacks; None if not installed."""
    for name in ("cuda.bindings.driver", "cuda.cuda"):  # its name since 12.6, and before
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue
    return None


def _pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ModuleNotFoundError:
        raise EngineError(
            "pycuda is not installed",
            mend="PATH=/usr/local/cuda/bin:$PATH pip install pycuda",
            code="not_installed",
        ) from None
    except ImportError as error:
        raise EngineError(
            f"pycuda does not work here ({error})",
            mend="pip install --force-reinstall --no-binary=:all: --no-cache-dir --no-deps pycuda",
        ) from error


def _give_back(primary: Any) -> None:
    with suppress(Exception):  # the process is ending
        primary.push()  # pycuda detaches only a context that is current
        primary.detach()


def _checked(function: str, result: tuple[Any, ...]) -> Any:
    if int(result[0]):
        raise EngineError(f"{function} failed: {getattr(result[0], 'name', result[0])}")
    return result[1] if len(result) > 1 else None


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
