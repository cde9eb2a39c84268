"""The process that builds one plan: ``python -m engines.build_process``.

It reads one :class:`Request` as a line of JSON from standard input, writes the plan to the file
named there, and writes events to standard output, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_common.errors import BuildError, EdgeRuntimeError, EngineError
from edge_common.files import explain_write_errors
from engines import cuda, fusion, libraries
from engines.bundle import EXPORT_AGAIN, FLOAT_TYPES, TensorSpec
from engines.libraries import Backend, Flavour, Library
from engines.plan import AttentionReport, Form, LayerReport, Shape, another_place, target

Profile = dict[str, tuple[Shape, Shape, Shape]]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a build. The files ``plan`` and ``new_timing_cache`` will be
    overwritten."""

    parent: int
    backend: Backend
    stage: str
    precision: Literal["fp32", "fp16", "bf16"]
    attention: str
    plain: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Profile
    plan: str
    workspace_mib: int | None = None
    timing_cache: str | None = None
    new_timing_cache: str | None = None


class Began(msgspec.Struct, frozen=True, kw_only=True, tag="began"):
    """The library is loaded: what will be built, and on which GPU if there is one."""

    flavour: Flavour
    version: str
    library: str
    form: Form
    compute_capabilities: tuple[str, ...]
    target: str
    gpu: str | None
    driver: str | None
    device_memory_bytes: int | None


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """``done`` of ``total`` steps of phase ``name``; phases nest, ``depth`` 0 is the outermost."""

    name: str
    done: int
    total: int
    depth: int


class Warned(msgspec.Struct, frozen=True, tag="warned"):
    """A warning of the library; a repeated one only once."""

    text: str


