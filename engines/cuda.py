"""The GPU as the engines need it: what it is, and its memory and streams.

:func:`facts` asks the driver itself (through ctypes), so that whoever only wants to know which GPU
is here needs no pycuda. What a GPU *does* goes through pycuda, imported when first needed. Every
failure is one :class:`~engines.errors.EngineError` that says what was missing and what mends it.
What is computed is left to :mod:`engines.trt`.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines.errors import EngineError

# cuda.h: CUresult and CUdevice_attribute.
_NO_DEVICE = 100
_ATTRIBUTE_INTEGRATED = 18
_ATTRIBUTE_COMPUTE_CAPABILITY = 75, 76


@dataclass(frozen=True)
class Facts:
    """One GPU, as the driver describes it.

    Attributes:
        name: as the driver spells it, e.g. ``Orin`` or ``NVIDIA L4``.
        compute_capability: e.g. ``8.7``.
        driver: version of the kernel module; of L4T where a Jetson's kernel does not say; else the
            newest CUDA the driver knows, as ``CUDA 12.6``.
        cuda: the newest CUDA the driver knows, e.g. ``12.6``.
        memory_bytes: all of it; on an integrated GPU that is the board's, shared with the CPU.
        integrated: whether it shares memory with the CPU, as on a Jetson.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str
    memory_bytes: int
    integrated: bool


def device_count() -> int:
    """How many NVIDIA GPUs this process may use; 0 also where no driver is."""
    try:
        return _count(_driver())
    except EngineError:
        return 0


def facts(ordinal: int = 0) -> Facts:
    """Describe GPU number ``ordinal``.

    Raises:
        EngineError: no driver, no such GPU, or the driver fails; with what mends it.
    """
    cuda = _driver()
    count = _count(cuda)
    if count == 0:
        raise EngineError(_NO_GPU)
    if not 0 <= ordinal < count:
        raise EngineError(
            f"there is no GPU {ordinal}: this process may use {count}, numbered from 0 "
            "(CUDA_VISIBLE_DEVICES can hide some)"
        )
    device = ctypes.c_int()
    _ask(cuda, "cuDeviceGet", ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    _ask(cuda, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _ask(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    version = ctypes.c_int()
    _ask(cuda, "cuDriverGetVersion", ctypes.byref(version))

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        _ask(cuda, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    major, minor = map(attribute, _ATTRIBUTE_COMPUTE_CAPABILITY)
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Facts(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=f"{major}.{minor}",
        driver=driver_version() or f"CUDA {newest}",
        cuda=newest,
        memory_bytes=memory.value,
        integrated=bool(attribute(_ATTRIBUTE_INTEGRATED)),
    )


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver of the system under ``root``, None where it says none.

    The kernel module comes first because a container sees it too; a Jetson's L4T release stands
    in where the module does not say, as before JetPack 6.
    """
    found = re.search(
        r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\b",
        _text(root / "proc/driver/nvidia/version"),
        re.MULTILINE,
    )
    if found:
        return found[1]
    found = re.search(
        r"^# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release")
    )
    return f"L4T {found[1]}.{found[2]}" if found else None


_NO_GPU = (
    "no NVIDIA GPU is visible to this process: see `nvidia-smi` (on a Jetson `tegrastats`) and "
    "CUDA_VISIBLE_DEVICES, start a container with --gpus all or --runtime nvidia, "
    "or use --device cpu"
)


@lru_cache(maxsize=1)
def _driver() -> Any:
    """``libcuda``, initialised."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"no NVIDIA driver is installed here ({error}): install it, start a container with "
            "--gpus all or --runtime nvidia, or use --device cpu"
        ) from None
    _ask(cuda, "cuInit", 0)
    return cuda


def _count(cuda: Any) -> int:
    count = ctypes.c_int()
    _ask(cuda, "cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _ask(cuda: Any, function: str, *arguments: Any) -> None:
    code = getattr(cuda, function)(*arguments)
    if code == _NO_DEVICE:
        raise EngineError(_NO_GPU)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode("utf-8", "replace")
        raise EngineError(
            f"the NVIDIA driver failed in {function}: {reason} (error {code}). "
            "See `nvidia-smi` and `dmesg`, or use --device cpu"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
