"""A client's link to its server: connects, connects again where libzmq gives up, and explains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.dos_protection import Connections
from transport.peer_events import HANDSHAKE_FAILED

NOT_AUTHORISED = (
    "handshake refused: this edge's key is not authorised on the node; send its .pub file to the "
    "node's operator, who adds it with `edge-runtime keys authorize`"
)
WRONG_SERVER_KEY = (
    "handshake refused: wrong server key or not a CURVE node; compare the configured server key "
    "with the node's node.pub"
)
NOT_A_NODE = "handshake refused: what listens there is not a CURVE node"
NO_ANSWER = (
    "handshake not answered: the node is frozen or overloaded, or what listens there is not one"
)
REFUSED_FOR_NOW = (
    "handshake refused for now: this edge connected too often, or broke one of the node's limits "
    "and is kept out for a while, or the node can't read its keys; its log says which"
)
UNREACHABLE = (
    "unreachable: no TCP connection (name not found, port closed or filtered, or node not running)"
)
CONNECTION_LOST = "connection lost: the node stopped, froze or the network broke"
_EVENTS = (
    HANDSHAKE_FAILED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)
_RETRY_GRACE_S = 0.2  # libzmq announces a retry together with the disconnection, or not at all


@dataclass(frozen=True)
class LinkEvent:
    """A change of a client's link.

    Args:
        state: ``up`` (handshake done), ``down`` (was up and broke), ``unreachable`` (no TCP
            connection), ``refused`` (a TCP connection but no handshake).
        reason: for the user.
    """

    state: Literal["up", "down", "unreachable", "refused"]
    reason: str


async def watch(
    socket: Any,
    endpoint: str,
    *,
    first_retry_s: float = 0.5,
    last_retry_s: float = 10.0,
    connections: Connections | None = None,
) -> AsyncGenerator[LinkEvent, None]:
    """Connect a `sockets.client`, made with ``connect=False``, again and again, and report changes.

    Iterate for as long as the socket lives (one task per socket), then `aclose` the iterator before
    closing the socket. libzmq gives a link up for good after a refused key or a protocol error, and
    tries ten times a second after other failed handshakes; here both are tried again with back-off.
    libzmq itself retries when there is no TCP connection.

    Args:
        socket: an asyncio socket from `sockets.client`, not connected.
        endpoint: where to connect.
        first_retry_s: wait before the first retry after a failed handshake; doubles each time.
        last_retry_s: the longest such wait.
        connections: receives the connection's events. Its owner calls `check`.

    Yields:
        events whose state or reason differs from the one before.
    """
    monitor = socket.get_monitor_socket(_EVENTS)
    wait = first_retry_s
    last: LinkEvent | None = None
    tcp = up = failed = resuming = False
    try:
        socket.connect(endpoint)
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            kind, value = event["event"], int(event["value"])
            state: LinkEvent | None = None
            reconnect = False
            if kind == zmq.EVENT_CONNECTED:
                tcp, failed = True, False
                if connections is not None:
                    connections.opened(value, time.monotonic())
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                up, wait = True, first_retry_s
                state = LinkEvent("up", "connected")
            elif kind & HANDSHAKE_FAILED:
                state = LinkEvent("refused", _explain(kind, value))
                reconnect = failed = True
            elif kind == zmq.EVENT_DISCONNECTED:
                if connections is not None:
                    connections.closed(value)
                if up:
                    state = LinkEvent("down", CONNECTION_LOST)
                elif not failed:  # else the failed handshake was reported already
                    state = LinkEvent("refused", NOT_A_NODE)
                resuming = bool(await monitor.poll(int(_RETRY_GRACE_S * 1000)))
                reconnect = not resuming
                tcp = up = False
            elif kind == zmq.EVENT_CONNECT_RETRIED:
                # The first one after a disconnection announces an attempt, the others report failed
                # attempts.
                if not tcp and not resuming:
                    state = LinkEvent("unreachable", UNREACHABLE)
                resuming = False
            if state and state != last:
                last = state
                yield state
            if reconnect:
                with contextlib.suppress(zmq.ZMQError):  # libzmq forgets an endpoint it gave up
                    socket.disconnect(endpoint)
                if connections is not None:
                    connections.close()
                await asyncio.sleep(wait)
                wait = min(2 * wait, last_retry_s)
                while await monitor.poll(0):  # events of the old attempt
                    await monitor.recv_multipart()
                tcp = up = False
                socket.connect(endpoint)
    finally:
        if connections is not None:
            connections.close()
        if not socket.closed:
            socket.disable_monitor()
        monitor.close(linger=0)


def _explain(kind: int, value: int) -> str:
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return REFUSED_FOR_NOW if value == 500 else NOT_AUTHORISED
    return NO_ANSWER if value == errno.EAGAIN else WRONG_SERVER_KEY
