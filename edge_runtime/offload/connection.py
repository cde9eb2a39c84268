"""The connection to one node: requests out, checked replies in, or an error with its cause."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import zmq
import zmq.asyncio

from edge_common.errors import OffloadError, ProtocolError
from edge_runtime.config import Node
from edge_runtime.exposure.ledger import Permit
from edge_runtime.offload.integrity import check_reply
from engines.bundle import Stage
from transport.dos_protection import Connections, connection_limits
from transport.link import NOT_AUTHORISED, LinkEvent, watch
from transport.messages import (
    NO_ID,
    UPDATE,
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
"""How long requests wait for an unreachable or lost node, once per outage."""
_REST_S = 0.1
"""Pause before a connection is rebuilt after a defect; it doubles with each defect in a row."""
_LONGEST_REST_S = 10.0
_ASKING_S = 3600.0
"""Longest wait for a node to say what it serves. Requests wait until their own deadlines."""
_METER_S = 0.05
"""How often to measure what the node has sent: at 1 Gbit/s, 6 MB arrive in between."""
SAME_BUNDLE = "use the bundle that the node's was cut from"
"""Remedy for a :func:`mismatch`."""
_LINK_CODES = {"down": "connection_lost", "unreachable": "unreachable", "refused": "link_refused"}


_E = TypeVar("_E", bound="NodeError")


class NodeError(OffloadError):
    """One node failed. `node` is its name, `reason` what happened, without the node's name.

    `code` is ``unreachable``, ``connection_lost``, ``link_refused``, ``not_authorised``,
    ``wrong_bundle``, ``wrong_version``, ``late``, ``wrong_answer``, ``refused``, ``quarantined`` or
    ``offload``.
    """

    node = reason = ""

    @classmethod
    def of(cls: type[_E], node: Node, reason: str, code: str, mend: str = "") -> _E:
        error = cls(f"node {node.name} ({node.endpoint}): {reason}", mend=mend, code=code)
        error.node, error.reason = node.name, reason
        return error


class NodeRefusedError(NodeError):
    """A node said that it will not return a result.

    `refusal` is the code of its answer, see ``docs/protocol.md``. The same request may do better
    after `retry_ms`; 0 if the node gave no hint.
    """

    refusal = ""
    retry_ms = 0


@dataclass(frozen=True)
class Reply:
    """A node's checked outputs and where the time went, in milliseconds.

    `upload_ms` ends when the node says that it has the whole request. The node reports `compute_ms`
    and `queue_ms` itself; `download_ms` is the rest. The clocks of edge and node may differ.
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

    def fail(self, reason: str, code: str, mend: str = "") -> None:
        if not self.answer.done():
            self.answer.set_exception(OffloadError(reason, mend=mend, code=code))


def listed(info: Info) -> str:
    """The stage that a node claims to serve, as text."""
    served = [f"{stage.label} (stack {stage.sha256[:12]})" for stage in info.stages]
    return ", ".join(served) or "nothing"


def mismatch(info: Info, stage: Stage) -> str | None:
    """Why a node cannot run `stage`, going by what it says it serves; None if it can."""
    if any(served.sha256 == stage.sha256 for served in info.stages):
        return None
    return f"it serves {listed(info)}, this edge has stack {stage.sha256[:12]}"


