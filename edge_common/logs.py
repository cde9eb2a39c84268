"""The log of a long-running process: lines for people or one JSON object per line, in UTC."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TextIO

from edge_common.text import escaped

_MAX_CHARACTERS = 8192
"""Longer messages are cut."""
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def setup(level: str, form: Literal["text", "json"] | str, stream: TextIO | None = None) -> None:
    """Send everything that is logged from now on to `stream` (default: stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Throttle())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def log_defect(log: logging.Logger, text: str, error: BaseException) -> None:
    """Log a defect with its traceback. Never raises: the caller has more to do."""
    with contextlib.suppress(Exception):
        log.error("%s: %s", text, type(error).__name__, exc_info=error)


class LogLimiter:
    """Limits how often each thing is logged, so that no peer can fill the log.

    Args:
        every_s: length of a period.
        lines: allowed for each key in a period.
        keys: remembered at most. When all are in use, further keys are not logged at all.
        clock: seconds.
    """

    def __init__(
        self,
        every_s: float = 60.0,
        *,
        lines: int = 1,
        keys: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_s, self._lines, self._keys, self._clock = every_s, lines, keys, clock
        self._periods: dict[Hashable, tuple[float, int]] = {}  # start, lines so far

    def allows(self, key: Hashable, now: float | None = None) -> bool:
        """True if a line about `key` may be logged now."""
        return self.take(key, now) is not None

    def take(self, key: Hashable, now: float | None = None) -> int | None:
        """Like `allows`, but returns how many lines the last period left out, or None to refuse."""
        now = self._clock() if now is None else now
        start, lines = self._periods.get(key, (None, 0))
        if start is not None and now - start < self._every_s:
            self._periods[key] = start, lines + 1
            return 0 if lines < self._lines else None
        if start is None and len(self._periods) >= self._keys:
            fresh = {k: p for k, p in self._periods.items() if now - p[0] < self._every_s}
            self._periods = fresh
            if len(fresh) >= self._keys:
                return None
        self._periods[key] = now, 1
        return max(0, lines - self._lines)


class Throttle(logging.Filter):
    """Lets each line of code log 100 messages in 10 seconds, then notes how many it left out.

    DEBUG messages all pass.
    """

    def __init__(self, limiter: LogLimiter | None = None) -> None:
        super().__init__()
        self._limiter = limiter or LogLimiter(10.0, lines=100, keys=1024)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        left_out = self._limiter.take((record.name, record.pathname, record.lineno, record.levelno))
        if left_out:
            record.left_out = left_out
        return left_out is not None


class TextFormatter(logging.Formatter):
    """``TIME LEVEL message``. Further lines are indented, so that none looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        text = _message(record)
        if left_out := getattr(record, "left_out", 0):
            text += f" (and {left_out} more such lines before, left out)"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        lines = map(escaped, text.rstrip("\n").split("\n"))
        return f"{_time(record)} {record.levelname} " + "\n    ".join(lines)


class JsonFormatter(logging.Formatter):
    """One object: ``time``, ``level``, ``logger``, ``message``, the ``extra`` fields,
    ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        fields = _extra(record) | fields
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)  # ASCII only: no character can control a terminal


def _harmless(value: object) -> object:
    """`value`; or only its type and size if it could hold part of an image or a key."""
    if isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "__array_interface__"):
        size = getattr(value, "nbytes", None)
        return f"<{type(value).__name__} of {len(value) if size is None else size} bytes>"  # type: ignore[arg-type]
    return value


def _message(record: logging.LogRecord) -> str:
    args = record.args
    if isinstance(args, Mapping):
        args = {key: _harmless(value) for key, value in args.items()}
    elif args:
        args = tuple(map(_harmless, args))
    text = str(_harmless(record.msg))
    try:
        text = text % args if args else text
    except (TypeError, ValueError, KeyError):  # a wrong format must not lose the line
        text = f"{text} (cannot be formatted)"
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}... ({len(text)} characters)"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """The fields given as ``extra``."""
    fields = {}
    for key, value in vars(record).items():
        if key not in _STANDARD and not key.startswith("_"):  # libraries add names with _
            value = _harmless(value)
            plain = value is None or isinstance(value, (str, int, float))
            fields[key] = value if plain else str(value)[:_MAX_CHARACTERS]
    return fields


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
