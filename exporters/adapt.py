"""Adapts SAM weights to the reordered blocks, by distilling the stock encoder.

A copy with reordered blocks learns to produce the stock encoder's image embeddings on unlabelled
images; prompt encoder and mask decoder stay as they are. A run resumes exactly, because every image
and crop is a function of ``(seed, step, place in the batch)``.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from edge_common.errors import CheckpointError, ConfigError, ImageError
from exporters.models import (
    REORDERED,
    ModelSpec,
    read_torch_file,
    reorder,
    save_atomically,
    spec_of,
    weights_hash,
)
from exporters.path_checks import image_files

_READERS = min(4, max(1, (os.cpu_count() or 2) // 2))  # threads; the rest of the CPU may compute
STATE_FORMAT = "edge-runtime-adapt"


@dataclass(frozen=True)
class AdaptConfig:
    """Everything that decides what a run computes, apart from the images."""

    model: str
    steps: int = 400
    batch: int = 12  # images a step, over all processes
    lr: float = 3e-4
    lr_warmup: int = 20
    weight_decay: float = 0.0
    seed: int = 1
    amp: bool = True


# --- images --------------------------------------------------------------------------------------


class Folder:
    """The readable images under a directory, in a fresh order each epoch."""

    def __init__(self, directory: Path | str, seed: int) -> None:
        found = image_files(Path(directory))
        self.paths = [p for p in found if _opens(p)]
        readable = set(self.paths)
        self.unreadable = [p for p in found if p not in readable]
        if not self.paths:
            raise ImageError(
                f"none of the {len(found)} images under {directory} can be read, "
                f"first {found[0].name}"
            )
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, number: int) -> np.ndarray:
        """Image ``number`` of an endless sequence, uint8 [h, w, 3], or the next readable one."""
        for skip in range(len(self.paths)):
            epoch, place = divmod(number + skip, len(self.paths))
            path = self.paths[int(_epoch_order(self.seed, epoch, len(self.paths))[place])]
            try:
                with Image.open(path) as file:
                    return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue
        raise ImageError(f"no image in the folder can be decoded; the last one tried is {path}")


class Scenes:
    """An endless sequence of ``count`` procedural scenes, repeated; every other one photo-like."""

    def __init__(self, seed: int, size: int, count: int = 2000) -> None:
        self.seed, self.size, self.count = seed, size, count
        self._made: dict[int, np.ndarray] = {}

    def image(self, number: int) -> np.ndarray:
        """Scene ``number``, uint8 [size, size, 3]."""
        from exporters.scenes import PHOTO_LIKE, make_scene

        number %= self.count
        if number not in self._made:
            kind = PHOTO_LIKE if number % 2 else None
            self._made[number] = make_scene(self.seed * 1_000_000 + number, self.size, kind).image
        return self._made[number]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as file:
            return min(file.size) > 0
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def prepare(image: np.ndarray, spec: ModelSpec, rng: np.random.Generator) -> Tensor:
    """A random crop as input of SAM: float32 [3, s, s], normalised, zero in the padding.

    Crops vary in aspect, so that every padding of the square occurs; half are mirrored. Colours
    vary a little.
    """
    h, w = image.shape[:2]
    if rng.random() < 0.6:
        ch, cw = max(1, int(h * rng.uniform(0.5, 1))), max(1, int(w * rng.uniform(0.5, 1)))
        y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        image = image[y : y + ch, x : x + cw]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    side = spec.image_size
    h, w = ResizeLongestSide.get_preprocess_shape(image.shape[0], image.shape[1], side)
    size = (max(1, w), max(1, h))
    small = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32)
    if rng.random() < 0.5:
        pixels = np.clip(pixels * rng.uniform(0.7, 1.2, 3) + rng.uniform(-20, 20), 0, 255)
    if rng.random() < 0.2:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, 2)
    out = np.zeros((side, side, 3), np.float32)
    out[: pixels.shape[0], : pixels.shape[1]] = (pixels - _MEAN) / _STD
    return torch.from_numpy(out).permute(2, 0, 1)


_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)


# --- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among those ``torchrun`` started (one of one without it)."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """The values of RANK, WORLD_SIZE and LOCAL_RANK that ``torchrun`` set."""
        get = os.environ.get
        return cls(int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0")))


# --- the run -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An image encoder whose blocks are recomputed in the backward pass when ``save_memory``."""

    def __init__(self, encoder: ImageEncoderViT, save_memory: bool) -> None:
        super().__init__()
        self.encoder, self.save_memory = encoder, save_memory

    def forward(self, images: Tensor) -> Tensor:
        """f32 [B, 3, s, s] -> [B, d, g, g]."""
        if not self.save_memory:
            return self.encoder(images)
        encoder = self.encoder
        x = encoder.patch_embed(images) + encoder.pos_embed
        for block in encoder.blocks:
            x = recompute(block, x, use_reentrant=False)
        return encoder.neck(x.permute(0, 3, 1, 2))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of embeddings [B, d, g, g] over their variance, mean over the images.

    0 is perfect; 1 is no better than each image's mean embedding.
    """
    found, wanted = found.float(), wanted.float()
    variance = (wanted - wanted.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    return ((found - wanted).square().sum((1, 2, 3)) / variance.clamp(min=1e-6)).mean()


def check(order: str, config: AdaptConfig, ranks: Ranks) -> None:
    """Raise CheckpointError or ConfigError if these weights can't be adapted so."""
    if order == REORDERED:
        raise CheckpointError(
            "these weights are reordered already; adaptation starts from stock-order weights"
        )
    if config.batch % ranks.world:
        raise ConfigError(
            f"a batch of {config.batch} images can't be divided among {ranks.world} processes"
        )


