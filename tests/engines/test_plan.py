"""Records of plans. The plans are made-up bytes, because nothing in engines.plan reads them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_common.errors import BuildError, BundleError, PlanError
from engines import plan as plan_module
from engines.bundle import Bundle
from engines.libraries import Defect, Library
from engines.plan import (
    Machine,
    Parity,
    Plan,
    PlanRecord,
    Row,
    check,
    directory,
    find,
    may_serve,
    plans,
    rebuild_command,
    target,
    verify_command,
    write,
    write_parity,
)

JETPACK = Library("tensorrt", (10, 3, 0), None)
_SUPPORTED = dict.fromkeys(["NONE", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])
RTX = Library(
    "tensorrt-rtx",
    (1, 7, 1),
    SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=_SUPPORTED)),
)
PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")
ORIN = Machine("Orin", "8.7", "540.4.0", 64 << 30, "TensorRT 10.3.0")
CONTENT = b"a serialised engine" * 100


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy at a path with characters that a shell would interpret."""
    return Bundle.load(shutil.copytree(toy_bundle, tmp_path / "my bundle; rm -rf"))


def record_of(
    bundle: Bundle,
    stage: str = "stack",
    library: Library = JETPACK,
    capabilities: tuple[str, ...] = ("8.7",),
    **changes: Any,
) -> PlanRecord:
    manifest, spec = bundle.manifest, bundle.stage(stage)
    record = PlanRecord(
        stage=stage,
        model=manifest.model,
        form="attention",
        precision=manifest.precision,
        flavour=library.flavour,
        version=library.version_text,
        target=target(library, capabilities),
        plan_sha256=hashlib.sha256(CONTENT).hexdigest(),
        plan_bytes=len(CONTENT),
        stage_sha256=spec.sha256,
        graph_sha256=spec.files[spec.file],
        weights_sha256=manifest.weights_sha256,
        compute_capabilities=capabilities,
        gpu="Orin" if library is JETPACK else None,
        driver="540.4.0" if library is JETPACK else None,
        device_memory_bytes=64 << 30 if library is JETPACK else None,
        profile={"pixels": ((1, 16, 16, 3), (4, 16, 16, 3), (9, 16, 16, 3))},
        inputs=spec.inputs,
        outputs=spec.outputs,
        flags={"TF32": False, "workspace MiB": None},
        command="edge-runtime build",
        build_seconds=1.5,
        built="2026-11-21T06:00:00Z",
        read_from="serialised plan",
        attention=(),
        layers=(),
        activation_bytes=None,
        edge_runtime="0.1.0",
    )
    return msgspec.structs.replace(record, **changes)


def put(bundle: Bundle, record: PlanRecord, content: bytes = CONTENT) -> Plan:
    folder = directory(bundle.path, record.target)
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / ".partial"
    built.write_bytes(content)
    return write(folder, record.stage, built, record)


def row(**changes: Any) -> Row:
    measured = Row(
        stage="stack",
        inputs="golden",
        reference="ONNX Runtime on the CPU",
        cosine=0.9999,
        max_abs=0.01,
        error=0.001,
        finite=True,
        mask_iou_min=None,
        mask_iou_mean=None,
        passed=True,
    )
    return msgspec.structs.replace(measured, **changes)


def parity(machine: Machine = ORIN, passed: bool = True, *rows: Row) -> Parity:
    return Parity(passed, machine, rows or (row(passed=passed),), "2026-11-21T07:00:00Z", {})


def command_in(mend: str) -> list[str]:
    """The command that is the remedy, or that it ends with."""
    return shlex.split(mend.split("`")[-2] if "`" in mend else mend)


def refused(error: PlanError, bundle: Bundle, library: str, stage: str = "stack") -> None:
    """A refusal is one printable line with the exact command that rebuilds the plan."""
    assert str(error).isprintable()
    words = ["edge-runtime", "build", str(bundle.path), "--stage", stage, "--backend", library]
    assert command_in(error.mend) == words


# Names and commands


