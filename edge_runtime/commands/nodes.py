"""`edge-runtime nodes`: ask every node of an edge.toml whether it can be used right now."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_common.options import SECONDS
from edge_common.text import printable, table

if TYPE_CHECKING:
    from edge_runtime.offload.status import NodeStatus

DESCRIPTION = """\
Check every node of an edge.toml: is it reachable, is this edge authorised there, does it serve the
same bundle as this edge, and how long is a round trip. No picture is sent. Exits with 1 unless
every node can be used."""

EPILOG = """\
examples:
  edge-runtime nodes
  edge-runtime nodes --config kitchen/edge.toml --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("edge.toml"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--timeout",
        type=SECONDS,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for the slowest node (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, one item per node")


def run(args: argparse.Namespace) -> int:
    """Ask and print. 1: a node cannot be used."""
    from edge_runtime.config import load_config
    from edge_runtime.offload.offloader import Offloader
    from engines.bundle import Bundle, shipped_bundle
    from engines.pipeline import Pipeline

    config = load_config(args.config)
    bundle = Bundle.load(config.bundle or shipped_bundle())
    with Pipeline(bundle) as pipeline, Offloader(config, pipeline) as offloader:
        found = offloader.status(args.timeout)
    print(_json(found) if args.json else printable(_table(found)))
    return 0 if all(status.usable for status in found) else 1


def _json(found: Sequence[NodeStatus]) -> str:
    import msgspec

    rows = [{**msgspec.to_builtins(status), "usable": status.usable} for status in found]
    return json.dumps(rows, indent=2)


def _table(found: Sequence[NodeStatus]) -> str:
    said = {True: "yes", False: "no", None: "-"}
    rows = [("NODE", "REACHABLE", "AUTHORISED", "SAME BUNDLE", "ROUND TRIP")]
    for status in found:
        trip = "-" if status.round_trip_ms is None else f"{status.round_trip_ms:.1f} ms"
        reachable, authorised = said[status.reachable], said[status.authorised]
        rows.append((status.name, reachable, authorised, said[status.same_bundle], trip))
    lines = table(rows)
    for status in found:
        lines += ["", f"{status.name} ({status.endpoint}): {status.detail}"]
    usable = sum(status.usable for status in found)
    return "\n".join([*lines, "", f"{usable} of {len(found)} nodes can be used."])
