"""Exports a SAM checkpoint as a bundle: writes each stage and verifies it against the original."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec
from segment_anything.modeling import Sam
from torch import nn

from edge_common.errors import ExportError
from edge_common.files import explain_write_errors, move_folder, refuse_existing, scratch_folder
from edge_common.text import printable
from engines.bundle import Bundle, Manifest, Stage, hash_file, write_manifest

from . import models, stages, verify
from .golden import make_sample, sample_images, write_sample
from .onnx_export import stage_specs, write_float32_twin, write_plain_twin, write_stage
from .plain_form import write_plain
from .precision import TORCH_DTYPES, Precision, cast

_INSTEAD = "choose another --out"
Order = Literal["reordered", "stock"]
_SHARES = {
    "load": 3,
    "original": 58,
    "head": 14,
    "stack": 36,
    "tail": 25,
    "encoder": 45,
    "decoder": 8,
    "plain": 15,
    "end": 14,
}
"""Relative duration of the parts of an export, in CPU seconds of ViT-B."""
GOLDEN = "golden/0.npz"

UNADAPTED = (
    "these weights were not trained for reordered blocks, so masks will be poor: "
    "run `edge-runtime adapt` on the checkpoint and export what it writes"
)
BF16_TWIN = (
    "ONNX Runtime has no bfloat16 arithmetic on CPUs: the graphs were verified as float32 graphs "
    "holding the same bfloat16-rounded weights"
)


@dataclass(frozen=True)
class Result:
    """The bundle, the comparison of each stage with the original, and notes for the user."""

    bundle: Bundle
    rows: tuple[verify.Row, ...]
    notes: tuple[str, ...]


class Watcher:
    """Callbacks of an export; override those you need."""

    def begin(self, steps: int, total: float) -> None:
        """``steps`` calls of :meth:`step` follow; their shares add up to ``total``."""

    def step(self, text: str, share: float) -> None:
        """The next step begins and takes about ``share`` of the total."""

    def row(self, row: verify.Row) -> None:
        """A stage was compared with the original and passed or failed."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    model: str | None = None,
    order: Order = "reordered",
    precision: Precision = "fp32",
    head_blocks: int | None = None,
    node_only: bool = False,
    watcher: Watcher | None = None,
) -> Result:
    """Export ``checkpoint`` as the bundle ``out``, which appears whole and verified or not at all.

    Args:
        checkpoint: of ``segment_anything``, or saved by this project.
        out: directory to make; must not exist.
        model: the expected model; None recognises it by its weights.
        order: ``stock`` writes one encoder for a single device, ``reordered`` the stages to split.
        precision: of matrices and tokens.
        head_blocks: K >= 0 keeps the patch embedding and K window blocks on the edge; None sends
            pixels to nodes.
        node_only: write the stack alone, as nodes need it.
        watcher: receives progress.

    Raises:
        CheckpointError: the checkpoint can't be read or is of another model.
        ExportError: the request is contradictory, ``out`` exists or can't be written, or a stage
            misses its tolerance.
    """
    watcher = watcher or Watcher()
    if order == "stock" and head_blocks is not None:
        raise ExportError(
            "--head-blocks splits reordered bundles, not one of stock order",
            mend="leave it out with --order stock",
        )
    if order == "stock" and node_only:
        raise ExportError(
            "--for node needs a stack, and a stock bundle has none", mend="use --order reordered"
        )
    check_out(out)
    names = _stage_names(order, head_blocks, node_only)
    shares = [_SHARES["load"], _SHARES["original"], *(_SHARES[name] for name in names)]
    shares += [_SHARES["plain"], 1 if node_only else _SHARES["end"]]
    watcher.begin(len(shares), sum(shares))
    watcher.step(f"loading {checkpoint.name}", _SHARES["load"])
    opened = models.open_checkpoint(checkpoint, model)
    _check_request(opened, order, head_blocks)
    room = _bytes_needed(opened, precision)
    with (
        scratch_folder(out, room=room, error=ExportError, instead=_INSTEAD) as place,
        explain_write_errors(out, ExportError, _INSTEAD),
    ):
        work, scratch = place / "bundle", place / "twin"
        work.mkdir()
        scratch.mkdir()
        sam = opened.load()
        if order == "reordered":
            models.reorder(sam)
        sam.requires_grad_(False)
        watcher.step("running the original model", _SHARES["original"])
        images = sample_images(stages.geometry_of(sam))
        samples = [make_sample(sam, image, head_blocks) for image in images]
        manifest = _manifest(sam, order, precision, head_blocks, checkpoint, out, node_only)
        twin = msgspec.structs.replace(manifest, precision="fp32", stages={}, golden={})
        tolerance, rows = verify.TOLERANCES[precision], []

        def check(row: verify.Row) -> None:
            rows.append(row)
            watcher.row(row)
            verify.require(row, precision, tolerance)

        plain: dict[str, tuple[Stage, Path]] = {}
        for name in names:
            watcher.step(f"writing and verifying {name}", _SHARES[name])
            stage = _write(name, sam, precision, head_blocks, work)
            stage = write_plain(stage, work, manifest.geometry.windows)
            assert stage.plain is not None
            manifest.stages[name] = stage
            run, at, plain[name] = stage, work, (stage, work / stage.plain.file)
            if precision == "bf16":
                run, at = write_float32_twin(stage, work, scratch), scratch
                twin.stages[name] = run
                plain[name] = run, write_plain_twin(stage, work, run, scratch)
            # The first sample goes through the whole bundle at the end, so long computations are
            # done for the second sample only.
            later = 0 if node_only or name == "decoder" else 1
            once = samples[later:] if name in ("tail", "encoder") else samples
            unfinished = later if once is samples else 0
            check(
                verify.verify_stage(
                    name, run, at / run.file, once, sam, tolerance, unfinished=unfinished
                )
            )
            gc.collect()
        watcher.step("verifying the plain forms", _SHARES["plain"])
        for row in verify.verify_plain(plain, samples[0], sam, tolerance):
            check(row)
        if node_only:
            watcher.step("finishing", 1)
        else:
            watcher.step("running the bundle end to end", _SHARES["end"])
        write_sample(work / GOLDEN, samples[0], manifest.stages)
        manifest = msgspec.structs.replace(manifest, golden={GOLDEN: hash_file(work / GOLDEN)})
        write_manifest(work, manifest)
        bundle = Bundle.load(work)
        if not node_only:
            if precision == "bf16":
                write_manifest(scratch, twin)
                check(verify.verify_bundle(Bundle.load(scratch), samples[0], tolerance))
            else:
                check(verify.verify_bundle(bundle, samples[0], tolerance))
        try:
            move_folder(work, out)
        except FileExistsError:
            check_out(out)
            raise
    notes = []
    if order == "reordered" and not sam.adapted:
        notes.append(UNADAPTED)
    if precision == "bf16":
        notes.append(BF16_TWIN)
    return Result(Bundle.load(out), tuple(rows), tuple(notes))