def test_targets_name_library_version_and_gpus() -> None:
    assert target(JETPACK, ["8.7"]) == "tensorrt-10.3.0-sm87"
    assert target(RTX, PORTABLE) == "tensorrt-rtx-1.7.1-sm80-86-89-120-121"
    assert target(RTX, ["12.0", "8.9", "8.9"]) == "tensorrt-rtx-1.7.1-sm89-120"


def test_commands_are_quoted_for_a_shell() -> None:
    command = rebuild_command("a b", "tail", "tensorrt", max_windows=9, workspace_mib=512)
    assert command == (
        "edge-runtime build 'a b' --stage tail --backend tensorrt --max-windows 9 --workspace 512"
    )
    command = rebuild_command(Path("x"), "tail", "auto", timing_cache=Path("it's"), strict=True)
    assert shlex.split(command)[-3:] == ["--timing-cache", "it's", "--strict"]
    assert shlex.split(rebuild_command("-rf", "tail", "auto"))[2] == "./-rf"
    assert verify_command("a b", "stack") == "edge-runtime verify 'a b' --stage stack"
    assert verify_command("-v") == "edge-runtime verify ./-v"


# Writing and reading


def test_a_written_plan_is_read_back(bundle: Bundle) -> None:
    record = record_of(bundle, parity=parity())
    written = put(bundle, record)
    assert written.path == bundle.path / "plans" / "tensorrt-10.3.0-sm87" / "stack.plan"
    (found,) = plans(bundle)
    assert found == Plan(written.path, record)
    assert found.read() == CONTENT
    assert find(bundle, "stack", JETPACK, "8.7", "Orin") == found
    assert sorted(path.name for path in written.path.parent.iterdir()) == [
        "stack.json",
        "stack.plan",
    ]


def test_the_digest_of_a_bundle_ignores_its_plans(bundle: Bundle) -> None:
    put(bundle, record_of(bundle))
    loaded = Bundle.load(bundle.path)
    loaded.verify_hashes()
    assert loaded.manifest == bundle.manifest


