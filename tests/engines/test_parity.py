from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from simulated_trt import GPU, SimulatedMachine, SimulatedTrt, install

from edge_common.errors import BundleError, EngineError, PlanError
from engines import cuda, libraries, selection
from engines import plan as plans
from engines.bundle import (
    Bundle,
    hash_file,
    node_bundle,
    shipped_bundle,
    stage_digest,
    write_manifest,
)
from engines.dtypes import to_float32, to_stored
from engines.engine import Engine
from engines.ort import OrtEngine
from engines.parity import END_TO_END, TOLERANCES, Report, Verdict, Watcher, compare, gate
from engines.samples import golden_samples
from engines.selection import open_stage

FP32, FP16 = TOLERANCES["fp32"], TOLERANCES["fp16"]
ONES = np.ones((2, 8), np.float32)


# Measures ----------------------------------------------------------------------------------------


def test_the_worst_row_decides() -> None:
    found = ONES.copy()
    found[1, ::2] = -1
    result = compare([(ONES, ONES), (found, ONES)])
    assert result.cosine == pytest.approx(0)
    assert result.max_abs == 2
    assert result.error == 2
    assert result.finite
    assert result.mask_iou is None
    missed = result.misses(FP32)
    assert any("cosine 0 (needed: >= 0.99999)" in text for text in missed)
    assert any("relative error 2" in text for text in missed)


def test_the_difference_is_relative_to_the_peak() -> None:
    wanted = np.array([[100.0, 1, 1, 1]], np.float32)
    result = compare([(wanted + np.float32(1), wanted)])
    assert result.max_abs == 1
    assert result.error == pytest.approx(0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_or_infinity_fails_at_any_place(bad: float, place: int) -> None:
    spoilt = ONES.copy()
    spoilt[1, 3] = bad
    pairs = [(ONES, ONES), (ONES, ONES)]
    pairs[place] = (spoilt, ONES)
    with np.errstate(all="raise"):
        result = compare(pairs)
    assert not result.finite
    assert result.misses(FP32) == ["NaN or infinity in the outputs"]
    assert not np.isfinite(result.max_abs)


def test_zeros_agree_only_with_zeros() -> None:
    zeros = np.zeros_like(ONES)
    assert compare([(zeros, zeros)]).misses(FP32) == []
    assert compare([(ONES, zeros)]).misses(FP32)
    assert compare([(zeros, ONES)]).misses(FP32)


def square(size: int, shift: int = 0) -> np.ndarray:
    logits = np.full((1, 1, 40, 40), -1, np.float32)
    logits[..., 2 : 2 + size, 2 + shift : 2 + size + shift] = 1
    return logits


def test_mask_iou_gives_total_minimum_and_mean() -> None:
    result = compare(
        [(ONES, ONES)],
        [(square(10), square(10)), (square(5, 5), square(5)), (square(3), square(5))],
    )
    assert result.mask_iou == pytest.approx(109 / 175)
    assert result.mask_iou_min == 0
    assert result.mask_iou_mean == pytest.approx((1 + 0 + 9 / 25) / 3)
    kinds = {text.split("IoU")[0] for text in result.misses(FP16)}
    assert kinds == {"mask ", "mean mask ", "least mask "}


def test_a_difference_of_a_few_pixels_is_left_to_the_logits() -> None:
    result = compare([(ONES, ONES)], [(square(2, 2), square(2)), (square(9), square(9))])
    assert (result.mask_iou_min, result.mask_iou_mean) == (1, 1)
    assert result.mask_iou == pytest.approx(81 / 89)
    result = compare([(ONES, ONES)], [(square(0), square(3)), (square(9), square(9))])
    assert (result.mask_iou_min, result.mask_iou_mean) == (0, 0.5)
    result = compare([(ONES, ONES)], [(square(0), square(0))])
    assert (result.mask_iou, result.mask_iou_min, result.mask_iou_mean) == (1, 1, 1)
    assert result.misses(FP32) == []


def test_the_mask_threshold_comes_from_the_bundle() -> None:
    assert compare([(ONES, ONES)], [(square(9) + 5, square(9))]).mask_iou_min != 1
    assert compare([(ONES, ONES)], [(square(9) + 5, square(9) + 5)], 5.5).mask_iou_min == 1


def test_one_mask_may_miss_three_times_as_much() -> None:
    assert FP16.mask_iou_min == pytest.approx(0.91)
    assert FP32.mask_iou_min == pytest.approx(0.997)


# The gate with ONNX Runtime alone ----------------------------------------------------------------


class Recorder(Watcher):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.verdicts: list[Verdict] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def verdict(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)


@pytest.fixture
def fp32(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(shipped_bundle("fp32"), tmp_path / "fp32"))


@pytest.fixture
def fp16(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(shipped_bundle("fp16"), tmp_path / "fp16"))


def change_weights(
    bundle: Bundle, stage: str, change: Callable[[np.ndarray], np.ndarray], ending: str = "weight"
) -> Bundle:
    """Change the first weight of a stage whose name has this ending, and update the hashes."""
    path = bundle.stage_path(stage)
    model = ir.load(path)
    name, value = next((k, v) for k, v in model.graph.initializers.items() if k.endswith(ending))
    assert value.const_value is not None
    value.const_value = ir.Tensor(change(value.const_value.numpy()), name=name)
    ir.save(model, path)
    spec = bundle.stage(stage)
    files = {file: hash_file(bundle.path / file) for file in spec.files}
    spec = msgspec.structs.replace(spec, files=files, sha256=stage_digest(files))
    stages = {**bundle.manifest.stages, stage: spec}
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, stages=stages))
    return Bundle.load(bundle.path)


