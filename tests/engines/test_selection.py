from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from simulated_trt import GPU, SimulatedMachine, SimulatedTrt, install, write_plan

from edge_common.errors import BundleError, EngineError, PlanError
from engines import cuda, libraries, selection
from engines import plan as plans
from engines.bundle import Bundle, shipped_bundle
from engines.ort import OrtEngine
from engines.parity import gate
from engines.pipeline import Pipeline
from engines.plan import Parity, Plan, Row
from engines.selection import Failure, find_failure, onnx_identity, open_stage, write_failure

OTHER_GPU = "Another GPU"


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(toy_bundle, tmp_path / "b"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimulatedMachine:
    return install(monkeypatch)


def judge(plan: Plan, machine: SimulatedMachine, *, passed: bool, gpu: str = GPU.name) -> None:
    here = selection.this_machine(machine.library, GPU)
    here = msgspec.structs.replace(here, gpu=gpu)
    row = Row(plan.record.stage, "golden", "PyTorch", 1.0, 0.0, 0.0, True, None, None, passed)
    plans.write_parity(plan, Parity(passed, here, (row,), "2026-01-01T00:00:00+00:00", {}))


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_plans_onnx_runtime_is_used_and_no_gpu_is_looked_for(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nothing here is TensorRT's")

    monkeypatch.setattr(selection.cuda, "facts", fail)
    monkeypatch.setattr(libraries, "load", fail)
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)
    assert texts(caplog) == []


@pytest.mark.process
def test_running_without_plans_imports_no_tensorrt(bundle: Bundle) -> None:
    script = (
        "import sys\n"
        "from engines.bundle import Bundle\n"
        "from engines.selection import open_stage\n"
        "open_stage(Bundle.load(sys.argv[1]), 'stack').close()\n"
        "assert not {*sys.modules} & {'tensorrt', 'tensorrt_rtx', 'pycuda', 'engines.trt'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle.path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_that_passed_here_serves_without_a_warning(
    bundle: Bundle, machine: SimulatedMachine, caplog: pytest.LogCaptureFixture
) -> None:
    (plan,) = machine.build(bundle, "stack")
    judge(plan, machine, passed=True)
    for device in ("auto", "tensorrt"):
        with open_stage(bundle, "stack", device=device) as engine:
            assert isinstance(engine, SimulatedTrt)
    assert texts(caplog) == []
    with open_stage(bundle, "stack", device="cpu") as engine:
        assert isinstance(engine, OrtEngine)


def test_an_unmeasured_plan_serves_with_a_single_warning(
    bundle: Bundle, machine: SimulatedMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.build(bundle, "stack")
    for _ in range(3):
        with open_stage(bundle, "stack") as engine:
            assert isinstance(engine, SimulatedTrt)
    (text,) = texts(caplog)
    assert f"edge-runtime verify {bundle.path}" in text


@pytest.mark.parametrize(
    ("gpu", "passed", "version", "reason"),
    [
        (GPU.name, False, (10, 13, 3), "failed the parity gate on this machine"),
        (None, True, (10, 4, 0), "has a known defect"),
        (OTHER_GPU, True, (10, 4, 0), "was measured elsewhere"),
    ],
)
def test_a_plan_that_may_not_serve_is_skipped_or_refused(
    bundle: Bundle,
    machine: SimulatedMachine,
    caplog: pytest.LogCaptureFixture,
    gpu: str | None,
    passed: bool,
    version: tuple[int, int, int],
    reason: str,
) -> None:
    machine.version = version
    (plan,) = machine.build(bundle, "stack")
    if gpu is not None:
        judge(plan, machine, passed=passed, gpu=gpu)
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)
    (text,) = texts(caplog)
    assert reason in text
    assert "ONNX Runtime is used instead of TensorRT" in text
    with pytest.raises(PlanError, match=reason) as error:
        open_stage(bundle, "stack", device="tensorrt")
    assert f"edge-runtime verify {bundle.path}" in str(error.value)
    assert machine.opened == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stage_sha256": "0" * 64}, "stale"),
        ({"graph_sha256": "0" * 64}, "stale"),
        ({"weights_sha256": "1" * 64}, "stale"),
        ({"compute_capabilities": ("8.6",)}, "built for compute capability 8.6"),
        ({"version": "10.3.0"}, "built with tensorrt 10.3.0"),
        ({"gpu": OTHER_GPU}, "built on the GPU Another GPU"),
    ],
)
def test_a_plan_for_something_else_is_not_read(
    bundle: Bundle, machine: SimulatedMachine, changes: dict[str, object], reason: str
) -> None:
    (plan,) = machine.build(bundle, "stack", **changes)
    with pytest.raises(PlanError, match=reason) as error:
        open_stage(bundle, "stack", device="tensorrt")
    assert f"edge-runtime build {bundle.path} --stage stack" in str(error.value)
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)
    assert machine.opened == []
    assert plan.path.exists()


