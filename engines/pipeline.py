"""The whole model in one process: windows, stack, tail and decoder, without a network.

An offloaded run computes the stack elsewhere and is otherwise the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_common.errors import EngineError
from edge_common.progress import Progress
from engines.bundle import Bundle
from engines.dtypes import all_finite
from engines.engine import Device, Engine
from engines.plan import verify_command
from engines.selection import open_stage
from engines.windows import Windows

Arrays = dict[str, np.ndarray]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Encoding:
    """The result of :meth:`Pipeline.encode` for an image, and its times.

    Attributes:
        embedding: float `[1, d, g, g]`, every number finite.
        tokens: the stack's outputs, one row per window; None for a stock bundle.
        stack_ms: for the stack, at any place, or for a stock bundle's encoder.
        tail_ms: for the tail; 0 for a stock bundle.
    """

    embedding: np.ndarray
    tokens: Arrays | None
    stack_ms: float
    tail_ms: float


class Pipeline:
    """Runs a bundle's stages. Any number of threads may call it at the same time.

    Each stage has one thread, which opens its engine when it is first needed and runs one call
    after the other. So the stack of one image can run while the tail of another does. Use it as a
    context manager, or call :meth:`close`.

    Args:
        bundle: of any kind; a stage it does not hold is a BundleError when used.
        threads: CPU threads of each engine; None means every core this process may use.
        device: which engines run the stages, see :data:`engines.engine.Device`.

    Attributes:
        work: receives the names of running parts, for a progress display; see :meth:`cost`.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, device: Device = "auto"
    ) -> None:
        self.bundle = bundle
        self.work = Progress()
        self._threads = threads
        self._device: Device = device
        self._engines: dict[str, Engine] = {}
        self._executors: dict[str, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()  # of the executors
        self._closed = False
        self._costs: dict[str, float] = {}

    def cost(self, stage: str) -> float:
        """A rough amount of computation for one run of a stage on a whole image, without a unit.

        0 for stages that take little.
        """
        if stage in self._costs:  # once the engine is open, the files may be gone
            return self._costs[stage]
        geometry = self.bundle.geometry
        # Every weight is used once for each token. Attention over the whole image costs as much
        # again, and is slower.
        tokens = {
            "stack": geometry.windows * geometry.tokens_per_window,
            "tail": 3 * geometry.grid**2,
            "encoder": 2 * geometry.grid**2,
        }
        self._costs[stage] = float(self.bundle.size(stage) * tokens.get(stage, 0))
        return self._costs[stage]

    def is_open(self, stage: str) -> bool:
        """True if the stage's engine is open."""
        return stage in self._engines

    def engine(self, stage: str) -> Engine:
        """The open engine of a stage. Opening takes seconds, so do it early if that matters.

        Raises:
            BundleError: the bundle lacks the stage, a file of it is damaged, or the graph
                contradicts the manifest.
            EngineError: it cannot be opened, or the pipeline was closed.
        """
        engine = self._engines.get(stage)  # not behind calls that wait for the stage's thread
        return engine or _result(self._in_thread(stage, lambda: self._open(stage)))

    def submit(self, stage: str, feeds: Mapping[str, np.ndarray]) -> Future[Arrays]:
        """Have the stage's thread run its engine; returns at once. Errors: see :meth:`engine`."""
        return self._in_thread(stage, lambda: self._open(stage).run(feeds))

    def _in_thread(self, stage: str, work: Callable[[], _T]) -> Future[_T]:
        with self._lock:
            if self._closed:
                raise EngineError("the pipeline was closed", code="closed")
            if stage not in self._executors:
                self._executors[stage] = ThreadPoolExecutor(1, f"engine-{stage}")
            return self._executors[stage].submit(work)

    def _open(self, stage: str) -> Engine:
        """In the stage's thread."""
        if stage not in self._engines:
            self._engines[stage] = open_stage(
                self.bundle, stage, device=self._device, threads=self._threads
            )
            self.cost(stage)
        return self._engines[stage]

    def stack_inputs(self, windows: Windows) -> Arrays:
        """The inputs of the stack, in the order of `windows`; leading dimension n.

        Returns:
            `pixels` uint8 `[n, w, w, 3]`, `extent` int64 `[n, 2]` and `window` int64 `[n]`; or, if
            the bundle has a head, the head's `hidden` `[n, t, c]` and `window`.
        """
        feeds = {"pixels": windows.pixels, "extent": windows.extent, "window": windows.window}
        if self.bundle.has("head"):
            feeds = _result(self.submit("head", feeds))
        return {**feeds, "window": windows.window}

    def stack(self, feeds: Mapping[str, np.ndarray], batch: int | None = None) -> Arrays:
        """Run the window blocks.

        Args:
            feeds: as :meth:`stack_inputs` returns them, or any selection of their rows.
            batch: windows per run of the engine; None runs all at once.

        Returns:
            `tokens` `[n, t, c]` and the codec's tensors, each with leading dimension n.
        """
        total = len(feeds["window"])
        size = total if batch is None else batch
        if total == 0:
            raise EngineError("no windows to run the stack on")
        if size < 1:
            raise EngineError(f"batch is {size}, expected at least 1")
        self.engine("stack")  # opening is no part of the progress
        parts = []
        for start in range(0, total, size):
            part = {name: array[start : start + size] for name, array in feeds.items()}
            share = len(part["window"]) / total
            with self.work.piece(share * self.cost("stack"), "window layers"):
                parts.append(_result(self.submit("stack", part)))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def tail(self, outputs: Mapping[str, np.ndarray], windows: Windows) -> np.ndarray:
        """Run the global blocks and the neck on the tokens of every window.

        Args:
            outputs: the stack's, one row for each of `windows`, in the same order.
            windows: of the image; the tail supplies the tokens of all others, which are padding.

        Returns:
            the image embedding `[1, d, g, g]`, every number finite.

        Raises:
            EngineError: `outputs` do not fit, or the embedding is not finite.
        """
        feeds: Arrays = {"present": windows.present}
        for spec in self.bundle.stage("tail").inputs:
            if spec.name != "present":
                if spec.name not in outputs:
                    raise EngineError(f"the stack's output {spec.name} is missing")
                feeds[spec.name] = _scatter(outputs[spec.name], windows, spec.name)
        with self.work.piece(self.cost("tail"), "global layers"):
            return self._run("tail", feeds)["embedding"]

    def encode(
        self,
        windows: Windows,
        stack: Callable[[Windows], Arrays] | None = None,
        batch: int | None = None,
    ) -> Encoding:
        """The embedding of an image. Every way of computing one goes through here.

        Args:
            windows: of the image.
            stack: computes the stack's outputs for `windows`, such as `Offloader.stack`; None
                computes them here.
            batch: see :meth:`stack`.
        """
        began = time.perf_counter()
        if self.bundle.has("encoder"):
            feeds = {
                "pixels": _scatter(windows.pixels, windows, "pixels"),
                "extent": _scatter(windows.extent, windows, "extent"),
            }
            with self.work.piece(self.cost("encoder"), "encoder"):
                embedding = self._run("encoder", feeds)["embedding"]
            return Encoding(embedding, None, (time.perf_counter() - began) * 1000, 0.0)
        tokens = stack(windows) if stack else self.stack(self.stack_inputs(windows), batch)
        middle = time.perf_counter()
        embedding = self.tail(tokens, windows)
        end = time.perf_counter()
        return Encoding(embedding, tokens, (middle - began) * 1000, (end - middle) * 1000)

    def embed(self, windows: Windows, batch: int | None = None) -> np.ndarray:
        """The embedding of an image, computed here."""
        return self.encode(windows, batch=batch).embedding

    def decode(
        self,
        embedding: np.ndarray,
        point_coords: np.ndarray,
        point_labels: np.ndarray,
        mask_input: np.ndarray,
        has_mask_input: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode p prompts against one embedding.

        Args:
            embedding: `[1, d, g, g]`, from :meth:`embed` or :meth:`tail`.
            point_coords: float32 `[p, k, 2]`, (x, y) in pixels of the padded square; k may be 0.
            point_labels: float32 `[p, k]`: 1 foreground, 0 background, 2 and 3 the corners of a
                box, -1 the padding point SAM adds to points without a box.
            mask_input: float32 `[p, 1, 4g, 4g]`, low-resolution logits of an earlier answer.
            has_mask_input: float32 `[p]`, 1 where `mask_input` is used and 0 where not.

        Returns:
            low-resolution logits float32 `[p, 4, 4g, 4g]` and predicted IoU float32 `[p, 4]`,
            every number finite; index 0 is SAM's single mask, 1 to 3 its multimask answer.

        Raises:
            EngineError: the arrays do not fit, or an answer is not finite.
        """
        result = self._run(
            "decoder",
            {
                "embedding": embedding,
                "point_coords": point_coords,
                "point_labels": point_labels,
                "mask_input": mask_input,
                "has_mask_input": has_mask_input,
            },
        )
        return result["low_res_logits"], result["iou"]

    def _run(self, stage: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Run a stage whose outputs become masks, and refuse outputs that are not finite."""

        def run() -> Arrays:
            engine = self._open(stage)
            outputs = engine.run(feeds)
            for spec in engine.outputs:
                if not all_finite(outputs[spec.name], spec.dtype):
                    raise EngineError(
                        f"the {stage} of {self.bundle.path} returned {spec.name} with numbers that "
                        "are not finite, so no mask is made",
                        mend=f"`{verify_command(self.bundle.path)}` measures the engines of this "
                        "machine; if they pass, a node returned wrong tokens: --local computes "
                        "without nodes",
                        code="not_finite",
                    )
            return outputs

        return _result(self._in_thread(stage, run))

    def close(self) -> None:
        """Close every engine. Waits for calls that run; calls that wait for their turn fail."""
        with self._lock:
            self._closed = True
        for executor in self._executors.values():
            executor.shutdown(cancel_futures=True)
        with self._lock:
            engines, self._engines = [*self._engines.values()], {}
        for engine in engines:
            engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _scatter(rows: np.ndarray, windows: Windows, name: str) -> np.ndarray:
    """Rows put at their window's index among all windows; zeros elsewhere."""
    if len(rows) != len(windows):
        raise EngineError(f"{name} has {len(rows)} rows for {len(windows)} windows")
    full = np.zeros((len(windows.present), *rows.shape[1:]), rows.dtype)
    full[windows.window] = rows
    return full


def _result(future: Future[_T]) -> _T:
    try:
        return future.result()
    except CancelledError:
        raise EngineError("the pipeline was closed", code="closed") from None
