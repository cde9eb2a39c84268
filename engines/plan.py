"""Plans: serialised TensorRT engines beside a bundle, each with a record of what it is.

``BUNDLE/plans/<target>/<stage>.plan`` holds the engine. ``<stage>.json`` holds the record: what the
plan was built from and for, what was fused, and the verdict of the parity gate. A plan contains
code, and its record is no signature: use only plans that you built.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_common.errors import BuildError, PlanError
from edge_common.files import atomic_file, explain_write_errors, flush_to_disk, write_atomically
from edge_common.json_file import json_bytes, read_json
from edge_common.permissions import why_untrusted
from engines import libraries
from engines.bundle import Bundle, Line, Name, Sha256, Tensors
from engines.libraries import Backend, Defect, Flavour, Library
from engines.plan_paths import bundle_of, cache, plans_folder

logger = logging.getLogger(__name__)

SCHEMA = 1
_MAX_RECORD_BYTES = 8 << 20
_MAX_PLAN_BYTES = 1 << 36

Form = Literal["attention", "plain"]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Capability = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,2}\.[0-9]\Z", max_length=4)]
Shape = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 31)], ...], msgspec.Meta(max_length=8)
]


class Machine(msgspec.Struct, frozen=True, eq=False):
    """The machine that measured a plan. Two machines are equal if everything except the memory is.

    ``memory_bytes`` is all of the GPU's memory, ``library`` a name such as ``TensorRT 10.3.0``. The
    memory of a GPU that shares it with the CPU differs by a few pages from boot to boot, which is
    no reason to measure again.
    """

    gpu: Name
    compute_capability: Capability
    driver: Name
    memory_bytes: Bytes
    library: Name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Machine) and not _difference(self, other)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in _BINDING))


_BINDING = ("gpu", "compute_capability", "driver", "library")


class Row(msgspec.Struct, frozen=True):
    """One comparison of a plan with a reference. A measure that is not finite is None."""

    stage: Name
    inputs: Literal["golden", "random"]
    reference: Name
    cosine: float | None
    max_abs: float | None
    error: float | None
    finite: bool
    mask_iou_min: float | None
    mask_iou_mean: float | None
    passed: bool

    def __post_init__(self) -> None:
        # JSON has neither NaN nor infinity.
        for name in ("cosine", "max_abs", "error", "mask_iou_min", "mask_iou_mean"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                msgspec.structs.force_setattr(self, name, None)


class Parity(msgspec.Struct, frozen=True):
    """The parity gate's result, with its machine, time (UTC, ISO 8601) and measure."""

    passed: bool
    machine: Machine
    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=4096)]
    time: Name
    tolerance: dict[Name, float | None]


class AttentionReport(msgspec.Struct, frozen=True):
    """The state of one attention: fused or not, and into which kernel. None if the plan does not
    say."""

    name: Line
    fused: bool | None
    kernel: Line = ""


