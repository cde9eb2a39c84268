"""The authenticator lets in whom the folder names, nobody else, and survives its own failures."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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

from edge_common import permissions
from edge_common.errors import KeyFileError
from transport import auth, sockets
from transport.auth import AllowList, Authenticator, Pace, Penalties
from transport.keys import KeyPair, make_directory, write_public
from transport.messages import StageLimits

NewPair = Callable[[str], KeyPair]


@asynccontextmanager
async def _serving(
    allowed: AllowList | None, node: KeyPair, limits: StageLimits
) -> AsyncIterator[tuple[zmq.asyncio.Context, Any]]:
    """A context with an authenticator (unless None) and a server."""
    ctx = zmq.asyncio.Context()
    authenticator = Authenticator(ctx, allowed) if allowed is not None else None
    if authenticator:
        authenticator.start()
    server = sockets.server(ctx, "tcp://127.0.0.1:0", node, limits)
    try:
        yield ctx, server
    finally:
        server.close()
        if authenticator:
            await authenticator.stop()
        ctx.destroy(linger=0)


async def _admitted(ctx: Any, server: Any, node: KeyPair, pair: KeyPair, limits: Any) -> str | None:
    """The name a client was let in under, None if its handshake was refused."""
    endpoint = server.last_endpoint.decode()
    client = sockets.client(ctx, endpoint, node.public, pair, limits, connect=False)
    watcher = sockets.watch(client, endpoint, first_retry_s=0.1)
    try:
        event = await asyncio.wait_for(anext(watcher), 30)
        while event.reason == sockets.NO_ANSWER:  # this machine was too slow: tried again
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


def test_only_authorised_keys_get_in_under_their_name(
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
            assert await _admitted(ctx, server, node, stranger, limits) is None

    asyncio.run(scene())


def test_without_an_authenticator_nobody_gets_in(new_pair: NewPair, limits: StageLimits) -> None:
    node, pair = new_pair("node"), new_pair("kitchen")

    async def scene() -> None:
        async with _serving(None, node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, pair, limits) is None

    asyncio.run(scene())


def test_an_exception_refuses_and_the_next_client_gets_in(
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
            allowed.broken, allowed.odd = False, True  # a name that can't be told
            assert await _admitted(ctx, server, node, pair, limits) is None
            allowed.odd = False
            assert await _admitted(ctx, server, node, pair, limits) == "kitchen"

    asyncio.run(scene())


def test_a_file_name_that_cannot_be_told_shuts_out_its_holder_alone(
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
        pytest.skip("this file system takes UTF-8 alone")

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            assert await _admitted(ctx, server, node, cellar, limits) is None
            assert await _admitted(ctx, server, node, umlaut, limits) == "k\u00fcche"
            assert await _admitted(ctx, server, node, kitchen, limits) == "kitchen"

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "is not UTF-8: rename it" in caplog.text


def test_a_folder_that_becomes_unsafe_or_vanishes_lets_in_nobody(
    authorized: Path, authorise: Any, new_pair: NewPair, limits: StageLimits
) -> None:
    node, pair = new_pair("node"), new_pair("kitchen")
    authorise(pair)

    async def scene() -> None:
        async with _serving(AllowList(authorized), node, limits) as (ctx, server):
            authorized.chmod(0o777)
            assert await _admitted(ctx, server, node, pair, limits) is None
            authorized.chmod(0o700)
            assert await _admitted(ctx, server, node, pair, limits) == "kitchen"
            authorized.rename(authorized.with_name("gone"))
            assert await _admitted(ctx, server, node, pair, limits) is None

    asyncio.run(scene())


@pytest.mark.parametrize(
    "question",
    [
        [b"1.0"],
        [b"2.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"CURVE", b"k" * 32],
        [b"1.0", b"1", b"another", b"127.0.0.1", b"", b"CURVE", b"k" * 32],
        [b"1.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"NULL"],
        [b"1.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"PLAIN", b"user", b"password"],
        [b"1.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"PLAIN", b"k" * 32],
        [b"1.0", b"1", b"edge-runtime", b"127.0.0.1", b"", b"CURVE", b"short"],
        [b"1.0", b"1", b"edge-runtime", b"\xff\xfe", b"", b"CURVE", b"k" * 32],
    ],
)
def test_other_questions_are_answered_no(authorized: Path, question: list[bytes]) -> None:
    async def scene() -> list[bytes]:
        ctx = zmq.asyncio.Context()
        authenticator = Authenticator(ctx, AllowList(authorized))
        authenticator.start()
        asker = ctx.socket(zmq.DEALER)
        asker.connect("inproc://zeromq.zap.01")
        try:
            await asker.send_multipart([b"", *question])
            return await asyncio.wait_for(asker.recv_multipart(), 30)
        finally:
            asker.close(linger=0)
            await authenticator.stop()
            ctx.destroy(linger=0)

    _, version, request_id, status, text, user, metadata = asyncio.run(scene())
    assert version == b"1.0"
    assert request_id == (question[1] if len(question) > 1 else b"")
    assert status in (b"400", b"500")
    assert text
    assert (user, metadata) == (b"", b"")


def test_refusals_are_logged_once_a_minute_and_key(
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


def test_what_lets_an_edge_in_fits_the_folder(authorized: Path, tmp_path: Path) -> None:
    told = AllowList(authorized).command("k.pub")
    assert told == f"edge-runtime keys authorize --dir {tmp_path} k.pub"
    elsewhere = authorized.rename(tmp_path / "edges")
    assert AllowList(elsewhere).command("k.pub") == f"cp k.pub {elsewhere}"


def test_folder_must_exist_and_be_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        permissions, "_alone", lambda uid, gid: False
    )  # its group has other members
    with pytest.raises(KeyFileError, match="edge-runtime keys node"):
        AllowList(tmp_path / "nowhere")
    for mode in (0o770, 0o702, 0o777, 0o1777):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(KeyFileError, match=f"chmod go-w {folder}"):
            AllowList(folder)


def test_a_way_to_the_folder_that_others_may_change(tmp_path: Path, new_pair: NewPair) -> None:
    """Who may write to the folder above can put another in its place."""
    above = tmp_path / "above"
    folder = make_directory(above / "authorized")
    write_public(folder / "edge.pub", new_pair("edge").public, "edge")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert len(AllowList(folder)) == len(AllowList(link)) == 1
    allowed = AllowList(folder)
    above.chmod(0o777)
    for path in (folder, link):
        with pytest.raises(KeyFileError, match=f"chmod go-w {above}"):
            AllowList(path)
    with pytest.raises(KeyFileError, match="go-w"):
        allowed.reload()
    above.chmod(0o700)
    assert len(allowed.reload()) == 1


def test_a_key_file_that_others_may_write_shuts_out_its_holder_alone(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, loose, linked = map(new_pair, ("kept", "loose", "linked"))
    authorise(kept)
    authorise(loose)
    target = make_directory(tmp_path / "elsewhere") / "linked"
    write_public(target, linked.public, "linked")
    (authorized / "linked.pub").symlink_to(target)
    allowed = AllowList(authorized)
    assert sorted(allowed.reload().values()) == ["kept", "linked", "loose"]
    (authorized / "loose.pub").chmod(0o646)
    with caplog.at_level(logging.WARNING):
        assert sorted(allowed.reload().values()) == ["kept", "linked"]
    assert f"chmod go-w {authorized / 'loose.pub'}" in caplog.text
    target.parent.chmod(0o777)  # nothing about the link or its target has changed
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert sorted(allowed.reload().values()) == ["kept"]
    assert caplog.text.count(f"chmod go-w {target.parent}") == 1  # told once
    target.parent.chmod(0o700)
    (authorized / "loose.pub").chmod(0o644)
    assert len(allowed.reload()) == 3


def test_another_users_key_file_lets_in_nobody(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    pair = new_pair("edge")
    authorise(pair)
    os.chown(authorized / "edge.pub", 12_345, -1)
    assert AllowList(authorized).name_of(pair.public) is None
    assert AllowList(authorized, owner=12_345).name_of(pair.public) == "edge"
    os.chown(authorized, 12_345, -1)
    with pytest.raises(KeyFileError, match="belongs to"):
        AllowList(authorized)


def _replace_in_place(file: Path, public: str) -> None:
    """Write another key over a file and keep its size and time."""
    before = file.stat()
    file.write_text(file.read_text().splitlines()[0] + f"\npublic-key {public}\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )


def test_a_key_replaced_in_place_with_size_and_time_kept_is_noticed(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    old, new = new_pair("edge"), new_pair("edge")
    authorise(old)
    file = authorized / "edge.pub"
    allowed = AllowList(authorized)
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:  # the clock of files may tick slowly
        _replace_in_place(file, new.public)
    assert allowed.changed("edge")
    assert allowed.reload() == {new.public: "edge"}
    assert not allowed.changed("edge")
    assert allowed.name_of(old.public) is None


def test_a_key_replaced_within_one_tick_of_the_clock_of_files_is_noticed(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing about the file has changed but what is in it."""
    stamp = auth._stamp
    second = 1_000_000_000
    monkeypatch.setattr(
        auth,
        "_stamp",
        lambda entry: tuple(n - n % second if n > second else n for n in stamp(entry)),
    )
    old, new = new_pair("edge"), new_pair("edge")
    file = authorized / "edge.pub"
    for _ in range(20):
        authorise(old)
        allowed = AllowList(authorized)
        before = auth._stamp(file)
        _replace_in_place(file, new.public)
        if auth._stamp(file) == before:  # both within one second
            break
        file.unlink()
    else:
        pytest.fail("this machine is too slow to write two files in a second")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * second)
    assert allowed.reload() == {new.public: "edge"}


