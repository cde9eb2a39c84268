"""Small SAMs in which every weight matters, and the results of the unchanged upstream modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engines.windows import Windows
from exporters.measure import randomise
from exporters.models import MODELS, ModelSpec, build_from_spec, reorder
from exporters.stages import geometry_of, to_windows

SMALL = {"depth": 5, "dim": 48, "heads": 2, "global_blocks": (1, 4), "out_chans": 32}
DECODER = {"decoder_mlp": 64, "iou_hidden": 32}
SPECS: dict[str, ModelSpec] = {
    # The geometries of the shipped and the published models, with reduced width and depth.
    "tiny": replace(MODELS["tiny"], **SMALL, **DECODER),
    "vit_b": replace(MODELS["vit_b"], **SMALL, **DECODER),
    # No grid padding: 20 tokens are four windows of five.
    "even": replace(MODELS["tiny"], image_size=160, **SMALL, **DECODER),
}


def make_sam(spec: ModelSpec, order: str = "reordered") -> Any:
    torch.manual_seed(0)
    sam = randomise(build_from_spec(spec), seed=1).requires_grad_(False)
    return reorder(sam) if order == "reordered" else sam


def sizes(geometry: Any) -> dict[str, tuple[int, int]]:
    """(h, w) of images that cause every kind of padding."""
    s, p, w = geometry.image_size, geometry.patch_size, geometry.window_pixels
    return {
        "square": (s, s),
        "ends inside a patch": (s - p - p // 2 + 1, s),
        "ends at a patch": (2 * w + p, s),
        "ends at a window": (2 * w, s),
        "one pixel into a window": (s, 2 * w + 1),
        "portrait strip": (s, w // 2 + 3),
        "one row of pixels": (1, s),
    }


CASES = [
    "square",
    "ends inside a patch",
    "ends at a patch",
    "ends at a window",
    "one pixel into a window",
    "portrait strip",
    "one row of pixels",
]


def make_image(sam: Any, case: str) -> np.ndarray:
    height, width = sizes(geometry_of(sam))[case]
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)


@torch.no_grad()
def upstream(sam: Any, image: np.ndarray, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's tokens [windows, t, c] after the given number of blocks, and its embedding."""
    encoder = sam.image_encoder
    square = sam.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    x = encoder.patch_embed(square) + encoder.pos_embed
    for index, block in enumerate(encoder.blocks):
        if index == after:
            tokens = x
        x = block(x)
    return to_windows(tokens[0], geometry_of(sam)), encoder.neck(x.permute(0, 3, 1, 2))


def as_tensors(windows: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(windows.pixels),
        torch.from_numpy(windows.extent),
        torch.from_numpy(windows.window),
    )
