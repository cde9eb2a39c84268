"""Ctrl-C and SIGTERM at real commands, also inside an engine, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.processes import descendants_of
from PIL import Image
from toy import slow

from engines.bundle import shipped_bundle

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def start(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    # A background test run passes on SIGINT as ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=heed,
        **options,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.02)


def busy(process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    """True if the process has computed for longer than loading takes."""
    ticks = os.sysconf("SC_CLK_TCK")

    def condition() -> bool:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / ticks > 4

    return condition


def ended(process: subprocess.Popen[bytes], number: int) -> bytes:
    """Send the signal. Check how the process ends and return its output."""
    children = descendants_of(process.pid)
    process.send_signal(number)
    said: bytes = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    assert b"Traceback" not in said
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in children):
        assert time.monotonic() < give_up, "children are left"
        time.sleep(0.02)
    return said


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (48, 60, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", ["stack", "tail", "decoder"])
def test_segment_can_be_stopped_inside_an_engine_and_leaves_nothing(
    stage: str, number: signal.Signals, photo: Path, tmp_path: Path, toy_bundle: Path
) -> None:
    bundle = slow(toy_bundle, tmp_path / "bundle", stage)
    command = ["edge_runtime.cli", "segment", str(photo), "--point", "5,6", "--local"]
    process = start(*command, "--bundle", str(bundle.path), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "out").exists(), process)
    wait_for(busy(process), process)
    said = ended(process, number)
    assert said.decode().endswith("interrupted\n") == (number == signal.SIGINT)
    assert sorted(os.listdir(tmp_path)) == ["bundle", "photo.png"]


def test_exposure_is_recorded_even_if_the_tail_never_ends(
    photo: Path, tmp_path: Path, make_fleet: Callable[..., Any], toy_bundle: Path
) -> None:
    bundle = slow(toy_bundle, tmp_path / "bundle", "tail")
    fleet = make_fleet("alpha", "beta", "gamma", bundle=bundle.path)
    config = fleet.config()
    lines = [f'bundle = "{bundle.path}"', f'secret = "{config.secret}"', "deadline_s = 60"]
    for node in config.nodes:
        lines += ["[[nodes]]", f'name = "{node.name}"', f'endpoint = "{node.endpoint}"']
        lines += [f'server_key = "{node.server_key}"', f'client_key = "{node.client_key}"']
    toml = tmp_path / "edge.toml"
    toml.write_text("\n".join(lines))
    toml.chmod(0o644)
    command = ["edge_runtime.cli", "segment", str(photo), "--point", "5,6"]
    process = start(*command, "--config", str(toml), "--out", "result", cwd=tmp_path)
    wait_for(lambda: "windows for" in fleet.nodes["gamma"].logged(), process)
    wait_for(busy(process), process)
    said = ended(process, signal.SIGTERM).decode()
    assert "What nodes have seen of photo.png is on record in" in said
    assert (tmp_path / "result.sends.json").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("number", SIGNALS)
def test_verify_can_be_stopped_inside_an_engine(number: signal.Signals, tmp_path: Path) -> None:
    bundle = slow(shipped_bundle(), tmp_path / "bundle", "stack")
    before = sorted(tmp_path.rglob("*"))
    process = start("edge_runtime.cli", "verify", str(bundle.path), "--device", "cpu")
    wait_for(busy(process), process)
    ended(process, number)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_nodes_can_be_stopped_while_it_waits(
    number: signal.Signals, tmp_path: Path, make_fleet: Callable[..., Any]
) -> None:
    fleet = make_fleet("alpha")
    node = fleet.config().nodes[0]
    fleet.nodes["alpha"].signal(signal.SIGSTOP)
    toml = tmp_path / "edge.toml"
    toml.write_text(
        f'secret = "{fleet.keys}/edge.secret"\nbundle = "{fleet.bundle}"\n[[nodes]]\n'
        f'name = "alpha"\nendpoint = "{node.endpoint}"\nserver_key = "{node.server_key}"\n'
        f'client_key = "{node.client_key}"\n'
    )
    toml.chmod(0o644)
    command = ["edge_runtime.cli", "nodes", "--timeout", "3600", "--config", str(toml)]
    process = start(*command)
    threads = Path(f"/proc/{process.pid}/task")
    wait_for(lambda: len(os.listdir(threads)) > 3, process)  # the command waits on the network
    ended(process, number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["nodes", "alone"])
def test_stopping_the_demo_ends_its_processes(
    moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = ["edge_runtime.cli", "demo", "--out", str(tmp_path / "out")]
    process = start(*command, cwd=ROOT, env=environment)

    def commands() -> list[bytes]:
        found = []
        for pid in descendants_of(process.pid):
            try:
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
            except OSError:
                continue
        return found

    wanted = {"nodes": b"cloud_node.cli", "alone": b"edge_runtime.demo"}[moment]
    count = {"nodes": 3, "alone": 1}[moment]
    wait_for(lambda: sum(wanted in line for line in commands()) == count, process)
    ended(process, number)
    assert os.listdir(tmp_path) == ["tmp"]
    assert os.listdir(scratch) == []  # keys and tokens are gone


@pytest.mark.parametrize("number", SIGNALS)
def test_a_node_can_be_stopped_while_its_engine_loads(
    number: signal.Signals, tmp_path: Path, make_fleet: Callable[..., Any]
) -> None:
    keys = make_fleet("alpha").root / "alpha"
    process = start("cloud_node.cli", "serve", "--keys", str(keys), "--bind", "tcp://127.0.0.1:0")
    wait_for(lambda: descendants_of(process.pid), process)
    children = descendants_of(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children)
