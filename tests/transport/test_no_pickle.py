"""A scan of the sources: no runtime code turns bytes into code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = ("edge_common", "transport", "edge_runtime", "cloud_node", "engines")
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "allow_pickle", "loads_pickle"}


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every call that unpickles or evaluates."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
            found = MODULES & set(names)
        elif isinstance(node, ast.ImportFrom):
            found = MODULES & {(node.module or "").partition(".")[0]}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found = CALLS & {node.func.id}
        elif isinstance(node, ast.Attribute):
            found = ATTRIBUTES & {node.attr}
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = node.value
            harmless = isinstance(value, ast.Constant) and value.value is False
            found = set() if harmless else {"allow_pickle"}
        else:
            continue
        for name in found:
            yield getattr(node, "lineno", 0), name


@pytest.mark.parametrize("package", RUNTIME)
def test_nothing_is_unpickled_or_evaluated(package: str) -> None:
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        found = list(offences(ast.parse(path.read_text(), str(path))))
        assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from shelve import open",
        "eval(x)",
        "exec(x)",
        "socket.recv_pyobj()",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
    ],
)
def test_the_scan_finds_offences(code: str) -> None:
    assert list(offences(ast.parse(code)))


def test_the_scan_accepts_harmless_code() -> None:
    innocent = "re.compile(x); np.load(f, allow_pickle=False); model.eval(); import pickletools_not"
    assert not list(offences(ast.parse(innocent)))
