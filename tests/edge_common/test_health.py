"""/metrics, /healthz and /readyz over real sockets, with clients that abuse them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from edge_common import health
from edge_common.errors import ConfigError
from edge_common.health import CONNECTIONS, Endpoint
from edge_common.metrics import new_registry


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 60)

    asyncio.run(bounded())


@dataclass
class State:
    """A stub of `Health`."""

    ready: bool = False
    state: str = "starting"
    summary: str = ""


@contextlib.asynccontextmanager
async def serving(state: State | None = None) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(state or State(), new_registry("test", "1.2.3"))
    await endpoint.open("127.0.0.1", 0)
    try:
        yield endpoint
    finally:
        await endpoint.close()


async def connect(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = endpoint.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def ask(endpoint: Endpoint, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes and return status, headers and body of the answer. The server must then close the
    connection."""
    reader, writer = await connect(endpoint)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.startswith("HTTP/1.1 ")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), headers, body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_metrics_in_prometheus_format() -> None:
    async def test() -> None:
        async with serving() as endpoint:
            status, headers, body = await ask(endpoint, get("/metrics"))
            assert status == 200
            assert headers["content-type"].startswith("text/plain; version=")
            assert headers["content-length"] == str(len(body))
            assert headers["connection"] == "close"
            assert b"\ntest_build_info{" in body
            assert b'version="1.2.3"' in body
            assert b"\nprocess_open_fds " in body

    run(test())


def test_ready_follows_the_state() -> None:
    async def test() -> None:
        state = State()
        async with serving(state) as endpoint:
            for state.ready, state.state, status in (
                (False, "starting", 503),
                (True, "ready", 200),
                (False, "draining", 503),
            ):
                found, _, body = await ask(endpoint, get("/readyz"))
                assert (found, body) == (status, f"{state.state}\n".encode())
                assert (await ask(endpoint, get("/healthz")))[0] == 200

    run(test())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/"), 404),
        (get("/metrics/../../etc/passwd"), 404),
        (get("/metrics?name[]=x"), 200),
        (b"HEAD /metrics HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"get /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1 \x00\xff\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"x" * 20_000, 431),
    ],
    ids=lambda v: str(v)[:40],
)
def test_requests_of_all_kinds(request_: bytes, status: int) -> None:
    async def test() -> None:
        async with serving() as endpoint:
            try:
                found, headers, body = await ask(endpoint, request_)
            except ConnectionError:
                # The server does not read bytes beyond the limit. TCP may end before the answer
                # arrives.
                assert status == 431
            else:
                assert found == status
                if request_.startswith(b"HEAD"):
                    assert body == b""
                    assert int(headers["content-length"]) > 0
                if status == 405:
                    assert headers["allow"] == "get, head"
            assert (await ask(endpoint, get("/healthz")))[0] == 200

    run(test())


def test_a_connection_without_a_complete_request_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.2)

    async def test() -> None:
        async with serving() as endpoint:
            silent, half = await connect(endpoint), await connect(endpoint)
            half[1].write(b"GET /metrics HT")
            for reader, writer in (silent, half):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            # A byte now and then does not extend the time.
            reader, writer = await connect(endpoint)
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
            writer.close()
            assert ended.exception() or ended.result() == b""
            assert not endpoint._connections

    run(test())


def test_many_slow_connections_do_not_lock_out_an_honest_one() -> None:
    async def test() -> None:
        async with serving() as endpoint:
            slow = [await connect(endpoint) for _ in range(3 * CONNECTIONS)]
            for _, writer in slow:
                writer.write(b"GET /metrics HT")
            for _ in range(5):
                assert (await ask(endpoint, get("/metrics")))[0] == 200
                assert len(endpoint._connections) <= CONNECTIONS
            # The oldest connection was dropped.
            with contextlib.suppress(ConnectionError):
                assert await slow[0][0].read() == b""
            for _, writer in slow:
                writer.close()

    run(test())


def test_a_client_that_does_not_read_the_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.2)
    monkeypatch.setattr(health, "exposition", lambda registry: b"x" * (64 << 20))

    async def test() -> None:
        async with serving() as endpoint:
            host, _, port = endpoint.address.rpartition(":")
            with socket.create_connection((host, int(port))) as deaf:
                deaf.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(deaf, get("/metrics"))
                while not endpoint._connections:
                    await asyncio.sleep(0.01)
                while endpoint._connections:
                    await asyncio.sleep(0.01)
            assert (await ask(endpoint, get("/healthz")))[0] == 200

    run(test())


def test_a_reset_connection_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as endpoint:
            for sent in (b"", b"GET", get("/metrics")):
                _, writer = await connect(endpoint)
                writer.write(sent)
                writer.transport.abort()
            assert (await ask(endpoint, get("/metrics")))[0] == 200

    run(test())
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_a_defect_in_a_handler_costs_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "exposition", lambda registry: 1 // 0)

    async def test() -> None:
        async with serving() as endpoint:
            reader, writer = await connect(endpoint)
            writer.write(get("/metrics"))
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
            assert (await ask(endpoint, get("/healthz")))[0] == 200

    run(test())
    assert {record.name for record in caplog.records} == {"edge_common.health"}


def test_closing_ends_open_connections_and_frees_the_port() -> None:
    async def test() -> None:
        async with serving() as endpoint:
            reader, writer = await connect(endpoint)
            writer.write(b"GET")
            while not endpoint._connections:
                await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(OSError):  # noqa: PT011
            await connect(endpoint)

    run(test())


def test_a_taken_port_is_reported_with_the_setting() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            endpoint = Endpoint(State(), new_registry("test", "x"))
            with pytest.raises(ConfigError, match=f"{address}.*--metrics"):
                await endpoint.open(*other.getsockname())
            await endpoint.close()

    run(test())
