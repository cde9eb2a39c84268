"""``edge-runtime demo``: the whole system on one machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Start three nodes on this machine, each a process of its own with its own keys, and segment a photo
of coins through them, with three clicks. Then compare every token and every mask, bit for bit, with
those of another process that computed everything by itself."""

EPILOG = """\
writes to --out:
  overlay.png               the photo with the clicks and the masks
  what-each-node-saw.png    side by side: each node's windows, the rest black
  report.json               exposure, bytes, latency by stage, quality of the masks

Exits with 1 if the results differ or a node saw too much. Always ends its nodes.

examples:
  edge-runtime demo
  edge-runtime demo --out /tmp/demo --bundle my-bundle
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="output folder; earlier results of the demo in it are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="full bundle to use (default: the one that comes with the package)",
    )
    parser.add_argument("--json", action="store_true", help="print report.json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its report."""
    from edge_runtime.demo import print_report, run_demo, verdict
    from edge_runtime.imaging.segmentation import dumps

    report = run_demo(args.out, bundle=args.bundle, quiet=args.json)
    if args.json:
        print(dumps(report).rstrip())
    else:
        print_report(report, args.out)
    failures = verdict(report)
    if failures:
        print("error: " + "; ".join(failures), file=sys.stderr)
    return 1 if failures else 0
