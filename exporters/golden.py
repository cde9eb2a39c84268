"""Golden samples: inputs of every stage with the outputs of the original model.

Export verifies every stage against such samples and stores one in the bundle, so that any machine
can repeat the check without PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from engines.bundle import Stage
from engines.dtypes import to_stored
from engines.geometry import Geometry
from engines.samples import Arrays, synthetic_image
from engines.windows import Windows, cut

from .models import is_window_block
from .stages import from_windows, geometry_of, to_windows


@dataclass(frozen=True)
class Sample:
    """One image through the original model.

    Attributes:
        windows: the image, cut.
        arrays: float32 (or the integer type fed), named ``stage.tensor`` for every input and
            output of every stage. Rows of ``head`` and ``stack`` are the windows present;
            ``tail.tokens`` holds every window, zeros where absent.
        blocks: tokens [windows, t, c] of every window where the model is split, by the number of
            blocks before.
    """

    windows: Windows
    arrays: Arrays
    blocks: dict[int, Tensor]

    def feeds(self, name: str, stage: Stage) -> Arrays:
        """The inputs of ``stage``, in the types that its engine takes."""
        return {s.name: to_stored(self.arrays[f"{name}.{s.name}"], s.dtype) for s in stage.inputs}

    def expected(self, name: str, stage: Stage) -> Arrays:
        """The reference's outputs of ``stage``, float32."""
        return {s.name: self.arrays[f"{name}.{s.name}"] for s in stage.outputs}


def sample_images(geometry: Geometry) -> list[np.ndarray]:
    """Two images, uint8 [h, w, 3], longest side as the model wants it.

    The first is a strip: most windows wholly in image padding, the rest ending inside a patch.
    The second is nearly square: every window present, the last row in both kinds of padding,
    again ending inside a patch.
    """
    size, patch = geometry.image_size, geometry.patch_size
    strip = size // 5 // patch * patch + patch // 2 + 1
    square = size - patch - patch // 2 + 1
    return [synthetic_image(h, size, seed) for seed, h in enumerate((strip, square))]


@torch.no_grad()
def make_sample(sam: Sam, image: np.ndarray, head_blocks: int | None = None) -> Sample:
    """Run the unchanged modules of ``sam`` on ``image`` and some prompts.

    Args:
        sam: stock order gives the arrays of ``encoder`` and ``decoder``; reordered those of
            ``stack``, ``tail``,
            ``decoder`` and, with ``head_blocks``, ``head``.
        image: uint8 [h, w, 3], longest side ``image_size``.
        head_blocks: blocks of the head; None when nodes get pixels.
    """
    geometry, encoder = geometry_of(sam), sam.image_encoder
    windows = cut(image, geometry)
    split = sum(is_window_block(b) for b in encoder.blocks) if sam.order == "reordered" else None
    blocks: dict[int, Tensor] = {}
    square = sam.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    x = encoder.patch_embed(square) + encoder.pos_embed
    for index in range(len(encoder.blocks) + 1):
        if index in (head_blocks, split):
            blocks[index] = to_windows(x[0], geometry)
        if index < len(encoder.blocks):
            x = encoder.blocks[index](x)
    embedding = encoder.neck(x.permute(0, 3, 1, 2))

    pixels = {"pixels": windows.pixels, "extent": windows.extent, "window": windows.window}
    arrays: Arrays = {}
    if split is None:
        for key in ("pixels", "extent"):
            rows = np.zeros((geometry.windows, *pixels[key].shape[1:]), pixels[key].dtype)
            rows[windows.window] = pixels[key]
            arrays[f"encoder.{key}"] = rows
        arrays["encoder.embedding"] = embedding.numpy()
    else:
        present = torch.from_numpy(windows.present)
        tokens = blocks[split]
        fed = pixels
        if head_blocks is not None:
            hidden = blocks[head_blocks][present].numpy()
            arrays.update({f"head.{k}": v for k, v in pixels.items()}, **{"head.hidden": hidden})
            fed = {"hidden": hidden, "window": windows.window}
        arrays.update({f"stack.{k}": v for k, v in fed.items()})
        arrays["stack.tokens"] = tokens[present].numpy()
        arrays["tail.tokens"] = torch.where(present[:, None, None], tokens, 0.0).numpy()
        arrays["tail.present"] = windows.present
        arrays["tail.embedding"] = embedding.numpy()
    arrays.update({f"decoder.{k}": v for k, v in decode_prompts(sam, embedding, windows).items()})
    return Sample(windows, arrays, blocks)


