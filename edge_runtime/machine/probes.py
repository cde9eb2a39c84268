"""Asks each library in its own child process, because a broken one may crash, hang or print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from edge_common.signals import child_process
from edge_common.text import one_line

_RUN = (
    # Set first, so that a file in the working directory cannot replace a module.
    "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); "
    "from edge_runtime.machine.probes import main; main(sys.argv[2], sys.argv[3:])"
)
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """The result of one probe.

    Attributes:
        facts: what it found; None if it failed.
        missing: the module is not installed, which is no error.
        error: one line about what went wrong.
        mend: what to do about it, if the error says so.
        end: how the probe's process ended, if it did not answer itself.
        stderr: the last lines the library wrote.
    """

    facts: dict[str, Any] | None = None
    missing: bool = False
    error: str | None = None
    mend: str | None = None
    end: Literal["late", "crashed", "ended", "not asked"] | None = None
    stderr: str = field(default="", repr=False)


def ask(probes: Iterable[tuple[str, ...]], timeout_s: float) -> dict[str, Answer]:
    """Run probes at the same time. Each is a name of :data:`_PROBES` and its arguments.

    ``timeout_s`` bounds the whole call. Returns one answer for each name.
    """
    deadline = time.monotonic() + timeout_s
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]] = {}
    with ExitStack() as stack:
        for name, *arguments in probes:
            # Files, because a full pipe would stop the child, and a grandchild that keeps a pipe
            # open would keep us waiting.
            out: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            err: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            command = [sys.executable, "-c", _RUN, os.pathsep.join(sys.path), name, *arguments]
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            process = stack.enter_context(child_process(command, **options))
            running[name] = process, out, err
        answers = {}
        for name, (process, out, err) in running.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                answers[name] = Answer(error=f"gave no answer within {timeout_s:g} s", end="late")
                continue
            answers[name] = _answer(code, _tail(out), _tail(err))
        return answers


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return file.read().decode("utf-8", "replace")


def _answer(code: int, out: str, err: str) -> Answer:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return Answer(error=f"crashed the process ({name})", end="crashed", stderr=err)
    try:
        return Answer(**json.loads(out), stderr=err)
    except (ValueError, TypeError):
        last = (err.strip().splitlines() or ["it printed nothing"])[-1]
        error = f"ended the process with code {code}: {last}"
        return Answer(error=error, end="ended", stderr=err)


# Everything below runs in the child.


def main(name: str, arguments: list[str]) -> None:
    """Run one probe and print its answer, whatever else the library prints."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        said: dict[str, Any] = {"facts": _PROBES[name](*arguments)}
    except ModuleNotFoundError as error:
        # The module itself may be missing; if another one is that it needs, that is an error.
        package = (error.name or "").split(".")[0]
        said = {"missing": True} if package in _MODULES.get(name, ()) else _told(error)
    except Exception as error:
        said = _told(error)
    os.write(answer_fd, json.dumps(said).encode())
    os._exit(0)  # skip what libraries do when the interpreter ends


def _told(error: Exception) -> dict[str, Any]:
    from edge_common.errors import EdgeRuntimeError

    if isinstance(error, EdgeRuntimeError):
        return {"error": one_line(error.found), "mend": error.mend or None}
    return {"error": f"{type(error).__name__}: {one_line(error) or 'no reason given'}"}


def _packages() -> dict[str, Any]:
    import msgspec
    import numpy
    import PIL
    import PIL._imaging  # the compiled half
    import rich.console  # noqa: F401  # has no version of its own
    import zmq

    return {
        "versions": {
            "numpy": numpy.__version__,
            "msgspec": msgspec.__version__,
            "pyzmq": zmq.__version__,
            "libzmq": zmq.zmq_version(),
            "Pillow": PIL.__version__,
        },
        "curve": bool(zmq.has("curve")),
    }


