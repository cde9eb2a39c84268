"""Checks of this machine's hardware and software, each with the command that repairs a problem.

A check that fails because of a bug is reported like any other. The module imports nothing but the
standard library and this project, so that it runs where other packages are broken.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from edge_runtime.machine import probes
from edge_runtime.machine.board import Board, read_board
from edge_runtime.machine.probes import Answer
from engines.libraries import Defect, Flavour, defects
from engines.plan_paths import plans_folder

Status = Literal["ok", "warn", "fail", "none"]
Needed = Literal["cuda", "tensorrt"]

_GB = 1_000_000_000
# The plans of ViT-H in fp16, the largest model there is, take 1.3 GB.
_DISK_BYTES = 2 * _GB
_MEMORY_BYTES = 1 * _GB
# CUDA -> the oldest driver that supports it.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
OPEN_VENV = (
    "sed -i 's/^include-system-site-packages.*/include-system-site-packages = true/' "
    '"$VIRTUAL_ENV/pyvenv.cfg"'
)
"""Makes the packages of the system's Python visible in a virtual environment."""
_PACKAGES = "numpy msgspec pyzmq Pillow rich"


@dataclass(frozen=True)
class Check:
    """One line. `id` is for scripts; `mend` is what to do, mostly a command."""

    id: str
    status: Status
    what: str
    detail: str
    mend: str | None = None


@dataclass(frozen=True)
class _Facts:
    board: Board
    answers: Mapping[str, Answer]
    asked_for: Path | None

    def found(self, probe: str) -> dict[str, Any]:
        """The probe's findings. Empty if it failed."""
        return self.answers[probe].facts or {}

    @property
    def compute_capability(self) -> str | None:
        return self.found("gpu").get("compute_capability") or self.board.compute_capability

    @property
    def bundle(self) -> Path | None:
        """Its folder; None if none was given and the shipped one was not found."""
        path = self.found("bundle").get("path")
        return Path(path) if path else self.asked_for

    def defects(self, flavour: Flavour) -> tuple[Defect, ...]:
        """Known defects of an installed library on this GPU."""
        major, minor, patch = self.found(flavour)["version"]
        return defects(flavour, (major, minor, patch), self.compute_capability)

    @property
    def gpu_usable(self) -> bool:
        return self.answers["gpu"].facts is not None


def examine(
    root: Path = Path("/"),
    *,
    bundle: Path | None = None,
    require: Iterable[Needed] = (),
    timeout_s: float = 20.0,
) -> list[Check]:
    """Run every check. Never raises because of what it finds.

    Args:
        root: the machine's files are read below it; the libraries are those of this process.
        bundle: its engines are opened; None means the shipped one.
        require: what must be able to run here.
    """
    checks: list[Check] = []
    board, answers = Board(), _Answers()
    try:
        board = read_board(root)
    except Exception as error:
        checks.append(_bug("files", "board", error))
    try:
        answers = _Answers(probes.ask(_questions(bundle), timeout_s))
    except Exception as error:
        checks.append(_bug("probes", "libraries", error))
    facts = _Facts(board, answers, bundle)
    for name, check in _CHECKS.items():
        try:
            found = check(facts)
        except Exception as error:
            found = _bug(name, name, error)
        if found is not None:
            checks.append(found)
    for needed in dict.fromkeys(require):
        try:
            checks.append(_require(needed, facts, checks))
        except Exception as error:
            checks.append(_bug(f"require-{needed}", needed, error))
    return [_tidy(check) for check in checks]


class _Answers(dict[str, Answer]):
    def __missing__(self, probe: str) -> Answer:
        return Answer(error="was not asked", end="not asked")


def _bug(name: str, what: str, error: Exception) -> Check:
    return Check(name, "fail", what, f"this check failed: {type(error).__name__}: {error} (a bug)")


def _questions(bundle: Path | None) -> list[tuple[str, ...]]:
    alone = ("packages", "onnxruntime", "tensorrt", "tensorrt-rtx", "gpu", "pycuda", "cuda-python")
    # The probes find the shipped one themselves: that needs modules that may be broken.
    path = () if bundle is None else (str(bundle),)
    return [*((name,) for name in alone), ("bundle", *path), ("engines", *path)]


# The checks, in the order of the report. None: it does not apply to this machine.


def _board(facts: _Facts) -> Check:
    board = facts.board
    name = board.model or ("a Jetson" if board.jetson else "a machine that names no model")
    parts = [name, platform.machine()]
    if board.container:
        parts.append("in a container")
    return Check("board", "ok", "board", ", ".join(parts))


