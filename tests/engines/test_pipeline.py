from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import Toy, poisoned

from edge_common.errors import BundleError, EngineError
from engines import pipeline as pipeline_module
from engines.bundle import Bundle, hash_file, node_bundle, stage_digest
from engines.pipeline import Pipeline
from engines.windows import Windows, cut


@pytest.fixture
def windows(toy: Toy) -> Windows:
    """Six of the nine windows. The last two rows of pixels end inside a patch."""
    image = np.random.default_rng(1).integers(0, 256, (27, 40, 3), np.uint8)
    return cut(image, toy.geometry)


@pytest.fixture
def pipeline(toy_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline(Bundle.load(toy_bundle), threads=1, device="cpu") as opened:
        yield opened


def expected_embedding(toy: Toy, windows: Windows) -> np.ndarray:
    tokens = np.full((9, 16, 8), np.nan, np.float32)  # absent windows must not be read
    tokens[windows.window] = toy.stack(windows.pixels, windows.extent, windows.window)
    return toy.tail(tokens, windows.present)


def test_embed_equals_the_model(pipeline: Pipeline, toy: Toy, windows: Windows) -> None:
    embedding = pipeline.embed(windows)
    assert embedding.shape == (1, 4, 10, 10)
    np.testing.assert_allclose(embedding, expected_embedding(toy, windows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags", [{"head": True}, {"stock": True}])
def test_every_kind_of_bundle_gives_the_same_embedding(
    make_toy_bundle: Callable[..., Path],
    tmp_path: Path,
    toy: Toy,
    windows: Windows,
    flags: dict[str, bool],
) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "b", **flags))
    with Pipeline(bundle, threads=1) as pipeline:
        found = pipeline.embed(windows)
        np.testing.assert_allclose(found, expected_embedding(toy, windows), rtol=1e-5, atol=1e-5)


def test_the_tensors_for_nodes_without_and_with_a_head(
    pipeline: Pipeline,
    make_toy_bundle: Callable[..., Path],
    tmp_path: Path,
    toy: Toy,
    windows: Windows,
) -> None:
    feeds = pipeline.stack_inputs(windows)
    assert feeds.keys() == {"pixels", "extent", "window"}
    assert feeds["pixels"] is windows.pixels
    with Pipeline(Bundle.load(make_toy_bundle(tmp_path / "b", head=True))) as with_head:
        feeds = with_head.stack_inputs(windows)
    assert feeds.keys() == {"hidden", "window"}
    np.testing.assert_allclose(feeds["hidden"], toy.head(windows.pixels, windows.extent), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6, 99])
def test_the_batch_size_changes_nothing(pipeline: Pipeline, windows: Windows, batch: int) -> None:
    feeds = pipeline.stack_inputs(windows)
    whole, split = pipeline.stack(feeds), pipeline.stack(feeds, batch)
    assert split.keys() == whole.keys()
    np.testing.assert_array_equal(split["tokens"], whole["tokens"])


def test_decode_equals_the_model(pipeline: Pipeline, toy: Toy, windows: Windows) -> None:
    rng = np.random.default_rng(3)
    embedding = pipeline.embed(windows)
    for k in (0, 1, 3):
        prompts = (
            rng.uniform(0, 40, (2, k, 2)).astype(np.float32),
            rng.integers(-1, 4, (2, k)).astype(np.float32),
            rng.standard_normal((2, 1, 40, 40)).astype(np.float32),
            np.array([0, 1], np.float32),
        )
        logits, iou = pipeline.decode(embedding, *prompts)
        expected_logits, expected_iou = toy.decode(embedding, *prompts)
        np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(iou, expected_iou)


def test_rows_that_do_not_fit_the_windows_are_refused(pipeline: Pipeline, windows: Windows) -> None:
    tokens = pipeline.stack(pipeline.stack_inputs(windows))["tokens"]
    with pytest.raises(EngineError, match="tokens has 5 rows for 6 windows"):
        pipeline.tail({"tokens": tokens[:-1]}, windows)
    with pytest.raises(EngineError, match="output tokens is missing"):
        pipeline.tail({}, windows)


def test_zero_windows_or_a_batch_of_zero_are_refused(pipeline: Pipeline, windows: Windows) -> None:
    feeds = pipeline.stack_inputs(windows)
    with pytest.raises(EngineError, match="no windows"):
        pipeline.stack({name: array[:0] for name, array in feeds.items()})
    with pytest.raises(EngineError, match="batch is 0"):
        pipeline.stack(feeds, 0)


def test_a_node_bundle_runs_only_the_stack(
    toy_bundle: Path, tmp_path: Path, pipeline: Pipeline, windows: Windows
) -> None:
    with Pipeline(node_bundle(Bundle.load(toy_bundle), tmp_path / "node")) as node:
        feeds = node.stack_inputs(windows)
        tokens = node.stack(feeds)
        np.testing.assert_array_equal(tokens["tokens"], pipeline.stack(feeds)["tokens"])
        with pytest.raises(BundleError, match="node bundle and has no tail"):
            node.tail(tokens, windows)


