"""The node's socket with all that guards it: ROUTER, authenticator and meter, opened, closed and
opened anew as one.

Promises that a message handed on comes from an edge that is authorised now, that sending never
waits, and that after `reopen` everything libzmq held is free and the same port is bound again;
edges reconnect by themselves. What messages mean is left to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
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
from transport.auth import KEY, Authenticator, Pace, Penalties
from transport.meter import Meter, bounds, message_bytes
from transport.sockets import BACKLOG, Bell, PeerEvent, peers, received
from transport.sockets import server as server_socket

log = logging.getLogger(__name__)

_REOPEN_S = 2.0
_RETRY_S = 0.02
MESSAGES_PER_S = 3000.0
"""Messages that one edge may send in a second: twice as many as an edge needs that sends a frame of
25 windows in as many requests, thirty times a second, and cancels each of them. A message that is
refused, or answered without work, counts for more (`in_vain`)."""
_BURST = 4000
_TURN_S = 0.002
"""How long messages are read before others in the event loop have their turn."""
_BREACHES = {
    "endless": "it sent more than may wait, or a message without end",
    "slow": "it asked for more than it reads",
}

Sent = Literal["sent", "lost", "unread"]
"""``lost``: the connection has ended; ``unread``: the edge does not read what it asked for."""


def in_vain(size: int) -> float:
    """What a message of so many bytes that was of no use counts for, besides itself."""
    return 2 + size / (1 << 16)


class Door:
    """Open from `open` to `close`.

    Args:
        prepared: address, keys and limits.
        metrics: counts handshakes and connections.
        on_message: is called with a message's frame, the routing id of its connection and the name
            of its key. What it raises is logged and forgotten. If it returns nothing true, the
            message was of no use and counts for more (`MESSAGES_PER_S`).
        on_revoked: is called with names whose keys have been taken away; their connections have
            been dropped.
        on_left: is called with the name and the routing id of a connection that has ended.
        lanes: batches that compute at the same time; an edge may have all of them.

    Attributes:
        endpoint: where it is bound, with the port chosen.
        broken: a future that fails if the door can't go on.
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
        self._bounds = bounds(
            limits.request,
            limits.result,
            # An edge may have sent all that it is allowed before any of it is read.
            backlog=max(BACKLOG, prepared.config.client_requests),
            total=prepared.config.queue_bytes,
            files=raise_file_limit(),
            # A batch computes in each lane and another waits there, while two results leave.
            results=2 * lanes + 2,
        )
        self._wide = self._bounds
        self._ctx: zmq.Context[Any] | None = None
        self._socket: Any = None
        self._bell: Bell | None = None
        self._authenticator: Authenticator | None = None
        self._meter: Meter | None = None
        self._pace, self._penalties = Pace(_BURST, MESSAGES_PER_S), Penalties()
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
            ConfigError: the address can't be bound; `close` all the same.
        """
        prepared = self._prepared
        self._ctx = zmq.Context()
        self._meter = meter = Meter(self._bounds)
        self._authenticator = Authenticator(
            self._ctx,
            prepared.allowed,
            self._revoke,
            self._broke,
            before_each=lambda: meter.catch_up(),
            on_refused=lambda reason: self._metrics.handshakes_refused.labels(reason).inc(),
            penalties=self._penalties,
        )
        self._authenticator.start()
        self._socket = server_socket(
            self._ctx, self.endpoint, prepared.keypair, prepared.limits, monitor=True
        )
        self.endpoint = self._socket.last_endpoint.decode()
        self._bell = Bell(self._socket)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._follow(peers(self._socket, meter)), name="peers"),
            loop.create_task(self._read(self._socket, self._bell, meter), name="read"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    @property
    def unsent(self) -> int:
        """Most bytes that should wait for one edge to read them."""
        return self._bounds.unsent

    @property
    def total(self) -> int:
        """Most bytes that should wait for all edges together."""
        return self._bounds.total

    @property
    def connections(self) -> int:
        """Most that stay open."""
        return self._bounds.connections

    def bound(self, total: int, connections: int) -> None:
        """Let edges hold no more than this: bytes of all together, and connections; never more than
        at first."""
        wide, limits = self._wide, self._prepared.limits
        self._bounds = dataclasses.replace(
            self._bounds,
            unseen=min(wide.unseen, max(3 * message_bytes(limits.request), total // 2)),
            unsent=min(wide.unsent, max(2 * message_bytes(limits.result), total // 2)),
            total=min(wide.total, total),
            handshakes=min(wide.handshakes, max(2, connections // 2)),
            connections=min(wide.connections, connections),
        )
        if self._meter is not None:
            self._meter.bound(self._bounds)

    async def close(self, flush_s: float = 0.0) -> None:
        """Let nobody in any more and, if asked to, what was sent leave; then drop all connections.

        Lingering alone does not flush: a closing socket counts a message as gone once it has left
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
        if self._bell:
            self._bell.close()
        if self._socket:
            self._socket.close(linger=round(flush_s * 1000))
        self._ctx.destroy()
        self._ctx = self._socket = self._bell = None

    async def reopen(self) -> None:
        """Close and open, which frees all that libzmq held.

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
            except Exception:  # the reaper may not have closed the old listener yet
                if time.monotonic() > give_up:
                    raise
            await self.close()
            await asyncio.sleep(_RETRY_S)

    def admits(self, name: str, key: str) -> bool:
        """Whether this key is authorised, under this name."""
        return self._authenticator is not None and self._authenticator.admits(name, key)

    def banish(self, name: str, reason: str) -> None:
        """Drop the connections of an edge that broke a rule, and keep it out for a while, twice as
        long each time. What it has sent and nobody has read yet is thrown away.

        Args:
            name: of its key.
            reason: for the log: what it did, and what is allowed.
        """
        assert self._authenticator is not None
        assert self._meter is not None
        now = time.monotonic()
        if self._authenticator.banished(name, now):
            return
        seconds = self._authenticator.banish(name)
        self._pace.drain(name, now + seconds)  # if it goes on as before, that shows sooner
        log.warning("%s is kept out for %.0f s: %s", name, seconds, reason)
        for breach in self._meter.banish(name):
            self._metrics.connections_dropped.labels(breach.reason).inc()

    def _spend(self, name: str, messages: float) -> bool:
        """Count so many messages of an edge; False if these were too many, and it is banished."""
        if self._pace(name, time.monotonic(), messages):
            return True
        self.banish(name, f"it sent more than {MESSAGES_PER_S:,.0f} messages a second")
        return False

    def send(self, peer: bytes, frame: memoryview) -> Sent:
        """Send to this edge's connection without ever waiting. The frame is not copied and must not
        change until freed."""
        if self._socket is None:
            return "lost"
        assert self._meter is not None
        assert self._bell is not None
        self._bell.ring()
        try:
            self._socket.send_multipart([peer, frame], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return "unread"
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return "lost"
            raise
        try:
            self._meter.handed(frame.nbytes, time.monotonic(), route=peer)
        except Exception:  # it is on its way all the same: nobody must send it again
            log.exception("a message that was sent could not be metered")
        return "sent"

    def waiting(self, name: str | None = None) -> int:
        """Bytes sent to an edge, or to all, and not read yet; 0 where that is unknown."""
        return 0 if self._meter is None else self._meter.waiting(name)

    @property
    def rate(self) -> float:
        """Bytes a second that all edges together have been reading of late."""
        return 0.0 if self._meter is None else self._meter.rate

    def look_again(self) -> bool:
        """Bring `waiting` up to date; False if it was a moment ago."""
        return self._meter is not None and self._meter.look()

    def look(self) -> None:
        """Bring the gauges up to date."""
        if self._meter is not None:
            self._metrics.connections.set(self._meter.connections)
            self._metrics.clients.set(len(self._meter.users()))

    async def _read(self, socket: Any, bell: Bell, meter: Meter) -> None:
        turn = 0.0
        async for frame, route, surplus in received(socket, routed=True, bell=bell):
            now = time.monotonic()
            try:
                self._take(frame, route, surplus, meter, now)
            except Exception as error:  # a peer's message must not stop the node
                # Where, but not the exception's text, which may quote what arrived.
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("message dropped: %s at\n%s", type(error).__name__, where)
            if now > turn:
                await asyncio.sleep(0)
                turn = time.monotonic() + _TURN_S

    def _take(self, frame: zmq.Frame, route: bytes, surplus: int, meter: Meter, now: float) -> None:
        name = str(frame.get("User-Id"))
        if self._authenticator is None or self._authenticator.banished(name, now):
            meter.unwanted(frame)
            return
        meter.delivered(frame, route)
        if surplus:
            self.banish(name, "it sent a message of several frames, and ours have one")
        elif self._spend(name, 1) and self.admits(name, str(frame.get(KEY))):
            useful = self._on_message(frame, route, name)
            if not useful:
                self._spend(name, in_vain(len(frame)))

    async def _follow(self, events: AsyncGenerator[PeerEvent, None]) -> None:
        async with contextlib.aclosing(events):
            async for event in events:
                self._count(event)
                if event.reason in ("endless", "slow") and event.user:
                    self.banish(event.user, _BREACHES[event.reason])
                if event.route:
                    self._on_left(event.user, event.route)

    def _count(self, event: PeerEvent) -> None:
        if event.kind == "refused":
            self._metrics.handshakes_refused.labels(event.reason).inc()
        elif event.kind == "dropped":
            self._metrics.connections_dropped.labels(event.reason).inc()
        elif event.kind == "full":
            self._metrics.connections_dropped.labels("full").inc()

    def _revoke(self, names: frozenset[str]) -> None:
        if self._meter is not None:
            for breach in self._meter.revoke(names):
                self._metrics.connections_dropped.labels(breach.reason).inc()
        self._on_revoked(names)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks:
            self._broke(task)

    def _broke(self, task: asyncio.Task[None]) -> None:
        """A task that ends by itself is a defect: let it show."""
        if not self.broken.done():
            error = None if task.cancelled() else task.exception()
            self.broken.set_exception(error or RuntimeError(f"{task.get_name()} has ended"))
