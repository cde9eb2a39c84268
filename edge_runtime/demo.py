"""The whole system on one machine: three node processes, one photo and three clicks.

Every token and mask is compared bit for bit with those of another process that computes all windows
in one batch. Run as a module, this file is that process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_common.errors import EdgeRuntimeError, OffloadError
from edge_common.files import explain_write_errors, move_folder, scratch_folder
from edge_common.progress import progress
from edge_common.signals import child_process
from edge_common.text import printable, table
from edge_runtime.imaging.prompts import Point, Prompt
from edge_runtime.imaging.segmentation import (
    ANOTHER_FOLDER,
    Object,
    check_folder,
    dumps,
    png,
    segment,
)

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

PHOTOS = Path(__file__).parent / "photos"
PHOTO = PHOTOS / "coins.png"
REFERENCE = PHOTOS / "coins-reference.png"
"""Label image: 0 is background, k the k-th coin."""
CLICKS = ((335, 43), (205, 124), (46, 260))
NODES = ("alpha", "beta", "gamma")
MAX_EXPOSURE = 0.37
"""With three nodes, a little more than a third of the photo each."""
_START_S = 60.0
_DEADLINE_S = 60.0  # generous: three nodes and an edge share this machine, perhaps with others
_RESULTS = ("report.json", "overlay.png", "what-each-node-saw.png")
_ROOM = 4 << 20
"""Bytes that the results take, and a little more."""

PROMPTS = tuple(Prompt(points=(Point(x, y),)) for x, y in CLICKS)


@dataclass(frozen=True)
class Run:
    """The parts of two runs that must be equal.

    Attributes:
        tokens: the stack's outputs, one row per window of the photo.
        masks: bool `[objects, H, W]`.
    """

    tokens: Mapping[str, np.ndarray]
    masks: np.ndarray


def run_demo(out: Path, *, bundle: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and write its three files into ``out``, in place of those of an earlier run.

    Args:
        bundle: full bundle. None is the shipped bundle.
        quiet: print no progress on stderr.

    Returns:
        what ``report.json`` holds.

    Raises:
        EdgeRuntimeError: a node did not start, or failed, or ``out`` holds other files.
    """
    from engines.bundle import Bundle, shipped_bundle

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    full = Bundle.load(bundle or shipped_bundle())
    check_folder(out, _RESULTS.__contains__, "report.json")
    temporary = Path(tempfile.gettempdir()) / "edge-runtime-demo"
    with (
        scratch_folder(out, room=_ROOM) as results,
        scratch_folder(temporary, mode=0o700, instead="set TMPDIR") as scratch,
    ):
        say(f"starting {len(NODES)} nodes, each with its own keys and the stack alone")
        with _nodes(scratch, full.path, quiet) as config:
            say("segmenting the photo through them")
            offloaded, report, pictures = _offloaded(config, full.path)
        say("computing it all in one process, to compare")
        alone = _alone(scratch, full.path)
        report["identical_to_local"] = identical(offloaded, alone)
        with explain_write_errors(out, instead=ANOTHER_FOLDER):
            for name, picture in pictures.items():
                (results / name).write_bytes(png(picture))
            (results / "report.json").write_text(dumps(report), encoding="utf-8")
            move_folder(results, out, replace=True)
    return report


def identical(one: Run, other: Run) -> bool:
    """True if two runs have the same bits in every token and mask."""
    return set(one.tokens) == set(other.tokens) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in [
            (one.masks, other.masks),
            *((one.tokens[k], other.tokens[k]) for k in one.tokens),
        ]
    )


