"""Secure ZeroMQ sockets: every option that matters, set on purpose in this one place, with its
reason.

An edge opens one DEALER per node (`client`), a node one ROUTER (`server`). Both are CURVE or
nothing. The options bound single frames and how many messages wait to be sent; bytes are bounded by
the `meter`, which both monitors feed: `watch` turns a client's events into `LinkEvent`s that say,
as far as an end can know, why a link is down, and `peers` a server's into `PeerEvent`s. Who is let
in is decided in `auth`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import errno
import itertools
import logging
import os
import re
import secrets
import struct
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from edge_common.errors import ConfigError
from transport.keys import KeyPair
from transport.messages import Limits, StageLimits
from transport.meter import SLOWEST_LINK, Ended, Meter, message_bytes

log = logging.getLogger(__name__)

ZAP_DOMAIN = b"edge-runtime"
BACKLOG = 8
"""Largest legal messages that may wait in libzmq for the program, per connection; a node allows
more if an edge may have more requests open. Whoever receives does little else, so that an honest
peer needs no more; the meter cuts off who exceeds it."""
_ZERO_COPY_RECV = 10  # ZMQ_ZERO_COPY_RECV, which pyzmq has no name for
_SLACK_BYTES = 4096  # CURVE and framing around a message
_SURPLUS = 256  # frames thrown away between two turns of other tasks
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
        raise ConfigError(
            f"malformed endpoint {endpoint!r}: expected tcp://HOST:PORT, such as {example}"
        )
    return endpoint


def heartbeat_timeout_ms(limits: StageLimits) -> int:
    """Silence after which a link counts as dead: max(3 s, twice the largest message at the slowest
    link).

    A ping can't overtake a message already on its way, and half a message doesn't count as life.
    Shorter timeouts cut healthy slow links and lose the request silently.
    """
    largest = max(message_bytes(limits.request), message_bytes(limits.result))
    return max(3000, 2 * largest * 1000 // SLOWEST_LINK)


def send_mark(outbound: Limits) -> int:
    """Messages that may wait for a peer to read them (SNDHWM): 64 MiB of the largest, and at least
    as many as a node's queue may hold for one edge, `accepted` included. By bytes they are bounded
    by the meter."""
    return max(48, min(256, (64 << 20) // message_bytes(outbound)))


def _copying(ctx: zmq.Context[Any]) -> zmq.Context[Any]:
    """The context, with receiving without a copy turned off for sockets made from now on.

    With it on, a small frame keeps the whole 8 KiB that it arrived in: an unfinished message of
    small frames then holds a hundred times its size, out of every meter's sight. Large frames are
    read into their own memory either way.
    """
    with contextlib.suppress(zmq.ZMQError):  # libzmq before 4.3 does not know it
        ctx.set(_ZERO_COPY_RECV, 0)
    return ctx


def _draw_routing_ids() -> None:
    """Have the next ROUTER number its connections from where nobody can guess.

    libzmq draws the first number from rand(), which it never seeds, so that it is the same in every
    process. Whoever knows the next one can give it to itself: libzmq then aborts when somebody else
    is to get it. And whoever knows one that was in use gets replies to an edge that has just left.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where libc can't be had
        ctypes.CDLL(None).srand(ctypes.c_uint(secrets.randbits(32)))


def _common(socket: Any, endpoint: str, inbound: Limits, limits: StageLimits) -> None:
    # A peer announces a frame's size before sending it and libzmq allocates it whole; without this,
    # four unauthenticated peers cost hundreds of megabytes.
    socket.set(zmq.MAXMSGSIZE, inbound.message_bytes + _SLACK_BYTES)
    # Nothing may outlive its socket: a late request or reply is worthless, and close() must not
    # hang.
    socket.set(zmq.LINGER, 0)
    # No mark: at one, libzmq stops reading, and a connection that is reset just then aborts the
    # process, at the next heartbeat or at a PING in what was read already ("!_io_error",
    # zeromq/libzmq#4364). The meter bounds what waits, by bytes, which no mark does.
    socket.set(zmq.RCVHWM, 0)
    # A frozen peer keeps its TCP connection open; only heartbeats show it.
    socket.set(zmq.HEARTBEAT_IVL, 1000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, heartbeat_timeout_ms(limits))
    # Nor does closing end a connection whose peer acknowledges nothing: the kernel keeps what is
    # unsent for minutes. (TCP_KEEPALIVE has nothing to add to heartbeats and stays off.)
    socket.set(zmq.TCP_MAXRT, max(10_000, 2 * heartbeat_timeout_ms(limits)))
    # A connection that doesn't finish its handshake holds a file descriptor: give it up.
    socket.set(zmq.HANDSHAKE_IVL, 3000)
    # Off by default: with it on, a name that resolves to ::1 first never tries 127.0.0.1.
    socket.set(zmq.IPV6, int("[" in endpoint))


