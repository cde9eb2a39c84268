"""Recomputing random windows: noise and lies, verdicts, odds, and frames in doubt."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_common.errors import ConfigError, ProtocolError
from edge_runtime.imaging.images import load_image, resize_longest
from edge_runtime.offload.spotcheck import (
    BOUNDS,
    Rechecked,
    SpotCheck,
    Tolerance,
    Trust,
    difference,
    windows_until_caught,
)
from engines.bundle import FLOAT_TYPES, Bundle, TensorSpec, shipped_bundle
from engines.dtypes import to_stored
from engines.parity import TOLERANCES
from engines.pipeline import Arrays, Pipeline
from engines.samples import golden_samples
from engines.windows import Windows, cut

ROOT = Path(__file__).parents[3]
PHOTO = ROOT / "edge_runtime" / "photos" / "coins.png"
FORGERY = ROOT / "docs" / "results" / "forgery.json"
TOKENS = (TensorSpec("tokens", "float32", ("n", 25, 8)),)


def tokens(seed: int = 0, n: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 25, 8)).astype(np.float32)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return difference({"tokens": ours}, {"tokens": theirs}, TOKENS)


# The difference -----------------------------------------------------------------------------------


def test_equal_answers_do_not_differ_and_zeros_differ_by_one() -> None:
    assert apart(tokens(), tokens()) == 0
    assert apart(tokens(), np.zeros_like(tokens())) == pytest.approx(1)
    assert apart(tokens(), -tokens()) == pytest.approx(2)
    assert apart(tokens(), 1.01 * tokens()) == pytest.approx(0.01, rel=1e-3)


def test_a_lie_about_one_token_of_one_window_is_not_averaged_away() -> None:
    false = tokens(n=9)
    false[4, 7] *= 1.2
    assert apart(tokens(n=9), false) == pytest.approx(0.2, rel=1e-3)


def test_a_small_token_counts_by_its_own_length() -> None:
    ours = tokens()
    ours[0, 3] /= 5
    theirs = ours.copy()
    theirs[0, 3] *= 2
    assert apart(ours, theirs) == pytest.approx(1, rel=1e-3)


def test_rounding_of_a_vanishing_token_is_no_lie_and_a_whole_token_in_its_place_is() -> None:
    ours = tokens()
    ours[0, 3] = 0  # as grid padding is
    theirs = ours.copy()
    theirs[0, 3, 0] = 1e-7
    assert apart(ours, theirs) < 1e-6
    theirs[0, 3] = ours[0, 2]
    assert apart(ours, theirs) > 1


def test_anything_in_place_of_zeros_is_a_lie() -> None:
    assert apart(np.zeros_like(tokens()), np.zeros_like(tokens())) == 0
    assert apart(np.zeros_like(tokens()), 1e-3 * tokens()) > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_numbers_that_are_not_finite_or_overflow_differ_by_infinity(value: float) -> None:
    false = tokens()
    false[0, 0, 0] = value
    assert apart(tokens(), false) == math.inf
    assert apart(false, tokens()) == math.inf


def test_bfloat16_is_compared_by_value_and_not_by_its_bits() -> None:
    specs = (TensorSpec("tokens", "bfloat16", ("n", 25, 8)),)
    ours, theirs = ({"tokens": to_stored(x, "bfloat16")} for x in (tokens(), 1.1 * tokens()))
    assert difference(ours, theirs, specs) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("shape", [(1,), (1, 25), (1, 25, 1), (1, 25, 2, 3)])
def test_a_codec_s_scales_count_too(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (1, 25, 8)).astype(np.int8)
    specs = (TensorSpec("tokens", "int8", ("n", 25, 8)), TensorSpec("scale", "float16", ("n",)))
    ours = {"tokens": codes, "scale": np.ones(shape, np.float16)}
    assert difference(ours, {**ours, "scale": ours["scale"] * 2}, specs) == pytest.approx(1)
    other = np.where(codes < 127, codes + 1, codes).astype(np.int8)
    assert 0 < difference(ours, {**ours, "tokens": other}, specs) < 0.1


# Tolerances ---------------------------------------------------------------------------------------


def noisy(of: np.ndarray, size: float, seed: int = 1) -> np.ndarray:
    way = np.random.default_rng(seed).standard_normal(of.shape)
    way *= np.linalg.norm(of, axis=-1, keepdims=True) / np.linalg.norm(way, axis=-1, keepdims=True)
    return (of + size * way).astype(np.float32)


def calibrated(noise: float, precision: str = "fp32") -> float:
    ours = tokens(n=5)
    reply = noisy(ours, noise)
    return Tolerance(TOKENS, precision).calibrate({"tokens": reply}, {"tokens": ours})


def test_a_tolerance_is_six_times_the_noise_between_floor_and_cap() -> None:
    bounds = BOUNDS["fp32"]
    assert calibrated(0) == calibrated(1e-7) == bounds.floor
    assert calibrated(2e-5) == pytest.approx(1.2e-4, rel=0.02)
    assert calibrated(0.9 * bounds.cap) == bounds.cap


def test_a_node_cannot_raise_its_tolerance_above_the_cap_by_answering_falsely() -> None:
    for precision, bounds in BOUNDS.items():
        assert calibrated(0.99 * bounds.cap, precision) == bounds.cap
        with pytest.raises(ProtocolError, match=r"differ by .* verify"):
            calibrated(1.02 * bounds.cap, precision)
    nothing = {"tokens": np.full((5, 25, 8), np.nan, np.float32)}
    with pytest.raises(ProtocolError, match="inf"):
        Tolerance(TOKENS, "fp32").calibrate(nothing, {"tokens": tokens(n=5)})


def test_caps_are_within_the_limits_of_the_parity_gate() -> None:
    assert BOUNDS.keys() == TOLERANCES.keys() == FLOAT_TYPES.keys()
    for precision, bounds in BOUNDS.items():
        assert 0 < bounds.floor < bounds.cap <= TOLERANCES[precision].error


# The shipped model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo() -> Iterator[tuple[Pipeline, Windows, Arrays, Arrays]]:
    """The pipeline, and the demo's photo: windows, feeds and tokens."""
    bundle = Bundle.load(shipped_bundle())
    windows = cut(resize_longest(load_image(PHOTO), bundle.geometry.image_size), bundle.geometry)
    with Pipeline(bundle, threads=1, device="cpu") as pipeline:
        feeds = pipeline.stack_inputs(windows)
        yield pipeline, windows, feeds, pipeline.stack(feeds)


