from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from edge_common.errors import ExportError
from engines.bundle import Bundle
from engines.ort import OrtEngine
from exporters.tensor_sizes import report

SIZES = {"n": 5, "p": 3, "k": 2}


def info(name: str, dtype: int, *shape: int | str | None) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, dtype, list(shape))


def save(
    path: Path, nodes: list, inputs: list, outputs: list, constants: list | None = None
) -> Path:
    graph = h.make_graph(nodes, "g", inputs, outputs, constants or [])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize("form", ["main", "plain"])
@pytest.mark.parametrize("name", ["stack", "tail", "decoder"])
def test_shapes_equal_those_of_onnx_runtime(
    random_bundle: Path, tmp_path: Path, name: str, form: str
) -> None:
    """Every intermediate result becomes an output. Its real shape must equal the report's."""
    bundle = Bundle.load(random_bundle)
    path = bundle.plain_path(name) if form == "plain" else bundle.stage_path(name)
    found = report(path, SIZES)
    assert found.unknown == ()
    model = onnx.load(path)  # weights included
    made = [output for node in model.graph.node for output in node.output]
    assert found.tensors == len(made)
    assert sum(found.operators.values()) == len(model.graph.node)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    onnx.save(model, tmp_path / "all.onnx")
    feeds = {}
    for spec in bundle.stage(name).inputs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        feeds[spec.name] = np.ones(shape, spec.numpy_dtype)
    with OrtEngine(tmp_path / "all.onnx", threads=1, device="cpu") as engine:
        answers = engine.run(feeds)
    seen: dict[tuple[str, tuple[int, ...], int], int] = {}
    for array in answers.values():
        key = (str(array.dtype), array.shape, array.nbytes)
        seen[key] = seen.get(key, 0) + 1
    told: dict[tuple[str, tuple[int, ...], int], int] = {}
    for group in found.groups:
        key = (group.dtype, group.shape, group.bytes)
        told[key] = told.get(key, 0) + group.count
    assert told == seen
    sizes = [group.bytes for group in found.groups]
    assert sizes == sorted(sizes, reverse=True)
    assert found.largest == max(array.nbytes for array in answers.values())


def test_dimensions_follow_the_given_sizes(random_bundle: Path) -> None:
    stack = Bundle.load(random_bundle).stage_path("stack")
    assert report(stack, {"n": 10}).largest == 2 * report(stack, {"n": 5}).largest


def test_weights_outside_the_file_are_not_read(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 1000), np.float32), "w")
    nodes = [h.make_node("MatMul", ["x", "w"], ["y"]), h.make_node("Relu", ["y"], ["z"])]
    path = tmp_path / "g.onnx"
    save(path, nodes, [info("x", T.FLOAT, "n", 4)], [info("z", T.FLOAT, "n", 1000)], [weight])
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0
    )
    (tmp_path / "w.data").unlink()
    found = report(path, {"n": 2})
    assert [(g.op, g.shape, g.bytes) for g in found.groups] == [
        ("MatMul", (2, 1000), 8000),
        ("Relu", (2, 1000), 8000),
    ]


def test_sizes_of_all_types(tmp_path: Path) -> None:
    for kind, name, size in (
        (T.BFLOAT16, "bfloat16", 2),
        (T.FLOAT16, "float16", 2),
        (T.BOOL, "bool", 1),
        (T.INT64, "int64", 8),
    ):
        node = h.make_node("Cast", ["x"], ["y"], to=kind)
        path = save(tmp_path / "g.onnx", [node], [info("x", T.FLOAT, 7)], [info("y", kind, 7)])
        (group,) = report(path, {}).groups
        assert (group.dtype, group.bytes) == (name, 7 * size)


def test_shapes_that_cannot_be_inferred_are_counted(tmp_path: Path) -> None:
    nodes = [
        h.make_node("NonZero", ["x"], ["places"]),  # the number of results depends on the data
        h.make_node("Cast", ["places"], ["y"], to=T.FLOAT),
    ]
    path = save(tmp_path / "g.onnx", nodes, [info("x", T.FLOAT, 7)], [info("y", T.FLOAT, 1, None)])
    found = report(path, {})
    assert found.unknown == ("places", "y")
    assert found.tensors == 0


def test_branches_are_counted_as_unknown(tmp_path: Path) -> None:
    inner = h.make_graph([h.make_node("Relu", ["x"], ["r"])], "b", [], [info("r", T.FLOAT, 7)])
    node = h.make_node("If", ["c"], ["y"], "choice", then_branch=inner, else_branch=inner)
    inputs = [info("c", T.BOOL), info("x", T.FLOAT, 7)]
    found = report(save(tmp_path / "g.onnx", [node], inputs, [info("y", T.FLOAT, 7)]), {})
    assert sorted(found.unknown) == ["choice/else_branch", "choice/then_branch"]


def test_an_unknown_dimension_name_is_refused(tmp_path: Path) -> None:
    node = h.make_node("Relu", ["x"], ["y"])
    path = save(
        tmp_path / "g.onnx", [node], [info("x", T.FLOAT, "batch")], [info("y", T.FLOAT, "batch")]
    )
    with pytest.raises(ExportError, match=r"dynamic dimension 'batch', expected one of n, p, k"):
        report(path, SIZES)


@pytest.mark.parametrize("content", [b"no graph at all", b"", None])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"no ONNX file|does not exist"):
        report(path, {})
