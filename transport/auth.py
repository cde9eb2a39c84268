"""Who may talk to a node: the ZAP authenticator and its allow-list, a folder of public keys.

libzmq asks this authenticator about every client before any message of it is read. Promises that
only a CURVE client whose key lies in the folder gets in, that no failure in here (a malformed key
file, an exception, an unknown question) lets anyone in or stops the authenticator, and that a key
added to or taken from the folder counts for the next handshake, without a restart. Connections that
are already open stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.utils import z85

from engines.errors import KeyFileError
from transport.keys import load_public
from transport.sockets import ZAP_DOMAIN

log = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_LOG_AGAIN_S = 60.0
_LOG_KEYS = 256


class AllowList:
    """The public keys in a folder: every ``NAME.pub`` lets in its holder under that name."""

    def __init__(self, folder: Path | str) -> None:
        """Read the folder.

        Raises:
            KeyFileError: it is missing, or others may write to it and so let themselves in.
        """
        self.folder = Path(folder)
        self._stamp: object = None
        self._names: dict[str, str] = {}
        self.reload()

    def reload(self) -> dict[str, str]:
        """Names by Z85 public key, read anew if anything in the folder changed. A malformed file
        lets in nobody.

        Raises:
            KeyFileError: as when made.
        """
        try:
            mode = self.folder.stat().st_mode
            entries = sorted(
                _stamp(e)
                for e in os.scandir(self.folder)
                if e.name.endswith(".pub") and not e.name.startswith(".")
            )
        except OSError as error:
            raise KeyFileError(
                f"cannot read the folder of authorised keys {self.folder}: {error.strerror}; "
                "`edge-runtime keys node` makes one"
            ) from None
        if stat.S_IMODE(mode) & 0o022:
            raise KeyFileError(
                f"others may write to {self.folder} (mode {stat.S_IMODE(mode):04o}) and so "
                f"authorise themselves: run `chmod 700 {self.folder}`"
            )
        if entries != self._stamp:
            names: dict[str, str] = {}
            for name, *_ in entries:
                try:
                    names.setdefault(load_public(self.folder / name), name.removesuffix(".pub"))
                except KeyFileError as error:
                    log.warning("ignored authorised key: %s", error)
            self._names, self._stamp = names, entries
        return self._names

    def name_of(self, public: str) -> str | None:
        """The name a Z85 public key is enrolled under, None if it is not."""
        return self.reload().get(public)

    def __len__(self) -> int:
        return len(self._names)


def _stamp(entry: os.DirEntry[str]) -> tuple[str, int, int, int]:
    """What changes when a key file does. A link to nowhere is a file to tell of, not an error."""
    with contextlib.suppress(OSError):
        status = entry.stat()
        return entry.name, status.st_mtime_ns, status.st_size, status.st_ino
    return entry.name, 0, 0, 0


class Authenticator:
    """Answers libzmq's ZAP questions on `ctx` from an `AllowList`, from `start` to `stop`."""

    def __init__(self, ctx: zmq.asyncio.Context, allowed: AllowList) -> None:
        self._ctx = ctx
        self._allowed = allowed
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._logged: dict[str, float] = {}

    def start(self) -> None:
        """Begin answering; needs a running event loop. Call before binding any server on `ctx`."""
        self._socket = self._ctx.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="zap")

    async def stop(self) -> None:
        """Stop; from now on nobody is let in."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._socket:
            self._socket.close()
        self._task = self._socket = None

    async def _serve(self) -> None:
        assert self._socket is not None
        while True:
            request = await self._socket.recv_multipart()
            try:
                status, text, user = self._judge(request)
            except Exception as error:  # whatever happens, answer no and stay alive
                log.error("authenticator failed, client refused: %s", error)
                status, text, user = b"500", b"internal error", ""
            request_id = request[1] if len(request) > 1 else b""
            reply = [b"1.0", request_id, status, text, user.encode(), b""]
            try:
                await self._socket.send_multipart(reply)
            except zmq.ZMQError as error:
                log.error("authenticator could not answer: %s", error)

    def _judge(self, request: list[bytes]) -> tuple[bytes, bytes, str]:
        """(status, text, user id) for one ZAP question. https://rfc.zeromq.org/spec/27/"""
        if len(request) != 7 or request[0] != b"1.0":
            return b"500", b"malformed question", ""
        _, _, domain, address, _, mechanism, credential = request
        if domain != ZAP_DOMAIN or mechanism != b"CURVE" or len(credential) != 32:
            return b"400", b"only CURVE clients", ""
        public = z85.encode(credential).decode()
        name = self._allowed.name_of(public)
        if name is None:
            self._log_refusal(public, address.decode("ascii", "replace"))
            return b"400", b"key not authorised", ""
        return b"200", b"OK", name

    def _log_refusal(self, public: str, address: str) -> None:
        now = time.monotonic()
        if now - self._logged.get(public, -_LOG_AGAIN_S) < _LOG_AGAIN_S:
            return
        if len(self._logged) >= _LOG_KEYS:
            self._logged.clear()
        self._logged[public] = now
        log.warning(
            "refused %s: its key %s is not authorised; to let it in, put its .pub file in place "
            "with `edge-runtime keys authorize --dir %s FILE.pub` (no restart needed)",
            address,
            public,
            self._allowed.folder.parent,
        )
