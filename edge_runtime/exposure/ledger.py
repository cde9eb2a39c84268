"""The exposure ledger: permits every send, and records what each node may have seen of an image.

It is the only source of permits and of figures on exposure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from edge_common.errors import PlacementError
from edge_runtime.exposure.colouring import touch
from edge_runtime.exposure.placement import Placement

Event = Literal["refused", "reserved", "committed", "released"]


class Entry(msgspec.Struct, frozen=True):
    """One line of the ledger.

    Attributes:
        event: ``refused``: not permitted, `reason` says why. ``reserved``: permitted, nothing has
            left yet. ``committed``: bytes may have left, so the windows count as seen whatever
            happens next. ``released``: not one byte has left, so the windows don't count.
        reason: of a request, or of its refusal.
        bytes: of the message, once committed.
        share_of_image: what the node's party may see by all permits in force after this entry.
    """

    node: str
    windows: tuple[int, ...]
    event: Event
    reason: str
    bytes: int
    share_of_image: float


class Permit:
    """Permission to send these windows to this node, once. Only :class:`ExposureLedger` makes them.

    Attributes:
        state: its last event in the ledger.
        bytes: of the message; 0 until it is committed.
    """

    def __init__(
        self, ledger: ExposureLedger, node: str, windows: tuple[int, ...], reason: str
    ) -> None:
        self.node = node
        self.windows = windows
        self.reason = reason
        self.state: Event = "reserved"
        self.bytes = 0
        self._ledger = ledger

    def check(self, node: str, windows: Sequence[int]) -> None:
        """Raise PlacementError unless these windows may be sent to this node now."""
        if self.state != "reserved" or node != self.node or tuple(windows) != self.windows:
            raise PlacementError(
                f"no permit to send windows {list(windows)} to {node!r}",
                mend="reserve one in the ledger",
            )

    def commit(self, size: int) -> None:
        """Count the windows as seen: call it before a byte of the message can leave."""
        self.check(self.node, self.windows)
        self.bytes = size
        self._turn("committed")

    def release(self) -> None:
        """Count the windows as not seen: call it only when provably no byte has left."""
        if self.state != "released":
            self._turn("released")

    def _turn(self, event: Event) -> None:
        self.state = event
        self._ledger._record(self.node, self.windows, event, self.reason, self.bytes)


class ExposureLedger:
    """Permits or refuses every send of one image's windows.

    A node may be sent the windows for which its party is the placement's first or second choice. It
    may be sent others while the party's share of the area stays within `max_exposure` and the
    placement's separation holds; room for its first and second choices is kept. Windows kept at
    home are never permitted. Reserved and committed permits count in full.

    Args:
        placement: of the image's windows on parties.
        nodes: party -> its nodes; None if every party is one node of the same name.
        extra: asked before a party is sent a window that it is not the first choice for; returns
            why not, or None. The scene counts the windows as seen then.

    Attributes:
        entries: everything that was recorded, in order.
        permits: all that were ever reserved.
    """

    def __init__(
        self,
        placement: Placement,
        nodes: Mapping[str, Sequence[str]] | None = None,
        extra: Callable[[str, tuple[int, ...]], str | None] | None = None,
    ) -> None:
        self.placement = placement
        self.nodes = {p: tuple(nodes[p]) if nodes else (p,) for p in placement.assignment}
        self._extra = extra
        self._party = {node: party for party, names in self.nodes.items() for node in names}
        self.entries: list[Entry] = []
        self.permits: list[Permit] = []

    def seen(self, node: str) -> set[int]:
        """Windows the node may have seen: those of its committed permits."""
        return self._windows([node], ("committed",))

    def firsts(self, node: str) -> set[int]:
        """Windows for which the node's party is the first choice."""
        return set(self.placement.assignment[self._party[node]])

    def asked(self, node: str) -> set[int]:
        """Windows the node was to compute, whether or not anything was sent."""
        return self._windows([node], ("reserved", "committed", "released"))

    def bytes_sent(self, node: str) -> int:
        """Bytes of the node's committed permits."""
        return sum(p.bytes for p in self.permits if p.node == node and p.state == "committed")

    def exposure(self) -> dict[str, float]:
        """Party -> share of the image's area that it may have seen."""
        share = self.placement.share
        return {p: share(self._windows(nodes, ("committed",))) for p, nodes in self.nodes.items()}

    def reserve(self, node: str, windows: Sequence[int], reason: str = "dispatch") -> Permit:
        """A permit to send `windows` to `node`.

        Raises:
            PlacementError: it is refused; that is recorded too.
        """
        asked = tuple(int(w) for w in windows)
        refusal = self.refusal(node, asked)
        if refusal is None and self._extra is not None:
            party = self._party[node]
            known = self._windows(self.nodes[party], ("reserved", "committed"))
            more = set(asked) - known - set(self.placement.assignment[party])
            refusal = self._extra(party, tuple(sorted(more))) if more else None
        if refusal is not None:
            self._record(node, asked, "refused", refusal)
            raise PlacementError(f"not sending windows {list(asked)} to {node!r}: {refusal}")
        permit = Permit(self, node, asked, reason)
        self.permits.append(permit)
        self._record(node, asked, "reserved", reason)
        return permit

    def _windows(self, nodes: Sequence[str], states: Sequence[Event]) -> set[int]:
        found = (p.windows for p in self.permits if p.node in nodes and p.state in states)
        return set().union(*found)

    def _record(
        self, node: str, windows: tuple[int, ...], event: Event, reason: str, size: int = 0
    ) -> None:
        mates = self.nodes.get(self._party.get(node, ""), ())
        share = self.placement.share(self._windows(mates, ("reserved", "committed")))
        self.entries.append(Entry(node, windows, event, reason, size, share))

    def refusal(self, node: str, asked: tuple[int, ...]) -> str | None:
        """Why these windows may not be sent to this node now; None if they may."""
        placement = self.placement
        party = self._party.get(node)
        if party is None:
            return "it is not one of the nodes of this placement"
        if strange := [w for w in asked if w not in placement.areas]:
            return f"windows {strange} are not part of this image"
        if kept := sorted(set(asked) & set(placement.home)):
            return f"windows {kept} stay at home"
        # Windows for which a party is the first or second choice are reserved for it: other permits
        # must leave room for them.
        own = set(placement.assignment[party])
        own |= {window for window, second in placement.second.items() if second == party}
        others = set(asked) - own
        if not others:
            return None
        after = self._windows(self.nodes[party], ("reserved", "committed")) | own | others
        share = placement.share(after)
        if share > placement.max_exposure:
            return f"it would see {share:.3f} of the image, above {placement.max_exposure:g}"
        for window in others:
            for other in after - {window}:
                if touch(window, other, placement.side, placement.separation):
                    return f"it sees window {other}, which touches window {window}"
        return None