class LayerReport(msgspec.Struct, frozen=True):
    """One kernel or layer of a plan, with its precision where the plan shows it."""

    name: Line
    kernel: Line
    precision: Line


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a plan.

    Attributes:
        form: which graph of the stage was parsed.
        flavour, version: the library that built the plan; no other may load it.
        target: the folder of the plan, from :func:`target`.
        stage_sha256, graph_sha256, weights_sha256: the manifest's digest of the stage, of the file
            that was parsed, and of the weights.
        compute_capabilities: the GPUs that the plan is for.
        gpu, driver, device_memory_bytes: of the building machine; None where it had no GPU.
        profile: least, best and greatest shape of every input.
        flags: settings of the library, and options of the build: ``max windows``, ``workspace
            MiB`` and ``timing cache`` (its file name) are None where the option was not given.
        command: the command that builds it again, run from the bundle's parent folder. It is for
            readers of the record; error messages contain the real path.
        built: UTC, ISO 8601.
        read_from: where ``attention`` and ``layers`` were read.
        activation_bytes: device memory of one context, None if unknown for lack of a GPU.
        edge_runtime: version of this software.
        parity: the last verdict of the parity gate, None before the first.
    """

    schema: int = SCHEMA
    stage: Name
    model: Name
    form: Form
    precision: Literal["fp32", "fp16", "bf16"]
    flavour: Flavour
    version: Name
    target: Name
    plan_sha256: Sha256
    plan_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_PLAN_BYTES)]
    stage_sha256: Sha256
    graph_sha256: Sha256
    weights_sha256: Sha256
    compute_capabilities: Annotated[tuple[Capability, ...], msgspec.Meta(min_length=1)]
    gpu: Name | None
    driver: Name | None
    device_memory_bytes: Bytes | None
    profile: dict[Name, tuple[Shape, Shape, Shape]]
    inputs: Tensors
    outputs: Tensors
    flags: dict[Name, Line | int | bool | None]
    command: Line
    build_seconds: Annotated[float, msgspec.Meta(ge=0)]
    built: Name
    read_from: Literal["engine inspector", "serialised plan"]
    attention: Annotated[tuple[AttentionReport, ...], msgspec.Meta(max_length=4096)]
    layers: Annotated[tuple[LayerReport, ...], msgspec.Meta(max_length=1 << 15)]
    activation_bytes: Bytes | None
    edge_runtime: Name
    parity: Parity | None = None


@dataclass(frozen=True)
class Plan:
    """A plan on disk: ``path`` of the ``.plan`` file and its record."""

    path: Path
    record: PlanRecord

    @property
    def bundle_path(self) -> Path:
        """Folder of the bundle that the plan is for."""
        return bundle_of(self.path.parent.parent)

    @property
    def rebuild(self) -> str:
        """The command that builds this plan again."""
        flavour = self.record.flavour
        return rebuild_command(
            self.bundle_path, self.record.stage, flavour, **_options(self.record, flavour)
        )

    def read(self) -> bytes:
        """Read the plan and compare its size and sha256 with the record.

        Raises:
            PlanError: when the file is missing, unreadable, or not what the record describes.
        """
        if not self.path.is_file():  # reading a device or pipe might never end
            raise PlanError(f"{self.path} is missing", mend=self.rebuild, code="missing")
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.record.plan_bytes:
                    raise PlanError(
                        f"{self.path} is damaged: it has {size} bytes, its record says "
                        f"{self.record.plan_bytes}",
                        mend=self.rebuild,
                        code="damaged",
                    )
                data = file.read(self.record.plan_bytes + 1)
        except OSError as error:
            raise PlanError(
                f"{self.path} cannot be read: {error.strerror}", mend=self.rebuild
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.record.plan_sha256:
            raise PlanError(
                f"{self.path} is damaged: its sha256 is {found}, its record says "
                f"{self.record.plan_sha256}",
                mend=self.rebuild,
                code="damaged",
            )
        return data


def target(library: Library, compute_capabilities: Iterable[str]) -> str:
    """Name of the folder for plans of ``library`` for these GPUs: ``tensorrt-10.3.0-sm87``."""
    order = sorted(set(compute_capabilities), key=lambda text: tuple(map(int, text.split("."))))
    numbers = "-".join(text.replace(".", "") for text in order)
    return f"{library.flavour}-{library.version_text}-sm{numbers}"


def directory(bundle_path: str | os.PathLike[str], target: str) -> Path:
    """The folder of a bundle's plans for ``target``."""
    return plans_folder(bundle_path) / target


