"""`edge-runtime tensors`: the largest tensors inside a graph, if no operators were fused."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_common.errors import ExportError
from edge_common.options import Number
from edge_common.text import printable
from engines.bundle import Bundle

if TYPE_CHECKING:
    from exporters.tensor_sizes import Report

_DESCRIPTION = """\
Show the largest tensors that pass between the nodes of a graph, by ONNX's shape inference, without
running it. An engine that fuses nothing has to hold each of them; one that fuses attention never
makes the largest, the logits [heads, tokens, tokens].

A stage's main form leaves attention to one operator, Attention, whose logits are inside it
and do not show. Its plain form (--plain), for TensorRT before 10.14, spells them out in blocks of
queries, so that none gets large."""

_EPILOG = """\
examples:
  edge-runtime tensors vit_h-fp16 --stage tail --plain
      what TensorRT 10.3 on a Jetson would allocate if it fused no attention
  edge-runtime tensors vit_h-fp16 --plain --limit 64
      fail if any tensor of any stage takes more than 64 MB (of 10^6 bytes)
  edge-runtime tensors vit_h-fp16 --stage stack --plain --windows 9
      for nodes that are given at most 9 windows at once
  edge-runtime tensors some/graph.onnx --top 3 --json
      any ONNX graph whose dynamic dimensions are called n, p and k

exit code: 0; 1 if --limit is exceeded, or cannot be checked because a shape is unknown."""

_SIZE = Number(0, 1_000_000, whole=True)
_MEGABYTES = Number(0, 1e9, "MB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("graph", type=Path, metavar="BUNDLE|GRAPH.onnx", help="a bundle, or any ONNX file")
    add("--stage", metavar="S", help="of a bundle: head, stack, tail, encoder or decoder (all)")
    add("--plain", action="store_true", help="of a bundle: the plain form instead of the main one")
    add("--windows", type=_SIZE, metavar="N", help="windows at once (default: all of the image)")
    add("--prompts", type=_SIZE, default=1, metavar="P", help="prompts at once (default 1)")
    add("--points", type=_SIZE, default=2, metavar="K", help="points per prompt (default 2)")
    add("--top", type=_SIZE, default=10, metavar="ROWS", help="rows to show (default 10)")
    add(
        "--limit",
        type=_MEGABYTES,
        metavar="MB",
        help="exit with 1 if a tensor is larger; 1 MB = 10^6",
    )
    add("--json", action="store_true", help="print JSON for scripts")


def run(args: argparse.Namespace) -> int:
    from exporters.tensor_sizes import report

    graphs, windows = _graphs(args)
    sizes = {"n": windows, "p": args.prompts, "k": args.points}
    reports = {stage: report(path, sizes) for stage, path in graphs.items()}
    problems = _problems(reports, args.limit)
    if args.json:
        print(json.dumps(_facts(args, sizes, graphs, reports, problems), indent=2))
    else:
        _print(args, sizes, reports, problems)
    return 1 if problems and args.limit is not None else 0


def _graphs(args: argparse.Namespace) -> tuple[dict[str, Path], int]:
    """Name -> file of every graph to measure, and how many windows to give them."""
    if args.graph.suffix == ".onnx" and not args.graph.is_dir():
        if args.stage or args.plain:
            raise ExportError(
                f"--stage and --plain choose a graph of a bundle, but {args.graph} is a graph",
                mend="leave them out, or name the bundle's directory",
            )
        return {args.graph.name: args.graph}, 25 if args.windows is None else args.windows
    bundle = Bundle.load(args.graph)
    stages = [args.stage] if args.stage else list(bundle.manifest.stages)
    path = bundle.plain_path if args.plain else bundle.stage_path
    windows = bundle.geometry.windows if args.windows is None else args.windows
    return {stage: path(stage) for stage in stages}, windows


def _problems(reports: dict[str, Report], limit: float | None) -> list[str]:
    """Why it cannot be said that every tensor is within the limit."""
    problems = []
    for stage, found in reports.items():
        if found.unknown:
            some = ", ".join(found.unknown[:3])
            problems.append(f"{stage}: {len(found.unknown)} tensors of unknown shape ({some}, ...)")
        over = [g for g in found.groups if limit is not None and g.bytes > limit * 1e6]
        if over:
            count = sum(group.count for group in over)
            problems.append(
                f"{stage}: {count} of {found.tensors} tensors exceed {limit:g} MB, the largest "
                f"({over[0].name}) with {over[0].bytes / 1e6:,.1f} MB"
            )
    return problems


def _facts(
    args: argparse.Namespace,
    sizes: dict[str, int],
    graphs: dict[str, Path],
    reports: dict[str, Report],
    problems: list[str],
) -> dict[str, Any]:
    return {
        "graph": str(args.graph),
        "form": "plain" if args.plain else "main",
        "dimensions": sizes,
        "limit_mb": args.limit,
        "problems": problems,
        "stages": {
            stage: {
                "file": graphs[stage].name,
                "tensors": found.tensors,
                "unknown": list(found.unknown),
                "largest_bytes": found.largest,
                "operators": dict(sorted(found.operators.items())),
                "largest": [dataclasses.asdict(group) for group in found.groups[: args.top]],
            }
            for stage, found in reports.items()
        },
    }


def _print(
    args: argparse.Namespace,
    sizes: dict[str, int],
    reports: dict[str, Report],
    problems: list[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    several = len(reports) > 1
    for name in (*(["stage"] if several else []), "made by", "type", "shape", "first of them"):
        table.add_column(name, overflow="fold")
    rows = [(group, stage) for stage, found in reports.items() for group in found.groups]
    rows.sort(key=lambda row: -row[0].bytes)
    for group, stage in rows[: args.top]:
        shape = " x ".join(map(str, group.shape)) or "1"
        where = [stage] if several else []
        facts = (group.op, group.dtype, shape, group.name)
        table.add_row(
            f"{group.bytes / 1e6:,.3f}", str(group.count), *map(printable, [*where, *facts])
        )
    console.print(table)
    measured = sum(found.tensors for found in reports.values())
    console.print(
        f"{measured} tensors at {sizes['n']} windows, {sizes['p']} prompts of {sizes['k']} points; "
        "alike ones share a row",
        soft_wrap=True,
    )
    if args.limit is not None and not problems:
        console.print(f"none exceeds {args.limit:g} MB", soft_wrap=True)
    for problem in problems:
        console.print(printable(problem), soft_wrap=True)
