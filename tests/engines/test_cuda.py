"""Tests of `engines.cuda` without a GPU. The others are in ``simulated_cuda/check_cuda.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from edge_common.errors import EngineError
from engines import cuda


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


def test_a_driver_installed_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        no_driver(patch)
        assert cuda.device_count() == 0
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name))
    with pytest.raises(AttributeError):
        cuda.facts()
    assert asked == ["libcuda.so.1"]


def test_a_cuda_python_that_does_not_load_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        (
            ModuleNotFoundError("pycuda"),
            r"pycuda is not installed: PATH=/usr/local/cuda/.* pip install",
        ),
        (ImportError("undefined symbol: cuX"), r"does not work here \(undefined symbol: cuX\)"),
    ],
)
def test_missing_or_broken_pycuda_is_reported(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, reason: str
) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(cuda.importlib, "import_module", refuse)
    with pytest.raises(EngineError, match=reason):
        cuda._pycuda()
