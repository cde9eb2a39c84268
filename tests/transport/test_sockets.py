"""Secure sockets between real peers: which messages arrive, and the reason if none does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket as plain
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio
from faults import zmtp

from edge_common.errors import ConfigError
from transport import link, messages, peer_events, sockets
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.dos_protection import Connections, connection_limits
from transport.dos_protection.byte_accounting import Connection
from transport.keys import KeyPair
from transport.link import LinkEvent
from transport.messages import Limits, StageLimits

NewPair = Callable[[str], KeyPair]


async def _next(events: asyncio.Queue[LinkEvent]) -> LinkEvent:
    """The next event. A handshake that fails because the machine is busy is tried again."""
    while (event := await events.get()).reason == link.NO_ANSWER:
        pass
    return event


@pytest.fixture
def run_scene(
    authorized: Path, new_pair: NewPair, limits: StageLimits
) -> Callable[[Callable[[Any], Awaitable[None]]], None]:
    """Run a scene in an event loop, with an authenticator over the folder `authorized`."""

    class Stage:
        node = new_pair("node")
        ctx: zmq.asyncio.Context

        def server(self, bind: str = "tcp://127.0.0.1:0") -> Any:
            return sockets.server(self.ctx, bind, self.node, limits)

        @asynccontextmanager
        async def watching(
            self, endpoint: str, pair: KeyPair, server_key: str | None = None
        ) -> AsyncIterator[tuple[Any, asyncio.Queue[LinkEvent]]]:
            key = server_key or self.node.public
            client = sockets.client(self.ctx, endpoint, key, pair, limits, connect=False)
            events: asyncio.Queue[LinkEvent] = asyncio.Queue()
            watcher = link.watch(client, endpoint, first_retry_s=0.1)

            async def listen() -> None:
                async for event in watcher:
                    events.put_nowait(event)

            task = asyncio.create_task(listen())
            try:
                yield client, events
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await watcher.aclose()
                client.close()

    async def main(scene: Callable[[Any], Awaitable[None]]) -> None:
        stage = Stage()
        stage.ctx = zmq.asyncio.Context()
        authenticator = Authenticator(stage.ctx, AllowList(authorized))
        authenticator.start()
        try:
            await asyncio.wait_for(scene(stage), 60)
        finally:
            await authenticator.stop()
            stage.ctx.destroy(linger=0)

    return lambda scene: asyncio.run(main(scene))


def test_tensors_cross_intact(
    run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    pair = new_pair("edge")
    authorise(pair)
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "pixels": rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8),
        "window": np.arange(5),
    }

    async def scene(stage: Any) -> None:
        server = stage.server()
        client = sockets.client(
            stage.ctx, server.last_endpoint.decode(), stage.node.public, pair, limits
        )
        seal = messages.new_seal()
        request = messages.Request(messages.new_id(), "0" * 64, 1000, seal)
        await client.send(messages.encode(request, feeds), copy=False)
        peer, frame = await server.recv_multipart(copy=False)
        message, arrays = messages.decode(frame, limits.request)
        assert message.id == request.id  # type: ignore[union-attr]
        assert all(np.array_equal(arrays[name], feeds[name]) for name in feeds)
        result = messages.Result(request.id, 1, 2)
        await server.send_multipart([peer, messages.encode(result, arrays, seal)], copy=False)
        _, back = messages.decode(await client.recv(copy=False), limits.result, seal)
        assert all(back[name].tobytes() == feeds[name].tobytes() for name in feeds)
        client.close()
        server.close()

    run_scene(scene)


def test_a_link_comes_up_goes_down_and_recovers(
    run_scene: Any, authorise: Any, new_pair: NewPair
) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server()
        endpoint = server.last_endpoint.decode()
        async with stage.watching(endpoint, pair) as (client, events):
            assert (await _next(events)).state == "up"
            server.close()
            assert await _next(events) == LinkEvent("down", link.CONNECTION_LOST)
            assert await _next(events) == LinkEvent("unreachable", link.UNREACHABLE)
            server = stage.server(endpoint)
            assert (await _next(events)).state == "up"
            await client.send(b"hello")
            assert (await server.recv_multipart())[-1] == b"hello"
        server.close()

    run_scene(scene)


def test_a_link_forgets_a_connection_that_has_ended(
    run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    """Its entry would keep a descriptor."""
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server, connections = stage.server(), connections_of(limits)
        endpoint, key = server.last_endpoint.decode(), stage.node.public
        client = sockets.client(stage.ctx, endpoint, key, pair, limits, connect=False)
        watcher = link.watch(client, endpoint, first_retry_s=0.1, connections=connections)
        async with contextlib.aclosing(watcher) as events:
            async for event in events:
                if event.state == "up":
                    assert len(connections) == 1
                    server.close()
                elif event.state == "down":
                    break
            assert len(connections) == 0
        client.close()

    run_scene(scene)


def test_an_edge_authorised_later_is_admitted_without_a_restart(
    run_scene: Any, authorise: Any, new_pair: NewPair
) -> None:
    pair = new_pair("edge")

    async def scene(stage: Any) -> None:
        server = stage.server()
        async with stage.watching(server.last_endpoint.decode(), pair) as (client, events):
            assert await _next(events) == LinkEvent("refused", link.NOT_AUTHORISED)
            authorise(pair)
            assert (await _next(events)).state == "up"
            await client.send(b"hello")
            assert (await server.recv_multipart())[-1] == b"hello"
        server.close()

    run_scene(scene)


def test_a_wrong_server_key_is_reported(run_scene: Any, authorise: Any, new_pair: NewPair) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server()
        endpoint = server.last_endpoint.decode()
        async with stage.watching(endpoint, pair, new_pair("other").public) as (_, events):
            assert await _next(events) == LinkEvent("refused", link.WRONG_SERVER_KEY)
            await asyncio.sleep(0.5)
            assert events.empty()  # the same event is reported once
        server.close()

    run_scene(scene)


@pytest.mark.parametrize("kind", ["NULL", "PLAIN"])
def test_no_message_goes_to_a_node_without_curve(
    run_scene: Any, new_pair: NewPair, kind: str
) -> None:
    async def scene(stage: Any) -> None:
        insecure = stage.ctx.socket(zmq.ROUTER)
        insecure.set(zmq.PLAIN_SERVER, int(kind == "PLAIN"))
        insecure.bind("tcp://127.0.0.1:0")
        endpoint = insecure.last_endpoint.decode()
        async with stage.watching(endpoint, new_pair("edge")) as (client, events):
            assert await _next(events) == LinkEvent("refused", link.NOT_A_NODE)
            with pytest.raises(zmq.Again):
                await client.send(b"secret", flags=zmq.NOBLOCK)
            assert not await insecure.poll(300)
        insecure.close(linger=0)

    run_scene(scene)


def test_another_service_on_the_port_is_reported(run_scene: Any, new_pair: NewPair) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # closing with unread bytes would reset the connection and lose the answer
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)
        await writer.drain()
        writer.close()

    async def scene(stage: Any) -> None:
        web = await asyncio.start_server(answer, "127.0.0.1", 0)
        endpoint = f"tcp://127.0.0.1:{web.sockets[0].getsockname()[1]}"
        async with stage.watching(endpoint, new_pair("edge")) as (_, events):
            assert await _next(events) == LinkEvent("refused", link.NOT_A_NODE)
        web.close()

    run_scene(scene)


def test_the_wait_before_a_retry_doubles_up_to_a_limit(
    run_scene: Any, new_pair: NewPair, limits: StageLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep, waits = asyncio.sleep, list[float]()

    async def short(seconds: float) -> None:
        if seconds in (0.11, 0.22, 0.44):
            waits.append(seconds)
            seconds = 0.01
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", short)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)
        writer.close()

    async def scene(stage: Any) -> None:
        web = await asyncio.start_server(refuse, "127.0.0.1", 0)
        endpoint = f"tcp://127.0.0.1:{web.sockets[0].getsockname()[1]}"
        key, pair = stage.node.public, new_pair("edge")
        client = sockets.client(stage.ctx, endpoint, key, pair, limits, connect=False)
        async with contextlib.aclosing(
            link.watch(client, endpoint, first_retry_s=0.11, last_retry_s=0.44)
        ) as events:

            async def follow() -> None:
                async for _ in events:
                    pass

            task = asyncio.create_task(follow())
            while len(waits) < 4:
                await sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        client.close()
        web.close()

    run_scene(scene)
    assert waits[:4] == [0.11, 0.22, 0.44, 0.44]


def test_a_link_that_was_up_is_tried_again_soon(
    run_scene: Any,
    authorise: Any,
    new_pair: NewPair,
    limits: StageLimits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The back-off of earlier refusals is over once a handshake succeeds."""
    sleep, waits = asyncio.sleep, list[float]()
    pair, other = new_pair("edge"), new_pair("other")

    async def short(seconds: float) -> None:
        if seconds in (0.1, 0.2, 0.4, 0.8):
            waits.append(seconds)
            seconds = 0.01
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", short)

    async def scene(stage: Any) -> None:
        server = stage.server()
        endpoint = server.last_endpoint.decode()
        async with stage.watching(endpoint, pair) as (_, events):
            assert await _next(events) == LinkEvent("refused", link.NOT_AUTHORISED)
            while len(waits) < 3:
                await sleep(0.01)
            authorise(pair)
            while (await _next(events)).state != "up":
                pass
            waits.clear()
            server.close()
            while True:  # libzmq closes in a thread of its own
                try:
                    server = sockets.server(stage.ctx, endpoint, other, limits)
                    break
                except ConfigError:
                    await sleep(0.01)
            while not waits:
                await sleep(0.01)
        server.close()

    run_scene(scene)
    assert waits[0] == 0.1


