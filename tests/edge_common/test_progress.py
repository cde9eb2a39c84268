"""Progress: its text and its stream."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from edge_common.progress import Progress, progress

WORK = """
import edge_common.progress as p, sys, time
import rich.console, rich.progress
p._FIRST_S, p._FIRST_LINE_S, p._LINE_S, p._REFRESH_S = 0.05, 0.05, 0.2, 0.05
with p.progress("photo.jpg", 4, quiet={quiet}) as work:
    time.sleep(0.5)
    work.advance(2, "window layers")
    print("half")
    with work.piece(2, "global layers"):
        time.sleep(0.5)
print("done")
"""


def test_the_remaining_time_follows_from_the_pace() -> None:
    work = Progress("x", 10, done=0)
    begun = work._begun
    assert work.state(begun + 5) == (None, None)
    assert work.text(begun + 5) == "5 s so far"
    work.done, work._marked, work.note = 4, begun + 8, "tail"
    assert work.state(begun + 8) == pytest.approx((0.4, 12.0))
    assert work.text(begun + 8) == "tail, 40%, 8 s so far, about 12 s left"
    work._piece = 6  # one piece: its duration is a guess
    assert work.state(begun + 14) == pytest.approx((0.7, 6.0))
    share, left = work.state(begun + 100)  # it takes longer than the guess
    assert share == pytest.approx(0.97)
    assert left is None


def test_work_of_an_earlier_run_does_not_count_for_the_pace() -> None:
    work = Progress("x", 100, done=90)
    assert work.state(work._begun + 50) == (0.9, None)
    work.done, work._marked = 95, work._begun + 10
    assert work.state(work._begun + 10) == pytest.approx((0.95, 10.0))


def test_work_of_unknown_length_has_no_percentage() -> None:
    work = Progress("x", None, 0)
    work.advance(3)
    assert work.state(work._begun + 1) == (None, None)
    assert work.text(work._begun + 200) == "3 min so far"


@pytest.mark.process
def test_without_a_terminal_progress_is_printed_as_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(quiet=False)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "half\ndone\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("photo.jpg: ")
    assert any("global layers, " in line and " left" in line for line in lines)
    assert "\x1b" not in done.stderr


@pytest.mark.process
def test_the_bar_on_a_terminal_disappears_and_the_cursor_returns() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", WORK.format(quiet=False)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 1 << 16)
        except OSError:  # the terminal is closed
            break
    os.close(ours)
    assert process.communicate()[0] == "half\ndone\n"
    text = said.decode()
    assert "photo.jpg" in text
    assert "about" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden
    assert text.rstrip().endswith("\x1b[2K") or text.rindex("\x1b[2K") > text.rindex("photo.jpg")


@pytest.mark.process
def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("x", 2, quiet=True) as work, work.piece():
        pass
    assert work.done == 1
    command = [sys.executable, "-c", WORK.format(quiet=True)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
