"""Paths of a bundle's plans and the parity gate's notes. Imports the standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

FOLDER = "plans"
_SHIPPED = Path(__file__).parent / "bundles"


def plans_folder(bundle_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundle's plans and the parity gate's notes.

    It lies in the bundle. For the bundles that come with the package it lies in the user's cache,
    because the package may be read-only and an update replaces it.

    Raises:
        OSError: the bundle has no manifest.
    """
    root, cached = Path(bundle_path), cache()
    if cached is None or root.resolve().parent != _SHIPPED.resolve():
        return root / FOLDER
    digest = hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    return cached / f"{root.resolve().name}-{digest[:12]}" / FOLDER


def make_plans_folder(bundle_path: str | os.PathLike[str]) -> Path:
    """:func:`plans_folder`, made if it is missing. Raises OSError."""
    folder = plans_folder(bundle_path)
    for parent in reversed(folder.parents):
        if not parent.is_dir():
            parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)
    return folder


def bundle_of(folder: Path) -> Path:
    """The bundle whose :func:`plans_folder` is ``folder``."""
    if cache() not in folder.parents:
        return folder.parent
    return _SHIPPED / folder.parent.name.rpartition("-")[0]


def cache() -> Path | None:
    """This program's folder in the user's cache; None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "edge-runtime"
    except RuntimeError:
        return None
