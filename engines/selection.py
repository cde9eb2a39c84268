"""Which engine runs a stage here: a TensorRT plan, or ONNX Runtime on CUDA or on the CPU.

:func:`open_stage` is the one way to an engine that serves. It promises that no stage runs whose
files, or whose plan, differ from the hashes on record, that no engine runs which failed the parity
gate on this machine, and that an opened engine takes and returns what the manifest says. Where
``auto`` passes a plan over, the log says why, once. What the gate needs to open engines before it
has a verdict on them is here too: they must not open otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from edge_common.errors import BundleError, EngineError, PlanError
from edge_common.files import explain_write_errors, write_atomically
from engines import cuda, libraries
from engines.bundle import Bundle, Line, Name, Sha256, TensorSpec
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
    """Open the engine that is to serve ``stage``.

    Args:
        device: see :data:`engines.engine.Device`.
        threads: CPU threads of ONNX Runtime; None means every core this process may use.
        ordinal: which GPU TensorRT uses.

    Raises:
        BundleError: when the bundle lacks the stage, a file of it is damaged, or the graph
            contradicts the manifest.
        PlanError: ``tensorrt`` was asked for and there is no plan that may serve here.
        EngineError: when the engine cannot be opened, or failed the parity gate here.
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
            _say(f"TensorRT is passed over, ONNX Runtime takes its place: {error}", error.mend)
    if device != "cpu":
        failure = find_failure(bundle, stage, "cuda")
        if failure is not None and device == "cuda":
            raise EngineError(failure)
        if failure is not None:
            _say(f"CUDA is passed over, the CPU takes its place: {failure}")
            device = "cpu"
    engine = open_onnx(bundle, stage, device=device, threads=threads)
    if engine.device == "cpu" and (failure := find_failure(bundle, stage, "cpu")) is not None:
        engine.close()
        raise EngineError(failure)
    return engine


def open_onnx(
    bundle: Bundle,
    stage: str,
    *,
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None = None,
) -> OrtEngine:
    """Open a stage in ONNX Runtime, whatever the parity gate said.

    Raises:
        BundleError, EngineError: as :func:`open_stage`.
    """
    bundle.verify_hashes([stage])  # a flipped bit is a wrong mask, seldom an error
    engine = OrtEngine(bundle.stage_path(stage), threads=threads, device=device)
    if (wrong := _contradiction(engine, bundle, stage)) is not None:
        engine.close()
        raise BundleError(
            f"{bundle.stage_path(stage)} {wrong}: export the bundle again with "
            "`edge-runtime export`"
        )
    return engine


def open_plan(bundle: Bundle, plan: Plan, library: Library, *, ordinal: int = 0) -> Engine:
    """Open a plan that :func:`engines.plan.check` passed, whatever the parity gate said.

    Raises:
        PlanError: when its bytes are not those on record, the library refuses them, or it takes or
            returns something else than the manifest says.
        EngineError: when the GPU refuses, or has no memory for it.
    """
    from engines.trt import TrtEngine

    engine = TrtEngine(plan, library, ordinal=ordinal)
    if (wrong := _contradiction(engine, bundle, plan.record.stage)) is not None:
        engine.close()
        raise PlanError(f"{plan.path} {wrong}. Build it again: `{plan.rebuild}`")
    return engine


def this_machine(library: Library, gpu: cuda.Facts) -> Machine:
    """What the verdicts on plans of ``library`` hold for."""
    return Machine(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        memory_bytes=gpu.memory_bytes,
        library=library.name,
    )


def _open_tensorrt(bundle: Bundle, stage: str, ordinal: int) -> Engine:
    """The plan of ``stage`` that may serve here. Raises EngineError with every reason against."""
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
                _say(warning)
            return engine
    if len(reasons) == 1:
        raise reasons[0]
    raise PlanError(" ".join(f"({number}) {text}" for number, text in enumerate(reasons, 1)))


def _has_plans(bundle: Bundle, stage: str) -> bool:
    """Whether there is anything for TensorRT to look at: cheap, and nothing is imported."""
    return any(plans_folder(bundle.path).glob(f"tensorrt*/{stage}.json"))


