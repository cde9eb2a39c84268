"""Builds TensorRT plans of a bundle, one stage at a time, each in its own process.

:func:`build_stage` starts :mod:`engines.build_process`, reports its progress, and puts the finished
plan and its record in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import msgspec

from edge_common.errors import BuildError, EngineError
from edge_common.files import explain_write_errors
from edge_common.signals import child_process, cleanup_on_exit, defer_signals
from edge_common.text import printable
from engines import libraries
from engines import plan as plans
from engines.build_process import Began, Built, Event, Failed, Phase, Profile, Request, Warned
from engines.bundle import Bundle, Manifest, Stage, hash_file
from engines.libraries import Backend
from engines.plan import Plan, PlanRecord
from engines.plan_paths import make_plans_folder, plans_folder

MAX_PROMPTS = 16
"""Prompts decoded at once, and points of one prompt, that a decoder's plan is built for."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        backend: ``auto`` takes TensorRT if it is installed, otherwise TensorRT-RTX.
        max_windows: most windows of a batch; None: all windows of the bundle's geometry.
        workspace_mib: scratch memory on the GPU that the library may use; None: its default.
        timing_cache: file to read measured timings from and write them to; TensorRT only.
        strict: fail if an attention of the encoder was not fused.
    """

    backend: Backend = "auto"
    max_windows: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    strict: bool = False


class Watcher:
    """Callbacks of a build; override those you need."""

    def begin(self, stage: str) -> None:
        """The build of ``stage`` begins."""

    def phase(self, name: str, done: int, total: int, depth: int) -> None:
        """``done`` of ``total`` steps of a phase are done; depth 0 is the whole build."""

    def warning(self, text: str) -> None:
        """A warning for the user."""

    def finished(self, record: PlanRecord) -> None:
        """The stage's plan is in place."""