def statuses(report: Report) -> dict[str, str]:
    return {verdict.stage: verdict.status for verdict in report.verdicts}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_shipped_bundles_pass(precision: str) -> None:
    bundle = Bundle.load(shipped_bundle(precision))
    before = sorted(bundle.path.rglob("*"))
    watcher = Recorder()
    report = gate(bundle, random=2, seed=5, threads=1, watcher=watcher)
    assert report.passed
    assert report.seed == 5
    assert report.unrecorded == ()
    assert statuses(report) == dict.fromkeys(["stack", "tail", "decoder", END_TO_END], "ok")
    assert {verdict.why for verdict in report.verdicts} == {""}
    assert watcher.verdicts == list(report.verdicts)
    assert any(text.endswith("CPU: stack") for text in watcher.steps)
    rows = {v.stage: [(r.inputs, r.reference) for r in v.rows] for v in report.verdicts}
    assert rows["tail"] == [("golden", "PyTorch"), ("random", "itself in other batches")]
    assert rows[END_TO_END] == [("golden", "PyTorch")]
    (end,) = report.verdicts[-1].rows
    assert end.mask_iou_min is not None
    assert end.mask_iou_mean is not None
    assert end.mask_iou_mean > 0.999
    assert sorted(bundle.path.rglob("*")) == before, "a pass leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"head_blocks": 2}, {"order": "stock"}])
