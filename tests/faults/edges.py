"""Hostile edges: authorised edges that attack their node.

A `HostileEdge` uses an authorised key on a `zmtp.Peer`, so it can send anything, at any speed,
without ever reading. Every attack ends with its budget, closes what it opened and returns a
`zmtp.Tally`, whose ``notes`` count the node's answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from edge_common.errors import ProtocolError
from faults import zmtp
from faults.zmtp import Budget, Curve, Peer, PeerError, Tally
from transport.keys import KeyPair
from transport.messages import (
    HEADER_BYTES,
    Accepted,
    InfoRequest,
    Message,
    Refused,
    Request,
    decode_header,
    encode,
    new_id,
    new_seal,
)

FORGETFUL = """
import sys
from cloud_node import server
server.Server._on_connection_ended = lambda *_: None
from cloud_node.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Program of a node that does not notice when an edge leaves. A result goes to the connection that
has the routing id."""

Feeds = dict[str, np.ndarray]
_BYTES = Budget()
_HUNDREDS = Budget(count=200, seconds=10)
_FEW = Budget(count=50, seconds=10)
_ENDED = (OSError, asyncio.IncompleteReadError, PeerError, asyncio.TimeoutError)


class HostileEdge:
    """An authorised edge of one node.

    Args:
        endpoint: of the node, or of a proxy before it.
        server_key: the node's public key, Z85.
        pair: an authorised key.
        stage: hash of the stack it serves.
        seed: of random choices.
    """

    def __init__(
        self, endpoint: str, server_key: str, pair: KeyPair, stage: str, *, seed: int = 0
    ) -> None:
        self.address = zmtp.address_of(endpoint)
        self.keys = Curve(pair.public, pair.secret, server_key)
        self.stage = stage
        self.seed = seed

    async def connect(self, *, receive_buffer: int | None = None, identity: bytes = b"") -> Peer:
        """A connection ready for messages, with the given routing id if there is one.

        Raises:
            PeerError: the node refused it.
        """
        peer = await Peer.connect(self.address, receive_buffer=receive_buffer)
        try:
            await peer.curve_client(self.keys, identity=identity)
        except BaseException:
            await peer.close()
            raise
        return peer

    def request(
        self, feeds: Feeds, *, id: bytes | None = None, deadline_ms: int = 60_000
    ) -> list[bytes]:
        """The frames of a valid request."""
        message = Request(id or new_id(), self.stage, deadline_ms, new_seal())
        return [bytes(encode(message, feeds))]

    async def endless_multipart(
        self, feeds: Feeds | None = None, *, part_bytes: int = 1 << 16, budget: Budget = _BYTES
    ) -> Tally:
        """Send a valid beginning of a message that never ends, then drop the connection."""
        async with await self.connect() as peer:
            opening = self.request(feeds) if feeds else ()
            return await zmtp.endless_multipart(
                peer, part_bytes=part_bytes, opening=opening, budget=budget
            )

    async def giant_part(self, *, declared: int = 1 << 30, budget: Budget = _BYTES) -> Tally:
        """Send a frame over the node's limit."""
        async with await self.connect() as peer:
            return await zmtp.giant_part(peer, declared=declared, budget=budget)

    async def heartbeat_abuse(self, *, budget: Budget = _HUNDREDS) -> Tally:
        async with await self.connect() as peer:
            return await zmtp.heartbeat_abuse(peer, budget=budget)

    async def flood(self, feeds: Feeds, *, budget: Budget = _HUNDREDS) -> Tally:
        """Send valid requests as fast as possible. Replies are read and counted by kind."""
        return await self._say(lambda number: self.request(feeds), budget)

    async def never_read(self, feeds: Feeds, *, budget: Budget = _HUNDREDS) -> Tally:
        """Send valid requests as fast as possible and never read a byte of the replies."""
        return await self._say(lambda number: self.request(feeds), budget, read=False)

    async def duplicate_ids(self, feeds: Feeds, *, budget: Budget = _FEW) -> Tally:
        """Send different requests with the same id."""
        id = new_id()
        return await self._say(lambda number: self.request(feeds, id=id), budget)

    async def wrong(self, feeds: Feeds, *, budget: Budget = _HUNDREDS) -> Tally:
        """Send requests with one defect each (`defects`), and mutated frames. No two are equal."""
        kinds = list(self.defects(feeds).values())

        def say(number: int) -> list[bytes]:
            rng = random.Random(f"{self.seed}/{number}")
            if number < len(kinds):
                return kinds[number]()
            parts = self.request(feeds)
            at = rng.randrange(len(parts))
            parts[at] = zmtp.mutate(rng, parts[at])
            if rng.random() < 0.3:
                parts = rng.sample(parts, rng.randint(1, len(parts)))
            return parts

        return await self._say(say, budget)

    def defects(self, feeds: Feeds) -> dict[str, Callable[[], list[bytes]]]:
        """Builders of requests that a node must refuse, by defect."""

        def spoilt(**changes: np.ndarray | None) -> Callable[[], list[bytes]]:
            changed = {**feeds, **changes}
            return lambda: self.request({k: v for k, v in changed.items() if v is not None})

        def header(**changes: Any) -> Callable[[], list[bytes]]:
            def build() -> list[bytes]:
                return [with_header(self.request(feeds)[0], **changes)]

            return build

        name = next(iter(feeds))
        first, window = feeds[name], feeds["window"]
        return {
            "shape": spoilt(**{name: np.ascontiguousarray(first[..., :-1])}),
            "dtype": spoilt(**{name: first.astype(np.int32)}),
            "missing": spoilt(**{name: None}),
            "extra": spoilt(other=np.ones(3, np.float32)),
            "counts": spoilt(window=window[:-1] if len(window) > 1 else np.repeat(window, 2)),
            "negative window": spoilt(window=np.full_like(window, -1)),
            "window beyond": spoilt(window=np.full_like(window, 1 << 40)),
            "stage": header(stage="0" * 64),
            "no deadline": header(deadline_ms=0),
            "negative deadline": header(deadline_ms=-1),
            "unknown field": header(pixels_of="somebody"),
            "unknown type": header(type="obey"),
            "short id": header(id=b"x"),
            "accepted": lambda: [bytes(encode(Accepted(new_id())))],
            "version": lambda: [b"ERT\xfe"],
            "magic": lambda: [b"GET / HTTP/1.1"],
            "empty": lambda: [b""],
            "long header": lambda: [
                b"ERT\x02" + HEADER_BYTES.to_bytes(4, "little") + bytes(HEADER_BYTES)
            ],
        }

    async def stolen_by(self, thief: HostileEdge, feeds: Feeds, number: int) -> list[bytes]:
        """Send a request and leave. `thief` then connects with our routing id at once.

        Returns:
            the thief's results. It tries again for a second while the routing id is taken.
        """
        route = b"\0" + number.to_bytes(4, "big")
        peer = await self.connect(identity=route)
        await peer.send_message(self.request(feeds))
        await asyncio.wait_for(peer.read_message(), 30)  # accepted
        peer.abort()
        await peer.close()
        found: list[bytes] = []
        give_up = asyncio.get_running_loop().time() + 1
        while asyncio.get_running_loop().time() < give_up:
            async with await thief.connect(identity=route) as taken:
                with contextlib.suppress(*_ENDED):
                    await taken.send_message(info_request())
                    while True:  # libzmq never answers a routing id that is in use
                        (frame,) = await asyncio.wait_for(taken.read_message(), 0.3)
                        if _kind(frame) == "info":
                            give_up = 0
                        elif _kind(frame) == "result":
                            found.append(frame)
        return found

    async def cancelled(self, feeds: Feeds, *, budget: Budget = _FEW) -> Tally:
        """Send requests and leave at once, half of the time before all bytes were sent. Each uses
        its own connection. ``messages`` counts them."""
        meter = zmtp._Meter(budget)
        while meter.may():
            rng = random.Random(f"{self.seed}/{meter.tally.messages}")
            meter.tally.messages += 1
            with contextlib.suppress(*_ENDED):
                peer = await self.connect()
                meter.tally.connections += 1
                parts = self.request(feeds)
                data = b"".join(
                    peer.seal(part, more=i + 1 < len(parts)) for i, part in enumerate(parts)
                )
                kept = len(data) if rng.random() < 0.5 else rng.randrange(len(data))
                await peer.send(data[:kept])
                meter.tally.sent += peer.sent
                if rng.random() < 0.5:
                    peer.abort()
                await peer.close()
        return meter.end()

    async def answer_to(self, parts: Sequence[bytes], timeout_s: float = 10.0) -> Message:
        """Send one message on a new connection and return the header of the first reply."""
        async with await self.connect() as peer:
            await peer.send_message(parts)
            frames = await asyncio.wait_for(peer.read_message(), timeout_s)
            return decode_header(frames[0])

    async def _say(
        self, say: Callable[[int], list[bytes]], budget: Budget, *, read: bool = True
    ) -> Tally:
        """Send messages 0, 1, 2 … on one connection, or on a new one when the node closes it."""
        meter = zmtp._Meter(budget)
        tally = meter.tally

        async def listen(peer: Peer) -> None:
            with contextlib.suppress(*_ENDED):
                while True:
                    frames = await peer.read_message()
                    tally.note(_kind(frames[0]))

        async def session() -> None:
            sent = tally.sent
            async with await self.connect(receive_buffer=None if read else 4096) as peer:
                tally.connections += 1
                listening = asyncio.create_task(listen(peer)) if read else None
                try:
                    while meter.may() and not (listening and listening.done()):
                        parts = say(tally.messages)
                        tally.messages += 1
                        await peer.send_message(parts)
                        tally.sent = sent + peer.sent
                        await meter.pace()
                    if listening:  # a last chance for replies under way
                        # wait, not wait_for: the listener's end is no error here
                        await asyncio.wait({listening}, timeout=min(0.5, meter.left_s))
                        if listening.done():
                            tally.closed += 1
                finally:
                    if listening:
                        listening.cancel()
                        await asyncio.gather(listening, return_exceptions=True)

        while meter.may():
            try:
                await asyncio.wait_for(session(), max(0.01, meter.left_s))
            except asyncio.TimeoutError:
                tally.note("out of time")
            except _ENDED:
                tally.closed += 1
                await asyncio.sleep(0.01)
        return meter.end()


def info_request() -> list[bytes]:
    """Frames of a question that every node answers. Shows that the node is alive."""
    return [bytes(encode(InfoRequest(new_id())))]


def with_header(message: bytes, **changes: Any) -> bytes:
    """A message with some header fields changed and the same tensors. None removes a field."""
    end = 8 + int.from_bytes(message[4:8], "little")
    fields = {**msgspec.msgpack.decode(message[8:end]), **changes}
    packed = msgspec.msgpack.encode({k: v for k, v in fields.items() if v is not None})
    header = message[:4] + len(packed).to_bytes(4, "little") + packed
    body = message[-(-end // 64) * 64 :]
    return header + bytes(-len(header) % 64 if body else 0) + body


def _kind(header: bytes) -> str:
    try:
        message = decode_header(header)
    except ProtocolError:
        return "unreadable"
    if isinstance(message, Refused):
        return f"refused {message.code}"
    return type(message).__name__.lower()
