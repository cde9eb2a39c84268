"""Notices to the service manager."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_common.service_manager import ServiceManager


@dataclass
class State:
    """A stub of `Health`."""

    state: str = "starting"
    workers: int = 0
    ready: bool = False

    @property
    def summary(self) -> str:
        return f"{self.state}, {self.workers} of 2 workers"


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, str]]:
    path = tmp_path_factory.mktemp("n") / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(60)
        yield end, str(path)


def waiting(end: socket.socket) -> list[str]:
    found = []
    end.setblocking(False)
    try:
        while True:
            found.append(end.recv(1000).decode())
    except BlockingIOError:
        end.settimeout(60)
        return found


def test_the_environment_is_read_and_cleared() -> None:
    environment = {
        "NOTIFY_SOCKET": "/run/x",
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "PATH": "/bin",
    }
    manager_ = ServiceManager.from_environment(environment)
    assert manager_.watchdog_s == 3.0
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
def test_a_watchdog_for_another_process_is_ignored(environment: dict[str, str]) -> None:
    assert ServiceManager.from_environment(environment).watchdog_s is None


def test_nothing_is_sent_without_a_service_manager() -> None:
    async def test() -> None:
        manager_ = ServiceManager(None)
        manager_.send("READY=1")
        async with manager_.following(State()):
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(test())


def test_sockets_in_the_abstract_namespace_work() -> None:
    name = f"edge-runtime-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name)
        end.settimeout(60)
        ServiceManager("@" + name).send("READY=1")
        assert end.recv(100) == b"READY=1"


def test_a_failed_notice_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(str(tmp_path / "gone")).send("READY=1\nSTATUS=x")
    (line,) = caplog.messages
    assert "cannot notify the service manager of READY=1" in line


def test_a_full_socket_does_not_block(manager: tuple[socket.socket, str]) -> None:
    manager_ = ServiceManager(manager[1])
    for _ in range(10_000):  # far more than a datagram queue holds
        manager_.send("WATCHDOG=1")
    assert 0 < len(waiting(manager[0])) < 10_000


def test_the_notices_over_a_node_s_life(manager: tuple[socket.socket, str]) -> None:
    end, path = manager

    async def until(text: str, told: list[str]) -> None:
        while text not in told:
            told += waiting(end)
            await asyncio.sleep(0.01)

    async def test() -> list[str]:
        health, told = State(), list[str]()
        async with ServiceManager(path, 60.0).following(health):
            await until("STATUS=starting, 0 of 2 workers", told)
            assert "READY=1" not in told
            health.state, health.workers, health.ready = "ready", 2, True
            await until("STATUS=ready, 2 of 2 workers", told)
            health.state, health.workers = "degraded", 1
            await until("STATUS=degraded, 1 of 2 workers", told)
            health.state = "draining"
            await until("STOPPING=1", told)
        return told + waiting(end)

    told = asyncio.run(asyncio.wait_for(test(), 60))
    assert [text for text in told if not text.startswith("STATUS")] == ["READY=1", "STOPPING=1"]


def test_a_failing_node_reports_that_it_stops(manager: tuple[socket.socket, str]) -> None:
    async def test() -> None:
        async with ServiceManager(manager[1]).following(State()):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asyncio.run(test())
    assert waiting(manager[0])[-1] == "STOPPING=1"


def test_a_blocked_loop_sends_no_watchdog_ping(manager: tuple[socket.socket, str]) -> None:
    end, path = manager

    async def test() -> None:
        async with ServiceManager(path, 0.04).following(State()):
            while "WATCHDOG=1" not in waiting(end):
                await asyncio.sleep(0.001)
            waiting(end)
            time.sleep(0.5)
            assert waiting(end) == []
            while "WATCHDOG=1" not in waiting(end):
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(test(), 60))
