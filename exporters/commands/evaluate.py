"""``edge-runtime evaluate``: the table of mask quality."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from engines.options import COUNT, THREADS
from exporters.early import DEVICE_HELP

BLURS = (4, 8, 16)  # sigma in pixels of an image whose longest side is 1024

_DESCRIPTION = """\
Measure masks from one click an object: stock order, reordered without adaptation, reordered and
adapted, and the adapted model on blurred input (Gaussian, sigma 4, 8 and 16 pixels at 1024, scaled
to each image). Every object is clicked once, at the pixel farthest from its border. `miou` is the
mean IoU of the mask with the highest predicted IoU, `best of 3` that of the best mask returned.
Without options it scores the shipped `tiny` on held-out procedural scenes."""
_EPILOG = """\
examples:
  edge-runtime evaluate                                  the shipped weights, 200 scenes
  edge-runtime evaluate --coins                          scikit-image's coins, one click each
  edge-runtime evaluate --stock sam_vit_b_01ec64.pth --adapted sam_vit_b-adapted.pt \\
      --annotations instances_val2017.json --images val2017 --limit 500
  edge-runtime evaluate --json > evaluation.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--stock", type=Path, metavar="FILE", help="stock-order weights (default: shipped tiny)")
    add("--adapted", type=Path, metavar="FILE", help="adapted weights (default: shipped tiny)")
    add("--scenes", type=COUNT, default=200, metavar="N", help="held-out scenes (default 200)")
    add("--coins", action="store_true", help="the photo `coins` of scikit-image instead of scenes")
    add("--annotations", type=Path, metavar="FILE", help="COCO annotation file instead of scenes")
    add("--images", type=Path, metavar="DIR", help="folder of the annotated images")
    add("--limit", type=COUNT, metavar="N", help="at most so many annotated images")
    add("--min-area", type=COUNT, default=100, metavar="PX", help="smallest object of a file (100)")
    add("--no-blur", action="store_true", help="leave out the blurred rows")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP)
    add("--threads", type=THREADS, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Score every row and print the table."""
    import copy
    import json
    from dataclasses import asdict

    import torch

    from engines.errors import CheckpointError, ConfigError
    from exporters.evaluate import Sample, blurred, evaluate, held_out_scenes
    from exporters.models import (
        REORDERED,
        STOCK,
        load_checkpoint,
        reorder,
        shipped_weights,
        weights_hash,
    )
    from exporters.runs import choose_device, made_with, progress_bar

    if (args.annotations is None) != (args.images is None):
        raise ConfigError("--annotations and --images go together; give both")
    if args.annotations is not None and args.coins:
        raise ConfigError("choose one of --coins and --annotations")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)

    given = args.stock is not None or args.adapted is not None
    stock_path = args.stock or (None if given else shipped_weights("stock"))
    adapted_path = args.adapted or (None if given else shipped_weights("adapted"))
    rows: list[tuple[str, Any, int | None]] = []
    weights: dict[str, str] = {}
    if stock_path is not None:
        stock = load_checkpoint(stock_path)
        if stock.order != STOCK:
            raise CheckpointError(f"{stock_path} is reordered; give it as --adapted")
        weights["stock"] = weights_hash(stock)
        rows.append(("stock order", stock, None))
        rows.append(("reordered, not adapted", reorder(copy.deepcopy(stock)), None))
    if adapted_path is not None:
        adapted = load_checkpoint(adapted_path)
        if adapted.order != REORDERED:
            raise CheckpointError(f"{adapted_path} is in stock order; give it as --stock")
        weights["adapted"] = weights_hash(adapted)
        rows.append(("reordered, adapted", adapted, None))
        if not args.no_blur:
            rows += [(f"adapted, blurred input, sigma {s}", adapted, s) for s in BLURS]

    samples: Any
    if args.annotations is not None:
        from exporters.coco import CocoFile

        samples = CocoFile(args.annotations, args.images, args.limit, args.min_area)
        what, count = f"{args.annotations.name}, {len(samples)} images", len(samples)
    elif args.coins:
        from exporters.coins import coins

        samples = [Sample(*coins(), "coins")]
        what, count = "scikit-image's coins, Sobel and marker-watershed reference", 1
    else:
        samples = list(held_out_scenes(args.scenes))
        what, count = f"{args.scenes} held-out procedural scenes", args.scenes

    results = []
    with progress_bar("evaluating", count * len(rows)) as advance:
        for name, sam, sigma in rows:
            change = None if sigma is None else blurred(sigma)
            score = evaluate(sam.to(device), samples, change, lambda: advance(""))
            results.append({"row": name, "blur_sigma": sigma, **asdict(score)})
    if args.json:
        report = {"data": what, "weights_sha256": weights, "rows": results}
        print(json.dumps({**report, "made": made_with(_command(args))}, indent=2))
        return 0
    print(f"{what}; {results[0]['objects']} objects, one click each")
    print(f"{'':36}{'miou':>8}{'best of 3':>12}")
    for row in results:
        print(f"{row['row']:36}{row['miou']:8.3f}{row['best_of_three']:12.3f}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command line that gives these figures; of files the names alone, not where they lie."""
    words = ["edge-runtime", "evaluate"]
    for name in ("stock", "adapted", "annotations", "images"):
        path: Path | None = getattr(args, name)
        if path is not None:
            words += [f"--{name}", path.name]
    if args.annotations is not None:
        words += ["--min-area", str(args.min_area)]
        if args.limit is not None:
            words += ["--limit", str(args.limit)]
    elif args.coins:
        words.append("--coins")
    else:
        words += ["--scenes", str(args.scenes)]
    if args.no_blur:
        words.append("--no-blur")
    return shlex.join(words)
