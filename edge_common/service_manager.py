"""Notifies systemd that a process is ready, alive or stopping: the protocol of sd_notify(3).

The `sdnotify` package is not sufficient: its sends can block the event loop, it hides
errors, and it has no watchdog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, MutableMapping

from edge_common.health import Health

log = logging.getLogger(__name__)

_POLL_S = 0.1


class ServiceManager:
    """The socket of the service manager, if the process was started by one.

    Attributes:
        watchdog_s: the service manager kills the process after this long without a ping; None:
            never.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        # A leading @ stands for a name outside the file system.
        self._address = "\0" + address[1:] if address and address[0] == "@" else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """Read the variables that systemd sets, and remove them: they are not for children."""
        address = environment.pop("NOTIFY_SOCKET", None)
        micros = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        ours = micros.isascii() and micros.isdigit() and int(micros) and pid == str(os.getpid())
        return cls(address, int(micros) / 1e6 if ours else None)

    def send(self, text: str) -> None:
        """Send a notice without waiting. A failure is logged and costs only the notice."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.setblocking(False)
                end.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("cannot notify the service manager of %s: %s", text.split("\n")[0], error)

    @contextlib.asynccontextmanager
    async def following(self, health: Health) -> AsyncIterator[None]:
        """During the block, report `health`: ready once, each new state, and that it stops.

        The watchdog is pinged from the event loop, so a blocked loop is noticed.
        """
        if not self._address:
            yield
            return
        task = asyncio.create_task(self._follow(health), name="service manager")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if health.state != "draining":
                self.send("STOPPING=1")

    async def _follow(self, health: Health) -> None:
        loop = asyncio.get_running_loop()
        state, ready, pinged = "", False, loop.time()
        while True:
            if health.ready and not ready:
                ready = True
                self.send("READY=1")
            if health.state != state:
                state = health.state
                if state == "draining":
                    self.send("STOPPING=1")
                self.send(f"STATUS={health.summary}")
            if self.watchdog_s and loop.time() - pinged >= self.watchdog_s / 4:
                pinged = loop.time()
                self.send("WATCHDOG=1")
            await asyncio.sleep(min(_POLL_S, (self.watchdog_s or 1) / 8))
