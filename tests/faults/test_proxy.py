"""Every fault of the proxy on plain TCP happens exactly where it was requested."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from faults.proxy import Cut, Faults, Proxy, random_cuts

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def proxied(handler: Any = echo, **options: Any) -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        async with Proxy(server.sockets[0].getsockname(), **options) as proxy:
            yield proxy
    finally:
        server.close()


def run(work: Callable[[Proxy], Awaitable[T]], handler: Any = echo, **options: Any) -> T:
    async def whole() -> T:
        async with proxied(handler, **options) as proxy:
            return await asyncio.wait_for(work(proxy), 30)

    return asyncio.run(whole())


async def there_and_back(proxy: Proxy, data: bytes, chunk: int = 1 << 16) -> bytes:
    reader, writer = await asyncio.open_connection(*proxy.address)

    async def send() -> None:
        for at in range(0, len(data), chunk):
            writer.write(data[at : at + chunk])
            await writer.drain()
        writer.write_eof()

    try:
        got, _ = await asyncio.gather(reader.read(-1), send())
        return got
    finally:
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_without_faults_all_bytes_pass_and_are_counted() -> None:
    async def work(proxy: Proxy) -> None:
        data = noise(1_000_000)
        assert await there_and_back(proxy, data) == data
        for flow in (proxy.up, proxy.down):
            assert (flow.read, flow.passed, flow.dropped) == (len(data), len(data), 0)
        await until(lambda: proxy.open == 0)
        assert (proxy.connections, proxy.resets, proxy.shed) == (1, 0, 0)

    run(work)


def test_nothing_remains_after_the_proxy() -> None:
    async def work(proxy: Proxy) -> None:
        held = [await asyncio.open_connection(*proxy.address) for _ in range(20)]
        await until(lambda: proxy.open == 20)
        for _, writer in held:
            writer.transport.abort()

    run(work)
    before = len(os.listdir("/proc/self/fd"))
    run(work)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_latency_and_jitter_keep_the_order() -> None:
    async def work(proxy: Proxy) -> None:
        proxy.up.set(latency_s=0.05, jitter_s=0.05)
        proxy.down.set(latency_s=0.05)
        data, begun = noise(200_000), time.monotonic()
        assert await there_and_back(proxy, data, chunk=1000) == data
        assert time.monotonic() - begun >= 0.1

    run(work)


def test_a_rate_is_shared_by_all_connections_and_can_be_removed() -> None:
    async def work(proxy: Proxy) -> None:
        proxy.up.set(rate=400_000, burst=10_000)
        data, begun = noise(60_000), time.monotonic()
        got = await asyncio.gather(*(there_and_back(proxy, data) for _ in range(2)))
        assert got == [data, data]
        assert time.monotonic() - begun >= (2 * len(data) - 10_000) / 400_000
        proxy.up.set(rate=10, burst=1)
        slow = asyncio.create_task(there_and_back(proxy, data))
        await asyncio.sleep(0.05)
        proxy.up.clear()
        assert await slow == data

    run(work)


def test_slices_do_not_depend_on_the_chunks() -> None:
    async def work(proxy: Proxy, chunk: int) -> int:
        proxy.up.set(slices=7)
        data = noise(20_000)
        assert await there_and_back(proxy, data, chunk) == data
        assert proxy.up.pieces >= len(data) / 7
        return proxy.up.pieces

    # The end of a chunk inside a piece splits the piece. Nothing else differs.
    whole = run(lambda proxy: work(proxy, 1 << 16), seed=3)
    parts = run(lambda proxy: work(proxy, 999), seed=3)
    assert abs(parts - whole) <= 20_000 // 999 + 2


@pytest.mark.parametrize("how", ["reset", "fin"])
def test_a_cut_happens_at_its_byte_and_only_as_often_as_requested(how: Any) -> None:
    async def work(proxy: Proxy) -> None:
        for side, cut in random_cuts(seed=1, count=20, most=40_000, how=how):
            flow = getattr(proxy, side)
            flow.set(cut=cut)
            passed = flow.passed
            data = noise(50_000)
            if how == "reset":
                with pytest.raises(OSError, match=r"reset|pipe"):
                    await there_and_back(proxy, data)
            else:
                assert await there_and_back(proxy, data) == data[: cut.after]
            assert flow.passed - passed == cut.after
            await until(lambda: proxy.open == 0)
            assert await there_and_back(proxy, data) == data
            flow.clear()
        assert proxy.up.cuts + proxy.down.cuts == 20
        assert proxy.resets == (20 if how == "reset" else 0)

    run(work)


def test_bytes_before_a_reset_arrive() -> None:
    async def work(proxy: Proxy) -> None:
        proxy.down.set(cut=Cut(12_345))
        reader, writer = await asyncio.open_connection(*proxy.address)
        data = noise(20_000)
        writer.write(data)
        assert await reader.readexactly(12_345) == data[:12_345]
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()

    run(work)


def test_a_half_close_ends_one_direction() -> None:
    async def work(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        assert proxy.half_close("down") == 1
        assert await reader.read() == b""  # FIN, not RST
        writer.write(b"two")
        await until(lambda: proxy.up.passed == 6)  # the other direction still works
        writer.close()
        await until(lambda: proxy.open == 0)
        assert proxy.resets == 0

    run(work)


def test_a_black_hole_discards_everything_and_then_ends() -> None:
    async def work(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.black_hole(True)
        writer.write(b"lost")
        late = await asyncio.open_connection(*proxy.address)  # accepted during the black hole too
        await until(lambda: proxy.up.dropped == 4 and proxy.connections == 2)
        assert proxy.up.passed == 3
        proxy.black_hole(False)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        late[1].write(b"now")
        assert await late[0].readexactly(3) == b"now"
        writer.close()
        late[1].close()

    run(work)


def test_frozen_bytes_arrive_when_thawed() -> None:
    async def work(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.freeze()
        writer.write(b"two")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(reader.readexactly(3), 0.1)
        assert proxy.up.passed == 3
        proxy.thaw()
        assert await reader.readexactly(3) == b"two"
        writer.close()

    run(work)


def test_refusing_and_resetting_on_command() -> None:
    async def work(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection(*proxy.address)
        await until(lambda: proxy.open == 1)
        proxy.refuse(True)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*proxy.address)
        assert proxy.reset_all() == 1
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        proxy.refuse(False)
        assert await there_and_back(proxy, b"again") == b"again"

    run(work)


def test_too_many_connections_are_shed() -> None:
    async def work(proxy: Proxy) -> None:
        kept = await asyncio.open_connection(*proxy.address)
        await until(lambda: proxy.open == 1)
        reader, writer = await asyncio.open_connection(*proxy.address)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        assert proxy.shed == 1
        for end in (kept[1], writer):
            end.close()

    run(work, max_connections=1)


def test_buffers_are_limited() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def work(proxy: Proxy) -> None:
        proxy.up.set(latency_s=60)
        _, writer = await asyncio.open_connection(*proxy.address)
        writer.write(noise(4_000_000))
        await until(lambda: proxy.up.read >= 100_000)
        await asyncio.sleep(0.1)
        assert proxy.up.read - proxy.up.passed <= 100_000 + 2 * 16 * 1024
        writer.transport.abort()

    run(work, deaf, buffer_bytes=100_000)


def test_many_changing_faults_corrupt_no_byte() -> None:
    async def work(proxy: Proxy) -> None:
        data = noise(400_000)
        tasks = [asyncio.create_task(there_and_back(proxy, data, 7000)) for _ in range(4)]
        rng = np.random.default_rng(5)
        for _ in range(20):
            flow = (proxy.up, proxy.down)[rng.integers(2)]
            flow.set(latency_s=rng.uniform(0, 0.01), jitter_s=0.005, rate=rng.uniform(5e5, 1e7))
            flow.set(slices=int(rng.integers(100, 5000)))
            proxy.freeze()
            await asyncio.sleep(0.005)
            proxy.thaw()
            await asyncio.sleep(0.005)
        proxy.up.clear()
        proxy.down.clear()
        assert await asyncio.gather(*tasks) == [data] * 4

    run(work)


def test_the_proxy_runs_in_a_thread_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with Proxy(f"tcp://{host}:{port}") as proxy:
            near = socket.create_connection(proxy.address)
            far, _ = listener.accept()
            with near, far:
                near.sendall(b"hello")
                assert far.recv(5) == b"hello"
                proxy.reset_all()
                with pytest.raises(ConnectionResetError):
                    far.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(proxy.address)


def test_invalid_proxy_settings_are_refused() -> None:
    for wrong in ({"latency_s": -1}, {"rate": 0}, {"slices": 0}, {"cut": Cut(-1)}):
        with pytest.raises(ValueError, match=r"must|least"):
            Faults(**wrong)
