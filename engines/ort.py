"""The engine on ONNX Runtime: CPU everywhere, CUDA where ``onnxruntime-gpu`` is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from edge_common.errors import EngineError
from edge_common.options import THREADS, Invalid
from engines.bundle import TensorSpec
from engines.engine import Engine, check_feeds, check_out

OrtDevice = Literal["auto", "cpu", "cuda"]

_DTYPES: dict[str, Any] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")},
}
_ONNX_BFLOAT16 = 16


class OrtEngine(Engine):
    """One ONNX graph, opened in ONNX Runtime.

    The number of threads is fixed, and idle threads sleep, so that several nodes on one machine do
    not compete for its cores. Results do not depend on how a batch was split.

    Args:
        path: the ``.onnx`` file; its weights may lie in files beside it.
        threads: CPU threads of one operation; None means every core this process may use.
        device: ``auto`` takes CUDA if ONNX Runtime has it, otherwise the CPU.

    Attributes:
        device: where the graph runs, ``cpu`` or ``cuda``.

    Raises:
        EngineError: the graph cannot be opened, or CUDA was asked for and is absent. On the CPU
            this includes every bfloat16 graph: ONNX Runtime has no bfloat16 arithmetic there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: OrtDevice = "auto",
    ) -> None:
        import onnxruntime as ort

        self._path = Path(path)
        if device not in get_args(OrtDevice):
            raise EngineError(
                f"device is {device!r}, expected one of {', '.join(get_args(OrtDevice))}"
            )
        try:
            THREADS.check(1 if threads is None else threads)
        except Invalid as error:
            raise EngineError(f"threads is {threads}; {error}") from None
        if not self._path.is_file():
            raise EngineError(f"{self._path} is missing")
        self._ort = ort
        self._session: Any = self._open(threads, device)
        providers = self._session.get_providers()
        self.device: Literal["cpu", "cuda"] = "cpu"
        if "CUDAExecutionProvider" in providers:
            self.device = "cuda"
        elif device == "cuda":
            raise EngineError(
                "CUDA was asked for, but ONNX Runtime could not start it",
                mend="check that the NVIDIA driver, CUDA and cuDNN it was built for are installed, "
                "or use --device cpu",
            )
        self.inputs = tuple(_spec(node, self._path) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node, self._path) for node in self._session.get_outputs())
        self._bfloat16 = any(s.dtype == "bfloat16" for s in (*self.inputs, *self.outputs))

    def _open(self, threads: int | None, device: OrtDevice) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        # An explicit count also keeps ONNX Runtime from pinning threads to cores, which the next
        # node on this machine would use too.
        options.intra_op_num_threads = threads or cores()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device != "cpu":
            if "CUDAExecutionProvider" in ort.get_available_providers():
                # The loader does not find CUDA and cuDNN wheels by itself.
                if hasattr(ort, "preload_dlls"):
                    ort.preload_dlls()
                # TF32 would lose three decimal digits in a float32 bundle.
                providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
            elif device == "cuda":
                raise EngineError(
                    "CUDA was asked for, but this ONNX Runtime has none",
                    mend="`pip uninstall onnxruntime; pip install onnxruntime-gpu`, or use "
                    "--device cpu",
                    code="not_installed",
                )
        try:
            return ort.InferenceSession(str(self._path), options, providers=providers)
        except Exception as error:
            text = str(error)
            if "NOT_IMPLEMENTED" in text and len(providers) == 1:
                raise EngineError(
                    f"{self._path} cannot run on the CPU: {_first_line(text)}. ONNX Runtime has no "
                    "bfloat16 arithmetic there",
                    mend="use an fp32 or fp16 bundle, or --device cuda or tensorrt",
                ) from error
            raise EngineError(f"{self._path} cannot be opened: {_first_line(text)}") from error

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        if self._session is None:
            raise EngineError(f"{self._path.name} was closed")
        dims = check_feeds(self.inputs, feeds)
        if out is not None:
            check_out(self.outputs, dims, out)
        names = [spec.name for spec in self.outputs]
        contiguous = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        try:
            if self._bfloat16 or out is not None:
                out = out or {spec.name: _empty(spec, dims) for spec in self.outputs}
                return self._run_bound(contiguous, out)
            return dict(zip(names, self._session.run(names, contiguous), strict=True))
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{self._path.name} failed: {_first_line(str(error))}") from error

    def _run_bound(
        self, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run with every tensor bound to host memory: needed for bfloat16 and for given outputs."""
        value = self._ort.OrtValue
        binding = self._session.io_binding()
        for specs, arrays, bind in (
            (self.inputs, feeds, binding.bind_ortvalue_input),
            (self.outputs, outputs, binding.bind_ortvalue_output),
        ):
            for spec in specs:
                array = arrays[spec.name]
                bind(
                    spec.name,
                    value.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
                    if spec.dtype == "bfloat16"
                    else value.ortvalue_from_numpy(array),
                )
        self._session.run_with_iobinding(binding)
        return {spec.name: outputs[spec.name] for spec in self.outputs}

    def close(self) -> None:
        self._session = None


def cores() -> int:
    """Cores this process may use; a container or taskset may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _spec(node: Any, path: Path) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise EngineError(f"{path} has {node.name} of type {node.type}, which is not supported")
    shape = tuple(
        dim if isinstance(dim, int) else str(dim or f"{node.name}.{axis}")
        for axis, dim in enumerate(node.shape)
    )
    return TensorSpec(node.name, dtype, shape)


def _empty(spec: TensorSpec, dims: Mapping[str, int]) -> np.ndarray:
    unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in dims]
    if unknown:
        raise EngineError(
            f"output {spec.name} has dimension {unknown[0]}, which no input of the graph names: "
            "a graph with bfloat16 tensors must name it"
        )
    shape = [dims[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    return np.empty(shape, spec.numpy_dtype)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason given"]
    return lines[0][:400].rstrip(". ")
