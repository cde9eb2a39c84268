"""How a SAM is trained here: batches of scenes and clicks, losses, and a trainer whose runs resume
exactly.

Every batch is a pure function of ``(seed, step)``, so a run interrupted and resumed takes the same
steps as one that was not. The recipe (see ``docs/training.md`` for the reasons): an affinity loss
warms the encoder up; decoder cross-attentions start with tied and scaled query and key
projections; class-balanced BCE and dice; half of the scenes leave no background to ignore a click
in; the single mask is supervised beside the best of three; the last part runs at full resolution.
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
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from engines.errors import CheckpointError
from exporters.models import (
    ModelSpec,
    build_from_spec,
    read_torch_file,
    save_atomically,
    spec_of,
)
from exporters.scenes import depth_of, make_scene

MODES = ("click", "box", "clicks", "mask")
MODE_SHARES = (0.76, 0.08, 0.10, 0.06)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes."""

    model: str = "tiny"
    seed: int = 1
    steps: int = 4600
    images: int = 12  # per step
    clicks: int = 8  # per image
    warmup_steps: int = 250  # encoder alone, affinity loss
    lr: float = 5e-4
    lr_end: float = 1e-5
    lr_warmup: int = 80
    weight_decay: float = 0.02
    ema: float = 0.998
    low_size: int = 144  # pixels of the first phase; 0: full resolution throughout
    low_window: int = 4
    low_until: float = 0.52  # share of the steps
    fresh_scenes: int = 4  # new scenes a step
    pool: int = 3000  # most recent scenes a step draws from
    offset: float = 0.0  # share of the schedules passed before the first step
    amp: bool = True

    def progress(self, step: int) -> float:
        """Where in the schedules this step is, 0 to 1."""
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
    coords: Tensor  # f32 [B*P, k, 2], pixels
    labels: Tensor  # int [B*P, k]
    boxes: Tensor | None  # f32 [B*P, 4]
    mask_input: Tensor | None  # f32 [B*P, 1, m, m] logits
    tokens: Tensor  # int64 [B, g, g]: label at each token's centre, -1 in the padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in values.items()}
        return Batch(**moved)


