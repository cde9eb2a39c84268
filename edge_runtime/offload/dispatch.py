"""Has the nodes run the stack on the windows of one image, under one deadline.

Every window's tokens come back or an error is raised: a mask is never made from part of an image.
This module executes what :mod:`.policy` decides, and sends nothing without a permit of the exposure
ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from edge_common.errors import OffloadError, PlacementError
from edge_runtime.config import EdgeConfig
from edge_runtime.exposure.ledger import ExposureLedger, Permit
from edge_runtime.offload.connection import Connection, NodeError, NodeRefusedError, Reply
from edge_runtime.offload.health import Fleet, Times, smoothed, split
from edge_runtime.offload.policy import Attempt, Cancel, Fail, FrameState, Local, Send, decide
from edge_runtime.offload.report import RunRecord
from edge_runtime.offload.reuse import HOME
from engines.pipeline import Pipeline
from engines.windows import Windows

_NODES_SHARE = 0.5
"""Share of the deadline for the nodes where the edge needs the rest, to compute windows itself."""
_SMOOTHING = 0.2

_T = TypeVar("_T")


class Nodes:
    """All nodes of an edge: connections, health, and the images that wait for one to be free.

    Attributes:
        connections: by name.
        local_s: seconds that the edge needs for one window, smoothed; None until it computed one.
    """

    def __init__(self, connections: Sequence[Connection], fleet: Fleet) -> None:
        self.connections = {connection.name: connection for connection in connections}
        self.fleet = fleet
        self.local_s: float | None = None
        self._images: set[asyncio.Event] = set()

    @contextlib.contextmanager
    def waking(self, event: asyncio.Event) -> Iterator[None]:
        """Set `event` whenever a request of any image has ended."""
        self._images.add(event)
        try:
            yield
        finally:
            self._images.discard(event)

    def wake(self) -> None:
        """Have every image decide anew."""
        for event in self._images:
            event.set()


class Dispatch:
    """One image's run, in an event loop. :meth:`run` is called once.

    Args:
        windows: of the image.
        place: places them and returns the image's ledger. It is called in a thread.
        nodes: that may be asked.
        pipeline: of the full bundle; its stack computes what stays at home.
        config: deadline and fallback.
        record: what happens is written here.
        known: row -> the stack's outputs of that window, where they are known already.

    Attributes:
        sources: row -> the node that computed it, or :data:`HOME`. Known rows have none.
        feeds: the stack's inputs, in the order of the windows; empty until they are prepared.
    """

    def __init__(
        self,
        windows: Windows,
        place: Callable[[], ExposureLedger],
        nodes: Nodes,
        pipeline: Pipeline,
        config: EdgeConfig,
        record: RunRecord,
        known: Mapping[int, Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        self.sources: dict[int, str] = {}
        self.feeds: Mapping[str, np.ndarray] = {}
        self._windows = windows
        self._place = place
        self._nodes = nodes
        self._pipeline = pipeline
        self._config = config
        self._record = record
        self._known = known or {}
        self._until = 0.0  # in the loop's time
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}
        self._at_home: deque[int] = deque()
        self._computing: asyncio.Task[None] | None = None
        self._errors: list[OffloadError] = []
        self._defect: BaseException | None = None
        self._changed = asyncio.Event()
        self._outputs = {
            spec.name: np.empty((len(windows), *(int(d) for d in spec.shape[1:])), spec.numpy_dtype)
            for spec in pipeline.bundle.stage("stack").outputs
        }

    async def run(self) -> dict[str, np.ndarray]:
        """The stack's outputs for every window, in the order of the windows.

        Raises:
            OffloadError: no permitted way led to the tokens of every window; at the deadline at the
                latest.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._until = started + self._config.deadline_s
        frame: FrameState | None = None
        try:
            ledger, self.feeds = await self.in_time(
                asyncio.to_thread(self._prepare), "preparing what the nodes are sent"
            )
            self._record.ledger = ledger
            frame = self._frame(ledger, started)
            with self._nodes.waking(self._changed):
                await self._complete(frame, ledger)
        finally:
            tasks = [*self._tasks.values(), *filter(None, [self._computing])]
            if frame is not None:
                frame.end(self._nodes.fleet, loop.time())
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # also if this is cancelled again
                for permit in self._record.ledger.permits if self._record.ledger else []:
                    if permit.state == "reserved":  # its task was cancelled before it began
                        permit.release()
                self._nodes.wake()
                self._record.total_ms = (loop.time() - started) * 1000
        return self._outputs

    def _prepare(self) -> tuple[ExposureLedger, dict[str, np.ndarray]]:
        """Place the windows and compute what the stack is fed. Too slow for the event loop."""
        return self._place(), self._pipeline.stack_inputs(self._windows)

    def _frame(self, ledger: ExposureLedger, started: float) -> FrameState:
        """What there is to do for this image."""
        numbers = self._windows.window.tolist()
        row_of = {window: row for row, window in enumerate(numbers)}
        for row, outputs in self._known.items():
            self._keep([row], {name: array[None] for name, array in outputs.items()})
        assigned: dict[int, str] = {}
        for party, windows in ledger.placement.assignment.items():
            rows = [row_of[window] for window in windows if row_of[window] not in self._known]
            members = [self._nodes.fleet.nodes[name] for name in ledger.nodes[party]]
            for name, mine in split(rows, members).items():
                assigned |= dict.fromkeys(mine, name)
        return FrameState(
            n=len(self._windows),
            assigned=assigned,
            may=lambda row, node: ledger.refusal(node, (numbers[row],)) is None,
            nodes_until=deadline_of_nodes(started, self._config),
            until=self._until,
            home={row_of[window] for window in ledger.placement.home},
            local="worker" if self._config.fallback == "local" else "never",
            most=self._config.windows_per_request or 0,
            done=set(self._known),
        )

    async def _complete(self, frame: FrameState, ledger: ExposureLedger) -> None:
        """Decide, execute and wait for what happens, until the frame is complete."""
        loop = asyncio.get_running_loop()
        fleet = self._nodes.fleet
        while True:
            self._changed.clear()
            if self._defect is not None:
                raise self._defect
            if self._computing is not None and self._computing.done():
                self._computing.result()  # an error of the edge's own ends the image
                self._computing = None
            frame.local_s = self._nodes.local_s
            decision = decide(frame, fleet, loop.time())
            for action in decision.actions:
                if isinstance(action, Send):
                    self._send(action, frame, ledger)
                elif isinstance(action, Cancel):  # its task may not have begun yet
                    frame.cancelled(action.attempt, fleet, loop.time())
                    self._tasks[action.attempt].cancel()
                elif isinstance(action, Local):
                    frame.local_rows |= set(action.rows)
                    self._at_home.extend(action.rows)
                    if self._computing is None:
                        self._computing = asyncio.create_task(self._compute(frame))
                elif isinstance(action, Fail):
                    raise self._failure(action)
            if frame.complete:
                return
            wake = decision.wake_at
            timer = None if wake is None else loop.call_at(wake, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def _send(self, action: Send, frame: FrameState, ledger: ExposureLedger) -> None:
        now = asyncio.get_running_loop().time()
        try:
            permit = self._permit(ledger, action, action.rows)
        except PlacementError:  # several rows together may be refused where each alone is not
            rows: tuple[int, ...] = ()
            for row in action.rows:
                more = tuple(self._windows.window[[*rows, row]].tolist())
                if ledger.refusal(action.node, more) is None:
                    rows = (*rows, row)
            rest = tuple(row for row in action.rows if row not in rows)
            self._changed.set()
            if not rest:  # the record or the scene refuses what the placement would allow
                own, numbers = ledger.firsts(action.node), self._windows.window
                rows = tuple(row for row in action.rows if int(numbers[row]) in own)
                rest = tuple(row for row in action.rows if row not in rows)
            if not rest:
                frame.refused(action, now)
                return
            frame.refused(msgspec.structs.replace(action, rows=rest), now)
            if rows:
                self._send(msgspec.structs.replace(action, rows=rows), frame, ledger)
            return
        feeds = {name: array[list(action.rows)] for name, array in self.feeds.items()}
        attempt = frame.sent(action, self._nodes.fleet, now)
        self._tasks[attempt] = asyncio.create_task(self._ask(attempt, feeds, permit, frame))

    def _permit(self, ledger: ExposureLedger, action: Send, rows: Sequence[int]) -> Permit:
        windows = self._windows.window[list(rows)].tolist()
        return ledger.reserve(action.node, windows, action.kind)

    async def _ask(
        self, attempt: Attempt, feeds: Mapping[str, np.ndarray], permit: Permit, frame: FrameState
    ) -> None:
        """One request. What became of it is in `frame`, the nodes' health and the record."""
        loop, fleet, name = asyncio.get_running_loop(), self._nodes.fleet, attempt.node
        try:
            infer = self._nodes.connections[name].infer
            reply = await infer(feeds, permit, frame.nodes_until)
            times = _times(reply, len(attempt.rows), permit.bytes, loop.time() - attempt.at)
            fresh = frame.answered(attempt, times, fleet, loop.time())
            outputs = reply.outputs
            if fresh != attempt.rows:
                places = [attempt.rows.index(row) for row in fresh]
                outputs = {key: array[places] for key, array in outputs.items()}
            self._keep(fresh, outputs)
            self.sources |= dict.fromkeys(fresh, name)
            self._record.replied(name, permit.windows, reply)
        except asyncio.CancelledError:
            if attempt in frame.under_way:
                frame.cancelled(attempt, fleet, loop.time())
            if not frame.done.issuperset(attempt.rows):
                self._record.failed(name, "given up before it answered")
            raise
        except OffloadError as error:
            retry_s = error.retry_ms / 1000 if isinstance(error, NodeRefusedError) else 0.0
            frame.lost(attempt, error.code, fleet, loop.time(), retry_s)
            self._errors.append(error)
            self._record.failed(name, error)
        except Exception as error:  # a defect ends the image at once
            self._defect = error
        finally:
            del self._tasks[attempt]
            self._nodes.wake()
            self._changed.set()

    async def _compute(self, frame: FrameState) -> None:
        """Compute rows on the edge, one at a time, so as to stop soon when cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while self._at_home:
                row = self._at_home.popleft()
                if row in frame.done:  # a node was faster
                    continue
                feeds = {name: array[row : row + 1] for name, array in self.feeds.items()}
                began = loop.time()
                running = asyncio.wrap_future(self._pipeline.submit("stack", feeds))
                result = await self.in_time(running, "computing windows at home")
                took = loop.time() - began
                self._nodes.local_s = smoothed(self._nodes.local_s, took, _SMOOTHING)
                if frame.take([row]):
                    self._keep([row], result)
                    self.sources[row] = HOME
                    self._record.at_home((int(self._windows.window[row]),))
                self._changed.set()
        finally:
            self._changed.set()

    def _keep(self, rows: Sequence[int], outputs: Mapping[str, np.ndarray]) -> None:
        for name, array in outputs.items():
            self._outputs[name][list(rows)] = array

    def _failure(self, fail: Fail) -> OffloadError:
        """What ended the image. Failures of several nodes become one error."""
        nodes = sorted(
            (error for error in self._errors if isinstance(error, NodeError)),
            key=lambda error: error.node,
        )
        if not nodes:
            mend = "allow more time (--deadline) or use more nodes" if fail.code == "late" else ""
            return OffloadError(fail.reason, mend=mend, code=fail.code)
        general = (
            "`edge-runtime nodes` checks every node; with --fallback local the edge computes what "
            "nodes do not"
        )
        mends = dict.fromkeys([error.mend for error in nodes if error.mend] + [general])
        return OffloadError(
            "; ".join(dict.fromkeys(error.found for error in nodes)) + ". No mask was made",
            mend="; ".join(mends),
            code=nodes[0].code,
        )

    async def in_time(self, work: Awaitable[_T], doing: str) -> _T:
        """Await `work`, which is the edge's own, and cancel it at the deadline.

        Raises:
            OffloadError: the deadline passed.
        """
        left = self._until - asyncio.get_running_loop().time()
        future = asyncio.ensure_future(work)
        try:  # not wait_for: before Python 3.12 it may lose a cancellation
            await asyncio.wait({future}, timeout=max(0.0, left))
            if future.done():
                return future.result()
        finally:
            future.cancel()
        raise OffloadError(
            f"the edge was still {doing} when the deadline of {self._config.deadline_s:g} s passed",
            mend="allow more time (--deadline) or use more nodes",
            code="late",
        )


def deadline_of_nodes(now: float, config: EdgeConfig) -> float:
    """The deadline for nodes. The edge needs time after it for a local fallback or strict mode."""
    shared = config.fallback == "local" or config.strict
    return now + config.deadline_s * (_NODES_SHARE if shared else 1)


def _times(reply: Reply, windows: int, bytes_up: int, total_s: float) -> Times:
    return Times(
        windows=windows,
        bytes_up=bytes_up,
        bytes_down=reply.bytes_down,
        upload_s=reply.upload_ms / 1000,
        queue_s=reply.queue_ms / 1000,
        compute_s=reply.compute_ms / 1000,
        download_s=reply.download_ms / 1000,
        total_s=total_s,
    )
