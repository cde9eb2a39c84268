from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_common.errors import ImageError
from edge_runtime.imaging.images import (
    load_image,
    resize_longest,
    transform_coords,
    upscale,
    upscale_mask,
)
from engines.geometry import resized_shape

SHAPES = [
    (1, 1),
    (1, 10_000),
    (10_000, 1),
    (2, 4_000),
    (3, 5),
    (37, 53),
    (144, 144),
    (255, 256),
    (480, 640),
    (683, 1024),
    (1024, 1024),
    (1025, 1023),
    (2000, 1500),
]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise over a gradient: every pixel differs, and every corner."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 128, height)[:, None] + np.linspace(0, 64, width)
    return (ramp[..., None] + rng.integers(0, 60, (height, width, 3))).astype(np.uint8)


# Reading ----------------------------------------------------------------------------------------


def test_an_rgb_image_is_read_unchanged(tmp_path: Path) -> None:
    image = picture(5, 7)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(found, image)
    found[:] = 0  # the caller owns the array


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = picture(5, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(image).save(path, exif=exif, **options)
    np.testing.assert_array_equal(load_image(path), TURNS[orientation](image))


def test_a_phones_upright_jpeg_has_the_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30] = 255  # top left as stored, top right as intended
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = load_image(tmp_path / "a.jpg")
    assert found.shape == (60, 40, 3)
    assert found[5, 35].min() > 250
    assert found[5, 5].max() < 5


def test_damaged_exif_beside_sound_pixels_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(picture(8, 8)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"
    )
    assert load_image(tmp_path / "a.jpg").shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "I", "LA", "PA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.array([0, 255], np.uint8), (4, 3))
    if mode in {"I;16", "I"}:
        values = grey.astype(np.uint16) * 257
        image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    elif mode == "PA":
        image = Image.fromarray(grey).convert("P").convert("PA")
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    path = tmp_path / ("a.png" if mode in {"1", "L", "P", "I;16", "LA"} else "a.tiff")
    image.save(path)
    found = load_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), np.repeat(grey[..., None], 3, 2), atol=1)


def test_16_bit_images_are_scaled_over_their_full_range(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match="floating-point"):
        load_image(tmp_path / "f.tiff")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "i.tiff")
    with pytest.raises(ImageError, match="from 70000 to 70000, expected 16 bits"):
        load_image(tmp_path / "i.tiff")


def test_transparency_is_blended_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 100, 50, 255], [200, 100, 50, 0], [0, 0, 0, 128]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")[0]
    assert found[0].tolist() == [200, 100, 50]
    assert found[1].tolist() == [255, 255, 255]  # the hidden colour stays hidden
    np.testing.assert_allclose(found[2], 127, atol=1)


def test_a_transparent_palette_entry_is_blended_over_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0)
    assert load_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_a_transparent_colour_is_white_and_stays_hidden(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)).save(
        tmp_path / "a.png", transparency=(10, 20, 30)
    )
    assert load_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (6, 4), value) for value in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").min() == 255


