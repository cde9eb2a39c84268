"""What a camera has shown of a scene and what each party may have seen of it, in scene coordinates.

Pure. Shares err on the high side; :meth:`Mosaic.share` says how.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from edge_common.errors import PlacementError
from edge_runtime.exposure.motion import Position

Rect = tuple[int, int, int, int]  # y0, x0, y1, x1 in pixels of the frame

_CELLS_PER_SIDE = 256  # a cell is 4 pixels at 1024
_MOST_CELLS = 1 << 21  # of one part: about 57 frames of 1024 x 576 side by side
_MOST_PARTS = 8
_MOST_PARTIES = 64
_GROW = 64  # cells added at a time beyond what is needed
_VERSION = 1


class _Stored(msgspec.Struct, frozen=True):
    key: int
    origin: tuple[int, int]
    shape: tuple[int, int]
    extra: list[int]
    planes: bytes


class _File(msgspec.Struct, frozen=True):
    version: int
    cell: int
    parties: list[str]
    spent: list[float]
    parts: list[_Stored]


class _Part:
    """Planes of cells: what was shown, then what each party may have seen."""

    def __init__(self, parties: int) -> None:
        self.y = self.x = 0  # scene cell at [0, 0]
        self.planes = np.zeros((1 + parties, 0, 0), bool)
        self.counts = [0] * (1 + parties)
        self.extra = [0] * parties  # cells a party may have seen beyond the planes' limit

    def cover(self, y0: int, x0: int, y1: int, x1: int) -> bool:
        """Make room for these cells; False if the part would become too large."""
        planes, rows, columns = self.planes.shape
        if self.y <= y0 and self.x <= x0 and y1 <= self.y + rows and x1 <= self.x + columns:
            return True
        if rows == 0:
            top, left, bottom, right = y0, x0, y1, x1
        else:
            top = self.y if y0 >= self.y else y0 - _GROW
            left = self.x if x0 >= self.x else x0 - _GROW
            bottom = self.y + rows if y1 <= self.y + rows else y1 + _GROW
            right = self.x + columns if x1 <= self.x + columns else x1 + _GROW
        if (bottom - top) * (right - left) > _MOST_CELLS:
            return False
        grown = np.zeros((planes, bottom - top, right - left), bool)
        y, x = self.y - top, self.x - left
        grown[:, y : y + rows, x : x + columns] = self.planes
        self.planes, self.y, self.x = grown, top, left
        return True

    def mark(self, plane: int, y0: int, x0: int, y1: int, x1: int) -> bool:
        if y1 <= y0 or x1 <= x0:
            return True
        if not self.cover(y0, x0, y1, x1):
            return False
        block = self.planes[plane, y0 - self.y : y1 - self.y, x0 - self.x : x1 - self.x]
        self.counts[plane] += block.size - int(np.count_nonzero(block))
        block[...] = True
        return True


class Mosaic:
    """The scene's cells. It grows as the camera moves, up to a limit.

    A *part* is a stretch of frames whose motion relative to one another is known. Between parts it
    is unknown, so they may show the same content at another scale.

    Args:
        image_size: side of the model's square; cells scale with it.
    """

    def __init__(self, image_size: int) -> None:
        self.cell = max(1, image_size // _CELLS_PER_SIDE)
        self.parties: list[str] = []
        self._spent: list[float] = []  # shares of parts that were folded
        self._parts: dict[int, _Part] = {}

    def show(self, position: Position, size: tuple[int, int]) -> None:
        """The camera showed a frame of ``(h, w)`` pixels. Only cells shown as a whole count."""
        part = self._part(position.part)
        part.mark(0, *self._inner((0, 0, *size), position))

    def see(self, party: str, position: Position, rects: Iterable[Rect]) -> None:
        """A party may have seen these parts of the frame at `position`.

        Every cell that a rectangle touches counts, after it was widened by the position's error.
        """
        index = self._index(party)
        part = self._part(position.part)
        for rect in rects:
            y0, x0, y1, x1 = self._outer(rect, position)
            if not part.mark(1 + index, y0, x0, y1, x1):
                part.extra[index] += (y1 - y0) * (x1 - x0)

    def share(self, party: str) -> float:
        """The largest share of the scene that the party may have seen, at most 1.

        It errs on the high side: a cell that a window touches counts as seen, a cell counts as
        shown only if it was shown as a whole, windows are widened and frames narrowed by the
        position's error. Parts count as if they showed the same content to nobody: the shares
        within the parts are added up. That bounds the share of the whole, whatever the scale of
        each part (a sum of the seen over a sum of the shown is at most the sum of the quotients).
        """
        if party not in self.parties:
            return 0.0
        index = self.parties.index(party)
        share = self._spent[index]
        for part in self._parts.values():
            seen = part.counts[1 + index] + part.extra[index]
            if seen:
                share += seen / part.counts[0] if part.counts[0] else 1.0
        return min(1.0, share)

    def share_after(self, party: str, position: Position, rects: Sequence[Rect]) -> float:
        """The share after :meth:`see`, at most; rectangles that overlap are counted twice."""
        load, shown = self.loads(position.part, [party])
        new = self.unseen(position, rects, [party])
        return min(1.0, (load[0] + new.sum()) / shown if shown else 1.0)

    def loads(self, part: int, parties: Sequence[str]) -> tuple[list[float], int]:
        """What each party may have seen, in cells of this part, and the cells it has shown.

        The first divided by the second is the share, not capped at 1.
        """
        here = self._part(part)
        shown = here.counts[0]
        loads = []
        for party in parties:
            index = self._index(party)
            elsewhere = self._spent[index]
            for other in self._parts.values():
                seen = other.counts[1 + index] + other.extra[index]
                if other is not here and seen:
                    elsewhere += seen / other.counts[0] if other.counts[0] else 1.0
            loads.append(elsewhere * shown + here.counts[1 + index] + here.extra[index])
        return loads, shown

    def unseen(
        self, position: Position, rects: Sequence[Rect], parties: Sequence[str]
    ) -> np.ndarray:
        """int64 ``[parties, rects]``: cells that :meth:`see` would add."""
        planes = [1 + self._index(party) for party in parties]
        cells = np.array([self._outer(rect, position) for rect in rects])
        area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
        part = self._part(position.part)
        y0, x0 = cells[:, :2].min(axis=0).tolist()
        y1, x1 = cells[:, 2:].max(axis=0).tolist()
        if not part.cover(y0, x0, y1, x1):
            return np.tile(area, (len(planes), 1))
        region = part.planes[planes, y0 - part.y : y1 - part.y, x0 - part.x : x1 - part.x]
        # Sums between neighbouring edges first: far fewer than cells, and windows overlap there.
        ys, xs = np.unique(cells[:, [0, 2]]), np.unique(cells[:, [1, 3]])
        rows = np.add.reduceat(region.view(np.uint8), ys[:-1] - y0, axis=1, dtype=np.uint16)
        blocks = np.add.reduceat(rows, xs[:-1] - x0, axis=2, dtype=np.int64)
        total = np.zeros((len(planes), len(ys), len(xs)), np.int64)
        total[:, 1:, 1:] = blocks.cumsum(1).cumsum(2)
        top, left, bottom, right = (
            np.searchsorted(edges, cells[:, column])
            for edges, column in ((ys, 0), (xs, 1), (ys, 2), (xs, 3))
        )
        seen = (
            total[:, bottom, right]
            - total[:, top, right]
            - total[:, bottom, left]
            + total[:, top, left]
        )
        return area - seen

    @property
    def parts(self) -> list[int]:
        """Keys of the parts; the one that has shown most comes first."""
        return sorted(self._parts, key=lambda key: -self._parts[key].counts[0])

    def picture(self, party: str, part: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Bool ``[rows, columns]`` each: the cells shown, and those the party may have seen."""
        here = self._part(part)
        return here.planes[0].copy(), here.planes[1 + self._index(party)].copy()

    def to_bytes(self) -> bytes:
        """Everything, for a file. Some kilobytes for a still camera."""
        parts = [
            _Stored(
                key,
                (part.y, part.x),
                (part.planes.shape[1], part.planes.shape[2]),
                part.extra,
                zlib.compress(np.packbits(part.planes).tobytes(), 1),
            )
            for key, part in self._parts.items()
        ]
        return msgspec.msgpack.encode(_File(_VERSION, self.cell, self.parties, self._spent, parts))

    @classmethod
    def from_bytes(cls, data: bytes) -> Mosaic:
        """The mosaic that :meth:`to_bytes` wrote.

        Raises:
            PlacementError: the bytes are damaged, too large, or of another version.
        """
        try:
            return cls._decode(data)
        except (msgspec.DecodeError, ValueError, zlib.error, OverflowError) as error:
            raise PlacementError(
                f"the record of a scene is damaged: {error}",
                mend="delete it, which also forgets what the nodes have seen of that scene",
            ) from error

    @classmethod
    def _decode(cls, data: bytes) -> Mosaic:
        stored = msgspec.msgpack.decode(data, type=_File)
        count = len(stored.parties)
        if stored.version != _VERSION:
            raise ValueError(f"version {stored.version}, expected {_VERSION}")
        if not 1 <= stored.cell <= 8192 or count > _MOST_PARTIES or len(stored.spent) != count:
            raise ValueError("its header contradicts itself")
        if len(set(stored.parties)) != count or len(stored.parts) > _MOST_PARTS:
            raise ValueError("parties or parts are too many or repeated")
        if not all(0 <= share < math.inf for share in stored.spent):
            raise ValueError("a share is negative or not finite")
        mosaic = cls(stored.cell * _CELLS_PER_SIDE)
        mosaic.parties, mosaic._spent = list(stored.parties), list(stored.spent)
        for each in stored.parts:
            rows, columns = each.shape
            if min(rows, columns) < 0 or rows * columns > _MOST_CELLS:
                raise ValueError(f"a part of {rows} x {columns} cells")
            if len(each.extra) != count or min(each.extra, default=0) < 0:
                raise ValueError("a part with wrong counts")
            if each.key in mosaic._parts or max(map(abs, each.origin)) > 1 << 40:
                raise ValueError("a part that is out of place")
            cells = (1 + count) * rows * columns
            size = -(-cells // 8)
            unpack = zlib.decompressobj()
            packed = unpack.decompress(each.planes, size + 1)
            if len(packed) != size or not unpack.eof or unpack.unused_data:
                raise ValueError(f"a part without its {size} bytes")
            part = _Part(count)
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=cells)
            part.planes = bits.astype(bool).reshape(1 + count, rows, columns)
            part.counts = [int(np.count_nonzero(plane)) for plane in part.planes]
            part.extra, (part.y, part.x) = list(each.extra), each.origin
            mosaic._parts[each.key] = part
        return mosaic

    def _part(self, key: int) -> _Part:
        if key not in self._parts:
            if len(self._parts) >= _MOST_PARTS:
                self._fold()
            self._parts[key] = _Part(len(self.parties))
        return self._parts[key]

    def _fold(self) -> None:
        """Drop the part that has shown least, and remember only what each party saw of it."""
        *older, _ = self._parts  # not the newest: frames may still come
        part = self._parts.pop(min(older, key=lambda key: self._parts[key].counts[0]))
        for index in range(len(self.parties)):
            seen = part.counts[1 + index] + part.extra[index]
            self._spent[index] += seen / part.counts[0] if part.counts[0] else float(bool(seen))

    def _index(self, party: str) -> int:
        if party not in self.parties:
            if len(self.parties) >= _MOST_PARTIES:
                raise PlacementError(
                    f"a scene with more than {_MOST_PARTIES} parties",
                    mend="give nodes of one operator the same provider in edge.toml",
                )
            self.parties.append(party)
            self._spent.append(0.0)
            for part in self._parts.values():
                blank = np.zeros((1, *part.planes.shape[1:]), bool)
                part.planes = np.concatenate([part.planes, blank])
                part.counts.append(0)
                part.extra.append(0)
        return self.parties.index(party)

    def _outer(self, rect: Rect, position: Position) -> Rect:
        y0, x0, y1, x1 = rect
        error = position.error
        return (
            math.floor((position.y + y0 - error) / self.cell),
            math.floor((position.x + x0 - error) / self.cell),
            math.ceil((position.y + y1 + error) / self.cell),
            math.ceil((position.x + x1 + error) / self.cell),
        )

    def _inner(self, rect: Rect, position: Position) -> Rect:
        y0, x0, y1, x1 = rect
        error = position.error
        return (
            math.ceil((position.y + y0 + error) / self.cell),
            math.ceil((position.x + x0 + error) / self.cell),
            math.floor((position.y + y1 - error) / self.cell),
            math.floor((position.x + x1 - error) / self.cell),
        )
