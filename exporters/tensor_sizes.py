"""Sizes of the tensors between a graph's nodes, found by shape inference without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_common.errors import ExportError

if TYPE_CHECKING:
    import onnx

Kind = tuple[str, str, tuple[int, ...]]  # operator, type, shape


@dataclass(frozen=True)
class Group:
    """Outputs of nodes with the same operator, type and shape.

    Attributes:
        name: the first of them, in the order of the graph.
        op: operator that makes it.
        dtype: ONNX's name of the type, in small letters (``float16``, ``bfloat16``, ...).
        shape: with the dynamic dimensions filled in.
        bytes: of one of them.
        count: how many there are.
    """

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int


@dataclass(frozen=True)
class Report:
    """All outputs of a graph's nodes, largest first, and the names of those of unknown shape."""

    groups: tuple[Group, ...]
    unknown: tuple[str, ...]
    operators: dict[str, int]

    @property
    def tensors(self) -> int:
        """How many tensors were measured."""
        return sum(group.count for group in self.groups)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((group.bytes for group in self.groups), default=0)


def report(path: Path, sizes: Mapping[str, int]) -> Report:
    """Measure the tensors of the graph in file ``path``, largest first.

    A tensor counts as an engine would store it that fuses nothing. Tensors whose shape cannot be
    inferred are listed as unknown. Weights in other files are not read.

    Args:
        path: ONNX file. Its external weights are not required.
        sizes: size of each dynamic dimension, by the name the graph gives it.

    Raises:
        ExportError: the file is no ONNX graph, or has a dynamic dimension that ``sizes`` lacks.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ExportError(f"{path} does not exist", mend="name a bundle or an .onnx file") from None
    except (DecodeError, IsADirectoryError) as error:
        raise ExportError(f"{path} is no ONNX file ({type(error).__name__})") from error
    if not model.graph.node:
        raise ExportError(f"{path} is no ONNX file, or one of a graph without nodes")
    _fix_sizes(path, model, sizes)
    computed: dict[str, tuple[str, np.ndarray]] = {}
    graph = _infer(path, model)
    while folded := _fold_shapes(model, graph):
        computed.update(folded)
        graph = _infer(path, model)
    known = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.output]}

    counts: dict[Kind, int] = {}
    first: dict[Kind, str] = {}
    operators: dict[str, int] = {}
    unknown = []

    def found(op: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        counts[op, dtype, shape] = counts.get((op, dtype, shape), 0) + 1
        first.setdefault((op, dtype, shape), name)

    for name, (op, value) in computed.items():
        operators[op] = operators.get(op, 0) + 1
        found(op, name, str(value.dtype), value.shape)
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
        # Branches and loops are not inferred.
        unknown += [f"{node.name}/{a.name}" for a in node.attribute if a.HasField("g") or a.graphs]
        for name in filter(None, node.output):
            described = _describe(known.get(name))
            if described is None:
                unknown.append(name)
            else:
                found(node.op_type, name, *described)
    groups = [
        Group(first[key], *key, _bytes(key[1], key[2]), count) for key, count in counts.items()
    ]
    groups.sort(key=lambda group: -group.bytes)
    return Report(tuple(groups), tuple(unknown), operators)


def _fix_sizes(path: Path, model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Set the inputs' dynamic dimensions, and remove other shapes from the graph."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                continue
            if dim.dim_param not in sizes:
                raise ExportError(
                    f"{path}: input {value.name} has the dynamic dimension {dim.dim_param!r}, "
                    f"expected one of {', '.join(sizes)}"
                )
            dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _infer(path: Path, model: onnx.ModelProto) -> onnx.GraphProto:
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"{path}: ONNX cannot infer its shapes: {error}") from error


def _fold_shapes(
    model: onnx.ModelProto, inferred: onnx.GraphProto
) -> dict[str, tuple[str, np.ndarray]]:
    """Compute values that depend only on known shapes and make them constants of ``model``.

    ONNX's own inference does not follow shapes through every operator. Returns the computed values
    with the operators that made them; empty if there are none left.
    """
    import onnx
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    values = [*inferred.value_info, *inferred.input]
    shapes = {v.name: _describe(v.type.tensor_type) for v in values}
    shapes |= {t.name: ("", tuple(t.dims)) for t in model.graph.initializer}
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    constants = {t.name: t for t in model.graph.initializer if t.data_type in integers}
    ready: set[str] = set()
    chain = []
    for node in model.graph.node:
        if node.op_type == "Shape" and shapes.get(node.input[0]) is not None:
            wanted = shapes[node.input[0]]
            assert wanted is not None
            bounds = {a.name: a.i for a in node.attribute}
            part = wanted[1][bounds.get("start", 0) : bounds.get("end")]
            value = numpy_helper.from_array(np.array(part, np.int64), node.output[0])
            chain.append(helper.make_node("Constant", [], [node.output[0]], value=value))
        elif all(i in constants or i in ready for i in node.input) and node.input:
            chain.append(node)
        else:
            continue
        ready.update(node.output)
    if not chain:
        return {}
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in sorted(ready)]
    used = {name for node in chain for name in node.input}
    small = helper.make_graph(
        chain, "shapes", [], outputs, [t for name, t in constants.items() if name in used]
    )
    evaluator = ReferenceEvaluator(helper.make_model(small, opset_imports=model.opset_import))
    results = dict(zip(sorted(ready), evaluator.run(None, {}), strict=True))
    rest = [node for node in model.graph.node if not ready.intersection(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(rest)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in results.items())
    return {name: (made[name], value) for name, value in results.items()}


def _describe(kind: onnx.TypeProto.Tensor | None) -> tuple[str, tuple[int, ...]] | None:
    import onnx

    if kind is None or not kind.HasField("shape") or kind.elem_type == 0:
        return None
    if not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    return "float32" if name == "float" else name, tuple(d.dim_value for d in kind.shape.dim)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    import onnx

    number = onnx.TensorProto.DataType.Value("FLOAT" if dtype == "float32" else dtype.upper())
    return math.prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(number).itemsize