def test_a_new_plan_replaces_the_old_one(bundle: Bundle) -> None:
    put(bundle, record_of(bundle, parity=parity()))
    content = CONTENT + b"!"
    digest = hashlib.sha256(content).hexdigest()
    put(bundle, record_of(bundle, plan_sha256=digest, plan_bytes=len(content)), content)
    (found,) = plans(bundle)
    assert found.read() == content
    assert found.record.parity is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CONTENT[:-1], f"{len(CONTENT) - 1} bytes, its record says {len(CONTENT)}"),
        (CONTENT + b"x", "bytes, its record says"),
        (CONTENT[:-1] + b"?", "its sha256 is"),
        (None, "is missing"),
    ],
)
def test_a_plan_with_changed_bytes_is_refused(
    bundle: Bundle, content: bytes | None, reason: str
) -> None:
    plan = put(bundle, record_of(bundle))
    if content is None:
        plan.path.unlink()
    else:
        plan.path.write_bytes(content)
    with pytest.raises(PlanError, match=reason) as caught:
        plan.read()
    refused(caught.value, bundle, "tensorrt")


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_a_plan_does_not_hang(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    plan.path.unlink()
    os.mkfifo(plan.path)
    with pytest.raises(PlanError, match="is missing"):
        plan.read()


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "copy the bundle, .* to a directory that you may write"),
        (errno.EACCES, "copy the bundle, .* to a directory that you may write"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("step", ["flush_to_disk", "json_bytes"])
def test_a_failed_write_leaves_the_old_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, number: int, mend: str, step: str
) -> None:
    old = put(bundle, record_of(bundle))

    def refuse(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(plan_module, step, refuse)
    with pytest.raises(BuildError, match=mend) as caught:
        put(bundle, record_of(bundle, build_seconds=9.0))
    assert str(old.path.with_suffix("")) in str(caught.value)
    assert plans(bundle) == [old]
    assert old.read() == CONTENT
    assert len(list(old.path.parent.iterdir())) == 2  # no leftovers


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_between_the_two_files_leaves_no_mismatched_pair(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    put(bundle, record_of(bundle))
    real, calls = os.replace, []

    def replace(source: Any, to: Any) -> None:
        calls.append(to)
        if len(calls) - 1 == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(source, to)

    monkeypatch.setattr(os, "replace", replace)
    other = b"another engine"
    digest = hashlib.sha256(other).hexdigest()
    with pytest.raises(BuildError):
        put(bundle, record_of(bundle, plan_sha256=digest, plan_bytes=len(other)), other)
    assert plans(bundle) == []
    with pytest.raises(PlanError, match="has none of this stage"):
        find(bundle, "stack", JETPACK, "8.7")


def test_a_missing_folder_is_a_build_error(bundle: Bundle, tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.write_bytes(CONTENT)
    with pytest.raises(BuildError, match="No such file"):
        write(bundle.path / "plans" / "nowhere", "stack", built, record_of(bundle))


# Finding and checking


def test_a_missing_plan_gives_the_build_command(bundle: Bundle) -> None:
    with pytest.raises(
        PlanError, match=r"TensorRT 10\.3\.0 .* 8\.7: the bundle has none"
    ) as caught:
        find(bundle, "tail", JETPACK, "8.7")
    refused(caught.value, bundle, "tensorrt", "tail")
    with pytest.raises(BundleError, match="no encoder"):
        find(bundle, "encoder", JETPACK, "8.7")


def test_a_portable_plan_fits_its_gpus_under_any_name(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle, library=RTX, capabilities=PORTABLE))
    for capability in PORTABLE:
        assert find(bundle, "stack", RTX, capability, "any GPU") == plan
    turing = "compute capability 8.0, 8.6, 8.9, 12.0, 12.1, this GPU has 7.5"
    with pytest.raises(PlanError, match=turing) as caught:
        find(bundle, "stack", RTX, "7.5", "T4")
    refused(caught.value, bundle, "tensorrt-rtx")


@pytest.mark.parametrize(("capability", "gpu"), [("9.0", "NVIDIA H200"), ("8.7", "Orin")])
def test_no_rebuild_is_suggested_if_the_library_lacks_the_gpu(
    bundle: Bundle, capability: str, gpu: str
) -> None:
    def told() -> PlanError:
        with pytest.raises(PlanError, match="supports no GPU of compute capability") as caught:
            find(bundle, "stack", RTX, capability, gpu)
        return caught.value

    assert "tensorrt-rtx" not in str(told())
    refused(told(), bundle, "tensorrt")
    plan = put(bundle, record_of(bundle, library=RTX, capabilities=PORTABLE))
    assert f"this GPU has {capability}" in told().found
    refused(told(), bundle, "tensorrt")
    with pytest.raises(PlanError, match="building again does not help") as caught:
        check(plan, bundle, RTX, capability, gpu)
    refused(caught.value, bundle, "tensorrt")


ASKED = {"max windows": 2, "workspace MiB": 512, "timing cache": "my.cache", "strict": True}
AS_ASKED = ["--max-windows", "2", "--workspace", "512", "--timing-cache", "my.cache", "--strict"]


def options_in(mend: str) -> list[str]:
    return command_in(mend)[7:]


def test_the_rebuild_command_repeats_the_options_of_the_build(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle, flags=ASKED))
    assert options_in(plan.rebuild) == AS_ASKED
    other = Library("tensorrt", (10, 13, 3), None)
    for ask in (
        lambda: check(plan, bundle, other, "8.7", "Orin"),
        lambda: find(bundle, "stack", other, "8.7", "Orin"),
        lambda: (plan.path.unlink(), plan.read()),
    ):
        with pytest.raises(PlanError) as caught:
            ask()  # type: ignore[no-untyped-call]
        assert options_in(caught.value.mend) == AS_ASKED
    # TensorRT-RTX refuses a timing cache.
    with pytest.raises(PlanError) as caught:
        check(plan, bundle, RTX, "8.6")
    assert options_in(caught.value.mend) == ["--max-windows", "2", "--workspace", "512", "--strict"]


def test_of_several_plans_the_most_similar_one_gives_the_options(
    bundle: Bundle,
) -> None:
    desktop = {"strict": True}
    put(bundle, record_of(bundle, library=RTX, capabilities=PORTABLE, built="3", flags=desktop))
    put(bundle, record_of(bundle, built="1", flags={"max windows": 2}))
    put(bundle, record_of(bundle, capabilities=("8.6",), built="2", flags={"max windows": 3}))
    with pytest.raises(PlanError) as caught:
        find(bundle, "stack", Library("tensorrt", (10, 13, 3), None), "8.7", "Orin")
    assert options_in(caught.value.mend) == ["--max-windows", "2"]


def test_the_rebuild_command_asks_for_no_more_windows_than_the_bundle_has(bundle: Bundle) -> None:
    windows = bundle.manifest.geometry.windows
    flags = {"max windows": windows + 1}
    plan = put(bundle, record_of(bundle, flags=flags, model="vit_b"))
    with pytest.raises(PlanError, match="stale") as caught:
        check(plan, bundle, JETPACK, "8.7")
    assert options_in(caught.value.mend) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"max windows": "9; rm", "workspace MiB": True, "timing cache": 3, "strict": "yes"},
        {"max windows": -1, "workspace MiB": 0, "timing cache": "", "strict": 1},
        {"timing cache": "/"},
    ],
)
def test_flags_that_no_build_wrote_are_no_options(bundle: Bundle, flags: dict[str, Any]) -> None:
    assert options_in(put(bundle, record_of(bundle, flags=flags)).rebuild) == []


