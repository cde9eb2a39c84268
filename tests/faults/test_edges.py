"""Hostile edges against a real node: their messages arrive, and the node's answers name the
defect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from faults import sodium
from faults.asking import feeds
from faults.background import cancel_all
from faults.edges import HostileEdge, info_request
from faults.nodes import FaultyNode, NodeProcess
from faults.zmtp import Budget
from transport.messages import Info, Refused

pytestmark = [
    pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING)),
    pytest.mark.process,
]

REFUSALS = {
    "shape": "invalid",
    "dtype": "invalid",
    "missing": "invalid",
    "extra": "malformed",
    "counts": "invalid",
    "negative window": "invalid",
    "window beyond": "invalid",
    "stage": "wrong_bundle",
    "no deadline": "deadline",
    "negative deadline": "malformed",
    "unknown field": "malformed",
    "unknown type": "malformed",
    "short id": "malformed",
    "accepted": "malformed",
    "magic": "malformed",
    "empty": "malformed",
    "long header": "malformed",
}


@pytest.fixture(autouse=True)
def _alive(hostile: HostileEdge) -> object:
    """Check after each test that the node answers."""
    yield
    assert isinstance(asyncio.run(hostile.answer_to(info_request())), Info)


def test_each_defect_is_refused_with_its_reason(hostile: HostileEdge, victim: NodeProcess) -> None:
    defects = hostile.defects(feeds(victim.bundle))
    assert defects.keys() == {*REFUSALS, "version"}

    async def work() -> dict[str, str]:
        told = {}
        for name, build in defects.items():
            answer = await hostile.answer_to(build())
            told[name] = answer.code if isinstance(answer, Refused) else type(answer).__name__
        return told

    assert asyncio.run(work()) == {**REFUSALS, "version": "VersionsSpoken"}


def test_a_flood_is_answered_and_counted(hostile: HostileEdge, victim: NodeProcess) -> None:
    fed = feeds(victim.bundle)
    tally = asyncio.run(hostile.flood(fed, budget=Budget(count=100, seconds=10)))
    assert tally.messages == 100
    assert tally.notes["accepted"] >= tally.notes["result"] > 0


def test_wrong_requests_never_get_a_wrong_result(hostile: HostileEdge, victim: NodeProcess) -> None:
    tally = asyncio.run(hostile.wrong(feeds(victim.bundle), budget=Budget(count=150, seconds=10)))
    assert tally.messages == 150
    assert tally.notes["refused malformed"] > 20
    assert "unreadable" not in tally.notes


def test_unread_replies_stay_at_the_node(faulty: Callable[..., FaultyNode]) -> None:
    with faulty("not_accepted") as node:
        pair = node.authorise()
        edge = HostileEdge(node.endpoint, node.keypair.public, pair, node.stage.sha256)
        fed = {name: np.repeat(array, 4, axis=0) for name, array in feeds(node.bundle).items()}

        async def work() -> int:
            budget = Budget(count=20_000, seconds=20)
            flooding = asyncio.create_task(edge.never_read(fed, budget=budget))
            while not node.undelivered and not flooding.done():
                await asyncio.sleep(0.01)
            await cancel_all([flooding])
            return node.undelivered

        assert asyncio.run(work()) > 0


def test_many_requests_with_one_id(hostile: HostileEdge, victim: NodeProcess) -> None:
    budget = Budget(count=20, seconds=10)
    tally = asyncio.run(hostile.duplicate_ids(feeds(victim.bundle), budget=budget))
    assert tally.messages == 20


def test_cancelled_requests_of_edges_that_left(hostile: HostileEdge, victim: NodeProcess) -> None:
    budget = Budget(count=20, seconds=10)
    tally = asyncio.run(hostile.cancelled(feeds(victim.bundle), budget=budget))
    assert tally.messages == tally.connections == 20
