"""Signals to real processes, both in Python code and inside a library call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_common import signals

pytestmark = pytest.mark.process

# A loop inside a library: it never ends, and Python runs no signal handler meanwhile.
STUCK = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1)"
HEADER = """
import os, sys, time
from pathlib import Path
from edge_common import signals
from edge_common.files import scratch_folder, atomic_file
from edge_common.signals import child_process, defer_signals, cleanup_on_exit
here = Path(sys.argv[1])
def stuck():
    (here / "ready").touch()
    {stuck}
"""


def run(body: str, folder: Path, *, stuck: str = STUCK) -> subprocess.Popen[str]:
    """Start a process that runs ``body`` as a command. On return it is inside :func:`stuck`."""
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    code = HEADER.format(stuck=stuck)
    code += f"def command():\n{indented}\n    return 0\nsys.exit(signals.run_as_process(command))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background test run passes on some signals as ignored.
        preexec_fn=lambda: [
            signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.signal(signal.SIGTERM, signal.SIG_DFL),
            signal.signal(signal.SIGHUP, signal.SIG_DFL),
        ],
    )
    wait_for(lambda: (folder / "ready").exists(), process)
    (folder / "ready").unlink()
    return process


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"  # a zombie that nobody has waited for


@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize("stuck", [STUCK, "time.sleep(3600)"], ids=["library", "python"])
def test_a_process_ends_anywhere_and_its_files_are_removed(
    number: signal.Signals, stuck: str, tmp_path: Path
) -> None:
    body = """
with scratch_folder(here / "a" / "b") as scratch, atomic_file(here / "file") as file:
    (scratch / "half").touch()
    file.write_text("half")
    stuck()
"""
    process = run(body, tmp_path, stuck=stuck)
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert (process.returncode, said[1]) == (128 + number, "interrupted\n" if number == 2 else "")
    assert os.listdir(tmp_path) == []


def test_children_and_their_children_end_too(tmp_path: Path) -> None:
    body = f"""
inner = "import subprocess; print(subprocess.Popen(['sleep', '3600']).pid, flush=True); "
inner += {STUCK!r}
with child_process([sys.executable, "-c", inner], stdout=-1) as process:
    pids = [process.pid, int(process.stdout.readline())]
    (here / "pids").write_text(" ".join(map(str, pids)))
    stuck()
"""
    process = run(body, tmp_path)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    give_up = time.monotonic() + 10
    while any(map(alive, pids)):  # the kernel needs a moment
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_held_signal_waits_for_the_end_of_the_block(tmp_path: Path) -> None:
    body = """
with defer_signals():
    (here / "first").touch()
    stuck()
    (here / "second").touch()
(here / "third").touch()
"""
    process = run(body, tmp_path, stuck="time.sleep(1)")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]


def test_a_second_signal_does_not_interrupt_the_clean_up(tmp_path: Path) -> None:
    body = """
def undo():
    (here / "begun").touch()
    time.sleep(0.1)
    (here / "undone").touch()
with cleanup_on_exit(undo):
    stuck()
"""
    process = run(body, tmp_path, stuck="time.sleep(3600)")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "begun").exists(), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "undone").exists()


def test_a_hanging_clean_up_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    body = """
with cleanup_on_exit(lambda: time.sleep(3600)):
    stuck()
"""
    process = run(body, tmp_path)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_command_may_handle_a_signal_itself(tmp_path: Path) -> None:
    body = """
import signal
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
stuck()
time.sleep(1)
return 7 if asked else 8
"""
    process = run(body, tmp_path, stuck="time.sleep(1)")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_exit_status_and_errors_pass_through(tmp_path: Path) -> None:
    process = run("stuck()\nreturn 5", tmp_path, stuck="pass")
    process.communicate(timeout=60)
    assert process.returncode == 5
    process = run("stuck()\nraise ValueError('odd')", tmp_path, stuck="pass")
    assert "ValueError: odd" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


def test_the_end_of_a_forked_child_does_not_end_its_parent(tmp_path: Path) -> None:
    body = """
import signal
pid = os.fork()
if pid == 0:
    time.sleep(3600)
    os._exit(0)
os.kill(pid, signal.SIGTERM)
assert os.waitpid(pid, 0)[1] != 0
stuck()
return 6
"""
    process = run(body, tmp_path, stuck="time.sleep(1)")
    process.communicate(timeout=60)
    assert process.returncode == 6


FINISHING = """
from edge_common.signals import stop_requests
with stop_requests("saving first") as asked:
    stuck()
    while not asked.requested:
        time.sleep(0.01)
(here / "saved").touch()
return 130
"""


def test_a_command_may_finish_its_work_before_it_stops(tmp_path: Path) -> None:
    process = run(FINISHING, tmp_path, stuck="pass")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "saving first\n"
    assert process.returncode == 130
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_anywhere(number: signal.Signals, tmp_path: Path) -> None:
    process = run(FINISHING, tmp_path)
    process.send_signal(number)
    assert process.stderr is not None
    # at once, not when the library call returns
    assert process.stderr.readline() == "saving first\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert os.listdir(tmp_path) == []