@lru_cache(maxsize=256)
def _say(text: str, mend: str = "") -> None:
    """Log a warning, the same one only once; `mend` is in its record for other programs."""
    logger.warning("%s", text, extra={"mend": mend})


def _contradiction(engine: Engine, bundle: Bundle, name: str) -> str | None:
    """What ``engine`` takes or returns against the manifest; None when they agree."""
    stage = bundle.stage(name)
    for side in ("inputs", "outputs"):
        said = {_signature(spec) for spec in getattr(stage, side)}
        found = {_signature(spec) for spec in getattr(engine, side)}
        if said != found:
            return f"has {side} {_listed(found)}, its manifest says {_listed(said)}"
    return None


def _signature(spec: TensorSpec) -> str:
    """What graph and manifest must agree on: all but the names of dynamic dimensions."""
    shape = ", ".join(str(dim) if isinstance(dim, int) else "?" for dim in spec.shape)
    return f"{spec.name} {spec.dtype} [{shape}]"


def _listed(signatures: set[str]) -> str:
    return ", ".join(sorted(signatures))


# Verdicts on ONNX Runtime. A plan has a record to hold its verdict; ONNX Runtime runs the bundle's
# own graphs and has none, so what is kept is a note of failure alone, until the gate passes again.


class Failure(msgspec.Struct, frozen=True):
    """Why ONNX Runtime may not serve a stage: what was measured, by which version and where."""

    engine: Name
    machine: Line
    stage_sha256: Sha256
    time: Name
    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=4096)]


OrtKind = Literal["cpu", "cuda"]


def onnx_identity(device: OrtKind, ordinal: int = 0) -> tuple[str, str]:
    """Name of ONNX Runtime on that device, and of the machine as far as a verdict depends on it."""
    import onnxruntime

    place = "CUDA" if device == "cuda" else "CPU"
    machine = platform.platform()
    if device == "cuda":
        with contextlib.suppress(EngineError):
            gpu = cuda.facts(ordinal)
            machine = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.driver}"
    return f"ONNX Runtime {onnxruntime.__version__} {place}", machine


def find_failure(bundle: Bundle, stage: str, device: OrtKind) -> str | None:
    """What to tell whoever wants ONNX Runtime on ``device`` for a stage it failed here, or None."""
    path = _failure_path(bundle, stage, device)
    try:
        with path.open("rb") as file:
            failure = msgspec.json.decode(file.read(_MAX_FAILURE_BYTES), type=Failure)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return (
            f"{path}, where the parity gate notes what failed, cannot be read: {error}. "
            f"`{verify_command(bundle.path)}` measures again and replaces it"
        )
    stale = failure.stage_sha256 != bundle.stage(stage).sha256
    if stale or (failure.engine, failure.machine) != onnx_identity(device):
        return None
    return (
        f"{failure.engine} failed the parity gate on the {stage} of {bundle.path} at "
        f"{failure.time}, so it does not serve: `{verify_command(bundle.path)}` measures again and "
        "shows the rows. If it fails again, export the bundle again, in fp32 if this is another "
        "precision, or install another version of ONNX Runtime"
    )


def write_failure(bundle: Bundle, stage: str, device: OrtKind, failure: Failure | None) -> None:
    """Keep a failure, or with None forget the one there was.

    Raises:
        EngineError: when it cannot be written, with what that means.
    """
    path = _failure_path(bundle, stage, device)
    instead = (
        "copy the bundle to a directory that you may write, and use the copy; until then this "
        "verdict binds nobody"
    )
    with explain_write_errors(path, EngineError, instead):
        if failure is None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            return
        make_plans_folder(bundle.path)
        path.parent.mkdir(exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(failure), indent=2) + b"\n"
    write_atomically(path, data, error=EngineError, instead=instead)


def _failure_path(bundle: Bundle, stage: str, device: OrtKind) -> Path:
    return plans_folder(bundle.path) / f"onnxruntime-{device}" / f"{stage}.failed.json"
