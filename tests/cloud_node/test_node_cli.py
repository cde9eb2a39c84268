"""The `cloud-node` command line: help, check, init, serving from a file, health and
notifications."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.processes import children_of

from cloud_node.cli import main
from cloud_node.config import load
from cloud_node.settings import SETTINGS
from edge_common.settings import settings_table
from transport import keys

DOCUMENT = Path(__file__).parents[2] / "docs" / "node.md"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*words: object, cwd: Path | None = None) -> Done:
    """Run a command that does not serve, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(cwd or before)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*map(str, words)])
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os.chdir(before)
    return Done(status, out.getvalue(), err.getvalue())


def serve(*words: object, cwd: Path | None = None) -> Any:
    """Run `cloud-node serve` in a case where it exits by itself."""
    return subprocess.run(
        [sys.executable, "-m", "cloud_node.cli", "serve", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path, bundle_of: Callable[[str], Path]) -> Path:
    """A folder with keys and a bundle beside them."""
    keys.generate(tmp_path / "keys", "node")
    keys.make_directory(tmp_path / "keys" / "authorized")
    (tmp_path / "bundle").symlink_to(bundle_of("pixels"))
    return tmp_path


@pytest.mark.process
def test_every_setting_is_a_documented_option() -> None:
    done = run("serve", "--help")
    assert done.returncode == 0
    text = re.sub(r"\s+", " ", done.stdout)
    for setting in SETTINGS.values():
        assert f" {setting.option} {setting.about.metavar} " in text
        assert re.sub(r"\s+", " ", setting.about.help.split(":")[0][:40]) in text
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_check_shows_each_value_and_its_source(folder: Path) -> None:
    (folder / "node.toml").write_text(
        'bundle = "bundle"\nbind = "tcp://127.0.0.1:0"\nthreads = 1\n'
    )
    done = run("check", "--config", "node.toml", "--drain-s", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.split("\n\n")[0].splitlines()}
    assert set(rows) == {"SETTING", *SETTINGS}
    assert rows["threads"] == ["node.toml", "1"]
    assert rows["drain_s"] == ["--drain-s", "3"]
    assert rows["queue_bytes"] == ["default", "256", "MiB"]
    assert "hashes are correct" in done.stdout
    assert "Note: no edge is authorised" in done.stdout
    told = json.loads(run("check", "--config", "node.toml", "--json", cwd=folder).stdout)
    assert told["settings"]["threads"] == {"value": 1, "source": "node.toml"}
    assert told["settings"]["device"]["value"] == ["auto"]
    assert told["public_key"] == keys.load_secret(folder / "keys" / "node.key").public
    assert told["authorised_keys"] == 0


@pytest.mark.process
def test_check_and_serve_refuse_the_same_mistakes(folder: Path) -> None:
    (folder / "node.toml").write_text('bundel = "bundle"\n')
    options = ("--config", folder / "node.toml")
    for done in (run("check", *options), serve(*options)):
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 + done.stderr.count("\n  -> ")
        assert "did you mean bundle?" in done.stderr
    (folder / "node.toml").write_text("")
    (folder / "keys" / "node.key").chmod(0o644)
    done = run("check", "--config", folder / "node.toml")
    assert (done.returncode, "chmod 600" in done.stderr) == (1, True)


def test_check_refuses_devices_that_this_process_does_not_see(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = run("check", "--bundle", "bundle", "--device", "cuda:1", cwd=folder)
    assert done.returncode == 1
    assert "CUDA_VISIBLE_DEVICES=0 shows 1" in done.stderr


@pytest.mark.process
def test_init_writes_a_file_that_explains_and_loads(folder: Path) -> None:
    done = run(
        "init", "--bundle", "bundle", "--metrics", "127.0.0.1:0", "--device", "cuda:0,1",
        "--queue-bytes", "64MiB", "--out", "etc.toml", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cloud-node check --config etc.toml" in done.stdout
    assert "keys node" not in done.stdout  # the folder already has keys
    text = (folder / "etc.toml").read_text()
    for setting in SETTINGS.values():
        assert re.search(rf"^(# )?{setting.name} = ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100
    config = load(folder / "etc.toml").config
    assert config.bundle == folder / "bundle"
    assert config.device == ("cuda:0", "cuda:1")
    assert config.queue_bytes == 64 << 20
    assert config.metrics == "127.0.0.1:0"
    assert run("init", "--out", "etc.toml", cwd=folder).returncode == 1
    assert (folder / "etc.toml").read_text() == text


@pytest.mark.process
def test_init_writes_a_file_that_only_the_owner_can_change(tmp_path: Path) -> None:
    command = f"umask 0; exec {sys.executable} -m cloud_node.cli init"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert stat.S_IMODE((tmp_path / "node.toml").stat().st_mode) == 0o644


def test_the_comments_that_init_writes_are_valid_settings(tmp_path: Path) -> None:
    assert run("init", cwd=tmp_path).returncode == 0
    text = (tmp_path / "node.toml").read_text()
    assert load(tmp_path / "node.toml").config == load(None, {"keys": tmp_path / "keys"}).config
    lines = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    lines = lines.replace('workers = "local"', 'workers = "ray"')
    (tmp_path / "all.toml").write_text(lines)
    sources = load(tmp_path / "all.toml").sources
    assert set(sources.values()) == {str(tmp_path / "all.toml")}


@pytest.mark.process
def test_init_on_a_full_disk_leaves_nothing_that_blocks_the_next_try(full_disk: Path) -> None:
    filler = full_disk / "filler"
    filler.write_bytes(b"x" * (64 << 10))
    done = run("init", cwd=full_disk)
    assert done.returncode == 1
    said = (
        "error: cannot write node.toml: No space left on device\n  -> make room on that disk, or "
    )
    assert done.stderr.startswith(said)
    assert list(full_disk.iterdir()) == [filler]
    filler.unlink()
    assert run("init", cwd=full_disk).returncode == 0


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--memory-ceiling", "100MiB"], "expected at least 320 MiB"),
        (["--out", "no/where.toml"], "cannot write no/where.toml"),
    ],
)
def test_init_writes_nothing_when_something_is_wrong(
    tmp_path: Path, words: list[str], part: str
) -> None:
    done = run("init", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert part in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--device", "abacus"],
        ["--threads", "x"],
        ["--threads", "0"],
        ["--max-wait-ms", "2000"],
        ["--metrics", "9464"],
        ["--queue-bytes", "lots"],
        ["--queue-bytes", "5"],
    ],
)
def test_a_wrong_value_of_an_option_is_a_usage_error(words: list[str]) -> None:
    done = run("serve", *words)
    assert done.returncode == 2
    assert re.match(rf"error: {words[0]}: expected .*, not '{words[1]}' \(", done.stderr)


@pytest.mark.process
def test_a_node_serves_from_its_file_and_reports_its_health(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    short = tmp_path_factory.mktemp("n")  # socket paths have a length limit
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short / "notify"))
        manager.settimeout(60)
        (folder / "node.toml").write_text(
            'bundle = "bundle"\nbind = "tcp://127.0.0.1:0"\nthreads = 1\nlog_format = "json"\n'
            'metrics = "127.0.0.1:0"\nready_file = "ready.json"\n'
        )
        environment = {"NOTIFY_SOCKET": str(short / "notify"), "WATCHDOG_USEC": "200000"}
        process = subprocess.Popen(
            [sys.executable, "-m", "cloud_node.cli", "serve", "--config", "node.toml"],
            cwd=folder,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            told = []
            while not told or told[-1] != "WATCHDOG=1" or "READY=1" not in told:
                told.append(manager.recv(1000).decode())
            assert process.stderr
            records = []
            while not records or not records[-1]["message"].startswith("ready "):
                records.append(json.loads(process.stderr.readline()))
            assert records[-1]["event"] == "ready"
            assert records[-1]["endpoint"].startswith("tcp://")
            address = next(r["message"] for r in records if "metrics at" in r["message"])
            base = address.removeprefix("metrics at ").removesuffix("/metrics")
            with urllib.request.urlopen(f"{base}/readyz", timeout=60) as answer:
                assert answer.read() == b"ready\n"
            with urllib.request.urlopen(f"{base}/metrics", timeout=60) as answer:
                assert b"\nedge_runtime_node_workers_ready 1.0\n" in answer.read()
            assert json.loads((folder / "ready.json").read_text())["pid"] == process.pid
            for child in children_of(process.pid):
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_bytes()

            process.send_signal(signal.SIGTERM)
            while told[-1] != "STOPPING=1":
                told.append(manager.recv(1000).decode())
            assert process.wait(timeout=60) == 0
            assert json.loads(process.stderr.read().splitlines()[-1])["message"] == "stopped"
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(f"{base}/healthz", timeout=60)
        finally:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()


@pytest.mark.process
def test_a_taken_metrics_address_stops_the_start(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = serve("--metrics", address, "--bind", "tcp://127.0.0.1:0", cwd=folder)
    assert done.returncode == 1
    assert f"error: cannot listen on {address}" in done.stderr


def test_the_document_holds_the_settings_table() -> None:
    assert settings_table(SETTINGS) in DOCUMENT.read_text()
