"""The TensorRT engine, on a simulated GPU everywhere and on a real one where there is one.

The simulated CUDA driver must be the only ``libcuda.so.1`` of its process. Its checks
(``simulated_cuda/check_*.py``) therefore run in their own pytest process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge_common.errors import EngineError
from engines import cuda, libraries
from engines.bundle import Bundle, shipped_bundle
from engines.engine import Engine
from engines.ort import OrtEngine

SIMULATED = Path(__file__).parent / "simulated_cuda"


def build() -> ModuleType:
    """The module ``simulated_cuda/build.py``."""
    spec = importlib.util.spec_from_file_location("simulated_build", SIMULATED / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulated_cuda() -> dict[str, str]:
    """Environment of a process that sees the simulated GPU. The first build takes about a
    minute."""
    module = build()
    try:
        found = module.environment()
    except module.Unavailable as error:
        pytest.skip(f"the simulated CUDA driver cannot be built here: {error}")
    python_path = os.pathsep.join(filter(None, [found["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    return {**os.environ, **found, "PYTHONPATH": python_path}


@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checks", ["check_cuda.py", "check_trt.py", "check_parity.py"])
def test_on_a_simulated_gpu(simulated_cuda: dict[str, str], checks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "python_files=check_*.py", str(SIMULATED / checks)],
        env=simulated_cuda,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.process
def test_importing_the_engine_imports_no_gpu_library() -> None:
    code = (
        "import sys, engines.trt, engines.cuda\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('pycuda', 'tensorrt', 'tensorrt_rtx', 'cuda', 'onnxruntime')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_real_library_s_first_message_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Without a GPU the real library refuses everything and logs the reason more than once."""
    pytest.importorskip("tensorrt_rtx")
    from engines.trt import _log

    library = libraries.load("tensorrt-rtx")
    log = _log(library)
    runtime = library.module.Runtime(log)
    log.forget()
    assert log.said() == ": no reason given"
    with caplog.at_level(logging.ERROR):
        assert runtime.deserialize_cuda_engine(b"no plan at all" * 100) is None
    assert "Serialization" in log.said()
    assert log is _log(libraries.load("tensorrt-rtx"))
    assert "TensorRT-RTX" in caplog.text


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["stack", "tail", "decoder"])
def test_on_a_real_gpu_it_agrees_with_onnx_runtime(stage: str, tmp_path: Path) -> None:
    from engines import plan as plans
    from engines.build import BuildOptions, build_stage
    from engines.trt import TrtEngine

    try:
        gpu = cuda.context().facts
        library = libraries.choose("auto")
    except EngineError as error:
        pytest.skip(str(error))
    shutil.copytree(shipped_bundle("fp16"), tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    plan = build_stage(bundle, stage, BuildOptions(backend=library.flavour, max_windows=9))
    plans.check(plan, bundle, library, gpu.compute_capability, gpu.name)
    feeds = golden_feeds(bundle, stage)
    with OrtEngine(bundle.stage_path(stage), device="cpu") as reference:
        expected = reference.run(feeds)
    with TrtEngine(plan, library) as engine, engine.another() as other:
        first = engine.run(feeds)
        compare(first, expected)
        for _ in range(4):  # the later runs are CUDA graphs
            compare_bits(engine.run(feeds), first)
        compare_bits(other.run(feeds), first)
        if stage == "decoder":
            compare_without_points(engine, bundle, feeds)
        elif stage == "stack":
            several = {name: array[:3] for name, array in feeds.items()}
            compare(engine.run(several), {name: array[:3] for name, array in expected.items()})
        times = engine.device_times(several if stage == "stack" else feeds, 3, 5)
        assert all(time > 0 for time in times)
        assert engine.notes == [] or "cuda-python" in engine.notes[0]


def golden_feeds(bundle: Bundle, stage: str) -> dict[str, np.ndarray]:
    """Real inputs of the stage. The decoder gets the tail's embedding."""
    with np.load(bundle.path / next(iter(bundle.manifest.golden))) as golden:
        names = {
            spec.name: "tail.embedding" if spec.name == "embedding" else f"{stage}.{spec.name}"
            for spec in bundle.stage(stage).inputs
        }
        return {
            spec.name: golden[names[spec.name]].astype(spec.numpy_dtype)
            for spec in bundle.stage(stage).inputs
        }


def compare_without_points(engine: Engine, bundle: Bundle, feeds: dict[str, np.ndarray]) -> None:
    """Use a prompt without points, only a mask: a tensor without elements."""
    bare = {
        **feeds,
        "point_coords": feeds["point_coords"][:, :0],
        "point_labels": feeds["point_labels"][:, :0],
        "has_mask_input": np.ones_like(feeds["has_mask_input"]),
    }
    with OrtEngine(bundle.stage_path("decoder"), device="cpu") as reference:
        compare(engine.run(bare), reference.run(bare))


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        a, b = found[name].astype(np.float64).ravel(), array.astype(np.float64).ravel()
        assert np.isfinite(a).all(), name
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.999, name


def compare_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
