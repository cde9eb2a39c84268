"""The authenticator admits exactly the keys in the folder and survives its own failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from echo_node import LIMITS, EchoNode, Honest
from faults.background import cancel_all
from faults.zmtp import Peer, PeerError
from zmq.utils import z85

from transport import auth, link, sockets
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.dos_protection import PenaltyBox
from transport.keys import KeyPair, write_public
from transport.messages import StageLimits

NewPair = Callable[[str], KeyPair]
_NULL = [b"1.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"NULL"]


@asynccontextmanager
async def _serving(
    allowed: AllowList | None, node: KeyPair, limits: StageLimits, **options: Any
) -> AsyncIterator[tuple[zmq.asyncio.Context, Any]]:
    """A context with an authenticator (unless None) and a server."""
    ctx = zmq.asyncio.Context()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ctx.destroy, linger=0)
        if allowed is not None:
            authenticator = Authenticator(ctx, allowed, **options)
            stack.push_async_callback(authenticator.stop)
            authenticator.start()
        server = sockets.server(ctx, "tcp://127.0.0.1:0", node, limits)
        stack.callback(server.close)
        yield ctx, server


async def _revoked(*args: Any) -> None:
    """Wait until the client of `_admitted` is refused."""
    give_up = time.monotonic() + 30
    while await _admitted(*args) is not None:
        assert time.monotonic() < give_up


async def _admitted(ctx: Any, server: Any, node: KeyPair, pair: KeyPair, limits: Any) -> str | None:
    """The name under which a client was admitted. None if its handshake was refused."""
    endpoint = server.last_endpoint.decode()
    client = sockets.client(ctx, endpoint, node.public, pair, limits, connect=False)
    watcher = link.watch(client, endpoint, first_retry_s=0.1)
    try:
        event = await asyncio.wait_for(anext(watcher), 30)
        while event.reason == link.NO_ANSWER:  # this machine was too slow: try again
            event = await asyncio.wait_for(anext(watcher), 30)
        if event.state != "up":
            assert event.state == "refused"
            return None
        await asyncio.wait_for(client.send(b"hello"), 30)
        frames = await asyncio.wait_for(server.recv_multipart(copy=False), 30)
        return str(frames[-1].get("User-Id"))
    finally:
        await watcher.aclose()
        client.close()


def test_only_authorised_keys_are_admitted_under_their_name(
    authorized: Path, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    node, kitchen, stranger = new_pair("node"), new_pair("kitchen"), new_pair("stranger")
    authorise(kitchen)

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, stranger, limits) is None
            assert await _admitted(ctx, server, node, kitchen, limits) == "kitchen"
            authorise(stranger)
            assert await _admitted(ctx, server, node, stranger, limits) == "stranger"
            (authorized / "stranger.pub").unlink()
            await _revoked(ctx, server, node, stranger, limits)
            assert await _admitted(ctx, server, node, kitchen, limits) == "kitchen"

    asyncio.run(scene())


def test_without_an_authenticator_every_client_is_refused(
    new_pair: NewPair, limits: StageLimits
) -> None:
    node, pair = new_pair("node"), new_pair("kitchen")

    async def scene() -> None:
        async with _serving(None, node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, pair, limits) is None

    asyncio.run(scene())


def test_an_exception_refuses_one_client_and_the_next_is_admitted(
    authorized: Path, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    node, pair = new_pair("node"), new_pair("kitchen")
    authorise(pair)

    class Shaky(AllowList):
        broken = odd = False

        def name_of(self, public: str) -> str | None:
            if self.broken:
                raise RuntimeError("boom")
            return "\udcfc" if self.odd else super().name_of(public)

    async def scene() -> None:
        allowed = Shaky(authorized)
        async with _serving(allowed, node, limits) as (ctx, server):
            allowed.broken = True
            for _ in range(3):
                assert await _admitted(ctx, server, node, pair, limits) is None
            allowed.broken, allowed.odd = False, True  # a name that can't be encoded
            assert await _admitted(ctx, server, node, pair, limits) is None
            allowed.odd = False
            assert await _admitted(ctx, server, node, pair, limits) == "kitchen"

    asyncio.run(scene())


def test_an_unencodable_file_name_excludes_only_its_holder(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    limits: StageLimits,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, kitchen, cellar, umlaut = map(new_pair, ("node", "kitchen", "cellar", "umlaut"))
    authorise(kitchen)
    write_public(authorized / "k\u00fcche.pub", umlaut.public, "umlaut")
    authorise(cellar)
    try:
        os.rename(authorized / "cellar.pub", os.fsencode(authorized) + b"/k\xfcche.pub")
    except OSError:
        pytest.skip("this file system accepts only UTF-8")

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, cellar, limits) is None
            assert await _admitted(ctx, server, node, umlaut, limits) == "k\u00fcche"
            assert await _admitted(ctx, server, node, kitchen, limits) == "kitchen"

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "is not UTF-8: rename the file" in caplog.text


def test_an_unsafe_or_missing_folder_admits_no_edge(
    authorized: Path, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    node, pair = new_pair("node"), new_pair("kitchen")
    authorise(pair)

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            authorized.chmod(0o777)
            await _revoked(ctx, server, node, pair, limits)
            authorized.chmod(0o700)
            while await _admitted(ctx, server, node, pair, limits) != "kitchen":
                pass
            authorized.rename(authorized.with_name("gone"))
            await _revoked(ctx, server, node, pair, limits)

    asyncio.run(scene())


async def _ask(allowed: AllowList, question: list[bytes], **options: Any) -> list[bytes]:
    """The authenticator's answer to a ZAP question."""
    ctx = zmq.asyncio.Context()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ctx.destroy, linger=0)
        authenticator = Authenticator(ctx, allowed, **options)
        stack.push_async_callback(authenticator.stop)
        authenticator.start()
        asker = ctx.socket(zmq.DEALER)
        asker.connect("inproc://zeromq.zap.01")
        await asker.send_multipart([b"", *question])
        answer: list[bytes] = await asyncio.wait_for(asker.recv_multipart(), 30)
        return answer[1:]


