"""The memory budget: what fits under a limit, and that a node keeps to it."""

from __future__ import annotations

import asyncio
import logging
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults.nodes import NodeProcess
from hypothesis import assume, given
from hypothesis import strategies as st
from reliability.load import data_bytes, limited, under_load, write_echoing_bundle

from cloud_node.memory import Budget, Memory, Needs, TooLittle, check_room, divide
from edge_common.memory_limits import Limit, MemoryLimits
from transport.keys import generate, make_directory

MIB = 1 << 20
WANTED = Budget(queue=256 * MIB, transit=256 * MIB, connections=4096)
NEEDS = Needs(request=4 * MIB, result=8 * MIB, batches=8 * MIB, shared=80 * MIB)
LIMIT = Limit("RLIMIT_DATA", "raise it", 512 * MIB, 0, promised=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is used")


def cost(budget: Budget, needs: Needs, limit: Limit) -> int:
    """The most memory that a process with this budget takes."""
    return (
        budget.queue + budget.transit + budget.connections * needs.each(limit) + needs.fixed(limit)
    )


@given(
    most=st.integers(1 * MIB, 8 << 30),
    used=st.integers(0, 512 * MIB),
    queue=st.integers(1 * MIB, 2 << 30),
    request=st.integers(1000, 32 * MIB),
    result=st.integers(1000, 64 * MIB),
    promised=st.booleans(),
    shared=st.booleans(),
)
def test_the_budget_fits_the_limit_and_stays_below_the_request(
    most: int, used: int, queue: int, request: int, result: int, promised: bool, shared: bool
) -> None:
    needs = Needs(request, result, 2 * request, 10 * result)
    assume(queue >= needs.least.queue)
    wanted = Budget(queue, queue, 4096)
    limit = Limit("a limit", "raise it", most, used, promised=promised, shared=shared)
    try:
        budget = divide(limit, used, wanted, needs)
    except TooLittle:
        return
    assert used + cost(budget, needs, limit) < most
    assert needs.least.queue <= budget.queue <= wanted.queue
    assert min(wanted.transit, needs.least.transit) <= budget.transit <= wanted.transit
    assert 4 <= budget.connections <= 4096


@given(st.integers(0, 2 << 30), st.integers(0, 512 * MIB))
def test_a_higher_limit_never_gives_less(most: int, more: int) -> None:
    try:
        before = divide(replace(LIMIT, most=most), 0, WANTED, NEEDS)
    except TooLittle:
        return
    after = divide(replace(LIMIT, most=most + more), 0, WANTED, NEEDS)
    assert after.queue >= before.queue
    assert after.transit >= before.transit


def test_a_distant_limit_changes_nothing() -> None:
    assert divide(replace(LIMIT, most=64 << 30), 100 * MIB, WANTED, NEEDS) == WANTED
    # A group's announced but unallocated memory does not count.
    assert divide(replace(LIMIT, most=1 << 30, promised=False), 0, WANTED, NEEDS) == WANTED


def test_too_little_memory_names_the_amount_that_suffices() -> None:
    with pytest.raises(TooLittle, match="expected at least") as caught:
        divide(replace(LIMIT, most=128 * MIB), 100 * MIB, WANTED, NEEDS)
    enough = int(str(caught.value).partition("at least ")[2].split()[0]) * MIB
    divide(replace(LIMIT, most=enough), 100 * MIB, WANTED, NEEDS)
    with pytest.raises(TooLittle):
        divide(replace(LIMIT, most=enough - 2 * MIB), 100 * MIB, WANTED, NEEDS)


class StubLimits(MemoryLimits):
    """Limits chosen by the test."""

    def __init__(self, *limits: Limit) -> None:
        super().__init__(group="")
        self.limits = list(limits)

    def own(self) -> list[Limit]:
        return self.limits

    def all(self) -> list[Limit]:
        return self.limits


def test_a_limit_that_changes_changes_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told = StubLimits()
    memory = Memory(WANTED, NEEDS, told)
    assert not memory.update()
    assert memory.budget == WANTED
    told.limits = [replace(LIMIT, used=100 * MIB)]
    assert memory.update()
    assert memory.lowered
    assert memory.budget == divide(LIMIT, 100 * MIB, WANTED, NEEDS)
    assert "RLIMIT_DATA is 512 MiB, of which 100 MiB are in use" in caplog.text
    assert "not 256 MiB" in caplog.text
    told.limits = [replace(LIMIT, used=300 * MIB)]  # requests use this memory, as intended
    assert not memory.update()
    told.limits = [replace(LIMIT, most=500 * MIB, used=300 * MIB)]
    assert memory.update()
    smaller = replace(LIMIT, most=500 * MIB)
    assert memory.budget == divide(smaller, 100 * MIB, WANTED, NEEDS), "100 MiB of it when idle"
    told.limits = [replace(LIMIT, most=100 * MIB, used=90 * MIB)]
    with pytest.raises(TooLittle):
        memory.update()
    assert memory.budget == replace(NEEDS.least, connections=4)
    assert not memory.update()  # a change is reported once
    told.limits = []
    assert memory.update()
    assert not memory.lowered
    memory.close()


def test_memory_becomes_scarce_and_then_breaches_once() -> None:
    told = StubLimits(replace(LIMIT, used=100 * MIB))
    memory = Memory(WANTED, NEEDS, told)
    memory.update()
    assert not memory.scarce()
    told.limits = [replace(LIMIT, used=490 * MIB)]
    assert memory.scarce()
    for used, breached in ((490, False), (508, True), (508, False), (100, False), (508, True)):
        told.limits = [replace(LIMIT, used=used * MIB)]
        memory.update()
        assert memory.breached() == (told.limits[0] if breached else None)
    told.limits = [replace(LIMIT, used=100 * MIB)]
    memory.update()
    assert not memory.scarce()
    memory.close()


def test_limits_are_read_once_for_both_questions() -> None:
    class Counted(StubLimits):
        read = 0

        def all(self) -> list[Limit]:
            self.read += 1
            return super().all()

    told = Counted(LIMIT)
    memory = Memory(WANTED, NEEDS, told)
    before = told.read
    memory.update()
    memory.breached()
    assert told.read == before + 1


@pytest.mark.process
@linux
@pytest.mark.parametrize("most", [48, 80, 112])
@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_too_little_memory_to_start_is_reported_before_libraries_fail(
    name: str, most: int, tmp_path: Path
) -> None:
    check_room()
    generate(tmp_path, "node")
    make_directory(tmp_path / "authorized")
    command = [sys.executable, "-m", "cloud_node.cli", "serve", "--keys", str(tmp_path)]
    command += ["--bind", "tcp://127.0.0.1:0"]
    kind = getattr(resource, name)
    with limited(most * MIB, kind)(command, stderr=subprocess.PIPE, text=True) as started:
        _, said = started.communicate(timeout=30)
    assert started.returncode == 1, said
    assert f"error: {name} is {most} MiB, expected at least" in said
    assert "ulimit" in said


# -- a real node, with requests of 4 MB and results of 8 MB
# -----------------------------------------


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echoing_bundle(tmp_path_factory.mktemp("echoing") / "bundle")


@pytest.fixture(scope="module")
def idle(echoing: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory of a node without requests."""
    with NodeProcess(echoing, tmp_path_factory.mktemp("idle")) as node:
        return data_bytes(node.pid)


@pytest.mark.process
@linux
def test_under_a_limit_a_node_sheds_and_lives(echoing: Path, idle: int, tmp_path: Path) -> None:
    limit = idle + 180 * MIB
    seen = asyncio.run(under_load(echoing, tmp_path, 2.0, limit, edges=5))
    assert seen["alive"], seen
    assert seen["data"] < limit
    assert seen["right"]
    assert not seen["wrong"]
    assert seen["refused"]["overloaded"]
    assert seen["served afterwards"]


@pytest.mark.process
@linux
def test_a_node_that_does_not_fit_names_the_limit_that_would(
    echoing: Path, idle: int, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError) as caught:
        NodeProcess(echoing, tmp_path, popen=limited(idle + 64 * MIB))
    said = str(caught.value)
    assert "error: RLIMIT_DATA is " in said
    enough = int(said.partition("expected at least ")[2].split()[0]) * MIB
    with NodeProcess(echoing, tmp_path, popen=limited(enough + 2 * MIB)) as node:
        assert "may wait in the queue, not 256 MiB" in node.logged()


@pytest.mark.process
@linux
def test_a_node_follows_a_limit_that_is_set_while_it_runs(
    echoing: Path, idle: int, tmp_path: Path
) -> None:
    with NodeProcess(echoing, tmp_path) as node:

        def limit(most: int, expected: str) -> None:
            hard = resource.RLIM_INFINITY
            resource.prlimit(node.pid, resource.RLIMIT_DATA, (most, hard))
            give_up = time.monotonic() + 30
            while expected not in node.logged():
                assert node.running
                assert time.monotonic() < give_up
                time.sleep(0.02)

        limit(idle + 240 * MIB, "may wait in the queue, not 256 MiB")
        limit(idle + 20 * MIB, "a limit has changed, and this process may fail because of it")
        limit(resource.RLIM_INFINITY, "leave room for all that is configured")