class Built(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """The plan is on disk."""

    seconds: float
    flags: dict[str, str | int | bool | None]
    read_from: Literal["engine inspector", "serialised plan"]
    attention: tuple[AttentionReport, ...]
    layers: tuple[LayerReport, ...]
    activation_bytes: int | None
    peak_rss_bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The build failed. ``kind`` names the class of the error; the others are its attributes."""

    kind: Literal["BuildError", "EngineError"]
    found: str
    mend: str
    code: str = BuildError.code


Event = Began | Phase | Warned | Built | Failed
Emit = Callable[[Event], None]

# Warnings about things that are handled here: users could do nothing about them.
_HANDLED = (
    re.compile(r"Make sure input \S+ has Int64 binding"),  # the engines feed int64 as int64
)
# Lines of the log that repeat the parser's errors, which are read from the parser itself.
_PARSER = re.compile(r"^(While parsing node|--- (Begin|End) node|ERROR: \S+\.cpp:\d+ In function)")
_SOURCE_LINE = re.compile(r"^\S+\.(?:cpp|h):\d+: ")
_SEVERE, _WARNING = 1, 2  # ILogger.Severity: 0 and 1 are errors
_MOST_TEXTS = 20
_LONGEST_TEXT = 1500
_INTERVAL_S = 0.1  # least time between events: a large graph takes tens of thousands of steps


def main() -> int:
    """Build what standard input asks for. Returns the exit code: 0 only with a plan on disk.

    Every failure that this process survives ends in a :class:`Failed` event. Only events reach
    standard output. The process ends with its parent.
    """
    # Libraries print to standard output, so it becomes standard error; events get the original.
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        try:
            events.write(msgspec.json.encode(event) + b"\n")
            events.flush()
        except OSError:
            os._exit(1)  # the parent is gone

    try:
        request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
        _die_with(request.parent)
        build(request, emit)
    except EdgeRuntimeError as error:
        kind: Any = "EngineError" if isinstance(error, EngineError) else "BuildError"
        emit(Failed(kind, error.found, error.mend, error.code))
    except MemoryError:
        emit(Failed("BuildError", "memory ran out", "close other programs, or add swap"))
    else:
        return 0
    return 1


def _die_with(parent: int) -> None:
    """End when the parent ends, even if it is killed; be the first to go when memory runs out."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before prctl took effect
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def build(request: Request, emit: Emit) -> None:
    """Build one plan and write it to ``request.plan``.

    Raises:
        EngineError: no library is installed, or it needs a GPU and there is none.
        BuildError: the graph cannot be parsed or built, or contradicts the manifest, or the plan
            cannot be written.
    """
    library = libraries.choose(request.backend)
    gpu = _gpu(library)
    form = form_for(library, request.precision)
    graph = request.attention if form == "attention" else request.plain
    if graph is None:
        raise BuildError(
            f"{library.name} builds {request.precision} bundles from the plain form, which this "
            "bundle lacks",
            mend=EXPORT_AGAIN,
        )
    capabilities = libraries.compute_capabilities(library, gpu.compute_capability if gpu else None)
    emit(
        Began(
            flavour=library.flavour,
            version=library.version_text,
            library=library.name,
            form=form,
            compute_capabilities=capabilities,
            target=target(library, capabilities),
            gpu=gpu.name if gpu else None,
            driver=gpu.driver if gpu else None,
            device_memory_bytes=gpu.memory_bytes if gpu else None,
        )
    )
    if gpu is not None and gpu.compute_capability not in capabilities:
        emit(
            Warned(
                f"{library.name} does not support the GPU here, {gpu.name} of compute capability "
                f"{gpu.compute_capability}: the plan is for other machines"
            )
        )
    started = time.monotonic()
    log = Log(emit)
    trt = library.module
    logger = _logger(library, log)  # must outlive the builder, as must the monitor below
    builder = trt.Builder(logger)
    if not builder:
        raise BuildError(f"{library.name} does not start: {log.errors()}")
    network = builder.create_network(libraries.network_flags(library))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(graph):
        raise BuildError(f"{library.name} cannot parse {graph}: {_parse_errors(parser, log)}")
    _check_network(library, network, request, graph)
    attentions = fusion.expected_attentions(library, network)
    config = builder.create_builder_config()
    flags = libraries.configure(
        library, config, workspace_mib=request.workspace_mib, compute_capabilities=capabilities
    )
    config.add_optimization_profile(_profile(builder, network, request.profile))
    cache = _use_timing_cache(config, request, emit)
    monitor = _monitor(library, emit)
    config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"{library.name} cannot build {graph}: {log.errors()}")
    _write(Path(request.plan), data)
    if cache is not None and request.new_timing_cache is not None:
        _write(Path(request.new_timing_cache), config.get_timing_cache().serialize())
    seconds = time.monotonic() - started
    read_from, (attention, layers), activation = _read_back(
        library, logger, data, attentions, gpu is not None, emit
    )
    log.summarise()
    emit(
        Built(
            seconds=seconds,
            flags=flags,
            read_from=read_from,
            attention=attention,
            layers=layers,
            activation_bytes=activation,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    )


class Log:
    """Messages of a library: errors are kept, warnings are emitted, each once.

    Messages that differ only in numbers count as one, because a library repeats them per layer.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._errors: dict[str, str] = {}
        self._warnings: Counter[str] = Counter()

    def add(self, severity: int, message: str) -> None:
        """Take one message; ``severity`` is ILogger.Severity: 0 and 1 errors, 2 a warning."""
        if severity > _WARNING:
            return
        text = _SOURCE_LINE.sub("", message.strip())[:_LONGEST_TEXT]
        kind = re.sub(r"\d+", "#", text)
        if severity <= _SEVERE:
            if not _PARSER.match(text) and len(self._errors) < _MOST_TEXTS:
                self._errors.setdefault(kind, text)
        elif not any(pattern.search(text) for pattern in _HANDLED):
            self._warnings[kind] += 1
            if self._warnings[kind] == 1 and len(self._warnings) <= _MOST_TEXTS:
                self._emit(Warned(text))

    def errors(self) -> str:
        """All errors so far, in one line each."""
        return "\n  ".join(self._errors.values()) or "the library gave no reason"

    def summarise(self) -> None:
        """Emit the errors that did not stop the build, and the number of suppressed warnings."""
        for text in self._errors.values():
            self._emit(Warned(text))
        more = sum(self._warnings.values()) - min(len(self._warnings), _MOST_TEXTS)
        if more:
            self._emit(Warned(f"{more} more warnings that differ only in numbers"))


def form_for(library: Library, precision: str) -> Form:
    """The form of a stage that ``library`` builds in ``precision``."""
    # ``Attention`` in float32 has no kernel, neither in TensorRT nor in TensorRT-RTX.
    return "attention" if library.parses_attention and precision != "fp32" else "plain"


def _gpu(library: Library) -> cuda.Facts | None:
    """The GPU here; None if there is none and TensorRT-RTX builds, which needs none."""
    if library.flavour == "tensorrt-rtx" and cuda.device_count() == 0:
        return None
    try:
        return cuda.facts()
    except EngineError as error:
        what = f"{library.name} builds only on the GPU that will run the plan"
        raise error.within(what) from None


def _logger(library: Library, log: Log) -> Any:
    base = library.module.ILogger

    class Logger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(int(severity), message)

    return Logger()


def _monitor(library: Library, emit: Emit) -> Any:
    base = library.module.IProgressMonitor
    progress = Progress(emit)

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress.step(name, step)
            return True

        def phase_finish(self, name: str) -> None:
            progress.finish(name)

    return Monitor()


class Progress:
    """Emits a build's nested phases as :class:`Phase` events, at a limited rate."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._phases: dict[str, tuple[int, int]] = {}  # steps and depth of those under way
        self._said = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins inside ``parent``."""
        depth = self._phases[parent][1] + 1 if parent in self._phases else 0
        self._phases[name] = steps, depth
        self._say(name, 0, at_once=depth < 2)

    def step(self, name: str, step: int) -> None:
        """Step number ``step``, from 0, is done."""
        self._say(name, step + 1)

    def finish(self, name: str) -> None:
        """The phase is over, even if not every step was reported."""
        if name in self._phases:
            steps, depth = self._phases[name]
            self._say(name, steps, at_once=depth < 2)
            del self._phases[name]

    def _say(self, name: str, done: int, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if name in self._phases and (at_once or now - self._said >= _INTERVAL_S):
            steps, depth = self._phases[name]
            self._said = now
            self._emit(Phase(name, min(done, steps), steps, depth))


def _parse_errors(parser: Any, log: Log) -> str:
    """All errors of the parser with their nodes, and other logged errors."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        code = str(error.code()).rpartition(".")[2]
        # Up to about 10.2, errors have no node names.
        name, operator = (getattr(error, key, str)() for key in ("node_name", "node_operator"))
        where = f"node {name} ({operator}): " if name else ""
        found.append(f"{where}{code}: {error.desc().strip()}"[:_LONGEST_TEXT])
    more = len(found) - _MOST_TEXTS
    if more > 0:
        found = [*found[:_MOST_TEXTS], f"and {more} more errors"]
    logged = log.errors()
    known = [text for text in logged.splitlines() if text.strip() and text.strip() not in found]
    return "\n  ".join([*found, *(text.strip() for text in known)] if found else [logged])


def _dtype(value: Any) -> str:
    name = str(value).rpartition(".")[2]
    return libraries.DTYPES.get(name, name)


def _check_network(library: Library, network: Any, request: Request, graph: str) -> None:
    """Refuse a graph whose tensors or precision contradict the manifest."""
    for side, specs, count, get in (
        ("inputs", request.inputs, network.num_inputs, network.get_input),
        ("outputs", request.outputs, network.num_outputs, network.get_output),
    ):
        tensors = [get(index) for index in range(count)]
        found = {t.name: (_dtype(t.dtype), tuple(t.shape)) for t in tensors}
        wanted = {
            spec.name: (spec.dtype, tuple(-1 if isinstance(d, str) else d for d in spec.shape))
            for spec in specs
        }
        if found != wanted:
            raise BuildError(
                f"{graph} has the {side} {found}, the manifest says {wanted}", mend=EXPORT_AGAIN
            )
    multiply = library.module.LayerType.MATRIX_MULTIPLY
    layers = (network.get_layer(index) for index in range(network.num_layers))
    types = {_dtype(layer.get_output(0).dtype) for layer in layers if layer.type == multiply}
    wanted_type = FLOAT_TYPES[request.precision]
    wrong = types - {"float32"} if wanted_type == "float32" else wanted_type not in types
    if types and wrong:
        raise BuildError(
            f"{graph} multiplies matrices in {', '.join(sorted(types))}, but its manifest says "
            f"{request.precision}",
            mend=EXPORT_AGAIN,
        )


def _profile(builder: Any, network: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def _use_timing_cache(config: Any, request: Request, emit: Emit) -> Any:
    """Give ``config`` the requested timing cache, or a new one if that does not fit."""
    if request.new_timing_cache is None:
        return None
    try:
        old = Path(request.timing_cache).read_bytes() if request.timing_cache else b""
    except OSError as error:
        raise BuildError(
            f"the timing cache {request.timing_cache} cannot be read: {error.strerror}"
        ) from error
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        emit(
            Warned(
                f"the timing cache {request.timing_cache} is of another GPU or version, or "
                "damaged: a new one replaces it"
            )
        )
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _read_back(
    library: Library,
    logger: Any,
    data: Any,
    attentions: fusion.Attentions,
    on_gpu: bool,
    emit: Emit,
) -> tuple[Literal["engine inspector", "serialised plan"], Any, int | None]:
    """Read layers and attentions from the engine inspector if a GPU opens the plan, or its bytes.

    The bytes are also used if only they show for every attention whether it was fused.
    """
    from_bytes = fusion.from_plan(data, attentions)
    memory = None
    if on_gpu:
        trt = library.module
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            emit(Warned("the plan does not open on this GPU: its layers are read from its bytes"))
        else:
            memory = libraries.device_memory(library, engine)
            text = engine.create_engine_inspector().get_engine_information(
                trt.LayerInformationFormat.JSON
            )
            inspected = fusion.from_inspector(text, attentions)
            if _all_known(inspected) or not _all_known(from_bytes):
                return "engine inspector", inspected, memory
    return "serialised plan", from_bytes, memory


def _all_known(reports: fusion.Reports) -> bool:
    return all(attention.fused is not None for attention in reports[0])


def _write(path: Path, data: Any) -> None:
    with explain_write_errors(path.parent, BuildError, another_place(path)):
        path.write_bytes(memoryview(data))


if __name__ == "__main__":
    sys.exit(main())
