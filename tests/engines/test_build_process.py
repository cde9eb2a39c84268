"""The builder's code run in this process, and as a process whose library misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from edge_common.errors import BuildError, EngineError
from engines import build_process, cuda, libraries
from engines.build_process import (
    Began,
    Built,
    Event,
    Log,
    Phase,
    Progress,
    Request,
    Warned,
    form_for,
)
from engines.bundle import TensorSpec
from engines.libraries import Library
from engines.plan import AttentionReport

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 32


@pytest.fixture
def heard() -> list[Event]:
    return []


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Warned)]


# -- messages of a library ------------------------------------------------------


def test_similar_warnings_are_passed_on_once(heard: list[Event]) -> None:
    log = Log(heard.append)
    for layer in range(32):
        log.add(2, f"Running layernorm after self-attention in FP16, layer {layer}")
    log.add(2, "another")
    assert texts(heard) == ["Running layernorm after self-attention in FP16, layer 0", "another"]
    log.summarise()
    assert texts(heard)[2:] == ["31 more warnings that differ only in numbers"]


def test_messages_below_warning_and_known_warnings_are_dropped(heard: list[Event]) -> None:
    log = Log(heard.append)
    log.add(3, "info")
    log.add(4, "verbose")
    log.add(2, "ModelImporter.cpp:1071: Make sure input extent has Int64 binding.")
    log.summarise()
    assert heard == []


def test_errors_are_kept_for_the_failure_report(heard: list[Event]) -> None:
    log = Log(heard.append)
    assert log.errors() == "the library gave no reason"
    log.add(1, "WeightsContext.cpp:203: Failed to open file: ext.data")
    log.add(0, "Internal: broken")
    log.add(1, "WeightsContext.cpp:203: Failed to open file: ext.data")
    assert log.errors() == "Failed to open file: ext.data\n  Internal: broken"
    assert heard == []
    log.summarise()  # the build succeeded anyway
    assert texts(heard) == ["Failed to open file: ext.data", "Internal: broken"]


def test_a_flood_of_different_warnings_is_truncated(heard: list[Event]) -> None:
    log = Log(heard.append)
    for index in range(100):
        log.add(2, "x" * (index + 1))
    log.summarise()
    assert len(heard) == 21
    assert texts(heard)[-1].startswith("80 more")


# -- progress -----------------------------------------------------------------


def test_phases_nest_and_end_correctly(heard: list[Event]) -> None:
    progress = Progress(heard.append)
    progress.start("whole", None, 2)
    progress.start("part", "whole", 3)
    progress.finish("part")
    progress.finish("whole")
    assert heard == [
        Phase("whole", 0, 2, 0),
        Phase("part", 0, 3, 1),
        Phase("part", 3, 3, 1),
        Phase("whole", 2, 2, 0),
    ]


def test_steps_are_reported_from_time_to_time(
    heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(build_process.time, "monotonic", lambda: now[0])
    progress = Progress(heard.append)
    progress.start("whole", None, 10_000)
    for step in range(10_000):
        now[0] += 0.001
        progress.step("whole", step)
    steps = [event.done for event in heard if isinstance(event, Phase)]
    assert 90 <= len(steps) <= 102
    assert steps == sorted(steps)


def test_a_library_with_wrong_step_counts_does_no_harm(heard: list[Event]) -> None:
    progress = Progress(heard.append)
    progress.step("unknown", 3)
    progress.finish("unknown")
    progress.start("whole", "nobody", 0)
    progress.finish("whole")
    assert heard == [Phase("whole", 0, 0, 0), Phase("whole", 0, 0, 0)]


# -- the choice of form -----------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "version", "precision", "form"),
    [
        ("tensorrt", (10, 3, 0), "fp16", "plain"),
        ("tensorrt", (10, 13, 3), "bf16", "plain"),
        ("tensorrt", (10, 14, 0), "fp16", "attention"),
        ("tensorrt", (11, 4, 0), "bf16", "attention"),
        ("tensorrt", (11, 4, 0), "fp32", "plain"),
        ("tensorrt-rtx", (1, 7, 1), "fp16", "attention"),
        ("tensorrt-rtx", (1, 7, 1), "fp32", "plain"),
    ],
)
def test_the_form_follows_from_library_and_precision(
    flavour: Any, version: tuple[int, int, int], precision: str, form: str
) -> None:
    assert form_for(Library(flavour, version, None), precision) == form


# -- graphs -------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Request]:
    """A build request for a graph of nodes from ``x`` to ``y``, both [n, 4, 32]."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper as h

    def make(nodes: list[Any], dtype: str = "float16", **changes: Any) -> Request:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        x, y = (h.make_tensor_value_info(name, kind, ["n", 4, WIDTH]) for name in "xy")
        weight = onnx.numpy_helper.from_array(np.eye(WIDTH, dtype=dtype), "w")
        graph = h.make_graph(nodes, "graph", [x], [y], [weight])
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=10)
        onnx.save(model, tmp_path / "graph.onnx")
        shape: Any = ("n", 4, WIDTH)
        request = Request(
            parent=os.getppid(),
            backend="tensorrt-rtx",
            stage="stack",
            precision="fp16",
            attention=str(tmp_path / "graph.onnx"),
            plain=None,
            inputs=(TensorSpec("x", dtype, shape),),  # type: ignore[arg-type]
            outputs=(TensorSpec("y", dtype, shape),),  # type: ignore[arg-type]
            profile={"x": ((1, 4, WIDTH), (2, 4, WIDTH), (3, 4, WIDTH))},
            plan=str(tmp_path / "plan"),
        )
        return msgspec.structs.replace(request, **changes)

    return make