class Adaptation:
    """A run of distillation: stock teacher, reordered student, optimiser, progress."""

    def __init__(
        self,
        stock: Sam,
        config: AdaptConfig,
        source: Folder | Scenes,
        device: torch.device | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        check(stock.order, config, self.ranks)
        self.config, self.source = config, source
        self.device = device or torch.device("cpu")
        self.spec = spec_of(config.model)
        self.teacher_hash = weights_hash(stock)
        self.teacher = stock.image_encoder.eval().requires_grad_(False).to(self.device)
        self.student = reorder(copy.deepcopy(stock)).to(self.device)
        self.student.requires_grad_(False)
        self.student.image_encoder.requires_grad_(True)
        self.module: nn.Module = Encoder(
            self.student.image_encoder, save_memory=self.spec.dim >= 512
        )
        if self.ranks.world > 1:
            ids = [self.ranks.local] if self.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.module, device_ids=ids)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self.losses: list[float] = []
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="images")
        self._next: tuple[int, list[Future[Tensor]]] | None = None

    def _one(self, number: int) -> Tensor:
        rng = np.random.default_rng([self.config.seed, number, 17])
        return prepare(self.source.image(number), self.spec, rng)

    def _order(self, step: int) -> list[Future[Tensor]]:
        numbers = range(
            step * self.config.batch + self.ranks.rank,
            (step + 1) * self.config.batch,
            self.ranks.world,
        )
        return [self._threads.submit(self._one, n) for n in numbers]

    def _images(self) -> Tensor:
        """This process's share of the step's batch; the next batch is read in the background."""
        if self._next is None or self._next[0] != self.step:
            self._next = (self.step, self._order(self.step))
        ready = [future.result() for future in self._next[1]]
        if self.step + 1 < self.config.steps:
            self._next = (self.step + 1, self._order(self.step + 1))
        return torch.stack(ready).to(self.device)

    def learning_rate(self) -> float:
        """The learning rate: a warm-up, then a cosine down to a fiftieth."""
        c = self.config
        progress = min(1.0, self.step / max(1, c.steps))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        return c.lr * cosine * min(1.0, (self.step + 1) / max(1, c.lr_warmup))

    def train_step(self) -> float:
        """One step on all processes; returns the relative error of this process's images."""
        images = self._images()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.student.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            with torch.no_grad():
                wanted = self.teacher(images)
            loss = relative_error(self.module(images), wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is {float(norm)} at step {self.step}")
        self.optimizer.step()
        self.step += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def result(self) -> Sam:
        """The reordered model with its adapted encoder, on the CPU, in eval mode."""
        sam = copy.deepcopy(self.student).cpu().eval()
        sam.adapted = True
        return sam

    def close(self) -> None:
        """Stop the reading threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def save(self, path: Path | str) -> None:
        """Write the state of the run, atomically."""
        save_atomically(
            {
                "format": STATE_FORMAT,
                "version": 1,
                "config": asdict(self.config),
                "teacher": self.teacher_hash,
                "step": self.step,
                "losses": self.losses,
                "encoder": self.student.image_encoder.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            path,
        )

    def restore(self, path: Path | str) -> None:
        """Continue from :meth:`save`'s file, with the same weights and settings.

        The number of steps may differ, which changes the rest of the learning-rate schedule.
        """
        state: Any = read_torch_file(path)
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise CheckpointError(
                f"{path} is not the state of an adaptation", mend="remove it to start again"
            )
        if state["teacher"] != self.teacher_hash:
            raise CheckpointError(
                f"{path} belongs to other stock weights", mend="remove it to start again with these"
            )
        mine = asdict(self.config)
        differing = [k for k in mine if k != "steps" and state["config"].get(k) != mine[k]]
        if differing:
            told = ", ".join(f"{k} {state['config'].get(k)} (now {mine[k]})" for k in differing)
            raise ConfigError(
                f"{path} was begun with {told}", mend="repeat those settings, or remove it"
            )
        self.student.image_encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def default_lr(model: str) -> float:
    """The default learning rate of this model: small for long pretrained weights."""
    return 3e-4 if model == "tiny" else 2e-5


def smoothed(values: Sequence[float], width: int = 20) -> float:
    """Mean of the last ``width`` values."""
    return float(np.mean(values[-width:])) if len(values) else float("nan")
