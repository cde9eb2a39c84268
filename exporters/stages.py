"""The stages of a split SAM as PyTorch modules: head, stack, tail, encoder, decoder.

Each module holds weights of a ``segment_anything`` model and computes the same function, with each
window on its own and with normalisation, position and padding inside. Tensors are token-major
(``[..., tokens, channels]``), tokens row by row.
"""

# There are two kinds of padding. Image padding lies inside SAM's square but outside the image: SAM
# pads with zeros after normalisation, so ``extent`` says how many rows and columns of a window hold
# image, and the rest is set to zero after normalisation. Grid padding are the tokens that fill up
# the last windows of a grid that is not a multiple of the window: SAM adds them as zeros after each
# block's first norm, and through the biases they act as keys and values.
#
# A layer computes in the type of its weights. Normalisations, softmax statistics and the prompt
# encoder always stay in float32.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Attention as SamAttention
from segment_anything.modeling.image_encoder import Block as SamBlock
from segment_anything.modeling.image_encoder import get_rel_pos
from segment_anything.modeling.mask_decoder import MLP as SamMlp
from segment_anything.modeling.transformer import Attention as SamDecoderAttention
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from engines.geometry import Geometry

from .models import is_window_block


def geometry_of(sam: Sam) -> Geometry:
    """The geometry of ``sam``, read from its modules."""
    encoder = sam.image_encoder
    return Geometry(
        image_size=encoder.img_size,
        patch_size=encoder.patch_embed.proj.kernel_size[0],
        window_size=next(b.window_size for b in encoder.blocks if is_window_block(b)),
        embed_dim=encoder.patch_embed.proj.out_channels,
        out_chans=encoder.neck[0].out_channels,
    )


def valid_tokens(geometry: Geometry) -> Tensor:
    """bool [windows, t, 1]: tokens inside the grid; the others are grid padding."""
    valid = torch.zeros(geometry.windows, geometry.window_size, geometry.window_size, 1).bool()
    for index in range(geometry.windows):
        rows, cols = geometry.valid_tokens(index)
        valid[index, :rows, :cols] = True
    return valid.flatten(1, 2)


def to_windows(grid: Tensor, geometry: Geometry) -> Tensor:
    """Tokens of the whole grid [g, g, c] as windows [windows, t, c], grid padding 0."""
    side, n, g = geometry.window_size, geometry.windows_per_side, geometry.grid
    padding = n * side - g
    x = F.pad(grid, (0, 0, 0, padding, 0, padding))
    x = x.reshape(n, side, n, side, -1).transpose(1, 2)
    return x.reshape(n * n, side * side, -1)


def from_windows(windows: Tensor, geometry: Geometry) -> Tensor:
    """Tokens of windows [windows, t, c] as the whole grid [g, g, c]; grid padding is dropped."""
    side, n, g = geometry.window_size, geometry.windows_per_side, geometry.grid
    x = windows.reshape(n, n, side, side, -1).transpose(1, 2)
    return x.reshape(n * side, n * side, -1)[:g, :g]


class Norm(nn.Module):
    """Layer normalisation over channels, for SAM's ``LayerNorm`` and ``LayerNorm2d``.

    It takes any float type and returns float32.
    """

    keep_fp32 = True

    def __init__(self, norm: nn.LayerNorm | LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)


class TokenLinear(nn.Module):
    """A linear map of channels whose weights were a convolution's: ``weight`` [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without scaling; q, k, v and the result are [n, heads, tokens, width].

    It is exported as one ``Attention`` of opset 23. Fused kernels keep softmax statistics in
    float32; the attribute ``softmax_precision`` stays unset because TensorRT's parser refuses it.
    """
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


