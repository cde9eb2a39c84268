"""Peers that write ZMTP's bytes without libzmq, so they can send what no ZeroMQ socket would.

`Peer` speaks ZMTP 3.1 (https://rfc.zeromq.org/spec/37/) over asyncio TCP, as client or server,
unencrypted or with CURVE (https://rfc.zeromq.org/spec/26/). It sends any frame at any time; libzmq
passes no frame of a message on before the last. The attacks below use it. Each has a `Budget`
(bytes, count, seconds) that ends it in any case and returns a `Tally`. Random choices follow from
the seed and the attempt's number.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from zmq.utils import z85

from faults import sodium

Address = tuple[str, int]
Mechanism = Literal["NULL", "PLAIN", "CURVE"]

MORE, LONG, COMMAND = 1, 2, 4
GREETING_BYTES = 64
_READ_LIMIT = 64 << 20


class PeerError(Exception):
    """The other end did not answer as ZMTP requires: it refused us or speaks another protocol."""


@dataclass(frozen=True)
class Budget:
    """The resources of an attack. The first one used up ends it."""

    bytes: int = 64 << 20
    count: int = 1_000_000
    seconds: float = 30.0
    rate: float = math.inf  # messages per second, if the attack has a pace


@dataclass
class Tally:
    """The counts of an attack.

    `sent`: bytes written to the kernel. `messages`: frames, messages or attempts, depending on the
    attack. `connections`: opened. `closed`: ended by the victim. `unconnected`: failed to open.
    `seconds`: the duration.
    """

    sent: int = 0
    messages: int = 0
    connections: int = 0
    closed: int = 0
    unconnected: int = 0
    seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def add(self, other: Tally) -> None:
        self.sent += other.sent
        self.messages += other.messages
        self.connections += other.connections
        self.closed += other.closed
        self.unconnected += other.unconnected
        self.seconds = max(self.seconds, other.seconds)
        for what, count in other.notes.items():
            self.notes[what] = self.notes.get(what, 0) + count


class _Meter:
    """Counts the use of an attack's budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.tally = budget, Tally()
        self._begun = time.monotonic()

    @property
    def left_s(self) -> float:
        return max(0.0, self._begun + self.budget.seconds - time.monotonic())

    def may(self, size: int = 0) -> bool:
        """True if `size` more bytes are within the budget."""
        tally, budget = self.tally, self.budget
        return (
            tally.messages < budget.count and tally.sent + size <= budget.bytes and self.left_s > 0
        )

    async def pace(self) -> None:
        """Yield, and wait while the attack is ahead of its rate."""
        due = self._begun + self.tally.messages / self.budget.rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))

    def end(self) -> Tally:
        self.tally.seconds = time.monotonic() - self._begun
        return self.tally


def address_of(endpoint: str) -> Address:
    """``tcp://127.0.0.1:5555`` as ``("127.0.0.1", 5555)``."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def greeting(
    mechanism: str | bytes = "CURVE", *, as_server: bool = False, version: tuple[int, int] = (3, 1)
) -> bytes:
    """The 64 bytes with which either end opens."""
    name = mechanism.encode() if isinstance(mechanism, str) else mechanism
    head = b"\xff" + bytes(7) + b"\x01" + b"\x7f" + bytes(version)
    return head + name[:20].ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def frame(
    body: bytes = b"",
    *,
    more: bool = False,
    command: bool = False,
    declared: int | None = None,
    long: bool | None = None,
) -> bytes:
    """One ZMTP frame.

    Args:
        body: the content after the header.
        more: another frame of the message follows.
        command: whether it is a command frame.
        declared: the length in the header, up to 2**64 - 1. None is the body's length.
        long: use eight bytes for the length. None uses as many as the length needs.
    """
    size = len(body) if declared is None else declared
    wide = size > 255 if long is None else long
    flags = MORE * more | LONG * wide | COMMAND * command
    return bytes([flags]) + (struct.pack(">Q", size) if wide else bytes([size])) + body


def command(name: bytes, data: bytes = b"") -> bytes:
    """The body of a command frame: the length of its name, the name, and data."""
    return bytes([len(name)]) + name + data


def metadata(socket_type: str = "DEALER", **others: bytes) -> bytes:
    """The properties of a READY or INITIATE command."""
    out = b""
    for name, value in {"Socket-Type": socket_type.encode(), "Identity": b"", **others}.items():
        out += bytes([len(name)]) + name.encode() + struct.pack(">I", len(value)) + value
    return out


def ping(ttl_ds: int = 0, context: bytes = b"") -> bytes:
    """The body of a PING: `ttl_ds` in tenths of a second (0 to 65535), `context` of at most 16
    bytes if legal."""
    return command(b"PING", struct.pack(">H", ttl_ds) + context)


@dataclass(frozen=True)
class Curve:
    """Keys of a CURVE end: its own pair and, for a client, the server's public key. Z85 text."""

    public: str
    secret: str
    server: str = ""

    @staticmethod
    def throwaway(server: str = "") -> Curve:
        """Keys that no node has authorised."""
        public, secret = sodium.keypair()
        return Curve(z85.encode(public).decode(), z85.encode(secret).decode(), server)


