"""``edge-runtime evaluate``: the table of mask quality."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_common.options import COUNT, THREADS
from exporters.path_checks import DEVICE_HELP, check_checkpoint_file

if TYPE_CHECKING:
    from edge_common.progress import Progress

BLURS = (4, 8, 16)  # sigma in pixels of an image whose longest side is 1024
_HEADS = ("box", "+1", "+3", "large", "error")

_DESCRIPTION = """\
Measure masks: stock order, reordered without adaptation, reordered and adapted, and the adapted
model on blurred input (Gaussian, sigma 4, 8 and 16 pixels at 1024, scaled to each image). All
figures are means over the objects, each of the mask with the highest predicted IoU:

  click      IoU after one click, at the pixel farthest from the object's border
  best of 3  the same for the best of the three masks returned
  box        IoU with the tight box instead of the click
  +1, +3     IoU after so many further clicks, each in the middle of the largest error, with the
             last logits as mask prompt
  large      IoU after one click, objects over a third of the picture only
  error      predicted against true IoU after one click, mean absolute difference

Without options it scores the shipped `tiny` on held-out procedural scenes, on held-out scenes that
look more like photos, and on scikit-image's photo `coins`."""
_EPILOG = """\
examples:
  edge-runtime evaluate                                  the shipped weights, 200 scenes a sort
  edge-runtime evaluate --only coins                     scikit-image's coins alone
  edge-runtime evaluate --stock sam_vit_b_01ec64.pth --adapted sam_vit_b-adapted.pt \\
      --annotations instances_val2017.json --images val2017 --limit 500
  edge-runtime evaluate --json > evaluation.json"""
