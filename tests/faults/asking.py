"""A real client of one node, and a small request to send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import zmq.asyncio

from edge_runtime.config import Node
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import place
from edge_runtime.offload.connection import Connection, Reply
from engines.bundle import Bundle
from transport.messages import stage_limits

WINDOWS = [0, 4]


def feeds(bundle: Bundle, seed: int = 0, windows: Sequence[int] = WINDOWS) -> dict[str, np.ndarray]:
    """The given windows of a random picture."""
    side, count = bundle.geometry.window_pixels, len(windows)
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "extent": np.full((count, 2), side, np.int64),
        "window": np.array(windows),
    }


async def ask(client: Connection, fed: dict[str, np.ndarray], seconds: float = 20.0) -> Reply:
    """Send a request for the stack, with a permit for it."""
    ledger = ExposureLedger(place([1] * 9, range(9), 3, [client.name], 1.0, bytes(32), b""))
    until = asyncio.get_running_loop().time() + seconds
    return await client.infer(fed, ledger.reserve(client.name, WINDOWS), until)


@asynccontextmanager
async def connected(node: Node, bundle: Bundle) -> AsyncIterator[Connection]:
    """A real client of `node`, connected to the bundle's stack."""
    ctx, stage = zmq.asyncio.Context(), bundle.stage("stack")
    limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
    client = Connection(ctx, node, stage, limits)
    client.start()
    try:
        while client.link is None or client.link.state != "up":
            await asyncio.sleep(0.005)
        yield client
    finally:
        await client.close()
        ctx.destroy(linger=0)
