"""The listener: opening, closing and reopening, with edges that reconnect by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from faults import sodium, zmtp
from faults.edges import HostileEdge
from faults.zmtp import PeerError
from node_metrics import nonzero, value

from cloud_node import listener as module
from cloud_node.config import NodeConfig, Prepared, prepare
from cloud_node.listener import Listener
from cloud_node.metrics import Metrics
from edge_common.errors import ConfigError
from transport import keys, sockets
from transport.dos_protection import PenaltyBox, RateLimit
from transport.wire_size import message_bytes

needs_sodium = pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING))


@pytest.fixture
def prepared(tmp_path: Path, bundle_of: Callable[[str], Path]) -> Prepared:
    folder = tmp_path / "keys"
    keys.generate(folder, "node")
    keys.make_directory(folder / "authorized")
    pair = keys.generate(tmp_path / "edge", "edge")
    keys.write_public(folder / "authorized" / "edge.pub", pair.public, "edge")
    return prepare(NodeConfig(bundle=bundle_of("pixels"), bind="tcp://127.0.0.1:0", keys=folder))


@contextlib.asynccontextmanager
async def listening(
    prepared: Prepared,
    metrics: Metrics | None = None,
    on_message: Callable[[zmq.Frame, bytes, str], object] = lambda *_: None,
    on_revoked: Callable[[frozenset[str]], None] = lambda _: None,
    *more: Any,
) -> AsyncIterator[Listener]:
    """A listener that is always closed at the end. `within` limits the seconds of a test."""
    listener = Listener(prepared, metrics or Metrics(), on_message, on_revoked, *more)
    try:
        listener.open()
        yield listener
    finally:
        await listener.close()


def within(work: Coroutine[Any, Any, None], seconds: float = 30) -> None:
    asyncio.run(asyncio.wait_for(work, seconds))


class Edge:
    """A bare edge in the same loop."""

    def __init__(self, prepared: Prepared, endpoint: str, pair: keys.KeyPair) -> None:
        self.ctx = zmq.asyncio.Context()
        public = prepared.keypair.public
        self.socket: Any = sockets.client(self.ctx, endpoint, public, pair, prepared.limits)

    async def say(self, text: bytes) -> list[bytes]:
        """Repeat until an answer comes: messages sent just before a disconnection are lost."""
        for _ in range(30):
            await asyncio.wait_for(self.socket.send(text), 30)
            while await self.socket.poll(1000):
                answer: bytes = await self.socket.recv()
                name, _, rest = answer.partition(b" ")
                if rest == text:
                    return [name, rest]
        raise AssertionError("no answer")

    async def __aenter__(self) -> Edge:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ctx.destroy(linger=0)


class Echo:
    """Once `listener` is set, answer each message with the name of its key and its text."""

    listener: Listener

    def __call__(self, frame: zmq.Frame, route: bytes, name: str) -> None:
        if frame.bytes == b"fail":
            raise ValueError("contents of a message")
        answer = memoryview(name.encode() + b" " + frame.bytes)
        assert self.listener.send(route, answer) == "sent"


@pytest.fixture
def edge_pair(prepared: Prepared, tmp_path: Path) -> keys.KeyPair:
    return keys.load_secret(tmp_path / "edge" / "edge.key")


def test_edges_come_back_after_it_was_reopened_on_the_same_port(
    prepared: Prepared, edge_pair: keys.KeyPair, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        metrics, echo = Metrics(), Echo()
        async with listening(prepared, metrics, echo) as listener:
            echo.listener = listener
            endpoint = listener.endpoint
            async with Edge(prepared, endpoint, edge_pair) as edge:
                for turn in range(3):
                    assert await edge.say(b"%d" % turn) == [b"edge", b"%d" % turn]
                    await edge.socket.send(b"fail")  # this error stops nothing
                    assert listener.send(b"nobody", memoryview(b"x")) == "lost"
                    await listener.reopen()
                    assert listener.endpoint == endpoint
                for _ in range(500):  # the first message may arrive before its connection's event
                    assert await edge.say(b"z") == [b"edge", b"z"]
                    listener.update_gauges()
                    if value(metrics, "clients"):
                        break
                    await asyncio.sleep(0.02)
                assert (value(metrics, "clients"), value(metrics, "connections")) == (1, 1)
            await listener.close()
            assert listener.send(b"nobody", memoryview(b"x")) == "lost"
            assert not listener.broken.done()

    within(work())
    assert "contents of a message" not in caplog.text


def test_a_revoked_key_loses_its_connection_and_its_name_is_reported(
    prepared: Prepared, edge_pair: keys.KeyPair, tmp_path: Path
) -> None:
    async def work() -> None:
        metrics, echo, told = Metrics(), Echo(), asyncio.Event()
        async with listening(prepared, metrics, echo, lambda names: told.set()) as listener:
            echo.listener = listener
            async with Edge(prepared, listener.endpoint, edge_pair) as edge:
                await edge.say(b"x")
                assert listener.admits("edge", edge_pair.public)
                (tmp_path / "keys" / "authorized" / "edge.pub").unlink()
                await told.wait()
                assert not listener.admits("edge", edge_pair.public)
                while not nonzero(metrics, "connections_dropped_total"):
                    await asyncio.sleep(0.01)
                assert nonzero(metrics, "connections_dropped_total") == {"revoked": 1}

    within(work())


def test_limits_are_lowered_and_raised_again(prepared: Prepared, edge_pair: keys.KeyPair) -> None:
    async def work() -> None:
        metrics, echo = Metrics(), Echo()
        async with listening(prepared, metrics, echo) as listener:
            echo.listener = listener
            wide = listener.limits
            listener.lower_limits(1 << 20, 2)
            assert (listener.limits.total, listener.limits.connections) == (1 << 20, 2)
            await listener.reopen()
            three = [Edge(prepared, listener.endpoint, edge_pair) for _ in range(3)]
            async with three[0], three[1], three[2]:
                while not value(metrics, "connections_dropped_total", reason="crowd"):
                    await asyncio.sleep(0.02)
            one, other = (Edge(prepared, listener.endpoint, edge_pair) for _ in range(2))
            async with one, other:
                for edge in (one, other):
                    assert await edge.say(b"x") == [b"edge", b"x"]
                before = nonzero(metrics, "connections_dropped_total").get("crowd", 0)
                listener.lower_limits(1 << 20, 1)
                while value(metrics, "connections_dropped_total", reason="crowd") == before:
                    await asyncio.sleep(0.02)
                listener.lower_limits(1 << 40, 1 << 20)
                assert listener.limits == wide

    within(work())


def test_an_edge_may_send_all_its_requests_before_the_first_is_read(prepared: Prepared) -> None:
    config = msgspec.structs.replace(prepared.config, client_requests=1000)

    async def work() -> None:
        async with listening(dataclasses.replace(prepared, config=config)) as listener:
            assert listener.limits.undelivered > 1000 * message_bytes(prepared.limits.request)

    within(work())


def test_opening_and_closing_at_once_does_not_hang(prepared: Prepared) -> None:
    async def work() -> None:
        async with listening(prepared):
            pass

    within(work())


def test_a_taken_port_is_reported(prepared: Prepared) -> None:
    async def work() -> None:
        async with listening(prepared) as first:
            config = msgspec.structs.replace(prepared.config, bind=first.endpoint)
            taken = dataclasses.replace(prepared, config=config)
            with pytest.raises(ConfigError, match="choose another"):
                Listener(taken, Metrics(), lambda *_: None, lambda _: None).try_address()
            with pytest.raises(ConfigError, match="choose another"):
                async with listening(taken):
                    pass
            await first.close()
            async with listening(taken):
                pass

    within(work())


def test_reopening_fails_when_the_port_stays_taken(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REOPEN_S", 0.1)

    async def work() -> None:
        async with listening(prepared) as first:
            close = first.close

            async def close_and_lose_the_port(flush_s: float = 0.0) -> None:
                await close(flush_s)
                if not thief.closed and not thief.last_endpoint:
                    thief.bind(first.endpoint)

            with zmq.Context() as ctx, ctx.socket(zmq.ROUTER) as thief:
                monkeypatch.setattr(first, "close", close_and_lose_the_port)
                with pytest.raises(ConfigError, match="choose another"):
                    await first.reopen()

    within(work())


def hostile(prepared: Prepared, listener: Listener, tmp_path: Path, name: str) -> HostileEdge:
    pair = keys.generate(tmp_path / name, name)
    authorized = tmp_path / "keys" / "authorized"
    keys.write_public(authorized / f"{name}.pub", pair.public, name)
    return HostileEdge(listener.endpoint, prepared.keypair.public, pair, prepared.stage.sha256)


@pytest.mark.parametrize("name", ["zap", "allow-list", "peers", "read"])
def test_the_listener_breaks_when_one_of_its_tasks_ends(prepared: Prepared, name: str) -> None:
    async def work() -> None:
        async with listening(prepared) as listener:
            await listener.reopen()  # reopening cancels all tasks, as intended
            assert not listener.broken.done()
            (task,) = [task for task in asyncio.all_tasks() if task.get_name() == name]
            task.cancel()
            with pytest.raises(RuntimeError, match=f"{name} has ended"):
                await listener.broken

    within(work())


@needs_sodium
def test_after_a_key_was_replaced_under_its_name_the_old_one_is_not_admitted(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = keys.generate(tmp_path / "new", "changing")
    authorized = tmp_path / "keys" / "authorized"

    async def work() -> None:
        seen: asyncio.Queue[list[bytes]] = asyncio.Queue()
        revoked: list[frozenset[str]] = []

        def take(frame: zmq.Frame, route: bytes, name: str) -> None:
            seen.put_nowait([name.encode(), frame.bytes])

        async with contextlib.AsyncExitStack() as stack:
            listener = await stack.enter_async_context(
                listening(prepared, None, take, revoked.append)
            )
            edge = hostile(prepared, listener, tmp_path, "changing")
            # The peer claims properties of its own. The node must ignore them.
            with monkeypatch.context() as patch:
                lies = {"User-Id": b"another", "X-Key": new.public.encode(), "X-Since": b"0"}
                honest = zmtp.metadata
                patch.setattr(zmtp, "metadata", lambda *args, **more: honest(*args, **more, **lies))
                peer = await stack.enter_async_context(await edge.connect())
            await peer.send_message([b"old"])
            assert await seen.get() == [b"changing", b"old"]
            assert listener._connections.users() == {"changing"}
            # Keep the old connection open, as if the change had not taken effect yet.
            monkeypatch.setattr(listener._connections, "drop", lambda *_: None)
            keys.write_public(authorized / "next", new.public, "changing")
            (authorized / "next").rename(authorized / "changing.pub")
            other = HostileEdge(listener.endpoint, prepared.keypair.public, new, "0" * 64)
            newcomer = await stack.enter_async_context(await other.connect())
            # The new key counts. From now on the old key is never admitted, not even for a moment.
            await peer.send_message([b"old again"])
            while not revoked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            await newcomer.send_message([b"new"])
            assert await seen.get() == [b"changing", b"new"]
            assert seen.empty()
            assert revoked == [frozenset({"changing"})]

    within(work())


# Floods


def test_an_edge_may_send_all_windows_one_by_one_thirty_times_a_second() -> None:
    """SAM's 25 windows as 25 requests, each cancelled, with those refused that exceed the node's
    limit at once. After a network pause, a whole second of them arrives together."""
    limit, window = RateLimit(module._BURST, module.MESSAGES_PER_S), 3 * 224 * 224 + 100
    refused = 25 - NodeConfig(bundle=Path()).client_requests
    for frame in range(30 * 60):
        now = max(1.0, frame / 30) if frame < 30 * 30 else frame / 30
        for _ in range(50):
            assert limit.take("edge", now)
        for _ in range(refused):
            assert limit.take("edge", now, module.useless_cost(window))


async def kept_out(edge: HostileEdge) -> None:
    with pytest.raises(PeerError, match="500"):
        await edge.connect()


@needs_sodium
def test_a_flooding_edge_is_banned_and_its_messages_are_dropped(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_BURST", 50)
    monkeypatch.setattr(module, "MESSAGES_PER_S", 0.001)
    handled: list[str] = []
    left: list[str] = []
    metrics = Metrics()

    def take(frame: zmq.Frame, route: bytes, name: str) -> bool:
        handled.append(name)
        return True

    async def work() -> None:
        called = take, lambda names: None, lambda name, route: left.append(name)
        async with listening(prepared, metrics, *called) as listener:
            bad, good = (hostile(prepared, listener, tmp_path, name) for name in ("bad", "good"))
            other = await good.connect()
            silent = await bad.connect()
            peer = await bad.connect()
            await peer.send(b"".join(peer.seal(b"x") for _ in range(200)))  # all in one write
            assert await peer.wait_closed(30)
            await silent.send_message([b"x"])  # the first message of this connection
            assert await silent.wait_closed(30)
            await kept_out(bad)
            await other.send_message([b"x"])
            while (
                "good" not in handled
                or len(left) < 2
                or not nonzero(metrics, "handshakes_refused_total")
            ):
                await asyncio.sleep(0.01)
            for each in (peer, silent, other):
                await each.close()

    within(work())
    assert (handled.count("bad"), handled.count("good")) == (50, 1)
    assert left == ["bad", "bad"]
    assert nonzero(metrics, "connections_dropped_total") == {"banished": 2}
    assert nonzero(metrics, "handshakes_refused_total") == {"banished": 1}
    assert caplog.text.count("bad is kept out for 2 s: it sent more than") == 1


@needs_sodium
@pytest.mark.parametrize(("useful", "handled"), [(True, 60), (False, 20)])
def test_useless_messages_cost_more_tokens(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    useful: bool,
    handled: int,
) -> None:
    monkeypatch.setattr(module, "_BURST", 60)
    monkeypatch.setattr(module, "MESSAGES_PER_S", 0.001)
    seen: list[str] = []

    def take(frame: zmq.Frame, route: bytes, name: str) -> bool:
        seen.append(name)
        return useful

    async def work() -> None:
        async with listening(prepared, None, take) as listener:
            peer = await hostile(prepared, listener, tmp_path, "bad").connect()
            await peer.send(b"".join(peer.seal(b"x") for _ in range(200)))
            assert await peer.wait_closed(30)
            await peer.close()

    within(work())
    assert len(seen) == handled


@needs_sodium
@pytest.mark.parametrize("breach", ["frames", "endless"])
def test_breaking_a_limit_ends_all_connections_and_bans_the_key(
    prepared: Prepared, tmp_path: Path, breach: str
) -> None:
    metrics, echo = Metrics(), Echo()

    async def work() -> None:
        async with listening(prepared, metrics, echo) as listener:
            echo.listener = listener
            edge = hostile(prepared, listener, tmp_path, "bad")
            peers = [await edge.connect() for _ in range(2)]
            for peer in peers:
                await peer.send_message([b"x"])
                assert await peer.read_message() == [b"bad x"]
            if breach == "frames":
                await peers[0].send_message([b"x"] * 1000)
            else:
                await zmtp.endless_multipart(peers[0], part_bytes=1000)
            for peer in peers:
                assert await peer.wait_closed(30)
            await kept_out(edge)
            while sum(nonzero(metrics, "connections_dropped_total").values()) < 2:
                await asyncio.sleep(0.01)
            await listener.reopen()
            await kept_out(edge)
            for peer in peers:
                await peer.close()

    within(work())
    whole = {"banished": 2} if breach == "frames" else {"endless": 1, "banished": 1}
    assert nonzero(metrics, "connections_dropped_total") == whole


@needs_sodium
def test_a_revoked_key_also_loses_silent_connections(prepared: Prepared, tmp_path: Path) -> None:
    metrics = Metrics()

    async def work() -> None:
        async with listening(prepared, metrics) as listener:
            edge = hostile(prepared, listener, tmp_path, "revoked")
            async with await edge.connect() as silent:
                (tmp_path / "keys" / "authorized" / "revoked.pub").unlink()
                assert await silent.wait_closed(30)
            while len(listener._connections):
                await asyncio.sleep(0.01)

    within(work())
    assert nonzero(metrics, "connections_dropped_total") == {"revoked": 1}


@needs_sodium
def test_a_second_ban_comes_sooner(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BURST", 50)
    monkeypatch.setattr(module, "MESSAGES_PER_S", 0.001)
    seen: list[bytes] = []

    def take(frame: zmq.Frame, route: bytes, name: str) -> bool:
        seen.append(frame.bytes)
        return True

    async def work() -> None:
        async with listening(prepared, None, take) as listener:
            listener._penalties = PenaltyBox(first_s=0.1, most_s=0.1)
            await listener.reopen()
            edge = hostile(prepared, listener, tmp_path, "bad")
            async with await edge.connect() as peer:
                await peer.send_message([b"x"] * 2)
                assert await peer.wait_closed(30)
            while listener._penalties.banned("bad", time.monotonic()):
                await asyncio.sleep(0.01)
            async with await edge.connect() as peer:
                await peer.send(b"".join(peer.seal(b"x") for _ in range(40)))
                assert await peer.wait_closed(30)

    within(work())
    assert len(seen) == 5, "a tenth of the burst"


def test_an_edge_that_is_kept_out_is_not_banned_once_more_for_what_it_had_sent(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with listening(prepared) as listener:
            for reason in ("its first connection", "its second connection"):
                listener.ban("bad", reason)
            listener.ban("other", "its only connection")

    within(work())
    banned = [r.getMessage() for r in caplog.records if "is kept out" in r.getMessage()]
    assert banned == [
        "bad is kept out for 2 s: its first connection",
        "other is kept out for 2 s: its only connection",
    ]


@needs_sodium
def test_a_newcomer_with_a_stolen_routing_id_does_not_get_the_replies(
    prepared: Prepared, tmp_path: Path
) -> None:
    async def work() -> None:
        echo = Echo()
        async with listening(prepared, None, echo) as listener:
            echo.listener = listener
            first, thief = (hostile(prepared, listener, tmp_path, name) for name in ("one", "two"))
            async with await first.connect(identity=b"same") as peer:
                await peer.send_message([b"x"])
                assert await peer.read_message() == [b"one x"]
                async with await thief.connect(identity=b"same") as other:
                    await other.send_message([b"y"])
                    await peer.send_message([b"z"])
                    assert await peer.read_message() == [b"one z"]

    within(work())