def _question(pair: KeyPair, **changes: bytes) -> list[bytes]:
    sound = {
        "version": b"1.0",
        "id": b"1",
        "domain": b"edge-runtime",
        "address": b"127.0.0.1",
        "identity": b"",
        "mechanism": b"CURVE",
        "key": z85.decode(pair.public),
    }
    return list({**sound, **changes}.values())


def test_a_valid_question_of_an_authorised_key_is_accepted(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    pair = new_pair("edge")
    authorise(pair)
    answer = asyncio.run(_ask(AllowList(authorized), _question(pair)))
    assert answer[:5] == [b"1.0", b"1", b"200", b"OK", b"edge"]
    assert answer[5] == b"\x05X-Key" + (40).to_bytes(4, "big") + pair.public.encode()


@pytest.mark.parametrize(
    "change",
    [
        {"version": b"2.0"},
        {"domain": b"another"},
        {"domain": b""},
        {"mechanism": b"NULL"},
        {"mechanism": b"PLAIN"},
        {"key": b"short"},
        {"key": b"k" * 32},
        {"address": b"\xff\xfe", "key": b"k" * 32},
        {"more": b""},
    ],
)
def test_a_question_with_one_defect_is_refused(
    authorized: Path, authorise: Any, new_pair: NewPair, change: dict[str, bytes]
) -> None:
    pair = new_pair("edge")
    authorise(pair)
    refused: list[str] = []
    question = _question(pair, **change)
    answer = asyncio.run(_ask(AllowList(authorized), question, on_refused=refused.append))
    assert answer[:3] == [b"1.0", b"1", b"400"]
    assert answer[3]
    assert answer[4:] == [b"", b""]
    assert refused == ["not_authorised" if change.get("key") == b"k" * 32 else "protocol"]


@pytest.mark.parametrize(
    "question", [[b"1.0"], [], _NULL, [b"1.0", b"1", b"edge-runtime", b"", b"", b"PLAIN", b"", b""]]
)
def test_a_question_of_another_length_is_refused(authorized: Path, question: list[bytes]) -> None:
    answer = asyncio.run(_ask(AllowList(authorized), question or [b""]))
    assert answer[:3] == [b"1.0", question[1] if len(question) > 1 else b"", b"400"]
    assert answer[4:] == [b"", b""]


def test_unknown_keys_cause_only_a_limited_number_of_folder_scans(
    authorized: Path, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    authenticator = Authenticator(zmq.Context.instance(), AllowList(authorized))
    clock, scans = [100.0], []
    scandir = os.scandir

    def slow(path: Any) -> Any:
        scans.append(path)
        clock[0] += 0.02  # the duration of a scan with 5,000 keys
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    question = _question(new_pair("stranger"))
    while clock[0] < 102.0:
        assert authenticator._answer(question)[2] == b"400"
        clock[0] += 0.001
    assert 5 < len(scans) < 20  # a tenth of the time, plus a burst of one second's worth


def test_a_key_revoked_and_authorised_again_has_a_fresh_state(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_HANDSHAKES", 2)
    monkeypatch.setattr(auth, "_HANDSHAKES_PER_S", 0.001)
    pair = new_pair("edge")
    authorise(pair)
    authenticator = Authenticator(zmq.Context.instance(), AllowList(authorized))

    def answers() -> list[bytes]:
        return [authenticator._answer(_question(pair))[2] for _ in range(3)]

    assert answers() == [b"200", b"200", b"500"]
    (authorized / "edge.pub").unlink()
    authenticator._reload()
    authorise(pair)
    authenticator._reload()
    assert answers() == [b"200", b"200", b"500"]


def test_refusals_are_logged_once_per_minute_and_key(
    authorized: Path, new_pair: NewPair, limits: StageLimits, caplog: pytest.LogCaptureFixture
) -> None:
    node, stranger = new_pair("node"), new_pair("stranger")

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            for _ in range(3):
                await _admitted(ctx, server, node, stranger, limits)

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    (line,) = [r.getMessage() for r in caplog.records if stranger.public in r.getMessage()]
    assert "edge-runtime keys authorize" in line


def test_an_undecodable_name_admits_no_edge_and_stops_nothing(
    authorized: Path, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    node, odd, kitchen = new_pair("node"), new_pair("odd"), new_pair("kitchen")
    for pair in (odd, kitchen):
        authorise(pair)
    try:
        (authorized / "odd.pub").rename(authorized / os.fsdecode(b"caf\xe9.pub"))
    except OSError:
        pytest.skip("this file system has no such names")

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, odd, limits) is None
            assert await _admitted(ctx, server, node, kitchen, limits) == "kitchen"

    asyncio.run(scene())


async def _answered(peer: Peer) -> bool:
    await peer.send_message([b"1 10"])
    return bool(await asyncio.wait_for(peer.read_message(), 60))


@pytest.mark.process
def test_only_a_revoked_key_is_disconnected(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    node = start()
    honest = behave(node)
    honest.more(1)
    pair = node.authorise("revoked")

    async def scene() -> None:
        peer, silent = await node.peer(pair), await node.peer(pair)
        assert await _answered(peer)
        (node.folder / "authorized" / "revoked.pub").unlink()
        assert await peer.wait_closed(60)
        assert await silent.wait_closed(60)  # admitted, but its first message is still missing
        with pytest.raises(PeerError):
            await node.peer(pair)
        await peer.close()
        await silent.close()

    asyncio.run(scene())
    honest.more(20)
    stats = node.stats()
    assert stats["revoked"] == ["revoked"]
    assert stats["dropped"]["revoked"] == 2
    assert not stats["events"].get("suppressed")
    assert stats["refused"] == {"not_authorised": 1}
    honest.close()


@pytest.mark.process
def test_replacing_a_key_under_the_same_name_disconnects_the_old_one(
    start: Callable[..., EchoNode], new_pair: NewPair
) -> None:
    node = start()
    old, new = node.authorise("edge"), new_pair("edge")

    async def scene() -> None:
        peer = await node.peer(old)
        assert await _answered(peer)
        (node.folder / "authorized" / "edge.pub").unlink()
        write_public(node.folder / "authorized" / "edge.pub", new.public, "edge")
        assert await peer.wait_closed(60)
        await peer.close()
        node.wait_for(lambda stats: stats["dropped"] == {"revoked": 1})
        with pytest.raises(PeerError):
            await node.peer(old)
        async with await node.peer(new) as peer:
            assert await _answered(peer)

    asyncio.run(scene())


@pytest.mark.process
def test_a_folder_that_becomes_unsafe_disconnects_every_edge(
    start: Callable[..., EchoNode],
) -> None:
    node = start()
    pair = node.authorise("edge")
    folder = node.folder / "authorized"

    async def scene() -> None:
        peer = await node.peer(pair)
        assert await _answered(peer)
        folder.chmod(0o777)
        assert await peer.wait_closed(60)
        await peer.close()
        # And not for silence, as any peer that answers no heartbeat.
        node.wait_for(lambda stats: stats["dropped"] == {"revoked": 1})
        with pytest.raises(PeerError):
            await node.peer(pair)
        folder.chmod(0o700)
        async with await node.peer(pair) as peer:
            assert await _answered(peer)

    asyncio.run(scene())
    assert "no key is authorised any more" in node.log
    assert "chmod go-w" in node.log
    assert node.stats()["refused"]["folder"] == 1


def test_a_failing_callback_does_not_end_the_watch_and_is_called_again(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    pairs = [new_pair(name) for name in ("first", "second")]
    for pair in pairs:
        authorise(pair)
    told: list[set[str]] = []

    def callback(names: frozenset[str]) -> None:
        told.append(set(names))
        if len(told) < 3:
            raise RuntimeError("boom")

    async def scene() -> None:
        ctx = zmq.asyncio.Context()
        authenticator = Authenticator(ctx, AllowList(authorized), callback)
        authenticator.start()
        try:
            for pair in pairs:
                assert authenticator.admits(pair.name, pair.public)
                (authorized / f"{pair.name}.pub").unlink()
                while not told or pair.name not in told[-1]:
                    await asyncio.sleep(0.01)
                assert not authenticator.admits(pair.name, pair.public)
            while len(told) < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.6)  # long enough for another call, if there were one
        finally:
            await authenticator.stop()
            ctx.destroy(linger=0)

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert told[0] == {"first"}
    assert told[-1] >= {"second"}
    assert len(told) == 3


def test_a_banned_edge_is_admitted_again_and_another_key_meanwhile(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    limits: StageLimits,
) -> None:
    node, bad, good = new_pair("node"), new_pair("bad"), new_pair("good")
    for pair in (bad, good):
        authorise(pair)
    box, refused = PenaltyBox(first_s=5.0), list[str]()

    async def until_free() -> None:
        while box.banned("bad", time.monotonic()):
            await asyncio.sleep(0.01)

    async def scene() -> None:
        options: dict[str, Any] = {"on_refused": refused.append, "penalties": box}
        async with _serving(AllowList(authorized), node, limits, **options) as (ctx, server):
            assert box.ban("bad", time.monotonic()) == 5.0
            endpoint = server.last_endpoint.decode()
            client = sockets.client(ctx, endpoint, node.public, bad, limits, connect=False)
            async with contextlib.aclosing(link.watch(client, endpoint)) as events:
                told = await asyncio.wait_for(anext(events), 30)
            client.close()
            assert told == link.LinkEvent("refused", link.REFUSED_FOR_NOW)
            assert refused == ["banished"]
            assert await _admitted(ctx, server, node, good, limits) == "good"
            await until_free()
            assert await _admitted(ctx, server, node, bad, limits) == "bad"
            assert box.ban("bad", time.monotonic()) == 10.0
            # Another key under this name has broken no rule.
            other = new_pair("other")
            write_public(authorized / "next", other.public, "bad")
            (authorized / "next").rename(authorized / "bad.pub")
            await until_free()
            assert await _admitted(ctx, server, node, other, limits) == "bad"
            assert box.ban("bad", time.monotonic()) == 5.0

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.process
def test_a_key_that_connects_too_often_is_paced_and_another_is_admitted_meanwhile(
    start: Callable[..., EchoNode],
) -> None:
    node = start()
    stormy, other = node.authorise("stormy"), node.authorise("other")

    async def scene() -> None:
        async def storm() -> None:
            while True:
                with contextlib.suppress(PeerError, OSError, asyncio.IncompleteReadError):
                    (await node.peer(stormy)).abort()

        storms = [asyncio.create_task(storm()) for _ in range(40)]
        while not node.stats()["refused"].get("too_often", 0) > 40:
            await asyncio.sleep(0.05)
        async with await node.peer(other) as peer:
            assert await _answered(peer)
        await cancel_all(storms)

    asyncio.run(asyncio.wait_for(scene(), 60))
    stats = node.wait_for(lambda s: not s["connections"])
    # A peer that gives up during its handshake may be counted under other reasons, but rarely.
    assert sum(n for what, n in stats["events"].items() if what.startswith("refused")) <= 40
    assert set(stats["refused"]) == {"too_often"}
    assert node.log.count("stormy connects too often") == 1
    # Once it has slowed down, it is admitted.

    async def admitted() -> bool:
        while True:
            with contextlib.suppress(PeerError, OSError, asyncio.IncompleteReadError):
                async with await node.peer(stormy) as peer:
                    return await _answered(peer)
            await asyncio.sleep(0.2)

    assert asyncio.run(asyncio.wait_for(admitted(), 60))


@pytest.mark.process
def test_an_edge_that_keeps_losing_its_connection_is_never_refused(
    start: Callable[..., EchoNode],
) -> None:
    node = start(limits={"unacked": 50_000})
    pair = node.authorise("edge")
    with zmq.Context() as ctx:
        client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
        client.sndtimeo = 60_000
        while node.stats()["dropped"].get("slow", 0) < 30:
            # exceeds the limit on unread bytes: the edge is disconnected and reconnects
            client.send(b"1 1000000")
        client.close()
    assert not node.stats()["refused"]
    assert node.log.count("does not read its replies") == 1
