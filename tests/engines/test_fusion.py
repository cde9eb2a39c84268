"""Fusion is read from plans that the real TensorRT-RTX builds here, without a GPU.

The engine inspector needs a GPU, so its answers are written by hand. They follow the format that
NVIDIA documents (10.x, and 11.x in "Migrating IEngineInspector Usage") and layers of real engines
quoted in NVIDIA/TensorRT#4397.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import fusion, libraries
from engines.bundle import shipped_bundle
from engines.fusion import Attentions
from engines.libraries import Library
from engines.plan import AttentionReport, LayerReport

SIZES = {"n": (1, 9, 25), "p": (1, 1, 4), "k": (1, 2, 4)}


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return libraries.load("tensorrt-rtx")


def build(library: Library, fill: Callable[[Any, Any], None]) -> tuple[bytes, Attentions]:
    """Build the network that ``fill(network, logger)`` defines. Returns its plan and its
    attentions."""
    trt = library.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(libraries.network_flags(library))
    fill(network, logger)
    config = builder.create_builder_config()
    targets = libraries.compute_capabilities(library, None)
    libraries.configure(library, config, compute_capabilities=targets)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        shapes = [
            [
                SIZES[name][which] if size == -1 else size
                for name, size in zip(names, tensor.shape, strict=True)
            ]
            for which in range(3)
        ]
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan), fusion.expected_attentions(library, network)


def parsed(library: Library, path: Path) -> Callable[[Any, Any], None]:
    def fill(network: Any, logger: Any) -> None:
        assert library.module.OnnxParser(network, logger).parse_from_file(str(path))

    return fill


@pytest.fixture(scope="module")
def tiny(library: Library) -> Callable[[str], tuple[bytes, Attentions]]:
    """Plan and attentions of a graph of the shipped bundles, for example ``fp16/stack.onnx``."""
    built: dict[str, tuple[bytes, Attentions]] = {}

    def get(name: str) -> tuple[bytes, Attentions]:
        if name not in built:
            precision, file = name.split("/")
            built[name] = build(library, parsed(library, shipped_bundle(precision) / file))
        return built[name]

    return get


def write_plain_attention(
    path: Path, *, dtype: str = "FLOAT16", width: int = 64, tokens: int = 256, blocks: int = 4
) -> Path:
    """One attention in blocks of queries, with the names that the plain form uses."""
    from onnx import TensorProto, numpy_helper, save
    from onnx import helper as h

    real = getattr(TensorProto, dtype)
    nodes = [h.make_node("Relu", [x], [f"{x}.in"], name=f"before/{x}") for x in "qkv"]
    nodes.append(
        h.make_node("Transpose", ["k.in"], ["kt"], name="attention.0/keys", perm=[0, 1, 3, 2])
    )
    constants, parts = [], []
    size = tokens // blocks
    for block in range(blocks):
        name = f"attention.0/block.{block}"
        bounds = [f"{name}/start", f"{name}/end", f"{name}/axis"]
        for bound, value in zip(bounds, (block * size, (block + 1) * size, 2), strict=True):
            constants.append(numpy_helper.from_array(np.array([value]), bound))
        last = f"{name}/queries"
        nodes.append(h.make_node("Slice", ["q.in", *bounds], [last], name=last))
        for step, operator, attributes in (
            ("logits", "MatMul", {}),
            ("cast", "Cast", {"to": TensorProto.FLOAT}),
            ("softmax", "Softmax", {"axis": -1}),
            ("cast_back", "Cast", {"to": real}),
            ("values", "MatMul", {}),
        ):
            second = {"logits": ["kt"], "values": ["v.in"]}.get(step, [])
            made = f"{name}/{step}"
            nodes.append(h.make_node(operator, [last, *second], [made], name=made, **attributes))
            last = made
        parts.append(last)
    nodes.append(h.make_node("Concat", parts, ["joined"], name="attention.0/join", axis=2))
    nodes.append(h.make_node("Relu", ["joined"], ["out"], name="after"))
    shape = [1, 2, tokens, width]
    graph = h.make_graph(
        nodes,
        "attention",
        [h.make_tensor_value_info(x, real, shape) for x in "qkv"],
        [h.make_tensor_value_info("out", real, shape)],
        constants,
    )
    save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


def states(reports: fusion.Reports) -> dict[str, bool | None]:
    return {report.name: report.fused for report in reports[0]}


@pytest.mark.parametrize("stage", ["stack", "tail"])
def test_every_attention_of_the_fp16_encoder_is_fused(tiny: Any, stage: str) -> None:
    plan, attentions = tiny(f"fp16/{stage}.onnx")
    reports = fusion.from_plan(plan, attentions)
    assert len(attentions) == 4
    assert states(reports) == dict.fromkeys(attentions, True)
    assert {report.kernel for report in reports[0]} == {"_gemm_mha_v2"}


def test_layers_come_with_kernel_and_precision(tiny: Any) -> None:
    plan, attentions = tiny("fp16/tail.onnx")
    layers = fusion.from_plan(plan, attentions)[1]
    fused = [layer for layer in layers if layer.kernel == "_gemm_mha_v2"]
    assert [layer.precision for layer in fused] == ["fp16"] * 4
    norms = [layer for layer in layers if "node_layer_norm" in layer.name]
    assert norms
    assert all("fp32" in layer.precision for layer in norms)  # the norms' weights are float32
    assert all(layer.kernel for layer in layers)
    # A runtime fusion is listed once, not again with each of its parts.
    assert not any(layer.kernel in ("add", "erf") for layer in layers)


def test_the_decoder_is_partly_fused_and_each_attention_is_reported(tiny: Any) -> None:
    plan, attentions = tiny("fp16/decoder.onnx")
    reports = fusion.from_plan(plan, attentions)
    assert len(reports[0]) == 7
    # One side has few tokens. This library fuses only the self-attention of the tokens.
    assert {report.fused for report in reports[0]} == {True, False}
    for report in reports[0]:
        assert ("_gemm_mha_v2" in report.kernel) == report.fused
        assert ("MaxrSubExpSumDiv" in report.kernel) != report.fused


def test_nothing_of_an_fp32_decoder_is_fused(tiny: Any) -> None:
    reports = fusion.from_plan(*tiny("fp32/decoder.onnx"))
    assert set(states(reports).values()) == {False}
    assert {layer.precision for layer in reports[1] if "node_MatMul" in layer.name} == {"fp32"}


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_blocks_of_queries_count_as_one_attention(
    library: Library, tmp_path: Path, dtype: str
) -> None:
    path = write_plain_attention(tmp_path / "a.onnx", blocks=4, dtype=dtype)
    plan, attentions = build(library, parsed(library, path))
    assert {name: len(cores) for name, cores in attentions.items()} == {"attention.0": 4}
    reports = fusion.from_plan(plan, attentions)
    assert states(reports) == {"attention.0": True}
    kernels = [layer for layer in reports[1] if layer.kernel == "_gemm_mha_v2"]
    expected = {"FLOAT16": "fp16", "BFLOAT16": "bf16"}[dtype]
    assert [layer.precision for layer in kernels] == [expected] * 4


@pytest.mark.parametrize(
    "changes",
    [{"width": 264}, {"dtype": "FLOAT"}, {"tokens": 64, "blocks": 1}],
    ids=["too wide", "fp32", "whole, straight from the inputs"],
)
def test_plain_attention_that_the_library_does_not_fuse_is_reported(
    library: Library, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = write_plain_attention(tmp_path / "a.onnx", **changes)
    reports = fusion.from_plan(*build(library, parsed(library, path)))
    assert states(reports) == {"attention.0": False}
    assert "fully_connected" in reports[0][0].kernel


@pytest.mark.parametrize(("dtype", "width", "fused"), [("HALF", 64, True), ("HALF", 264, False)])
def test_an_attention_layer_that_may_be_decomposed_is_recognised(
    library: Library, dtype: str, width: int, fused: bool
) -> None:
    trt = library.module

    def fill(network: Any, logger: Any) -> None:
        kind = getattr(trt.DataType, dtype)
        inputs = [network.add_input(x, kind, (1, 2, 128, width)) for x in "qkv"]
        fed = [network.add_activation(x, trt.ActivationType.RELU).get_output(0) for x in inputs]
        layer = network.add_attention(*fed, trt.AttentionNormalizationOp.SOFTMAX, False)
        layer.decomposable = True
        layer.metadata = "[ONNX Layer: node_attention]"
        after = network.add_activation(layer.get_output(0), trt.ActivationType.RELU)
        network.mark_output(after.get_output(0))

    assert states(fusion.from_plan(*build(library, fill))) == {"node_attention": fused}


def test_a_softmax_without_matrix_products_is_no_attention(
    library: Library, tmp_path: Path
) -> None:
    trt = library.module

    def fill(network: Any, logger: Any) -> None:
        fed = network.add_input("x", trt.float32, (4, 8))
        network.mark_output(network.add_softmax(fed).get_output(0))

    assert build(library, fill)[1] == {}


def test_a_plan_without_evidence_is_unknown_not_fused(tiny: Any) -> None:
    plan, attentions = tiny("fp16/stack.onnx")
    for silent in (b"", plan[:20_000], plan.replace(b"main {", b"code {")):
        reports = fusion.from_plan(silent, attentions)
        assert states(reports) == dict.fromkeys(attentions)
        assert reports[1] == ()


def test_a_kernel_with_an_unknown_name_is_unknown(tiny: Any) -> None:
    plan, attentions = tiny("fp16/stack.onnx")
    renamed = plan.replace(b"name=_gemm_mha_v2 ", b"name=_flash_whatever ")
    assert states(fusion.from_plan(renamed, attentions)) == dict.fromkeys(attentions)
    # A kernel's name is no evidence without the nodes, even if it looks like attention.
    elsewhere = plan.replace(b"[ONNX Layer: node_scaled_dot", b"[ONNX Layer: node_another_dot")
    assert states(fusion.from_plan(elsewhere, attentions)) == dict.fromkeys(attentions)


def test_plans_are_read_through_any_buffer(tiny: Any) -> None:
    plan, attentions = tiny("fp16/tail.onnx")
    assert fusion.from_plan(memoryview(plan), attentions) == fusion.from_plan(plan, attentions)
    assert fusion.from_plan(bytearray(plan), attentions) == fusion.from_plan(plan, attentions)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_damaged_plan_never_raises_and_its_report_fits_a_record(tiny: Any, data: Any) -> None:
    plan, attentions = tiny("fp16/tail.onnx")
    damaged = bytearray(plan)
    main = plan.find(b"\nmain {")
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(main - 2000, main + 20_000))
        damaged[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    attention, layers = fusion.from_plan(bytes(damaged), attentions)
    assert [report.name for report in attention] == list(attentions)
    msgspec.json.decode(msgspec.json.encode(attention), type=tuple[AttentionReport, ...])
    msgspec.json.decode(msgspec.json.encode(layers), type=tuple[LayerReport, ...])


def test_names_with_line_ends_fit_a_record() -> None:
    report = LayerReport(*(fusion._text(text) for text in ("a\nb", "c\x1b[1m", "d\u202ee")))
    again = msgspec.json.decode(msgspec.json.encode(report), type=LayerReport)
    assert again == LayerReport("a b", "c [1m", "d e")


# The inspector's answers below are simulated: see the module docstring.

PLAIN: Attentions = {
    "attention.0": tuple(
        frozenset(f"attention.0/block.{b}/{step}" for step in ("logits", "softmax", "values"))
        for b in range(2)
    )
}
MAIN: Attentions = {"node_attention": (frozenset({"node_attention"}),)}


def layer(
    name: str, kind: str, tactic: str, *nodes: str, dtype: str = "Half", release: int = 10
) -> dict[str, Any]:
    if release == 10:
        types = {"Format/Datatype": dtype}
    else:
        types = {"DataType": dtype, "Format": "Row major linear FP16 format (kLINEAR)"}
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "__mye1", "Dimensions": [4, 40, 64], **types}],
        "Outputs": [{"Name": "__mye2", "Dimensions": [4, 40, 64], **types}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def fused_block(block: int, release: int = 10) -> dict[str, Any]:
    steps = ("values", "cast_back", "softmax", "cast", "logits")
    return layer(
        f"_gemm_mha_v2_myl0_{17 + block}",
        "kgen",
        "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a",
        *(f"attention.0/block.{block}/{step}" for step in steps),
        release=release,
    )


def apart_block(block: int) -> list[dict[str, Any]]:
    name = f"attention.0/block.{block}"
    gemm = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6"
    return [
        layer(f"{name}/logits_myl0_1", "gemm", gemm, f"{name}/logits"),
        layer(
            "__myl_CastMaxrSubExpSumDivMulCast_myl0_2",
            "kgen",
            "__myl_CastMaxrSubExpSumDivMulCast_0x12",
            f"{name}/cast",
            f"{name}/softmax",
            f"{name}/cast_back",
        ),
        layer(f"{name}/values_myl0_3", "gemm", gemm, f"{name}/values"),
    ]


def inspect(layers: list[Any], attentions: Attentions, release: int = 10) -> fusion.Reports:
    tensors = {"Bindings": ["q"]} if release == 10 else {"I/O Tensors": [{"Name": "q"}]}
    return fusion.from_inspector(json.dumps({"Layers": layers, **tensors}), attentions)


@pytest.mark.parametrize("release", [10, 11])
def test_inspector_all_blocks_fused(release: int) -> None:
    layers = [fused_block(0, release), fused_block(1, release)]
    reports = inspect(layers, PLAIN, release)
    assert states(reports) == {"attention.0": True}
    assert [one.precision for one in reports[1]] == ["fp16", "fp16"]


def test_inspector_one_unfused_block_makes_the_attention_unfused() -> None:
    reports = inspect([fused_block(0), *apart_block(1)], PLAIN)
    assert states(reports) == {"attention.0": False}
    assert "CastMaxrSubExpSumDivMulCast" in reports[0][0].kernel


def test_inspector_one_missing_block_is_unknown() -> None:
    assert states(inspect([fused_block(0)], PLAIN)) == {"attention.0": None}


@pytest.mark.parametrize("missing", ["logits", "softmax", "values"])
def test_inspector_an_attention_kernel_for_part_of_an_attention_is_unknown(missing: str) -> None:
    names = {step: f"attention.0/block.1/{step}" for step in ("logits", "softmax", "values")}
    rest = names.pop(missing)
    part = layer("_gemm_mha_v2_myl0_18", "kgen", "_gemm_mha_v2_0x95", *names.values())
    other = layer("__myl_MaxrSubExpSumDivMul_myl0_2", "kgen", "__myl_MaxrSub_0x12", rest)
    assert states(inspect([fused_block(0), part, other], PLAIN)) == {"attention.0": None}
    assert states(inspect([fused_block(0), part], PLAIN)) == {"attention.0": None}


def test_inspector_names_of_nodes_are_no_evidence() -> None:
    """Real graphs have nodes such as /encoder/layers_2/mha/attn/MatMul (NVIDIA/TensorRT#4397)."""
    core = frozenset({"/mha/QK", "/mha/Softmax", "/mha/AV"})
    gemm = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n"
    layers = [
        layer("/mha/QK_myl0_1", "gemm", gemm, "/mha/QK"),
        layer("__myl_MaxrSubExpSumDivMul_myl0_2", "kgen", "", "/mha/Softmax"),
        layer("/mha/AV_myl0_3", "gemm", gemm, "/mha/AV"),
    ]
    assert states(inspect(layers, {"a": (core,)})) == {"a": False}
    one = layer("mha_of_everything", "Myelin", "", *core)
    assert states(inspect([one], {"a": (core,)})) == {"a": None}


def test_inspector_attention_operator() -> None:
    fused = layer("_gemm_mha_v2_myl0_9", "kgen", "_gemm_mha_v2_0xb4", "node_attention", "node_cat")
    around = layer("__myl_ReshMove_myl0_8", "kgen", "__myl_ReshMove_0x1", "node_attention")
    assert states(inspect([around, fused], MAIN)) == {"node_attention": True}
    # Kernels around it name the node too. Without softmax among them they are no evidence.
    assert states(inspect([around], MAIN)) == {"node_attention": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"Layers": 3}',
        '{"Layers": ["_gemm_mha_v2_myl0_9", "attention.0/block.0/logits"]}',
        '{"Layers": [{"Name": 3, "Inputs": [7], "Outputs": {}, "Metadata": null}]}',
        "[" * 5000,
    ],
)
def test_inspector_answers_without_detail_are_unknown(text: str) -> None:
    assert states(fusion.from_inspector(text, PLAIN)) == {"attention.0": None}


def test_reports_are_printable_and_short() -> None:
    text = json.dumps({"Layers": [{"Name": "\x1b[31m" + "n" * 9999, "LayerType": "gemm"}]})
    (found,) = fusion.from_inspector(text, {})[1]
    assert found.name.isprintable()
    assert len(found.name) <= 200