class ScenePool:
    """Scenes by number, kept in memory: image, labels and depth of each."""

    def __init__(self, seed: int, size: int, capacity: int) -> None:
        self.seed, self.size, self.capacity = seed, size, capacity
        self._kept: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def get(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image uint8 [s, s, 3], labels uint8 [s, s], depth uint8 [s, s]."""
        if number not in self._kept:
            scene = make_scene(self.seed * 1_000_000 + number, self.size)
            self._kept[number] = (scene.image, scene.labels, depth_of(scene.labels))
            if len(self._kept) > self.capacity:
                del self._kept[min(self._kept)]
        return self._kept[number]


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


def make_batch(config: TrainConfig, spec: ModelSpec, pool: ScenePool, step: int) -> Batch:
    """The batch of this step, a pure function of the configuration and ``step``."""
    rng = np.random.default_rng([config.seed, step, 11])
    s, g, m = spec.image_size, spec.grid, 4 * spec.grid
    newest = max(config.images * 8, (step + 1) * config.fresh_scenes)
    mode = MODES[int(rng.choice(4, p=MODE_SHARES))]
    images = np.zeros((config.images, s, s, 3), np.float32)
    valid = np.zeros((config.images, s, s), bool)
    tokens = np.full((config.images, g, g), -1, np.int64)
    masks, coords, labels, boxes = [], [], [], []
    for i in range(config.images):
        number = int(rng.integers(max(0, newest - config.pool), newest))
        image, label, depth = pool.get(number)
        turns, flip = int(rng.integers(4)), rng.random() < 0.5
        image, label, depth = (np.rot90(a, turns) for a in (image, label, depth))
        if flip:
            image, label, depth = image[:, ::-1], label[:, ::-1], depth[:, ::-1]
        h = w = s
        if rng.random() < 0.4:
            short = int(s * rng.uniform(0.5, 1.0))
            h, w = (short, s) if rng.random() < 0.5 else (s, short)
            y, x = int(rng.integers(0, s - h + 1)), int(rng.integers(0, s - w + 1))
            image, label, depth = (a[y : y + h, x : x + w] for a in (image, label, depth))
        images[i, :h, :w] = (_augment_colour(rng, image) - _MEAN) / _STD
        valid[i, :h, :w] = True
        padded = np.full((s, s), 255, np.uint8)
        padded[:h, :w] = label
        half = spec.patch_size // 2
        centres = padded[half :: spec.patch_size, half :: spec.patch_size]
        tokens[i] = np.where(centres == 255, -1, centres.astype(np.int64))
        counts = np.bincount(label.ravel(), minlength=256)
        present = np.flatnonzero(counts >= 0.003 * s * s)
        if not len(present):
            present = np.array([int(counts.argmax())])
        chosen = np.resize(rng.permutation(present), config.clicks)
        for target in chosen:
            mask = padded == target
            ys, xs = np.nonzero(label == target)
            deep = depth[ys, xs].astype(np.int64)
            if rng.random() < 0.5:
                at = int(deep.argmax())
            else:
                inside = np.flatnonzero(deep >= min(2, int(deep.max())))
                at = int(rng.choice(inside))
            points, kinds = [(xs[at], ys[at])], [1]
            if mode in ("clicks", "mask"):
                again = int(rng.integers(len(ys)))
                if mode == "clicks" and rng.random() < 0.6 and counts[target] < label.size:
                    oy, ox = np.nonzero(label != target)
                    near = rng.integers(len(oy), size=24)
                    near = near[
                        np.argmin((oy[near] - ys[again]) ** 2 + (ox[near] - xs[again]) ** 2)
                    ]
                    points.append((ox[near], oy[near]))
                    kinds.append(0)
                else:
                    points.append((xs[again], ys[again]))
                    kinds.append(1)
            coords.append(points)
            labels.append(kinds)
            shake = rng.normal(0, 0.04, 4) * np.tile([np.ptp(xs) + 1, np.ptp(ys) + 1], 2)
            corners = np.array([xs.min(), ys.min(), xs.max(), ys.max()]) + shake.clip(-8, 8)
            boxes.append(corners.clip(0, s - 1))
            masks.append(mask)
    small = F.interpolate(
        torch.from_numpy(np.stack(masks)).float()[:, None], size=(m, m), mode="area"
    )[:, 0]
    shown = F.interpolate(torch.from_numpy(valid).float()[:, None], size=(m, m), mode="area")[:, 0]
    mask_input = None
    if mode == "mask":
        rough = F.avg_pool2d(small[:, None], 5, 1, 2)
        noise = torch.from_numpy(rng.standard_normal((len(masks), 1, g, g)).astype(np.float32))
        rough = rough + 0.25 * F.interpolate(noise, size=(m, m), mode="bilinear")
        mask_input = (rough - 0.5) * 16
    prompts = torch.tensor(np.array(coords, np.float32))
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        masks=small,
        valid=(shown > 0.999).float(),
        coords=prompts,
        labels=torch.tensor(np.array(labels)),
        boxes=torch.tensor(np.array(boxes, np.float32)) if mode == "box" else None,
        mask_input=mask_input,
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
    coords: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None = None,
    mask_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``MaskDecoder.predict_masks`` for P prompts on each of B images at once.

    Args:
        embeddings: [B, d, g, g].
        coords, labels: [B*P, k, 2] pixels and [B*P, k]; the prompts of one image lie together.
        boxes: [B*P, 4] or None. mask_input: [B*P, 1, 4g, 4g] or None.

    Returns:
        Logits [B*P, 4, 4g, 4g] and predicted IoU [B*P, 4].
    """
    points = None if coords is None or labels is None else (coords, labels)
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=mask_input)
    decoder = sam.mask_decoder
    prompts = len(sparse) // len(embeddings)
    out = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight], 0)
    tokens = torch.cat([out[None].expand(len(sparse), -1, -1), sparse], 1)
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
    logits: Tensor, iou: Tensor, target: Tensor, valid: Tensor, balance: float, agree: float
) -> tuple[Tensor, dict[str, float]]:
    """The training loss of masks and predicted IoU, and figures for the log.

    ``agree``: weight of the mean of the three masks' losses against the least of them.
    """
    logits, iou = logits.float(), iou.float()
    losses = mask_losses(logits, target, valid, balance)
    multi = losses[:, 1:]
    with torch.no_grad():
        true = iou_of(logits, target, valid)
    predicted = (iou - true).square().mean()
    shared = (1 - agree) * multi.min(1).values.mean() + agree * multi.mean()
    loss = losses[:, 0].mean() + shared + 4 * agree * predicted
    rows = torch.arange(len(iou), device=iou.device)
    picked = true[rows, 1 + iou[:, 1:].argmax(1)].mean()
    return loss, {
        "loss": float(loss.detach()),
        "iou": float(picked),
        "best": float(true[:, 1:].amax(1).mean()),
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
    """A run of training: model, optimiser, running average, and where it stands."""

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
        """Take over the weights of a stock-order model of the same kind before the first step."""
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
        self.pool = ScenePool(self.config.seed, self.spec.image_size, self.config.pool + 500)

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
        """Weight of all three masks at this step: they part at first and agree more and more.

        The scenes are hardly ambiguous: with three masks far apart, choosing by predicted IoU lost
        more than the best of them gained (0.799 chosen, 0.814 for the single mask).
        """
        progress = self.config.progress(self.step)
        return float(np.interp(progress, (0.45, 0.55, 0.72, 0.78), (0.13, 0.5, 0.5, 0.9)))

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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            embeddings = self.sam.image_encoder(batch.images)
            near = affinity_loss(self.head, embeddings, batch.tokens, index)
            if warming:
                loss = near
            else:
                logits, iou = decode_batch(
                    self.sam,
                    embeddings,
                    None if batch.boxes is not None else batch.coords,
                    None if batch.boxes is not None else batch.labels,
                    batch.boxes,
                    batch.mask_input,
                )
                valid = batch.valid.repeat_interleave(config.clicks, 0)
                loss, figures = joint_loss(
                    logits, iou, batch.masks, valid, self.balance(), self.agreement()
                )
                loss = loss + 0.3 * near
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
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
        """Continue a run from :meth:`save`'s file; ``steps`` replaces its budget, reshaping its
        schedule.
        """
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