def test_a_record_cannot_cause_a_file_elsewhere_to_be_overwritten(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle, flags={"timing cache": "/home/you/.bashrc"}))
    assert "/home" not in plan.rebuild


def test_plans_for_several_targets_coexist(bundle: Bundle) -> None:
    jetson = put(bundle, record_of(bundle))
    desktop = put(bundle, record_of(bundle, library=RTX, capabilities=PORTABLE))
    put(bundle, record_of(bundle, stage="tail"))
    assert find(bundle, "stack", JETPACK, "8.7") == jetson
    assert find(bundle, "stack", RTX, "8.6") == desktop
    assert len(plans(bundle)) == 3


def test_the_newest_of_several_suitable_plans_is_found(bundle: Bundle) -> None:
    new = record_of(bundle, library=RTX, capabilities=("8.9",), built="2026-11-22T00:00:00Z")
    old = record_of(bundle, library=RTX, capabilities=("8.6", "8.9"))
    newest = put(bundle, new)
    put(bundle, old)
    assert find(bundle, "stack", RTX, "8.9") == newest


@pytest.mark.parametrize(
    ("changes", "library", "capability", "gpu", "reason"),
    [
        ({}, Library("tensorrt", (10, 13, 3), None), "8.7", "Orin", r"10\.3\.0, this is .* 10\.13"),
        ({}, RTX, "8.6", "Orin", "built with tensorrt 10.3.0, this is tensorrt-rtx"),
        ({}, JETPACK, "8.6", "Orin", "compute capability 8.7, this GPU has 8.6"),
        ({}, JETPACK, "8.7", "Other", "on the GPU Orin, this is Other"),
        ({}, JETPACK, "8.7", "Orin Nano", "on the GPU Orin, this is Orin Nano"),
        ({"gpu": "Orin Nano"}, JETPACK, "8.7", "Orin", "on the GPU Orin Nano, this is Orin"),
        ({"gpu": None}, JETPACK, "8.7", "Orin", "on a GPU without a name, this is Orin"),
        ({"model": "vit_b"}, JETPACK, "8.7", "Orin", "stale: .* the model vit_b"),
        ({"precision": "bf16"}, JETPACK, "8.7", "Orin", "the precision bf16"),
        ({"weights_sha256": "3" * 64}, JETPACK, "8.7", "Orin", "the weights 3333"),
        ({"stage_sha256": "1" * 64}, JETPACK, "8.7", "Orin", "the stage 1111"),
        ({"graph_sha256": "2" * 64}, JETPACK, "8.7", "Orin", "the graph 2222"),
    ],
)
def test_a_plan_that_does_not_match_is_refused(
    bundle: Bundle,
    changes: dict[str, Any],
    library: Library,
    capability: str,
    gpu: str,
    reason: str,
) -> None:
    plan = put(bundle, record_of(bundle, **changes))
    for ask in (
        lambda: check(plan, bundle, library, capability, gpu),
        lambda: find(bundle, "stack", library, capability, gpu),
    ):
        with pytest.raises(PlanError, match=reason) as caught:
            ask()
        refused(caught.value, bundle, library.flavour)


