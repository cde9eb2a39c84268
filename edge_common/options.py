"""Types of options: numbers within bounds, shares, and a parser whose errors are one line.

The command line, ``edge.toml`` and ``node.toml`` use the same bounds.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any, NoReturn


class Invalid(argparse.ArgumentTypeError, ValueError):
    """An option's value is wrong; the text says what was expected."""


@dataclass(frozen=True)
class Number:
    """A number within bounds, for the ``type=`` of an argparse option.

    Attributes:
        least, most: the bounds, both allowed.
        above: ``least`` itself is not allowed.
        whole: only whole numbers are allowed.
        unit: what the number counts.
    """

    least: float
    most: float
    unit: str = ""
    above: bool = False
    whole: bool = False

    def __call__(self, text: str) -> Any:
        try:
            value = self.parse(text)
            self.check(value)
        except Invalid as error:
            raise Invalid(f"{error}, not {text!r}") from None
        return value

    def parse(self, text: str) -> Any:
        """Convert ``text`` without checking the bounds; raises Invalid."""
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            raise Invalid(f"expected {self}") from None

    def check(self, value: float) -> None:
        """Raise Invalid unless the value is within the bounds."""
        low = self.least < value if self.above else self.least <= value
        if not (low and value <= self.most):  # a NaN fails this
            raise Invalid(f"expected {self}")

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = (
            f"above {_plain(self.least)}, at most"
            if self.above
            else f"from {_plain(self.least)} to"
        )
        return f"{kind} {low} {_plain(self.most)} {self.unit}".rstrip()


@dataclass(frozen=True)
class Share(Number):
    """A share of a whole: ``0.37`` or ``37%``."""

    least: float = 0
    most: float = 1
    above: bool = True

    def __str__(self) -> str:
        return "a share above 0, at most 1, such as 0.37"

    def parse(self, text: str) -> float:
        number = text.strip()
        percent = number.endswith("%")
        return float(super().parse(number.removesuffix("%"))) / (100 if percent else 1)


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


SHARE = Share()
THREADS = Number(1, 1024, whole=True)
SECONDS = Number(0, 86_400, "seconds", above=True)
COUNT = Number(1, 10_000_000, whole=True)
"""Steps, images, samples."""
RATE = Number(0, 1, above=True)
"""Learning rate."""
SEED = Number(0, (1 << 64) - 1, whole=True)


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line, which takes ``-5,10`` for a value, not an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as in Python 3.14

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        self.exit(2, f"error: {text} (`{self.prog} --help` explains)\n")