def verdict(report: Mapping[str, Any]) -> list[str]:
    """The reasons why a run of the demo failed. Empty if it succeeded."""
    failures = []
    if report["identical_to_local"] is not True:
        failures.append("the nodes' result differs from the one computed in one process")
    if not 0 < report["largest_share"] <= MAX_EXPOSURE:
        failures.append(
            f"one node saw {report['largest_share']:.1%} of the photo, above {MAX_EXPOSURE:.0%}"
        )
    return failures


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """Print a short table, and the paths of the files."""
    latency = report["latency_ms"]
    steps = ("upload", "compute", "download")
    rows = [("node", "windows", "of photo", "sent", "returned", *steps)]
    for node in report["nodes"]:
        times = latency["nodes"][node["name"]]
        rows.append(
            (
                node["name"],
                f"{len(node['windows'])}",
                f"{node['share_of_image']:.1%}",
                f"{node['bytes_up'] / 1000:.0f} kB",
                f"{node['bytes_down'] / 1000:.0f} kB",
                *(f"{times[step]:.0f} ms" for step in steps),
            )
        )
    print("What each node did")
    print("\n".join(table(rows)) + "\n")
    same = "yes, every bit of every token and mask" if report["identical_to_local"] else "NO"
    each = ", ".join(f"{value:.2f}" for value in report["mask_iou_per_click"])
    facts = {
        "same as one process": same,
        "most one node saw": f"{report['largest_share']:.1%} of the photo; at most "
        f"{MAX_EXPOSURE:.0%} allowed",
        "windows sent": f"{report['windows_sent']} of {report['windows_total']}; the others hold "
        "no pixel of the photo",
        "mask IoU": f"{report['mask_iou']:.2f} with the reference ({each})",
        "time": f"{latency['total']:.0f} ms: windows {latency['windows']:.0f}, nodes "
        f"{latency['stack']:.0f}, tail {latency['tail']:.0f}, decoder {latency['decoder']:.0f}",
    }
    for name, value in facts.items():
        print(f"{name:<20} {value}")
    print("\nLook at:")
    for name in _RESULTS:
        print(printable(f"  {out / name}"))


# -- the offloaded run --------------------------------------------------------------------------


def _offloaded(config: EdgeConfig, bundle: Path) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """Segment through the nodes; returns what to compare, the report so far, and the pictures."""
    from PIL import Image

    from edge_runtime.imaging import render
    from edge_runtime.imaging.images import load_image
    from edge_runtime.predictor import OffloadPredictor

    image = load_image(PHOTO)
    masks: list[np.ndarray] = []
    with OffloadPredictor(config, bundle=bundle, device="cpu") as predictor:
        # Open this side's engines and connect, so that this time does not count.
        predictor.load()
        assert predictor.offloader is not None
        for node in predictor.offloader.status(_START_S):
            if not node.usable:
                raise OffloadError(f"node {node.name} cannot be used: {node.detail}")
        overlay = render.Overlay(image)

        def keep(number: int, found: Object) -> None:
            masks.append(found.masks[0])
            overlay.add(found.masks[0])

        found = segment(predictor, image, PROMPTS, each=keep)
        assert predictor.image is not None
        offload, windows = predictor.report, predictor.image.windows
        tokens = predictor.image.stack_outputs
        assert offload is not None
        assert tokens is not None
        pictures = {
            "overlay.png": overlay.finish(PROMPTS),
            "what-each-node-saw.png": render.what_each_node_saw(
                image, windows, predictor.bundle.geometry, offload
            ),
        }
    with Image.open(REFERENCE) as opened:
        scores = mask_ious(masks, np.array(opened), CLICKS)
    exposure = found.report["exposure"]
    report = {
        "photo": PHOTO.name,
        "size": found.report["size"],
        "model": found.report["model"],
        "nodes": exposure["nodes"],
        "identical_to_local": False,
        **{
            key: exposure[key]
            for key in (
                "max_exposure",
                "largest_share",
                "separation",
                "windows_total",
                "windows_sent",
                "bytes_up",
                "bytes_down",
            )
        },
        "mask_iou": float(np.mean(scores)),
        "mask_iou_per_click": scores,
        "clicks": [list(click) for click in CLICKS],
        "predicted_iou": [item["masks"][0]["predicted_iou"] for item in found.report["objects"]],
        "latency_ms": found.report["latency_ms"],
        "ledger": exposure["ledger"],
        "software": _software(),
    }
    return Run(tokens, np.stack(masks)), report, pictures


def mask_ious(
    masks: Sequence[np.ndarray], reference: np.ndarray, clicks: Sequence[tuple[int, int]]
) -> list[float]:
    """IoU of each mask (bool ``[H, W]``) with the reference object (label image) clicked at."""
    scores = []
    for mask, (x, y) in zip(masks, clicks, strict=True):
        truth = reference == reference[y, x]
        scores.append(float(np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth)))
    return scores


