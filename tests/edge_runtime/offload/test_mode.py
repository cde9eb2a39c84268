"""The choice between nodes and edge, from measured times."""

from __future__ import annotations

import pytest

from edge_runtime.offload.mode import ModeChooser


@pytest.mark.parametrize(("mode", "place"), [("offload", "nodes"), ("local", "edge")])
def test_a_fixed_mode_leaves_no_choice(mode: str, place: str) -> None:
    chooser = ModeChooser(mode)  # type: ignore[arg-type]
    chooser.measured("nodes", 1.0 if place == "edge" else 1000.0)
    chooser.measured("edge", 10.0)
    choice = chooser.choose()
    assert (choice.place, choice.reason) == (place, f"mode is {mode}")


def test_nodes_are_used_until_both_times_are_known() -> None:
    chooser = ModeChooser("auto")
    assert chooser.choose(edge_ms=1.0).place == "nodes"
    chooser.measured("nodes", 50.0)
    assert chooser.choose().place == "nodes"
    choice = chooser.choose(edge_ms=20.0)
    assert (choice.place, choice.nodes_ms, choice.edge_ms) == ("edge", 50.0, 20.0)
    assert choice.reason == "nodes 50 ms, edge 20 ms: the edge would be faster"


def test_without_a_usable_node_the_edge_computes() -> None:
    chooser = ModeChooser("auto")
    assert chooser.choose(usable_nodes=0).place == "edge"
    assert chooser.choose(usable_nodes=1).place == "nodes"


def test_a_small_difference_changes_nothing() -> None:
    chooser = ModeChooser("auto")
    chooser.measured("nodes", 100.0)
    assert chooser.choose(edge_ms=85.0).place == "nodes"
    assert chooser.choose(edge_ms=79.0).place == "edge"
    chooser.measured("edge", 100.0)
    choice = chooser.choose()
    assert choice.place == "edge"
    for _ in range(50):
        chooser.measured("edge", 118.0)
    assert chooser.choose().place == "edge"
    assert "not by enough" in chooser.choose().reason
    for _ in range(20):
        chooser.measured("edge", 130.0)
    assert chooser.choose().place == "nodes"


def test_heat_weighs_in_and_old_times_are_measured_again() -> None:
    chooser = ModeChooser("auto")
    chooser.measured("nodes", 100.0)
    chooser.measured("edge", 70.0)
    assert chooser.choose(edge_slowdown=1.5).place == "nodes"
    assert chooser.choose().place == "edge"
    places = []
    for _ in range(205):
        places.append(chooser.choose().place)
        chooser.measured(places[-1], 100.0 if places[-1] == "nodes" else 70.0)
    assert places.count("nodes") == 2


def test_a_frame_that_measures_nothing_does_not_keep_the_nodes_in_use() -> None:
    chooser = ModeChooser("auto")
    chooser.measured("nodes", 100.0)
    for _ in range(101):
        chooser.measured("edge", 50.0)
    places = [chooser.choose().place for _ in range(5)]  # none of which is measured
    assert places == ["nodes", "edge", "edge", "edge", "edge"]