def _stage_names(order: Order, head_blocks: int | None, node_only: bool) -> list[str]:
    if order == "stock":
        return ["encoder", "decoder"]
    if node_only:
        return ["stack"]
    return ([] if head_blocks is None else ["head"]) + ["stack", "tail", "decoder"]


def _check_request(checkpoint: models.Checkpoint, order: Order, head_blocks: int | None) -> None:
    """Raise ExportError if this checkpoint cannot be exported so. No weights are read."""
    if order == "stock" and checkpoint.order == models.REORDERED:
        raise ExportError(
            f"{checkpoint.path} holds weights trained for reordered blocks; they make no sense in "
            "stock order",
            mend="leave out --order stock, or name the checkpoint they were adapted from",
        )
    spec = models.spec_of(checkpoint.model)
    windowed = spec.depth - len(spec.global_blocks)
    if head_blocks is not None and not 0 <= head_blocks < windowed:
        raise ExportError(
            f"--head-blocks {head_blocks}: {spec.name} has {windowed} window blocks, of which "
            "nodes need at least one",
            mend=f"give 0 to {windowed - 1}",
        )


def _write(
    name: str, sam: Sam, precision: Precision, head_blocks: int | None, directory: Path
) -> Stage:
    make: dict[str, Callable[[], nn.Module]] = {
        "head": lambda: stages.make_head(sam, head_blocks or 0),
        "stack": lambda: stages.make_stack(sam, head_blocks),
        "tail": lambda: stages.Tail(sam),
        "encoder": lambda: stages.Encoder(sam),
        "decoder": lambda: stages.Decoder(sam),
    }
    inputs, outputs = stage_specs(name, stages.geometry_of(sam), precision, head_blocks)
    return write_stage(name, cast(make[name](), precision), inputs, outputs, directory)


def _manifest(
    sam: Sam,
    order: Order,
    precision: Precision,
    head_blocks: int | None,
    checkpoint: Path,
    out: Path,
    node_only: bool,
) -> Manifest:
    command = ["edge-runtime export", f"--model {sam.model_name}"]
    command += [f"--checkpoint {checkpoint.name}", f"--out {out.name}"]
    command += [f"--order {order}", f"--precision {precision}"]
    command += [] if head_blocks is None else [f"--head-blocks {head_blocks}"]
    command += ["--for node"] if node_only else []
    packages = ("edge-runtime", "torch", "segment-anything", "onnx", "onnxruntime")
    return Manifest(
        model=sam.model_name,
        geometry=stages.geometry_of(sam),
        order=order,
        adapted=bool(sam.adapted),
        precision=precision,
        head_blocks=head_blocks,
        weights_sha256=models.weights_hash(sam),
        stages={},
        made={
            "command": printable(" ".join(command)),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{name: _version(name) for name in packages},
        },
        mask_threshold=float(sam.mask_threshold),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it may be installed as onnxruntime-gpu
        return "unknown"


def _bytes_needed(checkpoint: models.Checkpoint, precision: Precision) -> int:
    """Disk space of an export at its peak: weights, constants (a tenth), float32 twins."""
    count = sum(weight.numel() for weight in checkpoint.state.values())
    each = TORCH_DTYPES[precision].itemsize + (4 if precision == "bf16" else 0)
    return int(1.1 * count * each) + (16 << 20)


def check_out(out: Path) -> None:
    """Raises ExportError if there is something at ``out``."""
    refuse_existing(out, ExportError, _INSTEAD)
