"""Inputs for every stage of a bundle, with the outputs they should give.

Golden samples lie in the bundle and hold the original PyTorch model's outputs. Random samples are
drawn here; their outputs come from a reference engine. :mod:`engines.parity` runs and compares.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from edge_common.errors import BundleError, EngineError
from engines.bundle import COPY_AGAIN, EXPORT_AGAIN, UNREADABLE, Bundle, Stage, TensorSpec
from engines.dtypes import to_float32, to_stored
from engines.engine import check_feeds
from engines.geometry import Geometry

Arrays = dict[str, np.ndarray]

STAGES = ("head", "stack", "tail", "encoder", "decoder")
"""All stages, in the order in which data passes them."""

_ORIGINAL = "PyTorch"
_RANDOM_WINDOWS = 8
"""Most windows in a random sample: ONNX Runtime must compute them on the CPU too."""
_MAX_PROMPTS = 64


@dataclass
class Sample:
    """Inputs of every stage, and outputs where a reference has computed them.

    Attributes:
        inputs: ``golden`` or ``random``.
        arrays: named ``stage.tensor``: inputs as engines take them, outputs in float32.
        reference: the name of the reference that computed a stage's outputs, by stage.
    """

    inputs: Literal["golden", "random"]
    arrays: Arrays
    reference: dict[str, str] = field(default_factory=dict)

    def feeds(self, name: str, stage: Stage) -> Arrays:
        """The inputs of an engine of the stage."""
        return {spec.name: self.arrays[f"{name}.{spec.name}"] for spec in stage.inputs}

    def expected(self, name: str, stage: Stage) -> Arrays | None:
        """The expected outputs, float32; None without a reference."""
        if name not in self.reference:
            return None
        return {spec.name: self.arrays[f"{name}.{spec.name}"] for spec in stage.outputs}


def golden_samples(bundle: Bundle) -> list[Sample]:
    """The samples that the bundle was exported with.

    They are not trusted: sizes are bounded, pickle is off, every type and shape is checked.

    Raises:
        BundleError: there is none, or one is damaged or does not fit the bundle.
    """
    if not bundle.manifest.golden:
        raise BundleError(
            f"{bundle.path} holds no golden sample to measure against", mend=EXPORT_AGAIN
        )
    return [_golden(bundle, path) for path in bundle.verify_golden()]


def _golden(bundle: Bundle, path: Path) -> Sample:
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in order(bundle):
                stage = bundle.stage(name)
                for spec in (*stage.inputs, *stage.outputs):
                    key = source = f"{name}.{spec.name}"
                    if source == "decoder.embedding":  # stored once, as the output it is
                        source = f"{before(bundle, name)}.embedding"
                    arrays[key] = _read_array(file, source, spec, bundle.geometry)
                feeds = {spec.name: arrays[f"{name}.{spec.name}"] for spec in stage.inputs}
                dims = check_feeds(stage.inputs, feeds)
                for spec in stage.outputs:
                    _check_output(f"{name}.{spec.name}", arrays[f"{name}.{spec.name}"], spec, dims)
    except (EngineError, *UNREADABLE) as error:
        reason = str(error) or type(error).__name__
        raise BundleError(
            f"{path} is damaged: {reason}", mend=COPY_AGAIN, code="damaged"
        ) from error
    return Sample("golden", arrays, dict.fromkeys(order(bundle), _ORIGINAL))


def _read_array(
    file: zipfile.ZipFile, key: str, spec: TensorSpec, geometry: Geometry
) -> np.ndarray:
    info = file.getinfo(f"{key}.npy")
    most = {"n": geometry.windows}
    count = 1
    for dim in spec.shape:
        count *= dim if isinstance(dim, int) else most.get(dim, _MAX_PROMPTS)
    limit = count * max(4, spec.numpy_dtype.itemsize) + 4096
    if info.file_size > limit:
        raise ValueError(f"{key} has {info.file_size} bytes, expected at most {limit}")
    with file.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_output(key: str, array: np.ndarray, spec: TensorSpec, dims: Mapping[str, int]) -> None:
    shape = tuple(dim if isinstance(dim, int) else dims.get(dim, -1) for dim in spec.shape)
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"{key} is {array.dtype} {array.shape}, expected float32 {shape}")
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{key} is empty, or holds a NaN or an infinity")


def random_sample(bundle: Bundle, golden: Sample, rng: np.random.Generator) -> Sample:
    """Random inputs for every stage, without outputs.

    Pixels are noise and blobs, in windows with every kind of padding. Prompts are points, a box and
    a mask at random places. Inputs from an earlier stage have the golden sample's mean and spread;
    :func:`engines.parity.gate` replaces them by a reference's outputs. The same
    ``rng`` gives the same sample.
    """
    geometry = bundle.geometry
    window = _pick_windows(geometry, rng)
    count, w = len(window), geometry.window_pixels
    pixels = rng.integers(0, 256, (count, w, w, 3), np.uint8)
    for row in range(0, count, 2):
        pixels[row] = synthetic_image(w, w, int(rng.integers(1 << 31)))
    extent = np.empty((count, 2), np.int64)
    for row, index in enumerate(window):
        y0, x0, y1, x1 = geometry.window_rect(int(index))
        extent[row] = y1 - y0, x1 - x0
    partly = rng.random((count, 2)) < 0.3
    extent = np.where(partly, rng.integers(1, extent + 1), extent)
    rows, cols = np.arange(w)[:, None], np.arange(w)
    outside = (rows >= extent[:, 0, None, None]) | (cols >= extent[:, 1, None, None])
    pixels[outside] = 0
    present = np.zeros(geometry.windows, bool)
    present[window] = True
    own = {"pixels": pixels, "extent": extent, "window": window, "present": present}
    own.update(_prompts(geometry, rng))

    arrays: Arrays = {}
    for name in order(bundle):
        for spec in bundle.stage(name).inputs:
            array = own.get(spec.name)
            if array is None:
                like = to_float32(golden.arrays[f"{name}.{spec.name}"], spec.dtype)
                array = _alike(like, count, spec, rng)
            elif spec.shape[0] == geometry.windows and spec.name != "present":
                array = scatter(array, window, geometry)
            arrays[f"{name}.{spec.name}"] = to_stored(array, spec.dtype)
    return Sample("random", arrays)


def synthetic_image(height: int, width: int, seed: int) -> np.ndarray:
    """Coloured blobs with noise, uint8 ``[height, width, 3]``; the same for the same seed."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cell in (97, 31, 11, 1):
        coarse = rng.normal(size=(height // cell + 1, width // cell + 1, 3))
        rows, cols = np.arange(height) // cell, np.arange(width) // cell
        image += coarse[rows][:, cols] * (40 if cell > 1 else 8)
    return np.clip(image + 120, 0, 255).astype(np.uint8)


def _pick_windows(geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    """Some windows in random order, with one of the last row, the last column and the corner."""
    side = geometry.windows_per_side
    last_row = geometry.windows - 1 - int(rng.integers(side))
    last_column = side * int(rng.integers(1, side + 1)) - 1
    chosen = {geometry.windows - 1, last_row, last_column}
    for index in rng.permutation(geometry.windows):
        if len(chosen) >= min(_RANDOM_WINDOWS, geometry.windows):
            break
        chosen.add(int(index))
    return rng.permutation(np.array(sorted(chosen), np.int64))


def _prompts(geometry: Geometry, rng: np.random.Generator) -> Arrays:
    """Four prompts: a point; a box; a point on and one off the object; a point and a mask."""
    corners = np.sort(rng.uniform(0, geometry.image_size, (2, 2)), axis=0)
    coords = rng.uniform(0, geometry.image_size, (4, 2, 2))
    coords[1] = corners
    coords[[0, 3], 1] = 0  # the padding point that SAM adds to points without a box
    mask = np.zeros((4, 1, geometry.low_res, geometry.low_res), np.float32)
    hint = synthetic_image(geometry.low_res, geometry.low_res, int(rng.integers(1 << 31)))
    mask[3, 0] = (hint[..., 0].astype(np.float32) - 120) / 10
    return {
        "point_coords": coords.astype(np.float32),
        "point_labels": np.array([[1, -1], [2, 3], [1, 0], [1, -1]], np.float32),
        "mask_input": mask,
        "has_mask_input": np.array([0, 0, 0, 1], np.float32),
    }


def _alike(like: np.ndarray, rows: int, spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    """Normal values with the mean and spread of each channel of ``like`` [n, t, c], [1, d, g, g].

    Rows that are all zero are absent windows and are not counted.
    """
    known = like[np.abs(like).reshape(len(like), -1).max(1) > 0]
    known = known if len(known) else like
    axes = (0, 1) if like.ndim == 3 else (0, 2, 3)
    mean, spread = known.mean(axes, keepdims=True), known.std(axes, keepdims=True)
    shape = tuple(dim if isinstance(dim, int) else rows for dim in spec.shape)
    return (mean + spread * rng.standard_normal(shape)).astype(np.float32)


def scatter(rows: np.ndarray, window: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Put rows at their window's index among all windows; the rest is zero."""
    full = np.zeros((geometry.windows, *rows.shape[1:]), rows.dtype)
    full[window] = rows
    return full


def order(bundle: Bundle) -> list[str]:
    """The bundle's stages, in the order in which data passes them."""
    return [name for name in STAGES if bundle.has(name)]


def before(bundle: Bundle, name: str) -> str | None:
    """The stage before; None for the first."""
    names = order(bundle)
    index = names.index(name)
    return names[index - 1] if index else None


def linked(bundle: Bundle, name: str, sample: Sample, outputs: Arrays) -> Arrays:
    """The sample's inputs of a stage, with ``outputs`` of the stage before in their place."""
    stage = bundle.stage(name)
    feeds = sample.feeds(name, stage)
    for spec in stage.inputs:
        if spec.name in outputs:
            array = outputs[spec.name]
            if name == "tail":
                array = scatter(array, sample.arrays["stack.window"], bundle.geometry)
            feeds[spec.name] = array
    return feeds
