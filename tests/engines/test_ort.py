from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from toy import Toy

from edge_common.errors import EngineError
from engines.bundle import TensorSpec
from engines.engine import check_feeds
from engines.ort import OrtEngine


def save(path: Path, nodes: list, inputs: list, outputs: list) -> Path:
    def infos(tensors: list) -> list:
        return [h.make_tensor_value_info(*tensor) for tensor in tensors]

    graph = h.make_graph(nodes, "g", infos(inputs), infos(outputs))
    opset = [h.make_opsetid("", 21)]
    onnx.save(h.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def toy_feeds(n: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
        "extent": np.full((n, 2), 16),
        "window": np.arange(n),
    }


@pytest.fixture
def engine(toy_bundle: Path) -> OrtEngine:
    return OrtEngine(toy_bundle / "stack.onnx", threads=1, device="cpu")


def test_the_engine_reports_its_inputs_and_outputs(engine: OrtEngine) -> None:
    assert engine.inputs == (
        TensorSpec("pixels", "uint8", ("n", 16, 16, 3)),
        TensorSpec("extent", "int64", ("n", 2)),
        TensorSpec("window", "int64", ("n",)),
    )
    assert engine.outputs == (TensorSpec("tokens", "float32", ("n", 16, 8)),)
    assert engine.device == "cpu"


def test_weights_beside_the_graph_are_used(engine: OrtEngine, toy: Toy) -> None:
    feeds = toy_feeds()
    # Not contiguous: selecting rows in another order can give such arrays.
    feeds["pixels"] = feeds["pixels"][::-1, :, ::-1]
    np.testing.assert_allclose(engine.run(feeds)["tokens"], toy.stack(**feeds), rtol=1e-5)


def test_outputs_are_written_to_the_given_arrays(engine: OrtEngine) -> None:
    whole = np.full((4, 16, 8), np.nan, np.float32)
    expected = engine.run(toy_feeds())["tokens"]
    found = engine.run(toy_feeds(), {"tokens": whole[1:3]})
    assert found["tokens"].base is whole
    np.testing.assert_array_equal(whole[1:3], expected)
    assert np.isnan(whole[[0, 3]]).all()


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ({}, "returns tokens, but out has nothing"),
        ({"masks": np.empty((2, 16, 8), "f4")}, "returns tokens, but out has masks"),
        ({"tokens": np.empty((3, 16, 8), "f4")}, r"float32 \(2, 16, 8\), .* float32 \(3, 16, 8\)"),
        ({"tokens": np.empty((2, 16), "f4")}, r"out has float32 \(2, 16\)"),
        ({"tokens": np.empty((2, 16, 8), "f8")}, "out has float64"),
        (
            {"tokens": np.empty((2, 8, 16), "f4").transpose(0, 2, 1)},
            "is not a writable",
        ),
        ({"tokens": np.frombuffer(bytes(1024), "f4").reshape(2, 16, 8)}, "is not a writable"),
    ],
)
def test_output_arrays_that_do_not_fit_are_refused(
    engine: OrtEngine, out: dict[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        engine.run(toy_feeds(), out)


def changed(**feeds: np.ndarray | None) -> dict[str, np.ndarray]:
    both: dict[str, np.ndarray | None] = {**toy_feeds(), **feeds}
    return {name: array for name, array in both.items() if array is not None}


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({}, "missing extent, pixels, window"),
        (changed(window=None), r"missing window\. The stage takes extent, pixels, window"),
        (changed(prompt=np.zeros(1)), "unknown prompt"),
        (changed(window=np.zeros(2, np.int32)), "window is int32, expected int64"),
        (changed(window=np.zeros(2, ">i8")), "window is >i8, expected int64"),
        (changed(window=np.zeros((2, 1), np.int64)), r"window has shape \(2, 1\)"),
        (changed(extent=np.zeros((2, 3), np.int64)), r"extent has shape \(2, 3\)"),
        (changed(window=np.zeros(3, np.int64)), "makes n 3, but input pixels makes it 2"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(
    engine: OrtEngine, feeds: dict[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        engine.run(feeds)


def test_checked_feeds_give_the_dynamic_sizes(engine: OrtEngine) -> None:
    assert check_feeds(engine.inputs, toy_feeds(5)) == {"n": 5}


def test_a_library_error_is_one_clear_line(engine: OrtEngine) -> None:
    with pytest.raises(EngineError, match=r"stack\.onnx failed: ") as caught:
        engine.run(changed(window=np.array([0, 9])))  # the position table has no such window
    assert "\n" not in str(caught.value)


def test_a_closed_engine_does_not_run(engine: OrtEngine) -> None:
    with engine as opened:
        opened.run(toy_feeds())
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.run(toy_feeds())


def test_missing_and_broken_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is missing"):
        OrtEngine(tmp_path / "no.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"bad\.onnx cannot be opened"):
        OrtEngine(tmp_path / "bad.onnx")


def test_missing_weights_are_one_clear_line(toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "stack.onnx").write_bytes((toy_bundle / "stack.onnx").read_bytes())
    with pytest.raises(EngineError, match="cannot be opened") as caught:
        OrtEngine(tmp_path / "stack.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "1 to 1,024"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_invalid_settings_are_refused(toy_bundle: Path, arguments: dict, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        OrtEngine(toy_bundle / "stack.onnx", **arguments)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here"
)
def test_missing_cuda_gives_a_remedy(toy_bundle: Path) -> None:
    with pytest.raises(EngineError, match="pip install onnxruntime-gpu"):
        OrtEngine(toy_bundle / "stack.onnx", device="cuda")
    assert OrtEngine(toy_bundle / "stack.onnx", device="auto").device == "cpu"


THREADS = """
import os, sys
from engines.ort import OrtEngine
first = OrtEngine(sys.argv[1], threads=1)  # the library's own threads start with it
before = len(os.listdir("/proc/self/task"))
engine = OrtEngine(sys.argv[1], threads=int(sys.argv[2]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_it_starts_no_more_threads_than_requested(toy_bundle: Path, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(toy_bundle / "stack.onnx"), str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    # The caller's own thread works too.
    assert int(done.stdout) == threads - 1


def test_idle_threads_sleep(toy_bundle: Path) -> None:
    # A spinning pool uses processor time between runs. Ours must not spin, or three nodes on one
    # machine slow one another down.
    engine = OrtEngine(toy_bundle / "stack.onnx", threads=4)
    options = engine._session.get_session_options()
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"
    assert options.inter_op_num_threads == 1


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Cast", ["x"], ["f"], to=T.FLOAT),
        h.make_node("Add", ["f", "y"], ["s"]),
        h.make_node("Cast", ["s"], ["z"], to=T.BFLOAT16),
    ]
    inputs = [("x", T.BFLOAT16, ["n", 2]), ("y", T.FLOAT, ["n", 2])]
    path = save(tmp_path / "b.onnx", nodes, inputs, [("z", T.BFLOAT16, ["n", 2])])
    engine = OrtEngine(path, device="cpu")
    assert [spec.dtype for spec in engine.outputs] == ["bfloat16"]
    one, two, four = 0x3F80, 0x4000, 0x4080
    x, y = np.array([[one, two]], np.uint16), np.array([[1, 2]], np.float32)
    found = engine.run({"x": x, "y": y})["z"]
    np.testing.assert_array_equal(found, np.array([[two, four]], np.uint16))
    room = np.zeros((1, 2), np.uint16)
    assert engine.run({"x": x, "y": y}, {"z": room})["z"] is room
    np.testing.assert_array_equal(found, room)


def test_bfloat16_arithmetic_is_refused_on_the_cpu(tmp_path: Path) -> None:
    nodes = [h.make_node("MatMul", ["x", "x"], ["z"])]
    spec = [T.BFLOAT16, [2, 2]]
    path = save(tmp_path / "m.onnx", nodes, [("x", *spec)], [("z", *spec)])
    with pytest.raises(EngineError, match=r"use an fp32 or fp16 bundle, or --device cuda"):
        OrtEngine(path, device="cpu")


def test_an_unsupported_type_is_refused_by_name(tmp_path: Path) -> None:
    nodes = [h.make_node("Identity", ["x"], ["z"])]
    spec = [T.STRING, [2]]
    path = save(tmp_path / "s.onnx", nodes, [("x", *spec)], [("z", *spec)])
    with pytest.raises(EngineError, match=r"x of type tensor\(string\)"):
        OrtEngine(path)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs processor affinity")
def test_by_default_the_engine_uses_all_cores_available_to_the_process(
    engine: OrtEngine, toy_bundle: Path
) -> None:
    threads = OrtEngine(toy_bundle / "stack.onnx")._session.get_session_options()
    assert threads.intra_op_num_threads == len(os.sched_getaffinity(0))


def test_cuda_computes_float32_without_tf32(
    monkeypatch: pytest.MonkeyPatch, toy_bundle: Path
) -> None:
    real = onnxruntime.InferenceSession
    asked: list[Any] = []

    def open_on_the_cpu(path: str, options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_the_cpu)
    OrtEngine(toy_bundle / "stack.onnx").close()
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