def test_a_matching_plan_passes(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    check(plan, bundle, JETPACK, "8.7", "Orin")
    check(plan, bundle, JETPACK, "8.7")
    plan.path.unlink()
    with pytest.raises(PlanError, match="missing beside its record"):
        check(plan, bundle, JETPACK, "8.7")


def test_a_plan_of_the_plain_form_needs_this_plain_form(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    stage = manifest["stages"]["stack"]
    shutil.copyfile(bundle.path / stage["file"], bundle.path / "stack.plain.onnx")
    digest = stage["files"][stage["file"]]
    bare = put(bundle, record_of(bundle, form="plain", graph_sha256=digest))
    manifest["stages"]["stack"]["plain"] = None
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PlanError, match="the bundle's is absent from this bundle"):
        check(bare, Bundle.load(bundle.path), JETPACK, "8.7")
    stage["plain"] = {"file": "stack.plain.onnx", "sha256": digest}
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    check(bare, Bundle.load(bundle.path), JETPACK, "8.7")


def test_a_plan_of_a_missing_stage_is_refused(bundle: Bundle) -> None:
    record = record_of(bundle, stage="tail")
    plan = put(bundle, msgspec.structs.replace(record, stage="encoder"))
    with pytest.raises(PlanError, match="encoder, which this bundle lacks: remove it") as caught:
        check(plan, bundle, JETPACK, "8.7")
    assert "edge-runtime build" not in str(caught.value)


def test_a_damaged_record_of_a_missing_stage_is_refused(bundle: Bundle) -> None:
    note_of(put(bundle, record_of(bundle))).with_name("encoder.json").write_text("{")
    with pytest.raises(PlanError, match=r"is damaged: .*: remove it") as caught:
        plans(bundle)
    assert "edge-runtime build" not in str(caught.value)


# Records from elsewhere


def note_of(plan: Plan) -> Path:
    return plan.path.with_suffix(".json")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r.update(schema=2), "schema 2, expected 1"),
        (lambda r: r.update(schema=0), "schema 0, expected 1"),
        (lambda r: r.pop("plan_sha256"), "damaged"),
        (lambda r: r.update(plan_sha256="x" * 64), "damaged"),
        (lambda r: r.update(plan_bytes=-1), "damaged"),
        (lambda r: r.update(plan_bytes=1 << 60), "damaged"),
        (lambda r: r.update(plan_bytes="900"), "damaged"),
        (lambda r: r.update(gpu="\x1b[31mred"), "damaged"),
        (lambda r: r.update(command="two\nlines"), "damaged"),
        (lambda r: r.update(compute_capabilities=["8.7\n"]), "damaged"),
        (lambda r: r.update(compute_capabilities=[]), "damaged"),
        (lambda r: r.update(flavour="onnxruntime"), "damaged"),
        (lambda r: r.update(target="../../elsewhere"), "moved or renamed"),
        (lambda r: r.update(stage="tail"), "moved or renamed"),
        (lambda r: r.update(profile={"pixels": [[-1], [1], [1]]}), "damaged"),
    ],
)
def test_a_damaged_or_hostile_record_is_refused(bundle: Bundle, edit: Any, reason: str) -> None:
    plan = put(bundle, record_of(bundle))
    content = json.loads(note_of(plan).read_text())
    edit(content)
    note_of(plan).write_text(json.dumps(content))
    with pytest.raises(PlanError, match=reason) as caught:
        plans(bundle)
    refused(caught.value, bundle, "auto")
    assert plans(bundle, skip_damaged=True) == []
    with pytest.raises(PlanError, match=reason):
        find(bundle, "stack", JETPACK, "8.7")


