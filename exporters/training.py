"""Trains a small SAM: batches of scenes and prompts, losses, and a trainer that resumes exactly.

Every batch is a pure function of ``(seed, step)``. Each object is prompted several times: first
with a point or a box, then with corrective clicks. ``docs/training.md`` explains the recipe.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from edge_common.errors import CheckpointError
from exporters.models import (
    ModelSpec,
    build_from_spec,
    read_torch_file,
    save_atomically,
    spec_of,
)
from exporters.prompts import BOX, POINT, correction, embed
from exporters.scenes import PHOTO_LIKE, Scene, depth_of, make_scene

BOX_SHARE = 0.4  # of the first prompts; the others are points
FIRST_ROUND = 0.4  # weight of the first round's loss; the corrections share the rest


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run."""

    model: str = "tiny"
    seed: int = 1
    steps: int = 4600
    images: int = 12  # per step
    clicks: int = 8  # objects prompted per image
    rounds: int = 4  # prompts of an object at full resolution: the first, then corrections
    photo_like: float = 0.5  # share of the scenes at full resolution
    warmup_steps: int = 250  # encoder alone, affinity loss
    lr: float = 5e-4
    lr_end: float = 1e-5
    lr_warmup: int = 80
    weight_decay: float = 0.02
    ema: float = 0.998
    low_size: int = 144  # pixels of the first phase; 0: full resolution throughout
    low_window: int = 4
    low_until: float = 0.52  # share of the steps
    fresh_scenes: int = 6  # new scenes a step
    pool: int = 3000  # most recent scenes a step draws from
    offset: float = 0.0  # share of the schedules passed before the first step
    amp: bool = True

    def progress(self, step: int) -> float:
        """The position of this step in the schedules, 0 to 1."""
        return self.offset + (1 - self.offset) * min(1.0, step / max(1, self.steps))


def spec_at(config: TrainConfig, step: int) -> ModelSpec:
    """The model's geometry at this step."""
    spec = spec_of(config.model)
    if config.low_size and config.progress(step) < config.low_until:
        return spec.at(config.low_size, config.low_window)
    return spec


# --- batches -------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One step's data; B images, P prompts each, g tokens a side, m = 4g mask pixels a side."""

    images: Tensor  # f32 [B, 3, s, s], normalised, zero in the padding
    masks: Tensor  # f32 [B*P, m, m]: share of each mask pixel that is the object
    valid: Tensor  # f32 [B, m, m]: 1 where the image is
    coords: Tensor  # f32 [B*P, 2, 2], pixels: a point and nothing, or the corners of a box
    labels: Tensor  # int [B*P, 2], as exporters.prompts numbers them
    ambiguous: Tensor  # bool [B*P]: a point that may mean a part or the whole
    tokens: Tensor  # int64 [B, g, g]: label at each token's centre, -1 in the padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class ScenePool:
    """Scenes by number, kept in memory with the depth of each; ``photo_like`` of them are so."""

    def __init__(self, seed: int, size: int, capacity: int, photo_like: float = 0.0) -> None:
        self.seed, self.size, self.capacity = seed, size, capacity
        self.photo_like = photo_like
        self._kept: dict[int, tuple[Scene, np.ndarray]] = {}

    def get(self, number: int) -> tuple[Scene, np.ndarray]:
        """The scene and its depth, uint8 [s, s]."""
        if number in self._kept:
            return self._kept[number]
        drawn = np.random.default_rng([self.seed, number, 19]).random()
        kind = PHOTO_LIKE if drawn < self.photo_like else None
        scene = make_scene(self.seed * 1_000_000 + number, self.size, kind)
        made = self._kept[number] = (scene, depth_of(scene.labels))
        if len(self._kept) > self.capacity:
            del self._kept[min(self._kept)]
        return made


_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)


