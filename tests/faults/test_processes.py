"""Signals, samples and namespaces, each observed from outside the affected process."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import processes
from faults.processes import Child, Netns, Sampler, Step, random_plan, run_plan, sample, state

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
while True:
    end, _ = listener.accept()
    while data := end.recv(65536):
        end.sendall(data[:1])
    end.close()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    with Child(SLEEP, log=tmp_path / "log") as made:
        yield made


@pytest.mark.process
def test_a_child_is_frozen_thawed_killed_and_restarted(child: Child) -> None:
    assert child.stop()
    assert state(child.pid) == "T"
    assert child.cont()
    while state(child.pid) == "T":
        time.sleep(0.001)
    first = child.pid
    assert child.kill() == -9
    assert not child.running
    assert state(first) == ""
    assert not child.stop()  # no other process is hit
    child.restart()
    assert child.running
    assert child.pid != first
    assert child.starts == 2


@pytest.mark.process
def test_a_child_that_never_becomes_ready_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no good', flush=True); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="no good"):
        Child(command, log=tmp_path / "log", ready=lambda: False)


def test_plans_are_reproducible_and_undo_their_faults() -> None:
    children = ["alpha", "beta", "gamma"]
    plan = random_plan(7, children, seconds=60, every_s=1)
    assert plan == random_plan(7, children, seconds=60, every_s=1)
    assert plan != random_plan(8, children, seconds=60, every_s=1)
    assert len(plan) > 40
    last = dict.fromkeys(children, "restart")
    for step in plan:
        undoing = {"kill": "restart", "stop": "cont"}.get(last[step.child])
        assert undoing in (None, step.action)
        last[step.child] = step.action
    assert set(last.values()) <= {"restart", "cont"}


@pytest.mark.process
def test_a_plan_runs_in_order_and_thaws_at_the_end(tmp_path: Path) -> None:
    with Child(SLEEP, log=tmp_path / "a") as a, Child(SLEEP, log=tmp_path / "b") as b:
        plan = [Step(0.0, "a", "kill"), Step(0.01, "b", "stop"), Step(0.02, "a", "restart")]
        late = Step(600.0, "a", "kill")
        with run_plan([*plan, late], {"a": a, "b": b}) as done:
            while len(done) < 3:
                time.sleep(0.01)
            assert state(b.pid) == "T"
        assert [one.step for one in done] == plan
        assert all(one.at_s >= one.step.at_s for one in done)
        assert (a.starts, b.starts) == (2, 1)
        while state(b.pid) == "T":
            time.sleep(0.001)


@pytest.mark.process
def test_samples_show_growth(tmp_path: Path) -> None:
    program = (
        "import sys, threading, time\n"
        "time.sleep(0.2)\n"
        "kept = bytearray(b'x') * (32 << 20)\n"
        "files = [open('/dev/null') for _ in range(20)]\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "print('grown', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", program]
    with Child(command, log=log) as child, Sampler(child.pid, every_s=0.01) as sampler:
        while "grown" not in log.read_text():
            time.sleep(0.01)
        now = sample(child.pid)
        assert now.peak >= now.rss
    assert sampler.peak_rss >= 32 << 20
    first = sampler.samples[0]
    assert now.rss - first.rss > 30 << 20
    assert now.fds - first.fds == 20
    assert now.threads - first.threads == 1
    assert sampler.slope(skip=0) > 0
    with pytest.raises(ProcessLookupError):
        sample(child.pid)


def test_a_sampler_keeps_a_limited_number_of_samples() -> None:
    sampler = Sampler(os.getpid(), every_s=0.001, most=10)
    for _ in range(100):
        sampler._take()
        assert len(sampler.samples) < 10
    assert sampler._every_s > 0.001


@pytest.fixture
def net() -> Iterator[Netns]:
    if reason := Netns.unavailable():
        pytest.skip(reason)
    with Netns() as made:
        yield made


def serve(net: Netns, tmp_path: Path) -> Child:
    log = tmp_path / "echo"
    command = [sys.executable, "-c", ECHO, net.FAR]
    return Child(command, log=log, popen=net.popen, ready=lambda: "ready" in log.read_text())


@pytest.mark.process
def test_a_namespace_has_a_rate_and_a_cable(net: Netns, tmp_path: Path) -> None:
    with serve(net, tmp_path):
        net.rate("8mbit")
        with net.enter("near"), socket.create_connection((net.FAR, 7000), timeout=20) as end:
            size, burst, begun = 400_000, 16_384, time.monotonic()
            end.sendall(bytes(size))
            end.shutdown(socket.SHUT_WR)
            while end.recv(65536):
                pass  # until the far end has received everything
            assert time.monotonic() - begun >= (size - burst) / 1_000_000
        net.rate(None)
        with net.enter("near"), socket.create_connection((net.FAR, 7000), timeout=10) as end:
            end.sendall(b"x")
            assert end.recv(1) == b"x"
            net.down()
            end.settimeout(0.3)
            end.sendall(b"x")
            with pytest.raises(TimeoutError):
                end.recv(1)
            net.up()
            end.settimeout(20)
            assert end.recv(1) == b"x"


@pytest.mark.process
def test_namespaces_are_removed_afterwards(tmp_path: Path) -> None:
    if reason := Netns.unavailable():
        pytest.skip(reason)
    with Netns(rate="8mbit") as net:
        child = serve(net, tmp_path)
        assert all(Path("/run/netns", name).exists() for name in net.names.values())
    assert not child.running
    assert not any(Path("/run/netns", name).exists() for name in net.names.values())
    stale = f"{processes._PREFIX}-999999999-0-near"
    processes._run("ip", "netns", "add", stale)
    with Netns():
        assert not Path("/run/netns", stale).exists()
