"""Progress of long work on stderr: a bar with an estimate on a terminal, lines elsewhere.

Work that takes less than a second shows nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from edge_common.signals import cleanup_on_exit

_FIRST_S = 1.0
_REFRESH_S = 0.2
_FIRST_LINE_S = 3.0
_LINE_S = 15.0


class Progress:
    """How much of some work is done. Made by :func:`progress`."""

    def __init__(self, label: str = "", total: float | None = None, done: float = 0) -> None:
        self.label, self.total, self.done = label, total, done
        self.note = ""
        self._begun = self._marked = time.monotonic()
        self._begun_at = done
        self._piece = 0.0

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Report that ``amount`` more is done."""
        self.done += amount
        self._marked, self._piece = time.monotonic(), 0.0
        self.note = note

    @contextlib.contextmanager
    def piece(self, amount: float = 1.0, note: str = "") -> Iterator[None]:
        """Report that the block does ``amount`` at once; meanwhile the pace gives an estimate."""
        self._marked, self._piece, self.note = time.monotonic(), amount, note
        yield
        self.advance(amount, note)

    def state(self, now: float) -> tuple[float | None, float | None]:
        """The share done and the seconds left; None where unknown."""
        if self.total is None:
            return None, None
        finished, spent = self.done - self._begun_at, self._marked - self._begun
        if finished <= 0 or spent <= 0:
            return (self.done / self.total if self.done else None), None
        pace = finished / spent
        guess = (now - self._marked) * pace
        if guess > self._piece > 0:  # it takes longer than estimated
            return min((self.done + 0.95 * self._piece) / self.total, 1.0), None
        done = min(self.done + min(guess, self._piece), self.total)
        return done / self.total, (self.total - done) / pace

    def text(self, now: float) -> str:
        """The state in words: ``window layers, 45%, 12 s so far, about 14 s left``."""
        share, left = self.state(now)
        parts = [self.note] if self.note else []
        parts += [] if share is None else [f"{share:.0%}"]
        parts.append(f"{_duration(now - self._begun)} so far")
        parts += [] if left is None else [f"about {_duration(left)} left"]
        return ", ".join(parts)


@contextlib.contextmanager
def progress(
    label: str, total: float | None = None, *, done: float = 0, quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of the block; yields a :class:`Progress` for the work to keep up to date.

    Args:
        label: name of the work.
        total: how much work there is, in any unit; None if unknown.
        done: how much of it was done before, for example in an earlier run.
        quiet: show nothing.
    """
    work = Progress(label, total, done)
    if quiet:
        yield work
        return
    over = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(work, over), name="progress", daemon=True)
    thread.start()
    try:
        yield work
    finally:
        over.set()
        thread.join(1)


def _show_lines(work: Progress, over: threading.Event) -> None:
    wait = _FIRST_LINE_S
    while not over.wait(wait):
        print(f"{work.label}: {work.text(time.monotonic())}", file=sys.stderr, flush=True)
        wait = max(_LINE_S, (time.monotonic() - work._begun) / 20)  # keeps logs of long runs short


def _show_bar(work: Progress, over: threading.Event) -> None:
    if over.wait(_FIRST_S):
        return
    from rich.console import Console
    from rich.control import Control
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False),
    ]
    console = Console(stderr=True)
    with (
        cleanup_on_exit(lambda: console.control(Control.show_cursor(True))),
        Bar(
            *columns,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # otherwise output to a file would go to stderr
        ) as bar,
    ):
        task = bar.add_task(work.label, total=None, text="")
        while True:
            now = time.monotonic()
            share, _ = work.state(now)
            bar.update(
                task,
                description=work.label,
                total=share and 1.0,
                completed=share or 0.0,
                text=work.text(now),
            )
            bar.refresh()
            if over.wait(_REFRESH_S):
                return


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