def test_only_files_that_changed_are_read_again(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [new_pair(f"edge{i}") for i in range(20)]
    for pair in pairs:
        authorise(pair)
    later = time.time_ns() + 3_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    allowed = AllowList(authorized)
    read: list[Path] = []
    real = auth.read_public
    monkeypatch.setattr(auth, "read_public", lambda path: read.append(path) or real(path))
    for _ in range(3):
        assert len(allowed.reload()) == 20
    assert not read
    (authorized / "edge3.pub").unlink()
    authorise(new_pair("another"))
    os.utime(authorized / "edge5.pub")
    assert len(allowed.reload()) == 20
    assert sorted(path.name for path in read) == ["another.pub", "edge5.pub"]


def test_only_pub_files_count(authorized: Path, authorise: Any, new_pair: NewPair) -> None:
    kept, other = new_pair("kept"), new_pair("other")
    authorise(kept)
    for name in ("other.txt", ".other.pub", "other.pub~"):
        (authorized / name).write_text(f"public-key {other.public}\n")
    allowed = AllowList(authorized)
    assert len(allowed) == 1
    assert allowed.name_of(kept.public) == "kept"
    assert allowed.name_of(other.public) is None


def test_a_name_that_is_no_text_lets_in_nobody_and_stops_nothing(
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


def test_strangers_do_not_make_it_read_every_key_again(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen, stranger = new_pair("kitchen"), new_pair("stranger")
    authorise(kitchen)
    os.utime(authorized, (1, 1))  # long ago
    allowed = AllowList(authorized)
    read = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(path) or scandir(path))
    for _ in range(10):
        assert allowed.name_of(kitchen.public) == "kitchen"
        assert allowed.name_of(stranger.public) is None
    assert not read
    authorise(stranger)
    assert allowed.name_of(stranger.public) == "stranger"
    (authorized / "kitchen.pub").unlink()
    assert allowed.name_of(kitchen.public) is None
    authorized.chmod(0o777)
    with pytest.raises(KeyFileError):
        allowed.name_of(stranger.public)


def test_of_many_files_each_look_takes_a_part(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_LOOK", 10)
    pairs = [new_pair(f"edge{i}") for i in range(35)]
    for pair in pairs:
        authorise(pair)
    os.utime(authorized, (1, 1))
    allowed = AllowList(authorized)
    looks: list[Path] = []
    stamp = auth._stamp
    monkeypatch.setattr(auth, "_stamp", lambda entry: looks.append(entry) or stamp(entry))
    for _ in range(4):
        allowed.reload()
    assert sorted(path.name for path in looks) == sorted(f"{pair.name}.pub" for pair in pairs)
    for loose in ("edge7", "edge33"):  # seen at once, wherever the look is
        (authorized / f"{loose}.pub").chmod(0o666)
        assert allowed.changed(loose)
        assert loose not in allowed.reload().values()
    (authorized / "edge20.pub").chmod(0o666)
    assert allowed.name_of(pairs[20].public) is None
    (authorized / "edge30.pub").unlink()
    assert len(allowed.reload()) == 31
    for i in (5, 15, 25, 34):
        (authorized / f"edge{i}.pub").chmod(0o666)
    os.utime(authorized, (1, 1))
    for _ in range(5):
        allowed.reload()
    assert len(allowed) == 27


def test_strangers_cannot_keep_a_node_busy_with_a_folder_that_just_changed(
    authorized: Path, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change could hide behind that one, so it is looked at again: but only so often."""
    allowed = AllowList(authorized)
    clock, looks = [100.0], []
    scandir = os.scandir

    def slow(path: Any) -> Any:
        looks.append(path)
        clock[0] += 0.02  # as with 5,000 keys
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stranger = new_pair("stranger").public
    while clock[0] < 102.0:
        os.utime(authorized)
        assert allowed.name_of(stranger) is None
        clock[0] += 0.001
    assert 5 < len(looks) < 20  # instead of 95


def test_a_link_to_nowhere_is_skipped_until_it_leads_somewhere(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, linked = new_pair("kept"), new_pair("linked")
    authorise(kept)
    (authorized / "linked.pub").symlink_to(tmp_path / "later")
    (authorized / "loop.pub").symlink_to(authorized / "loop.pub")
    with caplog.at_level(logging.WARNING):
        allowed = AllowList(authorized)
    for name in ("linked.pub", "loop.pub"):
        assert name in caplog.text
    assert allowed.name_of(kept.public) == "kept"
    assert allowed.name_of(linked.public) is None
    write_public(tmp_path / "later", linked.public, "linked")
    assert allowed.name_of(linked.public) == "linked"
    assert allowed.name_of(kept.public) == "kept"


async def _answered(peer: Peer) -> bool:
    await peer.send_message([b"1 10"])
    return bool(await asyncio.wait_for(peer.read_message(), 60))


def test_a_revoked_key_is_cut_off_and_nobody_else(start: Callable[..., EchoNode]) -> None:
    node = start()
    honest = Honest(node)
    pair = node.authorise("revoked")

    async def scene() -> None:
        peer, silent = await node.peer(pair), await node.peer(pair)
        assert await _answered(peer)
        (node.folder / "authorized" / "revoked.pub").unlink()
        assert await peer.wait_closed(60)
        assert await silent.wait_closed(60)  # let in, and has not said yet whose it is
        with pytest.raises(PeerError):
            await node.peer(pair)
        await peer.close()
        await silent.close()

    asyncio.run(scene())
    honest.more(20)
    stats = node.stats()
    assert stats["revoked"] == ["revoked"]
    assert stats["events"]["dropped revoked"] == 2
    assert not stats["events"].get("suppressed")
    assert stats["refused"] == {"not_authorised": 1}
    honest.close()


def test_another_key_under_the_same_name_cuts_off_the_old_one(
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
        with pytest.raises(PeerError):
            await node.peer(old)
        async with await node.peer(new) as peer:
            assert await _answered(peer)

    asyncio.run(scene())


def test_a_folder_not_to_be_trusted_any_more_cuts_off_everybody(
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
        with pytest.raises(PeerError):
            await node.peer(pair)
        folder.chmod(0o700)
        async with await node.peer(pair) as peer:
            assert await _answered(peer)

    asyncio.run(scene())
    assert "nobody is authorised any more" in node.log
    assert "chmod go-w" in node.log
    assert node.stats()["refused"]["folder"] == 1


def test_a_failing_callback_does_not_end_the_watch_and_is_told_again(
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
            await asyncio.sleep(0.6)  # long enough to be told once more, if it were
        finally:
            await authenticator.stop()
            ctx.destroy(linger=0)

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert told[0] == {"first"}
    assert told[-1] >= {"second"}
    assert len(told) == 3


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_shuts_out_nobody(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    pair, other = new_pair("edge"), new_pair("other")
    authorise(pair)
    allowed = AllowList(authorized)

    def fail(path: object) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        authorise(other)
        assert allowed.name_of(pair.public) == "edge"
        assert allowed.name_of(other.public) is None
        with pytest.raises(KeyFileError):
            AllowList(authorized)  # without anything read before, there is nothing to go by
    assert allowed.name_of(other.public) == "other"


def test_a_key_has_a_burst_and_then_a_pace_and_others_their_own() -> None:
    pace = Pace(burst=3, per_s=10.0)
    assert [pace("a", 5.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert pace("b", 5.0)
    assert not pace("a", 5.05)
    assert pace("a", 5.1001)  # what was refused in between cost nothing
    assert not pace("a", 5.1002)
    assert all(pace("a", 6.0 + turn / 9.9) for turn in range(1000))  # as slow as it may be
    assert [pace("a", 500.0) for _ in range(4)] == [True] * 3 + [False]  # and saved up no more
    pace.keep(["b"])
    assert pace("a", 500.0)


def test_at_the_pace_of_libzmq_no_edge_comes_too_often() -> None:
    pace = Pace()
    assert all(pace("a", turn * 0.1) for turn in range(10_000))


def test_a_pace_of_more_than_one_token() -> None:
    pace = Pace(burst=10, per_s=10.0)
    assert [pace("a", 5.0, 4.0) for _ in range(4)] == [True] * 3 + [False]
    assert not pace("a", 5.2)
    assert pace("a", 5.3001)  # twelve were taken: what was too much has to be made up for
    pace.drain("a", 9.0)
    assert [pace("a", 9.0) for _ in range(2)] == [True, False]


def test_whoever_breaks_rules_is_kept_out_for_twice_as_long_each_time() -> None:
    penalties = Penalties(first_s=2.0, most_s=10.0)
    assert not penalties("a", 0.0)
    now, kept = 0.0, []
    for _ in range(5):
        kept.append(penalties.add("a", now))
        assert penalties("a", now)
        assert not penalties("b", now)
        now += kept[-1]
        assert not penalties("a", now)
        now += 9.9
    assert kept == [2.0, 4.0, 8.0, 10.0, 10.0]
    assert penalties.add("a", now + 0.2) == 2.0, "it had behaved for a while"
    penalties.forget(["a"])
    assert not penalties("a", now + 0.3)


def test_a_banished_edge_gets_in_again_and_another_meanwhile(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    limits: StageLimits,
) -> None:
    node, bad, good = new_pair("node"), new_pair("bad"), new_pair("good")
    for pair in (bad, good):
        authorise(pair)

    async def scene() -> None:
        ctx = zmq.asyncio.Context()
        refused: list[str] = []
        authenticator = Authenticator(ctx, AllowList(authorized), on_refused=refused.append)
        authenticator._penalties = Penalties(first_s=5.0)
        authenticator.start()
        server = sockets.server(ctx, "tcp://127.0.0.1:0", node, limits)
        try:
            assert authenticator.banish("bad") == 5.0
            assert authenticator.banished("bad", time.monotonic())
            endpoint = server.last_endpoint.decode()
            client = sockets.client(ctx, endpoint, node.public, bad, limits, connect=False)
            async with contextlib.aclosing(sockets.watch(client, endpoint)) as events:
                told = await asyncio.wait_for(anext(events), 30)
            client.close()
            assert told == sockets.LinkEvent("refused", sockets.REFUSED_FOR_NOW)
            assert refused == ["banished"]
            assert await _admitted(ctx, server, node, good, limits) == "good"
            while authenticator.banished("bad", time.monotonic()):
                await asyncio.sleep(0.01)
            assert await _admitted(ctx, server, node, bad, limits) == "bad"
            assert authenticator.banish("bad") == 10.0
            # Another key under this name has done nothing yet.
            other = new_pair("other")
            write_public(authorized / "next", other.public, "bad")
            (authorized / "next").rename(authorized / "bad.pub")
            while authenticator.banished("bad", time.monotonic()):
                await asyncio.sleep(0.01)
        finally:
            server.close()
            await authenticator.stop()
            ctx.destroy(linger=0)

    asyncio.run(scene())


def test_a_key_that_comes_too_often_is_paced_and_another_gets_in_meanwhile(
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

    asyncio.run(asyncio.wait_for(scene(), 120))
    stats = node.wait_for(lambda s: not s["connections"])
    # Whoever gives up in the middle of its handshake may look like many things, but that is rare.
    assert sum(n for what, n in stats["events"].items() if what.startswith("refused")) <= 40
    assert set(stats["refused"]) == {"too_often"}
    assert node.log.count("stormy connects too often") == 1
    # Once it has calmed down, it gets in.
    with zmq.Context() as ctx:
        client = sockets.client(ctx, node.endpoint, node.key.public, stormy, LIMITS)
        client.rcvtimeo = client.sndtimeo = 60_000
        client.send(b"1 10")
        assert client.recv_multipart()
        client.close()


def test_an_edge_that_loses_its_connection_again_and_again_is_never_refused(
    start: Callable[..., EchoNode],
) -> None:
    node = start(bounds={"unsent": 50_000})
    pair = node.authorise("edge")
    with zmq.Context() as ctx:
        client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
        client.sndtimeo = 60_000
        while node.stats()["dropped"].get("slow", 0) < 30:
            client.send(b"1 1000000")  # more than it may be owed: cut off, it comes back
        client.close()
    assert not node.stats()["refused"]
