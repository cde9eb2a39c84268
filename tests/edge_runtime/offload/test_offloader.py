"""Offloading over real sockets to real `cloud-node` processes, both healthy and broken."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_common.errors import (
    BundleError,
    ConfigError,
    KeyFileError,
    OffloadError,
    PlacementError,
)
from edge_runtime.config import EdgeConfig
from edge_runtime.imaging.images import resize_longest
from edge_runtime.offload import offloader as offload_module
from edge_runtime.offload.connection import Connection, NodeRefusedError, Reply
from edge_runtime.offload.offloader import Offloader
from edge_runtime.offload.report import OffloadReport, RunRecord
from engines.bundle import Bundle
from engines.ort import OrtEngine
from engines.pipeline import Pipeline
from engines.windows import Windows, cut
from transport.keys import generate

pytestmark = pytest.mark.process


def windows_of(photo: np.ndarray, bundle: Bundle) -> Windows:
    return cut(resize_longest(photo, bundle.geometry.image_size), bundle.geometry)


def offload(
    config: EdgeConfig, photo: np.ndarray, bundle: Path | None = None
) -> tuple[dict[str, np.ndarray], OffloadReport]:
    loaded = Bundle.load(bundle or str(config.bundle))
    with Pipeline(loaded, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        return stack(offloader, windows_of(photo, loaded))


def stack(offloader: Offloader, windows: Windows) -> tuple[dict[str, np.ndarray], OffloadReport]:
    record = RunRecord()
    outputs = offloader.stack(windows, record)
    report = record.report()
    assert report is not None
    return outputs, report


def alone(photo: np.ndarray, bundle: Path) -> dict[str, np.ndarray]:
    """Run all windows in one batch in this process."""
    loaded = Bundle.load(bundle)
    with Pipeline(loaded, threads=1) as pipeline:
        return pipeline.stack(pipeline.stack_inputs(windows_of(photo, loaded)))


def assert_identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes()


def with_node(config: EdgeConfig, name: str, **changes: str) -> EdgeConfig:
    nodes = tuple(
        msgspec.structs.replace(node, **changes) if node.name == name else node
        for node in config.nodes
    )
    return msgspec.structs.replace(config, nodes=nodes)


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


# -- healthy nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_request", [None, 1])
@pytest.mark.parametrize("shape", [(60, 90), (90, 90), (90, 7), (1, 1), (1, 10_000)])
def test_offloaded_is_bit_identical_to_one_batch(
    shape: tuple[int, int], per_request: int | None, shared_fleet: Any
) -> None:
    photo = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = shared_fleet.config(windows_per_request=per_request, max_exposure=0.6)
    outputs, report = offload(config, photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    windows = windows_of(photo, Bundle.load(shared_fleet.bundle))
    sent = sorted(w for node in report.nodes for w in node.windows)
    assert sent == windows.window.tolist()  # each once, without the all-padding ones
    assert (report.windows_sent, report.windows_total, report.home) == (len(sent), 9, ())
    for event in ("reserved", "committed"):
        entries = [entry for entry in report.ledger if entry.event == event]
        assert sorted(w for entry in entries for w in entry.windows) == sent
        if per_request:
            assert len(entries) == len(sent)
    assert {entry.event for entry in report.ledger} == {"reserved", "committed"}
    assert report.largest_share == max(node.share_of_image for node in report.nodes) <= 0.6


def test_report_adds_up_and_is_plain_data(shared_fleet: Any, photo: np.ndarray) -> None:
    outputs, report = offload(shared_fleet.config(), photo)
    tokens = sum(array.nbytes for array in outputs.values())
    assert tokens < report.bytes_down < tokens + 3 * 600
    pixels = windows_of(photo, Bundle.load(shared_fleet.bundle)).pixels.nbytes
    assert pixels < report.bytes_up < pixels + 3 * 600
    for node in report.nodes:
        assert node.failure is None
        assert node.compute_ms > 0
        assert node.upload_ms > 0
        assert node.share_of_image <= 0.5
    assert report.separation == 4
    again = msgspec.json.decode(msgspec.json.encode(report), type=OffloadReport)
    assert again == report


def test_the_same_photo_is_placed_the_same_way_again(shared_fleet: Any, photo: np.ndarray) -> None:
    def who_saw(config: EdgeConfig, image: np.ndarray) -> dict[str, tuple[int, ...]]:
        return {node.name: node.windows for node in offload(config, image)[1].nodes}

    config = shared_fleet.config()
    first = who_saw(config, photo)
    turned = msgspec.structs.replace(config, nodes=config.nodes[::-1])
    assert who_saw(turned, photo) == first
    others = [who_saw(config, photo ^ np.uint8(mask)) for mask in range(1, 5)]
    assert any(other != first for other in others)
    # Exchanged names: each machine still sees the windows that it saw before.
    names = [node.name for node in config.nodes]
    new = dict(zip(names, [*names[1:], names[0]], strict=True))
    renamed = tuple(msgspec.structs.replace(node, name=new[node.name]) for node in config.nodes)
    found = who_saw(msgspec.structs.replace(config, nodes=renamed), photo)
    assert found == {new[name]: windows for name, windows in first.items()}


def test_hidden_states_instead_of_pixels(
    make_toy_bundle: Callable[..., Path],
    make_fleet: Callable[..., Any],
    tmp_path: Path,
    photo: np.ndarray,
) -> None:
    bundle = make_toy_bundle(tmp_path / "head", head=True)
    fleet = make_fleet("alpha", "beta", bundle=bundle)
    outputs, report = offload(fleet.config(max_exposure=0.7), photo)
    assert_identical(outputs, alone(photo, bundle))
    hidden = report.windows_sent * 16 * 8 * 4
    assert hidden < report.bytes_up < hidden + 2 * 600


def test_embedding_of_sam_itself_is_bit_identical(
    random_bundle: Path, make_fleet: Callable[..., Any]
) -> None:
    photo = np.random.default_rng(5).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    fleet = make_fleet("alpha", "beta", "gamma", bundle=random_bundle)
    outputs, report = offload(fleet.config(), photo)
    assert_identical(outputs, alone(photo, random_bundle))
    assert report.largest_share <= 0.37
    loaded = Bundle.load(random_bundle)
    windows = windows_of(photo, loaded)
    with Pipeline(loaded, threads=1) as pipeline:
        embedded = pipeline.embed(windows)
        assert pipeline.tail(outputs, windows).tobytes() == embedded.tobytes()


# -- failing nodes ------------------------------------------------------------------------------


def test_a_missing_node_is_named(shared_fleet: Any, photo: np.ndarray) -> None:
    config = with_node(shared_fleet.config(), "beta", endpoint=closed_port())
    with pytest.raises(OffloadError, match=r"node beta \(tcp.*unreachable.*--fallback local"):
        offload(config, photo)


def test_the_edge_takes_over_for_a_missing_node(shared_fleet: Any, photo: np.ndarray) -> None:
    healthy = offload(shared_fleet.config(), photo)[1]
    config = with_node(shared_fleet.config(fallback="local"), "beta", endpoint=closed_port())
    outputs, report = offload(config, photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    before = {node.name: node.windows for node in healthy.nodes}
    # Another node may see what the budget leaves room for.
    seen = {node.name: set(node.windows) for node in report.nodes}
    assert seen["beta"] == set()
    assert seen["alpha"] >= set(before["alpha"])
    assert seen["gamma"] >= set(before["gamma"])
    assert set(report.home) == set(range(6)) - seen["alpha"] - seen["gamma"]
    assert report.windows_sent == 6 - len(report.home)
    assert report.largest_share <= 0.5
    failures = {node.name: node.failure for node in report.nodes}
    assert "unreachable" in str(failures.pop("beta"))
    assert failures == {"alpha": None, "gamma": None}


def test_all_nodes_missing_is_an_error_or_computed_by_the_edge(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    config = shared_fleet.config(fallback="local")
    for name in shared_fleet.nodes:
        config = with_node(config, name, endpoint=closed_port())
    outputs, report = offload(config, photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    assert (len(report.home), report.bytes_up, report.bytes_down) == (6, 0, 0)
    assert (report.windows_sent, report.largest_share) == (0, 0)  # no node existed to see anything
    with pytest.raises(OffloadError, match="unreachable"):
        offload(msgspec.structs.replace(config, fallback="error"), photo)


def test_a_frozen_node_ends_in_an_error_or_in_the_fallback(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    """The node freezes before the connection or during the request."""
    config = shared_fleet.config(deadline_s=3.0)
    local = msgspec.structs.replace(config, fallback="local", deadline_s=8.0)
    frozen = shared_fleet.nodes["alpha"]
    bundle = Bundle.load(shared_fleet.bundle)
    windows = windows_of(photo, bundle)
    right = alone(photo, shared_fleet.bundle)
    with Pipeline(bundle, threads=1) as pipeline, Offloader(local, pipeline) as connected:
        assert stack(connected, windows)[1].home == ()
        frozen.signal(signal.SIGSTOP)
        try:
            with pytest.raises(OffloadError, match="node alpha "):
                offload(config, photo)
            outputs, report = stack(connected, windows)
        finally:
            frozen.signal(signal.SIGCONT)
        assert_identical(outputs, right)
        assert "alpha" in {node.name for node in report.nodes if node.failure}
        elsewhere = {w for node in report.nodes[1:] for w in node.windows} | set(report.home)
        assert elsewhere >= set(report.nodes[0].windows)


def test_a_node_that_dies_while_computing_is_noticed_at_once(
    make_fleet: Callable[..., Any], photo: np.ndarray
) -> None:
    fleet = make_fleet("alpha", "beta")
    bundle = Bundle.load(fleet.bundle)
    windows = windows_of(photo, bundle)
    config = fleet.config(max_exposure=0.7, deadline_s=3600.0)  # the deadline can't be the cause
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        offloader.stack(windows)
        fleet.nodes["alpha"].signal(signal.SIGSTOP)
        timer = threading.Timer(0.3, fleet.nodes["alpha"].kill)
        timer.start()
        with pytest.raises(OffloadError, match=r"node alpha .*connection lost"):
            offloader.stack(windows)
        timer.join()
        with pytest.raises(OffloadError, match=r"node alpha .*(connection lost|unreachable)"):
            offloader.stack(windows)


def test_a_node_without_this_edge_s_key_is_reported(
    shared_fleet: Any, photo: np.ndarray, tmp_path: Path
) -> None:
    generate(tmp_path, "stranger")
    config = with_node(shared_fleet.config(), "gamma", client_key=str(tmp_path / "stranger.key"))
    with pytest.raises(OffloadError, match=r"node gamma .*not authorised on the node"):
        offload(config, photo)
    outputs, report = offload(msgspec.structs.replace(config, fallback="local"), photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    assert report.home
    assert report.nodes[2].windows == ()


def test_a_node_with_an_unexpected_key_is_reported(
    shared_fleet: Any, photo: np.ndarray, tmp_path: Path
) -> None:
    generate(tmp_path, "other")
    config = with_node(shared_fleet.config(), "alpha", server_key=str(tmp_path / "other.pub"))
    with pytest.raises(OffloadError, match=r"node alpha .*wrong server key"):
        offload(config, photo)


def test_nodes_with_another_bundle_are_named_and_sent_nothing(
    shared_fleet: Any,
    photo: np.ndarray,
    tmp_path: Path,
    make_toy_bundle: Callable[..., Path],
) -> None:
    other = make_toy_bundle(tmp_path / "other", head=True)
    digests = [Bundle.load(b).stage("stack").sha256[:12] for b in (shared_fleet.bundle, other)]
    logs = {name: len(node.logged()) for name, node in shared_fleet.nodes.items()}
    with pytest.raises(OffloadError, match=r"it serves toy fp32.*this edge has") as caught:
        offload(shared_fleet.config(), photo, other)
    assert all(digest in str(caught.value) for digest in digests)
    report = offload(shared_fleet.config(fallback="local"), photo, other)[1]
    assert (report.windows_sent, len(report.home), report.bytes_up) == (0, 6, 0)
    assert all("it serves toy fp32" in str(node.failure) for node in report.nodes)
    for name, node in shared_fleet.nodes.items():  # a node logs each request that it refuses
        assert "refused" not in node.logged()[logs[name] :]


# -- budget, deadline, set-up -------------------------------------------------------------------


def test_a_budget_that_the_nodes_cannot_meet_sends_nothing(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    with pytest.raises(PlacementError, match="what would suffice"):
        offload(shared_fleet.config(max_exposure=0.2), photo)


def test_windows_beyond_the_budget_are_computed_by_the_edge_with_fallback(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    outputs, report = offload(shared_fleet.config(max_exposure=0.25, fallback="local"), photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    assert report.home
    assert 0 < report.largest_share <= 0.25
    assert not set(report.home) & {w for node in report.nodes for w in node.windows}


@pytest.mark.parametrize("work", ["place", "image_hash"])
def test_placing_and_hashing_do_not_block_the_network_loop(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    real, threads = getattr(offload_module, work), []

    def noting(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*arguments, **options)

    monkeypatch.setattr(offload_module, work, noting)
    offload(shared_fleet.config(), photo)
    assert len(threads) == 1
    assert threads[0] != "edge-network"


def test_a_deadline_too_short_is_an_error_even_with_fallback(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    with pytest.raises(OffloadError):
        offload(shared_fleet.config(deadline_s=1e-6), photo)
    with pytest.raises(OffloadError, match="when the deadline of 1e-06 s passed"):
        offload(shared_fleet.config(deadline_s=1e-6, fallback="local"), photo)


@pytest.mark.parametrize(
    ("owner", "slow", "doing"),
    [
        (Pipeline, "stack_inputs", "the edge was still preparing what the nodes are sent"),
        (OrtEngine, "run", "the deadline passed while waiting for the edge"),
    ],
)
def test_the_edge_s_own_engine_cannot_outlast_the_deadline(
    shared_fleet: Any,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    slow: str,
    doing: str,
) -> None:
    enough = threading.Event()
    real = getattr(owner, slow)

    def waiting(*arguments: Any) -> Any:
        enough.wait(60)
        return real(*arguments)

    monkeypatch.setattr(owner, slow, waiting)
    config = shared_fleet.config(deadline_s=4.0, max_exposure=0.25, fallback="local")
    bundle = Bundle.load(shared_fleet.bundle)
    with Pipeline(bundle, threads=1) as pipeline, Offloader(config, pipeline) as offloader:
        try:
            with pytest.raises(OffloadError, match=doing):
                offloader.stack(windows_of(photo, bundle))
        finally:
            assert not enough.is_set()
            enough.set()


def refusing(
    monkeypatch: pytest.MonkeyPatch, times: int, retry_ms: int, node: str = "beta"
) -> list[tuple[int, ...]]:
    """Make a node refuse its first requests. Returns the windows of every request."""
    asked: list[tuple[int, ...]] = []
    infer = Connection.infer

    async def first_refused(self: Connection, feeds: Any, permit: Any, until: float) -> Reply:
        reply = await infer(self, feeds, permit, until)
        if self.name == node:
            asked.append(permit.windows)
            if len(asked) <= times:
                refused = NodeRefusedError.of(self.node, "busy", "refused")
                refused.refusal, refused.retry_ms = "overloaded", retry_ms
                raise refused
        return reply

    monkeypatch.setattr(Connection, "infer", first_refused)
    return asked


def test_a_busy_node_is_asked_once_more_and_sees_nothing_new(
    shared_fleet: Any, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refusing(monkeypatch, times=1, retry_ms=20)
    outputs, report = offload(shared_fleet.config(), photo)
    assert_identical(outputs, alone(photo, shared_fleet.bundle))
    assert len(asked) == 2
    assert set(asked[1]) <= set(asked[0])  # another node may have taken some
    beta = next(node for node in report.nodes if node.name == "beta")
    assert beta.windows == asked[0]
    # If another node took some of the windows, beta has not returned all that it was asked for.
    assert beta.failure is None or asked[1] != asked[0]
    assert report.largest_share <= 0.5
    again = [entry for entry in report.ledger if entry.node == "beta"]
    assert [entry.event for entry in again] == ["reserved", "committed"] * 2
    assert len({entry.share_of_image for entry in again}) == 1
    assert again[2].reason == again[3].reason == "retry"


@pytest.mark.parametrize(("retry_ms", "times"), [(20, 5), (0, 5), (3_600_000, 1)])
def test_retries_end_after_a_few_and_before_the_deadline(
    shared_fleet: Any,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    retry_ms: int,
    times: int,
) -> None:
    asked = refusing(monkeypatch, 1000, retry_ms)
    with pytest.raises(OffloadError, match="busy"):
        offload(shared_fleet.config(), photo)
    assert len(asked) == times
    assert all(set(again) <= set(asked[0]) for again in asked)


def test_simultaneous_failures_leave_no_asyncio_warning(
    shared_fleet: Any,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def failing(*arguments: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Connection, "infer", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        offload(shared_fleet.config(), photo)
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_the_memory_watch_goes_on_after_an_error_of_its_own(
    shared_fleet: Any,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Watch:
        looks = 0

        def __init__(self, limit: int) -> None:
            assert limit == 900_000

        def breached(self) -> int | None:
            Watch.looks += 1
            if Watch.looks == 1:
                raise OSError("odd")
            return 950_000 if Watch.looks == 2 else None

    monkeypatch.setattr(offload_module, "memory_limit", lambda: 1_000_000)
    monkeypatch.setattr(offload_module, "MemoryWatch", Watch)
    monkeypatch.setattr(offload_module, "_MEMORY_S", 0.01)
    monkeypatch.setattr(offload_module, "_MEMORY_REST_S", 0.01)
    bundle = Bundle.load(shared_fleet.bundle)
    with Pipeline(bundle) as pipeline, Offloader(shared_fleet.config(), pipeline) as offloader:
        while Watch.looks < 3:
            time.sleep(0.01)
        offloader.stack(windows_of(photo, bundle))
    assert "watching this process's memory failed" in caplog.text
    assert "has dropped its connections" in caplog.text


def test_an_error_leaves_the_offloader_usable(shared_fleet: Any, photo: np.ndarray) -> None:
    bundle = Bundle.load(shared_fleet.bundle)
    with Pipeline(bundle, threads=1) as pipeline:
        offloader = Offloader(shared_fleet.config(max_exposure=0.5), pipeline)
        with offloader:
            wide = np.broadcast_to(photo[:1], (1, 90, 3))
            offloader.config = msgspec.structs.replace(offloader.config, max_exposure=0.1)
            with pytest.raises(PlacementError):
                offloader.stack(windows_of(photo, bundle))
            offloader.config = msgspec.structs.replace(offloader.config, max_exposure=0.6)
            offloader.stack(windows_of(wide, bundle))
        offloader.close()
        with pytest.raises(OffloadError, match="closed"):
            offloader.stack(windows_of(photo, bundle))


def test_a_stock_bundle_cannot_be_offloaded(
    shared_fleet: Any, tmp_path: Path, make_toy_bundle: Callable[..., Path]
) -> None:
    stock = make_toy_bundle(tmp_path / "stock", stock=True)
    with Pipeline(Bundle.load(stock)) as pipeline, pytest.raises(BundleError, match="stock"):
        Offloader(shared_fleet.config(), pipeline)


def test_configuration_errors_start_nothing(shared_fleet: Any, tmp_path: Path) -> None:
    before = threading.active_count()
    config = shared_fleet.config()
    with Pipeline(Bundle.load(shared_fleet.bundle)) as pipeline:
        with pytest.raises(KeyFileError, match="edge-runtime keys"):
            Offloader(msgspec.structs.replace(config, secret=str(tmp_path / "no.secret")), pipeline)
        shared_key = config.nodes[0].client_key
        with pytest.raises(ConfigError, match="same client key"):
            Offloader(with_node(config, "beta", client_key=shared_key), pipeline)
    assert threading.active_count() == before


def test_threads_and_sockets_are_released(shared_fleet: Any, photo: np.ndarray) -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    offload(shared_fleet.config(), photo)
    before, closed = held(), []
    bundle = Bundle.load(shared_fleet.bundle)
    for _ in range(3):
        with (
            Pipeline(bundle, threads=1) as pipeline,
            Offloader(shared_fleet.config(), pipeline) as offloader,
        ):
            offloader.stack(windows_of(photo, bundle))
        closed.append(offloader)  # close() must release them, not the garbage collector
    assert held() == before
