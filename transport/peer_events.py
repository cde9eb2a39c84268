"""The events of a server's connections, from libzmq's monitor, and the reasons of failed
handshakes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import itertools
import logging
import struct
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import zmq

from edge_common.logs import LogLimiter
from transport.dos_protection import Connections
from transport.dos_protection.byte_accounting import Connection
from transport.dos_protection.connections import pause_after

log = logging.getLogger(__name__)

REFUSALS = {
    "not_authorised": "its key is not authorised",
    "too_often": "its key is authorised, but connects too often",
    "banished": "its key is authorised, but kept out for a while because it broke a limit",
    "folder": "the folder of authorised keys can't be read or trusted",
    "internal": "the authenticator failed: see the errors before this line",
    "wrong_key": "it does not encrypt for this node's key: the server_key in its edge.toml is "
    "another node's, or damaged on the way",
    "protocol": "it does not speak this protocol, or not with this node's key: another program, a "
    "scan, or an edge without keys or with another node's server_key",
    "timeout": "it did not finish its handshake in time: a scan, a frozen edge or a very slow link",
    "left": "it left in the middle of its handshake",
}
"""Reasons of refused handshakes, as far as a server can know them."""

# Don't listen to EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq 4.3.5 also sends it for a message that
# does not decrypt, keeps that connection half open, and aborts the process at its next heartbeat.
# Anybody who flips a bit on the way could end either process.
HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
# Do not listen to EVENT_ACCEPT_FAILED: without descriptors, libzmq sends it in an endless loop.
SERVER_EVENTS = HANDSHAKE_FAILED | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_GREETING_BYTES, _HELLO_BYTES, _WELCOMED_BYTES = 64, 202, 64 + 170
_EVENT = struct.Struct("=Hi")  # kind, value
_AT_ONCE = 100  # events, before other tasks have their turn


@dataclass(frozen=True)
class PeerEvent:
    """An event of a connection to a server.

    Args:
        kind: ``opened`` (TCP alone), ``refused`` (the handshake failed; the authenticator counts
            its own refusals), ``closed``, ``dropped`` (it broke a limit), or ``full`` (dropped at
            once, for want of descriptors).
        reason: for ``refused``, one of `REFUSALS`; for ``dropped``, a `dos_protection.Reason`.
        address, user: the peer's, as far as known.
        route: for ``closed``, its routing id, if it had sent a message.
    """

    kind: Literal["opened", "refused", "closed", "dropped", "full"]
    reason: str = ""
    address: str = ""
    user: str = ""
    route: bytes = b""


def follow(
    socket: Any, connections: Connections, *, every_s: float = 0.02
) -> AsyncGenerator[PeerEvent, None]:
    """Follow a server's connections, log what happens to them, and drop those that break a limit.

    Iterate for as long as the socket lives (one task per socket), then `aclose` the iterator before
    closing the socket.

    Args:
        socket: from `sockets.server`, made with ``monitor=True``.
        connections: receives the events, is checked and, at the end, closed.
        every_s: how often to check, less often (to 0.1 s) with many connections.
    """
    return _Follower(socket, connections).events(every_s)


class _Follower:
    def __init__(self, socket: Any, connections: Connections) -> None:
        self._socket, self._connections = socket, connections
        self._monitor = socket.get_monitor_socket(SERVER_EVENTS)
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(self._monitor)
        self._limiter = LogLimiter()
        self._news: collections.deque[PeerEvent] = collections.deque()
        self._handshakes = FailedHandshakes()
        connections.read_events = self._read

    async def events(self, every_s: float) -> AsyncGenerator[PeerEvent, None]:
        due = 0.0
        try:
            while True:
                self._read(_AT_ONCE)
                more = bool(self._news)
                begun = time.monotonic()
                if begun >= due:
                    self._check(begun)
                    due = pause_after(begun, every_s)
                while self._news:
                    yield self._news.popleft()
                await asyncio.sleep(0 if more else max(0.0, due - time.monotonic()))
        finally:
            self._connections.read_events = lambda: None
            self._connections.close()
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._monitor.close(linger=0)

    def _read(self, most: int | None = None) -> None:
        """Read the events that wait, at most so many."""
        with contextlib.suppress(zmq.Again):
            for _ in itertools.repeat(None) if most is None else range(most):
                kind, value = _EVENT.unpack(self._plain.recv_multipart(zmq.NOBLOCK)[0])
                self._handle(kind, value)

    def _handle(self, kind: int, value: int) -> None:
        if kind == zmq.EVENT_ACCEPTED:
            kept = self._connections.opened(value, time.monotonic())
            self._news.append(PeerEvent("opened" if kept else "full"))
            if not kept and self._limiter.allows("full"):
                log.error(
                    "connections dropped: no file descriptors are left; raise the limit (ulimit "
                    "-n, or LimitNOFILE= of the service)"
                )
        elif kind & HANDSHAKE_FAILED:
            self._handshakes.failed(kind, value)
        else:
            self._ended(self._connections.closed(value) or Connection(-1, "", 0.0))

    def _ended(self, ended: Connection) -> None:
        if reason := self._handshakes.reason(ended):
            self._news.append(PeerEvent("refused", reason, ended.address))
            if self._limiter.allows((reason, ended.address)):
                whose = ended.address or "a connection"
                log.warning("handshake of %s failed: %s", whose, REFUSALS[reason])
        self._news.append(PeerEvent("closed", "", ended.address, ended.user, ended.route))

    def _check(self, now: float) -> None:
        for dropped in self._connections.check(now):
            peer = dropped.connection
            if self._limiter.allows((dropped.reason, peer.address, peer.user)):
                log.warning("%s", dropped)
            self._news.append(PeerEvent("dropped", dropped.reason, peer.address, peer.user))


class FailedHandshakes:
    """Finds out why handshakes failed, from events and the bytes that were exchanged."""

    def __init__(self) -> None:
        self._failed = ""  # why the connection failed whose end libzmq reports next
        self._refused = 0  # refused by the authenticator; their ends come later

    def failed(self, kind: int, value: int) -> None:
        """One of `HANDSHAKE_FAILED` was reported."""
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused += 1
        else:
            self._failed = "timeout" if value in (errno.EAGAIN, errno.ETIMEDOUT) else "left"

    def reason(self, ended: Connection) -> str:
        """Why a handshake failed, one of `REFUSALS`. Empty if it had succeeded, or if the
        authenticator refused it: the authenticator counts that itself."""
        reason, self._failed = self._failed, ""
        if ended.authenticated or reason:
            return "" if ended.authenticated else reason
        if self._refused and (not ended.sent or ended.sent >= _WELCOMED_BYTES):
            self._refused -= 1
            return ""
        greeted = ended.sent >= _GREETING_BYTES
        hello = ended.received >= _GREETING_BYTES + _HELLO_BYTES
        return "wrong_key" if greeted and hello else "protocol"