def _augment_colour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Grey, channel order, gamma, gain: float32 in 0..255."""
    out: np.ndarray = image.astype(np.float32)
    if rng.random() < 0.25:
        out = np.repeat((out @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, 2)
    elif rng.random() < 0.5:
        out = out[..., rng.permutation(3)]
    if rng.random() < 0.5:
        out = 255 * (out / 255) ** np.float32(np.exp(rng.uniform(-0.45, 0.45)))
    if rng.random() < 0.6:
        out = out * np.float32(rng.uniform(0.55, 1.2)) + np.float32(rng.uniform(-25, 35))
    return np.clip(out, 0, 255)


def _crop(
    rng: np.random.Generator, image: np.ndarray, label: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotate, mirror, zoom and crop a scene; its longest side stays the same."""
    s, turns, flip = len(image), int(rng.integers(4)), rng.random() < 0.5
    image, label, depth = (np.rot90(a, turns) for a in (image, label, depth))
    if flip:
        image, label, depth = image[:, ::-1], label[:, ::-1], depth[:, ::-1]
    h = w = s
    if rng.random() < 0.4:
        short = int(s * rng.uniform(0.5, 1.0))
        h, w = (short, s) if rng.random() < 0.5 else (s, short)
    zoom = float(np.exp(rng.uniform(0, np.log(2.2)))) if rng.random() < 0.3 else 1.0
    ch, cw = max(1, round(h / zoom)), max(1, round(w / zoom))
    y, x = int(rng.integers(0, s - ch + 1)), int(rng.integers(0, s - cw + 1))
    image, label, depth = (a[y : y + ch, x : x + cw] for a in (image, label, depth))
    if zoom > 1:
        picture = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR))
        rows, columns = np.arange(h) * ch // h, np.arange(w) * cw // w
        label, depth = (a[rows[:, None], columns] for a in (label, depth))
    return image, label, depth


def _first_prompt(
    rng: np.random.Generator, mask: np.ndarray, depth: np.ndarray, box: bool
) -> list[tuple[float, float]]:
    """Two points (x, y): one in ``mask``, often its deepest, and nothing; or a jittered box."""
    ys, xs = np.nonzero(mask)
    if box:
        lo, hi = np.array([xs.min(), ys.min()]), np.array([xs.max(), ys.max()])
        shake = rng.normal(0, 0.05, (2, 2)) * (hi - lo + 1)
        corners = np.stack([lo, hi + 1]) + shake.clip(-5, 5)
        return [(float(x), float(y)) for x, y in corners.clip(0, len(mask))]
    deep = depth[ys, xs].astype(np.int64)
    if rng.random() < 0.5:
        at = int(deep.argmax())
    else:
        at = int(rng.choice(np.flatnonzero(deep >= min(2, int(deep.max())))))
    return [(float(xs[at]), float(ys[at])), (0.0, 0.0)]


def make_batch(config: TrainConfig, spec: ModelSpec, pool: ScenePool, step: int) -> Batch:
    """The batch of this step, a pure function of the configuration and ``step``."""
    rng = np.random.default_rng([config.seed, step, 11])
    s, g, m = spec.image_size, spec.grid, 4 * spec.grid
    newest = max(config.images * 8, (step + 1) * config.fresh_scenes)
    images = np.zeros((config.images, s, s, 3), np.float32)
    valid = np.zeros((config.images, s, s), bool)
    tokens = np.full((config.images, g, g), -1, np.int64)
    masks, coords, labels, ambiguous = [], [], [], []
    for i in range(config.images):
        scene, depth = pool.get(int(rng.integers(max(0, newest - config.pool), newest)))
        image, label, depth = _crop(rng, scene.image, scene.labels, depth)
        h, w = label.shape
        images[i, :h, :w] = (_augment_colour(rng, image) - _MEAN) / _STD
        valid[i, :h, :w] = True
        padded, deep = np.full((s, s), 255, np.uint8), np.zeros((s, s), np.uint8)
        padded[:h, :w], deep[:h, :w] = label, depth
        half = spec.patch_size // 2
        centres = padded[half :: spec.patch_size, half :: spec.patch_size]
        tokens[i] = np.where(centres == 255, -1, centres.astype(np.int64))
        counts = np.bincount(label.ravel(), minlength=256)
        seen = [int(k) for k in np.flatnonzero(counts >= 0.003 * s * s)] or [int(counts.argmax())]
        wholes = [tuple(k for k in whole if counts[k]) for whole in scene.wholes]
        wholes = [whole for whole in wholes if len(whole) > 1]
        parts = {k for whole in wholes for k in whole}
        targets = [(k,) for k in seen] + wholes
        for number in np.resize(rng.permutation(len(targets)), config.clicks):
            target, box = targets[number], rng.random() < BOX_SHARE
            mask = np.isin(padded, target) if len(target) > 1 else padded == target[0]
            coords.append(_first_prompt(rng, mask, deep, box))
            labels.append(BOX if box else POINT)
            ambiguous.append(not box and not parts.isdisjoint(target))
            masks.append(mask)
    small = F.interpolate(
        torch.from_numpy(np.stack(masks)).float()[:, None], size=(m, m), mode="area"
    )[:, 0]
    shown = F.interpolate(torch.from_numpy(valid).float()[:, None], size=(m, m), mode="area")[:, 0]
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        masks=small,
        valid=(shown > 0.999).float(),
        coords=torch.tensor(np.array(coords, np.float32)),
        labels=torch.tensor(np.array(labels)),
        ambiguous=torch.tensor(ambiguous),
        tokens=torch.from_numpy(tokens),
    )


