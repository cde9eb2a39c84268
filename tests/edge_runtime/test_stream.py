"""Frames of a stream through real nodes: right, in order, and never more than what changed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_common.errors import ConfigError, ImageError, OffloadError, PlacementError, RecordError
from edge_runtime.exposure.store import read_contents
from edge_runtime.offload.connection import Connection, NodeError
from edge_runtime.offload.offloader import Offloader
from edge_runtime.predictor import OffloadPredictor
from edge_runtime.stream import Frame, FrameResult, FrameStream

pytestmark = pytest.mark.process

MASKS: dict[int, np.ndarray] = {}
CLICK: dict[str, Any] = {"point_coords": np.array([[40, 20]]), "point_labels": np.array([1])}


@pytest.fixture
def fleet(five_nodes: Any) -> Any:
    return five_nodes


def moving(count: int, seed: int = 0, step: int = 3) -> list[np.ndarray]:
    """A still, textured picture over which a square moves."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 200, (60, 90, 3), dtype=np.uint8)
    frames = []
    for i in range(count):
        frame = ground.copy()
        frame[5:11, (step * i) % 80 : (step * i) % 80 + 6] = 255
        frames.append(frame)
    return frames


def collect(predictor: OffloadPredictor, source: Any, **options: Any) -> list[FrameResult]:
    async def work() -> list[FrameResult]:
        async with predictor.stream("door", **options) as stream:
            return [result async for result in stream.results(source)]

    results = asyncio.run(work())
    for result in results:  # while the engines are open
        if result.encoded is not None:
            MASKS[id(result.encoded)] = result.encoded.predict(**CLICK).masks
    return results


def assert_right(results: list[FrameResult], frames: list[np.ndarray], bundle: Path) -> None:
    """Every embedding and mask equals the one of a single process, bit by bit."""
    assert [result.number for result in results] == [*range(len(frames))]
    with OffloadPredictor(bundle=bundle, threads=1) as alone:
        for result, frame in zip(results, frames, strict=True):
            assert result.error is None
            assert result.encoded is not None
            alone.set_image(frame)
            np.testing.assert_array_equal(result.encoded.features, alone.features)
            np.testing.assert_array_equal(
                MASKS.pop(id(result.encoded)), alone.predict(**CLICK).masks
            )


def test_every_frame_is_right_and_only_what_changed_is_sent(fleet: Any, tmp_path: Path) -> None:
    frames = moving(30)
    config = fleet.config(max_exposure=0.5, exposure=str(tmp_path / "record"), recompute=0.0)
    with OffloadPredictor(config, threads=1) as predictor:
        results = collect(predictor, frames)
    assert_right(results, frames, fleet.bundle)
    changed = sent = 0
    for i, result in enumerate(results):
        report = result.report
        assert report is not None
        assert report.scene == 0
        assert max(report.shares.values()) <= 0.5
        assert report.offload is not None
        assert sorted([*report.reused, *seen(result)]) == list(range(6))
        sent += report.offload.windows_sent
        before = {frame.tobytes() for frame in frames[:i]}
        changed += frames[i].tobytes() not in before
    assert sent <= 6 + 2 * changed  # the square lies in at most two windows
    (scene,) = read_contents(tmp_path / "record").scenes.values()
    assert (scene.stream, scene.blanket) == ("door", False)


def seen(result: FrameResult) -> set[int]:
    assert result.report is not None
    assert result.report.offload is not None
    return {w for node in result.report.offload.nodes for w in node.windows}


def test_a_still_camera_sends_nothing_after_the_first_frame(fleet: Any) -> None:
    frames = [moving(1)[0]] * 12
    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        results = collect(predictor, iter(frames))
    assert_right(results, frames, fleet.bundle)
    assert [len(seen(result)) for result in results] == [6] + [0] * 11


