"""The layers in docs/architecture.md, and the files that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "edge_common": set(),
    "engines": {"edge_common"},
    "transport": {"edge_common"},
    "cloud_node": {"edge_common", "engines", "transport"},
    "edge_runtime": {"edge_common", "engines", "transport"},
    "exporters": {"edge_common", "engines"},
}


def imported(file: Path) -> set[str]:
    """The packages of this project that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found & LAYERS.keys()


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_the_layers_below(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    above = {
        str(file.relative_to(ROOT)): extra
        for file in files
        if (extra := imported(file) - LAYERS[package] - {package})
    }
    assert not above


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    start, end = text.index("## The way of one image"), text.index("## Two kinds of padding")
    named = re.findall(r"[\w/]+(?:\.py\b|/(?=`))", text[start:end])
    assert len(named) > 40
    edge = [ROOT / "edge_runtime" / room for room in ("offload", "exposure")]
    folders = [ROOT, *(ROOT / package for package in LAYERS), *edge]
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert not missing
