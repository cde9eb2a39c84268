"""An event loop in a thread of its own, for code that is not asynchronous itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from edge_common.errors import OffloadError
from edge_common.signals import defer_signals

_UNWIND_S = 1.0
"""How long an interrupted call may take to end what it has begun."""

_T = TypeVar("_T")


class BackgroundLoop:
    """Runs coroutines for callers in any thread, several at a time, until :meth:`close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` and return its result.

        If a signal interrupts the caller, `work` is cancelled and may take a second to clean up.

        Raises:
            OffloadError: the loop was closed, before or during the call.
        """
        ended = threading.Event()

        async def whole() -> _T:
            try:
                return await work
            finally:
                ended.set()

        coroutine = whole()
        try:
            future = self.submit(coroutine)
        except OffloadError:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise OffloadError("the offloader was closed meanwhile", code="closed") from None
        except BaseException:
            with defer_signals():
                if future.cancel():
                    ended.wait(_UNWIND_S)
            raise

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run `work`; returns at once. Cancelling the future cancels it.

        Raises:
            OffloadError: the loop was closed.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise OffloadError("the offloader was closed", code="closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what still runs, and end the thread. Closing twice is allowed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True

        async def finish() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
