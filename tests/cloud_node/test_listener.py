"""The door: opened, closed and opened anew, with edges that come back by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from faults import sodium, zmtp
from faults.edges import HostileEdge
from faults.zmtp import PeerError
from node_metrics import nonzero, value

from cloud_node import listener as door_module
from cloud_node.config import NodeConfig, Prepared, prepare
from cloud_node.listener import Door
from cloud_node.metrics import Metrics
from edge_common.errors import ConfigError
from transport import auth, keys, sockets
from transport.auth import Pace

needs_sodium = pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING))


@pytest.fixture
def prepared(tmp_path: Path, bundle_of: Callable[[str], Path]) -> Prepared:
    folder = tmp_path / "keys"
    keys.generate(folder, "node")
    keys.make_directory(folder / "authorized")
    pair = keys.generate(tmp_path / "edge", "edge")
    keys.write_public(folder / "authorized" / "edge.pub", pair.public, "edge")
    return prepare(NodeConfig(bundle=bundle_of("pixels"), bind="tcp://127.0.0.1:0", keys=folder))


class Edge:
    """A bare edge in the same loop."""

    def __init__(self, prepared: Prepared, endpoint: str, pair: keys.KeyPair) -> None:
        self.ctx = zmq.asyncio.Context()
        public = prepared.keypair.public
        self.socket: Any = sockets.client(self.ctx, endpoint, public, pair, prepared.limits)

    async def say(self, text: bytes) -> list[bytes]:
        """Until it is answered: what was sent before an end of the connection was seen is lost."""
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


def echo(door: list[Door]) -> Callable[[zmq.Frame, bytes, str], None]:
    def answer(frame: zmq.Frame, route: bytes, name: str) -> None:
        if frame.bytes == b"fail":
            raise ValueError("contents of a message")
        assert door[0].send(route, memoryview(name.encode() + b" " + frame.bytes)) == "sent"

    return answer


def test_edges_come_back_after_it_was_opened_anew_on_the_same_port(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = keys.load_secret(tmp_path / "edge" / "edge.key")

    async def work() -> None:
        metrics, doors = Metrics(), []
        door = Door(prepared, metrics, echo(doors), lambda names: None)
        doors.append(door)
        door.open()
        endpoint = door.endpoint
        async with Edge(prepared, endpoint, pair) as edge:
            for turn in range(3):
                assert await edge.say(b"%d" % turn) == [b"edge", b"%d" % turn]
                await edge.socket.send(b"fail")  # stops nothing
                assert door.send(b"nobody", memoryview(b"x")) == "lost"
                await door.reopen()
                assert door.endpoint == endpoint
            for _ in range(500):  # the first message may be read before the news of its connection
                assert await edge.say(b"z") == [b"edge", b"z"]
                door.look()
                if value(metrics, "clients"):
                    break
                await asyncio.sleep(0.02)
            assert (value(metrics, "clients"), value(metrics, "connections")) == (1, 1)
        await door.close()
        await door.close()
        assert door.send(b"nobody", memoryview(b"x")) == "lost"
        assert not door.broken.done()

    asyncio.run(work())
    assert "contents of a message" not in caplog.text


def test_a_revoked_key_loses_its_connection_and_its_name_is_told(
    prepared: Prepared, tmp_path: Path
) -> None:
    pair = keys.load_secret(tmp_path / "edge" / "edge.key")

    async def work() -> None:
        metrics, doors, told = Metrics(), [], asyncio.Event()
        door = Door(prepared, metrics, echo(doors), lambda names: told.set())
        doors.append(door)
        door.open()
        async with Edge(prepared, door.endpoint, pair) as edge:
            await edge.say(b"x")
            assert door.admits("edge", pair.public)
            (tmp_path / "keys" / "authorized" / "edge.pub").unlink()
            await asyncio.wait_for(told.wait(), 30)
            assert not door.admits("edge", pair.public)
            assert nonzero(metrics, "connections_dropped_total") == {"revoked": 1}
        await door.close()

    asyncio.run(work())


def test_bounds_are_lowered_and_raised_again(prepared: Prepared, tmp_path: Path) -> None:
    pair = keys.load_secret(tmp_path / "edge" / "edge.key")

    async def work() -> None:
        metrics, doors = Metrics(), []
        door = Door(prepared, metrics, echo(doors), lambda names: None)
        doors.append(door)
        wide = door.unsent, door.total, door.connections
        door.open()
        door.bound(1 << 20, 2)
        assert (door.total, door.connections) == (1 << 20, 2)
        await door.reopen()
        one, other = (Edge(prepared, door.endpoint, pair) for _ in range(2))
        async with one, other:
            for edge in (one, other):
                assert await edge.say(b"x") == [b"edge", b"x"]
            door.bound(1 << 20, 1)
            while not value(metrics, "connections_dropped_total", reason="crowd"):
                await asyncio.sleep(0.02)
            door.bound(1 << 40, 1 << 20)
            assert (door.unsent, door.total, door.connections) == wide
        await door.close()

    asyncio.run(work())


def test_opening_and_closing_at_once_does_not_hang(prepared: Prepared) -> None:
    async def work() -> None:
        door = Door(prepared, Metrics(), lambda *_: None, lambda _: None)
        door.open()
        await door.close()

    asyncio.run(work())


def test_a_port_that_is_taken(prepared: Prepared) -> None:
    async def work() -> None:
        first = Door(prepared, Metrics(), lambda *_: None, lambda _: None)
        first.open()
        taken = dataclasses.replace(prepared.config, bind=first.endpoint)
        second = Door(
            dataclasses.replace(prepared, config=taken),
            Metrics(),
            lambda *_: None,
            lambda _: None,
        )
        with pytest.raises(ConfigError, match="choose another"):
            second.try_address()
        with pytest.raises(ConfigError, match="choose another"):
            second.open()
        await second.close()
        await first.close()
        second.open()
        await second.close()

    asyncio.run(work())


def hostile(prepared: Prepared, door: Door, tmp_path: Path, name: str) -> HostileEdge:
    pair = keys.generate(tmp_path / name, name)
    authorized = tmp_path / "keys" / "authorized"
    keys.write_public(authorized / f"{name}.pub", pair.public, name)
    return HostileEdge(door.endpoint, prepared.keypair.public, pair, prepared.stage.sha256)


@pytest.mark.parametrize("name", ["zap", "allow-list", "peers", "read"])
def test_the_end_of_any_of_its_tasks_breaks_it(prepared: Prepared, name: str) -> None:
    async def work() -> None:
        door = Door(prepared, Metrics(), lambda *_: None, lambda _: None)
        door.open()
        await door.reopen()  # which cancels all of them, as it should
        assert not door.broken.done()
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == name]
        task.cancel()
        with pytest.raises(RuntimeError, match=f"{name} has ended"):
            await asyncio.wait_for(door.broken, 30)
        await door.close()

    asyncio.run(work())


@needs_sodium
def test_a_key_replaced_under_its_name_is_admitted_no_more_not_even_for_a_moment(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_WATCH_S", 60.0)
    new = keys.generate(tmp_path / "new", "changing")
    authorized = tmp_path / "keys" / "authorized"

    async def work() -> None:
        seen: asyncio.Queue[list[bytes]] = asyncio.Queue()
        revoked: list[frozenset[str]] = []

        def take(frame: zmq.Frame, route: bytes, name: str) -> None:
            seen.put_nowait([name.encode(), frame.bytes])

        door = Door(prepared, Metrics(), take, revoked.append)
        door.open()
        edge = hostile(prepared, door, tmp_path, "changing")
        with monkeypatch.context() as patch:  # what a peer says of itself does not count
            lies = {"User-Id": b"another", "X-Key": new.public.encode(), "X-Since": b"0"}
            honest = zmtp.metadata
            patch.setattr(zmtp, "metadata", lambda *args, **more: honest(*args, **more, **lies))
            peer = await edge.connect()
        await peer.send_message([b"old"])
        assert await asyncio.wait_for(seen.get(), 30) == [b"changing", b"old"]
        assert door._meter
        assert door._meter.users() == {"changing"}
        # Its connection is not cut, as if that had not taken effect yet.
        monkeypatch.setattr(door._meter, "revoke", lambda names: [])
        keys.write_public(authorized / "next", new.public, "changing")
        (authorized / "next").rename(authorized / "changing.pub")
        await peer.send_message([b"old again"])
        while not revoked:
            await asyncio.sleep(0.01)
        other = HostileEdge(door.endpoint, prepared.keypair.public, new, prepared.stage.sha256)
        newcomer = await other.connect()
        await peer.send_message([b"and again"])
        await asyncio.sleep(0.2)
        await newcomer.send_message([b"new"])
        assert await asyncio.wait_for(seen.get(), 30) == [b"changing", b"new"]
        assert seen.empty()
        assert revoked == [frozenset({"changing"})]
        await newcomer.close()
        await peer.close()
        await door.close()

    asyncio.run(asyncio.wait_for(work(), 60))


# Floods


def test_an_edge_may_send_all_windows_one_by_one_thirty_times_a_second() -> None:
    """SAM's 25 windows in as many requests, each cancelled, and those refused that are more than a
    node takes at once; after a pause of the network all of a second's at once."""
    pace, window = Pace(door_module._BURST, door_module.MESSAGES_PER_S), 3 * 224 * 224 + 100
    refused = 25 - NodeConfig(bundle=Path()).client_requests
    for frame in range(30 * 60):
        now = max(1.0, frame / 30) if frame < 30 * 30 else frame / 30
        for _ in range(50):
            assert pace("edge", now)
        for _ in range(refused):
            assert pace("edge", now, door_module.in_vain(window))


