"""``edge-runtime export``: make a bundle from a SAM checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_common.options import Number

if TYPE_CHECKING:
    from rich.console import Console

    from engines.bundle import Stage
    from exporters.export import Result
    from exporters.verify import Row

_DESCRIPTION = """\
Make a bundle, the directory that edge and nodes run, from a SAM checkpoint: of segment_anything, or
one that `edge-runtime adapt` or `train` wrote.

The blocks are reordered (window blocks first, so that nodes can compute them window by window) and
split into stages. Every stage is then run in ONNX Runtime and compared with the original PyTorch
model, and the table of differences is printed. If a stage misses its tolerance, or you press
Ctrl-C, nothing is left behind.

Beside each stage lies its plain form (STAGE.plain.onnx), the same function in operators that older
TensorRT knows, sharing the stage's weights; it is verified too, and `edge-runtime build` picks."""

_EPILOG = """\
examples:
  edge-runtime export --model vit_b --checkpoint adapted.pt --out vit_b
      the usual case: a bundle for the edge, fp32, nodes get pixels
  edge-runtime export --model vit_b --checkpoint adapted.pt --out vit_b-fp16 --precision fp16
      half the size and traffic; for GPUs and TensorRT
  edge-runtime export --model vit_b --checkpoint adapted.pt --out vit_b-head --head-blocks 2
      nodes get hidden states after the patch embedding and 2 window blocks instead of pixels
  edge-runtime export --model vit_b --checkpoint adapted.pt --out vit_b-node --for node
      the stack alone, to copy to a node; the same weights give the same stack, wherever exported
  edge-runtime export --model vit_b --checkpoint sam_vit_b.pth --out vit_b-stock --order stock
      one encoder, the original function: to compare with on one device

Weights for the stock order give poor masks once reordered, and export says so: adapt them first
with `edge-runtime adapt`. fp16 that overflows is reported; bf16 has fp32's range. `edge-runtime
info BUNDLE` shows what a bundle is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add(
        "--model",
        choices=("tiny", "vit_b", "vit_l", "vit_h"),
        help="the model the checkpoint should hold (default: what it looks like)",
    )
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="SAM weights (.pth, .pt)")
    add("--out", type=Path, required=True, metavar="BUNDLE", help="directory to make")
    add(
        "--order",
        choices=("reordered", "stock"),
        default="reordered",
        help="reordered: stages that can be split over nodes (default); stock: one encoder",
    )
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of matrices and tokens (default fp32); fragile parts stay fp32",
    )
    add(
        "--head-blocks",
        type=Number(0, 1024, whole=True),
        metavar="K",
        help="keep the patch embedding and K >= 0 window blocks on the edge (default: send pixels)",
    )
    add(
        "--for",
        dest="only",
        choices=("all", "node"),
        default="all",
        help="node: write the stack alone (default all)",
    )
    add("--json", action="store_true", help="print the result as JSON; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Export, then print the table of parity and the next steps."""
    from rich.console import Console

    from edge_common.errors import ExportError
    from edge_common.files import refuse_existing
    from exporters.path_checks import check_checkpoint_file, check_place

    started = time.monotonic()
    refuse_existing(args.out, ExportError, "choose another --out")
    check_place(args.out, ExportError)
    check_checkpoint_file(args.checkpoint)
    _give_memory_back()
    result = _export(args, Console(stderr=True))
    seconds = time.monotonic() - started
    if args.json:
        facts = {**_facts(result, seconds), "next": _following(args)}
        print(json.dumps(facts, indent=2))
        return 0
    console = Console()
    console.print(_table(result.rows))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    size = sum(f.stat().st_size for f in result.bundle.path.rglob("*") if f.is_file())
    console.print(
        f"{args.out}: {size / 1e6:.1f} MB, {seconds:.0f} s", highlight=False, soft_wrap=True
    )
    console.print(f"next: {_following(args)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _following(args: argparse.Namespace) -> str:
    bundle = shlex.quote(str(args.out))
    where = "" if args.only == "all" else "   (on the node)"
    if args.precision != "fp32":
        return f"edge-runtime build {bundle}{where}"
    if args.only == "all":
        return f"edge-runtime segment PHOTO --point X,Y --local --bundle {bundle}"
    return f"cloud-node serve --bundle {bundle} --keys DIR{where}"


def _export(args: argparse.Namespace, terminal: Console) -> Result:
    from edge_common.progress import progress

    missed: list[Row] = []
    try:
        with contextlib.ExitStack() as whole:
            if not terminal.is_terminal:
                terminal.print("loading PyTorch", highlight=False)
            whole.enter_context(progress("loading PyTorch"))
            return _run_export(args, terminal, whole, missed)
    finally:
        if missed:
            terminal.print(_table(missed))


def _run_export(
    args: argparse.Namespace, terminal: Console, whole: contextlib.ExitStack, missed: list[Row]
) -> Result:
    from edge_common.progress import progress
    from exporters.export import Watcher, export

    class Display(Watcher):
        """Shows steps as a bar on a terminal, as lines elsewhere."""

        def begin(self, steps: int, total: float) -> None:
            self.steps, self.done = steps, 0
            whole.close()  # PyTorch is there
            self.work = whole.enter_context(progress("exporting", total))
            self.piece = whole.enter_context(contextlib.ExitStack())

        def step(self, text: str, share: float) -> None:
            self.piece.close()
            self.piece.enter_context(self.work.piece(share, text))
            self.done += 1
            if not terminal.is_terminal:
                terminal.print(f"[{self.done}/{self.steps}] {text}", markup=False, highlight=False)

        def row(self, row: Row) -> None:
            if not row.passed:
                missed.append(row)

    return export(
        args.checkpoint,
        args.out,
        model=args.model,
        order=args.order,
        precision=args.precision,
        head_blocks=args.head_blocks,
        node_only=args.only == "node",
        watcher=Display(),
    )


def _give_memory_back() -> None:
    """Make glibc return freed blocks of 4 MiB and more to the system at once.

    By default it raises that size and keeps the memory of a closed engine: over 2 GB after the
    first of ViT-H's, in pieces that the next engine cannot use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def _table(rows: Any) -> Any:
    from rich.table import Table

    table = Table(title="ONNX Runtime against PyTorch, worst of all samples; plain: of one")
    table.add_column("stage")
    for name in ("cosine", "max abs", "of peak", "mask IoU"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.stage,
            f"{row.cosine:.7f}",
            f"{row.max_abs:.1e}",
            f"{row.error:.1e}",
            f"{row.mask_iou:.5f}",
            "ok" if row.passed else "MISSED",
        )
    return table


def _plain_facts(path: Path, stage: Stage) -> dict[str, Any] | None:
    if stage.plain is None:
        return None
    size = (path / stage.plain.file).stat().st_size
    return {"file": stage.plain.file, "sha256": stage.plain.sha256, "bytes": size}


def _facts(result: Result, seconds: float) -> dict[str, Any]:
    import dataclasses
    import resource

    manifest, path = result.bundle.manifest, result.bundle.path
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "bundle": str(path),
        "model": manifest.model,
        "order": manifest.order,
        "adapted": manifest.adapted,
        "precision": manifest.precision,
        "head_blocks": manifest.head_blocks,
        "weights_sha256": manifest.weights_sha256,
        "stages": {
            name: {
                "sha256": stage.sha256,
                "bytes": sum((path / file).stat().st_size for file in stage.files),
                "plain": _plain_facts(path, stage),
            }
            for name, stage in manifest.stages.items()
        },
        "verification": [dataclasses.asdict(row) for row in result.rows],
        "notes": list(result.notes),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": usage.ru_maxrss // 1024,
    }
