"""TensorRT and TensorRT-RTX behind one face: every difference between their versions, once.

``tensorrt`` (JetPack, data centre) and ``tensorrt_rtx`` (workstations) have nearly the same Python
interface, from 10.3 to 11 and beyond. Where they differ, a function here takes the branch and says
why, so that builder and engine read the same for all. The module promises to import neither library
until :func:`load` is called, and that a missing one is a single line naming what installs it.
Building, running and judging plans are left to the modules that use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_common.errors import EngineError

Version = tuple[int, int, int]
Flavour = Literal["tensorrt", "tensorrt-rtx"]
Backend = Literal["auto", "tensorrt", "tensorrt-rtx"]

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# JetPack 6 has TensorRT 10.3, and everything here is written for that on. Of TensorRT-RTX, 1.7.1 is
# what the tests run; pip reaches it wherever an older one lies.
_OLDEST: dict[Flavour, Version] = {"tensorrt": (10, 3, 0), "tensorrt-rtx": (1, 7, 0)}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": (
        "on a Jetson `sudo apt install python3-libnvinfer` installs it, and a virtual environment "
        "sees it when made with `python3 -m venv --system-site-packages`"
    ),
    "tensorrt-rtx": "`pip install tensorrt-rtx-cu13` installs it",
}
# Of one that is there but broken, pip and apt would say that nothing is to be done.
_REPAIR: dict[Flavour, str] = {
    "tensorrt": "on a Jetson `sudo apt install --reinstall python3-libnvinfer` installs it anew",
    "tensorrt-rtx": "`pip install --force-reinstall tensorrt-rtx-cu13` installs it anew",
}


@dataclass(frozen=True)
class Library:
    """One imported library. ``module`` is ``tensorrt`` or ``tensorrt_rtx`` itself."""

    flavour: Flavour
    version: Version
    module: Any = field(repr=False, compare=False)

    @property
    def version_text(self) -> str:
        """``10.3.0``."""
        return ".".join(map(str, self.version))

    @property
    def name(self) -> str:
        """``TensorRT 10.3.0`` or ``TensorRT-RTX 1.7.1``."""
        return f"{_TITLES[self.flavour]} {self.version_text}"

    @property
    def parses_attention(self) -> bool:
        """Whether the ONNX parser knows the operator ``Attention`` of opset 23."""
        # onnx-tensorrt's release 10.14 added it; TensorRT-RTX 1.7 parses it.
        return self.flavour == "tensorrt-rtx" or self.version >= (10, 14, 0)


def installed() -> list[Flavour]:
    """The libraries that Python can find, without importing them, in order of preference."""
    return [flavour for flavour in FLAVOURS if _found(_MODULES[flavour])]


def load(flavour: Flavour) -> Library:
    """Import the library.

    Raises:
        EngineError: when it is not installed, cannot be imported, is too old, or has no version.
    """
    name = _MODULES[flavour]
    if not _found(name):
        raise EngineError(f"{_TITLES[flavour]} is not installed: {_INSTALL[flavour]}")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # its loaders raise OSError, RuntimeError and others
        reason = (str(error).splitlines() or [""])[0]
        raise EngineError(
            f"{_TITLES[flavour]} is installed, but `import {name}` fails "
            f"({type(error).__name__}: {reason}): {_REPAIR[flavour]}"
        ) from error
    text = str(getattr(module, "__version__", ""))
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise EngineError(
            f"the module {name} at {getattr(module, '__file__', None)} has the version {text!r}, "
            f"expected one like 10.3.0: something else lies in its place. {_REPAIR[flavour]}"
        )
    major, minor, patch = map(int, match.groups())
    library = Library(flavour, (major, minor, patch), module)
    if library.version < _OLDEST[flavour]:
        oldest = ".".join(map(str, _OLDEST[flavour]))
        mend = (
            "JetPack 6.1 or later has it"
            if flavour == "tensorrt"
            else "`pip install --upgrade tensorrt-rtx-cu13` installs it"
        )
        raise EngineError(f"{library.name} is too old, expected {oldest} or later: {mend}")
    return library


def choose(backend: Backend) -> Library:
    """The library of that name; ``auto``: TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        EngineError: as :func:`load`; for ``auto`` when neither is installed.
    """
    if backend != "auto":
        return load(backend)
    found = installed()
    if not found:
        ways = "; ".join(f"{_TITLES[flavour]}: {_INSTALL[flavour]}" for flavour in FLAVOURS)
        raise EngineError(f"neither TensorRT nor TensorRT-RTX is installed. {ways}")
    return load(found[0])


def compute_capabilities(library: Library, gpu: str | None) -> tuple[str, ...]:
    """What GPUs a plan is built for, where a GPU of compute capability ``gpu`` (or none) is.

    Raises:
        EngineError: TensorRT without a GPU.
    """
    if library.flavour == "tensorrt":
        # It times kernels on the GPU that will run them, so the plan is for that one.
        if gpu is None:
            raise EngineError(
                f"{library.name} builds on the GPU that will run the plan, and finds none here"
            )
        return (gpu,)
    # TensorRT-RTX compiles kernels where the plan is opened. Left to itself it writes a plan for
    # 8.0 and all later GPUs that it supports, also ones to come; naming them makes the record true.
    # A plan that is for Turing (7.5) too is slower everywhere, says its support matrix.
    names = library.module.ComputeCapability.__members__
    found = (_from_sm(name) for name in names)
    supported = sorted(
        (text for text in found if text is not None),
        key=lambda text: tuple(map(int, text.split("."))),
    )
    if gpu == "7.5" and gpu in supported:
        return (gpu,)
    return tuple(text for text in supported if text != "7.5")


def builds_for(library: Library, compute_capability: str) -> bool:
    """Whether a plan that ``library`` builds where such a GPU is can fit that GPU."""
    return compute_capability in compute_capabilities(library, compute_capability)


def network_flags(library: Library) -> int:
    """For ``Builder.create_network``: every tensor keeps the type that the graph gives it."""
    if library.flavour == "tensorrt" and library.version >= (11, 0, 0):
        return 0  # always so from 11.0 on, where the flag is deprecated and ignored
    return 1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def configure(
    library: Library,
    config: Any,
    *,
    compute_capabilities: Sequence[str],
    workspace_mib: int | None = None,
) -> dict[str, str | int | bool | None]:
    """Set a builder's configuration to what every plan here is built with.

    Args:
        config: an ``IBuilderConfig`` of the library; changed.
        compute_capabilities: from :func:`compute_capabilities`.
        workspace_mib: most scratch memory a kernel may take, in MiB; None: all of the GPU's.

    Returns:
        what was set, for the plan's record.

    Raises:
        EngineError: the library refuses a compute capability.
    """
    trt = library.module
    # On by default, and it would round the float32 parts (LayerNorm, softmax) to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Without details neither the plan nor the inspector tells which nodes became which kernel.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    rtx = library.flavour == "tensorrt-rtx"
    if rtx:
        # Otherwise the runtime allocates while it runs, and a stream that does can't be captured:
        # https://docs.nvidia.com/deeplearning/tensorrt-rtx/1.2/getting-started/release-notes.html
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # TensorRT has no targets but the GPU at hand.
        config.num_compute_capabilities = len(compute_capabilities)
        for index, text in enumerate(compute_capabilities):
            member = getattr(trt.ComputeCapability, _to_sm(text), None)
            if member is None or not config.set_compute_capability(member, index):
                raise EngineError(
                    f"{library.name} does not build for GPUs of compute capability {text}"
                )
    return {
        "strongly typed": True,
        "TF32": bool(config.get_flag(trt.BuilderFlag.TF32)),
        "workspace MiB": workspace_mib,
        "profiling verbosity": "detailed",
        "memory from its user alone": rtx,
        "optimization level": int(config.builder_optimization_level),
    }


def device_memory(library: Library, engine: Any) -> int:
    """Bytes of device memory that one execution context of ``engine`` takes."""
    # ``device_memory_size`` is gone from 11.0 on; its successor is there since 10.1.
    return int(engine.device_memory_size_v2)


def make_context(library: Library, engine: Any) -> Any:
    """An ``IExecutionContext`` of ``engine``, or None when that failed.

    It brings no memory for activations: :func:`give_memory` first. So contexts that never run at
    the same time can share it, and running out of it is told by whoever allocates.
    """
    trt = library.module
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if library.flavour == "tensorrt":
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # Our engine captures its own graphs, and a capture inside a capture fails.
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    # By default kernels made for a shape are compiled beside the first runs and slipped in later: a
    # graph captured before keeps the slow ones, and equal inputs give different bits over time.
    config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    return engine.create_execution_context(config)


def give_memory(context: Any, address: int, size: int) -> None:
    """Let ``context`` keep its activations in ``size`` bytes (see :func:`device_memory`) there."""
    context.set_device_memory(address, size)  # since 10.1; the property before it knew no size


def capturable(context: Any, stream: int) -> bool:
    """Whether work of ``context`` can be captured on ``stream``, as far as the library tells."""
    # Only TensorRT-RTX tells; a capture that fails tells too, a little later.
    asked = getattr(context, "is_stream_capturable", None)
    return asked is None or bool(asked(stream))


def invalidity(library: Library, runtime: Any, plan: bytes) -> str | None:
    """Why the library would refuse to open ``plan`` here, read from its header alone.

    None: it would not, or the library has no such check. It asks the GPU driver, so without one
    every plan is refused.
    """
    if library.flavour == "tensorrt":
        return None  # only TensorRT-RTX has get_engine_validity
    trt = library.module
    validity, diagnostics = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        return None
    members = trt.EngineInvalidityDiagnostics.__members__
    causes = [name for name, bit in members.items() if int(bit) & int(diagnostics)]
    return ", ".join(causes).replace("_", " ").lower() or "no working GPU driver"


@dataclass(frozen=True)
class Defect:
    """Something known to be wrong with a library; ``source`` is a URL.

    ``precisions``: the bundles concerned; empty: all.
    """

    what: str
    source: str
    precisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    first: Version
    last: Version | None  # of TensorRT; None: no version is known to be free of it
    capabilities: tuple[str, ...]  # empty: all
    defect: Defect


_ISSUES = "https://github.com/NVIDIA/TensorRT/issues/"
_BLACKWELL = ("12.0", "12.1")
# What others found with networks like ours, no more than they said: it only decides whether a plan
# may serve before it was measured. The parity gate has the last word, either way.
_KNOWN = (
    _Known(
        (10, 3, 0),
        (10, 3, 99),
        (),
        Defect("vision transformers in fp16 come out wrong with 10.3", f"{_ISSUES}4723", ("fp16",)),
    ),
    _Known(
        (10, 3, 0),
        (10, 3, 99),
        (),
        Defect(
            "a transformer with dynamic dimensions came out wrong with 10.3, right with 10.5",
            f"{_ISSUES}4419",
        ),
    ),
    _Known(
        (10, 4, 0),
        (10, 4, 99),
        (),
        Defect(
            "a vision transformer came out wrong in fp32, as NaN in fp16, with 10.4",
            f"{_ISSUES}4742",
        ),
    ),
    _Known(
        (10, 4, 0),
        (10, 7, 99),
        (),
        Defect(
            "self-attention in the form of PyTorch's scaled_dot_product_attention comes out wrong, "
            "in fp32 too, with 10.4 and 10.7; right with 10.8",
            f"{_ISSUES}4334",
        ),
    ),
    _Known(
        (10, 8, 0),
        None,
        _BLACKWELL,
        Defect(
            "fused attention of SAM 3's vision transformer is silently wrong on compute capability "
            "12.0, still so with 10.16.1",
            f"{_ISSUES}4837",
            ("fp16", "bf16"),
        ),
    ),
    _Known(
        (10, 14, 0),
        None,
        _BLACKWELL,
        Defect(
            "a transformer for speech comes out wrong in every precision on compute capability "
            "12.0, with 10.14 and 11.1",
            f"{_ISSUES}4822",
        ),
    ),
)
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_RTX_MATRIX = (
    "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html"
)


def defects(
    flavour: Flavour, version: Version, compute_capability: str | None
) -> tuple[Defect, ...]:
    """What is known to be wrong with a library on a GPU.

    Args:
        compute_capability: of the GPU, as ``8.7``; None: unknown, then any defect counts.
    """
    if flavour == "tensorrt-rtx":
        if compute_capability is None or compute_capability in _RTX_CAPABILITIES:
            return ()
        what = f"it does not support GPUs of compute capability {compute_capability}"
        return (Defect(what, _RTX_MATRIX),)
    return tuple(
        known.defect
        for known in _KNOWN
        if known.first <= version
        and (known.last is None or version <= known.last)
        and (
            not known.capabilities
            or compute_capability is None
            or compute_capability in known.capabilities
        )
    )


def _from_sm(name: str) -> str | None:
    """``8.6`` for ``SM86``; None for members that are no GPU."""
    return f"{name[2:-1]}.{name[-1]}" if re.fullmatch(r"SM\d{2,3}", name) else None


def _to_sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a half-installed module without a spec
        return False