def test_a_constant_rate_sends_every_window_to_the_same_party(fleet: Any) -> None:
    frames = [moving(1)[0]] * 5
    with OffloadPredictor(fleet.config(constant_rate=True), threads=1) as predictor:
        results = collect(predictor, frames)
    assert_right(results, frames, fleet.bundle)
    assert [len(seen(result)) for result in results] == [6] * 5
    shares = [result.report.shares for result in results if result.report]
    assert all(share == shares[0] for share in shares)


def test_regions_of_settings_and_frame_stay(fleet: Any) -> None:
    config = fleet.config(keep_local=((0.0, 0.0, 4.0, 4.0),), constant_rate=True)
    frames = moving(3)
    source = [Frame(frames[0]), Frame(frames[1], ((85.0, 55.0, 90.0, 60.0),)), Frame(frames[2])]
    with OffloadPredictor(config, threads=1) as predictor:
        results = collect(predictor, source)
    assert_right(results, frames, fleet.bundle)
    home = [result.report.offload.home for result in results if result.report]
    assert [set(each) for each in home] == [{0}, {0, 5}, {0}]
    assert all(not set(each) & seen(result) for each, result in zip(home, results, strict=True))


def test_a_frame_that_fails_is_refused_and_the_stream_goes_on(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, asked = Connection.infer, []

    async def failing(self: Connection, feeds: Any, permit: Any, until: float) -> Any:
        asked.append(self.name)
        if 6 < len(asked) <= 20:
            raise NodeError.of(self.node, "broken", "wrong_bundle")
        return await infer(self, feeds, permit, until)

    monkeypatch.setattr(Connection, "infer", failing)
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(20)]
    config = fleet.config(budget="frame", deadline_s=5.0)
    with OffloadPredictor(config, threads=1) as predictor:
        results = collect(predictor, frames, depth=1)
    assert [result.number for result in results] == [*range(20)]
    refused = [result for result in results if result.error is not None]
    assert 0 < len(refused) < 20
    for result in refused:
        assert isinstance(result.error, OffloadError)
        assert result.encoded is None
        assert result.report is not None
    assert results[0].error is None
    assert results[-1].error is None


def test_what_no_party_may_see_is_computed_here_or_refused(fleet: Any) -> None:
    """Pictures of a pan: no party may see more than 0.25 of it."""
    rng = np.random.default_rng(2)
    large = rng.integers(0, 256, (60, 800, 3), dtype=np.uint8)
    frames = [np.ascontiguousarray(large[:, 6 * i : 6 * i + 90]) for i in range(20)]
    with OffloadPredictor(
        fleet.config(max_exposure=0.25, fallback="local", recompute=0.0), threads=1
    ) as predictor:
        results = collect(predictor, frames)
    assert_right(results, frames, fleet.bundle)
    for result in results:
        assert result.report is not None
        assert max(result.report.shares.values()) <= 0.25
    with OffloadPredictor(fleet.config(max_exposure=0.25), threads=1) as predictor:
        results = collect(predictor, frames)
    for result in results:
        if result.error is not None:
            assert isinstance(result.error, PlacementError)
            assert "edge-runtime plan" in str(result.error)


def test_without_nodes_everything_is_computed_here(fleet: Any) -> None:
    frames = moving(6)
    local = msgspec.structs.replace(fleet.config(), mode="local")
    for predictor in (OffloadPredictor(bundle=fleet.bundle), OffloadPredictor(local)):
        with predictor:
            results = collect(predictor, frames)
            assert_right(results, frames, fleet.bundle)
            reports = [result.report for result in results if result.report]
            assert {report.choice.place for report in reports} == {"edge"}
            assert all(report.offload is None for report in reports)
            assert reports[-1].reused


