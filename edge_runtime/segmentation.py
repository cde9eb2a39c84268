"""From prompts on a photo to a folder of masks: what ``edge-runtime segment`` and the demo share.

Promises that prompts outside the photo are refused before anything is computed or sent, that every
object is decoded against one embedding of one photo, and that the folder appears whole or not at
all. Drawing is left to :mod:`edge_runtime.render`, the model to :mod:`edge_runtime.predictor`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_runtime.prompts import Prompt, check
from engines.errors import ConfigError, EdgeRuntimeError, OutputError
from engines.files import write_whole
from engines.stopping import held, undone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_runtime.offload import OffloadReport
    from edge_runtime.predictor import OffloadPredictor

log = logging.getLogger(__name__)

RESULT = "result.json"
_OURS = re.compile(
    r"mask-\d+(-\d+)?\.png|masks\.png|overlay\.png|what-each-node-saw\.png|result\.json"
)
"""Every name that :func:`write` may give a file."""
DRAWING_SIDE = 2048
"""Longest side of drawings, in pixels; masks are written at the photo's own size."""


@dataclass(frozen=True)
class Object:
    """What the model made of one prompt.

    ``masks``: bool ``[n, H, W]``, ``scores``: the model's own estimate of each mask's IoU, best
    mask first. n is 1, or 3 when all of the model's answers were asked for.
    """

    prompt: Prompt
    masks: np.ndarray
    scores: tuple[float, ...]


def predict(predictor: OffloadPredictor, prompt: Prompt, all_masks: bool = False) -> Object:
    """Decode one object on the photo that is set.

    Of the model's three answers, the one that the model itself thinks best; or, with ``all_masks``,
    all three.
    """
    points = prompt.points
    masks, scores, _ = predictor.predict(
        point_coords=np.array([(p.x, p.y) for p in points]) if points else None,
        point_labels=np.array([p.label for p in points]) if points else None,
        box=np.array(msgspec.structs.astuple(prompt.box)) if prompt.box else None,
    )
    order = np.argsort(-scores, kind="stable")[: None if all_masks else 1]
    return Object(prompt, masks[order], tuple(float(scores[i]) for i in order))


@dataclass
class Segmentation:
    """All objects of a photo, with masks as drawn (``[h, w]``, ``scale`` times the photo's size).

    ``labels``: unsigned ``[H, W]``, 0 or the number of the last object that covers the pixel.
    ``report``: plain data for ``result.json``.
    """

    drawn: list[np.ndarray]
    labels: np.ndarray
    report: dict[str, Any]


def segment(
    predictor: OffloadPredictor,
    image: np.ndarray,
    prompts: Sequence[Prompt],
    *,
    all_masks: bool = False,
    each: Callable[[int, Object], None] = lambda number, found: None,
) -> Segmentation:
    """Segment a photo.

    Args:
        image: uint8 ``[H, W, 3]``, upright.
        prompts: one per object, as :func:`group` makes them.
        all_masks: keep all three of the model's masks of each object.
        each: called with each object's number (from 1) and masks as soon as they exist. Masks at
            the photo's size are not kept, so that many objects of a large photo fit into memory.

    Raises:
        EdgeRuntimeError: see :class:`~edge_runtime.predictor.OffloadPredictor`.
    """
    check(prompts, image.shape[:2])
    start = time.perf_counter()
    predictor.set_image(image)
    timing = predictor.timing
    decoder = upscale = 0.0
    height, width = image.shape[:2]
    small = np.uint8 if len(prompts) < 256 else np.uint16
    labels = np.zeros((height, width), small)
    drawn: list[np.ndarray] = []
    objects: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts, 1):
        found = predict(predictor, prompt, all_masks)
        decoder += timing.decoder
        upscale += timing.upscale
        each(number, found)
        labels[found.masks[0]] = number
        drawn.append(_reduced(found.masks[0]))
        objects.append(_described(number, found))
    offload = predictor.report
    report: dict[str, Any] = {
        "size": {"width": width, "height": height},
        "model": _model(predictor),
        "offloaded": offload is not None,
        "objects": objects,
        "latency_ms": {
            "windows": timing.windows,
            **({"nodes": _node_times(predictor)} if offload else {}),
            "stack" if predictor.stack_outputs is not None else "encoder": timing.encode,
            "tail": timing.tail,
            "decoder": decoder,
            "upscale": upscale,
            "total": (time.perf_counter() - start) * 1000,
        },
    }
    if offload:
        report["exposure"] = _exposure(offload)
    return Segmentation(drawn, labels, report)


