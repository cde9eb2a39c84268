"""The plain form: a second version of a stage, with operators that older TensorRT parsers know.

The main form of a stage is opset 23 with one ``Attention`` per block, which TensorRT parses from
10.14 on. The plain form is opset 17, with attention as MatMul, Softmax and MatMul.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from edge_common.errors import ExportError
from engines.bundle import PlainForm, Stage, hash_file

OPSET = 17
"""Lowest opset with all needed operators (LayerNormalization came last).

According to onnx-tensorrt's docs/operators.md, TensorRT 9.2 knows opset 19 and 10.6 opset 22.
"""
IR_VERSION = 8
LIMIT = 64_000_000
"""Most bytes of the float32 logits of one block of queries."""
_TILE = 64  # queries per block come in multiples of this: matrix kernels work in tiles of it

# Operators that rewritten graphs may contain: they mean the same in opsets 17 and 23, with these
# attributes. onnx-tensorrt lists all of them for TensorRT 9.2 and 10.6, in every type used here.
# ONNX allows Conv in bfloat16 from opset 22 on only; TensorRT's parser allows it here too.
OPERATORS: Mapping[str, frozenset[str]] = {
    **{
        name: frozenset()
        for name in (
            *("Add", "And", "Cos", "Div", "Equal", "Erf", "Expand", "Greater", "Less", "MatMul"),
            *("Mul", "Relu", "Sin", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
        )
    },
    "Cast": frozenset({"to"}),
    "Concat": frozenset({"axis"}),
    "Conv": frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}),
    "Gather": frozenset({"axis"}),
    "Gemm": frozenset({"alpha", "beta", "transA", "transB"}),
    "LayerNormalization": frozenset({"axis", "epsilon", "stash_type"}),
    "Pad": frozenset({"mode"}),
    "Reshape": frozenset({"allowzero"}),
    "Shape": frozenset({"end", "start"}),
    "Softmax": frozenset({"axis"}),
    "Transpose": frozenset({"perm"}),
}


def write_plain(stage: Stage, directory: Path, windows: int, limit: int = LIMIT) -> Stage:
    """Write ``<stage>.plain.onnx`` beside ``stage`` and return the stage with it.

    The plain form computes the same function with the same weights: its graph names the main form's
    data file. Attention is computed for one block of queries at a time, so that its logits stay
    within ``limit`` bytes even where nothing is fused. Softmax is in float32. Equal main forms give
    equal bytes. :mod:`exporters.verify` checks that both forms compute the same.

    Softmax in float32 costs nothing where TensorRT fuses: in plans of ``tiny`` in fp16 that
    TensorRT-RTX 1.7.1 built, ``_gemm_mha_v2`` replaces every MatMul-Softmax-MatMul, with or without
    the casts, whole or per block of queries. In fp32 no such kernel exists: the plain form is built
    unfused, and the main form does not build at all.

    Args:
        stage: a stage whose files lie in ``directory``, as ``write_stage`` leaves them.
        directory: of the bundle.
        windows: most windows that a stack computes at once; sizes its blocks of queries.
        limit: bytes of the largest logits, float32.

    Raises:
        ExportError: the graph holds something that has no plain form.
        OSError: the file could not be written.
    """
    model = ir.load(directory / stage.file)
    _rewrite(model, windows, limit)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not tensor.dtype.is_floating_point():
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=value.name)
    path = directory / f"{Path(stage.file).stem}.plain.onnx"
    ir.save(model, path)
    return msgspec.structs.replace(stage, plain=PlainForm(path.name, hash_file(path)))


def queries_per_block(tokens: int, bytes_per_query: int, limit: int = LIMIT) -> int:
    """The number of queries in a block: all ``tokens``, or a multiple of 64 if possible.

    ``bytes_per_query``: of the float32 logits of one query, over all heads and windows.
    """
    most = max(1, limit // bytes_per_query)
    if most >= tokens:
        return tokens
    return most // _TILE * _TILE or most


def _rewrite(model: ir.Model, windows: int, limit: int) -> None:
    """Replace operators that opset 17 lacks, in place, and declare opset 17."""
    attentions = 0
    for node in list(model.graph):
        if node.op_type == "Attention":
            _replace(model.graph, node, _attention(model.graph, node, attentions, windows, limit))
            attentions += 1
        elif node.op_type == "Gelu":
            _replace(model.graph, node, _gelu(model.graph, node))
    for node in model.graph.all_nodes():
        known = OPERATORS.get(node.op_type) if node.domain == "" else None
        unknown = set(node.attributes) - known if known is not None else {node.op_type}
        if unknown:
            raise ExportError(
                f"operator {node.op_type} ({node.name}, {', '.join(sorted(unknown))}) has no plain "
                f"form: expected one of {', '.join(OPERATORS)}, as they are in opset {OPSET}"
            )
        node.version = None
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


def _typed(value: ir.Value | None) -> tuple[ir.Value, ir.DataType, list[Any]]:
    """A node's input with its type and dimensions: ints, or symbols for windows and prompts."""
    if value is None or value.dtype is None or value.shape is None:
        raise ExportError(f"no plain form without type and shape of {value}")
    return value, value.dtype, list(value.shape)


