"""The formulas compared with PyTorch's own counter, run over upstream's modules without any
data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.geometry import Geometry
from exporters import flops
from exporters.models import MODELS, build_sam, is_window_block, reorder


@pytest.fixture(scope="module", params=["tiny", "vit_b"])
def sam(request: pytest.FixtureRequest) -> Any:
    """Upstream's modules with window blocks first, on PyTorch's meta device, which holds only
    shapes."""
    with torch.device("meta"):
        return reorder(build_sam(request.param))


def counted(function: Any) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_stack_and_tail_equal_pytorch_s_count(sam: Any) -> None:
    spec, encoder = MODELS[sam.model_name], sam.image_encoder
    image = torch.empty(1, 3, spec.image_size, spec.image_size, device="meta")
    tokens = torch.empty(1, spec.grid, spec.grid, spec.dim, device="meta")

    def stack() -> None:
        x = encoder.patch_embed(image) + encoder.pos_embed
        for block in encoder.blocks:
            if is_window_block(block):
                x = block(x)

    def tail() -> None:
        x = tokens
        for block in encoder.blocks:
            if not is_window_block(block):
                x = block(x)
        encoder.neck(x.permute(0, 3, 1, 2))

    assert counted(stack) == flops.stack(spec, range(25))
    assert counted(tail) == flops.tail(spec)
    assert counted(lambda: encoder(image)) == flops.encoder(spec)


@pytest.mark.parametrize(("prompts", "points"), [(1, 2), (16, 2), (3, 5)])
def test_decoder_equals_pytorch_s_count(sam: Any, prompts: int, points: int) -> None:
    spec = MODELS[sam.model_name]
    embedding = torch.empty(1, spec.out_chans, spec.grid, spec.grid, device="meta")
    coords = torch.empty(prompts, points - 1, 2, device="meta")

    def decoder() -> None:
        # Points are encoded one layer down: indexing by labels would make shapes depend on data.
        prompt = sam.prompt_encoder
        prompt.pe_layer.forward_with_coords(
            torch.cat([coords, coords[:, :1]], 1), prompt.input_image_size
        )
        dense = prompt.no_mask_embed.weight.reshape(1, -1, 1, 1)
        sam.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=prompt.get_dense_pe(),
            sparse_prompt_embeddings=torch.empty(prompts, points, spec.out_chans),
            dense_prompt_embeddings=dense.expand(prompts, -1, spec.grid, spec.grid),
        )

    assert counted(decoder) == flops.decoder(spec, prompts, points)


def test_a_share_of_the_windows_counts_its_own_tokens() -> None:
    spec = MODELS["vit_b"]
    g = Geometry(spec.image_size, spec.patch_size, spec.window_size, spec.dim, spec.out_chans)
    inside, corner = flops.stack(spec, [0]), flops.stack(spec, [g.windows - 1])
    assert g.valid_tokens(0) == (14, 14)
    assert g.valid_tokens(24) == (8, 8)
    assert corner < inside
    assert sum(flops.stack(spec, [i]) for i in range(25)) == flops.stack(spec, range(25))
