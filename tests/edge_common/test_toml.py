"""Errors for unreadable settings files and for unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_common.errors import ConfigError
from edge_common.toml import read_toml, unknown_key


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('name = "é"\n[[nodes]]\nport = 5', encoding="utf-8")
    assert read_toml(tmp_path / "x.toml", "make") == {"name": "é", "nodes": [{"port": 5}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist: make one"),
        (b"name = ]", "is not valid TOML: .*line 1"),
        (b'name = "\xe9"', "is not valid TOML: 'utf-8'"),
    ],
)
def test_an_unreadable_file_is_reported_with_the_reason(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "x.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"x.toml {says}"):
        read_toml(file, "make one")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_toml(tmp_path, "make one")


def test_an_unknown_key_is_reported_with_the_nearest_or_all_keys() -> None:
    known = ["deadline_s", "device"]
    near = unknown_key("dead-line-s", known)
    assert (near.found, near.mend) == ("unknown key 'dead-line-s'", "did you mean deadline_s?")
    far = unknown_key("zzz", known, " in table 2")
    assert (far.found, far.mend) == ("unknown key 'zzz' in table 2", "known are deadline_s, device")
