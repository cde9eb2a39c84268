"""Modules of ``segment_anything``, split like this project's stages: the benchmark's baseline.

Blocks, neck, prompt encoder and mask decoder are called as upstream calls them, on one image that
fills the square. In half precision all weights are converted but the prompt encoder's, which fails
in any type but float32.
"""

from __future__ import annotations

from segment_anything.modeling import Sam
from torch import Tensor, nn

from .models import is_window_block


class UpstreamStack(nn.Module):
    """Normalisation, patch embedding and window blocks: image [1, 3, s, s] to grid [1, g, g, c]."""

    mean: Tensor  # [3, 1, 1]
    std: Tensor  # [3, 1, 1]

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.clone())
        self.register_buffer("std", sam.pixel_std.clone())
        self.patch_embed, self.pos_embed = encoder.patch_embed, encoder.pos_embed
        self.blocks = nn.ModuleList(b for b in encoder.blocks if is_window_block(b))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed((image - self.mean) / self.std) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class UpstreamTail(nn.Module):
    """Global blocks and neck: grid [1, g, g, c] to embedding [1, d, g, g]."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        encoder = sam.image_encoder
        self.blocks = nn.ModuleList(b for b in encoder.blocks if not is_window_block(b))
        self.neck = encoder.neck

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class UpstreamEncoder(nn.Module):
    """The whole encoder, its blocks in the order ``sam`` has them: image to embedding."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.stack, self.tail = UpstreamStack(sam), UpstreamTail(sam)

    def forward(self, image: Tensor) -> Tensor:
        return self.tail(self.stack(image))


class UpstreamDecoder(nn.Module):
    """Prompt encoder and mask decoder for points: (embedding [1, d, g, g], coords [p, k, 2],
    labels [p, k]) to logits [p, 4, 4g, 4g] and scores [p, 4].

    The last point of each prompt must be the padding point (label -1), which upstream adds itself.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompts, self.masks = sam.prompt_encoder, sam.mask_decoder
        self.prompts.keep_fp32 = True  # read by exporters.precision.cast

    def forward(self, embedding: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.masks.iou_token.weight.dtype
        sparse, dense = self.prompts((coords[:, :-1], labels[:, :-1]), boxes=None, masks=None)
        return self.masks.predict_masks(
            image_embeddings=embedding.to(dtype),
            image_pe=self.prompts.get_dense_pe().to(dtype),
            sparse_prompt_embeddings=sparse.to(dtype),
            dense_prompt_embeddings=dense.to(dtype),
        )
