"""Secure ZeroMQ sockets: every option that matters, with its reason.

An edge opens one DEALER per node (`client`), a node one ROUTER (`server`), both with CURVE. The
options limit single frames; `dos_protection` limits bytes and connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import secrets
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import zmq

from edge_common.errors import ConfigError
from transport.keys import KeyPair
from transport.messages import Limits, StageLimits
from transport.peer_events import SERVER_EVENTS
from transport.wire_size import SLOWEST_LINK, message_bytes

ZAP_DOMAIN = b"edge-runtime"
BACKLOG = 8
"""Largest legal messages of one connection that may wait in libzmq for the program. The receiver
does little else, so an honest peer needs no more. A node allows more if an edge may have more
requests open."""
_ZERO_COPY_RECV = 10  # ZMQ_ZERO_COPY_RECV, which pyzmq has no name for
_SLACK_BYTES = 4096  # CURVE and framing around a message
_SEND_MARK = 256  # messages; a node's queue holds fewer for one edge, `accepted` included
_SURPLUS = 256  # frames thrown away before other tasks have their turn
_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5}|\*)\Z")


def check_endpoint(endpoint: str, *, bind: bool = False) -> str:
    """Check that `endpoint` has the form ``tcp://HOST:PORT``, and return it.

    Args:
        endpoint: an IPv6 address goes in brackets.
        bind: also allow the wildcards ``*`` as host, and port 0 (any free port).

    Raises:
        ConfigError: it has another form.
    """
    match = _ENDPOINT.match(endpoint)
    port = match.group(2) if match else "*"
    number = int(port) if port.isdigit() else -1
    if not match or not (0 if bind else 1) <= number <= 65535 or (match[1] == "*" and not bind):
        example = "tcp://0.0.0.0:5555" if bind else "tcp://node.example.org:5555"
        raise ConfigError(
            f"malformed endpoint {endpoint!r}: expected tcp://HOST:PORT, such as {example}"
        )
    return endpoint


def heartbeat_timeout_ms(limits: StageLimits) -> int:
    """Silence after which a link counts as dead: twice the time of the largest message on the
    slowest link, at least 3 s.

    A ping can't overtake a message that is on its way, and half a message is no sign of life. A
    shorter timeout would cut a healthy slow link and lose the request.
    """
    largest = max(message_bytes(limits.request), message_bytes(limits.result))
    return max(3000, 2 * largest * 1000 // SLOWEST_LINK)


def _copying(ctx: zmq.Context[Any]) -> zmq.Context[Any]:
    """The context, set to copy what its new sockets receive.

    Without the copy a small frame keeps the whole 8 KiB that it arrived in: an unfinished message
    of small frames would hold a hundred times the bytes that are counted. libzmq reads large frames
    into their own memory either way.
    """
    with contextlib.suppress(zmq.ZMQError):  # unknown to libzmq before 4.3
        ctx.set(_ZERO_COPY_RECV, 0)
    return ctx


def _draw_routing_ids() -> None:
    """Make the next ROUTER number its connections from an unpredictable start.

    libzmq draws the first number from rand() and never seeds it, so every process would start with
    the same one. A peer that claims the next number for itself makes libzmq abort when it assigns
    that number. A peer that claims a number lately in use gets replies to an edge that just left.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no libc here
        ctypes.CDLL(None).srand(ctypes.c_uint(secrets.randbits(32)))


def _common(socket: Any, endpoint: str, inbound: Limits, limits: StageLimits) -> None:
    # libzmq allocates a frame when a peer announces its size. Without this limit four peers without
    # a key cost hundreds of megabytes.
    socket.set(zmq.MAXMSGSIZE, inbound.message_bytes + _SLACK_BYTES)
    # A late request or reply is worthless, and close() must not hang.
    socket.set(zmq.LINGER, 0)
    # No receive mark: at a mark libzmq stops reading, and a connection reset just then aborts the
    # process at the next heartbeat ("!_io_error", zeromq/libzmq#4364). `dos_protection` limits what
    # waits, by bytes.
    socket.set(zmq.RCVHWM, 0)
    # A frozen peer keeps its TCP connection open; only heartbeats show it.
    socket.set(zmq.HEARTBEAT_IVL, 1000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, heartbeat_timeout_ms(limits))
    # Without this the kernel keeps a closed connection for minutes while its peer acknowledges
    # nothing. (TCP_KEEPALIVE adds nothing to heartbeats and stays off.)
    socket.set(zmq.TCP_MAXRT, max(10_000, 2 * heartbeat_timeout_ms(limits)))
    # An unfinished handshake holds a file descriptor.
    socket.set(zmq.HANDSHAKE_IVL, 3000)
    # Off by default: with it on, a name that resolves to ::1 first never tries 127.0.0.1.
    socket.set(zmq.IPV6, int("[" in endpoint))


