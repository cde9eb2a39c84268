"""Checks of paths that commands make before they load PyTorch or weights."""

from __future__ import annotations

import os
from pathlib import Path

from edge_common.errors import CheckpointError, EdgeRuntimeError, ImageError

DEVICE_HELP = "where to compute: cpu, cuda, or auto, which is cuda if PyTorch finds a GPU (auto)"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def check_checkpoint_file(path: Path) -> None:
    """Raise CheckpointError unless ``path`` is a readable file that is not empty."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint {path} {what}", mend="give the path of a .pt or .pth file"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty", mend="download or copy it again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"checkpoint {path} may not be read", mend="check its permissions")


def check_place(out: Path, error: type[EdgeRuntimeError]) -> None:
    """Raise ``error`` unless ``out`` can be written. Its folders may be missing."""
    for folder in out.absolute().parents:
        if not os.path.lexists(folder):
            continue
        if not folder.is_dir():
            raise error(
                f"cannot write {out}: {folder} is not a folder", mend="choose another --out"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise error(
                f"cannot write {out}: {folder} may not be written to",
                mend="allow it, or choose another --out",
            )
        return


def image_files(folder: Path) -> list[Path]:
    """The files under ``folder`` with names of images, sorted.

    Raises:
        ImageError: there are none.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a directory", mend="give a folder of images")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ImageError(
            f"no images under {folder}; expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return found
