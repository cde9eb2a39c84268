"""OffloadPredictor compared with segment_anything's own SamPredictor."""

from __future__ import annotations

import inspect
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_common.errors import BundleError, ConfigError, ImageError, OffloadError, PromptError
from edge_runtime.imaging.images import as_rgb
from edge_runtime.predictor import OffloadPredictor

SIZES = [(144, 144), (300, 401), (97, 33), (7, 500), (1, 1), (801, 600)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coarse random blotches, so that masks have an inside and an outline."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1)[:height, :width])


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> Any:
    """The original predictor on the reordered original blocks."""
    segment_anything = pytest.importorskip("segment_anything")
    from exporters.models import load_checkpoint, reorder

    return segment_anything.SamPredictor(reorder(load_checkpoint(random_checkpoint)))


@pytest.fixture(scope="module")
def predictor(random_bundle: Path) -> Iterator[OffloadPredictor]:
    with OffloadPredictor(bundle=random_bundle, threads=1) as predictor:
        yield predictor


def prompts(height: int, width: int, low_res: np.ndarray) -> dict[str, dict[str, Any]]:
    """One prompt of every kind, in pixels of an image of that size."""
    at = np.array([width, height])
    points = {
        "point_coords": np.array([[0.3, 0.4], [0.8, 0.1], [0.0, 1.0]]) * at,
        "point_labels": np.array([1, 0, 1]),
    }
    box = np.array([0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height])
    return {
        "point": {"point_coords": points["point_coords"][:1], "point_labels": np.array([1])},
        "points": points,
        "box": {"box": box},
        "box as a row of integers": {"box": box.astype(int)[None]},
        "points and box": {**points, "box": box},
        "mask": {"mask_input": low_res},
        "points, box and mask": {**points, "box": box, "mask_input": low_res},
        "nothing": {},
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_results_equal_the_original_s(
    size: tuple[int, int], predictor: OffloadPredictor, reference: Any
) -> None:
    image = picture(*size)
    predictor.set_image(image)
    reference.set_image(image)
    assert predictor.original_size == tuple(reference.original_size)
    assert predictor.input_size == tuple(reference.input_size)
    embedding = reference.get_image_embedding().numpy()
    np.testing.assert_allclose(predictor.get_image_embedding(), embedding, atol=1e-4)
    low_res = reference.predict(np.array([[1, 1]]), np.array([1]), multimask_output=False)[2]
    pixels = different = 0
    for kind, prompt in prompts(*size, low_res).items():
        for multimask in (True, False):
            ours = predictor.predict(**prompt, multimask_output=multimask, return_logits=True)
            theirs = reference.predict(**prompt, multimask_output=multimask, return_logits=True)
            for one, other in zip(ours, theirs, strict=True):
                assert one.shape == other.shape, kind
                assert one.dtype == other.dtype, kind
                np.testing.assert_allclose(one, other, atol=1e-3, err_msg=kind)
            masks = predictor.predict(**prompt, multimask_output=multimask)[0]
            wanted = reference.predict(**prompt, multimask_output=multimask)[0]
            assert masks.dtype == wanted.dtype == np.bool_
            pixels += masks.size
            different += int((masks != wanted).sum())
    assert different <= max(1e-5 * pixels, 0)
    assert predictor.image is not None
    assert min(ours.decoder_ms, ours.upscale_ms, predictor.image.timing.encode) > 0


def test_masks_of_the_comparison_are_not_trivial(predictor: OffloadPredictor) -> None:
    predictor.set_image(picture(300, 401))
    masks, iou, low_res = predictor.predict(np.array([[120, 80]]), np.array([1]))
    assert masks.shape == (3, 300, 401)
    assert iou.shape == (3,)
    assert 0.02 < masks.mean() < 0.98
    other = predictor.predict(np.array([[300, 250]]), np.array([1]))[2]
    assert abs(other - low_res).max() > 0.01  # the click changes the result


def test_bgr_is_rgb_with_reversed_channels(predictor: OffloadPredictor) -> None:
    image = picture(60, 90)
    predictor.set_image(image)
    rgb = predictor.get_image_embedding()
    predictor.set_image(np.ascontiguousarray(image[..., ::-1]), image_format="BGR")
    np.testing.assert_array_equal(predictor.get_image_embedding(), rgb)
    predictor.set_image(image, image_format="BGR")
    assert not np.array_equal(predictor.get_image_embedding(), rgb)


def test_signatures_equal_the_original_s(reference: Any) -> None:
    for name in ("set_image", "predict", "reset_image", "get_image_embedding"):
        every = inspect.signature(getattr(OffloadPredictor, name)).parameters.values()
        ours = [p for p in every if p.kind is not p.KEYWORD_ONLY]  # options of our own
        theirs = inspect.signature(getattr(type(reference), name)).parameters.values()
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def raised(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        call()
    return caught.type, str(caught.value)


def test_errors_that_callers_rely_on_equal_the_original_s(
    predictor: OffloadPredictor, reference: Any
) -> None:
    image = picture(60, 90)
    calls: list[Callable[[Any], object]] = [
        lambda p: p.predict(np.array([[1, 1]]), np.array([1])),
        lambda p: p.get_image_embedding(),
        lambda p: p.set_image(image, image_format="HSV"),
    ]
    for p in (predictor, reference):
        p.reset_image()
        assert p.is_image_set is False
        assert p.features is None
    for call in calls:
        assert raised(lambda: call(predictor)) == raised(lambda: call(reference))  # noqa: B023
    predictor.set_image(image)
    reference.set_image(image)
    call = lambda p: p.predict(np.array([[1, 1]]))  # noqa: E731
    assert raised(lambda: call(predictor)) == raised(lambda: call(reference))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"point_coords": np.zeros((1, 3)), "point_labels": np.ones(1)}, r"\[1, 3\]"),
        ({"point_coords": np.zeros((2, 2)), "point_labels": np.ones(1)}, r"\[2, 2\].*\[1\]"),
        ({"point_coords": np.zeros((1, 2)), "point_labels": np.array([2])}, "point_labels must"),
        ({"point_coords": np.full((1, 2), np.nan), "point_labels": np.ones(1)}, "not finite"),
        ({"point_coords": [["a", "b"]], "point_labels": np.ones(1)}, "numbers"),
        ({"box": np.zeros(3)}, "expected 4 numbers"),
        ({"box": np.zeros((2, 4))}, "once per box"),
        ({"box": np.full(4, np.inf)}, "not finite"),
        ({"mask_input": np.zeros((1, 3, 3))}, "mask_input has shape"),
    ],
)
def test_malformed_prompts_are_refused(
    prompt: dict[str, Any], says: str, predictor: OffloadPredictor
) -> None:
    predictor.set_image(picture(60, 90))
    with pytest.raises(PromptError, match=says):
        predictor.predict(**prompt)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        "photo.jpg",
    ],
)
def test_a_malformed_image_is_refused_and_no_image_is_set(
    image: Any, predictor: OffloadPredictor
) -> None:
    predictor.set_image(picture(60, 90))
    with pytest.raises(ImageError):
        predictor.set_image(image)
    assert not predictor.is_image_set


