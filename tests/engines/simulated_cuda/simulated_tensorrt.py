"""A simulated TensorRT on the simulated driver: the part of its Python interface that the engine
uses.

A simulated plan names an ONNX graph. Enqueueing it puts a host function on the stream. When the
stream reaches it, the function reads the inputs at the given addresses, runs the graph in ONNX
Runtime on the CPU and writes the outputs. So wrong addresses, shapes or types, missing copies and
missing waits give wrong numbers or an error that the driver counts. :func:`library` simulates
TensorRT or TensorRT-RTX. Arithmetic and speed of the real library are not simulated.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import simulated_driver as driver

from engines import plan as plans
from engines.bundle import Bundle, TensorSpec, hash_file
from engines.libraries import Flavour, Library
from engines.ort import OrtEngine
from engines.plan import Plan, PlanRecord

__version__ = "10.3.0"
_WEIGHTS = 4096
_PERSISTENT = 512
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}
DataType = enum.Enum("DataType", list(DTYPES.values()))
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
DynamicShapesKernelSpecializationStrategy = enum.Enum(
    "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
)
EngineValidity = enum.Enum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"])


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class Failures:
    """Makes calls into the simulated library fail, by number or by name."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0
        self.name: str | None = None
        self.failed: str | None = None
        self.invalid = 0
        self.capturable = True

    def due(self, name: str) -> bool:
        """Count this call. True if it must fail."""
        self.calls += 1
        if self.calls != self.at and name != self.name:
            return False
        self.failed = name
        return True

    def reset(self) -> None:
        self.__init__()


failures = Failures()


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
    ERROR = Severity.ERROR

    def __init__(self) -> None:
        self.ready = True

    def error(self, text: str) -> None:
        assert self.ready, "ILogger.__init__ was not called"
        self.log(ILogger.ERROR, text)


class _Simulated(msgspec.Struct):
    """The content of a simulated plan."""

    onnx: str
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    activation: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    simulated: bool = True


