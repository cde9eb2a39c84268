"""The cases of the GPU benchmark: their inputs, expected outputs, operations and timing."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_common.errors import EdgeRuntimeError
from engines.geometry import Geometry

from . import flops
from .measure import randomise
from .models import MODELS, build_from_spec, reorder

WARM_UPS = 3  # for compilers and captured graphs
POINTS = 2  # per prompt: one point, and the padding point that upstream adds


Tensors = dict[str, Tensor]


class Absent(Exception):
    """The engine is not installed or cannot run this case; the text says why."""


@dataclass(frozen=True)
class Case:
    """One stage at one size: ``count`` windows, or prompts for the decoder."""

    stage: str
    count: int

    @property
    def size(self) -> dict[str, int]:
        return {"prompts" if self.stage == "decoder" else "windows": self.count}


@dataclass
class Loaded:
    """A stage ready to run.

    Attributes:
        run: runs it once, on the current stream, without waiting.
        read: returns the outputs of the last run by name, on any device.
        times: if the engine measures itself: returns the milliseconds of that many runs.
        weights_bytes: bytes of the stage's weights on the device, if known.
        notes: facts about how it runs.
        close: frees what the engine holds.
        stream: the torch stream it runs on; None: the current one.
        kept: objects that must live as long as this one.
    """

    run: Callable[[], Any]
    read: Callable[[], Tensors]
    times: Callable[[int], list[float]] | None = None
    weights_bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None
    stream: Any = None
    kept: Any = None


class Worker:
    """The child process: its request, its device and its events."""

    def __init__(self, request: Mapping[str, Any], out: Any) -> None:
        self.request, self._out = request, out
        self.device = torch.device(request["device"])
        self.on_gpu = self.device.type == "cuda"
        self.deadline = time.monotonic() + float(request["seconds"])
        self.directory = Path(request["directory"])
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def emit(self, event: str, **content: Any) -> None:
        self._out.write(json.dumps({"event": event, **content}) + "\n")
        self._out.flush()

    @property
    def model(self) -> str:
        return self.request["model"]

    @property
    def precision(self) -> str:
        return self.request["precision"]

    @property
    def bundle(self) -> Path:
        return self.directory / f"{self.model}-{self.precision}"

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def sam(self) -> Any:
        """The model, reordered, float32, on the device; the same weights in every process."""
        torch.manual_seed(0)
        with self.device:
            sam = build_from_spec(MODELS[self.model])
        sam = randomise(sam.to(self.device)).requires_grad_(False)
        return reorder(sam)

    def reference(self) -> Tensors:
        return torch.load(self.directory / f"{self.model}-reference.pt", weights_only=True)


def timed(
    worker: Worker, loaded: Loaded, seconds: float, warm_up: float | None = None
) -> tuple[list[float], int]:
    """Milliseconds of each run after a warm-up, and the number of warm-up runs.

    Runs follow one another without waiting, with an event between them, so a run's time is the
    device's time, or the launch's if that takes longer.
    """
    begun, warm_ups = time.perf_counter(), 0
    fewest, most = worker.request["runs"]
    least, least_seconds = worker.request["warm_up"]
    least_seconds = least_seconds if warm_up is None else warm_up
    stream = torch.cuda.stream(loaded.stream) if worker.on_gpu else contextlib.nullcontext()
    with stream:
        while warm_ups < least or (time.perf_counter() - begun < least_seconds and warm_ups < most):
            loaded.run()
            worker.wait()
            warm_ups += 1
        each = (time.perf_counter() - begun) / warm_ups
        before = time.perf_counter()
        loaded.run()
        worker.wait()
        each = min(each, time.perf_counter() - before)
        count = max(fewest, min(most, int(seconds / each)))
        if loaded.times is not None:
            return loaded.times(count), warm_ups + 1
        if not worker.on_gpu:
            times = []
            for _ in range(count):
                before = time.perf_counter()
                loaded.run()
                times.append(1e3 * (time.perf_counter() - before))
            return times, warm_ups + 1
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            loaded.run()
            event.record()
        worker.wait()
        return [a.elapsed_time(b) for a, b in pairwise(events)], warm_ups + 1


def chosen(geometry: Geometry, count: int) -> Tensor:
    """Indices of ``count`` windows: all; those of even rows and columns, which do not touch; or the
    first ones.
    """
    side = geometry.windows_per_side
    apart = [r * side + c for r in range(0, side, 2) for c in range(0, side, 2)]
    return torch.tensor(apart if count == len(apart) else range(count))


def feeds(case: Case, known: Tensors, geometry: Geometry, dtype: torch.dtype) -> Tensors:
    """The reference's inputs, for this project's stage."""
    if case.stage == "decoder":
        low = geometry.low_res
        return {
            "embedding": known["embedding"],
            "point_coords": known["coords"][: case.count],
            "point_labels": known["labels"][: case.count],
            "mask_input": torch.zeros(case.count, 1, low, low),
            "has_mask_input": torch.zeros(case.count),
        }
    if case.stage == "tail":
        present = torch.ones(geometry.windows, dtype=torch.bool)
        return {"tokens": known["tokens"].to(dtype), "present": present}
    window = chosen(geometry, case.count)
    cut_up = {"pixels": known["pixels"][window], "extent": known["extent"][window]}
    return cut_up if case.stage == "encoder" else {**cut_up, "window": known["window"][window]}


def expected(case: Case, known: Tensors, geometry: Geometry) -> Tensors:
    """The reference's outputs for :func:`feeds`."""
    if case.stage == "decoder":
        return {name: known[name][: case.count] for name in ("low_res_logits", "iou")}
    if case.stage == "stack":
        return {"tokens": known["tokens"][chosen(geometry, case.count)]}
    return {"embedding": known["embedding"]}


def outputs(case: Case) -> tuple[str, ...]:
    """Names of a stage's outputs, in order."""
    if case.stage == "decoder":
        return "low_res_logits", "iou"
    return ("tokens",) if case.stage == "stack" else ("embedding",)


def operations(worker: Worker, case: Case, geometry: Geometry) -> int:
    """Floating-point operations of a case, as :mod:`exporters.flops` counts them."""
    spec = MODELS[worker.model]
    if case.stage == "stack":
        return flops.stack(spec, chosen(geometry, case.count).tolist())
    if case.stage == "decoder":
        return flops.decoder(spec, case.count, POINTS)
    return flops.tail(spec) if case.stage == "tail" else flops.encoder(spec)


def geometry_of(model: str) -> Geometry:
    s = MODELS[model]
    return Geometry(s.image_size, s.patch_size, s.window_size, s.dim, s.out_chans)


def line(error: BaseException) -> str:
    """The first line of an error, with its class unless it is one of ours."""
    text = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
    return (
        text if isinstance(error, (EdgeRuntimeError, Absent)) else f"{type(error).__name__}: {text}"
    )
