"""``edge-runtime adapt``: make a SAM's weights fit the reordered blocks."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_common.options import COUNT, RATE, SEED, THREADS
from exporters.path_checks import DEVICE_HELP

if TYPE_CHECKING:
    from edge_common.progress import Progress
    from exporters.adapt import Adaptation

_DESCRIPTION = """\
Adapt a SAM to the reordered blocks (window blocks first, global blocks last) that splitting over
nodes needs. A reordered copy of the image encoder learns to give the embeddings of the original on
unlabelled images; prompt encoder and mask decoder stay as they are. Interrupted runs (Ctrl-C saves)
are continued exactly by the same command."""
_EPILOG = """\
examples:
  edge-runtime adapt --model vit_b --checkpoint sam_vit_b_01ec64.pth --images photos/ \\
      --out vit_b-adapted.pt
  edge-runtime adapt --checkpoint runs/tiny/tiny-stock.pt --scenes --out tiny-adapted.pt
  torchrun --nproc-per-node 8 -m edge_runtime.cli adapt --model vit_h \\
      --checkpoint sam_vit_h_4b8939.pth --images sa1b/ --steps 20000 --batch 32 \\
      --out vit_h-adapted.pt

Says the relative squared error of the image embedding (0 is the original, 1 no better than a
constant) and the next step, and prints the path of the weights. Any photos like those to be
segmented will do; 11,000 (one part of SA-1B) are plenty.
`edge-runtime evaluate` measures masks, `edge-runtime export` makes a bundle of the result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--model", choices=("tiny", "vit_b", "vit_l", "vit_h"), help="default: what the file holds")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="stock-order SAM weights")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="DIR", help="folder of unlabelled images")
    source.add_argument("--scenes", action="store_true", help="procedural scenes instead of images")
    add("--out", type=Path, required=True, metavar="FILE", help="adapted weights to write")
    add("--steps", type=COUNT, default=400, metavar="N", help="optimiser steps (default 400)")
    add("--batch", type=COUNT, metavar="N", help="images a step, all processes (12; big models 2)")
    add("--lr", type=RATE, metavar="X", help="highest learning rate (tiny 3e-4, others 2e-5)")
    add("--seed", type=SEED, default=1, metavar="N", help="of images and crops (default 1)")
    add("--save-every", type=COUNT, default=50, metavar="N", help="steps between checkpoints (50)")
    add("--force", action="store_true", help="replace --out if it exists")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP)
    add("--threads", type=THREADS, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--no-amp", action="store_true", help="compute in float32 instead of mixed bfloat16")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Adapt until the budget of steps is spent, or until interrupted."""
    from edge_common.errors import ConfigError
    from edge_common.progress import progress
    from exporters.path_checks import check_checkpoint_file, check_place, image_files

    if args.out.exists() and not args.force:
        raise ConfigError(
            f"{args.out} exists already", mend="choose another --out, or add --force", code="exists"
        )
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"the directory of --out {args.out} does not exist", mend="make it first")
    check_place(args.out, ConfigError)
    check_checkpoint_file(args.checkpoint)
    if args.images is not None:
        image_files(args.images)
    with progress("preparing", quiet=os.environ.get("RANK", "0") != "0") as work:
        work.note = "loading PyTorch"
        adaptation = _prepare(args, work)
    from exporters.adapt import smoothed
    from exporters.commands.common import made_with, say
    from exporters.models import save_checkpoint

    ranks, config = adaptation.ranks, adaptation.config
    state = _state_of(args.out)
    try:
        if adaptation.step and ranks.rank == 0:
            say(f"continuing {state} at step {adaptation.step} of {config.steps}")
        finished = _steps(adaptation, state, args.save_every)
        if ranks.rank == 0 and finished:
            where = f"--images {args.images.name}" if args.images is not None else "--scenes"
            command = (
                f"edge-runtime adapt --model {config.model} --checkpoint {args.checkpoint.name} "
                f"{where} --steps {config.steps} --batch {config.batch} --lr {config.lr:g} "
                f"--seed {config.seed} --out {args.out.name}"
            )
            error = smoothed(adaptation.losses)
            facts = {**made_with(command), "relative_error": error, "losses": adaptation.losses}
            facts["stock_weights_sha256"] = adaptation.teacher_hash
            save_checkpoint(adaptation.result(), args.out, facts)
            state.unlink(missing_ok=True)
            _report(args, config.model, error, adaptation.step)
        if not finished:
            if ranks.rank == 0:
                say(f"stopped at step {adaptation.step}; the same command continues")
            raise KeyboardInterrupt
    finally:
        adaptation.close()
        if ranks.world > 1:
            import torch

            torch.distributed.destroy_process_group()
    return 0


