"""``edge-runtime build`` as users run it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.cli import main
from edge_runtime.commands import build as command
from engines.bundle import Bundle, node_bundle, shipped_bundle
from engines.plan import Machine, Parity, Plan, PlanRecord, Row, plans, write_parity

BUILD = [sys.executable, "-m", "edge_runtime.cli", "build"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped fp16 bundle, on a machine without a visible GPU."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Path(shutil.copytree(shipped_bundle("fp16"), tmp_path / "tiny"))


@pytest.mark.process
def test_it_builds_all_stages_and_reports_the_results(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "--backend", "tensorrt-rtx"]) == 0
    said = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in said.out.splitlines()}
    for stage, fused in (("stack", "4/4"), ("tail", "4/4"), ("decoder", "2/7")):
        assert rows[stage][1] == "attention"
        assert rows[stage][3] == "MB"
        assert rows[stage][5] == "s"
        assert rows[stage][6:] == [fused, "serialised", "plan", "not", "measured"]
    assert "tensorrt-rtx 1." in said.out
    assert "no GPU here; for compute capability 8.0," in said.out
    assert f"measure them: edge-runtime verify {tiny}" in said.out
    for number, stage in enumerate(("stack", "tail", "decoder"), 1):
        assert f"[{number}/3] {stage}" in said.err
    assert len(plans(Bundle.load(tiny))) == 3


@pytest.mark.process
def test_json_holds_the_records(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--stage", "tail", "--backend", "tensorrt-rtx", "--strict", "--json"]
    assert main(["build", str(tiny), *options]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    path = Path(found.pop("path"))
    assert msgspec.convert(found, PlanRecord) == plans(Bundle.load(tiny))[0].record
    assert found == json.loads(path.with_suffix(".json").read_text())
    assert {*found} == {*PlanRecord.__struct_fields__}


@pytest.mark.process
def test_a_nodes_bundle_is_built_for_fewer_windows(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = node_bundle(Bundle.load(tiny), tmp_path / "node")
    assert main(["build", str(node.path), "--max-windows", "9", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert found["profile"]["window"] == [[1], [9], [9]]
    assert "--max-windows 9" in found["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "encoder"], "has no encoder"),
        (["--max-windows", "26"], "expected 1 to 25"),
        (["--backend", "tensorrt-rtx", "--timing-cache", "x"], "TensorRT-RTX measures no timings"),
    ],
)
def test_impossible_options_are_refused_in_one_line(
    tiny: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), *options]) == 1
    said = capsys.readouterr().err
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert message in error
    assert not (tiny / "plans").exists()


def test_a_workspace_out_of_bounds_is_refused(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "--workspace", "-1"]) == 2
    assert "--workspace" in capsys.readouterr().err
    assert not (tiny / "plans").exists()


@pytest.mark.process
def test_unfused_attention_is_reported_and_fails_with_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Path(shutil.copytree(shipped_bundle("fp32"), tmp_path / "fp32"))
    options = [str(bundle), "--stage", "stack", "--backend", "tensorrt-rtx"]
    assert main(["build", *options, "--strict"]) == 1
    assert "error: stack: 4 of 4 attentions were NOT fused" in capsys.readouterr().err
    assert not (bundle / "plans").exists()
    assert main(["build", *options]) == 0
    said = capsys.readouterr()
    assert "warning: stack: 4 of 4 attentions were NOT fused" in said.err
    assert " 0/4 " in said.out


# -- progress -----------------------------------------------------------------


class Lines:
    """A console that is no terminal."""

    is_terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, text: str, **how: Any) -> None:
        self.lines.append(text)


def test_a_long_build_prints_a_line_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    console: Any = Lines()
    display = command._Display(console, None, 2)  # type: ignore[arg-type]
    display.begin("stack")
    for step in range(600):
        now[0] += 0.1
        display.phase("Timing tactics", step, 600, 3)
    assert console.lines[0] == "[1/2] stack: building"
    assert 5 <= len(console.lines) - 1 <= 6
    assert all("Timing tactics" in line for line in console.lines[1:])


@pytest.mark.process
def test_a_terminal_shows_a_bar(tiny: Path) -> None:
    controller, terminal = pty.openpty()
    edge = subprocess.Popen(
        [*BUILD, str(tiny), "--stage", "tail", "--backend", "tensorrt-rtx"],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 1 << 16)
        except OSError:  # the other side is closed
            break
    os.close(controller)
    assert edge.wait() == 0
    assert b"[1/1] tail" in shown
    assert "━".encode() in shown
    assert b"0:00:0" in shown  # the elapsed time


# -- signals ------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("wait_s", [0.0, 0.2, 0.7])
def test_a_signal_at_any_moment_leaves_complete_plans_or_none(
    tiny: Path, number: signal.Signals, wait_s: float
) -> None:
    edge = subprocess.Popen(
        [*BUILD, str(tiny), "--backend", "tensorrt-rtx"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A background test run has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in SIGNALS],
    )
    assert edge.stderr
    edge.stderr.readline()  # "[1/3] stack"
    time.sleep(wait_s)
    edge.send_signal(number)
    said = edge.communicate()[1]
    if edge.returncode == 0:  # a fast machine may have finished
        assert len(plans(Bundle.load(tiny))) == 3
    else:
        assert edge.returncode == 128 + number, said
    assert list(tiny.rglob("*.partial")) == []
    assert list(tiny.glob("plans/*/.*")) == []
    for folder in tiny.glob("plans/*"):
        names = {path.name for path in folder.iterdir()}
        assert names
        assert {name.replace(".plan", ".json") for name in names} == {
            name for name in names if name.endswith(".json")
        }
    for plan in plans(Bundle.load(tiny)):
        plan.read()


# -- the parity gate, with a simulated GPU and verdict ---------------------------


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Simulate plans built on a GPU. The gate then returns the given result."""
    outcome = {"passed": True}
    machine = Machine("Orin", "8.7", "540.4.0", 8 << 30, "TensorRT 10.3.0")

    def build(bundle: Bundle, stage: str, options: Any, watcher: Any) -> Plan:
        plan = real(bundle, stage, options, watcher)
        record = msgspec.structs.replace(plan.record, gpu="Orin")
        plan.path.with_suffix(".json").write_bytes(msgspec.json.encode(record))
        return Plan(plan.path, record)

    def gate(bundle: Bundle, stages: list[str], kinds: list[str]) -> Any:
        assert kinds == ["tensorrt"]
        for plan in plans(bundle):
            assert plan.record.stage in stages
            row = Row(
                plan.record.stage, "golden", "the model", 1.0, 0.0, 0.0, True, None, None,
                outcome["passed"],
            )  # fmt: skip
            write_parity(plan, Parity(outcome["passed"], machine, (row,), "now", {}))
        return Report()

    class Verdict:
        stage, engine, why = "tail", "TensorRT 10.3.0", "error 0.5"

    class Report:
        verdicts = (Verdict(),)
        unrecorded = ()

    real = command.build_stage
    monkeypatch.setattr(command, "build_stage", build)
    monkeypatch.setattr("engines.parity.gate", gate)
    return outcome


@pytest.mark.process
def test_with_a_gpu_the_plans_are_measured(
    tiny: Path, on_a_gpu: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "--stage", "tail", "--backend", "tensorrt-rtx"]) == 0
    said = capsys.readouterr()
    assert "passed" in said.out
    assert f"next: edge-runtime segment PHOTO --point X,Y --local --bundle {tiny}" in said.out


@pytest.mark.process
def test_a_plan_that_fails_the_gate_is_a_failure(
    tiny: Path, on_a_gpu: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_gpu["passed"] = False
    assert main(["build", str(tiny), "--stage", "tail", "--backend", "tensorrt-rtx"]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "tail will not be used" in said.out
    assert "warning: tail, TensorRT 10.3.0: error 0.5" in said.err


# -- imports ---------------------------------------------------------------------


@pytest.mark.process
def test_neither_torch_nor_onnx_is_needed(tiny: Path, tmp_path: Path) -> None:
    """The builder's process does not need them either: modules of those names are traps here."""
    for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "pycuda"):
        (tmp_path / "traps").mkdir(exist_ok=True)
        (tmp_path / "traps" / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [*BUILD, str(tiny), "--stage", "tail", "--backend", "tensorrt-rtx"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "traps")},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
