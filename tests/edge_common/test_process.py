"""Core dumps are off, even where the system pipes them to a collector. Also file limits and freed
memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process


def test_core_dumps_are_disabled() -> None:
    code = (
        "import ctypes, resource\n"
        "from edge_common.process import disable_core_dumps\n"
        "disable_core_dumps()\n"
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)\n"
        "PR_GET_DUMPABLE = 3\n"
        "assert ctypes.CDLL(None).prctl(PR_GET_DUMPABLE) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_limit_is_raised_as_far_as_allowed() -> None:
    code = (
        "import resource\n"
        "from edge_common.process import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200))\n"
        "assert raise_file_limit() == 200\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)\n"
        "assert raise_file_limit() == 200\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_message_memory_is_reused_without_page_faults() -> None:
    code = (
        "import resource, threading\n"
        "from edge_common.process import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def work():\n"
        "    for _ in range(100):\n"
        "        held = [b'x' * 4_000_000 for _ in range(4)]\n"
        "        held += [b'x' * 9_000_000 for _ in range(3)]\n"
        "        del held\n"
        "def faults():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()\n"
        # over 600,000 without it
        "assert faults() - before < 100_000, faults() - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