def test_stages_are_opened_when_needed_and_closed_with_the_pipeline(
    toy_bundle: Path, tmp_path: Path, windows: Windows
) -> None:
    copy = shutil.copytree(toy_bundle, tmp_path / "b")
    bundle = Bundle.load(copy)
    weights = bytearray((copy / "tail.onnx.data").read_bytes())
    weights[100] ^= 1
    (copy / "tail.onnx.data").write_bytes(weights)
    pipeline = Pipeline(bundle, threads=1)
    tokens = pipeline.stack(pipeline.stack_inputs(windows))
    assert pipeline.engine("stack") is pipeline.engine("stack")
    with pytest.raises(BundleError, match=r"tail\.onnx\.data is damaged"):
        pipeline.tail(tokens, windows)
    engine = pipeline.engine("stack")
    pipeline.close()
    with pytest.raises(EngineError, match="pipeline was closed"):
        pipeline.embed(windows)
    with pytest.raises(EngineError, match="was closed"):
        engine.run({})


@pytest.mark.parametrize("stage", ["tail", "encoder"])
def test_an_embedding_that_is_not_finite_is_refused(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, windows: Windows, stage: str
) -> None:
    whole = make_toy_bundle(tmp_path / "whole", stock=stage == "encoder")
    with (
        Pipeline(poisoned(whole, tmp_path / "broken", stage), threads=1) as pipeline,
        pytest.raises(EngineError, match=rf"{stage} of .*broken returned .*embedding.*not finite"),
    ):
        pipeline.embed(windows)


def test_tokens_that_overflow_in_the_tail_are_refused(pipeline: Pipeline, windows: Windows) -> None:
    tokens = np.full((len(windows), 16, 8), 3e38, np.float32)  # finite, so a node may return them
    with pytest.raises(EngineError, match=r"not finite.*edge-runtime verify .*bundle.*node"):
        pipeline.tail({"tokens": tokens}, windows)


@pytest.mark.parametrize("output", ["low_res_logits", "iou"])
def test_a_decoder_output_that_is_not_finite_is_refused(pipeline: Pipeline, output: str) -> None:
    coords, labels = np.zeros((1, 2, 2), np.float32), np.zeros((1, 2), np.float32)
    (coords[0] if output == "low_res_logits" else labels)[:] = 3e38  # the toy model adds them up
    prompts = coords, labels, np.zeros((1, 1, 40, 40), np.float32), np.zeros(1, np.float32)
    with pytest.raises(EngineError, match=rf"the decoder of .* returned {output}.*not finite"):
        pipeline.decode(np.zeros((1, 4, 10, 10), np.float32), *prompts)


def test_a_graph_that_contradicts_its_manifest_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_bundle, tmp_path / "b")
    manifest = json.loads((copy / "manifest.json").read_text())
    for stage, side in (("stack", "outputs"), ("tail", "inputs")):
        manifest["stages"][stage][side][0]["dtype"] = "float16"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with (
        Pipeline(Bundle.load(copy)) as pipeline,
        pytest.raises(
            BundleError, match=r"float32 \[\?, 16, 8\], its manifest says tokens float16"
        ),
    ):
        pipeline.engine("stack")


