"""Converts the weights of a stage to fp32, fp16 or bf16.

Matrices, tokens and attention take that type. Layer normalisations, softmax statistics, pixel
normalisation, the prompt encoder, the mask decoder's heads and all outputs of tail and decoder stay
in float32. :mod:`exporters.stages` places the casts.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from torch import nn

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
TENSOR_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("uint8", "int64", "bool", "float32", "float16", "bfloat16")
}
"""Types of a stage's tensors, by their names in :class:`engines.bundle.TensorSpec`."""

Stage = TypeVar("Stage", bound=nn.Module)


def cast(stage: Stage, precision: Precision) -> Stage:
    """A copy of ``stage`` whose weights have ``precision``, except in modules marked ``keep_fp32``.

    Weights that need no conversion are shared with the original.
    """
    return _cast(stage, TORCH_DTYPES[precision])


def _cast(module: Stage, dtype: torch.dtype) -> Stage:
    if getattr(module, "keep_fp32", False):
        dtype = torch.float32
    twin = copy.copy(module)
    twin._parameters = {
        name: None if p is None else nn.Parameter(_as(p.detach(), dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {
        name: None if b is None else _as(b, dtype) for name, b in module._buffers.items()
    }
    twin._modules = {
        name: None if m is None else _cast(m, dtype) for name, m in module._modules.items()
    }
    return twin


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
