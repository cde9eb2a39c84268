"""Child processes: messages in both directions, and every way to end."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_common.children import Child, Unpacker, pack


def child_test(test: Callable[[Child, asyncio.Queue[bytes]], Awaitable[None]]) -> None:
    """Run a test with a child of `echo_child`, and leave no zombie."""

    async def main() -> None:
        got: asyncio.Queue[bytes] = asyncio.Queue()

        def on_message(child: Child, body: bytes) -> None:
            if body == b"defect":
                raise ZeroDivisionError
            got.put_nowait(body)

        child = await Child.start("tests.edge_common.echo_child", on_message, os.environ)
        try:
            await asyncio.wait_for(test(child, got), 60)
        finally:
            child.kill("the test is over")
            await child.reap(0)
            assert not Path(f"/proc/{child.pid}").exists()

    asyncio.run(main())


@pytest.mark.process
def test_messages_go_both_ways_and_the_child_ends_when_the_socket_closes() -> None:
    async def test(child: Child, got: asyncio.Queue[bytes]) -> None:
        for body in (b"a", b"", b"x" * 200_000):
            child.send(body)
            assert await got.get() == body
        child.leave()
        await child.lost
        assert await child.reap(60) == "ended with status 3"
        child.send(b"too late")

    child_test(test)


@pytest.mark.process
def test_modules_in_the_current_folder_do_not_replace_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("edge_common", "tests", "struct"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)

    async def test(child: Child, got: asyncio.Queue[bytes]) -> None:
        child.send(b"a")
        first = asyncio.ensure_future(got.get())
        await asyncio.wait({first, child.lost}, return_when=asyncio.FIRST_COMPLETED)
        assert not child.lost.done()
        assert first.result() == b"a"

    child_test(test)


@pytest.mark.process
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"crash", None),
        (b"garbage", "sent an invalid message: ValueError"),
        (b"defect", "was ended because of a defect: ZeroDivisionError"),
    ],
)
def test_the_reason_of_the_child_s_end_is_known(message: bytes, reason: str | None) -> None:
    async def test(child: Child, got: asyncio.Queue[bytes]) -> None:
        child.send(message)
        await child.lost
        end = await child.reap(60)
        assert child.reason == reason
        assert end == "crashed (SIGSEGV)" if reason is None else "SIGKILL" in end

    child_test(test)


@pytest.mark.process
def test_what_it_prints_stays_out_of_our_output(capfd: pytest.CaptureFixture[str]) -> None:
    """Another program may read that."""

    async def test(child: Child, got: asyncio.Queue[bytes]) -> None:
        child.send(b"print")
        assert await got.get() == b"print"

    child_test(test)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "printed\n")


@pytest.mark.process
def test_a_child_that_does_not_end_is_killed_after_its_grace() -> None:
    async def test(child: Child, got: asyncio.Queue[bytes]) -> None:
        child.send(b"linger")
        child.leave()
        assert "SIGKILL" in await child.reap(0.1)

    child_test(test)


def test_messages_survive_any_fragmentation() -> None:
    sent = [b"a", b"", b"x" * 3000, b"end"]
    data = b"".join(map(pack, sent))
    rng = random.Random(0)
    for _ in range(200):
        unpacker, found, start = Unpacker(), list[Any](), 0
        while start < len(data):
            stop = start + rng.randrange(1, 40)
            found += unpacker.feed(data[start:stop])
            start = stop
        assert found == sent


def test_an_oversized_message_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at most"):
        list(Unpacker().feed(b"\0\x20\0\0"))
