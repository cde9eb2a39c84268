"""Memory shared by a node's front and a worker, for batches and results.

An :class:`Arena` is an anonymous file in memory that both processes map. The :class:`Layout` alone
determines each tensor's place. The pool assigns places to writers.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import secrets
import sys

import msgspec
import numpy as np

from edge_common.errors import EngineError
from engines.bundle import Tensors, TensorSpec

_ALIGNMENT = 64


class Layout(msgspec.Struct, frozen=True):
    """The contents of an arena: ``batches`` of ``inputs`` and ``results`` of ``outputs``.

    The first dimension of every tensor is ``rows``.
    """

    inputs: Tensors
    outputs: Tensors
    rows: int
    batches: int
    results: int

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self.batches * _size(self.inputs, self.rows) + self.results * _size(
            self.outputs, self.rows
        )


class Arena:
    """The memory for one layout. Unused pages take no memory.

    Attributes:
        batches: the inputs by name of each batch. results: the outputs of each result. Writable.
        fd: descriptor for workers; open until :meth:`close`.
    """

    def __init__(self, layout: Layout, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, layout.size)
        start = 0
        self.batches: list[dict[str, np.ndarray]] = []
        self.results: list[dict[str, np.ndarray]] = []
        for count, specs, places in (
            (layout.batches, layout.inputs, self.batches),
            (layout.results, layout.outputs, self.results),
        ):
            for _ in range(count):
                places.append(_views(self._map, start, specs, layout.rows))
                start += _size(specs, layout.rows)

    @classmethod
    def create(cls, layout: Layout) -> Arena:
        """Allocate the memory, filled with zeros.

        Raises:
            EngineError: a tensor has no fixed size per row, or the system refuses the memory.
        """
        size = layout.size
        try:
            fd = _anonymous()
            try:
                os.ftruncate(fd, size)
                _seal(fd)
                return cls(layout, fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            many = error.errno in (errno.EMFILE, errno.ENFILE)
            raise EngineError(
                f"no {size} bytes of memory to share with a worker ({error.strerror or error})",
                mend="raise the limit on open files" if many else "free memory, or lower max_batch",
            ) from error

    @classmethod
    def attach(cls, layout: Layout, fd: int) -> Arena:
        """Map the memory of another process; closes ``fd``.

        Raises:
            EngineError: it is too small for the layout.
        """
        found = os.fstat(fd).st_size
        if found < layout.size:
            os.close(fd)
            raise EngineError(f"shared memory of {found} bytes, expected {layout.size}")
        arena = cls(layout, fd)
        arena.close_fd()
        return arena

    def close_fd(self) -> None:
        """Close the descriptor; the memory stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Free the memory as soon as no array uses it. A second call does nothing."""
        self.close_fd()
        self.batches, self.results = [], []
        with contextlib.suppress(BufferError):  # the last array that uses it frees it
            self._map.close()


def _anonymous() -> int:
    """The descriptor of a new file in memory, without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("edge-runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        import _posixshmem  # type: ignore[import-not-found]
    except ImportError:
        raise EngineError(
            f"{sys.platform} has no memory that processes share by descriptor",
            mend="run the node on Linux or macOS",
        ) from None
    name = f"/edge-runtime-{secrets.token_hex(6)}"
    fd = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    _posixshmem.shm_unlink(name)
    return int(fd)


def _seal(fd: int) -> None:
    """Keep both processes from shrinking it, which would end the other one with SIGBUS."""
    if hasattr(os, "memfd_create"):
        import fcntl

        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def _views(
    memory: mmap.mmap, start: int, specs: tuple[TensorSpec, ...], rows: int
) -> dict[str, np.ndarray]:
    views = {}
    for spec in specs:
        shape = (rows, *_row(spec))
        flat = np.frombuffer(memory, spec.numpy_dtype, math.prod(shape), start)
        views[spec.name] = flat.reshape(shape)
        start += _padded(flat.nbytes, _ALIGNMENT)
    return views


def _size(specs: tuple[TensorSpec, ...], rows: int) -> int:
    """Bytes of one batch or result, whole pages."""
    size = 0
    for spec in specs:
        tensor = rows * math.prod(_row(spec)) * spec.numpy_dtype.itemsize
        size += _padded(tensor, _ALIGNMENT)
    return _padded(size, mmap.PAGESIZE)


def _row(spec: TensorSpec) -> tuple[int, ...]:
    row = tuple(dim for dim in spec.shape[1:] if isinstance(dim, int))
    if not spec.shape or len(row) != len(spec.shape) - 1:
        raise EngineError(
            f"{spec.name} has shape {spec.shape}, expected rows of a fixed size: this bundle "
            "cannot be served"
        )
    return row


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
