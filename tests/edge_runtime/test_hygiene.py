"""Apart from the requested outputs, nothing stores or prints a picture, a prompt or a key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zmq.utils import z85

from transport.keys import load_secret, load_secret_bytes

pytestmark = pytest.mark.process

PIXEL = bytes((0xC5, 0x3A, 0x97))
"""The whole photo has this colour, so every piece of it is recognised."""
POINT = ("13.62548", "27.37519")


def needles(keys: Iterable[Path]) -> list[bytes]:
    """The photo, the prompt and the keys in every form in which they could appear."""
    numbers = [str(value) for value in PIXEL] * 2
    found = [separator.join(numbers).encode() for separator in (",", ", ", " ", "  ")]
    found += [coordinate.encode() for coordinate in POINT]
    raw = [PIXEL * 2]
    for path in keys:
        if path.suffix == ".key":
            text = load_secret(path).secret
            found.append(text.encode())
            raw.append(z85.decode(text))
        else:
            raw.append(load_secret_bytes(path))
    return [*found, *raw, *(r.hex().encode() for r in raw), *(repr(r)[2:-1].encode() for r in raw)]


def leaks(content: bytes, wanted: list[bytes]) -> list[bytes]:
    return [needle for needle in wanted if needle.lower() in content.lower()]


def secrets(folder: Path) -> list[Path]:
    return [*folder.rglob("*.key"), *folder.rglob("*.secret")]


@pytest.mark.parametrize("ending", ["success", "failure", "SIGTERM"])
def test_no_log_or_temporary_file_holds_the_canary(
    ending: str,
    tmp_path: Path,
    make_fleet: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo, out, scratch = tmp_path / "photo.ppm", tmp_path / "out" / "result", tmp_path / "tmp"
    out.parent.mkdir()
    scratch.mkdir()
    Image.fromarray(np.tile(np.frombuffer(PIXEL, np.uint8), (40, 40, 1))).save(photo)
    fleet = make_fleet()
    monkeypatch.setenv("TMPDIR", str(scratch))
    fleet.start("alpha", "beta", "gamma")  # they log at debug level
    config = fleet.config()
    lines = [f'bundle = "{config.bundle}"', f'secret = "{config.secret}"', "deadline_s = 10"]
    for node in config.nodes:
        lines += ["[[nodes]]", f'name = "{node.name}"', f'endpoint = "{node.endpoint}"']
        lines += [f'server_key = "{node.server_key}"', f'client_key = "{node.client_key}"']
    (tmp_path / "edge.toml").write_text("\n".join(lines))
    command = [sys.executable, "-X", "dev", "-m", "edge_runtime.cli", "segment", "--debug"]
    command += [str(photo), "--point", ",".join(POINT), "--out", str(out)]
    command += ["--config", str(tmp_path / "edge.toml")]

    if ending != "success":
        fleet.nodes["beta"].signal(signal.SIGSTOP)
    edge = subprocess.Popen(
        command,
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if ending == "SIGTERM":
        while b"windows for" not in (fleet.root / "alpha" / "log").read_bytes():
            assert edge.poll() is None
            time.sleep(0.01)
        assert os.listdir(scratch) == []  # and none while it runs
        edge.terminate()
    said = edge.communicate(timeout=120)[0]
    fleet.nodes["beta"].signal(signal.SIGCONT)
    expected = {"success": 0, "failure": 1, "SIGTERM": 128 + signal.SIGTERM}[ending]
    assert edge.returncode == expected, said
    for node in fleet.nodes.values():
        node.signal(signal.SIGTERM)
        node.process.wait(60)

    wanted = needles(secrets(fleet.root))
    assert len(wanted) > 20
    assert leaks(photo.read_bytes(), wanted)  # the search itself works
    assert leaks(fleet.keys.joinpath("alpha.key").read_bytes(), wanted)
    assert leaks(said, wanted) == []
    assert "windows for" in fleet.nodes["alpha"].logged()
    for node in fleet.nodes.values():
        assert leaks(node.logged().encode(), wanted) == []
    assert os.listdir(scratch) == []
    if ending == "success":
        assert leaks((out / "result.json").read_bytes(), wanted) == [p.encode() for p in POINT]
    else:
        assert os.listdir(out.parent) == ["result.sends.json"]
    known = {photo, *secrets(fleet.root), *out.rglob("*"), *fleet.bundle.rglob("*")}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path not in known:
            assert leaks(path.read_bytes(), wanted) == [], path
