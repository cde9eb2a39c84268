"""Prompts of many objects at once, and the corrective clicks of SAM's interactive protocol.

A prompt is a row of points with labels: 1 a click on the object, 0 one beside it, 2 and 3 the
corners of a box, -1 no point. SAM adds a point of label -1 to every prompt without a box.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from exporters.scenes import click_of

POINT = (1, -1)
BOX = (2, 3)


def embed(encoder: PromptEncoder, coords: Tensor, labels: Tensor) -> Tensor:
    """Sparse embeddings f32 [n, k, d] of points [n, k, 2] (x, y in pixels) and labels [n, k].

    The same as upstream's ``PromptEncoder``, which can't mix boxes and points in one batch.
    """
    places = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
    table = torch.cat(
        [encoder.not_a_point_embed.weight, *(p.weight for p in encoder.point_embeddings)]
    )
    return places * (labels >= 0)[..., None] + table[labels + 1]


def largest_error(wrong: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, int] | None:
    """The largest connected region of ``wrong`` (bool [h, w]) and the click's label there.

    False negatives (label 1) and false positives (label 0) are separate regions. None where
    nothing is wrong.
    """
    best: tuple[np.ndarray, int] | None = None
    most = 0
    for label in (1, 0):
        regions, count = ndimage.label(wrong & (truth if label else ~truth))
        if count:
            sizes = np.bincount(regions.ravel())[1:]
            if sizes.max() > most:
                most, best = int(sizes.max()), (regions == 1 + sizes.argmax(), label)
    return best


def correction(
    wrong: np.ndarray, truth: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One click for each of n masks: points f64 [n, 2] (x, y) and labels int64 [n].

    ``wrong`` and ``truth`` are bool [n, h, w]. Half of the clicks lie in the middle of the largest
    error, half anywhere in it; a mask without error gets a click on the object.
    """
    points, labels = np.zeros((len(wrong), 2)), np.ones(len(wrong), np.int64)
    for i, (miss, mask) in enumerate(zip(wrong, truth, strict=True)):
        region, labels[i] = largest_error(miss, mask) or (mask, 1)
        if rng.random() < 0.5:
            points[i] = click_of(region)
        else:
            ys, xs = np.nonzero(region)
            at = int(rng.integers(len(ys))) if len(ys) else 0
            points[i] = (xs[at], ys[at]) if len(ys) else (0, 0)
    return points, labels