@pytest.fixture
def matmul() -> list[Any]:
    from onnx import helper as h

    return [h.make_node("MatMul", ["x", "w"], ["y"], name="product")]


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.usefixtures("rtx")
def test_a_small_graph_is_built(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event], tmp_path: Path
) -> None:
    build_process.build(ask(matmul), heard.append)
    began, built = heard[0], heard[-1]
    assert isinstance(began, Began)
    assert isinstance(built, Built)
    assert began.form == "attention"
    assert began.target.startswith("tensorrt-rtx-")
    assert built.flags["strongly typed"] is True
    assert built.attention == ()
    assert built.layers
    assert (tmp_path / "plan").stat().st_size > 1000
    assert texts(heard) == []


@pytest.mark.usefixtures("rtx")
def test_every_unparsable_node_is_named(ask: Callable[..., Request], heard: list[Event]) -> None:
    from onnx import helper as h

    nodes = [
        h.make_node("Det", ["x"], ["a"], name="first"),
        h.make_node("Frobnicate", ["a"], ["b"], name="second"),
        h.make_node("Identity", ["x"], ["y"], name="third"),
    ]
    with pytest.raises(BuildError, match="cannot parse") as failure:
        build_process.build(ask(nodes), heard.append)
    text = str(failure.value)
    assert "node first (Det)" in text
    assert "node second (Frobnicate)" in text
    assert "third" not in text
    assert "Begin node" not in text


@pytest.mark.usefixtures("rtx")
def test_a_corrupt_graph_is_an_error(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event]
) -> None:
    request = ask(matmul)
    Path(request.attention).write_bytes(b"\x08\x01garbage" * 100)
    with pytest.raises(BuildError, match=r"cannot parse .*graph\.onnx: MODEL_DESERIALIZE_FAILED"):
        build_process.build(request, heard.append)


@pytest.mark.usefixtures("rtx")
def test_missing_weights_are_named(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event], tmp_path: Path
) -> None:
    import onnx

    request = ask(matmul)
    onnx.save(
        onnx.load(request.attention),
        request.attention,
        save_as_external_data=True,
        location="gone.data",
        size_threshold=0,
    )
    (tmp_path / "gone.data").unlink()
    with pytest.raises(BuildError, match=r"gone\.data"):
        build_process.build(request, heard.append)


