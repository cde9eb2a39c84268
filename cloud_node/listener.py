"""The node's socket with its protection: ROUTER, authenticator and connection limits, opened,
closed and reopened together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal

import zmq

from cloud_node.config import Prepared
from cloud_node.metrics import Metrics
from edge_common.process import raise_file_limit
from transport.auth import KEY, Authenticator
from transport.dos_protection import (
    Connections,
    PenaltyBox,
    RateLimit,
    connection_limits,
)
from transport.peer_events import PeerEvent, follow
from transport.sockets import BACKLOG, Readable, received
from transport.sockets import server as server_socket

log = logging.getLogger(__name__)

_REOPEN_S = 2.0
_RETRY_S = 0.02
MESSAGES_PER_S = 3000.0
"""Messages that one edge may send in a second: twice as many as an edge that sends the 25 windows
of a frame in as many requests, thirty times a second, and cancels each of them. A useless message
counts for more (`useless_cost`)."""
_BURST = 4000
_TURN_S = 0.002
"""How long messages are read before other tasks have their turn."""
_BREACHES = {
    "endless": "it sent more than may wait, or a message without end",
    "slow": "it asked for more than it reads",
}

Sent = Literal["sent", "lost", "unread"]
"""``lost``: the connection has ended. ``unread``: the edge does not read what it asked for."""


def useless_cost(size: int) -> float:
    """Messages that a useless message of so many bytes counts for, besides itself."""
    return 2 + size / (1 << 16)


class Listener:
    """Hands on the messages of authorised edges, and sends without ever waiting.

    Args:
        prepared: address, keys and limits.
        metrics: counts handshakes and connections.
        on_message: is called with a message's frame, the routing id of its connection and the name
            of its key. Its exceptions are logged. Unless it returns something true, the message was
            useless and counts for more.
        on_revoked: is called with names whose keys were revoked; their connections are dropped.
        on_left: is called with the name and the routing id of a connection that has ended.
        lanes: batches that compute at the same time; one edge may have all of them.

    Attributes:
        endpoint: where it is bound, with the port that was chosen.
        limits: of its connections.
        broken: a future that fails if the listener can't go on.
    """

    def __init__(
        self,
        prepared: Prepared,
        metrics: Metrics,
        on_message: Callable[[zmq.Frame, bytes, str], object],
        on_revoked: Callable[[frozenset[str]], None],
        on_left: Callable[[str, bytes], None] = lambda name, route: None,
        *,
        lanes: int = 1,
    ) -> None:
        self.endpoint = prepared.config.bind
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._prepared = prepared
        self._metrics = metrics
        self._on_message = on_message
        self._on_revoked = on_revoked
        self._on_left = on_left
        limits = prepared.limits
        self._widest = self.limits = connection_limits(
            limits.request,
            limits.result,
            # An edge may have sent all its requests before the first is read.
            backlog=max(BACKLOG, prepared.config.client_requests),
            total=prepared.config.queue_bytes,
            files=raise_file_limit(),
            # In each lane a batch computes and another one waits, while two results leave.
            results=2 * lanes + 2,
        )
        self._connections = Connections(self.limits)
        self._ctx: zmq.Context[Any] | None = None
        self._socket: Any = None
        self._readable: Readable | None = None
        self._authenticator: Authenticator | None = None
        self._rate, self._penalties = RateLimit(_BURST, MESSAGES_PER_S), PenaltyBox()
        self._tasks: list[asyncio.Task[None]] = []

    def try_address(self) -> None:
        """Fail now and not after the workers' warm-up.

        Raises:
            ConfigError: the address can't be bound.
        """
        with zmq.Context() as ctx:
            server_socket(ctx, self.endpoint, self._prepared.keypair, self._prepared.limits).close()

    def open(self) -> None:
        """Bind, and begin to let edges in.

        Raises:
            ConfigError: the address can't be bound. Call `close` in this case too.
        """
        prepared = self._prepared
        self._ctx = zmq.Context()
        self._connections = Connections(self.limits)
        self._authenticator = Authenticator(
            self._ctx,
            prepared.allowed,
            self._revoke,
            self._break,
            connections=self._connections,
            on_refused=lambda reason: self._metrics.handshakes_refused.labels(reason).inc(),
            penalties=self._penalties,
        )
        self._authenticator.start()
        self._socket = server_socket(
            self._ctx, self.endpoint, prepared.keypair, prepared.limits, monitor=True
        )
        self.endpoint = self._socket.last_endpoint.decode()
        self._readable = Readable(self._socket)
        loop = asyncio.get_running_loop()
        events = follow(self._socket, self._connections)
        self._tasks = [
            loop.create_task(self._follow(events), name="peers"),
            loop.create_task(self._read(self._socket, self._readable), name="read"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def lower_limits(self, total: int, connections: int) -> None:
        """Let edges hold at most so many bytes and connections, and never more than at first."""
        limits = self._prepared.limits
        self.limits = self._widest.lowered(total, connections, limits.request, limits.result)
        self._connections.limits = self.limits

    async def close(self, flush_s: float = 0.0) -> None:
        """Drop all connections, after `flush_s` for what was sent to leave.

        Lingering alone does not flush: a closing socket counts a message as sent once it has left
        its queue, and drops what the connection has not written yet.
        """
        if self._ctx is None:
            return
        if flush_s:
            await asyncio.sleep(flush_s)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._authenticator:
            await self._authenticator.stop()
        if self._readable:
            self._readable.close()
        if self._socket:
            self._socket.close(linger=round(flush_s * 1000))
        self._ctx.destroy()
        self._ctx = self._socket = self._readable = None

    async def reopen(self) -> None:
        """Close and open on the same port, which frees all that libzmq held. Edges reconnect.

        Raises:
            ConfigError: the port could not be bound again.
        """
        await self.close()
        with contextlib.suppress(AttributeError, OSError):  # only where glibc is
            ctypes.CDLL(None).malloc_trim(0)
        give_up = time.monotonic() + _REOPEN_S
        while True:
            try:
                return self.open()
            except Exception:  # libzmq's reaper may not have closed the old socket yet
                if time.monotonic() > give_up:
                    raise
            await self.close()
            await asyncio.sleep(_RETRY_S)

    def admits(self, name: str, key: str) -> bool:
        """True if this key is authorised under this name."""
        return self._authenticator is not None and self._authenticator.admits(name, key)

    def ban(self, name: str, reason: str) -> None:
        """Keep an edge that broke a rule out for a while, drop its connections, and throw away what
        it has sent.

        Args:
            name: of its key.
            reason: for the log: what it did.
        """
        now = time.monotonic()
        if self._penalties.banned(name, now):
            return
        seconds = self._penalties.ban(name, now)
        self._rate.drain(name, now + seconds)  # if it goes on, that shows sooner
        log.warning("%s is kept out for %.0f s: %s", name, seconds, reason)
        self._connections.drop([name], "banished")

    def _charge(self, name: str, messages: float) -> bool:
        """Count messages of an edge. Returns False if there were too many: then it is banned."""
        if self._rate.take(name, time.monotonic(), messages):
            return True
        self.ban(name, f"it sent more than {MESSAGES_PER_S:,.0f} messages a second")
        return False

    def send(self, peer: bytes, frame: memoryview) -> Sent:
        """Send to the connection with this routing id. The frame is not copied and must not change
        until it is freed."""
        if self._socket is None or self._readable is None:
            return "lost"
        self._readable.wake()
        try:
            self._socket.send_multipart([peer, frame], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return "unread"
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return "lost"
            raise
        try:
            self._connections.sent(frame.nbytes, time.monotonic(), route=peer)
        except Exception:  # it was sent nevertheless and must not be sent again
            log.exception("a message that was sent could not be metered")
        return "sent"

    def unread(self, name: str | None = None) -> int:
        """Bytes sent to an edge, or to all, and not acknowledged; 0 where that is unknown."""
        return self._connections.unread(name)

    @property
    def read_rate(self) -> float:
        """Bytes per second that all edges together read lately."""
        return self._connections.read_rate

    def refresh(self) -> bool:
        """Bring `unread` up to date. Returns False if that was done a moment ago."""
        return self._connections.refresh()

    def update_gauges(self) -> None:
        self._metrics.connections.set(len(self._connections))
        self._metrics.clients.set(len(self._connections.users()))

    async def _read(self, socket: Any, readable: Readable) -> None:
        turn = 0.0
        async for frame, route, surplus in received(socket, routed=True, readable=readable):
            now = time.monotonic()
            try:
                self._receive(frame, route, surplus, now)
            except Exception as error:  # a peer's message must not stop the node
                # The place, but not the exception's text, which may quote the message.
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("message dropped: %s at\n%s", type(error).__name__, where)
            if now > turn:
                await asyncio.sleep(0)
                turn = time.monotonic() + _TURN_S

    def _receive(self, frame: zmq.Frame, route: bytes, surplus: int, now: float) -> None:
        name = str(frame.get("User-Id"))
        banned = self._penalties.banned(name, now)
        self._connections.received(frame, route, banned=banned)
        if banned:
            return
        if surplus:
            self.ban(name, "it sent a message of several frames, and ours have one")
        elif self._charge(name, 1) and self.admits(name, str(frame.get(KEY))):
            useful = self._on_message(frame, route, name)
            if not useful:
                self._charge(name, useless_cost(len(frame)))

    async def _follow(self, events: AsyncGenerator[PeerEvent, None]) -> None:
        async with contextlib.aclosing(events):
            async for event in events:
                self._count(event)
                if event.user and event.reason in _BREACHES:
                    self.ban(event.user, _BREACHES[event.reason])
                if event.route:
                    self._on_left(event.user, event.route)

    def _count(self, event: PeerEvent) -> None:
        if event.kind == "refused":
            self._metrics.handshakes_refused.labels(event.reason).inc()
        elif event.kind in ("dropped", "full"):
            self._metrics.connections_dropped.labels(event.reason or "full").inc()

    def _revoke(self, names: frozenset[str]) -> None:
        # Also drop connections that have sent no message, because their key is not known yet.
        # Honest edges reconnect at once.
        self._connections.drop({*names, ""}, "revoked")
        self._on_revoked(names)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks:
            self._break(task)

    def _break(self, task: asyncio.Task[None]) -> None:
        """If one of these tasks ends, that is a defect: stop the node."""
        if not self.broken.done():
            error = None if task.cancelled() else task.exception()
            self.broken.set_exception(error or RuntimeError(f"{task.get_name()} has ended"))
