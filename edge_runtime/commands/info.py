"""`edge-runtime info`: what a bundle is, and whether its files match its manifest.

It opens no graph, so it is quick and needs no inference engine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import msgspec

from edge_common.text import printable
from engines.bundle import Bundle, Stage, TensorSpec, shipped_bundle

_RUNS_ON = {
    "head": "edge",
    "stack": "nodes (and edge)",
    "tail": "edge",
    "encoder": "edge",
    "decoder": "edge",
}
_KINDS = {
    "full": "full: for an edge, and for nodes too",
    "stock": "stock order: for comparison on one device, cannot be offloaded",
    "node": "node: the stack alone, for a node",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a bundle is: model, geometry, kind of weights, precision, stages with what\n"
        "they take and return, and what one window costs to send. Files are checked against\n"
        "their hashes; a damaged bundle is an error."
    )
    parser.epilog = (
        "examples:\n"
        "  edge-runtime info                     the bundle that comes with the package\n"
        "  edge-runtime info bundles/vit_b       any other\n"
        "  edge-runtime info bundles/vit_b --json | jq .stages.stack.sha256\n"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "bundle", nargs="?", type=Path, help="directory of the bundle (default: the shipped one)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not hash the files (large bundles take seconds)",
    )


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.load(args.bundle or shipped_bundle())
    if not args.no_verify:
        bundle.verify_hashes()
    facts = describe(bundle, verified=not args.no_verify)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
    else:
        _print(bundle, facts)
    return 0


def describe(bundle: Bundle, *, verified: bool) -> dict[str, Any]:
    """The output of `--json`: the manifest, and figures derived from it."""
    manifest, geometry = bundle.manifest, bundle.geometry
    facts: dict[str, Any] = msgspec.to_builtins(manifest)
    facts["path"] = str(bundle.path.resolve())
    facts["kind"] = manifest.kind
    facts["verified"] = verified
    facts["geometry"] |= {
        "grid": geometry.grid,
        "windows": geometry.windows,
        "window_pixels": geometry.window_pixels,
        "tokens_per_window": geometry.tokens_per_window,
    }
    for name, stage in manifest.stages.items():
        facts["stages"][name]["bytes"] = bundle.size(name)
        if stage.plain is not None:
            facts["stages"][name]["plain"]["bytes"] = (
                (bundle.path / stage.plain.file).stat().st_size
            )
    if bundle.has("stack"):
        stack = bundle.stage("stack")
        facts["window_bytes"] = {
            "up": sum(map(_bytes_per_window, stack.inputs)),
            "down": sum(map(_bytes_per_window, stack.outputs)),
        }
    return facts


def _bytes_per_window(spec: TensorSpec) -> int:
    fixed = [dim for dim in spec.shape if isinstance(dim, int)]
    return math.prod(fixed) * spec.numpy_dtype.itemsize


def _print(bundle: Bundle, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    manifest, geometry = bundle.manifest, bundle.geometry
    console = Console(highlight=False, markup=False, emoji=False)
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True, style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("bundle", printable(bundle.path))
    rows.add_row("kind", _KINDS[manifest.kind])
    rows.add_row("model", f"{manifest.model}, weights {manifest.weights_sha256[:12]}")
    rows.add_row("order", _order(bundle))
    rows.add_row("precision", f"{manifest.precision}, codec {manifest.codec}")
    side = geometry.windows_per_side
    rows.add_row(
        "geometry",
        f"{geometry.image_size} x {geometry.image_size} pixels, {geometry.grid} x {geometry.grid} "
        f"tokens, {side} x {side} windows of {geometry.window_pixels} x {geometry.window_pixels} "
        f"pixels ({geometry.tokens_per_window} tokens of {geometry.embed_dim})",
    )
    if "window_bytes" in facts:
        sent = (
            "pixels"
            if manifest.head_blocks is None
            else f"hidden states after {manifest.head_blocks} window blocks"
        )
        cost = facts["window_bytes"]
        rows.add_row(
            "nodes are sent",
            f"{sent}: per window {_human(cost['up'])} up, {_human(cost['down'])} down",
        )
    for key, value in manifest.made.items():
        rows.add_row(f"made: {key}", value)
    rows.add_row("golden samples", str(len(manifest.golden)))
    rows.add_row("files", "match their hashes" if facts["verified"] else "present, not verified")
    console.print(rows)

    stages = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    stages.add_column("stage", no_wrap=True)
    stages.add_column("runs on, size, sha256; plain form; takes, returns", overflow="fold")
    for name, stage in manifest.stages.items():
        size = _human(facts["stages"][name]["bytes"])
        takes, returns = map(_signature, (stage.inputs, stage.outputs))
        facts_line = f"{_RUNS_ON[name]}, {size}, {stage.sha256[:12]}"
        stages.add_row(name, f"{facts_line}\n{_plain(bundle, stage)}\n<- {takes}\n-> {returns}")
    console.print()
    console.print(stages)


def _plain(bundle: Bundle, stage: Stage) -> str:
    if stage.plain is None:
        return "no plain form: export again to build with TensorRT before 10.14, or in fp32"
    size = _human((bundle.path / stage.plain.file).stat().st_size)
    return f"plain form {stage.plain.file}, {size}, with the same weights"


def _order(bundle: Bundle) -> str:
    manifest = bundle.manifest
    if manifest.order == "stock":
        return "stock: the blocks as SAM has them"
    if manifest.adapted:
        return "reordered: window blocks first; weights adapted to it"
    return (
        "reordered: window blocks first; weights NOT adapted to it, so masks are worse than the "
        "original's (`edge-runtime adapt` improves them)"
    )


def _signature(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(
        f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs
    )


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
