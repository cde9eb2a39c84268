"""``edge-runtime segment``: photos, one or more objects in each, masks in folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_common.options import SECONDS, SHARE, THREADS
from edge_common.text import printable

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

DESCRIPTION = """\
Segment photos at points or boxes. The nodes of an edge.toml compute the windows of a photo, and
each sees only a few of them. With --local this machine computes everything. Points, boxes and masks
never leave this machine. Without --config and --local, edge.toml in the current folder is used."""

EPILOG = """\
Coordinates are pixels from the left top corner of the photo as a viewer shows it (upright).

Each --point and each --box is an object of its own. A point with label 0 is a place that does not
belong to the object before it. For an object with several prompts, put --object before them.
Several photos, or a folder of them, are all segmented at the same prompts.

The output folder of photo.jpg is out/photo.jpg, and out/photo.jpg-2 the next time. It holds
mask-1.png, mask-2.png, ... (white on black), masks.png (all in colours; a pixel's palette index is
the object's number), overlay.png, result.json and, if nodes took part, what-each-node-saw.png.
--out names another folder: for one photo its own (new or empty, unless --overwrite), for several
photos the one in which each gets its folder.

--json prints result.json with its place in "folder": for one photo as one document, for several as
one line each. For a photo that cannot be read, or a prompt outside of it, the line holds "photo",
"error", "code" and "mend"; the other photos are still segmented, and the exit code is 1.

examples:
  edge-runtime segment photo.jpg --point 120,80 --local
  edge-runtime segment photo.jpg --point 120,80 --point 300,210 --config edge.toml
  edge-runtime segment photo.jpg --point 120,80 --point 150,95,0     (the second is not on it)
  edge-runtime segment photo.jpg --box 20,30,180,150 --max-exposure 37%
  edge-runtime segment photo.jpg --object --point 120,80 --point 160,90 --object --box 20,30,60,70
  edge-runtime segment photos/ more.jpg --point 320,240 --no-pictures --json
"""


class _Ordered(argparse.Action):
    """Collects points, boxes and object markers in the order in which they are given."""

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
    parser.add_argument(
        "photos",
        nargs="+",
        type=Path,
        metavar="PHOTO",
        help="JPEG, PNG, WebP, TIFF, ...; or a folder of them",
    )
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
        help="largest share of the photo's area any node may see, such as 0.37 or 37%% (default: "
        "edge.toml's)",
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
        "--strict",
        action="store_const",
        const=True,
        help="compute every window of a node again here, so that no node can falsify a mask; takes "
        "as long as without nodes (default: edge.toml's)",
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
        help="engines on this machine: tensorrt: plans made by `edge-runtime build`; cuda, "
        "cpu: ONNX Runtime; auto: the first of these that may serve here (default: edge.toml's, or "
        "auto)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: out/PHOTO, numbered)"
    )
    result.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run"
    )
    result.add_argument(
        "--no-pictures",
        action="store_true",
        help="leave out overlay.png and what-each-node-saw.png, which take time",
    )
    result.add_argument(
        "--multimask",
        action="store_true",
        help="keep all three of the model's masks of each object, best first (default: the best)",
    )
    result.add_argument("--json", action="store_true", help="print result.json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Segment every photo. 1: one of several failed. A photo that fails leaves no folder."""
    from edge_common.errors import ImageError, PromptError
    from edge_common.progress import progress
    from edge_runtime.imaging import prompts as prompting
    from edge_runtime.imaging import segmentation
    from edge_runtime.imaging.images import load_image

    prompts = prompting.group([_parsed(option, text) for option, text in args.prompts])
    config = _config(args)
    photos = _photos(args.photos)
    several = len(args.photos) > 1 or args.photos[0].is_dir()
    if args.out is not None and not several:
        ours = segmentation.is_ours
        segmentation.check_folder(args.out, ours, segmentation.RESULT, args.overwrite)
    images = {}
    if not several:  # find mistakes before loading anything large
        images[photos[0]] = load_image(photos[0])
        prompting.check(prompts, images[photos[0]].shape[:2])

    from edge_runtime.predictor import OffloadPredictor

    failed = 0
    with OffloadPredictor(
        config,
        max_exposure=args.max_exposure,
        deadline_s=args.deadline,
        fallback=args.fallback,
        strict=args.strict,
        bundle=args.bundle,
        threads=args.threads,
        device=args.device,
    ) as predictor:
        predictor.load(quiet=args.json)
        total = len(photos) * predictor.cost
        with progress("segmenting", total, quiet=args.json) as predictor.pipeline.work:
            for photo in photos:
                predictor.pipeline.work.label = printable(photo.name)
                folder = (args.out or Path("out")) / photo.name
                named = args.out is not None and not several
                try:
                    image = images.pop(photo) if photo in images else load_image(photo)
                    found, report = segmentation.write(
                        args.out if named else folder,
                        photo.name,
                        image,
                        predictor,
                        prompts,
                        all_masks=args.multimask,
                        pictures=not args.no_pictures,
                        overwrite=args.overwrite,
                        number=not (named or args.overwrite),
                    )
                except (ImageError, PromptError) as error:
                    if not several:
                        raise
                    failed += 1
                    if isinstance(error, PromptError):
                        error.within(str(photo))
                    if args.json:
                        print(json.dumps({"photo": photo.name, **error.fields()}), flush=True)
                    else:
                        print(error.shown(), file=sys.stderr)
                    continue
                if args.json:
                    told = {**report, "folder": str(found)}
                    print(json.dumps(told) if several else segmentation.dumps(told).rstrip())
                else:
                    name = f"{photo}:\n" if several else ""
                    print(printable(f"{name}{_text(report, found)}") + "\n" * several)
                sys.stdout.flush()
    if failed:
        print(f"error: {failed} of {len(photos)} photos failed", file=sys.stderr)
    return 1 if failed else 0


def _photos(paths: Sequence[Path]) -> list[Path]:
    """The given photos, and those in the given folders."""
    from edge_common.errors import ImageError
    from edge_runtime.imaging.images import is_photo

    found = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if is_photo(p)) if path.is_dir() else [path]
        if not inside:
            raise ImageError(f"{path} holds no photos (JPEG, PNG, WebP, TIFF, ...)")
        found += inside
    return found


