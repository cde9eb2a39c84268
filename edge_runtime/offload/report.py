"""The record of one image, written as events happen, and the report made from it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import msgspec

from edge_common.errors import OffloadError
from edge_runtime.exposure.ledger import Entry, ExposureLedger
from edge_runtime.offload.connection import Reply


class NodeReport(msgspec.Struct, frozen=True):
    """The windows that one node saw, and its times in milliseconds (see
    :class:`.connection.Reply`).

    Attributes:
        windows: those that were sent to it, whether or not it answered.
        share_of_image: their share of the image's area.
        upload_ms, download_ms: of the slowest of several requests.
        queue_ms, compute_ms: sums over several requests.
        failure: None if it returned everything it was asked for, and nothing of it proved false.
    """

    name: str
    windows: tuple[int, ...]
    share_of_image: float
    bytes_up: int = 0
    bytes_down: int = 0
    upload_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    download_ms: float = 0.0
    failure: str | None = None


class OffloadReport(msgspec.Struct, frozen=True):
    """One image's run. `msgspec.to_builtins` makes it plain data for JSON.

    Attributes:
        home: windows the edge computed.
        max_exposure: the limit on the share of the image's area that a party may see.
        largest_share: the largest that any party saw.
        separation: see :class:`~edge_runtime.exposure.placement.Placement`.
        windows_total: of the padded square, including those without an image pixel.
        ledger: every permit that was asked for, and what became of it.
        recomputed: windows of nodes that the edge has computed again so far.
        suspect: the image's masks may be wrong. A node that returned windows of it lied, there or
            elsewhere, and they were not all computed again before its masks were made.
    """

    nodes: tuple[NodeReport, ...]
    home: tuple[int, ...]
    max_exposure: float
    largest_share: float
    separation: int
    windows_total: int
    windows_sent: int
    bytes_up: int
    bytes_down: int
    total_ms: float
    ledger: tuple[Entry, ...]
    recomputed: tuple[int, ...] = ()
    suspect: bool = False


class Replied(NamedTuple):
    """A node returned what it was asked for."""

    node: str
    windows: tuple[int, ...]
    reply: Reply


class Failed(NamedTuple):
    """A node did not."""

    node: str
    reason: str


class AtHome(NamedTuple):
    """The edge computed these windows."""

    windows: tuple[int, ...]


class Rechecked(NamedTuple):
    """The edge computed a window of a node again. `wrong` is empty if the node's was right."""

    node: str
    window: int
    wrong: str


class RunRecord:
    """Events of one image's run, in order. Any thread may ask for a report at any time.

    Attributes:
        ledger: of the image; None until its windows are placed, before which nothing is sent.
        total_ms: how long the run took; 0 until it has ended.
        number: of the image, increasing by 1 per `Offloader`; 0 until the run begins.
        suspect: see :class:`OffloadReport`.
    """

    def __init__(self) -> None:
        self.number = 0
        self.suspect = False
        self.events: list[Replied | Failed | AtHome | Rechecked] = []
        self.ledger: ExposureLedger | None = None
        self.total_ms = 0.0

    def replied(self, node: str, windows: tuple[int, ...], reply: Reply) -> None:
        # Without the tensors, which are large.
        self.events.append(Replied(node, windows, dataclasses.replace(reply, outputs={})))

    def failed(self, node: str, reason: OffloadError | str) -> None:
        self.events.append(Failed(node, str(reason)))

    def at_home(self, windows: tuple[int, ...]) -> None:
        self.events.append(AtHome(windows))

    def rechecked(self, node: str, window: int, wrong: str = "") -> None:
        self.events.append(Rechecked(node, window, wrong))

    def report(self) -> OffloadReport | None:
        """How the run has gone so far; None before any window could be sent."""
        ledger, events = self.ledger, [*self.events]
        if ledger is None:
            return None
        nodes, again = [], [event for event in events if isinstance(event, Rechecked)]
        for name in sorted(node for nodes in ledger.nodes.values() for node in nodes):
            answers = [e for e in events if isinstance(e, Replied) and e.node == name]
            replies = [answer.reply for answer in answers]
            false = {e.window: e.wrong for e in again if e.node == name and e.wrong}
            right = {window for answer in answers for window in answer.windows} - false.keys()
            failures = [e.reason for e in events if isinstance(e, Failed) and e.node == name]
            failures[:0] = false.values()
            nodes.append(
                NodeReport(
                    name=name,
                    windows=tuple(sorted(ledger.seen(name))),
                    share_of_image=ledger.placement.share(ledger.seen(name)),
                    bytes_up=ledger.bytes_sent(name),
                    bytes_down=sum(reply.bytes_down for reply in replies),
                    upload_ms=max((reply.upload_ms for reply in replies), default=0.0),
                    queue_ms=sum(reply.queue_ms for reply in replies),
                    compute_ms=sum(reply.compute_ms for reply in replies),
                    download_ms=max((reply.download_ms for reply in replies), default=0.0),
                    failure=failures[0] if failures and ledger.asked(name) - right else None,
                )
            )
        return OffloadReport(
            nodes=tuple(nodes),
            home=tuple(sorted(w for e in events if isinstance(e, AtHome) for w in e.windows)),
            max_exposure=ledger.placement.max_exposure,
            largest_share=max(ledger.exposure().values(), default=0.0),
            separation=ledger.placement.separation,
            windows_total=ledger.placement.side**2,
            windows_sent=sum(len(node.windows) for node in nodes),
            bytes_up=sum(node.bytes_up for node in nodes),
            bytes_down=sum(node.bytes_down for node in nodes),
            total_ms=self.total_ms,
            ledger=tuple(ledger.entries),
            recomputed=tuple(sorted({event.window for event in again})),
            suspect=self.suspect,
        )
