from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_common.errors import BundleError
from engines.bundle import Bundle, hash_file, node_bundle, shipped_bundle
from engines.dtypes import to_float32
from engines.engine import check_feeds
from engines.geometry import Geometry
from engines.samples import (
    Sample,
    _alike,
    _pick_windows,
    golden_samples,
    linked,
    order,
    random_sample,
    synthetic_image,
)


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle("fp16"))


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(shipped_bundle("fp32"), tmp_path / "b"))


def rewrite(bundle: Bundle, **changes: Any) -> Bundle:
    """Change arrays of the golden sample by name (dots as __). None removes one."""
    (name,) = bundle.manifest.golden
    path = bundle.path / name
    with np.load(path) as stored:
        arrays = dict(stored)
    for key, array in changes.items():
        tensor = key.replace("__", ".")
        arrays.pop(tensor)
        if array is not None:
            arrays[tensor] = array
    np.savez_compressed(path, **arrays)
    return vouching(bundle)


def vouching(bundle: Bundle) -> Bundle:
    """The bundle with a manifest that has the golden sample's current hash."""
    (name,) = bundle.manifest.golden
    golden = {name: hash_file(bundle.path / name)}
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, golden=golden))


def test_the_golden_sample_fits_its_bundle(bundle: Bundle) -> None:
    (sample,) = golden_samples(bundle)
    assert sample.inputs == "golden"
    for name, stage in bundle.manifest.stages.items():
        check_feeds(stage.inputs, sample.feeds(name, stage))
        wanted = sample.expected(name, stage)
        assert wanted is not None
        assert all(array.dtype == np.float32 for array in wanted.values())
    embedding = sample.arrays["tail.embedding"]
    np.testing.assert_array_equal(sample.arrays["decoder.embedding"], embedding)


