"""A stack without grid padding, for windows known beforehand (the benchmark's ``pytorch-packed``).

A sixth of the tokens of SAM's 25 windows are grid padding: as keys and values they are constant
(the bias of the linear map), and their outputs are unused. So only tokens inside the grid are kept,
and windows are filled up only for the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .stages import Block, Stack


class PackedBlock(nn.Module):
    """One window block on the tokens inside the grid [v, c]."""

    inside: Tensor  # int64 [v], where in the windows each token lies
    source: Tensor  # int64 [n * t], which token lies at each place; any for grid padding
    valid: Tensor  # bool [n * t, 1]

    def __init__(self, block: Block, windows: int, inside: Tensor, source: Tensor, valid: Tensor):
        super().__init__()
        self.block, self.windows = block, windows
        self.register_buffer("inside", inside)
        self.register_buffer("source", source)
        self.register_buffer("valid", valid)

    def forward(self, x: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        qkv = attn.qkv(block.norm1(x).to(x.dtype))
        filled = torch.where(self.valid, qkv.index_select(0, self.source), attn.qkv.bias)
        mixed = attn.mix(filled.reshape(self.windows, -1, filled.shape[1])).flatten(0, 1)
        x = x + attn.proj(mixed.index_select(0, self.inside))
        return x + block.mlp(block.norm2(x).to(x.dtype))


class PackedStack(nn.Module):
    """``stack`` for the windows of these indices: (pixels, extent, window) to tokens [n, t, c].

    It computes the same function as :class:`exporters.stages.Stack`; ``window`` is ignored.
    """

    positions: Tensor  # [v, c]
    inside: Tensor  # int64 [v]

    def __init__(self, stack: Stack, window: Tensor) -> None:
        super().__init__()
        assert stack.embed is not None
        valid = stack.valid[window].flatten(0, 1)
        inside = valid[:, 0].nonzero()[:, 0]
        source = torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
        source[inside] = torch.arange(len(inside), device=valid.device)
        self.embed, self.windows = stack.embed, len(window)
        self.register_buffer("inside", inside)
        self.register_buffer("positions", stack.positions[window].flatten(0, 1)[inside])
        self.blocks = nn.ModuleList(
            PackedBlock(block, len(window), inside, source, valid)
            for block in stack.blocks
            if isinstance(block, Block)
        )
        self.tokens = len(valid)

    def forward(self, pixels: Tensor, extent: Tensor, window: Tensor) -> Tensor:
        x = self.embed(pixels, extent).flatten(0, 1).index_select(0, self.inside) + self.positions
        for block in self.blocks:
            x = block(x)
        out = x.new_zeros(self.tokens, x.shape[1]).index_copy(0, self.inside, x)
        return out.reshape(self.windows, -1, x.shape[1])