class Runtime:
    engine_header_size = 64

    def __init__(self, logger: ILogger) -> None:
        if failures.due("Runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        assert len(header) <= self.engine_header_size
        if failures.invalid:
            return EngineValidity.INVALID, failures.invalid
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if failures.due("deserialize_cuda_engine"):
            self._logger.error("[runtime.cpp::parse::314] Error Code 6: plan\x1b[31m of another\n")
            self._logger.error("[checkMacros.cpp] what the real one adds after every error")
            return None
        weights = driver.allocate(_WEIGHTS)
        if weights is None:
            self._logger.error("Requested amount of GPU memory could not be allocated")
            return None
        return Engine(msgspec.json.decode(data, type=_Simulated), weights, self._logger)


class Engine:
    def __init__(self, said: _Simulated, weights: int, logger: ILogger) -> None:
        self.said = said
        self.logger = logger
        self._weights = weights
        self._specs = {spec.name: spec for spec in (*said.inputs, *said.outputs)}
        self.num_io_tensors = len(self._specs)
        self.device_memory_size_v2 = said.activation
        self.ort = OrtEngine(said.onnx, threads=1, device="cpu")

    def __del__(self) -> None:
        driver.free(self._weights)

    def get_tensor_name(self, index: int) -> str:
        return list(self._specs)[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(spec.name == name for spec in self.said.inputs)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[DTYPES[self._specs[name].dtype]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self._specs[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        return list(self.said.profile[name])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any) -> ExecutionContext | None:
        strategy = how.allocation if isinstance(how, RuntimeConfig) else how
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if failures.due("create_execution_context"):
            self.logger.error("a simulated reason")
            return None
        persistent = driver.allocate(_PERSISTENT)
        if persistent is None:
            self.logger.error("Requested amount of GPU memory could not be allocated")
            return None
        kind = CapturableContext if isinstance(how, RuntimeConfig) else ExecutionContext
        return kind(self, persistent)


class RuntimeConfig:
    def __init__(self) -> None:
        self.allocation: Any = None
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy


class ExecutionContext:
    """``shapes`` are read when the work runs. A real captured graph may also read data that its
    context keeps on the device, so changing a context's shapes spoils the graphs captured from
    it."""

    def __init__(self, engine: Engine, persistent: int) -> None:
        self._engine = engine
        self._persistent = persistent
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {
            spec.name: tuple(spec.shape)
            for spec in engine.said.inputs
            if not any(isinstance(dim, str) for dim in spec.shape)
        }
        self._warm = False
        # Graphs may call it after this object is gone. It must then report an error, not crash.
        self._function = driver.HostFunction(_caller(self))
        _functions.append(self._function)

    def __del__(self) -> None:
        driver.free(self._persistent)

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.said.activation
        self._memory = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        if failures.due("set_tensor_address"):
            self._engine.logger.error("a simulated reason")
            return False
        if address % 256:
            return self._refuse(f"{name}: {address:#x} is not aligned to 256 bytes")
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if failures.due("set_input_shape"):
            self._engine.logger.error("a simulated reason")
            return False
        least, _, greatest = self._engine.said.profile[name]
        fits = len(shape) == len(least) and all(
            low <= dim <= high for low, dim, high in zip(least, shape, greatest, strict=True)
        )
        if not fits:
            return self._refuse(f"{name} {shape} is outside {least} to {greatest}")
        if self.shapes.get(name) != shape:
            self._warm = False
            self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        if failures.due("infer_shapes"):
            raise RuntimeError("a simulated reason")
        return [spec.name for spec in self._engine.said.inputs if spec.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if failures.due("get_tensor_shape"):
            return (-1,)
        dims = {}
        for spec in self._engine.said.inputs:
            dims.update(zip(spec.shape, self.shapes[spec.name], strict=True))
        spec = next(s for s in self._engine.said.outputs if s.name == name)
        return tuple(dims.get(dim, dim) for dim in spec.shape)

    def execute_async_v3(self, stream: int) -> bool:
        if failures.due("execute_async_v3"):
            self._engine.logger.error("[enqueue] Error Code 1: a simulated reason.")
            return False
        missing = [name for name in self._engine._specs if name not in self._addresses]
        if missing or (self._engine.said.activation and not self._memory[0]):
            return self._refuse(f"no memory for {missing or 'activations'}")
        if not self._warm:
            # Like the real library it allocates after new shapes, which a capture does not allow.
            scratch = driver.allocate(256)
            if scratch is None:
                return self._refuse("no memory for a change of shapes")
            driver.free(scratch)
        if driver.cuda.cuLaunchHostFunc(stream, self._function, None):
            return self._refuse("cuLaunchHostFunc failed")
        self._warm = True
        return True

    def _refuse(self, text: str) -> bool:
        self._engine.logger.error(text)
        return False

    def compute(self) -> None:
        """Simulate the GPU's work. Runs when the stream reaches it."""
        if self._engine.said.activation:
            _at(self._memory[0], np.dtype("uint8"), (self._engine.said.activation,))[:] = 0x5A
        feeds = {
            spec.name: _at(self._addresses[spec.name], spec.numpy_dtype, self.shapes[spec.name])
            for spec in self._engine.said.inputs
        }
        results = self._engine.ort.run(feeds)
        for spec in self._engine.said.outputs:
            result = results[spec.name]
            _at(self._addresses[spec.name], result.dtype, result.shape)[...] = result


class CapturableContext(ExecutionContext):
    """TensorRT-RTX's context, which reports whether it can be captured."""

    def is_stream_capturable(self, stream: int) -> bool:
        return failures.capturable


_functions: list[Any] = []


def _caller(context: ExecutionContext) -> Any:
    known = weakref.ref(context)

    def call(_: Any) -> None:
        alive = known()
        try:
            if alive is None:
                raise RuntimeError("its execution context is gone")
            alive.compute()
        except Exception as error:
            driver.report(f"simulated TensorRT: {type(error).__name__}: {error}")

    return call


def _at(address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Device memory as an array. Raises MemoryError if the address is not allocated."""
    size = int(np.prod(shape)) * dtype.itemsize
    pointer = driver.cuda.simulated_backing(address, max(size, 1))
    if not pointer:
        raise MemoryError(hex(address))
    raw = (ctypes.c_uint8 * size).from_address(pointer) if size else b""
    return np.frombuffer(raw, dtype).reshape(shape)


def library(flavour: Flavour = "tensorrt") -> Library:
    """The simulated TensorRT, in the form in which :func:`engines.libraries.load` returns the real
    one."""
    version = (10, 3, 0) if flavour == "tensorrt" else (1, 7, 1)
    return Library(flavour, version, sys.modules[__name__])


def write_plan(
    bundle: Bundle,
    stage: str,
    greatest: Mapping[str, int],
    least: Mapping[str, int] | None = None,
    *,
    flavour: Flavour = "tensorrt",
    activation: int = 1024,
    graph: Path | None = None,
    inputs: tuple[TensorSpec, ...] | None = None,
    outputs: tuple[TensorSpec, ...] | None = None,
) -> Plan:
    """Write a simulated plan of ``stage`` into the bundle. Dynamic dimensions range from ``least``
    (1 by default) to ``greatest``."""
    said = bundle.stage(stage)
    inputs, outputs = inputs or said.inputs, outputs or said.outputs
    low = {**dict.fromkeys(greatest, 1), **(least or {})}

    def shape(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)

    profile = {s.name: (shape(s, low), shape(s, low), shape(s, greatest)) for s in inputs}
    path = graph or bundle.stage_path(stage)
    simulated = _Simulated(str(path.resolve()), profile, activation, inputs, outputs)
    data = msgspec.json.encode(simulated)
    target = plans.target(library(flavour), ["8.7"])
    folder = plans.directory(bundle.path, target)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{stage}.part"
    temporary.write_bytes(data)
    record = PlanRecord(
        stage=stage,
        model=bundle.manifest.model,
        form="plain",
        precision=bundle.manifest.precision,
        flavour=flavour,
        version=library(flavour).version_text,
        target=target,
        plan_sha256=hashlib.sha256(data).hexdigest(),
        plan_bytes=len(data),
        stage_sha256=said.sha256,
        graph_sha256=hash_file(path),
        weights_sha256=bundle.manifest.weights_sha256,
        compute_capabilities=("8.7",),
        gpu="Simulated GPU",
        driver=None,
        device_memory_bytes=None,
        profile=profile,
        inputs=inputs,
        outputs=outputs,
        flags={},
        command="simulated",
        build_seconds=0.0,
        built="2026-01-01T00:00:00Z",
        read_from="engine inspector",
        attention=(),
        layers=(),
        activation_bytes=activation,
        edge_runtime="0",
    )
    return plans.write(folder, stage, temporary, record)
