"""Which requests were being computed when a worker died, so that none of them kills a third.

A request that is sent again bears a new id; it is known by a digest of its tensors, kept in memory
for some minutes and for each client apart. The first death may be anybody's: whoever was there is
suspected and is computed alone the next time. Who is then there at another death is the one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

_SECONDS = 600.0
_MOST = 256


class Suspects:
    """Of one node. Times are passed in."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)  # else a digest could be compared with those of others
        self._deaths: OrderedDict[tuple[str, bytes], tuple[int, float]] = OrderedDict()

    def deaths(self, client: str, feeds: Mapping[str, np.ndarray], now: float) -> int:
        """How many workers have died over this request: 0, 1 or 2."""
        while self._deaths and next(iter(self._deaths.values()))[1] < now - _SECONDS:
            self._deaths.popitem(last=False)
        if not any(name == client for name, _ in self._deaths):
            return 0  # the usual case costs nothing
        return self._deaths.get((client, self._digest(feeds)), (0, 0.0))[0]

    def died(self, client: str, feeds: Mapping[str, np.ndarray], now: float, alone: bool) -> int:
        """A worker died over this request, which it computed `alone` or not; how many now."""
        key = client, self._digest(feeds)
        count = 1 + alone
        self._deaths.pop(key, None)
        self._deaths[key] = count, now
        if len(self._deaths) > _MOST:
            self._deaths.popitem(last=False)
        return count

    def survived(self, client: str, feeds: Mapping[str, np.ndarray]) -> None:
        """It was computed after all."""
        self._deaths.pop((client, self._digest(feeds)), None)

    def _digest(self, feeds: Mapping[str, np.ndarray]) -> bytes:
        digest = hashlib.blake2b(digest_size=16, key=self._salt)
        for name, array in sorted(feeds.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.digest()