def _prepare(args: argparse.Namespace, work: Progress) -> Adaptation:
    """Everything before the first step, quickest checks first."""
    import torch

    from exporters.adapt import Adaptation, AdaptConfig, Folder, Ranks, Scenes, check, default_lr
    from exporters.commands.common import choose_device, say
    from exporters.models import open_checkpoint, spec_of

    if args.threads:
        torch.set_num_threads(args.threads)
    ranks = Ranks.from_environment()
    device = choose_device(args.device)
    if device.type == "cuda" and ranks.world > 1:
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    checkpoint = open_checkpoint(args.checkpoint, args.model)
    model = checkpoint.model
    config = AdaptConfig(
        model=model,
        steps=args.steps,
        batch=args.batch or (12 if model == "tiny" else 2 * ranks.world),
        lr=args.lr or default_lr(model),
        seed=args.seed,
        amp=not args.no_amp,
    )
    check(checkpoint.order, config, ranks)
    source: Folder | Scenes
    if args.images is not None:
        work.note = "looking into the images"
        source = Folder(args.images, args.seed)
        if source.unreadable and ranks.rank == 0:
            first = source.unreadable[0].name
            say(f"skipping {len(source.unreadable)} unreadable images, first {first}")
    else:
        source = Scenes(args.seed, spec_of(model).image_size)
    if ranks.world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    work.note = f"loading {args.checkpoint.name}"
    adaptation = Adaptation(checkpoint.load(), config, source, device, ranks)
    state = _state_of(args.out)
    if state.exists():
        work.note = f"loading {state.name}"
        adaptation.restore(state)
    return adaptation


def _state_of(out: Path) -> Path:
    return out.with_name(out.name + ".state")


def _report(args: argparse.Namespace, model: str, error: float, steps: int) -> None:
    from exporters.commands.common import say

    out, bundle = shlex.quote(str(args.out)), shlex.quote(args.out.stem)
    following = f"edge-runtime export --model {model} --checkpoint {out} --out {bundle}"
    if args.json:
        report = {"weights": str(args.out), "model": model, "steps": steps}
        print(json.dumps({**report, "relative_error": error, "next": following}, indent=2))
        return
    say(f"relative error of the image embedding: {error:.4f}")
    print(args.out)
    say(f"next: {following}")


def _steps(adaptation: Adaptation, state: Path, save_every: int) -> bool:
    """Step until done (True) or interrupted (False, saved). All stop together."""
    import torch

    from edge_common.signals import stop_requests
    from exporters.adapt import smoothed
    from exporters.commands.common import STOPPING, progress_bar, say

    steps, ranks = adaptation.config.steps, adaptation.ranks
    quiet = ranks.rank != 0
    with (
        stop_requests(STOPPING) as interrupt,
        progress_bar("adapting", steps, adaptation.step, quiet) as tell,
    ):
        while adaptation.step < steps:
            adaptation.train_step()
            tell(f"relative error {smoothed(adaptation.losses):.4f}")
            stop = interrupt.requested
            if ranks.world > 1:
                flag = torch.tensor(float(stop), device=adaptation.device)
                torch.distributed.all_reduce(flag)
                stop = bool(flag.item())
            if ranks.rank == 0 and (stop or adaptation.step % save_every == 0):
                adaptation.save(state)
                if not sys.stderr.isatty():  # a log file gets lines instead of the moving bar
                    error = smoothed(adaptation.losses)
                    say(f"step {adaptation.step} of {steps}: relative error {error:.4f}")
            if stop and adaptation.step < steps:
                return False
    return True