def test_the_golden_sample_of_a_node_bundle(bundle: Bundle, tmp_path: Path) -> None:
    node = node_bundle(bundle, tmp_path / "node")
    (sample,) = golden_samples(node)
    assert order(node) == ["stack"]
    assert sample.reference == {"stack": "PyTorch"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stack__tokens": None}, "stack.tokens.npy"),
        ({"stack__window": np.arange(6)}, "makes n 6"),
        ({"stack__pixels": np.zeros((5, 40, 40, 3), np.float32)}, "pixels is float32"),
        ({"tail__embedding": np.zeros((1, 128, 24, 24), np.float16)}, "expected float32"),
        ({"tail__embedding": np.full((1, 128, 24, 24), np.nan, np.float32)}, "NaN"),
        ({"decoder__iou": np.full((3, 4), np.inf, np.float32)}, "infinity"),
        ({"stack__tokens": np.zeros((500, 25, 128), np.float32)}, "expected at most"),
        ({"decoder__iou": np.array([{}], object)}, "pickle|Object arrays"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(
    copy: Bundle, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BundleError, match=rf"0\.npz is damaged: .*({reason})"):
        golden_samples(rewrite(copy, **changes))


@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize("kind", ["cropped", "flipped", "empty", "text", "huge header"])
def test_a_damaged_file_is_refused(copy: Bundle, kind: str, vouched: bool) -> None:
    (name,) = copy.manifest.golden
    path = copy.path / name
    data = bytearray(path.read_bytes())
    if kind == "cropped":
        del data[len(data) // 2 :]
    elif kind == "flipped":
        data[len(data) // 3] ^= 0xFF
    elif kind in ("empty", "text"):
        data = bytearray(b"" if kind == "empty" else b"not a zip file")
    path.write_bytes(data)
    if kind == "huge header":
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (1 << 45,)}
        np.lib.format.write_array_header_1_0(header, shape)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("stack.pixels.npy", header.getvalue())
    with pytest.raises(BundleError, match=r"0\.npz is damaged: .+: copy the bundle again"):
        golden_samples(vouching(copy) if vouched else copy)


def test_a_bundle_without_samples_is_refused(bundle: Bundle) -> None:
    bare = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, golden={}))
    with pytest.raises(BundleError, match="no golden sample"):
        golden_samples(bare)


def draw(bundle: Bundle, *seed: int) -> Sample:
    golden = golden_samples(bundle)[0]
    return random_sample(bundle, golden, np.random.default_rng(seed))


def test_the_same_seed_draws_the_same_sample(bundle: Bundle) -> None:
    one, same, other = draw(bundle, 1, 0), draw(bundle, 1, 0), draw(bundle, 1, 1)
    assert one.arrays.keys() == same.arrays.keys()
    for key, array in one.arrays.items():
        np.testing.assert_array_equal(array, same.arrays[key])
    assert (one.arrays["stack.pixels"] != other.arrays["stack.pixels"]).any()


@pytest.mark.parametrize("seed", range(5))
def test_random_inputs_resemble_those_of_an_image(bundle: Bundle, seed: int) -> None:
    sample, g = draw(bundle, seed), bundle.geometry
    for name, stage in bundle.manifest.stages.items():
        check_feeds(stage.inputs, sample.feeds(name, stage))
        assert sample.expected(name, stage) is None
    window, extent = sample.arrays["stack.window"], sample.arrays["stack.extent"]
    assert len(set(window)) == len(window) == 8
    assert window.max() == g.windows - 1
    assert sorted(window) == list(np.flatnonzero(sample.arrays["tail.present"]))
    for index, (rows, cols), pixels in zip(
        window, extent, sample.arrays["stack.pixels"], strict=True
    ):
        y0, x0, y1, x1 = g.window_rect(int(index))
        assert 1 <= rows <= y1 - y0
        assert 1 <= cols <= x1 - x0
        assert not pixels[rows:].any()
        assert not pixels[:, cols:].any()
        assert pixels[:rows, :cols].any()
    tokens = to_float32(sample.arrays["tail.tokens"], "float16")
    golden = golden_samples(bundle)[0].arrays["stack.tokens"]
    assert 0.5 < tokens.std() / golden.std() < 2
    coords = sample.arrays["decoder.point_coords"]
    assert (coords[1, 0] <= coords[1, 1]).all(), "a box from its left top corner"


def test_some_random_windows_are_partly_outside_the_image(bundle: Bundle) -> None:
    cut_short = [0, 0]
    for seed in range(4):
        sample = draw(bundle, seed)
        for index, extent in zip(
            sample.arrays["stack.window"], sample.arrays["stack.extent"], strict=True
        ):
            y0, x0, y1, x1 = bundle.geometry.window_rect(int(index))
            cut_short[0] += extent[0] < y1 - y0
            cut_short[1] += extent[1] < x1 - x0
    assert all(0 < number < 32 for number in cut_short)


def test_every_window_is_drawn_sooner_or_later() -> None:
    for geometry in (Geometry(40, 4, 4, 8, 4), Geometry(8, 4, 2, 8, 4)):
        rng = np.random.default_rng(0)
        seen = {int(i) for _ in range(30) for i in _pick_windows(geometry, rng)}
        assert seen == set(range(geometry.windows))


def test_samples_of_other_kinds_of_bundle(make_toy_bundle: Any, tmp_path: Path) -> None:
    for flags in ({"head": True}, {"stock": True}):
        bundle = Bundle.load(make_toy_bundle(tmp_path / str(flags), **flags))
        shapes = {"n": 2, "p": 2, "k": 2}
        arrays = {
            f"{name}.{spec.name}": np.ones(
                [shapes.get(d, d) if isinstance(d, str) else d for d in spec.shape],
                spec.numpy_dtype,
            )
            for name, stage in bundle.manifest.stages.items()
            for spec in stage.inputs
        }
        sample = random_sample(bundle, Sample("golden", arrays), np.random.default_rng(0))
        for name, stage in bundle.manifest.stages.items():
            check_feeds(stage.inputs, sample.feeds(name, stage))


def test_absent_windows_do_not_reduce_the_random_sample(bundle: Bundle) -> None:
    like = np.zeros((4, 100, 3), np.float32)
    like[1] = np.random.default_rng(0).normal(5, 2, (100, 3))
    spec = bundle.stage("tail").inputs[0]
    spec = msgspec.structs.replace(spec, shape=("n", 100, 3))
    drawn = _alike(like, 50, spec, np.random.default_rng(1))
    assert drawn.shape == (50, 100, 3)
    assert abs(drawn.mean() - 5) < 0.5
    assert abs(drawn.std() - 2) < 0.5


def test_linked_feeds_put_windows_at_their_place(bundle: Bundle) -> None:
    (sample,) = golden_samples(bundle)
    sample.arrays["stack.window"] = np.array([3, 0, 1, 2, 4])
    tokens = np.arange(5, dtype=np.float16)[:, None, None] * np.ones((5, 25, 128), np.float16)
    feeds = linked(bundle, "tail", sample, {"tokens": tokens})
    assert feeds["tokens"][:, 0, 0].tolist() == [1, 2, 3, 0, 4] + [0] * 20
    np.testing.assert_array_equal(feeds["present"], sample.arrays["tail.present"])


def test_a_synthetic_image_follows_from_its_seed() -> None:
    image = synthetic_image(50, 70, 3)
    assert image.shape == (50, 70, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, synthetic_image(50, 70, 3))
    assert (image != synthetic_image(50, 70, 4)).any()
    assert image.std() > 20
