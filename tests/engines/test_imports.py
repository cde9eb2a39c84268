"""Edge and node load no torch and nothing else that only exporters or tests need."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

RUNTIME = ("edge_common", "engines", "transport", "cloud_node", "edge_runtime")
HEAVY = ("torch", "torchvision", "matplotlib", "scipy", "onnx", "onnxscript", "skimage")
ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_of(package: str) -> list[str]:
    found = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    return [package, *(module.name for module in found if not module.name.endswith("__main__"))]


def loaded_after(modules: list[str]) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(modules)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("package", RUNTIME)
def test_no_runtime_module_imports_anything_heavy(package: str) -> None:
    modules = modules_of(package)
    assert len(modules) > 3
    assert loaded_after(modules).isdisjoint(HEAVY)


def test_running_a_bundle_imports_nothing_heavy(toy_bundle: Path) -> None:
    script = (
        "import sys, numpy as np\n"
        "from engines.bundle import Bundle\n"
        "from engines.pipeline import Pipeline\n"
        "from engines.windows import cut\n"
        "from edge_runtime.imaging.images import resize_longest, upscale_mask\n"
        "with Pipeline(Bundle.load(sys.argv[1])) as p:\n"
        "    image = resize_longest(np.zeros((30, 60, 3), np.uint8), 40)\n"
        "    embedding = p.embed(cut(image, p.bundle.geometry))\n"
        f"assert not {{*sys.modules}} & {{*{HEAVY!r}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(toy_bundle)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_an_engine() -> None:
    loaded = loaded_after(["edge_runtime.cli", "cloud_node.cli", "edge_runtime.commands.info"])
    assert loaded.isdisjoint({"onnxruntime", "zmq", "PIL", *HEAVY})
