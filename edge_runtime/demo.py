"""The whole system on one machine: three node processes, one photo, three clicks, and the proof.

Promises that what it shows is the real thing: nodes are ``cloud-node serve`` processes with keys of
their own and a bundle that holds the stack alone, the photo goes through the same code as
``edge-runtime segment``, and every token and mask is compared bit for bit with those of a separate
process that computed all windows in one batch. Whatever happens, the nodes it started are ended.
Run as a module with a folder, this file is that separate process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.prompts import Point, Prompt
from edge_runtime.segmentation import Object, dumps, segment
from engines.errors import ConfigError, EdgeRuntimeError, OffloadError

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

PHOTOS = Path(__file__).parent / "photos"
PHOTO = PHOTOS / "coins.png"
REFERENCE = PHOTOS / "coins-reference.png"
"""Label image: 0 is background, k the k-th coin."""
CLICKS = ((335, 43), (205, 124), (46, 260))
NODES = ("alpha", "beta", "gamma")
MAX_EXPOSURE = 0.37
"""The budget of the demo: with three nodes, little over a third of the photo each."""
_START_S = 60.0
_DEADLINE_S = 60.0  # generous: three nodes and an edge share this machine, perhaps with others
_STOP_S = 5.0
_RESULTS = ("overlay.png", "what-each-node-saw.png", "report.json")

PROMPTS = tuple(Prompt(points=(Point(x, y),)) for x, y in CLICKS)


@dataclass(frozen=True)
class Run:
    """What two runs must agree on. ``tokens``: the stack's outputs, one row per window of the
    photo; ``masks``: bool ``[objects, H, W]``."""

    tokens: Mapping[str, np.ndarray]
    masks: np.ndarray


def run_demo(
    out: Path,
    *,
    bundle: Path | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Run the demo and write its three files into ``out``.

    Args:
        bundle: full bundle; None is the one that comes with the package.
        say: is told what happens next.

    Returns:
        what ``report.json`` holds.

    Raises:
        EdgeRuntimeError: a node did not start, or failed.
    """
    from engines.bundle import Bundle, shipped_bundle

    full = Bundle.load(bundle or shipped_bundle())
    _check_out(out)
    with tempfile.TemporaryDirectory(prefix="edge-runtime-demo-") as scratch:
        say(f"starting {len(NODES)} nodes, each with its own keys and the stack alone")
        with _nodes(Path(scratch), full.path) as config:
            say("segmenting the photo through them")
            offloaded, report, pictures = _offloaded(config, full.path)
        say("computing it all in one process, to compare")
        alone = _alone(Path(scratch), full.path)
    report["identical_to_local"] = identical(offloaded, alone)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with _replacing(out / name) as path:
            picture.save(path, format="PNG")
    with _replacing(out / "report.json") as path:
        path.write_text(dumps(report), encoding="utf-8")
    return report


def identical(one: Run, other: Run) -> bool:
    """Whether two runs agree in every bit of every token and mask."""
    return set(one.tokens) == set(other.tokens) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in [
            (one.masks, other.masks),
            *((one.tokens[k], other.tokens[k]) for k in one.tokens),
        ]
    )