def start_sending() -> None:
    """Start the threads that pyzmq needs to send without a copy. It starts them for the first large
    frame; call this before measuring what an idle process takes."""
    with zmq.Context() as ctx, ctx.socket(zmq.PAIR) as one, ctx.socket(zmq.PAIR) as other:
        one.bind("inproc://start")
        other.connect("inproc://start")
        one.send(bytearray(2 * zmq.COPY_THRESHOLD), copy=False)
        other.recv()


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
        connect: False to leave connecting to `link.watch`.

    Raises:
        ConfigError: malformed endpoint.
    """
    check_endpoint(endpoint)
    socket = _copying(ctx).socket(zmq.DEALER)
    try:
        _common(socket, endpoint, limits.result, limits)
        # Pinned: a host with another key can't answer in place of the node.
        socket.set(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.set(zmq.CURVE_PUBLICKEY, keypair.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, keypair.secret.encode())
        # Queue only to a finished handshake: no request waits in a socket, beyond its deadline, for
        # a node to come back. Sending blocks (or fails with EAGAIN) while the node is away.
        socket.set(zmq.IMMEDIATE, 1)
        # Few requests wait here: each has a caller with a deadline.
        socket.set(zmq.SNDHWM, 8)
        # Come back soon after a short outage, and rarely while a node stays away.
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


def server(
    ctx: zmq.Context[Any],
    bind: str,
    keypair: KeyPair,
    limits: StageLimits,
    *,
    monitor: bool = False,
) -> Any:
    """A ROUTER bound to `bind`; ``socket.last_endpoint`` has the port that was chosen for port 0.

    Start `auth.Authenticator` on `ctx` first: without it no client gets in.

    Args:
        ctx: context.
        bind: ``tcp://HOST:PORT``.
        keypair: the node's.
        limits: of the stage served.
        monitor: attach the monitor before binding, so that `peer_events.follow` misses no
            connection.

    Raises:
        ConfigError: malformed or unusable endpoint.
    """
    check_endpoint(bind, bind=True)
    _draw_routing_ids()
    socket = _copying(ctx).socket(zmq.ROUTER)
    try:
        _common(socket, bind, limits.request, limits)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keypair.secret.encode())
        # CURVE alone lets any client in. With an enforced domain, no authenticator means no client.
        socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        # A reply to an edge that left fails with EHOSTUNREACH, one to an edge that does not read
        # with EAGAIN. Without this both vanish silently.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # A newcomer that claims another's routing id must not get its replies.
        socket.set(zmq.ROUTER_HANDOVER, 0)
        socket.set(zmq.SNDHWM, _SEND_MARK)
        # Connections that wait in the kernel to be accepted (net.core.somaxconn may allow fewer).
        socket.set(zmq.BACKLOG, 4096)
        if monitor:
            socket.get_monitor_socket(SERVER_EVENTS)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            mend = {
                errno.EADDRINUSE: "choose another port: another process has this one",
                errno.EACCES: "choose a port above 1023: this one needs privileges",
            }.get(error.errno or 0, "choose an address of this machine")
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"cannot listen on {bind}: {reason}", mend=mend) from None
    except BaseException:
        socket.close()
        raise
    return socket


class Readable:
    """Wakes a task of an event loop when a plain socket may have a message.

    It is faster than pyzmq's asyncio sockets, whose futures take longer than a small message.
    libzmq signals the descriptor once, until everything is received, and sending can consume the
    signal: call `wake` after sending.
    """

    def __init__(self, socket: Any) -> None:
        self._loop, self._file = asyncio.get_running_loop(), socket.get(zmq.FD)
        self._event = asyncio.Event()
        self._loop.add_reader(self._file, self._event.set)

    def wake(self) -> None:
        """Make the task look for messages."""
        self._event.set()

    async def wait(self) -> None:
        """Call when there was no message; returns when there may be one."""
        self._event.clear()
        await self._event.wait()

    def close(self) -> None:
        """Call before the socket is closed."""
        self._loop.remove_reader(self._file)


class Received(NamedTuple):
    """A message: its first frame, the routing id of its peer (for a ROUTER), and how many more
    frames it had. A legal message has one frame; the others are thrown away."""

    frame: zmq.Frame
    route: bytes
    surplus: int


async def received(
    socket: Any, *, routed: bool = False, readable: Readable | None = None
) -> AsyncGenerator[Received, None]:
    """Every message of a socket. It doesn't yield to other tasks while messages wait.

    libzmq hands over a message frame by frame, and a hostile one has any number of them. Surplus
    frames are dropped as they come, and other tasks get their turn in between.

    Args:
        socket: from `client` or `server`, for asyncio or plain.
        routed: whether a routing id comes first.
        readable: of a plain socket.
    """
    plain: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
    while True:
        try:
            route = plain.recv(zmq.NOBLOCK) if routed else b""
            frame = plain.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            await (readable.wait() if readable else socket.poll())
            continue
        surplus, more = 0, frame.more
        while more:
            more = plain.recv(zmq.NOBLOCK, copy=False).more
            surplus += 1
            if surplus % _SURPLUS == 0:
                await asyncio.sleep(0)
        yield Received(frame, route, surplus)