def rebuild_command(
    bundle_path: str | os.PathLike[str],
    stage: str,
    backend: Backend,
    *,
    max_windows: int | None = None,
    workspace_mib: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> str:
    """The command line that builds a plan, quoted for a shell."""
    words = ["edge-runtime", "build", _argument(bundle_path), "--stage", stage]
    words += ["--backend", backend]
    if max_windows is not None:
        words += ["--max-windows", str(max_windows)]
    if workspace_mib is not None:
        words += ["--workspace", str(workspace_mib)]
    if timing_cache is not None:
        words += ["--timing-cache", _argument(timing_cache)]
    if strict:
        words.append("--strict")
    return shlex.join(words)


def verify_command(bundle_path: str | os.PathLike[str], stage: str | None = None) -> str:
    """The command line that measures the plans of a bundle, quoted for a shell."""
    words = ["edge-runtime", "verify", _argument(bundle_path)]
    return shlex.join(words if stage is None else [*words, "--stage", stage])


def plans(bundle: Bundle, *, skip_damaged: bool = False) -> list[Plan]:
    """Every plan of the bundle that has a record, in the order of their paths.

    Args:
        skip_damaged: log records that cannot be used, instead of raising.

    Raises:
        PlanError: naming the first damaged record and the command that rebuilds its plan.
    """
    found = []
    for path in _records(bundle, "*"):
        try:
            found.append(_read(bundle, path))
        except PlanError as error:
            if not skip_damaged:
                raise
            logger.warning("%s", error)
    return found


def find(
    bundle: Bundle,
    stage: str,
    library: Library,
    compute_capability: str,
    gpu: str | None = None,
) -> Plan:
    """The newest plan of ``stage`` that :func:`check` accepts.

    Raises:
        BundleError: the bundle has no such stage.
        PlanError: no plan fits; the text says why, and which command builds one.
    """
    bundle.stage(stage)
    fitting: list[Plan] = []
    others: list[PlanRecord] = []
    reasons: list[str] = []
    for path in _records(bundle, stage):
        try:
            plan = _read(bundle, path)
            others.append(plan.record)
            _check(plan, bundle, library, compute_capability, gpu)
        except PlanError as error:
            reasons.append(error.found)
        else:
            fitting.append(plan)
    if fitting:
        return max(fitting, key=lambda plan: plan.record.built)
    wanted = f"{library.name} on a GPU of compute capability {compute_capability}"
    why = "; ".join(reasons) or "the bundle has none of this stage"
    like = max(
        others,
        key=lambda record: (
            record.flavour == library.flavour,
            compute_capability in record.compute_capabilities,
            record.built,
        ),
        default=None,
    )
    remedy = _remedy(bundle, stage, library, compute_capability, like)
    raise PlanError(f"no plan of the {stage} fits {wanted}: {why}", mend=remedy, code="missing")


def check(
    plan: Plan,
    bundle: Bundle,
    library: Library,
    compute_capability: str,
    gpu: str | None = None,
) -> None:
    """Refuse a plan that was built from or for something else. Only its record is read.

    Args:
        compute_capability: of this machine's GPU, such as ``8.7``.
        gpu: the GPU's name, if known. A plan of TensorRT is for one GPU model, a plan of
            TensorRT-RTX for every GPU of its compute capabilities.

    Raises:
        PlanError: naming the first mismatch and, where that helps, the command that rebuilds.
    """
    stage = plan.record.stage
    if not bundle.has(stage):
        raise PlanError(
            f"{plan.path} is for the {stage}, which this bundle lacks", mend="remove it"
        )
    try:
        _check(plan, bundle, library, compute_capability, gpu)
    except PlanError as error:
        remedy = _remedy(bundle, stage, library, compute_capability, plan.record)
        raise PlanError(error.found, mend=remedy) from None


def may_serve(plan: Plan, machine: Machine, defects: Sequence[Defect]) -> PlanError | None:
    """Decide if a plan may answer requests on ``machine``, by the parity gate's verdict.

    Args:
        defects: known defects of this library on this machine, from
            :func:`engines.libraries.defects`.

    Returns:
        None if the plan passed on this machine; a warning to log if it was not measured here.

    Raises:
        PlanError: the plan failed, here or elsewhere; or it was not measured here and the library
            has a known defect.
    """
    parity = plan.record.parity
    verify = verify_command(plan.bundle_path)
    failed = [row for row in parity.rows if not row.passed] if parity is not None else []
    if parity is not None and (failed or not parity.passed):
        where = "this machine" if parity.machine == machine else f"a {parity.machine.gpu}"
        how = f": {_describe(failed[0])}" if failed else ""
        raise PlanError(
            f"{plan.path} failed the parity gate on {where} at {parity.time}{how}. It does not "
            "serve",
            mend=f"build it again with `{plan.rebuild}`, or measure it again with "
            f"`{verify}`; if it fails again, use a bundle of another precision",
            code="not_verified",
        )
    if parity is None or not parity.rows:
        state = "was never measured"
    elif parity.machine == machine:
        return None
    else:
        state = f"was measured elsewhere ({_difference(parity.machine, machine)})"
    precision = plan.record.precision
    concerning = [one for one in defects if not one.precisions or precision in one.precisions]
    if concerning:
        known = "; ".join(f"{defect.what} ({defect.source})" for defect in concerning)
        raise PlanError(
            f"{plan.path} {state}, and {machine.library} has a known defect: {known}. "
            "It serves once it has passed here",
            mend=verify,
            code="not_verified",
        )
    return PlanError(f"{plan.path} {state}: it serves without a measurement", mend=verify)


def write(
    folder: str | os.PathLike[str], stage: str, built: str | os.PathLike[str], record: PlanRecord
) -> Plan:
    """Move the finished file ``built`` to its place in ``folder``, with its record.

    ``built`` must lie on the same disk as ``folder``; it is gone afterwards, also after an error. A
    plan without a record counts for nothing, so the record is removed first and written last: no
    reader ever finds a plan beside the record of another one.

    Raises:
        BuildError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    place, note = folder / f"{stage}.plan", folder / f"{stage}.json"
    instead = another_place(folder)
    try:
        with explain_write_errors(place, BuildError, instead), _locked(folder):
            flush_to_disk(built)
            with atomic_file(note, error=BuildError, instead=instead) as scratch:
                scratch.write_bytes(json_bytes(record, indent=1))
                note.unlink(missing_ok=True)
                os.replace(built, place)
            flush_to_disk(folder)
    finally:
        with contextlib.suppress(OSError):
            Path(built).unlink()
    return Plan(place, record)


def write_parity(plan: Plan, parity: Parity) -> Plan:
    """Write the parity gate's verdict into the plan's record.

    Raises:
        PlanError: the record cannot be written, or the plan was rebuilt meanwhile.
    """
    note = plan.path.with_suffix(".json")
    instead = another_place(note.parent)
    with explain_write_errors(note, PlanError, instead), _locked(note.parent):
        on_disk = _read_record(note, plan.rebuild)
        if on_disk.plan_sha256 != plan.record.plan_sha256:
            raise PlanError(
                f"{plan.path} was rebuilt while the old one was measured",
                mend=verify_command(plan.bundle_path),
            )
        record = msgspec.structs.replace(on_disk, parity=parity)
        write_atomically(note, json_bytes(record, indent=1), error=PlanError, instead=instead)
        flush_to_disk(note.parent)
    return Plan(plan.path, record)


def another_place(path: Path) -> str:
    """The remedy if ``path``, a place of plans, cannot be written."""
    if cache() in path.parents:
        return "set XDG_CACHE_HOME to a directory that you may write"
    return (
        "copy the bundle, which holds its plans, to a directory that you may write, and use the "
        "copy"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers of plans and verdicts out of ``folder``, if its disk supports locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _options(record: PlanRecord, flavour: Flavour, windows: int | None = None) -> dict[str, Any]:
    """The options of :func:`rebuild_command` with which the plan was built.

    Args:
        flavour: of the library that will build; TensorRT-RTX takes no timing cache.
        windows: of the bundle, which may have fewer now; None if unknown.
    """
    most, workspace = (_count(record.flags.get(name)) for name in ("max windows", "workspace MiB"))
    cache = record.flags.get("timing cache")
    return {
        "max_windows": None if most and windows and most >= windows else most,
        "workspace_mib": workspace,
        # Only the file name: a record must not choose which files elsewhere are overwritten.
        "timing_cache": (
            (Path(cache).name or None) if isinstance(cache, str) and flavour == "tensorrt" else None
        ),
        "strict": record.flags.get("strict") is True,
    }


def _count(flag: object) -> int | None:
    return flag if isinstance(flag, int) and not isinstance(flag, bool) and flag > 0 else None


def _remedy(
    bundle: Bundle,
    stage: str,
    library: Library,
    compute_capability: str,
    like: PlanRecord | None,
) -> str:
    """The command that builds a plan like ``like``, or what else would help."""
    able = libraries.builds_for(library, compute_capability)
    flavour: Flavour = library.flavour if able else "tensorrt"
    windows = bundle.manifest.geometry.windows
    options = {} if like is None else _options(like, flavour, windows)
    command = rebuild_command(bundle.path, stage, flavour, **options)
    if able:
        return command
    return (
        "use ONNX Runtime with CUDA or, where JetPack or a container of NVIDIA's provides "
        f"TensorRT, build with that: `{command}`; building again does not help, because "
        f"{library.name} supports no GPU of compute capability {compute_capability}"
    )


def _argument(path: str | os.PathLike[str]) -> str:
    """The path in a form that no parser takes for an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def _records(bundle: Bundle, stage: str) -> list[Path]:
    """The records of TensorRT's plans. Other engines may keep files in folders beside them.

    Raises:
        PlanError: another user could put plans into this user's cache.
    """
    folder = plans_folder(bundle.path)
    if folder.is_dir() and bundle.path not in folder.parents and (danger := why_untrusted(folder)):
        raise danger.error(PlanError).within("plans contain code")
    return sorted(folder.glob(f"tensorrt*/{stage}.json"))


def _read(bundle: Bundle, path: Path) -> Plan:
    stage = path.stem
    known = stage in bundle.manifest.stages  # otherwise building would not replace it
    command = rebuild_command(bundle.path, stage, "auto")
    record = _read_record(path, command if known else "remove it")
    if (record.target, record.stage) != (path.parent.name, stage):
        raise PlanError(
            f"{path} is the record of {record.target}/{record.stage}, it was moved or renamed",
            mend=f"remove it, then `{command}`" if known else "remove it",
        )
    return Plan(path.with_suffix(".plan"), record)


def _read_record(path: Path, remedy: str) -> PlanRecord:
    try:
        return read_json(
            path,
            PlanRecord,
            max_bytes=_MAX_RECORD_BYTES,
            error=PlanError,
            remedy=remedy,
            schema=SCHEMA,
        )
    except FileNotFoundError:
        raise PlanError(f"{path} is missing", mend=remedy, code="missing") from None


def _check(
    plan: Plan, bundle: Bundle, library: Library, compute_capability: str, gpu: str | None
) -> None:
    record, path = plan.record, plan.path
    stage = bundle.stage(record.stage)
    if record.form == "attention":
        graph = stage.files[stage.file]
    else:
        graph = stage.plain.sha256 if stage.plain is not None else "absent from this bundle"
    built_with = f"{record.flavour} {record.version}"
    wanted = f"{library.flavour} {library.version_text}"
    if built_with != wanted:
        raise PlanError(f"{path} was built with {built_with}, this is {wanted}")
    if compute_capability not in record.compute_capabilities:
        raise PlanError(
            f"{path} was built for compute capability {', '.join(record.compute_capabilities)}, "
            f"this GPU has {compute_capability}"
        )
    if record.flavour == "tensorrt" and gpu is not None and record.gpu != gpu:
        where = "a GPU without a name" if record.gpu is None else f"the GPU {record.gpu}"
        raise PlanError(f"{path} was built on {where}, this is {gpu}")
    for what, found, expected in (
        ("model", record.model, bundle.manifest.model),
        ("precision", record.precision, bundle.manifest.precision),
        ("weights", record.weights_sha256, bundle.manifest.weights_sha256),
        ("stage", record.stage_sha256, stage.sha256),
        ("graph", record.graph_sha256, graph),
    ):
        if found != expected:
            raise PlanError(
                f"{path} is stale: it was built from the {what} {found}, the bundle's is {expected}"
            )
    if not path.is_file():
        raise PlanError(f"{path} is missing beside its record")


def _describe(row: Row) -> str:
    measures = (("cosine", row.cosine), ("error", row.error), ("mask IoU", row.mask_iou_min))
    values = [f"{name} {value:.6g}" for name, value in measures if value is not None]
    if not row.finite:
        values.insert(0, "NaN or infinity in the outputs")
    measured = f": {', '.join(values)}" if values else ""
    return f"{row.stage} on {row.inputs} inputs against {row.reference}{measured}"


def _difference(there: Machine, here: Machine) -> str:
    """Why a verdict made there does not hold here; empty if it does."""
    changed = [
        f"{name.replace('_', ' ')} {getattr(there, name)}, here {getattr(here, name)}"
        for name in _BINDING
        if getattr(there, name) != getattr(here, name)
    ]
    return "; ".join(changed)
