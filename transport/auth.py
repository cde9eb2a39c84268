"""The authenticator of a server: answers libzmq's question about every client (ZAP).

pyzmq's own authenticator (`zmq.auth`) with a `CredentialsProvider` can't replace it: it ends when a
callback raises, answers nothing but 200 and 400 (an edge could not tell "not now" from "never"),
sets no properties (`KEY`, `LET_IN_AT`), and lets NULL clients in.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from edge_common.logs import LogLimiter
from transport.allow_list import AllowList
from transport.dos_protection import Connections, PenaltyBox, RateLimit
from transport.dos_protection.connections import LET_IN_AT
from transport.sockets import ZAP_DOMAIN, Readable

log = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
KEY = "X-Key"
"""Property of every message: the Z85 key of its connection. Its name is in User-Id. The
authenticator sets both; a peer can't override them."""
_RELOAD_S = 0.25
_HANDSHAKES, _HANDSHAKES_PER_S = 100, 10.0
"""Handshakes of one key: at once, and in the long run. libzmq waits 0.1 s before it reconnects, so
no edge exceeds this rate by itself; many processes of one key may start together."""
# Status codes of ZAP. libzmq passes 400 and 500 on to the client; after 300 the client would wait.
_NEVER, _LATER = b"400", b"500"
_ANSWERS = {
    "protocol": (_NEVER, b"only CURVE clients"),
    "not_authorised": (_NEVER, b"key not authorised"),
    "folder": (_LATER, b"keys can't be read"),
    "banished": (_LATER, b"kept out, try again"),
    "too_often": (_LATER, b"too often, try again"),
    "internal": (_LATER, b"internal error"),
}
"""Answers to refused clients, by a reason of `peer_events.REFUSALS`."""


class _Refusal(Exception):
    """A client is refused; the text is one of `_ANSWERS`."""


def _property(name: str, value: bytes) -> bytes:
    """Encode a property as ZMTP does."""
    return bytes([len(name)]) + name.encode() + struct.pack(">I", len(value)) + value


