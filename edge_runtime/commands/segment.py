"""``edge-runtime segment``: one photo, one or more objects, masks in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.options import SECONDS, SHARE, THREADS

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

DESCRIPTION = """\
Segment a photo at points or boxes. The windows of the photo are computed by the nodes of an
edge.toml, each of which sees only a few of them, or on this machine with --local. Points, boxes and
masks never leave this machine. Without --config and --local, edge.toml in the current folder is
used."""

EPILOG = """\
Coordinates are pixels from the left top corner of the photo as a viewer shows it (upright).

Each --point and each --box is an object of its own. A point with label 0 is not part of the object
before it. For an object with several prompts, put --object before them.

The folder --out then holds mask-1.png, mask-2.png, ... (white on black), masks.png (all in colours;
a pixel's palette index is the object's number), overlay.png, result.json and, if nodes took part,
what-each-node-saw.png.

examples:
  edge-runtime segment photo.jpg --point 120,80 --local
  edge-runtime segment photo.jpg --point 120,80 --point 300,210 --config edge.toml
  edge-runtime segment photo.jpg --point 120,80 --point 150,95,0     (the second is not on it)
  edge-runtime segment photo.jpg --box 20,30,180,150 --max-exposure 0.37
  edge-runtime segment photo.jpg --object --point 120,80 --point 160,90 --object --box 20,30,60,70
"""


class _Ordered(argparse.Action):
    """Collects points, boxes and object markers in the order in which they were typed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        text = values if isinstance(values, str) else None
        namespace.prompts = [*namespace.prompts, (self.option_strings[0], text)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.set_defaults(prompts=[])
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="JPEG, PNG, WebP, TIFF, ...")
    what = parser.add_argument_group("what to segment")
    what.add_argument(
        "--point",
        action=_Ordered,
        metavar="X,Y[,LABEL]",
        help="a pixel on an object; label 0: a pixel that is not part of it",
    )
    what.add_argument("--box", action=_Ordered, metavar="X0,Y0,X1,Y1", help="a box around it")
    what.add_argument(
        "--object",
        action=_Ordered,
        nargs=0,
        help="all prompts from here to the next --object are about one object",
    )
    where = parser.add_argument_group("where to compute")
    place = where.add_mutually_exclusive_group()
    place.add_argument("--config", type=Path, metavar="FILE", help="edge.toml with your nodes")
    place.add_argument("--local", action="store_true", help="all on this machine, nothing leaves")
    where.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="model to use (default: edge.toml's, or the small one that comes with the package)",
    )
    where.add_argument(
        "--max-exposure",
        type=SHARE,
        metavar="SHARE",
        help="largest share of the photo's area any node may see (default: edge.toml's)",
    )
    where.add_argument(
        "--deadline",
        type=SECONDS,
        metavar="SECONDS",
        help="time for all windows to come back; with --fallback local nodes get half of it, this "
        "machine the rest (default: edge.toml's)",
    )
    where.add_argument(
        "--fallback",
        choices=("error", "local"),
        help="when a node fails or the budget lets no node take a window: stop with an error, or "
        "compute those windows here (default: edge.toml's)",
    )
    where.add_argument(
        "--threads",
        type=THREADS,
        metavar="N",
        help="CPU threads on this machine (default: all cores)",
    )
    where.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "tensorrt"),
        help="what computes on this machine: tensorrt: plans made by `edge-runtime build`; cuda, "
        "cpu: ONNX Runtime; auto: the first of these that may serve here (default: edge.toml's, or "
        "auto)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: out/PHOTO's name)"
    )
    result.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run in --out"
    )
    result.add_argument(
        "--multimask",
        action="store_true",
        help="keep all three of the model's masks of each object, best first (default: the best)",
    )
    result.add_argument("--json", action="store_true", help="print result.json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Raises any EdgeRuntimeError; then no folder is left behind."""
    from edge_runtime import prompts as prompting
    from edge_runtime import segmentation
    from edge_runtime.images import load_image

    prompts = prompting.group([_parsed(option, text) for option, text in args.prompts])
    config = _config(args)
    out = args.out or Path("out") / (args.photo.stem or "photo")
    segmentation.check_folder(out, args.overwrite)
    image = load_image(args.photo)
    prompting.check(prompts, image.shape[:2])

    from edge_runtime.predictor import OffloadPredictor

    with OffloadPredictor(
        config, bundle=args.bundle, threads=args.threads, device=args.device
    ) as predictor:
        report = segmentation.write(
            out,
            args.photo.name,
            image,
            predictor,
            prompts,
            all_masks=args.multimask,
            overwrite=args.overwrite,
        )
    print(segmentation.dumps(report).rstrip() if args.json else _text(report, out))
    return 0


def _parsed(option: str, text: str | None) -> Any:
    from edge_runtime.prompts import parse_box, parse_point

    if text is None:
        return None
    return parse_point(text) if option == "--point" else parse_box(text)


def _config(args: argparse.Namespace) -> EdgeConfig | None:
    """The nodes to use and how; None computes here."""
    import msgspec

    from edge_runtime.config import load_config
    from engines.errors import ConfigError

    changes = {
        "max_exposure": args.max_exposure,
        "deadline_s": args.deadline,
        "fallback": args.fallback,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if args.local:
        if given:
            option = {"deadline_s": "--deadline"}.get(next(iter(given)))
            option = option or "--" + next(iter(given)).replace("_", "-")
            raise ConfigError(f"{option} is about nodes, and with --local there are none")
        return None
    path = args.config or Path("edge.toml")
    if args.config is None and not path.exists():
        raise ConfigError(
            "where shall the photo be computed? With --local on this machine; with --config "
            "edge.toml on your nodes (`edge-runtime init` writes that file, and one in the current "
            "folder is found without --config)"
        )
    return msgspec.structs.replace(load_config(path), **given)


def _text(report: dict[str, Any], out: Path) -> str:
    lines = []
    for item in report["objects"]:
        best = item["masks"][0]
        box = "empty" if best["box"] is None else "box {},{},{},{}".format(*best["box"])
        lines.append(
            f"object {item['object']}: {best['area']} pixels, {box}, "
            f"predicted IoU {best['score']:.2f}"
        )
    if "exposure" in report:
        seen = report["exposure"]
        lines.append("")
        for node in seen["nodes"]:
            failed = f"; failed: {node['failure']}" if node["failure"] else ""
            lines.append(
                f"{node['name']} saw {len(node['windows'])} of {seen['windows_total']} windows, "
                f"{node['share_of_image']:.1%} of the photo{failed}"
            )
        if seen["windows_at_home"]:
            lines.append(f"this machine computed {len(seen['windows_at_home'])} windows itself")
    else:
        lines.append("computed on this machine; nothing left it")
    lines += ["", f"{report['latency_ms']['total']:.0f} ms. Masks and overlay are in {out}"]
    return "\n".join(lines)
