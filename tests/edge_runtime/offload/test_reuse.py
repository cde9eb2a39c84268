"""Which windows reuse the tokens of an earlier frame."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_common.errors import ConfigError
from edge_runtime.offload.reuse import HOME, TokenCache
from engines.geometry import Geometry
from engines.windows import Windows, cut

GEOMETRY = Geometry(image_size=40, patch_size=4, window_size=4, embed_dim=8, out_chans=4)
LARGE = 1 << 24


def windows_of(seed: int = 0, height: int = 40) -> Windows:
    image = np.random.default_rng(seed).integers(20, 200, (height, 40, 3), dtype=np.uint8)
    return cut(image, GEOMETRY)


def tokens_of(number: float) -> dict[str, np.ndarray]:
    return {"tokens": np.full((16, 8), number, np.float32)}


def fill(cache: TokenCache, windows: Windows, source: str = "alpha", frame: int = 0) -> None:
    for row in range(len(windows)):
        cache.store(windows, row, tokens_of(row), source, frame)


def changed(windows: Windows, row: int, by: int = 1) -> Windows:
    """The same windows with another value in one byte of one of them."""
    pixels = windows.pixels.copy()
    pixels[row, 5, 6, 1] = int(pixels[row, 5, 6, 1]) + by
    return dataclasses.replace(windows, pixels=pixels)


def test_equal_windows_are_reused_with_their_tokens_source_and_frame() -> None:
    cache, windows = TokenCache(LARGE), windows_of()
    assert cache.lookup(windows) == {}
    fill(cache, windows, "alpha", frame=7)
    found = cache.lookup(windows_of())
    assert sorted(found) == list(range(9))
    for row, reused in found.items():
        assert (reused.outputs["tokens"] == row).all()
        assert (reused.source, reused.frame) == ("alpha", 7)


@pytest.mark.parametrize("offset", [(0, 0, 0), (5, 6, 1), (15, 15, 2)])
def test_one_changed_byte_is_noticed_anywhere(offset: tuple[int, int, int]) -> None:
    cache, windows = TokenCache(LARGE), windows_of()
    fill(cache, windows)
    pixels = windows.pixels.copy()
    pixels[(4, *offset)] ^= 1
    assert sorted(cache.lookup(dataclasses.replace(windows, pixels=pixels))) == [
        0, 1, 2, 3, 5, 6, 7, 8
    ]  # fmt: skip


def test_equal_pixels_elsewhere_or_of_another_extent_are_not_reused() -> None:
    black = cut(np.zeros((40, 40, 3), np.uint8), GEOMETRY)
    cache = TokenCache(LARGE)
    cache.store(black, 0, tokens_of(1), "alpha")
    assert [*cache.lookup(black)] == [0]
    # The same black pixels, but most of them are padding.
    lower = cut(np.zeros((10, 40, 3), np.uint8), GEOMETRY)
    assert (lower.pixels[0] == black.pixels[0]).all()
    assert cache.lookup(lower) == {}


def test_rows_are_found_by_window_index_and_not_by_row() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    fill(cache, windows)
    some = np.array([7, 2])
    part = dataclasses.replace(
        windows,
        pixels=windows.pixels[some],
        extent=windows.extent[some],
        window=windows.window[some],
    )
    found = cache.lookup(part)
    assert {row: float(f.outputs["tokens"][0, 0]) for row, f in found.items()} == {0: 7, 1: 2}


def test_pixels_that_are_not_contiguous_are_compared_too() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    fill(cache, windows)
    strided = np.repeat(windows.pixels, 2, axis=2)[:, :, ::2]
    assert not strided[0].flags.c_contiguous
    assert len(cache.lookup(dataclasses.replace(windows, pixels=strided))) == 9


def test_the_last_few_contents_of_a_window_are_remembered() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    versions = [changed(windows, 0, by) for by in range(4)]
    for number, version in enumerate(versions):
        cache.store(version, 0, tokens_of(number), "alpha")
    found = [cache.lookup(version).get(0) for version in versions]
    assert found[0] is None
    assert [float(f.outputs["tokens"][0, 0]) for f in found[1:] if f] == [1, 2, 3]


def test_a_tolerance_reuses_tokens_of_nearly_equal_pixels_only() -> None:
    windows = windows_of()
    cache = TokenCache(LARGE, tolerance=3)
    cache.store(windows, 0, tokens_of(1), "alpha")
    assert 0 in cache.lookup(changed(windows, 0, 3))
    assert 0 not in cache.lookup(changed(windows, 0, 4))
    near = cache.lookup(changed(windows, 0, -3))[0]
    assert (near.pixels == windows.pixels[0]).all()  # not those that were looked up
    assert 0 not in cache.lookup(changed(windows, 0, -4))


def test_slow_changes_do_not_add_up_within_the_tolerance() -> None:
    windows = windows_of()
    cache = TokenCache(LARGE, tolerance=3)
    cache.store(windows, 0, tokens_of(1), "alpha")
    reused = [0 in cache.lookup(changed(windows, 0, by)) for by in range(8)]
    assert reused == [True] * 4 + [False] * 4


def test_changed_arrays_of_the_caller_do_not_change_the_cache() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    outputs = tokens_of(5)
    cache.store(windows, 0, outputs, "alpha")
    outputs["tokens"][:] = 9
    windows.pixels[0] += 1
    found = cache.lookup(windows_of())[0].outputs["tokens"]
    assert (found == 5).all()
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_a_row_does_not_keep_the_whole_reply_alive() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    reply = np.zeros((9, 16, 8), np.float32)
    cache.store(windows, 0, {"tokens": reply[0]}, "alpha")
    found = cache.lookup(windows)[0].outputs["tokens"]
    assert found.base is None
    assert not np.shares_memory(found, reply)


def test_tokens_that_were_recomputed_replace_those_of_the_node() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    fill(cache, windows, "alpha")
    before = cache.nbytes
    cache.store(windows, 3, tokens_of(33), HOME, frame=1)
    assert (len(cache), cache.nbytes) == (9, before)
    cache.forget("alpha")
    found = cache.lookup(windows)
    assert [*found] == [3]
    assert (found[3].outputs["tokens"] == 33).all()
    assert found[3].source == HOME


def test_a_liar_s_tokens_are_forgotten_and_nobody_else_s() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    for row in range(9):
        cache.store(windows, row, tokens_of(row), "liar" if row % 2 else "alpha")
    cache.forget("liar")
    assert sorted(cache.lookup(windows)) == [0, 2, 4, 6, 8]
    cache.forget("nobody")
    cache.clear()
    assert (cache.lookup(windows), len(cache), cache.nbytes) == ({}, 0, 0)


def test_the_least_recently_used_go_first() -> None:
    windows, cache = windows_of(), TokenCache(LARGE)
    cache.store(windows, 0, tokens_of(0), "alpha")
    cache.max_bytes = 3 * cache.nbytes
    cache.store(windows, 1, tokens_of(1), "alpha")
    cache.store(windows, 2, tokens_of(2), "alpha")
    only_first = dataclasses.replace(
        windows, pixels=windows.pixels[:1], extent=windows.extent[:1], window=windows.window[:1]
    )
    cache.lookup(only_first)
    cache.store(windows, 3, tokens_of(3), "alpha")
    assert sorted(cache.lookup(windows)) == [0, 2, 3]


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    windows, cache = windows_of(), TokenCache(100)
    fill(cache, windows)
    assert (len(cache), cache.nbytes, cache.lookup(windows)) == (0, 0, {})


def test_tokens_that_are_too_large_do_not_push_out_others() -> None:
    windows, cache = windows_of(), TokenCache(20_000)
    cache.store(windows, 0, tokens_of(1), "alpha")
    cache.store(windows, 1, {"tokens": np.zeros((100, 100), np.float32)}, "alpha")
    assert [*cache.lookup(windows)] == [0]


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 4), st.sampled_from(["a", "b", "forget"])),
        max_size=60,
    ),
    st.integers(0, 9),
)
def test_sizes_are_bounded_and_exact_and_tokens_are_those_stored_last(
    steps: list[tuple[int, int, str]], room: int
) -> None:
    base = windows_of()
    size = 16 * 16 * 3 + 16 * 8 * 4 + 1024
    cache = TokenCache(room * size)
    stored: dict[tuple[int, int], tuple[int, str]] = {}
    for number, (row, version, source) in enumerate(steps):
        if source == "forget":
            cache.forget("a")
            stored = {key: value for key, value in stored.items() if value[1] != "a"}
            continue
        cache.store(changed(base, row, version), row, tokens_of(number), source)
        stored[row, version] = number, source
        assert cache.nbytes <= cache.max_bytes
        assert cache.nbytes == len(cache) * size
        newest = cache.lookup(changed(base, row, version)).get(row)
        assert (newest is None) == (room == 0)
    for row in range(9):
        for version in range(5):
            found = cache.lookup(changed(base, row, version)).get(row)
            if found is not None:
                number, source = stored[row, version]
                assert (found.outputs["tokens"] == number).all()
                assert found.source == source


@pytest.mark.parametrize(("max_bytes", "tolerance"), [(-1, 0), (1, -1), (1, 256)])
def test_senseless_settings_are_refused(max_bytes: int, tolerance: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TokenCache(max_bytes, tolerance)
