"""The counts in the rows about floods, independent of speed: honest edges lose nothing, and every
newcomer is served."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest
from faults.floods import Kind

from reliability.floods import CASES, edges_join, message_flood
from reliability.rows import Bench

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("kind", "connections", "limit"), [("cancel", 1, None), ("request", 16, 250 << 20)]
)
def test_a_flooding_key_is_banned_and_costs_no_honest_request(
    tmp_path: Path, toy_bundle: Path, kind: Kind, connections: int, limit: int | None
) -> None:
    seen = message_flood(
        Bench(tmp_path, toy_bundle),
        toy_bundle,
        kind,
        rounds=2,
        seconds=0.5,
        connections=connections,
        limit=limit,
    ).seen
    assert (seen["node lived"], seen["bound anew"]) == (True, 0)
    assert (seen["honest requests lost"], seen["honest requests refused"]) == (0, {})
    assert seen["memory of the front, most MB more"] < 100
    if not seen["flood: times kept out"]:  # `test_listener` tests that, without a clock
        pytest.skip("this machine is too busy to flood a node")


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("1,000")])
def test_newcomers_are_served_during_a_flood_of_half_open_connections(
    tmp_path: Path, toy_bundle: Path, case: str
) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 16_384:
        pytest.skip("a process may not have 16,384 descriptors here")
    seen = asyncio.run(edges_join(Bench(tmp_path, toy_bundle), CASES[case], 1))
    assert seen["served"] == seen["newcomers"] == 20
    assert seen["connected edge: answered"] == seen["connected edge: asked"] > 0
    assert seen["half-open connections"] > 1000
    assert seen["memory, most MB more"] < 100