@pytest.mark.usefixtures("rtx")
def test_a_graph_of_the_wrong_precision_is_refused(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event]
) -> None:
    with pytest.raises(BuildError, match=r"multiplies matrices in float32.* says fp16"):
        build_process.build(ask(matmul, "float32"), heard.append)
    with pytest.raises(BuildError, match=r"multiplies matrices in float16.* says bf16"):
        build_process.build(ask(matmul, precision="bf16"), heard.append)
    request = ask(matmul, precision="fp32")
    with pytest.raises(BuildError, match=r"multiplies matrices in float16.* says fp32"):
        build_process.build(msgspec.structs.replace(request, plain=request.attention), heard.append)


@pytest.mark.usefixtures("rtx")
def test_a_graph_with_other_tensors_than_the_manifest_is_refused(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event]
) -> None:
    outputs = (TensorSpec("y", "float16", ("n", 5, WIDTH)),)
    with pytest.raises(BuildError, match=r"has the outputs .*the manifest says"):
        build_process.build(ask(matmul, outputs=outputs), heard.append)


@pytest.mark.usefixtures("rtx")
def test_a_bundle_without_the_plain_form_gives_a_remedy(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event]
) -> None:
    with pytest.raises(BuildError, match=r"from the plain form.*`edge-runtime export`"):
        build_process.build(ask(matmul, "float32", precision="fp32"), heard.append)


@pytest.mark.usefixtures("rtx")
def test_attention_without_a_kernel_gives_the_library_s_error(
    ask: Callable[..., Request], heard: list[Event]
) -> None:
    from onnx import helper as h

    nodes = [  # heads of width 4
        h.make_node("Relu", ["x"], ["k"]),
        h.make_node("Exp", ["x"], ["v"]),
        h.make_node("Attention", ["x", "k", "v"], ["y"], q_num_heads=8, kv_num_heads=8),
    ]
    with pytest.raises(BuildError, match=r"cannot build .*Attention operation was not supported"):
        build_process.build(ask(nodes), heard.append)


# -- TensorRT 10.3 on a Jetson, simulated on top of TensorRT-RTX ------------------


