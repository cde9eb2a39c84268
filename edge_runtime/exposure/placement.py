"""Decides which node may see which window of an image. Pure: no networks, models or clocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from edge_common.errors import PlacementError
from edge_runtime.exposure.colouring import (
    SETTLE_STEPS,
    KeyedRandom,
    Shape,
    Walk,
    loads_of,
    most_even,
    randomised,
    reached,
    settle,
    touch,
    touching,
)

DEFAULT_MAX_EXPOSURE = 0.5
"""No node sees more than half of an image. Three nodes always satisfy it; two hardly ever can."""


class Placement(msgspec.Struct, frozen=True):
    """Which node computes which windows of an image.

    Attributes:
        assignment: node name -> indices of its windows, ascending (every node is a key).
        home: windows that stay on the edge.
        separation: 8 if no two windows of a node touch, 4 if none share an edge, else 0.
        touching: pairs of windows of one node that touch, corners included.
        areas: window index -> image pixels in it.
        side: windows per side of the grid.
        second: window -> another node that may see it too. If all of them do, every node is still
            within `max_exposure` and keeps `separation`. Windows without one are not listed.
        frame: number of the frame in its scene; 0 for a photo.
    """

    assignment: dict[str, tuple[int, ...]]
    home: tuple[int, ...]
    separation: int
    touching: int
    max_exposure: float
    areas: dict[int, int]
    side: int
    second: dict[int, str] = msgspec.field(default_factory=dict)
    frame: int = 0

    def share(self, windows: Iterable[int]) -> float:
        """The share of the image's area that lies in these windows. Nothing else computes it."""
        return sum(self.areas[window] for window in windows) / sum(self.areas.values())

    @property
    def exposure(self) -> dict[str, float]:
        """Node name -> share of the image's area that is assigned to it."""
        return {name: self.share(windows) for name, windows in self.assignment.items()}


def place(
    areas: Sequence[int],
    windows: Sequence[int],
    side: int,
    nodes: Sequence[str],
    max_exposure: float,
    secret: bytes,
    image_hash: bytes,
    keep_home: bool = False,
    ids: Mapping[str, str] | None = None,
) -> Placement:
    """Assign every window to one node or, with `keep_home`, to the edge if the budget requires it.

    No node sees more than `max_exposure` of the image's area. No node sees two touching windows
    where the number of nodes allows it: with four or more nodes not even at a corner, with two or
    three not along an edge. Where area and separation conflict, area wins, and `separation` and
    `touching` of the result say so.

    The choice depends on the image's hash and the edge's secret. A node cannot predict its windows,
    and the same photo with the same nodes is placed the same way again, so that a repeat shows no
    node anything new. Under a tighter budget with `keep_home`, nodes see less of that same
    placement; without it, another placement is chosen.

    A budget that can be met is never refused, as far as the exact search finishes. It does for up
    to eight windows, and for every photo.

    Args:
        areas: image pixels in each window, > 0.
        windows: index of each window in the `side` x `side` grid, row-major, distinct.
        nodes: distinct node names; their order does not matter.
        max_exposure: largest share of `sum(areas)` one node may see, in (0, 1].
        secret: the edge's secret, at least 16 bytes.
        image_hash: any digest of the image's content.
        keep_home: keep at home what exceeds a node's budget, instead of choosing another placement
            with less separation, or failing.
        ids: node name -> what identifies the machine, such as its key, so that a machine under a
            new name is placed as before. None: the names.

    Raises:
        PlacementError: the budget cannot be met; `mend` says what would suffice.
    """
    if not nodes:
        raise PlacementError("there are no nodes to place windows on", mend="add some to edge.toml")
    if len(set(nodes)) != len(nodes):
        raise PlacementError(f"node names must differ, found {', '.join(sorted(nodes))}")
    if not 0 < max_exposure <= 1:
        raise PlacementError(f"max_exposure is {max_exposure}; it must be above 0 and at most 1")
    if len(secret) < 16:
        raise PlacementError(f"the edge secret has {len(secret)} bytes; at least 16 are needed")
    if len(windows) == 0 or len(windows) != len(areas) or len(set(windows)) != len(windows):
        raise PlacementError("windows must be distinct and have one area each")
    shape = _shape(areas, windows, side)
    random = KeyedRandom(secret, image_hash)
    colours, separation = _choose(shape, max_exposure, random, nodes, keep_home)

    # Which node gets which colour depends on each node alone, not on the order in the file.
    known = ids or {name: name for name in nodes}
    ranked = sorted(nodes, key=lambda name: (random.digest(b"node", known[name].encode()), name))
    placed: dict[int, list[int]] = {colour: [] for colour in range(-1, len(nodes))}  # -1: at home
    for window, colour in zip(shape.windows, colours, strict=True):
        placed[colour].append(window)
    assignment = {name: tuple(placed[ranked.index(name)]) for name in sorted(nodes)}
    named = dict(zip(shape.windows, shape.areas, strict=True))
    loads = {name: sum(named[w] for w in mine) for name, mine in assignment.items()}
    return Placement(
        assignment=assignment,
        home=tuple(placed[-1]),
        separation=separation,
        touching=touching(shape, colours, 8),
        max_exposure=max_exposure,
        areas=named,
        side=side,
        second=seconds(
            assignment,
            dict.fromkeys(assignment, named),
            loads,
            dict.fromkeys(assignment, _budget(shape, max_exposure)),
            side,
            separation,
        ),
    )


