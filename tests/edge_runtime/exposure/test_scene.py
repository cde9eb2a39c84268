"""The scenes of a stream: one budget over all frames, restarts, and what is on record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_common.errors import PlacementError
from edge_runtime.exposure import scene as scene_module
from edge_runtime.exposure.mosaic import Mosaic
from edge_runtime.exposure.scene import FramePlan, SceneKeeper
from edge_runtime.exposure.store import ExposureStore, read_contents
from engines.bundle import Bundle, shipped_bundle

GEOMETRY = Bundle.load(shipped_bundle()).geometry
SIDE = GEOMETRY.image_size
SIZE = (SIDE * 9 // 16, SIDE)
NODES = {name: (f"{name}-1",) for name in ("a", "b", "c", "d", "e")}
SECRET = bytes(range(32))


def picture(seed: int, height: int = 3 * SIDE, width: int = 3 * SIDE) -> np.ndarray:
    """A large textured picture, uint8 ``[h, w, 3]``."""
    rng = np.random.default_rng(seed)
    found = np.zeros((height, width, 3))
    for cell in (4, 16, 64):
        grid = rng.random((height // cell + 1, width // cell + 1, 3)) * (0.3 + 0.7 * rng.random(3))
        found += grid.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    return (found * 85).astype(np.uint8)


def view(of: np.ndarray, y: int = 0, x: int = 0) -> np.ndarray:
    return np.ascontiguousarray(of[y : y + SIZE[0], x : x + SIZE[1]])


def keeper(budget: float = 0.4, **options: object) -> SceneKeeper:
    settings: dict = {"fallback": True, **options}
    return SceneKeeper("door", GEOMETRY, budget, SECRET, NODES, **settings)


def test_a_still_camera_shows_nobody_anything_new() -> None:
    scenes, still = keeper(), view(picture(1))
    plans = [scenes.frame(still, NODES) for _ in range(20)]
    assert {plan.scene for plan in plans} == {0}
    assert len({str(plan.ledger.placement.assignment) for plan in plans}) == 1
    assert plans[0].shares == plans[-1].shares
    assert all(0 < share <= 0.4 for share in plans[0].shares.values())
    assert plans[0].ledger.placement.home == ()


def test_no_party_exceeds_the_budget_while_the_camera_moves() -> None:
    scenes, large = keeper(0.3), picture(2)
    rng = np.random.default_rng(3)
    y = x = SIDE
    for _ in range(40):
        y = int(np.clip(y + rng.integers(-30, 31), 0, 2 * SIDE))
        x = int(np.clip(x + rng.integers(-30, 31), 0, 2 * SIDE))
        plan = scenes.frame(view(large, y, x), NODES)
        assert max(plan.shares.values()) <= 0.3
        placed = [w for mine in plan.ledger.placement.assignment.values() for w in mine]
        assert sorted([*placed, *plan.ledger.placement.home]) == [*plan.ledger.placement.areas]
    assert plan.scene == 0


def test_another_picture_is_another_scene_with_a_budget_of_its_own() -> None:
    dark = view(picture(12)) // 8
    dark[..., 0] = 255 - dark[..., 0]
    scenes = keeper()
    assert scenes.frame(view(picture(4)), NODES).scene == 0
    assert scenes.frame(dark, NODES).scene == 1
    scenes.new_scene()
    assert scenes.frame(dark, NODES).scene == 2


def test_regions_and_absent_parties_get_nothing() -> None:
    plan = keeper(1.0).frame(view(picture(5)), {"a", "b"}, keep_local={0, 1})
    assert {0, 1} <= set(plan.ledger.placement.home)
    assert plan.ledger.placement.assignment.keys() == {"a", "b"}
    assert plan.ledger.refusal("c-1", (2,)) is not None


def test_a_frame_that_cannot_stay_within_the_budget_is_refused_with_what_would_help() -> None:
    scenes = keeper(0.1, fallback=False)
    with pytest.raises(PlacementError, match=r"each may see 0\.1 of the scene.*edge-runtime plan"):
        scenes.frame(view(picture(6)), NODES)
    # What the user keeps at home on purpose is no reason to refuse.
    plan = keeper(0.4, fallback=False).frame(view(picture(6)), NODES, keep_local={3})
    assert plan.ledger.placement.home == (3,)


def test_a_second_choice_is_counted_by_the_scene() -> None:
    scenes = keeper(1.0)
    plan = scenes.frame(view(picture(7)), NODES)
    window, party = next(iter(plan.ledger.placement.second.items()))
    before = plan.shares[party]
    plan.ledger.reserve(f"{party}-1", [window])
    assert scenes.frame(view(picture(7)), NODES).shares[party] > before
    third = next(
        p for p in NODES if p != party and window not in plan.ledger.placement.assignment[p]
    )
    with pytest.raises(PlacementError):
        plan.ledger.reserve(f"{third}-1", [window])


def test_a_restart_goes_on_with_the_budget(tmp_path: Path) -> None:
    folder = tmp_path / "exposure"
    with ExposureStore(folder) as store:
        scenes = keeper(0.3, store=store)
        first = scenes.frame(view(picture(8)), NODES)
        scenes.close()
    (record,) = (s for s in read_contents(folder).scenes.values() if s.state == "live")
    assert not record.blanket
    assert Mosaic.from_bytes(record.snapshot).share("a") == first.shares["a"]
    with ExposureStore(folder) as store:
        scenes = keeper(0.3, store=store)
        again = scenes.frame(view(picture(8)), NODES)
        # How the camera moved in between is not known, so what a party sees now comes on top.
        assert max(again.shares.values()) <= 0.3
        assert len(again.ledger.placement.home) > len(first.ledger.placement.home)
        scenes.new_scene()
        assert scenes.frame(view(picture(8)), NODES).ledger.placement.home == ()


def test_a_still_scene_gets_an_exact_record_before_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene_module, "_STILL_FRAMES", 3)
    folder = tmp_path / "exposure"
    with ExposureStore(folder) as store:
        scenes, large = keeper(0.45, store=store), picture(9)

        def on_disk() -> tuple[bool, dict[str, float]]:
            assert store.flush(30)
            (record,) = (s for s in read_contents(folder).scenes.values() if s.state == "live")
            if record.blanket:
                return True, {}
            mosaic = Mosaic.from_bytes(record.snapshot)
            return False, {party: mosaic.share(party) for party in NODES}

        for _ in range(3):
            plan = scenes.frame(view(large), NODES)
        assert on_disk()[0]  # the blanket
        plan = scenes.frame(view(large), NODES)
        blanket, recorded = on_disk()
        assert not blanket
        assert all(recorded[party] >= plan.shares[party] for party in NODES)
        # Second choices are on record before anybody is sent one.
        for window, party in plan.ledger.placement.second.items():
            plan.ledger.reserve(f"{party}-1", [window])
        plan = scenes.frame(view(large), NODES)
        assert all(recorded[party] >= plan.shares[party] - 1e-9 for party in NODES)
        # When the camera moves again, the new record is there before the frame is sent.
        moved = scenes.frame(view(large, 0, 40), NODES)
        (record,) = (s for s in read_contents(folder).scenes.values() if s.state == "live")
        mosaic = Mosaic.from_bytes(record.snapshot)
        assert all(mosaic.share(party) >= moved.shares[party] - 1e-9 for party in NODES)


def test_after_a_crash_under_a_blanket_nothing_more_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "exposure"
    with ExposureStore(folder) as store:
        keeper(store=store).frame(view(picture(10)), NODES)  # and no close
    with ExposureStore(folder) as store:
        scenes = keeper(store=store)
        assert scenes.blanket
        plan = scenes.frame(view(picture(10)), NODES)
        assert plan.ledger.placement.assignment == {}
        assert len(plan.ledger.placement.home) == len(plan.ledger.placement.areas)
        with pytest.raises(PlacementError, match="--new-scene door"):
            keeper(store=store, fallback=False).frame(view(picture(10)), NODES)
        scenes.new_scene()
        assert scenes.frame(view(picture(10)), NODES).ledger.placement.home == ()


def spend(plan: FramePlan) -> bool:
    """Use all second choices of a frame, as far as the scene permits."""
    used = False
    for window, party in plan.ledger.placement.second.items():
        try:
            plan.ledger.reserve(f"{party}-1", [window])
            used = True
        except PlacementError:
            continue
    return used


def test_seconds_of_a_frame_count_in_its_own_scene() -> None:
    dark = view(picture(12)) // 8
    dark[..., 0] = 255 - dark[..., 0]
    scenes = keeper(1.0)
    old = scenes.frame(view(picture(7)), NODES)
    before = scenes.frame(dark, NODES)
    assert before.scene == 1
    assert spend(old)
    assert scenes.frame(dark, NODES).shares == before.shares


def test_an_exact_record_holds_the_seconds_of_every_frame_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene_module, "_STILL_FRAMES", 1)
    with ExposureStore(tmp_path / "exposure") as store:
        scenes, large = keeper(0.9, store=store), picture(9)
        scenes.frame(view(large), NODES)
        scenes.frame(view(large), NODES)
        moved = scenes.frame(view(large, 0, 40), NODES)
        scenes.frame(view(large, 0, 80), NODES)
        recorded = recorded_shares(store, tmp_path / "exposure")
        assert spend(moved)
        shares = scenes.frame(view(large, 0, 80), NODES).shares
        assert all(recorded[party] >= shares[party] - 1e-9 for party in NODES)


def recorded_shares(store: ExposureStore, folder: Path) -> dict[str, float]:
    assert store.flush(30)
    (record,) = (s for s in read_contents(folder).scenes.values() if s.state == "live")
    assert not record.blanket
    mosaic = Mosaic.from_bytes(record.snapshot)
    return {party: mosaic.share(party) for party in NODES}


def test_frames_after_a_close_are_on_record_too(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "exposure") as store:
        scenes, large = keeper(0.9, store=store), picture(9)
        first = scenes.frame(view(large), NODES)
        scenes.close()
        assert not spend(first)
        moved = scenes.frame(view(large, 40, 90), NODES)
        recorded = recorded_shares(store, tmp_path / "exposure")
        assert all(recorded[party] >= moved.shares[party] - 1e-9 for party in NODES)


def test_a_stream_without_frames_leaves_no_blanket(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "exposure") as store:
        keeper(store=store).close()
    with ExposureStore(tmp_path / "exposure") as store:
        scenes = keeper(store=store)
        assert not scenes.blanket
        assert scenes.frame(view(picture(10)), NODES).ledger.placement.home == ()


def test_another_format_of_the_same_picture_is_no_new_scene() -> None:
    scenes, large = keeper(0.4), picture(13)
    for i in range(8):
        plan = scenes.frame(np.ascontiguousarray(view(large)[: SIZE[0] - 16 * (i % 2)]), NODES)
        assert plan.scene == 0
        assert max(plan.shares.values()) <= 0.4


def test_without_any_node_the_error_says_so() -> None:
    with pytest.raises(PlacementError, match="no node can be sent this frame"):
        keeper(fallback=False).frame(view(picture(6)), ())