@pytest.fixture
def jetson(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    orin = cuda.Facts("Orin", "8.7", "540.4.0", "12.6", 8 << 30, True)
    library = Library("tensorrt", (10, 3, 0), rtx)
    monkeypatch.setattr(libraries, "choose", lambda backend: library)
    monkeypatch.setattr(cuda, "facts", lambda ordinal=0: orin)


@pytest.mark.usefixtures("jetson")
def test_simulated_tensorrt_builds_the_plain_form_for_the_local_gpu(
    ask: Callable[..., Request], matmul: list[Any], heard: list[Event], tmp_path: Path
) -> None:
    request = ask(matmul)
    broken = tmp_path / "attention.onnx"
    broken.write_bytes(b"what 10.3 cannot parse")
    request = msgspec.structs.replace(request, plain=request.attention, attention=str(broken))
    build_process.build(request, heard.append)
    began = heard[0]
    assert isinstance(began, Began)
    assert began.form == "plain"
    assert began.compute_capabilities == ("8.7",)
    assert began.target == "tensorrt-10.3.0-sm87"
    assert (began.gpu, began.device_memory_bytes) == ("Orin", 8 << 30)


def test_tensorrt_without_a_gpu_says_why_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(ordinal: int = 0) -> None:
        raise EngineError("no NVIDIA GPU is visible")

    monkeypatch.setattr(cuda, "facts", none)
    with pytest.raises(EngineError, match="only on the GPU that will run the plan: no NVIDIA GPU"):
        build_process._gpu(Library("tensorrt", (10, 3, 0), None))


FUSED = (AttentionReport("a", True, "mha"),), ()
UNTOLD = (AttentionReport("a", None),), ()


@pytest.mark.parametrize(
    ("opens", "inspected", "in_plan", "expected"),
    [
        (True, FUSED, UNTOLD, ("engine inspector", FUSED, 4096)),
        (True, UNTOLD, UNTOLD, ("engine inspector", UNTOLD, 4096)),
        (True, UNTOLD, FUSED, ("serialised plan", FUSED, 4096)),
        (False, UNTOLD, FUSED, ("serialised plan", FUSED, None)),
    ],
)
def test_build_details_are_read_from_the_engine_where_possible(
    opens: bool,
    inspected: Any,
    in_plan: Any,
    expected: Any,
    heard: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library is simulated: without a GPU no engine can be opened."""
    engine = mock.Mock(device_memory_size_v2=4096)
    trt = mock.Mock()
    trt.Runtime.return_value.deserialize_cuda_engine.return_value = engine if opens else None
    library = Library("tensorrt", (10, 3, 0), trt)
    monkeypatch.setattr(build_process.fusion, "from_inspector", lambda text, attentions: inspected)
    monkeypatch.setattr(build_process.fusion, "from_plan", lambda plan, attentions: in_plan)
    assert build_process._read_back(library, None, b"plan", {}, True, heard.append) == expected
    assert [("does not open on this GPU" in text) for text in texts(heard)] == [True] * (not opens)


class Config:
    """A simulated IBuilderConfig that accepts only one cache."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def create_timing_cache(self, data: bytes) -> bytes | None:
        self.made.append(data)
        return None if data == b"damaged" else data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache in (b"", b"fits")


@pytest.mark.parametrize(
    ("old", "made"),
    [
        (None, [b""]),
        (b"fits", [b"fits"]),
        (b"of another GPU", [b"of another GPU", b""]),
        (b"damaged", [b"damaged", b""]),
    ],
)
def test_an_unsuitable_timing_cache_is_replaced_with_a_warning(
    old: bytes | None,
    made: list[bytes],
    ask: Callable[..., Request],
    matmul: list[Any],
    heard: list[Event],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    if old is not None:
        cache.write_bytes(old)
    request = ask(
        matmul,
        timing_cache=None if old is None else str(cache),
        new_timing_cache=str(tmp_path / "new"),
    )
    config = Config()
    assert build_process._use_timing_cache(config, request, heard.append) in (b"", b"fits")
    assert config.made == made
    assert len(texts(heard)) == len(made) - 1


# -- the process --------------------------------------------------------------


def start(folder: Path, code: str, request: Request) -> subprocess.CompletedProcess[bytes]:
    """Start the process with a simulated ``tensorrt`` that executes ``code`` on import."""
    package = folder / "modules" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-m", "engines.build_process"],
        input=msgspec.json.encode(msgspec.structs.replace(request, parent=os.getpid())) + b"\n",
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        check=False,
    )


@pytest.mark.process
def test_library_output_does_not_mix_with_the_events(
    ask: Callable[..., Request], matmul: list[Any], tmp_path: Path
) -> None:
    code = "import os\nprint('chatter')\nos.write(1, b'more\\n')\nraise OSError('libnvinfer.so.10')"
    done = start(tmp_path, code, ask(matmul, backend="tensorrt"))
    (event,) = done.stdout.splitlines()
    failed = json.loads(event)
    assert failed["type"] == "failed"
    assert failed["kind"] == "EngineError"
    assert "libnvinfer.so.10" in failed["found"]
    assert "apt install --reinstall" in failed["mend"]
    assert b"chatter" in done.stderr
    assert done.returncode == 1


@pytest.mark.process
def test_the_process_ends_when_its_parent_has_died(
    ask: Callable[..., Request], matmul: list[Any]
) -> None:
    orphan = msgspec.json.encode(ask(matmul, parent=1 << 30)) + b"\n"
    done = subprocess.run(
        [sys.executable, "-m", "engines.build_process"],
        input=orphan,
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