def _onnxruntime() -> dict[str, Any]:
    """Opens a stage of the shipped bundle on the CPU, and on CUDA if that is available."""
    import onnxruntime

    from edge_common.errors import EngineError
    from engines.bundle import Bundle, shipped_bundle
    from engines.ort import OrtEngine

    providers = onnxruntime.get_available_providers()
    path = Bundle.load(shipped_bundle()).stage_path("decoder")
    OrtEngine(path, device="cpu", threads=1).close()
    cuda: str | None = None
    if "CUDAExecutionProvider" in providers:
        try:
            OrtEngine(path, device="cuda", threads=1).close()
            cuda = ""
        except EngineError as error:
            cuda = one_line(error.found)
    return {
        "version": onnxruntime.__version__,
        "providers": providers,
        # None: not available; empty: works; otherwise what is wrong.
        "cuda": cuda,
    }


def _library(flavour: Any) -> dict[str, Any]:
    from edge_common.errors import EngineError
    from engines import libraries

    if flavour not in libraries.installed():
        raise ModuleNotFoundError(name=_MODULES[flavour][0])
    try:
        library = libraries.load(flavour)
    except EngineError as error:
        # The remedy depends on the machine, which the caller knows, so pass on the cause alone.
        raise (error.__cause__ or error) from None
    return {"version": library.version}


def _gpu() -> dict[str, Any]:
    """Asks the driver directly, without any package."""
    from dataclasses import asdict

    from engines import cuda

    return {**asdict(cuda.facts()), "count": cuda.device_count()}


def _pycuda() -> dict[str, Any]:
    """Makes a context, as the engines do."""
    import pycuda
    import pycuda.driver as driver

    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        free, total = driver.mem_get_info()
    finally:
        context.pop()
        context.detach()
    return {"version": pycuda.VERSION_TEXT, "free_bytes": free, "total_bytes": total}


def _cuda_python() -> dict[str, Any]:
    import importlib
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    # The second is the module of cuda-python up to 12.5; other packages have a `cuda` too.
    for module in ("cuda.bindings.driver", "cuda.cuda"):
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            continue
        if found:
            importlib.import_module(module)
            break
    else:
        raise ModuleNotFoundError(name="cuda")
    for name in ("cuda-bindings", "cuda-python"):
        try:
            return {"version": version(name)}
        except PackageNotFoundError:
            continue
    return {"version": "of unknown version"}


def _bundle(path: str | None = None) -> dict[str, Any]:
    from engines.bundle import Bundle, shipped_bundle

    bundle = Bundle.load(path or shipped_bundle())
    bundle.verify_hashes()
    return {
        "path": str(bundle.path),
        "model": bundle.manifest.model,
        "precision": bundle.manifest.precision,
    }


def _engines(path: str | None = None) -> dict[str, Any]:
    """Opens every stage as ``--device auto`` does."""
    import logging

    from engines.bundle import Bundle, shipped_bundle
    from engines.selection import open_stage

    warnings: list[dict[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = getattr(record, "found", record.getMessage())
            warnings.append({"text": text, "mend": getattr(record, "mend", "")})

    logging.getLogger("engines").addHandler(Keep(logging.WARNING))
    bundle = Bundle.load(path or shipped_bundle())
    names = {"cpu": "ONNX Runtime on the CPU", "cuda": "ONNX Runtime on CUDA"}
    opened = {}
    for stage in bundle.manifest.stages:
        with open_stage(bundle, stage) as engine:
            opened[stage] = names.get(getattr(engine, "device", ""), "TensorRT")
    return {"opened": opened, "warnings": warnings}


_PROBES: dict[str, Any] = {
    "packages": _packages,
    "onnxruntime": _onnxruntime,
    "tensorrt": lambda: _library("tensorrt"),
    "tensorrt-rtx": lambda: _library("tensorrt-rtx"),
    "gpu": _gpu,
    "pycuda": _pycuda,
    "cuda-python": _cuda_python,
    "bundle": _bundle,
    "engines": _engines,
}
# Probe -> the modules that may be missing.
_MODULES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "pycuda": ("pycuda",),
    "cuda-python": ("cuda",),
}