def start_sending() -> None:
    """Have pyzmq start the threads that sending without a copy takes, which it else does when the
    first large frame leaves: for who measures what a process takes before that."""
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
        connect: False to attach a monitor (`watch`) first, so that it misses no event; then call
            ``socket.connect(endpoint)``.

    Raises:
        ConfigError: malformed endpoint.
    """
    check_endpoint(endpoint)
    socket = _copying(ctx).socket(zmq.DEALER)
    try:
        _common(socket, endpoint, limits.result, limits)
        # Pinned: a host with another key can't answer in the node's place.
        socket.set(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.set(zmq.CURVE_PUBLICKEY, keypair.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, keypair.secret.encode())
        # Queue only to a finished handshake: a request never waits in a socket for a node to come
        # back, where no deadline would reach it. Sending then blocks (or fails with EAGAIN) while
        # the node is away.
        socket.set(zmq.IMMEDIATE, 1)
        # Requests waiting here are few: each has a caller with a deadline.
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


def server(
    ctx: zmq.Context[Any],
    bind: str,
    keypair: KeyPair,
    limits: StageLimits,
    *,
    monitor: bool = False,
) -> Any:
    """A ROUTER bound to `bind`; ``socket.last_endpoint`` tells the port when it was 0.

    Start `auth.Authenticator` on `ctx` first: without it nobody is let in.

    Args:
        ctx: context.
        bind: ``tcp://HOST:PORT``.
        keypair: the node's.
        limits: of the stage served.
        monitor: attach the monitor before binding, so that `peers`, which must be iterated soon,
            misses no connection, however early.

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
        # CURVE alone lets any client in. With a domain and its enforcement, no authenticator means
        # nobody.
        socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        # A reply to an edge that left is an error we see (EHOSTUNREACH), one to an edge that
        # doesn't read is EAGAIN; without it both vanish silently.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # A newcomer using another's routing id must not take over its replies.
        socket.set(zmq.ROUTER_HANDOVER, 0)
        socket.set(zmq.SNDHWM, send_mark(limits.result))
        # What connects while the loop is busy or descriptors are short waits in the kernel, which
        # allows so many (net.core.somaxconn) and answers no more.
        socket.set(zmq.BACKLOG, 4096)
        if monitor:
            socket.get_monitor_socket(_SERVER_WATCHED)
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


class Bell:
    """Wakes a task when a plain socket may have something to receive, in an event loop.

    pyzmq's asyncio sockets do this too, with futures that take longer than a small message. libzmq
    signals a socket's descriptor once, until everything is received, and sending may take the
    signal away: call `ring` after sending.
    """

    def __init__(self, socket: Any) -> None:
        self._loop, self._file = asyncio.get_running_loop(), socket.get(zmq.FD)
        self._rung = asyncio.Event()
        self._loop.add_reader(self._file, self._rung.set)

    def ring(self) -> None:
        """Have the task look again."""
        self._rung.set()

    async def wait(self) -> None:
        """Call when there was nothing to receive; returns when there may be something."""
        self._rung.clear()
        await self._rung.wait()

    def close(self) -> None:
        """Call before the socket is closed."""
        self._loop.remove_reader(self._file)


class Received(NamedTuple):
    """A message as it arrived: its frame, the routing id of the connection (of a ROUTER), and how
    many more frames there were. All of those are thrown away: a legal message has one."""

    frame: zmq.Frame
    route: bytes
    surplus: int


