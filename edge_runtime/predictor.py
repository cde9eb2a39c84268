"""`OffloadPredictor`: the interface of `segment_anything.SamPredictor`, without torch.

The embedding is computed once per image, by nodes or on this machine. Prompts never leave it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_common.errors import ConfigError, ImageError, PromptError
from edge_common.progress import progress
from edge_runtime.config import EdgeConfig, Fallback, Region, check_region, load_config
from edge_runtime.exposure.regions import windows_in
from edge_runtime.imaging.images import (
    as_rgb,
    resize_longest,
    transform_coords,
    upscale,
    upscale_mask,
)
from edge_runtime.offload.mode import Choice, ModeChooser
from edge_runtime.offload.offloader import Offloader
from edge_runtime.offload.recheck import recheck_rate
from edge_runtime.offload.report import OffloadReport, RunRecord
from engines.bundle import Bundle, shipped_bundle
from engines.engine import Device
from engines.pipeline import Encoding, Pipeline
from engines.windows import Windows, cut

if TYPE_CHECKING:
    from PIL import Image

    from edge_runtime.stream import FrameStream


_AT_ONCE = 5
"""Windows that a CPU computes at once. More would not be faster, but take more memory."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds that an image took.

    Attributes:
        windows: resizing and cutting it.
        encode: the nodes, or this machine's stack (of a stock bundle, its encoder).
        tail: the global layers.
    """

    windows: float = 0.0
    encode: float = 0.0
    tail: float = 0.0


class _Masks(NamedTuple):
    masks: np.ndarray
    iou: np.ndarray
    low_res: np.ndarray


class Prediction(_Masks):
    """Masks, predicted IoU and low-resolution logits, as of `SamPredictor.predict`.

    Attributes:
        decoder_ms, upscale_ms: how long they took.
    """

    decoder_ms: float
    upscale_ms: float


@dataclass(frozen=True)
class _Encoder:
    img_size: int


@dataclass
class _Model:
    """The attributes that programs read from ``SamPredictor.model``."""

    mask_threshold: float
    image_encoder: _Encoder
    image_format: str = field(default="RGB", init=False)


class EncodedImage:
    """An image whose embedding is known: prompts are decoded against it, as many as you like.

    Attributes:
        features: image embedding float ``[1, d, g, g]``.
        original_size, input_size: ``(H, W)`` of the image and ``(h, w)`` of its resized copy.
        windows: the image's windows.
        stack_outputs: the stack's outputs for them; None for a stock bundle.
        timing: of the image.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        encoding: Encoding,
        windows: Windows,
        original_size: tuple[int, int],
        windows_ms: float,
    ) -> None:
        self.features = encoding.embedding
        self.original_size = original_size
        self.input_size = windows.size
        self.windows = windows
        self.stack_outputs = encoding.tokens
        self.timing = Timing(windows_ms, encoding.stack_ms, encoding.tail_ms)
        self._pipeline = pipeline
        self._bundle = pipeline.bundle

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Masks of one object in the image.

        Args:
            point_coords: ``[N, 2]``, (x, y) in pixels of the image.
            point_labels: ``[N]``, 1 for foreground, 0 for background, -1 for a point to ignore.
            box: length 4, (x0, y0, x1, y1) in pixels of the image.
            mask_input: ``[1, 4g, 4g]``, low-resolution logits of an earlier answer.
            multimask_output: three masks for an ambiguous prompt, instead of one.
            return_logits: the masks' logits instead of ``logits > mask_threshold``.

        Returns:
            a tuple of masks bool (or float32 logits) ``[C, H, W]``, predicted IoU float32 ``[C]``
            and low-resolution logits float32 ``[C, 4g, 4g]``, fit for ``mask_input``.

        Raises:
            PromptError: a prompt has the wrong shape or is not finite.
        """
        coords, labels = self._prompt(point_coords, point_labels, box)
        mask, has_mask = self._mask_prompt(mask_input)

        start = time.perf_counter()
        low_res, iou = self._pipeline.decode(self.features, coords, labels, mask, has_mask)
        decoder_ms = _ms_since(start)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        low_res, iou = low_res[0, chosen], iou[0, chosen]

        start = time.perf_counter()
        size = (self._bundle.geometry.image_size, self.input_size, self.original_size)
        if return_logits:
            masks = upscale(low_res, *size)
        else:
            masks = upscale_mask(low_res, *size, self._bundle.manifest.mask_threshold)
        found = Prediction(masks, iou, low_res)
        found.decoder_ms, found.upscale_ms = decoder_ms, _ms_since(start)
        return found

    def _prompt(
        self,
        point_coords: np.ndarray | None,
        point_labels: np.ndarray | None,
        box: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points, then the box's corners, as the decoder takes them: ``[1, k, 2]``, ``[1, k]``."""
        points, labels = np.zeros((0, 2)), np.zeros(0)
        if point_coords is not None:
            assert point_labels is not None, (
                "point_labels must be supplied if point_coords is supplied."
            )
            points, labels = _numbers(point_coords, "point_coords"), np.asarray(point_labels)
            if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1]:
                raise PromptError(
                    f"point_coords has shape {list(points.shape)} and point_labels "
                    f"{list(labels.shape)}; expected [N, 2] and [N]"
                )
            if not np.isin(labels, (-1, 0, 1)).all():
                raise PromptError(
                    "point_labels must be 1 (foreground), 0 (background) or -1 (ignored)"
                )
        if box is not None:
            corners = _numbers(box, "box")
            if corners.size != 4:
                raise PromptError(
                    f"box has shape {list(corners.shape)}; expected 4 numbers, x0 y0 x1 y1",
                    mend="call predict once per box",
                )
            points = np.concatenate([points, corners.reshape(2, 2)])
            labels = np.concatenate([labels, (2, 3)])
        moved = transform_coords(points, self.original_size, self.input_size)
        if point_coords is not None and box is None:
            moved = np.concatenate([moved, np.zeros((1, 2))])  # SAM pads points without a box
            labels = np.concatenate([labels, (-1,)])
        return moved[None].astype(np.float32), labels[None].astype(np.float32)

    def _mask_prompt(self, mask_input: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        side = self._bundle.geometry.low_res
        if mask_input is None:
            return np.zeros((1, 1, side, side), np.float32), np.zeros(1, np.float32)
        mask = _numbers(mask_input, "mask_input")
        if mask.shape != (1, side, side):
            raise PromptError(
                f"mask_input has shape {list(mask.shape)}; expected [1, {side}, {side}], one of "
                "the low-resolution masks of an earlier answer"
            )
        return mask[None].astype(np.float32), np.ones(1, np.float32)


class OffloadPredictor:
    """Segment one image at a time by points, boxes and masks.

    Example::

        with OffloadPredictor("edge.toml") as predictor:
            predictor.set_image(image)
            masks, iou, low_res = predictor.predict(point_coords=np.array([[120, 80]]),
                                                    point_labels=np.array([1]))

    Args:
        config: an ``edge.toml`` or its contents; None computes everything on this machine.
        max_exposure, deadline_s, fallback, strict: in place of the configuration's, see
            :class:`~edge_runtime.config.EdgeConfig`.
        bundle: full or (without config) stock bundle; None takes the configuration's, or the one
            that comes with the package.
        threads: CPU threads of this machine's engines; None means all cores.
        device: of this machine's engines, see :data:`engines.engine.Device`; None takes the
            configuration's, or ``auto``.

    Attributes:
        image: the image that is set, or None.
        features, original_size, input_size: of :class:`EncodedImage`, or None.
        is_image_set: whether :meth:`predict` may be called.
        record: what happened while nodes worked on the image; None without nodes.
        choice: where the last image's window layers were computed, and why; None without nodes.

    Raises:
        EdgeRuntimeError: bundle, configuration or keys are not in order.
    """

    image: EncodedImage | None
    record: RunRecord | None

    def __init__(
        self,
        config: EdgeConfig | str | os.PathLike[str] | None = None,
        *,
        max_exposure: float | None = None,
        deadline_s: float | None = None,
        fallback: Fallback | None = None,
        strict: bool | None = None,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        threads: int | None = None,
        device: Device | None = None,
    ) -> None:
        if config is not None and not isinstance(config, EdgeConfig):
            config = load_config(config)
        config = _changed(
            config,
            max_exposure=max_exposure,
            deadline_s=deadline_s,
            fallback=fallback,
            strict=strict,
        )
        if bundle is None:
            bundle = (config.bundle if config else None) or shipped_bundle()
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(bundle)
        self.bundle = bundle
        device = device or (config.device if config else "auto")
        self.pipeline = Pipeline(bundle, threads=threads, device=device)
        self.offloader = Offloader(config, self.pipeline) if config else None
        self._chooser = ModeChooser(config.mode if config else "local")
        self.choice: Choice | None = None
        self.model = _Model(bundle.manifest.mask_threshold, _Encoder(bundle.geometry.image_size))
        self.reset_image()

    @property
    def features(self) -> np.ndarray | None:
        return self.image.features if self.image else None

    @property
    def original_size(self) -> tuple[int, int] | None:
        return self.image.original_size if self.image else None

    @property
    def input_size(self) -> tuple[int, int] | None:
        return self.image.input_size if self.image else None

    @property
    def is_image_set(self) -> bool:
        return self.image is not None

    @property
    def report(self) -> OffloadReport | None:
        """Which node saw what of the image, also while :meth:`set_image` runs and when it failed.

        None if nothing has left this machine.
        """
        return self.record.report() if self.record else None

    def load(self, *, quiet: bool = True) -> None:
        """Open this machine's engines. Otherwise the first :meth:`set_image` does.

        Args:
            quiet: show no progress on stderr.

        Raises:
            BundleError, EngineError: see :meth:`engines.pipeline.Pipeline.engine`.
        """
        stages = [stage for stage in ("head", "stack", "tail", "encoder") if self.bundle.has(stage)]
        config = self.offloader.config if self.offloader else None
        if config and config.fallback != "local" and not recheck_rate(config):
            stages.remove("stack")
        stages = [stage for stage in (*stages, "decoder") if not self.pipeline.is_open(stage)]
        if not stages:
            return
        size = sum(map(self.bundle.size, stages))
        with progress(f"loading {self.bundle.manifest.model}", size, quiet=quiet) as work:
            for stage in stages:
                with work.piece(self.bundle.size(stage), stage):
                    self.pipeline.engine(stage)

    @property
    def cost(self) -> float:
        """A rough amount of computation for an image on this machine; see `Pipeline.cost`."""
        stages = ("tail",) if self.offloader else ("stack", "tail", "encoder")
        return sum(self.pipeline.cost(stage) for stage in stages if self.bundle.has(stage))

    def set_image(
        self,
        image: np.ndarray | Image.Image,
        image_format: str = "RGB",
        *,
        keep_local: Iterable[Region] = (),
    ) -> None:
        """Compute the image's embedding, so that :meth:`predict` can be called.

        Args:
            image: uint8 ``[H, W, 3]``, values 0 to 255; or a Pillow image, which is not turned
                upright (:func:`edge_runtime.imaging.images.load_image` does that).
            image_format: ``RGB`` or ``BGR``, of an array.
            keep_local: regions whose windows never leave this machine, besides those of the
                configuration.

        Raises:
            ImageError: it is not such an array.
            OffloadError: a node failed; no image is set then.
            PlacementError: the nodes cannot satisfy the exposure budget.
        """
        assert image_format in ("RGB", "BGR"), (
            f"image_format must be in ['RGB', 'BGR'], is {image_format}."
        )
        self.reset_image()
        self.load()
        start = time.perf_counter()
        pixels = _pixels(image)
        if image_format == "BGR" and pixels is image:
            pixels = pixels[..., ::-1]
        windows = cut(resize_longest(pixels, self.bundle.geometry.image_size), self.bundle.geometry)
        regions = [*keep_local]
        for region in regions:
            check_region(region)
        if self.offloader:
            regions += self.offloader.config.keep_local
        local = windows_in(regions, pixels.shape[:2], windows.size, self.bundle.geometry)
        windows_ms = _ms_since(start)
        through_nodes = None
        if self.offloader:
            each_s, usable = self.offloader.local_s, len(self.offloader.usable())
            here_ms = each_s and each_s * 1000 * len(windows)
            self.choice = self._chooser.choose(edge_ms=here_ms, usable_nodes=usable)
            if self.choice.place == "nodes":
                through_nodes = functools.partial(self._through_nodes, local)
        encoding = self.pipeline.encode(windows, through_nodes, self._batch())
        if self.choice:
            self._chooser.measured(self.choice.place, encoding.stack_ms)
        size = (pixels.shape[0], pixels.shape[1])
        self.image = EncodedImage(self.pipeline, encoding, windows, size, windows_ms)

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Masks of one object in the image that is set; see :meth:`EncodedImage.predict`.

        Raises:
            RuntimeError: no image is set.
            PromptError: a prompt has the wrong shape or is not finite.
        """
        return self._set("before mask prediction").predict(
            point_coords, point_labels, box, mask_input, multimask_output, return_logits
        )

    def stream(
        self,
        name: str = "stream",
        *,
        policy: Literal["every", "latest"] = "every",
        depth: int = 3,
    ) -> FrameStream:
        """The frames of a camera or video, several under way at a time.

        See :class:`edge_runtime.stream.FrameStream`.
        """
        from edge_runtime.stream import FrameStream

        return FrameStream(self, name, policy=policy, depth=depth)

    def get_image_embedding(self) -> np.ndarray:
        """The embedding of the image that is set, float ``[1, d, g, g]``.

        Raises:
            RuntimeError: no image is set.
        """
        return self._set("to generate an embedding").features

    def reset_image(self) -> None:
        """Drop the image."""
        self.image = None
        self.record = None

    def _set(self, what_for: str) -> EncodedImage:
        if self.image is None:
            raise RuntimeError(f"An image must be set with .set_image(...) {what_for}.")
        return self.image

    def close(self) -> None:
        """Drop the connections and close the engines."""
        self.reset_image()
        if self.offloader:
            self.offloader.close()
        self.pipeline.close()

    def __enter__(self) -> OffloadPredictor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _through_nodes(self, local: frozenset[int], windows: Windows) -> dict[str, np.ndarray]:
        assert self.offloader is not None
        self.record = RunRecord()
        with self.pipeline.work.piece(0, "waiting for the nodes"):
            return self.offloader.stack(windows, self.record, local)

    def _batch(self) -> int | None:
        if self.offloader or not self.bundle.has("stack"):
            return None
        on_cpu = getattr(self.pipeline.engine("stack"), "device", None) == "cpu"
        return _AT_ONCE if on_cpu else None


def _changed(config: EdgeConfig | None, **changes: Any) -> EdgeConfig | None:
    given = {name: value for name, value in changes.items() if value is not None}
    if config is None and given:
        raise ConfigError(f"{next(iter(given))} is about nodes", mend="give an edge.toml too")
    return config and msgspec.structs.replace(config, **given)


def _pixels(image: object) -> np.ndarray:
    """uint8 ``[H, W, 3]``. Checks the type only; :func:`resize_longest` checks the rest."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return as_rgb(image, "the image")
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        found = f"array {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(
            f"set_image was given {found}; expected a uint8 array (height, width, 3) in RGB order, "
            "or a Pillow image",
            mend="edge_runtime.imaging.images.load_image reads a file",
        )
    return image


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise PromptError(f"{name} does not hold numbers") from None
    if not np.isfinite(array).all():
        raise PromptError(f"{name} holds numbers that are not finite")
    return array


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
