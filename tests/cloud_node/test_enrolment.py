"""The steps of docs/enrolment.md, command by command, on real processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

NODES = ("alpha", "beta")


@pytest.fixture
def run_node(toy_bundle: Path) -> Iterator[Callable[[Path], str]]:
    """Start `cloud-node serve` in a folder with default settings. Returns the bound endpoint."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> str:
        command = [sys.executable, "-m", "cloud_node.cli", "serve", "--threads", "1"]
        command += ["--bind", "tcp://127.0.0.1:0", "--bundle", str(toy_bundle)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--ready-file", "ready.json"], cwd=folder, stderr=log
            )
        processes.append(process)
        give_up = time.monotonic() + 120
        while not (folder / "ready.json").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return str(json.loads((folder / "ready.json").read_text())["endpoint"])

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _edge_runtime(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_documented_steps_work(
    tmp_path: Path, toy_bundle: Path, run_node: Callable[[Path], str]
) -> None:
    edge = tmp_path / "edge"
    edge.mkdir()
    folders = {name: tmp_path / name for name in NODES}
    for folder in folders.values():
        folder.mkdir()
        assert _edge_runtime(folder, "keys", "node").returncode == 0
    named = [word for name in NODES for word in ("--node", name)]
    assert _edge_runtime(edge, "keys", "edge", *named).returncode == 0

    words = []
    for name, folder in folders.items():
        shutil.copy(folder / "keys" / "node.pub", edge / "keys" / f"{name}-node.pub")
        shutil.copy(edge / "keys" / f"{name}.pub", folder)
        words += ["--node", f"{name}={run_node(folder)},keys/{name}-node.pub"]
    init = _edge_runtime(edge, "init", *words)
    assert init.returncode == 0, init.stderr
    settings = (edge / "edge.toml").read_text()
    settings = re.sub(r"(?m)^#? ?bundle = .*$", f'bundle = "{toy_bundle}"', settings)
    (edge / "edge.toml").write_text(settings)

    # Before the operators authorise the edge, it reports what is missing. Afterwards all is well.
    before = _edge_runtime(edge, "nodes", "--timeout", "60")
    assert before.returncode == 1
    assert before.stdout.count("not authorised on the node") == len(NODES)
    for name, folder in folders.items():
        done = _edge_runtime(folder, "keys", "authorize", f"{name}.pub", "--as", "kitchen")
        assert done.returncode == 0, done.stderr
    after = _edge_runtime(edge, "nodes", "--timeout", "60")
    assert after.returncode == 0, after.stdout + after.stderr
    assert f"{len(NODES)} of {len(NODES)} nodes can be used" in after.stdout


def test_the_documented_commands_exist() -> None:
    """Every `edge-runtime` and `cloud-node` option in docs/enrolment.md is a real one."""
    text = (Path(__file__).parents[2] / "docs" / "enrolment.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\$ ((?:edge-runtime|cloud-node) .*)$", text, re.MULTILINE)
    assert len(commands) >= 6
    for line in commands:
        program, *words = line.split()
        module = {"edge-runtime": "edge_runtime.cli", "cloud-node": "cloud_node.cli"}[program]
        verbs = [word for word in words[:2] if word.isalpha() and words.index(word) < 2]
        verbs = verbs if verbs[0] == "keys" else verbs[:1]
        command = [sys.executable, "-m", module, *verbs, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert shown.returncode == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.stdout, f"{option} of: {line}"
