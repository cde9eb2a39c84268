"""Compares written stages with the original model.

Stages run in ONNX Runtime, on samples with the outputs of the unchanged ``segment_anything``
modules (:mod:`exporters.golden`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam

from edge_common.errors import ExportError
from engines.bundle import Bundle, Stage
from engines.dtypes import to_float32
from engines.ort import OrtEngine
from engines.parity import TOLERANCES as TOLERANCES
from engines.parity import Comparison, Pair, Tolerance, compare
from engines.pipeline import Pipeline

from .golden import Arrays, Sample, decode, finish
from .precision import Precision


@dataclass(frozen=True, kw_only=True)
class Row(Comparison):
    """How one stage compares with the original, worst over all samples and outputs.

    Attributes:
        stage: name of the stage, or ``end to end``.
        passed: whether everything is within tolerance.
    """

    stage: str
    mask_iou: float
    passed: bool


def verify_stage(
    name: str,
    stage: Stage,
    path: Path,
    samples: Sequence[Sample],
    sam: Sam,
    tolerance: Tolerance,
    *,
    unfinished: int = 0,
) -> Row:
    """Compare the stage in file ``path`` with the original on every sample.

    The stage gets the reference's inputs, so that the row measures this stage alone. For the masks,
    the original continues from the stage's outputs, which takes most of the time.

    Args:
        unfinished: number of samples, from the first on, whose masks are not compared here, because
            :func:`verify_bundle` compares them.

    Raises:
        EngineError: ONNX Runtime can't open or run it.
    """
    pairs: list[Pair] = []
    masks: list[Pair] = []
    with OrtEngine(path, device="cpu") as engine:
        answers = [_run(engine, name, stage, sample) for sample in samples]
    for number, (sample, got) in enumerate(zip(samples, answers, strict=True)):
        pairs += _pairs(name, stage, got, sample)
        if number >= unfinished:
            masks.append((_masks(name, got, sample, sam), sample.arrays["decoder.low_res_logits"]))
    return _row(name, pairs, masks, tolerance)


def verify_plain(
    graphs: Mapping[str, tuple[Stage, Path]], sample: Sample, sam: Sam, tolerance: Tolerance
) -> list[Row]:
    """Compare the plain forms of all stages with the original, each fed by the stage before.

    They share the weights of the main forms, so one sample is enough. Errors add up, and the masks
    at the end count for every stage, so this is stricter than :func:`verify_stage`.

    Args:
        graphs: by name, in the order in which they run.

    Raises:
        EngineError: ONNX Runtime can't open or run one.
    """
    fed, found = sample, {}
    for name, (stage, path) in graphs.items():
        with OrtEngine(path, device="cpu") as engine:
            found[name] = _run(engine, name, stage, fed)
        fed = _fed(fed, name, found[name])
    last = next(name for name in reversed(found) if name != "decoder")
    masks = {last: _masks(last, found[last], sample, sam)}
    masks["decoder"] = found.get("decoder", {}).get("low_res_logits", masks[last])
    wanted = sample.arrays["decoder.low_res_logits"]
    return [
        _row(
            f"{name} (plain)",
            _pairs(name, graphs[name][0], got, sample),
            [(masks.get(name, masks[last]), wanted)],
            tolerance,
        )
        for name, got in found.items()
    ]


def _run(engine: OrtEngine, name: str, stage: Stage, sample: Sample) -> Arrays:
    answer = engine.run(sample.feeds(name, stage))
    return {s.name: to_float32(answer[s.name], s.dtype) for s in stage.outputs}


def _pairs(name: str, stage: Stage, got: Arrays, sample: Sample) -> list[Pair]:
    return [(got[key], wanted) for key, wanted in sample.expected(name, stage).items()]


def _fed(sample: Sample, name: str, got: Arrays) -> Sample:
    """The sample with a stage's outputs in place of the reference's."""
    if name == "head":
        new = {"stack.hidden": got["hidden"]}
    elif name == "stack":
        tokens = np.zeros_like(sample.arrays["tail.tokens"])
        tokens[sample.windows.present] = got["tokens"]
        new = {"tail.tokens": tokens}
    else:
        new = {"decoder.embedding": got["embedding"]} if "embedding" in got else {}
    return replace(sample, arrays={**sample.arrays, **new})


def verify_bundle(bundle: Bundle, sample: Sample, tolerance: Tolerance) -> Row:
    """Compare the image embedding and the masks of a whole bundle, run by :class:`Pipeline`."""
    prompts = ("point_coords", "point_labels", "mask_input", "has_mask_input")
    with Pipeline(bundle, device="cpu") as pipeline:
        embedding = pipeline.embed(sample.windows)
        logits, iou = pipeline.decode(embedding, *(sample.arrays[f"decoder.{k}"] for k in prompts))
    expected = [sample.arrays[f"decoder.{k}"] for k in ("embedding", "low_res_logits", "iou")]
    pairs = list(zip((embedding, logits, iou), expected, strict=True))
    return _row("end to end", pairs, [(logits, expected[1])], tolerance)


def require(row: Row, precision: Precision, tolerance: Tolerance) -> None:
    """Raise ExportError unless ``row`` passed; it says what was missed and what may help."""
    if row.passed:
        return
    advice = {
        "fp32": "use another checkpoint: no float32 graph may reproduce its values",
        "fp16": "try --precision bf16 or fp32: the weights may be too large for fp16",
        "bf16": "try --precision fp16 or fp32: the weights lose too much in bf16",
    }[precision]
    if not row.finite:
        raise ExportError(f"{row.stage} gives NaN or Inf in {precision}", mend=advice)
    misses = ", ".join(row.misses(tolerance))
    raise ExportError(
        f"{row.stage} differs from the original in {precision}: {misses}", mend=advice
    )


def _masks(name: str, got: Arrays, sample: Sample, sam: Sam) -> np.ndarray:
    """Logits [p, 4, 4g, 4g] of the original with ``got`` in place of a stage's outputs."""
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
