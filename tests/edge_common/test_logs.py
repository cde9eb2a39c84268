"""The log: one record per line, no tensor contents, no flood."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_common.logs import JsonFormatter, LogLimiter, TextFormatter, Throttle, setup

HOSTILE = "a\nb\r\x1b[31mred\x1b[0m\x00\u202eevil\u2028z\x9b\x7f\ud800é"


def record(message: object, *args: Any, level: int = logging.INFO, **extra: Any) -> Any:
    made = logging.getLogger("test").makeRecord(
        "test", level, "file.py", 1, message, args, None, extra=extra or None
    )
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_a_text_line_has_utc_time_level_and_message() -> None:
    line = TextFormatter().format(
        record("%d windows for %s", 4, "kitchen", event="done", client="kitchen")
    )
    assert line == "2023-11-14T22:13:20.250Z INFO 4 windows for kitchen"


def test_a_json_line_has_the_same_fields() -> None:
    made = record("%d windows", 4, event="done", client="kitchen", ms=1.5, ok=True)
    made._ray_timestamp_ns = 1  # Ray marks every record of a process in which it is imported
    assert json.loads(JsonFormatter().format(made)) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "test",
        "message": "4 windows",
        "event": "done",
        "client": "kitchen",
        "ms": 1.5,
        "ok": True,
    }


def test_a_field_cannot_override_time_or_level() -> None:
    made = record("x", event="e")
    made.time, made.level = "never", "none"
    told = json.loads(JsonFormatter().format(made))
    assert (told["time"], told["level"]) == ("2023-11-14T22:13:20.250Z", "info")


def test_text_of_a_peer_cannot_forge_a_record_or_control_a_terminal() -> None:
    text = TextFormatter().format(record("refused %s", HOSTILE))
    first, *rest = text.split("\n")
    assert first.startswith("2023")
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]", text)
    assert "\\x1b[31mred" in text
    assert "é" in text
    line = JsonFormatter().format(record("refused %s", HOSTILE, client=HOSTILE))
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["client"] == HOSTILE


CANARY = b"window-contents-canary"


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        bytearray(CANARY),
        memoryview(CANARY),
        np.frombuffer(CANARY, np.uint8),
        np.frombuffer(CANARY[:16], np.float32),
    ],
    ids=lambda v: type(v).__name__,
)
def test_arrays_and_bytes_are_logged_by_size(form: Any, value: Any) -> None:
    for made in (
        record("got %s", value),
        record("got %r", value),
        record(value),
        record("got %(it)s", {"it": value}),
        record("got", contents=value),
    ):
        line = form.format(made)
        assert "canary" not in line
        assert "119" not in line  # printed as numbers
        if form.__class__ is JsonFormatter or "contents" not in vars(made):
            assert re.search(r"<\w+ of (22|16) bytes>", line)


def test_a_wrong_format_string_still_logs_a_line() -> None:
    line = TextFormatter().format(record("%d of %d", "x"))
    assert line.endswith("%d of %d (cannot be formatted)")


def test_a_huge_message_is_truncated() -> None:
    line = TextFormatter().format(record("x" * 100_000))
    assert len(line) < 9000
    assert line.endswith("(100000 characters)")


def test_exceptions_are_indented_in_text_and_a_field_in_json() -> None:
    try:
        raise ValueError("no\x1b[2J")
    except ValueError as error:
        made = record("failed")
        made.exc_info = (type(error), error, error.__traceback__)
    text = TextFormatter().format(made)
    assert "\n    ValueError: no\\x1b[2J" in text
    assert "ValueError: no" in json.loads(JsonFormatter().format(made))["exception"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def throttle(lines: int, clock: Clock) -> Throttle:
    return Throttle(LogLimiter(10.0, lines=lines, clock=clock))


def test_repeated_lines_are_limited_and_the_dropped_ones_counted() -> None:
    clock = Clock()
    limited = throttle(3, clock)
    assert [limited.filter(record("a %d", i)) for i in range(10)] == [True] * 3 + [False] * 7
    other = record("elsewhere")
    other.lineno = 2
    assert limited.filter(other)
    clock.now = 10.0
    again = record("a")
    assert limited.filter(again)
    assert TextFormatter().format(again).endswith("INFO a (and 7 more such lines before, left out)")
    assert json.loads(JsonFormatter().format(again))["left_out"] == 7
    later = record("a")
    assert limited.filter(later)
    assert "left out" not in TextFormatter().format(later)


def test_debug_lines_are_not_limited() -> None:
    limited = throttle(1, Clock())
    assert all(limited.filter(record("a", level=logging.DEBUG)) for _ in range(10))


def test_a_limiter_allows_each_key_once_in_a_period() -> None:
    clock = Clock()
    limiter = LogLimiter(60.0, clock=clock)
    assert [limiter.allows("a"), limiter.allows("a"), limiter.allows("b")] == [True, False, True]
    clock.now = 59.9
    assert not limiter.allows("a")
    clock.now = 60.0
    assert limiter.take("a") == 2
    clock.now = 120.0
    assert limiter.take("a") == 0


def test_a_limiter_remembers_a_bounded_number_of_keys() -> None:
    clock = Clock()
    limiter = LogLimiter(60.0, keys=100, clock=clock)
    assert sum(limiter.allows(number) for number in range(1000)) == 100
    assert len(limiter._periods) == 100
    clock.now = 60.0
    assert limiter.allows("later")
    assert len(limiter._periods) == 1


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    quiet = logging.getLogger("asyncio").level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logging.getLogger("asyncio").setLevel(quiet)


@pytest.mark.parametrize("form", ["text", "json"])
def test_setup_sends_every_logger_to_one_stream(root: logging.Logger, form: str) -> None:
    stream = io.StringIO()
    setup("info", form, stream)
    setup("info", form, stream)  # set up twice, still one line per record
    logging.getLogger("some.module").info("hello")
    logging.getLogger("some.module").debug("not this")
    (line,) = stream.getvalue().splitlines()
    assert "hello" in line
    assert (form == "json") == line.startswith("{")
