"""Other processes of the same user cannot look into nodes, workers and edges, except while Python
starts: the protection is on before numpy is imported.

Root may look into everything. If the tests run as root, node and attacker run as root without any
capability: to the kernel that is an ordinary user.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cloud_node import worker, worker_start

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.process,
]

CANARY = b"CANARY-IN-THE-COAL-MINE!"
UNPRIVILEGED = """
import ctypes, os, sys
for capability in range(64):  # of root nothing is left with the next program
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
ATTACK = """
import json, os, select, sys
mark, canary = sys.argv[1].encode(), sys.argv[2].encode()
taken, mems, late, tried, done = {}, {}, 0, 0, set()

def read(path):
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
    except OSError:
        return None
    finally:
        os.close(fd)

def targets():
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        stat = read(f"/proc/{name}/stat")
        if stat:
            parents[name] = stat.rpartition(b")")[2].split()[1].decode()
    marked = {pid for pid in parents if mark in (read(f"/proc/{pid}/cmdline") or b"")}
    marked.discard(str(os.getpid()))
    return marked | {pid for pid, parent in parents.items() if parent in marked}

print("ready", flush=True)
while select.select([0], [], [], 0)[0] == []:  # until it is told to stop
    for pid in targets():
        tried += 1
        maps = read(f"/proc/{pid}/maps") or b""
        try:
            fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        except OSError:
            pass
        else:
            late += b"_multiarray_umath" in maps  # of numpy: it was open while that was imported
            if pid in mems:
                os.close(fd)
            else:
                mems[pid] = fd
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            fds = []
        for each in fds:
            if (pid, each) not in taken:
                try:
                    if "memfd:" in os.readlink(f"/proc/{pid}/fd/{each}"):
                        taken[pid, each] = os.open(f"/proc/{pid}/fd/{each}", os.O_RDONLY)
                except OSError:
                    pass
found = 0
for fd in taken.values():
    os.lseek(fd, 0, 0)
    found += canary in os.read(fd, 1 << 24)
got = {"tried": tried, "memories": len(taken), "seen": found, "mem": len(mems), "late": late}
print(json.dumps(got))
"""


@pytest.fixture
def attack() -> Iterator[Callable[[str], Callable[[], dict[str, int]]]]:
    """Start a process of the same user that tries to look into all processes with `mark` in their
    command line, and into their children. Returns a function that ends it and gives its
    findings."""
    running: list[subprocess.Popen[str]] = []

    def start(mark: str) -> Callable[[], dict[str, int]]:
        command = [sys.executable, "-c", UNPRIVILEGED, "-c", ATTACK, mark, CANARY.decode()]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"

        def end() -> dict[str, int]:
            told, _ = process.communicate("stop", timeout=60)
            found: dict[str, int] = json.loads(told)
            return found

        return end

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_worker_asks_to_be_killed_first_before_it_closes_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Afterwards an ordinary user has no right to. Root has, so a real worker would not show it."""
    done: list[str] = []
    monkeypatch.setattr(worker_start, "die_with_parent", lambda _: done.append("die"))
    monkeypatch.setattr(worker_start, "disable_core_dumps", lambda: done.append("close"))
    monkeypatch.setattr(worker, "work", lambda _: 0)
    assert worker_start.main(["3", "1"]) == 0
    assert done == ["die", "close"]


def test_the_attack_works_on_an_unprotected_process(
    attack: Callable[[str], Callable[[], dict[str, int]]],
) -> None:
    mark = f"victim-{os.urandom(4).hex()}"
    end = attack(mark)
    code = (
        "import os, sys, time\n"
        "import numpy\n"
        "fd = os.memfd_create('edge-runtime')\n"
        f"os.write(fd, {CANARY!r})\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    victim = [sys.executable, "-c", UNPRIVILEGED, "-c", code, mark]
    with subprocess.Popen(victim, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.5)
        got = end()
        process.kill()
    if not got["mem"] and not got["memories"]:
        pytest.skip("this kernel already separates processes of one user")
    assert got["seen"] == 1
    assert got["late"]


def test_other_processes_of_the_user_cannot_read_windows(
    start_node: Any, connect: Any, attack: Callable[[str], Callable[[], dict[str, int]]]
) -> None:
    mark = f"mark-{os.urandom(4).hex()}"
    end = attack(mark)
    program = [sys.executable, "-c", UNPRIVILEGED, "-m", "cloud_node.cli"]
    node = start_node("pixels", program=program, folder=mark)
    edge = connect(node)
    pixels = np.frombuffer(CANARY * 8, np.uint8).reshape(1, 8, 8, 3)
    feeds = {"pixels": pixels, "extent": np.full((1, 2), 8), "window": np.array([0])}
    for _ in range(3):
        assert "tokens" in edge.ask(feeds)
    (worker,) = node.workers()
    os.kill(worker, signal.SIGKILL)  # the attack on the next worker begins with its start
    while node.logged().count("ready on") < 2:
        time.sleep(0.01)
    for _ in range(3):
        assert "tokens" in edge.ask(feeds)
    got = end()
    assert got["tried"] > 20
    assert got["memories"] == 0
    assert got["late"] == 0


def test_other_processes_of_the_user_cannot_read_an_edge_s_pictures(
    attack: Callable[[str], Callable[[], dict[str, int]]], tmp_path: Path, toy_bundle: Path
) -> None:
    photo = tmp_path / f"photo-{os.urandom(4).hex()}.png"
    Image.new("RGB", (90, 60), "teal").save(photo)
    end = attack(photo.name)
    command = [sys.executable, "-c", UNPRIVILEGED, "-m", "edge_runtime.cli", "segment", str(photo)]
    command += ["--local", "--bundle", str(toy_bundle), "--point", "9,9"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    got = end()
    assert got["tried"] > 5
    assert got["late"] == 0
