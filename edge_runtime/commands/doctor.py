"""`edge-runtime doctor`: what this machine can run, and the command that repairs the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_common.options import SECONDS
from edge_runtime.machine.diagnosis import Check, Status, examine

_COLOURS: dict[Status, str] = {"ok": "32", "warn": "33", "fail": "31", "none": "2"}
DESCRIPTION = """\
Say what this machine can run: board, JetPack, driver, CUDA, TensorRT, ONNX Runtime, memory, power
mode and the bundle, one line each. Below a problem is the command that repairs it. Nothing is
changed.

  ok    works                   warn  works, but is slow, unproven or about to fail
  none  absent and not needed   fail  broken: edge-runtime, or an engine that it would use

Exits with 1 if a line says fail, otherwise with 0. A machine without a GPU is fine unless --require
asks for one."""

EPILOG = """\
examples:
  edge-runtime doctor
  edge-runtime doctor bundles/vit_b                  which engine would serve that bundle
  edge-runtime doctor --require tensorrt && edge-runtime build bundles/vit_b
  edge-runtime doctor --json | jq -r '.[] | select(.status == "fail") | .mend'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "bundle", nargs="?", type=Path, help="directory of the bundle (default: the shipped one)"
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        choices=("cuda", "tensorrt"),
        help="fail unless this can run here (may be repeated)",
    )
    parser.add_argument(
        "--timeout",
        type=SECONDS,
        default=20.0,
        metavar="SECONDS",
        help="how long all libraries together may take to answer (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, one item per line")


def run(args: argparse.Namespace) -> int:
    """Print the checks. 1: one of them failed."""
    checks = examine(bundle=args.bundle, require=args.require, timeout_s=args.timeout)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(_lines(checks, colours=_colours()))
    return 1 if any(check.status == "fail" for check in checks) else 0


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _lines(checks: Sequence[Check], *, colours: bool) -> str:
    width = max(len(check.what) for check in checks)
    lines = []
    for check in checks:
        status = f"{check.status:<4}"
        if colours:
            status = f"\x1b[{_COLOURS[check.status]}m{status}\x1b[0m"
        lines.append(f"{status}  {check.what:<{width}}  {check.detail}")
        if check.mend is not None:
            lines.append(f"      -> {check.mend}")
    return "\n".join(lines)
