"""One worker process as the node's front sees it: start it, talk to it, end it.

The process gets two descriptors of this one's and no others, the one of the memory only once no
other process can look into it. Its end is noticed the moment it comes, and it leaves no zombie.
What is said, and what to do about an end, is left to the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from cloud_node.worker import Closed, FromWorker, Open, Run, Unpacker, pack

log = logging.getLogger(__name__)

_decoder = msgspec.msgpack.Decoder(FromWorker)


class Process(asyncio.Protocol):
    """A worker. Make one with :meth:`start`; every one needs :meth:`reap`.

    Attributes:
        lost: done once nothing more will come from it; it may take a moment longer to be gone.
        reason: why it was killed, if it was.
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        hand_over: Callable[[], None],
        on_message: Callable[[FromWorker], None],
    ) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason: str | None = None
        self._popen = popen
        self._hand_over = hand_over
        self._on_message = on_message
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def start(
        cls,
        request: Open,
        memory: int,
        environment: Mapping[str, str],
        on_message: Callable[[FromWorker], None],
    ) -> Process:
        """Start a worker that will be given the request and the descriptor `memory`.

        Raises:
            OSError: the system allows no more processes or descriptors.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                popen = subprocess.Popen(
                    [
                        sys.executable,
                        *("-m", "cloud_node.worker_start"),
                        *map(str, (theirs.fileno(), os.getpid())),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # ours may be somebody's input
                    pass_fds=(theirs.fileno(),),
                    # A Ctrl-C at the terminal is the node's to answer.
                    start_new_session=True,
                    # Modules of the same names where the user happens to be are not ours.
                    cwd=Path(__file__).resolve().parents[1],
                    env=dict(environment),
                )
        except BaseException:
            ours.close()
            raise

        def hand_over() -> None:
            # Nothing was sent before, so that this has room and comes first.
            with contextlib.suppress(OSError):  # it has ended
                socket.send_fds(ours, [pack(request)], [memory])

        process = cls(popen, hand_over, on_message)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: process, sock=ours)
        except BaseException:
            ours.close()
            process.end_now()
            raise
        return process

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: Run) -> None:
        if self._transport is not None:
            self._transport.write(pack(message))

    def leave(self) -> None:
        """Tell it to end after what it runs now."""
        if self._transport is not None:
            self._transport.close()

    def kill(self, reason: str) -> None:
        """End it at once, for a reason to tell people."""
        if self.reason is None:
            self.reason = reason
        if self._popen.poll() is None:
            self._popen.kill()
        if self._transport is not None:
            self._transport.abort()

    def end_now(self) -> None:
        """Kill it and wait for its end without the event loop."""
        self.kill("the node is going down")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(2)

    async def reap(self, grace_s: float) -> str:
        """Wait for its end, after ``grace_s`` with force.

        Returns:
            how it ended, to come after "the worker".
        """
        loop = asyncio.get_running_loop()
        patience, pause = loop.time() + grace_s, 0.002
        while self._popen.poll() is None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)
            if loop.time() > patience and self._popen.poll() is None:
                self._popen.kill()
        return _how(self._popen.returncode)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._unpacker.feed(data):
                message = _decoder.decode(body)
                if isinstance(message, Closed):
                    self._hand_over()
                else:
                    self._on_message(message)
        except (ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
            self.kill(f"sent what is no message: {type(error).__name__}")
        except Exception as error:
            log.exception("a message of a worker could not be handled")
            self.kill(f"was ended because of a defect of the node: {type(error).__name__}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name == "SIGKILL":
        return "was killed (SIGKILL), by somebody or by the system because memory ran out"
    return f"crashed ({name})"
