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
