"""Checks of paths before PyTorch is loaded."""

from __future__ import annotations

from pathlib import Path

from exporters.path_checks import image_files


def test_cameras_may_name_their_photos_in_capitals(tmp_path: Path) -> None:
    for name in ("b/IMG_0001.JPG", "a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == [tmp_path / "a.png", tmp_path / "b/IMG_0001.JPG"]
