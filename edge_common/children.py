"""A child process that exchanges messages with its parent over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_MESSAGE = 1 << 20


def pack(body: bytes) -> bytes:
    """A message with its length in front."""
    return struct.pack(">I", len(body)) + body


class Unpacker:
    """Finds the messages in a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the messages that `data` completes.

        Raises:
            ValueError: a message announces more than 1 MiB.
        """
        self._data += data
        while len(self._data) >= 4:
            (length,) = struct.unpack_from(">I", self._data)
            if length > _MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes, expected at most {_MAX_MESSAGE}")
            if len(self._data) < 4 + length:
                return
            body = bytes(self._data[4 : 4 + length])
            del self._data[: 4 + length]
            yield body


class Child(asyncio.Protocol):
    """A child process. Make one with :meth:`start`; end each with :meth:`reap`, or it stays a
    zombie.

    Attributes:
        lost: done once no more messages will come. The process may exist a moment longer.
        reason: why this process killed it, if it did.
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        sock: socket.socket,
        on_message: Callable[[Child, bytes], None],
    ) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason: str | None = None
        self._popen, self._socket = popen, sock
        self._on_message = on_message
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def start(
        cls, module: str, on_message: Callable[[Child, bytes], None], environment: Mapping[str, str]
    ) -> Child:
        """Run ``python -m MODULE SOCKET PARENT``: the descriptor of its socket, and our pid.

        The child gets no other descriptor of this process.

        Args:
            on_message: called with the child and the body of each message. The child is killed if
                this raises.

        Raises:
            OSError: the system allows no more processes or descriptors.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                popen = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # another program may read our stdout
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C at the terminal is for the parent only
                    # Otherwise modules in the user's current folder could replace ours.
                    cwd=Path(__file__).resolve().parents[1],
                    env=dict(environment),
                )
        except BaseException:
            ours.close()
            raise
        child = cls(popen, ours, on_message)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: child, sock=ours)
        except BaseException:
            ours.close()
            child.end_now()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, body: bytes) -> None:
        """Send a message; nothing happens if the child has ended."""
        if self._transport is not None:
            self._transport.write(pack(body))

    def send_descriptor(self, body: bytes, descriptor: int) -> None:
        """Send a message with a file descriptor. It must be the first message."""
        with contextlib.suppress(OSError):  # the child has ended
            socket.send_fds(self._socket, [pack(body)], [descriptor])

    def leave(self) -> None:
        """Close the socket, so that the child ends after its present work."""
        if self._transport is not None:
            self._transport.close()

    def kill(self, reason: str) -> None:
        """End the child at once; `reason` is for people."""
        if self.reason is None:
            self.reason = reason
        if self._popen.poll() is None:
            self._popen.kill()
        if self._transport is not None:
            self._transport.abort()

    def end_now(self) -> None:
        """Kill the child and wait for its end without the event loop."""
        self.kill("was ended with its parent")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(2)

    async def reap(self, grace_s: float) -> str:
        """Wait until the process is gone; kill it after ``grace_s``.

        Returns:
            how it ended, such as "ended with status 1".
        """
        loop = asyncio.get_running_loop()
        kill_at, pause = loop.time() + grace_s, 0.002
        while self._popen.poll() is None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)
            if loop.time() > kill_at and self._popen.poll() is None:
                self._popen.kill()
        return _description(self._popen.returncode)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._unpacker.feed(data):
                self._on_message(self, body)
        except (ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
            self.kill(f"sent an invalid message: {type(error).__name__}")
        except Exception as error:
            log.exception("a message of a child process could not be handled")
            self.kill(f"was ended because of a defect: {type(error).__name__}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)


def _description(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name == "SIGKILL":
        return "was killed (SIGKILL): by a user, or by the system because memory ran out"
    return f"crashed ({name})"
