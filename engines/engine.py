"""The one interface behind which every inference engine stands.

An engine holds one stage of a bundle, opened on one device, and maps named arrays to named arrays.
It promises to check what it is fed before the library underneath sees it, so that a wrong name,
type or shape is one clear line. Which engine to open, and what the tensors mean, is left to
:mod:`engines.pipeline` and to the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np

from edge_common.errors import EngineError
from engines.bundle import TensorSpec

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
"""Where a stage runs. ``auto``: a TensorRT plan of the bundle that may serve on this machine, else
ONNX Runtime on CUDA, else on the CPU. The others: that, or an error."""

_Self = TypeVar("_Self", bound="Engine")


class Engine(ABC):
    """One opened stage. Use it as a context manager, or call :meth:`close`.

    Attributes:
        inputs: what :meth:`run` must be fed; a string in a shape is a dynamic dimension, equal
            wherever it recurs.
        outputs: what :meth:`run` returns.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the stage once.

        Args:
            feeds: one array for every input, of exactly its dtype. bfloat16 travels as the uint16
                of its bits.
            out: where to put the outputs, without a copy more than needed: for every one a writable
                C-contiguous array of exactly its dtype and shape, apart from the feeds. After an
                error, what these hold is undefined. None: new arrays.

        Returns:
            one array for every output, owned by the caller: those of ``out``, if given.

        Raises:
            EngineError: when the feeds or ``out`` do not fit, or the library fails.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Closing twice is allowed; running afterwards is an EngineError."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Check that ``feeds`` are just the arrays that ``inputs`` describe.

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
    """Check that ``out`` holds a place for just every one of ``outputs``.

    Args:
        dims: sizes of dynamic dimensions, from :func:`check_feeds`; one not known fits any size.

    Raises:
        EngineError: naming the first output that does not fit.
    """
    if out.keys() != (expected := {spec.name for spec in outputs}):
        raise EngineError(
            f"the engine returns {', '.join(sorted(expected))}, but there is room for "
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
                f"the engine returns {spec.name} as {spec.numpy_dtype} {shape}, but there is room "
                f"for {place.dtype} {place.shape}"
            )
        if not (place.flags.c_contiguous and place.flags.writeable):
            raise EngineError(f"the room for {spec.name} is not writable memory of one piece")
