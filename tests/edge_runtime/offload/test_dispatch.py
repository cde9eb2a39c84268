"""The orchestration of one image, and of several images at a time, with real nodes."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from test_offloader import alone, assert_identical, closed_port, windows_of, with_node

from edge_common.errors import OffloadError
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import Placement, place
from edge_runtime.offload import dispatch
from edge_runtime.offload.connection import Connection, NodeError, NodeRefusedError, Reply
from edge_runtime.offload.dispatch import Dispatch
from edge_runtime.offload.offloader import Offloader, image_hash
from edge_runtime.offload.report import NodeReport, RunRecord
from engines.bundle import Bundle
from engines.pipeline import Pipeline
from engines.windows import cut


@pytest.mark.process
def test_where_the_edge_computes_too_nodes_get_half_of_the_deadline(shared_fleet: Any) -> None:
    config = shared_fleet.config(deadline_s=8.0)
    assert dispatch.deadline_of_nodes(100.0, config) == 108.0
    local = msgspec.structs.replace(config, fallback="local")
    assert dispatch.deadline_of_nodes(100.0, local) == 104.0
    strict = msgspec.structs.replace(config, strict=True)
    assert dispatch.deadline_of_nodes(100.0, strict) == 104.0


@pytest.mark.process
@pytest.mark.parametrize(("fallback", "share"), [("error", 1.0), ("local", 0.5)])
def test_connections_get_the_node_s_share_of_the_deadline(
    shared_fleet: Any,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    fallback: str,
    share: float,
) -> None:
    infer, left = Connection.infer, []

    async def noting(self: Connection, feeds: Any, permit: Any, until: float) -> Reply:
        left.append(until - asyncio.get_running_loop().time())
        return await infer(self, feeds, permit, until)

    monkeypatch.setattr(Connection, "infer", noting)
    bundle = Bundle.load(shared_fleet.bundle)
    config = shared_fleet.config(deadline_s=1000.0, fallback=fallback)
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        offloader.stack(windows_of(photo, bundle))
    assert len(left) == 3
    assert all(share * 1000 - 100 < each <= share * 1000 for each in left)


def test_the_hash_of_an_image_depends_on_its_pixels_and_its_size(shared_fleet: Any) -> None:
    geometry = Bundle.load(shared_fleet.bundle).geometry
    side = geometry.image_size
    black = [cut(np.zeros((h, side, 3), np.uint8), geometry) for h in (20, 27)]
    assert black[0].pixels.tobytes() == black[1].pixels.tobytes()
    hashes = {image_hash(each) for each in black}
    spot = np.zeros((20, side, 3), np.uint8)
    spot[3, 4, 1] = 1
    hashes.add(image_hash(cut(spot, geometry)))
    assert len(hashes) == 3
    assert image_hash(cut(spot, geometry)) in hashes


def test_several_images_at_a_time_get_their_own_tokens_and_records(shared_fleet: Any) -> None:
    rng = np.random.default_rng(7)
    photos = [rng.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(8)]
    bundle = Bundle.load(shared_fleet.bundle)
    config = shared_fleet.config(max_exposure=0.25, fallback="local")
    records = [RunRecord() for _ in photos]
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        windows = [windows_of(photo, bundle) for photo in photos]
        with ThreadPoolExecutor(len(photos)) as callers:
            found = [*callers.map(offloader.stack, windows, records)]
    for photo, outputs, record in zip(photos, found, records, strict=True):
        assert_identical(outputs, alone(photo, shared_fleet.bundle))
        report = record.report()
        assert report is not None
        sent = [w for node in report.nodes for w in node.windows]
        assert set(sent) | set(report.home) == set(range(6))
        assert 0 < report.largest_share <= 0.25
        assert report.total_ms > 0


def test_the_record_can_be_read_while_the_image_is_being_sent(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ends the process does this: all bytes that have left by then are on record."""
    infer, sent, go_on = Connection.infer, threading.Event(), threading.Event()

    async def waiting(self: Connection, feeds: Any, permit: Any, until: float) -> Reply:
        reply = await infer(self, feeds, permit, until)
        if self.name == "alpha":
            sent.set()
            while not go_on.is_set():
                await asyncio.sleep(0.01)
        return reply

    monkeypatch.setattr(Connection, "infer", waiting)
    bundle, record = Bundle.load(shared_fleet.bundle), RunRecord()
    assert record.report() is None
    with (
        Pipeline(bundle, threads=1) as pipeline,
        Offloader(shared_fleet.config(), pipeline) as offloader,
        ThreadPoolExecutor(1) as caller,
    ):
        running = caller.submit(offloader.stack, windows_of(photo, bundle), record)
        try:
            assert sent.wait(30)
            report = record.report()
            assert report is not None
            assert report.nodes[0].windows
            assert report.nodes[0].bytes_up > 0
            assert (report.nodes[0].bytes_down, report.nodes[0].failure) == (0, None)
        finally:
            go_on.set()
        running.result(30)


