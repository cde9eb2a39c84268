"""The log of a node: lines for people, or one JSON object per line; times in UTC, on stderr.

Promises that a record is one line (or, in text, a line and indented ones that can't be taken for
others), whatever a peer got into it; that arrays and bytes are told by their size only, should one
be logged by mistake; and that one place in the program can't fill the log, whoever makes it try.
What is worth a line is left to whoever writes it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

_MOST = 8192
"""Characters of a message; more is cut."""
_SITES = 1024
_SUSPECT = re.compile(r"[^\x20-\x7e]")
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def setup(level: str, form: Literal["text", "json"] | str, stream: TextIO | None = None) -> None:
    """Send everything that is logged from now on to `stream` (default: stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Json() if form == "json" else Text())
    handler.addFilter(Throttle())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def printable(text: str) -> str:
    """`text` with whatever a terminal would obey, or an eye not see, written out."""

    def written(match: re.Match[str]) -> str:
        character = match[0]
        if unicodedata.category(character) not in _UNSEEN:
            return character
        code = ord(character)
        if code < 256:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"

    return _SUSPECT.sub(written, text)


def _harmless(value: object) -> object:
    """`value`, or its type and size if it might be a part of an image, or a key."""
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
    except (TypeError, ValueError, KeyError):  # a mistake in the program must not cost the line
        text = f"{text} (cannot be formatted)"
    return text if len(text) <= _MOST else f"{text[:_MOST]}... ({len(text)} characters)"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``."""
    found = {}
    for key, value in vars(record).items():
        if key not in _STANDARD and not key.startswith("_"):  # libraries mark records of theirs so
            value = _harmless(value)
            plain = value is None or isinstance(value, (str, int, float))
            found[key] = value if plain else str(value)[:_MOST]
    return found


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class Text(logging.Formatter):
    """``TIME LEVEL message``; the message says what the fields say."""

    def format(self, record: logging.LogRecord) -> str:
        text = _message(record)
        if left_out := getattr(record, "left_out", 0):
            text += f" (and {left_out} more such lines before, left out)"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        lines = map(printable, text.rstrip("\n").split("\n"))
        return f"{_time(record)} {record.levelname} " + "\n    ".join(lines)


class Json(logging.Formatter):
    """One object: ``time``, ``level``, ``logger``, ``message``, what was given as ``extra``,
    ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        told |= {key: value for key, value in _fields(record).items() if key not in told}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)  # ASCII only, so that no character is left to obey


class Throttle(logging.Filter):
    """Lets each place in the program write `most` lines in `every_s` seconds.

    The first line after that says how many were left out. Lines of level DEBUG all pass: who asks
    for these wants all.
    """

    def __init__(
        self, most: int = 100, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most, self._every_s, self._clock = most, every_s, clock
        self._sites: dict[object, list[float]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        site = (record.name, record.pathname, record.lineno, record.levelno)
        now = self._clock()
        if site not in self._sites and len(self._sites) >= _SITES:
            self._sites.clear()
        state = self._sites.setdefault(site, [now, 0])
        if now - state[0] >= self._every_s:
            left_out = int(state[1]) - self._most
            state[:] = [now, 0]
            if left_out > 0:
                record.left_out = left_out
        state[1] += 1
        return state[1] <= self._most
