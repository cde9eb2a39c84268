"""Differences between TensorRT and TensorRT-RTX and between their versions.

``tensorrt`` (JetPack, data centre) and ``tensorrt_rtx`` (workstations) have nearly the same Python
interface since 10.3. Functions here handle each difference. Neither library is imported before
:func:`load` is called.
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
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""Names of both libraries' ``DataType`` members, as :class:`engines.bundle.TensorSpec` has them."""
# JetPack 6 has TensorRT 10.3. The tests run TensorRT-RTX 1.7.1; pip can upgrade older ones to it.
_OLDEST: dict[Flavour, Version] = {"tensorrt": (10, 3, 0), "tensorrt-rtx": (1, 7, 0)}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": (
        "on a Jetson `sudo apt install python3-libnvinfer` installs it, and a virtual environment "
        "sees it when made with `python3 -m venv --system-site-packages`"
    ),
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}
# Force a reinstall: pip and apt skip a package that is already present.
_REPAIR: dict[Flavour, str] = {
    "tensorrt": "on a Jetson `sudo apt install --reinstall python3-libnvinfer`",
    "tensorrt-rtx": "pip install --force-reinstall tensorrt-rtx-cu13",
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
        """True if the ONNX parser knows the operator ``Attention`` of opset 23."""
        # onnx-tensorrt has it since 10.14, TensorRT-RTX since 1.7 or earlier.
        return self.flavour == "tensorrt-rtx" or self.version >= (10, 14, 0)


def installed() -> list[Flavour]:
    """The libraries that Python can find, most preferred first. Imports none."""
    return [flavour for flavour in FLAVOURS if _found(_MODULES[flavour])]


def load(flavour: Flavour) -> Library:
    """Import the library.

    Raises:
        EngineError: it is not installed, cannot be imported, is too old, or has no version.
    """
    name = _MODULES[flavour]
    if not _found(name):
        raise EngineError(
            f"{_TITLES[flavour]} is not installed", mend=_INSTALL[flavour], code="not_installed"
        )
    try:
        module = importlib.import_module(name)
    except Exception as error:  # its loaders raise OSError, RuntimeError and others
        reason = (str(error).splitlines() or [""])[0]
        raise EngineError(
            f"{_TITLES[flavour]} is installed, but `import {name}` fails "
            f"({type(error).__name__}: {reason})",
            mend=_REPAIR[flavour],
        ) from error
    text = str(getattr(module, "__version__", ""))
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise EngineError(
            f"the module {name} at {getattr(module, '__file__', None)} has the version {text!r}, "
            "expected one like 10.3.0: another module has its name",
            mend=_REPAIR[flavour],
        )
    major, minor, patch = map(int, match.groups())
    library = Library(flavour, (major, minor, patch), module)
    if library.version < _OLDEST[flavour]:
        oldest = ".".join(map(str, _OLDEST[flavour]))
        remedy = (
            "install JetPack 6.1 or later"
            if flavour == "tensorrt"
            else "pip install --upgrade tensorrt-rtx-cu13"
        )
        raise EngineError(f"{library.name} is too old, expected {oldest} or later", mend=remedy)
    return library


def choose(backend: Backend) -> Library:
    """The library of that name; ``auto`` takes TensorRT if installed, otherwise TensorRT-RTX.

    Raises:
        EngineError: as :func:`load`; for ``auto``, neither is installed.
    """
    if backend != "auto":
        return load(backend)
    found = installed()
    if not found:
        ways = "; ".join(f"{_TITLES[flavour]}: {_INSTALL[flavour]}" for flavour in FLAVOURS)
        raise EngineError(
            "neither TensorRT nor TensorRT-RTX is installed", mend=ways, code="not_installed"
        )
    return load(found[0])


def compute_capabilities(library: Library, gpu: str | None) -> tuple[str, ...]:
    """The GPUs that a plan is built for on a machine with a GPU of compute capability ``gpu``.

    Args:
        gpu: such as ``8.7``; None without a GPU.

    Raises:
        EngineError: TensorRT without a GPU.
    """
    if library.flavour == "tensorrt":
        # It times kernels on the GPU that will run them, so the plan is for that GPU.
        if gpu is None:
            raise EngineError(
                f"{library.name} builds on the GPU that will run the plan, and finds none here"
            )
        return (gpu,)
    # TensorRT-RTX compiles kernels when a plan is opened. By default a plan is for 8.0 and all
    # newer supported GPUs, even future ones; naming them makes the record exact. A plan that
    # supports Turing (7.5) too is slower everywhere, according to the support matrix.
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
    """True if a plan that ``library`` builds on a machine with such a GPU fits that GPU."""
    return compute_capability in compute_capabilities(library, compute_capability)


def network_flags(library: Library) -> int:
    """Flags for ``Builder.create_network``: every tensor keeps the type that the graph gives it."""
    if library.flavour == "tensorrt" and library.version >= (11, 0, 0):
        return 0  # the default from 11.0 on, where the flag is deprecated
    return 1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def configure(
    library: Library,
    config: Any,
    *,
    compute_capabilities: Sequence[str],
    workspace_mib: int | None = None,
) -> dict[str, str | int | bool | None]:
    """Configure a builder as every plan here is built.

    Args:
        config: an ``IBuilderConfig`` of the library; it is changed.
        compute_capabilities: from :func:`compute_capabilities`.
        workspace_mib: most scratch memory of a kernel, in MiB; None: all of the GPU's memory.

    Returns:
        the settings, for the plan's record.

    Raises:
        EngineError: the library refuses a compute capability.
    """
    trt = library.module
    # On by default; it would round float32 parts (LayerNorm, softmax) to 10 bits of precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Otherwise neither the plan nor the inspector says which kernel runs which nodes.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    rtx = library.flavour == "tensorrt-rtx"
    if rtx:
        # Otherwise the runtime allocates while it runs, and such a stream can't be captured:
        # https://docs.nvidia.com/deeplearning/tensorrt-rtx/1.2/getting-started/release-notes.html
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # TensorRT itself only builds for the GPU of this machine.
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
    # 11.0 removed ``device_memory_size``; this exists since 10.1.
    return int(engine.device_memory_size_v2)


def make_context(library: Library, engine: Any) -> Any:
    """An ``IExecutionContext`` of ``engine``; None if that fails.

    It has no memory for activations: call :func:`give_memory` before it runs. So contexts that
    never run at the same time can share memory, and the caller notices when memory runs out.
    """
    trt = library.module
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if library.flavour == "tensorrt":
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # engines.trt captures graphs itself, and a capture inside a capture fails.
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    # By default, kernels for a shape are compiled during the first runs and replace others later:
    # a graph captured before keeps the slow ones, and equal inputs give different bits over time.
    config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    return engine.create_execution_context(config)


def give_memory(context: Any, address: int, size: int) -> None:
    """Give ``context`` ``size`` bytes (see :func:`device_memory`) for its activations."""
    context.set_device_memory(address, size)  # since 10.1; before, a property without a size


def capturable(context: Any, stream: int) -> bool:
    """True if work of ``context`` can be captured on ``stream``, or if that is unknown."""
    # Only TensorRT-RTX has this check; otherwise the capture itself fails.
    asked = getattr(context, "is_stream_capturable", None)
    return asked is None or bool(asked(stream))


def invalidity(library: Library, runtime: Any, plan: bytes) -> list[str] | None:
    """Why the library would refuse to open ``plan`` here, by its header alone.

    None if it would open it, or if the library has no such check. The check asks the GPU driver, so
    every plan is refused without one.
    """
    if library.flavour == "tensorrt":
        return None  # only TensorRT-RTX has get_engine_validity
    trt = library.module
    validity, diagnostics = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        return None
    members = trt.EngineInvalidityDiagnostics.__members__
    causes = [name for name, bit in members.items() if int(bit) & int(diagnostics)]
    return [name.replace("_", " ").lower() for name in causes] or ["no working GPU driver"]


@dataclass(frozen=True)
class Defect:
    """A known defect of a library; ``source`` is a URL.

    ``precisions``: of the affected bundles; empty means all.
    """

    what: str
    source: str
    precisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    first: Version
    last: Version | None  # of TensorRT; None: no fixed version is known
    capabilities: tuple[str, ...]  # empty: all
    defect: Defect


_ISSUES = "https://github.com/NVIDIA/TensorRT/issues/"
_BLACKWELL = ("12.0", "12.1")
# Defects that others report for similar networks. They only decide whether a plan may serve before
# it was measured; the parity gate's verdict overrides them.
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
    """The known defects of a library on a GPU.

    Args:
        compute_capability: of the GPU, such as ``8.7``; None means unknown: every defect counts.
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
    """``8.6`` for ``SM86``; None for other members."""
    return f"{name[2:-1]}.{name[-1]}" if re.fullmatch(r"SM\d{2,3}", name) else None


def _to_sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a half-installed module without a spec
        return False