def test_the_latest_frame_wins(fleet: Any) -> None:
    """A camera that is far faster than the nodes: old frames are left out, the last one is not."""
    frames = moving(40, step=1)
    gate = threading.Event()

    async def camera() -> AsyncIterator[np.ndarray]:
        for i, frame in enumerate(frames):
            if i == len(frames) - 1:
                gate.set()
            yield frame

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        results = collect(predictor, camera(), policy="latest", depth=1)
    assert gate.is_set()
    numbers = [result.number for result in results]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 39
    assert len(numbers) < 40
    with OffloadPredictor(bundle=fleet.bundle, threads=1) as alone:
        alone.set_image(frames[39])
        assert results[-1].encoded is not None
        np.testing.assert_array_equal(results[-1].encoded.features, alone.features)


def test_an_error_of_the_source_comes_after_the_frames_before_it(fleet: Any) -> None:
    def source() -> Iterator[np.ndarray]:
        yield from moving(2)
        raise ValueError("the camera was unplugged")

    got = []

    async def work(predictor: OffloadPredictor) -> None:
        async with predictor.stream() as stream:
            async for result in stream.results(source()):
                got.append(result.number)

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        with pytest.raises(ValueError, match="unplugged"):
            asyncio.run(work(predictor))
        assert got == [0, 1]


def test_leaving_early_leaves_no_task(fleet: Any) -> None:
    async def work(predictor: OffloadPredictor) -> None:
        stream = predictor.stream()
        results = stream.results(moving(50))
        async for result in results:
            if result.number == 2:
                break
        await results.aclose()  # type: ignore[attr-defined]
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left
        stream.close()

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        asyncio.run(work(predictor))
        nodes = predictor.offloader._nodes.fleet.nodes.values()  # type: ignore[union-attr]
        assert all(node.under_way == 0 for node in nodes)
        predictor.set_image(moving(1)[0])


def test_a_bundle_without_a_stack_can_be_streamed(tmp_path: Path, make_toy_bundle: Any) -> None:
    stock = make_toy_bundle(tmp_path / "stock", stock=True)
    frames = moving(3)
    with OffloadPredictor(bundle=stock, threads=1) as predictor:
        results = collect(predictor, frames)
    assert_right(results, frames, stock)


def test_items_that_are_no_frames_are_refused_and_the_stream_goes_on(fleet: Any) -> None:
    good = moving(1)[0]
    source = [good, None, good[..., 0], Frame(good, (0, 0, 4, 4)), good]  # type: ignore[arg-type]
    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        results = collect(predictor, source)
    assert [type(result.error) for result in results] == [
        type(None),
        ImageError,
        ImageError,
        ConfigError,
        type(None),
    ]


def test_without_any_node_the_edge_computes_every_window(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Offloader, "usable", lambda self: set())
    frames = moving(2)
    with OffloadPredictor(fleet.config(fallback="local"), threads=1) as predictor:
        results = collect(predictor, frames)
    assert_right(results, frames, fleet.bundle)


def test_a_name_belongs_to_one_open_stream_and_keeps_its_budget(fleet: Any, tmp_path: Path) -> None:
    record = str(tmp_path / "record")
    shares, frames = [], moving(2)
    for exposure in (record, None):
        config = msgspec.structs.replace(fleet.config(recompute=0.0), exposure=exposure)
        with OffloadPredictor(config, threads=1) as predictor:
            first = predictor.stream("door")
            with pytest.raises(RecordError, match="'door' is open already"):
                predictor.stream("door")
            first.close()
            shares = []
            for _ in range(2):  # one after the other they share a scene
                for result in collect(predictor, frames):
                    assert result.report is not None
                    shares.append(result.report.shares)
                    assert result.report.scene == 0
            second = predictor.stream("door")
            first.close()  # again, which leaves the second one open
            with pytest.raises(RecordError, match="'door' is open already"):
                predictor.stream("door")
            second.close()
        assert shares[-1] == shares[0]