def test_a_node_that_is_replaced_by_something_else(run_scene: Any, new_pair: NewPair) -> None:
    """After one refusal the next one is explained, too."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)
        await writer.drain()
        writer.close()

    async def scene(stage: Any) -> None:
        server = stage.server()
        endpoint = server.last_endpoint.decode()
        async with stage.watching(endpoint, new_pair("edge")) as (_, events):
            assert await _next(events) == LinkEvent("refused", link.NOT_AUTHORISED)
            server.close()
            while True:  # libzmq closes in a thread of its own
                try:
                    web = await asyncio.start_server(
                        answer, "127.0.0.1", int(endpoint.rpartition(":")[2])
                    )
                    break
                except OSError:
                    await asyncio.sleep(0.01)
            while await _next(events) != LinkEvent("refused", link.NOT_A_NODE):
                pass
        web.close()

    run_scene(scene)


def test_a_frozen_listener_is_reported(run_scene: Any, new_pair: NewPair) -> None:
    async def scene(stage: Any) -> None:
        with plain.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            async with stage.watching(endpoint, new_pair("edge")) as (_, events):
                assert await events.get() == LinkEvent("refused", link.NO_ANSWER)

    run_scene(scene)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_port_without_a_listener_is_reported(
    run_scene: Any, new_pair: NewPair, host: str
) -> None:
    async def scene(stage: Any) -> None:
        with plain.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        async with stage.watching(f"tcp://{host}:{port}", new_pair("edge")) as (client, events):
            assert await _next(events) == LinkEvent("unreachable", link.UNREACHABLE)
            with pytest.raises(zmq.Again):  # no message is queued for an absent node
                await client.send(b"late", flags=zmq.NOBLOCK)

    run_scene(scene)


def test_a_part_over_the_limit_ends_the_link_and_the_link_recovers(
    run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server()
        async with stage.watching(server.last_endpoint.decode(), pair) as (client, events):
            assert (await _next(events)).state == "up"
            await client.send(bytes(limits.request.message_bytes))
            assert len((await server.recv_multipart())[-1]) == limits.request.message_bytes
            await client.send(bytes(limits.request.message_bytes + 8192))
            assert (await _next(events)).state == "down"
            assert (await _next(events)).state == "up"
            await client.send(b"again")
            assert (await server.recv_multipart())[-1] == b"again"
        server.close()

    run_scene(scene)


def test_ipv6_works(run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits) -> None:
    try:
        plain.create_server(("::1", 0), family=plain.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server("tcp://[::1]:0")
        async with stage.watching(server.last_endpoint.decode(), pair) as (_, events):
            assert (await _next(events)).state == "up"
        server.close()

    run_scene(scene)


async def _say(endpoint: str, data: bytes, go: asyncio.Event, stay: bool) -> None:
    host, port = endpoint.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await go.wait()
    writer.write(data)
    await reader.read(64)
    while stay and await reader.read(64):
        pass
    writer.close()


@pytest.mark.parametrize("reason", ["wrong_key", "null", "protocol", "timeout", "left"])
def test_a_server_reports_why_a_handshake_failed(
    run_scene: Any,
    authorise: Any,
    new_pair: NewPair,
    limits: StageLimits,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server()
        endpoint = server.last_endpoint.decode()
        watcher = peer_events.follow(server, connections_of(limits))
        key = new_pair("other").public if reason == "wrong_key" else stage.node.public
        client: Any = None
        task: asyncio.Task[None] | None = None
        seen = asyncio.Event()  # an attempt that is over at once looks like none
        first = asyncio.ensure_future(anext(watcher))
        await asyncio.sleep(0)  # now it listens
        if reason == "wrong_key":
            client = sockets.client(stage.ctx, endpoint, key, pair, limits)
        elif reason == "null":
            client = stage.ctx.socket(zmq.DEALER)
            client.connect(endpoint)
        else:
            said = {"protocol": b"GET / HTTP/1.1\r\n\r\n", "left": zmtp.greeting()}.get(reason, b"")
            task = asyncio.create_task(_say(endpoint, said, seen, reason == "timeout"))
        assert (await first).kind == "opened"
        seen.set()
        async for event in watcher:
            if event.kind == "refused":
                break
        # All connections that end before the check have only this in common.
        also = {"protocol"} if reason in ("wrong_key", "null") else set()
        assert event.reason in {reason, *also}
        if reason == "timeout":  # others may have ended before the check
            assert event.address == "127.0.0.1"
        await watcher.aclose()
        if client:
            client.close(linger=0)
        if task:
            task.cancel()
        server.close()

    run_scene(scene)
    if reason not in ("wrong_key", "null"):
        assert peer_events.REFUSALS[reason] in caplog.text


def test_a_failed_handshake_is_explained_once() -> None:
    failures = peer_events.FailedHandshakes()
    stranger, scan, finished = (Connection(fd, "10.0.0.1", 0.0) for fd in range(3))
    stranger.count(600, 0, 246, 0.0)  # it was welcomed and then refused
    finished.count(600, 0, 301, 0.0)
    failures.failed(zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
    assert failures.reason(finished) == ""
    assert failures.reason(stranger) == "", "the authenticator explained this one"
    assert failures.reason(stranger) == "wrong_key", "the authenticator did not explain this one"
    failures.failed(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.ETIMEDOUT)
    assert [failures.reason(scan) for _ in range(2)] == ["timeout", "protocol"]
    failures.failed(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE)
    assert failures.reason(scan) == "left"


def connections_of(limits: StageLimits) -> Connections:
    return Connections(connection_limits(limits.request, limits.result, backlog=sockets.BACKLOG))


def test_a_server_follows_its_connections(
    run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = stage.server()
        connections = connections_of(limits)
        kinds: list[str] = []

        async def follow() -> None:
            async for event in peer_events.follow(server, connections):
                kinds.append(event.kind)

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        for _ in range(3):
            kinds.clear()
            async with stage.watching(server.last_endpoint.decode(), pair) as (client, events):
                assert (await _next(events)).state == "up"
                await client.send(b"hello")
                route, frame = await server.recv_multipart(copy=False)
                connections.received(frame, route.bytes)
                while connections.users() != {"edge"}:  # the message may arrive before the event
                    await asyncio.sleep(0.01)
                assert len(connections) == 1
            while "closed" not in kinds:
                await asyncio.sleep(0.01)
            assert kinds == ["opened", "closed"]
            assert len(connections) == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()

    run_scene(scene)


def test_a_connection_made_before_the_monitor_starts_is_followed(
    run_scene: Any, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    pair = new_pair("edge")
    authorise(pair)

    async def scene(stage: Any) -> None:
        server = sockets.server(stage.ctx, "tcp://127.0.0.1:0", stage.node, limits, monitor=True)
        endpoint = server.last_endpoint.decode()
        client = sockets.client(stage.ctx, endpoint, stage.node.public, pair, limits)
        await client.send(b"hello")
        await server.recv_multipart()
        connections = connections_of(limits)
        watcher = peer_events.follow(server, connections)
        assert (await anext(watcher)).kind == "opened"
        assert len(connections) == 1
        await watcher.aclose()
        assert len(connections) == 0
        client.close()
        server.close()

    run_scene(scene)


_ROUTING_ID = """
import zmq
from transport import sockets
from transport.dos_protection import Connections, connection_limits
from transport.keys import KeyPair
from transport.link import LinkEvent
from transport.messages import Limits, StageLimits

