"""Segments photos by prompts and writes folders of masks, for ``edge-runtime segment`` and the
demo."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_common.errors import ConfigError, EdgeRuntimeError, OutputError
from edge_common.files import explain_write_errors, move_folder, scratch_folder, write_atomically
from edge_common.signals import defer_signals, on_forced_exit
from edge_common.text import printable
from edge_runtime.imaging.prompts import Prompt, check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from edge_runtime.offload.report import OffloadReport
    from edge_runtime.predictor import OffloadPredictor

log = logging.getLogger(__name__)

RESULT = "result.json"
_OURS = re.compile(
    r"mask-\d+(-\d+)?\.png|masks\.png|overlay\.png|what-each-node-saw\.png|result\.json"
)
DRAWING_SIDE = 2048
"""Longest side of drawings, in pixels; masks are written at the photo's own size."""
ANOTHER_FOLDER = "name another folder with --out"
_ROOM, _ROOM_OF_PICTURES = 32 << 10, 8 << 20
"""Bytes that a report takes, and pictures."""


@dataclass(frozen=True)
class Object:
    """The model's answer to one prompt.

    ``masks``: bool ``[n, H, W]``, ``predicted_iou``: the model's own estimate of each mask's IoU,
    best mask first. n is 1, or 3 when all of the model's answers were asked for.
    """

    prompt: Prompt
    masks: np.ndarray
    predicted_iou: tuple[float, ...]
    decoder_ms: float
    upscale_ms: float


def predict(predictor: OffloadPredictor, prompt: Prompt, all_masks: bool = False) -> Object:
    """Decode one object on the photo that is set.

    Returns the mask with the highest predicted IoU, or with `all_masks` all three.
    """
    points = prompt.points
    answer = predictor.predict(
        point_coords=np.array([(p.x, p.y) for p in points]) if points else None,
        point_labels=np.array([p.label for p in points]) if points else None,
        box=np.array(msgspec.structs.astuple(prompt.box)) if prompt.box else None,
    )
    order = np.argsort(-answer.iou, kind="stable")[: None if all_masks else 1]
    iou = tuple(float(answer.iou[i]) for i in order)
    return Object(prompt, answer.masks[order], iou, answer.decoder_ms, answer.upscale_ms)


@dataclass
class Segmentation:
    """All objects of a photo.

    ``labels``: unsigned ``[H, W]``, 0 or the number of the last object that covers the pixel.
    ``report``: plain data for ``result.json``.
    """

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
    assert predictor.image is not None
    timing = predictor.image.timing
    decoder = upscale = elsewhere = 0.0
    height, width = image.shape[:2]
    small = np.uint8 if len(prompts) < 256 else np.uint16
    labels = np.zeros((height, width), small)
    objects: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts, 1):
        found = predict(predictor, prompt, all_masks)
        decoder += found.decoder_ms
        upscale += found.upscale_ms
        began = time.perf_counter()
        each(number, found)
        elsewhere += time.perf_counter() - began
        labels[found.masks[0]] = number
        objects.append(_described(number, found))
    if predictor.offloader is not None:
        predictor.offloader.settle()  # a lie that is found now counts
    offload = predictor.report
    report: dict[str, Any] = {
        "size": {"width": width, "height": height},
        "model": _model(predictor),
        "offloaded": offload is not None,
        "objects": objects,
        "latency_ms": {
            "windows": timing.windows,
            **({"nodes": _node_times(offload)} if offload else {}),
            "stack" if predictor.image.stack_outputs is not None else "encoder": timing.encode,
            "tail": timing.tail,
            "decoder": decoder,
            "upscale": upscale,
            "total": (time.perf_counter() - start - elsewhere) * 1000,
        },
    }
    if offload:
        report["exposure"] = _exposure(offload)
    return Segmentation(labels, report)