def test_a_graph_with_other_shapes_than_its_manifest_is_refused(
    toy_bundle: Path, tmp_path: Path
) -> None:
    import onnx

    copy = shutil.copytree(toy_bundle, tmp_path / "b")
    graph = onnx.load(copy / "stack.onnx", load_external_data=False)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, copy / "stack.onnx")
    manifest = json.loads((copy / "manifest.json").read_text())
    stage = manifest["stages"]["stack"]
    stage["files"]["stack.onnx"] = hash_file(copy / "stack.onnx")
    stage["sha256"] = stage_digest(stage["files"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with (
        Pipeline(Bundle.load(copy)) as pipeline,
        pytest.raises(
            BundleError, match=r"pixels uint8 \[2, 16, 16, 3\].* manifest says .*\[\?, 16"
        ),
    ):
        pipeline.engine("stack")


# The model itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(random_bundle: Path) -> Bundle:
    bundle = Bundle.load(random_bundle)
    bundle.verify_hashes()
    return bundle


def test_results_are_bit_identical_for_any_batching(real: Bundle) -> None:
    """This makes "offloaded equals local" checkable: batch, order and threads change no bit."""
    size = real.geometry.image_size
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size * 3 // 4 + 3, size, 3), dtype=np.uint8)
    windows = cut(image, real.geometry)
    with Pipeline(real, threads=1) as one, Pipeline(real, threads=2) as two:
        feeds = one.stack_inputs(windows)
        whole = one.stack(feeds)["tokens"]
        assert np.isfinite(whole).all()
        for batch in (1, 3, 7, 8):
            np.testing.assert_array_equal(one.stack(feeds, batch)["tokens"], whole)
        np.testing.assert_array_equal(two.stack(feeds, 9)["tokens"], whole)
        order = rng.permutation(len(windows))
        shuffled = one.stack({name: array[order] for name, array in feeds.items()}, 5)["tokens"]
        np.testing.assert_array_equal(shuffled, whole[order])
        embedding = one.tail({"tokens": whole}, windows)
        np.testing.assert_array_equal(two.embed(windows, 4), embedding)


def test_a_prompt_does_not_depend_on_the_other_prompts(real: Bundle) -> None:
    g = real.geometry
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (g.image_size, g.image_size // 2, 3), dtype=np.uint8)
    coords = rng.uniform(0, g.image_size, (3, 2, 2)).astype(np.float32)
    labels = np.array([[1, -1], [1, 0], [2, 3]], np.float32)
    mask = rng.standard_normal((3, 1, g.low_res, g.low_res)).astype(np.float32)
    has_mask = np.array([0, 1, 0], np.float32)
    with Pipeline(real, threads=1) as pipeline:
        embedding = pipeline.embed(cut(image, g))
        logits, iou = pipeline.decode(embedding, coords, labels, mask, has_mask)
        assert logits.shape == (3, 4, g.low_res, g.low_res)
        for i in range(3):
            row = slice(i, i + 1)
            alone = pipeline.decode(embedding, coords[row], labels[row], mask[row], has_mask[row])
            np.testing.assert_allclose(alone[0], logits[row], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(alone[1], iou[row], atol=1e-5)


# Several callers at a time ---------------------------------------------------------------------


class Meeting:
    """An engine whose runs wait for each other. They end only if they run at the same time."""

    def __init__(self, engine: Any, met: threading.Barrier) -> None:
        self.engine, self.met = engine, met
        self.began = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, feeds: Any) -> Any:
        self.began.set()
        self.met.wait(20)
        return self.engine.run(feeds)


def test_the_stack_of_one_image_runs_beside_the_tail_of_another(
    pipeline: Pipeline, windows: Windows
) -> None:
    tokens = pipeline.stack(pipeline.stack_inputs(windows))
    expected = pipeline.tail(tokens, windows)
    met = threading.Barrier(2)
    for stage in ("stack", "tail"):
        pipeline._engines[stage] = Meeting(pipeline.engine(stage), met)  # type: ignore[assignment]
    running = pipeline.submit("stack", pipeline.stack_inputs(windows))
    np.testing.assert_array_equal(pipeline.tail(tokens, windows), expected)
    np.testing.assert_array_equal(running.result(20)["tokens"], tokens["tokens"])


def test_many_callers_get_their_own_answers_and_open_each_stage_once(
    toy_bundle: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = pipeline_module.open_stage

    def counting(bundle: Bundle, stage: str, **options: Any) -> Any:
        opened.append(stage)
        return real(bundle, stage, **options)

    monkeypatch.setattr(pipeline_module, "open_stage", counting)
    rng = np.random.default_rng(2)
    images = [cut(rng.integers(0, 256, (27, 40, 3), np.uint8), toy.geometry) for _ in range(12)]
    with Pipeline(Bundle.load(toy_bundle), threads=1, device="cpu") as pipeline:
        with ThreadPoolExecutor(6) as callers:
            found = [*callers.map(pipeline.embed, images)]
        for windows, embedding in zip(images, found, strict=True):
            np.testing.assert_array_equal(pipeline.embed(windows), embedding)
    assert sorted(opened) == ["stack", "tail"]


def test_closing_waits_for_running_calls_and_fails_waiting_ones(
    pipeline: Pipeline, windows: Windows
) -> None:
    feeds = pipeline.stack_inputs(windows)
    met = threading.Barrier(2)
    engine = pipeline.engine("stack")
    slow = Meeting(engine, met)
    pipeline._engines["stack"] = slow  # type: ignore[assignment]
    running, waiting = pipeline.submit("stack", feeds), pipeline.submit("stack", feeds)
    assert slow.began.wait(20)
    closing = [threading.Thread(target=pipeline.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    give_up = time.monotonic() + 10
    while not waiting.cancelled() and time.monotonic() < give_up:
        time.sleep(0.001)
    met.wait(20)
    assert waiting.cancelled()
    assert running.result(20).keys() == {"tokens"}
    for thread in closing:
        thread.join(20)
        assert not thread.is_alive()
    with pytest.raises(EngineError, match="closed") as caught:
        pipeline.stack(feeds)
    assert caught.value.code == "closed"
    with pytest.raises(EngineError, match="was closed"):
        engine.run({})


def test_an_encoding_reports_the_time_of_each_part(
    pipeline: Pipeline, make_toy_bundle: Callable[..., Path], tmp_path: Path, windows: Windows
) -> None:
    encoding = pipeline.encode(windows)
    assert encoding.tokens is not None
    assert min(encoding.stack_ms, encoding.tail_ms) > 0
    tokens = encoding.tokens
    again = pipeline.encode(windows, lambda given: tokens if given is windows else {})
    np.testing.assert_array_equal(again.embedding, encoding.embedding)
    with Pipeline(Bundle.load(make_toy_bundle(tmp_path / "b", stock=True))) as stock:
        whole = stock.encode(windows)
    assert (whole.tokens, whole.tail_ms) == (None, 0)
