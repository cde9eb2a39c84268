"""The process that holds a node's engine, one per device. :mod:`cloud_node.worker_start` starts it.

Started by :mod:`cloud_node.pool`, which hands it a socket for messages and, once it has closed
itself, the memory that batches and results lie in. It opens one stage, runs it until it is warm,
says so, and then runs one batch after another. A batch that fails costs only that batch as long as
the engine works afterwards; else the process ends, to be replaced. It is gone when its parent is,
and nothing of what it computes on is logged, dumped or kept. It never opens a network socket.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np

from cloud_node.shared_memory import Arena, Layout
from edge_common.errors import BundleError, EdgeRuntimeError
from engines.bundle import Bundle, Sha256, TensorSpec
from engines.engine import Device, Engine, check_feeds, check_out
from engines.ort import OrtEngine
from engines.selection import open_stage

log = logging.getLogger(__name__)

_LONG_S = 3.0
"""Of a warm-up that takes longer, the log says how long."""

STAGE = "stack"
_MAX_MESSAGE = 1 << 20
_MAX_TEXT = 2000
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_DAY_US = 86_400_000_000
"""No run takes longer. What a broken worker claims decides what is admitted, and when it hangs."""

Kind = Literal["tensorrt", "cuda", "cpu", "noop"]
"""What computes: TensorRT, ONNX Runtime on CUDA or on the CPU, or nothing at all."""


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """What to open. `stage` is the digest of the stack the node serves.

    `noop` opens nothing and answers every batch with bytes that mean nothing, to measure all that
    surrounds an engine.
    """

    bundle: str
    stage: Sha256
    device: Device
    threads: int | None
    layout: Layout
    log_level: int
    noop: bool = False


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Run the first `rows` rows of a batch and put the outputs into a result."""

    id: int
    batch: int
    result: int
    rows: int


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """No other process of the same user can look into this one any more: it may have the memory,
    which comes with `Open`."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Open and warm. `slowest_s`: the longest run of the warm-up."""

    kind: Kind
    slowest_s: Annotated[float, msgspec.Meta(ge=0, le=_DAY_US / 1e6)]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine can't be opened; `kind` names the class of the error."""

    kind: str
    text: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A run succeeded."""

    id: int
    compute_us: Annotated[int, msgspec.Meta(ge=0, le=_DAY_US)]


class RunFailed(msgspec.Struct, frozen=True, tag="run_failed"):
    """A run failed."""

    id: int
    text: str


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    """Something for the node's log."""

    level: int
    name: str
    text: str


ToWorker = Open | Run
FromWorker = Closed | Ready | Failed | Done | RunFailed | Logged

_encoder = msgspec.msgpack.Encoder()


def pack(message: ToWorker | FromWorker) -> bytes:
    """A message with its length before it."""
    body = _encoder.encode(message)
    return struct.pack(">I", len(body)) + body


class Unpacker:
    """Finds the messages in a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the messages that `data` completes.

        Raises:
            ValueError: no message is that long.
        """
        self._data += data
        while len(self._data) >= 4:
            (length,) = struct.unpack_from(">I", self._data)
            if length > _MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes, expected at most {_MAX_MESSAGE}")
            if len(self._data) < 4 + length:
                return
            body = bytes(self._data[4 : 4 + length])
            del self._data[: 4 + length]
            yield body


class _Channel:
    """The worker's end of the socket. `memory`: the last descriptor that came with a message."""

    def __init__(self, sock: socket.socket) -> None:
        self.memory = -1
        self._sock = sock
        self._unpacker = Unpacker()
        self._bodies: list[bytes] = []
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._lock = threading.Lock()

    def receive(self) -> ToWorker | None:
        """The next message; None when there will be no more."""
        while not self._bodies:
            try:
                data, fds, *_ = socket.recv_fds(self._sock, 65536, 1, _CLOEXEC)
            except ConnectionError:
                return None
            self.memory = fds[0] if fds else self.memory
            if not data:
                return None
            self._bodies = list(self._unpacker.feed(data))
        return self._decoder.decode(self._bodies.pop(0))

    def send(self, message: FromWorker) -> None:
        """Send; without a parent to hear it, end."""
        with self._lock:
            try:
                self._sock.sendall(pack(message))
            except OSError:
                os._exit(1)