def test_skipping_a_damaged_record_is_logged(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    good = put(bundle, record_of(bundle))
    bad = put(bundle, record_of(bundle, stage="tail"))
    note_of(bad).write_text("{")
    assert plans(bundle, skip_damaged=True) == [good]
    assert str(note_of(bad)) in caplog.text
    assert find(bundle, "stack", JETPACK, "8.7") == good  # damage of another stage does not matter


@pytest.mark.timeout(30)
def test_the_size_of_a_record_is_limited(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    note_of(plan).write_bytes(b" " * (9 << 20))
    with pytest.raises(PlanError, match="larger than"):
        plans(bundle)
    note_of(plan).unlink()
    os.mkfifo(note_of(plan))
    with pytest.raises(PlanError, match="is not a file"):
        plans(bundle)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_harmless_or_a_plan_error(bundle: Bundle, data: st.DataObject) -> None:
    plan = put(bundle, record_of(bundle, parity=parity()))
    content = bytearray(note_of(plan).read_bytes())
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 40))
    content[start : start + length] = data.draw(st.binary(max_size=40))
    note_of(plan).write_bytes(content)
    read = plans(bundle, skip_damaged=True)
    assert all(found.record.target == plan.path.parent.name for found in read)
    if not read:
        with pytest.raises(PlanError) as caught:
            plans(bundle)
        assert str(caught.value).isprintable()


def test_records_of_other_engines_are_ignored(bundle: Bundle) -> None:
    other = bundle.path / "plans" / "onnxruntime-cuda"
    other.mkdir(parents=True)
    (other / "stack.json").write_text("{}")
    assert plans(bundle) == []


# Who may serve

KNOWN = (Defect("wrong in fp16", "https://example.org/1", ("fp16",)),)
WIDER = (Defect("wrong in all", "https://example.org/2"),)


def test_a_plan_measured_and_passed_here_serves_without_a_warning(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle, parity=parity()))
    assert may_serve(plan, ORIN, ()) is None
    assert may_serve(plan, ORIN, WIDER) is None


def test_an_unmeasured_plan_serves_with_a_warning(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    warning = may_serve(plan, ORIN, ())
    assert warning is not None
    assert "never measured" in warning.found
    assert shlex.split(warning.mend) == ["edge-runtime", "verify", str(bundle.path)]


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "Orin Nano"},
        {"compute_capability": "8.6"},
        {"driver": "1"},
        {"library": "TensorRT 10.3.1"},
    ],
)
def test_a_measurement_on_another_machine_does_not_count(
    bundle: Bundle, changes: dict[str, Any]
) -> None:
    there = msgspec.structs.replace(ORIN, **changes)
    plan = put(bundle, record_of(bundle, parity=parity(there)))
    warning = may_serve(plan, ORIN, ())
    assert warning is not None
    assert str(next(iter(changes.values()))) in warning.found
    with pytest.raises(PlanError, match="wrong in all"):
        may_serve(plan, ORIN, WIDER)


def test_a_verdict_does_not_depend_on_the_amount_of_memory(bundle: Bundle) -> None:
    """If a Jetson's kernel keeps one page more for itself, the results stay the same."""
    there = msgspec.structs.replace(ORIN, memory_bytes=ORIN.memory_bytes - 4096)
    assert there == ORIN
    assert hash(there) == hash(ORIN)
    assert there != "Orin"
    plan = put(bundle, record_of(bundle, parity=parity(there)))
    assert may_serve(plan, ORIN, WIDER) is None
    assert plans(bundle)[0].record.parity == parity(there)
    failed = put(bundle, record_of(bundle, parity=parity(there, False)))
    with pytest.raises(PlanError, match="on this machine"):
        may_serve(failed, ORIN, ())


