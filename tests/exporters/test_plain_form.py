"""The plain form: the same function and weights, with operators that older parsers support."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_sams import SPECS

from edge_common.errors import ExportError
from engines.bundle import Bundle, hash_file, shipped_bundle
from engines.ort import OrtEngine
from exporters import stages, tensor_sizes
from exporters.measure import randomise
from exporters.models import MODELS, build_from_spec, reorder
from exporters.onnx_export import stage_specs, write_float32_twin, write_plain_twin, write_stage
from exporters.plain_form import OPERATORS, queries_per_block, write_plain
from exporters.precision import Precision, cast

LOGITS_OF_A_QUERY = 4 * 4 * 576  # bytes, float32: tiny's tail has 4 heads and 576 tokens
STACK, TAIL, DECODER = "stack", "tail", "decoder"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a small SAM with random weights in fp16, with their plain forms."""
    return small_stages("fp16", tmp_path_factory.mktemp("half"))


def small_stages(precision: Precision, directory: Path) -> Path:
    sam = reorder(randomise(build_from_spec(SPECS["tiny"]), seed=1)).requires_grad_(False)
    geometry = stages.geometry_of(sam)
    for name, module in (
        (STACK, stages.make_stack(sam, None)),
        (TAIL, stages.Tail(sam)),
        (DECODER, stages.Decoder(sam)),
    ):
        specs = stage_specs(name, geometry, precision)
        write_plain(write_stage(name, cast(module, precision), *specs, directory), directory, 25)
    return directory


def copy_stage(directory: Path, name: str, target: Path) -> None:
    for file in (f"{name}.onnx", f"{name}.onnx.data"):
        shutil.copyfile(directory / file, target / file)


def feeds(bundle: Bundle, name: str, n: int = 3, p: int = 2, k: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n + p + k)
    sizes = {"n": n, "p": p, "k": k}
    made = {}
    for spec in bundle.stage(name).inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        low, high = {"pixels": (0, 256), "extent": (0, 41), "window": (0, 25)}.get(
            spec.name, (0, 2)
        )
        if spec.dtype.startswith("float"):
            made[spec.name] = rng.normal(size=shape).astype(spec.numpy_dtype)
        else:
            made[spec.name] = rng.integers(low, high, shape).astype(spec.numpy_dtype)
    if name == DECODER:
        made["point_labels"] = rng.integers(-1, 4, (p, k)).astype(np.float32)
        made["point_coords"] = (made["point_coords"] * 50 + 96).astype(np.float32)
    return made


def run(path: Path, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with OrtEngine(path, threads=1, device="cpu") as engine:
        return engine.run(fed)


def nodes(path: Path) -> list[ir.Node]:
    return list(ir.load(path).graph.all_nodes())


# The same function


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4, 25])
def test_the_stack_for_any_number_of_windows(random_bundle: Path, n: int) -> None:
    bundle = Bundle.load(random_bundle)
    fed = feeds(bundle, STACK, n=n)
    main, other = (run(p(STACK), fed) for p in (bundle.stage_path, bundle.plain_path))
    assert np.abs(main["tokens"]).max() > 1
    np.testing.assert_allclose(other["tokens"], main["tokens"], atol=2e-5)


@pytest.mark.parametrize("queries", [576, 192, 100, 1])
def test_the_tail_for_any_block_size(random_bundle: Path, tmp_path: Path, queries: int) -> None:
    """Also with blocks that do not divide the queries evenly and, in the stack, blocks of one."""
    source = Bundle.load(random_bundle)
    name = TAIL if queries > 1 else STACK
    copy_stage(random_bundle, name, tmp_path)
    stage = write_plain(source.stage(name), tmp_path, 25, queries * LOGITS_OF_A_QUERY)
    assert stage.plain is not None
    if queries == 1:
        stage = write_plain(source.stage(name), tmp_path, 25, 1)
    fed = feeds(source, name)
    fed_output = stage.outputs[0].name
    main, other = run(source.stage_path(name), fed), run(tmp_path / f"{name}.plain.onnx", fed)
    np.testing.assert_allclose(other[fed_output], main[fed_output], atol=2e-5)
    blocks = [x for x in nodes(tmp_path / f"{name}.plain.onnx") if x.op_type == "Softmax"]
    per_attention = {576: 1, 192: 3, 100: 9, 1: 25}[queries]  # 100 becomes 64: 9 blocks of 64
    assert len(blocks) == 4 * per_attention


@pytest.mark.parametrize(("p", "k"), [(1, 0), (3, 5)])
def test_the_decoder_for_any_number_of_prompts(random_bundle: Path, p: int, k: int) -> None:
    bundle = Bundle.load(random_bundle)
    fed = feeds(bundle, DECODER, p=p, k=k)
    main, other = (run(path(DECODER), fed) for path in (bundle.stage_path, bundle.plain_path))
    for output, values in main.items():
        np.testing.assert_allclose(other[output], values, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [STACK, TAIL])
