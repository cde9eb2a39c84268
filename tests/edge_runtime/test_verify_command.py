"""``edge-runtime verify``, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from simulated_trt import SimulatedMachine, install

from edge_runtime.cli import main
from engines.bundle import Bundle, shipped_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(shipped_bundle("fp16"), tmp_path / "a bundle"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> SimulatedMachine:
    """A simulated machine with TensorRT. The bundle has plans for it."""
    found = install(monkeypatch)
    found.build(bundle, "stack", "tail", "decoder")
    monkeypatch.setenv("COLUMNS", "200")
    return found


def halve(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array / 2 for key, array in outputs.items()} if stage == "tail" else outputs


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_shipped_bundle_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--threads", "1", "--seed", "17"]) == 0
    said = capsys.readouterr()
    out = words(said.out)
    assert "every engine that ran passed" in out
    assert "the same random inputs again: --seed 17" in out
    assert "end to end golden, PyTorch" in out
    assert "measuring ONNX Runtime" in said.err
    assert "warning" not in said.err


def test_a_machine_with_only_a_cpu_is_reported_as_such(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    if _cuda():
        pytest.skip("this machine has more than the CPU")
    command = ["verify", str(bundle.path), "--threads", "1"]
    assert main(command) == 0
    out = words(capsys.readouterr().out)
    assert "Only ONNX Runtime on the CPU is available" in out
    assert f"`edge-runtime build '{bundle.path}'`" in out
    assert main([*command, "--device", "cpu"]) == 0
    assert "Nothing but" not in capsys.readouterr().out


def _cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def test_good_plans_pass(
    bundle: Bundle, machine: SimulatedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle.path), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "tensorrt-10.13.3-sm87" in out
    assert "FAILED" not in out
    assert "Nothing but" not in out


def test_a_failing_plan_is_named_and_the_exit_status_is_1(
    bundle: Bundle, machine: SimulatedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.spoil = halve
    assert main(["verify", str(bundle.path), "--threads", "1"]) == 1
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("tail FAILED: golden inputs against PyTorch: ") for line in lines)
    assert any(line.split()[0] == "tail" and line.endswith("FAILED") for line in lines if line)
    assert lines[-1] == "FAILED: tensorrt-10.13.3-sm87. What failed does not serve."
    assert main(["verify", str(bundle.path), "--threads", "1", "--stage", "stack"]) == 0
    assert main(["verify", str(bundle.path), "--threads", "1", "--device", "cpu"]) == 0
    assert main(["verify", str(bundle.path), "--threads", "1", "--device", "tensorrt"]) == 1


def test_plans_for_another_machine_are_not_run(
    bundle: Bundle, machine: SimulatedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.gpu = None
    assert main(["verify", str(bundle.path), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "stack not run: no NVIDIA driver is installed here (simulated)" in out


def test_nothing_measured_on_the_requested_device_is_a_failure(
    bundle: Bundle, machine: SimulatedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(bundle.path), "--threads", "1", "--device", "tensorrt"]
    assert main(command) == 0
    assert "nothing ran" not in capsys.readouterr().err
    machine.gpu = None
    assert main([*command, "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert "--require tensorrt` says what is missing" in said.err
    shutil.rmtree(bundle.path / "plans")
    assert main(command) == 1
    assert "nothing ran on --device tensorrt" in capsys.readouterr().err


def test_json_output(
    bundle: Bundle, machine: SimulatedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.spoil = lambda stage, outputs: {k: a * np.nan for k, a in outputs.items()}
    command = ["verify", str(bundle.path), "--json", "--seed", str(2**64 - 1), "--threads", "1"]
    assert main(command) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] is False
    assert facts["seed"] == 2**64 - 1
    assert facts["precision"] == "fp16"
    assert facts["tolerance"]["cosine"] == 0.999
    failed = [v for v in facts["verdicts"] if v["status"] == "failed"]
    assert [v["stage"] for v in failed] == ["stack", "tail", "decoder"]
    assert failed[0]["rows"][0]["cosine"] is None
    assert failed[0]["rows"][0]["finite"] is False


def test_a_verdict_that_cannot_be_saved_is_a_warning(
    bundle: Bundle,
    machine: SimulatedMachine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from engines import plan as plans

    def refuse(*_: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(plans, "json_bytes", refuse)
    assert main(["verify", str(bundle.path), "--threads", "1"]) == 0
    assert capsys.readouterr().err.count("warning: ") == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stage", "head"], "has no head"),
    ],
)
def test_mistakes_are_usage_errors(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *options]) == 1
    assert says in capsys.readouterr().err


def test_a_missing_bundle_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
