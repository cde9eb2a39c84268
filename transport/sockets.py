"""Secure ZeroMQ sockets: every option that matters, set on purpose in this one place, with its
reason.

An edge opens one DEALER per node (`client`), a node one ROUTER (`server`). Both are CURVE or
nothing. The options bound what a peer can make us hold, but not the number of frames of a message
nor the sum over connections: receivers count frames, and nodes admit by bytes. `watch` turns
libzmq's monitor events into `LinkEvent`s that say, as far as an end can know, why a link is down.
Who is let in is decided in `auth`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

from engines.errors import ConfigError
from transport.keys import KeyPair
from transport.messages import HEADER_BYTES, StageLimits

ZAP_DOMAIN = b"edge-runtime"
SLOWEST_LINK = 1_000_000
"""Bytes per second of the slowest link that must not be taken for a dead one (8 Mbit/s)."""
_SLACK_BYTES = 4096  # CURVE and framing around a part
_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5}|\*)\Z")


def check_endpoint(endpoint: str, *, bind: bool = False) -> str:
    """`endpoint` if it has the form ``tcp://HOST:PORT``.

    Args:
        endpoint: an IPv6 address goes in brackets.
        bind: also allow the wildcards ``*`` as host, and port 0 (any free port).

    Raises:
        ConfigError: it has not.
    """
    match = _ENDPOINT.match(endpoint)
    port = match.group(2) if match else "*"
    number = int(port) if port.isdigit() else -1
    if not match or not (0 if bind else 1) <= number <= 65535 or (match[1] == "*" and not bind):
        example = "tcp://0.0.0.0:5555" if bind else "tcp://node.example.org:5555"
        raise ConfigError(f"malformed endpoint {endpoint!r}: expected tcp://HOST:PORT as {example}")
    return endpoint


def heartbeat_timeout_ms(limits: StageLimits) -> int:
    """Silence after which a link counts as dead: max(3 s, twice the largest part at the slowest
    link).

    A ping can't overtake a part already on its way, nor does half a part count as life. Shorter
    timeouts cut healthy slow links and lose the request silently.
    """
    part = max(limits.request.part_bytes, limits.result.part_bytes)
    return max(3000, 2 * part * 1000 // SLOWEST_LINK)


def _common(socket: Any, endpoint: str, largest_part: int, limits: StageLimits) -> None:
    # A peer announces a part's size before sending it and libzmq allocates it whole; without this,
    # four unauthenticated peers cost hundreds of megabytes.
    socket.set(zmq.MAXMSGSIZE, max(largest_part, HEADER_BYTES) + _SLACK_BYTES)
    # Nothing may outlive its socket: a late request or reply is worthless, and close() must not
    # hang.
    socket.set(zmq.LINGER, 0)
    # High-water marks count messages, not bytes; with a MAXMSGSIZE they bound memory per peer. A
    # full inbox stops reading, and TCP pushes back on the sender.
    socket.set(zmq.RCVHWM, 8)
    # A frozen peer keeps its TCP connection open; only heartbeats show it.
    socket.set(zmq.HEARTBEAT_IVL, 1000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, heartbeat_timeout_ms(limits))
    # A connection that doesn't finish its handshake holds a file descriptor: give it up.
    socket.set(zmq.HANDSHAKE_IVL, 3000)
    # Off by default: with it on, a name that resolves to ::1 first never tries 127.0.0.1.
    socket.set(zmq.IPV6, int("[" in endpoint))


def client(
    ctx: zmq.Context[Any],
    endpoint: str,
    server_key: str,
    keypair: KeyPair,
    limits: StageLimits,
    *,
    connect: bool = True,
) -> Any:
    """A DEALER connected to one node, of the socket type `ctx` makes (plain or asyncio).

    Args:
        ctx: context.
        endpoint: ``tcp://HOST:PORT``.
        server_key: the node's public key, Z85.
        keypair: this edge's key for this node alone.
        limits: of the stage asked for.
        connect: False to attach a monitor (`watch`) first, so that it misses no event; then call
            ``socket.connect(endpoint)``.

    Raises:
        ConfigError: malformed endpoint.
    """
    check_endpoint(endpoint)
    socket = ctx.socket(zmq.DEALER)
    try:
        _common(socket, endpoint, limits.result.part_bytes, limits)
        # Pinned: a host with another key can't answer in the node's place.
        socket.set(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.set(zmq.CURVE_PUBLICKEY, keypair.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, keypair.secret.encode())
        # Queue only to a finished handshake: a request never waits in a socket for a node to come
        # back, where no deadline would reach it. Sending then blocks (or fails with EAGAIN) while
        # the node is away.
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.SNDHWM, 8)
        # Come back fast after a blip, and don't hammer a node that stays away.
        socket.set(zmq.RECONNECT_IVL, 100)
        socket.set(zmq.RECONNECT_IVL_MAX, 10_000)
        # The kernel's own connect timeout is minutes.
        socket.set(zmq.CONNECT_TIMEOUT, 3000)
        if connect:
            socket.connect(endpoint)
    except BaseException:
        socket.close()
        raise
    return socket


def server(ctx: zmq.Context[Any], bind: str, keypair: KeyPair, limits: StageLimits) -> Any:
    """A ROUTER bound to `bind`; ``socket.last_endpoint`` tells the port when it was 0.

    Start `auth.Authenticator` on `ctx` first: without it nobody is let in.

    Raises:
        ConfigError: malformed or unusable endpoint.
    """
    check_endpoint(bind, bind=True)
    socket = ctx.socket(zmq.ROUTER)
    try:
        _common(socket, bind, limits.request.part_bytes, limits)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keypair.secret.encode())
        # CURVE alone lets any client in. With a domain and its enforcement, no authenticator means
        # nobody.
        socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        # A reply to an edge that left is an error we see (EHOSTUNREACH), one to an edge that
        # doesn't read is EAGAIN; without it both vanish silently.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # A newcomer using another's routing id must not take over its replies.
        socket.set(zmq.ROUTER_HANDOVER, 0)
        # Two messages for each request that may wait (16), and some room: libzmq gives credit for
        # what was read only half a mark at a time.
        socket.set(zmq.SNDHWM, 48)
        socket.set(zmq.BACKLOG, 256)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            hint = {
                errno.EADDRINUSE: "another process has this port; choose another one",
                errno.EACCES: "this port needs privileges; choose one above 1023",
            }.get(error.errno or 0, "is the address one of this machine's?")
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"cannot listen on {bind}: {reason} ({hint})") from None
    except BaseException:
        socket.close()
        raise
    return socket


LinkState = Literal["up", "down", "unreachable", "refused"]


@dataclass(frozen=True)
class LinkEvent:
    """What became of a client's link.

    `state`: ``up`` (handshake done), ``down`` (was up and broke), ``unreachable`` (no TCP
    connection), ``refused`` (a TCP connection but no handshake). `reason` is for the user.
    """

    state: LinkState
    reason: str


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
UNREACHABLE = (
    "unreachable: no TCP connection (name not found, port closed or filtered, or node not running)"
)
CONNECTION_LOST = "connection lost: the node stopped, froze or the network broke"

_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_WATCHED = (
    _FAILED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)
# libzmq tells of a retry in the same breath as of the disconnection, if it is going to.
_RETRY_GRACE_S = 0.2


async def watch(
    socket: Any, endpoint: str, *, first_retry_s: float = 0.5, last_retry_s: float = 10.0
) -> AsyncGenerator[LinkEvent, None]:
    """Connect a `client` made with ``connect=False``, keep it so, and tell how its link fares.

    Iterate for as long as the socket lives (one task per socket), then `aclose` the iterator before
    closing the socket. It reconnects where libzmq doesn't: libzmq gives a link up for good after a
    refused key or a protocol error, and hammers a node ten times a second after other failed
    handshakes. Missing TCP connections are left to libzmq, with its own backoff.

    Args:
        socket: an asyncio socket from `client`, not connected.
        endpoint: where to.
        first_retry_s: wait before connecting anew after a failed handshake; doubles each time.
        last_retry_s: the longest such wait.

    Yields:
        events whose state or reason differs from the one before.
    """
    monitor = socket.get_monitor_socket(_WATCHED)
    wait = first_retry_s
    last: LinkEvent | None = None
    tcp = up = resuming = False
    try:
        socket.connect(endpoint)
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            kind, value = event["event"], int(event["value"])
            state: LinkEvent | None = None
            reconnect = False
            if kind == zmq.EVENT_CONNECTED:
                tcp = True
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                up, wait = True, first_retry_s
                state = LinkEvent("up", "connected")
            elif kind & _FAILED:
                state = LinkEvent("refused", _explain(kind, value))
                reconnect = True
            elif kind == zmq.EVENT_DISCONNECTED:
                state = (
                    LinkEvent("down", CONNECTION_LOST) if up else LinkEvent("refused", NOT_A_NODE)
                )
                if not up and last and last.state == "refused":
                    state = None  # follows a failed handshake already told
                resuming = bool(await monitor.poll(int(_RETRY_GRACE_S * 1000)))
                reconnect = not resuming
                tcp = up = False
            elif kind == zmq.EVENT_CONNECT_RETRIED:
                # The first after a disconnection announces an attempt, the others tell of failed
                # ones.
                if not tcp and not resuming:
                    state = LinkEvent("unreachable", UNREACHABLE)
                resuming = False
            if state and state != last:
                last = state
                yield state
            if reconnect:
                _disconnect(socket, endpoint)
                await asyncio.sleep(wait)
                wait = min(2 * wait, last_retry_s)
                # What the old attempt still had to say is past.
                while await monitor.poll(0):
                    await monitor.recv_multipart()
                tcp = up = False
                socket.connect(endpoint)
    finally:
        if not socket.closed:
            socket.disable_monitor()
        monitor.close(linger=0)


def _explain(kind: int, value: int) -> str:
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return NOT_AUTHORISED
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return NOT_A_NODE
    return NO_ANSWER if value == errno.EAGAIN else WRONG_SERVER_KEY


def _disconnect(socket: Any, endpoint: str) -> None:
    # An endpoint that libzmq has given up is no longer known to it.
    with contextlib.suppress(zmq.ZMQError):
        socket.disconnect(endpoint)
