"""The packed stack computes the same as the stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_sams import CASES, as_tensors

from exporters import stages
from exporters.packed_stack import PackedStack
from exporters.precision import cast


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_the_stack(sam: Any, example: Callable[..., Any], case: str) -> None:
    after = len(stages.window_blocks(sam.image_encoder))
    windows, tokens, _ = example(sam, case, after)
    stack = stages.make_stack(sam, None)
    fed = as_tensors(windows)
    with torch.no_grad():
        got = PackedStack(stack, fed[2])(*fed)
        torch.testing.assert_close(got, stack(*fed), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, tokens[windows.present], rtol=1e-4, atol=1e-4)


def test_the_packed_stack_computes_only_tokens_of_the_grid(tiny_sam: Any) -> None:
    geometry = stages.geometry_of(tiny_sam)
    every = torch.arange(geometry.windows)
    packed = PackedStack(stages.make_stack(tiny_sam, None), every)
    assert len(packed.inside) == geometry.grid**2
    assert len(packed.inside) < geometry.windows * geometry.tokens_per_window


def test_the_packed_stack_can_be_cast_like_a_stage(
    tiny_sam: Any, example: Callable[..., Any]
) -> None:
    after = len(stages.window_blocks(tiny_sam.image_encoder))
    windows, tokens, _ = example(tiny_sam, "square", after)
    fed = as_tensors(windows)
    packed = cast(PackedStack(stages.make_stack(tiny_sam, None), fed[2]), "bf16")
    with torch.no_grad():
        got = packed(*fed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), tokens[windows.present], rtol=0.1, atol=0.1)