async def received(
    socket: Any, *, routed: bool = False, bell: Bell | None = None
) -> AsyncGenerator[Received, None]:
    """Every message of a socket, for as long as it lives. It doesn't yield to other tasks between
    messages that are there already.

    A message may have any number of frames, and libzmq hands them over one by one. So surplus
    frames are counted and dropped as they come, and other tasks get their turn in between.

    Args:
        socket: from `client` or `server`, for asyncio or plain.
        routed: whether a routing id comes first.
        bell: of a plain socket.
    """
    plain: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
    while True:
        try:
            route = plain.recv(zmq.NOBLOCK) if routed else b""
            frame = plain.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            await (bell.wait() if bell else socket.poll())
            continue
        surplus, more = 0, frame.more
        while more:
            more = plain.recv(zmq.NOBLOCK, copy=False).more
            surplus += 1
            if surplus % _SURPLUS == 0:
                await asyncio.sleep(0)
        yield Received(frame, route, surplus)


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
REFUSED_FOR_NOW = (
    "handshake refused for now: this edge connected too often, or broke one of the node's limits "
    "and is kept out for a while, or the node can't read its keys; its log says which"
)
UNREACHABLE = (
    "unreachable: no TCP connection (name not found, port closed or filtered, or node not running)"
)
CONNECTION_LOST = "connection lost: the node stopped, froze or the network broke"