class Attention(nn.Module):
    """SAM's attention with decomposed relative position, folded into plain attention.

    With ``q' = [q * scale, q Rh^T, q Rw^T]`` and ``k' = [k, onehot(row), onehot(column)]`` the
    product ``q' k'^T`` equals SAM's biased logits, without a bias of tokens x tokens. The width is
    rounded up to a multiple of 8 with zeros, and v is padded to the same width: fused kernels ask
    for both.
    """

    rel_h: Tensor  # [side, head_dim, side], by the query's row
    rel_w: Tensor  # [side, head_dim, side + spare], by the query's column
    places: Tensor  # [tokens, 2 * side + spare], one-hot row and column of a key

    def __init__(self, attention: SamAttention, side: int) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.heads, self.scale, self.side = attention.num_heads, attention.scale, side
        self.head_dim = attention.proj.in_features // attention.num_heads
        self.width = -(-(self.head_dim + 2 * side) // 8) * 8
        spare = self.width - self.head_dim - 2 * side
        place = torch.arange(side * side)
        rows, cols = F.one_hot(place // side, side), F.one_hot(place % side, side)
        rel_h = get_rel_pos(side, side, attention.rel_pos_h.detach()).transpose(1, 2)
        rel_w = get_rel_pos(side, side, attention.rel_pos_w.detach()).transpose(1, 2)
        self.register_buffer("rel_h", rel_h.contiguous())
        self.register_buffer("rel_w", F.pad(rel_w, (0, spare)).contiguous())
        self.register_buffer("places", F.pad(torch.cat([rows, cols], 1), (0, spare)).float())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, side * side, c] of squares of side x side tokens to the same shape."""
        return self.proj(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        """The attention between its two linear maps: [n, side * side, 3 * c] to [..., c]."""
        heads, side, tokens = self.heads, self.side, self.side**2
        n = qkv.shape[0]
        qkv = qkv.reshape(n, tokens, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        by_row = q.reshape(n, heads, side, side, self.head_dim)
        rel_h = (by_row @ self.rel_h).reshape(n, heads, tokens, side)
        rel_w = (by_row.transpose(2, 3) @ self.rel_w).transpose(2, 3)
        rel_w = rel_w.reshape(n, heads, tokens, self.rel_w.shape[2])
        q = torch.cat([q * self.scale, rel_h, rel_w], -1)
        k = torch.cat([k, self.places.expand(n, heads, -1, -1)], -1)
        v = F.pad(v, (0, self.width - self.head_dim))
        out = attend(q, k, v)[..., : self.head_dim]
        return out.transpose(1, 2).reshape(n, tokens, heads * self.head_dim)


class Block(nn.Module):
    """One transformer block on squares of tokens [n, side * side, c]."""

    def __init__(self, block: SamBlock, side: int) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(block.norm1), Attention(block.attn, side)
        self.norm2, self.mlp = Norm(block.norm2), block.mlp

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid`` bool [n, t, 1] marks tokens inside the grid; None where all are."""
        y = self.norm1(x).to(x.dtype)
        if valid is not None:  # select: multiplying by zero would turn an Inf into NaN
            y = torch.where(valid, y, torch.zeros((), dtype=y.dtype))
        x = x + self.attn(y)
        return x + self.mlp(self.norm2(x).to(x.dtype))


class Normalise(nn.Module):
    """Pixels to SAM's normalised input, zero in image padding; float32."""

    keep_fp32 = True
    mean: Tensor  # [3]
    std: Tensor  # [3]
    place: Tensor  # int64 [w], 0 to w - 1

    def __init__(self, sam: Sam, geometry: Geometry) -> None:
        super().__init__()
        self.register_buffer("mean", sam.pixel_mean.reshape(3).clone())
        self.register_buffer("std", sam.pixel_std.reshape(3).clone())
        self.register_buffer("place", torch.arange(geometry.window_pixels))

    def forward(self, pixels: Tensor, extent: Tensor) -> Tensor:
        """uint8 [n, w, w, 3] and int64 [n, 2] to float32 [n, w, w, 3]."""
        inside = (self.place < extent[:, :1])[:, :, None] & (self.place < extent[:, 1:])[:, None]
        x = (pixels.float() - self.mean) / self.std
        return torch.where(inside[..., None], x, torch.zeros(()))


class Embed(nn.Module):
    """Patch embedding of windows, without the position: pixels and extent to tokens [n, t, c]."""

    def __init__(self, sam: Sam, geometry: Geometry) -> None:
        super().__init__()
        conv = sam.image_encoder.patch_embed.proj
        self.side, self.patch = geometry.window_size, geometry.patch_size
        self.normalise = Normalise(sam, geometry)
        self.proj = TokenLinear(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)

    def forward(self, pixels: Tensor, extent: Tensor) -> Tensor:
        side, patch, n = self.side, self.patch, pixels.shape[0]
        x = self.normalise(pixels, extent)
        x = x.reshape(n, side, patch, side, patch, 3).transpose(2, 3)
        x = x.reshape(n, side * side, patch * patch * 3)
        return self.proj(x.to(self.proj.weight.dtype))


def positions(encoder: ImageEncoderViT, geometry: Geometry) -> Tensor:
    """Position embedding by window [windows, t, c]; 0 at grid padding."""
    return to_windows(encoder.pos_embed.detach()[0], geometry)


class Stack(nn.Module):
    """Window blocks, each window on its own.

    With ``pixels``: (pixels uint8 [n, w, w, 3], extent int64 [n, 2], window int64 [n]) to tokens
    [n, t, c].
    Without: (hidden [n, t, c], window int64 [n]) to tokens [n, t, c]. Grid padding comes out as 0.
    """

    positions: Tensor  # [windows, t, c]
    valid: Tensor  # bool [windows, t, 1]

    def __init__(self, sam: Sam, blocks: Iterable[SamBlock], pixels: bool) -> None:
        super().__init__()
        geometry = geometry_of(sam)
        self.embed = Embed(sam, geometry) if pixels else None
        if pixels:
            self.register_buffer("positions", positions(sam.image_encoder, geometry))
        self.blocks = nn.ModuleList(Block(b, geometry.window_size) for b in blocks)
        self.register_buffer("valid", valid_tokens(geometry))

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.embed is None:
            x, window = inputs
        else:
            pixels, extent, window = inputs
            x = self.embed(pixels, extent) + self.positions.index_select(0, window)
        valid = self.valid.index_select(0, window)
        for block in self.blocks:
            x = block(x, valid)
        return torch.where(valid, x, torch.zeros((), dtype=x.dtype))


def window_blocks(encoder: ImageEncoderViT) -> list[SamBlock]:
    """The encoder's window blocks, in order."""
    return [b for b in encoder.blocks if is_window_block(b)]


def make_head(sam: Sam, head_blocks: int) -> Stack:
    """The part on the edge: patch embedding and the first ``head_blocks`` window blocks."""
    return Stack(sam, window_blocks(sam.image_encoder)[:head_blocks], pixels=True)


def make_stack(sam: Sam, head_blocks: int | None) -> Stack:
    """The part on nodes: all window blocks, or those after the head's."""
    return Stack(sam, window_blocks(sam.image_encoder)[head_blocks or 0 :], head_blocks is None)


class Neck(nn.Module):
    """Tokens of the grid [1, g * g, c] to SAM's image embedding, float32 [1, d, g, g]."""

    def __init__(self, neck: Iterable[Any], grid: int) -> None:
        super().__init__()
        first, norm1, conv, norm2 = neck
        self.grid, self.lin = grid, TokenLinear(first.weight.flatten(1), None)
        self.norm1, self.conv, self.norm2 = Norm(norm1), conv, Norm(norm2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.lin(x)).to(x.dtype).reshape(1, self.grid, self.grid, -1)
        y = self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm2(y).permute(0, 3, 1, 2)


class Tail(nn.Module):
    """Global blocks and neck: (tokens [windows, t, c], present bool [windows]) to embedding
    float32 [1, d, g, g].

    A window that is not present lies wholly in image padding. Its tokens depend only on its index
    and are stored here; its rows in ``tokens`` are ignored.
    """

    absent: Tensor  # [windows, t, c]

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.geometry = geometry_of(sam)
        encoder = sam.image_encoder
        self.blocks = nn.ModuleList(
            Block(b, self.geometry.grid) for b in encoder.blocks if not is_window_block(b)
        )
        self.neck = Neck(encoder.neck, self.geometry.grid)
        self.register_buffer("absent", padding_tokens(sam))

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        x = torch.where(present[:, None, None], tokens, self.absent)
        x = from_windows(x, self.geometry).reshape(1, self.geometry.grid**2, -1)
        for block in self.blocks:
            x = block(x)
        return self.neck(x)


@torch.no_grad()
def padding_tokens(sam: Sam) -> Tensor:
    """Tokens [windows, t, c] that the whole stack gives for windows wholly in image padding."""
    geometry = geometry_of(sam)
    stack = make_stack(sam, None)
    side = geometry.window_pixels
    pixels, extent = torch.zeros(1, side, side, 3, dtype=torch.uint8), torch.zeros(1, 2).long()
    return torch.cat([stack(pixels, extent, torch.tensor([i])) for i in range(geometry.windows)])


class Encoder(nn.Module):
    """The whole encoder with its blocks in the model's own order, for one device.

    (pixels uint8 [windows, w, w, 3], extent int64 [windows, 2]), all windows in index order, to
    embedding float32 [1, d, g, g].
    """

    positions: Tensor  # [windows, t, c]
    valid: Tensor  # bool [windows, t, 1]

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.geometry = geometry_of(sam)
        encoder = sam.image_encoder
        self.embed = Embed(sam, self.geometry)
        self.kinds = [is_window_block(b) for b in encoder.blocks]
        self.blocks = nn.ModuleList(
            Block(b, self.geometry.window_size if kind else self.geometry.grid)
            for b, kind in zip(encoder.blocks, self.kinds, strict=True)
        )
        self.neck = Neck(encoder.neck, self.geometry.grid)
        self.register_buffer("positions", positions(encoder, self.geometry))
        self.register_buffer("valid", valid_tokens(self.geometry))

    def forward(self, pixels: Tensor, extent: Tensor) -> Tensor:
        g = self.geometry.grid
        x = self.embed(pixels, extent) + self.positions
        in_windows = True
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            if kind and not in_windows:
                x = to_windows(x.reshape(g, g, -1), self.geometry)
            elif in_windows and not kind:
                x = from_windows(x, self.geometry).reshape(1, g * g, -1)
            in_windows = kind
            x = block(x, self.valid) if kind else block(x)
        if in_windows:
            x = from_windows(x, self.geometry).reshape(1, g * g, -1)
        return self.neck(x)


class Prompts(nn.Module):
    """SAM's prompt encoder with selections instead of indexed writes; float32.

    (point_coords [p, k, 2] in pixels of the square, point_labels [p, k], mask_input [p, 1, 4g,
    4g], has_mask_input [p]) to sparse [p, k, d] and dense [p, g * g, d]. Labels: 1 foreground, 0
    background, 2 and 3 the corners of a box, -1 no point.
    """

    keep_fp32 = True
    gaussian: Tensor  # [2, d / 2]
    labelled: Tensor  # [5, d], what a point of label -1, 0, 1, 2, 3 adds
    no_mask: Tensor  # [1, d]

    def __init__(self, prompts: PromptEncoder, image_size: int) -> None:
        super().__init__()
        self.image_size, self.grid = image_size, prompts.image_embedding_size[0]
        self.register_buffer(
            "gaussian", prompts.pe_layer.positional_encoding_gaussian_matrix.detach()
        )
        labelled = [prompts.not_a_point_embed, *prompts.point_embeddings]
        self.register_buffer("labelled", torch.cat([e.weight.detach() for e in labelled]))
        down = prompts.mask_downscaling
        self.down1 = TokenLinear(down[0].weight.flatten(1), down[0].bias)
        self.norm1, self.act = Norm(down[1]), down[2]
        self.down2 = TokenLinear(down[3].weight.permute(0, 2, 3, 1).flatten(1), down[3].bias)
        self.norm2 = Norm(down[4])
        self.lift = TokenLinear(down[6].weight.flatten(1), down[6].bias)
        self.register_buffer("no_mask", prompts.no_mask_embed.weight.detach())

    def encode(self, unit: Tensor) -> Tensor:
        """Positions [..., 2] in 0..1 (x, y) to their random Fourier features [..., d]."""
        angles = 2 * torch.pi * ((2 * unit - 1) @ self.gaussian)
        return torch.cat([torch.sin(angles), torch.cos(angles)], -1)

    def grid_encoding(self) -> Tensor:
        """Encoding of the centres of all grid cells [1, g * g, d]."""
        centres = (torch.arange(self.grid) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.encode(torch.stack([x, y], -1)).reshape(1, self.grid**2, -1)

    def forward(
        self, coords: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        points = self.encode((coords + 0.5) / self.image_size)
        labels = labels[..., None]
        sparse = torch.where(labels == -1, torch.zeros(()), points)
        for index in range(len(self.labelled)):
            sparse = sparse + torch.where(
                labels == index - 1, self.labelled[index], torch.zeros(())
            )
        p, g = mask.shape[0], self.grid
        # Mask pixels of a cell: rows (a, b), columns (c, d); the first convolution merges b, d.
        x = mask.reshape(p, g, 2, 2, g, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        x = self.act(self.norm1(self.down1(x.reshape(p, g * g, 4, 4))))
        x = self.act(self.norm2(self.down2(x.reshape(p, g * g, -1))))
        dense = torch.where(has_mask[:, None, None] > 0.5, self.lift(x), self.no_mask)
        return sparse, dense


class DecoderAttention(nn.Module):
    """Attention of the mask decoder, written out, with softmax in float32.

    Its logits are small (a few prompt tokens on one side), so fusing gains nothing.
    """

    def __init__(self, attention: SamDecoderAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj
        self.heads, self.inner = attention.num_heads, attention.internal_dim
        self.scale = (self.inner // self.heads) ** -0.5

    def split(self, x: Tensor) -> Tensor:
        """[b, tokens, inner] to [b, heads, tokens, head_dim]."""
        x = x.reshape(x.shape[0], x.shape[1], self.heads, self.inner // self.heads)
        return x.transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(q)), self.split(self.k_proj(k)), self.split(self.v_proj(v))
        logits = (q * self.scale) @ k.transpose(2, 3)
        out = (torch.softmax(logits.float(), -1).to(v.dtype) @ v).transpose(1, 2)
        return self.out_proj(out.reshape(out.shape[0], out.shape[1], self.inner))


class DecoderBlock(nn.Module):
    """Prompt tokens and image tokens attending to one another, once."""

    def __init__(self, block: TwoWayAttentionBlock) -> None:
        super().__init__()
        self.first = block.skip_first_layer_pe
        self.self_attn = DecoderAttention(block.self_attn)
        self.to_image = DecoderAttention(block.cross_attn_token_to_image)
        self.to_tokens = DecoderAttention(block.cross_attn_image_to_token)
        self.mlp = block.mlp
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.norm3, self.norm4 = Norm(block.norm3), Norm(block.norm4)

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = queries.dtype
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries).to(dtype)
        queries = queries + self.to_image(queries + query_pe, keys + key_pe, keys)
        queries = self.norm2(queries).to(dtype)
        queries = self.norm3(queries + self.mlp(queries)).to(dtype)
        keys = keys + self.to_tokens(keys + key_pe, queries + query_pe, queries)
        return queries, self.norm4(keys).to(dtype)


class Fp32Mlp(nn.Module):
    """One of the decoder's small heads, in float32: its output decides masks and their ranking."""

    keep_fp32 = True

    def __init__(self, mlp: SamMlp) -> None:
        super().__init__()
        self.layers: nn.ModuleList = mlp.layers

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Upscale(nn.Module):
    """Image tokens [p, g * g, d] to four times the resolution, float32 [p, g * g, 4, 4, d / 8].

    A transposed convolution of kernel and stride 2 is a linear map of each token to its four
    children. Axes 2 and 3 number the children of the first and the second step, row by row.
    """

    def __init__(self, upscaling: Iterable[Any]) -> None:
        super().__init__()
        first, norm, act, second, _ = upscaling
        self.act = act
        self.up1 = TokenLinear(first.weight.permute(2, 3, 1, 0).flatten(0, 2), first.bias.repeat(4))
        self.norm = Norm(norm)
        self.up2 = TokenLinear(
            second.weight.permute(2, 3, 1, 0).flatten(0, 2), second.bias.repeat(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        p, tokens = x.shape[0], x.shape[1]
        y = self.up1(x).reshape(p, tokens, 4, -1)
        y = self.act(self.norm(y)).to(x.dtype)
        return self.act(self.up2(y).float()).reshape(p, tokens, 4, 4, -1)


class Decoder(nn.Module):
    """Prompt encoder and mask decoder, all four masks returned.

    (embedding float32 [1, d, g, g], point_coords [p, k, 2], point_labels [p, k],
    mask_input [p, 1, 4g, 4g], has_mask_input [p]) to low_res_logits float32 [p, 4, 4g, 4g] and
    iou float32 [p, 4]. k may be 0.
    """

    image_pe: Tensor  # [1, g * g, d]
    output_tokens: Tensor  # [1, 5, d], the IoU token and four mask tokens

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        decoder: MaskDecoder = sam.mask_decoder
        self.prompts = Prompts(sam.prompt_encoder, sam.image_encoder.img_size)
        self.register_buffer("image_pe", self.prompts.grid_encoding())
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).detach()
        self.register_buffer("output_tokens", output[None])
        transformer = decoder.transformer
        self.blocks = nn.ModuleList(DecoderBlock(b) for b in transformer.layers)
        self.final = DecoderAttention(transformer.final_attn_token_to_image)
        self.final_norm = Norm(transformer.norm_final_attn)
        self.upscale = Upscale(decoder.output_upscaling)
        self.hyper = nn.ModuleList(Fp32Mlp(m) for m in decoder.output_hypernetworks_mlps)
        self.iou = Fp32Mlp(decoder.iou_prediction_head)

    def forward(
        self, embedding: Tensor, coords: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        p, g = mask.shape[0], embedding.shape[-1]
        dtype = self.output_tokens.dtype
        sparse, dense = self.prompts(coords, labels, mask, has_mask)
        tokens = torch.cat([self.output_tokens.expand(p, -1, -1), sparse.to(dtype)], 1)
        keys = (embedding.flatten(2).transpose(1, 2) + dense).to(dtype)
        queries = tokens
        for block in self.blocks:
            queries, keys = block(queries, keys, tokens, self.image_pe)
        queries = queries + self.final(queries + tokens, keys + self.image_pe, keys)
        queries = self.final_norm(queries)
        masks = torch.stack([mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.hyper)], 2)
        upscaled = self.upscale(keys)  # [p, g * g, 4, 4, d / 8]
        logits = upscaled.reshape(p, g * g * 16, -1) @ masks  # [p, g * g * 16, 4]
        logits = logits.reshape(p, g, g, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return logits.reshape(p, -1, 4 * g, 4 * g), self.iou(queries[:, 0])
