"""The node itself: one socket, one queue, one engine.

Every message that arrives is answered or, if it can't be answered, counted and forgotten; none of
them stops the node. Window contents live in memory only, from arrival to reply, and no log line
holds any. Admission by bytes, fairness, batching and metrics have their place between `_handle` and
`_work`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib.metadata
import json
import logging
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from cloud_node.admission import Refusal, check_stage, check_windows
from cloud_node.config import QUEUE_LENGTH, Prepared
from cloud_node.worker import Worker
from engines.bundle import TensorSpec
from engines.errors import ConfigError, ProtocolError
from transport.auth import Authenticator
from transport.messages import (
    NO_ID,
    VERSIONS,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Message,
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
from transport.sockets import server as server_socket

log = logging.getLogger(__name__)

_FLUSH_S = 0.5
"""How long a stopping node lets its last replies leave."""


@dataclass(frozen=True)
class Job:
    """A request admitted to the queue. Times are the event loop's, in seconds."""

    peer: bytes
    name: str
    request: Request
    feeds: dict[str, np.ndarray]
    windows: int
    arrived: float

    def expired(self, now: float) -> bool:
        return now - self.arrived >= self.request.deadline_ms / 1000


class Server:
    """Serves the stack of one bundle until told to stop."""

    def __init__(self, prepared: Prepared, worker: Worker) -> None:
        self._prepared = prepared
        self._worker = worker
        self._queue: asyncio.Queue[Job] = asyncio.Queue(maxsize=QUEUE_LENGTH)
        self._socket: Any = None

    async def run(self, stop: asyncio.Event) -> None:
        """Bind, announce, serve until `stop` is set; then finish the run in progress and leave.

        Raises:
            EdgeRuntimeError: the address can't be bound or the ready file not written.
        """
        prepared = self._prepared
        with zmq.asyncio.Context() as ctx:
            authenticator = Authenticator(ctx, prepared.allowed)
            authenticator.start()
            try:
                self._socket = server_socket(
                    ctx, prepared.config.bind, prepared.keypair, prepared.limits
                )
                with self._announced():
                    await self._serve(stop)
            finally:
                if self._socket:
                    # Lingering alone does not do: a closing socket counts a message as gone once it
                    # has left its queue, and drops what the connection has not written yet.
                    await asyncio.sleep(_FLUSH_S)
                    self._socket.close(linger=round(_FLUSH_S * 1000))
                await authenticator.stop()

    async def _serve(self, stop: asyncio.Event) -> None:
        working = asyncio.create_task(self._work(stop), name="work")
        reading = asyncio.create_task(self._read(), name="read")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({working, reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                log.info("stopping")
            else:  # neither task ends by itself unless something is broken: let it show
                await asyncio.gather(*(task for task in (working, reading) if task.done()))
        finally:
            stop.set()
            reading.cancel()
            stopping.cancel()
            while not self._queue.empty():
                self._refuse(self._queue.get_nowait(), "shutdown", "the node is stopping")
            await asyncio.gather(working, reading, stopping, return_exceptions=True)

    async def _read(self) -> None:
        """Receive for as long as the node lives."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                self._handle(frames, asyncio.get_running_loop().time())
            except Exception as error:  # a peer's message must not stop the node
                # Where, but not the exception's text, which may quote what arrived.
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("message dropped: %s at\n%s", type(error).__name__, where)
            # Receiving what is there already doesn't yield; replies and handshakes want their turn.
            await asyncio.sleep(0)

    def _handle(self, frames: list[zmq.Frame], arrived: float) -> None:
        peer, *parts = frames
        to = peer.bytes
        if not parts:
            return
        name = str(parts[0].get("User-Id"))
        message_id = NO_ID
        try:
            message = decode_header(parts[0])
            message_id = getattr(message, "id", NO_ID)
            if isinstance(message, InfoRequest):
                self._send(to, self._info(message))
            elif isinstance(message, Request):
                self._admit(to, name, message, parts[1:], arrived)
            elif not isinstance(message, (Cancel, VersionsSpoken)):  # neither is ever answered
                kind = type(message).__name__
                raise ProtocolError(f"a node takes no {kind} message")
        except UnknownVersionError as error:
            log.info("%s: %s", name, error)
            self._send(to, VersionsSpoken(VERSIONS))
        except (ProtocolError, Refusal) as error:
            code = error.code if isinstance(error, Refusal) else "malformed"
            refused = refuse(message_id, code, str(error))
            log.info("refused %s (%s): %s", name, code, refused.message)
            self._send(to, refused)

    def _admit(
        self, peer: bytes, name: str, request: Request, parts: list[zmq.Frame], arrived: float
    ) -> None:
        prepared = self._prepared
        check_stage(request.stage, prepared.stage, prepared.label)
        feeds = decode_tensors(request, parts, prepared.limits.request)
        windows = check_windows(feeds, prepared.stage, prepared.bundle.geometry)
        job = Job(peer, name, request, feeds, windows, arrived)
        if job.expired(asyncio.get_running_loop().time()):
            raise Refusal("deadline", "the deadline had passed when the request arrived")
        if self._queue.full():
            raise Refusal("overloaded", f"{QUEUE_LENGTH} requests are waiting already")
        self._send(peer, Accepted(request.id))
        self._queue.put_nowait(job)

    async def _work(self, stop: asyncio.Event) -> None:
        """Run what is queued, oldest first, until `stop` is set."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                getting = asyncio.create_task(self._queue.get())
                await asyncio.wait({getting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    break
                job = getting.result()
                started = loop.time()
                if stop.is_set():
                    self._refuse(job, "shutdown", "the node is stopping")
                elif job.expired(started):
                    self._refuse(job, "deadline", "the deadline passed while waiting its turn")
                else:
                    await self._run(job, started)
        finally:
            stopped.cancel()

    async def _run(self, job: Job, started: float) -> None:
        try:
            outcome = await self._worker.run(job.feeds)
        except Exception as error:  # this request fails alone
            log.error("engine failed on %d windows of %s: %s", job.windows, job.name, error)
            self._refuse(job, "engine", "the node's engine failed; its log says more")
            return
        queue_us = round((started - job.arrived) * 1e6)
        result = Result(job.request.id, queue_us, outcome.compute_us)
        self._send(job.peer, result, outcome.outputs)
        log.debug(
            "%d windows for %s: queued %d us, computed %d us",
            job.windows,
            job.name,
            queue_us,
            outcome.compute_us,
        )

    def _refuse(self, job: Job, code: str, message: str) -> None:
        log.info("refused %s (%s): %s", job.name, code, message)
        self._send(job.peer, refuse(job.request.id, code, message))

    def _send(
        self, peer: bytes, message: Message, arrays: dict[str, np.ndarray] | None = None
    ) -> None:
        """Send without ever waiting: an edge that left or doesn't read loses its reply."""
        frames = [peer, *encode(message, arrays)]
        sent = self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        error = sent.exception()
        if isinstance(error, zmq.ZMQError) and error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
            why = "it left" if error.errno == errno.EHOSTUNREACH else "it does not read its replies"
            log.info("%s to an edge dropped: %s", type(message).__name__, why)
        elif error:
            raise error

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
    def _announced(self) -> Any:
        """Say where the node listens, on the log and in the ready file while it serves."""
        prepared = self._prepared
        ready = {
            "endpoint": self._socket.last_endpoint.decode(),
            "public_key": prepared.keypair.public,
            "bundle": prepared.label,
            "stack_sha256": prepared.stage.sha256,
            "authorised_keys": len(prepared.allowed),
            "pid": os.getpid(),
        }
        if not prepared.allowed:
            log.warning(
                "NO EDGE IS AUTHORISED, so none can connect. An edge's owner runs `edge-runtime "
                "keys edge --node NAME` and sends you NAME.pub; then run `edge-runtime keys "
                "authorize --dir %s NAME.pub` (no restart needed)",
                prepared.config.keys,
            )
        log.info("ready %s", json.dumps(ready))
        path = prepared.config.ready_file
        if path:
            _write_atomically(path, json.dumps(ready) + "\n")
        try:
            yield
        finally:
            if path:
                path.unlink(missing_ok=True)


@functools.cache
def software() -> str:
    """Name and version of this node, as told to edges."""
    try:
        return f"cloud-node {importlib.metadata.version('edge-runtime')}"
    except importlib.metadata.PackageNotFoundError:
        return "cloud-node"


def _tensor_info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, spec.dtype, spec.shape)


def _write_atomically(path: Path, text: str) -> None:
    try:
        descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.replace(scratch, path)
        except OSError:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write the ready file {path}: {error.strerror}") from None
