"""`Offloader`: connections to all nodes of a configuration, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import NamedTuple

import msgspec
import numpy as np
import zmq.asyncio

from edge_common.errors import BundleError, PlacementError, RecordError
from edge_common.memory_limits import memory_limit
from edge_runtime.config import EdgeConfig, Node, load_nodes
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import Placement, place
from edge_runtime.exposure.scene import SceneKeeper
from edge_runtime.exposure.store import ExposureStore, photo_key
from edge_runtime.offload.background import BackgroundLoop
from edge_runtime.offload.connection import Connection
from edge_runtime.offload.dispatch import Dispatch, Nodes
from edge_runtime.offload.health import Fleet, NodeHealth
from edge_runtime.offload.recheck import Rechecker, Rechecks
from edge_runtime.offload.report import RunRecord
from edge_runtime.offload.status import NodeStatus, status
from engines.pipeline import Pipeline
from engines.windows import Windows
from transport.dos_protection import MemoryWatch
from transport.keys import load_secret_bytes
from transport.messages import stage_limits

_MEMORY_SHARE = 0.9
"""Connections are dropped when this process uses this share of the memory it may use."""
_MEMORY_S = 0.25
_MEMORY_REST_S = 5.0
"""Pause after an error in watching memory."""

log = logging.getLogger(__name__)


class Computed(NamedTuple):
    """The stack's outputs for every window, and row -> who computed it (known rows are missing)."""

    outputs: dict[str, np.ndarray]
    sources: dict[int, str]


