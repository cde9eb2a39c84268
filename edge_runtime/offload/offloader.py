"""Has the nodes run the stack on an image's windows, all at once and under one deadline.

:meth:`Offloader.stack` returns every window's tokens or raises: a mask is never made from part of
an image. Placement grants each send, nodes work in parallel, replies are checked, and the first
node that fails ends the image with an error that names it; or, with ``fallback = "local"``, the
edge computes that node's windows itself. No window is ever sent to a second node; a node that asks
for a moment's patience is asked once more.

Everything on the network happens in one background thread with an event loop, so that this class is
called like any other.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq.asyncio

from edge_common.errors import BundleError, OffloadError
from edge_common.memory_limits import memory_limit
from edge_common.signals import defer_signals
from edge_runtime.config import EdgeConfig, load_nodes
from edge_runtime.offload.connection import NodeClient, NodeRefusedError, Reply, listed, mismatch
from edge_runtime.offload.placement import Decision, ExposureLedger, Permit, Placement, place
from engines.pipeline import Pipeline
from engines.windows import Windows
from transport.keys import load_secret_bytes
from transport.messages import stage_limits
from transport.meter import MemoryWatch
from transport.sockets import NOT_AUTHORISED

_NODES_SHARE = 0.5
"""With a local fallback, the share of the deadline the nodes get; the edge needs the rest."""

_UNWIND_S = 1.0
"""How long an interrupted call may take to end what it has under way."""

_MEMORY_SHARE = 0.9
"""Of the memory this process may use, the share from which on connections are dropped."""
_MEMORY_S = 0.25
_MEMORY_REST_S = 5.0
"""Pause after a defect in watching memory."""

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class NodeReport(msgspec.Struct, frozen=True):
    """What one node was shown and how long it took (milliseconds; see :class:`.client.Reply`).

    ``windows`` are those that went out on a connection to it, whether or not it answered, and
    ``share_of_image`` is their share of its area; what was meant for a node that could not be
    reached is not among them. With several requests to one node, times are those of the slowest
    upload and download and the sums of queue and compute. ``failure`` is None if it returned all it
    was asked for.
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
    """One image's run. ``msgspec.to_builtins`` makes it plain data for JSON.

    ``home``: windows the edge computed. ``max_exposure``: the limit on the share of the image's
    area that a node may be shown; ``largest_share``: what any node was. ``separation``: as in
    :class:`.placement.Placement`. ``windows_total``: of the padded square, those without an image
    pixel included.
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
    ledger: tuple[Decision, ...]


class NodeStatus(msgspec.Struct, frozen=True):
    """What ``edge-runtime nodes`` found out about one node; None means not known.

    ``usable`` is the conclusion; ``detail`` says what is wrong, or what the node runs.
    """

    name: str
    endpoint: str
    reachable: bool
    authorised: bool | None
    same_bundle: bool | None
    round_trip_ms: float | None
    detail: str

    @property
    def usable(self) -> bool:
        return bool(self.reachable and self.authorised and self.same_bundle)


@dataclass
class _Share:
    """One request: rows of the image's windows, to one node."""

    client: NodeClient
    rows: np.ndarray
    permits: list[Permit] = field(default_factory=list)