def check_of(pipeline: Pipeline, **settings: object) -> SpotCheck:
    return SpotCheck(pipeline.bundle.stage("stack").outputs, **settings)  # type: ignore[arg-type]


async def all_of(
    check: SpotCheck, pipeline: Pipeline, feeds: Arrays, outputs: Arrays, rows: list[int]
) -> list[Rechecked]:
    sources = {row: f"node-{row % 3}" for row in rows}
    tolerances = {f"node-{k}": BOUNDS["fp32"].floor for k in range(3)}
    found = check.recheck(pipeline, feeds, outputs, rows, sources, tolerances)
    return [each async for each in found]


def test_every_forged_window_is_found_in_strict_mode_and_no_other(
    photo: tuple[Pipeline, Windows, Arrays, Arrays],
) -> None:
    pipeline, windows, feeds, honest = photo
    check = check_of(pipeline, strict=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        forged = sorted(rng.choice(len(windows), 4, replace=False).tolist())
        outputs = {"tokens": honest["tokens"].copy()}
        outputs["tokens"][forged[0]] *= 1.001
        outputs["tokens"][forged[1]] = honest["tokens"][(forged[1] + 1) % len(windows)]
        outputs["tokens"][forged[2]] = noisy(honest["tokens"][forged[2]], 1e-4)
        outputs["tokens"][forged[3], 3] = 0
        rows = check.choose({"a": range(0, 20, 2), "b": range(1, 20, 2)})
        assert rows == list(range(20))
        found = asyncio.run(all_of(check, pipeline, feeds, outputs, rows))
        assert [each.row for each in found if not each.verdict.ok] == forged
        for each in found:
            assert each.verdict.source == f"node-{each.row % 3}"
            assert each.verdict.window == windows.window[each.row]
            outputs["tokens"][each.row] = each.ours["tokens"][0]
        assert (outputs["tokens"] == honest["tokens"]).all()


def test_golden_windows_calibrate_this_machine_to_the_floor(
    photo: tuple[Pipeline, Windows, Arrays, Arrays],
) -> None:
    pipeline = photo[0]
    stage = pipeline.bundle.stage("stack")
    sample = golden_samples(pipeline.bundle)[0]
    ours = pipeline.stack(sample.feeds("stack", stage), batch=1)
    pytorch = sample.expected("stack", stage)
    assert pytorch is not None
    assert 0 < difference(ours, pytorch, stage.outputs) < 2e-6
    assert Tolerance(stage.outputs, "fp32").calibrate(pytorch, ours) == BOUNDS["fp32"].floor


def test_a_hundred_thousand_honest_windows_with_noise_raise_no_alarm() -> None:
    # Noise as measured in docs/results/forgery.json, drawn anew for every window.
    check = SpotCheck((TensorSpec("tokens", "float32", ("n", 4, 16)),))
    rng = np.random.default_rng(5)
    for noise, precision in ((5e-7, "fp32"), (0.0013, "fp16"), (0.012, "bf16")):
        ours = rng.standard_normal((33_400, 4, 16)).astype(np.float32)
        tolerance = BOUNDS[precision].floor  # the tightest
        theirs = noisy(ours, noise)
        verdict = check.verdict("a", 0, {"tokens": ours}, {"tokens": theirs}, tolerance)
        assert verdict.ok, str(verdict)
        assert verdict.difference > noise / 2


def test_a_verdict_tells_both_numbers() -> None:
    check = SpotCheck(TOKENS)
    ours, theirs = {"tokens": tokens()}, {"tokens": 1.1 * tokens()}
    verdict = check.verdict("beta", 7, ours, theirs, 1e-5)
    assert not verdict.ok
    assert "beta" in str(verdict)
    assert "window 7 differ by 0.1" in str(verdict)
    assert "above the tolerance of 1e-05" in str(verdict)
    assert check.verdict("beta", 7, ours, theirs, 0.11).ok
    assert not check.verdict("beta", 7, ours, theirs, math.nan).ok


def test_a_cancelled_recheck_computes_no_more(
    photo: tuple[Pipeline, Windows, Arrays, Arrays],
) -> None:
    pipeline, _, feeds, honest = photo
    submitted = []

    class Counting:
        def submit(self, stage: str, feeds: Arrays) -> object:
            submitted.append(stage)
            return pipeline.submit(stage, feeds)

    async def two_then_none() -> None:
        check = check_of(pipeline)
        found = check.recheck(
            Counting(),  # type: ignore[arg-type]
            feeds,
            honest,
            range(20),
            dict.fromkeys(range(20), "a"),
            {"a": 1e-5},
        )
        await anext(found)
        await anext(found)
        await found.aclose()

    asyncio.run(two_then_none())
    assert submitted == ["stack"] * 2


# The odds -----------------------------------------------------------------------------------------


def test_each_window_is_chosen_with_the_rate_whatever_its_source() -> None:
    check = SpotCheck(TOKENS, rate=0.25, rng=random.Random(3))
    rows = {"a": range(8), "b": range(8, 12), "c": [], "d": [40]}
    counts = dict.fromkeys([*range(12), 40], 0)
    for _ in range(4000):
        for row in check.choose(rows):
            counts[row] += 1
    assert all(900 < count < 1100 for count in counts.values())
    assert SpotCheck(TOKENS, rate=0).choose(rows) == []
    assert SpotCheck(TOKENS, rate=1).choose(rows) == [*range(12), 40]


def test_nodes_cannot_predict_the_choice() -> None:
    assert isinstance(SpotCheck(TOKENS)._rng, random.SystemRandom)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_senseless_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        SpotCheck(TOKENS, rate=rate)


@pytest.mark.parametrize(("forged", "frames"), [(1.0, 10), (0.04, 250)])
def test_a_liar_is_caught_in_time_with_95_percent(forged: float, frames: int) -> None:
    # 8 windows a frame, each false with probability `forged` and recomputed with 4 %: the odds of
    # SpotCheck.choose, drawn at once for 10,000 runs.
    per_frame = 1 - (1 - forged * 0.04) ** 8
    expected = 1 - (1 - per_frame) ** frames
    caught = np.random.default_rng(1).geometric(per_frame, 10_000) <= frames
    assert caught.mean() >= 0.95
    assert caught.mean() == pytest.approx(expected, abs=0.01)
    # And with the check itself, in fewer runs.
    rng = random.Random(2)
    check, late, runs = SpotCheck(TOKENS, rng=rng), 0, 300
    for _ in range(runs):
        false = ({row for row in range(8) if rng.random() < forged} for _ in range(frames))
        late += not any(each.intersection(check.choose({"liar": range(8)})) for each in false)
    assert 1 - late / runs == pytest.approx(expected, abs=0.04)


def test_windows_until_caught_follows_from_the_rate() -> None:
    assert windows_until_caught(0.04) == 74
    assert 1 - 0.96**74 >= 0.95 > 1 - 0.96**73
    assert windows_until_caught(1) == 1
    assert windows_until_caught(0) == math.inf


# Frames in doubt ----------------------------------------------------------------------------------


def test_frames_are_suspect_until_each_window_of_the_node_is_proven() -> None:
    trust = Trust()
    trust.accept("a", 1, [3, 4])
    trust.accept("a", 2, [3])
    trust.accept("b", 2, [5])
    assert trust.suspects("a") == [1, 2]
    trust.prove("a", 3, computed=1)
    assert (trust.suspects("a"), trust.unproven("a")) == ([1, 2], 2)
    trust.prove("a", 4, computed=1)
    assert trust.suspects("a") == [2]
    assert (trust.suspects("b"), trust.suspects("nobody")) == ([2], [])
    trust.prove("nobody", 4, computed=1)


def test_a_passed_check_does_not_clear_other_windows() -> None:
    trust = Trust()
    for frame in range(5):
        trust.accept("a", frame, [1, 2])
        trust.prove("a", 1, computed=frame)
    assert trust.suspects("a") == [0, 1, 2, 3, 4]


def test_reused_tokens_are_proven_in_every_frame_that_used_them() -> None:
    trust = Trust()
    trust.accept("a", 1, [7])
    trust.accept("a", 2, [7], computed=1)
    trust.accept("a", 3, [7])  # other pixels, computed anew
    trust.accept("a", 4, [7], computed=1)
    trust.prove("a", 7, computed=1)
    assert trust.suspects("a") == [3]


def test_old_frames_are_forgotten_and_counted() -> None:
    trust = Trust(frames=10)
    for frame in range(25):
        trust.accept("a", frame, [frame % 3])
    trust.accept("a", 25, [])
    assert trust.suspects("a") == list(range(15, 25))
    assert (trust.forgotten("a"), trust.unproven("a")) == (15, 10)
    trust.clear("a")
    assert (trust.suspects("a"), trust.forgotten("a")) == ([], 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=60))
