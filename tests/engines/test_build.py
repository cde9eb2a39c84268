"""Building plans of whole bundles with the real TensorRT-RTX, which builds without a GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faults.processes import children_of

from edge_common.errors import BuildError, BundleError, EngineError
from engines import build as building
from engines.build import BuildOptions, Watcher, build_stage, expected_share, profile_for, unfused
from engines.build_process import Began, Built, Request
from engines.bundle import Bundle, shipped_bundle, write_manifest
from engines.plan import AttentionReport, Plan, PlanRecord, plans

RTX = BuildOptions(backend="tensorrt-rtx")


@dataclass
class Heard(Watcher):
    """Records the events it receives."""

    begun: list[str] = field(default_factory=list)
    phases: list[tuple[str, int, int, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    records: list[PlanRecord] = field(default_factory=list)

    def begin(self, stage: str) -> None:
        self.begun.append(stage)

    def phase(self, name: str, done: int, total: int, depth: int) -> None:
        self.phases.append((name, done, total, depth))

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def finished(self, record: PlanRecord) -> None:
        self.records.append(record)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, on a machine without a visible GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    """A copy of the shipped fp16 bundle."""
    shutil.copytree(shipped_bundle("fp16"), tmp_path / "tiny")
    return Bundle.load(tmp_path / "tiny")


@pytest.fixture
def tiny_fp32(tmp_path: Path) -> Bundle:
    shutil.copytree(shipped_bundle("fp32"), tmp_path / "tiny-fp32")
    return Bundle.load(tmp_path / "tiny-fp32")


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], BuildOptions]:
    """Give the builder's process a simulated ``tensorrt`` that executes some code on import."""

    def install(code: str) -> BuildOptions:
        package = tmp_path / "modules" / "tensorrt"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        return BuildOptions(backend="tensorrt")

    return install


def left_in(bundle: Bundle) -> list[str]:
    return sorted(str(p.relative_to(bundle.path)) for p in bundle.path.rglob("plans/**/*"))


def no_plans(bundle: Bundle) -> bool:
    return not (bundle.path / "plans").exists()


# -- profiles -----------------------------------------------------------------


def test_the_stack_s_profile_covers_all_window_counts_and_prefers_the_expected_one(
    tiny: Bundle,
) -> None:
    profile = profile_for(tiny.manifest, "stack")
    assert [shape[0] for shape in profile["pixels"]] == [1, 9, 25]
    assert profile["pixels"][0][1:] == (40, 40, 3)
    assert profile["extent"] == ((1, 2), (9, 2), (25, 2))
    assert profile["window"] == ((1,), (9,), (25,))


@pytest.mark.parametrize(("most", "best"), [(1, 1), (4, 4), (9, 9), (10, 9), (25, 9)])
def test_fewer_windows_lower_the_preferred_count(tiny: Bundle, most: int, best: int) -> None:
    assert profile_for(tiny.manifest, "stack", most)["window"] == ((1,), (best,), (most,))


@pytest.mark.parametrize("most", [0, -1, 26, 1000])
def test_windows_out_of_range_are_refused(tiny: Bundle, most: int) -> None:
    with pytest.raises(BuildError, match=rf"--max-windows is {most}, expected 1 to 25"):
        profile_for(tiny.manifest, "stack", most)


def test_the_tail_is_static_and_the_decoder_accepts_many_prompts(tiny: Bundle) -> None:
    tail = profile_for(tiny.manifest, "tail", 3)
    assert tail == {"tokens": ((25, 25, 128),) * 3, "present": ((25,),) * 3}
    decoder = profile_for(tiny.manifest, "decoder")
    assert decoder["point_coords"] == ((1, 0, 2), (1, 2, 2), (16, 16, 2))
    assert decoder["embedding"] == ((1, 128, 24, 24),) * 3


def test_the_expected_number_of_windows_is_rounded_up() -> None:
    assert [expected_share(windows) for windows in (1, 4, 16, 25, 36)] == [1, 2, 6, 9, 13]


def test_an_unknown_dimension_is_refused(tiny: Bundle) -> None:
    stack = tiny.stage("stack")
    odd = msgspec.structs.replace(stack.inputs[0], shape=("m", 40, 40, 3))
    stages = {**tiny.manifest.stages, "stack": msgspec.structs.replace(stack, inputs=(odd,))}
    manifest = msgspec.structs.replace(tiny.manifest, stages=stages)
    with pytest.raises(BuildError, match="dimension m, for which no range is known"):
        profile_for(manifest, "stack")