def verdict(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with a run of the demo; nothing, if all is well."""
    failures = []
    if report["identical_to_local"] is not True:
        failures.append("the nodes' result differs from the one computed in one process")
    if not 0 < report["max_exposure"] <= MAX_EXPOSURE:
        failures.append(
            f"one node saw {report['max_exposure']:.1%} of the photo, above {MAX_EXPOSURE:.0%}"
        )
    return failures


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """A short table on the terminal, and where to look."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    latency = report["latency_ms"]
    table = Table(title="What each node did", title_justify="left", title_style="bold")
    table.add_column("node")
    for column in ("windows", "of photo", "sent", "returned", "upload", "compute", "download"):
        table.add_column(column, justify="right", no_wrap=True)
    for node in report["nodes"]:
        times = latency["nodes"][node["name"]]
        table.add_row(
            node["name"],
            f"{len(node['windows'])}",
            f"{node['share_of_image']:.1%}",
            f"{node['bytes_up'] / 1000:.0f} kB",
            f"{node['bytes_down'] / 1000:.0f} kB",
            *(f"{times[step]:.0f} ms" for step in ("upload", "compute", "download")),
        )
    console.print(table)
    same = "yes, every bit of every token and mask" if report["identical_to_local"] else "NO"
    each = ", ".join(f"{value:.2f}" for value in report["mask_iou_per_click"])
    rows = {
        "same as one process": same,
        "most one node saw": f"{report['max_exposure']:.1%} of the photo; at most "
        f"{MAX_EXPOSURE:.0%} allowed",
        "windows sent": f"{report['windows_sent']} of {report['windows_total']}; the others hold "
        "no pixel of the photo",
        "mask IoU": f"{report['mask_iou']:.2f} with the reference ({each})",
        "time": f"{latency['total']:.0f} ms: windows {latency['windows']:.0f}, nodes "
        f"{latency['stack']:.0f}, tail {latency['tail']:.0f}, decoder {latency['decoder']:.0f}",
    }
    for name, value in rows.items():
        console.print(f"{name:<20} {value}")
    console.print("\nLook at:")
    for name in _RESULTS:
        console.print(f"  {out / name}", soft_wrap=True)


# -- the offloaded run --------------------------------------------------------------------------


def _offloaded(config: EdgeConfig, bundle: Path) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """Segment through the nodes: what to compare, the report so far, and the pictures."""
    from PIL import Image

    from edge_runtime import render
    from edge_runtime.images import load_image
    from edge_runtime.predictor import OffloadPredictor

    image = load_image(PHOTO)
    masks: list[np.ndarray] = []
    with OffloadPredictor(config, bundle=bundle, device="cpu") as predictor:
        # Before the clock starts: open this side's engines, as the nodes have, and connect.
        for stage in ("tail", "decoder"):
            predictor.pipeline.engine(stage)
        assert predictor.offloader is not None
        for node in predictor.offloader.status(_START_S):
            if not node.usable:
                raise OffloadError(f"node {node.name} cannot be used: {node.detail}")
        found = segment(predictor, image, PROMPTS, each=lambda _, o: masks.append(o.masks[0]))
        offload, windows, tokens = predictor.report, predictor.windows, predictor.stack_outputs
        assert offload is not None
        assert windows is not None
        assert tokens is not None
        pictures = {
            "overlay.png": render.overlay(image, found.drawn, PROMPTS),
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
        "predicted_iou": [item["masks"][0]["score"] for item in found.report["objects"]],
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
def _nodes(scratch: Path, bundle: Path) -> Iterator[EdgeConfig]:
    """Running nodes with keys exchanged, as a configuration of an edge that may use them."""
    from edge_runtime.config import EdgeConfig, NodeConfig
    from engines.bundle import Bundle, node_bundle
    from engines.ort import cores
    from transport.keys import AUTHORIZED, generate, generate_secret, make_directory, write_public

    edge = make_directory(scratch / "edge")
    secret = edge / "edge.secret"
    generate_secret(secret)
    node_bundle(Bundle.load(bundle), scratch / "node-bundle")
    threads = max(1, cores() // len(NODES))
    processes: list[subprocess.Popen[bytes]] = []
    nodes = []
    try:
        for name in NODES:
            keys = make_directory(scratch / name)
            generate(keys, "node")
            mine = generate(edge, name)
            write_public(make_directory(keys / AUTHORIZED) / "edge.pub", mine.public, "edge")
            command = [sys.executable, "-m", "cloud_node.cli", "serve"]
            command += ["--bundle", str(scratch / "node-bundle"), "--keys", str(keys)]
            command += ["--bind", "tcp://127.0.0.1:0", "--threads", str(threads)]
            command += ["--device", "cpu", "--ready-file", str(scratch / f"{name}.json")]
            with open(scratch / f"{name}.log", "wb") as log, _undisturbed():
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )
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
        yield EdgeConfig(
            nodes=tuple(nodes),
            secret=str(secret),
            deadline_s=_DEADLINE_S,
            max_exposure=MAX_EXPOSURE,
        )
    finally:
        with _undisturbed():
            _end(processes)


def _ready(scratch: Path, name: str, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """What a node says once it serves."""
    path = scratch / f"{name}.json"
    until = time.monotonic() + _START_S
    while not path.exists():
        if process.poll() is not None:
            log = (scratch / f"{name}.log").read_text(errors="replace").strip().splitlines()
            said = log[-1] if log else "nothing"
            raise EdgeRuntimeError(f"node {name} ended before it served; it said: {said}")
        if time.monotonic() > until:
            raise EdgeRuntimeError(f"node {name} did not start within {_START_S:g} s")
        time.sleep(0.02)
    ready: dict[str, str] = json.loads(path.read_text())
    return ready


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every process: kindly, then not."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back till the end: a node is started and noted down, or ended, in one piece."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


# -- the separate process -----------------------------------------------------------------------


def _alone(scratch: Path, bundle: Path) -> Run:
    """The same photo and clicks in a process that has never heard of nodes."""
    result = scratch / "alone.npz"
    command = [sys.executable, "-m", "edge_runtime.demo", str(bundle), str(result)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise EdgeRuntimeError(
            f"the process to compare with failed: {said[-1] if said else done.returncode}"
        )
    return load_run(result)


def compute_alone(bundle: Path) -> Run:
    """Segment the demo's photo in this process, all windows in one batch."""
    from edge_runtime.images import load_image
    from edge_runtime.predictor import OffloadPredictor

    masks: list[np.ndarray] = []

    def keep(number: int, found: Object) -> None:
        masks.append(found.masks[0])

    with OffloadPredictor(None, bundle=bundle, device="cpu") as predictor:
        segment(predictor, load_image(PHOTO), PROMPTS, each=keep)
        assert predictor.stack_outputs is not None
        return Run(predictor.stack_outputs, np.stack(masks))


def save_run(path: Path, run: Run) -> None:
    """Write a run for another process."""
    arrays: dict[str, Any] = {f"tokens.{k}": v for k, v in run.tokens.items()}
    np.savez(path, masks=run.masks, **arrays)


def load_run(path: Path) -> Run:
    """Read what :func:`save_run` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        tokens = {k.removeprefix("tokens."): arrays[k] for k in arrays.files if k != "masks"}
        return Run(tokens, arrays["masks"])


# -- files --------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigError(f"{out} is in the way: name another folder with --out")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A scratch file that takes the place of ``path`` once it is whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    save_run(Path(sys.argv[2]), compute_alone(Path(sys.argv[1])))