class _Forward(logging.Handler):
    """Hands log records to the parent, which has the log."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()[:_MAX_TEXT]
        except Exception as error:  # a library's mistake in a format
            text = f"a log line that cannot be formatted: {type(error).__name__}"
        self._channel.send(Logged(record.levelno, record.name, text))


class Noop(Engine):
    """Computes nothing: outputs are what their memory happens to hold, zeros where it is new."""

    def __init__(self, layout: Layout) -> None:
        self.inputs, self.outputs = layout.inputs, layout.outputs

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        dims = check_feeds(self.inputs, feeds)
        if out is not None:
            check_out(self.outputs, dims, out)
            return dict(out)
        rows = next(iter(dims.values()))
        return {spec.name: np.zeros(_shape(spec, rows), spec.numpy_dtype) for spec in self.outputs}

    def close(self) -> None:
        pass


def work(control: int) -> int:
    """Serve until the socket of this descriptor closes. Returns the exit status."""
    # Whoever means the node signals the whole group or service: the node says when to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = _Channel(socket.socket(fileno=control))
    channel.send(Closed())
    request = channel.receive()
    if not isinstance(request, Open) or channel.memory < 0:
        return 1
    logging.basicConfig(level=request.log_level, handlers=[_Forward(channel)])
    try:
        arena = Arena.attach(request.layout, channel.memory)
        bundle = Bundle.load(request.bundle)
        log.info("opening %s, %.0f MB", bundle.manifest.model, bundle.size(STAGE) / 1e6)
        engine, kind = open_engine(request, bundle)
        rows = request.layout.rows
        first = slowest = warm_up(engine, bundle, 1)
        if (guess := first * rows) > _LONG_S:
            log.info("warming up with %d windows: about %.0f s more", rows, guess)
        # TensorRT captures its CUDA graphs on the second round.
        for size in [rows] if kind == "cpu" else [rows, 1, rows]:
            slowest = max(slowest, warm_up(engine, bundle, size))
    except EdgeRuntimeError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return 1
    except MemoryError:
        text = "there is not enough memory for the engine: free some, or serve a smaller model"
        channel.send(Failed("EngineError", text))
        return 1
    channel.send(Ready(kind, slowest))
    with engine:
        return _serve(channel, arena, engine, bundle)


def open_engine(request: Open, bundle: Bundle) -> tuple[Engine, Kind]:
    """The engine that `request` asks for and what it computes on, or an EdgeRuntimeError."""
    stage = bundle.stage(STAGE)
    if stage.sha256 != request.stage:
        raise BundleError(
            f"{bundle.path} holds stack {stage.sha256[:12]}, but this node was started with "
            f"{request.stage[:12]}: restart the node to serve the new one, or put the old one back"
        )
    if request.noop:
        return Noop(request.layout), "noop"
    engine = open_stage(bundle, STAGE, device=request.device, threads=request.threads)
    return engine, engine.device if isinstance(engine, OrtEngine) else "tensorrt"


def warm_up(engine: Engine, bundle: Bundle, rows: int) -> float:
    """Run harmless rows; returns the seconds it took."""
    feeds = {spec.name: _harmless(spec, bundle, rows) for spec in engine.inputs}
    start = time.perf_counter()
    engine.run(feeds)
    return time.perf_counter() - start


def _harmless(spec: TensorSpec, bundle: Bundle, rows: int) -> np.ndarray:
    """Rows of an input that every engine takes: the first window, black and whole."""
    value = bundle.geometry.window_pixels if spec.name == "extent" else 0
    return np.full(_shape(spec, rows), value, spec.numpy_dtype)


def _shape(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else rows for dim in spec.shape)


def _serve(channel: _Channel, arena: Arena, engine: Engine, bundle: Bundle) -> int:
    while (message := channel.receive()) is not None:
        if not isinstance(message, Run):
            return 1
        feeds = {name: a[: message.rows] for name, a in arena.batches[message.batch].items()}
        places = {name: a[: message.rows] for name, a in arena.results[message.result].items()}
        try:
            start = time.perf_counter()
            engine.run(feeds, places)
            compute_us = round((time.perf_counter() - start) * 1e6)
        except Exception as error:
            known = isinstance(error, EdgeRuntimeError)
            text = str(error) if known else f"{type(error).__name__} in the engine"
            channel.send(RunFailed(message.id, text[:_MAX_TEXT]))
            try:  # a GPU may be unusable from now on
                warm_up(engine, bundle, 1)
            except Exception as after:
                log.error("after a failed run the engine works no more: %s", type(after).__name__)
                return 1
        else:
            channel.send(Done(message.id, compute_us))
    return 0