def _jetpack(facts: _Facts) -> Check | None:
    board = facts.board
    if not board.jetson:
        return None
    what = "JetPack"
    if board.l4t is None:
        where = "hidden in this container" if board.container else "not found"
        return Check("jetpack", "none", what, f"release of Jetson Linux {where}")
    detail = f"{board.jetpack or 'of unknown version'}, L4T {board.l4t}"
    if int(board.l4t.split(".")[0]) < 36:
        return Check(
            "jetpack",
            "warn",
            what,
            f"{detail}: older than 6, whose Python 3.10 is the oldest that edge-runtime runs on",
            "flash JetPack 6.2 or newer: https://developer.nvidia.com/embedded/jetpack",
        )
    if board.jetpack_installed is None and not board.container:
        return Check(
            "jetpack",
            "none",
            what,
            f"{detail}; its packages (CUDA, TensorRT) are not installed as a whole",
            None
            if board.cuda and board.tensorrt_folders
            else "sudo apt update && sudo apt install nvidia-jetpack",
        )
    return Check("jetpack", "ok", what, detail)


def _gpu(facts: _Facts) -> Check:
    board, gpu = facts.board, facts.found("gpu")
    if facts.gpu_usable:
        more = f" (the first of {gpu['count']})" if gpu["count"] > 1 else ""
        shared = "shared with the CPU" if gpu["integrated"] else "of its own"
        return Check(
            "gpu",
            "ok",
            "GPU",
            f"{gpu['name']}{more}, compute capability {gpu['compute_capability']}, "
            f"{_gigabytes(gpu['memory_bytes'])} of memory {shared}",
        )
    named = ", ".join(board.gpus) or ("the Jetson's own" if board.jetson else "NVIDIA")
    if board.locked_nodes:
        nodes = ", ".join(f"/dev/{node}" for node in board.locked_nodes)
        return Check(
            "gpu",
            "fail",
            "GPU",
            f"{named}, but this user may not open {nodes}",
            'sudo usermod -aG video,render "$USER"    (then log out and in again)',
        )
    if board.gpu_visible:
        return Check(
            "gpu",
            "fail",
            "GPU",
            f"{named}, but the driver cannot use it: {facts.answers['gpu'].error}",
            "sudo dmesg | grep -iE 'nvidia|nvgpu|nvrm' | tail    (shows why)",
        )
    if board.container and board.jetson:
        return Check(
            "gpu",
            "warn",
            "GPU",
            "the Jetson's own is not visible in this container",
            "docker run --runtime nvidia ...    (instead of docker run ...)",
        )
    if board.container:
        hint = "; if the host has one, start the container with `docker run --gpus all`"
        return Check("gpu", "none", "GPU", f"none visible, everything runs on the CPU{hint}")
    if board.jetson or board.gpus:
        return Check(
            "gpu",
            "warn",
            "GPU",
            f"{named}: no device nodes in /dev",
            "sudo modprobe nvgpu" if board.jetson else "sudo modprobe nvidia",
        )
    return Check("gpu", "none", "GPU", "no NVIDIA GPU, everything runs on the CPU")


def _driver(facts: _Facts) -> Check:
    board, gpu = facts.board, facts.found("gpu")
    if board.driver is None and not gpu:
        if board.gpu_visible:
            return Check("driver", "fail", "driver", "none found", _driver_command(board))
        return Check("driver", "none", "driver", "no NVIDIA driver")
    parts = [board.driver] if board.driver else []
    if gpu:
        parts.append(f"for CUDA up to {gpu['cuda']}")
    return Check("driver", "ok", "driver", ", ".join(parts))


def _driver_command(board: Board) -> str:
    return (
        "sudo apt install --reinstall nvidia-l4t-core nvidia-l4t-cuda"
        if board.jetson
        else "sudo ubuntu-drivers install    (then reboot)"
    )


