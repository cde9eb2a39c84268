"""Text from elsewhere (models, nodes, libraries, file names), made fit for terminals and logs."""

from __future__ import annotations


def printable(text: object) -> str:
    """The text with ``?`` for every character that is not to be seen, except line ends.

    Those are control characters, escapes, characters that turn the direction of writing (such as
    U+202E, by which "gnp.exe" reads "exe.png"), and undecodable bytes of file names.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))
