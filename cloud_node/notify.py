"""What the service manager is told: that the node serves, that it stops, that it is not stuck.

The protocol of sd_notify(3): datagrams to a socket that systemd names in the environment. Promises
that nothing is sent where nothing was asked for, that sending never waits and never fails the node,
and that the watchdog hears only from a turning event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, MutableMapping

from cloud_node.metrics import Metrics

log = logging.getLogger(__name__)

_LOOK_S = 0.1


class Notifier:
    """Whom to tell, if anybody.

    Attributes:
        watchdog_s: after so long without a sign of life the node is killed; None: never.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        # A name that begins with @ stands for one outside the file system.
        self._address = "\0" + address[1:] if address and address[0] == "@" else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Notifier:
        """As systemd says; taken out of the environment, since workers are not meant."""
        address = environment.pop("NOTIFY_SOCKET", None)
        micros = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        meant = micros.isascii() and micros.isdigit() and int(micros) and pid == str(os.getpid())
        return cls(address, int(micros) / 1e6 if meant else None)

    def send(self, text: str) -> None:
        """Tell, or lose it."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.setblocking(False)
                end.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("cannot tell the service manager %s: %s", text.split("\n")[0], error)

    @contextlib.asynccontextmanager
    async def following(self, metrics: Metrics) -> AsyncIterator[None]:
        """While the block runs, tell what becomes of the node: ready at the first time it can
        compute, alive as long as this loop turns, stopping at the end."""
        if not self._address:
            yield
            return
        task = asyncio.create_task(self._follow(metrics), name="notify")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if metrics.state != "draining":
                self.send("STOPPING=1")

    async def _follow(self, metrics: Metrics) -> None:
        loop = asyncio.get_running_loop()
        told, ready, alive = "", False, loop.time()
        while True:
            if metrics.ready and not ready:
                ready = True
                self.send("READY=1")
            if metrics.state != told:
                told = metrics.state
                if told == "draining":
                    self.send("STOPPING=1")
                self.send(f"STATUS={told}, {metrics.workers_ready} of {metrics.lanes} workers")
            if self.watchdog_s and loop.time() - alive >= self.watchdog_s / 4:
                alive = loop.time()
                self.send("WATCHDOG=1")
            await asyncio.sleep(min(_LOOK_S, (self.watchdog_s or 1) / 8))