def _cuda(facts: _Facts) -> Check:
    board = facts.board
    versions = {name: _version(name) for name in _pip_cuda()}
    from_pip = [f"{name} {version}" for name, version in versions.items() if version]
    if board.cuda is None:
        if from_pip:
            return Check("cuda", "ok", "CUDA", f"from pip: {', '.join(from_pip)}")
        command = None
        if board.gpu_visible and not board.container:
            command = (
                "sudo apt update && sudo apt install nvidia-jetpack"
                if board.jetson
                else "sudo apt install nvidia-cuda-toolkit"
            )
        detail = "no toolkit: compiling pycuda needs one, serving does not"
        return Check("cuda", "none", "CUDA", detail, command)
    major = int(board.cuda.split(".")[0])
    oldest = _OLDEST_DRIVER.get(major)
    driver = re.match(r"(\d+)\.", board.driver or "")
    if oldest and driver and int(driver[1]) < oldest:
        return Check(
            "cuda",
            "warn",
            "CUDA",
            f"{board.cuda} needs driver {oldest} or newer, this one is {board.driver}",
            "sudo apt update && sudo apt install nvidia-jetpack    (brings the CUDA of this driver)"
            if board.jetson
            else _driver_command(board),
        )
    return Check("cuda", "ok", "CUDA", ", ".join([f"toolkit {board.cuda}", *from_pip]))


def _pip_cuda() -> list[str]:
    return ["nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11"]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _memory(facts: _Facts) -> Check | None:
    board, pycuda = facts.board, facts.found("pycuda")
    if not board.memory_bytes:
        return None
    detail = f"{_gigabytes(board.available_bytes)} of {_gigabytes(board.memory_bytes)} free"
    if board.jetson:
        detail += ", shared with the GPU"
    elif pycuda:
        detail += (
            f"; of the GPU's {_gigabytes(pycuda['free_bytes'])} "
            f"of {_gigabytes(pycuda['total_bytes'])}"
        )
    swap = _gigabytes(board.swap_bytes) if board.swap_bytes else "none"
    detail += f"; swap {swap}"
    if board.available_bytes < _MEMORY_BYTES:
        command = (
            "sudo init 3    (stops the desktop until the next boot)"
            if board.jetson and not board.container
            else "ps aux --sort -rss | head    (shows who has it)"
        )
        return Check("memory", "warn", "memory", detail, command)
    return Check("memory", "ok", "memory", detail)


def _power(facts: _Facts) -> Check | None:
    mode, fastest = facts.board.power_mode, facts.board.fastest_mode
    if mode is None:
        return None
    name = f"{mode.name} (mode {mode.number})"
    if fastest is None or mode == fastest:
        return Check("power", "ok", "power mode", name)
    return Check(
        "power",
        "warn",
        "power mode",
        f"{name}; {fastest.name} is faster, where power supply and cooling allow it",
        f"sudo nvpmodel -m {fastest.number}    (then `sudo jetson_clocks` before measuring)",
    )


def _heat(facts: _Facts) -> Check | None:
    zones = facts.board.zones
    if not zones:
        return None
    slowed = [z for z in zones if z.throttles is not None and z.celsius >= z.throttles]
    if slowed:
        named = ", ".join(f"{zone.name} {zone.celsius:.0f} °C" for zone in slowed)
        command = "sudo jetson_clocks --fan    (fan at full speed)" if facts.board.jetson else None
        return Check("heat", "warn", "heat", f"{named}: hot enough to be slowed down", command)
    return Check("heat", "ok", "heat", f"{zones[0].name} {zones[0].celsius:.0f} °C")


def _python(facts: _Facts) -> Check:
    version = platform.python_version()
    place = "in a virtual environment" if sys.prefix != sys.base_prefix else "the system's own"
    return Check("python", "ok", "Python", f"{version}, {place}")


def _packages(facts: _Facts) -> Check:
    answer = facts.answers["packages"]
    reinstall = f"pip install --force-reinstall {_PACKAGES}"
    if answer.facts is None:
        return Check("packages", "fail", "packages", f"{answer.error}", reinstall)
    found = {name: f"{name} {version}" for name, version in answer.facts["versions"].items()}
    if not answer.facts["curve"]:
        return Check(
            "packages",
            "fail",
            "packages",
            f"{', '.join(found.values())}: this libzmq has no CURVE, without which nothing may "
            "leave the machine",
            "pip install --force-reinstall --only-binary :all: pyzmq",
        )
    if "libzmq" in found:
        found["libzmq"] += " with CURVE"
    return Check("packages", "ok", "packages", ", ".join(found.values()))