def test_a_known_defect_stops_an_unmeasured_plan(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    assert bundle.manifest.precision == "fp32"
    assert may_serve(plan, ORIN, KNOWN) is not None  # its precision differs
    with pytest.raises(PlanError, match=r"https://example\.org/2") as caught:
        may_serve(plan, ORIN, (*KNOWN, *WIDER))
    assert "https://example.org/1" not in str(caught.value)
    assert "edge-runtime verify" in str(caught.value)
    half = put(bundle, record_of(bundle, precision="fp16"))
    with pytest.raises(PlanError, match=r"https://example\.org/1"):
        may_serve(half, ORIN, KNOWN)


@pytest.mark.parametrize("machine", [ORIN, msgspec.structs.replace(ORIN, driver="older")])
@pytest.mark.parametrize(
    "verdict",
    [
        (False, row(passed=False, cosine=0.5)),
        (True, row(), row(passed=False, finite=False, cosine=math.nan)),
        (False, row()),
    ],
)
def test_a_failed_plan_never_serves(
    bundle: Bundle, machine: Machine, verdict: tuple[bool, Row]
) -> None:
    passed, *rows = verdict
    plan = put(bundle, record_of(bundle, parity=parity(machine, passed, *rows)))
    (plan,) = plans(bundle)
    with pytest.raises(PlanError, match="failed the parity gate") as caught:
        may_serve(plan, ORIN, ())
    assert "edge-runtime build" in str(caught.value)
    assert "edge-runtime verify" in str(caught.value)


def test_a_verdict_without_measurements_does_not_count(bundle: Bundle) -> None:
    empty = Parity(True, ORIN, (), "2026-11-21T07:00:00Z", {})
    plan = put(bundle, record_of(bundle, parity=empty))
    assert "never measured" in str(may_serve(plan, ORIN, ()))


# Verdicts on disk


def test_a_verdict_is_written_to_the_record(bundle: Bundle) -> None:
    plan = put(bundle, record_of(bundle))
    verdict = parity(ORIN, False, row(passed=False, finite=False, cosine=math.nan, error=math.inf))
    written = write_parity(plan, verdict)
    (found,) = plans(bundle)
    assert found == written
    assert found.read() == CONTENT
    assert found.record.parity == verdict
    # NaN and infinity are not valid JSON: they become null.
    assert verdict.rows[0].cosine is None
    assert verdict.rows[0].error is None
    assert len(list(plan.path.parent.iterdir())) == 2


def test_a_verdict_on_a_replaced_plan_is_refused(bundle: Bundle) -> None:
    old = put(bundle, record_of(bundle))
    new = CONTENT + b"!"
    digest = hashlib.sha256(new).hexdigest()
    put(bundle, record_of(bundle, plan_sha256=digest, plan_bytes=len(new)), new)
    with pytest.raises(PlanError, match="rebuilt while the old one was measured"):
        write_parity(old, parity())
    assert plans(bundle)[0].record.parity is None


def test_a_build_that_ends_during_the_write_of_a_verdict_loses_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(bundle, record_of(bundle))
    new = CONTENT + b"!"
    digest = hashlib.sha256(new).hexdigest()
    record = record_of(bundle, plan_sha256=digest, plan_bytes=len(new))
    build = threading.Thread(target=put, args=(bundle, record, new))
    real = plan_module.read_json

    def decode(*args: Any, **options: Any) -> PlanRecord:
        read: PlanRecord = real(*args, **options)
        build.start()
        build.join(0.5)  # without a lock the build ends here and its record is overwritten
        return read

    monkeypatch.setattr(plan_module, "read_json", decode)
    write_parity(old, parity())
    build.join()
    monkeypatch.undo()
    (found,) = plans(bundle)
    assert found.record == record
    assert found.read() == new


def test_a_verdict_that_cannot_be_written_gives_a_remedy(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = put(bundle, record_of(bundle))

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(plan_module, "json_bytes", refuse)
    with pytest.raises(PlanError, match="copy the bundle"):
        write_parity(plan, parity())
    assert plans(bundle) == [plan]
