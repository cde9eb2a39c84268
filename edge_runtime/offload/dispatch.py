"""Has the nodes run the stack on the windows of one image, all at once and under one deadline.

Every window's tokens come back or an error is raised: a mask is never made from part of an image.
No window is ever sent to a second node.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Mapping
from typing import TypeVar

import numpy as np

from edge_common.errors import OffloadError
from edge_runtime.config import EdgeConfig
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import Placement, place
from edge_runtime.offload.connection import Connection, NodeError, NodeRefusedError, Reply
from edge_runtime.offload.report import RunRecord
from engines.pipeline import Pipeline
from engines.windows import Windows

_NODES_SHARE = 0.5
"""With a local fallback, the share of the deadline for the nodes; the edge needs the rest."""

_T = TypeVar("_T")


class Dispatch:
    """One image's run, in an event loop. :meth:`run` is called once.

    The first node that fails ends the image with an error that names it; with ``fallback =
    "local"`` the edge computes that node's windows itself. If a node says when to ask again, it is
    asked once more.

    Args:
        windows: of the image.
        connections: one for each node.
        pipeline: of the full bundle; its stack computes what stays at home.
        config: deadline, budget and fallback.
        secret: of the edge, for the placement.
        record: what happens is written here.
    """

    def __init__(
        self,
        windows: Windows,
        connections: list[Connection],
        pipeline: Pipeline,
        config: EdgeConfig,
        secret: bytes,
        record: RunRecord,
    ) -> None:
        self._windows = windows
        self._connections = {connection.name: connection for connection in connections}
        self._pipeline = pipeline
        self._config = config
        self._secret = secret
        self._record = record
        self._local = config.fallback == "local"
        self._until = self._nodes_until = 0.0  # in the loop's time
        self._feeds: Mapping[str, np.ndarray] = {}
        self._outputs = {
            spec.name: np.empty((len(windows), *(int(d) for d in spec.shape[1:])), spec.numpy_dtype)
            for spec in pipeline.bundle.stage("stack").outputs
        }

    async def run(self) -> dict[str, np.ndarray]:
        """The stack's outputs for every window, in the order of the windows.

        Raises:
            OffloadError: a node failed, or time ran out; at the deadline at the latest.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._until = started + self._config.deadline_s
        self._nodes_until = deadline_of_nodes(started, self._config)
        tasks: list[asyncio.Task[None]] = []
        try:
            placement, self._feeds = await self._in_time(
                asyncio.to_thread(self._prepare), "preparing what the nodes are sent"
            )
            ledger = self._record.ledger = ExposureLedger(placement)
            tasks = [
                asyncio.create_task(self._serve(ledger, name, rows))
                for name, rows in self._requests(placement)
            ]
            kept = np.flatnonzero(np.isin(self._windows.window, placement.home))
            tasks.append(asyncio.create_task(self._compute(kept)))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            _raise_first([task.exception() for task in tasks if task in done])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._record.total_ms = (loop.time() - started) * 1000
        return self._outputs

    def _prepare(self) -> tuple[Placement, dict[str, np.ndarray]]:
        """Place the windows and compute what the stack is fed. Too slow for the event loop."""
        placement = place(
            areas=self._windows.area().tolist(),
            windows=self._windows.window.tolist(),
            side=self._pipeline.bundle.geometry.windows_per_side,
            nodes=[*self._connections],
            max_exposure=self._config.max_exposure,
            secret=self._secret,
            image_hash=image_hash(self._windows),
            keep_home=self._local,
            ids={name: each.node.server_key for name, each in self._connections.items()},
        )
        return placement, self._pipeline.stack_inputs(self._windows)

    def _requests(self, placement: Placement) -> list[tuple[str, np.ndarray]]:
        """Node and rows of every request."""
        most = self._config.windows_per_request or len(self._windows)
        return [
            (name, rows[first : first + most])
            for name, mine in placement.assignment.items()
            for rows in [np.flatnonzero(np.isin(self._windows.window, mine))]
            for first in range(0, len(rows), most)
        ]

    async def _serve(self, ledger: ExposureLedger, name: str, rows: np.ndarray) -> None:
        """Have a node compute some rows or, if it fails and the fallback allows it, the edge."""
        try:
            reply = await self._ask(ledger, name, rows)
        except OffloadError as error:
            self._record.failed(name, error)
            if not self._local:
                raise
            await self._compute(rows)
        except asyncio.CancelledError:
            self._record.failed(name, "given up before it answered")
            raise
        else:
            self._record.replied(name, reply)
            for output, array in reply.outputs.items():
                self._outputs[output][rows] = array

    async def _ask(self, ledger: ExposureLedger, name: str, rows: np.ndarray) -> Reply:
        feeds = {key: array[rows] for key, array in self._feeds.items()}
        asked = feeds["window"].tolist()
        infer = self._connections[name].infer
        try:
            return await infer(feeds, ledger.reserve(name, asked), self._nodes_until)
        except NodeRefusedError as error:
            # The same windows to the same node: it sees nothing new.
            wait = error.retry_ms / 1000
            if not wait or asyncio.get_running_loop().time() + wait >= self._nodes_until:
                raise
            await asyncio.sleep(wait)
            permit = ledger.reserve(name, asked, f"once more: {error.refusal}")
            return await infer(feeds, permit, self._nodes_until)

    async def _compute(self, rows: np.ndarray) -> None:
        """Compute rows on the edge, one at a time, so as to stop soon when cancelled."""
        for row in rows:
            one = slice(row, row + 1)
            feeds = {name: array[one] for name, array in self._feeds.items()}
            running = asyncio.wrap_future(self._pipeline.submit("stack", feeds))
            result = await self._in_time(running, "computing windows at home")
            for name, array in result.items():
                self._outputs[name][one] = array
            self._record.at_home((int(self._windows.window[row]),))

    async def _in_time(self, work: Awaitable[_T], doing: str) -> _T:
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
    """The deadline for nodes. With a local fallback the edge needs time after it."""
    return now + config.deadline_s * (_NODES_SHARE if config.fallback == "local" else 1)


def image_hash(windows: Windows) -> bytes:
    """Digest of what the nodes could see of the image: its pixels and its size."""
    digest = hashlib.sha256(repr(windows.size).encode())  # CPUs have instructions for this one
    digest.update(np.ascontiguousarray(windows.pixels).data)
    return digest.digest()


def _raise_first(errors: list[BaseException | None]) -> None:
    """Raise what ended the image. Failures of several nodes become one error."""
    found = [error for error in errors if error is not None]
    nodes = [error for error in found if isinstance(error, NodeError)]
    for error in found:
        if error not in nodes:
            raise error
    if nodes:
        general = (
            "`edge-runtime nodes` checks every node; with --fallback local the edge computes what "
            "nodes do not"
        )
        mends = dict.fromkeys([error.mend for error in nodes if error.mend] + [general])
        raise OffloadError(
            "; ".join(dict.fromkeys(error.found for error in nodes)) + ". No mask was made",
            mend="; ".join(mends),
            code=nodes[0].code,
        )
