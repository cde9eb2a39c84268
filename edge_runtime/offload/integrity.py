"""Structural checks on a node's reply, before any of it reaches the tail.

Replies that pass have the stage's names, types and shapes, and every number is finite. A node that
returns plausible but wrong numbers is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_common.errors import ProtocolError
from engines.bundle import TensorSpec
from engines.dtypes import all_finite


def check_reply(
    outputs: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], windows: int
) -> None:
    """Refuse outputs that do not fit the stage and the number of windows.

    Args:
        outputs: what the node returned, leading dimension ``windows``.
        specs: the stage's outputs.
        windows: how many windows it was sent.

    Raises:
        ProtocolError: naming the first tensor that is wrong.
    """
    expected = {spec.name for spec in specs}
    if outputs.keys() != expected:
        raise ProtocolError(
            f"it returned tensors {', '.join(sorted(outputs)) or 'none'}; "
            f"expected {', '.join(sorted(expected))}"
        )
    for spec in specs:
        array = outputs[spec.name]
        shape = (windows, *spec.shape[1:])
        if array.dtype != spec.numpy_dtype or array.shape != shape:
            raise ProtocolError(
                f"it returned {spec.name} as {array.dtype} {list(array.shape)}; "
                f"expected {spec.numpy_dtype} {list(shape)}"
            )
        if not all_finite(array, spec.dtype):
            raise ProtocolError(f"it returned {spec.name} with numbers that are not finite")