def refused(path: Path, reason: str, **limits: float) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path, **limits)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.png", "does not exist")
    refused(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "not an image this program reads")
    (tmp_path / "text.jpg").write_text("hello")
    refused(tmp_path / "text.jpg", "not an image this program reads")


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    refused(tmp_path / "a.eps", "not an image this program reads")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "gif"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(64, 64)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, r"damaged or truncated|not an image")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["jpg", "png", "tiff", "webp", "gif", "bmp"]))
def test_a_damaged_file_gives_an_image_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    Image.fromarray(picture(16, 24)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    refusal: Exception | None = None
    try:
        found = load_image(path, max_megapixels=1)
        assert found.dtype == np.uint8
        assert found.shape[2] == 3
    except ImageError as error:
        refusal = error
    assert "\n" not in str(refusal)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and contains almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.parametrize("side", [10_001, 50_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    refused(tmp_path / "bomb.png", "limit is 100 megapixels")


def test_the_pixel_limit_can_be_set_and_is_exact(tmp_path: Path) -> None:
    Image.new("L", (1000, 1000)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_megapixels=1).shape == (1000, 1000, 3)
    refused(tmp_path / "a.png", r"1000 x 1000 pixels, the limit is 0\.5", max_megapixels=0.5)


def test_50_megapixels_are_read_and_resized(tmp_path: Path) -> None:
    Image.new("L", (8660, 5774), 77).save(tmp_path / "a.jpg")
    image = load_image(tmp_path / "a.jpg")
    assert image.shape == (5774, 8660, 3)
    small = resize_longest(image, 1024)
    assert small.shape == (683, 1024, 3)
    assert (small == 77).all()


# Resizing, coordinates ---------------------------------------------------------------------------


def sams_transform(size: int) -> Any:
    transforms = pytest.importorskip("segment_anything.utils.transforms")
    return transforms.ResizeLongestSide(size)


@pytest.mark.parametrize("size", [144, 192, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_resize_equals_sam_s_bit_for_bit(shape: tuple[int, int], size: int) -> None:
    image = picture(*shape)
    found = resize_longest(image, size)
    assert found.shape == (*resized_shape(*shape, size), 3)
    reference = sams_transform(size)
    if 0 in reference.get_preprocess_shape(*shape, size):
        assert min(found.shape) == 1  # SAM itself fails on these
    else:
        np.testing.assert_array_equal(found, reference.apply_image(image))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([97, 144, 192]))
def test_resize_equals_sam_s_for_any_shape(height: int, width: int, size: int) -> None:
    reference = sams_transform(size)
    if 0 not in reference.get_preprocess_shape(height, width, size):
        image = picture(height, width)
        np.testing.assert_array_equal(resize_longest(image, size), reference.apply_image(image))


@pytest.mark.parametrize("turned", [False, True])
def test_half_a_pixel_is_rounded_up_as_in_sam(turned: bool) -> None:
    """1365 becomes 682.5. Python and NumPy would round that to the even 682."""
    shape = (2048, 1365) if turned else (1365, 2048)
    found = resize_longest(np.zeros((*shape, 3), np.uint8), 1024)
    assert sorted(found.shape) == [3, 683, 1024]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_images_that_are_not_rgb_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="expected uint8"):
        resize_longest(image, 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_coordinates_equal_sam_s(height: int, width: int) -> None:
    reference = sams_transform(1024)
    if 0 in reference.get_preprocess_shape(height, width, 1024):
        return
    points = np.random.default_rng(0).uniform(0, 5000, (3, 2, 2))
    kept = points.copy()
    found = transform_coords(points, (height, width), resized_shape(height, width, 1024))
    np.testing.assert_array_equal(found, reference.apply_coords(points, (height, width)))
    np.testing.assert_array_equal(points, kept)
    assert transform_coords(np.array([[3, 4]]), (2, 2), (1, 1)).tolist() == [[1.5, 2.0]]


# Upscaling ---------------------------------------------------------------------------------------


def postprocess_masks(
    low_res: np.ndarray, size: int, resized: tuple[int, int], original: tuple[int, int]
) -> np.ndarray:
    """``Sam.postprocess_masks`` itself, on a stub with the one model field that it reads."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from segment_anything.modeling import Sam

    model: Any = SimpleNamespace(image_encoder=SimpleNamespace(img_size=size))
    masks = torch.from_numpy(low_res)[None]
    return Sam.postprocess_masks(model, masks, resized, original)[0].numpy()


def logits(size: int, masks: int = 2) -> np.ndarray:
    """Noise: neighbours differ by more than in any real mask."""
    rng = np.random.default_rng(size)
    return (rng.standard_normal((masks, size, size)) * 8).astype(np.float32)


@pytest.mark.parametrize(("size", "low"), [(1024, 256), (192, 96), (144, 72)])
@pytest.mark.parametrize("shape", SHAPES)
def test_upscale_equals_sam_s(shape: tuple[int, int], size: int, low: int) -> None:
    low_res, resized = logits(low), resized_shape(*shape, size)
    found = upscale(low_res, size, resized, shape)
    assert found.dtype == np.float32
    expected = postprocess_masks(low_res, size, resized, shape)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(upscale_mask(low_res, size, resized, shape), found > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(-3, 3))
def test_upscale_equals_sam_s_for_any_shape(height: int, width: int, threshold: float) -> None:
    low_res, resized = logits(24, masks=1), resized_shape(height, width, 48)
    found = upscale(low_res, 48, resized, (height, width))
    expected = postprocess_masks(low_res, 48, resized, (height, width))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    mask = upscale_mask(low_res, 48, resized, (height, width), threshold)
    np.testing.assert_array_equal(mask, found > threshold)


@pytest.mark.parametrize("threshold", [0.0, -1.5])
def test_a_logit_equal_to_the_threshold_is_outside_the_mask(threshold: float) -> None:
    logits = np.full((1, 8, 8), threshold, np.float32)
    assert not upscale_mask(logits, 32, (32, 24), (60, 45), threshold).any()
    above = np.nextafter(logits, np.float32(np.inf))
    assert upscale_mask(above, 32, (32, 24), (60, 45), threshold).all()


def test_leading_dimensions_are_kept() -> None:
    low_res = logits(24, masks=6).reshape(2, 3, 24, 24)
    found = upscale(low_res, 48, (48, 30), (9, 6))
    assert found.shape == (2, 3, 9, 6)
    np.testing.assert_array_equal(found[1, 2], upscale(low_res[1, 2], 48, (48, 30), (9, 6)))
    assert upscale_mask(low_res[:, :0], 48, (48, 30), (9, 6)).shape == (2, 0, 9, 6)


def test_logits_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        upscale(np.zeros((2, 3), np.float32), 48, (48, 48), (5, 5))


MEMORY = """
import resource, sys
import numpy as np
from edge_runtime.imaging.images import upscale_mask
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
low = np.random.default_rng(0).standard_normal((3, 256, 256)).astype(np.float32)
upscale_mask(low, 1024, (1024, 1024), (64, 64))
before = peak()
masks = upscale_mask(low, 1024, (723, 1024), (5946, 8418))
print(peak() - before, masks.nbytes / 2**20, masks.mean())
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_masks_of_50_megapixels_need_little_extra_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    grown, masks, share = map(float, done.stdout.split())
    assert 0.3 < share < 0.7
    # At full size, the logits of one mask would take 191 MiB.
    assert grown < masks + 100
