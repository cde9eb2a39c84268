"""The counts in the rows about whole images, independent of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.__main__ import load_rows
from reliability.images import Images, witnessed
from reliability.rows import Bench

# That of 5 nodes and of overhead are left to `make reliability`: they take long.
ROWS = (
    "image: one of 3 nodes killed",
    "image: all nodes dead or frozen",
    "image: everything slow",
    "image: flapping",
    "image: cancellation",
)
pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.parametrize("name", ROWS)
def test_every_image_is_right_and_nothing_is_left(
    name: str, tmp_path: Path, toy_bundle: Path
) -> None:
    seen = load_rows()[name].work(Bench(tmp_path, toy_bundle))
    assert seen.held, seen.seen


def test_what_a_node_received_without_the_ledger_is_found(tmp_path: Path, toy_bundle: Path) -> None:
    bench = Bench(tmp_path, toy_bundle)
    settings = {"fallback": "local", "max_exposure": 0.5}
    with witnessed(bench, ["a", "b", "c"]) as nodes, Images(bench, nodes, settings) as images:
        images.settle()
        assert images.received() == 9
        assert images.right
        ledger = images.records[0].ledger
        assert ledger is not None
        ledger.permits[0].state = "released"
        images.received()
    assert images.broken == [f"{ledger.permits[0].node} received what the ledger does not know"]
    assert not images.right