def test_a_loaded_predictor_needs_no_bundle_files(toy_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy_bundle, copy)
    with OffloadPredictor(bundle=copy, threads=1) as predictor:
        predictor.load()
        shutil.rmtree(copy)
        predictor.set_image(picture(30, 40))
        predictor.predict(np.array([[5, 6]]), np.array([1]))


def test_the_error_says_which_argument_to_pass(predictor: OffloadPredictor) -> None:
    with pytest.raises(ImageError, match=r"was given str; expected a uint8 array .*load_image"):
        predictor.set_image("photo.jpg")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"was given array \(5, 5\)"):
        predictor.set_image(np.zeros((5, 5), np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1"])
def test_pillow_images_of_every_mode_are_accepted(mode: str, predictor: OffloadPredictor) -> None:
    image = Image.fromarray(picture(60, 90))
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    predictor.set_image(image)
    assert predictor.original_size == (60, 90)
    embedding = predictor.get_image_embedding()
    expected = as_rgb(image, "x")
    predictor.set_image(expected)
    np.testing.assert_array_equal(predictor.get_image_embedding(), embedding)
    predictor.set_image(image, image_format="BGR")  # ignored: the image knows its own format
    np.testing.assert_array_equal(predictor.get_image_embedding(), embedding)


def test_pillow_images_with_values_out_of_range_are_refused(predictor: OffloadPredictor) -> None:
    with pytest.raises(ImageError, match="the image holds floating-point pixels"):
        predictor.set_image(Image.new("F", (9, 9)))


# -- through nodes, on the toy bundle -----------------------------------------------------------


@pytest.mark.process
def test_configuration_settings_can_be_overridden(
    shared_fleet: Any, photo: np.ndarray, toy_bundle: Path
) -> None:
    changes: dict[str, Any] = {"max_exposure": 0.45, "deadline_s": 20.0, "fallback": "local"}
    with OffloadPredictor(shared_fleet.config(), threads=1, **changes) as predictor:
        assert predictor.offloader is not None
        config = predictor.offloader.config
        assert (config.max_exposure, config.deadline_s, config.fallback) == (0.45, 20.0, "local")
    for name, bad in (("max_exposure", 0.0), ("deadline_s", -1.0), ("fallback", "lokal")):
        with pytest.raises(ConfigError, match=name):
            OffloadPredictor(shared_fleet.config(), **{name: bad})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{name} is about nodes"):
            OffloadPredictor(bundle=toy_bundle, **{name: changes[name]})


@pytest.mark.process
def test_results_through_nodes_are_bit_identical_to_local(
    shared_fleet: Any, photo: np.ndarray
) -> None:
    bundle = shared_fleet.bundle
    with (
        OffloadPredictor(shared_fleet.config(), threads=1) as remote,
        OffloadPredictor(bundle=bundle, threads=1) as local,
    ):
        for p in (remote, local):
            p.set_image(photo)
        assert remote.features is not None
        np.testing.assert_array_equal(remote.features, local.features)
        assert remote.image.stack_outputs is not None
        assert local.image.stack_outputs is not None
        np.testing.assert_array_equal(
            remote.image.stack_outputs["tokens"], local.image.stack_outputs["tokens"]
        )
        click = (np.array([[40, 20]]), np.array([1]))
        for one, other in zip(remote.predict(*click), local.predict(*click), strict=True):
            np.testing.assert_array_equal(one, other)
        assert local.report is None
        assert remote.report is not None
        assert remote.report.windows_sent == 6


@pytest.mark.process
def test_configuration_file_and_explicit_bundle(
    shared_fleet: Any, photo: np.ndarray, tmp_path: Path
) -> None:
    config = shared_fleet.config()
    lines = [f'secret = "{config.secret}"', "deadline_s = 30"]
    for node in config.nodes:
        lines += ["[[nodes]]", f'name = "{node.name}"', f'endpoint = "{node.endpoint}"']
        lines += [f'server_key = "{node.server_key}"', f'client_key = "{node.client_key}"']
    path = tmp_path / "edge.toml"
    path.write_text("\n".join(lines))
    with OffloadPredictor(path, bundle=shared_fleet.bundle) as predictor:
        predictor.set_image(photo)
        assert predictor.report is not None


@pytest.mark.process
def test_a_failed_image_leaves_no_image_set(shared_fleet: Any, photo: np.ndarray) -> None:
    config = shared_fleet.config()
    with OffloadPredictor(config, threads=1) as predictor:
        predictor.set_image(photo)
        assert predictor.offloader is not None
        predictor.offloader.config = msgspec.structs.replace(config, deadline_s=1e-6)
        with pytest.raises(OffloadError):
            predictor.set_image(photo)
        assert not predictor.is_image_set
        assert predictor.features is None
        with pytest.raises(RuntimeError):
            predictor.predict(np.array([[1, 1]]), np.array([1]))


@pytest.mark.process
def test_engines_are_opened_before_the_deadline_begins(
    shared_fleet: Any, make_toy_bundle: Callable[..., Path], tmp_path: Path, photo: np.ndarray
) -> None:
    for stage, config in (
        ("head", shared_fleet.config()),
        ("stack", shared_fleet.config(fallback="local")),
    ):
        bundle = make_toy_bundle(tmp_path / stage, head=True)
        (bundle / f"{stage}.onnx").write_bytes(b"broken")
        before = threading.active_count()
        with OffloadPredictor(config, bundle=bundle) as predictor:
            with pytest.raises(BundleError, match=rf"{stage}\.onnx is damaged"):
                predictor.set_image(photo)
            assert predictor.report is None  # no node was asked for anything
        assert threading.active_count() == before


def test_a_stock_bundle_works_locally(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, toy_bundle: Path, photo: np.ndarray
) -> None:
    stock = make_toy_bundle(tmp_path / "stock", stock=True)
    with OffloadPredictor(bundle=stock) as one, OffloadPredictor(bundle=toy_bundle) as other:
        one.set_image(photo)
        other.set_image(photo)
        assert one.image.stack_outputs is None
        np.testing.assert_allclose(one.get_image_embedding(), other.get_image_embedding(), 1e-5)
