"""The engines of the GPU benchmark, each as a function that makes a case ready to run.

An engine's libraries are imported when it is used; a missing one raises
:class:`~exporters.gpu_cases.Absent`.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from edge_common.errors import EdgeRuntimeError, PlanError
from engines.geometry import Geometry

from . import stages, upstream
from .gpu_cases import (
    WARM_UPS,
    Absent,
    Case,
    Loaded,
    Tensors,
    Worker,
    chosen,
    feeds,
    line,
    outputs,
    timed,
)
from .packed_stack import PackedStack
from .precision import TENSOR_DTYPES, TORCH_DTYPES, cast

TUNED = (("stack", 25), ("tail", 25))
TUNING = "max-autotune-no-cudagraphs"
ON_CPU = "not measured: a rehearsal on the CPU"
_ONNX_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}


@dataclass(frozen=True)
class Kind:
    """One engine of the benchmark.

    Attributes:
        open, version: see the functions.
        graphs: it needs the exported bundle.
        capture: its runs are replayed as a CUDA graph.
        prepare: called before a case is opened and before its memory is watched.
    """

    open: Callable[[Worker, Case, Tensors, Geometry], Loaded]
    version: Callable[[Worker], str]
    graphs: bool = False
    capture: bool = False
    prepare: Callable[[Worker, Case], None] = lambda worker, case: None


def _pytorch_version(_: Worker) -> str:
    return f"PyTorch {torch.__version__}"


def _ort_version(worker: Worker) -> str:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Absent(f"onnxruntime cannot be imported ({line(error)})") from error
    if worker.on_gpu and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Absent(
            f"this ONNX Runtime {ort.__version__} was built without CUDA; onnxruntime-gpu has it"
        )
    _require_export()
    return f"ONNX Runtime {ort.__version__}"


def _trt_version(flavour: Any) -> Callable[[Worker], str]:
    def version(worker: Worker) -> str:
        if not worker.on_gpu:
            raise Absent(ON_CPU)
        from engines import libraries

        try:
            library = libraries.load(flavour)
            importlib.import_module("pycuda.driver")
        except (EdgeRuntimeError, ImportError) as error:
            raise Absent(line(error)) from error
        _require_export()
        return library.name

    return version


def _require_export() -> None:
    """Raise Absent if graphs cannot be exported."""
    for package in ("onnx", "onnxscript", "onnx_ir"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise Absent(f"no graph can be exported: {package} cannot be imported") from error


def open_upstream(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """Upstream's modules, converted to the precision, eager."""
    if case.stage == "stack" and case.count != geometry.windows:
        raise Absent("upstream's window blocks compute whole grids only")
    dtype = TORCH_DTYPES[worker.precision]
    kinds: dict[str, Callable[[Any], nn.Module]] = {
        "stack": upstream.UpstreamStack,
        "tail": upstream.UpstreamTail,
        "encoder": upstream.UpstreamEncoder,
        "decoder": upstream.UpstreamDecoder,
    }
    module = cast(kinds[case.stage](worker.sam()), worker.precision)  # type: ignore[arg-type]
    worker.tidy()
    if case.stage == "decoder":
        fed = {name: known[name] for name in ("embedding", "coords", "labels")}
        fed = {k: v if k == "embedding" else v[: case.count] for k, v in fed.items()}
    elif case.stage == "tail":
        fed = {"grid": stages.from_windows(known["tokens"], geometry)[None].to(dtype)}
    else:
        fed = {"image": known["image"]}
    loaded = _module(worker, case, module, _to_device(fed, worker.device))
    if case.stage == "stack":
        read = loaded.read
        loaded.read = lambda: {"tokens": stages.to_windows(read()["tokens"][0], geometry)}
    return loaded


def folded(worker: Worker, case: Case) -> nn.Module:
    kinds: dict[str, Callable[[Any], nn.Module]] = {
        "stack": lambda sam: stages.make_stack(sam, None),
        "tail": stages.Tail,
        "encoder": stages.Encoder,
        "decoder": stages.Decoder,
    }
    with worker.device, torch.no_grad():
        module = kinds[case.stage](worker.sam()).to(worker.device)
        return cast(module, worker.precision)  # type: ignore[arg-type]