class Offloader:
    """Connections to all nodes. Several threads may call it at the same time.

    Use it as a context manager, or call :meth:`close`.

    Args:
        config: nodes, deadline, budget and fallback.
        pipeline: of the full bundle; its stack computes what stays at home, and recomputes windows.

    Attributes:
        on_suspect: called in the network's thread when a node was found lying, with its name and
            the numbers (`RunRecord.number`) of the images whose masks may be wrong, oldest first.
            It must return soon.

    Raises:
        BundleError: the bundle's windows cannot be offloaded (stock order).
        ConfigError, KeyFileError: see :func:`.config.load_nodes`.
    """

    def __init__(self, config: EdgeConfig, pipeline: Pipeline) -> None:
        bundle = pipeline.bundle
        if not bundle.has("stack") or not bundle.has("tail"):
            raise BundleError(
                f"{bundle.path} is a {bundle.manifest.kind} bundle, which cannot be offloaded",
                mend="use a full one in reordered order (`edge-runtime export --order reordered`)",
            )
        self.config = config
        self.pipeline = pipeline
        self.on_suspect: Callable[[str, list[int]], None] | None = None
        self._numbers = itertools.count(1)
        self._closed = False
        self._opening = threading.Lock()
        self._exposure: ExposureStore | None = None
        self._scenes: dict[str, SceneKeeper] = {}
        self._streams: set[str] = set()  # those that are open
        self._secret = load_secret_bytes(config.secret)
        stage = bundle.stage("stack")
        limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
        nodes = load_nodes(config)
        self._background = BackgroundLoop("edge-network")
        parties = {node.name: node.party for node in config.nodes}
        fleet = Fleet(NodeHealth(node.name, parties[node.name]) for node in nodes)

        def connection(ctx: zmq.asyncio.Context, node: Node) -> Connection:
            def up() -> None:
                fleet.nodes[node.name].link_up(asyncio.get_running_loop().time())
                self._nodes.wake()

            def down(waits_s: float) -> None:
                fleet.nodes[node.name].link_down(asyncio.get_running_loop().time(), waits_s)

            return Connection(ctx, node, stage, limits, up, down)

        async def connect() -> tuple[zmq.asyncio.Context, list[Connection]]:
            ctx = zmq.asyncio.Context()
            connections = [connection(ctx, node) for node in nodes]
            self._nodes = Nodes(connections, fleet)
            self._rechecker = Rechecker(pipeline, self._nodes, self._suspect)
            for each in connections:
                each.start()
            self._watching = asyncio.create_task(_watch_memory(connections), name="memory")
            return ctx, connections

        try:
            self._ctx, self._connections = self._background.call(connect())
        except BaseException:
            self._background.close()
            raise

    @functools.cached_property
    def parties(self) -> dict[str, tuple[str, ...]]:
        """Party -> names of its nodes."""
        found: dict[str, tuple[str, ...]] = {}
        for name, health in sorted(self._nodes.fleet.nodes.items()):
            found[health.party] = (*found.get(health.party, ()), name)
        return found

    @property
    def shut_out(self) -> frozenset[str]:
        """Names of the nodes that were turned away, for what they sent."""
        return frozenset(name for name, c in self._nodes.connections.items() if c.quarantine)

    def usable(self) -> set[str]:
        """Parties of which a node could be sent something now, or soon."""

        async def look() -> set[str]:
            now = asyncio.get_running_loop().time()
            links = self._nodes.connections
            nodes = [n for n in self._nodes.fleet.nodes.values() if not links[n.name].quarantine]
            return {n.party for n in nodes if n.state(now) in ("healthy", "probing", "resting")}

        return self._background.call(look())

    def stack(
        self,
        windows: Windows,
        record: RunRecord | None = None,
        keep_local: Collection[int] = (),
    ) -> dict[str, np.ndarray]:
        """The stack's outputs for every window of a photo, in the order of `windows`.

        On the same kind of machine they equal those of `pipeline.stack` bit for bit.

        Args:
            record: what happens is written here, also if this fails or is interrupted.
            keep_local: windows that never leave the edge.

        Raises:
            OffloadError: no permitted way led to all tokens; at the deadline at the latest.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        place = functools.partial(self.place_photo, windows, keep_local)
        return self._background.call(self._run(windows, record or RunRecord(), place, {})).outputs

    def submit(
        self,
        windows: Windows,
        record: RunRecord,
        place: Callable[[], ExposureLedger],
        known: Mapping[int, Mapping[str, np.ndarray]],
    ) -> Future[Computed]:
        """Begin with a frame; returns at once. Cancelling the future gives the frame up.

        Args:
            place: see :class:`.dispatch.Dispatch`.
            known: row -> tokens that are known from an earlier frame.
        """
        return self._background.submit(self._run(windows, record, place, known))

    async def _run(
        self,
        windows: Windows,
        record: RunRecord,
        place: Callable[[], ExposureLedger],
        known: Mapping[int, Mapping[str, np.ndarray]],
    ) -> Computed:
        record.number, config = next(self._numbers), self.config
        run = Dispatch(windows, place, self._nodes, self.pipeline, config, record, known)
        outputs = await run.run()
        await self._rechecker.check(run, outputs, config, record)
        return Computed(outputs, run.sources)

    def _suspect(self, node: str, images: list[int]) -> None:
        if self.on_suspect is not None:
            self.on_suspect(node, images)

    @property
    def rechecks(self) -> Rechecks:
        """How many windows of nodes were recomputed so far."""
        return self._rechecker.count

    def settle(self) -> None:
        """Wait until all windows that were chosen so far have been recomputed."""
        self._background.call(self._rechecker.settle())

    def place_photo(self, windows: Windows, keep_local: Collection[int] = ()) -> ExposureLedger:
        """Place a photo's windows on the parties, and make its ledger.

        Raises:
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        areas = dict(zip(windows.window.tolist(), windows.area().tolist(), strict=True))
        rest = {window: area for window, area in areas.items() if window not in keep_local}
        keys = {name: each.node.server_key for name, each in self._nodes.connections.items()}
        limit = self.config.max_exposure
        side = self.pipeline.bundle.geometry.windows_per_side
        digest = image_hash(windows)

        def placed(of: dict[int, int]) -> Placement:
            return place(
                areas=[*of.values()],
                windows=[*of],
                side=side,
                nodes=[*self.parties],
                # The budget is a share of the whole photo, also of what stays here.
                max_exposure=min(1.0, limit * sum(areas.values()) / sum(of.values())),
                secret=self._secret,
                image_hash=digest,
                keep_home=self.config.fallback == "local",
                ids={party: min(keys[name] for name in ns) for party, ns in self.parties.items()},
            )

        if not rest:
            placement = Placement(dict.fromkeys(self.parties, ()), (), 8, 0, limit, areas, side)
        else:
            try:  # as without regions, so that a repeat with others shows no party more
                placement = placed(areas)
            except PlacementError:
                if len(rest) == len(areas):
                    raise
                placement = placed(rest)
        whole = msgspec.structs.replace(
            placement,
            assignment={
                party: tuple(window for window in mine if window in rest)
                for party, mine in placement.assignment.items()
            },
            second={w: party for w, party in placement.second.items() if w in rest},
            home=tuple(sorted({*placement.home, *(areas.keys() - rest.keys())})),
            areas=areas,
            max_exposure=limit,
        )
        return ExposureLedger(whole, self.parties, self._photo_extra(digest, windows.size, whole))

    def _photo_extra(
        self, digest: bytes, size: tuple[int, int], placement: Placement
    ) -> Callable[[str, tuple[int, ...]], str | None] | None:
        """Put a photo's placement on record. Second choices may be used once they are on the disk.

        A repeat of the photo uses the same first choices, so those need not wait.
        """
        try:
            store = self._store()
        except RecordError as error:
            if error.code != "in_use":
                raise
            return lambda party, extra: "another process writes the exposure record"
        if store is None:
            return None
        side = self.pipeline.bundle.geometry.window_pixels
        record = store.photo(photo_key(self._secret, digest), size, side)
        for party, mine in placement.assignment.items():
            record.place(party, mine)
        for window, party in placement.second.items():
            record.grant(party, [window])

        def extra(party: str, asked: tuple[int, ...]) -> str | None:
            if any(placement.second.get(window) != party for window in asked):
                return "only its second choices are on record"
            return None if record.durable() else "they are not on record yet"

        return extra

    @property
    def local_s(self) -> float | None:
        """Seconds that this machine's stack takes for one window; None while not known."""
        return self._nodes.local_s

    def scenes(self, stream: str) -> SceneKeeper:
        """The scenes of one camera or video, with their budget.

        Until :meth:`end_stream` no other caller gets them; the next one goes on with them.

        Raises:
            RecordError: the exposure record cannot be used, or the stream is open already.
        """
        store = self._store()
        with self._opening:
            if stream in self._streams:
                raise RecordError(
                    f"the stream {stream!r} is open already, and both would share one budget",
                    mend="close it first, or give each camera or video a name of its own",
                    code="in_use",
                )
            if stream not in self._scenes:
                self._scenes[stream] = SceneKeeper(
                    stream,
                    self.pipeline.bundle.geometry,
                    self.config.max_exposure,
                    self._secret,
                    self.parties,
                    store,
                    fallback=self.config.fallback == "local",
                )
            self._streams.add(stream)
            return self._scenes[stream]

    def end_stream(self, stream: str) -> None:
        """Put on record what the parties have seen of it."""
        with self._opening:
            if stream in self._streams:
                self._streams.discard(stream)
                self._scenes[stream].close()

    def _store(self) -> ExposureStore | None:
        with self._opening:
            if self._exposure is None and self.config.exposure is not None:
                self._exposure = ExposureStore(self.config.exposure, self.config.max_exposure)
            return self._exposure

    def status(self, timeout_s: float = 5.0) -> list[NodeStatus]:
        """Ask every node, all at once, what it serves."""

        async def ask() -> list[NodeStatus]:
            return await asyncio.gather(*(status(each, timeout_s) for each in self._connections))

        return self._background.call(ask())

    def close(self) -> None:
        """Drop all connections and end the thread. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True

        async def disconnect() -> None:
            await self._rechecker.close()
            self._watching.cancel()
            del self._watching  # a cancelled task keeps its open files
            await asyncio.gather(*(connection.close() for connection in self._connections))
            self._ctx.destroy(linger=0)

        self._background.call(disconnect())
        self._background.close()
        for stream in [*self._streams]:
            self.end_stream(stream)
        if self._exposure is not None:
            self._exposure.close()

    def __enter__(self) -> Offloader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def image_hash(windows: Windows) -> bytes:
    """Digest of what the nodes could see of the image: its pixels and its size."""
    digest = hashlib.sha256(repr(windows.size).encode())  # CPUs have instructions for this one
    digest.update(np.ascontiguousarray(windows.pixels).data)
    return digest.digest()


async def _watch_memory(connections: list[Connection]) -> None:
    """Drop all connections before what nodes have sent exhausts this process's memory."""
    limit = memory_limit()
    if limit is None:
        return
    watch = MemoryWatch(int(limit * _MEMORY_SHARE))
    while True:
        await asyncio.sleep(_MEMORY_S)
        try:
            if used := watch.breached():
                reason = (
                    f"the edge uses {used / 1e9:.1f} of the {limit / 1e9:.1f} GB of memory it may "
                    "use, and has dropped its connections so that the kernel does not kill it"
                )
                log.error("%s", reason)
                for connection in connections:
                    await connection.close(reason)
                    connection.start()
        except Exception:  # a bug here must not end the watch
            log.exception("watching this process's memory failed")
            await asyncio.sleep(_MEMORY_REST_S)
