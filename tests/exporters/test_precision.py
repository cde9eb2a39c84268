from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from engines.ort import OrtEngine
from exporters.onnx_export import stage_specs, write_float32_twin, write_stage
from exporters.precision import TORCH_DTYPES, cast
from exporters.stages import Decoder, Tail, geometry_of, make_stack


def build(name: str, sam: Any) -> torch.nn.Module:
    return {"stack": lambda: make_stack(sam, None), "tail": lambda: Tail(sam)}.get(
        name, lambda: Decoder(sam)
    )()


def write(name: str, sam: Any, precision: Any, directory: Path) -> Any:
    inputs, outputs = stage_specs(name, geometry_of(sam), precision)
    return write_stage(name, cast(build(name, sam), precision), inputs, outputs, directory)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cast_changes_neither_the_original_nor_fragile_parts(tiny_sam: Any, precision: Any) -> None:
    before = {k: v.clone() for k, v in tiny_sam.state_dict().items()}
    stage = Decoder(tiny_sam)
    twin = cast(stage, precision)
    assert all(torch.equal(v, before[k]) for k, v in tiny_sam.state_dict().items())
    assert {v.dtype for v in stage.state_dict().values()} == {torch.float32}
    found = {k: v.dtype for k, v in twin.state_dict().items()}
    chosen = TORCH_DTYPES[precision]
    assert found["blocks.0.self_attn.q_proj.weight"] == chosen
    assert found["upscale.up1.weight"] == chosen
    assert found["image_pe"] == chosen
    for fragile in ("blocks.0.norm1.weight", "prompts.gaussian", "prompts.lift.weight"):
        assert found[fragile] == torch.float32
    assert found["iou.layers.0.weight"] == found["hyper.3.layers.2.bias"] == torch.float32


def test_cast_shares_tensors_that_need_no_conversion(tiny_sam: Any) -> None:
    twin = cast(make_stack(tiny_sam, None), "fp32")
    lin1 = tiny_sam.image_encoder.blocks[0].mlp.lin1.weight
    assert twin.blocks[0].mlp.lin1.weight.data_ptr() == lin1.data_ptr()


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request: pytest.FixtureRequest, tiny_sam: Any, tmp_path_factory: Any) -> Any:
    """Directory and stages of one 16-bit precision."""
    directory = tmp_path_factory.mktemp(request.param)
    names = ("stack", "tail", "decoder")
    return directory, {n: write(n, tiny_sam, request.param, directory) for n in names}


@pytest.mark.slow
def test_fragile_parts_of_the_graphs_are_float32(half: Any) -> None:
    directory, written = half
    small = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    counted = dict.fromkeys(("LayerNormalization", "Softmax", "Attention", "MatMul"), 0)
    for name, stage in written.items():
        model = ir.load(directory / stage.file)
        for node in model.graph:
            if node.op_type in ("LayerNormalization", "Softmax", "Sin", "Cos"):
                assert {v.dtype for v in node.inputs if v} == {ir.DataType.FLOAT}
            if node.op_type == "Attention":
                assert {v.dtype for v in node.inputs} <= small
            if node.op_type == "MatMul" and name != "decoder":
                assert {v.dtype for v in node.inputs} <= small
            if node.op_type in counted:
                counted[node.op_type] += 1
    assert min(counted.values()) > 4, counted
    assert {s.dtype for s in written["stack"].outputs} <= {"float16", "bfloat16"}
    for name in ("tail", "decoder"):
        assert {s.dtype for s in written[name].outputs} == {"float32"}


def test_weights_take_half_the_space(half: Any, tiny_sam: Any, tmp_path: Path) -> None:
    directory, written = half
    whole = write("stack", tiny_sam, "fp32", tmp_path)

    def size(folder: Path, stage: Any) -> int:
        return sum((folder / file).stat().st_size for file in stage.files)

    assert size(directory, written["stack"]) < 0.62 * size(tmp_path, whole)


def test_the_float32_twin_is_the_same_graph_with_rounded_weights(
    tiny_sam: Any, tmp_path: Path
) -> None:
    source, target = tmp_path / "bf16", tmp_path / "twin"
    source.mkdir()
    target.mkdir()
    stage = write("stack", tiny_sam, "bf16", source)
    twin = write_float32_twin(stage, source, target)
    model, other = ir.load(source / stage.file), ir.load(target / twin.file)
    onnx.checker.check_model(str(target / twin.file), full_check=True)
    assert [n.op_type for n in model.graph] == [n.op_type for n in other.graph]
    assert {s.dtype for s in (*twin.inputs, *twin.outputs)} == {"uint8", "int64", "float32"}
    rounded = 0
    for name, value in model.graph.initializers.items():
        was, now = value.const_value, other.graph.initializers[name].const_value
        assert was is not None
        assert now is not None
        assert now.dtype != ir.DataType.BFLOAT16
        np.testing.assert_array_equal(now.numpy(), was.numpy().astype(now.numpy().dtype))
        rounded += was.dtype == ir.DataType.BFLOAT16
    assert rounded > 10
    lin1 = tiny_sam.image_encoder.blocks[0].mlp.lin1.weight
    wanted = lin1.bfloat16().float().numpy()
    held = [v.const_value.numpy() for v in other.graph.initializers.values() if v.const_value]
    assert any(
        a.shape in (wanted.shape, wanted.T.shape)
        and (np.array_equal(a, wanted) or np.array_equal(a, wanted.T))
        for a in held
    )
    with OrtEngine(target / twin.file, threads=1, device="cpu") as engine:
        w = geometry_of(tiny_sam).window_pixels
        tokens = engine.run(
            {
                "pixels": np.full((1, w, w, 3), 90, np.uint8),
                "extent": np.array([[w, w]]),
                "window": np.array([0]),
            }
        )["tokens"]
    assert tokens.dtype == np.float32
    assert np.isfinite(tokens).all()