# -- results ------------------------------------------------------------------


def check(plan: Plan, bundle: Bundle, stage: str) -> None:
    """Check the properties of every plan built here."""
    record, manifest, spec = plan.record, bundle.manifest, bundle.stage(stage)
    assert plan in plans(bundle)  # the record on disk equals this record
    data = plan.path.read_bytes()
    assert record.plan_sha256 == hashlib.sha256(data).hexdigest()
    assert record.plan_bytes == len(data)
    assert plan.path == bundle.path / "plans" / record.target / f"{stage}.plan"
    assert record.flavour == "tensorrt-rtx"
    assert record.target.startswith(f"tensorrt-rtx-{record.version}-sm")
    assert record.compute_capabilities
    assert (record.stage, record.model, record.precision) == (
        stage,
        manifest.model,
        manifest.precision,
    )
    assert record.stage_sha256 == spec.sha256
    assert record.weights_sha256 == manifest.weights_sha256
    graph = spec.file if record.form == "attention" else f"{stage}.plain.onnx"
    content = (bundle.path / graph).read_bytes()
    assert record.graph_sha256 == hashlib.sha256(content).hexdigest()
    assert (record.inputs, record.outputs) == (spec.inputs, spec.outputs)
    assert record.profile == profile_for(manifest, stage)
    assert (record.gpu, record.read_from) == (None, "serialised plan")
    assert record.flags["strongly typed"] is True
    assert record.command == (
        f"edge-runtime build {bundle.path.name} --stage {stage} --backend tensorrt-rtx"
    )
    assert record.build_seconds > 0
    assert record.layers
    assert record.parity is None


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_every_stage_of_a_bundle_is_built_and_described(tiny: Bundle, heard: Heard) -> None:
    for stage in ("stack", "tail", "decoder"):
        check(build_stage(tiny, stage, RTX, heard), tiny, stage)
    assert heard.begun == ["stack", "tail", "decoder"]
    assert heard.warnings == []
    for record in heard.records[:2]:
        assert record.form == "attention"
        assert [attention.fused for attention in record.attention] == [True] * 4
        assert all("mha" in attention.kernel for attention in record.attention)
    target = heard.records[0].target
    ends = (".json", ".plan")
    files = [f"plans/{target}/{record.stage}{end}" for record in heard.records for end in ends]
    assert left_in(tiny) == sorted([f"plans/{target}", *files])


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_progress_is_reported_from_start_to_end(tiny: Bundle, heard: Heard) -> None:
    build_stage(tiny, "tail", RTX, heard)
    whole = [phase for phase in heard.phases if phase[3] == 0]
    assert whole[0] == heard.phases[0]
    assert whole[-1] == heard.phases[-1]
    assert whole[0][1] == 0
    assert whole[-1][1] == whole[-1][2] > 0
    assert any(phase[3] > 0 for phase in heard.phases)
    assert all(0 <= done <= total for _, done, total, _ in heard.phases)


