"""Distillation: what the student learns, exact resume, folders of images, several processes, the
command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from edge_common.errors import CheckpointError, ConfigError, ImageError
from edge_runtime.cli import main
from exporters import adapt
from exporters.adapt import (
    Adaptation,
    AdaptConfig,
    Encoder,
    Folder,
    Scenes,
    prepare,
    relative_error,
)
from exporters.models import (
    MODELS,
    Checkpoint,
    build_sam,
    load_checkpoint,
    reorder,
    save_checkpoint,
)

CONFIG = AdaptConfig("tiny", steps=4, batch=2, lr_warmup=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stock():
    torch.manual_seed(0)
    sam = build_sam("tiny")
    with torch.no_grad():
        sam.image_encoder.pos_embed.normal_(std=0.2)
        for block in sam.image_encoder.blocks:
            block.attn.rel_pos_h.normal_(std=0.3)
            block.attn.rel_pos_w.normal_(std=0.3)
    return sam


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate([(40, 60), (64, 30), (50, 50)]):
        pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if i else ".") / f"{i}.png")
    return folder


@pytest.mark.slow
def test_it_learns_the_stock_embeddings_and_leaves_the_decoder_alone():
    run = Adaptation(stock(), AdaptConfig("tiny", steps=20, batch=2, lr_warmup=2), Scenes(1, 96))
    images = torch.stack(
        [
            prepare(Scenes(9, 96).image(i), MODELS["tiny"], np.random.default_rng(i))
            for i in range(3)
        ]
    )

    def error():
        with torch.no_grad():
            return float(relative_error(run.module(images), run.teacher(images)))

    before = error()
    for _ in range(20):
        run.train_step()
    assert error() < 0.85 * before
    result = run.result()
    assert (result.order, result.adapted) == ("reordered", True)
    old, new = stock().state_dict(), result.state_dict()
    for name in old:
        if not name.startswith("image_encoder"):
            assert torch.equal(old[name], new[name])
    run.close()


def test_two_and_two_steps_equal_four(tmp_path, photos):
    def begin():
        return Adaptation(stock(), CONFIG, Folder(photos, 1))

    whole, first, second = begin(), begin(), begin()
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "state")
    second.restore(tmp_path / "state")
    for _ in range(2):
        second.train_step()
    assert second.losses == whole.losses
    a, b = whole.result().state_dict(), second.result().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_of_other_weights_or_settings_is_refused(tmp_path, photos):
    run = Adaptation(stock(), CONFIG, Folder(photos, 1))
    run.save(tmp_path / "state")
    other = stock()
    with torch.no_grad():
        other.image_encoder.pos_embed += 1
    with pytest.raises(CheckpointError, match="other stock weights"):
        Adaptation(other, CONFIG, Folder(photos, 1)).restore(tmp_path / "state")
    other_batch = AdaptConfig("tiny", steps=4, batch=3, lr_warmup=1)
    with pytest.raises(ConfigError, match=r"batch 2 \(now 3\)"):
        Adaptation(stock(), other_batch, Folder(photos, 1)).restore(tmp_path / "state")


def test_reordered_weights_are_refused(photos):
    with pytest.raises(CheckpointError, match="reordered already"):
        Adaptation(reorder(stock()), CONFIG, Folder(photos, 1))


def test_recomputing_blocks_changes_nothing():
    encoder = stock().image_encoder
    image = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        a, b = Encoder(encoder, False)(image), Encoder(encoder, True)(image)
    assert torch.equal(a, b)


def test_relative_error_values():
    wanted = torch.randn(2, 8, 4, 4)
    mean = wanted.mean((2, 3), keepdim=True).expand_as(wanted)
    assert float(relative_error(wanted, wanted)) == 0
    assert float(relative_error(mean, wanted)) == pytest.approx(1)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (37, 90), (500, 200)])
def test_any_image_becomes_a_square_padded_with_zeros(size):
    image = np.full((*size, 3), 255, np.uint8)
    for seed in range(8):
        square = prepare(image, MODELS["tiny"], np.random.default_rng(seed))
        assert square.shape == (3, 192, 192)
        filled = (square.abs().sum(0) > 0).numpy()
        rows, columns = filled.any(1).sum(), filled.any(0).sum()
        assert max(rows, columns) == 192
        assert filled[:rows, :columns].all()


def test_each_epoch_shows_every_image_once_in_a_new_order(photos):
    folder = Folder(photos, 3)
    epochs = [[folder.image(e * 3 + i).shape[:2] for i in range(3)] for e in range(6)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1


def test_folders_without_readable_images_are_refused(tmp_path, photos):
    with pytest.raises(ImageError, match="not a directory"):
        Folder(tmp_path / "nowhere", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no images under"):
        Folder(tmp_path / "empty", 1)
    (tmp_path / "empty" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of the 1 images"):
        Folder(tmp_path / "empty", 1)


def test_damaged_images_are_skipped(photos):
    (photos / "bad.jpg").write_bytes(b"no image")
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    folder = Folder(photos, 1)
    assert [p.name for p in folder.unreadable] == ["bad.jpg"]
    assert len(folder) == 4  # the truncated file opens and fails only when decoded
    shapes = {folder.image(i).shape[:2] for i in range(4)}
    assert shapes == {(40, 60), (64, 30), (50, 50)}


def cli(*args):
    return [sys.executable, "-m", "edge_runtime.cli", "adapt", *map(str, args)]


def run_cli(*args):
    return subprocess.run(cli(*args), capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.process
def test_the_command_can_be_interrupted_and_resumed(tmp_path, photos):
    weights, out = tmp_path / "stock.pt", tmp_path / "adapted.pt"
    save_checkpoint(stock(), weights)
    options = ["--checkpoint", weights, "--images", photos, "--out", out, "--batch", 1]
    options += ["--threads", 1, "--save-every", 1, "--steps", 12]
    process = subprocess.Popen(cli(*options), stderr=subprocess.PIPE, text=True)
    state = tmp_path / "adapted.pt.state"
    deadline = time.monotonic() + 200
    while not state.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert not out.exists()
    done = run_cli(*options)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    assert not state.exists()
    sam = load_checkpoint(out, "tiny")
    assert (sam.order, sam.adapted) == ("reordered", True)
    assert len(sam.made["losses"]) == 12
    assert done.stdout == f"{out}\n"
    assert f"next: edge-runtime export --model tiny --checkpoint {out}" in done.stderr
    again = run_cli(*options)
    assert again.returncode == 1
    assert again.stderr.strip().startswith("error:")
    assert "--force" in again.stderr


@pytest.mark.process
def test_the_command_as_json(tmp_path, photos):
    weights, out = tmp_path / "stock.pt", tmp_path / "adapted.pt"
    save_checkpoint(stock(), weights)
    options = ["--checkpoint", weights, "--images", photos, "--out", out, "--batch", 1]
    done = run_cli(*options, "--threads", 1, "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["weights"], told["model"], told["steps"]) == (str(out), "tiny", 1)
    assert told["relative_error"] > 0
    assert told["next"].startswith("edge-runtime export ")


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": "nowhere/a.pt"}, "--out nowhere/a.pt does not exist"),
        ({"--checkpoint": "none.pt"}, "checkpoint none.pt does not exist"),
        ({"--images": "nowhere"}, "nowhere is not a directory"),
        ({"--images": "empty"}, "no images under empty"),
    ],
)
def test_paths_are_checked_before_pytorch_is_loaded(tmp_path, photos, changes, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.pt").write_text("x")
    options = {"--out": "a.pt", "--checkpoint": "some.pt", "--images": str(photos), **changes}
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
        "from edge_runtime.cli import main; sys.exit(main(sys.argv))"
    )
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-c", code, "adapt", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr


def test_reordered_weights_are_refused_before_anything_is_read(
    tmp_path, photos, monkeypatch, capsys
):
    """There may be thousands of images to read."""
    weights = tmp_path / "reordered.pt"
    save_checkpoint(reorder(stock()), weights)
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("the weights were read"))
    monkeypatch.setattr(adapt, "_opens", lambda _: pytest.fail("an image was opened"))
    options = ["--checkpoint", str(weights), "--images", str(photos), "--out", str(tmp_path / "a")]
    assert main(["adapt", *options]) == 1
    assert "reordered already" in capsys.readouterr().err


@pytest.mark.process
def test_two_processes_give_the_result_of_one(tmp_path, photos):
    """torchrun with gloo: half of the images each give the same weights up to rounding."""
    weights = tmp_path / "stock.pt"
    save_checkpoint(stock(), weights)
    common = ["--checkpoint", weights, "--images", photos, "--batch", 2, "--steps", 3]
    common += ["--threads", 1, "--no-amp"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    two = tmp_path / "two.pt"
    command = [*launch, *cli(*common, "--out", two)[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)
    assert ran.returncode == 0, ran.stderr
    one = tmp_path / "one.pt"
    assert run_cli(*common, "--device", "cpu", "--out", one).returncode == 0
    a, b = load_checkpoint(one).state_dict(), load_checkpoint(two).state_dict()
    start = reorder(stock()).state_dict()
    encoder = [k for k in a if k.startswith("image_encoder")]
    moved = sum(float((a[k] - start[k]).square().sum()) for k in encoder) ** 0.5
    apart = sum(float((a[k] - b[k]).square().sum()) for k in encoder) ** 0.5
    assert moved > 1e-3
    assert apart < 0.05 * moved
