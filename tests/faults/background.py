"""An event loop in its own thread, so that a fault can run beside a blocking test.

`Background.close` cancels and awaits all tasks, closes the loop and joins the thread. A `Service`
runs either there or in the caller's own loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended.

    Repeats, because before Python 3.12 `asyncio.wait_for` swallows a cancellation that arrives in
    the same turn as its result.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=0.2)
        for task in done:
            if not task.cancelled():
                task.exception()


class Background:
    """A running event loop, from its creation to `close`. Also a context manager."""

    def __init__(self, name: str = "faults") -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = 60.0) -> T:
        """Run `work` in the loop and wait for its result. It is cancelled after `timeout_s`."""
        future = self.start(work)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `work`. Any thread may cancel its future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in the loop's thread and return its result."""

        async def work() -> T:
            return function()

        return self.run(work())

    def close(self) -> None:
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(cancel_all(asyncio.all_tasks(self.loop)))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Service:
    """An object that lives in an event loop: ``async with`` uses the caller's, ``with`` its own
    thread.

    Subclasses define `_start` and `_stop`. Their other methods go through `_call`, so any thread
    may call them, and they have acted when they return.
    """

    _background: Background | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: int | None = None

    async def _start(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        raise NotImplementedError

    def _call(self, function: Callable[[], T]) -> T:
        """Call in the service's thread, from any thread."""
        if self._loop is None or threading.get_ident() == self._thread:
            return function()

        async def work() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(60)

    async def __aenter__(self) -> Self:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stop()
        self._loop = None

    def __enter__(self) -> Self:
        self._background = Background(type(self).__name__)
        try:
            return self._background.run(self.__aenter__())
        except BaseException:
            self._background.close()
            raise

    def __exit__(self, *error: object) -> None:
        assert self._background is not None
        try:
            self._background.run(self.__aexit__())
        finally:
            self._background.close()
