"""Places the windows of each frame of a scene, so that no party sees too much of the scene.

Pure and deterministic: the secret, the scene's key and the frames decide.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

import numpy as np

from edge_common.errors import PlacementError
from edge_runtime.exposure.colouring import KeyedRandom, Shape, reached, touch, touching
from edge_runtime.exposure.mosaic import Mosaic, Rect
from edge_runtime.exposure.motion import Position
from edge_runtime.exposure.placement import Placement, seconds
from engines.geometry import Geometry

_HYSTERESIS = 0.6  # of a window: how far the grid of cells lies from the frame's before it moves on
_STEEP = 48  # exponent of the price of a party's exposure, as a share of its budget
_PER_AREA = 0.01  # price of new area whatever the load, so that needless exposure is avoided
_AWAY = 100.0  # price of new area for another party than the cell's own
_HOME_SHAKING = 0.1  # price of a window at home; below 1, rare extremes of a shake are not worth
_HOME_MOVING = 0.5  # their area. A camera that moves on won't come back, so there it is higher.
_SWEEPS = 4
_HISTORY = 10  # frames from which shaking and moving on are told apart
_REMEMBERED = 16  # frames whose seconds may still be used
_MOST_CELLS = 4096  # whose party is remembered


class FramePlacer:
    """Places the frames of one scene.

    The scene is divided into cells of a window's size, each with its own party. A window goes to
    the party of the cell that it covers most, with hysteresis: so windows of a still or shaking
    camera stay with their parties, and under a camera that moves on, the parties stay with the
    content. Cells get their parties by a regular pattern in which touching cells differ. A search
    then improves each frame: it moves windows whose party has no room to others, or home.

    Every party's share of the scene (:meth:`Mosaic.share`, which errs on the high side) stays
    within the budget, over all frames, whatever the camera or the parties do. Windows that fit
    nowhere stay at home. Frames of a still camera are placed alike for ever.

    Args:
        geometry: of the bundle.
        max_exposure: the largest share of the scene that a party may see, in (0, 1].
        secret: the edge's secret, at least 16 bytes.
        scene_key: of the scene, such as a random one from its start.
        mosaic: of the scene so far, if it was restored; None for a new scene.
    """

    def __init__(
        self,
        geometry: Geometry,
        max_exposure: float,
        secret: bytes,
        scene_key: bytes,
        mosaic: Mosaic | None = None,
    ) -> None:
        if not 0 < max_exposure <= 1:
            raise PlacementError(f"max_exposure is {max_exposure}; it must be above 0, at most 1")
        self.mosaic = mosaic or Mosaic(geometry.image_size)
        self._geometry = geometry
        self._max_exposure = max_exposure
        self._secret, self._key = secret, scene_key
        self._owners: dict[tuple[int, int, int], list[str]] = {}  # part, row, column of a cell
        self._grid = (0, 0)  # cell of the frame's first window
        self._patterns: dict[tuple[str, ...], tuple[list[int], int, int]] = {}
        self._steps: deque[Position] = deque(maxlen=_HISTORY + 1)
        self._size = (0, 0)
        self._unknown = min([0, *self.mosaic.parts]) - 1
        self._frame = 0
        self._last: tuple[object, Placement] | None = None
        self._placed: dict[int, tuple[Position, Placement, tuple[int, int]]] = {}

    def place(
        self,
        size: tuple[int, int],
        position: Position | None,
        parties: Sequence[str],
        keep_local: Iterable[int] = (),
    ) -> Placement:
        """The next frame's placement. Its windows count as seen from now on.

        Args:
            size: ``(h, w)`` of the resized image.
            position: of the frame in the scene; None if its motion is unknown, and that of the
                next one too.
            parties: those that can be sent something now. Others keep what they have seen.
            keep_local: windows that must stay at home.

        Raises:
            PlacementError: the parties' names repeat. A budget that cannot be met is no error: the
                windows are then in `home`.
        """
        names = sorted(parties)
        if len(set(names)) != len(names):
            raise PlacementError(f"party names must differ, found {', '.join(names)}")
        if size != self._size and self._size != (0, 0):
            position = None  # another format of the camera: nothing is known about its motion
        self._size = size
        if position is None:
            position = Position(0.0, 0.0, 0.0, self._unknown)
            self._unknown -= 1
        local = frozenset(keep_local)
        same = (size, position, tuple(names), local)
        if self._last is None or self._last[0] != same:
            placement = self._place(size, position, names, local)
            self._last = (same, placement)
        placement = self._last[1]
        self._frame += 1
        self._placed[placement.frame] = position, placement, size
        while len(self._placed) > _REMEMBERED:
            del self._placed[next(iter(self._placed))]
        return placement

    def use(self, placement: Placement, party: str, windows: Sequence[int]) -> bool:
        """Permit a party to see further windows of a frame, and count them as seen.

        For seconds: those of the newest frame are always permitted, for a still camera those of
        all. Later frames may have used up the room that an earlier frame's seconds had.

        Returns:
            False if the party is not the second of all these windows, the frame is too old, or
            there is no room left; nothing is counted then.
        """
        if placement.frame not in self._placed:
            return False
        position, known, size = self._placed[placement.frame]
        if any(known.second.get(window) != party for window in windows):
            return False
        rects = [self._rect(window, size) for window in windows]
        if self.mosaic.share_after(party, position, rects) > self._max_exposure:
            return False
        self.mosaic.see(party, position, rects)
        return True

    def forget_frames(self) -> None:
        """Permit no second of the frames so far any more."""
        self._placed.clear()

    def with_seconds(self) -> Mosaic:
        """A copy of the mosaic in which every second that :meth:`use` may still permit is seen."""
        mosaic = Mosaic.from_bytes(self.mosaic.to_bytes())
        for position, placement, size in self._placed.values():
            for window, party in placement.second.items():
                mosaic.see(party, position, [self._rect(window, size)])
        return mosaic

    def _place(
        self, size: tuple[int, int], position: Position, names: list[str], local: frozenset[int]
    ) -> Placement:
        side = self._geometry.windows_per_side
        windows = [
            index
            for index in range(self._geometry.windows)
            if (y0x0 := self._geometry.window_rect(index))[0] < size[0] and y0x0[1] < size[1]
        ]
        rects = [self._rect(window, size) for window in windows]
        areas = [(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in rects]
        self.mosaic.show(position, size)
        separation = 8 if len(names) >= 4 else 4 if len(names) >= 2 else 0
        choice = [-1] * len(windows)
        costs = np.zeros((len(names), len(windows)), np.int64)
        loads, limit = [0.0] * len(names), 0.0
        fresh = not self._steps or self._steps[-1].part != position.part
        if names:
            costs = self.mosaic.unseen(position, rects, names)
            loads, shown = self.mosaic.loads(position.part, names)
            limit = self._max_exposure * shown
            owners = self._label(windows, areas, position, names, separation, loads, fresh)
            near = [
                [j for j, b in enumerate(windows) if touch(a, b, side, separation)] for a in windows
            ]
            search = _Search(
                (costs / max(limit, 1e-9)).tolist(),
                [load / max(limit, 1e-9) for load in loads],
                near,
                owners,
                [window in local for window in windows],
                math.inf if fresh else _HOME_MOVING if self._moving() else _HOME_SHAKING,
            )
            choice = search.run()
        placed = {name: [i for i, k in enumerate(choice) if k == n] for n, name in enumerate(names)}
        for name, mine in placed.items():
            if mine:
                self.mosaic.see(name, position, [rects[i] for i in mine])
        if names:
            loads, shown = self.mosaic.loads(position.part, names)
        assignment = {name: tuple(windows[i] for i in mine) for name, mine in placed.items()}
        shape = Shape(tuple(windows), tuple(areas), side)
        kept = min(separation, reached(shape, choice)) if names else 8
        return Placement(
            assignment=assignment,
            home=tuple(w for w, k in zip(windows, choice, strict=True) if k < 0),
            separation=kept,
            touching=touching(shape, choice, 8),
            max_exposure=self._max_exposure,
            areas=dict(zip(windows, areas, strict=True)),
            side=side,
            second=seconds(
                assignment,
                {
                    name: dict(zip(windows, row, strict=True))
                    for name, row in zip(names, costs.tolist(), strict=True)
                },
                dict(zip(names, loads, strict=True)),
                dict.fromkeys(names, limit),
                side,
                separation,
            ),
            frame=self._frame,
        )

    def _moving(self) -> bool:
        """True if the camera moves on, False if it shakes about a place."""
        steps = list(self._steps)
        way = sum(abs(b.y - a.y) + abs(b.x - a.x) for a, b in pairwise(steps))
        return abs(steps[-1].y - steps[0].y) + abs(steps[-1].x - steps[0].x) > way / 2

    def _label(
        self,
        windows: list[int],
        areas: list[int],
        position: Position,
        names: list[str],
        separation: int,
        loads: list[float],
        fresh: bool,
    ) -> list[int]:
        """The party, by its place in `names`, that owns the cell under each window."""
        side, w = self._geometry.windows_per_side, self._geometry.window_pixels
        at_y, at_x = position.y / w, position.x / w
        if fresh:
            self._steps.clear()
            self._grid = round(at_y), round(at_x)
        self._steps.append(position)
        row, column = self._grid = _follow(self._grid[0], at_y), _follow(self._grid[1], at_x)
        cells = [(row + index // side, column + index % side) for index in windows]
        if fresh and self._last and not any((position.part, *at) in self._owners for at in cells):
            # Motion is unknown: the picture may be the same, so windows stay with their parties.
            for name, mine in self._last[1].assignment.items():
                for index in mine:
                    at = (row + index // side, column + index % side)
                    self._owners[(position.part, *at)] = [name]
        owners: dict[tuple[int, int], int] = {}
        for at in cells:
            known = self._owners.get((position.part, *at), ())
            found = next((name for name in known if name in names), None)
            if found is not None:
                owners[at] = names.index(found)
        pattern = self._pattern(windows, areas, names, separation)
        for at in cells:
            if at in owners:
                continue
            around = [(at[0] + a, at[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
            taken = {
                owners.get(other)
                for other in around
                if separation == 8 or (separation == 4 and (other[0] == at[0] or other[1] == at[1]))
            }
            owner = pattern[0][(pattern[1] * at[0] + pattern[2] * at[1]) % len(names)]
            if owner in taken:  # cells from before a party came or went
                free = [n for n in range(len(names)) if n not in taken] or range(len(names))
                owner = min(free, key=lambda n: (loads[n], n))
            owners[at] = owner
            self._owners.setdefault((position.part, *at), []).append(names[owner])
        while len(self._owners) > _MOST_CELLS:
            del self._owners[next(iter(self._owners))]
        return [owners[at] for at in cells]

    def _pattern(
        self, windows: list[int], areas: list[int], names: list[str], separation: int
    ) -> tuple[list[int], int, int]:
        """The party of any cell: ``order[(a row + b column) % parties]``, and touching ones differ.

        Of all such patterns, one that is about the most even on the first frame, once windows are
        widened as a shaking camera does. The secret chooses among them, and the parties' order.
        """
        if tuple(names) in self._patterns:
            return self._patterns[tuple(names)]
        k, side = len(names), self._geometry.windows_per_side
        random = KeyedRandom(self._secret, self._key)
        order = sorted(range(k), key=lambda n: random.digest(b"party", names[n].encode()))
        wide = (self._geometry.window_pixels / 4) ** 2
        found = []
        for a, b in product(range(1, max(2, k)), repeat=2):
            apart = (a, b, a + b, a - b) if separation == 8 else (a, b) if separation else ()
            if any(x % k == 0 for x in apart) or math.gcd(a, b, k) != 1:
                continue
            loads = [0.0] * k
            for window, area in zip(windows, areas, strict=True):
                row, column = divmod(window, side)
                loads[(a * row + b * column) % k] += area + wide + 4 * math.sqrt(area * wide) / 2
            found.append((max(loads), a, b))
        least = min(load for load, _, _ in found)
        even = [(a, b) for load, a, b in found if load <= least * 1.01]
        a, b = even[random.below(len(even))]
        self._patterns[tuple(names)] = order, a, b
        return order, a, b

    def _rect(self, window: int, size: tuple[int, int]) -> Rect:
        y0, x0, y1, x1 = self._geometry.window_rect(window)
        return y0, x0, min(y1, size[0]), min(x1, size[1])


def _follow(cell: int, at: float) -> int:
    """The cell that the frame's first window belongs to; it changes late."""
    return cell if abs(at - cell) <= _HYSTERESIS else round(at)