class Authenticator:
    """Answers ZAP questions on `ctx` from an `AllowList`, from `start` to `stop`.

    Only a CURVE client whose key is in the list gets in. No failure in here lets anyone in or stops
    the authenticator. A key that is new in the folder counts at once, a removed one within about
    0.25 s.

    Args:
        ctx: context of the servers.
        allowed: the keys.
        on_revoked: is called in the event loop with the names that lost their key or have another
            one. If it raises, it is called again soon.
        on_broken: is called in the event loop if a task ends. From then on, no edge is admitted or
            no key is revoked.
        connections: of the server. Their events are read before a client gets in (`LET_IN_AT`).
        on_refused: is called with the reason of each refused handshake, see `peer_events.REFUSALS`.
        penalties: names that are banned.
    """

    def __init__(
        self,
        ctx: zmq.Context[Any],
        allowed: AllowList,
        on_revoked: Callable[[frozenset[str]], None] | None = None,
        on_broken: Callable[[asyncio.Task[None]], None] | None = None,
        connections: Connections | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
        penalties: PenaltyBox | None = None,
    ) -> None:
        self._ctx = ctx
        self._allowed = allowed
        self._on_revoked = on_revoked
        self._on_broken = on_broken
        self._connections = connections
        self._on_refused = on_refused
        self._penalties = penalties or PenaltyBox()
        self._keys = {name: key for key, name in allowed.reload().items()}
        self._revoked: frozenset[str] = frozenset()  # not taken in by `on_revoked` yet
        self._folder_unusable = False
        self._reload_at = 0.0
        self._socket: zmq.Socket[bytes] | None = None
        self._readable: Readable | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._limiter = LogLimiter()
        self._rate = RateLimit(_HANDSHAKES, _HANDSHAKES_PER_S)

    def start(self) -> None:
        """Begin to answer; needs a running event loop. Call before binding a server on `ctx`."""
        plain: zmq.Context[Any] = zmq.Context.shadow(self._ctx.underlying)
        self._socket = plain.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._readable = Readable(self._socket)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._serve(self._socket, self._readable), name="zap"),
            loop.create_task(self._watch(), name="allow-list"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Stop. From now on no edge is admitted."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._readable and self._socket:
            self._readable.close()
            self._socket.close()
        self._socket = self._readable = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks and self._on_broken:
            self._on_broken(task)

    def admits(self, name: str, key: str) -> bool:
        """True if this key is authorised under this name now. A connection keeps the key and name
        under which it was admitted."""
        return self._keys.get(name) == key

    async def _watch(self) -> None:
        """Read the folder again and again: no notification works on every file system."""
        while True:
            await asyncio.sleep(max(_RELOAD_S, self._reload_at - time.monotonic()))
            try:
                self._reload()
            except Exception as error:  # the watch must go on
                log.error("authenticator failed: %s", error)

    def _reload(self) -> None:
        begun = time.monotonic()
        try:
            now = {name: key for key, name in self._allowed.reload().items()}
            self._folder_unusable = False
        except Exception as error:
            now, self._folder_unusable = {}, True
            if self._keys or self._limiter.allows("folder"):
                log.error("no key is authorised any more: %s", error)
        finally:  # a tenth of the time at most, however large the folder; a second's share at once
            took = time.monotonic() - begun
            self._reload_at = max(self._reload_at, begun - 1.0) + 10 * took
        revoked = frozenset(name for name, key in self._keys.items() if now.get(name) != key)
        added = sorted(now.keys() - self._keys.keys())
        self._keys = now
        if added:
            log.info("authorised now: %s", ", ".join(added))
        if revoked:
            log.warning("no longer authorised: %s", ", ".join(sorted(revoked)))
            self._rate.keep(now.values())
            self._penalties.forget(revoked)
        self._revoked |= revoked
        if self._revoked and self._on_revoked:
            self._on_revoked(self._revoked)
        self._revoked = frozenset()

    async def _serve(self, socket: zmq.Socket[bytes], readable: Readable) -> None:
        while True:
            try:
                request = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await readable.wait()
                continue
            try:
                socket.send_multipart(self._answer(request), zmq.NOBLOCK)
            except zmq.ZMQError as error:
                log.error("authenticator could not answer: %s", error)
            await asyncio.sleep(0)  # a flood of questions must not starve other tasks

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to one ZAP question. https://rfc.zeromq.org/spec/27/"""
        start = [b"1.0", request[1] if len(request) > 1 else b""]
        try:
            user = self._judge(request).encode()
            properties = _property(KEY, z85.encode(request[6]))
            if self._connections is not None:
                self._connections.read_events()
                properties += _property(LET_IN_AT, str(time.monotonic()).encode())
            return [*start, b"200", b"OK", user, properties]
        except _Refusal as refusal:
            reason = str(refusal)
        except Exception as error:  # refuse, and go on
            reason = "internal"
            if self._limiter.allows(reason):
                log.error("authenticator failed, client refused: %s", error)
        self._on_refused(reason)
        return [*start, *_ANSWERS[reason], b"", b""]

    def _judge(self, request: list[bytes]) -> str:
        """The name of the client that a ZAP question is about.

        Raises:
            _Refusal: it does not get in.
        """
        if len(request) != 7 or request[0] != b"1.0":
            raise _Refusal("protocol")
        _, _, domain, address, _, mechanism, credential = request
        if domain != ZAP_DOMAIN or mechanism != b"CURVE" or len(credential) != 32:
            raise _Refusal("protocol")
        now = time.monotonic()
        public = z85.encode(credential).decode()
        name = self._allowed.name_of(public)
        if name is None and now >= self._reload_at:
            self._reload()
            name = self._allowed.name_of(public)
        if self._folder_unusable:
            raise _Refusal("folder")
        if name is None:
            if self._limiter.allows(public):
                log.warning(
                    "refused %s: its key %s is not authorised; to let it in, put its .pub file in "
                    "place with `%s` (no restart needed)",
                    *(address.decode("ascii", "replace"), public),
                    self._allowed.command("FILE.pub"),
                )
            raise _Refusal("not_authorised")
        if self._penalties.banned(name, now):
            raise _Refusal("banished")
        # Each handshake costs half a millisecond, and each connection takes one of libzmq's routing
        # ids, or claims one: unlimited reconnects could collide with an id that libzmq is about to
        # assign.
        if not self._rate.take(public, now):
            if self._limiter.allows(("too_often", name)):
                log.warning("%s connects too often, some connections are refused", name)
            raise _Refusal("too_often")
        return name
