"""Rate limit: a token bucket for each key.

Attacks: one key sends messages, or connects, faster than the node can handle.
Counted: tokens; each message or handshake costs one, a useless message more.
Done: `take` says no. The authenticator then refuses the handshake, the listener bans the key.
"""

from __future__ import annotations

from collections.abc import Iterable


class RateLimit:
    """`burst` tokens for each key, refilled at `per_s`.

    The caller passes the time, in seconds of a monotonic clock.
    """

    def __init__(self, burst: int, per_s: float) -> None:
        self._token_s = 1 / per_s
        self._most_s = (burst - 0.9) / per_s  # a tenth of a token for rounding
        self._full_at: dict[str, float] = {}  # when each key's bucket is full again

    def take(self, key: str, now: float, tokens: float = 1) -> bool:
        """Take tokens, and return whether there was one left. A refusal takes nothing."""
        full_at = max(now, self._full_at.get(key, now))
        if full_at - now > self._most_s:
            return False
        self._full_at[key] = full_at + tokens * self._token_s
        return True

    def drain(self, key: str, now: float) -> None:
        """Leave this key a tenth of its burst."""
        self._full_at[key] = now + 0.9 * self._most_s

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all other keys."""
        kept = set(keys)
        self._full_at = {key: at for key, at in self._full_at.items() if key in kept}