def open_folded(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """This project's modules, eager."""
    module = folded(worker, case)
    worker.tidy()
    notes = _choose_attention(worker, case, module)
    fed = feeds(case, known, geometry, TORCH_DTYPES[worker.precision])
    loaded = _module(worker, case, module, _to_device(fed, worker.device))
    loaded.notes.update(notes)
    return loaded


def open_compiled(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """This project's modules under ``torch.compile``, replayed as one CUDA graph."""
    return _compiled(worker, case, known, geometry, folded(worker, case), "default")


def open_tuned(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """The same, with every matrix product tuned and fused with the operations after it."""
    if not worker.on_gpu:
        raise Absent(ON_CPU)
    if (case.stage, case.count) not in TUNED:
        raise Absent("tuning takes minutes; only what the targets speak of is tuned")
    return _compiled(worker, case, known, geometry, folded(worker, case), TUNING)


def open_packed(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """The stack without grid padding, compiled and tuned."""
    if case.stage != "stack" or case.count == 1:
        raise Absent("only the stack of several windows has grid padding to leave out")
    stack = folded(worker, case)
    assert isinstance(stack, stages.Stack)
    module = PackedStack(stack, chosen(geometry, case.count).to(worker.device))
    mode = TUNING if worker.on_gpu and (case.stage, case.count) in TUNED else "default"
    loaded = _compiled(worker, case, known, geometry, module, mode)
    loaded.notes["computes"] = "less than upstream, whose work tflops counts: no grid padding"
    return loaded


def _compiled(
    worker: Worker,
    case: Case,
    known: Tensors,
    geometry: Geometry,
    module: nn.Module,
    mode: str,
) -> Loaded:
    torch._dynamo.reset()
    counters.clear()
    worker.tidy()
    notes = {"mode": mode, **_choose_attention(worker, case, module)}
    # Blocks are compiled one by one: they share their code, so it is compiled once.
    blocks = [] if case.stage == "decoder" else list(getattr(module, "blocks", []))
    parts: list[nn.Module] = [*blocks] or [module]
    parts += [p for p in (getattr(module, name, None) for name in ("embed", "neck")) if p]
    for part in parts:
        # fullgraph: an error instead of a silent fallback to eager.
        part.compile(mode=mode, dynamic=False, fullgraph=True)
    fed = feeds(case, known, geometry, TORCH_DTYPES[worker.precision])
    loaded = _module(worker, case, module, _to_device(fed, worker.device))
    loaded.notes.update(notes)
    begun = time.perf_counter()
    for _ in range(WARM_UPS):
        loaded.run()
    worker.wait()
    loaded.notes["compiled_graphs"] = dict(counters["stats"]).get("unique_graphs")
    loaded.notes["compile_seconds"] = round(time.perf_counter() - begun, 1)
    return loaded


def _module(worker: Worker, case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Loaded:
    last: list[Any] = []

    @torch.no_grad()
    def run() -> None:
        last.clear()  # the previous output must not count as memory of this run
        with worker.device:  # stages.py makes scalar zeros on the default device
            last[:] = [module(*inputs)]

    def read() -> Tensors:
        out = last[0] if isinstance(last[0], tuple) else (last[0],)
        return dict(zip(outputs(case), out, strict=True))

    return Loaded(run, read, weights_bytes=_weights(module))


def _choose_attention(worker: Worker, case: Case, module: nn.Module) -> dict[str, Any]:
    """Time PyTorch's attention kernels on a stage's sizes, and enable only the fastest.

    The folded attention is wider (112 and 208 for ViT-H's heads of 80) than kernels are usually
    tuned for, so the fastest must be measured.
    """
    if not worker.on_gpu or case.stage == "decoder":
        return {}
    switches = {
        "flash": torch.backends.cuda.enable_flash_sdp,
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    }

    def only(kept: str | None) -> None:
        for name, switch in switches.items():
            switch(name == kept)
        torch.backends.cuda.enable_math_sdp(kept is None)

    attention = next(m for m in module.modules() if isinstance(m, stages.Attention))
    squares = case.count if case.stage == "stack" else 1
    if case.stage == "encoder":  # the last one is in a global block, which takes longer
        attention = [m for m in module.modules() if isinstance(m, stages.Attention)][-1]
    shape = (squares, attention.heads, attention.side**2, attention.width)
    dtype = TORCH_DTYPES[worker.precision]
    q, k, v = (torch.randn(shape, device=worker.device, dtype=dtype) for _ in "qkv")
    found: dict[str, Any] = {}
    for name in switches:
        only(name)
        try:
            with torch.no_grad():
                attend = Loaded(lambda: stages.attend(q, k, v), dict)
                found[name] = round(statistics.median(timed(worker, attend, 0.05, 0.05)[0]), 4)
        except Exception as error:
            found[name] = f"refused: {line(error)}"
    measured = {name: ms for name, ms in found.items() if isinstance(ms, float)}
    best = min(measured, key=lambda name: measured[name]) if measured else None
    only(best)
    return {"attention": best or "math", "attention_ms": found, "attention_shape": list(shape)}


def _to_device(tensors: Tensors, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(t.to(device).contiguous() for t in tensors.values())


def _weights(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def open_ort(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
    """ONNX Runtime, tensors bound to device memory."""
    import onnxruntime as ort

    from engines.bundle import Bundle

    bundle = Bundle.load(worker.bundle)
    if not bundle.has(case.stage):
        raise Absent("the bundle of a split model has no such stage")
    stage, path = bundle.stage(case.stage), str(bundle.stage_path(case.stage))
    notes: dict[str, Any] = {}
    run_options, stream = ort.RunOptions(), None
    providers: list[Any] = ["CPUExecutionProvider"]
    if worker.on_gpu:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        stream = torch.cuda.Stream()
        shared = {"use_tf32": "0", "user_compute_stream": str(stream.cuda_stream)}
        providers = [("CUDAExecutionProvider", shared), *providers]
        # Events on the shared stream mark the end of a run.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def session(cpu_too: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not cpu_too:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return ort.InferenceSession(path, options, providers=providers)

    try:
        opened = session(cpu_too=not worker.on_gpu)
    except Exception as error:
        if not worker.on_gpu:
            raise
        notes["nodes_on_cpu"] = f"yes; all on the GPU failed: {line(error)}"
        opened = session(cpu_too=True)
    if worker.on_gpu and "CUDAExecutionProvider" not in opened.get_providers():
        raise Absent("ONNX Runtime could not start CUDA: its CUDA or cuDNN libraries are missing")
    fed = feeds(case, known, geometry, TORCH_DTYPES[worker.precision])
    held = dict(zip(fed, _to_device(fed, worker.device), strict=True))
    made = {
        s.name: torch.empty(
            [case.count if isinstance(d, str) else d for d in s.shape],
            dtype=TENSOR_DTYPES[s.dtype],
            device=worker.device,
        )
        for s in stage.outputs
    }
    binding = opened.io_binding()
    for tensors, bind in ((held, binding.bind_input), (made, binding.bind_output)):
        for name, t in tensors.items():
            kind = _ONNX_TYPES[t.dtype]
            bind(name, worker.device.type, 0, kind, tuple(t.shape), t.data_ptr())
    worker.wait()  # the inputs were copied on another stream

    def run() -> None:
        opened.run_with_iobinding(binding, run_options)

    # A binding holds only addresses, so the tensors must be kept.
    return Loaded(run, lambda: made, notes=notes, stream=stream, kept=held)


def build_trt(flavour: Any) -> Callable[[Worker, Case], None]:
    """Build the plan of a stage, unless a case before did."""

    def build(worker: Worker, case: Case) -> None:
        from engines import libraries, plan
        from engines.build import BuildOptions, Watcher, build_stage
        from engines.bundle import Bundle
        from engines.cuda import facts

        bundle = Bundle.load(worker.bundle)
        if not bundle.has(case.stage):
            raise Absent("the bundle of a split model has no such stage")
        try:
            library, gpu = libraries.load(flavour), facts()
            plan.find(bundle, case.stage, library, gpu.compute_capability, gpu.name)
        except PlanError:
            build_stage(bundle, case.stage, BuildOptions(backend=flavour), Watcher())

    return build


def open_trt(flavour: Any) -> Callable[[Worker, Case, Tensors, Geometry], Loaded]:
    """TensorRT or TensorRT-RTX, from the plan that :func:`build_trt` built."""

    def open_(worker: Worker, case: Case, known: Tensors, geometry: Geometry) -> Loaded:
        from engines import libraries, plan
        from engines.bundle import Bundle
        from engines.cuda import facts
        from engines.dtypes import to_stored
        from engines.trt import TrtEngine

        bundle, library, gpu = Bundle.load(worker.bundle), libraries.load(flavour), facts()
        built = plan.find(bundle, case.stage, library, gpu.compute_capability, gpu.name)
        engine = TrtEngine(built, library)
        arrays = {
            s.name: to_stored(t.float().numpy(), s.dtype)
            if s.dtype == "bfloat16"
            else t.numpy().astype(s.numpy_dtype)
            for s, t in zip(
                bundle.stage(case.stage).inputs,
                feeds(case, known, geometry, TORCH_DTYPES[worker.precision]).values(),
                strict=True,
            )
        }
        types = {s.name: s.dtype for s in engine.outputs}
        last: dict[str, np.ndarray] = {}

        def read() -> Tensors:
            return {
                name: torch.from_numpy(array).view(torch.bfloat16)
                if types[name] == "bfloat16"
                else torch.from_numpy(array)
                for name, array in last.items()
            }

        record = built.record
        return Loaded(
            lambda: last.update(engine.run(arrays)),
            read,
            times=lambda runs: engine.device_times(arrays, WARM_UPS, runs),
            notes={
                "form": record.form,
                "build_seconds": round(record.build_seconds, 1),
                "attention_fused": [a.fused for a in record.attention],
                "activation_bytes": record.activation_bytes,
                "engine_notes": [str(note) for note in getattr(engine, "notes", ())],
            },
            close=engine.close,
        )

    return open_


ENGINES: dict[str, Kind] = {
    "pytorch-eager": Kind(open_upstream, _pytorch_version),
    "pytorch-folded": Kind(open_folded, _pytorch_version),
    "pytorch-compiled": Kind(open_compiled, _pytorch_version, capture=True),
    "pytorch-tuned": Kind(open_tuned, _pytorch_version, capture=True),
    "pytorch-packed": Kind(open_packed, _pytorch_version, capture=True),
    "onnxruntime": Kind(open_ort, _ort_version, graphs=True),
    "tensorrt": Kind(
        open_trt("tensorrt"),
        _trt_version("tensorrt"),
        graphs=True,
        prepare=build_trt("tensorrt"),
    ),
    "tensorrt-rtx": Kind(
        open_trt("tensorrt-rtx"),
        _trt_version("tensorrt-rtx"),
        graphs=True,
        prepare=build_trt("tensorrt-rtx"),
    ),
}
