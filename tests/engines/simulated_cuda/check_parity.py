"""The parity gate and the choice of engines, with the real TensorRT engine on the simulated GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_driver as driver
import simulated_tensorrt as simulated

from edge_common.errors import PlanError
from engines import libraries, selection
from engines.bundle import Bundle, shipped_bundle
from engines.ort import OrtEngine
from engines.parity import END_TO_END, Verdict, gate
from engines.pipeline import Pipeline
from engines.selection import open_stage
from engines.trt import TrtEngine
from engines.windows import cut

pytestmark = pytest.mark.process  # some do; all run in one of their own

DIMS: dict[str, dict[str, int]] = {"stack": {"n": 6}, "tail": {}, "decoder": {"p": 16, "k": 16}}


@pytest.fixture
def fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The shipped fp16 bundle with a plan for every stage, on a machine with TensorRT 10.3."""
    monkeypatch.setattr(libraries, "installed", lambda: ["tensorrt"])
    monkeypatch.setattr(libraries, "load", lambda flavour: simulated.library(flavour))
    selection._warn_once.cache_clear()
    bundle = Bundle.load(shutil.copytree(shipped_bundle("fp16"), tmp_path / "fp16"))
    for stage, greatest in DIMS.items():
        plain = bundle.stage(stage).plain
        assert plain is not None
        simulated.write_plan(bundle, stage, greatest, graph=bundle.path / plain.file)
    return bundle


def plans_of(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {v.stage: v for v in verdicts if v.engine == "tensorrt-10.3.0-sm87"}


def test_a_version_with_known_defects_serves_after_a_pass(fp16: Bundle) -> None:
    for stage in DIMS:
        with pytest.raises(PlanError, match="known defect"):
            open_stage(fp16, stage, device="tensorrt")
        with open_stage(fp16, stage) as engine:
            assert isinstance(engine, OrtEngine)
    replays = driver.count("launches")
    report = gate(fp16, threads=1)
    assert report.passed, report.verdicts
    assert driver.count("launches") > replays, "CUDA graphs were measured too"
    assert plans_of(report.verdicts).keys() == {*DIMS, END_TO_END}
    image = np.random.default_rng(0).integers(0, 256, (150, 192, 3), np.uint8)
    windows = cut(image, fp16.geometry)
    with (
        Pipeline(fp16, threads=1) as fast,
        Pipeline(fp16, threads=1, device="cpu") as plain,
    ):
        assert isinstance(fast.engine("stack"), TrtEngine)
        np.testing.assert_allclose(fast.embed(windows), plain.embed(windows), atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, 3.0])
@pytest.mark.parametrize("stage", list(DIMS))
def test_a_plan_with_wrong_weights_fails_and_does_not_serve(
    fp16: Bundle, tmp_path: Path, stage: str, bad: float
) -> None:
    import onnx_ir as ir

    plain = fp16.stage(stage).plain
    assert plain is not None
    folder = Path(shutil.copytree(fp16.path, tmp_path / "wrong"))
    model = ir.load(folder / plain.file)
    value = next(v for k, v in model.graph.initializers.items() if k.endswith("weight"))
    assert value.const_value is not None
    weight = value.const_value.numpy()
    value.const_value = ir.Tensor((weight * bad).astype(weight.dtype), name=value.name)
    ir.save(model, folder / plain.file)
    written = simulated.write_plan(fp16, stage, DIMS[stage], graph=folder / plain.file)
    simulated_graph = fp16.path / plain.file
    assert written.record.graph_sha256 != simulated.hash_file(simulated_graph)
    record(written, graph_sha256=simulated.hash_file(simulated_graph))

    report = gate(fp16, threads=1)
    assert not report.passed
    verdicts = plans_of(report.verdicts)
    assert {name for name, v in verdicts.items() if v.status == "failed"} == {stage}
    if np.isnan(bad):
        assert "NaN or infinity" in verdicts[stage].why
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, stage, device="tensorrt")
    with open_stage(fp16, stage) as engine:
        assert isinstance(engine, OrtEngine)
    for other in DIMS.keys() - {stage}:
        with open_stage(fp16, other) as engine:
            assert isinstance(engine, TrtEngine)


def record(plan: Any, **changes: Any) -> None:
    """Change a plan's record on disk, here to hide that the plan is of another graph."""
    import msgspec

    path = plan.path.with_suffix(".json")
    changed = msgspec.structs.replace(plan.record, **changes)
    path.write_bytes(msgspec.json.encode(changed))


def test_too_little_memory_is_a_failure_and_all_memory_is_released(fp16: Bundle) -> None:
    with driver.memory(1 << 16):
        report = gate(fp16, threads=1)
    assert not report.passed
    assert any("memory" in v.why for v in report.verdicts if v.status == "failed")
    assert gate(fp16, threads=1).passed


@pytest.mark.parametrize("after", [1, 15, 30])
def test_a_driver_failure_during_the_run_is_a_failure(fp16: Bundle, after: int) -> None:
    selection.cuda.context()  # already started, as on a node
    with driver.failing(after, 719):
        report = gate(fp16, ["stack"], threads=1)
        failed = driver.failed_call()
    verdict = plans_of(report.verdicts)["stack"]
    assert failed, "the gate made too few calls"
    assert verdict.status in ("failed", "not run")
    assert verdict.why
