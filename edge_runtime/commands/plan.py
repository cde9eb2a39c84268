"""`edge-runtime plan`: how many parties a budget needs, and how much room it leaves for retries.

It computes placements of a picture of the given size; no picture and no node is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_common.options import SHARE, Invalid
from edge_common.text import table
from edge_runtime.exposure.placement import DEFAULT_MAX_EXPOSURE, best_share, place

DESCRIPTION = """\
Say, for a number of parties and a budget, how the windows of a picture can be divided: how much of
it the busiest party sees, whether windows of one party touch, how many windows this machine has to
compute itself, and how many may go to a second party when the first one fails or is slow. A party
is all nodes with the same provider, since these might put together what they see."""

EPILOG = """\
The columns:
  BUSIEST      largest share of the picture that one party sees
  AT LEAST     the lowest budget with which that many parties can take all windows
  APART        which windows of one party never touch: corners (not even at a corner), edges (they
               may share a corner), or no
  AT HOME      windows that would break the budget, which this machine computes
  SECOND       windows that a second party may be sent too, all of them at once, within the budget
               and without windows that touch: the room for retries and hedges. The others are
               computed here if their party fails.

Every picture is divided differently, so the worst of a few divisions is shown. A camera that moves
needs more parties than a photo: see docs/privacy.md.

examples:
  edge-runtime plan
  edge-runtime plan --parties 5 --max-exposure 37%
  edge-runtime plan --parties 3-6 --max-exposure 0.3 --image 1080x1920 --json
"""

_MOST_PARTIES = 64
_TRIES = 4
"""Divisions that are tried for each number of parties."""


class Row(msgspec.Struct, frozen=True):
    """What a number of parties can do under the budget; the worst of a few placements.

    Attributes:
        busiest: share of the picture's area that the busiest party sees.
        at_least: the lowest budget with which no window stays at home.
        separation: 8, 4 or 0, as of :class:`.placement.Placement`.
        home: windows that the edge computes.
        second: windows that a second party may be sent too, all at once.
        windows: of the picture.
    """

    parties: int
    busiest: float
    at_least: float
    separation: int
    home: int
    second: int
    windows: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--parties",
        type=_counts,
        default=range(3, 10),
        metavar="N|N-M",
        help="how many parties, such as 5 or 3-9 (default: 3-9)",
    )
    parser.add_argument(
        "--max-exposure",
        type=SHARE,
        default=DEFAULT_MAX_EXPOSURE,
        metavar="SHARE",
        help="the budget: largest share of a picture's area any party may see, such as 0.37 or "
        "37%% (default: %(default)g)",
    )
    parser.add_argument(
        "--image",
        type=_size,
        default=(1920, 1080),
        metavar="WxH",
        help="width and height of the picture; only its shape matters (default: 1920x1080)",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="the model (default: the small one that comes with the package)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    import numpy as np

    from engines.bundle import Bundle, shipped_bundle
    from engines.geometry import resized_shape
    from engines.windows import cut

    geometry = Bundle.load(args.bundle or shipped_bundle()).geometry
    width, height = args.image
    size = resized_shape(height, width, geometry.image_size)
    windows = cut(np.zeros((*size, 3), np.uint8), geometry)
    areas, indices = windows.area().tolist(), windows.window.tolist()
    side, budget = geometry.windows_per_side, args.max_exposure
    rows = [look(areas, indices, side, count, budget) for count in args.parties]
    enough = enough_parties(areas, indices, side, budget)
    if args.json:
        result: dict[str, Any] = {
            "image": [width, height],
            "windows": len(indices),
            "max_exposure": budget,
            "parties": [msgspec.to_builtins(row) for row in rows],
            "enough": enough,
        }
        print(json.dumps(result, indent=2))
        return 0
    print(f"{width} x {height}: {len(indices)} windows, budget {_percent(budget)}\n")
    print("\n".join([*_table(rows), "", *_advice(rows, enough, budget)]))
    return 0


def look(
    areas: Sequence[int], windows: Sequence[int], side: int, parties: int, budget: float
) -> Row:
    """Place a few pictures of that shape on that many parties."""
    names = [f"party {number}" for number in range(parties)]
    tries = [
        place(areas, windows, side, names, budget, bytes([i]) * 32, b"", keep_home=True)
        for i in range(_TRIES)
    ]
    at_least = best_share(areas, windows, side, parties)
    assert at_least is not None  # without separation there is always a placement
    return Row(
        parties=parties,
        busiest=max(max(placement.exposure.values()) for placement in tries),
        at_least=at_least,
        separation=min(placement.separation for placement in tries),
        home=max(len(placement.home) for placement in tries),
        second=min(len(placement.second) for placement in tries),
        windows=len(windows),
    )


def enough_parties(
    areas: Sequence[int], windows: Sequence[int], side: int, budget: float
) -> dict[str, int | None]:
    """The fewest parties that take all windows: in any way, with edges and with corners apart.

    None: not even with one window for each party.
    """
    found: dict[str, int | None] = {}
    for name, separation in (("any", 0), ("edges", 4), ("corners", 8)):
        shares = (
            (count, best_share(areas, windows, side, count, separation))
            for count in range(1, min(len(windows), _MOST_PARTIES) + 1)
        )
        fits = (count for count, share in shares if share is not None and share <= budget)
        found[name] = next(fits, None)
    return found


def _table(rows: Sequence[Row]) -> list[str]:
    apart = {8: "corners", 4: "edges", 0: "no"}
    lines = [("PARTIES", "BUSIEST", "AT LEAST", "APART", "AT HOME", "SECOND")]
    for row in rows:
        second = f"{row.second} of {row.windows}"
        shares = _percent(row.busiest), _percent(row.at_least, up=True)
        lines.append((str(row.parties), *shares, apart[row.separation], str(row.home), second))
    return table(lines)


def _advice(rows: Sequence[Row], enough: dict[str, int | None], budget: float) -> list[str]:
    if enough["any"] is None:
        return [f"No number of parties can take all windows under {_percent(budget)}."]
    said = [f"{enough['any']} can take all windows under {_percent(budget)}"]
    if enough["edges"] is not None:
        said.append(f"{enough['edges']} so that windows of one party share no edge")
    if enough["corners"] is not None:
        said.append(f"{enough['corners']} so that they do not touch at all")
    lines = [f"Fewest parties: {'; '.join(said)}."]
    if short := [row for row in rows if row.home]:
        row = short[-1]
        needed = math.ceil(row.at_least * 1000) / 1000
        lines.append(
            f"With {row.parties}, none stays at home from --max-exposure {needed:g} on, with "
            '`fallback = "error"`, or a little more with "local".'
        )
    return lines


def _percent(share: float, *, up: bool = False) -> str:
    tenths = share * 1000
    return f"{(math.ceil(tenths - 1e-9) if up else tenths) / 10:.1f} %"


def _counts(text: str) -> range:
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    first = int(found[1]) if found else 0
    last = int(found[2] or first) if found else 0
    if not 1 <= first <= last <= _MOST_PARTIES:
        raise Invalid(f"expected N or N-M from 1 to {_MOST_PARTIES}, such as 3-9, not {text!r}")
    return range(first, last + 1)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (width and height):
        raise Invalid(f"expected WIDTHxHEIGHT in pixels, such as 1920x1080, not {text!r}")
    return width, height
