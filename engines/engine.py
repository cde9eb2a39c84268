"""The interface of all inference engines.

An engine holds one stage of a bundle, opened on one device, and maps named arrays to named arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np

from edge_common.errors import EngineError
from engines.bundle import TensorSpec

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
"""Where a stage runs. ``auto`` takes a TensorRT plan that may serve on this machine, otherwise ONNX
Runtime on CUDA, otherwise on the CPU. The others take exactly that, or raise an error."""

_Self = TypeVar("_Self", bound="Engine")


class Engine(ABC):
    """One opened stage. Use it as a context manager, or call :meth:`close`.

    Attributes:
        inputs: arrays that :meth:`run` takes. A string in a shape is a dynamic dimension; it has
            the same size wherever it occurs.
        outputs: arrays that :meth:`run` returns.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the stage once.

        Args:
            feeds: one array for every input, of exactly its dtype. bfloat16 is stored as the
                uint16 of its bits.
            out: arrays to write the outputs to, which saves copies: for every output a writable
                C-contiguous array of its dtype and shape that shares no memory with the feeds.
                After an error their content is undefined. None makes new arrays.

        Returns:
            one array for every output, owned by the caller; those of ``out`` if given.

        Raises:
            EngineError: the feeds or ``out`` do not fit, or the library fails.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the memory. Closing twice is allowed; running afterwards raises EngineError."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Check that ``feeds`` are exactly the arrays that ``inputs`` describe.

    Returns:
        the size of every dynamic dimension.

    Raises:
        EngineError: naming the first input that does not fit.
    """
    expected = {spec.name for spec in inputs}
    if feeds.keys() != expected:
        missing, extra = sorted(expected - feeds.keys()), sorted(feeds.keys() - expected)
        both = ("missing", missing), ("unknown", extra)
        found = [f"{what} {', '.join(names)}" for what, names in both if names]
        raise EngineError(
            f"wrong inputs: {'; '.join(found)}. The stage takes {', '.join(sorted(expected))}"
        )
    dims: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = feeds[spec.name]
        if array.dtype != spec.numpy_dtype:
            raise EngineError(f"input {spec.name} is {array.dtype}, expected {spec.numpy_dtype}")
        if array.ndim != len(spec.shape):
            raise EngineError(f"input {spec.name} has shape {array.shape}, expected {spec.shape}")
        for found_dim, dim in zip(array.shape, spec.shape, strict=True):
            if isinstance(dim, int):
                if found_dim != dim:
                    raise EngineError(
                        f"input {spec.name} has shape {array.shape}, expected {spec.shape}"
                    )
                continue
            known, source = dims.setdefault(dim, (found_dim, spec.name))
            if known != found_dim:
                raise EngineError(
                    f"input {spec.name} has shape {array.shape}, which makes {dim} {found_dim}, "
                    f"but input {source} makes it {known}"
                )
    return {dim: size for dim, (size, _) in dims.items()}


def check_out(
    outputs: tuple[TensorSpec, ...], dims: Mapping[str, int], out: Mapping[str, np.ndarray]
) -> None:
    """Check that ``out`` has exactly one fitting array for each of ``outputs``.

    Args:
        dims: sizes of dynamic dimensions, from :func:`check_feeds`; an unknown one fits any size.

    Raises:
        EngineError: naming the first output that does not fit.
    """
    if out.keys() != (expected := {spec.name for spec in outputs}):
        raise EngineError(
            f"the engine returns {', '.join(sorted(expected))}, but out has "
            f"{', '.join(sorted(out)) or 'nothing'}"
        )
    for spec in outputs:
        place = out[spec.name]
        shape = tuple(dims.get(d, d) if isinstance(d, str) else d for d in spec.shape)
        fits = place.dtype == spec.numpy_dtype and place.ndim == len(shape)
        if not fits or any(
            isinstance(d, int) and d != found for d, found in zip(shape, place.shape, strict=True)
        ):
            raise EngineError(
                f"the engine returns {spec.name} as {spec.numpy_dtype} {shape}, but out has "
                f"{place.dtype} {place.shape}"
            )
        if not (place.flags.c_contiguous and place.flags.writeable):
            raise EngineError(f"out[{spec.name!r}] is not a writable, contiguous array")