def _software() -> dict[str, str]:
    from importlib.metadata import version

    import onnxruntime

    return {
        "edge-runtime": version("edge-runtime"),
        "onnxruntime": onnxruntime.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


# -- the nodes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _nodes(scratch: Path, bundle: Path, quiet: bool) -> Iterator[EdgeConfig]:
    """Start nodes and exchange keys; yields the configuration of an edge that may use them."""
    from edge_runtime.config import EdgeConfig, NodeConfig
    from engines.bundle import Bundle, node_bundle
    from engines.ort import cores
    from transport.keys import AUTHORIZED, generate, generate_secret, make_directory, write_public

    edge = make_directory(scratch / "edge")
    secret = edge / "edge.secret"
    generate_secret(secret)
    node_bundle(Bundle.load(bundle), scratch / "node-bundle")
    threads = max(1, cores() // len(NODES))
    with contextlib.ExitStack() as running:
        processes = []
        for name in NODES:
            keys = make_directory(scratch / name)
            generate(keys, "node")
            mine = generate(edge, name)
            write_public(make_directory(keys / AUTHORIZED) / "edge.pub", mine.public, "edge")
            command = [sys.executable, "-m", "cloud_node.cli", "serve"]
            command += ["--bundle", str(scratch / "node-bundle"), "--keys", str(keys)]
            command += ["--bind", "tcp://127.0.0.1:0", "--threads", str(threads)]
            command += ["--device", "cpu", "--ready-file", str(scratch / f"{name}.json")]
            with open(scratch / f"{name}.log", "wb") as log:
                options: dict[str, Any] = {
                    "stdin": subprocess.DEVNULL,
                    "stdout": log,
                    "stderr": log,
                }
                processes.append(running.enter_context(child_process(command, **options)))
        nodes = []
        with progress("waiting for the nodes", len(NODES), quiet=quiet) as waiting:
            for name, process in zip(NODES, processes, strict=True):
                ready = _ready(scratch, name, process)
                nodes.append(
                    NodeConfig(
                        name=name,
                        endpoint=ready["endpoint"],
                        server_key=ready["public_key"],
                        client_key=str(edge / f"{name}.key"),
                    )
                )
                waiting.advance()
        yield EdgeConfig(
            nodes=tuple(nodes),
            secret=str(secret),
            deadline_s=_DEADLINE_S,
            max_exposure=MAX_EXPOSURE,
        )


def _ready(scratch: Path, name: str, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Wait until a node serves; returns what it writes then."""
    path = scratch / f"{name}.json"
    until = time.monotonic() + _START_S
    while not path.exists():
        if process.poll() is not None:
            said = _last_line((scratch / f"{name}.log").read_bytes())
            raise EdgeRuntimeError(f"node {name} ended before it served; it said: {said}")
        if time.monotonic() > until:
            raise EdgeRuntimeError(f"node {name} did not start within {_START_S:g} s")
        time.sleep(0.02)
    ready: dict[str, str] = json.loads(path.read_text())
    return ready


def _last_line(log: bytes) -> str:
    lines = log.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


# -- the separate process -----------------------------------------------------------------------


def _alone(scratch: Path, bundle: Path) -> Run:
    """The same photo and clicks in a process without nodes."""
    result, log = scratch / "alone.npz", scratch / "alone.log"
    command = [sys.executable, "-m", "edge_runtime.demo", str(bundle), str(result)]
    with (
        open(log, "wb") as said,
        child_process(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as process,
    ):
        code = process.wait()
    if code:
        raise EdgeRuntimeError(
            f"the process to compare with failed ({code}); it said: {_last_line(log.read_bytes())}"
        )
    return load_run(result)


def compute_alone(bundle: Path) -> Run:
    """Segment the demo's photo in this process, all windows in one batch."""
    from edge_runtime.imaging.images import load_image
    from edge_runtime.predictor import OffloadPredictor

    masks: list[np.ndarray] = []

    def keep(number: int, found: Object) -> None:
        masks.append(found.masks[0])

    with OffloadPredictor(None, bundle=bundle, device="cpu") as predictor:
        segment(predictor, load_image(PHOTO), PROMPTS, each=keep)
        assert predictor.image is not None
        assert predictor.image.stack_outputs is not None
        return Run(predictor.image.stack_outputs, np.stack(masks))


def save_run(path: Path, run: Run) -> None:
    """Write a run for another process."""
    arrays: dict[str, Any] = {f"tokens.{k}": v for k, v in run.tokens.items()}
    np.savez(path, masks=run.masks, **arrays)


def load_run(path: Path) -> Run:
    """Read what :func:`save_run` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        tokens = {k.removeprefix("tokens."): arrays[k] for k in arrays.files if k != "masks"}
        return Run(tokens, arrays["masks"])


if __name__ == "__main__":
    save_run(Path(sys.argv[2]), compute_alone(Path(sys.argv[1])))
