"""`edge-runtime build`: TensorRT plans of a bundle, for the GPU that will run them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_common.options import COUNT
from engines import plan as plans
from engines.build import BuildOptions, Watcher, build_stage
from engines.bundle import Bundle
from engines.plan import Plan, PlanRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_DESCRIPTION = """\
Build TensorRT plans of a bundle's stages, with TensorRT (Jetson, data centre) or TensorRT-RTX
(workstations), whichever is installed. Neither torch nor onnx is needed.

The bundle decides the precision. TensorRT builds on the GPU that will run the plan, for that model
of GPU only; this takes long on a small board. TensorRT-RTX needs no GPU. Its plans run on every
card it supports from Ampere on (if built on a Turing card: on Turing).
Files are checked against their hashes first. Each plan has a record of what it was built from and
how. A new plan replaces an older one once it is complete. Ctrl-C leaves nothing behind."""

_EPILOG = """\
examples:
  edge-runtime build vit_b-fp16                   every stage
  edge-runtime build vit_b-node --max-windows 9   a node's stack, for at most 9 windows at once
  edge-runtime build vit_b-fp16 --stage tail --timing-cache timings.cache
      a second build for the same GPU takes the measured timings from the file
  edge-runtime build vit_b-fp16 --strict          fail if an attention was not fused

Plans contain code: use only those that you built yourself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add(
        "bundle",
        type=Path,
        help="directory of the bundle; plans go into its folder plans, or into your cache folder "
        "if the bundle comes with the package",
    )
    add(
        "--stage",
        choices=("all", "stack", "tail", "decoder", "head", "encoder"),
        default="all",
        help="what to build (default: all that the bundle holds)",
    )
    add(
        "--backend",
        choices=("auto", "tensorrt", "tensorrt-rtx"),
        default="auto",
        help="auto (default): TensorRT where it is installed, else TensorRT-RTX",
    )
    add(
        "--max-windows",
        type=COUNT,
        metavar="N",
        help="windows a batch of the stack or head may hold (default: all of an image)",
    )
    add(
        "--workspace",
        type=COUNT,
        metavar="MIB",
        help="scratch memory on the GPU that the plan may use (default: the library's)",
    )
    add(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="read measured timings from FILE and write them back (TensorRT only)",
    )
    add(
        "--strict",
        action="store_true",
        help="fail, and keep no plan, if an attention of the encoder is not fused",
    )
    add("--json", action="store_true", help="print the records as JSON; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Build, measure if there is a GPU, and print the results. 1: a plan failed the parity gate."""
    from rich.console import Console

    bundle = Bundle.load(args.bundle)
    stages = list(bundle.manifest.stages) if args.stage == "all" else [args.stage]
    for stage in stages:
        bundle.stage(stage)
    options = BuildOptions(
        backend=args.backend,
        max_windows=args.max_windows,
        workspace_mib=args.workspace,
        timing_cache=args.timing_cache,
        strict=args.strict,
    )
    terminal = Console(stderr=True, highlight=False, markup=False, emoji=False)
    built = _build(bundle, stages, options, terminal)
    if any(plan.record.gpu for plan in built):
        built = _measure(bundle, built, terminal)
    failed = [p.record.stage for p in built if p.record.parity and not p.record.parity.passed]
    if args.json:
        records = [{"path": str(p.path), **msgspec.to_builtins(p.record)} for p in built]
        print(msgspec.json.format(msgspec.json.encode({"plans": records}), indent=2).decode())
    else:
        _print(bundle, built, failed)
    return 1 if failed else 0


def _build(
    bundle: Bundle, stages: Sequence[str], options: BuildOptions, terminal: Console
) -> list[Plan]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
        transient=True,
    ) as progress:
        display = _Display(terminal, progress, len(stages))
        return [build_stage(bundle, stage, options, display) for stage in stages]