def test_a_damaged_plan_is_skipped_or_refused(bundle: Bundle, machine: SimulatedMachine) -> None:
    (plan,) = machine.build(bundle, "stack")
    plan.path.write_bytes(b"?" * plan.record.plan_bytes)
    with pytest.raises(PlanError, match="its sha256 is"):
        open_stage(bundle, "stack", device="tensorrt")
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)


def test_a_plan_is_chosen_for_the_gpu_that_will_run_it(
    bundle: Bundle, machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.build(bundle, "stack")
    gpus = dataclasses.replace(GPU, name=OTHER_GPU), GPU
    monkeypatch.setattr(cuda, "facts", lambda ordinal=0: gpus[ordinal])
    with pytest.raises(PlanError, match=f"this is {OTHER_GPU}"):
        open_stage(bundle, "stack", device="tensorrt")
    open_stage(bundle, "stack", device="tensorrt", ordinal=1).close()


def test_a_missing_gpu_is_reported(
    bundle: Bundle, machine: SimulatedMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.build(bundle, "stack", "tail", "decoder")
    machine.gpu = None
    with Pipeline(bundle, threads=1) as pipeline:
        for stage in ("stack", "tail", "decoder"):
            assert isinstance(pipeline.engine(stage), OrtEngine)
    assert len(texts(caplog)) == 1, "one reason, logged once"
    assert "no NVIDIA driver" in texts(caplog)[0]
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_stage(bundle, "stack", device="tensorrt")


def test_a_missing_tensorrt_is_reported(
    bundle: Bundle, machine: SimulatedMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.build(bundle, "stack")
    machine.version = None
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)
    assert "neither TensorRT nor TensorRT-RTX is installed" in texts(caplog)[0]


def test_a_missing_plan_of_the_stage_is_reported(bundle: Bundle, machine: SimulatedMachine) -> None:
    machine.build(bundle, "tail")
    with pytest.raises(PlanError, match="no TensorRT plan of the stack") as error:
        open_stage(bundle, "stack", device="tensorrt")
    assert f"edge-runtime build {bundle.path} --stage stack" in str(error.value)
    with open_stage(bundle, "stack") as engine:
        assert isinstance(engine, OrtEngine)


def test_the_reasons_of_both_libraries_are_reported(
    bundle: Bundle, machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = machine.build(bundle, "stack")
    judge(plan, machine, passed=False)
    monkeypatch.setattr(libraries, "installed", lambda: ["tensorrt", "tensorrt-rtx"])
    with pytest.raises(PlanError, match=r"\(1\) .*failed the parity.* \(2\) tensorrt-rtx is not"):
        open_stage(bundle, "stack", device="tensorrt")


def test_a_plan_that_contradicts_the_manifest_is_closed_and_refused(
    bundle: Bundle, machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engines.trt

    (plan,) = machine.build(bundle, "stack")

    class Wrong(SimulatedTrt):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(machine, bundle, "stack")
            self.inputs = self.inputs[1:]

    monkeypatch.undo()
    monkeypatch.setattr(engines.trt, "TrtEngine", Wrong)
    with pytest.raises(PlanError, match=r"stack\.plan has inputs .*, its manifest says .*: edge"):
        selection.open_plan(bundle, plan, machine.library)
    assert machine.open == 0


def test_a_graph_of_another_type_than_its_manifest_is_refused(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage, side in (("stack", "outputs"), ("tail", "inputs")):
        (tokens,) = [t for t in manifest["stages"][stage][side] if t["name"] == "tokens"]
        tokens["dtype"] = "float16"
    path.write_text(json.dumps(manifest))
    reason = r"has outputs tokens float32 .*, its manifest says tokens float16 .*edge-runtime expo"
    with pytest.raises(BundleError, match=reason):
        open_stage(Bundle.load(bundle.path), "stack", device="cpu")


def test_unknown_devices_and_stages_are_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="'tpu', expected one of auto, cpu, cuda, tensorrt"):
        open_stage(bundle, "stack", device="tpu")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="has no encoder"):
        open_stage(bundle, "encoder", device="tensorrt")


# Failures of ONNX Runtime ------------------------------------------------------------------------


def failure(bundle: Bundle, device: selection.OrtKind, **changes: object) -> Failure:
    engine, place = onnx_identity(device)
    row = Row("stack", "golden", "PyTorch", None, None, None, False, None, None, False)
    found = Failure(engine, place, bundle.stage("stack").sha256, "2026-01-01", (row,))
    return msgspec.structs.replace(found, **changes)


def test_a_failure_on_the_cpu_stops_serving_there(bundle: Bundle) -> None:
    write_failure(bundle, "stack", "cpu", failure(bundle, "cpu"))
    for device in ("auto", "cpu"):
        with pytest.raises(EngineError, match="failed the parity gate on the stack") as error:
            open_stage(bundle, "stack", device=device)
        assert f"edge-runtime verify {bundle.path}" in str(error.value)
    open_stage(bundle, "tail").close()
    write_failure(bundle, "stack", "cpu", None)
    open_stage(bundle, "stack").close()


def test_a_failure_on_cuda_is_skipped_or_refused(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection._warn_once.cache_clear()
    write_failure(bundle, "stack", "cuda", failure(bundle, "cuda"))
    asked: list[str] = []
    real = selection.open_onnx

    def spy(*args: object, **options: object) -> OrtEngine:
        asked.append(str(options["device"]))
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(selection, "open_onnx", spy)
    open_stage(bundle, "stack").close()
    assert asked == ["cpu"]
    assert "the CPU is used instead of CUDA" in texts(caplog)[0]
    with pytest.raises(EngineError, match="CUDA failed the parity gate"):
        open_stage(bundle, "stack", device="cuda")


@pytest.mark.parametrize(
    "changes",
    [{"engine": "ONNX Runtime 0.1 CPU"}, {"machine": "elsewhere"}, {"stage_sha256": "0" * 64}],
)
def test_a_failure_of_something_else_has_no_effect(
    bundle: Bundle, changes: dict[str, object]
) -> None:
    write_failure(bundle, "stack", "cpu", failure(bundle, "cpu", **changes))
    assert find_failure(bundle, "stack", "cpu") is None
    open_stage(bundle, "stack").close()


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_an_unreadable_note_of_failure_counts_as_one(bundle: Bundle, text: bytes) -> None:
    write_failure(bundle, "stack", "cpu", failure(bundle, "cpu"))
    (note,) = bundle.path.glob("plans/*/*")
    note.write_bytes(text)
    with pytest.raises(
        EngineError, match=r"(cannot be read|is damaged|is not a file).*measures again"
    ):
        open_stage(bundle, "stack")


def test_a_note_that_cannot_be_written_is_reported(bundle: Bundle) -> None:
    (bundle.path / "plans").write_text("in the way")
    with pytest.raises(EngineError, match="until then this verdict has no effect"):
        write_failure(bundle, "stack", "cpu", failure(bundle, "cpu"))


def test_notes_of_failure_are_no_plans(bundle: Bundle) -> None:
    write_failure(bundle, "stack", "cpu", failure(bundle, "cpu"))
    assert plans.plans(bundle) == []


def test_plans_of_another_library_are_found_by_that_library(
    bundle: Bundle, machine: SimulatedMachine
) -> None:
    """Two folders for one stage: the matching one is used."""
    machine.build(bundle, "stack")
    old = libraries.Library("tensorrt", (10, 3, 0), None)
    write_plan(bundle, "stack", old)
    with open_stage(bundle, "stack", device="tensorrt") as engine:
        assert isinstance(engine, SimulatedTrt)


@pytest.mark.process
def test_a_real_plan_is_found_and_needs_its_gpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT-RTX builds without a GPU. Nothing here is simulated."""
    pytest.importorskip("tensorrt_rtx")
    if cuda.device_count():
        pytest.skip("this machine has a GPU")
    from engines.build import BuildOptions, build_stage

    selection._warn_once.cache_clear()
    bundle = Bundle.load(shutil.copytree(shipped_bundle("fp16"), tmp_path / "real"))
    build_stage(bundle, "decoder", BuildOptions(backend="tensorrt-rtx"))
    with open_stage(bundle, "decoder") as engine:
        assert isinstance(engine, OrtEngine)
    assert "no NVIDIA driver" in texts(caplog)[-1]
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_stage(bundle, "decoder", device="tensorrt")
    report = gate(bundle, ["decoder"], threads=1)
    assert report.passed
    assert [v.status for v in report.verdicts if v.engine.startswith("tensorrt")] == ["not run"]