@torch.no_grad()
def finish(sam: Sam, tokens: Tensor, blocks_done: int) -> Tensor:
    """The original's embedding [1, d, g, g] of tokens [windows, t, c] after some blocks."""
    encoder = sam.image_encoder
    x = from_windows(tokens, geometry_of(sam))[None]
    for block in encoder.blocks[blocks_done:]:
        x = block(x)
    return encoder.neck(x.permute(0, 3, 1, 2))


@torch.no_grad()
def decode(sam: Sam, embedding: Tensor, prompts: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """The original decoder's outputs for the prompts of :func:`decode_prompts`, all four masks.

    The original takes points, boxes and masks separately and adds a padding point itself, so each
    prompt goes through its public interface alone.
    """
    logits, scores = [], []
    coords = torch.from_numpy(prompts["point_coords"])
    labels = torch.from_numpy(prompts["point_labels"])
    for i in range(len(coords)):
        box = labels[i] >= 2
        if box.any():
            keep, boxes = ~box, coords[i][box].reshape(1, 4)
        else:  # the last one is the padding point the original adds
            keep, boxes = torch.arange(len(box)) < len(box) - 1, None
        mask = torch.from_numpy(prompts["mask_input"][i : i + 1])
        sparse, dense = sam.prompt_encoder(
            points=(coords[i : i + 1, keep], labels[i : i + 1, keep]),
            boxes=boxes,
            masks=mask if prompts["has_mask_input"][i] else None,
        )
        low_res, iou = sam.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        logits.append(low_res)
        scores.append(iou)
    return torch.cat(logits), torch.cat(scores)


def decode_prompts(sam: Sam, embedding: Tensor, windows: Windows) -> Arrays:
    """A point; a point in a box; two points and a mask; with the original decoder's outputs."""
    geometry = geometry_of(sam)
    h, w = windows.size
    places = np.array(
        [
            [[0.4, 0.5], [0, 0], [0, 0]],
            [[0.6, 0.4], [0.3, 0.2], [0.8, 0.7]],
            [[0.5, 0.6], [0.9, 0.9], [0, 0]],
        ],
        np.float32,
    )
    arrays: Arrays = {
        "embedding": embedding.numpy(),
        "point_coords": places * np.array([w, h], np.float32),
        "point_labels": np.array([[1, -1, -1], [1, 2, 3], [1, 0, -1]], np.float32),
        "mask_input": np.zeros((3, 1, geometry.low_res, geometry.low_res), np.float32),
        "has_mask_input": np.array([0, 0, 1], np.float32),
    }
    first = {k: v[:1] for k, v in arrays.items()}
    arrays["mask_input"][2] = decode(sam, embedding, first)[0][0, :1].numpy()
    logits, iou = decode(sam, embedding, arrays)
    return {**arrays, "low_res_logits": logits.numpy(), "iou": iou.numpy()}


def write_sample(path: Path, sample: Sample, stages: Mapping[str, Stage]) -> None:
    """Store ``sample`` for ``stages``: inputs in the types they take, outputs in float32.

    ``decoder.embedding`` is left out: it equals the ``embedding`` of the stage before.
    """
    arrays: Arrays = {}
    for name, stage in stages.items():
        for tensors in (sample.feeds(name, stage), sample.expected(name, stage)):
            arrays.update({f"{name}.{tensor}": array for tensor, array in tensors.items()})
    arrays.pop("decoder.embedding", None)  # absent from a bundle for nodes
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
