"""How far honest answers are apart, and what a false answer of which size does to the masks.

    python docs/results/forgery.py --machine "..."

writes ``forgery.json`` beside this file (about a quarter of an hour; needs the export extra):

- ``noise``: :func:`edge_runtime.offload.spotcheck.difference` between engines that compute the same
  windows, in fp32, fp16 and bf16, with the shipped weights and, in larger stacks, random ones.
  ``alarms``: for the pair farthest apart, the tolerance calibrated on the golden windows, and how
  many honest windows of procedural pictures break it;
- ``lies``: the demo's photo, with the tokens of one window (the one under the click) or of one node
  of three replaced by false ones. The mask of each click is compared with the honest one. Lies
  called *worst found* were sought by gradient descent through tail and decoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import combinations
from itertools import count as count_from
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_runtime.exposure.placement import place
from edge_runtime.imaging.images import resize_longest, transform_coords, upscale_mask
from edge_runtime.offload.spotcheck import BOUNDS, Tolerance, difference
from engines.bundle import FLOAT_TYPES, Bundle, TensorSpec, shipped_bundle
from engines.dtypes import to_float32, to_stored
from engines.ort import OrtEngine
from engines.pipeline import Pipeline
from engines.samples import golden_samples, synthetic_image
from engines.windows import Windows, cut
from exporters import stages
from exporters.demo_photo import demo_photo
from exporters.evaluate import iou
from exporters.measure import randomise
from exporters.models import build_sam, load_checkpoint, shipped_weights
from exporters.precision import cast
from exporters.scenes import click_of, make_scene

SIZES = (1e-5, 3e-4, 1e-3, 4e-3, 0.01, 0.02, 0.04, 0.08, 0.2)
SOUGHT = 4
"""Clicks for which the worst lie about a single window is sought."""
STEPS = 30

LIMITS = (0.99, 0.95, 0.9)

Row = dict[str, object]
Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], np.ndarray]


def feeds_of(windows: Windows) -> Feeds:
    return {"pixels": windows.pixels, "extent": windows.extent, "window": windows.window}


# Honest noise ------------------------------------------------------------------------------


def engines_of(precision: str) -> Iterator[tuple[str, Run]]:
    """Engines of the stack on this machine. Each returns tokens as the bundle stores them."""
    sam = load_checkpoint(shipped_weights())
    dtype = FLOAT_TYPES[precision]

    def module(stack: torch.nn.Module) -> Run:
        def run(feeds: Feeds) -> np.ndarray:
            inputs = [torch.from_numpy(feeds[name]) for name in ("pixels", "extent", "window")]
            with torch.no_grad():
                return to_stored(stack(*inputs).float().numpy(), dtype)

        return run

    stack = cast(stages.make_stack(sam, None), precision)
    yield f"PyTorch, {precision} arithmetic", module(stack)
    if precision != "fp32":
        twin = copy.deepcopy(stack).float()
        yield f"PyTorch, weights in {precision}, fp32 arithmetic", module(twin)
    if precision != "bf16":  # ONNX Runtime has no bf16 on the CPU
        bundle = Bundle.load(shipped_bundle(precision))
        forms = {"ONNX Runtime": bundle.stage_path("stack")}
        forms["ONNX Runtime, plain form"] = bundle.plain_path("stack")
        for name, path in forms.items():
            engine = OrtEngine(path, device="cpu")
            yield name, lambda feeds, engine=engine: engine.run(feeds)["tokens"]


def apart(ours: np.ndarray, theirs: np.ndarray, precision: str) -> np.ndarray:
    """The difference of each window."""
    specs = (TensorSpec("tokens", FLOAT_TYPES[precision], ("n", *ours.shape[1:])),)
    rows = [slice(i, i + 1) for i in range(len(ours))]
    return np.array([difference({"tokens": ours[r]}, {"tokens": theirs[r]}, specs) for r in rows])


def pictures(size: int) -> Iterator[np.ndarray]:
    """Procedural scenes, noise and blobs, each turned, mirrored and darkened."""
    for seed in count_from(0):
        picture = make_scene(seed, size).image if seed % 2 else synthetic_image(size, size, seed)
        for turns in range(4):
            turned = np.ascontiguousarray(np.rot90(picture, turns))
            yield from (turned, np.ascontiguousarray(turned[:, ::-1]), turned // 2, 255 - turned)


def larger(model: str, windows: int = 1) -> Iterator[Row]:
    """Noise in a large stack with random weights: in PyTorch, computed in two ways."""
    torch.manual_seed(7)
    sam = randomise(build_sam(model).eval(), seed=7)
    geometry = stages.geometry_of(sam)
    side = geometry.image_size
    feeds = feeds_of(cut(synthetic_image(side, side, 1), geometry))
    inputs = [torch.from_numpy(feeds[name][:windows]) for name in ("pixels", "extent", "window")]
    whole = stages.make_stack(sam, None)
    for precision, dtype in FLOAT_TYPES.items():
        stack = cast(whole, precision)
        with torch.no_grad():
            one = to_stored(stack(*inputs).float().numpy(), dtype)
            other_way = "fp32 arithmetic"
            if precision == "fp32":
                other_way = "attention written out"
                with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                    other = stack(*inputs).numpy()
            else:
                other = to_stored(copy.deepcopy(stack).float()(*inputs).numpy(), dtype)
        yield {
            "model": f"{model}, random weights",
            "precision": precision,
            "engines": [f"PyTorch, {precision} arithmetic", f"PyTorch, {other_way}"],
            "random picture": short(apart(one, other, precision).max()),
        }


def noise(count: int) -> tuple[list[Row], list[Row]]:
    """Differences between all pairs of engines, and false alarms of the worst pairs."""
    bundle = Bundle.load(shipped_bundle())
    stage, geometry = bundle.stage("stack"), bundle.geometry
    golden = golden_samples(bundle)[0].feeds("stack", stage)
    photo = feeds_of(cut(resize_longest(demo_photo()[0], geometry.image_size), geometry))
    rows, alarms = [], []
    for precision in BOUNDS:
        engines = dict(engines_of(precision))
        known = {name: run(golden) for name, run in engines.items()}
        seen = {name: run(photo) for name, run in engines.items()}
        worst: tuple[float, str, str] = (-1.0, "", "")
        for one, other in combinations(engines, 2):
            found = apart(known[one], known[other], precision)
            of_photo = apart(seen[one], seen[other], precision)
            worst = max(worst, (float(found.max()), one, other))
            rows.append(
                {
                    "model": "tiny",
                    "precision": precision,
                    "engines": [one, other],
                    "golden": short(found.max()),
                    "photo": short(of_photo.max()),
                }
            )
        for name, run in engines.items():
            for batch in (1, 5):
                parts = [
                    run({key: array[i : i + batch] for key, array in photo.items()})
                    for i in range(0, len(photo["window"]), batch)
                ]
                found = apart(seen[name], np.concatenate(parts), precision)
                rows.append(
                    {
                        "model": "tiny",
                        "precision": precision,
                        "engines": [name, f"itself, {batch} at a time"],
                        "photo": short(found.max()),
                    }
                )
        _, one, other = worst
        specs = (TensorSpec("tokens", FLOAT_TYPES[precision], ("n", *known[one].shape[1:])),)
        tolerance = Tolerance(specs, precision).calibrate(
            {"tokens": known[other]}, {"tokens": known[one]}
        )
        many: list[np.ndarray] = []
        for picture in pictures(geometry.image_size):
            feeds = feeds_of(cut(picture, geometry))
            many.append(apart(engines[one](feeds), engines[other](feeds), precision))
            if sum(map(len, many)) >= count:
                break
        of_all = np.concatenate(many)
        alarms.append(
            {
                "precision": precision,
                "engines": [one, other],
                "tolerance": short(tolerance),
                "windows": len(of_all),
                "median": short(np.median(of_all)),
                "largest": short(of_all.max()),
                "above the tolerance": int((of_all > tolerance).sum()),
            }
        )
    for model in ("vit_b", "vit_h"):
        rows += larger(model)
    return rows, alarms


# Lies ------------------------------------------------------------------------------------------


class Photo:
    """The demo's photo and a click on each coin, computed honestly."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.bundle = Bundle.load(shipped_bundle(precision))
        self.pipeline = Pipeline(self.bundle, device="cpu")
        self.dtype = FLOAT_TYPES[precision]
        image, coins = demo_photo()
        geometry = self.bundle.geometry
        self.original = image.shape[:2]
        self.windows = cut(resize_longest(image, geometry.image_size), geometry)
        clicks = np.array([click_of(coin) for coin in coins], np.float64)
        self.coords = transform_coords(clicks, self.original, self.windows.size)
        column, row = (self.coords // geometry.window_pixels).astype(int).T
        self.under = np.searchsorted(self.windows.window, row * geometry.windows_per_side + column)
        stored = self.pipeline.stack(self.pipeline.stack_inputs(self.windows))["tokens"]
        self.tokens = to_float32(stored, self.dtype)
        self.low_res, self.honest = self.masks(self.tokens)

    def masks(
        self, tokens: np.ndarray, clicks: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each click the mask that users get: low-resolution logits [p, m, m], and bool."""
        outputs = {"tokens": to_stored(tokens, self.dtype)}
        embedding = self.pipeline.tail(outputs, self.windows)
        low, scores = self.pipeline.decode(embedding, *(a[clicks] for a in self.prompts()))
        best = np.argmax(scores[:, 1:], axis=1) + 1
        picked, side = low[np.arange(len(low)), best], self.bundle.geometry.image_size
        return picked, upscale_mask(picked, side, self.windows.size, self.original)

    def prompts(self) -> tuple[np.ndarray, ...]:
        """A click each, with the padding point that SAM adds."""
        count, side = len(self.coords), self.bundle.geometry.low_res
        coords = np.stack([self.coords, np.zeros_like(self.coords)], 1).astype(np.float32)
        labels = np.tile(np.array([1, -1], np.float32), (count, 1))
        mask = np.zeros((count, 1, side, side), np.float32)
        return coords, labels, mask, np.zeros(count, np.float32)

    def of_node(self) -> np.ndarray:
        """The rows that one of three nodes gets."""
        placed = place(
            self.windows.area().tolist(),
            self.windows.window.tolist(),
            self.bundle.geometry.windows_per_side,
            ["alpha", "beta", "gamma"],
            0.37,
            bytes(32),
            bytes(32),
        )
        most = max(placed.assignment.values(), key=len)
        return np.flatnonzero(np.isin(self.windows.window, most))

    def effect(self, false: np.ndarray, rows: np.ndarray, clicks: np.ndarray) -> list[float]:
        """IoU of each click's mask with the honest one, with false tokens in some rows."""
        tokens = self.tokens.copy()
        tokens[rows] = false[rows]
        _, masks = self.masks(tokens, clicks)
        return [iou(mask, self.honest[k]) for mask, k in zip(masks, clicks, strict=True)]

    def row(
        self, name: str, rows: np.ndarray, false: np.ndarray, found: list[float], windows: int
    ) -> Row:
        """The effect of a lie, as it is kept."""
        honest, stored = (to_stored(each[rows], self.dtype) for each in (self.tokens, false))
        size = apart(honest, stored, self.precision)
        return {
            "precision": self.precision,
            "windows": windows,
            "lie": name,
            "difference": short(size.min()),
            "masks": len(found),
            "iou_median": round(float(np.median(found)), 4),
            "iou_least": round(min(found), 4),
            **{f"below {limit}": sum(each < limit for each in found) for limit in LIMITS},
        }


def lengths(tokens: np.ndarray) -> np.ndarray:
    """What sizes refer to, see :func:`edge_runtime.offload.spotcheck.difference`: [n, t, 1]."""
    own = np.linalg.norm(tokens, axis=-1, keepdims=True)
    typical = np.sqrt((own**2).mean(axis=1, keepdims=True))
    return np.maximum(own, typical / 10)


def plain_lies(photo: Photo) -> Iterator[tuple[str, np.ndarray]]:
    """Lies that take no thought; each is all tokens of the photo."""
    honest, rng = photo.tokens, np.random.default_rng(0)
    for size in SIZES:
        way = rng.standard_normal(honest.shape)
        way /= np.linalg.norm(way, axis=-1, keepdims=True)
        yield "random noise", (honest + size * lengths(honest) * way).astype(np.float32)
    for factor in (1.001, 1.01, 1.1, 2.0, 0.5):
        yield f"scaled by {factor:g}", honest * np.float32(factor)
    yield "sign flipped", -honest
    yield "zeros", np.zeros_like(honest)
    yield "mean token everywhere", np.broadcast_to(honest.mean((0, 1)), honest.shape).copy()
    yield "tokens of the next window", np.roll(honest, 1, axis=0)
    geometry = photo.bundle.geometry
    other = make_scene(1, geometry.image_size).image[: photo.windows.size[0]]
    windows = cut(np.ascontiguousarray(other), geometry)
    found = photo.pipeline.stack(photo.pipeline.stack_inputs(windows))["tokens"]
    yield "tokens of another picture", to_float32(found, photo.dtype)


class Worst:
    """Seeks the false tokens of a given size that spoil the masks most."""

    def __init__(self, photo: Photo) -> None:
        self.photo = photo
        sam = load_checkpoint(shipped_weights())
        self.tail, self.decoder = stages.Tail(sam), stages.Decoder(sam)
        for module in (self.tail, self.decoder):
            module.requires_grad_(False)
        self.prompts = [torch.from_numpy(array) for array in photo.prompts()]
        self.wanted = torch.from_numpy(photo.low_res > 0)
        self.present = torch.from_numpy(photo.windows.present)

    def seek(self, size: float, rows: np.ndarray, clicks: np.ndarray) -> np.ndarray:
        """All tokens, with false ones in some rows, by projected gradient descent."""
        photo = self.photo
        honest = torch.from_numpy(photo.tokens[rows])
        limit = 0.999 * size * torch.from_numpy(lengths(photo.tokens[rows]))
        generator = torch.Generator().manual_seed(0)
        lie = torch.randn(honest.shape, generator=generator)
        lie = lie / lie.norm(dim=-1, keepdim=True) * limit * 0.5
        full = torch.zeros(len(self.present), *photo.tokens.shape[1:])
        full[photo.windows.window] = torch.from_numpy(photo.tokens)
        index = torch.from_numpy(photo.windows.window[rows])
        prompts = [array[clicks] for array in self.prompts]
        wanted = self.wanted[clicks][:, None].float()
        for step in range(STEPS):
            lie.requires_grad_(True)
            tokens = full.index_copy(0, index, honest + lie)
            logits, _ = self.decoder(self.tail(tokens, self.present), *prompts)
            soft = torch.sigmoid(logits[:, 1:])
            both = (soft * wanted).sum((2, 3))
            either = (soft + wanted - soft * wanted).sum((2, 3))
            (gradient,) = torch.autograd.grad((both / either).mean(), lie)
            with torch.no_grad():
                way = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-20)
                lie = lie - way * limit * (0.3 if step < STEPS // 2 else 0.1)
                longest = lie.norm(dim=-1, keepdim=True).clamp_min(1e-20)
                lie = lie * torch.clamp(limit / longest, max=1.0)
        false = photo.tokens.copy()
        false[rows] = (honest + lie).numpy()
        return false


def sought(photo: Photo) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """The worst lies found: what to add to all tokens, and for which clicks, or for one node."""
    worst, mine = Worst(photo), photo.of_node()
    everyone = np.arange(len(photo.coords))
    few = everyone[:: len(everyone) // SOUGHT][:SOUGHT]
    for size in SIZES:
        for k in few:
            click = few[few == k]
            yield "worst found", worst.seek(size, photo.under[click], click) - photo.tokens, click
        yield "worst found", worst.seek(size, mine, everyone) - photo.tokens, None


def lies(precision: str, worst: list[tuple[str, np.ndarray, np.ndarray | None]]) -> Iterator[Row]:
    """The effect of each lie, about one window and about those of one node."""
    photo = Photo(precision)
    everyone, mine = np.arange(len(photo.coords)), photo.of_node()
    for name, false in plain_lies(photo):
        each = [photo.effect(false, photo.under[[k]], everyone[[k]])[0] for k in everyone]
        yield photo.row(name, photo.under, false, each, windows=1)
        yield photo.row(name, mine, false, photo.effect(false, mine, everyone), windows=len(mine))
    each, mixed, under = [], photo.tokens.copy(), []
    for name, lie, click in worst:
        false = photo.tokens + lie
        if click is not None:
            rows = photo.under[click]
            each += photo.effect(false, rows, click)
            mixed[rows] = false[rows]
            under += [*rows]
        else:
            yield photo.row(name, np.array(under), mixed, each, windows=1)
            found = photo.effect(false, mine, everyone)
            yield photo.row(name, mine, false, found, windows=len(mine))
            each, mixed, under = [], photo.tokens.copy(), []


def all_lies() -> list[Row]:
    worst = [*sought(Photo("fp32"))]
    return [row for precision in ("fp32", "fp16") for row in lies(precision, worst)]


def short(value: float) -> float:
    return float(f"{float(value):.3g}")


def main() -> None:
    """Write ``forgery.json``, or the part of it that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="unnamed machine")
    parser.add_argument("--part", choices=("noise", "lies"), help="measure only this")
    parser.add_argument("--honest", type=int, default=34_000, help="windows for each precision")
    options = parser.parse_args()
    out = Path(__file__).with_suffix(".json")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    about = {
        "commit": commit.stdout.strip(),
        "machine": options.machine,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    for part in ("noise", "lies"):
        if options.part in (None, part):
            command = f"python docs/results/forgery.py --part {part}"
            if part == "noise":
                measured, alarms = noise(options.honest)
                command += f" --honest {options.honest}"
                found = {"run": {"command": command, **about}, "pairs": measured, "alarms": alarms}
            else:
                found = {"run": {"command": command, **about}, "rows": all_lies()}
            result = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(json.dumps({**result, part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
