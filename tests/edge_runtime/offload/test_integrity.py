"""Checks of the tensors that a node returns."""

from __future__ import annotations

import numpy as np
import pytest

from edge_common.errors import ProtocolError
from edge_runtime.offload.integrity import check_reply
from engines.bundle import TensorSpec

SPECS = (
    TensorSpec("tokens", "float16", ("n", 4, 8)),
    TensorSpec("scales", "bfloat16", ("n", 4)),
    TensorSpec("codes", "int8", ("n", 4)),
)


def good() -> dict[str, np.ndarray]:
    return {
        "tokens": np.ones((3, 4, 8), np.float16),
        "scales": np.full((3, 4), 0x3F80, np.uint16),  # 1.0
        "codes": np.full((3, 4), -128, np.int8),
    }


def test_a_correct_result_passes() -> None:
    check_reply(good(), SPECS, 3)
    extreme = good()
    extreme["tokens"][0, 0, 0] = np.finfo(np.float16).max
    extreme["scales"][0, 0] = 0x7F7F  # the largest finite bfloat16
    check_reply(extreme, SPECS, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_non_finite_number_is_refused(value: float) -> None:
    outputs = good()
    outputs["tokens"][2, 3, 7] = value
    with pytest.raises(ProtocolError, match=r"tokens.*not finite"):
        check_reply(outputs, SPECS, 3)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_bfloat16_is_checked_by_its_bit_pattern(bits: int) -> None:
    outputs = good()
    outputs["scales"][1, 1] = bits
    with pytest.raises(ProtocolError, match=r"scales.*not finite"):
        check_reply(outputs, SPECS, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": np.ones((2, 4, 8), np.float16)}, r"\[2, 4, 8\]; expected .*\[3, 4, 8\]"),
        ({"tokens": np.ones((3, 8, 4), np.float16)}, r"\[3, 8, 4\]"),
        ({"tokens": np.ones((3, 4, 8), np.float32)}, "float32"),
        ({"scales": np.ones((3, 4), np.float16)}, "expected uint16"),
        ({"extra": np.ones(3, np.int8)}, "extra"),
    ],
)
def test_tensors_of_other_names_types_or_shapes_are_refused(
    change: dict[str, np.ndarray], says: str
) -> None:
    with pytest.raises(ProtocolError, match=says):
        check_reply({**good(), **change}, SPECS, 3)


def test_a_missing_tensor_is_refused() -> None:
    outputs = good()
    del outputs["codes"]
    with pytest.raises(ProtocolError, match="expected codes"):
        check_reply(outputs, SPECS, 3)
