"""Ctrl-C, SIGTERM and SIGHUP: a command ends within a second and leaves nothing behind.

Python handles signals between two steps of the main thread, so not while an engine computes, which
may take minutes. A second thread therefore hears of the signal too. If the main thread does not
end in time, the second thread undoes what :func:`undone` has registered and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 0.15
"""How long the main thread may take to end by itself."""
_UNDO_S = 0.4
"""How long undoing may take after that."""
_HELD_S = 5.0
"""How long :func:`held` can put the end off."""

_undo: dict[object, Callable[[], None]] = {}
_held = 0
_pending: int | None = None
_came: int | None = None
_ending = False
_said = False


def as_process(command: Callable[[], int]) -> int:
    """Run ``command`` as the whole of this process; returns its exit status.

    The stack of the command is unwound by a signal. After one, this does not return: the process
    ends with the status that shells report, 128 and the signal's number, without waiting for
    threads that are still inside a library.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's own C handler writes the signal's number here at once, whatever the main thread does.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _survive_forks()
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _install(_raise)
    try:
        return command()
    except KeyboardInterrupt:
        say_interrupted()
        return 128 + signal.SIGINT
    finally:
        if _came is not None:
            error = sys.exc_info()[1]
            if isinstance(error, Exception):
                sys.excepthook(type(error), error, error.__traceback__)
            _undo_all()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(128 + _came)


def came() -> int | None:
    """The signal that is ending the process, if any."""
    return _came


def forget() -> None:
    """The signal has been dealt with, and the process lives on."""
    global _came, _said
    _came, _said = None, False


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Signals raise in the main thread during the block, so that every clean-up runs.

    SIGINT raises KeyboardInterrupt as usual, the others SystemExit. Signals that are ignored, as
    SIGHUP is under ``nohup``, stay ignored.
    """
    before = _install(_raise)
    try:
        yield
    finally:
        _restore(before)


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle all signals that are not ignored or handled by others; returns what to restore."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _raise):
                before[number] = signal.signal(number, handler)
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _survive_forks() -> None:
    """In a process that this one forks, nothing that is registered here is its own."""
    mask: set[int] = set()

    def block() -> None:  # until the child has forgotten, a signal to it would reach us too
        mask.clear()
        mask.update(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        _undo.clear()
        for number in SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=forget)


def _raise(number: int, frame: FrameType | None) -> None:
    global _pending, _came
    while _ending:  # the other thread ends the process: do nothing any more
        time.sleep(60)
    if _held:
        _pending = number
        return
    _came = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


class Finishing:
    """Whether a stop is wanted, for a command that first finishes what it has begun."""

    def __init__(self, text: str) -> None:
        self.requested = False
        self._text, self._heard = text, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            _raise(number, frame)
        self.requested = True
        self.hear()

    def hear(self) -> None:
        """Say at once, from whichever thread hears of it first, what happens next."""
        if not self._heard:
            self._heard = 1
            os.write(2, f"{self._text}\n".encode())


@contextlib.contextmanager
def finishing(text: str) -> Iterator[Finishing]:
    """The first signal during the block only asks for a stop, and ``text`` says what happens now.

    A second one stops at once.
    """
    asked = Finishing(text)
    before = _install(asked)
    try:
        yield asked
    finally:
        _restore(before)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Put a stop off until the end of the block, which must be short."""
    global _held, _pending
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted by signals
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held and _pending is not None:
            number, _pending = _pending, None
            _raise(number, None)


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` at the end of the block, and also if the process ends in the middle of it.

    ``undo`` must be quick and must do no harm when it is called twice. Enter this before making
    the thing that ``undo`` removes, so that there is no moment in between.
    """
    key = object()
    _undo[key] = undo
    try:
        yield
    finally:
        with held():
            try:
                undo()
            finally:
                _undo.pop(key, None)


@contextlib.contextmanager
def if_ended(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` if the process ends in the middle of the block; see :func:`undone`."""
    key = object()
    _undo[key] = action
    try:
        yield
    finally:
        _undo.pop(key, None)


@contextlib.contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; at the end it and what it has started are killed."""
    import subprocess

    process: subprocess.Popen[bytes] | None = None

    def kill() -> None:
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not _ending:  # there may be others to kill, and little time
                process.wait()

    with undone(kill):
        with held():
            process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            yield process
        finally:
            kill()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _watch(pipe: int) -> None:
    heard: Finishing | None = None
    while numbers := os.read(pipe, 1):
        handler = signal.getsignal(numbers[0])
        if handler is _raise or (handler is heard and heard is not None):
            _end(numbers[0])
        elif isinstance(handler, Finishing):
            heard = handler
            handler.hear()
        # Else the command handles the signal itself.


def _end(number: int) -> None:
    global _ending
    time.sleep(_GRACE_S)
    until = time.monotonic() + _HELD_S
    while _held and time.monotonic() < until:
        time.sleep(0.01)
    _ending = True
    limit = threading.Timer(_UNDO_S, os._exit, (128 + number,))
    limit.daemon = True
    limit.start()
    _undo_all()
    if number == signal.SIGINT:
        say_interrupted()
    os._exit(128 + number)


def say_interrupted() -> None:
    """Print it, once, from whichever thread ends the process."""
    global _said
    said, _said = _said, True
    if not said:
        with contextlib.suppress(OSError, ValueError):
            print("interrupted", file=sys.stderr, flush=True)


def _undo_all() -> None:
    for key in reversed([*_undo]):
        undo = _undo.pop(key, None)
        if undo is not None:
            with contextlib.suppress(Exception):
                undo()
