"""Probes of libraries that raise, crash, hang or print nonsense, each in a child process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from edge_runtime.machine.probes import ask

pytestmark = pytest.mark.process

TENSORRT = ("tensorrt",)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is imported as ``tensorrt``, before any real one."""
    folder = tmp_path / "library"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder / "tensorrt.py"


def test_a_working_library_is_reported(library: Path) -> None:
    library.write_text("print('loading'); __version__ = '10.3.0'")
    answer = ask([TENSORRT], 60)["tensorrt"]
    assert answer.facts == {"version": [10, 3, 0]}
    assert answer.error is None
    assert "loading" in answer.stderr  # the library's own output is no part of the answer


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            "ImportError: libnvinfer.so.10: cannot open shared object file",
        ),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def", "SyntaxError: "),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "crashed the process (SIGSEGV)",
        ),
        ("import os; os.abort()", "crashed the process (SIGABRT)"),
        ("import os; os._exit(3)", "ended the process with code 3: it printed nothing"),
        (
            "import os, sys; print('licence expired', file=sys.stderr, flush=True); os._exit(3)",
            "ended the process with code 3: licence expired",
        ),
        ("import sys; sys.exit(4)", "ended the process with code 4: it printed nothing"),
        ("__version__ = 'tomorrow'", "has the version 'tomorrow'"),
    ],
)
def test_a_failing_library_is_reported(library: Path, source: str, error: str) -> None:
    library.write_text(source)
    answer = ask([TENSORRT], 60)["tensorrt"]
    assert answer.facts is None
    assert not answer.missing
    assert error in (answer.error or "")
    assert "\n" not in (answer.error or "")


def test_a_hanging_library_is_killed_with_its_children(library: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    library.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    answer = ask([TENSORRT], 5)["tensorrt"]
    assert answer.error == "gave no answer within 5 s"
    for pid in map(int, pids.read_text().split()):
        while running(pid):  # killed, but perhaps not gone yet
            time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A grandchild stays a zombie where nothing collects orphans, as in some containers.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_hanging_library_costs_the_others_no_time(library: Path) -> None:
    library.write_text("import time; time.sleep(600)")
    answers = ask([TENSORRT, ("packages",)], 10)
    assert "no answer" in (answers["tensorrt"].error or "")
    assert answers["packages"].facts


def test_a_missing_package_is_missing_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).resolve().parents[3])
    monkeypatch.setattr(sys, "path", [here, *(p for p in sys.path if "-packages" not in p)])
    names = ("tensorrt", "tensorrt-rtx", "pycuda", "cuda-python", "onnxruntime")
    for name, answer in ask([(name,) for name in names], 60).items():
        assert (answer.missing, answer.error, answer.facts) == (True, None, None), name


def test_a_missing_dependency_of_a_library_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import flatbuffers_of_another_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = ask([("onnxruntime",)], 60)["onnxruntime"]
    assert not answer.missing
    assert "flatbuffers_of_another_name" in (answer.error or "")


def test_other_packages_called_cuda_are_not_cuda_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda" / "pathfinder").mkdir(parents=True)
    here = str(Path(__file__).resolve().parents[3])
    kept = [path for path in sys.path if "-packages" not in path]
    monkeypatch.setattr(sys, "path", [here, str(tmp_path), *kept])
    assert ask([("cuda-python",)], 60)["cuda-python"].missing


def test_modules_come_from_this_process_s_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules in the working directory are ignored."""
    for name in ("tensorrt", "json", "numpy", "edge_runtime"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('from the working directory')")
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).resolve().parents[3])
    kept = [path for path in sys.path if path and Path(path) != tmp_path]
    monkeypatch.setattr(sys, "path", [here, *kept])
    answers = ask([TENSORRT, ("packages",)], 60)
    assert answers["tensorrt"].error is None
    assert answers["packages"].facts
