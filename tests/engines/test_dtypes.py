from __future__ import annotations

import numpy as np
import pytest

from engines.dtypes import to_float32, to_stored


def test_every_bfloat16_survives_a_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(bits, "bfloat16")
    assert values.dtype == np.float32
    back = to_stored(values, "bfloat16")
    nan = np.isnan(values)
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    assert np.isnan(to_float32(back[nan], "bfloat16")).all()


def test_rounding_equals_pytorch_s() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    ties = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000
    near = np.concatenate([ties - 1, ties, ties + 1])
    values = np.concatenate([bits, near]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_stored(values, "bfloat16"), expected)
    back = torch.from_numpy(expected).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(to_float32(expected, "bfloat16"), back)


def test_a_tie_rounds_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    assert [hex(bits) for bits in to_stored(ties, "bfloat16")] == ["0x3f80", "0x3f82"]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_nan_stays_nan(bits: int) -> None:
    values = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(to_float32(to_stored(values, "bfloat16"), "bfloat16")).all()


def test_infinities_overflow_and_empty() -> None:
    values = np.array([np.inf, -np.inf, 3.4e38, 0.0, -0.0], np.float32)
    back = to_float32(to_stored(values, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(back, [np.inf, -np.inf, np.inf, 0, 0])
    assert np.signbit(back).tolist() == [False, True, False, False, True]
    assert to_stored(np.zeros((0, 3), np.float32), "bfloat16").shape == (0, 3)


def test_other_types_are_converted_by_numpy() -> None:
    values = np.array([[0.1, 70000.0]], np.float32)
    with np.errstate(over="ignore"):
        half = to_stored(values, "float16")
    assert half.dtype == np.float16
    assert np.isinf(half[0, 1])
    assert to_float32(half, "float16").dtype == np.float32
    assert to_stored(np.array([3]), "uint8").dtype == np.uint8
