"""One connection to one node: requests out, checked replies in, and the reason if not.

:meth:`NodeClient.infer` ends at its deadline at the latest, with the stage's outputs or with an
:class:`~edge_common.errors.OffloadError` that names the node and the likely cause. Which windows to
send is decided in :mod:`edge_runtime.offload.placement`, what to do about failures in
:mod:`edge_runtime.offload.offloader`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from edge_common.errors import OffloadError, ProtocolError
from edge_runtime.config import Node
from edge_runtime.offload.integrity import check_reply
from edge_runtime.offload.placement import Permit
from engines.bundle import Stage
from transport.dos_protection import Connections, connection_limits
from transport.link import LinkEvent, watch
from transport.messages import (
    NO_ID,
    VERSIONS,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Message,
    Refused,
    Request,
    Result,
    StageLimits,
    UnknownVersionError,
    VersionsSpoken,
    decode_header,
    decode_tensors,
    encode,
    new_id,
    new_seal,
)
from transport.sockets import BACKLOG, client, received

log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How long requests wait for an unreachable or lost node to come back, counted once per outage."""
_REST_S = 0.1
"""Pause before a connection is rebuilt after a defect; it doubles with each defect in a row."""
_LONGEST_REST_S = 10.0
_ASKING_S = 3600.0
"""Longest wait for what a node serves; requests wait for it until their own deadlines."""
_METER_S = 0.05
"""How often to look what the node makes this process hold: at 1 Gbit/s, 6 MB in between."""


class NodeRefusedError(OffloadError):
    """A node said that it will not return a result; ``code`` as in ``docs/protocol.md``.

    ``retry_ms``: the same request may do better after so long; 0 if the node gave no hint.
    """

    def __init__(self, message: str, code: str, retry_ms: int) -> None:
        super().__init__(message)
        self.code = code
        self.retry_ms = retry_ms


@dataclass(frozen=True)
class Reply:
    """A node's checked outputs and where the time went, in milliseconds.

    ``upload_ms`` ends when the node says that it has the whole request. ``compute_ms`` and
    ``queue_ms`` are the node's own account; ``download_ms`` is the rest. All by the edge's clock
    but those two, so clocks need not agree.
    """

    outputs: dict[str, np.ndarray]
    bytes_down: int
    upload_ms: float
    queue_ms: float
    compute_ms: float
    download_ms: float


