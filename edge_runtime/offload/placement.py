"""Decides which node may see which window of an image, and grants every single send.

:func:`place` assigns the windows, :class:`ExposureLedger` grants and records each send. Nothing
here knows about networks, models or time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from edge_common.errors import PlacementError

DEFAULT_MAX_EXPOSURE = 0.5
"""No node sees more than half of an image. Three nodes always satisfy it; two hardly ever can."""

# A placement may be this much (share of the image's area) above the most even one known: evenness
# that is spent on unpredictability, since few placements are exactly optimal.
_SLACK = 0.01
_EXACT_STEPS = 16_000  # of the search for a shape's most even colouring; cached per shape
_EXACT_WINDOWS = 200  # it recurses once for each
_SEARCH_STEPS = 6000  # of the walk that takes its place where that search does not finish
_WALK_STEPS = 40  # random Kempe exchanges per window that make one photo's placement its own
_SETTLE_STEPS = (
    4000  # to bring a random colouring back under its limit, else the cached one is used
)


class Placement(msgspec.Struct, frozen=True):
    """Who computes what.

    ``assignment``: node name -> indices of its windows, ascending (every node is a key).
    ``home``: windows that stay on the edge. ``exposure``: node name -> share of the image's area.
    ``separation``: 8 if no two windows of a node touch, 4 if none share an edge, else 0.
    ``touching``: pairs of windows of one node that touch, corners included.
    ``areas``: window index -> image pixels in it. ``side``: windows per side of the grid.
    """

    assignment: dict[str, tuple[int, ...]]
    home: tuple[int, ...]
    exposure: dict[str, float]
    separation: int
    touching: int
    max_exposure: float
    areas: dict[int, int]
    side: int


class Decision(msgspec.Struct, frozen=True):
    """One line of the ledger: somebody asked to show ``windows`` to ``node``."""

    node: str
    windows: tuple[int, ...]
    granted: bool
    reason: str
    share_of_image: float  # the node's, after the decision


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
    """Assign every window to one node (or, with ``keep_home``, to the edge if the budget says so).

    No node sees more than ``max_exposure`` of the image's area. No node sees two touching windows
    where the number of nodes allows it: with four or more nodes not even at a corner, with two or
    three not along an edge. Where area and separation conflict, area wins and the placement says
    so.

    The choice is drawn with a hash of the image, keyed by the edge's secret: a node cannot predict
    its windows, and the same photo with the same nodes is placed the same way again, so that a
    repeat shows nobody anything new. Under a tighter budget, nodes see less of that placement if
    windows may stay at home; otherwise another one is drawn.

    A budget that can be met is never refused, as far as :func:`_exact` finishes: that is for up to
    eight windows, and for every photo.

    Args:
        areas: image pixels in each window, > 0.
        windows: index of each window in the ``side`` x ``side`` grid, row-major, distinct.
        nodes: distinct node names; their order does not matter.
        max_exposure: largest share of ``sum(areas)`` one node may see, in (0, 1].
        secret: the edge's secret, at least 16 bytes.
        image_hash: any digest of the image's content.
        keep_home: what is too much for a node's budget stays at home, instead of another placement
            being drawn, with less separation if need be, or none being found.
        ids: node name -> what makes the node itself known, such as its key, so that a machine under
            a new name is placed as before; None: the names.

    Raises:
        PlacementError: the budget cannot be met; the message says what would suffice.
    """
    if not nodes:
        raise PlacementError("there are no nodes to place windows on; name some in edge.toml")
    if len(set(nodes)) != len(nodes):
        raise PlacementError(f"node names must differ, found {', '.join(sorted(nodes))}")
    if not 0 < max_exposure <= 1:
        raise PlacementError(f"max_exposure is {max_exposure}; it must be above 0 and at most 1")
    if len(secret) < 16:
        raise PlacementError(f"the edge secret has {len(secret)} bytes; at least 16 are needed")
    if len(windows) == 0 or len(windows) != len(areas) or len(set(windows)) != len(windows):
        raise PlacementError("windows must be distinct and have one area each")
    order = sorted(range(len(windows)), key=lambda i: windows[i])
    shape = _Shape(tuple(int(windows[i]) for i in order), tuple(int(areas[i]) for i in order), side)
    random = _KeyedRandom(secret, image_hash)
    colours, separation = _choose(shape, len(nodes), max_exposure, random, nodes, keep_home)

    # Which node gets which colour depends on each node alone, not on the order in the file.
    known = ids or {name: name for name in nodes}
    ranked = sorted(nodes, key=lambda name: (random.digest(b"node", known[name].encode()), name))
    assignment: dict[str, list[int]] = {name: [] for name in nodes}
    home = []
    for window, colour in zip(shape.windows, colours, strict=True):
        if colour < 0:
            home.append(window)
        else:
            assignment[ranked[colour]].append(window)
    area = dict(zip(shape.windows, shape.areas, strict=True))
    return Placement(
        assignment={name: tuple(assignment[name]) for name in sorted(nodes)},
        home=tuple(home),
        exposure={
            name: sum(area[w] for w in assignment[name]) / shape.total for name in sorted(nodes)
        },
        separation=separation,
        touching=_touching(shape, colours, 8),
        max_exposure=max_exposure,
        areas=area,
        side=side,
    )


def best_share(
    areas: Sequence[int], windows: Sequence[int], side: int, nodes: int, separation: int = 0
) -> float | None:
    """Smallest largest share (of the area) that :func:`place` can reach with that many nodes.

    ``separation`` 8 or 4 asks for placements that keep it; None if that many nodes cannot.
    """
    order = sorted(range(len(windows)), key=lambda i: windows[i])
    shape = _Shape(tuple(int(windows[i]) for i in order), tuple(int(areas[i]) for i in order), side)
    found = _most_even(shape, nodes, separation)
    return None if found is None else max(_loads(shape, found, nodes)) / shape.total


class Permit:
    """Leave to send some windows to one node, once. Only :class:`ExposureLedger` makes them.

    ``bytes_sent``: 0 until the sender has handed the windows to a connection; from then on, the
    node may have seen them.
    """

    __slots__ = ("_spent", "bytes_sent", "node", "windows")

    def __init__(self, node: str, windows: tuple[int, ...]) -> None:
        self.node = node
        self.windows = windows
        self.bytes_sent = 0
        self._spent = False

    def spend(self, node: str, windows: Sequence[int]) -> None:
        """Use the permit for this very send; raises PlacementError if it is for another one."""
        if self._spent or node != self.node or tuple(int(w) for w in windows) != self.windows:
            raise PlacementError(
                f"no permit to send windows {list(windows)} to {node!r}: ask the ledger first"
            )
        self._spent = True


class ExposureLedger:
    """Grants or refuses every send of one image's windows and remembers what each node has seen.

    A node may be sent what the placement assigned to it, and anything more only while its share of
    the area stays within ``max_exposure`` and the placement's separation holds; windows kept at
    home are never granted. What was granted counts as seen, whether or not it arrived.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.decisions: list[Decision] = []
        self._seen: dict[str, set[int]] = {name: set() for name in placement.assignment}
        self._total = sum(placement.areas.values())

    def seen(self, node: str) -> frozenset[int]:
        """Windows the node has been permitted to see so far."""
        return frozenset(self._seen[node])

    def exposure(self) -> dict[str, float]:
        """Node name -> share of the image's area it has been permitted to see so far."""
        return {name: self._share(seen) for name, seen in self._seen.items()}

    def permit(self, node: str, windows: Sequence[int], reason: str = "dispatch") -> Permit:
        """Leave to send ``windows`` to ``node``; raises PlacementError, and records it, if not."""
        asked = tuple(int(w) for w in windows)
        refusal = self._refusal(node, asked)
        if refusal is None:
            self._seen[node] |= set(asked)
        seen = self._seen.get(node, set())
        self.decisions.append(
            Decision(node, asked, refusal is None, refusal or reason, self._share(seen))
        )
        if refusal is not None:
            raise PlacementError(f"not sending windows {list(asked)} to {node!r}: {refusal}")
        return Permit(node, asked)

    def _share(self, seen: set[int]) -> float:
        return sum(self.placement.areas[w] for w in seen) / self._total

    def _refusal(self, node: str, asked: tuple[int, ...]) -> str | None:
        placement = self.placement
        if node not in self._seen:
            return "it is not one of the nodes of this placement"
        if strange := [w for w in asked if w not in placement.areas]:
            return f"windows {strange} are not part of this image"
        if kept := sorted(set(asked) & set(placement.home)):
            return f"windows {kept} stay at home"
        # The node's own windows are reserved for it: granting others must not break that promise.
        others = set(asked) - set(placement.assignment[node])
        after = self._seen[node] | set(placement.assignment[node]) | others
        if not others:
            return None
        if self._share(after) > placement.max_exposure:
            share = self._share(after)
            return f"it would see {share:.3f} of the image, above {placement.max_exposure:g}"
        for window in others:
            for other in after - {window}:
                if _touch(window, other, placement.side, placement.separation):
                    return f"it sees window {other}, which touches window {window}"
        return None


