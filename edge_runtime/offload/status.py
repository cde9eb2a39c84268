"""Checks which nodes could be used right now, without sending a window."""

from __future__ import annotations

import asyncio

import msgspec

from edge_runtime.offload.connection import SAME_BUNDLE, Connection, NodeError, listed, mismatch


class NodeStatus(msgspec.Struct, frozen=True):
    """The known facts about one node. None means not known.

    Attributes:
        code: None if it can be used, otherwise that of :class:`.connection.NodeError`.
        detail: the problem, or the software that the node runs.
    """

    name: str
    endpoint: str
    reachable: bool
    authorised: bool | None
    same_bundle: bool | None
    round_trip_ms: float | None
    code: str | None
    detail: str

    @property
    def usable(self) -> bool:
        return self.code is None


async def status(connection: Connection, timeout_s: float) -> NodeStatus:
    """Ask a node what it serves."""
    name, endpoint = connection.name, connection.node.endpoint
    try:
        info, ms = await connection.info(asyncio.get_running_loop().time() + timeout_s)
    except NodeError as error:
        state = connection.link.state if connection.link else "unreachable"
        authorised = True if state == "up" else False if error.code == "not_authorised" else None
        reachable = state in ("up", "refused")
        detail = f"{error.reason}: {error.mend}" if error.mend else error.reason
        return NodeStatus(name, endpoint, reachable, authorised, None, None, error.code, detail)
    wrong = mismatch(info, connection.stage)
    detail = f"{wrong}: {SAME_BUNDLE}" if wrong else f"{info.software}, {listed(info)}"
    code = "wrong_bundle" if wrong else None
    return NodeStatus(name, endpoint, True, True, wrong is None, ms, code, detail)