def _exposure(offload: OffloadReport) -> dict[str, Any]:
    return {
        "max_exposure": offload.max_exposure,
        "separation": offload.separation,
        "windows_total": offload.windows_total,
        "windows_sent": offload.windows_sent,
        "windows_at_home": list(offload.home),
        "bytes_up": offload.bytes_up,
        "bytes_down": offload.bytes_down,
        "nodes": [
            {
                "name": node.name,
                "windows": list(node.windows),
                "share_of_image": node.exposure,
                "bytes_up": node.bytes_up,
                "bytes_down": node.bytes_down,
                "failure": node.failure,
            }
            for node in offload.nodes
        ],
        "ledger": msgspec.to_builtins(offload.ledger),
    }


def _node_times(predictor: OffloadPredictor) -> dict[str, dict[str, float]]:
    assert predictor.report is not None
    return {
        node.name: {
            "upload": node.upload_ms,
            "queue": node.queue_ms,
            "compute": node.compute_ms,
            "download": node.download_ms,
        }
        for node in predictor.report.nodes
    }


def _model(predictor: OffloadPredictor) -> dict[str, Any]:
    manifest = predictor.bundle.manifest
    return {
        "name": manifest.model,
        "order": manifest.order,
        "adapted": manifest.adapted,
        "precision": manifest.precision,
        "weights_sha256": manifest.weights_sha256,
    }


def _described(number: int, found: Object) -> dict[str, Any]:
    masks = [
        {
            "file": mask_name(number, i),
            "score": score,
            "area": int(np.count_nonzero(mask)),
            "box": bounds(mask),
        }
        for i, (mask, score) in enumerate(zip(found.masks, found.scores, strict=True))
    ]
    return {"object": number, "prompt": msgspec.to_builtins(found.prompt), "masks": masks}


def mask_name(number: int, rank: int = 0) -> str:
    """File name of an object's mask; ``rank`` 0 is the best one."""
    return f"mask-{number}.png" if rank == 0 else f"mask-{number}-{rank + 1}.png"


def bounds(mask: np.ndarray) -> list[int] | None:
    """Smallest ``[x0, y0, x1, y1]`` (right and bottom exclusive) around a mask; None if empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _reduced(mask: np.ndarray) -> np.ndarray:
    """The mask at the size of drawings."""
    step = -(-max(mask.shape) // DRAWING_SIDE)
    return mask[::step, ::step]


def write(
    folder: Path,
    photo: str,
    image: np.ndarray,
    predictor: OffloadPredictor,
    prompts: Sequence[Prompt],
    *,
    all_masks: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Segment a photo into a folder that appears whole or not at all; returns its report.

    The folder holds ``mask-K.png`` for each object (white on black), ``masks.png`` (all of them in
    colours; a pixel's palette index is the object's number), ``overlay.png``, ``result.json`` and,
    if nodes saw anything, ``what-each-node-saw.png``. If it fails after nodes were sent windows, a
    record of that is written beside the folder, see :func:`sends_on_record`.

    Raises:
        ConfigError: the folder exists and ``overwrite`` is off, or something else is in its place.
        EdgeRuntimeError: see :func:`segment`.
    """
    from PIL import Image

    from edge_runtime import render

    check_folder(folder, overwrite)
    check(prompts, image.shape[:2])
    with sends_on_record(folder, photo, predictor), whole_folder(folder) as scratch:

        def save(number: int, found: Object) -> None:
            for rank, mask in enumerate(found.masks):
                Image.fromarray(mask).save(scratch / mask_name(number, rank))

        found = segment(predictor, image, prompts, all_masks=all_masks, each=save)
        render.label_image(found.labels).save(scratch / "masks.png")
        render.overlay(image, found.drawn, prompts).save(scratch / "overlay.png")
        if predictor.report is not None and predictor.windows is not None:
            picture = render.what_each_node_saw(
                image,
                predictor.windows,
                predictor.bundle.geometry,
                predictor.report,
                hidden=predictor.bundle.has("head"),
            )
            picture.save(scratch / "what-each-node-saw.png")
        report = {"photo": photo, **found.report}
        (scratch / RESULT).write_text(dumps(report), encoding="utf-8")
    return report


