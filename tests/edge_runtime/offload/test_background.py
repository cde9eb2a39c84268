"""Calls into an event loop in another thread."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from edge_runtime.offload.background import BackgroundLoop


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGUSR1 raises in the main thread, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupting")
def test_an_interrupted_call_ends_after_its_clean_up() -> None:
    """Otherwise what nodes were sent would be missing from the record of an interrupted run."""
    loop, ended = BackgroundLoop("test"), []

    async def work() -> None:
        await asyncio.sleep(0.1)  # by now the main thread waits for the result
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.1)
            ended.append(True)

    try:
        with pytest.raises(Interrupted):
            loop.call(work())
        assert ended
    finally:
        loop.close()
