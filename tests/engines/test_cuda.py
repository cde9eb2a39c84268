"""What needs no GPU; the rest is in ``simulated_cuda/check_cuda.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import cuda
from engines.errors import EngineError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    cuda._driver.cache_clear()
    yield
    cuda._driver.cache_clear()


def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)


def test_without_a_driver_there_is_no_gpu_and_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_driver(monkeypatch)
    assert cuda.device_count() == 0
    for ask in (cuda.facts, cuda.context):
        with pytest.raises(EngineError, match=r"no NVIDIA driver .*--gpus all"):
            ask()


def test_a_driver_that_was_installed_meanwhile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        no_driver(patch)
        assert cuda.device_count() == 0
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name))
    with pytest.raises(AttributeError):
        cuda.facts()
    assert asked == ["libcuda.so.1"]


@pytest.mark.parametrize(
    ("module", "release", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 2023\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
            None,
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
            "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "540.4.0",
        ),
        (
            None,
            "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
            "L4T 35.4.1",
        ),
        ("nothing of use\n", "nor here\n", None),
        (None, None, None),
    ],
)
def test_the_version_of_the_driver(
    tmp_path: Path, module: str | None, release: str | None, expected: str | None
) -> None:
    for name, text in (("proc/driver/nvidia/version", module), ("etc/nv_tegra_release", release)):
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text(text)
    assert cuda.driver_version(tmp_path) == expected


def test_cuda_python_that_does_not_load_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(name: str) -> None:
        asked.append(name)
        raise (ImportError if len(asked) == 1 else RuntimeError)("no libcuda")

    monkeypatch.setattr(cuda.importlib, "import_module", refuse)
    assert cuda.graph_driver() is None
    assert asked == ["cuda.bindings.driver", "cuda.cuda"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("pycuda"), r"pycuda is not installed: `pip install .*nvcc"),
        (ImportError("undefined symbol: cuX"), r"does not work here \(undefined symbol: cuX\)"),
    ],
)
def test_pycuda_that_is_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, reason: str
) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(cuda.importlib, "import_module", refuse)
    with pytest.raises(EngineError, match=reason):
        cuda._pycuda()
