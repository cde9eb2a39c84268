"""Does what was written compute what the original computes?

Every stage runs in ONNX Runtime, through the engine that will serve it, on samples whose answers
come from the untouched ``segment_anything`` modules (:mod:`exporters.golden`). A stage is fed the
reference's inputs, so that its row tells of it alone; its mask IoU is measured by putting its
output in the place of the original's and letting the original finish. One last row runs the whole
bundle through :class:`engines.pipeline.Pipeline`. A row that misses its tolerance, or holds a
NaN, raises; nothing is repaired here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam

from engines.bundle import Bundle, Stage
from engines.errors import ExportError
from engines.ort import OrtEngine
from engines.parity import TOLERANCES as TOLERANCES
from engines.parity import Comparison, Tolerance, compare
from engines.pipeline import Pipeline
from engines.wire import from_wire

from .golden import Arrays, Sample, decode, finish
from .precision import Precision


@dataclass(frozen=True, kw_only=True)
class Row(Comparison):
    """How one stage compares with the original, worst over all samples and outputs.

    Attributes:
        stage: name of the stage, or ``end to end``.
        passed: whether all of it is within tolerance.
    """

    stage: str
    mask_iou: float
    passed: bool


def verify_stage(
    name: str, stage: Stage, path: Path, samples: Sequence[Sample], sam: Sam, tolerance: Tolerance
) -> Row:
    """Compare the stage in file ``path`` with the original on every sample.

    Raises:
        EngineError: ONNX Runtime can't open or run it.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    masks: list[tuple[np.ndarray, np.ndarray]] = []
    with OrtEngine(path, device="cpu") as engine:
        answers = [engine.run(sample.feeds(name, stage)) for sample in samples]
    for sample, answer in zip(samples, answers, strict=True):
        got = {s.name: from_wire(answer[s.name], s.dtype) for s in stage.outputs}
        wanted = sample.expected(name, stage)
        pairs += [(got[key], wanted[key]) for key in wanted]
        masks.append((_masks(name, got, sample, sam), sample.arrays["decoder.low_res_logits"]))
    return _row(name, pairs, masks, tolerance)


def verify_bundle(bundle: Bundle, sample: Sample, tolerance: Tolerance) -> Row:
    """Compare the image embedding and the masks of a whole bundle, run as a deployment runs it."""
    prompts = ("point_coords", "point_labels", "mask_input", "has_mask_input")
    with Pipeline(bundle, device="cpu") as pipeline:
        embedding = pipeline.embed(sample.windows)
        logits, iou = pipeline.decode(embedding, *(sample.arrays[f"decoder.{k}"] for k in prompts))
    expected = [sample.arrays[f"decoder.{k}"] for k in ("embedding", "low_res_logits", "iou")]
    pairs = list(zip((embedding, logits, iou), expected, strict=True))
    return _row("end to end", pairs, [(logits, expected[1])], tolerance)


def require(row: Row, precision: Precision, tolerance: Tolerance) -> None:
    """Raise ExportError, saying what was missed and what may help, unless ``row`` passed."""
    if row.passed:
        return
    advice = {
        "fp32": "the checkpoint may hold values no float32 graph can reproduce",
        "fp16": "the weights may be too large for fp16: try --precision bf16 or fp32",
        "bf16": "the weights do not bear bf16: try --precision fp16 or fp32",
    }[precision]
    if not row.finite:
        raise ExportError(f"{row.stage} gives NaN or Inf in {precision}; {advice}")
    misses = ", ".join(row.misses(tolerance))
    raise ExportError(f"{row.stage} differs from the original in {precision}: {misses}; {advice}")


def _masks(name: str, got: Arrays, sample: Sample, sam: Sam) -> np.ndarray:
    """Logits [p, 4, 4g, 4g] of the original when ``got`` stands in for one stage's outputs."""
    if name == "decoder":
        return got["low_res_logits"]
    if name in ("tail", "encoder"):
        embedding = torch.from_numpy(got["embedding"])
    else:
        (tokens,) = got.values()
        done = (min if name == "head" else max)(sample.blocks)
        every = sample.blocks[done].clone()
        every[torch.from_numpy(sample.windows.present)] = torch.from_numpy(tokens)
        embedding = finish(sam, every, done)
    prompts = {k.removeprefix("decoder."): v for k, v in sample.arrays.items()}
    return decode(sam, embedding, prompts)[0].numpy()


def _row(
    stage: str,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    masks: Sequence[tuple[np.ndarray, np.ndarray]],
    tolerance: Tolerance,
) -> Row:
    found = compare(pairs, masks)
    return Row(stage=stage, passed=not found.misses(tolerance), **asdict(found))