def test_closing_during_an_image_is_an_error(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = threading.Event()

    async def never(self: Connection, feeds: Any, permit: Any, until: float) -> None:
        sent.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(Connection, "infer", never)
    bundle = Bundle.load(shared_fleet.bundle)
    with Pipeline(bundle, threads=1) as pipeline, ThreadPoolExecutor(1) as caller:
        offloader = Offloader(shared_fleet.config(), pipeline)
        try:
            running = caller.submit(offloader.stack, windows_of(photo, bundle))
            assert sent.wait(30)
        finally:
            offloader.close()
        with pytest.raises(OffloadError, match="closed") as caught:
            running.result(30)
        assert caught.value.code == "closed"


def test_a_retry_waits_as_long_as_the_node_asked_and_keeps_the_deadline(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, asked, deadlines = Connection.infer, [], set()

    async def refusing_once(self: Connection, feeds: Any, permit: Any, until: float) -> Reply:
        reply = await infer(self, feeds, permit, until)
        if self.name == "beta":
            asked.append(asyncio.get_running_loop().time())
            deadlines.add(until)
            if len(asked) == 1:
                error = NodeRefusedError.of(self.node, "busy", "refused")
                error.refusal, error.retry_ms = "overloaded", 300
                raise error
        return reply

    monkeypatch.setattr(Connection, "infer", refusing_once)
    bundle, record = Bundle.load(shared_fleet.bundle), RunRecord()
    config = shared_fleet.config(deadline_s=60.0, fallback="local")
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        offloader.stack(windows_of(photo, bundle), record)
    first, second = asked
    assert second - first >= 0.3
    assert len(deadlines) == 1  # the edge needs the rest of the time for its fallback


@pytest.mark.process
def test_the_first_failure_ends_the_image_and_gives_up_the_other_nodes(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    config = with_node(shared_fleet.config(deadline_s=200.0), "alpha", endpoint=closed_port())
    bundle, record = Bundle.load(shared_fleet.bundle), RunRecord()
    frozen = shared_fleet.nodes["beta"]
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        frozen.signal(signal.SIGSTOP)
        try:
            with pytest.raises(OffloadError, match=r"alpha .*unreachable"):
                offloader.stack(windows_of(photo, bundle), record)
        finally:
            frozen.signal(signal.SIGCONT)
    report = record.report()
    assert report is not None
    failures = {node.name: node.failure for node in report.nodes}
    assert failures["beta"] == "given up before it answered"
    assert "unreachable" in str(failures["alpha"])


def reply(milliseconds: float, size: int) -> Reply:
    each = milliseconds
    return Reply({}, size, upload_ms=each, queue_ms=each, compute_ms=each, download_ms=each)


def test_a_report_follows_from_the_ledger_and_the_events() -> None:
    placement = place([3, 2, 1, 2], [0, 2, 4, 6], 5, ["a", "b"], 1.0, bytes(32), b"x")
    record = RunRecord()
    assert record.report() is None
    ledger = record.ledger = ExposureLedger(placement)
    (a, first), (b, second) = placement.assignment.items()
    for window in first:
        ledger.reserve(a, [window]).commit(10)
    lost = ledger.reserve(b, second)
    lost.commit(100)
    lost.release()
    for milliseconds in (5.0, 7.0):
        record.replied(a, first, reply(milliseconds, 50))
    record.failed(b, "it was late")
    record.failed(b, "given up before it answered")
    record.at_home(second)
    record.total_ms = 12.0
    found = record.report()
    assert found is not None
    assert found.nodes[0] == NodeReport(
        name=a,
        windows=first,
        share_of_image=placement.exposure[a],
        bytes_up=10 * len(first),
        bytes_down=100,
        upload_ms=7.0,
        queue_ms=12.0,
        compute_ms=12.0,
        download_ms=7.0,
    )
    assert found.nodes[1] == NodeReport(b, (), 0.0, failure="it was late")
    assert (found.largest_share, found.home) == (placement.exposure[a], second)
    assert (found.windows_sent, found.windows_total) == (len(first), 25)
    assert (found.bytes_up, found.bytes_down, found.total_ms) == (10 * len(first), 100, 12.0)
    assert len(found.ledger) == 2 * len(first) + 3


def test_all_nodes_that_fail_together_are_named_in_one_error(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(self: Connection, *_: Any) -> None:
        raise NodeError.of(self.node, f"{self.name} is odd", "wrong_answer")

    monkeypatch.setattr(Connection, "infer", failing)
    bundle = Bundle.load(shared_fleet.bundle)
    with (
        Pipeline(bundle, threads=1) as pipeline,
        Offloader(shared_fleet.config(), pipeline) as offloader,
        pytest.raises(OffloadError, match=r"alpha is odd; .*beta is odd; .*gamma is odd") as caught,
    ):
        offloader.stack(windows_of(photo, bundle))
    assert caught.value.code == "wrong_answer"
    assert "--fallback local" in caught.value.mend


def placed(offloader: Offloader, assignment: dict[str, tuple[int, ...]]) -> ExposureLedger:
    """A ledger of the square toy photo's nine windows, without separation."""
    areas = dict(enumerate([256, 256, 128, 256, 256, 128, 128, 128, 64]))
    return ExposureLedger(Placement(assignment, (), 0, 0, 0.5, areas, 3))


def test_a_node_gets_the_rows_that_it_may_see_of_those_it_may_not_see_together(
    shared_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = Connection.infer

    async def failing(self: Connection, feeds: Any, permit: Any, until: float) -> Reply:
        if self.name == "beta":
            raise NodeError.of(self.node, "it serves another stack", "wrong_bundle")
        return await infer(self, feeds, permit, until)

    monkeypatch.setattr(Connection, "infer", failing)
    bundle, record = Bundle.load(shared_fleet.bundle), RunRecord()
    photo = np.random.default_rng(5).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    # Alpha may see one window more of this size, gamma none.
    parts = {"alpha": (0, 1), "beta": (3, 4), "gamma": (2, 5, 6, 7, 8)}
    config = shared_fleet.config(fallback="local", max_exposure=0.5)
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        monkeypatch.setattr(offloader, "place_photo", lambda *_: placed(offloader, parts))
        outputs = offloader.stack(windows_of(photo, bundle), record)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    report = record.report()
    assert report is not None
    seen = {node.name: node.windows for node in report.nodes}
    assert len(seen["alpha"]) == 3
    assert {*seen["alpha"], *report.home} == {0, 1, 3, 4}


def test_tokens_that_could_not_be_kept_are_no_result(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Dispatch, *_: Any) -> None:
        raise MemoryError("no memory for the tokens")

    monkeypatch.setattr(Dispatch, "_keep", full)
    bundle = Bundle.load(shared_fleet.bundle)
    with (
        Pipeline(bundle, threads=1) as pipeline,
        Offloader(shared_fleet.config(), pipeline) as offloader,
    ):
        with pytest.raises(MemoryError):
            offloader.stack(windows_of(photo, bundle))
        assert [n.under_way for n in offloader._nodes.fleet.nodes.values()] == [0, 0, 0]


@pytest.mark.process
def test_no_window_is_sent_to_a_node_whose_link_is_down(make_fleet: Any, photo: np.ndarray) -> None:
    fleet = make_fleet("alpha", "beta", "gamma")
    bundle, record = Bundle.load(fleet.bundle), RunRecord()
    config = fleet.config(fallback="local", max_exposure=0.5)
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        offloader.stack(windows_of(photo, bundle))
        offloader._nodes.local_s = 0.2  # less than the wait for the link, more than a node takes
        fleet.nodes["beta"].kill()
        link = offloader._nodes.connections["beta"].link
        while link is not None and link.state == "up":
            link = offloader._nodes.connections["beta"].link
        outputs = offloader.stack(windows_of(photo, bundle), record)
    assert_identical(outputs, alone(photo, fleet.bundle))
    assert record.ledger is not None
    assert record.ledger.nodes["beta"] == ("beta",)
    assert not record.ledger.asked("beta")


def test_an_image_cancelled_twice_leaves_nothing_reserved(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ending = threading.Event(), threading.Event()

    async def slow_to_end(self: Connection, *_: Any) -> None:
        try:
            asked.set()
            await asyncio.sleep(3600)
        finally:
            ending.set()
            await asyncio.sleep(0.2)

    monkeypatch.setattr(Connection, "infer", slow_to_end)
    bundle, record = Bundle.load(shared_fleet.bundle), RunRecord()
    config = shared_fleet.config()
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        windows = windows_of(photo, bundle)
        place_ = partial(offloader.place_photo, windows)
        run = Dispatch(windows, place_, offloader._nodes, pipeline, config, record)

        async def cancelled_twice() -> None:
            task = asyncio.create_task(run.run())
            for event in (asked, ending):
                while not event.is_set():
                    await asyncio.sleep(0.001)
                task.cancel()
            await asyncio.wait([task])

        offloader._background.call(cancelled_twice())
        assert [n.under_way for n in offloader._nodes.fleet.nodes.values()] == [0, 0, 0]
    assert record.ledger is not None
    assert {permit.state for permit in record.ledger.permits} == {"released"}