def test_half_precision_stays_within_tolerance(half: Path, random_bundle: Path, name: str) -> None:
    fed = feeds(Bundle.load(random_bundle), name)
    with OrtEngine(half / f"{name}.onnx", threads=1, device="cpu") as engine:
        wanted = {s.name: s.numpy_dtype for s in engine.inputs}
        shapes = {s.name: s.shape for s in engine.inputs}
        fed = {k: v[..., : _last(shapes[k])].astype(wanted[k]) for k, v in fed.items()}
        main = engine.run(fed)
    other = run(half / f"{name}.plain.onnx", fed)
    for output, values in main.items():
        peak = np.abs(values).max()
        np.testing.assert_allclose(other[output], values, atol=0.01 * peak)


def _last(shape: tuple[int | str, ...]) -> int | None:
    return shape[-1] if isinstance(shape[-1], int) else None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_shipped_bundles_give_their_golden_answers(precision: str) -> None:
    bundle = Bundle.load(shipped_bundle(precision))
    bundle.verify_hashes()
    with np.load(bundle.path / next(iter(bundle.manifest.golden)), allow_pickle=False) as stored:
        golden = {**stored, "decoder.embedding": stored["tail.embedding"]}
    for name, stage in bundle.manifest.stages.items():
        fed = {s.name: golden[f"{name}.{s.name}"] for s in stage.inputs}
        main, other = (run(path(name), fed) for path in (bundle.stage_path, bundle.plain_path))
        for output, values in main.items():
            peak = float(np.abs(values).max())
            share = 1e-5 if precision == "fp32" else 5e-3
            np.testing.assert_allclose(other[output], values, rtol=0, atol=share * peak)


def test_bf16_is_verified_through_its_float32_twin(tmp_path: Path) -> None:
    """The twin of the written plain form, not a plain form of the twin."""
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    sam = reorder(randomise(build_from_spec(SPECS["tiny"]), seed=1)).requires_grad_(False)
    specs = stage_specs(TAIL, stages.geometry_of(sam), "bf16")
    stage = write_stage(TAIL, cast(stages.Tail(sam), "bf16"), *specs, work)
    stage = write_plain(stage, work, 25)
    twin = write_float32_twin(stage, work, scratch)
    path = write_plain_twin(stage, work, twin, scratch)
    written, rewritten = (nodes(p) for p in (work / "tail.plain.onnx", path))
    assert [n.name for n in written] == [n.name for n in rewritten]
    types = {v.dtype for n in rewritten for v in (*n.inputs, *n.outputs) if v is not None}
    assert ir.DataType.BFLOAT16 not in types
    assert ir.DataType.BFLOAT16 in {v.dtype for n in written for v in n.outputs}
    assert path.stat().st_size < 100_000
    rng = np.random.default_rng(0)
    g = stages.geometry_of(sam)
    shape = (g.windows, g.tokens_per_window, g.embed_dim)
    fed = {"tokens": rng.normal(size=shape).astype(np.float32), "present": np.ones(25, bool)}
    main, other = run(scratch / twin.file, fed), run(path, fed)
    # Only the constants of the expanded Gelu differ: the root of 2 is 1.4140625 in bfloat16.
    np.testing.assert_allclose(other["embedding"], main["embedding"], atol=3e-4)


# The same weights


@pytest.fixture(scope="module")
def every_stage(random_bundle: Path, half: Path) -> list[tuple[Path, Path]]:
    """Main and plain form of every stage, in fp32 and fp16."""
    names = (STACK, TAIL, DECODER)
    return [(d / f"{n}.onnx", d / f"{n}.plain.onnx") for d in (random_bundle, half) for n in names]


def test_every_weight_is_read_from_the_main_form_s_data(
    every_stage: list[tuple[Path, Path]],
) -> None:
    for main, other in every_stage:
        assert other.stat().st_size < 100_000
        originals = ir.load(main).graph.initializers
        shared = 0
        for name, value in ir.load(other).graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if isinstance(tensor, ir.ExternalTensor):
                assert tensor.location == f"{main.name}.data"
                assert tensor.dtype.is_floating_point(), "masks and indices are in the graph"
                original = originals[name].const_value
                assert original is not None
                assert tensor.tobytes() == original.tobytes(), name
                assert (tensor.dtype, tuple(tensor.shape)) == (original.dtype, original.shape)
                shared += 1
            else:
                assert not tensor.dtype.is_floating_point() or tensor.nbytes <= 256, name
                assert tensor.nbytes <= 8192
        assert shared > 20


