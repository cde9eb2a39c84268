"""Computes windows again that nodes returned, and turns away the nodes whose answers were wrong.

:mod:`.spotcheck` chooses and judges. This module runs it for the frames of an `Offloader`: before a
frame's outputs are returned in strict mode, otherwise behind the caller's back.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_common.errors import EngineError
from edge_runtime.config import EdgeConfig
from edge_runtime.offload.dispatch import Dispatch, Nodes
from edge_runtime.offload.report import RunRecord
from edge_runtime.offload.reuse import HOME
from edge_runtime.offload.spotcheck import BOUNDS, DEFAULT_RATE, SpotCheck, Trust, Verdict
from engines.pipeline import Pipeline

_WAITING = 4
"""Frames that may wait to be rechecked."""

log = logging.getLogger(__name__)


class Rechecks(NamedTuple):
    """Windows so far. `recomputed` as a share of `returned` is the rate really reached.

    Attributes:
        returned: by nodes, in frames that were complete.
        recomputed: of them.
        skipped: chosen, but not recomputed: the edge could not keep up, or failed.
    """

    returned: int = 0
    recomputed: int = 0
    skipped: int = 0


def recheck_rate(config: EdgeConfig) -> float:
    """The share of the windows returned by nodes that this edge is to compute again."""
    default = DEFAULT_RATE if config.fallback == "local" else 0.0
    return 1.0 if config.strict else default if config.recompute is None else config.recompute


class _Work(NamedTuple):
    """Rows to recompute. The others in `sources` are compared if one of them is wrong."""

    spot: SpotCheck
    record: RunRecord
    feeds: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    sources: Mapping[int, str]
    rows: Sequence[int]

    def others(self, nodes: set[str]) -> list[int]:
        """A row of every node besides these."""
        return [*{node: row for row, node in self.sources.items() if node not in nodes}.values()]


class Rechecker:
    """Rechecks the frames of an `Offloader`, in its event loop.

    All nodes have the tolerance `BOUNDS[precision].cap`: no node is measured with known windows.

    Args:
        pipeline: of the full bundle. Its stack recomputes one window at a time, so that nothing
            else waits for longer than one window takes.
        on_suspect: called with a node that lied and the numbers of the frames in doubt, oldest
            first.

    Attributes:
        count: windows so far.
    """

    def __init__(
        self, pipeline: Pipeline, nodes: Nodes, on_suspect: Callable[[str, list[int]], None]
    ) -> None:
        self.count = Rechecks()
        self._pipeline = pipeline
        self._nodes = nodes
        self._on_suspect = on_suspect
        self._tolerance = BOUNDS[pipeline.bundle.manifest.precision].cap
        self._trust = Trust()
        self._records: weakref.WeakValueDictionary[int, RunRecord] = weakref.WeakValueDictionary()
        self._waiting: deque[_Work] = deque()
        self._working: asyncio.Task[None] | None = None

    async def check(
        self,
        run: Dispatch,
        outputs: dict[str, np.ndarray],
        config: EdgeConfig,
        record: RunRecord,
    ) -> None:
        """Recheck a frame that is complete. Its outputs may be used as soon as this returns.

        In strict mode every window of a node is recomputed here; so are, in any mode, the windows
        of a node in quarantine. The edge's own tokens replace false ones. Otherwise windows are
        chosen at random and copied, to be recomputed later. Known rows are not checked again.

        Raises:
            OffloadError: the deadline passed first.
            EngineError: the edge cannot compute the stack.
        """
        spot = SpotCheck(self._pipeline.bundle.stage("stack").outputs, recheck_rate(config))
        unchecked = {row: node for row, node in run.sources.items() if node != HOME}
        if not spot.rate or not unchecked:
            return
        self._add(returned=len(unchecked))
        began = asyncio.get_running_loop().time()
        while now := [row for row in sorted(unchecked) if self._at_once(config, unchecked[row])]:
            work = _Work(spot, record, run.feeds, outputs, unchecked, now)
            false = await run.in_time(self._examine(work), "computing windows again")
            for row, ours in false.items():
                for name, array in ours.items():
                    outputs[name][row] = array[0]
                run.sources[row] = HOME
                record.at_home((int(run.feeds["window"][row]),))
            unchecked = {row: node for row, node in unchecked.items() if row not in {*now, *false}}
        record.total_ms += (asyncio.get_running_loop().time() - began) * 1000
        by_node: dict[str, list[int]] = {}
        for row, node in unchecked.items():
            by_node.setdefault(node, []).append(row)
        for node, rows in by_node.items():
            self._trust.accept(node, record.number, run.feeds["window"][rows].tolist())
        self._records[record.number] = record
        if chosen := spot.choose(by_node):
            self._later(_Work(spot, record, run.feeds, outputs, unchecked, chosen))

    def _at_once(self, config: EdgeConfig, node: str) -> bool:
        return config.strict or self._nodes.connections[node].quarantine is not None

    def _later(self, work: _Work) -> None:
        """Have rows recomputed in the background, or skip them if too many frames wait."""
        if len(self._waiting) >= _WAITING:
            self._skip(len(work.rows), f"{_WAITING} images wait for it")
            return
        rows = [*work.rows, *work.others({work.sources[row] for row in work.rows})]
        feeds, outputs = (
            {name: array[rows] for name, array in part.items()}
            for part in (work.feeds, work.outputs)
        )
        self._waiting.append(
            work._replace(
                feeds=feeds,
                outputs=outputs,
                sources={at: work.sources[row] for at, row in enumerate(rows)},
                rows=range(len(work.rows)),
            )
        )
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work(), name="recheck")

    async def _work(self) -> None:
        while self._waiting:
            work = self._waiting.popleft()
            done, why = self.count.recomputed, "the offloader was closed"
            try:
                await self._examine(work)
            except EngineError as error:
                why = str(error)
            except Exception as error:  # a defect here must not end the checks
                why = repr(error)
            finally:
                self._skip(len(work.rows) - (self.count.recomputed - done), why)

    def _skip(self, windows: int, why: str) -> None:
        if windows <= 0:
            return
        if not self.count.skipped:  # once
            log.warning("fewer windows of nodes than asked are computed again: %s", why)
        self._add(skipped=windows)

    async def _examine(self, work: _Work) -> dict[int, dict[str, np.ndarray]]:
        """Recompute rows and turn away who lied. Returns this machine's tokens for false rows."""
        verdicts: list[Verdict] = []
        false: dict[int, dict[str, np.ndarray]] = {}

        async def recompute(rows: Sequence[int]) -> None:
            tolerances = dict.fromkeys(work.sources.values(), self._tolerance)
            async for row, verdict, ours in work.spot.recheck(
                self._pipeline, work.feeds, work.outputs, rows, work.sources, tolerances
            ):
                self._add(recomputed=1)
                verdicts.append(verdict)
                node, window = verdict.source, verdict.window
                work.record.rechecked(node, window, "" if verdict.ok else str(verdict))
                if verdict.ok:
                    self._trust.prove(node, window, work.record.number)
                else:
                    false[row] = ours

        try:
            await recompute(work.rows)
            if false:
                await recompute(work.others({verdict.source for verdict in verdicts}))
        finally:  # what was found counts, also if the deadline passed
            await self._judge(work.record, verdicts)
        return false

    async def _judge(self, record: RunRecord, verdicts: Sequence[Verdict]) -> None:
        """Turn away the nodes whose windows were wrong, unless the edge's engine may be."""
        wrong = {verdict.source: verdict for verdict in verdicts if not verdict.ok}
        if len(wrong) > 1 and not any(verdict.ok for verdict in verdicts):
            record.suspect = True
            log.error(
                "image %d: the tokens of %s all differ from those computed here, so this machine's "
                "own engine may be wrong, and no node was turned away -> `edge-runtime verify "
                "%s` checks it. %s",
                *(record.number, " and ".join(sorted(wrong)), self._pipeline.bundle.path),
                next(iter(wrong.values())),
            )
            return
        for node, verdict in wrong.items():
            await self._turn_away(node, str(verdict))

    async def _turn_away(self, node: str, reason: str) -> None:
        """Quarantine a node that lied, and tell which frames hold windows that nobody checked."""
        connection = self._nodes.connections[node]
        frames, forgotten = self._trust.suspects(node), self._trust.forgotten(node)
        if connection.quarantine and not frames:
            return
        self._trust.clear(node)
        for number in frames:
            if record := self._records.get(number):
                record.suspect = True
        self._nodes.fleet.nodes[node].quarantine(asyncio.get_running_loop().time(), reason)
        try:
            await connection.shut_out(f"it returned false tokens: {reason}")
        finally:
            self._nodes.wake()
            if frames:
                more = f" and {forgotten} earlier ones" if forgotten else ""
                log.warning(
                    "the masks of images %s%s may be wrong: node %s returned windows of them that "
                    "were never computed again",
                    *(", ".join(map(str, frames)), more, node),
                )
            try:
                self._on_suspect(node, frames)
            except Exception:
                log.exception("the program's on_suspect failed")

    def _add(self, returned: int = 0, recomputed: int = 0, skipped: int = 0) -> None:
        a, b, c = self.count
        self.count = Rechecks(a + returned, b + recomputed, c + skipped)

    async def settle(self) -> None:
        """Wait until nothing waits to be recomputed."""
        while self._working is not None and not self._working.done():
            await asyncio.wait({self._working})

    async def close(self) -> None:
        """Skip what still waits."""
        self._add(skipped=sum(len(work.rows) for work in self._waiting))
        self._waiting.clear()
        task, self._working = self._working, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