# -- colourings: one colour per node; windows that touch want different colours -----------------


class _Shape(NamedTuple):
    """Windows in ascending order with their areas, in a grid of ``side`` x ``side``."""

    windows: tuple[int, ...]
    areas: tuple[int, ...]
    side: int

    @property
    def total(self) -> int:
        return sum(self.areas)


class _KeyedRandom:
    """Random numbers from BLAKE2b in counter mode: equal on every machine and Python version."""

    def __init__(self, secret: bytes, image_hash: bytes) -> None:
        self._key = hashlib.blake2b(secret, digest_size=32, person=b"ert.placement").digest()
        self._image = image_hash
        self._counter = 0
        self._words: list[int] = []

    def digest(self, purpose: bytes, data: bytes) -> bytes:
        message = b"".join(len(b).to_bytes(4, "big") + b for b in (purpose, self._image, data))
        return hashlib.blake2b(message, key=self._key, digest_size=64).digest()

    def below(self, n: int) -> int:
        """Uniform in [0, n); the bias of the modulo is below n / 2**64."""
        if not self._words:
            block = self.digest(b"stream", self._counter.to_bytes(8, "big"))
            self._words = [int.from_bytes(block[i : i + 8], "big") for i in range(0, 64, 8)]
            self._counter += 1
        return self._words.pop() % n


