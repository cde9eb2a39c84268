"""Tokens of windows whose pixels have not changed, so that nobody has to compute them again.

A cache belongs to one scene and one stack. It is not thread-safe: use it from one thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_common.errors import ConfigError
from engines.windows import Windows

HOME = ""
"""The source of tokens that the edge computed itself. No node can have this name."""

_VERSIONS = 3
"""Per window index: an object that comes and goes shows the same few pictures in turn."""
_OVERHEAD = 1024
"""Bytes of Python objects per entry, about."""


@dataclass(frozen=True)
class Reused:
    """Tokens from an earlier frame.

    Attributes:
        outputs: the stack's outputs for one window, read-only, without the leading dimension.
        source: the node that computed them, or :data:`HOME`.
        frame: in which they were computed.
        pixels: uint8 ``[w, w, 3]``, from which they were computed, read-only. With a tolerance
            these may differ from those looked up; recompute tokens from these to check them.
    """

    outputs: dict[str, np.ndarray]
    source: str
    frame: int
    pixels: np.ndarray


@dataclass(frozen=True)
class _Entry:
    extent: tuple[int, int]
    reused: Reused

    @property
    def nbytes(self) -> int:
        arrays = [self.reused.pixels, *self.reused.outputs.values()]
        return sum(array.nbytes for array in arrays) + _OVERHEAD


class TokenCache:
    """The last few contents of each window with their tokens, least recently used first to go.

    Args:
        max_bytes: of pixels and tokens together; 0 keeps nothing.
        tolerance: largest difference of a colour value, in 0..255, at which tokens are reused. 0 is
            exact. Otherwise a mask may be made from tokens of slightly other pixels. The comparison
            is with the pixels that the tokens were computed from, so slow changes do not add up.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, max_bytes: int, tolerance: int = 0) -> None:
        if max_bytes < 0:
            raise ConfigError(f"the cache's max_bytes is {max_bytes}, expected at least 0")
        if not 0 <= tolerance <= 255:
            raise ConfigError(f"the cache's tolerance is {tolerance}, expected 0 to 255")
        self.max_bytes = max_bytes
        self.tolerance = tolerance
        self.nbytes = 0
        self._entries: OrderedDict[int, tuple[int, _Entry]] = OrderedDict()  # by serial number
        self._by_window: dict[int, list[int]] = {}  # serial numbers, newest first
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, windows: Windows) -> dict[int, Reused]:
        """The rows of `windows` whose tokens are known.

        Windows with equal pixels and extent count as one only at the same index, because tokens
        depend on the position.
        """
        found: dict[int, Reused] = {}
        for row, window in enumerate(windows.window.tolist()):
            extent = _extent(windows, row)
            for serial in self._by_window.get(window, ()):
                entry = self._entries[serial][1]
                if entry.extent == extent and self._near(entry.reused.pixels, windows.pixels[row]):
                    self._entries.move_to_end(serial)
                    found[row] = entry.reused
                    break
        return found

    def store(
        self,
        windows: Windows,
        row: int,
        outputs: Mapping[str, np.ndarray],
        source: str,
        frame: int = 0,
    ) -> None:
        """Keep copies of a row's pixels and tokens, in place of any for equal pixels.

        Store only tokens that passed every check and that were computed from these very pixels:
        tokens that :meth:`lookup` returned belong to other pixels if there is a tolerance.

        Args:
            outputs: the stack's, for this window, without the leading dimension.
            source, frame: see :class:`Reused`.
        """
        window, extent = int(windows.window[row]), _extent(windows, row)
        pixels = windows.pixels[row]
        for serial in [*self._by_window.get(window, ())]:
            old = self._entries[serial][1]
            if old.extent == extent and _equal(old.reused.pixels, pixels):
                self._drop(serial)
        copies = {name: _copy(array) for name, array in outputs.items()}
        entry = _Entry(extent, Reused(copies, source, frame, _copy(pixels)))
        if entry.nbytes > self.max_bytes:
            return
        self._serial += 1
        self._entries[self._serial] = window, entry
        serials = self._by_window.setdefault(window, [])
        serials.insert(0, self._serial)
        self.nbytes += entry.nbytes
        for serial in serials[_VERSIONS:]:
            self._drop(serial)
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def forget(self, source: str) -> None:
        """Drop all tokens of a source, such as a node that was found lying."""
        for serial, (_, entry) in [*self._entries.items()]:
            if entry.reused.source == source:
                self._drop(serial)

    def clear(self) -> None:
        """Drop everything: the scene changed."""
        self._entries.clear()
        self._by_window.clear()
        self.nbytes = 0

    def _near(self, kept: np.ndarray, new: np.ndarray) -> bool:
        if not self.tolerance:
            return _equal(kept, new)
        # The difference of unsigned bytes without a wider type.
        return bool((np.maximum(kept, new) - np.minimum(kept, new)).max() <= self.tolerance)

    def _drop(self, serial: int) -> None:
        window, entry = self._entries.pop(serial)
        self._by_window[window].remove(serial)
        self.nbytes -= entry.nbytes


def _extent(windows: Windows, row: int) -> tuple[int, int]:
    rows, columns = windows.extent[row].tolist()
    return rows, columns


def _copy(array: np.ndarray) -> np.ndarray:
    """A read-only copy of its own: a row is a view that would keep the whole reply alive."""
    copy = np.array(array, order="C")
    copy.flags.writeable = False
    return copy


def _equal(kept: np.ndarray, new: np.ndarray) -> bool:
    """Exact comparison of equal shapes, eight bytes at a time where the layout allows it."""
    if new.flags.c_contiguous and kept.nbytes % 8 == 0:
        a, b = kept.reshape(-1).view(np.uint64), new.reshape(-1).view(np.uint64)
        # Most changed windows differ in a sample, which saves comparing the rest.
        return bool((a[::127] == b[::127]).all()) and bool((a == b).all())
    return bool(np.array_equal(kept, new))
