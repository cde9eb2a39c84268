"""Writes stage modules as ONNX files: the graph, and its weights in a data file beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import onnx_ir as ir
import torch
from torch import nn

from edge_common.errors import ExportError
from engines.bundle import FLOAT_TYPES, Stage, TensorSpec, contract, hash_file, stage_digest
from engines.geometry import Geometry

from .precision import TENSOR_DTYPES, Precision

OPSET = 23
_EXAMPLE_SIZES = {"n": 3, "p": 2, "k": 4}

Specs = tuple[TensorSpec, ...]


def stage_specs(
    stage: str, geometry: Geometry, precision: Precision, head_blocks: int | None = None
) -> tuple[Specs, Specs]:
    """Inputs and outputs that the graph of ``stage`` must have."""
    inputs, outputs = (
        tuple(
            TensorSpec(name, dtype or FLOAT_TYPES[precision], shape)
            for name, (dtype, shape) in side
        )
        for side in map(dict.items, contract(stage, geometry, head_blocks))
    )
    return inputs, outputs


def write_stage(
    name: str, module: nn.Module, inputs: Specs, outputs: Specs, directory: Path
) -> Stage:
    """Export ``module`` as ``directory/name.onnx`` in opset 23 and describe it for the manifest.

    Counts of windows and prompts are dynamic. Weights of 256 bytes or more lie in
    ``name.onnx.data``. The same weights give the same bytes, so that edges and nodes that export on
    their own agree on a stage's digest; nothing about the exporting machine is in the file.

    Raises:
        ExportError: the graph's inputs or outputs are not ``inputs`` and ``outputs``.
        OSError: the file could not be written.
    """
    model = _to_onnx(module.eval(), inputs, outputs)
    avoid_uint8_shapes(model)
    _make_anonymous(model)
    return _save(name, model, inputs, outputs, directory)


def _save(name: str, model: ir.Model, inputs: Specs, outputs: Specs, directory: Path) -> Stage:
    _check_signature(name, model, inputs, outputs)
    files = [f"{name}.onnx", f"{name}.onnx.data"]
    ir.save(model, directory / files[0], external_data=files[1])
    hashes = {f: hash_file(directory / f) for f in files}
    return Stage(
        file=files[0], files=hashes, sha256=stage_digest(hashes), inputs=inputs, outputs=outputs
    )


def _to_onnx(module: nn.Module, inputs: Specs, outputs: Specs) -> ir.Model:
    dims = {s: torch.export.Dim(s, min=int(s != "k"), max=4096) for s in _EXAMPLE_SIZES}
    examples, dynamic = [], []
    for spec in inputs:
        shape = [_EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        examples.append(torch.zeros(shape, dtype=TENSOR_DTYPES[spec.dtype]))
        dynamic.append({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)})
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Positional(module),
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=[s.name for s in inputs],
            output_names=[s.name for s in outputs],
            dynamic_shapes=(tuple(dynamic),),
            verbose=False,
        )
    assert program is not None
    return program.model


class _Positional(nn.Module):
    """Gives every stage a signature for which the exporter accepts dynamic shapes."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.stage(*inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's output; its exceptions still say what is wrong."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def avoid_uint8_shapes(model: ir.Model) -> None:
    """Read the batch size from an input that is not uint8.

    TensorRT accepts uint8 inputs only in a cast, not even to ask for their shape
    (https://github.com/NVIDIA/TensorRT/issues/3985).
    """
    for node in model.graph.all_nodes():
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or value.dtype != ir.DataType.UINT8:
            continue
        if [node.attributes[k].as_int() for k in ("start", "end")] != [0, 1]:
            raise ExportError(f"the graph asks for more than the batch size of {value.name}")
        size = _describe(value)[2][0]
        others = (v for v in model.graph.inputs if v.dtype != ir.DataType.UINT8)
        node.replace_input_with(0, next(v for v in others if _describe(v)[2][0] == size))


def _make_anonymous(model: ir.Model) -> None:
    """Remove stack traces and other metadata: they contain paths, and make equal graphs differ."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "edge-runtime", None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "main"
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _check_signature(name: str, model: ir.Model, inputs: Specs, outputs: Specs) -> None:
    for side, specs, values in (
        ("inputs", inputs, model.graph.inputs),
        ("outputs", outputs, model.graph.outputs),
    ):
        found, wanted = [_describe(v) for v in values], [_wanted(s) for s in specs]
        if found != wanted:
            raise ExportError(f"{side} of stage {name} came out as {found}, expected {wanted}")


def _wanted(spec: TensorSpec) -> tuple[str, str, tuple[int | str, ...]]:
    return spec.name, spec.dtype, spec.shape


def _describe(value: ir.Value) -> tuple[str | None, str, tuple[int | str | None, ...]]:
    dims = tuple(d if isinstance(d, int) else d.value for d in value.shape or ())
    name = value.dtype.name.lower() if value.dtype else "unknown"
    return value.name, "float32" if name == "float" else name, dims


def write_float32_twin(stage: Stage, source: Path, directory: Path) -> Stage:
    """Rewrite a bfloat16 stage as float32, with the same graph and the same rounded weights.

    ONNX Runtime has no bfloat16 arithmetic on CPUs, so the twin is verified there instead.

    Args:
        stage: the stage to rewrite, its files in ``source``.
        directory: where the twin goes.
    """
    model = ir.load(source / stage.file)
    _to_float32(model)
    inputs, outputs = (
        tuple(
            msgspec.structs.replace(s, dtype="float32") if s.dtype == "bfloat16" else s
            for s in specs
        )
        for specs in (stage.inputs, stage.outputs)
    )
    return _save(Path(stage.file).stem, model, inputs, outputs, directory)


def write_plain_twin(stage: Stage, source: Path, twin: Stage, directory: Path) -> Path:
    """Rewrite the plain form of a bfloat16 stage as float32 and return the file.

    Args:
        stage: the stage with its plain form, its files in ``source``.
        twin: what :func:`write_float32_twin` made of it in ``directory``; its weights are used.
        directory: where the file goes.
    """
    assert stage.plain is not None
    model = ir.load(source / stage.plain.file)
    weights = ir.load(directory / twin.file).graph.initializers
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value, value.dtype = weights[name].const_value, ir.DataType.FLOAT
    _to_float32(model)
    path = directory / stage.plain.file
    ir.save(model, path)
    return path


def _to_float32(model: ir.Model) -> None:
    """Make every bfloat16 of ``model`` a float32 of the same value, in place."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.Tensor(tensor.numpy().astype("float32"), name=value.name)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        values += node.outputs
        for attribute in list(node.attributes.values()):
            tensor = attribute.value
            if attribute.name == "to" and tensor == ir.DataType.BFLOAT16:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            elif isinstance(tensor, ir.TensorProtocol) and tensor.dtype == ir.DataType.BFLOAT16:
                exact = ir.Tensor(tensor.numpy().astype("float32"), name=tensor.name)
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, exact)
    for value in values:
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