def _choose(
    shape: _Shape,
    k: int,
    max_exposure: float,
    random: _KeyedRandom,
    nodes: Sequence[str],
    keep_home: bool,
) -> tuple[list[int], int]:
    """A colouring within the budget and the separation it reached; colour -1 stays at home."""
    # Drawn without a look at the budget and kept if it fits: another budget then shows nobody more.
    widest = next(s for s in (8, 4, 0) if _most_even(shape, k, s) is not None)
    colours = _randomised(shape, k, widest, random)
    budget = _budget(shape, max_exposure)
    if max(_loads(shape, colours, k)) <= budget:
        return colours, _reached(shape, colours)
    if keep_home:  # less of the same placement, rather than another one
        _send_home(shape, colours, k, budget)
        return colours, _reached(shape, colours)
    for separation in (8, 4, 0):
        even = _most_even(shape, k, separation)
        if even is None or max(_loads(shape, even, k)) > budget:
            continue
        drawn = _settle(_Walk(shape, k, separation, colours, random), budget, _SETTLE_STEPS)
        colours = drawn if max(_loads(shape, drawn, k)) <= budget else list(even)
        return colours, _reached(shape, colours)
    raise PlacementError(_what_would_suffice(shape, nodes, max_exposure))


def _budget(shape: _Shape, max_exposure: float) -> int:
    """Largest area whose share, computed as the report computes it, is within the budget."""
    area = int(max_exposure * shape.total) + 1
    while area / shape.total > max_exposure:
        area -= 1
    return area


def _send_home(shape: _Shape, colours: list[int], k: int, budget: int) -> None:
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


def _what_would_suffice(shape: _Shape, nodes: Sequence[str], max_exposure: float) -> str:
    k = len(nodes)
    even = _most_even(shape, k, 0)
    assert even is not None
    share = math.ceil(max(_loads(shape, even, k)) / shape.total * 1000) / 1000
    advice = [f"--max-exposure {share:g}"]
    for more in range(k + 1, len(shape.windows) + 1):
        colours = _most_even(shape, more, 0)
        assert colours is not None
        if max(_loads(shape, colours, more)) / shape.total <= max_exposure:
            advice.insert(0, f"{more} nodes")
            break
    advice.append("--fallback local, which computes the rest on the edge")
    return (
        f"no placement on {k} {'node' if k == 1 else 'nodes'} keeps every node within "
        f"{max_exposure:g} of this image; what would suffice: {', or '.join(advice)}"
    )


