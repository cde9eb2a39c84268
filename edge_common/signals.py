"""Ctrl-C, SIGTERM and SIGHUP: a command ends within a second and leaves nothing behind.

Python runs signal handlers between two steps of the main thread, so never while a library computes,
which may take minutes. A second thread therefore receives each signal too. If the main thread does
not end in time, that thread runs the registered clean-ups and ends the process.
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
"""Time for the main thread to end by itself."""
_CLEANUP_S = 0.4
"""Time for the clean-ups after that."""
_DEFER_S = 5.0
"""Longest time that :func:`defer_signals` can put the end off."""

_cleanups: dict[object, Callable[[], None]] = {}
_deferring = 0
_pending: int | None = None
_received: int | None = None
_ending = False
_said = False


def run_as_process(command: Callable[[], int]) -> int:
    """Run ``command`` as the whole of this process and return its exit status.

    A signal raises in the main thread, so the command's clean-ups run. After a signal this function
    does not return: the process ends with the status that shells report, 128 plus the signal's
    number, and does not wait for threads that are still inside a library.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's C handler writes the signal's number here at once, whatever the main thread does.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _reset_in_forks()
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _install(_raise)
    try:
        return command()
    except KeyboardInterrupt:
        say_interrupted()
        return 128 + signal.SIGINT
    finally:
        if _received is not None:
            error = sys.exc_info()[1]
            if isinstance(error, Exception):
                sys.excepthook(type(error), error, error.__traceback__)
            _run_cleanups()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(128 + _received)


def received() -> int | None:
    """The signal that is ending the process, if any."""
    return _received


def clear_received() -> None:
    """Forget the signal: the caller has dealt with it and the process goes on."""
    global _received, _said
    _received, _said = None, False


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Make signals raise in the main thread during the block, so that clean-ups run.

    SIGINT raises KeyboardInterrupt as usual, the others raise SystemExit. Signals that are ignored
    stay ignored, as SIGHUP under ``nohup``.
    """
    before = _install(_raise)
    try:
        yield
    finally:
        _restore(before)


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for every signal that has Python's own or ours; return what to restore."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _raise):
                before[number] = signal.signal(number, handler)
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _reset_in_forks() -> None:
    """Make forked processes drop the clean-ups, which belong to this process."""
    mask: set[int] = set()

    def block() -> None:  # a signal to the child would reach us too until the child has reset
        mask.clear()
        mask.update(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def reset() -> None:
        signal.set_wakeup_fd(-1)
        _cleanups.clear()
        for number in SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def _raise(number: int, frame: FrameType | None) -> None:
    global _pending, _received
    while _ending:  # the other thread is ending the process
        time.sleep(60)
    if _deferring:
        _pending = number
        return
    _received = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


class StopRequest:
    """True if a signal has asked the command to stop. Made by :func:`stop_requests`."""

    def __init__(self, text: str) -> None:
        self.requested = False
        self._text, self._announced = text, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            _raise(number, frame)
        self.requested = True
        self.announce()

    def announce(self) -> None:
        """Print the text once, from whichever thread receives the signal first."""
        if not self._announced:
            self._announced = True
            os.write(2, f"{self._text}\n".encode())


@contextlib.contextmanager
def stop_requests(text: str) -> Iterator[StopRequest]:
    """Make the first signal during the block only request a stop, and print ``text`` then.

    A second signal stops at once.
    """
    request = StopRequest(text)
    before = _install(request)
    try:
        yield request
    finally:
        _restore(before)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Handle signals only after the block, which must be short."""
    global _deferring, _pending
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if not _deferring and _pending is not None:
            number, _pending = _pending, None
            _raise(number, None)


@contextlib.contextmanager
def cleanup_on_exit(cleanup: Callable[[], None]) -> Iterator[None]:
    """Call ``cleanup`` at the end of the block, also if a signal ends the process inside it.

    ``cleanup`` must be quick, and harmless when called twice. Enter this block before you make the
    thing that ``cleanup`` removes, so that there is no moment in between.
    """
    with on_forced_exit(cleanup):
        try:
            yield
        finally:
            with defer_signals():
                cleanup()


@contextlib.contextmanager
def on_forced_exit(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` if a signal ends the process inside the block, and only then."""
    key = object()
    _cleanups[key] = action
    try:
        yield
    finally:
        _cleanups.pop(key, None)


@contextlib.contextmanager
def child_process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own; kill the whole group at the end of the block."""
    import subprocess

    process: subprocess.Popen[bytes] | None = None

    def kill() -> None:
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not _ending:  # other processes may have to be killed, and time is short
                process.wait()

    with cleanup_on_exit(kill):
        with defer_signals():
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
    announced: StopRequest | None = None
    while numbers := os.read(pipe, 1):
        handler = signal.getsignal(numbers[0])
        if handler is _raise or (handler is announced and announced is not None):
            _end(numbers[0])
        elif isinstance(handler, StopRequest):
            announced = handler
            handler.announce()
        # Otherwise the command handles the signal itself.


def _end(number: int) -> None:
    global _ending
    time.sleep(_GRACE_S)
    until = time.monotonic() + _DEFER_S
    while _deferring and time.monotonic() < until:
        time.sleep(0.01)
    _ending = True
    limit = threading.Timer(_CLEANUP_S, os._exit, (128 + number,))
    limit.daemon = True
    limit.start()
    _run_cleanups()
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


def _run_cleanups() -> None:
    for key in reversed([*_cleanups]):
        cleanup = _cleanups.pop(key, None)
        if cleanup is not None:
            with contextlib.suppress(Exception):
                cleanup()
