"""Fixtures of the checks that run on the simulated driver; see ``test_on_a_simulated_gpu.py``."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every check must release what it took, break no rule of CUDA and leave no context current."""
    import simulated_driver as driver
    import simulated_tensorrt

    simulated_tensorrt.failures.reset()
    before = driver.live()  # left behind by an earlier, failed check
    yield
    simulated_tensorrt.failures.reset()
    gc.collect()
    errors, last = driver.count("errors"), driver.last_error()
    driver.cuda.simulated_forget_errors()
    assert (errors, last) == (0, "")
    assert driver.live() == before
    assert driver.count("depth") == 0
    assert driver.count("retains") <= 1  # the process keeps it, see engines.cuda.Context


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A toy bundle to write plans into."""
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
