"""Nodes that return plausible but false tokens, behind a real `Offloader`."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from faults.nodes import Act, Ask, FaultyNode, Script

from edge_common.errors import OffloadError
from edge_runtime.config import EdgeConfig, NodeConfig, load_config
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.imaging.images import resize_longest
from edge_runtime.offload.offloader import Offloader
from edge_runtime.offload.recheck import Rechecks, recheck_rate
from edge_runtime.offload.report import OffloadReport, Replied, RunRecord
from edge_runtime.offload.spotcheck import SpotCheck
from edge_runtime.predictor import OffloadPredictor
from engines.bundle import Bundle, shipped_bundle
from engines.pipeline import Pipeline
from engines.windows import Windows, cut
from transport.keys import generate_secret

LIES = [Act("norm", factor=1.5), Act("forge"), Act("forge", share=0.5)]
"""Right shapes, finite numbers: scaled tokens; tokens in another order, in all or some windows."""
SHAPES = [(60, 90), (90, 90), (90, 60), (60, 60), (90, 7)]


class Scene:
    """Three nodes, an `Offloader` that uses them, and what it told about liars."""

    def __init__(self, nodes: dict[str, FaultyNode], config: EdgeConfig) -> None:
        self.nodes = nodes
        self.pipeline = Pipeline(Bundle.load(str(config.bundle)), threads=1, device="cpu")
        self.offloader = Offloader(config, self.pipeline)
        self.told: list[tuple[str, list[int]]] = []
        self.offloader.on_suspect = lambda node, images: self.told.append((node, images))

    def windows(self, seed: int = 0, shape: tuple[int, int] = (60, 90)) -> Windows:
        geometry = self.pipeline.bundle.geometry
        photo = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
        return cut(resize_longest(photo, geometry.image_size), geometry)

    def truth(self, windows: Windows) -> np.ndarray:
        return self.pipeline.stack(self.pipeline.stack_inputs(windows))["tokens"]

    def run(self, windows: Windows) -> tuple[np.ndarray, RunRecord]:
        record = RunRecord()
        return self.offloader.stack(windows, record)["tokens"], record

    def change(self, **settings: Any) -> None:
        self.offloader.config = msgspec.structs.replace(self.offloader.config, **settings)

    def turned_away(self) -> set[str]:
        return {node.name for node in self.offloader.status(2.0) if node.code == "quarantined"}


Make = Callable[..., Scene]


@pytest.fixture
def make(tmp_path: Path, toy_bundle: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def scene(bundle: Path = toy_bundle, policies: Any = None, **settings: Any) -> Scene:
            keys = tmp_path / "keys"
            keys.mkdir(mode=0o700)
            generate_secret(keys / "edge.secret")
            nodes, known = {}, []
            for name in ("alpha", "beta", "gamma"):
                policy = (policies or {}).get(name, "honest")
                node = FaultyNode(Bundle.load(bundle), tmp_path / name, policy, name=name)
                nodes[name] = stack.enter_context(node)
                node.authorise(name, keys)
                known.append(
                    NodeConfig(
                        name=name,
                        endpoint=node.endpoint,
                        server_key=node.keypair.public,
                        client_key=str(keys / f"{name}.key"),
                    )
                )
            options: dict[str, Any] = {"deadline_s": 30.0, "max_exposure": 0.6, **settings}
            config = EdgeConfig(
                nodes=tuple(known), bundle=str(bundle), secret=str(keys / "edge.secret"), **options
            )
            made = Scene(nodes, config)
            stack.callback(made.pipeline.close)
            stack.callback(made.offloader.close)
            return made

        yield scene


def report(record: RunRecord) -> OffloadReport:
    found = record.report()
    assert found is not None
    return found


@pytest.mark.parametrize("fallback", ["error", "local"])
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie.kind}-{lie.share}")
def test_in_strict_mode_no_lie_reaches_a_mask(make: Make, lie: Act, fallback: str) -> None:
    scene = make(
        policies={"beta": Script(*["honest"] * 3, then=lie)}, strict=True, fallback=fallback
    )
    false = failed = 0
    for seed in range(50):
        windows = scene.windows(seed, SHAPES[seed % 2])
        try:
            tokens, record = scene.run(windows)
        except OffloadError as error:
            assert "beta is quarantined" in error.found  # noqa: PT017
            failed += 1
            continue
        false += tokens.tobytes() != scene.truth(windows).tobytes()
        found = report(record)
        assert {*found.recomputed, *found.home} == {*windows.window.tolist()}
        assert not record.suspect
    assert false == 0
    assert scene.nodes["beta"].did[lie.kind] >= 1
    assert scene.turned_away() == {"beta"}
    assert [node for node, _ in scene.told] == ["beta"]
    assert scene.told[0][1] == []
    assert failed == 0 or fallback == "error"
    asked = scene.nodes["beta"].requests
    with contextlib.suppress(OffloadError):
        scene.run(scene.windows(99))
    assert scene.nodes["beta"].requests == asked
    scene.offloader._nodes.fleet.nodes["beta"].release(time.monotonic())  # its rest is over
    assert scene.offloader.usable() == {"alpha", "gamma"}


def test_the_report_names_the_liar_and_what_the_edge_computed_in_its_place(make: Make) -> None:
    scene = make(policies={"beta": LIES[0]}, strict=True)
    tokens, record = scene.run(scene.windows())
    assert tokens.tobytes() == scene.truth(scene.windows()).tobytes()
    found = report(record)
    beta = found.nodes[1]
    assert "differ" in str(beta.failure)
    assert found.home == beta.windows != ()
    assert found.recomputed == tuple(range(6))
    assert not found.suspect
    assert [node.failure for node in (found.nodes[0], found.nodes[2])] == [None, None]


def test_a_lie_is_found_behind_the_first_frame_and_that_frame_is_suspect(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make(policies={"beta": LIES[0]}, recompute=1.0)
    windows = scene.windows()
    tokens, record = scene.run(windows)
    assert tokens.tobytes() != scene.truth(windows).tobytes()  # not strict: the lie came through
    scene.offloader.settle()
    assert scene.told == [("beta", [1])]
    assert record.number == 1
    assert report(record).suspect
    assert "differ" in str(report(record).nodes[1].failure)
    assert scene.turned_away() == {"beta"}
    assert "node beta" in caplog.text
    assert "the masks of images 1 may be wrong" in caplog.text
    scene.change(fallback="local")
    for seed in range(5):
        windows = scene.windows(seed)
        tokens, record = scene.run(windows)
        scene.offloader.settle()
        assert tokens.tobytes() == scene.truth(windows).tobytes()
        assert not report(record).suspect
    assert len(scene.told) == 1


def test_all_earlier_frames_with_unproven_windows_of_the_liar_are_suspect(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(policies={"beta": LIES[0]}, recompute=0.5)
    real = SpotCheck.choose
    records = []
    monkeypatch.setattr(SpotCheck, "choose", lambda self, rows: [])
    for seed in range(4):
        records.append(scene.run(scene.windows(seed, SHAPES[0]))[1])
    monkeypatch.setattr(SpotCheck, "choose", lambda self, rows: [rows["alpha"][0]])
    records.append(scene.run(scene.windows(9))[1])
    scene.offloader.settle()
    assert scene.told == []
    monkeypatch.setattr(SpotCheck, "choose", lambda self, rows: [rows["beta"][0]])
    records.append(scene.run(scene.windows(10))[1])
    scene.offloader.settle()
    assert scene.told == [("beta", [1, 2, 3, 4, 5, 6])]
    assert all(record.suspect for record in records)
    monkeypatch.setattr(SpotCheck, "choose", real)
    scene.change(fallback="local")
    assert not scene.run(scene.windows(11))[1].suspect


def test_a_liar_found_in_several_frames_at_once_is_told_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(policies={"beta": LIES[0]}, recompute=1.0)
    gate, real = threading.Event(), scene.pipeline.submit
    with ThreadPoolExecutor(1) as pool:

        def submit(stage: str, feeds: Any) -> Future[Any]:
            return pool.submit(lambda: gate.wait(60) and real(stage, feeds).result())

        monkeypatch.setattr(scene.pipeline, "submit", submit)
        records = [scene.run(scene.windows(seed))[1] for seed in range(3)]
        gate.set()
        scene.offloader.settle()
    assert scene.told == [("beta", [1, 2, 3])]
    assert all(len(report(record).recomputed) == 6 for record in records)


def test_a_frame_on_its_way_when_its_node_is_found_lying_comes_out_right(make: Make) -> None:
    held = threading.Event()

    def alpha(ask: Ask) -> Act:
        return Act(delay_s=1.5) if ask.number == 0 else Act()

    scene = make(policies={"alpha": alpha, "beta": LIES[0]}, recompute=1.0)
    first, second = scene.windows(1), scene.windows(2)
    records = [RunRecord(), RunRecord()]
    places: list[Callable[[], ExposureLedger]] = [
        lambda windows=windows: scene.offloader.place_photo(windows) for windows in (first, second)
    ]
    early = scene.offloader.submit(first, records[0], places[0], {})
    while not any(isinstance(e, Replied) and e.node == "beta" for e in records[0].events):
        held.wait(0.01)
    scene.offloader.submit(second, records[1], places[1], {}).result()
    scene.offloader.settle()
    assert not early.done()
    assert scene.told == [("beta", [2])]
    outputs = early.result()
    assert outputs.outputs["tokens"].tobytes() == scene.truth(first).tobytes()
    assert "beta" not in outputs.sources.values()
    assert [record.suspect for record in records] == [False, True]
    assert "differ" in str(report(records[0]).nodes[1].failure)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("per_request", [None, 1, 2])
def test_honest_nodes_are_never_turned_away(
    make: Make, strict: bool, per_request: int | None
) -> None:
    scene = make(strict=strict, recompute=1.0, windows_per_request=per_request)
    for seed in range(40):
        scene.run(scene.windows(seed, SHAPES[seed % len(SHAPES)]))
        scene.offloader.settle()
    assert scene.told == []
    assert scene.turned_away() == set()
    count = scene.offloader.rechecks
    assert count == Rechecks(count.returned, count.returned, 0)
    assert count.returned >= 200


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_real_model_in_other_batches_is_within_the_tolerance(
    make: Make, precision: str
) -> None:
    scene = make(shipped_bundle(precision), strict=True)
    record = scene.run(scene.windows(1, (300, 400)))[1]
    assert len(report(record).recomputed) == len(scene.windows(1, (300, 400)))
    assert scene.turned_away() == set()


@pytest.mark.parametrize("strict", [True, False])
def test_if_all_nodes_differ_none_is_turned_away_for_the_edge_s_own_engine_may_be_wrong(
    make: Make, strict: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(
        policies=dict.fromkeys(("alpha", "beta", "gamma"), LIES[0]), strict=strict, recompute=0.5
    )
    if not strict:  # the others' windows are compared before anyone is turned away
        monkeypatch.setattr(SpotCheck, "choose", lambda self, rows: [rows["beta"][0]])
    windows = scene.windows()
    tokens, record = scene.run(windows)
    scene.offloader.settle()
    assert (tokens.tobytes() == scene.truth(windows).tobytes()) == strict
    assert "this machine's own engine may be wrong" in caplog.text
    assert scene.told == []
    assert scene.turned_away() == set()
    assert record.suspect
    assert len(report(record).recomputed) == (6 if strict else 3)


def test_strict_mode_ends_at_the_deadline_and_still_turns_the_liar_away(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(policies={"beta": LIES[0]}, strict=True, deadline_s=3.0)
    scene.pipeline.engine("stack")
    real, left = scene.pipeline.submit, [6]

    def submit(stage: str, feeds: Any) -> Future[Any]:
        left[0] -= 1
        return real(stage, feeds) if left[0] > 0 else Future()

    monkeypatch.setattr(scene.pipeline, "submit", submit)
    with pytest.raises(OffloadError, match="still computing windows again when the deadline"):
        scene.run(scene.windows())
    while not scene.told:
        time.sleep(0.01)
    assert scene.told == [("beta", [])]
    assert scene.turned_away() == {"beta"}


def never(stage: str, feeds: Any) -> Future[Any]:
    """A stack engine that takes for ever."""
    return Future()


def test_a_slow_edge_delays_no_frame_and_what_it_skips_is_counted(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make(recompute=1.0)
    monkeypatch.setattr(scene.pipeline, "submit", never)
    for seed in range(8):  # one is being recomputed, four wait, three are skipped
        scene.run(scene.windows(seed))
    assert scene.offloader.rechecks == Rechecks(48, 0, 18)
    assert caplog.text.count("fewer windows of nodes than asked") == 1
    scene.offloader.close()
    assert scene.offloader.rechecks == Rechecks(48, 0, 48)


def test_an_engine_that_fails_is_no_lie_and_ends_only_strict_frames(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from edge_common.errors import EngineError

    def fails(stage: str, feeds: Any) -> Future[Any]:
        raise EngineError("no memory")

    scene = make(recompute=1.0)
    monkeypatch.setattr(scene.pipeline, "submit", fails)
    scene.run(scene.windows())
    scene.offloader.settle()
    assert scene.offloader.rechecks == Rechecks(6, 0, 6)
    assert "no memory" in caplog.text
    scene.change(strict=True)
    with pytest.raises(EngineError, match="no memory"):
        scene.run(scene.windows())
    assert scene.turned_away() == set()


def test_closing_with_rechecks_waiting_leaves_nothing_behind(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make(recompute=1.0)
    scene.offloader.close()
    config, pipeline = scene.offloader.config, scene.pipeline
    monkeypatch.setattr(pipeline, "submit", never)

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def use() -> Offloader:
        with Offloader(config, pipeline) as offloader:
            for seed in range(3):
                offloader.stack(scene.windows(seed))
        return offloader

    closed = [use()]
    before = held()
    closed += [use() for _ in range(3)]
    assert held() == before
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        del closed
    assert "Task was destroyed" not in caplog.text


def test_an_error_in_on_suspect_is_logged_and_the_liar_turned_away_all_the_same(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make(policies={"beta": LIES[0]}, recompute=1.0)

    def broken(node: str, images: list[int]) -> None:
        raise RuntimeError("a defect")

    scene.offloader.on_suspect = broken
    scene.run(scene.windows())
    scene.offloader.settle()
    assert "on_suspect failed" in caplog.text
    assert scene.turned_away() == {"beta"}


def test_without_rechecks_the_edge_does_not_open_the_stack(make: Make) -> None:
    scene = make()
    assert recheck_rate(scene.offloader.config) == 0
    scene.run(scene.windows())
    scene.offloader.settle()
    assert not scene.pipeline.is_open("stack")
    assert scene.offloader.rechecks == Rechecks()
    with OffloadPredictor(scene.offloader.config) as predictor:
        predictor.load()
        assert not predictor.pipeline.is_open("stack")
    with OffloadPredictor(scene.offloader.config, strict=True) as predictor:
        predictor.load()
        assert predictor.pipeline.is_open("stack")


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ("", 0),
        ('fallback = "local"', 0.04),
        ('fallback = "local"\nrecompute = 0.0', 0),
        ("recompute = 0.25", 0.25),
        ("recompute = 0.25\nstrict = true", 1),
        ("strict = true", 1),
    ],
)
def test_the_rate_comes_from_edge_toml(tmp_path: Path, settings: str, rate: float) -> None:
    path = tmp_path / "edge.toml"
    node = f'[[nodes]]\nname = "a"\nendpoint = "tcp://a:1"\nserver_key = "{"A" * 40}"\n'
    path.write_text(f"{settings}\n{node}")
    assert recheck_rate(load_config(path)) == rate
