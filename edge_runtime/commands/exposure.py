"""`edge-runtime exposure`: what each party may have seen so far, from the record on disk."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_common.errors import RecordError
from edge_common.text import printable, table

if TYPE_CHECKING:
    from PIL import Image

    from edge_runtime.exposure.store import Contents, Photo, Scene

DESCRIPTION = """\
Show what each party (all nodes of one provider) may have seen so far: for every scene of a stream
and every photo on record, the share of its area. With --out also draw it."""

EPILOG = """\
A scene is what one camera or video shows until the picture really changes. Its budget holds for all
its frames, also after a restart. "unknown" means that a process was killed, or the machine switched
off, at a moment at which the record said only that everything allowed may have been seen. Nothing
more of such a scene is sent. If you know that the camera shows something else now, say so with
--new-scene; end the process that uses the stream first. What was seen before then counts no longer.

A photo is listed by a number that says nothing about it to anyone without this edge's secret.
The record is in the folder "exposure" beside edge.toml. To read it does not disturb a process that
writes it.

examples:
  edge-runtime exposure
  edge-runtime exposure --stream door --out door.png
  edge-runtime exposure --json | jq '.scenes[-1].parties'
  edge-runtime exposure --new-scene door
"""

_SHOWN = 20
"""Scenes and photos in the table; all are in the JSON."""


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
        "--folder",
        type=Path,
        metavar="DIR",
        help="of the record, instead of the one of --config",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stream", metavar="NAME", help="only the scenes of that stream")
    which.add_argument(
        "--photo", metavar="NUMBER", help="only that photo; its first digits suffice"
    )
    which.add_argument(
        "--new-scene",
        metavar="STREAM",
        help="say that the stream shows another scene now, so that its budget starts again",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="draw what each party may have seen of the last scene, or of --photo",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def run(args: argparse.Namespace) -> int:
    """Read the record and show it, or end a scene."""
    from edge_runtime.exposure.store import read_contents

    folder = args.folder or _folder(args.config)
    if args.new_scene is not None:
        return _end_scene(folder, args.new_scene, args.json)
    contents = _chosen(read_contents(folder), folder, args.stream, args.photo)
    if args.out is not None:
        _draw(contents, args.out)
    if args.json:
        print(json.dumps(_as_json(contents, folder), indent=2))
    else:
        print(printable("\n".join(_lines(contents, folder))))
        if args.out is not None:
            print(f"\n{args.out}: what each party may have seen")
    return 0


def _folder(config_file: Path) -> Path:
    from edge_runtime.config import load_config

    folder = load_config(config_file).exposure
    assert folder is not None  # a file has a default
    return Path(folder)


def _end_scene(folder: Path, stream: str, as_json: bool) -> int:
    from edge_runtime.exposure.store import ExposureStore, read_contents

    live = [s.stream for s in read_contents(folder).scenes.values() if s.state == "live"]
    if stream not in live:
        raise RecordError(
            f"no scene of a stream {stream!r} goes on",
            mend=f"there are {', '.join(live)}" if live else "",
        )
    with ExposureStore(folder) as store:
        store.new_scene(stream)
        if not store.flush():
            raise RecordError(store.problem or f"cannot write {folder}")
    if as_json:
        print(json.dumps({"stream": stream, "new_scene": True}))
    else:
        print(printable(f"{stream}: the next frame begins a new scene"))
    return 0


def _chosen(contents: Contents, folder: Path, stream: str | None, photo: str | None) -> Contents:
    import msgspec

    scenes, photos = contents.scenes, contents.photos
    if stream is not None:
        scenes = {key: scene for key, scene in scenes.items() if scene.stream == stream}
        photos = {}
        if not scenes:
            known = sorted({scene.stream for scene in contents.scenes.values()})
            raise RecordError(
                f"{folder} has no stream {stream!r}",
                mend=f"it has {', '.join(known)}" if known else "",
            )
    if photo is not None:
        scenes, photos = {}, {key: each for key, each in photos.items() if key.startswith(photo)}
        if len(photos) != 1:
            found = f"{len(photos)} photos" if photos else "no photo"
            raise RecordError(
                f"{folder} has {found} with a number that begins with {photo!r}",
                mend="`edge-runtime exposure` lists them",
            )
    return msgspec.structs.replace(contents, scenes=scenes, photos=photos)


def _lines(contents: Contents, folder: Path) -> list[str]:
    if not contents.scenes and not contents.photos:
        return [f"Nothing is on record in {folder}."]
    lines: list[str] = []
    if contents.scenes:
        scenes = [("SCENE OF", "BEGAN (UTC)", "GOES ON", "BUDGET", "SEEN BY")]
        for scene in list(contents.scenes.values())[-_SHOWN:]:
            goes_on = "yes" if scene.state == "live" else "no"
            budget = f"{scene.max_exposure:.0%}"
            scenes.append((scene.stream, _when(scene.begun), goes_on, budget, _seen(scene)))
        lines += [*table(scenes), *_left_out("scenes", len(contents.scenes)), ""]
    if contents.photos:
        photos = [("PHOTO", "FIRST SENT (UTC)", "BUDGET", "SEEN BY")]
        for key, photo in list(contents.photos.items())[-_SHOWN:]:
            budget = f"{photo.max_exposure:.0%}"
            photos.append((key[:12], _when(photo.begun), budget, _listed(_photo_shares(photo))))
        lines += [*table(photos), *_left_out("photos", len(contents.photos)), ""]
    if contents.in_use:
        lines.append("A process has the record open: shares include what it may send next.")
    return lines[:-1] if not lines[-1] else lines


def _left_out(what: str, count: int) -> list[str]:
    return [f"and {count - _SHOWN} older {what}, which --json shows"] if count > _SHOWN else []


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if seconds else "-"


def _seen(scene: Scene) -> str:
    shares = _scene_shares(scene)
    return f"unknown: up to {scene.max_exposure:.0%} each" if shares is None else _listed(shares)


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{party} {share:.1%}" for party, share in shares.items()) or "nobody"


def _scene_shares(scene: Scene) -> dict[str, float] | None:
    """Party -> share of the scene; None if that is not known."""
    from edge_runtime.exposure.mosaic import Mosaic

    if scene.blanket:
        return None
    mosaic = Mosaic.from_bytes(scene.snapshot)
    return {party: mosaic.share(party) for party in sorted(mosaic.parties)}


def _photo_shares(photo: Photo) -> dict[str, float]:
    return {party: photo.share(windows) for party, windows in photo.seen().items()}


def _as_json(contents: Contents, folder: Path) -> dict[str, Any]:
    def common(entry: Scene | Photo, shares: dict[str, float] | None) -> dict[str, Any]:
        began = None
        if entry.begun:
            began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.begun))
        return {"began": began, "max_exposure": entry.max_exposure, "parties": shares}

    scenes = [
        {
            "id": key,
            "stream": scene.stream,
            "goes_on": scene.state == "live",
            "blanket": scene.blanket,
            **common(scene, _scene_shares(scene)),
        }
        for key, scene in contents.scenes.items()
    ]
    photos = [
        {"photo": key, **common(photo, _photo_shares(photo))}
        for key, photo in contents.photos.items()
    ]
    return {"folder": str(folder), "in_use": contents.in_use, "scenes": scenes, "photos": photos}


def _draw(contents: Contents, out: Path) -> None:
    """Draw the last scene or, if there is none, the last photo."""
    from edge_common.files import atomic_file

    if contents.scenes:
        picture = _scene_picture(next(reversed(contents.scenes.values())))
    elif contents.photos:
        picture = _photo_picture(next(reversed(contents.photos.values())))
    else:
        raise RecordError("nothing is on record, so nothing can be drawn")
    with atomic_file(out, mode=0o600, instead="name another file with --out") as scratch:
        picture.save(scratch, "PNG")


def _scene_picture(scene: Scene) -> Image.Image:
    import numpy as np

    from edge_runtime.exposure.mosaic import Mosaic
    from edge_runtime.imaging.render import what_each_party_has_seen

    shares = _scene_shares(scene)
    if shares is None:
        raise RecordError(
            f"which part of {scene.stream} the parties have seen is not known, so it cannot be "
            f"drawn: up to {scene.max_exposure:.0%} each",
            mend=f"edge-runtime exposure --new-scene {scene.stream}, if it shows another scene now",
        )
    mosaic = Mosaic.from_bytes(scene.snapshot)
    largest, *others = mosaic.parts or [0]
    shown = np.zeros((1, 1), bool)
    seen = {}
    for party in shares:
        shown, seen[party] = mosaic.picture(party, largest)
    detail = "what the camera has shown of it"
    if others:
        detail += f"; {len(others)} parts at unknown places are not drawn"
    return what_each_party_has_seen((f"The scene of {scene.stream}", detail), shown, seen, shares)


def _photo_picture(photo: Photo) -> Image.Image:
    import numpy as np

    from edge_runtime.imaging.render import what_each_party_has_seen

    seen = {}
    for party, windows in photo.seen().items():
        seen[party] = np.zeros(photo.size, bool)
        for window in windows:
            y0, x0, y1, x1 = photo.rect(window)
            seen[party][y0:y1, x0:x1] = True
    shown = np.ones(photo.size, bool)
    title = "The photo", "in its windows"
    return what_each_party_has_seen(title, shown, seen, _photo_shares(photo))
