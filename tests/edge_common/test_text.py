"""Text that is safe to print on a terminal."""

from __future__ import annotations

import re
import sys

import pytest

from edge_common.text import UNPRINTABLE, escaped, one_line, printable, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("vit_b", "vit_b"),
        ("Küche 厨房", "Küche 厨房"),
        ("\u202egnp.exe", "?gnp.exe"),
        ("\u2066a\u2069\u200f\u061c", "?a???"),
        ("\x1b[31mred\x07\x9b", "?[31mred??"),
        ("caf\udce9", "caf?"),
        ("a\tb\r\nc", "a?b?\nc"),
        (ValueError("\x00"), "?"),
    ],
)
def test_unprintable_characters_are_replaced(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()


def test_the_character_class_matches_only_unprintable_characters() -> None:
    harmful = [c for c in map(chr, range(sys.maxunicode + 1)) if re.match(f"[{UNPRINTABLE}]", c)]
    assert not any(map(str.isprintable, harmful))
    assert {"\n", "\x1b", "\u202e", "\u2066", "\u200f", "\udce9"} <= set(harmful)


def test_escaped_text_shows_the_original_characters() -> None:
    assert escaped('Grüße, 東京 100 % \\ "q"') == 'Grüße, 東京 100 % \\ "q"'
    shown = "\\t\\x85\\u200b\\U000e0001\\x1b\\ud800é"
    assert escaped("\t\x85\u200b\U000e0001\x1b\ud800é") == shown


def test_one_line_collapses_white_space() -> None:
    assert one_line(" a\tb\r\n\n c\u202e d ") == "a b c d"


def test_a_table_truncates_no_cell() -> None:
    name = "n" * 64
    assert table([("node", "windows"), (name, "7"), ("b", "12")]) == [
        f"node{' ' * 60}  windows",
        f"{name}        7",
        f"b{' ' * 63}       12",
    ]