def _exposure(offload: OffloadReport) -> dict[str, Any]:
    return {
        "max_exposure": offload.max_exposure,
        "largest_share": offload.largest_share,
        "separation": offload.separation,
        "windows_total": offload.windows_total,
        "windows_sent": offload.windows_sent,
        "windows_at_home": list(offload.home),
        "windows_recomputed": list(offload.recomputed),
        "suspect": offload.suspect,
        "bytes_up": offload.bytes_up,
        "bytes_down": offload.bytes_down,
        "nodes": [
            {
                "name": node.name,
                "windows": list(node.windows),
                "share_of_image": node.share_of_image,
                "bytes_up": node.bytes_up,
                "bytes_down": node.bytes_down,
                "failure": node.failure,
            }
            for node in offload.nodes
        ],
        "ledger": msgspec.to_builtins(offload.ledger),
    }


def _node_times(offload: OffloadReport) -> dict[str, dict[str, float]]:
    return {
        node.name: {
            "upload": node.upload_ms,
            "queue": node.queue_ms,
            "compute": node.compute_ms,
            "download": node.download_ms,
        }
        for node in offload.nodes
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
            "predicted_iou": iou,
            "area": int(np.count_nonzero(mask)),
            "box": bounds(mask),
        }
        for i, (mask, iou) in enumerate(zip(found.masks, found.predicted_iou, strict=True))
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


