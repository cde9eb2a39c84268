"""The supported SAM models: their sizes, their block order, and their checkpoints."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from edge_common.errors import CheckpointError
from edge_common.files import atomic_file
from exporters.path_checks import check_checkpoint_file

FORMAT = "edge-runtime-sam"
FORMAT_VERSION = 1
_ZIP = b"PK\x03\x04"
STOCK, REORDERED = "stock", "reordered"


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of one SAM. Pixels and tokens count one side of the square."""

    name: str
    depth: int
    dim: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    out_chans: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_hidden: int = 256
    mask_in_chans: int = 16

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def window_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with window attention, in stock order."""
        return tuple(i for i in range(self.depth) if i not in self.global_blocks)

    @property
    def reordered_permutation(self) -> tuple[int, ...]:
        """Stock index of the block at each place of the reordered model."""
        return self.window_blocks + self.global_blocks

    def at(self, image_size: int, window_size: int) -> ModelSpec:
        """The same model for another image side (pixels) and window side (tokens)."""
        return replace(self, image_size=image_size, window_size=window_size)


MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "tiny",
            depth=8,
            dim=128,
            heads=4,
            global_blocks=(1, 3, 5, 7),
            image_size=192,
            patch_size=8,
            window_size=5,
            out_chans=128,
            decoder_mlp=512,
            iou_hidden=128,
        ),
        ModelSpec("vit_b", depth=12, dim=768, heads=12, global_blocks=(2, 5, 8, 11)),
        ModelSpec("vit_l", depth=24, dim=1024, heads=16, global_blocks=(5, 11, 17, 23)),
        ModelSpec("vit_h", depth=32, dim=1280, heads=16, global_blocks=(7, 15, 23, 31)),
    )
}


def spec_of(name: str) -> ModelSpec:
    """The sizes of the model called ``name``; CheckpointError for a name not in the table."""
    try:
        return MODELS[name]
    except KeyError:
        raise CheckpointError(f"no model is called {name!r}; known: {', '.join(MODELS)}") from None


def build_from_spec(spec: ModelSpec) -> Sam:
    """A SAM of these sizes in stock order, untrained, in eval mode, float32, on the CPU."""
    sam = Sam(
        image_encoder=ImageEncoderViT(
            depth=spec.depth,
            embed_dim=spec.dim,
            img_size=spec.image_size,
            mlp_ratio=4,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=spec.heads,
            patch_size=spec.patch_size,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=spec.global_blocks,
            window_size=spec.window_size,
            out_chans=spec.out_chans,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=spec.out_chans,
            image_embedding_size=(spec.grid, spec.grid),
            input_image_size=(spec.image_size, spec.image_size),
            mask_in_chans=spec.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=spec.out_chans,
                mlp_dim=spec.decoder_mlp,
                num_heads=spec.decoder_heads,
            ),
            transformer_dim=spec.out_chans,
            iou_head_depth=3,
            iou_head_hidden_dim=spec.iou_hidden,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    sam.model_name = spec.name
    sam.order = STOCK
    sam.adapted = False
    return sam.eval()


def build_sam(name: str) -> Sam:
    """An untrained SAM called ``name`` (``tiny``, ``vit_b``, ``vit_l``, ``vit_h``) in stock order.

    The model carries three attributes beyond upstream's: ``model_name``, ``order`` (``"stock"`` or
    ``"reordered"``) and ``adapted`` (whether its weights were trained for the reordered blocks).
    """
    return build_from_spec(spec_of(name))


def is_window_block(block: Any) -> bool:
    """True if an encoder block attends within windows only."""
    return bool(block.window_size > 0)


def reorder(sam: Sam) -> Sam:
    """Put all window blocks first and all global blocks last, in place; returns the same object.

    The order within each kind stays. The blocks are the upstream objects, so the keys of the state
    dict are renumbered with them. A reordered model is returned unchanged. Reordering changes the
    function, so the weights must be adapted: see ``edge-runtime adapt``.
    """
    encoder = sam.image_encoder
    blocks = list(encoder.blocks)
    encoder.blocks = torch.nn.ModuleList(
        [b for b in blocks if is_window_block(b)] + [b for b in blocks if not is_window_block(b)]
    )
    sam.order = REORDERED
    return sam


def weights_hash(sam: Sam) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of all weights, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sam.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(sam: Sam, path: Path | str, made: Mapping[str, Any] | None = None) -> None:
    """Write ``sam``'s weights in this project's format, atomically.

    ``made`` says how the weights were made (JSON-like values). Tensors keep their dtype. The
    format is a ``torch.save`` dict ``{format, version, model, order, adapted, state_dict, made}``
    that loads with ``weights_only``.
    """
    facts = {"saved": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": sam.model_name,
        "order": sam.order,
        "adapted": bool(sam.adapted),
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in sam.state_dict().items()},
        "made": json.loads(json.dumps({**facts, **(made or {})})),  # plain types only
    }
    save_atomically(content, path)


def save_atomically(content: Any, path: Path | str) -> None:
    """``torch.save``, whole or not at all."""
    with atomic_file(path, error=CheckpointError) as scratch, open(scratch, "wb") as file:
        torch.save(content, file)


def read_torch_file(path: Path | str, *, lazily: bool = False) -> Any:
    """Load a ``torch.save`` file without executing anything in it; CheckpointError when it can't be
    read.

    Args:
        lazily: read tensors from the file when they are used.
    """
    path = Path(path)
    check_checkpoint_file(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP  # not before PyTorch 1.6
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and is_zip)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as err:
        if is_zip and not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"checkpoint {path} is truncated ({path.stat().st_size:,} bytes)",
                mend="download or copy it again",
                code="damaged",
            ) from None
        raise CheckpointError(
            f"{path} is not a SAM checkpoint, or is damaged; expected a state dict written by "
            f"torch.save ({type(err).__name__})"
        ) from None


def recognise(state: Mapping[str, Any]) -> str | None:
    """The name of the model of these weights, by their sizes; None if it is not supported."""
    patch = state.get("image_encoder.patch_embed.proj.weight")
    if not isinstance(patch, torch.Tensor) or patch.ndim != 4:
        return None
    places = [int(k.split(".")[2]) for k in state if k.startswith("image_encoder.blocks.")]
    depth = max(places, default=-1) + 1
    for spec in MODELS.values():
        if (spec.dim, spec.patch_size, spec.depth) == (patch.shape[0], patch.shape[2], depth):
            return spec.name
    return None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose weights have not been read yet.

    Attributes:
        order: ``"stock"`` or ``"reordered"``.
        adapted: whether the weights were trained for the reordered blocks.
        made: how they were made.
        state: the weights, read when they are used.
    """

    path: Path
    model: str
    order: str
    adapted: bool
    made: dict[str, Any]
    state: Mapping[str, torch.Tensor]

    def load(self) -> Sam:
        """The model in eval mode on the CPU, with ``model_name``, ``order``, ``adapted`` and
        ``made`` set."""
        sam = build_sam(self.model)
        if self.order == REORDERED:
            reorder(sam)
        sam.load_state_dict({key: value.float() for key, value in self.state.items()})
        sam.adapted, sam.made = self.adapted, self.made
        return sam


