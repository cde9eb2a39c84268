"""A worker process: it opens the stack of a bundle on one device and runs batches.

:mod:`cloud_node.worker_start` starts it for :mod:`cloud_node.pool`. It opens no network socket, and
logs nothing of what it computes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping

import numpy as np

from cloud_node.shared_memory import Arena, Layout
from cloud_node.worker_messages import (
    STAGE,
    Closed,
    Done,
    Failed,
    FromWorker,
    Kind,
    Logged,
    Open,
    Ready,
    Run,
    RunFailed,
    ToWorker,
    decode_to_worker,
    encode,
)
from edge_common.children import Unpacker, pack
from edge_common.errors import BundleError, EdgeRuntimeError, EngineError
from engines.bundle import Bundle, TensorSpec
from engines.engine import Engine, check_feeds, check_out
from engines.ort import OrtEngine
from engines.selection import open_stage

log = logging.getLogger(__name__)

_LONG_S = 3.0
"""The log announces a warm-up that takes longer."""

_MAX_TEXT = 2000
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Noop(Engine):
    """Computes nothing. Outputs keep the previous content of their memory, or zeros."""

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


class WarmEngine:
    """The engine of a bundle's stack, open and warm.

    Attributes:
        kind: the engine, see `Kind`.
        slowest_s: the longest run so far.

    Raises:
        EdgeRuntimeError: it cannot be opened, or the bundle holds another stack than the node's.
    """

    def __init__(self, request: Open, engine: Engine | None = None) -> None:
        bundle = Bundle.load(request.bundle)
        self._geometry = bundle.geometry
        stage = bundle.stage(STAGE)
        if stage.sha256 != request.stage:
            raise BundleError(
                f"{bundle.path} holds stack {stage.sha256[:12]}, but this node was started with "
                f"{request.stage[:12]}",
                mend="restart the node to serve the new one, or put the old one back",
            )
        log.info("opening %s, %.0f MB", bundle.manifest.model, bundle.size(STAGE) / 1e6)
        self.kind: Kind
        self.slowest_s = 0.0
        try:
            if engine or request.noop:
                self._engine, self.kind = engine or Noop(request.layout), "noop"
            else:
                opened = open_stage(bundle, STAGE, device=request.device, threads=request.threads)
                self._engine = opened
                self.kind = opened.device if isinstance(opened, OrtEngine) else "tensorrt"
            rows = request.layout.rows
            self._warm_up(1)
            if (guess := self.slowest_s * rows) > _LONG_S:
                log.info("warming up with %d windows: about %.0f s more", rows, guess)
            # TensorRT captures its CUDA graphs on the second round.
            for size in [rows] if self.kind == "cpu" else [rows, 1, rows]:
                self._warm_up(size)
        except MemoryError:
            raise EngineError(
                "there is not enough memory for the engine",
                mend="free some, or serve a smaller model",
                code="out_of_memory",
            ) from None

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, np.ndarray], int]:
        """Run a batch; returns its outputs and the microseconds that it took.

        Raises:
            EngineError: the batch failed; the text holds nothing of its contents. Call `works`.
        """
        try:
            start = time.perf_counter()
            outputs = self._engine.run(feeds, out)
            seconds = time.perf_counter() - start
        except EdgeRuntimeError as error:
            raise EngineError(
                error.found[:_MAX_TEXT], mend=error.mend[:_MAX_TEXT], code=error.code
            ) from None
        except Exception as error:
            raise EngineError(f"{type(error).__name__} in the engine") from None
        self.slowest_s = max(self.slowest_s, seconds)
        return outputs, round(seconds * 1e6)

    def works(self) -> bool:
        """True if the engine still runs. A GPU may be unusable after a failed batch."""
        try:
            self._warm_up(1)
        except Exception as error:
            log.error("after a failed run the engine no longer works: %s", type(error).__name__)
            return False
        return True

    def close(self) -> None:
        self._engine.close()

    def _warm_up(self, rows: int) -> None:
        """Run rows that every engine accepts: the first window, black and whole."""
        feeds = {
            spec.name: np.full(
                _shape(spec, rows),
                self._geometry.window_pixels if spec.name == "extent" else 0,
                spec.numpy_dtype,
            )
            for spec in self._engine.inputs
        }
        start = time.perf_counter()
        self._engine.run(feeds)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)


def _shape(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else rows for dim in spec.shape)


def work(control: int) -> int:
    """Serve until the socket with this descriptor closes. Returns the exit status."""
    # These signals may go to the whole process group or service. The front says when to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = _Channel(socket.socket(fileno=control))
    channel.send(Closed())
    request = channel.receive()
    if not isinstance(request, Open) or channel.memory < 0:
        return 1
    logging.basicConfig(level=request.log_level, handlers=[_LogHandler(channel)])
    try:
        arena = Arena.attach(request.layout, channel.memory)
        engine = WarmEngine(request)
    except EdgeRuntimeError as error:
        channel.send(Failed.of(error))
        return 1
    channel.send(Ready(engine.kind, engine.slowest_s))
    try:
        return _serve(channel, arena, engine)
    finally:
        engine.close()


def _serve(channel: _Channel, arena: Arena, engine: WarmEngine) -> int:
    while (message := channel.receive()) is not None:
        if not isinstance(message, Run):
            return 1
        batch, result = arena.batches[message.place], arena.results[message.place]
        feeds = {name: array[: message.rows] for name, array in batch.items()}
        outputs = {name: array[: message.rows] for name, array in result.items()}
        try:
            _, compute_us = engine.run(feeds, outputs)
        except EngineError as error:
            channel.send(RunFailed(message.id, Failed.of(error)))
            if not engine.works():
                return 1
        else:
            channel.send(Done(message.id, compute_us))
    return 0


class _Channel:
    """The worker's end of the socket. `memory`: the last descriptor that came with a message."""

    def __init__(self, sock: socket.socket) -> None:
        self.memory = -1
        self._sock = sock
        self._unpacker = Unpacker()
        self._bodies: list[bytes] = []
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
        return decode_to_worker(self._bodies.pop(0))

    def send(self, message: FromWorker) -> None:
        """Send; end the process if the parent is gone."""
        with self._lock:
            try:
                self._sock.sendall(pack(encode(message)))
            except OSError:
                os._exit(1)


class _LogHandler(logging.Handler):
    """Sends log records to the front, which writes the log."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()[:_MAX_TEXT]
        except Exception as error:  # a library's wrong format
            text = f"a log line that cannot be formatted: {type(error).__name__}"
        self._channel.send(Logged(record.levelno, record.name, text))