# Not EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq tells it, too, of a message that does not decrypt,
# after the handshake, and telling it overwrites the very error that would end the connection. That
# stays half alive, and once it ends, the next heartbeat aborts the process: whoever can flip a bit
# on the way could end either side.
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
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
    socket: Any,
    endpoint: str,
    *,
    first_retry_s: float = 0.5,
    last_retry_s: float = 10.0,
    meter: Meter | None = None,
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
        meter: told of the connection; whoever has made it polls it.

    Yields:
        events whose state or reason differs from the one before.
    """
    monitor = socket.get_monitor_socket(_WATCHED)
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
                if meter is not None:
                    meter.opened(value, time.monotonic())
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                up, wait = True, first_retry_s
                state = LinkEvent("up", "connected")
            elif kind & _FAILED:
                state = LinkEvent("refused", _explain(kind, value))
                reconnect = failed = True
            elif kind == zmq.EVENT_DISCONNECTED:
                if meter is not None:
                    meter.closed(value)
                state = (
                    LinkEvent("down", CONNECTION_LOST) if up else LinkEvent("refused", NOT_A_NODE)
                )
                if not up and failed:
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
                if meter is not None:
                    meter.close()
                await asyncio.sleep(wait)
                wait = min(2 * wait, last_retry_s)
                # What the old attempt still had to say is past.
                while await monitor.poll(0):
                    await monitor.recv_multipart()
                tcp = up = False
                socket.connect(endpoint)
    finally:
        if meter is not None:
            meter.close()
        if not socket.closed:
            socket.disable_monitor()
        monitor.close(linger=0)


def _explain(kind: int, value: int) -> str:
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return REFUSED_FOR_NOW if value == 500 else NOT_AUTHORISED
    return NO_ANSWER if value == errno.EAGAIN else WRONG_SERVER_KEY


def _disconnect(socket: Any, endpoint: str) -> None:
    # An endpoint that libzmq has given up is no longer known to it.
    with contextlib.suppress(zmq.ZMQError):
        socket.disconnect(endpoint)


Peering = Literal["opened", "ready", "refused", "closed", "dropped", "full"]


@dataclass(frozen=True)
class PeerEvent:
    """What became of a connection to a server.

    `kind`: ``opened`` (TCP alone), ``ready`` (handshake done: an authorised edge), ``refused``
    (handshake failed, other than by the authenticator, which counts and logs its own), ``closed``,
    ``dropped`` (by the meter), ``full`` (dropped at once, for want of descriptors). `reason`: of
    ``refused``, one of `REFUSALS`; of ``dropped``, a `meter.Reason`. `address`, `user`: the peer's,
    as far as known. `route`: of ``closed``, the routing id that leads nowhere now, if the peer had
    said anything.
    """

    kind: Peering
    reason: str = ""
    address: str = ""
    user: str = ""
    route: bytes = b""


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

# Not EVENT_ACCEPT_FAILED: without descriptors, libzmq tells it as fast as it can, again and again.
_SERVER_WATCHED = (
    _FAILED | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
)
_GREETING_BYTES, _HELLO_BYTES, _WELCOMED_BYTES = 64, 202, 64 + 170
_NEWS = struct.Struct("=Hi")  # of a monitor: event, value
_EVENTS_AT_ONCE = 100  # then others in the loop have their turn, the authenticator above all


class Seldom:
    """Whether to tell of something again: each thing at most once in `every_s`, so that nobody can
    fill a log."""

    def __init__(self, every_s: float = 60.0, most: int = 256) -> None:
        self._every_s, self._most = every_s, most
        self._told: dict[object, float] = {}

    def __call__(self, thing: object, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        told = self._told.get(thing)
        if told is not None and now - told < self._every_s:
            return False
        if len(self._told) >= self._most:
            self._told = {key: at for key, at in self._told.items() if now - at < self._every_s}
            if len(self._told) >= self._most:
                return False  # so many things in so short a time: the rest goes untold
        self._told[thing] = now
        return True


def peers(socket: Any, meter: Meter, *, every_s: float = 0.02) -> AsyncGenerator[PeerEvent, None]:
    """Follow a server's connections, and have `meter` bound them.

    Iterate for as long as the socket lives (one task per socket), then `aclose` the iterator before
    closing the socket. What is told here is logged too, each kind for each address at most once a
    minute.

    Args:
        socket: from `server`, made with ``monitor=True``.
        meter: fed, polled and, at the end, closed here.
        every_s: how often to look; seldomer, down to ten times a second, if there is much to see.
    """
    follower = _Peers(socket, meter)
    meter.catch_up = follower.read
    return follower.events(every_s)


class _Peers:
    def __init__(self, socket: Any, meter: Meter) -> None:
        self._socket, self._meter = socket, meter
        self._monitor = socket.get_monitor_socket(_SERVER_WATCHED)
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(self._monitor)
        self._seldom = Seldom()
        self._untold: collections.deque[PeerEvent] = collections.deque()
        self._failed = ""  # why the connection failed whose end libzmq tells next
        self._judged = 0  # connections that the authenticator refused, whose end comes later

    async def events(self, every_s: float) -> AsyncGenerator[PeerEvent, None]:
        due = 0.0
        try:
            while True:
                self.read(_EVENTS_AT_ONCE)
                more = bool(self._untold)
                begun = time.monotonic()
                if begun >= due:
                    self._poll(begun)
                    # Many connections are a lot to look at; a fifth of the time is enough for it.
                    now = time.monotonic()
                    due = now + max(every_s, min(0.1, 5 * (now - begun)))
                while self._untold:
                    yield self._untold.popleft()
                await asyncio.sleep(0 if more else max(0.0, due - time.monotonic()))
        finally:
            self._meter.catch_up = lambda: None
            self._meter.close()
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._monitor.close(linger=0)

    def read(self, most: int | None = None) -> None:
        """Read what libzmq tells of connections, all there is or so many events."""
        with contextlib.suppress(zmq.Again):
            for _ in itertools.repeat(None) if most is None else range(most):
                kind, value = _NEWS.unpack(self._plain.recv_multipart(zmq.NOBLOCK)[0])
                self._take(kind, value, time.monotonic())

    def _take(self, kind: int, value: int, now: float) -> None:
        if kind == zmq.EVENT_ACCEPTED:
            kept = self._meter.opened(value, now)
            self._tell(PeerEvent("opened" if kept else "full"))
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._tell(PeerEvent("ready"))
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._judged += 1
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._failed = "timeout" if value in (errno.EAGAIN, errno.ETIMEDOUT) else "left"
        else:
            ended = self._meter.closed(value)
            if self._failed or ended.established:
                reason = "" if ended.established else self._failed
            elif self._judged and (not ended.sent or ended.sent >= _WELCOMED_BYTES):
                self._judged, reason = self._judged - 1, ""
            else:
                reason = _mismatch(ended)
            self._failed = ""
            if reason:
                self._tell(PeerEvent("refused", reason, ended.address))
            self._tell(PeerEvent("closed", "", ended.address, ended.user, ended.route))

    def _poll(self, now: float) -> None:
        for breach in self._meter.poll(now):
            if self._seldom((breach.reason, breach.address, breach.user)):
                log.warning("%s", breach)
            self._tell(PeerEvent("dropped", breach.reason, breach.address, breach.user))

    def _tell(self, event: PeerEvent) -> None:
        self._untold.append(event)
        if event.kind == "refused" and self._seldom(("refused", event.reason, event.address)):
            whom = event.address or "a connection"
            log.warning("handshake of %s failed: %s", whom, REFUSALS[event.reason])
        elif event.kind == "full" and self._seldom("full"):
            log.error(
                "connections dropped: no file descriptors are left; raise the limit (ulimit -n, or "
                "LimitNOFILE= of the service)"
            )


def _mismatch(ended: Ended) -> str:
    """Why libzmq ended a connection without a word, as far as its bytes tell."""
    greeted = ended.sent >= _GREETING_BYTES
    hello = ended.received >= _GREETING_BYTES + _HELLO_BYTES
    return "wrong_key" if greeted and hello else "protocol"