# --- the model in batches ------------------------------------------------------------------------


def tie_cross_attention(sam: Sam, scale: float = 2.5) -> None:
    """Start every cross-attention of the decoder with ``k_proj = q_proj``, both scaled.

    Queries and keys carry the same position encoding, so a click then attends to its own place
    from the first step.
    """
    transformer = sam.mask_decoder.transformer
    crosses = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crosses += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    with torch.no_grad():
        for cross in crosses:
            cross.q_proj.weight.mul_(scale)
            cross.k_proj.weight.copy_(cross.q_proj.weight)
            cross.k_proj.bias.copy_(cross.q_proj.bias)


def decode_batch(
    sam: Sam,
    embeddings: Tensor,
    coords: Tensor,
    labels: Tensor,
    mask_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``MaskDecoder.predict_masks`` for P prompts on each of B images at once.

    Args:
        embeddings: [B, d, g, g].
        coords, labels: [B*P, k, 2] pixels and [B*P, k], as for :func:`exporters.prompts.embed`;
            the prompts of one image lie together.
        mask_input: [B*P, 1, 4g, 4g] logits or None.

    Returns:
        Logits [B*P, 4, 4g, 4g] and predicted IoU [B*P, 4].
    """
    sparse = embed(sam.prompt_encoder, coords, labels)
    _, dense = sam.prompt_encoder(points=None, boxes=None, masks=mask_input)
    decoder = sam.mask_decoder
    prompts = len(sparse) // len(embeddings)
    out = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight], 0)
    tokens = torch.cat([out[None].expand(len(sparse), -1, -1), sparse], 1)
    if mask_input is None:
        dense = dense.expand(len(sparse), -1, *embeddings.shape[2:])
    src = embeddings.repeat_interleave(prompts, 0) + dense
    position = sam.prompt_encoder.get_dense_pe().expand(len(src), -1, -1, -1)
    b, _, h, w = src.shape
    hs, src = decoder.transformer(src, position, tokens)
    iou_token, mask_tokens = hs[:, 0], hs[:, 1 : 1 + decoder.num_mask_tokens]
    up = _upscale(decoder.output_upscaling, src)
    hyper = torch.stack(
        [mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
    )
    masks = (hyper @ up.transpose(1, 2)).reshape(b, -1, h, w, 2, 2, 2, 2)
    masks = masks.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, -1, 4 * h, 4 * w)
    return masks, decoder.iou_prediction_head(iou_token)


def _upscale(layers: nn.Sequential, tokens: Tensor) -> Tensor:
    """The decoder's transposed convolutions as linear maps of tokens, which train faster on a CPU.

    tokens [N, g*g, d] to [N, g*g*16, d/8]; the 16 are (row, column) of the first step, then of the
    second.
    """
    first, norm, _, second, _ = layers
    assert isinstance(first, nn.ConvTranspose2d)
    assert isinstance(second, nn.ConvTranspose2d)
    assert isinstance(norm, LayerNorm2d)
    x = _spread(first, tokens)
    x = F.gelu(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    return F.gelu(_spread(second, x))


def _spread(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 on tokens [N, n, c]: [N, 4n, c_out]."""
    c, out = conv.weight.shape[:2]
    weight = conv.weight.permute(2, 3, 1, 0).reshape(4 * out, c)
    assert conv.bias is not None
    return F.linear(x, weight, conv.bias.repeat(4)).reshape(len(x), -1, out)


# --- losses --------------------------------------------------------------------------------------


def affinity_loss(head: nn.Linear, embeddings: Tensor, tokens: Tensor, rng: Tensor) -> Tensor:
    """Same instance or not, between token embeddings [B, d, g, g], classes balanced.

    ``rng``: int64 [n], the places (row-major) compared with one another in every image.
    """
    flat = embeddings.flatten(2).transpose(1, 2)[:, rng]
    ids = tokens.flatten(1)[:, rng]
    codes = head(flat).float()
    gap = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    logits = 2.0 - gap
    known = (ids >= 0)[:, :, None] & (ids >= 0)[:, None]
    same = (ids[:, :, None] == ids[:, None]) & known
    other = (ids[:, :, None] != ids[:, None]) & known
    pull = (F.softplus(-logits) * same).sum() / same.sum().clamp(min=1)
    push = (F.softplus(logits) * other).sum() / other.sum().clamp(min=1)
    return 0.5 * (pull + push)


def mask_losses(logits: Tensor, target: Tensor, valid: Tensor, balance: float) -> Tensor:
    """BCE + dice of every mask: [N, c] for logits [N, c, m, m], target and valid [N, m, m].

    ``balance`` 1 averages positives and negatives apart (leaves empty masks at once), 0 averages
    all pixels (truer borders later on).
    """
    target, valid = target[:, None], valid[:, None]
    bce = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    positive, negative = target * valid, (1 - target) * valid
    n_pos = positive.sum((2, 3)).clamp(min=1)
    n_neg = negative.sum((2, 3)).clamp(min=1)
    apart = 0.5 * ((bce * positive).sum((2, 3)) / n_pos + (bce * negative).sum((2, 3)) / n_neg)
    share = torch.sqrt(n_pos / (n_pos + n_neg)).clamp(min=0.1)
    plain = (bce * valid).sum((2, 3)) / (n_pos + n_neg) / share
    chance = torch.sigmoid(logits) * valid
    overlap = (chance * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (chance.sum((2, 3)) + positive.sum((2, 3)) + 1)
    return balance * apart + (1 - balance) * plain + dice


def iou_of(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """IoU [N, c] of thresholded logits [N, c, m, m] against target [N, m, m] within valid [N, m,
    m].
    """
    found = (logits > 0) & (valid[:, None] > 0)
    wanted = ((target > 0.5) & (valid > 0))[:, None]
    union = (found | wanted).sum((2, 3)).clamp(min=1)
    return (found & wanted).sum((2, 3)) / union


def joint_loss(
    logits: Tensor,
    iou: Tensor,
    target: Tensor,
    valid: Tensor,
    balance: float,
    agree: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """The training loss of masks and predicted IoU, and figures for the log.

    ``agree`` [N]: weight of the mean of the three masks' losses against the least of them.
    """
    logits, iou = logits.float(), iou.float()
    losses = mask_losses(logits, target, valid, balance)
    multi = losses[:, 1:]
    with torch.no_grad():
        true = iou_of(logits, target, valid)
    predicted = (iou - true).abs().mean(1)  # not squared: the median, and small errors count
    shared = (1 - agree) * multi.min(1).values + agree * multi.mean(1)
    loss = (losses[:, 0] + shared + agree * predicted).mean()
    rows = torch.arange(len(iou), device=iou.device)
    picked = 1 + iou[:, 1:].argmax(1)
    return loss, {
        "loss": float(loss.detach()),
        "iou": float(true[rows, picked].mean()),
        "best": float(true[:, 1:].amax(1).mean()),
        "gap": float((iou.detach() - true)[rows, picked].abs().mean()),
    }


# --- resolution ----------------------------------------------------------------------------------


def resize_state(state: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """``state`` of the same model at another resolution, its position tables interpolated to
    ``spec``.
    """
    out = {}
    for name, value in state.items():
        if name == "image_encoder.pos_embed" and value.shape[1] != spec.grid:
            value = F.interpolate(
                value.permute(0, 3, 1, 2), size=(spec.grid, spec.grid), mode="bicubic"
            ).permute(0, 2, 3, 1)
        elif ".attn.rel_pos_" in name:
            place = int(name.split(".")[2])
            side = spec.grid if place in spec.global_blocks else spec.window_size
            if len(value) != 2 * side - 1:
                value = F.interpolate(value.T[None], size=2 * side - 1, mode="linear")[0].T
        out[name] = value.contiguous()
    return out


# --- the trainer ---------------------------------------------------------------------------------


class Trainer:
    """A run of training: model, optimiser, running average, progress."""

    def __init__(self, config: TrainConfig, device: torch.device | None = None) -> None:
        self.config, self.step = config, 0
        self.device = device or torch.device("cpu")
        self.spec = spec_at(config, 0)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        torch.manual_seed(config.seed)
        self.sam = build_from_spec(self.spec)
        tie_cross_attention(self.sam)
        nn.init.trunc_normal_(self.sam.image_encoder.pos_embed, std=0.02)
        self.head = nn.Linear(self.spec.out_chans, 24)
        self.sam.to(self.device)
        self.head.to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.sam.state_dict().items()}
        self._attach()

    def begin_from(self, sam: Sam) -> None:
        """Start from the weights of a stock-order model of the same kind."""
        state = resize_state(sam.state_dict(), self.spec)
        self.sam.load_state_dict(state)
        self.average = {k: v.detach().clone() for k, v in self.sam.state_dict().items()}

    def _attach(self) -> None:
        decay = [p for p in self._parameters() if p.ndim > 1]
        plain = [p for p in self._parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": self.config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.config.lr,
            betas=(0.9, 0.98),
        )
        photo_like = self.config.photo_like if self._at_full_size() else 0.0
        size, kept = self.spec.image_size, self.config.pool + 500
        self.pool = ScenePool(self.config.seed, size, kept, photo_like)

    def _at_full_size(self) -> bool:
        return self.spec.image_size == spec_of(self.config.model).image_size

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.sam.parameters(), *self.head.parameters()]

    def _change_resolution(self, spec: ModelSpec) -> None:
        """Move weights, their average and the optimiser's moments to another resolution."""
        old = self.optimizer.state_dict()
        names = [n for n, _ in self.sam.named_parameters()]
        self.spec = spec
        state = resize_state(self.sam.state_dict(), spec)
        self.average = resize_state(self.average, spec)
        self.sam = build_from_spec(spec).to(self.device)
        self.sam.load_state_dict(state)
        self._attach()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        by_id = {id(p): n for n, p in zip(names, self.sam.parameters(), strict=True)}
        for i, parameter in enumerate(order):
            moments = old["state"].get(i)
            name = by_id.get(id(parameter), "")
            if moments is None:
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = resize_state({name: moments[key]}, spec)[name].clamp(
                    min=0.0 if key == "exp_avg_sq" else -math.inf
                )
        fresh = self.optimizer.state_dict()
        fresh["state"] = old["state"]
        self.optimizer.load_state_dict(fresh)

    def learning_rate(self) -> float:
        """Warm-up, then a cosine; the joint phase warms up again."""
        c = self.config
        since = self.step if self.step < c.warmup_steps else self.step - c.warmup_steps
        progress = c.progress(self.step)
        cosine = c.lr_end + (c.lr - c.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
        return cosine * min(1.0, (since + 1) / max(1, c.lr_warmup))

    def balance(self) -> float:
        """Weight of the class-balanced BCE at this step: 1 at first, 0.2 from the middle on."""
        progress = self.config.progress(self.step)
        return float(np.interp(progress, (0.25, 0.5), (1.0, 0.2)))

    def agreement(self) -> float:
        """Weight of all three masks' mean loss at this step; it grows, so that the masks agree.

        Most prompts are hardly ambiguous: with three masks far apart, choosing by predicted IoU
        lost more than the best of them gained (0.799 chosen, 0.814 for the single mask).
        """
        progress = self.config.progress(self.step)
        return float(np.interp(progress, (0.45, 0.6), (0.13, 0.9)))

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the figures of its batch."""
        began = time.monotonic()
        config = self.config
        spec = spec_at(config, self.step)
        if spec != self.spec:
            self._change_resolution(spec)
        batch = make_batch(config, self.spec, self.pool, self.step).to(self.device)
        warming = self.step < config.warmup_steps
        figures: dict[str, float] = {}
        places = np.random.default_rng([config.seed, self.step, 13]).permutation(self.spec.grid**2)
        index = torch.from_numpy(places[:144].copy()).to(self.device)
        self.sam.train()
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            embeddings = self.sam.image_encoder(batch.images)
            near = affinity_loss(self.head, embeddings, batch.tokens, index)
            if warming:
                near.backward()
            else:
                # the encoder's gradient is that of all rounds, computed once
                leaf = embeddings.detach().requires_grad_()
                figures = self._prompt(batch, leaf)
                assert leaf.grad is not None
                torch.autograd.backward([embeddings, 0.3 * near], [leaf.grad, None])
        norm = nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm} at step {self.step}")
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.sam.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        spent = time.monotonic() - began
        self.seconds += spent
        return {**figures, "affinity": float(near.detach()), "lr": rate, "seconds": spent}

    def _prompt(self, batch: Batch, embeddings: Tensor) -> dict[str, float]:
        """Prompt every object of the batch for some rounds and leave the gradients of the loss.

        Each round after the first adds a click on an error of the last mask and, usually, the last
        logits as mask prompt; some rounds add the mask alone. Returns the first round's figures,
        and the IoU of the last round.
        """
        config = self.config
        rng = np.random.default_rng([config.seed, self.step, 23])
        valid = batch.valid.repeat_interleave(config.clicks, 0)
        rounds = config.rounds if self._at_full_size() else 1
        rest = (1 - FIRST_ROUND) / max(1, rounds - 1)
        coords, labels, mask_input = batch.coords, batch.labels, None
        agree = torch.full((len(coords),), self.agreement(), device=self.device)
        figures: dict[str, float] = {}
        for number in range(rounds):
            logits, iou = decode_batch(self.sam, embeddings, coords, labels, mask_input)
            apart = batch.ambiguous if number == 0 else torch.zeros_like(batch.ambiguous)
            weight = torch.where(apart, agree.clamp(max=0.3), agree)
            loss, found = joint_loss(logits, iou, batch.masks, valid, self.balance(), weight)
            share = 1.0 if rounds == 1 else FIRST_ROUND if not number else rest
            (share * loss).backward()
            figures = figures or found
            figures["last"] = found["iou"]
            if number + 1 == rounds:
                break
            picked = 1 + iou[:, 1:].argmax(1) if rng.random() < 0.7 else torch.zeros_like(iou[:, 0])
            rows = torch.arange(len(iou), device=self.device)
            last = logits.detach().float()[rows, picked.long()]
            mask_input = last[:, None] if rng.random() < 0.75 else None
            if mask_input is not None and rng.random() < 0.12:
                continue
            scale = self.spec.image_size / last.shape[-1]
            wrong = ((last > 0) != (batch.masks > 0.5)) & (valid > 0)
            points, kinds = correction(wrong.cpu().numpy(), batch.masks.cpu().numpy() > 0.5, rng)
            more = torch.from_numpy(((points + 0.5) * scale - 0.5).astype(np.float32))
            coords = torch.cat([coords, more[:, None].to(self.device)], 1)
            labels = torch.cat([labels, torch.from_numpy(kinds)[:, None].to(self.device)], 1)
        return figures

    def averaged(self) -> Sam:
        """A model of the running average, in eval mode on the CPU, at the current resolution."""
        sam = build_from_spec(self.spec)
        sam.load_state_dict({k: v.cpu() for k, v in self.average.items()})
        return sam

    def result(self) -> Sam:
        """A model of the running average, in eval mode on the CPU, at full resolution."""
        spec = spec_of(self.config.model)
        sam = build_from_spec(spec)
        sam.load_state_dict(resize_state({k: v.cpu() for k, v in self.average.items()}, spec))
        return sam

    def save(self, path: Path) -> None:
        """Write the full state of the run, atomically."""
        save_atomically(
            {
                "format": "edge-runtime-train",
                "version": 1,
                "config": asdict(self.config),
                "step": self.step,
                "image_size": self.spec.image_size,
                "window_size": self.spec.window_size,
                "seconds": self.seconds,
                "history": self.history,
                "sam": self.sam.state_dict(),
                "head": self.head.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
            },
            path,
        )

    @classmethod
    def resume(
        cls, path: Path, device: torch.device | None = None, steps: int | None = None
    ) -> Trainer:
        """Continue a run from :meth:`save`'s file; ``steps`` replaces its number of steps."""
        state = read_torch_file(path)
        if not isinstance(state, dict) or state.get("format") != "edge-runtime-train":
            raise CheckpointError(f"{path} is not the state of a training run")
        config = TrainConfig(**{k: v for k, v in state["config"].items() if k != "channels"})
        if steps is not None:
            config = replace(config, steps=steps)
        trainer = cls(config, device)
        trainer.spec = spec_of(config.model).at(state["image_size"], state["window_size"])
        trainer.sam = build_from_spec(trainer.spec).to(trainer.device)
        trainer.sam.load_state_dict(state["sam"])
        trainer.head.load_state_dict(state["head"])
        trainer.average = {k: v.to(trainer.device) for k, v in state["average"].items()}
        trainer._attach()
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        trainer.history = state["history"]
        return trainer