def expected_share(windows: int) -> int:
    """The number of windows that one of several nodes computes of an image of ``windows``.

    Each of three nodes that may not see adjacent windows gets at most 9 of 25.
    """
    return -(-windows * 9 // 25)


def profile_for(manifest: Manifest, stage: str, max_windows: int | None = None) -> Profile:
    """Least, best and greatest shape of every input of ``stage`` for its plan.

    Raises:
        BuildError: ``max_windows`` is out of range, or the stage has an unknown dimension.
    """
    windows = manifest.geometry.windows
    most = windows if max_windows is None else max_windows
    if not 1 <= most <= windows:
        raise BuildError(
            f"--max-windows is {most}, expected 1 to {windows}: {manifest.model} cuts an image "
            f"into {windows} windows"
        )
    ranges = {
        "n": (1, min(most, expected_share(windows)), most),
        "p": (1, 1, MAX_PROMPTS),
        "k": (0, 2, MAX_PROMPTS),
    }
    profile: Profile = {}
    for spec in manifest.stages[stage].inputs:
        unknown = [d for d in spec.shape if isinstance(d, str) and d not in ranges]
        if unknown:
            raise BuildError(
                f"input {spec.name} of {stage} has dimension {unknown[0]}, for which no range is "
                f"known (only {', '.join(ranges)}): this bundle cannot be built"
            )
        least, best, greatest = (
            tuple(ranges[d][place] if isinstance(d, str) else d for d in spec.shape)
            for place in range(3)
        )
        profile[spec.name] = least, best, greatest
    return profile


def build_stage(
    bundle: Bundle, stage: str, options: BuildOptions, watcher: Watcher | None = None
) -> Plan:
    """Build the plan of one stage and put it into the bundle, replacing an older one.

    The files of the stage are hashed first. Any exception, KeyboardInterrupt and SystemExit too,
    kills the build process and leaves the bundle as it was. If this process is killed, the next
    build removes what it left.

    Raises:
        BundleError: the bundle lacks the stage, or its files are damaged.
        EngineError: no library is installed, or it needs a GPU and there is none.
        BuildError: the options contradict one another, the graph cannot be built, attention was not
            fused under ``strict``, the build process died, or the disk refuses.
    """
    watcher = watcher or Watcher()
    spec = bundle.stage(stage)
    profile = profile_for(bundle.manifest, stage, options.max_windows)
    _check_options(options)
    root = bundle.path.absolute()
    watcher.begin(stage)
    bundle.verify_hashes([stage])
    with _workplace(bundle) as folder, contextlib.ExitStack() as files:
        partial = files.enter_context(_temporary(folder, stage))
        _require_room(bundle, spec, folder)
        request = Request(
            parent=os.getpid(),
            backend=options.backend,
            stage=stage,
            precision=bundle.manifest.precision,
            attention=str(root / spec.file),
            plain=None if spec.plain is None else str(root / spec.plain.file),
            inputs=spec.inputs,
            outputs=spec.outputs,
            profile=profile,
            plan=str(partial),
            workspace_mib=options.workspace_mib,
        )
        cache = options.timing_cache
        if cache is not None:
            new = files.enter_context(_temporary(cache.parent, cache.name))
            old = str(cache.absolute()) if cache.exists() else None
            request = msgspec.structs.replace(request, timing_cache=old, new_timing_cache=str(new))
        began, built = _follow(request, watcher)
        record = _record(bundle, stage, options, request, began, built)
        _check_fusion(record, options, watcher)
        place = plans.directory(bundle.path, began.target)
        with defer_signals():
            with _writing(place):
                place.mkdir(exist_ok=True)
            plan = plans.write(place, stage, partial, record)
            if cache is not None:
                with _writing(cache):
                    os.replace(new, cache)
    watcher.finished(plan.record)
    return plan


def _check_options(options: BuildOptions) -> None:
    if options.workspace_mib is not None and options.workspace_mib < 1:
        raise BuildError(f"--workspace is {options.workspace_mib} MiB, expected at least 1")
    cache = options.timing_cache
    if cache is None:
        return
    flavour = options.backend
    if flavour == "auto":
        flavour = next(iter(libraries.installed()), "auto")
    if flavour == "tensorrt-rtx":
        raise BuildError(
            "--timing-cache is for TensorRT: TensorRT-RTX measures no timings, and with a cache it "
            "would need a GPU",
            mend="leave it out",
        )
    if cache.is_dir() or not cache.parent.is_dir():
        raise BuildError(
            f"--timing-cache {cache} is no file in a directory that exists", mend="name one"
        )


@contextlib.contextmanager
def _workplace(bundle: Bundle) -> Iterator[Path]:
    """The folder of the bundle's plans, cleared of partial files that killed builds left.

    Every build holds a shared lock on it. A build that gets an exclusive lock is alone and may
    remove leftovers.
    """
    folder = plans_folder(bundle.path)
    with _writing(folder):
        make_plans_folder(bundle.path)
        lock = os.open(folder, os.O_RDONLY)

    def tidy() -> None:
        if _alone(lock):
            for empty in (*folder.glob("*/"), folder):
                with contextlib.suppress(OSError):
                    empty.rmdir()

    try:
        if _alone(lock):
            for leftover in folder.glob(f".*{_PARTIAL}"):
                _remove(leftover)
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        with cleanup_on_exit(tidy):
            yield folder
    finally:
        os.close(lock)


def _require_room(bundle: Bundle, stage: Stage, folder: Path) -> None:
    """Refuse a full disk before the build, which may take an hour. A plan holds all weights."""
    needed = sum((bundle.path / file).stat().st_size for file in stage.files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"no room for a plan in {folder}: at least {needed / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free",
            mend="make room on that disk, then try again",
            code="disk_full",
        )


def _alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """An empty file in ``folder``, removed after the block unless it was moved away."""
    path = (folder / f".{name}.{secrets.token_hex(8)}{_PARTIAL}").absolute()
    with cleanup_on_exit(lambda: _remove(path)):
        with _writing(folder):
            path.touch(exist_ok=False)
        yield path


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    with explain_write_errors(path, BuildError, plans.another_place(path)):
        yield


def _follow(request: Request, watcher: Watcher) -> tuple[Began, Built]:
    """Run the build process to its end and report to ``watcher``."""
    events: dict[type, Any] = {}
    last_lines: deque[str] = deque(maxlen=3)
    # cwd: modules with the same names in the user's folder must not be imported.
    with child_process(
        [sys.executable, "-m", "engines.build_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
    ) as builder:
        assert builder.stdin
        assert builder.stdout
        assert builder.stderr
        arguments = (builder.stderr, last_lines)
        listener = threading.Thread(target=_keep_last_lines, args=arguments, daemon=True)
        listener.start()
        with contextlib.suppress(BrokenPipeError):
            builder.stdin.write(msgspec.json.encode(request) + b"\n")
            builder.stdin.close()
        decoder = msgspec.json.Decoder(Event)
        for line in builder.stdout:
            try:
                event = decoder.decode(line)
            except msgspec.MsgspecError:  # the build process died in the middle of a line
                continue
            events[type(event)] = event
            if isinstance(event, Phase):
                watcher.phase(printable(event.name), event.done, event.total, event.depth)
            elif isinstance(event, Warned):
                watcher.warning(printable(event.text))
        builder.wait()
        listener.join(1)
    failed = events.get(Failed)
    if failed is not None:
        kind = EngineError if failed.kind == "EngineError" else BuildError
        raise kind(printable(failed.found), mend=printable(failed.mend), code=failed.code)
    if Built not in events or builder.returncode:
        raise _crash(request, builder.returncode, events, last_lines)
    return events[Began], events[Built]


def _keep_last_lines(stream: IO[bytes], last_lines: deque[str]) -> None:
    for line in stream:
        text = line.decode("utf-8", "replace").strip()
        if text:
            last_lines.append(printable(text[:300]))


def _crash(
    request: Request, code: int, events: dict[type, Any], last_lines: deque[str]
) -> BuildError:
    began, phase = events.get(Began), events.get(Phase)
    who = began.library if began else "the library"
    where = f" in phase '{phase.name}'" if phase else ""
    mend = ""
    if code == -signal.SIGKILL:
        how = f"{who} was killed{where}, most likely because memory ran out (see `dmesg`)"
        mend = (
            "close other programs, add swap, or build with a smaller --max-windows or --workspace"
        )
    elif code < 0:
        how = f"{who} crashed with {signal.Signals(-code).name}{where}"
    else:
        how = f"{who} ended with code {code}{where} and gave no reason"
    said = f". It last said: {' / '.join(last_lines)}" if last_lines else ""
    return BuildError(
        f"building the {request.stage} failed, nothing was kept: {how}{said}", mend=mend
    )


def _record(
    bundle: Bundle,
    stage: str,
    options: BuildOptions,
    request: Request,
    began: Began,
    built: Built,
) -> PlanRecord:
    manifest, spec = bundle.manifest, bundle.stage(stage)
    graph = spec.files[spec.file]
    if began.form == "plain":
        assert spec.plain is not None
        graph = spec.plain.sha256
    partial = Path(request.plan)
    # Names without folders, because a bundle with its records may be copied elsewhere.
    cache = None if options.timing_cache is None else options.timing_cache.name
    return PlanRecord(
        stage=stage,
        model=manifest.model,
        form=began.form,
        precision=manifest.precision,
        flavour=began.flavour,
        version=began.version,
        target=began.target,
        plan_sha256=hash_file(partial),
        plan_bytes=partial.stat().st_size,
        stage_sha256=spec.sha256,
        graph_sha256=graph,
        weights_sha256=manifest.weights_sha256,
        compute_capabilities=began.compute_capabilities,
        gpu=began.gpu,
        driver=began.driver,
        device_memory_bytes=began.device_memory_bytes,
        profile=request.profile,
        inputs=spec.inputs,
        outputs=spec.outputs,
        flags={
            **built.flags,
            "max windows": options.max_windows,
            "workspace MiB": options.workspace_mib,
            "timing cache": cache,
            "strict": options.strict,
            "builder_peak_rss_bytes": built.peak_rss_bytes,
        },
        command=plans.rebuild_command(
            bundle.path.resolve().name,
            stage,
            began.flavour,
            max_windows=options.max_windows,
            workspace_mib=options.workspace_mib,
            timing_cache=cache,
            strict=options.strict,
        ),
        build_seconds=round(built.seconds, 2),
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        read_from=built.read_from,
        attention=built.attention,
        layers=built.layers,
        activation_bytes=built.activation_bytes,
        edge_runtime=importlib.metadata.version("edge-runtime"),
    )


def unfused(record: PlanRecord) -> BuildError | None:
    """A warning if not all attention of a plan is known to be fused; None if all is.

    A decoder gets no warning: its few prompt tokens make small matrices, which libraries may fuse
    or not. Its record shows which were.
    """
    if record.stage == "decoder":
        return None
    count = len(record.attention)
    apart = [a.name for a in record.attention if a.fused is False]
    unknown = [a.name for a in record.attention if a.fused is None]
    if count == 0 and record.stage != "head":  # a head may hold no blocks
        return BuildError(f"{record.stage}: no attention was found in its graph, fused or not")
    if not apart and not unknown:
        return None
    parts = []
    if apart:
        parts.append(f"{len(apart)} of {count} attentions were NOT fused ({_some(apart)})")
    if unknown:
        parts.append(
            f"the {record.read_from} does not say whether {len(unknown)} of {count} attentions "
            f"were fused ({_some(unknown)})"
        )
    found = f"{record.stage}: {'; '.join(parts)}"
    if record.precision == "fp32":
        mend = "export the bundle with --precision fp16: no library fuses float32 attention"
        return BuildError(found, mend=mend)
    why = "the whole matrix of tokens by tokens may go through memory: expect it slow and large"
    return BuildError(f"{found}: {why}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


def _check_fusion(record: PlanRecord, options: BuildOptions, watcher: Watcher) -> None:
    found = unfused(record)
    if found is None:
        return
    if options.strict:
        found.found += ". Nothing was kept, because of --strict"
        raise found
    watcher.warning(str(found))
