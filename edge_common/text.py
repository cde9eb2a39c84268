"""Text from elsewhere (models, nodes, libraries, file names), made safe for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

UNPRINTABLE = (
    r"\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
)
"""The most harmful unprintable characters, for a class in a regular expression."""


def printable(text: object) -> str:
    """Replace every unprintable character by ``?``, except line ends.

    Unprintable are control characters, escapes, characters that change the direction of writing
    (with U+202E, "gnp.exe" shows as "exe.png"), and undecodable bytes of file names.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))


def escaped(text: str) -> str:
    """The text with an escape such as ``\\x1b`` for every character that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """Put the text on one printable line, with single spaces between its words."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as columns: the first aligned left, the others right; nothing is cut off."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
