"""Models, reordering and checkpoint files."""

from __future__ import annotations

import pytest
import torch

from edge_common.errors import CheckpointError
from exporters.models import (
    MODELS,
    build_sam,
    is_window_block,
    load_checkpoint,
    recognise,
    reorder,
    save_checkpoint,
    weights_hash,
)


@pytest.fixture
def sam():
    torch.manual_seed(0)
    sam = build_sam("tiny")
    with torch.no_grad():  # SAM starts these at zero, which would hide mistakes
        sam.image_encoder.pos_embed.normal_(std=0.5)
        for block in sam.image_encoder.blocks:
            block.attn.rel_pos_h.normal_()
            block.attn.rel_pos_w.normal_()
    return sam


def embed(sam):
    image = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return sam.image_encoder(image)


def test_tiny_splits_into_five_by_five_windows_partly_padded():
    spec = MODELS["tiny"]
    assert -(-spec.grid // spec.window_size) == 5
    assert spec.grid % spec.window_size != 0
    assert sum(p.numel() for p in build_sam("tiny").parameters()) <= 2_750_000


@pytest.mark.parametrize(
    ("name", "window_blocks"), [("vit_b", 8), ("vit_l", 20), ("vit_h", 28), ("tiny", 4)]
)
def test_block_counts_per_model(name, window_blocks):
    spec = MODELS[name]
    assert len(spec.window_blocks) == window_blocks
    assert sorted(spec.reordered_permutation) == list(range(spec.depth))


def test_reorder_puts_window_blocks_first_and_keeps_the_order_within_each_kind(sam):
    before = list(sam.image_encoder.blocks)
    reorder(sam)
    after = list(sam.image_encoder.blocks)
    assert [before.index(b) for b in after] == list(MODELS["tiny"].reordered_permutation)
    assert [is_window_block(b) for b in after] == [True] * 4 + [False] * 4
    assert sam.order == "reordered"


def test_reorder_changes_the_function_and_is_idempotent(sam):
    stock = embed(sam)
    once = embed(reorder(sam))
    assert not torch.allclose(stock, once, atol=1e-3)
    assert torch.equal(once, embed(reorder(sam)))


def test_a_saved_checkpoint_loads_equal(sam, tmp_path):
    reorder(sam)
    sam.adapted = True
    save_checkpoint(sam, tmp_path / "w.pt", {"command": "test"})
    loaded = load_checkpoint(tmp_path / "w.pt", "tiny")
    assert (loaded.order, loaded.adapted, loaded.model_name) == ("reordered", True, "tiny")
    assert loaded.made["command"] == "test"
    assert weights_hash(loaded) == weights_hash(sam)
    assert torch.equal(embed(loaded), embed(sam))
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_a_bare_state_dict_is_a_stock_checkpoint(sam, tmp_path):
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    loaded = load_checkpoint(tmp_path / "sam.pth")
    assert (loaded.order, loaded.adapted) == ("stock", False)
    assert torch.equal(embed(loaded), embed(sam))


def test_the_hash_distinguishes_weights(sam):
    before = weights_hash(sam)
    with torch.no_grad():
        sam.image_encoder.pos_embed[0, 0, 0, 0] += 1e-3
    assert weights_hash(sam) != before


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_sizes_equal_those_of_upstream_s_builders(name):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        upstream = sam_model_registry[name]()
        ours = build_sam(name)
    shapes = {k: v.shape for k, v in upstream.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert recognise(upstream.state_dict()) == name
    kinds = [b.window_size for b in upstream.image_encoder.blocks]
    assert [b.window_size for b in ours.image_encoder.blocks] == kinds


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_reported(sam, tmp_path, share):
    path = tmp_path / "w.pt"
    save_checkpoint(sam, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"truncated|empty") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"\x89PNG\r\n\x1a\n" * 40])
def test_a_file_of_another_kind_is_reported(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a SAM checkpoint"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "w.pt").write_bytes(pickle.dumps({"image_encoder.x": Trap()}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_wrong_model_error_names_the_likely_one(sam, tmp_path):
    save_checkpoint(sam, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"looks like tiny, not vit_b: use --model tiny"):
        load_checkpoint(tmp_path / "w.pt", "vit_b")


def test_foreign_and_incomplete_state_dicts_are_refused(sam, tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="no weights of a SAM"):
        load_checkpoint(tmp_path / "foreign.pt")
    state = sam.state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*iou_token"):
        load_checkpoint(tmp_path / "part.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="list"):
        load_checkpoint(tmp_path / "list.pt")