class Offloader:
    """Connections to all nodes of a configuration. Use it as a context manager, or ``close`` it.

    Args:
        config: nodes, deadline, budget and fallback.
        pipeline: of the full bundle; its stack runs what stays at home.

    Attributes:
        report: how the last call of :meth:`stack` went, also when it failed or was interrupted;
            None when it ended before any window could be sent.

    Raises:
        BundleError: the bundle's windows cannot leave home (stock order).
        ConfigError, KeyFileError: see :func:`.config.load_nodes`.
    """

    def __init__(self, config: EdgeConfig, pipeline: Pipeline) -> None:
        bundle = pipeline.bundle
        if not bundle.has("stack") or not bundle.has("tail"):
            raise BundleError(
                f"{bundle.path} is a {bundle.manifest.kind} bundle, which cannot be offloaded: use "
                "a full one in reordered order (`edge-runtime export --order reordered`)"
            )
        self.config = config
        self.pipeline = pipeline
        self.report: OffloadReport | None = None
        self._stage = bundle.stage("stack")
        self._geometry = bundle.geometry
        self._secret = load_secret_bytes(config.secret)
        nodes = load_nodes(config)
        limits = stage_limits(self._stage.inputs, self._stage.outputs, self._geometry.windows)
        # The pipeline serves one caller at a time: this thread is the one.
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="edge-engine")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="edge-network", daemon=True
        )
        self._thread.start()
        self._closed = False

        async def connect() -> tuple[zmq.asyncio.Context, list[NodeClient]]:
            ctx = zmq.asyncio.Context()
            clients = [NodeClient(ctx, node, self._stage, limits) for node in nodes]
            for client in clients:
                client.start()
            self._watching = asyncio.create_task(_watch_memory(clients), name="memory")
            return ctx, clients

        try:
            self._ctx, self._clients = self._call(connect())
        except BaseException:
            self._stop()
            raise

    def stack(self, windows: Windows) -> tuple[dict[str, np.ndarray], OffloadReport]:
        """The stack's outputs for every window, in the order of ``windows``, and how it went.

        What the nodes returned is bit for bit what ``pipeline.stack`` returns on the same kind of
        machine.

        Raises:
            OffloadError: a node failed, or time ran out; at the deadline at the latest.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        self.report = None
        outputs = self._call(self._offload(windows))
        assert self.report is not None
        return outputs, self.report

    def status(self, timeout_s: float = 5.0) -> list[NodeStatus]:
        """Ask every node, at once, what it serves."""
        return self._call(self._status(timeout_s))

    def close(self) -> None:
        """Drop all connections and stop the threads. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True

        async def disconnect() -> None:
            self._watching.cancel()
            await asyncio.gather(*(client.close() for client in self._clients))
            left = asyncio.all_tasks() - {asyncio.current_task()}  # of a call that was interrupted
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self._ctx.destroy(linger=0)

        self._call(disconnect())
        self._stop()

    def __enter__(self) -> Offloader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop.is_closed():
            work.close()
            raise OffloadError("the offloader was closed")
        ended = threading.Event()

        async def whole() -> _T:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            return future.result()
        except BaseException:
            # The caller was interrupted. Its work ends too, and then reports what was sent.
            with defer_signals():
                future.cancel()
                ended.wait(_UNWIND_S)
            raise

    def _stop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._engine_thread.shutdown(cancel_futures=True)

    # -- in the event loop ----------------------------------------------------------------------

    async def _offload(self, windows: Windows) -> dict[str, np.ndarray]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        until = started + self.config.deadline_s
        local = self.config.fallback == "local"
        nodes_until = started + self.config.deadline_s * (_NODES_SHARE if local else 1)

        preparing = loop.run_in_executor(self._engine_thread, self._prepare, windows)
        preparing.add_done_callback(_retrieve)
        await asyncio.wait({preparing}, timeout=max(0.0, until - loop.time()))
        if not preparing.done():
            preparing.cancel()
            raise self._late("preparing what the nodes are sent")
        placement, feeds = preparing.result()
        ledger = ExposureLedger(placement)
        outputs = {
            spec.name: np.empty((len(windows), *(int(d) for d in spec.shape[1:])), spec.numpy_dtype)
            for spec in self._stage.outputs
        }
        stop = threading.Event()  # tells the engine's thread that nobody wants its work any more

        def compute(rows: np.ndarray) -> asyncio.Future[None]:
            future = loop.run_in_executor(
                self._engine_thread, self._compute, feeds, rows, outputs, stop
            )
            future.add_done_callback(_retrieve)
            return future

        async def send(share: _Share) -> Reply:
            chosen = {name: array[share.rows] for name, array in feeds.items()}

            async def ask(reason: str) -> Reply:
                permit = ledger.permit(share.client.name, chosen["window"].tolist(), reason)
                share.permits.append(permit)
                return await share.client.infer(chosen, permit, nodes_until)

            try:
                reply = await ask("dispatch")
            except NodeRefusedError as error:
                # The same windows to the same node: it is shown nothing new.
                wait = error.retry_ms / 1000
                if not wait or loop.time() + wait >= nodes_until:
                    raise
                await asyncio.sleep(wait)
                reply = await ask(f"once more: {error.code}")
            for name, array in reply.outputs.items():
                outputs[name][share.rows] = array
            return reply

        sends: dict[asyncio.Future[Any], _Share] = {
            asyncio.ensure_future(send(share)): share for share in self._shares(placement, windows)
        }
        waiting: set[asyncio.Future[Any]] = set(sends)
        for sending in sends:
            sending.add_done_callback(_retrieve)
        kept = np.flatnonzero(np.isin(windows.window, placement.home))
        if len(kept):
            waiting.add(compute(kept))
        returned: dict[int, list[Reply]] = {}
        failures: dict[str, str] = {}
        at_home = set(placement.home)
        try:
            while waiting:
                # Sends end at their deadline by themselves, and can say why; homework does not.
                left = None if waiting & sends.keys() else until - loop.time()
                if left is not None and left <= 0:
                    raise self._late("computing windows at home")
                done, waiting = await asyncio.wait(
                    waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                for future in done:
                    share = sends.get(future)
                    if share is None:
                        future.result()
                        continue
                    try:
                        returned.setdefault(id(share.client), []).append(future.result())
                    except OffloadError as error:
                        failures.setdefault(share.client.name, str(error))
                        if local:
                            at_home |= set(windows.window[share.rows].tolist())
                            waiting.add(compute(share.rows))
                if failures and not local:
                    raise OffloadError(
                        "; ".join(failures.values())
                        + ". No mask was made; `edge-runtime nodes` checks every node, and "
                        "--fallback local has the edge compute what nodes do not"
                    )
        finally:
            stop.set()
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for future in waiting & sends.keys():
                failures.setdefault(sends[future].client.name, "given up before it answered")
            report = self._report(placement, ledger, sends.values(), returned, failures, at_home)
            total_ms = (loop.time() - started) * 1000
            self.report = msgspec.structs.replace(report, total_ms=total_ms)
        return outputs

    def _prepare(self, windows: Windows) -> tuple[Placement, dict[str, np.ndarray]]:
        """Who is to see which window, and what the stack is fed. Takes too long for the loop."""
        placement = place(
            areas=windows.area().tolist(),
            windows=windows.window.tolist(),
            side=self._geometry.windows_per_side,
            nodes=[client.name for client in self._clients],
            max_exposure=self.config.max_exposure,
            secret=self._secret,
            image_hash=_image_hash(windows),
            keep_home=self.config.fallback == "local",
            ids={client.name: client.node.server_key for client in self._clients},
        )
        return placement, self.pipeline.leave_home(windows)

    def _shares(self, placement: Placement, windows: Windows) -> list[_Share]:
        most = self.config.windows_per_request or len(windows)
        shares = []
        for client in self._clients:
            rows = np.flatnonzero(np.isin(windows.window, placement.assignment[client.name]))
            shares += [
                _Share(client, rows[first : first + most]) for first in range(0, len(rows), most)
            ]
        return shares

    def _compute(
        self,
        feeds: dict[str, np.ndarray],
        rows: np.ndarray,
        outputs: dict[str, np.ndarray],
        stop: threading.Event,
    ) -> None:
        """Run the stack at home, one window at a time so as to stop soon when told."""
        for row in rows:
            if stop.is_set():
                return
            one = slice(row, row + 1)
            result = self.pipeline.stack({name: array[one] for name, array in feeds.items()})
            for name, array in result.items():
                outputs[name][one] = array

    def _late(self, doing: str) -> OffloadError:
        return OffloadError(
            f"the edge was still {doing} when the deadline of {self.config.deadline_s:g} s passed: "
            "allow more time (--deadline) or use more nodes"
        )

    def _report(
        self,
        placement: Placement,
        ledger: ExposureLedger,
        shares: Iterable[_Share],
        returned: dict[int, list[Reply]],
        failures: dict[str, str],
        at_home: set[int],
    ) -> OffloadReport:
        sent = [permit for share in shares for permit in share.permits if permit.bytes_sent]
        total = sum(placement.areas.values())
        nodes = []
        for client in self._clients:
            permits = [permit for permit in sent if permit.node == client.name]
            shown = sorted({window for permit in permits for window in permit.windows})
            replies = returned.get(id(client), [])
            nodes.append(
                NodeReport(
                    name=client.name,
                    windows=tuple(shown),
                    share_of_image=sum(placement.areas[window] for window in shown) / total,
                    bytes_up=sum(permit.bytes_sent for permit in permits),
                    bytes_down=sum(reply.bytes_down for reply in replies),
                    upload_ms=max((reply.upload_ms for reply in replies), default=0.0),
                    queue_ms=sum(reply.queue_ms for reply in replies),
                    compute_ms=sum(reply.compute_ms for reply in replies),
                    download_ms=max((reply.download_ms for reply in replies), default=0.0),
                    failure=failures.get(client.name),
                )
            )
        return OffloadReport(
            nodes=tuple(nodes),
            home=tuple(sorted(at_home)),
            max_exposure=self.config.max_exposure,
            largest_share=max(node.share_of_image for node in nodes),
            separation=placement.separation,
            windows_total=self._geometry.windows,
            windows_sent=sum(len(node.windows) for node in nodes),
            bytes_up=sum(node.bytes_up for node in nodes),
            bytes_down=sum(node.bytes_down for node in nodes),
            total_ms=0.0,
            ledger=tuple(ledger.decisions),
        )

    async def _status(self, timeout_s: float) -> list[NodeStatus]:
        until = asyncio.get_running_loop().time() + timeout_s
        return await asyncio.gather(*(self._ask(client, until) for client in self._clients))

    async def _ask(self, client: NodeClient, until: float) -> NodeStatus:
        try:
            info, round_trip = await client.info(until)
        except OffloadError as error:
            state = client.link.state if client.link else "unreachable"
            reason = str(error).split("): ", 1)[-1]
            authorised = True if state == "up" else False if reason == NOT_AUTHORISED else None
            return NodeStatus(
                name=client.name,
                endpoint=client.node.endpoint,
                reachable=state in ("up", "refused"),
                authorised=authorised,
                same_bundle=None,
                round_trip_ms=None,
                detail=reason,
            )
        wrong = mismatch(info, self._stage)
        return NodeStatus(
            name=client.name,
            endpoint=client.node.endpoint,
            reachable=True,
            authorised=True,
            same_bundle=wrong is None,
            round_trip_ms=round_trip,
            detail=wrong or f"{info.software}, {listed(info)}",
        )


async def _watch_memory(clients: list[NodeClient]) -> None:
    """Drop all connections before this process runs out of memory by what nodes have sent."""
    limit = memory_limit()
    if limit is None:
        return
    watch = MemoryWatch(int(limit * _MEMORY_SHARE))
    while True:
        await asyncio.sleep(_MEMORY_S)
        try:
            if held := watch.breached():
                reason = (
                    f"the edge holds {held / 1e9:.1f} of the {limit / 1e9:.1f} GB of memory it may "
                    "have, and has dropped its connections so that the kernel does not end it"
                )
                log.error("%s", reason)
                for client in clients:
                    await client.close(reason)
                    client.start()
        except Exception:  # it must go on watching
            log.exception("watching this process's memory failed")
            await asyncio.sleep(_MEMORY_REST_S)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Look at the outcome, lest asyncio complain that nobody did: the first failure is told."""
    if not future.cancelled():
        future.exception()


def _image_hash(windows: Windows) -> bytes:
    """Digest of what the nodes could see of the image: its pixels and its size."""
    digest = hashlib.sha256(repr(windows.size).encode())  # the fastest where CPUs have it built in
    digest.update(np.ascontiguousarray(windows.pixels).data)
    return digest.digest()