def test_equal_main_forms_give_equal_bytes(random_bundle: Path, tmp_path: Path) -> None:
    source = Bundle.load(random_bundle)
    for name in (STACK, TAIL, DECODER):
        copy_stage(random_bundle, name, tmp_path)
        stage = write_plain(source.stage(name), tmp_path, 25)
        assert stage == source.stage(name)
        assert hash_file(tmp_path / f"{name}.plain.onnx") == source.stage(name).plain.sha256  # type: ignore[union-attr]


# Operators that TensorRT 10.3 knows


def test_only_known_operators_and_opset(every_stage: list[tuple[Path, Path]]) -> None:
    for main, other in every_stage:
        model = onnx.load(other, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        assert model.ir_version == 8
        assert {n.op_type for n in model.graph.node} <= set(OPERATORS)
        for node in model.graph.node:
            schema = onnx.defs.get_schema(node.op_type, 17)
            assert {a.name for a in node.attribute} <= set(schema.attributes), node.name
        if main.stem != DECODER:
            assert any(n.op_type == "Attention" for n in onnx.load(main).graph.node)
        onnx.checker.check_model(str(other), full_check=True)


def test_softmax_is_float32_and_scale_is_one(half: Path) -> None:
    for name in (STACK, TAIL):
        for node in nodes(half / f"{name}.plain.onnx"):
            if node.op_type == "Softmax":
                assert {node.inputs[0].dtype, node.outputs[0].dtype} == {ir.DataType.FLOAT}  # type: ignore[union-attr]


def test_nodes_of_an_attention_can_be_regrouped_by_name(
    random_bundle: Path, tmp_path: Path
) -> None:
    copy_stage(random_bundle, TAIL, tmp_path)
    stage = Bundle.load(random_bundle).stage(TAIL)
    write_plain(stage, tmp_path, 25, 192 * LOGITS_OF_A_QUERY)
    found = [n.name for n in nodes(tmp_path / "tail.plain.onnx") if n.op_type == "Softmax"]
    assert found == [f"attention.{i}/block.{j}/softmax" for i in range(4) for j in range(3)]


def change(model: ir.Model, kind: str) -> None:
    attention = next(n for n in model.graph if n.op_type == "Attention")
    if kind == "causal":
        attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    elif kind == "scaled":
        attention.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
    elif kind == "scale by width":
        attention.attributes.pop("scale")
    elif kind == "tanh":
        gelu = next(n for n in model.graph if n.op_type == "Gelu")
        gelu.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    elif kind == "operator":
        next(n for n in model.graph if n.op_type == "Add").op_type = "Swish"
    elif kind == "attribute":
        cast_node = next(n for n in model.graph if n.op_type == "Concat")
        cast_node.attributes["round_mode"] = ir.AttrString("round_mode", "up")
    else:
        attention.inputs[0].shape = None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("causal", "attention .* does not know"),
        ("scaled", "attention .* does not know"),
        ("scale by width", "attention .* does not know"),
        ("tanh", "approximated Gelu"),
        ("operator", "operator Swish"),
        ("attribute", "round_mode"),
        ("shape", "without type and shape"),
    ],
)
def test_graphs_without_a_plain_form_are_refused(
    random_bundle: Path, tmp_path: Path, kind: str, reason: str
) -> None:
    model = ir.load(random_bundle / "tail.onnx")
    change(model, kind)
    ir.save(model, tmp_path / "tail.onnx")
    with pytest.raises(ExportError, match=reason):
        write_plain(Bundle.load(random_bundle).stage(TAIL), tmp_path, 25)
    assert not (tmp_path / "tail.plain.onnx").exists()


# Memory


