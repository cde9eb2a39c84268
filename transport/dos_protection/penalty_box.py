"""Penalty box: bans edges that broke a rule.

Attack: a key whose connection was dropped reconnects and goes on.
Counted: breaches of each name, and when the last ban ended.
Done: handshakes are refused and messages discarded, twice as long after each further breach.
"""

from __future__ import annotations

from collections.abc import Iterable


class PenaltyBox:
    """Bans for `first_s` seconds, then twice as long each time, up to `most_s`. After `most_s`
    without a breach a name starts with `first_s` again.

    The caller passes the time, in seconds of a monotonic clock.
    """

    def __init__(self, first_s: float = 2.0, most_s: float = 300.0) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._bans: dict[str, tuple[float, float]] = {}  # end and length of the last one

    def ban(self, name: str, now: float) -> float:
        """Ban this name from now on; returns for how many seconds."""
        end, length = self._bans.get(name, (now, 0.0))
        if now - end > self._most_s:
            length = 0.0
        length = min(self._most_s, 2 * length or self._first_s)
        self._bans[name] = now + length, length
        return length

    def banned(self, name: str, now: float) -> bool:
        ban = self._bans.get(name)
        return ban is not None and now < ban[0]

    def forget(self, names: Iterable[str]) -> None:
        """End the bans of names that belong to another key now, or to none."""
        for name in names:
            self._bans.pop(name, None)
