"""Small JSON files from untrusted sources."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from edge_common.errors import ConfigError
from edge_common.json_file import json_bytes, read_json


class Note(msgspec.Struct):
    schema: int
    text: str


def read(path: Path, schema: int | None = 1) -> Note:
    return read_json(
        path, Note, max_bytes=100, error=ConfigError, remedy="write it again", schema=schema
    )


def test_a_written_note_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(json_bytes(Note(1, "x")))
    assert read(path) == Note(1, "x")
    assert path.read_text() == '{\n  "schema": 1,\n  "text": "x"\n}\n'
    path.write_bytes(json_bytes(Note(7, "x")))
    assert read(path, schema=None) == Note(7, "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b" " * 101, "is larger than 100 bytes"),
        (b'{"schema": 2}', "has schema 2, expected 1: a newer version"),
        (b'{"schema": 0}', "has schema 0, expected 1: an older version"),
        (b'{"schema": 1}', "is damaged: Object missing required field `text`"),
        (b"\xff", "is damaged"),
        (b"", "is damaged"),
        (b"[" * 100, "is damaged"),
    ],
)
def test_malformed_content_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"note\.json {reason}.*: write it again"):
        read(path)


@pytest.mark.timeout(30)
def test_a_path_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.json")
    os.mkfifo(tmp_path / "pipe")  # opening a pipe would wait for a writer
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match=r"is not a file: write it again"):
            read(tmp_path / name)