def _touch(a: int, b: int, side: int, separation: int) -> bool:
    if separation == 0:
        return False
    rows, columns = abs(a // side - b // side), abs(a % side - b % side)
    return max(rows, columns) == 1 and (separation == 8 or rows + columns == 1)


@lru_cache(maxsize=64)
def _neighbours(shape: _Shape, separation: int) -> tuple[tuple[int, ...], ...]:
    """For each window (by position in the shape), the positions it must not share a node with."""
    n, w = len(shape.windows), shape.windows
    return tuple(
        tuple(j for j in range(n) if _touch(w[i], w[j], shape.side, separation)) for i in range(n)
    )


def _touching(shape: _Shape, colours: Sequence[int], separation: int) -> int:
    return sum(
        colours[i] == colours[j] and colours[i] >= 0
        for i, near in enumerate(_neighbours(shape, separation))
        for j in near
        if j > i
    )


def _reached(shape: _Shape, colours: Sequence[int]) -> int:
    return next((s for s in (8, 4) if not _touching(shape, colours, s)), 0)


def _loads(shape: _Shape, colours: Sequence[int], k: int) -> list[int]:
    loads = [0] * k
    for area, colour in zip(shape.areas, colours, strict=True):
        loads[colour] += area
    return loads


def _templates(shape: _Shape, k: int, separation: int) -> list[list[int]]:
    """Colourings that keep the separation, by construction; empty if k colours cannot.

    ``(2 row + column) mod k`` differs by 1, 2 or 3 between 8-neighbours, so k >= 4 always keeps
    8; ``(row + column) mod k`` keeps 4 for k >= 2. Fewer colours may do for some shapes (a strip).
    """
    cells = [divmod(w, shape.side) for w in shape.windows]
    if k >= 4 and separation:
        return [[(2 * r + c) % k for r, c in cells], [(r + 2 * c) % k for r, c in cells]]
    if k >= 2 and separation != 8:
        return [[(r + c) % k for r, c in cells]]
    if separation == 0:
        return [[0] * len(cells)]
    found = _greedy(_neighbours(shape, separation), k)
    return [found] if found is not None else []


def _greedy(neighbours: tuple[tuple[int, ...], ...], k: int) -> list[int] | None:
    """Colouring with at most 3 colours by backtracking, component by component."""
    colours = [-1] * len(neighbours)
    for start in range(len(neighbours)):
        if colours[start] >= 0:
            continue
        # Breadth-first order keeps every window next to earlier ones, so dead ends show at once.
        order, queue = [start], {start}
        for v in order:
            order += (fresh := [u for u in neighbours[v] if u not in queue])
            queue.update(fresh)
        position, tried = 0, [-1] * len(order)
        while position < len(order):
            v = order[position]
            taken = {colours[u] for u in neighbours[v]}
            choice = next((c for c in range(tried[position] + 1, k) if c not in taken), None)
            if choice is not None:
                colours[v] = tried[position] = choice
                position += 1
                continue
            tried[position] = -1
            position -= 1
            if position < 0:
                return None
            colours[order[position]] = -1
    return colours


class _Walk:
    """A colouring changed by Kempe exchanges, which keep touching windows of different colours."""

    def __init__(
        self, shape: _Shape, k: int, separation: int, colours: list[int], random: _KeyedRandom
    ) -> None:
        self.shape, self.k, self.random = shape, k, random
        self.near = _neighbours(shape, separation)
        self.colours = list(colours)
        self.loads = _loads(shape, colours, k)

    def step(self, threshold: float) -> None:
        """One random exchange, unless it raises the sum of squared loads by over ``threshold``."""
        v = self.random.below(len(self.colours))
        a = self.colours[v]
        b = self.random.below(self.k - 1)
        b += b >= a
        chain = [v]
        found = {v}
        for u in chain:
            other = b if self.colours[u] == a else a
            for x in self.near[u]:
                if x not in found and self.colours[x] == other:
                    chain.append(x)
                    found.add(x)
        moved = 0  # area that goes from a to b
        for u in chain:
            moved += self.shape.areas[u] if self.colours[u] == a else -self.shape.areas[u]
        if 2 * moved * (moved + self.loads[b] - self.loads[a]) > threshold:
            return
        for u in chain:
            self.colours[u] = b if self.colours[u] == a else a
        self.loads[a] -= moved
        self.loads[b] += moved


def _settle(walk: _Walk, limit: int, steps: int) -> list[int]:
    """Walk towards even loads until the largest is within ``limit``; the best colouring seen.

    Threshold accepting: like annealing, but without exp() or floats that might differ somewhere.
    """
    scale = (walk.shape.total // walk.k) ** 2 // 8
    best, best_load = list(walk.colours), max(walk.loads)
    for step in range(steps):
        if best_load <= limit:
            break
        # Four sweeps from generous to strict, so that a bad valley is left again.
        left = steps - step * 4 % steps
        walk.step(scale * left**3 // steps**3)
        if max(walk.loads) < best_load:
            best, best_load = list(walk.colours), max(walk.loads)
    return best


@lru_cache(maxsize=512)
def _most_even(shape: _Shape, k: int, separation: int) -> tuple[int, ...] | None:
    """The most even colouring known that keeps the separation; None if there is none.

    It is the most even one there is wherever :func:`_exact` finishes. Depends on the shape alone,
    so it tells what can be promised without knowing any key.
    """
    templates = _templates(shape, k, separation)
    if k == 1 or not templates:
        return tuple(templates[0]) if templates else None
    found, finished = _exact(shape, k, separation)
    if not finished:
        floor = max(-(-shape.total // k), max(shape.areas))  # no colouring is more even than this
        random = _KeyedRandom(b"shape", b"")
        found += [
            _settle(_Walk(shape, k, separation, start, random), floor, _SEARCH_STEPS)
            for start in templates
        ]
    return min((tuple(c) for c in found), key=lambda c: max(_loads(shape, c, k)))


def _exact(shape: _Shape, k: int, separation: int) -> tuple[list[list[int]], bool]:
    """Search all colourings that keep the separation for the most even one.

    Returns:
        the best one found, if any, and whether the search finished within its steps: then none is
        more even. It does for small shapes, and without separation for all photos, whose windows
        have at most four different areas.
    """
    if len(shape.areas) > _EXACT_WINDOWS:
        return [], False
    near = _neighbours(shape, separation)
    order = sorted(range(len(shape.areas)), key=lambda i: -shape.areas[i])
    floor = max(-(-shape.total // k), max(shape.areas))
    best: list[list[int]] = []
    limit = shape.total
    colours, loads = [-1] * len(order), [0] * k
    futile: set[tuple[int, ...]] = set()  # loads from which no colouring is within the limit
    steps = 0

    def search(position: int) -> None:
        nonlocal limit, steps
        steps += 1
        if position == len(order):
            best[:] = [list(colours)]
            limit = max(loads) - 1
            return
        window = order[position]
        area = shape.areas[window]
        taken = {colours[j] for j in near[window]}
        tried = set()
        for colour in sorted(range(k), key=loads.__getitem__):
            load = loads[colour] + area
            if load > limit or limit < floor or steps > _EXACT_STEPS:
                return
            # Nodes with equal loads are alike; with separation, only those without any window.
            alike = loads[colour] if not separation or not loads[colour] else -1 - colour
            if colour in taken or alike in tried:
                continue
            tried.add(alike)
            after = tuple(sorted((*loads[:colour], load, *loads[colour + 1 :])))
            if not separation and (position, *after) in futile:
                continue
            colours[window], loads[colour] = colour, load
            search(position + 1)
            colours[window], loads[colour] = -1, load - area
            if not separation:
                futile.add((position, *after))

    search(0)
    return best, steps <= _EXACT_STEPS


def _randomised(shape: _Shape, k: int, separation: int, random: _KeyedRandom) -> list[int]:
    """A colouring drawn with the key whose largest load is about that of :func:`_most_even`.

    There must be a colouring of that separation.
    """
    even = _most_even(shape, k, separation)
    assert even is not None
    if k == 1:
        return list(even)
    limit = int(max(_loads(shape, even, k)) + _SLACK * shape.total)
    templates = _templates(shape, k, separation)
    walk = _Walk(shape, k, separation, templates[random.below(len(templates))], random)
    for _ in range(_WALK_STEPS * len(shape.windows)):
        walk.step(math.inf)
    drawn = _settle(walk, limit, _SETTLE_STEPS)
    return drawn if max(_loads(shape, drawn, k)) <= limit else list(even)