class _Session:
    """Keys and nonces after a CURVE handshake. `mine` and `theirs` are the nonce prefixes."""

    def __init__(self, key: bytes, server: bool, nonce: int) -> None:
        self.key, self.nonce = key, nonce
        self.mine, self.theirs = b"CurveZMQMESSAGEC", b"CurveZMQMESSAGES"
        if server:
            self.mine, self.theirs = self.theirs, self.mine

    def seal(self, body: bytes, *, more: bool, command: bool) -> bytes:
        self.nonce += 1
        counter = struct.pack(">Q", self.nonce)
        plain = bytes([more | command << 1]) + body
        return b"\x07MESSAGE" + counter + sodium.box(plain, self.mine + counter, self.key)

    def open(self, body: bytes) -> tuple[int, bytes]:
        """Decrypt. Returns (MORE and COMMAND flags, content)."""
        if body[:8] != b"\x07MESSAGE" or len(body) < 16 + sodium.MAC_BYTES + 1:
            raise PeerError(f"no CURVE message: {body[:16]!r}")
        counter = body[8:16]
        plain = sodium.unbox(body[16:], self.theirs + counter, self.key)
        return plain[0] & 1 | (plain[0] & 2) << 1, plain[1:]


class Peer:
    """One TCP connection. Only the called methods send or read.

    Attributes:
        sent: bytes written. received: bytes read. session: set after a CURVE handshake.
        client_key: the client's public key (32 bytes), on a server.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.session: _Session | None = None
        self.client_key = b""
        self.sent = self.received = 0
        self._sending = asyncio.Lock()

    @classmethod
    async def connect(
        cls, address: Address, *, timeout_s: float = 10.0, receive_buffer: int | None = None
    ) -> Peer:
        """Connect. `receive_buffer` limits the bytes that the kernel accepts, roughly."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        end = socket.socket(family, socket.SOCK_STREAM)
        try:
            end.setblocking(False)
            if receive_buffer:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop = asyncio.get_running_loop()
            await asyncio.wait_for(loop.sock_connect(end, address), timeout_s)
            # The stream reads ahead up to twice its limit. A small limit makes a pause in reading
            # effective.
            reader, writer = await asyncio.open_connection(sock=end, limit=4096)
        except BaseException:
            end.close()
            raise
        return cls(reader, writer)

    async def send(self, data: bytes) -> None:
        """Send raw bytes. Returns when the kernel has accepted nearly all of them."""
        async with self._sending:
            self.writer.write(data)
            self.sent += len(data)
            await self.writer.drain()

    async def read(self, size: int) -> bytes:
        if size > _READ_LIMIT:
            raise PeerError(f"the other end declares {size} bytes")
        data = await self.reader.readexactly(size)
        self.received += size
        return data

    async def read_frame(self) -> tuple[int, bytes]:
        """(flags MORE and COMMAND, body) of the next frame, decrypted in a session."""
        flags = (await self.read(1))[0]
        length = (
            struct.unpack(">Q", await self.read(8))[0] if flags & LONG else (await self.read(1))[0]
        )
        body = await self.read(length)
        if self.session and not flags & COMMAND:
            return self.session.open(body)
        return flags & (MORE | COMMAND), body

    async def read_message(self, *, most: int = 64, pong: bool = True) -> list[bytes]:
        """The next message's frames. With `pong`, pings before or inside it are answered."""
        parts: list[bytes] = []
        while True:
            flags, body = await self.read_frame()
            if flags & COMMAND:
                if pong and body[:5] == b"\x04PING":
                    await self.send_part(command(b"PONG", body[7:23]), is_command=True)
                continue
            parts.append(body)
            if not flags & MORE:
                return parts
            if len(parts) > most:
                raise PeerError(f"a message of more than {most} frames")

    async def send_part(self, body: bytes, *, more: bool = False, is_command: bool = False) -> None:
        """Send one frame. It is legal by itself, whatever message it belongs to."""
        await self.send(self.seal(body, more=more, is_command=is_command))

    def seal(self, body: bytes, *, more: bool = False, is_command: bool = False) -> bytes:
        """The bytes of one frame, encrypted in a session."""
        if self.session:
            return frame(self.session.seal(body, more=more, command=is_command))
        return frame(body, more=more, command=is_command)

    async def send_message(self, parts: Iterable[bytes]) -> None:
        """Send a whole message."""
        listed = [bytes(part) for part in parts]
        # Seal all frames without a pause: nonces must arrive in order.
        data = b"".join(self.seal(part, more=i + 1 < len(listed)) for i, part in enumerate(listed))
        await self.send(data)

    async def greet(self, mechanism: Mechanism = "CURVE", *, as_server: bool = False) -> bytes:
        """Exchange greetings. Returns the other end's."""
        await self.send(greeting(mechanism, as_server=as_server))
        other = await self.read(GREETING_BYTES)
        if other[0] != 0xFF or other[9] != 0x7F:
            raise PeerError(f"no ZMTP greeting: {other[:10]!r}")
        return other

    async def curve_client(
        self,
        keys: Curve,
        *,
        socket_type: str = "DEALER",
        identity: bytes = b"",
        timeout_s: float = 10.0,
    ) -> None:
        """Perform greeting and CURVE handshake as a client. `identity` is the routing id it claims;
        empty is none.

        Raises:
            PeerError: another server, a refused key, or a closed connection.
        """
        try:
            await asyncio.wait_for(self._curve_client(keys, socket_type, identity), timeout_s)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise PeerError(f"handshake refused: {error!r}") from None

    async def _curve_client(self, keys: Curve, socket_type: str, identity: bytes) -> None:
        await self.greet()
        hand = ClientHandshake(keys, identity)
        await self.send(frame(hand.hello(), command=True))
        await self.send(
            frame(hand.initiate(await self._command(b"WELCOME"), socket_type), command=True)
        )
        self.session = hand.ready(await self._command(b"READY"))

    async def curve_server(
        self, keys: Curve, *, socket_type: str = "ROUTER", timeout_s: float = 10.0
    ) -> None:
        """Perform greeting and CURVE handshake as a server that admits every client; see
        `client_key`.

        Raises:
            PeerError: the client does not speak CURVE, or uses another server key.
        """
        try:
            await asyncio.wait_for(self._curve_server(keys, socket_type), timeout_s)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise PeerError(f"handshake failed: {error!r}") from None

    async def _curve_server(self, keys: Curve, socket_type: str) -> None:
        await self.greet(as_server=True)
        secret = z85.decode(keys.secret)
        hello = await self._command(b"HELLO")
        if len(hello) != 194:
            raise PeerError(f"HELLO of {len(hello)} bytes")
        their_transient, counter = hello[74:106], hello[106:114]
        long_term = sodium.shared(their_transient, secret)
        sodium.unbox(hello[114:], b"CurveZMQHELLO---" + counter, long_term)
        transient, transient_secret = sodium.keypair()
        nonce, cookie = os.urandom(16), os.urandom(96)
        welcome = sodium.box(transient + cookie, b"WELCOME-" + nonce, long_term)
        await self.send(frame(command(b"WELCOME", nonce + welcome), command=True))
        initiate = await self._command(b"INITIATE")
        if initiate[:96] != cookie:
            raise PeerError("INITIATE with another cookie")
        key = sodium.shared(their_transient, transient_secret)
        plain = sodium.unbox(initiate[104:], b"CurveZMQINITIATE" + initiate[96:104], key)
        self.client_key, vouch = plain[:32], plain[32:128]
        sealed_by = sodium.shared(self.client_key, transient_secret)
        vouched = sodium.unbox(vouch[16:], b"VOUCH---" + vouch[:16], sealed_by)
        if vouched[:32] != their_transient:
            raise PeerError("INITIATE vouches for another key")
        counter = struct.pack(">Q", 1)
        sealed = sodium.box(metadata(socket_type), b"CurveZMQREADY---" + counter, key)
        await self.send(frame(command(b"READY", counter + sealed), command=True))
        self.session = _Session(key, True, 1)

    async def _command(self, name: bytes) -> bytes:
        """The data of the next frame, which must be this command."""
        flags, body = await self.read_frame()
        prefix = bytes([len(name)]) + name
        if not flags & COMMAND or not body.startswith(prefix):
            raise PeerError(f"expected {name.decode()}, got {body[:40]!r}")
        return body[len(prefix) :]

    async def wait_closed(self, timeout_s: float) -> bool:
        """Read and discard until the other end closes. False if it didn't within the time."""

        async def drain() -> None:
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass

        try:
            await asyncio.wait_for(drain(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def abort(self) -> None:
        """Close with RST."""
        end = self.writer.get_extra_info("socket")
        if end is not None:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close at once and discard unsent bytes."""
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class ClientHandshake:
    """The commands of a CURVE client, one by one, to send as they are or damaged. `identity` is the
    routing id it claims; empty is none."""

    def __init__(self, keys: Curve, identity: bytes = b"") -> None:
        self.keys, self.identity = keys, identity
        self._public, self._secret = sodium.keypair()
        self._server = z85.decode(keys.server)
        self._server_transient = b""

    def hello(self) -> bytes:
        counter = struct.pack(">Q", 1)
        key = sodium.shared(self._server, self._secret)
        sealed = sodium.box(bytes(64), b"CurveZMQHELLO---" + counter, key)
        return command(b"HELLO", b"\x01\x00" + bytes(72) + self._public + counter + sealed)

    def initiate(self, welcome: bytes, socket_type: str = "DEALER") -> bytes:
        """The INITIATE command for the data of the server's WELCOME."""
        key = sodium.shared(self._server, self._secret)
        plain = sodium.unbox(welcome[16:], b"WELCOME-" + welcome[:16], key)
        self._server_transient, cookie = plain[:32], plain[32:]
        nonce = os.urandom(16)
        vouch_key = sodium.shared(self._server_transient, z85.decode(self.keys.secret))
        vouch = nonce + sodium.box(self._public + self._server, b"VOUCH---" + nonce, vouch_key)
        counter = struct.pack(">Q", 2)
        inner = z85.decode(self.keys.public) + vouch + metadata(socket_type, Identity=self.identity)
        key = sodium.shared(self._server_transient, self._secret)
        sealed = sodium.box(inner, b"CurveZMQINITIATE" + counter, key)
        return command(b"INITIATE", cookie + counter + sealed)

    def ready(self, data: bytes) -> _Session:
        """Check the data of the server's READY."""
        key = sodium.shared(self._server_transient, self._secret)
        sodium.unbox(data[8:], b"CurveZMQREADY---" + data[:8], key)
        return _Session(key, False, 2)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four defects: bytes changed, removed, doubled or truncated."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            del out[at:]
    return bytes(out)


def broken_opening(rng: random.Random, keys: Curve) -> tuple[str, list[bytes]]:
    """The first writes of a defective or hostile client: (kind, writes).

    Needs no answer from the server, so INITIATE has an invented cookie.
    """
    hello = frame(ClientHandshake(keys).hello(), command=True)
    kinds: dict[str, Callable[[], list[bytes]]] = {
        "noise": lambda: [rng.randbytes(rng.randint(1, 200))],
        "http": lambda: [b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"],
        "greeting": lambda: [mutate(rng, greeting()), hello],
        "version": lambda: [greeting(version=(rng.randrange(256), rng.randrange(256))), hello],
        "mechanism": lambda: [
            greeting(rng.choice([b"NULL", b"PLAIN", b"GSSAPI", b"curve", rng.randbytes(20)])),
            frame(command(b"READY", metadata()), command=True),
        ],
        "as server": lambda: [greeting(as_server=True), hello],
        "hello": lambda: [greeting(), mutate(rng, hello)],
        "initiate": lambda: [
            greeting(),
            hello,
            frame(command(b"INITIATE", rng.randbytes(rng.randint(0, 400))), command=True),
        ],
        "declared": lambda: [
            greeting(),
            frame(hello[2:], command=True, declared=rng.choice([0, 1, 199, 201, 1 << 31, 1 << 63])),
        ],
        "old": lambda: [b"\x01\x00" + rng.randbytes(rng.randint(0, 30))],
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()


@contextlib.asynccontextmanager
async def _attempt(address: Address, tally: Tally) -> AsyncIterator[Peer | None]:
    """One counted connection of an attack. It is no error if the victim closes it."""
    try:
        peer = await Peer.connect(address)
    except (OSError, asyncio.TimeoutError):
        tally.unconnected += 1
        yield None
        return
    tally.connections += 1
    try:
        async with peer:
            yield peer
    except (OSError, asyncio.IncompleteReadError, PeerError):
        tally.closed += 1
    finally:
        tally.sent += peer.sent


async def broken_openings(
    address: Address,
    server_key: str,
    *,
    seed: int = 0,
    parallel: int = 16,
    linger_s: float = 0.05,
    budget: Budget = Budget(count=1000),
) -> Tally:
    """Broken greetings and handshakes, each on its own connection, which is left after `linger_s`
    or when the victim closes it. ``notes`` counts the kinds, ``closed`` the connections that the
    victim ended."""
    meter = _Meter(budget)
    keys = Curve.throwaway(server_key)

    async def one(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        kind, writes = broken_opening(rng, keys)
        meter.tally.note(kind)
        async with _attempt(address, meter.tally) as peer:
            if peer is None:
                return
            for data in writes:
                await peer.send(data)
            if await peer.wait_closed(linger_s):
                meter.tally.closed += 1

    await _many(meter, parallel, one)
    return meter.end()


async def _many(meter: _Meter, parallel: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Run ``one(0)``, ``one(1)`` … within the budget, `parallel` at a time."""

    async def worker() -> None:
        while meter.may():
            number = meter.tally.messages
            meter.tally.messages += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(one(number), max(0.01, meter.left_s))

    await asyncio.gather(*(worker() for _ in range(parallel)))


async def half_open(
    address: Address, *, hold_s: float = 5.0, keep: bool = True, budget: Budget = Budget(count=100)
) -> Tally:
    """Hold ``budget.count`` connections that never send a byte, all at once for `hold_s`.

    With `keep`, connections closed by the victim are replaced. Each needs a descriptor here too.
    """
    meter = _Meter(budget)

    async def one(number: int) -> None:
        until = time.monotonic() + min(hold_s, meter.left_s)
        while time.monotonic() < until:
            async with _attempt(address, meter.tally) as peer:
                if peer is None:
                    await asyncio.sleep(0.2)
                elif await peer.wait_closed(until - time.monotonic()):
                    meter.tally.closed += 1
                    if not keep:
                        return

    await _many(meter, budget.count, one)
    return meter.end()


async def slow_loris(
    address: Address, *, every_s: float = 0.1, budget: Budget = Budget(count=20, seconds=10)
) -> Tally:
    """``budget.count`` connections at once that send a valid opening, one byte every `every_s`."""
    meter = _Meter(budget)
    opening = greeting() + frame(command(b"HELLO", bytes(194)), command=True)

    async def one(number: int) -> None:
        async with _attempt(address, meter.tally) as peer:
            if peer is None:
                return
            for at in range(len(opening)):
                await peer.send(opening[at : at + 1])
                if await peer.wait_closed(every_s):
                    meter.tally.closed += 1
                    return

    await _many(meter, budget.count, one)
    return meter.end()


async def giant_frames(
    address: Address,
    *,
    declared: int = 1 << 30,
    fill: int = 4096,
    hold_s: float = 2.0,
    mechanism: Mechanism = "CURVE",
    budget: Budget = Budget(count=50),
) -> Tally:
    """``budget.count`` connections at once that declare a frame of `declared` bytes before any
    authentication, send `fill` of them and wait."""
    meter = _Meter(budget)

    async def one(number: int) -> None:
        async with _attempt(address, meter.tally) as peer:
            if peer is None:
                return
            await peer.greet(mechanism)
            await peer.send(frame(bytes(fill), command=True, declared=declared))
            if await peer.wait_closed(min(hold_s, meter.left_s)):
                meter.tally.closed += 1

    await _many(meter, budget.count, one)
    return meter.end()


async def wrong_order(
    address: Address, server_key: str, *, wait_s: float = 2.0, budget: Budget = Budget()
) -> Tally:
    """Send every command at a wrong time. ``notes`` has the victim's reaction to each: ``closed
    NAME`` or ``kept NAME``."""
    meter = _Meter(budget)
    hand = ClientHandshake(Curve.throwaway(server_key))
    hello = frame(hand.hello(), command=True)
    said = {
        "message first": [frame(b"\x07MESSAGE" + bytes(40))],
        "plain message": [frame(b"hello")],
        "initiate first": [frame(command(b"INITIATE", bytes(300)), command=True)],
        "welcome": [frame(command(b"WELCOME", bytes(160)), command=True)],
        "ready": [frame(command(b"READY", metadata()), command=True)],
        "error": [frame(command(b"ERROR", b"\x03400"), command=True)],
        "hello twice": [hello, hello],
        "hello as message": [frame(hand.hello())],
        "message after hello": [hello, frame(b"\x07MESSAGE" + bytes(40))],
        "ping first": [frame(ping(10, b"x"), command=True)],
        "subscribe": [frame(command(b"SUBSCRIBE", b""), command=True)],
        "nameless": [frame(b"\x00", command=True)],
        "empty": [frame(b"", command=True)],
    }
    for name, writes in said.items():
        if not meter.may():
            break
        meter.tally.messages += 1
        async with _attempt(address, meter.tally) as peer:
            if peer is None:
                continue
            before = meter.tally.closed
            try:
                await peer.greet()
                for data in writes:
                    await peer.send(data)
                if await peer.wait_closed(wait_s):
                    meter.tally.closed += 1
            except (OSError, asyncio.IncompleteReadError):
                meter.tally.closed += 1
            meter.tally.note(f"{'closed' if meter.tally.closed > before else 'kept'} {name}")
    return meter.end()


async def endless_multipart(
    peer: Peer,
    *,
    part_bytes: int = 1 << 16,
    opening: Iterable[bytes] = (),
    budget: Budget = Budget(),
) -> Tally:
    """Send parts of legal size after those of `opening`, in a message that never ends.

    ``messages`` counts parts. Only the budget ends it. The connection stays open.
    """
    meter = _Meter(budget)
    part = bytes(part_bytes)
    started = peer.sent

    async def send() -> None:
        for body in opening:
            await peer.send_part(bytes(body), more=True)
        while meter.may(part_bytes):
            await peer.send_part(part, more=True)
            meter.tally.messages += 1
            meter.tally.sent = peer.sent - started

    await _bounded(meter, send())
    meter.tally.sent = peer.sent - started
    return meter.end()


async def giant_part(
    peer: Peer, *, declared: int = 1 << 30, hold_s: float = 2.0, budget: Budget = Budget()
) -> Tally:
    """After the handshake, send one frame that declares `declared` bytes, as far as the budget and
    the victim allow. Then wait `hold_s` for the victim to close."""
    meter = _Meter(budget)
    started = peer.sent

    async def send() -> None:
        await peer.send(frame(declared=declared, long=True))
        chunk = bytes(1 << 16)
        while meter.may(len(chunk)) and peer.sent - started < declared:
            await peer.send(chunk)
            meter.tally.sent = peer.sent - started

    await _bounded(meter, send())
    meter.tally.sent = peer.sent - started
    if not meter.tally.closed and await peer.wait_closed(hold_s):
        meter.tally.closed += 1
    return meter.end()


async def heartbeat_abuse(
    peer: Peer, *, every_s: float = 0.0, budget: Budget = Budget(count=1000, seconds=10)
) -> Tally:
    """Send heartbeats that no honest peer sends, again and again: the longest time to live, none, a
    context over the limit, truncated pings, unrequested pongs. Nothing is read.

    ``messages`` counts them. The connection stays open.
    """
    meter = _Meter(budget)
    bodies = [
        ping(65535, bytes(16)),
        ping(0, b""),
        ping(1, b"x" * 16),
        ping(65535, bytes(4096)),
        command(b"PONG", bytes(4096)),
        command(b"PONG"),
        command(b"PING", b"\x00"),
    ]
    started = peer.sent

    async def send() -> None:
        while meter.may():
            await peer.send_part(bodies[meter.tally.messages % len(bodies)], is_command=True)
            meter.tally.messages += 1
            meter.tally.sent = peer.sent - started
            if every_s:
                await asyncio.sleep(every_s)

    await _bounded(meter, send())
    return meter.end()


async def _bounded(meter: _Meter, work: Awaitable[None]) -> None:
    """Run `work` within the budget's seconds. Count it if the victim closes the connection."""
    try:
        await asyncio.wait_for(work, meter.left_s)
    except asyncio.TimeoutError:
        meter.tally.note("out of time")
    except OSError:
        meter.tally.closed += 1


async def in_parallel(attacks: Iterable[Awaitable[Tally]]) -> Tally:
    """Run several attacks at once. Returns their sum."""
    total = Tally()
    for tally in await asyncio.gather(*attacks):
        total.add(tally)
    return total
