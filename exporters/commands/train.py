"""``edge-runtime train``: train the small SAM from scratch on procedural scenes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from edge_common.options import COUNT, RATE, SEED, THREADS, Number
from exporters.path_checks import DEVICE_HELP

_NONE = Number(0, 10_000_000, whole=True)
_DESCRIPTION = """\
Train the model `tiny` (2.6 M parameters, SAM's architecture) on procedurally generated scenes, from
scratch or from weights. No images are needed. Each object is prompted with a point or a box and
then, at full resolution, with clicks that correct the model's own errors. The run lives in a
directory; calling the command again continues it exactly where it stopped. Ctrl-C saves first. The
weights are in stock order: `edge-runtime adapt` is the next step."""
_EPILOG = """\
examples:
  edge-runtime train --out runs/tiny                    about two hours on 2 cores (estimated)
  edge-runtime train --out runs/tiny --steps 8000       continue it with a larger budget
  edge-runtime train --out runs/try --steps 600 --seed 7
  edge-runtime train --out runs/more --weights tiny-stock.pt --steps 6000 --seed 2

what is in the directory:
  state.pt       full state of the run      tiny-stock.pt  weights (running average) when done
  log.jsonl      loss, IoU, learning rate and held-out scores by step

A new --steps reshapes the learning-rate schedule of a run that is continued; all else must stay as
it was. Held-out mIoU is about 0.65 after 1000 steps; see docs/training.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the run")
    add("--weights", type=Path, metavar="FILE", help="begin a new run from these weights")
    add("--steps", type=COUNT, metavar="N", help="optimiser steps in all (default 4600)")
    add("--seed", type=SEED, metavar="N", help="seed of weights and scenes (default 1)")
    add("--images", type=COUNT, metavar="N", help="images a step (default 12)")
    add("--clicks", type=COUNT, metavar="N", help="objects prompted in each image (default 8)")
    add("--lr", type=RATE, metavar="X", help="highest learning rate (default 5e-4)")
    add(
        "--save-every", type=COUNT, default=150, metavar="N", help="steps between checkpoints (150)"
    )
    add(
        "--held-out",
        type=_NONE,
        default=48,
        metavar="N",
        help="scenes a sort scored at checkpoints (48)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP)
    add("--threads", type=THREADS, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--no-amp", action="store_true", help="compute in float32 instead of mixed bfloat16")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train until the budget of steps is spent, or until interrupted."""
    import json

    import torch

    from edge_common.errors import ConfigError
    from edge_common.signals import stop_requests
    from exporters.commands.common import STOPPING, choose_device, made_with, progress_bar, say
    from exporters.evaluate import CORRECTIONS, evaluate, held_out_scenes
    from exporters.models import STOCK, load_checkpoint, save_checkpoint
    from exporters.scenes import PHOTO_LIKE
    from exporters.training import TrainConfig, Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    given: dict[str, Any] = {
        name: value
        for name in ("steps", "seed", "images", "clicks", "lr")
        if (value := getattr(args, name)) is not None
    }
    if args.no_amp:
        given["amp"] = False
    state = args.out / "state.pt"
    if state.exists():
        trainer = Trainer.resume(state, device, steps=given.pop("steps", None))
        fixed = [n for n, v in given.items() if getattr(trainer.config, n) != v]
        if fixed:
            told = ", ".join(f"--{n} {getattr(trainer.config, n)}" for n in fixed)
            raise ConfigError(
                f"the run in {args.out} has {told}", mend="repeat it, or choose another --out"
            )
        say(f"continuing {args.out} at step {trainer.step} of {trainer.config.steps}")
    else:
        begin = None if args.weights is None else load_checkpoint(args.weights, "tiny")
        if begin is not None:
            if begin.order != STOCK:
                raise ConfigError(f"{args.weights} is reordered; --weights wants stock order")
            given.update(offset=0.6, warmup_steps=0)  # full resolution, a lower learning rate
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(TrainConfig(**given), device)
        if begin is not None:
            trainer.begin_from(begin)
    scenes = list(held_out_scenes(args.held_out, first=500_000))
    photos = list(held_out_scenes(args.held_out, first=500_000, kind=PHOTO_LIKE))
    config = trainer.config

    def log(row: dict[str, object]) -> None:
        with open(args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoint() -> None:
        if scenes and trainer.step > config.warmup_steps:
            sam = trainer.averaged().to(device)
            score = evaluate(sam, scenes, all_prompts=False)
            photo = evaluate(sam, photos)
            row = {
                "step": trainer.step,
                "size": trainer.spec.image_size,
                "scenes": round(score.miou, 4),
                "scenes_best": round(score.best_of_three, 4),
                "photo_like": round(photo.miou, 4),
                "photo_like_box": round(photo.box or 0.0, 4),
                "photo_like_corrected": round(photo.corrected.get(CORRECTIONS, 0.0), 4),
                "seconds": round(trainer.seconds),
            }
            trainer.history.append(row)
            log({"held_out": row})
            say(
                f"step {trainer.step}: held-out mIoU {score.miou:.3f}, "
                f"photo-like {photo.miou:.3f}, by box {row['photo_like_box']:.3f}, "
                f"after {CORRECTIONS} corrections {row['photo_like_corrected']:.3f}"
            )
        trainer.save(state)

    with (
        stop_requests(STOPPING) as interrupt,
        progress_bar("training", config.steps, trainer.step) as advance,
    ):
        while trainer.step < config.steps and not interrupt.requested:
            figures = trainer.train_step()
            log({"step": trainer.step, **{k: round(v, 5) for k, v in figures.items()}})
            advance(f"IoU {figures['iou']:.2f}" if "iou" in figures else "warming up")
            if trainer.step % args.save_every == 0 or trainer.step == config.steps:
                checkpoint()
    if trainer.step < config.steps:
        trainer.save(state)
        say(f"stopped at step {trainer.step}; the same command continues")
        raise KeyboardInterrupt
    weights = args.out / f"{config.model}-stock.pt"
    command = f"edge-runtime train --out {os.path.relpath(args.out)} --steps {config.steps}"
    facts = {**made_with(command), "steps": trainer.step, "seed": config.seed}
    save_checkpoint(trainer.result(), weights, facts)
    following = (
        f"edge-runtime adapt --checkpoint {weights} --scenes --out {config.model}-adapted.pt"
    )
    if args.json:
        scores = trainer.history[-1] if trainer.history else None
        report = {"weights": str(weights), "steps": trainer.step, "held_out": scores}
        print(json.dumps({**report, "next": following}, indent=2))
        return 0
    print(weights)
    say(f"next: {following}")
    return 0
