"""The simulated driver's counters and controls, for tests. Import it only where ``LD_LIBRARY_PATH``
leads to the simulated ``libcuda.so.1`` (see :mod:`build`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

cuda = ctypes.CDLL("libcuda.so.1")
cuda.simulated_count.restype = ctypes.c_long
cuda.simulated_count.argtypes = [ctypes.c_char_p]
cuda.simulated_last_error.restype = ctypes.c_char_p
cuda.simulated_failed_call.restype = ctypes.c_char_p
cuda.simulated_set_memory.argtypes = [ctypes.c_size_t]
cuda.simulated_backing.restype = ctypes.c_void_p
cuda.simulated_backing.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
cuda.simulated_report.argtypes = [ctypes.c_char_p]
cuda.simulated_fail.argtypes = [ctypes.c_long, ctypes.c_int]
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
cuda.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, HostFunction, ctypes.c_void_p]
cuda.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t]
cuda.cuMemFree_v2.argtypes = [ctypes.c_size_t]

OUT_OF_MEMORY = 2
MEMORY = 1 << 30
LIVE = ("allocations", "host_allocations", "streams", "events", "graphs", "graph_execs", "used")


def count(name: str) -> int:
    """One of the counters of ``libcuda.c``."""
    value = int(cuda.simulated_count(name.encode()))
    assert value >= 0, f"the simulated driver has no counter {name}"
    return value


def live() -> dict[str, int]:
    """Allocations that have not been freed."""
    return {name: count(name) for name in LIVE if count(name)}


def last_error() -> str:
    return cuda.simulated_last_error().decode()


def failed_call() -> str:
    """The call that failed on request; empty if none did."""
    return cuda.simulated_failed_call().decode()


@contextmanager
def failing(after: int, code: int) -> Iterator[None]:
    """Inside the block, driver call number ``after`` fails with ``code``."""
    cuda.simulated_fail(after, code)
    try:
        yield
    finally:
        cuda.simulated_fail(0, 0)


@contextmanager
def memory(size: int) -> Iterator[None]:
    """Inside the block, the GPU has ``size`` bytes."""
    cuda.simulated_set_memory(size)
    try:
        yield
    finally:
        cuda.simulated_set_memory(MEMORY)


def allocate(size: int) -> int | None:
    """Allocate device memory as the simulated TensorRT does. None if there is too little."""
    address = ctypes.c_size_t()
    return None if cuda.cuMemAlloc_v2(ctypes.byref(address), size) else address.value


def free(address: int) -> None:
    cuda.cuMemFree_v2(address)


def report(text: str) -> None:
    """Count an error."""
    cuda.simulated_report(text.encode())