def test_a_predictor_that_is_closed_leaves_an_exact_record(fleet: Any, tmp_path: Path) -> None:
    async def work(predictor: OffloadPredictor) -> None:
        stream = predictor.stream("door")
        async for result in stream.results(moving(3)):
            assert result.error is None
        await asyncio.to_thread(predictor.close)
        refused = [result.error async for result in stream.results(moving(2))]
        assert [type(error) for error in refused] == [OffloadError] * 2
        stream.close()

    config = fleet.config(exposure=str(tmp_path / "record"))
    with OffloadPredictor(config, threads=1) as predictor:
        asyncio.run(work(predictor))
    (scene,) = read_contents(tmp_path / "record").scenes.values()
    assert not scene.blanket


def test_a_predictor_that_is_closed_under_a_frame_refuses_it(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    async def never(self: Connection, feeds: Any, permit: Any, until: float) -> Any:
        asked.set()
        await asyncio.Event().wait()

    async def work(predictor: OffloadPredictor) -> list[FrameResult]:
        async def closing() -> None:
            await asyncio.to_thread(asked.wait)
            await asyncio.to_thread(predictor.close)

        task = asyncio.create_task(closing())
        async with predictor.stream() as stream:
            results = [result async for result in stream.results(moving(4))]
        await task
        return results

    monkeypatch.setattr(Connection, "infer", never)
    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        results = asyncio.run(work(predictor))
    assert len(results) == 4
    assert all(result.error is not None for result in results)


def test_a_stream_is_read_by_one_reader_at_a_time(fleet: Any) -> None:
    async def twice(stream: FrameStream) -> None:
        first = stream.results(moving(4))
        await first.__anext__()
        with pytest.raises(RuntimeError, match="being read already"):
            await stream.results(moving(4)).__anext__()
        await first.aclose()  # type: ignore[attr-defined]

    async def whole(stream: FrameStream) -> None:
        assert len([result async for result in stream.results(moving(4))]) == 4

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        stream = predictor.stream()
        for work in (twice, whole, whole):  # each in an event loop of its own
            asyncio.run(work(stream))
        stream.close()


def test_a_stream_that_is_left_with_its_results_open_ends_them(fleet: Any) -> None:
    async def work(predictor: OffloadPredictor) -> None:
        async with predictor.stream() as stream:
            results = stream.results(moving(50))
            await results.__anext__()
        assert not asyncio.all_tasks() - {asyncio.current_task()}

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        asyncio.run(work(predictor))


def test_a_source_that_never_waits_does_not_stop_the_others(fleet: Any) -> None:
    async def work(predictor: OffloadPredictor) -> None:
        ended = False

        async def camera() -> AsyncIterator[np.ndarray]:
            for _ in range(10**6):  # far more than the test has time for
                if ended:
                    return
                yield moving(1)[0]
            raise AssertionError("nothing else had a turn")

        async with predictor.stream(policy="latest") as stream:
            async for _ in stream.results(camera()):
                ended = True

    with OffloadPredictor(fleet.config(), threads=1) as predictor:
        asyncio.run(asyncio.wait_for(work(predictor), 60))


def test_tokens_of_a_node_that_was_turned_away_are_not_used_again(fleet: Any) -> None:
    frame = moving(1)[0]
    config = fleet.config(fallback="local", recompute=0.0)

    async def work(predictor: OffloadPredictor) -> list[FrameResult]:
        offloader = predictor.offloader
        assert offloader is not None

        async def source() -> AsyncIterator[np.ndarray]:
            yield frame
            yield frame
            offloader._nodes.connections["alpha"].quarantine = "it lied"
            yield frame

        async with predictor.stream(depth=1) as stream:
            return [result async for result in stream.results(source())]

    with OffloadPredictor(config, threads=1) as predictor:
        first, second, third = asyncio.run(work(predictor))
    assert first.report is not None
    assert first.report.offload is not None
    (of_alpha,) = [n.windows for n in first.report.offload.nodes if n.name == "alpha"]
    assert of_alpha
    assert second.report is not None
    assert second.report.reused == (0, 1, 2, 3, 4, 5)
    assert third.report is not None
    assert set(third.report.reused) == {*range(6)} - {*of_alpha}