@contextmanager
def sends_on_record(folder: Path, photo: str, predictor: OffloadPredictor) -> Iterator[None]:
    """If what is done within fails, write what nodes were sent for it to ``FOLDER.sends.json``.

    No earlier record is overwritten: the next one is ``FOLDER.sends-2.json``. An EdgeRuntimeError
    then names the file; for anything else, the log does.
    """
    before = predictor.report
    settled = False

    def settle(why: str) -> str | None:
        """Write the record, if there is one to write; returns what to say of it."""
        nonlocal settled
        sent = predictor.report
        if settled or sent is None or sent is before or not sent.windows_sent:
            return None
        settled = True
        try:
            path = _record(folder.absolute(), {"photo": photo, "error": why}, sent)
        except (OSError, OutputError) as problem:
            seen = "; ".join(f"{node.name}: {node.windows}" for node in sent.nodes if node.windows)
            return (
                f"nodes have seen windows of {photo} ({seen}), and no record of it could be "
                f"written: {problem}"
            )
        return f"what nodes have seen of {photo} is on record in {path}"

    def end() -> None:
        if said := settle("interrupted"):
            log.warning("%s", said)

    with undone(end):  # it also runs if the process has to end while an engine computes
        try:
            yield
        except Exception as error:
            with held():
                said = settle(str(error) or type(error).__name__)
            if said and isinstance(error, EdgeRuntimeError):
                error.args = (f"{error}. {said[0].upper()}{said[1:]}",)
            elif said:
                log.warning("%s", said)
            raise
        else:
            settled = True


def _record(folder: Path, what: dict[str, Any], sent: OffloadReport) -> Path:
    path, number = folder.with_name(f"{folder.name}.sends.json"), 1
    while os.path.lexists(path):
        number += 1
        path = folder.with_name(f"{folder.name}.sends-{number}.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dumps({**what, "exposure": _exposure(sent)}), replace=False)
    return path


def dumps(report: dict[str, Any]) -> str:
    """A report as JSON with lists of numbers on one line each."""
    text = json.dumps(report, indent=2, allow_nan=False)
    lists = re.compile(r"\[\n\s+([-0-9.e+,\s]+?)\s+\]")
    return lists.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that :func:`write` would have to overwrite, or can't.

    Raises:
        ConfigError: saying how to go on.
    """
    for parent in folder.absolute().parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ConfigError(f"{parent} is a file, not a folder: name another one with --out")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ConfigError(f"{folder} is in the way: name another folder with --out")
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if not names:
        return
    # Replacing removes the whole folder, so that it may hold nothing that we did not write.
    foreign = sorted(n for n, is_file in names.items() if not (is_file and _OURS.fullmatch(n)))
    if foreign or RESULT not in names:
        other = foreign[0] if foreign else next(iter(names))
        raise ConfigError(
            f"{folder} holds other things than results, such as {other}: name a new folder with "
            "--out"
        )
    if not overwrite:
        raise ConfigError(
            f"{folder} holds earlier results: name another folder with --out, or replace them "
            "with --overwrite"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` at the end, or vanishes on any error."""
    folder = folder.absolute()
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    old: Path | None = None
    try:
        yield scratch
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp's is private; results are as open as other files
        if folder.is_dir():
            old = scratch.with_name(f"{scratch.name}.old")
        try:
            if old is not None:
                folder.rename(old)
            scratch.rename(folder)
        except BaseException:
            if old is not None and old.exists():
                old.rename(folder)
            raise
    finally:
        for leftover in (scratch, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # does nothing if the folder is in it