def _onnxruntime(facts: _Facts) -> Check:
    what, answer = "ONNX Runtime", facts.answers["onnxruntime"]
    builds = [
        name
        for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-openvino")
        if _version(name)
    ]
    gpu_build = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if answer.facts is None:
        detail = "not installed" if answer.missing else f"{answer.error}"
        command = f"pip install --force-reinstall {builds[0] if builds else 'onnxruntime'}"
        return Check("onnxruntime", "fail", what, detail, command)
    detail = f"{answer.facts['version']}, {' '.join(_providers(answer.facts['providers']))}"
    if len(builds) > 1:
        # They share one folder, so whichever was installed last decides what there is.
        keep = gpu_build if "onnxruntime-gpu" in builds else f"pip install {builds[-1]}"
        return Check(
            "onnxruntime",
            "warn",
            what,
            f"{detail}: {' and '.join(builds)} are both installed and overwrite each other",
            f"pip uninstall -y {' '.join(builds)} && {keep}",
        )
    cuda = answer.facts["cuda"]
    if cuda:
        library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared", answer.stderr)
        why = f"{library[1]} is missing" if library else cuda
        if not facts.board.gpu_visible:
            return Check("onnxruntime", "ok", what, f"{detail} (CUDA has no GPU here)")
        return Check("onnxruntime", "fail", what, f"{detail}, but CUDA fails: {why}", gpu_build)
    if cuda is None and facts.gpu_usable and not facts.found("gpu")["integrated"]:
        return Check(
            "onnxruntime",
            "warn",
            what,
            f"{detail}: a build for the CPU alone, though there is a GPU",
            f"pip uninstall -y onnxruntime && {gpu_build}",
        )
    return Check("onnxruntime", "ok", what, detail)


def _providers(names: Sequence[str]) -> list[str]:
    known = {"CPUExecutionProvider": "CPU", "CUDAExecutionProvider": "CUDA"}
    return [known[name] for name in names if name in known]


def _tensorrt(facts: _Facts) -> Check:
    answer, board = facts.answers["tensorrt"], facts.board
    install = "sudo apt update && sudo apt install python3-libnvinfer" if board.jetson else None
    if not answer.missing:
        # A broken copy may hide the system's own, so the folder says nothing here.
        return _library(facts, "tensorrt", "TensorRT", install)
    if board.tensorrt_folders:
        return _hidden_tensorrt(board)
    mend = install if board.gpu_visible and not board.container else None
    return Check("tensorrt", "none", "TensorRT", "not installed", mend)


def _hidden_tensorrt(board: Board) -> Check:
    """It is a Debian package of the system's Python, and not visible to this Python."""
    folder = board.tensorrt_folders[-1]
    here, prefix, base = _python_here()
    detail = f"{board.tensorrt_package or 'installed'} belongs to the system's Python {folder}"
    if folder in (here, "3") and prefix != base and base == Path("/usr"):
        return Check(
            "tensorrt",
            "warn",
            "TensorRT",
            f"{detail}; this virtual environment does not see the system's packages",
            OPEN_VENV,
        )
    python = "/usr/bin/python3" if folder == "3" else f"/usr/bin/python{folder}"
    return Check(
        "tensorrt",
        "warn",
        "TensorRT",
        f"{detail}; this is another Python ({here})",
        f"{python} -m venv --system-site-packages ~/edge-runtime    (and install there)",
    )


def _python_here() -> tuple[str, Path, Path]:
    """Version such as ``3.10``, the folder of its environment, and that of its installation."""
    version = ".".join(platform.python_version_tuple()[:2])
    return version, Path(sys.prefix), Path(sys.base_prefix)


def _tensorrt_rtx(facts: _Facts) -> Check:
    command = "pip install tensorrt-rtx-cu13"
    answer = facts.answers["tensorrt-rtx"]
    if not answer.missing:
        return _library(facts, "tensorrt-rtx", "TensorRT-RTX", command)
    wanted = facts.gpu_usable and not facts.board.jetson and facts.answers["tensorrt"].missing
    return Check(
        "tensorrt-rtx", "none", "TensorRT-RTX", "not installed", command if wanted else None
    )


