"""The benchmark's control flow with a fake worker, and its rows rehearsed on the CPU.

Tests that need a GPU are marked. ``FAKE_WORKER`` replaces :mod:`exporters.gpu_worker` in tests
about the results file when engines are absent, crash, hang or run out of time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import cuda
from exporters import gpu

FAKE_WORKER = """
import json, os, pathlib, signal, sys, time

request = json.load(sys.stdin)
task = request["task"]

def emit(event, **content):
    print(json.dumps({"event": event, **content}), flush=True)

def size(stage, count):
    return {"stage": stage, "prompts" if stage == "decoder" else "windows": count}

log = pathlib.Path(os.environ["FAKE_LOG"])
with log.open("a") as file:
    print(task, request.get("engine", ""), request.get("model", ""), file=file)
if task == "probe":
    emit("machine", machine={"gpu": "NVIDIA Pretend", "driver": "1", "cuda": "2", "torch": "3"})
elif task == "rates":
    emit("rate", rate={"precision": "fp16", "size": 8, "runs": 1, "median_ms": 1, "tflops": 100.0})
elif task == "check":
    if request["engine"] == "tensorrt":
        emit("absent", why="TensorRT is not installed")
    elif request["engine"] == "tensorrt-rtx":
        os.kill(os.getpid(), signal.SIGSEGV)
    else:
        emit("engine", version="ONNX Runtime 9")
