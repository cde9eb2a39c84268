"""Turns the log of a training run into ``docs/results``: figures as data, curves, predicted masks.

Run it as ``python -m exporters.training_report RUN_DIR --out docs/results``. It needs matplotlib
and scikit-image, which ``make venv`` installs.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from edge_common.files import write_atomically

CONTOUR, MASK, CLICK = (255, 225, 0), (230, 40, 40), (40, 230, 60)


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of training steps and those of held-out scores; a step taken twice counts once."""
    steps: dict[int, dict[str, Any]] = {}
    scores: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "held_out" in row:
            scores[row["held_out"]["step"]] = row["held_out"]
        else:
            steps[row["step"]] = row
    return [steps[k] for k in sorted(steps)], [scores[k] for k in sorted(scores)]


def curves(steps: list[dict[str, Any]], scores: list[dict[str, Any]], out: Path) -> None:
    """Draw IoU of training batches and of held-out scenes by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    joint = [r for r in steps if "iou" in r]
    axes.plot([r["step"] for r in joint], [r["iou"] for r in joint], lw=0.8, label="batches")
    marks = [r["step"] for r in scores]
    axes.plot(marks, [r["scenes"] for r in scores], "o-", ms=3, label="held-out scenes")
    axes.plot(marks, [r["scenes_best"] for r in scores], "--", lw=1, label="best of three")
    for name, label in (("photo_like", "photo-like"), ("coins", "photo `coins`")):
        rows = [r for r in scores if name in r]
        if rows:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], "s-", ms=3, label=label)
    changes = [(b["step"], b["size"]) for a, b in pairwise(scores) if a["size"] != b["size"]]
    for step, size in changes:
        axes.axvline(step, color="0.7", lw=1)
        axes.text(step, 0.02, f" {size} px", color="0.4")
    axes.set(xlabel="step", ylabel="mean IoU, one click", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def masks_picture(sam: Any, out: Path, scenes: int = 6, clicks: int = 4) -> None:
    """Predicted masks (red), true outlines (yellow) and clicks (green) on scenes and the coins."""
    from segment_anything import SamPredictor

    from exporters.coins import coins
    from exporters.evaluate import held_out_scenes, predict
    from exporters.scenes import click_of

    predictor = SamPredictor(sam)

    def answer(image: np.ndarray, masks: list[np.ndarray]) -> list[np.ndarray]:
        predictor.set_image(image)
        points = np.array([click_of(m) for m in masks])
        panels = []
        ones = np.ones((len(points), 1), int)
        answers = predict(predictor, points[:, None], ones)
        for truth, (x, y), (found, scores, _) in zip(masks, points, answers, strict=True):
            panel = image.astype(np.float32)
            best = found[int(scores.argmax())]
            panel[best] = panel[best] * 0.45 + np.array(MASK) * 0.55
            panel[truth & ~ndimage.binary_erosion(truth)] = CONTOUR
            panel[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = CLICK
            panels.append(panel.astype(np.uint8))
        return panels

    rows = []
    for sample in held_out_scenes(scenes):
        panels = [sample.image, *answer(sample.image, list(sample.masks)[:clicks])]
        panels += [np.zeros_like(sample.image)] * (1 + clicks - len(panels))
        rows.append(np.concatenate(panels, 1))
    photo, reference = coins()
    panels = answer(photo, reference[::6][:4])
    strip = Image.fromarray(np.concatenate(panels, 1))
    width = rows[0].shape[1]
    rows.append(np.asarray(strip.resize((width, round(strip.height * width / strip.width)))))
    Image.fromarray(np.concatenate(rows)).save(out, quality=88)


def main() -> None:
    """Write ``training.json``, ``training.png`` and ``training-masks.jpg``."""
    from exporters.models import load_checkpoint, read_torch_file, shipped_weights, weights_hash

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--note", action="append", default=[], help="a line kept in the JSON")
    args = parser.parse_args()
    steps, scores = read_log(args.run / "log.jsonl")
    state = read_torch_file(args.run / "state.pt")
    adapted = load_checkpoint(shipped_weights("adapted"))
    losses = adapted.made.get("losses", [])
    report = {
        "command": f"python -m exporters.training_report {args.run.name}",
        "machine": "2-core x86-64 CPU (AMD EPYC), bfloat16, shared with other work",
        "notes": args.note,
        "config": state["config"],
        "seconds": round(state["seconds"]),
        "parameters": sum(p.numel() for p in adapted.parameters()),
        "weights_sha256": {
            "stock": weights_hash(load_checkpoint(shipped_weights("stock"))),
            "adapted": weights_hash(adapted),
        },
        "held_out": scores,
        "batches": steps,
        "adaptation": {
            "command": adapted.made.get("command"),
            "relative_error": [
                {"step": i + 1, "error": round(float(np.mean(losses[max(0, i - 9) : i + 1])), 5)}
                for i in range(9, len(losses), 10)
            ],
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    write_atomically(args.out / "training.json", text + "\n")
    curves(steps, scores, args.out / "training.png")
    masks_picture(adapted, args.out / "training-masks.jpg")
    print(f"{args.out}/training.json, training.png, training-masks.jpg")


if __name__ == "__main__":
    main()
