"""The trainer: batches, losses, resolution, exact resume, and the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edge_common.errors import CheckpointError
from exporters.models import MODELS, build_from_spec, build_sam, load_checkpoint
from exporters.scenes import PHOTO_LIKE
from exporters.training import (
    ScenePool,
    TrainConfig,
    Trainer,
    affinity_loss,
    decode_batch,
    iou_of,
    joint_loss,
    make_batch,
    mask_losses,
    resize_state,
    tie_cross_attention,
)

MINUTE = TrainConfig(
    steps=4, images=2, clicks=2, warmup_steps=1, low_size=64, low_window=2, low_until=0.5, pool=8
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_and_two_steps_equal_four(tmp_path):
    """Bit for bit, across a checkpoint, the warm-up and the change of resolution."""
    whole = Trainer(MINUTE)
    figures = [whole.train_step() for _ in range(4)]
    first = Trainer(MINUTE)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "state.pt")
    second = Trainer.resume(tmp_path / "state.pt")
    again = [second.train_step() for _ in range(2)]
    assert [f.get("loss") for f in again] == [f.get("loss") for f in figures[2:]]
    assert whole.spec.image_size == second.spec.image_size == 192
    for name, value in whole.sam.state_dict().items():
        assert torch.equal(value, second.sam.state_dict()[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name


def test_steps_change_the_weights_and_another_seed_gives_others():
    trainer, other = Trainer(MINUTE), Trainer(replace(MINUTE, seed=2))
    before = {k: v.clone() for k, v in trainer.sam.state_dict().items()}
    trainer.train_step()
    trainer.train_step()
    after = trainer.sam.state_dict()
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert any(k.startswith("image_encoder.blocks.7") for k in moved)
    assert any(k.startswith("mask_decoder") for k in moved)
    assert not torch.equal(
        before["image_encoder.pos_embed"], other.average["image_encoder.pos_embed"]
    )


def test_a_run_may_start_from_weights():
    torch.manual_seed(5)
    sam = build_sam("tiny")
    trainer = Trainer(replace(MINUTE, steps=100, offset=0.8, warmup_steps=0))
    trainer.begin_from(sam)
    assert trainer.spec == MODELS["tiny"]
    wanted = sam.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in trainer.result().state_dict().items())
    assert "iou" in trainer.train_step()
    assert trainer.learning_rate() < 0.2 * MINUTE.lr


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"format": "something"}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not the state of a training run"):
        Trainer.resume(tmp_path / "state.pt")


def test_batches_follow_the_step_and_prompts_are_on_their_masks():
    config = replace(MINUTE, images=4, clicks=3)
    spec = MODELS["tiny"]
    pool, fresh = (ScenePool(1, 192, 100, photo_like=0.5) for _ in range(2))
    boxes = 0
    for step in range(6):
        batch, again = (make_batch(config, spec, p, step) for p in (pool, fresh))
        for name, value in vars(batch).items():
            assert torch.equal(value, getattr(again, name)), name
        assert batch.images.shape == (4, 3, 192, 192)
        assert batch.masks.shape == (12, 96, 96)
        padded = batch.valid.repeat_interleave(3, 0) == 0
        assert float((batch.masks * padded).max()) < 1
        for mask, coords, labels in zip(batch.masks, batch.coords, batch.labels, strict=True):
            if labels.tolist() == [1, -1]:
                x, y = (coords[0] / 2).long()
                assert mask[y, x] > 0
            else:
                assert labels.tolist() == [2, 3]
                boxes += 1
                ys, xs = torch.nonzero(mask, as_tuple=True)
                tight = torch.tensor([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]]) * 2
                assert (coords - tight).abs().max() <= 7
    assert 10 < boxes < 62


def test_points_on_parts_and_wholes_count_as_ambiguous():
    config, pool = replace(MINUTE, images=8, clicks=6), ScenePool(1, 192, 200, photo_like=1.0)
    batches = [make_batch(config, MODELS["tiny"], pool, step) for step in range(4)]
    ambiguous = torch.cat([b.ambiguous for b in batches])
    boxes = torch.cat([b.labels[:, 0] == 2 for b in batches])
    assert 0.02 < ambiguous.float().mean() < 0.5
    assert not (ambiguous & boxes).any()


def test_a_pool_mixes_both_kinds_of_scenes_in_the_given_number():
    pool, other = ScenePool(3, 48, 100, photo_like=0.5), ScenePool(3, 48, 4, photo_like=0.5)
    kinds = [pool.get(n)[0].kind for n in range(40)]
    assert 8 < kinds.count(PHOTO_LIKE) < 32
    assert [other.get(n)[0].kind for n in reversed(range(40))] == kinds[::-1]
    assert len(other._kept) == 4
    assert PHOTO_LIKE not in {ScenePool(3, 48, 100).get(n)[0].kind for n in range(10)}


def test_every_round_trains_decoder_and_encoder(monkeypatch):
    """All rounds are supervised, each with more points or with the last mask."""
    asked = []

    def recorded(sam, embeddings, coords, labels, mask_input=None):
        asked.append((coords.shape[1], mask_input is not None))
        return decode_batch(sam, embeddings, coords, labels, mask_input)

    monkeypatch.setattr("exporters.training.decode_batch", recorded)
    trainer = Trainer(replace(MINUTE, warmup_steps=0, low_size=0, rounds=4))
    before = {k: v.clone() for k, v in trainer.sam.state_dict().items()}
    for _ in range(3):
        assert "last" in trainer.train_step()
    assert len(asked) == 12
    assert {mask for points, mask in asked if points > 2} == {True, False}
    assert all(asked[i] == (2, False) for i in (0, 4, 8))
    after = trainer.sam.state_dict()
    for name in (
        "image_encoder.patch_embed.proj.weight",
        "prompt_encoder.mask_downscaling.0.weight",
    ):
        assert not torch.equal(before[name], after[name]), name
    for k in range(4):
        name = f"prompt_encoder.point_embeddings.{k}.weight"
        assert not torch.equal(before[name], after[name]), name


def test_decoding_in_batches_equals_upstream_s_decoder():
    torch.manual_seed(0)
    sam = build_sam("tiny")
    embeddings = torch.randn(2, 128, 24, 24)
    coords, labels = torch.rand(6, 2, 2) * 192, torch.tensor([[1, 0]] * 6)
    masks = torch.randn(6, 1, 96, 96)
    with torch.no_grad():
        boxes = coords.reshape(6, 4)
        for k in range(2):
            part = slice(3 * k, 3 * k + 3)
            prompts = ((coords[part], labels[part]), boxes[part], masks[part])
            sparse, dense = sam.prompt_encoder(*prompts)
            pe = sam.prompt_encoder.get_dense_pe()
            wanted = sam.mask_decoder.predict_masks(embeddings[k : k + 1], pe, sparse, dense)
            both = torch.cat([coords, coords], 1), torch.tensor([[1, 0, 2, 3]] * 6)
            logits, iou = decode_batch(sam, embeddings, *both, masks)
            assert torch.allclose(logits[part], wanted[0], atol=1e-5)
            assert torch.allclose(iou[part], wanted[1], atol=1e-5)
            sparse, dense = sam.prompt_encoder((coords[part], labels[part]), None, None)
            wanted = sam.mask_decoder.predict_masks(embeddings[k : k + 1], pe, sparse, dense)
            padded = torch.cat([coords, coords[:, :1]], 1), torch.tensor([[1, 0, -1]] * 6)
            logits, iou = decode_batch(sam, embeddings, *padded)
            assert torch.allclose(logits[part], wanted[0], atol=1e-5)


def test_tied_attention_reads_the_place_of_the_click():
    torch.manual_seed(0)
    sam = build_sam("tiny")
    tie_cross_attention(sam)
    attention = sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    pe = sam.prompt_encoder.get_dense_pe()[0].flatten(1).T
    with torch.no_grad():
        scores = attention.q_proj(pe[300]) @ attention.k_proj(pe).T
    assert int(scores.argmax()) == 300


def test_losses_prefer_the_correct_mask():
    target = torch.zeros(1, 16, 16)
    target[:, 4:9, 5:12] = 1
    valid = torch.ones_like(target)
    right = (target * 2 - 1)[:, None] * 8
    logits = torch.cat([right, -right, torch.full_like(right, -8.0)], 1)
    for balance in (0.0, 1.0):
        losses = mask_losses(logits, target, valid, balance)[0]
        assert losses[0] < 0.05 < losses[2] < losses[1]
    assert iou_of(logits, target, valid)[0].tolist() == [1.0, 0.0, 0.0]


def test_padding_does_not_count_in_the_loss():
    target, valid = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    target[:, 2:5, 2:5] = 1
    valid[:, :, 6:] = 0
    logits = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = logits.clone()
    changed[..., 6:] = 50
    iou, half = torch.zeros(1, 4), torch.tensor([0.5])
    one = joint_loss(logits, iou, target, valid, 0.5, half)[0]
    two = joint_loss(changed, iou, target, valid, 0.5, half)[0]
    assert torch.isclose(one, two)


def test_position_tables_keep_their_slope_at_another_resolution():
    low = build_from_spec(MODELS["tiny"].at(144, 4))
    with torch.no_grad():
        line = torch.linspace(-1, 1, 18)
        low.image_encoder.pos_embed.copy_(line[None, :, None, None].expand(1, 18, 18, 128))
    state = resize_state(low.state_dict(), MODELS["tiny"])
    build_sam("tiny").load_state_dict(state)
    column = state["image_encoder.pos_embed"][0, :, 3, 0]
    assert (column.diff() > 0).all()
    same = resize_state(state, MODELS["tiny"])
    assert all(torch.equal(same[k], state[k]) for k in state)


def run_cli(*args, **kw):
    command = [sys.executable, "-m", "edge_runtime.cli", "train", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **kw)


@pytest.mark.process
def test_the_command_can_be_interrupted_and_resumed(tmp_path):
    out = tmp_path / "run"
    options = ["--out", str(out), "--images", "1", "--clicks", "1", "--threads", "1"]
    options += ["--held-out", "1", "--save-every", "1000"]
    command = [sys.executable, "-m", "edge_runtime.cli", "train", *options, "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command continues" in errors
    reached = torch.load(out / "state.pt", weights_only=True)["step"]
    assert reached >= 2

    refused = run_cli(*options, "--seed", "5")
    assert refused.returncode == 1
    assert "--seed 1" in refused.stderr

    done = run_cli(*options, "--steps", str(reached + 1), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["weights"], told["steps"]) == (str(out / "tiny-stock.pt"), reached + 1)
    assert told["next"].startswith(f"edge-runtime adapt --checkpoint {out}/tiny-stock.pt")
    assert f"at step {reached} of {reached + 1}" in done.stderr
    sam = load_checkpoint(out / "tiny-stock.pt", "tiny")
    assert (sam.order, sam.adapted) == ("stock", False)
    assert sam.image_encoder.img_size == 192
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if "lr" in line]
    assert steps == list(range(1, reached + 2))


def test_the_learning_rate_warms_up_and_decays():
    trainer = Trainer(replace(MINUTE, steps=1000, warmup_steps=0, lr_warmup=10))
    rates = []
    for trainer.step in range(1000):
        rates.append(trainer.learning_rate())
    assert rates[0] < rates[5] < rates[9]
    assert int(np.argmax(rates)) < 20
    assert rates[-1] < 0.05 * max(rates)


def test_the_encoder_s_gradient_is_that_of_the_whole_loss(monkeypatch):
    """Two rounds, compared with one backward pass through everything."""
    config = replace(MINUTE, warmup_steps=0, low_size=0, rounds=2, amp=False, seed=4)
    trainer, plain = Trainer(config), Trainer(config)
    asked = []

    def recorded(*args):
        asked.append(args[2:])
        return decode_batch(*args)

    monkeypatch.setattr("exporters.training.decode_batch", recorded)
    trainer.train_step()
    batch = make_batch(config, plain.spec, plain.pool, 0)
    places = np.random.default_rng([config.seed, 0, 13]).permutation(plain.spec.grid**2)[:144]
    embeddings = plain.sam.train().image_encoder(batch.images)
    loss = 0.3 * affinity_loss(
        plain.head, embeddings, batch.tokens, torch.from_numpy(places.copy())
    )
    valid, agree = batch.valid.repeat_interleave(2, 0), torch.full((4,), plain.agreement())
    unsure = torch.where(batch.ambiguous, agree.clamp(max=0.3), agree)
    for share, weight, prompt in zip((0.4, 0.6), (unsure, agree), asked, strict=True):
        answer = decode_batch(plain.sam, embeddings, *prompt)
        loss = loss + share * joint_loss(*answer, batch.masks, valid, plain.balance(), weight)[0]
    loss.backward()
    nn.utils.clip_grad_norm_(plain._parameters(), 1.0)
    for (name, got), wanted in zip(
        trainer.sam.named_parameters(), plain.sam.parameters(), strict=True
    ):
        assert (got.grad is None) == (wanted.grad is None), name
        assert got.grad is None or torch.allclose(got.grad, wanted.grad, atol=1e-5), name
    assert trainer.sam.image_encoder.pos_embed.grad.abs().max() > 0