_SETS = ("scenes", "photo-like", "coins")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--stock", type=Path, metavar="FILE", help="stock-order weights (default: shipped tiny)")
    add("--adapted", type=Path, metavar="FILE", help="adapted weights (default: shipped tiny)")
    add(
        "--scenes",
        type=COUNT,
        default=200,
        metavar="N",
        help="held-out scenes of each sort (default 200)",
    )
    add("--only", choices=_SETS, help="one set instead of all three")
    add(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="COCO annotation file instead of these sets",
    )
    add("--images", type=Path, metavar="DIR", help="folder of the annotated images")
    add("--limit", type=COUNT, metavar="N", help="at most so many annotated images")
    add("--min-area", type=COUNT, default=100, metavar="PX", help="smallest object of a file (100)")
    add("--no-blur", action="store_true", help="leave out the blurred rows")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP)
    add("--threads", type=THREADS, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Score every row and print the table."""
    import json
    from dataclasses import asdict
    from functools import partial

    from edge_common.errors import ConfigError
    from edge_common.progress import progress

    if (args.annotations is None) != (args.images is None):
        raise ConfigError("--annotations and --images go together", mend="give both")
    if args.annotations is not None and args.only:
        raise ConfigError("--only and --annotations exclude each other", mend="choose one of them")
    for path in (args.stock, args.adapted):
        if path is not None:
            check_checkpoint_file(path)
    with progress("preparing") as work:
        work.note = "loading PyTorch"
        from exporters.commands.common import choose_device, made_with, progress_bar
        from exporters.evaluate import blurred, evaluate

        device = choose_device(args.device)
        rows, weights = _rows(args, work)
        work.note = "reading or making the images"
        sets = _sets(args)
    report: list[tuple[str, list[dict[str, Any]]]] = []
    total = sum(len(rows) * len(samples) for _, samples in sets)
    with progress_bar("evaluating", total) as advance:
        for what, samples in sets:
            results = []
            for name, sam, sigma in rows:
                change = None if sigma is None else blurred(sigma)
                step = partial(advance, name)
                score = evaluate(sam.to(device), samples, change, step, all_prompts=not sigma)
                results.append({"row": name, "blur_sigma": sigma, **asdict(score)})
            report.append((what, results))
    if args.json:
        made = made_with(_command(args))
        scored = [{"data": what, "rows": results} for what, results in report]
        print(json.dumps({"weights_sha256": weights, "sets": scored, "made": made}, indent=2))
        return 0
    for what, results in report:
        first = results[0]
        print(f"{what}: {first['objects']} objects, {first['large_objects']} large")
        print(f"  {'':33}{'click':>7}{'best of 3':>11}" + "".join(f"{h:>7}" for h in _HEADS))
        for row in results:
            rest = [row["box"], row["corrected"].get(1), row["corrected"].get(3)]
            figures = [*rest, row["large"], row["iou_error"]]
            print(
                f"  {row['row']:33}{row['miou']:7.3f}{row['best_of_three']:11.3f}"
                + "".join(f"{'-' if f is None else format(f, '.3f'):>7}" for f in figures)
            )
    return 0


def _rows(
    args: argparse.Namespace, work: Progress
) -> tuple[list[tuple[str, Any, int | None]], dict[str, str]]:
    """The models to score, each with its name and the blur of its input; and their hashes."""
    import copy

    import torch

    from edge_common.errors import CheckpointError
    from exporters.models import (
        REORDERED,
        STOCK,
        open_checkpoint,
        reorder,
        shipped_weights,
        weights_hash,
    )

    if args.threads:
        torch.set_num_threads(args.threads)
    given = args.stock is not None or args.adapted is not None
    stock_path = args.stock or (None if given else shipped_weights("stock"))
    adapted_path = args.adapted or (None if given else shipped_weights("adapted"))
    rows: list[tuple[str, Any, int | None]] = []
    weights: dict[str, str] = {}
    opened = {path: open_checkpoint(path) for path in (stock_path, adapted_path) if path}
    if stock_path is not None and opened[stock_path].order != STOCK:
        raise CheckpointError(f"{stock_path} is reordered", mend="give it as --adapted")
    if adapted_path is not None and opened[adapted_path].order != REORDERED:
        raise CheckpointError(f"{adapted_path} is in stock order", mend="give it as --stock")
    if stock_path is not None:
        work.note = f"loading {stock_path.name}"
        stock = opened[stock_path].load()
        weights["stock"] = weights_hash(stock)
        rows.append(("stock order", stock, None))
        rows.append(("reordered, not adapted", reorder(copy.deepcopy(stock)), None))
    if adapted_path is not None:
        work.note = f"loading {adapted_path.name}"
        adapted = opened[adapted_path].load()
        weights["adapted"] = weights_hash(adapted)
        rows.append(("reordered, adapted", adapted, None))
        if not args.no_blur:
            rows += [(f"adapted, blurred input, sigma {s}", adapted, s) for s in BLURS]

    return rows, weights


def _sets(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The data to score on: what it is, and its samples."""
    from exporters.coco import CocoFile
    from exporters.demo_photo import demo_photo
    from exporters.evaluate import Sample, held_out_scenes
    from exporters.scenes import PHOTO_LIKE

    if args.annotations is not None:
        file = CocoFile(args.annotations, args.images, args.limit, args.min_area)
        return [(f"{args.annotations.name}, {len(file)} images", file)]
    sets: list[tuple[str, Any]] = []
    if args.only in (None, "scenes"):
        scenes = list(held_out_scenes(args.scenes))
        sets.append((f"{args.scenes} held-out procedural scenes", scenes))
    if args.only in (None, "photo-like"):
        scenes = list(held_out_scenes(args.scenes, kind=PHOTO_LIKE))
        sets.append((f"{args.scenes} held-out photo-like scenes", scenes))
    if args.only in (None, "coins"):
        what = "scikit-image's coins, Sobel and marker-watershed reference"
        sets.append((what, [Sample(*demo_photo(), "coins")]))
    return sets


def _command(args: argparse.Namespace) -> str:
    """The command line that gives these figures, with file names but no folders."""
    words = ["edge-runtime", "evaluate"]
    for name in ("stock", "adapted", "annotations", "images"):
        path: Path | None = getattr(args, name)
        if path is not None:
            words += [f"--{name}", path.name]
    if args.annotations is not None:
        words += ["--min-area", str(args.min_area)]
        if args.limit is not None:
            words += ["--limit", str(args.limit)]
    else:
        words += ["--scenes", str(args.scenes)]
        if args.only:
            words += ["--only", args.only]
    if args.no_blur:
        words.append("--no-blur")
    return shlex.join(words)