def export(bundle: Bundle, *names: str, head_blocks: int | None = None) -> Bundle:
    """Rewrite a bundle around stages exported without verification. The others stay."""
    pytest.importorskip("torch")
    from exporters import models, stages
    from exporters.onnx_export import stage_specs, write_stage
    from exporters.precision import cast

    sam = models.load_checkpoint(models.shipped_weights(), "tiny").requires_grad_(False)
    manifest, made = bundle.manifest, dict(bundle.manifest.stages)
    for name in names:
        module = {
            "head": lambda: stages.make_head(sam, head_blocks or 0),
            "stack": lambda: stages.make_stack(sam, head_blocks),
            "encoder": lambda: stages.Encoder(sam),
        }[name]()
        inputs, outputs = stage_specs(name, manifest.geometry, "fp16", head_blocks)
        made[name] = write_stage(name, cast(module, "fp16"), inputs, outputs, bundle.path)
    order: Any = "reordered"
    if "encoder" in names:
        order, made = "stock", {name: made[name] for name in ("encoder", "decoder")}
    write_manifest(
        bundle.path,
        msgspec.structs.replace(manifest, order=order, head_blocks=head_blocks, stages=made),
    )
    return Bundle.load(bundle.path)


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_head_and_stack_of_a_bundle_that_sends_hidden_states(tiny: Bundle, heard: Heard) -> None:
    bundle = export(tiny, "head", "stack", head_blocks=1)
    for stage, attentions in (("head", 1), ("stack", 3)):
        plan = build_stage(bundle, stage, RTX, heard)
        check(plan, bundle, stage)
        assert [attention.fused for attention in plan.record.attention] == [True] * attentions
    assert heard.warnings == []


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_the_encoder_of_a_stock_bundle(tiny: Bundle, heard: Heard) -> None:
    bundle = export(tiny, "encoder")
    plan = build_stage(bundle, "encoder", RTX, heard)
    check(plan, bundle, "encoder")
    assert [attention.fused for attention in plan.record.attention] == [True] * 8
    assert heard.warnings == []


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_float32_is_built_from_the_plain_form_and_reported_as_unfused(
    tiny_fp32: Bundle, heard: Heard
) -> None:
    plan = build_stage(tiny_fp32, "tail", RTX, heard)
    check(plan, tiny_fp32, "tail")
    assert plan.record.form == "plain"
    assert [attention.fused for attention in plan.record.attention] == [False] * 4
    (warning,) = heard.warnings
    assert warning.startswith("tail: 4 of 4 attentions were NOT fused")
    assert "--precision fp16" in warning


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_strict_keeps_no_unfused_plan(tiny_fp32: Bundle, heard: Heard) -> None:
    strict = BuildOptions(backend="tensorrt-rtx", strict=True)
    with pytest.raises(BuildError, match=r"NOT fused.*Nothing was kept, because of --strict"):
        build_stage(tiny_fp32, "tail", strict, heard)
    assert no_plans(tiny_fp32)
    assert heard.records == []


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_strict_keeps_a_fused_plan(tiny: Bundle, heard: Heard) -> None:
    strict = BuildOptions(backend="tensorrt-rtx", strict=True, max_windows=4, workspace_mib=256)
    record = build_stage(tiny, "stack", strict, heard).record
    assert record.profile["window"] == ((1,), (4,), (4,))
    assert record.command.endswith("--max-windows 4 --workspace 256 --strict")
    assert record.flags["workspace MiB"] == 256
    (plan,) = plans(tiny)
    assert plan.rebuild == record.command.replace(tiny.path.name, str(tiny.path))


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_a_second_build_replaces_the_first(tiny: Bundle, heard: Heard) -> None:
    first = build_stage(tiny, "tail", RTX, heard)
    before = left_in(tiny), first.path.stat().st_ino
    first.path.write_bytes(b"stale")
    second = build_stage(tiny, "tail", RTX, heard)
    assert left_in(tiny) == before[0]
    assert second.path.stat().st_ino != before[1]  # replaced, not overwritten
    check(second, tiny, "tail")


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_a_failed_build_leaves_the_old_plan(tiny: Bundle, heard: Heard) -> None:
    plan = build_stage(tiny, "tail", RTX, heard)
    before = {path: path.read_bytes() for path in plan.path.parent.iterdir()}
    (tiny.path / "tail.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"tail\.onnx is damaged"):
        build_stage(tiny, "tail", RTX, heard)
    assert {path: path.read_bytes() for path in plan.path.parent.iterdir()} == before


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_a_graph_that_cannot_be_parsed_leaves_no_files(tiny: Bundle, heard: Heard) -> None:
    from engines.bundle import hash_file, stage_digest

    path = tiny.path / "tail.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    stage = tiny.stage("tail")
    files = {"tail.onnx": hash_file(path)}
    stage = msgspec.structs.replace(stage, files=files, sha256=stage_digest(files))
    stages = {**tiny.manifest.stages, "tail": stage}
    write_manifest(tiny.path, msgspec.structs.replace(tiny.manifest, stages=stages))
    with pytest.raises(BuildError, match=r"cannot parse .*tail\.onnx"):
        build_stage(Bundle.load(tiny.path), "tail", RTX, heard)
    assert no_plans(tiny)


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_leftovers_of_a_killed_build_are_removed_by_the_next(tiny: Bundle, heard: Heard) -> None:
    (tiny.path / "plans").mkdir()
    stale = tiny.path / "plans" / ".stack.x7_a.partial"
    stale.write_bytes(bytes(1000))
    build_stage(tiny, "tail", RTX, heard)
    assert not stale.exists()


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_the_partial_file_of_a_running_build_is_kept(tiny: Bundle, heard: Heard) -> None:
    with building._workplace(tiny) as folder:
        other = folder / ".stack.running.partial"
        other.touch()
        build_stage(tiny, "tail", RTX, heard)
        assert other.exists()
        other.unlink()
    assert len(plans(tiny)) == 1


# -- invalid options and folders ------------------------------------------------


def test_a_stage_missing_from_the_bundle_is_refused(tiny: Bundle) -> None:
    with pytest.raises(BundleError, match=r"has no encoder .*--order stock"):
        build_stage(tiny, "encoder", RTX)
    assert no_plans(tiny)


def test_a_timing_cache_is_refused_for_rtx(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for backend, installed in (("tensorrt-rtx", []), ("auto", ["tensorrt-rtx"])):
        monkeypatch.setattr(building.libraries, "installed", lambda found=installed: found)
        options = BuildOptions(backend=backend, timing_cache=cache)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match=r"--timing-cache is for TensorRT: .*leave it out"):
            build_stage(tiny, "stack", options)
    assert not cache.exists()
    assert no_plans(tiny)


def test_a_timing_cache_must_be_a_file_in_an_existing_folder(tiny: Bundle, tmp_path: Path) -> None:
    for cache in (tmp_path, tmp_path / "none" / "cache"):
        with pytest.raises(BuildError, match="is no file in a directory that exists"):
            build_stage(tiny, "stack", BuildOptions(backend="tensorrt", timing_cache=cache))


@pytest.mark.parametrize("fails", [False, True])
def test_the_build_replaces_the_timing_cache_with_its_own(
    fails: bool, tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is simulated: a timing cache needs TensorRT and a GPU."""
    cache = tmp_path / "cache"
    cache.write_bytes(b"old")
    began = Began(
        flavour="tensorrt",
        version="10.3.0",
        library="TensorRT 10.3.0",
        form="plain",
        compute_capabilities=("8.7",),
        target="tensorrt-10.3.0-sm87",
        gpu="Orin",
        driver="540.4.0",
        device_memory_bytes=8 << 30,
    )
    built = Built(
        seconds=1.0,
        flags={},
        read_from="engine inspector",
        attention=(AttentionReport("a", True, "mha"),),
        layers=(),
        activation_bytes=1,
        peak_rss_bytes=1,
    )

    def follow(request: Request, watcher: Watcher) -> tuple[Began, Built]:
        assert request.timing_cache == str(cache)
        assert request.new_timing_cache
        Path(request.new_timing_cache).write_bytes(b"new")
        Path(request.plan).write_bytes(b"plan")
        if fails:
            raise BuildError("no")
        return began, built

    monkeypatch.setattr(building, "_follow", follow)
    options = BuildOptions(backend="tensorrt", timing_cache=cache)
    if fails:
        with pytest.raises(BuildError):
            build_stage(tiny, "stack", options)
        assert no_plans(tiny)
    else:
        record = build_stage(tiny, "stack", options).record
        assert "--timing-cache cache" in record.command
        assert str(tmp_path) not in msgspec.json.encode(record).decode()
        assert plans(tiny)[0].rebuild.endswith("--timing-cache cache")
        assert (record.gpu, record.form) == ("Orin", "plain")
    assert cache.read_bytes() == (b"old" if fails else b"new")
    assert list(tmp_path.glob(".*")) == []


def test_a_workspace_of_zero_is_refused(tiny: Bundle) -> None:
    with pytest.raises(BuildError, match="--workspace is 0 MiB"):
        build_stage(tiny, "stack", BuildOptions(workspace_mib=0))


@pytest.mark.process
def test_a_missing_library_is_reported(tiny: Bundle) -> None:
    if "tensorrt" in building.libraries.installed():
        pytest.skip("TensorRT is installed here")
    with pytest.raises(EngineError, match=r"TensorRT is not installed: .*python3-libnvinfer"):
        build_stage(tiny, "stack", BuildOptions(backend="tensorrt"))
    assert no_plans(tiny)


def test_a_full_disk_is_reported_before_the_build(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tiny.path)._replace(free=1 << 20)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"no room for a plan .*1 MB are free"):
        build_stage(tiny, "stack", RTX)
    assert no_plans(tiny)


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_a_disk_that_fills_up_during_the_build_leaves_nothing(tiny: Bundle) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BuildError, match=r"cannot write .*plans: File too large"):
            build_stage(tiny, "stack", RTX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert no_plans(tiny)


def test_an_unwritable_folder_is_named(tiny: Bundle) -> None:
    (tiny.path / "plans").write_text("a file where the folder should be")
    with pytest.raises(BuildError, match=r"cannot write .*plans: "):
        build_stage(tiny, "stack", RTX)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_read_only_folder_gives_a_remedy(tiny: Bundle) -> None:
    (tiny.path / "plans").symlink_to("/proc/self/fd")  # not even root may create a file there
    with pytest.raises(BuildError, match=r"cannot write .*plans: "):
        build_stage(tiny, "stack", RTX)


# -- a builder that dies, with a simulated library ----------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"the library crashed with SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed, most likely because memory ran out"),
        ("os.write(2, b'last\\nwords\\n'); os._exit(7)", r"ended with code 7.*last / words"),
        ("sys.modules['engines.build_process'] = None; raise SystemExit(3)", r"ended with code 3"),
    ],
)
def test_a_builder_that_dies_is_one_clear_line(
    code: str, expected: str, tiny: Bundle, pretend: Callable[[str], BuildOptions]
) -> None:
    options = pretend(f"import os, signal, sys\n{code}\n")
    with pytest.raises(BuildError, match=expected) as failure:
        build_stage(tiny, "stack", options)
    assert "\n" not in str(failure.value)
    assert no_plans(tiny)


@pytest.mark.process
def test_a_library_error_prints_no_control_characters(
    tiny: Bundle, pretend: Callable[[str], BuildOptions]
) -> None:
    options = pretend("raise OSError('\\x1b[31mred')")
    with pytest.raises(EngineError, match=r"\?\[31mred"):
        build_stage(tiny, "stack", options)


@pytest.mark.process
@pytest.mark.usefixtures("rtx")
def test_an_exception_in_the_progress_callback_ends_the_build(tiny: Bundle) -> None:
    class Stop(Watcher):
        def phase(self, name: str, done: int, total: int, depth: int) -> None:
            raise SystemExit(143)

    before = children_of(os.getpid())  # children of other tests' fixtures
    with pytest.raises(SystemExit):
        build_stage(tiny, "stack", RTX, Stop())
    assert no_plans(tiny)
    assert children_of(os.getpid()) <= before


# -- the verdict on fusion ------------------------------------------------------


@pytest.fixture
def record(tiny: Bundle) -> PlanRecord:
    spec = tiny.stage("tail")
    return PlanRecord(
        stage="tail",
        model="tiny",
        form="attention",
        precision="fp16",
        flavour="tensorrt",
        version="11.4.0",
        target="tensorrt-11.4.0-sm87",
        plan_sha256="0" * 64,
        plan_bytes=1,
        stage_sha256=spec.sha256,
        graph_sha256="0" * 64,
        weights_sha256="0" * 64,
        compute_capabilities=("8.7",),
        gpu="Orin",
        driver="1",
        device_memory_bytes=1,
        profile={},
        inputs=spec.inputs,
        outputs=spec.outputs,
        flags={},
        command="",
        build_seconds=1.0,
        built="",
        read_from="engine inspector",
        attention=(AttentionReport("a", True, "mha"), AttentionReport("b", True, "mha")),
        layers=(),
        activation_bytes=1,
        edge_runtime="0",
    )


def test_fused_attention_gives_no_warning(record: PlanRecord) -> None:
    assert unfused(record) is None


def test_unfused_and_unknown_attention_give_different_warnings(record: PlanRecord) -> None:
    attention = (
        AttentionReport("a", True),
        AttentionReport("b", False),
        AttentionReport("c", None),
    )
    text = str(unfused(msgspec.structs.replace(record, attention=attention)))
    assert "1 of 3 attentions were NOT fused (b)" in text
    assert "the engine inspector does not say whether 1 of 3 attentions were fused (c)" in text


def test_a_stage_without_attention_does_not_count_as_fused(record: PlanRecord) -> None:
    bare = msgspec.structs.replace(record, attention=())
    assert "no attention was found" in str(unfused(bare))
    assert unfused(msgspec.structs.replace(bare, stage="head")) is None


def test_an_unfused_decoder_gives_no_warning(record: PlanRecord) -> None:
    attention = (AttentionReport("a", False),)
    assert unfused(msgspec.structs.replace(record, attention=attention, stage="decoder")) is None