class _Display(Watcher):
    """A progress bar on a terminal; elsewhere a line every few seconds."""

    seconds_between_lines = 10.0

    def __init__(self, terminal: Console, progress: Progress, stages: int) -> None:
        self.terminal, self.progress, self.stages = terminal, progress, stages
        self.begun = 0

    def begin(self, stage: str) -> None:
        self.begun += 1
        self.stage, self.started = stage, time.monotonic()
        self.said = self.started
        text = f"[{self.begun}/{self.stages}] {stage}"
        if self.terminal.is_terminal:
            self.task = self.progress.add_task(f"{text}: checking the files", total=None)
        else:
            self._print(f"{text}: building")

    def phase(self, name: str, done: int, total: int, depth: int) -> None:
        if self.terminal.is_terminal:
            text = f"[{self.begun}/{self.stages}] {self.stage}: {name}"
            self.progress.update(self.task, description=text, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.said >= self.seconds_between_lines:
            self.said = now
            self._print(f"  {self.stage}: {now - self.started:.0f} s: {name}, {done} of {total}")

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}")

    def finished(self, record: PlanRecord) -> None:
        if self.terminal.is_terminal:
            self.progress.remove_task(self.task)
        self._print(f"  {record.stage}: built in {record.build_seconds:.1f} s")

    def _print(self, text: str) -> None:
        self.terminal.print(text, soft_wrap=True)


def _measure(bundle: Bundle, built: Sequence[Plan], terminal: Console) -> list[Plan]:
    """Run the parity gate on the new plans; returns them with its verdicts."""
    from engines.parity import gate

    terminal.print("measuring the plans against ONNX Runtime")
    report = gate(bundle, [plan.record.stage for plan in built], kinds=["tensorrt"])
    for verdict in report.verdicts:
        if verdict.why:
            terminal.print(
                f"warning: {verdict.stage}, {verdict.engine}: {verdict.why}", soft_wrap=True
            )
    for text in report.unrecorded:
        terminal.print(f"warning: {text}", soft_wrap=True)
    measured = {plan.path: plan for plan in plans.plans(bundle, skip_damaged=True)}
    return [measured.get(plan.path, plan) for plan in built]


def _print(bundle: Bundle, built: Sequence[Plan], failed: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    first = built[0].record
    where = first.gpu or "no GPU here"
    gpus = ", ".join(first.compute_capabilities)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("stage", "form", "plan", "time", "fused", "read from", "parity"):
        table.add_column(name, justify="right" if name in ("plan", "time", "fused") else "left")
    for record in (plan.record for plan in built):
        table.add_row(
            record.stage,
            record.form,
            f"{record.plan_bytes / 1e6:.1f} MB",
            f"{record.build_seconds:.1f} s",
            _fused(record),
            record.read_from,
            _verdict(record),
        )
    console.print(table)
    for text in (
        f"{first.flavour} {first.version}, {where}; for compute capability {gpus}",
        f"plans: {built[0].path.parent}",
        f"next: {_next(bundle, built, failed)}",
    ):
        console.print(text, soft_wrap=True)


def _fused(record: PlanRecord) -> str:
    if not record.attention:
        return "-"
    return f"{sum(a.fused is True for a in record.attention)}/{len(record.attention)}"


def _verdict(record: PlanRecord) -> str:
    if record.parity is None:
        return "not measured"
    return "passed" if record.parity.passed else "FAILED"


def _next(bundle: Bundle, built: Sequence[Plan], failed: Sequence[str]) -> str:
    verify = plans.verify_command(bundle.path)
    if failed:
        return (
            f"{', '.join(failed)} will not be used: run `{verify}`, and use a bundle of another "
            "precision if it fails again"
        )
    if not all(plan.record.parity for plan in built):
        return f"on the machine with the GPU, measure them: {verify}"
    if bundle.manifest.kind == "node":
        return f"cloud-node serve --bundle {bundle.path} --keys DIR"
    return f"edge-runtime segment PHOTO --point X,Y --local --bundle {bundle.path}"