def _replace(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    ir.convenience.replace_nodes_and_values(
        graph, old, [old], new, [old.outputs[0]], [new[-1].outputs[0]]
    )


@dataclass
class _Maker:
    """Makes nodes named ``prefix/step`` with one output of the same name."""

    graph: ir.Graph
    prefix: str

    def node(
        self,
        step: str,
        op: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        shape: Sequence[Any],
        **attributes: int | Sequence[int],
    ) -> ir.Node:
        name = f"{self.prefix}/{step}"
        out = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return ir.node(op, inputs, attributes, outputs=[out], name=name)

    def constant(self, step: str, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{self.prefix}/{step}"
        tensor.name = name
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _attention(
    graph: ir.Graph, node: ir.Node, index: int, windows: int, limit: int
) -> list[ir.Node]:
    """MatMul, Softmax, MatMul for ``Attention`` of scale 1 without mask, bias or cache.

    q, k and v are [n, heads, tokens, width]. Names start with ``attention.INDEX``, in a block of
    queries with ``attention.INDEX/block.BLOCK``, so that :mod:`engines.fusion` can group them.
    """
    defaults = {"scale": 1.0, "is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
    plain = all(defaults.get(a.name) == a.value for a in node.attributes.values())
    if len(node.inputs) != 3 or "scale" not in node.attributes or not plain:
        raise ExportError(
            f"attention {node.name} has inputs or attributes that the plain form does not know: "
            f"expected q, k, v and {defaults}"
        )
    (q, real, (n, heads, tokens, width)), (k, _, (_, _, keys, _)), (v, _, _) = map(
        _typed, node.inputs
    )
    most = n if isinstance(n, int) else windows
    block = queries_per_block(tokens, 4 * most * heads * keys, limit)

    make = _Maker(graph, f"attention.{index}")
    turned = [n, heads, width, keys]
    transposed = make.node("keys", "Transpose", [k], real, turned, perm=[0, 1, 3, 2])
    nodes, results = [transposed], list[ir.Value]()
    for start in range(0, tokens, block):
        size = min(block, tokens - start)
        part = _Maker(graph, f"attention.{index}/block.{len(results)}")
        asked = q
        if block < tokens:
            bounds = [
                part.constant(step, ir.tensor([number], dtype=ir.DataType.INT64))
                for step, number in (("start", start), ("end", start + size), ("axis", 2))
            ]
            nodes.append(part.node("queries", "Slice", [q, *bounds], real, [n, heads, size, width]))
            asked = nodes[-1].outputs[0]
        logits = [n, heads, size, keys]
        for step, op, dtype, attributes in (
            ("logits", "MatMul", real, {}),
            ("cast", "Cast", ir.DataType.FLOAT, {"to": ir.DataType.FLOAT.value}),
            ("softmax", "Softmax", ir.DataType.FLOAT, {"axis": -1}),
            ("cast_back", "Cast", real, {"to": real.value}),
        ):
            if op == "Cast" and real == ir.DataType.FLOAT:
                continue
            fed = [asked, transposed.outputs[0]] if op == "MatMul" else [nodes[-1].outputs[0]]
            nodes.append(part.node(step, op, fed, dtype, logits, **attributes))
        weights = nodes[-1].outputs[0]
        nodes.append(part.node("values", "MatMul", [weights, v], real, [n, heads, size, width]))
        results.append(nodes[-1].outputs[0])
    if len(results) > 1:
        nodes.append(make.node("join", "Concat", results, real, [n, heads, tokens, width], axis=2))
    return nodes


def _gelu(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """``0.5 x (1 + erf(x / sqrt 2))``, in the order that TensorRT recognises as GELU.

    It is computed in the type of x: in float32 it would be a stage's largest tensor.
    """
    if "approximate" in node.attributes and node.attributes["approximate"].value != "none":
        raise ExportError(f"{node.name} is an approximated Gelu, which has no plain form")
    x, real, shape = _typed(node.inputs[0])
    make = _Maker(graph, str(node.name))

    def number(name: str, value: float) -> ir.Value:
        return make.constant(name, ir.tensor(value, dtype=real))

    divided = make.node("divided", "Div", [x, number("sqrt_two", math.sqrt(2))], real, shape)
    erf = make.node("erf", "Erf", divided.outputs, real, shape)
    plus = make.node("plus", "Add", [erf.outputs[0], number("one", 1.0)], real, shape)
    times = make.node("times", "Mul", [x, plus.outputs[0]], real, shape)
    half = make.node("half", "Mul", [times.outputs[0], number("a_half", 0.5)], real, shape)
    return [divided, erf, plus, times, half]
