from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from edge_common.errors import ExportError
from engines.bundle import Bundle, hash_file, stage_digest, write_manifest
from exporters import verify
from exporters.golden import Sample, make_sample, sample_images
from exporters.models import load_checkpoint, reorder
from exporters.stages import geometry_of
from exporters.verify import (
    TOLERANCES,
    Row,
    require,
    verify_bundle,
    verify_plain,
    verify_stage,
)

FP32 = TOLERANCES["fp32"]
STAGES = ["stack", "tail", "decoder"]


@pytest.fixture(scope="module")
def original(random_checkpoint: Path) -> Any:
    return reorder(load_checkpoint(random_checkpoint)).requires_grad_(False)


@pytest.fixture(scope="module")
def sample(original: Any) -> Sample:
    return make_sample(original, sample_images(geometry_of(original))[0])


def test_samples_cover_all_kinds_of_padding(original: Any) -> None:
    geometry = geometry_of(original)
    strip, square = (make_sample(original, i).windows for i in sample_images(geometry))
    assert 0 < strip.present.sum() < len(strip.present)
    assert square.present.all()
    for windows in (strip, square):
        assert (windows.extent % geometry.patch_size != 0).any()


def test_every_exported_stage_has_a_row(random_bundle: Path, original: Any, sample: Sample) -> None:
    bundle = Bundle.load(random_bundle)
    for name, stage in bundle.manifest.stages.items():
        row = verify_stage(name, stage, bundle.stage_path(name), [sample], original, FP32)
        assert row.passed
        assert row.stage == name
        assert row.cosine > 0.999999
        assert row.mask_iou > 0.9999
        assert 0 < row.max_abs < 1e-4
    assert verify_bundle(bundle, sample, FP32).passed


def nudge(stage: str, name: str) -> Callable[[ir.Model], None]:
    """Change the first initialiser whose name has this ending, by a little."""

    def change(model: ir.Model) -> None:
        value = next(v for k, v in model.graph.initializers.items() if k.endswith(name))
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.02), name=value.name)

    change.__name__ = f"{stage} {name}"
    return change


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("stack", "blocks.0.attn.rel_h"),
        ("stack", "blocks.3.norm2.weight"),
        ("tail", "absent"),
        ("tail", "blocks.1.attn.rel_w"),
        ("decoder", "output_tokens"),
    ],
)
def test_a_weight_off_by_two_percent_is_noticed(
    random_bundle: Path,
    original: Any,
    sample: Sample,
    tmp_path: Path,
    name: str,
    weight: str,
) -> None:
    bundle = Bundle.load(random_bundle)
    model = ir.external_data.load_to_model(ir.load(bundle.stage_path(name)))
    nudge(name, weight)(model)
    wrong = tmp_path / "wrong.onnx"
    ir.save(model, wrong)
    row = verify_stage(name, bundle.stage(name), wrong, [sample], original, FP32)
    assert not row.passed
    with pytest.raises(ExportError, match=f"{name} differs"):
        require(row, "fp32", FP32)


def test_plain_forms_pass(random_bundle: Path, original: Any, sample: Sample) -> None:
    bundle = Bundle.load(random_bundle)
    graphs = {stage: (bundle.stage(stage), bundle.plain_path(stage)) for stage in STAGES}
    assert all(row.passed for row in verify_plain(graphs, sample, original, FP32))


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("stack", "blocks.0.attn.rel_h"),
        ("stack", "blocks.3.norm2.weight"),
        ("tail", "absent"),
        ("tail", "blocks.1.attn.rel_w"),
        ("decoder", "output_tokens"),
    ],
)
def test_a_weight_of_a_plain_form_off_by_two_percent_is_noticed(
    random_bundle: Path, original: Any, sample: Sample, tmp_path: Path, name: str, weight: str
) -> None:
    """In the row of this stage, and in no row before it."""
    bundle = Bundle.load(random_bundle)
    graphs = {stage: (bundle.stage(stage), bundle.plain_path(stage)) for stage in STAGES}
    model = ir.external_data.load_to_model(ir.load(bundle.plain_path(name)))
    nudge(name, weight)(model)
    wrong = tmp_path / "wrong.onnx"
    ir.save(model, wrong)
    graphs[name] = bundle.stage(name), wrong
    rows = verify_plain(graphs, sample, original, FP32)
    assert [row.stage for row in rows] == [f"{stage} (plain)" for stage in STAGES]
    values = {row.stage.split()[0]: row for row in rows}
    assert not values[name].passed
    assert all(values[s].error < FP32.error for s in STAGES[: STAGES.index(name)])
    if name == "decoder":
        assert values["tail"].passed
    else:  # the masks at the end come from the plain form too
        assert values["tail"].mask_iou == values["stack"].mask_iou


