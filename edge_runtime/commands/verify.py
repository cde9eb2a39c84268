"""`edge-runtime verify`: the parity gate, on every engine that this machine has for a bundle."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_common.options import SEED, THREADS, Number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from engines.bundle import Bundle
    from engines.parity import Kind, Report, Verdict

_DESCRIPTION = """\
Run every engine of this machine on the bundle's golden samples, whose answers are the original
PyTorch model's, and on fresh random inputs, whose answers are ONNX Runtime's on the CPU. An engine
fails if its outputs differ by more than rounding or contain a NaN. It is not used until it passes.
TensorRT plans keep the verdict in their records; it holds for this GPU, driver and version of
TensorRT. Exits with 1 if an engine failed or none of those named by --device could be run."""

_EPILOG = """\
examples:
  edge-runtime verify bundles/vit_b                    after every build, driver update or move
  edge-runtime verify bundles/vit_b --device tensorrt  the plans (and the CPU, to compare with)
  edge-runtime verify bundles/vit_b --random 20        more random inputs
  edge-runtime verify bundles/vit_b --json | jq .passed

cosine: least cosine similarity of a window's tokens, an embedding, or a prompt's answer.
max abs: largest absolute difference; of peak: as a share of the largest absolute value.
mask IoU: intersection over union of the masks, the least and the mean.
bf16: ONNX Runtime cannot compute it on the CPU. Results for random inputs are then compared with
ONNX Runtime on CUDA if installed; otherwise they must be finite and independent of batching."""

_ONLY_CPU = """\
Only ONNX Runtime on the CPU is available: the bundle has no TensorRT plans
(`edge-runtime build {}` makes them where TensorRT is installed), and there is no
ONNX Runtime with CUDA and a GPU. `edge-runtime doctor` says what is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("bundle", nargs="?", type=Path, help="directory of the bundle (default: the shipped one)")
    add(
        "--stage",
        choices=("all", "stack", "tail", "decoder", "head", "encoder"),
        default="all",
        help="what to measure (default: all that the bundle holds)",
    )
    add(
        "--device",
        choices=("all", "cpu", "cuda", "tensorrt"),
        default="all",
        help="which engines, besides ONNX Runtime on the CPU (default: all)",
    )
    add(
        "--random",
        type=Number(1, 10_000, whole=True),
        default=1,
        metavar="N",
        help="samples of random inputs, besides the golden ones (default %(default)s)",
    )
    add("--seed", type=SEED, metavar="S", help="draw the random inputs of an earlier run again")
    help_threads = "CPU threads of ONNX Runtime (default: all cores)"
    add("--threads", type=THREADS, metavar="N", help=help_threads)
    add("--json", action="store_true", help="print JSON for scripts; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Measure and print. 1: an engine failed, or none of those asked for ran."""
    from rich.console import Console

    from engines.bundle import Bundle, shipped_bundle
    from engines.parity import gate

    bundle = Bundle.load(args.bundle or shipped_bundle())
    kinds: dict[str, tuple[Kind, ...]] = {"all": ("cpu", "cuda", "tensorrt")}
    terminal = Console(stderr=True, highlight=False, markup=False, emoji=False)
    report = gate(
        bundle,
        None if args.stage == "all" else [args.stage],
        kinds=kinds.get(args.device, (args.device,)),
        random=args.random,
        seed=args.seed,
        threads=args.threads,
        watcher=_display(terminal),
    )
    passed = report.passed and _ran(args.device, report)
    if args.json:
        facts = {**_facts(bundle, report), "passed": passed}
        print(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
    else:
        _print(bundle, report, Console(highlight=False, markup=False, emoji=False))
        if args.device == "all" and len({verdict.engine for verdict in report.verdicts}) == 1:
            print(_ONLY_CPU.format(shlex.quote(str(bundle.path))))
    if not _ran(args.device, report):
        command = f"edge-runtime doctor {shlex.quote(str(bundle.path))}"
        if args.device in ("cuda", "tensorrt"):
            command += f" --require {args.device}"
        terminal.print(
            f"error: nothing ran on --device {args.device}: `{command}` says what is missing",
            soft_wrap=True,
        )
    for text in report.unrecorded:
        terminal.print(f"warning: {text}", soft_wrap=True)
    return 0 if passed else 1


def _ran(device: str, report: Report) -> bool:
    """True if a requested engine ran. The CPU always runs, for comparison."""
    besides = device in ("cuda", "tensorrt")
    verdicts = [v for v in report.verdicts if not (besides and v.engine.endswith(" CPU"))]
    return any(verdict.status != "not run" for verdict in verdicts)


def _display(terminal: Console) -> Any:
    from engines.parity import Watcher

    class Display(Watcher):
        """One line for each step: it may take minutes on a small board."""

        def step(self, text: str) -> None:
            terminal.print(f"measuring {text}", soft_wrap=True, style="dim")

    return Display()


def _facts(bundle: Bundle, report: Report) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path.resolve()),
        "model": bundle.manifest.model,
        "precision": bundle.manifest.precision,
        "seed": report.seed,
        "tolerance": {**asdict(report.tolerance), "mask_iou_min": report.tolerance.mask_iou_min},
        "verdicts": [
            {
                "engine": verdict.engine,
                "stage": verdict.stage,
                "status": verdict.status,
                "why": verdict.why,
                "rows": verdict.rows,
            }
            for verdict in report.verdicts
        ],
        "unrecorded": report.unrecorded,
    }


def _print(bundle: Bundle, report: Report, console: Console) -> None:
    for engine in dict.fromkeys(verdict.engine for verdict in report.verdicts):
        verdicts = [verdict for verdict in report.verdicts if verdict.engine == engine]
        console.print(_table(engine, verdicts))
        for verdict in verdicts:
            if verdict.why:
                said = "FAILED" if verdict.status == "failed" else verdict.status
                console.print(f"{verdict.stage} {said}: {verdict.why}", soft_wrap=True)
        console.print()
    console.print(f"the same random inputs again: --seed {report.seed}", soft_wrap=True)
    failed = dict.fromkeys(v.engine for v in report.verdicts if v.status == "failed")
    if failed:
        console.print(f"FAILED: {', '.join(failed)}. What failed does not serve.", soft_wrap=True)
    elif any(verdict.status == "ok" for verdict in report.verdicts):
        console.print("every engine that ran passed", soft_wrap=True)


def _table(engine: str, verdicts: Sequence[Verdict]) -> Table:
    from rich.table import Table

    table = Table(title=engine, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("inputs, against", overflow="fold")
    for name in ("cosine", "max abs", "of peak", "mask IoU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in verdicts:
        for row in verdict.rows:
            table.add_row(
                verdict.stage,
                f"{row.inputs}, {row.reference}",
                _number(row.cosine, ".7f"),
                _number(row.max_abs, ".1e"),
                _number(row.error, ".1e"),
                _number(row.mask_iou_min, ".4f")
                + ("" if row.mask_iou_mean is None else f" {row.mask_iou_mean:.4f}"),
                "ok" if row.passed else "FAILED" if row.finite else "FAILED, NaN or Inf",
            )
        if not verdict.rows:
            said = "FAILED" if verdict.status == "failed" else verdict.status
            table.add_row(verdict.stage, "", "", "", "", "", said)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
