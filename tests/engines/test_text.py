"""What may reach a terminal."""

from __future__ import annotations

import pytest

from engines.text import printable


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
def test_what_is_not_to_be_seen_is_replaced(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()