@pytest.mark.parametrize("weight", ["blocks.0.attn.rel_w", "absent"])
def test_end_to_end_notices_stages_of_two_models(
    random_bundle: Path, original: Any, sample: Sample, tmp_path: Path, weight: str
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(random_bundle, mixed)
    model = ir.load(mixed / "tail.onnx")
    nudge("tail", weight)(model)
    ir.save(model, mixed / "tail.onnx")
    manifest = Bundle.load(mixed).manifest
    tail = manifest.stages["tail"]
    files = {name: hash_file(mixed / name) for name in tail.files}
    tail = msgspec.structs.replace(tail, files=files, sha256=stage_digest(files))
    stages = {**manifest.stages, "tail": tail}
    write_manifest(mixed, msgspec.structs.replace(manifest, stages=stages))
    assert not verify_bundle(Bundle.load(mixed), sample, FP32).passed


def row(**changes: Any) -> Row:
    values = {"stage": "tail", "cosine": 1.0, "max_abs": 0.0, "error": 0.0, "mask_iou": 1.0}
    return Row(**{**values, "finite": True, "passed": False, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cosine": 0.5}, r"cosine 0.5 \(needed: >= 0.99999\)"),
        ({"error": 0.5}, r"relative error 0.5 \(needed: <= 0.0003\)"),
        ({"mask_iou": 0.5}, r"mask IoU 0.5 \(needed: >= 0.999\)"),
        ({"finite": False}, "NaN or Inf"),
    ],
)
def test_missed_tolerances_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        require(row(**changes), "fp32", FP32)


def test_bf16_is_recommended_where_fp16_overflows() -> None:
    with pytest.raises(ExportError, match="--precision bf16"):
        require(row(finite=False), "fp16", TOLERANCES["fp16"])
    require(row(passed=True), "fp16", TOLERANCES["fp16"])


def test_the_worst_of_all_outputs_decides() -> None:
    ones, masks = np.ones((2, 8), np.float32), np.ones((1, 4, 2, 2), np.float32)
    bad = ones.copy()
    bad[1, ::2] = -1  # the second window only
    result = verify._row("stack", [(ones, ones), (bad, ones)], [(masks, masks)], FP32)
    assert result.cosine == pytest.approx(0)
    assert result.max_abs == 2
    assert not result.passed
    result = verify._row("stack", [(ones, ones)], [(masks, masks), (-masks, masks)], FP32)
    assert result.mask_iou == 0.5
    assert not result.passed
    result = verify._row("stack", [(ones * np.nan, ones)], [(masks, masks)], FP32)
    assert not result.finite
    assert not result.passed


def test_two_empty_sets_of_masks_agree() -> None:
    ones, nothing = np.ones((1, 8), np.float32), -np.ones((1, 4, 2, 2), np.float32)
    assert verify._row("stack", [(ones, ones)], [(nothing, nothing)], FP32).mask_iou == 1
    zeros = np.zeros_like(ones)
    assert verify._row("stack", [(zeros, zeros)], [(nothing, nothing)], FP32).passed
    assert not verify._row("stack", [(ones, zeros)], [(nothing, nothing)], FP32).passed
