"""Core dumps are off, also where the system pipes them to a collector."""

from __future__ import annotations

import subprocess
import sys


def test_core_dumps_are_disabled() -> None:
    code = (
        "import ctypes, resource\n"
        "from transport.process import disable_core_dumps\n"
        "disable_core_dumps()\n"
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)\n"
        "PR_GET_DUMPABLE = 3\n"
        "assert ctypes.CDLL(None).prctl(PR_GET_DUMPABLE) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_limit_is_raised_as_far_as_may_be() -> None:
    code = (
        "import resource\n"
        "from transport.process import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200))\n"
        "assert raise_file_limit() == 200\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)\n"
        "assert raise_file_limit() == 200\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
