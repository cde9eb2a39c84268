"""`Offloader`: connections to all nodes of a configuration, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import hashlib
import logging

import numpy as np
import zmq.asyncio

from edge_common.errors import BundleError
from edge_common.memory_limits import memory_limit
from edge_runtime.config import EdgeConfig, Node, load_nodes
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import place
from edge_runtime.offload.background import BackgroundLoop
from edge_runtime.offload.connection import Connection
from edge_runtime.offload.dispatch import Dispatch, Nodes
from edge_runtime.offload.health import Fleet, NodeHealth
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


class Offloader:
    """Connections to all nodes. Several threads may call it at the same time.

    Use it as a context manager, or call :meth:`close`.

    Args:
        config: nodes, deadline, budget and fallback.
        pipeline: of the full bundle; its stack computes what stays at home.

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
        self._closed = False
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
            for each in connections:
                each.start()
            self._watching = asyncio.create_task(_watch_memory(connections), name="memory")
            return ctx, connections

        try:
            self._ctx, self._connections = self._background.call(connect())
        except BaseException:
            self._background.close()
            raise

    def stack(self, windows: Windows, record: RunRecord | None = None) -> dict[str, np.ndarray]:
        """The stack's outputs for every window, in the order of `windows`.

        On the same kind of machine they equal those of `pipeline.stack` bit for bit.

        Args:
            record: what happens is written here, also if this fails or is interrupted.

        Raises:
            OffloadError: a node failed, or time ran out; at the deadline at the latest.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        run = Dispatch(
            windows,
            lambda: self._place(windows),
            self._nodes,
            self.pipeline,
            self.config,
            record or RunRecord(),
        )
        return self._background.call(run.run())

    def _place(self, windows: Windows) -> ExposureLedger:
        """Place a photo's windows on the parties."""
        members: dict[str, list[Node]] = {}
        for node in self._nodes.connections.values():
            party = self._nodes.fleet.nodes[node.name].party
            members.setdefault(party, []).append(node.node)
        placement = place(
            areas=windows.area().tolist(),
            windows=windows.window.tolist(),
            side=self.pipeline.bundle.geometry.windows_per_side,
            nodes=[*members],
            max_exposure=self.config.max_exposure,
            secret=self._secret,
            image_hash=image_hash(windows),
            keep_home=self.config.fallback == "local",
            ids={party: min(node.server_key for node in members[party]) for party in members},
        )
        nodes = {party: sorted(node.name for node in members[party]) for party in members}
        return ExposureLedger(placement, nodes)

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
            self._watching.cancel()
            del self._watching  # a cancelled task keeps its open files
            await asyncio.gather(*(connection.close() for connection in self._connections))
            self._ctx.destroy(linger=0)

        self._background.call(disconnect())
        self._background.close()

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
