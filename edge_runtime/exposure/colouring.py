"""Colours windows so that touching ones differ: one colour for each node, as even as can be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

# A colouring may be this much (share of the area) above the most even one known. Few colourings are
# exactly optimal, so that without this slack they could be predicted.
_SLACK = 0.01
_EXACT_STEPS = 16_000  # of the search for a shape's most even colouring; cached per shape
_EXACT_WINDOWS = 200  # the search recurses once for each
_SEARCH_STEPS = 6000  # of the walk that is used where the search does not finish
_WALK_STEPS = 40  # random Kempe exchanges per window that make one photo's colouring its own
SETTLE_STEPS = 4000  # to bring a random colouring under its limit; else the cached one is used


class Shape(NamedTuple):
    """Windows in ascending order with their areas, in a grid of ``side`` x ``side``."""

    windows: tuple[int, ...]
    areas: tuple[int, ...]
    side: int

    @property
    def total(self) -> int:
        return sum(self.areas)


class KeyedRandom:
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


def touch(a: int, b: int, side: int, separation: int) -> bool:
    """True if two windows must not share a node: 8 forbids common edges and corners, 4 edges."""
    if separation == 0:
        return False
    rows, columns = abs(a // side - b // side), abs(a % side - b % side)
    return max(rows, columns) == 1 and (separation == 8 or rows + columns == 1)


@lru_cache(maxsize=64)
def _neighbours(shape: Shape, separation: int) -> tuple[tuple[int, ...], ...]:
    """For each window (by position in the shape), the positions it must not share a node with."""
    n, w = len(shape.windows), shape.windows
    return tuple(
        tuple(j for j in range(n) if touch(w[i], w[j], shape.side, separation)) for i in range(n)
    )


def touching(shape: Shape, colours: Sequence[int], separation: int) -> int:
    """Pairs of windows that share a colour and touch."""
    return sum(
        colours[i] == colours[j] and colours[i] >= 0
        for i, near in enumerate(_neighbours(shape, separation))
        for j in near
        if j > i
    )


def reached(shape: Shape, colours: Sequence[int]) -> int:
    """The separation that a colouring keeps."""
    return next((s for s in (8, 4) if not touching(shape, colours, s)), 0)


def loads_of(shape: Shape, colours: Sequence[int], k: int) -> list[int]:
    """The area of each colour's windows."""
    loads = [0] * k
    for area, colour in zip(shape.areas, colours, strict=True):
        loads[colour] += area
    return loads


def _templates(shape: Shape, k: int, separation: int) -> list[list[int]]:
    """Colourings that keep the separation by construction; empty if k colours are too few.

    ``(2 row + column) mod k`` differs by 1, 2 or 3 between 8-neighbours, so k >= 4 always keeps
    8; ``(row + column) mod k`` keeps 4 for k >= 2. Fewer colours suffice for some shapes (a strip).
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
        # In breadth-first order every window touches earlier ones, so dead ends show at once.
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


class Walk:
    """A colouring changed by Kempe exchanges, which keep touching windows of different colours."""

    def __init__(
        self, shape: Shape, k: int, separation: int, colours: list[int], random: KeyedRandom
    ) -> None:
        self.shape, self.k, self.random = shape, k, random
        self.near = _neighbours(shape, separation)
        self.colours = list(colours)
        self.loads = loads_of(shape, colours, k)

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


def settle(walk: Walk, limit: int, steps: int) -> list[int]:
    """Walk towards even loads until the largest is within ``limit``; the best colouring seen.

    Threshold accepting: like annealing, but without exp() or floats that might differ somewhere.
    """
    scale = (walk.shape.total // walk.k) ** 2 // 8
    best, best_load = list(walk.colours), max(walk.loads)
    for step in range(steps):
        if best_load <= limit:
            break
        # Four sweeps from generous to strict, so as to leave local minima.
        left = steps - step * 4 % steps
        walk.step(scale * left**3 // steps**3)
        if max(walk.loads) < best_load:
            best, best_load = list(walk.colours), max(walk.loads)
    return best


@lru_cache(maxsize=512)
def most_even(shape: Shape, k: int, separation: int) -> tuple[int, ...] | None:
    """The most even colouring known that keeps the separation; None if there is none.

    No colouring is more even if :func:`_exact` finishes. It depends on the shape alone, not on a
    key, so it can be used to say which budgets can be met.
    """
    templates = _templates(shape, k, separation)
    if k == 1 or not templates:
        return tuple(templates[0]) if templates else None
    found, finished = _exact(shape, k, separation)
    if not finished:
        floor = max(-(-shape.total // k), max(shape.areas))  # the load of a perfectly even one
        random = KeyedRandom(b"shape", b"")
        found += [
            settle(Walk(shape, k, separation, start, random), floor, _SEARCH_STEPS)
            for start in templates
        ]
    return min((tuple(c) for c in found), key=lambda c: max(loads_of(shape, c, k)))


def _exact(shape: Shape, k: int, separation: int) -> tuple[list[list[int]], bool]:
    """Search all colourings that keep the separation for the most even one.

    Returns:
        the best one found, if any, and whether the search finished within its steps. If it did,
        none is more even. It finishes for small shapes and, without separation, for all photos,
        because their windows have at most four different areas.
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
            # Nodes with equal loads are equivalent; with separation, only those without windows.
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


def randomised(shape: Shape, k: int, separation: int, random: KeyedRandom) -> list[int]:
    """A colouring chosen by the key, with about the largest load of :func:`most_even`.

    There must be a colouring of that separation.
    """
    even = most_even(shape, k, separation)
    assert even is not None
    if k == 1:
        return list(even)
    limit = int(max(loads_of(shape, even, k)) + _SLACK * shape.total)
    templates = _templates(shape, k, separation)
    walk = Walk(shape, k, separation, templates[random.below(len(templates))], random)
    for _ in range(_WALK_STEPS * len(shape.windows)):
        walk.step(math.inf)
    drawn = settle(walk, limit, SETTLE_STEPS)
    return drawn if max(loads_of(shape, drawn, k)) <= limit else list(even)
