"""Chooses the engine that runs a stage: a TensorRT plan, or ONNX Runtime on CUDA or on the CPU.

Everything that serves opens its engines with :func:`open_stage`. The parity gate opens engines that
have no verdict yet with :func:`open_onnx` and :func:`open_plan`.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shlex
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from edge_common.errors import BundleError, EngineError, PlanError
from edge_common.files import explain_write_errors, write_atomically
from edge_common.json_file import json_bytes, read_json
from engines import cuda, libraries
from engines.bundle import EXPORT_AGAIN, Bundle, Line, Name, Sha256, TensorSpec
from engines.engine import Device, Engine
from engines.libraries import Library
from engines.ort import OrtEngine
from engines.plan import (
    Machine,
    Plan,
    Row,
    find,
    may_serve,
    verify_command,
)
from engines.plan_paths import make_plans_folder, plans_folder

logger = logging.getLogger(__name__)

_MAX_FAILURE_BYTES = 1 << 20


def open_stage(
    bundle: Bundle,
    stage: str,
    *,
    device: Device = "auto",
    threads: int | None = None,
    ordinal: int = 0,
) -> Engine:
    """Open the engine that serves ``stage``.

    The files of the stage, or its plan, have the recorded hashes; the engine did not fail the
    parity gate on this machine; and it takes and returns what the manifest says. If ``auto`` does
    not use a plan, the log says why, once.

    Args:
        device: see :data:`engines.engine.Device`.
        threads: CPU threads of ONNX Runtime; None means every core this process may use.
        ordinal: which GPU TensorRT uses.

    Raises:
        BundleError: the bundle lacks the stage, a file of it is damaged, or the graph contradicts
            the manifest.
        PlanError: ``tensorrt`` was asked for and no plan may serve here.
        EngineError: the engine cannot be opened, or failed the parity gate here.
    """
    if device not in get_args(Device):
        raise EngineError(f"device is {device!r}, expected one of {', '.join(get_args(Device))}")
    bundle.stage(stage)
    if device == "tensorrt":
        return _open_tensorrt(bundle, stage, ordinal)
    if device == "auto" and _has_plans(bundle, stage):
        try:
            return _open_tensorrt(bundle, stage, ordinal)
        except EngineError as error:
            _warn_once(f"ONNX Runtime is used instead of TensorRT: {error.found}", error.mend)
    if device != "cpu":
        failure = find_failure(bundle, stage, "cuda")
        if failure is not None and device == "cuda":
            raise failure
        if failure is not None:
            _warn_once(f"the CPU is used instead of CUDA: {failure.found}", failure.mend)
            device = "cpu"
    engine = open_onnx(bundle, stage, device=device, threads=threads)
    if engine.device == "cpu" and (failure := find_failure(bundle, stage, "cpu")) is not None:
        engine.close()
        raise failure
    return engine


def open_onnx(
    bundle: Bundle,
    stage: str,
    *,
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None = None,
) -> OrtEngine:
    """Open a stage in ONNX Runtime. The parity gate's verdict is not checked.

    Raises:
        BundleError, EngineError: as :func:`open_stage`.
    """
    bundle.verify_hashes([stage])  # a flipped bit gives wrong masks and rarely an error
    engine = OrtEngine(bundle.stage_path(stage), threads=threads, device=device)
    if (wrong := _contradiction(engine, bundle, stage)) is not None:
        engine.close()
        raise BundleError(f"{bundle.stage_path(stage)} {wrong}", mend=EXPORT_AGAIN)
    return engine


def open_plan(bundle: Bundle, plan: Plan, library: Library, *, ordinal: int = 0) -> Engine:
    """Open a plan that :func:`engines.plan.check` accepted. The parity gate's verdict is not
    checked.

    Raises:
        PlanError: its bytes differ from the record, the library refuses them, or its inputs or
            outputs contradict the manifest.
        EngineError: the GPU refuses it, or has too little memory.
    """
    from engines.trt import TrtEngine

    engine = TrtEngine(plan, library, ordinal=ordinal)
    if (wrong := _contradiction(engine, bundle, plan.record.stage)) is not None:
        engine.close()
        raise PlanError(f"{plan.path} {wrong}", mend=plan.rebuild)
    return engine


def this_machine(library: Library, gpu: cuda.Facts) -> Machine:
    """This machine, as verdicts on plans of ``library`` record it."""
    return Machine(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        memory_bytes=gpu.memory_bytes,
        library=library.name,
    )


def _open_tensorrt(bundle: Bundle, stage: str, ordinal: int) -> Engine:
    """Open the plan of ``stage`` that may serve here. Raises EngineError with all reasons."""
    if not _has_plans(bundle, stage):
        raise PlanError(
            f"{bundle.path} has no TensorRT plan of the {stage}",
            mend=f"edge-runtime build {shlex.quote(str(bundle.path))} --stage {stage}",
        )
    gpu = cuda.facts(ordinal)
    reasons = []
    for flavour in libraries.installed() or [libraries.choose("auto").flavour]:
        try:
            library = libraries.load(flavour)
            plan = find(bundle, stage, library, gpu.compute_capability, gpu.name)
            known = libraries.defects(flavour, library.version, gpu.compute_capability)
            warning = may_serve(plan, this_machine(library, gpu), known)
            engine = open_plan(bundle, plan, library, ordinal=ordinal)
        except EngineError as error:
            reasons.append(error)
        else:
            if warning is not None:
                _warn_once(warning.found, warning.mend)
            return engine
    if len(reasons) == 1:
        raise reasons[0]
    raise PlanError(
        _numbered(error.found for error in reasons), mend=_numbered(error.mend for error in reasons)
    )


def _numbered(texts: Iterable[str]) -> str:
    return " ".join(f"({number}) {text}" for number, text in enumerate(texts, 1) if text)


def _has_plans(bundle: Bundle, stage: str) -> bool:
    """True if the stage has any plan. Cheap, and imports nothing."""
    return any(plans_folder(bundle.path).glob(f"tensorrt*/{stage}.json"))


@lru_cache(maxsize=256)
def _warn_once(found: str, mend: str) -> None:
    """Log a warning, the same one only once. Its record has both texts apart, for programs."""
    logger.warning("%s", EngineError(found, mend=mend), extra={"found": found, "mend": mend})


def _contradiction(engine: Engine, bundle: Bundle, name: str) -> str | None:
    """How ``engine`` differs from the manifest in inputs or outputs; None if they agree."""
    stage = bundle.stage(name)
    for side in ("inputs", "outputs"):
        said = {_signature(spec) for spec in getattr(stage, side)}
        found = {_signature(spec) for spec in getattr(engine, side)}
        if said != found:
            return f"has {side} {_listed(found)}, its manifest says {_listed(said)}"
    return None


def _signature(spec: TensorSpec) -> str:
    """The part in which graph and manifest must agree: all except names of dynamic dimensions."""
    shape = ", ".join(str(dim) if isinstance(dim, int) else "?" for dim in spec.shape)
    return f"{spec.name} {spec.dtype} [{shape}]"


def _listed(signatures: set[str]) -> str:
    return ", ".join(sorted(signatures))


# Verdicts on ONNX Runtime. A verdict on a plan is in its record. Graphs have no record, so a
# failure of ONNX Runtime is kept in a separate file until the gate passes again.


class Failure(msgspec.Struct, frozen=True):
    """A failure of ONNX Runtime in the parity gate: its version, machine and measurements."""

    engine: Name
    machine: Line
    stage_sha256: Sha256
    time: Name
    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=4096)]


OrtKind = Literal["cpu", "cuda"]


def onnx_identity(device: OrtKind, ordinal: int = 0) -> tuple[str, str]:
    """Names of ONNX Runtime on that device and of the machine, for which a verdict holds."""
    import onnxruntime

    place = "CUDA" if device == "cuda" else "CPU"
    machine = platform.platform()
    if device == "cuda":
        with contextlib.suppress(EngineError):
            gpu = cuda.facts(ordinal)
            machine = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.driver}"
    return f"ONNX Runtime {onnxruntime.__version__} {place}", machine


def find_failure(bundle: Bundle, stage: str, device: OrtKind) -> EngineError | None:
    """Why ONNX Runtime on ``device`` must not run the stage here; None if it may."""
    path = _failure_path(bundle, stage, device)
    verify = f"`{verify_command(bundle.path)}` measures again and"
    try:
        failure = read_json(
            path,
            Failure,
            max_bytes=_MAX_FAILURE_BYTES,
            error=EngineError,
            remedy=f"{verify} replaces it: it holds what failed the parity gate",
        )
    except FileNotFoundError:
        return None
    except EngineError as error:
        return error
    stale = failure.stage_sha256 != bundle.stage(stage).sha256
    if stale or (failure.engine, failure.machine) != onnx_identity(device):
        return None
    return EngineError(
        f"{failure.engine} failed the parity gate on the {stage} of {bundle.path} at "
        f"{failure.time}, so it does not serve",
        mend=f"{verify} shows the rows. If it fails again, export the bundle again, in fp32 if it "
        "has another precision, or install another version of ONNX Runtime",
        code="not_verified",
    )


def write_failure(bundle: Bundle, stage: str, device: OrtKind, failure: Failure | None) -> None:
    """Keep a failure; None deletes an earlier one.

    Raises:
        EngineError: it cannot be written.
    """
    path = _failure_path(bundle, stage, device)
    instead = (
        "copy the bundle to a directory that you may write, and use the copy; until then this "
        "verdict has no effect"
    )
    with explain_write_errors(path, EngineError, instead):
        if failure is None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            return
        make_plans_folder(bundle.path)
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, json_bytes(failure), error=EngineError, instead=instead)


def _failure_path(bundle: Bundle, stage: str, device: OrtKind) -> Path:
    return plans_folder(bundle.path) / f"onnxruntime-{device}" / f"{stage}.failed.json"