def open_checkpoint(path: Path | str, model: str | None = None) -> Checkpoint:
    """Open a stock ``segment_anything`` checkpoint or one that this project saved.

    Args:
        path: file written by ``torch.save``: a bare state dict (stock order is assumed) or this
            project's format.
        model: the expected model; None recognises it by its weights.

    Raises:
        CheckpointError: it is missing, truncated, no checkpoint, incomplete, or of another model.
    """
    if model is not None:
        spec_of(model)
    content = read_torch_file(path, lazily=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a SAM state dict")
    order: str | None = STOCK
    adapted, made = False, {}
    if "format" in content:
        if content["format"] != FORMAT or content.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} is of format {content['format']!r} version {content.get('version')!r}; "
                f"this software reads {FORMAT!r} version {FORMAT_VERSION}"
            )
        state = content.get("state_dict")
        order, adapted = content.get("order"), bool(content.get("adapted"))
        made = dict(content.get("made") or {})
        if not isinstance(state, dict) or order not in (STOCK, REORDERED):
            raise CheckpointError(f"{path} is damaged: its weights or its block order are missing")
    else:
        state = content
    looks_like = recognise(state)
    if looks_like is None:
        raise CheckpointError(
            f"{path} holds no weights of a SAM known here ({', '.join(MODELS)}); expected keys "
            "like 'image_encoder.patch_embed.proj.weight'"
        )
    if model is not None and looks_like != model:
        raise CheckpointError(
            f"{path} looks like {looks_like}, not {model}", mend=f"use --model {looks_like}"
        )
    with torch.device("meta"):  # the shapes alone
        sam = build_sam(looks_like)
    if order == REORDERED:
        reorder(sam)
    expected = sam.state_dict()
    missing = [k for k in expected if k not in state]
    surplus = [k for k in state if k not in expected]
    misfits = [
        k
        for k in expected
        if k in state
        and (not isinstance(state[k], torch.Tensor) or state[k].shape != expected[k].shape)
    ]
    for kind, keys in (("lacks", missing), ("has unknown", surplus), ("has misshapen", misfits)):
        if keys:
            raise CheckpointError(
                f"{path} looks like {looks_like} ({order} order) but {kind} {len(keys)} weights, "
                f"first {keys[0]!r}"
            )
    return Checkpoint(Path(path), looks_like, str(order), adapted, made, state)


def load_checkpoint(path: Path | str, model: str | None = None) -> Sam:
    """:func:`open_checkpoint` and :meth:`Checkpoint.load` in one."""
    return open_checkpoint(path, model).load()


def shipped_weights(kind: str = "adapted") -> Path:
    """Path of the weights that come with the package: ``"stock"`` or ``"adapted"`` tiny."""
    return Path(__file__).with_name("weights") / f"tiny-{kind}.pt"
