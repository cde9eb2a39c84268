"""Measures a SAM's mask quality from clicks, boxes and corrective clicks.

Every object is clicked once, at the pixel farthest from its border. The mask of ``SamPredictor``
with the highest *predicted* IoU counts. The best of its three masks is reported too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from exporters.prompts import largest_error
from exporters.scenes import HELD_OUT, click_of, make_scene, objects_of

CORRECTIONS = 3
LARGE = 1 / 3  # of the picture


@dataclass(frozen=True)
class Sample:
    """An image uint8 [h, w, 3] and the masks bool [h, w] of the objects clicked in it."""

    image: np.ndarray
    masks: Sequence[np.ndarray]
    kind: str = ""


@dataclass(frozen=True)
class Score:
    """Means over all objects; None where nothing was measured."""

    miou: float  # one click: of the mask with the highest predicted IoU
    best_of_three: float
    box: float | None  # the tight box instead of the click
    corrected: dict[int, float]  # the click and so many corrective ones
    large: float | None  # one click, objects over a third of the picture
    large_objects: int
    iou_error: float  # one click: mean |predicted - true IoU| of that mask
    objects: int
    images: int
    by_kind: dict[str, float]


def held_out_scenes(
    count: int, size: int = 192, first: int = 0, kind: str | None = None
) -> Iterator[Sample]:
    """``count`` scenes never trained on, with every object of at least 0.35 % of the image.

    ``kind``: as for :func:`exporters.scenes.make_scene`.
    """
    for seed in range(HELD_OUT + first, HELD_OUT + first + count):
        scene = make_scene(seed, size, kind)
        masks = [scene.labels == k for k in objects_of(scene.labels)]
        yield Sample(scene.image, masks, scene.kind)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def blurred(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian blur of images uint8 [h, w, 3]; ``sigma`` in pixels of a longest side of 1024."""

    def blur(image: np.ndarray) -> np.ndarray:
        width = sigma * max(image.shape[:2]) / 1024
        smooth = ndimage.gaussian_filter(image.astype(np.float32), (width, width, 0))
        return np.clip(np.rint(smooth), 0, 255).astype(np.uint8)

    return blur


def predict(
    predictor: SamPredictor,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    logits: torch.Tensor | None = None,
    batch: int = 32,
) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """The three answers to each of n prompts on the image set.

    Args:
        points, labels: [n, k, 2] (x, y) and [n, k], 1 on the object and 0 beside it.
        boxes: [n, 4] (left, top, right, bottom). logits: f32 [n, 1, m, m], the mask prompts.

    Yields:
        Masks bool [3, h, w], predicted IoU [3] and low-resolution logits [3, m, m].
    """
    device, size = predictor.device, predictor.original_size
    coords = kinds = corners = None
    if points is not None:
        moved = predictor.transform.apply_coords(points.astype(np.float64), size)
        coords = torch.as_tensor(moved, dtype=torch.float32, device=device)
        kinds = torch.as_tensor(labels, dtype=torch.int, device=device)
    if boxes is not None:
        moved = predictor.transform.apply_boxes(boxes.astype(np.float64), size)
        corners = torch.as_tensor(moved, dtype=torch.float32, device=device)
    prompts = (coords, kinds, corners, logits)
    for i in range(0, max(len(p) for p in prompts if p is not None), batch):
        part = (None if p is None else p[i : i + batch] for p in prompts)
        masks, scores, low = predictor.predict_torch(*part)
        yield from zip(masks.cpu().numpy(), scores.float().cpu().numpy(), low, strict=True)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box (left, top, right, bottom) of ``mask`` (bool [h, w], not empty), in the
    coordinates of COCO: right and bottom lie one pixel after the last of the mask.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _corrected(
    predictor: SamPredictor,
    truths: Sequence[np.ndarray],
    clicks: np.ndarray,
    answers: list[tuple[np.ndarray, np.ndarray, torch.Tensor]],
) -> list[list[float]]:
    """IoU of every object after each corrective click, first all objects after one click.

    A click lies in the middle of the largest error of the mask chosen last, whose logits are the
    mask prompt; an object without error is clicked again where it was first.
    """
    points, labels = clicks[:, None], np.ones((len(clicks), 1), int)
    rounds = []
    for _ in range(CORRECTIONS):
        best = [(found[k], low[k]) for found, scores, low in answers for k in [scores.argmax()]]
        added = []
        for truth, click, (found, _) in zip(truths, clicks, best, strict=True):
            region, label = largest_error(found != truth, truth) or (None, 1)
            added.append((*(click if region is None else click_of(region)), label))
        points = np.concatenate([points, [[[x, y]] for x, y, _ in added]], 1)
        labels = np.concatenate([labels, [[label] for *_, label in added]], 1)
        logits = torch.stack([low for _, low in best])[:, None]
        answers = list(predict(predictor, points, labels, logits=logits))
        rounds.append(
            [
                iou(found[scores.argmax()], truth)
                for (found, scores, _), truth in zip(answers, truths, strict=True)
            ]
        )
    return rounds


def evaluate(
    sam: Sam,
    samples: Iterable[Sample],
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[], None] | None = None,
    all_prompts: bool = True,
) -> Score:
    """Prompt every object of every sample and score the answers.

    Args:
        prepare: changes the image (uint8 [h, w, 3]) before the model sees it, e.g. blurs it.
        progress: called after each image.
        all_prompts: boxes and corrective clicks as well as the one click.
    """
    predictor = SamPredictor(sam)
    chosen: list[float] = []
    best: list[float] = []
    boxes: list[float] = []
    large: list[float] = []
    errors: list[float] = []
    corrected: list[list[float]] = [[] for _ in range(CORRECTIONS)]
    kinds: dict[str, list[float]] = {}
    images = 0
    for sample in samples:
        images += 1
        truths = [mask for mask in sample.masks if mask.any()]
        if truths:
            predictor.set_image(prepare(sample.image) if prepare else sample.image)
            clicks = np.array([click_of(mask) for mask in truths])
            answers = list(predict(predictor, clicks[:, None], np.ones((len(clicks), 1), int)))
            for truth, (masks, scores, _) in zip(truths, answers, strict=True):
                each = [iou(mask, truth) for mask in masks]
                chosen.append(each[int(scores.argmax())])
                best.append(max(each))
                errors.append(abs(float(scores.max()) - chosen[-1]))
                kinds.setdefault(sample.kind, []).append(chosen[-1])
                if truth.mean() > LARGE:
                    large.append(chosen[-1])
            if all_prompts:
                found = predict(predictor, boxes=np.array([box_of(mask) for mask in truths]))
                for truth, (masks, scores, _) in zip(truths, found, strict=True):
                    boxes.append(iou(masks[scores.argmax()], truth))
                for row, more in zip(
                    corrected, _corrected(predictor, truths, clicks, answers), strict=True
                ):
                    row.extend(more)
        if progress:
            progress()
    return Score(
        miou=_mean(chosen),
        best_of_three=_mean(best),
        box=_mean(boxes) if boxes else None,
        corrected={n: _mean(row) for n, row in enumerate(corrected, 1) if row},
        large=_mean(large) if large else None,
        large_objects=len(large),
        iou_error=_mean(errors),
        objects=len(chosen),
        images=images,
        by_kind={k: _mean(v) for k, v in sorted(kinds.items()) if k},
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