def _parsed(option: str, text: str | None) -> Any:
    from edge_runtime.imaging.prompts import parse_box, parse_point

    if text is None:
        return None
    return parse_point(text) if option == "--point" else parse_box(text)


def _config(args: argparse.Namespace) -> EdgeConfig | None:
    """The nodes to use; None computes everything here."""
    from edge_common.errors import ConfigError
    from edge_runtime.config import load_config

    if args.local:
        given = {
            "--max-exposure": args.max_exposure,
            "--deadline": args.deadline,
            "--fallback": args.fallback,
            "--strict": args.strict,
        }
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} is about nodes, and --local uses none")
        return None
    path = args.config or Path("edge.toml")
    if args.config is None and not path.exists():
        raise ConfigError(
            "neither --local nor --config is given, and there is no edge.toml in this folder",
            mend="give --local to compute on this machine, or --config FILE to use nodes "
            "(`edge-runtime init` writes that file)",
        )
    return load_config(path)


def _text(report: dict[str, Any], out: Path) -> str:
    lines = []
    for item in report["objects"]:
        best = item["masks"][0]
        box = "empty" if best["box"] is None else "box {},{},{},{}".format(*best["box"])
        lines.append(
            f"object {item['object']}: {best['area']} pixels, {box}, "
            f"predicted IoU {best['predicted_iou']:.2f}"
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
        if seen["windows_recomputed"]:
            again = len(seen["windows_recomputed"])
            lines.append(f"this machine computed {again} of the nodes' windows again")
        if seen["suspect"]:
            lines.append(
                "these masks may be wrong, because a node lied; with --strict they are not"
            )
    else:
        lines.append("computed on this machine; nothing left it")
    spent = report["latency_ms"]
    took = f"{_time(spent['total'])}, of which files took {_time(spent['files'])}"
    lines += ["", f"{took}. Masks and pictures are in {out}"]
    return "\n".join(lines)


def _time(milliseconds: float) -> str:
    seconds = milliseconds / 1000
    return f"{milliseconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
