"""``edge-runtime doctor`` as users run it, here and with simulated broken packages."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cli
from edge_runtime.commands import doctor
from edge_runtime.machine.diagnosis import Check

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"id", "status", "what", "detail", "mend"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder whose modules take precedence over all others."""
    folder = tmp_path / "broken"
    folder.mkdir()
    return folder


@pytest.fixture
def run(broken: Path) -> Run:
    def go(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edge_runtime.cli", "doctor", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(broken), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return go


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.stderr == ""
    rows = json.loads(done.stdout)
    assert all(row.keys() == KEYS for row in rows)
    assert {row["status"] for row in rows} <= {"ok", "warn", "fail", "none"}
    return {row["id"]: row for row in rows}


def failed(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in found.items() if row["status"] == "fail"}


@pytest.mark.process
def test_this_machine(run: Run) -> None:
    done = run("--json", "--timeout", "120")
    found = checks(done)
    assert found["python"]["detail"].startswith(platform.python_version())
    for needed in ("packages", "onnxruntime", "bundle"):
        assert found[needed]["status"] in ("ok", "warn"), found[needed]
    assert re.search(r"libzmq [\d.]+ with CURVE, ", found["packages"]["detail"])
    assert "files match their hashes" in found["bundle"]["detail"]
    assert done.returncode == (1 if failed(found) else 0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('libnvinfer.so.10: not there')", "libnvinfer.so.10: not there"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import time; time.sleep(600)", "gave no answer within 15 s"),
        ("print('x' * 100_000); raise SystemExit(9)", "code 9"),
    ],
)
def test_a_broken_tensorrt_is_one_failed_line(
    run: Run, broken: Path, source: str, said: str
) -> None:
    (broken / "tensorrt.py").write_text(source)
    done = run("--json", "--timeout", "15")
    found = checks(done)
    assert "tensorrt" in failed(found)
    assert said in found["tensorrt"]["detail"]
    assert found["tensorrt"]["mend"]
    assert done.returncode == 1


@pytest.mark.process
@pytest.mark.parametrize("name", ["numpy", "msgspec", "rich", "zmq"])
def test_it_runs_with_broken_dependencies(run: Run, broken: Path, name: str) -> None:
    (broken / f"{name}.py").write_text("import os; os.abort()")
    done = run("--json", "--timeout", "120")
    found = checks(done)
    assert "SIGABRT" in found["packages"]["detail"]
    assert "pip install" in found["packages"]["mend"]
    assert found["board"]["status"] == "ok"
    assert done.returncode == 1


@pytest.mark.process
@pytest.mark.parametrize("needed", ["cuda", "tensorrt"])
def test_requirements_decide_the_exit_code(run: Run, needed: str) -> None:
    done = run("--json", "--require", needed, "--timeout", "120", CUDA_VISIBLE_DEVICES="")
    found = checks(done)
    assert found[f"require-{needed}"]["status"] == "fail"
    assert done.returncode == 1


@pytest.mark.process
def test_nothing_heavy_is_imported() -> None:
    heavy = "'torch', 'numpy', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'pycuda', 'rich', 'zmq'"
    code = (
        "import sys; from edge_runtime.cli import main; main(['doctor', '--timeout', '120']);"
        f"print([m for m in ({heavy}, 'msgspec') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


@pytest.mark.process
def test_the_report_contains_no_machine_or_user_name(
    run: Run, broken: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "canary-user"
    home.mkdir(parents=True)
    (broken / "tensorrt.py").write_text(f"raise ImportError('{home}/lib/x.so: no such file')")
    copied = home / "bundle"
    copied.mkdir()
    done = run(str(copied), "--timeout", "120", HOME=str(home))
    assert "~/lib/x.so" in done.stdout
    assert "~/bundle" in done.stdout
    assert "canary-user" not in done.stdout
    words = set(re.findall(r"[\w.-]+", done.stdout))
    names = {socket.gethostname(), getpass.getuser()} - {"root", "localhost"}
    assert names.isdisjoint(words)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """An empty diagnosis for a test to fill."""
    rows: list[Check] = []
    monkeypatch.setattr(doctor, "examine", lambda **options: rows)
    monkeypatch.setattr("edge_common.process.disable_core_dumps", lambda: None)
    return rows


def test_each_finding_is_one_line_with_its_command_below(
    found: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    found += [
        Check("board", "ok", "board", "an Orin"),
        Check("power", "warn", "power mode", "15W", "sudo nvpmodel -m 2"),
        Check("tensorrt", "none", "TensorRT", "not installed"),
    ]
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "ok    board       an Orin\n"
        "warn  power mode  15W\n"
        "      -> sudo nvpmodel -m 2\n"
        "none  TensorRT    not installed\n"
    )


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_gets_colours(
    found: list[Check],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    coloured: bool,
) -> None:
    found.append(Check("board", "fail", "board", "an Orin"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out == (
        "\x1b[31mfail\x1b[0m  board  an Orin\n" if coloured else "fail  board  an Orin\n"
    )


def test_the_exit_code_depends_on_failures_alone(found: list[Check]) -> None:
    for status, code in (("ok", 0), ("none", 0), ("warn", 0), ("fail", 1), ("ok", 1)):
        found.append(Check(str(len(found)), status, "x", "y"))  # type: ignore[arg-type]
        assert cli.main(["doctor", "--json"]) == code


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--timeout", "0"], 2, "error: --timeout: expected a number above 0"),
        (["--require", "luck"], 2, "invalid choice"),
    ],
)
def test_bad_options_are_refused(
    found: list[Check],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    assert cli.main(["doctor", *arguments]) == code
    assert said in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--require tensorrt &&" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def simulated_gpu() -> dict[str, str]:
    """Environment that makes Python find real pycuda and a simulated CUDA driver."""
    spec = importlib.util.spec_from_file_location(
        "build_simulated_cuda", ROOT / "tests/engines/simulated_cuda/build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        return dict(build.environment())
    except build.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.process
@pytest.mark.parametrize("devices", ["1", "0"])
def test_a_gpu_seen_through_real_pycuda_and_a_simulated_driver(
    run: Run, broken: Path, simulated_gpu: dict[str, str], devices: str
) -> None:
    (broken / "tensorrt.py").write_text("__version__ = '10.13.3'")
    done = run(
        *("--json", "--timeout", "120", "--require", "tensorrt"),
        LD_LIBRARY_PATH=simulated_gpu["LD_LIBRARY_PATH"],
        PYTHONPATH=os.pathsep.join([str(broken), simulated_gpu["PYTHONPATH"]]),
        SIMULATED_CUDA_NAME="Orin",
        SIMULATED_CUDA_CAPABILITY="8.7",
        SIMULATED_CUDA_INTEGRATED="1",
        SIMULATED_CUDA_MEMORY="1000000000",
        SIMULATED_CUDA_DEVICES=devices,
    )
    found = checks(done)
    if devices == "0":
        assert "Orin" not in found["gpu"]["detail"]
        assert found["require-tensorrt"]["status"] == "fail"
        assert done.returncode == 1
        return
    assert found["gpu"]["detail"] == (
        "Orin, compute capability 8.7, 1.0 GB of memory shared with the CPU"
    )
    assert found["pycuda"]["status"] == "ok"
    assert found["require-tensorrt"]["status"] == "ok"
