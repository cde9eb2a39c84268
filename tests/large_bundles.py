"""Bundles of the published models with meaningless weights, made in seconds and little memory.

They are for tests that depend on a model's size and shape but not on its results. All weights are
one piece of noise, scaled a little differently for each tensor, so that no two are equal by chance.
The tail's tokens for absent windows are zeros, because computing them takes a run of the whole
stack. The decoder is a placeholder: it is nearly the same in all models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.bundle import Bundle, Manifest, Stage, hash_file, stage_digest, write_manifest


def write_large_bundle(name: str, directory: Path) -> Bundle:
    """Write ``vit_b``, ``vit_l`` or ``vit_h`` as a full fp16 bundle without golden samples."""
    import torch

    from exporters import models, stages
    from exporters.onnx_export import stage_specs, write_stage
    from exporters.precision import cast

    with torch.device("meta"):
        sam = models.build_sam(name)
    sam.image_encoder.half()
    sam.to_empty(device="cpu").requires_grad_(False)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for index, tensor in enumerate([*sam.parameters(), *sam.buffers()]):
        piece = (noise * (1 + index / 1024)).to(tensor.dtype)
        flat = tensor.data.view(-1)
        for part in flat.split(len(piece)):
            part.copy_(piece[: len(part)])
    models.reorder(sam)
    geometry = stages.geometry_of(sam)
    shape = geometry.windows, geometry.tokens_per_window, geometry.embed_dim
    real, stages.padding_tokens = stages.padding_tokens, lambda sam: torch.zeros(shape)
    try:
        directory.mkdir()
        made: dict[str, Any] = {
            "stack": lambda: stages.make_stack(sam, None),
            "tail": lambda: stages.Tail(sam),
        }
        for stage, make in made.items():
            inputs, outputs = stage_specs(stage, geometry, "fp16")
            made[stage] = write_stage(stage, cast(make(), "fp16"), inputs, outputs, directory)
    finally:
        stages.padding_tokens = real
    (directory / "decoder.onnx").write_bytes(b"no decoder")
    files = {"decoder.onnx": hash_file(directory / "decoder.onnx")}
    sides = stage_specs("decoder", geometry, "fp16")
    made["decoder"] = Stage("decoder.onnx", files, stage_digest(files), *sides)
    manifest = Manifest(
        model=name,
        geometry=geometry,
        order="reordered",
        adapted=False,
        precision="fp16",
        weights_sha256="0" * 64,
        stages=made,
        made={"command": "tests"},
    )
    write_manifest(directory, manifest)
    return Bundle.load(directory)