def _library(facts: _Facts, flavour: Flavour, what: str, install: str | None) -> Check:
    answer = facts.answers[flavour]
    module = flavour.replace("-", "_")
    if answer.facts is None:
        command = install or f"pip uninstall {flavour}"
        if flavour == "tensorrt-rtx":
            command = "pip install --force-reinstall tensorrt-rtx-cu13"
        elif install:
            command = install.replace("install python3", "install --reinstall python3")
        detail = f"`import {module}` {_failed(answer)}"
        return Check(flavour, "fail", what, detail, command)
    version = ".".join(map(str, answer.facts["version"]))
    known = facts.defects(flavour)
    if known:
        faults = "; ".join(f"{defect.what} ({defect.source})" for defect in known)
        if flavour == "tensorrt-rtx":  # its only known defects are GPUs that it does not support
            return Check(flavour, "warn", what, f"{version}: {faults}")
        verify = f"edge-runtime verify {_quoted(facts.bundle)}    (measures whether it is affected)"
        detail = f"{version} has known defects: {faults}"
        return Check(flavour, "warn", what, detail, verify if facts.gpu_usable else None)
    if not facts.gpu_usable:
        return Check(flavour, "ok", what, f"{version}, which without a GPU can run no plan")
    return Check(flavour, "ok", what, version)


def _failed(answer: Answer) -> str:
    """A probe's error, to follow the name of what failed."""
    error = answer.error or "failed"
    return error if answer.end else f"fails: {error}"


def _pycuda(facts: _Facts) -> Check:
    answer, board = facts.answers["pycuda"], facts.board
    # Its build finds the headers and libcuda through nvcc.
    path = "PATH=/usr/local/cuda/bin:$PATH " if board.cuda else ""
    install = f"{path}pip install pycuda"
    if answer.facts:
        return Check("pycuda", "ok", "pycuda", answer.facts["version"])
    if answer.missing:
        if _has_tensorrt(facts) and facts.gpu_usable:
            return Check("pycuda", "warn", "pycuda", "not installed: TensorRT needs it", install)
        return Check("pycuda", "none", "pycuda", "not installed")
    if not board.gpu_visible and re.search("cuInit|libcuda", answer.error or ""):
        return Check("pycuda", "none", "pycuda", "installed, but there is no GPU to use")
    rebuild = install.replace("pip install", "pip install --force-reinstall --no-cache-dir")
    return Check("pycuda", "fail", "pycuda", _failed(answer), rebuild)


def _has_tensorrt(facts: _Facts) -> bool:
    """True if one of the two libraries works and is not known to lack this GPU."""
    rtx = facts.answers["tensorrt-rtx"].facts and not facts.defects("tensorrt-rtx")
    return bool(facts.answers["tensorrt"].facts or rtx)


def _cuda_python(facts: _Facts) -> Check:
    answer, what = facts.answers["cuda-python"], "cuda-python"
    newest = facts.found("gpu").get("cuda")
    pin = (
        f"pip install --force-reinstall 'cuda-python=={newest.split('.')[0]}.*'" if newest else None
    )
    if answer.facts:
        version = answer.facts["version"]
        made_for = re.match(r"\d+", version)
        if newest and made_for and int(made_for[0]) > int(newest.split(".")[0]):
            detail = f"{version} is for CUDA {made_for[0]}, the driver knows CUDA up to {newest}"
            return Check("cuda-python", "warn", what, detail, pin)
        return Check("cuda-python", "ok", what, version)
    if answer.missing:
        needed = _has_tensorrt(facts) and facts.gpu_usable
        detail = "not installed: TensorRT runs without CUDA graphs" if needed else "not installed"
        command = pin.replace("--force-reinstall ", "") if needed and pin else None
        return Check("cuda-python", "none", what, detail, command)
    command = pin or "pip install --force-reinstall cuda-python"
    return Check("cuda-python", "fail", what, _failed(answer), command)


def _bundle(facts: _Facts) -> Check:
    answer = facts.answers["bundle"]
    if answer.facts is None:
        if facts.answers["packages"].facts is None:
            return Check("bundle", "none", "bundle", "not opened: packages are missing")
        error, command = f"{answer.error}", answer.mend
        if answer.end == "late":
            command = f"edge-runtime info {_quoted(facts.bundle)}    (hashes it without a limit)"
        elif facts.asked_for is None:
            command = "pip install --force-reinstall --no-deps .    (in the folder of its source)"
        return Check("bundle", "fail", "bundle", error, command)
    detail = f"{answer.facts['model']}, {answer.facts['precision']}, files match their hashes"
    return Check("bundle", "ok", "bundle", detail)