def test_other_kinds_of_bundle_pass(
    random_checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from exporters.export import export

    bundle = export(random_checkpoint, tmp_path / "b", model="tiny", **options).bundle
    report = gate(bundle, threads=1)
    assert report.passed, report.verdicts
    assert statuses(report).keys() == {*bundle.manifest.stages, END_TO_END}
    if bundle.has("stack"):
        node = node_bundle(bundle, tmp_path / "node")
        report = gate(node, threads=1)
        assert report.passed
        assert statuses(report) == {"stack": "ok"}


@pytest.mark.parametrize("stage", ["stack", "tail", "decoder"])
def test_a_bundle_with_other_weights_fails_and_does_not_serve(fp32: Bundle, stage: str) -> None:
    bundle = change_weights(fp32, stage, lambda w: w * np.float32(1.05))
    report = gate(bundle, threads=1)
    assert not report.passed
    found = statuses(report)
    assert found.pop(stage) == "failed"
    assert found.pop(END_TO_END) == ("ok" if stage == "stack" else "not run")
    assert set(found.values()) == {"ok"}
    (verdict,) = [v for v in report.verdicts if v.status == "failed"]
    assert "golden inputs against PyTorch: " in verdict.why
    with pytest.raises(EngineError, match=f"failed the parity gate on the {stage}"):
        open_stage(bundle, stage)
    for other in {"stack", "tail", "decoder"} - {stage}:
        open_stage(bundle, other).close()


def test_nan_weights_fail(fp16: Bundle) -> None:
    bundle = change_weights(fp16, "stack", lambda w: np.full_like(w, np.nan))
    report = gate(bundle, threads=1)
    (verdict,) = [v for v in report.verdicts if v.status == "failed"]
    assert verdict.stage == "stack"
    assert "NaN or infinity" in verdict.why
    assert all(row.cosine is None and not row.finite for row in verdict.rows)
    assert statuses(report)["tail"] == "ok", "the later stages got finite inputs"
    with pytest.raises(EngineError, match="failed the parity gate"):
        open_stage(bundle, "stack")


def test_a_repaired_engine_serves_again(fp32: Bundle) -> None:
    stack = fp32.stage_path("stack").read_bytes()
    manifest = (fp32.path / "manifest.json").read_bytes()
    wrong = change_weights(fp32, "stack", lambda w: w * np.float32(1.05))
    failed = gate(wrong, threads=1)
    assert not failed.passed
    notes = list(fp32.path.glob("plans/*/*"))
    assert [note.name for note in notes] == ["stack.failed.json"]
    fp32.stage_path("stack").write_bytes(stack)
    (fp32.path / "manifest.json").write_bytes(manifest)
    mended = Bundle.load(fp32.path)
    open_stage(mended, "stack").close()  # its digest differs, so the note does not apply
    assert gate(mended, threads=1).passed
    assert not notes[0].exists()


def test_only_the_selected_stages_are_measured(fp32: Bundle) -> None:
    bundle = change_weights(fp32, "stack", lambda w: w * np.float32(1.05))
    report = gate(bundle, ["tail"], threads=1)
    assert statuses(report) == {"tail": "ok", END_TO_END: "ok"}
    with pytest.raises(BundleError, match="has no encoder"):
        gate(bundle, ["encoder"])


def test_random_samples_are_required(fp32: Bundle) -> None:
    with pytest.raises(ValueError, match="random is 0"):
        gate(fp32, random=0)


def test_a_damaged_bundle_gets_no_verdict(fp32: Bundle) -> None:
    data = bytearray(fp32.stage_path("tail").read_bytes())
    data[len(data) // 2] ^= 1
    fp32.stage_path("tail").write_bytes(data)
    with pytest.raises(BundleError, match=r"tail\.onnx is damaged"):
        gate(fp32, threads=1)


def test_a_read_only_bundle_that_passes_is_not_written(fp32: Bundle) -> None:
    (fp32.path / "plans").write_text("in the way: nothing can be written here")
    assert gate(fp32, threads=1).unrecorded == ()


def test_a_failure_that_cannot_be_saved_is_reported(fp32: Bundle) -> None:
    bundle = change_weights(fp32, "stack", lambda w: w * np.float32(1.05))
    (bundle.path / "plans").write_text("in the way")
    report = gate(bundle, threads=1)
    assert not report.passed
    assert any("has no effect" in text for text in report.unrecorded)


# The gate with a simulated TensorRT --------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimulatedMachine:
    return install(monkeypatch)


TARGET = "tensorrt-10.13.3-sm87"


def of_tensorrt(report: Report) -> dict[str, Verdict]:
    return {v.stage: v for v in report.verdicts if v.engine == TARGET}


def scaled(stage: str, factor: float) -> Callable[..., dict[str, np.ndarray]]:
    def spoil(name: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if name != stage:
            return outputs
        return {key: (a * a.dtype.type(factor)) for key, a in outputs.items()}

    return spoil


def test_equivalent_plans_pass_and_serve(
    fp16: Bundle, machine: SimulatedMachine, caplog: pytest.LogCaptureFixture
) -> None:
    built = machine.build(fp16, "stack", "tail", "decoder")
    report = gate(fp16, threads=1)
    assert report.passed
    verdicts = of_tensorrt(report)
    assert {name: v.status for name, v in verdicts.items()} == dict.fromkeys(
        ["stack", "tail", "decoder", END_TO_END], "ok"
    )
    against = [(row.inputs, row.reference.split(" 1.")[0]) for row in verdicts["stack"].rows]
    assert against == [
        ("golden", "PyTorch"),
        ("random", "ONNX Runtime"),
        ("golden", "itself in other batches"),
        ("random", "itself in other batches"),
    ]
    assert [row.inputs for row in verdicts[END_TO_END].rows] == ["golden", "random"]
    assert machine.open == 0
    for plan in built:
        (record,) = [p.record for p in plans.plans(fp16) if p.record.stage == plan.record.stage]
        assert record.parity is not None
        assert record.parity.passed
        assert record.parity.machine.gpu == GPU.name
        assert record.parity.machine.library == "TensorRT 10.13.3"
        assert record.parity.tolerance["mask_iou"] == FP16.mask_iou
        assert record.parity.rows[-1].stage == END_TO_END
        with open_stage(fp16, record.stage) as engine:
            assert isinstance(engine, SimulatedTrt)
    assert caplog.text == ""


@pytest.mark.parametrize("stage", ["stack", "tail", "decoder"])
def test_only_the_wrong_plan_fails_and_it_never_serves(
    fp16: Bundle, machine: SimulatedMachine, stage: str
) -> None:
    machine.build(fp16, "stack", "tail", "decoder")
    machine.spoil = scaled(stage, 1.1)
    report = gate(fp16, threads=1)
    assert not report.passed
    verdicts = of_tensorrt(report)
    assert {n: v.status for n, v in verdicts.items()} == {
        **dict.fromkeys(["stack", "tail", "decoder", END_TO_END], "ok"),
        stage: "failed",
    }, "the other plans run in a chain with ONNX Runtime in its place, and pass"
    assert "golden inputs against PyTorch: relative error 0." in verdicts[stage].why
    assert len(verdicts[END_TO_END].why.split(" and ")) == 2
    with open_stage(fp16, stage) as engine:
        assert isinstance(engine, OrtEngine)
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, stage, device="tensorrt")
    for other in {"stack", "tail", "decoder"} - {stage}:
        with open_stage(fp16, other, device="tensorrt") as engine:
            assert isinstance(engine, SimulatedTrt)
    assert machine.open == 0


def test_a_known_bad_version_serves_only_after_a_pass(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    machine.version = (10, 3, 0)
    machine.build(fp16, "stack")
    with pytest.raises(PlanError, match="known defect"):
        open_stage(fp16, "stack", device="tensorrt")
    assert gate(fp16, threads=1).passed
    open_stage(fp16, "stack", device="tensorrt").close()
    machine.spoil = scaled("stack", 1.1)
    assert not gate(fp16, threads=1).passed
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, "stack", device="tensorrt")


def test_stale_outputs_of_the_run_before_are_noticed(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    """Simulates a CUDA graph that replays with stale inputs from the fourth run of a shape on."""
    seen: dict[Any, list[dict[str, np.ndarray]]] = {}

    def stale(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs = seen.setdefault((stage, next(iter(outputs.values())).shape), [])
        runs.append(outputs)
        return runs[2] if len(runs) > 3 else outputs

    machine.spoil = stale
    machine.build(fp16, "stack", "tail", "decoder")
    verdicts = of_tensorrt(gate(fp16, threads=1))
    assert {verdicts[name].status for name in ("stack", "tail", "decoder")} == {"failed"}
    assert END_TO_END not in verdicts


def test_a_nan_in_some_windows_is_noticed(fp16: Bundle, machine: SimulatedMachine) -> None:
    """The golden sample has windows 0 to 4. This engine fails at the last corner."""
    machine.build(fp16, "stack")
    opened = machine.open_plan

    class Corner(SimulatedTrt):
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            outputs = super().run(feeds)
            tokens = outputs["tokens"]
            tokens[feeds["window"] == 24] = np.nan
            return outputs

    def open_plan(*args: Any, **options: Any) -> Engine:
        opened(*args, **options).close()
        return Corner(machine, fp16, "stack")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "open_plan", open_plan)
        verdict = of_tensorrt(gate(fp16, threads=1))["stack"]
    assert [row.passed for row in verdict.rows] == [True, False, True, False]
    assert "random inputs" in verdict.why


def test_stages_that_pass_alone_but_not_together_fail(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    """Only the simulated stack's outputs make the tail fail."""
    machine.build(fp16, "stack", "tail")
    opened = machine.open_plan
    (golden,) = golden_samples(fp16)

    class Tail(SimulatedTrt):
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            outputs = super().run(feeds)
            same = {key: (a == golden.arrays[f"tail.{key}"]).all() for key, a in feeds.items()}
            if same["present"] and not same["tokens"]:
                return {key: a * 0 for key, a in outputs.items()}
            return outputs

    def open_plan(bundle: Bundle, plan: Any, library: Any, *, ordinal: int = 0) -> Engine:
        if plan.record.stage == "stack":
            return opened(bundle, plan, library)
        return Tail(machine, bundle, "tail")

    machine.spoil = lambda stage, outputs: (
        {k: a + a.dtype.type(0.001) for k, a in outputs.items()} if stage == "stack" else outputs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "open_plan", open_plan)
        report = gate(fp16, threads=1)
    verdicts = of_tensorrt(report)
    assert [verdicts[n].status for n in ("stack", "tail", END_TO_END)] == ["ok", "ok", "failed"]
    assert not report.passed
    for stage in ("stack", "tail"):
        with pytest.raises(PlanError, match=f"{END_TO_END} on golden"):
            open_stage(fp16, stage, device="tensorrt")


def test_an_engine_that_raises_fails_and_never_serves(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    def broken(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise EngineError("the GPU gave up (simulated)")

    machine.spoil = broken
    machine.build(fp16, "stack")
    verdict = of_tensorrt(gate(fp16, threads=1))["stack"]
    assert verdict.status == "failed"
    assert verdict.why == "the GPU gave up (simulated)"
    machine.spoil = lambda stage, outputs: outputs
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, "stack", device="tensorrt")
    assert machine.open == 0


class Odd(Exception):
    """An error that none of our libraries raises."""


def without(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(list(outputs.items())[1:])


def one_row_less(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array[:1] for key, array in outputs.items()}


def raising(error: BaseException) -> Callable[..., dict[str, np.ndarray]]:
    def spoil(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if stage == "stack":
            raise error
        return outputs

    return spoil


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (raising(MemoryError()), "MemoryError"),
        (raising(RuntimeError("two\nlines")), "RuntimeError: two lines"),
        (raising(KeyError("tokens")), "KeyError: 'tokens'"),
        (raising(Odd("odd")), "Odd: odd"),
        (without, "it returned nothing for tokens, expected float16"),
        (one_row_less, "it returned float16 (1, "),
    ],
)
def test_any_misbehaviour_of_an_engine_is_a_failure(
    fp16: Bundle, machine: SimulatedMachine, spoil: Any, why: str
) -> None:
    machine.build(fp16, "stack", "tail")
    assert gate(fp16, threads=1).passed
    machine.spoil = lambda stage, outputs: spoil(stage, outputs) if stage == "stack" else outputs
    report = gate(fp16, threads=1)
    verdicts = of_tensorrt(report)
    assert not report.passed
    assert verdicts["stack"].status == "failed"
    assert why in verdicts["stack"].why
    assert verdicts["tail"].status == "ok", "the others are still measured"
    machine.spoil = lambda stage, outputs: outputs
    with pytest.raises(PlanError, match=r"failed the parity gate .* no answer at all\. It does"):
        open_stage(fp16, "stack", device="tensorrt")
    open_stage(fp16, "tail", device="tensorrt").close()
    assert machine.open == 0


@pytest.mark.parametrize("error", [EngineError("no memory"), MemoryError(), OSError(5, "I/O")])
def test_a_plan_that_no_longer_opens_loses_its_pass(
    fp16: Bundle, machine: SimulatedMachine, error: Exception
) -> None:
    machine.build(fp16, "stack")
    assert gate(fp16, threads=1).passed

    def refuse(*args: Any, **options: Any) -> Engine:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "open_plan", refuse)
        assert of_tensorrt(gate(fp16, threads=1))["stack"].status == "failed"
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, "stack", device="tensorrt")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_gives_no_verdict_but_keeps_failures(
    fp16: Bundle, machine: SimulatedMachine, stop: BaseException
) -> None:
    machine.build(fp16, "stack", "tail")
    assert gate(fp16, threads=1).passed

    def spoil(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if stage == "tail":
            raise stop
        return {key: array * 2 for key, array in outputs.items()}

    machine.spoil = spoil
    with pytest.raises(type(stop)):
        gate(fp16, threads=1)
    machine.spoil = lambda stage, outputs: outputs
    open_stage(fp16, "tail", device="tensorrt").close()  # nothing was found against it
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, "stack", device="tensorrt")


def test_an_engine_that_fails_only_in_the_chain_fails(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    """The decoder answers its own inputs well. For chained inputs it leaves some outputs out."""
    machine.build(fp16, "tail", "decoder")
    assert gate(fp16, threads=1).passed
    opened = machine.open_plan

    class Decoder(SimulatedTrt):
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            outputs = super().run(feeds)
            seen = any(np.array_equal(feeds["embedding"], known) for known in tails)
            return without("decoder", outputs) if seen else outputs

    tails: list[np.ndarray] = []

    def spoil(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if stage == "tail":
            outputs = {k: a + a.dtype.type(0.001) for k, a in outputs.items()}
            tails.extend(outputs.values())
        return outputs

    def open_plan(bundle: Bundle, plan: Any, library: Any, *, ordinal: int = 0) -> Engine:
        if plan.record.stage == "decoder":
            return Decoder(machine, bundle, "decoder")
        return opened(bundle, plan, library)

    machine.spoil = spoil
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "open_plan", open_plan)
        report = gate(fp16, threads=1)
    assert of_tensorrt(report)["decoder"].status == "failed"
    with pytest.raises(PlanError, match="failed the parity gate"):
        open_stage(fp16, "decoder", device="tensorrt")


def test_an_error_of_onnx_runtime_is_a_failure_too(
    fp16: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OrtEngine.run

    def run(self: OrtEngine, feeds: Any) -> dict[str, np.ndarray]:
        if any(spec.name == "pixels" for spec in self.inputs):
            raise MemoryError
        return real(self, feeds)

    monkeypatch.setattr(OrtEngine, "run", run)
    report = gate(fp16, threads=1)
    monkeypatch.undo()
    assert statuses(report)["stack"] == "failed"
    assert statuses(report)["tail"] == "ok"
    with pytest.raises(EngineError, match="failed the parity gate"):
        open_stage(fp16, "stack")


def test_a_plan_that_cannot_be_opened_fails(fp16: Bundle, machine: SimulatedMachine) -> None:
    (plan,) = machine.build(fp16, "stack")
    plan.path.write_bytes(b"?" * plan.record.plan_bytes)
    verdict = of_tensorrt(gate(fp16, threads=1))["stack"]
    assert verdict.status == "failed"
    assert "is damaged" in verdict.why


@pytest.mark.parametrize("absent", ["gpu", "version"])
def test_plans_for_another_machine_are_not_run(
    fp16: Bundle, machine: SimulatedMachine, absent: str
) -> None:
    machine.build(fp16, "stack", "tail")
    setattr(machine, absent, None)
    report = gate(fp16, threads=1)
    verdicts = of_tensorrt(report)
    assert {v.status for v in verdicts.values()} == {"not run"}
    assert all("simulated" in v.why for v in verdicts.values())
    assert report.passed
    assert machine.opened == []


def test_a_stale_plan_is_not_run(fp16: Bundle, machine: SimulatedMachine) -> None:
    machine.build(fp16, "stack", stage_sha256="0" * 64)
    verdict = of_tensorrt(gate(fp16, threads=1))["stack"]
    assert verdict.status == "not run"
    assert f"edge-runtime build {fp16.path} --stage stack" in verdict.why


def test_nothing_is_compared_with_a_failing_reference(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    bundle = change_weights(fp16, "stack", lambda w: w * w.dtype.type(1.2))
    machine.build(bundle, "stack", "tail")
    machine.spoil = scaled("stack", 1.0)
    verdicts = of_tensorrt(gate(bundle, threads=1))
    references = {row.reference for row in verdicts["stack"].rows if row.inputs == "random"}
    assert references == {"itself in other batches"}
    assert verdicts["tail"].status == "ok"


def test_only_engines_of_the_requested_kinds_are_measured(
    fp16: Bundle, machine: SimulatedMachine
) -> None:
    machine.build(fp16, "stack")
    assert of_tensorrt(gate(fp16, kinds=("cpu",), threads=1)) == {}
    report = gate(fp16, ["stack"], kinds=("tensorrt",), threads=1)
    assert {v.engine.split(" ")[0] for v in report.verdicts} == {"ONNX", TARGET}


# bfloat16: ONNX Runtime has no arithmetic for it on the CPU ---------------------------------------


@pytest.fixture(scope="module")
def bf16(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporters.export import export

    out = tmp_path_factory.mktemp("bf16") / "bundle"
    return export(random_checkpoint, out, model="tiny", precision="bf16").bundle.path


class Rounded(Engine):
    """The float32 bundle's stage behind the bf16 bundle's interface: it computes like a good
    plan."""

    def __init__(self, machine: SimulatedMachine, bundle: Bundle, twin: Bundle, stage: str) -> None:
        spec = bundle.stage(stage)
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._machine, self._stage = machine, stage
        self._engine = OrtEngine(twin.stage_path(stage), threads=1, device="cpu")

    def run(self, feeds: Any, out: Any = None) -> dict[str, np.ndarray]:
        assert out is None
        plain = {
            spec.name: to_float32(feeds[spec.name], spec.dtype)
            if spec.dtype == "bfloat16"
            else feeds[spec.name]
            for spec in self.inputs
        }
        found = self._engine.run(plain)
        wire = {spec.name: to_stored(found[spec.name], spec.dtype) for spec in self.outputs}
        return self._machine.spoil(self._stage, wire)

    def close(self) -> None:
        self._engine.close()


@pytest.mark.slow
def test_bf16_is_not_run_on_the_cpu(bf16: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(bf16, tmp_path / "b"))
    report = gate(bundle, threads=1)
    assert report.passed
    assert {statuses(report)[name] for name in ("stack", "tail")} == {"not run"}
    assert all("bfloat16" in v.why for v in report.verdicts if v.status == "not run")


@pytest.mark.slow
def test_bf16_plans_are_measured_on_the_golden_sample_and_against_themselves(
    bf16: Path, tmp_path: Path, random_bundle: Path, machine: SimulatedMachine
) -> None:
    bundle = Bundle.load(shutil.copytree(bf16, tmp_path / "b"))
    twin = Bundle.load(random_bundle)
    machine.build(bundle, "stack", "tail", "decoder")

    def open_plan(bundle: Bundle, plan: Any, library: Any, *, ordinal: int = 0) -> Engine:
        return Rounded(machine, bundle, twin, plan.record.stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "open_plan", open_plan)
        verdicts = of_tensorrt(gate(bundle, threads=1))
        assert {v.status for v in verdicts.values()} == {"ok"}
        assert verdicts.keys() == {"stack", "tail", "decoder", END_TO_END}
        against = [(row.inputs, row.reference) for row in verdicts["tail"].rows]
        assert against == [
            ("golden", "PyTorch"),
            ("golden", "itself in other batches"),
            ("random", "itself in other batches"),
        ]

        def infinite(stage: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if stage != "stack":
                return outputs
            tokens = outputs["tokens"].copy()
            tokens[-1, 0, 0] = 0x7F80
            return {"tokens": tokens}

        machine.spoil = infinite
        verdict = of_tensorrt(gate(bundle, threads=1))["stack"]
        assert "NaN or infinity" in verdict.why


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_on_a_real_gpu_built_plans_pass_and_serve(fp16: Bundle) -> None:
    from engines.build import BuildOptions, build_stage
    from engines.trt import TrtEngine

    try:
        here = cuda.facts()
        library = libraries.choose("auto")
    except EngineError as error:
        pytest.skip(str(error))
    pytest.importorskip("pycuda.driver")
    stages = ["stack", "tail", "decoder"]
    for stage in stages:
        build_stage(fp16, stage, BuildOptions(backend=library.flavour))
    report = gate(fp16, random=3)
    assert report.passed, report.verdicts
    for stage in stages:
        with open_stage(fp16, stage, device="tensorrt") as engine:
            assert isinstance(engine, TrtEngine)
    for plan in plans.plans(fp16):
        assert plan.record.parity is not None
        assert plan.record.parity.machine.gpu == here.name
