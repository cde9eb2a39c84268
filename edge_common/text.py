"""Text from elsewhere (models, nodes, libraries, file names), made fit for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

UNPRINTABLE = (
    r"\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
)
"""The most harmful of these characters, for a class in a regular expression."""


def printable(text: object) -> str:
    """The text with ``?`` for every character that is not to be seen, except line ends.

    Those are control characters, escapes, characters that turn the direction of writing (such as
    U+202E, by which "gnp.exe" reads "exe.png"), and undecodable bytes of file names.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))


def escaped(text: str) -> str:
    """The text with an escape such as ``\\x1b`` for every character that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """The text as one printable line, without the space that it wastes."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, the first to the left and the others to the right; nothing is cut short."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
