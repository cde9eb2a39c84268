"""The figure of throughput: bars of a node and of bare sockets, as an SVG made from the results.

Written by hand so that the same results give the same bytes, everywhere and without a plotting
library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_INK, _FAINT = "#1f2328", "#5b6270"
_COLOURS = {"node": "#4a7bd0", "bare": "#c3c9d4"}
_LEFT, _WIDTH, _BARS = 150, 720, 400
_TOP, _BAR, _GAP = 64, 20, 18


def compared(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a row measured of a node beside bare sockets, by edges; empty for any other row."""
    return {
        name: both
        for name, both in result.get("seen", {}).items()
        if isinstance(both, dict)
        and all("requests/s" in _dict(both.get(side)) for side in ("node", "bare"))
    }


def share(both: Mapping[str, Any]) -> Any:
    """What the node moved of what bare sockets did, in percent, as the row gives it."""
    return next((value for name, value in both.items() if name.startswith("share")), {})


def figure(results: Sequence[Mapping[str, Any]]) -> str | None:
    """An SVG of all rows of throughput, of the long form where that was run; None without any."""
    chosen = {one["row"]: one for one in results if compared(one)}  # the long form comes last
    if not chosen:
        return None
    groups = [
        (f"{re.sub('^throughput, | windows$', '', name)}, {edges}", both)
        for name, one in chosen.items()
        for edges, both in compared(one).items()
    ]
    most = max(both[side]["requests/s"] for _, both in groups for side in ("node", "bare"))
    forms = " and ".join(dict.fromkeys(one["form"] for one in chosen.values()))
    height = _TOP + len(groups) * (2 * _BAR + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13">',
        "<title>Requests a second of a node and of bare sockets</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 26, "Requests a second, each of all windows of an image", _INK, 'font-size="15"'),
    ]
    x = 16.0
    for side, words in (
        ("node", "a node whose engine does nothing"),
        ("bare", "two bare sockets with the same security"),
    ):
        parts.append(f'<rect x="{x:g}" y="38" width="12" height="12" fill="{_COLOURS[side]}"/>')
        parts.append(_text(x + 18, 49, words, _FAINT))
        x += 260
    parts.append(_text(_WIDTH - 16, 49, f"{forms} form", _FAINT, 'text-anchor="end"'))
    for number, (label, both) in enumerate(groups):
        y = _TOP + number * (2 * _BAR + _GAP) + _GAP / 2
        parts.append(_text(_LEFT - 12, y + _BAR + 5, label, _INK, 'text-anchor="end"'))
        for side in ("node", "bare"):
            rate = both[side]["requests/s"]
            width = _BARS * rate / most if most else 0.0
            parts.append(
                f'<rect x="{_LEFT}" y="{y:g}" width="{width:.1f}" height="{_BAR - 2}" '
                f'fill="{_COLOURS[side]}"/>'
            )
            median = _dict(share(both)).get("median")
            of_bare = f" ({median} % of bare)" if side == "node" and median is not None else ""
            parts.append(_text(_LEFT + width + 8, y + _BAR - 6, f"{rate:,}{of_bare}", _INK))
            y += _BAR
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, fill: str, more: str = "") -> str:
    safe = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{f" {more}" if more else ""}>{safe}</text>'


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
