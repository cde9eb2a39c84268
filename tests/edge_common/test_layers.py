"""`edge_common` imports none of the packages that use it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edge_common

MODULES = sorted(Path(edge_common.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_edge_common_imports_no_program(module: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert not imported & {"transport", "engines", "cloud_node", "edge_runtime", "exporters"}
