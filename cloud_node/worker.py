"""The engine behind a node: one stage, opened once, run in one thread of its own.

Promises that the event loop never waits for the engine and that runs never overlap. Batching
several requests into one run, and processes instead of threads, belong here when they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engines.bundle import Bundle
from engines.engine import Device
from engines.pipeline import Pipeline


@dataclass(frozen=True)
class Outcome:
    """Outputs of one run, and the time inside the engine."""

    outputs: dict[str, np.ndarray]
    compute_us: int


class Worker:
    """Runs the stack of a bundle.

    Raises:
        EdgeRuntimeError: the engine can't be opened.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None, device: Device) -> None:
        self._pipeline = Pipeline(bundle, threads=threads, device=device)
        self._engine = self._pipeline.engine("stack")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def run(self, feeds: Mapping[str, np.ndarray]) -> Outcome:
        """Run once.

        Raises:
            EngineError: the feeds don't fit or the engine failed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, feeds)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Outcome:
        start = time.perf_counter()
        outputs = self._engine.run(feeds)
        return Outcome(outputs, round((time.perf_counter() - start) * 1e6))

    def close(self) -> None:
        """Wait for a run in progress, then close the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pipeline.close()