def seconds(
    assignment: Mapping[str, Sequence[int]],
    costs: Mapping[str, Mapping[int, int]],
    loads: Mapping[str, float],
    limits: Mapping[str, float],
    side: int,
    separation: int,
) -> dict[int, str]:
    """A second node for as many of the assigned windows as a greedy search finds.

    Args:
        costs: node -> window -> what the node would see in addition by seeing the window.
        loads: node -> what it sees with its own windows, in the same unit.
        limits: node -> what it may see at most.
    """
    after = dict(loads)
    held = {name: set(mine) for name, mine in assignment.items()}
    # For each window, the nodes left to it; those that see a window that touches it are out.
    left = {
        window: {
            name
            for name, mine in held.items()
            if window not in mine and not any(touch(window, w, side, separation) for w in mine)
        }
        for own in assignment.values()
        for window in own
    }
    found: dict[int, str] = {}
    for window in sorted(left, key=lambda w: (len(left[w]), w)):  # fewest choices first
        fitting = [n for n in sorted(left[window]) if after[n] + costs[n][window] <= limits[n]]
        if not fitting:
            continue
        name = max(fitting, key=lambda n: limits[n] - after[n] - costs[n][window])
        found[window] = name
        after[name] += costs[name][window]
        for other, names in left.items():
            if touch(window, other, side, separation):
                names.discard(name)
    return found


def best_share(
    areas: Sequence[int], windows: Sequence[int], side: int, nodes: int, separation: int = 0
) -> float | None:
    """The lowest largest share (of the area) that :func:`place` can reach with that many nodes.

    `separation` 8 or 4 asks for placements that keep it; None if that many nodes cannot.
    """
    shape = _shape(areas, windows, side)
    found = most_even(shape, nodes, separation)
    return None if found is None else max(loads_of(shape, found, nodes)) / shape.total


def _shape(areas: Sequence[int], windows: Sequence[int], side: int) -> Shape:
    pairs = sorted((int(w), int(a)) for w, a in zip(windows, areas, strict=True))
    return Shape(tuple(w for w, _ in pairs), tuple(a for _, a in pairs), side)


def _choose(
    shape: Shape, max_exposure: float, random: KeyedRandom, nodes: Sequence[str], keep_home: bool
) -> tuple[list[int], int]:
    """A colouring within the budget and the separation it reached; colour -1 stays at home."""
    k = len(nodes)
    # Chosen without regard to the budget and kept if it fits: another budget then shows no node
    # more of the photo.
    widest = next(s for s in (8, 4, 0) if most_even(shape, k, s) is not None)
    colours = randomised(shape, k, widest, random)
    budget = _budget(shape, max_exposure)
    if max(loads_of(shape, colours, k)) <= budget:
        return colours, reached(shape, colours)
    if keep_home:  # less of the same placement, rather than another one
        _send_home(shape, colours, k, budget)
        return colours, reached(shape, colours)
    for separation in (8, 4, 0):
        even = most_even(shape, k, separation)
        if even is None or max(loads_of(shape, even, k)) > budget:
            continue
        drawn = settle(Walk(shape, k, separation, colours, random), budget, SETTLE_STEPS)
        colours = drawn if max(loads_of(shape, drawn, k)) <= budget else list(even)
        return colours, reached(shape, colours)
    raise PlacementError(
        f"no placement on {k} {'node' if k == 1 else 'nodes'} keeps every node within "
        f"{max_exposure:g} of this image",
        mend=f"what would suffice: {_what_would_suffice(shape, k, max_exposure)}",
    )


def _budget(shape: Shape, max_exposure: float) -> int:
    """Largest area whose share, computed as in :meth:`Placement.share`, is within the budget."""
    area = int(max_exposure * shape.total) + 1
    while area / shape.total > max_exposure:
        area -= 1
    return area


def _send_home(shape: Shape, colours: list[int], k: int, budget: int) -> None:
    """Take windows from each node until it fits: the smallest that suffices, else the largest."""
    for colour in range(k):
        mine = sorted(
            (i for i, c in enumerate(colours) if c == colour), key=lambda i: shape.areas[i]
        )
        while (excess := sum(shape.areas[i] for i in mine) - budget) > 0:
            enough = [i for i in mine if shape.areas[i] >= excess]
            dropped = enough[0] if enough else mine[-1]
            mine.remove(dropped)
            colours[dropped] = -1


def _what_would_suffice(shape: Shape, k: int, max_exposure: float) -> str:
    even = most_even(shape, k, 0)
    assert even is not None
    share = math.ceil(max(loads_of(shape, even, k)) / shape.total * 1000) / 1000
    advice = [f"--max-exposure {share:g}"]
    for more in range(k + 1, len(shape.windows) + 1):
        colours = most_even(shape, more, 0)
        assert colours is not None
        if max(loads_of(shape, colours, more)) / shape.total <= max_exposure:
            advice.insert(0, f"{more} nodes")
            break
    advice.append("--fallback local, which computes the rest on the edge")
    return ", or ".join(advice)