class _Pending:
    """A message waiting for its answer."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.accepted: float | None = None  # loop time
        self.answered: float | None = None
        self.answer: asyncio.Future[tuple[Message, zmq.Frame]] = loop.create_future()

    def fail(self, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(OffloadError(reason))


def listed(info: Info) -> str:
    """What a node says it serves, for people."""
    served = [f"{stage.label} (stack {stage.sha256[:12]})" for stage in info.stages]
    return ", ".join(served) or "nothing"


def mismatch(info: Info, stage: Stage) -> str | None:
    """Why a node cannot run ``stage``, by what it says it serves; None if it can."""
    if any(served.sha256 == stage.sha256 for served in info.stages):
        return None
    return (
        f"it serves {listed(info)}, this edge has stack {stage.sha256[:12]}: use the bundle that "
        "the node's was cut from"
    )


class NodeClient:
    """Connected to ``node`` from :meth:`start` to :meth:`close`, within one event loop.

    It sends nothing without a permit of the exposure ledger, and no window before the node has
    said, once per connection, that it serves the stage. It tells the node of requests it gives up.
    A node that sends without end is cut off and not talked to again. The connection's tasks are
    supervised: one that ends by itself is logged, and the connection is rebuilt.

    Args:
        ctx: asyncio context of that loop.
        node: whom to talk to.
        stage: the stage asked for, by its hash.
        limits: of that stage, for both directions.

    Attributes:
        strays: messages that answered nothing we had asked, all ignored.
        cancelled: requests that the node was told to forget.
        quarantine: why this node is not talked to any more, None if it is.
    """

    def __init__(
        self, ctx: zmq.asyncio.Context, node: Node, stage: Stage, limits: StageLimits
    ) -> None:
        self.node = node
        self.strays = 0
        self.cancelled = 0
        self.quarantine: str | None = None
        self._ctx = ctx
        self._stage = stage
        self._limits = limits
        # What is sent needs no metering: few requests wait, each for a caller with a deadline.
        self._connections = Connections(
            connection_limits(limits.result, limits.request, backlog=BACKLOG)
        )
        self._pending: dict[bytes, _Pending] = {}
        self._link: LinkEvent | None = None
        self._away_since = 0.0  # when connecting began, or when the link was last lost
        self._link_changed = asyncio.Event()
        self._versions_told = False
        self._greeting: asyncio.Task[Info] | None = None  # of this connection
        self._socket: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._rebuilding: asyncio.Task[None] | None = None
        self._defects = 0  # in a row

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def link(self) -> LinkEvent | None:
        """The link's last known state; None while the first connection is being made."""
        return self._link

    def start(self) -> None:
        """Begin connecting, in the running event loop; returns at once. Not with a node in
        quarantine."""
        if self.quarantine:
            return
        self._link = None
        self._versions_told = False
        self._away_since = asyncio.get_running_loop().time()
        self._socket = client(
            self._ctx,
            self.node.endpoint,
            self.node.server_key,
            self.node.keypair,
            self._limits,
            connect=False,
        )
        self._tasks = [
            asyncio.create_task(self._follow(), name=f"link-{self.name}"),
            asyncio.create_task(self._read(), name=f"read-{self.name}"),
            asyncio.create_task(self._measure(), name=f"meter-{self.name}"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def close(self, reason: str = "the connection was closed") -> None:
        """Drop the connection and all that libzmq holds for it; requests under way fail. It may be
        started again."""
        here = asyncio.current_task()
        ours = [*self._tasks, self._rebuilding, self._greeting]
        tasks = [task for task in ours if task is not None and task is not here]
        self._tasks, self._greeting = [], None
        if self._rebuilding is not here:
            self._rebuilding = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._turn(LinkEvent("down", reason))
        self._fail_all(reason)
        if self._socket is not None:
            self._socket.close(linger=0)

    async def infer(self, feeds: Mapping[str, np.ndarray], permit: Permit, until: float) -> Reply:
        """Have the node run the stage.

        Args:
            feeds: the stage's inputs, leading dimension n; ``window`` says which windows these are.
            permit: to send exactly these windows to this node, once; its ``bytes_sent`` tells, also
                after an error, whether they went out.
            until: deadline, in the event loop's time.

        Raises:
            NodeRefusedError: the node refused; it may say when to ask again.
            OffloadError: no checked outputs by the deadline; names the node and the cause.
            PlacementError: the permit is for something else.
        """
        if self.quarantine:
            raise self._error(self.quarantine)
        permit.spend(self.name, feeds["window"].tolist())
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await self._ready(until)
        started = loop.time()
        left_ms = max(0, int((until - started) * 1000))
        request = Request(new_id(), self._stage.sha256, left_ms, new_seal())
        pending = _Pending()
        message, frame = await self._ask(
            request.id, encode(request, feeds), pending, until, begun, permit
        )
        if not isinstance(message, Result):
            raise self._error(f"answered with {type(message).__name__} where a result was due")
        finished = pending.answered or loop.time()
        try:
            outputs = decode_tensors(message, frame, self._limits.result, request.seal)
            check_reply(outputs, self._stage.outputs, len(feeds["window"]))
        except ProtocolError as error:
            raise self._error(f"wrong answer: {error}") from None
        accepted = finished if pending.accepted is None else pending.accepted
        # A node may claim any times; no more can have passed than by our own clock.
        compute_ms = min(message.compute_us / 1000, (finished - started) * 1000)
        queue_ms = min(message.queue_us / 1000, (finished - started) * 1000 - compute_ms)
        return Reply(
            outputs=outputs,
            bytes_down=len(frame),
            upload_ms=(accepted - started) * 1000,
            queue_ms=queue_ms,
            compute_ms=compute_ms,
            download_ms=max(0.0, (finished - accepted) * 1000 - queue_ms - compute_ms),
        )

    async def info(self, until: float) -> tuple[Info, float]:
        """What the node serves, and the round trip in milliseconds once connected.

        Raises:
            OffloadError: no answer by the deadline; names the node and the cause.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await self._connected(until)
        started = loop.time()
        request = InfoRequest(new_id())
        pending = _Pending()
        message, _ = await self._ask(request.id, encode(request), pending, until, begun)
        if not isinstance(message, Info):
            raise self._error(f"answered with {type(message).__name__} where its info was due")
        return message, ((pending.answered or loop.time()) - started) * 1000

    async def _ask(
        self,
        id: bytes,
        frame: memoryview,
        pending: _Pending,
        until: float,
        begun: float,
        permit: Permit | None = None,
    ) -> tuple[Message, zmq.Frame]:
        """Send and wait for the answer of that id, or for what makes it impossible."""
        loop = asyncio.get_running_loop()
        self._pending[id] = pending
        sending = asyncio.ensure_future(self._socket.send(frame, copy=False))
        try:
            done, _ = await asyncio.wait(
                {pending.answer, sending},
                timeout=max(0.0, until - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if sending in done and pending.answer not in done:
                sending.result()
                done, _ = await asyncio.wait(
                    {pending.answer}, timeout=max(0.0, until - loop.time())
                )
            if pending.answer in done:
                message, answer = pending.answer.result()
            else:
                after = f"within {loop.time() - begun:.1f} s"
                if pending.accepted is not None:
                    raise OffloadError(
                        f"no result {after}, though it has the windows: it is overloaded, slow or "
                        "frozen"
                    )
                raise OffloadError(f"no answer {after}: the node is frozen or the link is slow")
        except OffloadError as error:
            raise self._error(str(error)) from None
        except zmq.ZMQError as error:
            raise self._error(f"sending failed: {error}") from None
        finally:
            self._pending.pop(id, None)
            if permit and not pending.answer.done():
                self._cancel(id, sending)
            for future in (sending, pending.answer):
                if not future.cancel() and not future.cancelled():
                    future.exception()  # told already, or too late to matter
            if permit and not sending.cancelled() and not sending.exception():
                permit.bytes_sent = frame.nbytes
        if isinstance(message, Refused):
            raise NodeRefusedError(
                str(self._error(f"refused ({message.code}): {message.message}")),
                message.code,
                message.retry_ms,
            )
        return message, answer

    def _cancel(self, id: bytes, sending: asyncio.Future[Any]) -> None:
        """Tell the node that nobody waits any more for what it has been sent."""
        if not sending.done() or sending.cancelled() or sending.exception():
            return
        self.cancelled += self._send_now(encode(Cancel(id)))

    def _send_now(self, frame: memoryview) -> bool:
        """At once or not at all: a node that takes nothing more needs no telling. Whether it was
        sent."""
        told = self._socket.send(frame, flags=zmq.NOBLOCK)
        if not told.done():  # pyzmq lets it wait behind other messages
            told.cancel()
            return False
        return not told.cancelled() and told.exception() is None

    def _error(self, reason: str) -> OffloadError:
        return OffloadError(f"node {self.name} ({self.node.endpoint}): {reason}")

    async def _ready(self, until: float) -> None:
        """Wait until the node has said that it serves the stage; raise if it does not.

        It is asked once per connection, and asked again only if that failed.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            await self._connected(until)
            greeting = self._greeting or self._greet()
            await asyncio.wait({greeting}, timeout=max(0.0, until - loop.time()))
            if greeting is not self._greeting:
                continue  # that connection is gone, or the question was given up
            if not greeting.done():
                self._forget_greeting()
                raise self._error(
                    f"it has not said within {loop.time() - begun:.1f} s what it serves, so no "
                    "window was sent: the node is frozen or the link is slow"
                )
            if greeting.cancelled():
                self._forget_greeting()
                raise self._error("asking what it serves was interrupted")
            if greeting.exception():
                self._forget_greeting()
            if wrong := mismatch(greeting.result(), self._stage):
                raise self._error(wrong)
            self._defects = 0
            return

    def _greet(self) -> asyncio.Task[Info]:
        """Begin to ask what the node serves."""

        async def ask() -> Info:
            info, _ = await self.info(asyncio.get_running_loop().time() + _ASKING_S)
            return info

        self._greeting = asyncio.create_task(ask(), name=f"greet-{self.name}")
        self._greeting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._greeting

    def _forget_greeting(self) -> None:
        greeting, self._greeting = self._greeting, None
        if greeting is not None:
            greeting.cancel()

    def _patience(self, until: float) -> float:
        """When to stop waiting for the link: an outage has one grace, for all requests."""
        return until if self._link is None else min(until, self._away_since + _GRACE_S)

    async def _connected(self, until: float) -> None:
        """Wait for the link; raise as soon as it is known that waiting is in vain."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        if self.quarantine:
            raise self._error(self.quarantine)
        while self._link is None or self._link.state != "up":
            if self._link is not None and self._link.state == "refused":
                raise self._error(self._link.reason)
            limit = self._patience(until)
            changed = self._link_changed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), max(0.0, limit - loop.time()))
            if not changed.is_set() and loop.time() >= limit:
                if self._link is not None:
                    raise self._error(self._link.reason)
                raise self._error(
                    f"no connection within {loop.time() - begun:.1f} s: the host does not answer, "
                    "or the node is frozen"
                )

    async def _follow(self) -> None:
        """Keep the link's state for as long as the client lives."""
        events: Any = watch(self._socket, self.node.endpoint, connections=self._connections)
        async with contextlib.aclosing(events):
            async for event in events:
                self._turn(event)
                if event.state == "up":
                    self._greet()
                else:  # the node forgets us with the connection
                    self._versions_told = False
                    self._forget_greeting()
                    self._fail_all(event.reason)

    def _turn(self, event: LinkEvent) -> None:
        if self._link is not None and self._link.state == "up":
            self._away_since = asyncio.get_running_loop().time()
        self._link = event
        changed, self._link_changed = self._link_changed, asyncio.Event()
        changed.set()

    async def _measure(self) -> None:
        """Watch what the node makes this process hold, until it is too much."""
        while True:
            await asyncio.sleep(_METER_S)
            for breach in self._connections.check(time.monotonic()):
                if breach.reason == "endless":
                    await self._shut_out(
                        f"in quarantine until this edge starts anew: it sent "
                        f"{breach.bytes / 1e6:.0f} MB without ending a message, or without being "
                        "asked, which no node does that means well"
                    )
                    return

    async def _shut_out(self, reason: str) -> None:
        """Drop the connection, and never talk to this node again."""
        log.warning("%s", self._error(reason))
        self.quarantine = reason
        self._fail_all(reason)
        await self.close(reason)
        self._turn(LinkEvent("refused", reason))

    async def _read(self) -> None:
        """Receive for as long as the client lives."""
        loop = asyncio.get_running_loop()
        async for message in received(self._socket):
            self._connections.received(message.frame)
            if message.surplus:
                await self._shut_out(
                    "in quarantine until this edge starts anew: it sent a message of "
                    f"{1 + message.surplus} frames, and no node of ours sends more than one"
                )
                return
            try:
                self._handle(message.frame, loop.time())
            except UnknownVersionError as error:
                self._fail_all(f"wrong answer: {error}")
                self._tell_versions()
            except ProtocolError as error:
                # Whatever it was meant to answer, this node does not speak our protocol.
                self._fail_all(f"wrong answer: {error}")
            except Exception as error:  # a node's message must not stop the reader
                self._fail_all(f"its answer could not be read ({type(error).__name__})")
            # Receiving what is there already doesn't yield; deadlines want their turn.
            await asyncio.sleep(0)

    def _tell_versions(self) -> None:
        """Tell a node whose version we don't know which we speak: once, for it may go on."""
        if not self._versions_told:
            self._versions_told = self._send_now(encode(VersionsSpoken(VERSIONS)))

    def _handle(self, frame: zmq.Frame, now: float) -> None:
        message = decode_header(frame)
        if isinstance(message, VersionsSpoken):
            spoken = ", ".join(map(str, message.versions))
            self._fail_all(f"speaks only protocol versions {spoken}: update the older side")
            return
        if isinstance(message, Refused) and message.id == NO_ID:
            self._fail_all(f"refused ({message.code}): {message.message}")
            return
        pending = self._pending.get(message.id)
        if pending is None or pending.answer.done():
            self.strays += 1
        elif isinstance(message, Accepted):
            pending.accepted = now
        else:
            pending.answered = now
            pending.answer.set_result((message, frame))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Rebuild the connection if one of its tasks has ended by itself, which is a defect."""
        error = None if task.cancelled() else task.exception()
        ours = task in self._tasks and self.quarantine is None
        if error is None and not ours:
            return
        why = repr(error) if error else "it was cancelled"
        log.error(
            "the connection to node %s broke down: its task %s ended (%s)",
            *(self.name, task.get_name(), why),
            exc_info=error,
        )
        if ours:
            reason = (
                f"the edge's connection broke down and is being rebuilt ({why}): this is a defect "
                "of edge-runtime, not the node's; please report it with the log"
            )
            self._rebuilding = self._rebuilding or asyncio.create_task(self._rebuild(reason))

    async def _rebuild(self, reason: str) -> None:
        await self.close(reason)
        while not self._tasks and self.quarantine is None:
            await asyncio.sleep(min(_LONGEST_REST_S, _REST_S * 2 ** min(self._defects, 10)))
            self._defects += 1
            try:
                self.start()
            except Exception:  # such as no file descriptor being left
                log.exception("the connection to node %s could not be rebuilt yet", self.name)
        self._rebuilding = None
        self._turn(LinkEvent("down", reason))  # until it is known better

    def _fail_all(self, reason: str) -> None:
        for pending in self._pending.values():
            pending.fail(reason)
