"""How good a SAM's masks are, from one click an object.

Every object is clicked once, at the pixel farthest from its border; of the three masks
``SamPredictor`` returns, the one with the highest *predicted* IoU counts, and the best of the
three is given beside it. Samples come from held-out procedural scenes, from a photo, or from a
COCO annotation file (:mod:`exporters.coco`). The models run in PyTorch through
``segment_anything``'s own ``SamPredictor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from exporters.scenes import HELD_OUT, click_of, make_scene, objects_of


@dataclass(frozen=True)
class Sample:
    """An image uint8 [h, w, 3] and the masks bool [h, w] of the objects clicked in it."""

    image: np.ndarray
    masks: Sequence[np.ndarray]
    kind: str = ""


@dataclass(frozen=True)
class Score:
    """One row of the table: means over all objects."""

    miou: float  # of the mask with the highest predicted IoU
    best_of_three: float
    objects: int
    images: int
    by_kind: dict[str, float]


def held_out_scenes(count: int, size: int = 192, first: int = 0) -> Iterator[Sample]:
    """``count`` scenes never trained on, with every object of at least 0.35 % of the image."""
    for seed in range(HELD_OUT + first, HELD_OUT + first + count):
        scene = make_scene(seed, size)
        masks = [scene.labels == k for k in objects_of(scene.labels)]
        yield Sample(scene.image, masks, scene.kind)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def blurred(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian blur of an image uint8 [h, w, 3]; ``sigma`` counts pixels at a longest side of
    1024.
    """

    def blur(image: np.ndarray) -> np.ndarray:
        width = sigma * max(image.shape[:2]) / 1024
        smooth = ndimage.gaussian_filter(image.astype(np.float32), (width, width, 0))
        return np.clip(np.rint(smooth), 0, 255).astype(np.uint8)

    return blur


def predict_clicks(
    predictor: SamPredictor, clicks: np.ndarray, batch: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each click [n, 2] (x, y) on the image set: masks bool [3, h, w] and predicted IoU [3]."""
    coords = predictor.transform.apply_coords(clicks.astype(np.float64), predictor.original_size)
    points = torch.as_tensor(coords, dtype=torch.float32, device=predictor.device)[:, None]
    ones = torch.ones(len(points), 1, dtype=torch.int, device=predictor.device)
    for i in range(0, len(points), batch):
        masks, scores, _ = predictor.predict_torch(points[i : i + batch], ones[i : i + batch])
        yield from zip(masks.cpu().numpy(), scores.float().cpu().numpy(), strict=True)


def evaluate(
    sam: Sam,
    samples: Iterable[Sample],
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[], None] | None = None,
) -> Score:
    """Click every object of every sample once and score the answers.

    Args:
        prepare: changes the image (uint8 [h, w, 3]) before the model sees it, e.g. blurs it.
        progress: called after each image.
    """
    predictor = SamPredictor(sam)
    chosen: list[float] = []
    best: list[float] = []
    kinds: dict[str, list[float]] = {}
    images = 0
    for sample in samples:
        images += 1
        if sample.masks:
            predictor.set_image(prepare(sample.image) if prepare else sample.image)
            clicks = np.array([click_of(mask) for mask in sample.masks])
            answers = predict_clicks(predictor, clicks)
            for truth, (masks, scores) in zip(sample.masks, answers, strict=True):
                each = [iou(mask, truth) for mask in masks]
                chosen.append(each[int(scores.argmax())])
                best.append(max(each))
                kinds.setdefault(sample.kind, []).append(chosen[-1])
        if progress:
            progress()
    return Score(
        float(np.mean(chosen)) if chosen else float("nan"),
        float(np.mean(best)) if best else float("nan"),
        len(chosen),
        images,
        {k: float(np.mean(v)) for k, v in sorted(kinds.items()) if k},
    )
