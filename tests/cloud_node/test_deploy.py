"""The systemd unit and the Containerfile: every file they name exists, and a node works under the
restrictions that can be tried without a running systemd."""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_node.cli import build_parser
from cloud_node.config import NodeConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cloud_node" / "deploy"
UNIT = DEPLOY / "edge-runtime-node.service"


def settings(path: Path) -> dict[str, list[str]]:
    """Values by key. Repeated keys add up, as in systemd."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_runs_an_existing_command() -> None:
    (command,) = settings(UNIT)["ExecStart"]
    program, *words = shlex.split(command)
    assert Path(program).name == "cloud-node"
    args = build_parser().parse_args(words)
    assert args.command == "serve"
    assert args.config == Path("/etc/edge-runtime-node/node.toml")
    assert args.secret_key == Path("${CREDENTIALS_DIRECTORY}/node.key")
    (credential,) = settings(UNIT)["LoadCredential"]
    assert credential.split(":")[0] == args.secret_key.name


def test_the_unit_waits_longer_than_the_node_takes_to_stop() -> None:
    (stop,) = settings(UNIT)["TimeoutStopSec"]
    assert int(stop) > NodeConfig().drain_s + 10


@pytest.mark.process
@pytest.mark.parametrize("name", ["edge-runtime-node.service", "gpu.conf"])
def test_systemd_accepts_the_unit(tmp_path: Path, name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze (Debian package systemd)")
    # The program is elsewhere on this machine. Everything else stays the same.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    (tmp_path / UNIT.name).write_text(text)
    if name != UNIT.name:
        (tmp_path / f"{UNIT.name}.d").mkdir()
        shutil.copy(DEPLOY / name, tmp_path / f"{UNIT.name}.d")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.stem in line]
    assert not complaints
    assert done.returncode == 0, done.stderr


SANDBOX = """\
import ctypes, json, os, runpy, sys
allowed, families, library = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
if libc.prctl(65, 1, 0, 0, 0) != 0:  # no memory that is written and then run; Linux 6.3
    print("no PR_SET_MDWE", file=sys.stderr)
s = ctypes.CDLL(library)
class Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64),
                ("b", ctypes.c_uint64)]
s.seccomp_init.restype = ctypes.c_void_p
allow, refuse, equal = 0x7FFF0000, 0x00050001, 4
context = ctypes.c_void_p(s.seccomp_init(ctypes.c_uint32(refuse)))
for name in allowed:
    number = s.seccomp_syscall_resolve_name(name.encode())
    if number < 0:
        continue
    if name != "socket":
        s.seccomp_rule_add_array(context, allow, number, 0, None)
    else:
        for family in families:
            rule = Compare(0, equal, family, 0)
            assert s.seccomp_rule_add_array(context, allow, number, 1, ctypes.byref(rule)) == 0
assert s.seccomp_load(context) == 0
import mmap, socket
try:
    mmap.mmap(-1, 4096, prot=7)
except PermissionError:
    print("memory restricted", file=sys.stderr)
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except PermissionError:
    print("sockets restricted", file=sys.stderr)
sys.argv = ["cloud-node", *sys.argv[4:]]
runpy.run_module("cloud_node.cli", run_name="__main__")
"""


def system_calls(groups: list[str]) -> list[str]:
    """The system calls that `SystemCallFilter=` lines allow, as systemd reads them."""

    def expand(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        done = subprocess.run(
            ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
        )
        lines = [line.strip() for line in done.stdout.splitlines()[1:]]
        return set().union(*(expand(line) for line in lines if line and line[0] != "#"))

    allowed: set[str] = set()
    for group in groups:
        names = group.removeprefix("~").split()
        calls = set().union(*map(expand, names))
        allowed = allowed - calls if group.startswith("~") else allowed | calls
    return sorted(allowed | expand("@default"))


@pytest.mark.process
def test_a_node_works_under_the_units_restrictions(
    tmp_path: Path, start_node: Any, connect: Any, feeds: dict[str, np.ndarray], local: Any
) -> None:
    library = ctypes.util.find_library("seccomp")
    if not library or not shutil.which("systemd-analyze"):
        pytest.skip("needs libseccomp and systemd-analyze")
    unit = settings(UNIT)
    calls = system_calls(unit["SystemCallFilter"])
    assert "ptrace" not in calls
    assert "mount" not in calls
    families = [int(getattr(socket, name)) for name in unit["RestrictAddressFamilies"][0].split()]
    sandbox = [sys.executable, "-c", SANDBOX, json.dumps(calls), json.dumps(families), library]
    node = start_node(program=sandbox)
    outputs = connect(node).ask(feeds)
    assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()
    said = node.logged()
    assert "sockets restricted" in said
    assert "memory restricted" in said or "no PR_SET_MDWE" in said
    assert node.end() == 0
    assert "Traceback" not in node.logged()


def test_the_containerfile_copies_existing_files() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    sources = [word for line in copied for word in line.split()]
    for source in sources:
        for engine in ("cpu", "gpu"):
            assert (ROOT / source.replace("${ENGINE}", engine)).exists(), source
    tomllib = pytest.importorskip("tomllib")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name.rstrip("*") for name in packages["packages"]["find"]["include"]}
    assert found <= set(sources)


def test_the_container_runs_an_existing_command_as_an_unprivileged_user() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    (words,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(entry) == ["cloud-node"]
    args = build_parser().parse_args(json.loads(words))
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) > 0
    port = args.metrics.rpartition(":")[2]
    (probe,) = re.findall(r"^ +CMD (\[.*\])$", text, re.MULTILINE)
    program = json.loads(probe)[2]
    compile(program, "healthcheck", "exec")
    assert f"http://127.0.0.1:{port}/healthz" in program
    assert f"EXPOSE 5555 {port}" in text


def test_the_documented_container_is_confined_and_has_time_to_stop() -> None:
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    (run,) = re.findall(r"^\$ (podman run -d .*)$", text, re.MULTILINE)
    words = shlex.split(run)
    assert {"--read-only", "ALL", "no-new-privileges", "./keys:/keys:ro"} <= set(words)
    stop = int(words[words.index("--stop-timeout") + 1])
    assert stop > NodeConfig().drain_s + 10
    # Without this flag podman drops the health check and only warns.
    (build,) = re.findall(r"^\$ (podman build .*)$", text, re.MULTILINE)
    assert "--format docker" in build
    assert text.index("$ mkdir keys") < text.index("-v ./keys:/keys")


def test_deployment_files_name_one_another() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (DEPLOY / target).exists(), target