class _Search:
    """Chooses a party or home for each window of one frame.

    It starts with the owners of the cells, smallest new area first, and then moves single windows
    as long as that lowers the total price: of exposure, steep near the budget; of new area; of
    windows at home. A window also takes the place of one that touches it if that can go elsewhere.
    No choice exceeds the budget or lets windows of one party touch.

    Args:
        costs: ``[parties][windows]``, new area as a share of the budget.
        loads: ``[parties]``, what each party has seen, as a share of the budget.
        near: for each window, those that must not go to the same party.
        owners: for each window, the party that it should go to.
        local: for each window, whether it must stay at home.
        home: price of a window at home; infinite: all that fit are sent.
    """

    def __init__(
        self,
        costs: list[list[float]],
        loads: list[float],
        near: list[list[int]],
        owners: list[int],
        local: list[bool],
        home: float,
    ) -> None:
        self.costs, self.loads, self.near, self.owners = costs, loads, near, owners
        self.local, self.home = local, home
        self.choice = [-1] * len(owners)

    def run(self) -> list[int]:
        """For each window the party, -1 for home."""
        windows = [i for i, local in enumerate(self.local) if not local]
        for i in sorted(windows, key=lambda i: self.costs[self.owners[i]][i]):
            k = self.owners[i]
            if self._fits(k, i) and not self._blockers(k, i):
                price = self._price(k, i, self.loads[k])
                if price < self.home:
                    self._put(i, k)
        for _ in range(_SWEEPS):
            moved = [self._improve(i) for i in windows]
            if not any(moved):
                break
        return self.choice

    def _improve(self, i: int) -> bool:
        k = self.choice[i]
        now = self.home if k < 0 else self._price(k, i, self.loads[k] - self.costs[k][i])
        if k >= 0 and self.costs[k][i] == 0:
            return False
        best, move = now - 1e-9, None
        for n in range(len(self.loads)):
            if n == k:
                continue
            blockers = self._blockers(n, i)
            if not blockers:
                if self._fits(n, i) and (price := self._price(n, i, self.loads[n])) < best:
                    best, move = price, (n, -1, -1)
            elif k < 0 and len(blockers) == 1:
                j = blockers[0]
                # What remains if j leaves n, and for each party that j can go to instead.
                left = self.loads[n] - self.costs[n][j]
                if left + self.costs[n][i] > 1:
                    continue
                saved = self._price(n, j, left)
                gained = self._price(n, i, left) - saved
                for other in range(len(self.loads)):
                    if other == n or not self._fits(other, j) or self._blockers(other, j):
                        continue
                    price = gained + self._price(other, j, self.loads[other])
                    if price < best:
                        best, move = price, (n, j, other)
        if move is None:
            return False
        n, j, other = move
        if j >= 0:
            self._put(j, other)
        self._put(i, n)
        return True

    def _fits(self, k: int, i: int) -> bool:
        return self.loads[k] + self.costs[k][i] <= 1 or self.costs[k][i] == 0

    def _blockers(self, k: int, i: int) -> list[int]:
        return [j for j in self.near[i] if self.choice[j] == k]

    def _price(self, k: int, i: int, load: float) -> float:
        """Of party k, which has seen `load` without window i, seeing it too."""
        new = self.costs[k][i]
        away = 0.0 if k == self.owners[i] else _AWAY
        return (load + new) ** _STEEP - load**_STEEP + (_PER_AREA + away) * new

    def _put(self, i: int, k: int) -> None:
        before = self.choice[i]
        if before >= 0:
            self.loads[before] -= self.costs[before][i]
        self.choice[i] = k
        self.loads[k] += self.costs[k][i]