elif task == "engine":
    for stage, count in request["cases"]:
        row = {**size(stage, count), "engine_version": "x"}
        emit("begin", row=row)
        if (request["engine"], stage) == ("pytorch-compiled", "tail"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (request["engine"], stage) == ("pytorch-tuned", "decoder"):
            time.sleep(600)
        ms = 10.0 if request["engine"] == "pytorch-eager" else 2.0
        cosine = 0.5 if request["engine"] == "pytorch-folded" else 1.0
        emit("row", row={
            **row, "status": "ok", "median_ms": ms, "p95_ms": ms, "tflops": 120 / ms,
            "peak_bytes": int(100 * ms),
            "parity": {"finite": True, "cosine": cosine, "error": 0.0, "max_abs": 0.0,
                       "tolerance": {"cosine": 0.9, "error": 0.1, "mask_iou": 0.9}},
        })
    for stage, count in request["cases"]:
        emit("masks", **size(stage, count), mask_iou=1.0)
emit("done")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the real worker by the fake one. Returns the log of its requests."""
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(gpu, "WORKER", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "gpu-pretend.json"
    code = gpu.main(["--out", str(out), "--models", "vit_h", "--precisions", "fp16", *arguments])
    return code, json.loads(out.read_text())


def rows(content: dict[str, Any], engine: str) -> dict[tuple[str, int], str]:
    return {
        (row["stage"], row.get("windows", row.get("prompts"))): row["status"]
        for row in content["rows"]
        if row["engine"] == engine
    }


@pytest.mark.process
def test_every_engine_has_its_rows_or_the_reason_why_not(fake: Path, tmp_path: Path) -> None:
    code, content = run(tmp_path, "--engine-seconds", "4")
    assert code == 0
    assert set(rows(content, "pytorch-eager").values()) == {"ok"}
    assert len(rows(content, "pytorch-eager")) == len(gpu.CASES)
    # The crash costs its own row: another process computed those after it.
    crashed = rows(content, "pytorch-compiled")
    assert crashed.pop(("tail", 25)) == "failed: the process was ended by SIGKILL"
    assert set(crashed.values()) == {"ok"}
    assert len(crashed) == len(gpu.CASES) - 1
    # The hang used up the engine's time.
    hung = rows(content, "pytorch-tuned")
    assert hung[("stack", 25)] == "ok"
    assert hung[("decoder", 1)].startswith("failed: no end within")
    assert hung[("stack", 1)].startswith("not run: the time was up")
    # Wrong numbers count as failed. A split bundle has no encoder.
    assert set(rows(content, "pytorch-folded").values()) == {
        "failed: the output differs from upstream's beyond the tolerance"
    }
    assert ("encoder", 25) not in rows(content, "onnxruntime")
    alone = {row["engine"]: row["status"] for row in content["rows"] if "model" not in row}
    assert alone == {
        "tensorrt": "absent: TensorRT is not installed",
        "tensorrt-rtx": "absent: the process was ended by SIGSEGV",
    }
    asked = fake.read_text().splitlines()
    assert asked.count("reference  vit_h") == 1
    assert asked.count("export  vit_h") == 1
    assert content["schema"] == gpu.SCHEMA
    assert not content["rehearsal"]
    assert "exporters.gpu --out" in content["command"]


@pytest.mark.process
def test_targets_are_computed_from_rows(fake: Path, tmp_path: Path) -> None:
    _, content = run(tmp_path, "--engines", "pytorch-eager", "onnxruntime")
    assert [target["status"] for target in content["targets"]] == ["met", "met", "missed"]
    share, speed, tail = content["targets"]
    assert share["share_of_matmul"] == pytest.approx(0.6)
    assert speed["speedup"] == pytest.approx(5.0)
    assert (tail["speedup"], tail["memory_ratio"]) == (pytest.approx(5.0), pytest.approx(0.2))
    assert tail["engine"] == "onnxruntime"


@pytest.mark.process
def test_without_a_baseline_nothing_is_compared(fake: Path, tmp_path: Path) -> None:
    _, content = run(tmp_path, "--engines", "onnxruntime")
    share, speed, tail = content["targets"]
    assert share["status"] == "met"
    for target in (speed, tail):
        assert target["status"].startswith("not measurable")
        assert "speedup" not in target


@pytest.mark.process
def test_wrong_output_and_the_baseline_itself_meet_no_target(fake: Path, tmp_path: Path) -> None:
    _, content = run(tmp_path, "--engines", "pytorch-eager", "pytorch-folded")
    assert all(target["status"].startswith("not measurable") for target in content["targets"])


@pytest.mark.process
def test_running_out_of_time_leaves_a_file_that_resume_completes(
    fake: Path, tmp_path: Path
) -> None:
    engines = ["--engines", "pytorch-eager", "pytorch-compiled"]
    code, content = run(tmp_path, *engines, "--seconds", "3")
    assert code == 1  # nothing was measured
    assert {row["status"] for row in content["rows"]} == {
        "not run: the time was up; --resume goes on"
    }
    code, content = run(tmp_path, *engines, "--resume")
    assert code == 0
    assert set(rows(content, "pytorch-eager").values()) == {"ok"}
    fake.write_text("")
    again = run(tmp_path, *engines, "--resume")[1]
    asked = [line for line in fake.read_text().splitlines() if line.startswith("engine")]
    assert set(asked) == {"engine pytorch-compiled vit_h"}  # for the row that crashed
    times = [[r for r in c["rows"] if r["status"] == "ok"] for c in (content, again)]
    assert len(times[0]) == len(times[1])


@pytest.mark.process
def test_resume_refuses_another_machine_and_another_file(fake: Path, tmp_path: Path) -> None:
    run(tmp_path, "--engines", "pytorch-eager")
    out = tmp_path / "gpu-pretend.json"
    content = json.loads(out.read_text())
    content["machine"]["gpu"] = "Another"
    out.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="was measured on Another with driver 1"):
        run(tmp_path, "--resume")
    out.write_text("{}")
    with pytest.raises(SystemExit, match="no file of this benchmark"):
        run(tmp_path, "--resume")
    assert out.read_text() == "{}"


def test_a_rehearsal_does_not_change_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--out", str(gpu.RESULTS / "gpu-x.json")]):
        with pytest.raises(SystemExit):
            gpu.main(["--cpu-rehearsal", *arguments])
        assert "outside docs/results" in capsys.readouterr().err


@pytest.mark.process
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    if cuda.device_count():
        pytest.skip("there is an NVIDIA GPU here")
    out = tmp_path / "gpu-none.json"
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU .*nothing was measured"):
        gpu.main(["--out", str(out)])
    assert not out.exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = gpu.importlib.util.find_spec
    lacking = {"msgspec", "segment_anything"}
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name in lacking else find(name)
    )
    with pytest.raises(SystemExit, match="--target DIR msgspec segment-anything"):
        gpu.main([])
    lacking.add("torch")
    with pytest.raises(SystemExit, match="lacks torch: name a Python that has PyTorch"):
        gpu.main([])


@pytest.mark.process
def test_the_parent_imports_no_installed_package() -> None:
    code = (
        "import sys, exporters.gpu\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'numpy', 'msgspec', 'onnx', 'onnxruntime', 'segment_anything')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("gpu_name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Orin", "orin")],
)
def test_the_file_is_named_after_the_gpu(gpu_name: str, short: str) -> None:
    assert gpu.short_name(gpu_name) == short


def test_comparison_sees_each_kind_of_difference() -> None:
    torch = pytest.importorskip("torch")
    from exporters.gpu_worker import compare

    wanted = {"tokens": torch.eye(4)}
    same = compare(wanted, wanted)
    assert (same["cosine"], same["max_abs"]) == (pytest.approx(1.0), 0.0)
    turned = torch.eye(4)
    turned[2] = turned[2].roll(1)
    assert compare({"tokens": turned}, wanted)["cosine"] == pytest.approx(0.0)
    assert compare({"tokens": 2 * torch.eye(4)}, wanted)["error"] == pytest.approx(1.0)
    turned[0, 0] = torch.nan
    assert compare({"tokens": turned}, wanted) == {"finite": False}


def check_rows(content: dict[str, Any], engines: list[str], cases: Any) -> None:
    """Check that every row exists, agrees with upstream's modules and has what the docs promise."""
    for engine in engines:
        found = [row for row in content["rows"] if row["engine"] == engine]
        for row in found:
            if row["status"].startswith("absent"):
                continue
            assert row["status"] == "ok", row
            assert row["parity"]["passed"], row
            assert row["parity"]["mask_iou"] > 0.9
            assert 0 < row["median_ms"] <= row["p95_ms"]
            assert row["tflops"] == pytest.approx(row["tflop"] / row["median_ms"] * 1e3)
            assert row["runs"] >= 3
        assert {row["stage"] for row in found} >= {"stack", "tail", "decoder"}
    assert len(cases) == len([r for r in content["rows"] if r["engine"] == engines[0]])


@pytest.mark.process
@pytest.mark.timeout(900)
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """The real worker on the CPU with tiny: upstream's modules, this project's, and ONNX
    Runtime."""
    engines = ["pytorch-eager", "pytorch-folded", "onnxruntime"]
    out = tmp_path / "rehearsal.json"
    arguments = ["--cpu-rehearsal", "--out", str(out), "--row-seconds", "0.01"]
    assert gpu.main([*arguments, "--engines", *engines, "tensorrt"]) == 0
    content = json.loads(out.read_text())
    assert content["rehearsal"]
    check_rows(content, engines, gpu.REHEARSED)
    (share,) = [
        r
        for r in content["rows"]
        if (r["engine"], r.get("stage"), r.get("windows")) == ("pytorch-folded", "stack", 9)
    ]
    assert share["status"] == "ok"
    for row in content["rows"]:
        assert row.get("peak_bytes") is None
        assert row.get("timing", "wall clock (rehearsal)") == "wall clock (rehearsal)"
    assert all("rehearsal" in target["status"] for target in content["targets"])


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_engine_agrees_on_the_gpu(precision: str, tmp_path: Path) -> None:
    if not cuda.device_count():
        pytest.skip("no NVIDIA GPU here")
    out = tmp_path / "gpu.json"
    arguments = ["--out", str(out), "--models", "tiny", "--precisions", precision]
    assert gpu.main([*arguments, "--row-seconds", "0.05"]) == 0
    content = json.loads(out.read_text())
    engines = ["pytorch-eager", "pytorch-folded", "pytorch-compiled"]
    check_rows(content, engines, gpu.CASES)
    for row in content["rows"]:
        assert row["status"].startswith(("ok", "absent")), row
        if row["status"] == "ok":
            assert row["peak_bytes"] > 0
            assert row["share_of_matmul"] > 0