def _disk(facts: _Facts) -> Check | None:
    """True if there is room for plans."""
    if facts.bundle is None or not facts.bundle.is_dir():
        return None
    try:
        folder = plans_folder(facts.bundle)
    except OSError:
        return None  # another check has said it
    path = next(found for found in (folder, *folder.parents) if found.is_dir())
    free = shutil.disk_usage(path).free
    detail = f"{_gigabytes(free)} free where the bundle's plans go"
    if not os.access(path, os.W_OK):
        copy = f"cp -r {_quoted(facts.bundle)} ~/bundle && edge-runtime build ~/bundle"
        needed = _has_tensorrt(facts)
        detail += ", which this user may not write"
        return Check("disk", "warn" if needed else "none", "disk", detail, copy if needed else None)
    if free < _DISK_BYTES:
        command = f"du -xsh {_quoted(folder)}/*    (plans no longer used may be deleted)"
        return Check(
            "disk", "warn", "disk", f"{detail}; a large model's plans take 1.3 GB", command
        )
    return Check("disk", "ok", "disk", detail)


def _engines(facts: _Facts) -> Check | None:
    what, answer = "--device auto", facts.answers["engines"]
    if answer.facts is None:
        error, command = f"{answer.error}", answer.mend
        if error == facts.answers["bundle"].error:
            return None  # the check of the bundle has said it
        if answer.end == "late":
            command = f"edge-runtime doctor {_quoted(facts.bundle)} --timeout 200"
        return Check("engines", "fail", what, error, command)
    by_engine: dict[str, list[str]] = {}
    for stage, engine in answer.facts["opened"].items():
        by_engine.setdefault(engine, []).append(stage)
    if len(by_engine) == 1:
        detail = f"{next(iter(by_engine))} runs every stage"
    else:
        detail = "; ".join(f"{engine}: {', '.join(s)}" for engine, s in by_engine.items())
    warnings = answer.facts["warnings"]
    if warnings:
        mend = next((warning["mend"] for warning in warnings if warning["mend"]), None)
        return Check("engines", "warn", what, f"{detail}. {warnings[0]['text']}", mend)
    if "TensorRT" not in by_engine and facts.found("pycuda") and _has_tensorrt(facts):
        return Check(
            "engines",
            "ok",
            what,
            f"{detail}: this bundle has no TensorRT plans, `edge-runtime build` makes them",
        )
    return Check("engines", "ok", what, detail)


_CHECKS: dict[str, Callable[[_Facts], Check | None]] = {
    "board": _board,
    "jetpack": _jetpack,
    "gpu": _gpu,
    "driver": _driver,
    "cuda": _cuda,
    "memory": _memory,
    "power": _power,
    "heat": _heat,
    "python": _python,
    "packages": _packages,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
    "pycuda": _pycuda,
    "cuda-python": _cuda_python,
    "bundle": _bundle,
    "disk": _disk,
    "engines": _engines,
}


def _require(needed: Needed, facts: _Facts, checks: Sequence[Check]) -> Check:
    """Check that an engine can run here. If not, name the first missing part."""
    name = f"require-{needed}"
    what = f"required {needed}"
    by_id = {check.id: check for check in checks}
    if not facts.gpu_usable:
        gpu = by_id["gpu"]
        return Check(name, "fail", what, f"no GPU can be used: {gpu.detail}", gpu.mend)
    if needed == "cuda":
        if facts.found("onnxruntime").get("cuda") == "":
            return Check(name, "ok", what, "ONNX Runtime runs on CUDA")
        part = by_id["onnxruntime"]
        return Check(name, "fail", what, f"ONNX Runtime cannot use it: {part.detail}", part.mend)
    if not _has_tensorrt(facts):
        part = by_id["tensorrt" if facts.board.jetson else "tensorrt-rtx"]
        return Check(name, "fail", what, f"{part.what}: {part.detail}", part.mend)
    if not facts.found("pycuda"):
        part = by_id["pycuda"]
        return Check(name, "fail", what, f"pycuda: {part.detail}", part.mend)
    return Check(name, "ok", what, "TensorRT can run; `verify` measures its plans")


def _gigabytes(size: float) -> str:
    return f"{size / _GB:.1f} GB"


def _quoted(path: Path | None) -> str:
    return shlex.quote(str(path)) if path else "BUNDLE"


def _tidy(check: Check) -> Check:
    """One short printable line each, with ~ for the home folder, whose name may be private."""
    home = os.path.expanduser("~")

    def tidy(text: str, limit: int) -> str:
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split(" "))
        if len(home) > 1:
            text = re.sub(rf"{re.escape(home)}(?=/|$|\s)", "~", text)
        return text if len(text) <= limit else f"{text[: limit - 1]}…"

    return dataclasses.replace(
        check,
        detail=" ".join(tidy(check.detail, 600).split()),
        mend=None if check.mend is None else tidy(check.mend, 1000),
    )