def test_suspects_are_the_frames_with_a_window_that_was_never_proven(
    steps: list[tuple[int, int, bool]],
) -> None:
    trust = Trust()
    unproven: dict[int, set[int]] = {}
    for frame, window, prove in steps:
        if prove:
            trust.prove("a", window, computed=frame)
            unproven.get(frame, set()).discard(window)
        else:
            trust.accept("a", frame, [window])
            unproven.setdefault(frame, set()).add(window)
    assert sorted(trust.suspects("a")) == sorted(f for f, left in unproven.items() if left)
    assert trust.unproven("a") == sum(map(len, unproven.values()))


# What was measured --------------------------------------------------------------------------------


def test_floors_are_above_the_noise_that_was_measured() -> None:
    noise = json.loads(FORGERY.read_text())["noise"]
    for row in noise["pairs"]:
        found = [row[inputs] for inputs in ("golden", "photo", "random picture") if inputs in row]
        assert found
        assert 3 * max(found) < BOUNDS[row["precision"]].floor
    assert {row["precision"] for row in noise["alarms"]} == set(BOUNDS)
    for row in noise["alarms"]:
        assert row["above the tolerance"] == 0
        assert row["windows"] >= 10_000
        assert 2 * row["largest"] < BOUNDS[row["precision"]].floor


def test_lies_within_the_floor_hardly_change_a_mask() -> None:
    rows = json.loads(FORGERY.read_text())["lies"]["rows"]
    for precision, least in (("fp32", 0.999), ("fp16", 0.98)):
        small = [
            row["iou_least"]
            for row in rows
            if row["precision"] == precision and row["difference"] <= BOUNDS[precision].floor
        ]
        assert small
        assert min(small) >= least