@contextlib.asynccontextmanager
async def opened(prepared: Prepared, metrics: Metrics, *called: Any) -> AsyncIterator[Door]:
    door = Door(prepared, metrics, *called)
    door.open()
    try:
        yield door
    finally:
        await door.close()


async def kept_out(edge: HostileEdge) -> None:
    with pytest.raises(PeerError, match="500"):
        await edge.connect()


@needs_sodium
def test_an_edge_that_floods_is_kept_out_and_what_it_sent_is_thrown_away(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(door_module, "_BURST", 50)
    monkeypatch.setattr(door_module, "MESSAGES_PER_S", 0.001)
    handled: list[str] = []
    left: list[str] = []
    metrics = Metrics()

    def take(frame: zmq.Frame, route: bytes, name: str) -> bool:
        handled.append(name)
        return True

    async def work() -> None:
        called = take, lambda names: None, lambda name, route: left.append(name)
        async with opened(prepared, metrics, *called) as door:
            bad, good = (hostile(prepared, door, tmp_path, name) for name in ("bad", "good"))
            other = await good.connect()
            silent = await bad.connect()
            peer = await bad.connect()
            await peer.send(b"".join(peer.seal(b"x") for _ in range(200)))  # all of it at once
            assert await peer.wait_closed(30)
            await silent.send_message([b"x"])  # the first that is heard of it
            assert await silent.wait_closed(30)
            await kept_out(bad)
            await other.send_message([b"x"])
            while (
                "good" not in handled
                or not left
                or not nonzero(metrics, "handshakes_refused_total")
            ):
                await asyncio.sleep(0.01)
            for each in (peer, silent, other):
                await each.close()

    asyncio.run(asyncio.wait_for(work(), 60))
    assert (handled.count("bad"), handled.count("good")) == (50, 1)
    assert left == ["bad"]
    assert nonzero(metrics, "connections_dropped_total") == {"banished": 1}
    assert nonzero(metrics, "handshakes_refused_total") == {"banished": 1}
    assert caplog.text.count("bad is kept out for 2 s: it sent more than") == 1


@needs_sodium
@pytest.mark.parametrize(("useful", "handled"), [(True, 60), (False, 20)])
def test_messages_of_no_use_count_for_more(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    useful: bool,
    handled: int,
) -> None:
    monkeypatch.setattr(door_module, "_BURST", 60)
    monkeypatch.setattr(door_module, "MESSAGES_PER_S", 0.001)
    seen: list[str] = []

    def take(frame: zmq.Frame, route: bytes, name: str) -> bool:
        seen.append(name)
        return useful

    async def work() -> None:
        async with opened(prepared, Metrics(), take, lambda names: None) as door:
            peer = await hostile(prepared, door, tmp_path, "bad").connect()
            await peer.send(b"".join(peer.seal(b"x") for _ in range(200)))
            assert await peer.wait_closed(30)
            await peer.close()

    asyncio.run(asyncio.wait_for(work(), 60))
    assert len(seen) == handled


@needs_sodium
@pytest.mark.parametrize("breach", ["frames", "endless"])
def test_whoever_breaks_a_limit_loses_all_connections_and_is_kept_out(
    prepared: Prepared, tmp_path: Path, breach: str
) -> None:
    metrics, doors = Metrics(), list[Door]()

    async def work() -> None:
        async with opened(prepared, metrics, echo(doors), lambda names: None) as door:
            doors.append(door)
            edge = hostile(prepared, door, tmp_path, "bad")
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
            await door.reopen()
            await kept_out(edge)
            for peer in peers:
                await peer.close()

    asyncio.run(asyncio.wait_for(work(), 60))
    whole = {"banished": 2} if breach == "frames" else {"endless": 1, "banished": 1}
    assert nonzero(metrics, "connections_dropped_total") == whole