ctx, some = zmq.Context(), Limits(1, 1024)
keys = KeyPair("node", *(key.decode() for key in zmq.curve_keypair()))
server = sockets.server(ctx, "tcp://127.0.0.1:0", keys, StageLimits(some, some))
server.bind("inproc://here")  # asks for no key
client = ctx.socket(zmq.DEALER)
client.connect("inproc://here")
client.send(b"")
print(server.recv_multipart()[0].hex())
ctx.destroy(linger=0)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="by way of libc")
def test_routing_ids_differ_between_processes() -> None:
    """If a peer claimed the next id to be assigned, libzmq would end the process."""
    command = [sys.executable, "-c", _ROUTING_ID]
    found = {subprocess.run(command, check=True, capture_output=True).stdout for _ in range(3)}
    assert len(found) == 3


def test_heartbeats_allow_a_slow_link_its_time() -> None:
    small = StageLimits(Limits(1, 1000), Limits(1, 1000))
    assert sockets.heartbeat_timeout_ms(small) == 3000
    large = StageLimits(Limits(1, 1000), Limits(1, 10_000_000))
    assert sockets.heartbeat_timeout_ms(large) // 100 == 200  # twice ten seconds at 8 Mbit/s


@pytest.mark.parametrize(
    ("endpoint", "bind", "fits"),
    [
        ("tcp://node.example.org:5555", False, True),
        ("tcp://10.0.0.1:1", False, True),
        ("tcp://[fe80::1%eth0]:5555", False, True),
        ("tcp://*:5555", True, True),
        ("tcp://0.0.0.0:0", True, True),
        ("tcp://*:5555", False, False),
        ("tcp://10.0.0.1:0", False, False),
        ("tcp://10.0.0.1:65536", False, False),
        ("tcp://10.0.0.1", False, False),
        ("10.0.0.1:5555", False, False),
        ("ipc:///tmp/x", False, False),
        ("tcp://fe80::1:5555", False, False),
        ("tcp://a b:5555", False, False),
        ("tcp://a:5555\n", False, False),
    ],
)
def test_endpoints_are_checked(endpoint: str, bind: bool, fits: bool) -> None:
    if fits:
        assert sockets.check_endpoint(endpoint, bind=bind) == endpoint
        return
    with pytest.raises(ConfigError, match=r"expected tcp://HOST:PORT"):
        sockets.check_endpoint(endpoint, bind=bind)
