"""Finds poison requests: those that kill the worker that computes them.

All requests of a batch over which a worker died are suspect, and each is run alone the next time.
If a request crashes a worker again when run alone, it is refused.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

_SECONDS = 600.0
_MAX_REQUESTS = 256


class PoisonTracker:
    """Remembers suspect requests for ten minutes. Times are passed in.

    A request that is sent again has a new id, so requests are recognised by a digest of their
    tensors, for each client separately.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)  # digests cannot be compared with those of others
        self._deaths: OrderedDict[tuple[str, bytes], tuple[int, float]] = OrderedDict()

    def deaths(self, client: str, feeds: Mapping[str, np.ndarray], now: float) -> int:
        """How many workers have died over this request: 0, 1 or 2."""
        while self._deaths and next(iter(self._deaths.values()))[1] < now - _SECONDS:
            self._deaths.popitem(last=False)
        if not any(name == client for name, _ in self._deaths):
            return 0  # the usual case needs no digest
        return self._deaths.get((client, self._digest(feeds)), (0, 0.0))[0]

    def died(self, client: str, feeds: Mapping[str, np.ndarray], now: float, alone: bool) -> int:
        """Note that a worker died over this request, run `alone` or not; returns `deaths`."""
        key = client, self._digest(feeds)
        count = 1 + alone
        self._deaths.pop(key, None)
        self._deaths[key] = count, now
        if len(self._deaths) > _MAX_REQUESTS:
            self._deaths.popitem(last=False)
        return count

    def survived(self, client: str, feeds: Mapping[str, np.ndarray]) -> None:
        """Note that this request was computed: it is no longer suspect."""
        self._deaths.pop((client, self._digest(feeds)), None)

    def _digest(self, feeds: Mapping[str, np.ndarray]) -> bytes:
        digest = hashlib.blake2b(digest_size=16, key=self._salt)
        for name, array in sorted(feeds.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.digest()
