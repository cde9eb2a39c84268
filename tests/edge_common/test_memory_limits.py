"""Memory limits and memory use."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from edge_common.memory_limits import MemoryLimits, memory_limit

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is used")


@linux
def test_groups_are_read_from_the_innermost_to_the_outermost(tmp_path: Path) -> None:
    def group(folder: Path, most: str, current: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("anon 1\nactive_file 1000\ninactive_file 500\n")

    group(tmp_path / "system.slice", str(1 << 30), 900_000)
    group(tmp_path / "system.slice" / "node.service", str(512 * MIB), 800_000)
    limits = MemoryLimits(tmp_path, "/system.slice/node.service")
    found = {limit.name: limit for limit in limits.all()}
    service = found["memory.max of /system.slice/node.service"]
    assert (service.most, service.used) == (512 * MIB, 798_500)  # cached files do not count
    assert found["memory.max of /system.slice"].most == 1 << 30
    group(tmp_path / "system.slice" / "node.service", "max", 800_000)
    assert [limit.most for limit in limits.all() if "service" in limit.name] == []
    limits.close()


@pytest.mark.process
@linux
@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_limits_of_the_process_are_read(name: str) -> None:
    most = 1 << 30
    code = (
        "import resource\n"
        "from edge_common.memory_limits import MemoryLimits\n"
        f"resource.setrlimit(resource.{name}, ({most}, {most}))\n"
        "(limit,) = MemoryLimits().own()\n"
        f"assert limit.name == '{name}', limit\n"
        "before = limit.used\n"
        "held = bytearray(64 << 20)\n"
        "(after,) = MemoryLimits().own()\n"
        "assert 60 << 20 < after.used - before < 70 << 20, (before, after)\n"
        f"assert after.most == {most}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@linux
def test_memory_use_and_a_limit_are_known_without_a_group() -> None:
    read = MemoryLimits(group="").resident
    before = read()
    assert before
    with mmap.mmap(-1, 64 * MIB) as ballast:  # never memory that this process has freed before
        for page in range(0, 64 * MIB, 4096):
            ballast[page] = 1
        after = read()
    assert after
    assert after - before > 32 * MIB
    limit = memory_limit()
    assert limit is not None
    assert limit > after


@pytest.mark.process
@linux
@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_process_limit_limits_its_memory(name: str) -> None:
    code = (
        "import resource, sys\n"
        "from edge_common.memory_limits import memory_limit\n"
        f"resource.setrlimit(resource.{name}, (1 << 30, 1 << 30))\n"
        "assert memory_limit() <= 1 << 30\n"
        "heavy = {'numpy', 'zmq', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