@pytest.mark.parametrize(
    ("tokens", "bytes_per_query", "queries"),
    [
        (4096, 16 * 4096 * 4, 192),  # a global block of ViT-H
        (4096, 12 * 4096 * 4, 320),  # a global block of ViT-B
        (196, 25 * 16 * 196 * 4, 196),  # all windows of ViT-H at once: whole
        (576, 4 * 576 * 4, 576),
        (4096, 64_000_000 // 50, 50),  # fewer than a tile
        (4096, 100_000_000, 1),
    ],
)
def test_queries_per_block_fit_the_memory(tokens: int, bytes_per_query: int, queries: int) -> None:
    assert queries_per_block(tokens, bytes_per_query) == queries
    if queries > 1:
        assert queries * bytes_per_query <= 64_000_000


@pytest.mark.parametrize(("windows", "blocks"), [(1, 1), (5, 2), (25, 9)])
def test_blocks_of_a_stack_are_sized_for_all_its_windows(
    random_bundle: Path, tmp_path: Path, windows: int, blocks: int
) -> None:
    copy_stage(random_bundle, STACK, tmp_path)
    heads, tokens = 4, 25
    limit = 3 * windows * 4 * heads * tokens if windows == 25 else 14 * 5 * 4 * heads * tokens
    write_plain(Bundle.load(random_bundle).stage(STACK), tmp_path, windows, limit)
    path = tmp_path / "stack.plain.onnx"
    softmaxes = [node for node in nodes(path) if node.op_type == "Softmax"]
    assert len(softmaxes) == 4 * blocks
    shapes = [node.outputs[0].shape for node in softmaxes]
    sizes = [4 * windows * heads * shape[2] * tokens for shape in shapes if shape is not None]
    assert max(sizes) <= limit


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def vit_h(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """ViT-H cut to one window block and one global block, with random weights."""
    directory = tmp_path_factory.mktemp(request.param)
    spec = replace(MODELS["vit_h"], depth=2, global_blocks=(1,))
    sam = reorder(build_from_spec(spec)).requires_grad_(False)
    written = {}
    for name, module in ((TAIL, stages.Tail(sam)), (STACK, stages.make_stack(sam, None))):
        specs = stage_specs(name, stages.geometry_of(sam), request.param)
        written[name] = write_stage(name, cast(module, request.param), *specs, directory)
    yield directory, written
    shutil.rmtree(directory)  # 100 MB


@pytest.mark.slow
def test_no_tensor_of_vit_h_exceeds_64_mb(vit_h: tuple[Path, dict[str, Any]]) -> None:
    directory, written = vit_h
    for name, stage in written.items():
        write_plain(stage, directory, 25)
        found = tensor_sizes.report(directory / f"{name}.plain.onnx", {"n": 25})
        assert found.unknown == ()
        assert 40e6 < found.largest <= 64e6
        main = tensor_sizes.report(directory / f"{name}.onnx", {"n": 25})
        assert main.operators["Attention"] == 1
    # Larger blocks exceed it, so the block size is what keeps the limit.
    write_plain(written[TAIL], directory, 25, 200_000_000)
    assert tensor_sizes.report(directory / "tail.plain.onnx", {}).largest > 64e6
    write_plain(written[TAIL], directory, 25, 10**12)
    assert tensor_sizes.report(directory / "tail.plain.onnx", {}).largest == 16 * 4096 * 4096 * 4


# TensorRT-RTX builds it, without a GPU


def build(path: Path) -> bytes | str:
    """Build a plan. Returns it, or the error of the parser or builder."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return str(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        least, most = ([size if d == -1 else d for d in tensor.shape] for size in (1, 25))
        profile.set_shape(tensor.name, least, least, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return "not built" if plan is None else bytes(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", [STACK, TAIL, DECODER])
def test_rtx_builds_every_stage_and_reads_weights_from_the_main_form(
    half: Path, random_bundle: Path, tmp_path: Path, name: str
) -> None:
    fused = build(half / f"{name}.plain.onnx")
    assert isinstance(fused, bytes), fused
    if name != DECODER:  # the decoder's attention, here with 4 channels per head, may stay unfused
        assert b"name=_gemm_mha_v2" in fused
    assert isinstance(build(random_bundle / f"{name}.plain.onnx"), bytes), "fp32 builds unfused"
    # Without the main form beside it there are no weights to read.
    shutil.copyfile(half / f"{name}.plain.onnx", tmp_path / "alone.onnx")
    assert isinstance(build(tmp_path / "alone.onnx"), str)


def test_rtx_builds_bf16(tmp_path: Path) -> None:
    """Also its convolution, which ONNX itself allows in bfloat16 only from opset 22 on."""
    sam = reorder(randomise(build_from_spec(SPECS["tiny"]), seed=1)).requires_grad_(False)
    specs = stage_specs(TAIL, stages.geometry_of(sam), "bf16")
    write_plain(write_stage(TAIL, cast(stages.Tail(sam), "bf16"), *specs, tmp_path), tmp_path, 25)
    plan = build(tmp_path / "tail.plain.onnx")
    assert isinstance(plan, bytes), plan
    assert b"name=_gemm_mha_v2" in plan


def test_rtx_fuses_every_block_of_queries(random_bundle: Path, half: Path, tmp_path: Path) -> None:
    stage = Bundle.load(random_bundle).stage(TAIL)
    copy_stage(half, TAIL, tmp_path)
    counts = []
    for queries in (576, 192, 50):
        write_plain(stage, tmp_path, 25, queries * 2 * 4 * 576)  # the small SAM has two heads
        plan = build(tmp_path / "tail.plain.onnx")
        assert isinstance(plan, bytes), plan
        counts.append(plan.count(b"name=_gemm_mha_v2"))
    assert counts[0] > 0
    assert counts[1:] == [3 * counts[0], 12 * counts[0]]
