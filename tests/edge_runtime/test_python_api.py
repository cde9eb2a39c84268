"""The code of `docs/python-api.md`, run block by block, with three nodes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_common import errors
from edge_runtime.commands.init import _toml
from edge_runtime.demo import PHOTO
from engines.bundle import shipped_bundle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.process
def test_every_block_runs(
    make_fleet: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fleet = make_fleet("alpha", "beta", "gamma", bundle=shipped_bundle())
    monkeypatch.chdir(tmp_path)
    Path("edge.toml").write_text(_toml(fleet.config(), tmp_path))
    with Image.open(PHOTO) as photo:
        photo.convert("RGB").save("photo.jpg")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    told = capsys.readouterr().out
    assert re.search(r"best of three: 0\.\d\d, decoded in \d+ ms", told)
    assert told.count("(1, 128, 24, 24)") == 2
    assert told.count("can be used") == 3
    assert told.count("committed") == told.count("reserved") == 3
    assert "image | nowhere.jpg does not exist" in told


def test_every_code_is_listed() -> None:
    rows = re.findall(r"^\| (`.*?`) \| .*? \| .* \|$", TEXT, re.MULTILINE)
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    folders = ("cloud_node", "edge_common", "edge_runtime", "engines", "exporters", "transport")
    source = "".join(
        path.read_text() for folder in folders for path in (PAGE.parents[1] / folder).rglob("*.py")
    )
    given = set(re.findall(r"\bcode ?= ?\"(\w+)\"", source))
    used = given | {kind.code for kind in classes}
    assert used - listed == {errors.EdgeRuntimeError.code}
