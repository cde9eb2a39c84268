"""The counts in the rows about throughput, independent of speed: honest edges lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.load import write_sized_bundle
from reliability.rows import Bench
from reliability.throughput import sided

pytestmark = pytest.mark.process


def test_edges_that_ask_for_more_than_the_node_may_hold_lose_no_request(tmp_path: Path) -> None:
    # 48 results of 12.5 MB are more than twice the 256 MiB that may wait in libzmq.
    bundle = write_sized_bundle(tmp_path / "bundle", 1280)
    with sided(Bench(tmp_path, bundle), bundle, "serve", 16) as side:
        for _ in range(10):  # on a busy machine nothing may come back within the first seconds
            side.measure(1.0)
            if len(side.rates) > 1 and sum(side.rates) > 0:
                break
        logged = side.logged()
    assert sum(side.rates) > 0
    assert (side.lost, side.refused) == (0, {})
    assert "dropped" not in logged
