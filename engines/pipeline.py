"""The whole model in one process: windows, stack, tail, decoder, and no network.

Local mode, the predictor, the exporters' verification and every "offloaded equals local" check use
it; an offloaded run differs only in who computed the stack. Stages are opened by
:func:`engines.selection.open_stage` when first needed and kept until :meth:`Pipeline.close`; one
caller at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from edge_common.errors import EngineError
from edge_common.progress import Progress
from engines.bundle import Bundle
from engines.dtypes import all_finite
from engines.engine import Device, Engine
from engines.plan import verify_command
from engines.selection import open_stage
from engines.windows import Windows


class Pipeline:
    """Run a bundle's stages by name. Use it as a context manager, or call :meth:`close`.

    Args:
        bundle: a full, stock or node bundle; a stage it does not hold is a BundleError when used.
        threads: CPU threads of each engine; None means every core this process may use.
        device: which engines run the stages, see :data:`engines.engine.Device`.

    Attributes:
        work: is told what runs, for whoever watches; see :meth:`cost`.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, device: Device = "auto"
    ) -> None:
        self.bundle = bundle
        self._threads = threads
        self._device: Device = device
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.work = Progress()
        self._costs: dict[str, float] = {}

    def cost(self, stage: str) -> float:
        """About how much there is to compute in one run of a stage on a whole image, in a unit of
        its own; 0 for those that take little."""
        if stage in self._costs:  # the files need not be there once the engine is open
            return self._costs[stage]
        geometry = self.bundle.geometry
        # Every weight is used once for each token; attention over the whole image is as much again,
        # and slower.
        tokens = {
            "stack": geometry.windows * geometry.tokens_per_window,
            "tail": 3 * geometry.grid**2,
            "encoder": 2 * geometry.grid**2,
        }
        self._costs[stage] = float(self.bundle.size(stage) * tokens.get(stage, 0))
        return self._costs[stage]

    def is_open(self, stage: str) -> bool:
        """Whether the stage's engine is open."""
        return stage in self._engines

    def engine(self, stage: str) -> Engine:
        """The opened engine of a stage. Opening takes seconds, so do it early if that matters.

        Raises:
            BundleError: when the bundle lacks the stage, a file of it is damaged, or the graph
                contradicts the manifest.
            EngineError: when it cannot be opened.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the pipeline was closed")
            if stage not in self._engines:
                self._engines[stage] = open_stage(
                    self.bundle, stage, device=self._device, threads=self._threads
                )
                self.cost(stage)
            return self._engines[stage]

    def leave_home(self, windows: Windows) -> dict[str, np.ndarray]:
        """What the stack is fed, in the order of ``windows``; leading dimension n.

        Returns:
            ``pixels`` uint8 ``[n, w, w, 3]``, ``extent`` int64 ``[n, 2]`` and ``window`` int64
            ``[n]``; or, when the bundle has a head, the head's ``hidden`` ``[n, t, c]`` and
            ``window``.
        """
        feeds = {"pixels": windows.pixels, "extent": windows.extent, "window": windows.window}
        if self.bundle.has("head"):
            return {**self.engine("head").run(feeds), "window": windows.window}
        return feeds

    def stack(
        self, feeds: Mapping[str, np.ndarray], batch: int | None = None
    ) -> dict[str, np.ndarray]:
        """Run the window blocks.

        Args:
            feeds: as :meth:`leave_home` returns them, or any selection of their rows.
            batch: windows per run of the engine; None runs all at once.

        Returns:
            ``tokens`` ``[n, t, c]`` and whatever the codec adds, each with leading dimension n.
        """
        engine = self.engine("stack")
        total = len(feeds["window"])
        size = total if batch is None else batch
        if total == 0:
            raise EngineError("no windows to run the stack on")
        if size < 1:
            raise EngineError(f"batch is {size}, expected at least 1")
        parts = []
        for start in range(0, total, size):
            part = {name: array[start : start + size] for name, array in feeds.items()}
            share = len(part["window"]) / total
            with self.work.piece(share * self.cost("stack"), "window layers"):
                parts.append(engine.run(part))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def tail(self, outputs: Mapping[str, np.ndarray], windows: Windows) -> np.ndarray:
        """Run the global blocks and the neck on the tokens of every window.

        Args:
            outputs: the stack's, one row for each of ``windows``, in the same order.
            windows: of the image; the tail itself supplies the tokens of windows not among them.

        Returns:
            the image embedding ``[1, d, g, g]``, every number finite.

        Raises:
            EngineError: ``outputs`` do not fit, or the embedding is not finite.
        """
        engine = self.engine("tail")
        feeds: dict[str, np.ndarray] = {"present": windows.present}
        for spec in engine.inputs:
            if spec.name != "present":
                if spec.name not in outputs:
                    raise EngineError(f"the stack's output {spec.name} is missing")
                feeds[spec.name] = _scatter(outputs[spec.name], windows, spec.name)
        with self.work.piece(self.cost("tail"), "global layers"):
            return self._run("tail", feeds)["embedding"]

    def embed(self, windows: Windows, batch: int | None = None) -> np.ndarray:
        """The embedding of a cut image, as of :meth:`tail`; ``batch`` as in :meth:`stack`."""
        if self.bundle.has("encoder"):
            feeds = {
                "pixels": _scatter(windows.pixels, windows, "pixels"),
                "extent": _scatter(windows.extent, windows, "extent"),
            }
            with self.work.piece(self.cost("encoder"), "encoder"):
                return self._run("encoder", feeds)["embedding"]
        return self.tail(self.stack(self.leave_home(windows), batch), windows)

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
            embedding: ``[1, d, g, g]``, from :meth:`embed` or :meth:`tail`.
            point_coords: float32 ``[p, k, 2]``, (x, y) in pixels of the padded square; k may be 0.
            point_labels: float32 ``[p, k]``: 1 foreground, 0 background, 2 and 3 the corners of a
                box, -1 the padding point SAM adds to points without a box.
            mask_input: float32 ``[p, 1, 4g, 4g]``, low-resolution logits of an earlier answer.
            has_mask_input: float32 ``[p]``, 1 where ``mask_input`` counts and 0 where not.

        Returns:
            low-resolution logits float32 ``[p, 4, 4g, 4g]`` and predicted IoU float32 ``[p, 4]``,
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

    def _run(self, stage: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a stage whose outputs become masks, and refuse outputs that are not finite."""
        engine = self.engine(stage)
        outputs = engine.run(feeds)
        for spec in engine.outputs:
            if not all_finite(outputs[spec.name], spec.dtype):
                raise EngineError(
                    f"the {stage} of {self.bundle.path} returned {spec.name} with numbers that are "
                    "not finite, so no mask is made. "
                    f"`{verify_command(self.bundle.path)}` measures the engines of this machine; "
                    "if they pass, a node returned wrong tokens: --local computes without nodes"
                )
        return outputs

    def close(self) -> None:
        """Close every engine that was opened."""
        with self._lock:
            self._closed = True
            while self._engines:
                self._engines.popitem()[1].close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _scatter(rows: np.ndarray, windows: Windows, name: str) -> np.ndarray:
    """Rows of the windows at hand, put at their index among all windows; zeros elsewhere."""
    if len(rows) != len(windows):
        raise EngineError(f"{name} has {len(rows)} rows for {len(windows)} windows")
    full = np.zeros((len(windows.present), *rows.shape[1:]), rows.dtype)
    full[windows.window] = rows
    return full
