"""The number of floating-point operations of each stage, from the model's sizes.

Counted are multiplications and additions of matrix products and convolutions as
``segment_anything`` computes them. Elementwise work, the wider heads of the folded attention and
additional grid padding are left out, so that an engine gains nothing by computing more.
"""

from __future__ import annotations

from collections.abc import Iterable

from engines.geometry import Geometry

from .models import ModelSpec

_MLP_RATIO = 4
_OUTPUT_TOKENS, _MASKS = 5, 4
_HEAD_LAYERS = 2
_ATTENTION_DOWNSAMPLE = 2


def stack(spec: ModelSpec, windows: Iterable[int]) -> int:
    """Operations of patch embedding and all window blocks for the windows of these indices.

    Upstream's window attention computes whole windows, grid padding included; patch embedding and
    MLP compute the tokens of the grid only. With every window it is upstream's own count.
    """
    geometry = _geometry(spec)
    valid = [geometry.valid_tokens(index) for index in windows]
    count, inside = len(valid), sum(rows * cols for rows, cols in valid)
    block = count * _attention(spec, spec.window_size) + _mlp(spec, inside)
    return 2 * (_patches(spec, inside) + len(spec.window_blocks) * block)


def tail(spec: ModelSpec) -> int:
    """Operations of all global blocks and the neck."""
    tokens = spec.grid**2
    block = _attention(spec, spec.grid) + _mlp(spec, tokens)
    neck = tokens * spec.out_chans * (spec.dim + 9 * spec.out_chans)
    return 2 * (len(spec.global_blocks) * block + neck)


def encoder(spec: ModelSpec) -> int:
    """Operations of the whole image encoder; the order of its blocks makes no difference."""
    return stack(spec, range(_geometry(spec).windows)) + tail(spec)


def decoder(spec: ModelSpec, prompts: int, points: int) -> int:
    """Operations of prompt encoder and mask decoder.

    Args:
        spec: the model.
        prompts: how many; each is decoded on its own.
        points: points of each prompt, padding points counted; no mask is given.
    """
    d, image, tokens = spec.out_chans, spec.grid**2, _OUTPUT_TOKENS + points
    inner = d // _ATTENTION_DOWNSAMPLE
    to_self = tokens * 4 * d * d + 2 * tokens**2 * d
    # Projections of the attending side (queries and output) and of the attended (keys, values).
    across = 2 * (tokens + image) * d * inner + 2 * tokens * image * inner
    layer = to_self + 2 * across + 2 * tokens * d * spec.decoder_mlp
    upscale = image * d * d + 4 * image * (d // 4) * (d // 8) * 4
    hyper = _MASKS * (2 * d * d + d * (d // 8))
    masks = _MASKS * 16 * image * (d // 8)
    iou = spec.iou_hidden * (d + spec.iou_hidden + _MASKS)
    one = _HEAD_LAYERS * layer + across + upscale + hyper + masks + iou
    positions = (prompts * points + image) * d  # of points, and of the grid once: 2 x d/2 each
    return 2 * (prompts * one + positions)


def _geometry(spec: ModelSpec) -> Geometry:
    return Geometry(spec.image_size, spec.patch_size, spec.window_size, spec.dim, spec.out_chans)


def _patches(spec: ModelSpec, tokens: int) -> int:
    return tokens * 3 * spec.patch_size**2 * spec.dim


def _attention(spec: ModelSpec, side: int) -> int:
    """Multiply-adds of attention over one square of side x side tokens: qkv and output, relative
    rows and columns, logits and the sum over values.
    """
    tokens = side**2
    return tokens * spec.dim * (4 * spec.dim + 2 * side + 2 * tokens)


def _mlp(spec: ModelSpec, tokens: int) -> int:
    return tokens * 2 * _MLP_RATIO * spec.dim**2