class Connection:
    """Connected to `node` from :meth:`start` to :meth:`close`, within one event loop.

    It sends nothing without a permit of the exposure ledger, and no window before the node has
    said, once per connection, that it serves the stage. It cancels requests on the node that are
    given up. It quarantines a node that sends without end, or for which :meth:`shut_out` is called.
    If one of its tasks ends by a defect, it logs that and connects again.

    Args:
        ctx: asyncio context of that loop.
        stage: the stage to run, identified by its hash.
        limits: of that stage, for both directions.
        on_up: called whenever the link is there, or there again.
        on_down: called when the link is lost, with the seconds that requests wait for it to return.

    Attributes:
        strays: messages that answered no open request; all were ignored.
        cancelled: requests that were cancelled on the node.
        quarantine: why this node is no longer used. None if it is used.
    """

    def __init__(
        self,
        ctx: zmq.asyncio.Context,
        node: Node,
        stage: Stage,
        limits: StageLimits,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.node = node
        self._on_up, self._on_down = on_up, on_down
        self.strays = 0
        self.cancelled = 0
        self.quarantine: str | None = None
        self._ctx = ctx
        self.stage = stage
        self._limits = limits
        # Outgoing bytes need no meter: few requests wait, each for a caller with a deadline.
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
        """Begin to connect, in the running event loop, and return at once.

        Does nothing for a node in quarantine.
        """
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
        """Drop the connection and everything libzmq holds for it. Open requests fail.

        It may be started again.
        """
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
        self._fail_all(reason, "connection_lost")
        if self._socket is not None:
            self._socket.close(linger=0)

    async def infer(self, feeds: Mapping[str, np.ndarray], permit: Permit, until: float) -> Reply:
        """Have the node run the stage. Ends at the deadline at the latest.

        Args:
            feeds: the stage's inputs, leading dimension n; `window` says which windows these are.
            permit: to send exactly these windows to this node. It is committed just before the
                send. It is released if nothing was sent.
            until: deadline, in the event loop's time.

        Raises:
            NodeRefusedError: the node refused; it may say when to ask again.
            NodeError: no checked outputs by the deadline.
            PlacementError: the permit is for something else.
        """
        permit.check(self.name, feeds["window"].tolist())
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            await self._ready(until)
            started = loop.time()
            left_ms = max(0, int((until - started) * 1000))
            request = Request(new_id(), self.stage.sha256, left_ms, new_seal())
            pending = _Pending()
            message, frame = await self._ask(
                request.id, encode(request, feeds), pending, until, begun, permit
            )
        finally:
            if permit.state == "reserved":
                permit.release()
        if not isinstance(message, Result):
            raise self._wrong(f"answered with {type(message).__name__}, expected a result")
        finished = pending.answered or loop.time()
        try:
            outputs = decode_tensors(message, frame, self._limits.result, request.seal)
            check_reply(outputs, self.stage.outputs, len(feeds["window"]))
        except ProtocolError as error:
            raise self._wrong(f"wrong answer: {error}") from None
        accepted = finished if pending.accepted is None else pending.accepted
        # A node may report any times. Limit them to the time that passed on our own clock.
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
        """The stage that the node serves, and the round trip in milliseconds once connected.

        Raises:
            NodeError: no answer by the deadline.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await self._connected(until)
        started = loop.time()
        request = InfoRequest(new_id())
        pending = _Pending()
        message, _ = await self._ask(request.id, encode(request), pending, until, begun)
        if not isinstance(message, Info):
            raise self._wrong(f"answered with {type(message).__name__}, expected its info")
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
        """Send, and wait for the answer to that id, or for what makes an answer impossible."""
        loop = asyncio.get_running_loop()
        if permit:
            permit.commit(frame.nbytes)
        self._pending[id] = pending
        sending: asyncio.Future[Any] | None = None
        try:
            sending = asyncio.ensure_future(self._socket.send(frame, copy=False))
            await asyncio.wait(
                {pending.answer, sending},
                timeout=max(0.0, until - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not pending.answer.done() and sending.done():
                sending.result()
                await asyncio.wait({pending.answer}, timeout=max(0.0, until - loop.time()))
            if not pending.answer.done():
                after = f"within {loop.time() - begun:.1f} s"
                raise self._error(
                    f"no answer {after}: the node is frozen or the link is slow"
                    if pending.accepted is None
                    else f"no result {after}, though it has the windows: it is overloaded, slow or "
                    "frozen",
                    "late",
                )
            try:
                message, answer = pending.answer.result()
            except OffloadError as error:
                raise self._error(error.found, error.code, error.mend) from None
        except zmq.ZMQError as error:
            raise self._error(f"sending failed: {error}", "connection_lost") from None
        finally:
            self._pending.pop(id, None)
            sent = sending is not None and _succeeded(sending)
            if permit and not sent:  # pyzmq never sends what is cancelled before it was sent
                permit.release()
            elif permit and not pending.answer.done():
                self.cancelled += self._send_now(encode(Cancel(id)))
            _succeeded(pending.answer)
        if isinstance(message, Refused):
            reason = f"refused ({message.code}): {message.message}"
            refused = NodeRefusedError.of(self.node, reason, "refused")
            refused.refusal, refused.retry_ms = message.code, message.retry_ms
            raise refused
        return message, answer

    def _send_now(self, frame: memoryview) -> bool:
        """Send at once or not at all; returns whether it was sent."""
        sending = self._socket.send(frame, flags=zmq.NOBLOCK)
        return _succeeded(sending)  # pyzmq may queue it behind other messages: then give it up

    def _error(self, reason: str, code: str, mend: str = "") -> NodeError:
        return NodeError.of(self.node, reason, code, mend)

    def _wrong(self, reason: str) -> NodeError:
        return self._error(reason, "wrong_answer")

    def _link_code(self, link: LinkEvent) -> str:
        known = {NOT_AUTHORISED: "not_authorised", self.quarantine: "quarantined"}
        return known.get(link.reason) or _LINK_CODES[link.state]

    async def _ready(self, until: float) -> None:
        """Wait until the node has said that it serves the stage; raise if it does not.

        It is asked once per connection, and again only if that failed.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            await self._connected(until)
            greeting = self._greeting or self._greet()
            await asyncio.wait({greeting}, timeout=max(0.0, until - loop.time()))
            if greeting is not self._greeting:
                continue  # that connection is gone, or another request stopped waiting
            if not greeting.done():
                self._forget_greeting()
                raise self._error(
                    f"it has not said within {loop.time() - begun:.1f} s what it serves, so no "
                    "window was sent: the node is frozen or the link is slow",
                    "late",
                )
            if greeting.cancelled():
                self._forget_greeting()
                raise self._error("asking what it serves was interrupted", "connection_lost")
            if greeting.exception():
                self._forget_greeting()
            if wrong := mismatch(greeting.result(), self.stage):
                raise self._error(wrong, "wrong_bundle", SAME_BUNDLE)
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
        """When to stop waiting for the link. All requests of an outage share one grace."""
        return until if self._link is None else min(until, self._away_since + _GRACE_S)

    async def _connected(self, until: float) -> None:
        """Wait for the link; raise as soon as waiting cannot help."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        if self.quarantine:
            raise self._error(self.quarantine, "quarantined")
        while self._link is None or self._link.state != "up":
            if self._link is not None and self._link.state == "refused":
                raise self._error(self._link.reason, self._link_code(self._link))
            limit = self._patience(until)
            changed = self._link_changed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), max(0.0, limit - loop.time()))
            if not changed.is_set() and loop.time() >= limit:
                if self._link is not None:
                    raise self._error(self._link.reason, self._link_code(self._link))
                raise self._error(
                    f"no connection within {loop.time() - begun:.1f} s: the host does not answer, "
                    "or the node is frozen",
                    "unreachable",
                )

    async def _follow(self) -> None:
        """Keep track of the link's state."""
        events: Any = watch(self._socket, self.node.endpoint, connections=self._connections)
        async with contextlib.aclosing(events):
            async for event in events:
                self._turn(event)
                if event.state == "up":
                    self._greet()
                    self._on_up()
                else:  # the node forgets this edge when the connection ends
                    self._versions_told = False
                    self._forget_greeting()
                    waits = self._away_since + _GRACE_S - asyncio.get_running_loop().time()
                    if event.state != "refused" and waits > 0:
                        self._on_down(waits)
                    self._fail_all(event.reason, self._link_code(event))

    def _turn(self, event: LinkEvent) -> None:
        if self._link is not None and self._link.state == "up":
            self._away_since = asyncio.get_running_loop().time()
        self._link = event
        changed, self._link_changed = self._link_changed, asyncio.Event()
        changed.set()

    async def _measure(self) -> None:
        """Quarantine the node if this process holds too many of its bytes."""
        while True:
            await asyncio.sleep(_METER_S)
            for breach in self._connections.check(time.monotonic()):
                if breach.reason == "endless":
                    await self.shut_out(
                        f"it sent {breach.bytes / 1e6:.0f} MB without ending a message, or without "
                        "being asked; no honest node does that"
                    )
                    return

    async def shut_out(self, reason: str) -> None:
        """Drop the connection, and never use this node again. Open requests fail.

        Does nothing if it is in quarantine already.
        """
        if self.quarantine:
            return
        reason = f"in quarantine until this edge is restarted: {reason}"
        log.warning("%s", self._error(reason, "quarantined"))
        self.quarantine = reason
        self._fail_all(reason, "quarantined")
        await self.close(reason)
        self._turn(LinkEvent("refused", reason))

    async def _read(self) -> None:
        """Receive messages."""
        loop = asyncio.get_running_loop()
        async for message in received(self._socket):
            self._connections.received(message.frame)
            if message.surplus:
                await self.shut_out(
                    f"it sent a message of {1 + message.surplus} frames; honest nodes send one"
                )
                return
            try:
                self._handle(message.frame, loop.time())
            except UnknownVersionError as error:
                self._fail_all(f"wrong answer: {error.found}", error.code, error.mend)
                self._tell_versions()
            except ProtocolError as error:
                # It does not say which request it answers, and this node breaks the protocol.
                self._fail_all(f"wrong answer: {error}", "wrong_answer")
            except Exception as error:  # a node's message must not stop the reader
                reason = f"its answer could not be read ({type(error).__name__})"
                self._fail_all(reason, "wrong_answer")
            # Receiving does not yield while messages are waiting, and timers must run.
            await asyncio.sleep(0)

    def _tell_versions(self) -> None:
        """Tell a node of an unknown version which versions we speak, once per connection."""
        if not self._versions_told:
            self._versions_told = self._send_now(encode(VersionsSpoken(VERSIONS)))

    def _handle(self, frame: zmq.Frame, now: float) -> None:
        message = decode_header(frame)
        if isinstance(message, VersionsSpoken):
            spoken = ", ".join(map(str, message.versions))
            reason = f"speaks only protocol versions {spoken}"
            self._fail_all(reason, UnknownVersionError.code, UPDATE)
            return
        if isinstance(message, Refused) and message.id == NO_ID:
            self._fail_all(f"refused ({message.code}): {message.message}", "refused")
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
        """Rebuild the connection if one of its tasks has ended by itself, which is a bug."""
        error = None if task.cancelled() else task.exception()
        ours = task in self._tasks and self.quarantine is None
        if error is None and not ours:
            return
        why = repr(error) if error else "it was cancelled"
        log.error(
            "the connection to node %s failed: its task %s ended (%s)",
            *(self.name, task.get_name(), why),
            exc_info=error,
        )
        if ours:
            reason = (
                f"the edge's connection failed and is being rebuilt ({why}): this is a defect of "
                "edge-runtime, not the node's; please report it with the log"
            )
            self._rebuilding = self._rebuilding or asyncio.create_task(self._rebuild(reason))

    async def _rebuild(self, reason: str) -> None:
        await self.close(reason)
        while not self._tasks and self.quarantine is None:
            await asyncio.sleep(min(_LONGEST_REST_S, _REST_S * 2 ** min(self._defects, 10)))
            self._defects += 1
            try:
                self.start()
            except Exception:  # for example when no file descriptor is left
                log.exception("the connection to node %s could not be rebuilt yet", self.name)
        self._rebuilding = None
        self._turn(LinkEvent("down", reason))  # until the monitor reports

    def _fail_all(self, reason: str, code: str, mend: str = "") -> None:
        for pending in self._pending.values():
            pending.fail(reason, code, mend)


def _succeeded(future: asyncio.Future[Any]) -> bool:
    """True if it is done without an error. Otherwise it is cancelled. Its error is not logged."""
    return not future.cancel() and not future.cancelled() and future.exception() is None