def write(
    folder: Path,
    photo: str,
    image: np.ndarray,
    predictor: OffloadPredictor,
    prompts: Sequence[Prompt],
    *,
    all_masks: bool = False,
    pictures: bool = True,
    overwrite: bool = False,
    number: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Segment a photo into a folder that appears whole or not at all.

    The folder holds ``mask-K.png`` for each object (white on black), ``masks.png`` (all of them in
    colours; a pixel's palette index is the object's number), ``overlay.png``, ``result.json`` and,
    if nodes saw anything, ``what-each-node-saw.png``. If it fails after nodes were sent windows, a
    record of that is written beside the folder, see :func:`sends_on_record`.

    Args:
        pictures: whether to make ``overlay.png`` and ``what-each-node-saw.png``.
        overwrite: replace earlier results in ``folder``.
        number: if something is there, take ``FOLDER-2``, ``FOLDER-3`` and so on.

    Returns:
        the folder and what its ``result.json`` holds.

    Raises:
        ConfigError: the folder exists and neither ``overwrite`` nor ``number`` is on, or something
            else is there.
        EdgeRuntimeError: see :func:`segment`.
    """
    from PIL import Image

    from edge_runtime.imaging import render

    if not number:
        check_folder(folder, is_ours, RESULT, overwrite)
    check(prompts, image.shape[:2])
    # Masks take less than a bit per pixel.
    room = _ROOM + len(prompts) * image[..., 0].size // 16 + pictures * _ROOM_OF_PICTURES
    with (
        sends_on_record(folder, photo, predictor),
        scratch_folder(folder, room=room, instead=ANOTHER_FOLDER) as scratch,
    ):
        start = time.perf_counter()
        drawing = 0.0
        overlay = render.Overlay(image) if pictures else None

        def save(picture: Image.Image, name: str) -> None:
            with explain_write_errors(folder, instead=ANOTHER_FOLDER):
                (scratch / name).write_bytes(png(picture))

        def keep(number: int, found: Object) -> None:
            nonlocal drawing
            began = time.perf_counter()
            for rank, mask in enumerate(found.masks):
                save(Image.fromarray(mask), mask_name(number, rank))
            if overlay:
                overlay.add(_reduced(found.masks[0]))
            drawing += time.perf_counter() - began

        found = segment(predictor, image, prompts, all_masks=all_masks, each=keep)
        began = time.perf_counter()
        save(render.label_image(found.labels), "masks.png")
        if overlay:
            save(overlay.finish(prompts), "overlay.png")
        if pictures and predictor.report is not None and predictor.image is not None:
            seen = render.what_each_node_saw(
                image,
                predictor.image.windows,
                predictor.bundle.geometry,
                predictor.report,
                hidden=predictor.bundle.has("head"),
            )
            save(seen, "what-each-node-saw.png")
        end = time.perf_counter()
        report = {"photo": photo, **found.report}
        report["latency_ms"]["files"] = (drawing + end - began) * 1000
        report["latency_ms"]["total"] = (end - start) * 1000
        with explain_write_errors(folder, instead=ANOTHER_FOLDER):
            (scratch / RESULT).write_text(dumps(report), encoding="utf-8")
            for place in numbered(folder):
                try:
                    move_folder(scratch, place, replace=overwrite)
                    break
                except FileExistsError:
                    if not number:
                        raise
    return place, report


def png(picture: Image.Image) -> bytes:
    """A picture as a file's bytes. When Pillow writes files, it hides why a disk refuses one."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # twice as fast as the default, and hardly larger
    return buffer.getvalue()


def _reduced(mask: np.ndarray) -> np.ndarray:
    """The mask at the size of drawings."""
    step = -(-max(mask.shape) // DRAWING_SIDE)
    return mask[::step, ::step]


def numbered(path: Path, suffix: str = "") -> Iterator[Path]:
    """``PATH``, ``PATH-2``, ``PATH-3`` and so on, each with ``suffix``."""
    yield path.with_name(path.name + suffix)
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}{suffix}")


@contextmanager
def sends_on_record(folder: Path, photo: str, predictor: OffloadPredictor) -> Iterator[None]:
    """If the block fails after nodes were sent windows, record that in ``FOLDER.sends.json``.

    No earlier record is overwritten: the next one is ``FOLDER.sends-2.json``. The error then names
    the file if it is an EdgeRuntimeError; otherwise the log does.
    """
    before = predictor.record
    name = printable(photo)
    lock = threading.Lock()

    def record(why: dict[str, str]) -> str | None:
        """Write it, once, if nodes were sent anything; returns a sentence that says where."""
        if predictor.record is before or not (sent := predictor.report) or not sent.windows_sent:
            return None
        if not lock.acquire(blocking=False):
            return None
        text = dumps({"photo": photo, **why, "exposure": _exposure(sent)})
        try:
            with defer_signals():
                beside = folder.absolute()
                with explain_write_errors(beside):
                    beside.parent.mkdir(parents=True, exist_ok=True)
                names = numbered(beside.with_name(f"{beside.name}.sends"), ".json")
                path = next(path for path in names if not os.path.lexists(path))
                write_atomically(path, text, replace=False)
        except OutputError as problem:
            seen = "; ".join(f"{node.name}: {node.windows}" for node in sent.nodes if node.windows)
            return f"Nodes have seen windows of {name} ({seen}), which is not on record: {problem}"
        return f"What nodes have seen of {name} is on record in {path}"

    def interrupted() -> None:
        if (said := record({"error": "interrupted"})) is not None:
            log.warning("%s", said)

    with on_forced_exit(interrupted):
        try:
            yield
        except EdgeRuntimeError as error:
            if (said := record(error.fields())) is not None:
                error.found += f". {said}"
            raise
        except Exception as error:
            if (said := record({"error": str(error)})) is not None:
                log.warning("%s", said)
            raise
        except BaseException:
            interrupted()
            raise


def dumps(report: dict[str, Any]) -> str:
    """A report as JSON with lists of numbers on one line each."""
    text = json.dumps(report, indent=2, allow_nan=False)
    lists = re.compile(r"\[\n\s+([-0-9.e+,\s]+?)\s+\]")
    return lists.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def is_ours(name: str) -> bool:
    """True if :func:`write` may give a file that name."""
    return _OURS.fullmatch(name) is not None


def check_folder(
    folder: Path, ours: Callable[[str], bool], marker: str, overwrite: bool = True
) -> None:
    """Refuse a folder that holds anything but the results of an earlier run.

    Args:
        ours: says whether a file of that name may be a result.
        marker: a file that every result has.
        overwrite: whether earlier results may be replaced.

    Raises:
        ConfigError: it does, or has earlier results and `overwrite` is off.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ConfigError(f"{folder} is in the way", mend=ANOTHER_FOLDER)
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if not names:
        return
    # Replacing removes the whole folder, so it must hold nothing that we did not write.
    foreign = sorted(n for n, is_file in names.items() if not (is_file and ours(n)))
    if foreign or marker not in names:
        other = foreign[0] if foreign else next(iter(names))
        raise ConfigError(
            f"{folder} holds other things than these results, such as {other}", mend=ANOTHER_FOLDER
        )
    if not overwrite:
        raise ConfigError(
            f"{folder} holds earlier results",
            mend=f"{ANOTHER_FOLDER}, or replace them with --overwrite",
        )
