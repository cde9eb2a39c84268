"""The table of mask quality."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edge_runtime.cli import main
from exporters.coins import coins
from exporters.demo_photo import demo_photo
from exporters.evaluate import Sample, blurred, box_of, evaluate, held_out_scenes, iou, predict
from exporters.models import Checkpoint, build_sam, reorder, save_checkpoint
from exporters.scenes import HELD_OUT, PHOTO_LIKE, make_scene


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    sam = build_sam("tiny")
    save_checkpoint(sam, tmp_path / "stock.pt")
    reorder(sam)
    sam.adapted = True
    save_checkpoint(sam, tmp_path / "adapted.pt")
    return tmp_path


def test_iou_values():
    a = np.zeros((4, 4), bool)
    a[:2] = True
    assert iou(a, a) == 1
    assert iou(a, ~a) == 0
    assert iou(a, np.ones((4, 4), bool)) == 0.5
    assert iou(a & False, a & False) == 1


@pytest.mark.parametrize("honest", [True, False])
def test_the_mask_with_the_highest_predicted_iou_is_scored(monkeypatch, honest):
    truth = np.zeros((32, 32), bool)
    truth[4:20, 6:20] = True
    wrong = ~truth
    scores = np.array([0.1, 0.9, 0.2]) if honest else np.array([0.1, 0.2, 0.9])

    def answers(predictor, points=None, labels=None, boxes=None, logits=None):
        for _ in points if boxes is None else boxes:
            yield np.stack([wrong, truth, wrong]), scores, torch.zeros(3, 8, 8)

    monkeypatch.setattr("exporters.evaluate.predict", answers)
    image = np.zeros((32, 32, 3), np.uint8)
    score = evaluate(build_sam("tiny"), [Sample(image, [truth], "one")])
    right = 1.0 if honest else 0.0
    assert (score.miou, score.best_of_three, score.box) == (right, 1.0, right)
    assert score.corrected == {1: right, 2: right, 3: right}
    assert (score.objects, score.images, score.by_kind) == (1, 1, {"one": right})
    assert score.iou_error == pytest.approx(0.1 if honest else 0.9)
    assert (score.large, score.large_objects) == (None, 0)
    one_click = evaluate(build_sam("tiny"), [Sample(image, [wrong])], all_prompts=False)
    assert (one_click.box, one_click.corrected, one_click.large_objects) == (None, {}, 1)
    assert one_click.large == 1.0 - right


def test_a_correction_clicks_the_largest_error_and_feeds_back_the_chosen_logits(monkeypatch):
    """Three answers: half of the object, then with some background, then complete."""
    truth = np.zeros((32, 32), bool)
    truth[8:24, 4:28] = True
    half = truth & (np.arange(32) < 16)
    spilt = truth.copy()
    spilt[0:8, 20:30] = True
    found = {1: half, 2: spilt, 3: truth, 4: truth}
    asked = {}

    def answers(predictor, points=None, labels=None, boxes=None, logits=None):
        if boxes is not None:
            assert boxes.tolist() == [[4, 8, 28, 24]]
            points = np.zeros((1, 4, 2))
        else:
            asked[points.shape[1]] = (points[0], labels[0].tolist(), logits)
        count = points.shape[1]
        low = torch.stack([torch.full((8, 8), float(10 * count + k)) for k in range(3)])
        yield np.stack([~truth, ~truth, found[count]]), np.array([0.1, 0.2, 0.8]), low

    monkeypatch.setattr("exporters.evaluate.predict", answers)
    score = evaluate(build_sam("tiny"), [Sample(np.zeros((32, 32, 3), np.uint8), [truth])])
    assert score.miou == iou(half, truth)
    assert score.corrected == {1: iou(spilt, truth), 2: 1.0, 3: 1.0}
    assert [asked[n][1] for n in (1, 2, 3, 4)] == [[1], [1, 1], [1, 1, 0], [1, 1, 0, 1]]
    for count, region in ((2, truth & ~half), (3, spilt & ~truth), (4, truth)):
        x, y = asked[count][0][-1]
        assert region[y, x]
        assert asked[count][2].unique().tolist() == [10 * (count - 1) + 2]
    assert asked[4][0][-1].tolist() == asked[1][0][0].tolist()


def test_batched_prompts_equal_the_predictor_one_by_one():
    from segment_anything import SamPredictor

    torch.manual_seed(0)
    predictor = SamPredictor(build_sam("tiny"))
    rng = np.random.default_rng(3)
    predictor.set_image(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    points, labels = rng.uniform(5, 55, (3, 2, 2)), np.array([[1, 0], [1, 1], [1, 0]])
    boxes, logits = (
        np.array([[5, 6, 40, 50]] * 3) + rng.integers(0, 9, (3, 4)),
        torch.randn(3, 1, 96, 96),
    )
    for given in ({"points": points, "labels": labels, "logits": logits}, {"boxes": boxes}):
        for k, (masks, scores, low) in enumerate(predict(predictor, **given, batch=2)):
            wanted = predictor.predict(
                points[k] if "points" in given else None,
                labels[k] if "points" in given else None,
                None if "points" in given else boxes[k],
                logits[k].numpy() if "points" in given else None,
            )
            assert np.array_equal(masks, wanted[0])
            assert np.allclose(scores, wanted[1], atol=1e-5)
            assert np.allclose(low.numpy(), wanted[2], atol=1e-4)


def test_a_box_ends_one_pixel_after_the_mask_as_in_coco():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 7:21] = True
    assert box_of(mask) == (7, 4, 21, 9)


def test_blur_scales_with_the_image():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 64:] = 255
    small = blurred(16)(image)  # two pixels at this size
    assert small[0, 60, 0] < 20
    assert 100 < small[0, 63, 0] < 156
    assert np.array_equal(blurred(0)(image), image)


def test_held_out_scenes_are_fixed():
    first, again = list(held_out_scenes(2)), list(held_out_scenes(2))
    assert np.array_equal(first[1].image, again[1].image)
    assert all(m.sum() >= 0.0035 * 192 * 192 for m in first[0].masks)
    (photo,) = held_out_scenes(1, kind=PHOTO_LIKE)
    assert photo.kind == PHOTO_LIKE
    assert np.array_equal(photo.image, make_scene(HELD_OUT, 192, PHOTO_LIKE).image)


def test_the_coins_have_the_reference_of_scikit_images_recipe():
    photo, masks = coins()
    assert photo.shape == (303, 384, 3)
    assert len(masks) == 24
    assert not np.sum(masks, 0).max() > 1
    committed, same = demo_photo()
    assert np.array_equal(committed, photo)
    assert np.array_equal(same, masks)


@pytest.mark.slow
def test_the_table_is_complete(weights, capsys):
    files = ["--stock", str(weights / "stock.pt"), "--adapted", str(weights / "adapted.pt")]
    assert main(["evaluate", *files, "--scenes", "1", "--only", "scenes", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for row in ("stock order", "not adapted", "reordered, adapted", "sigma 4", "sigma 16", "+3"):
        assert row in out
    assert main(["evaluate", *files[2:], "--scenes", "1", "--no-blur", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for data in ("1 held-out procedural", "1 held-out photo-like", "scikit-image's coins"):
        assert data in out
    options = ["--scenes", "2", "--only", "scenes", "--no-blur", "--json", "--threads", "1"]
    assert main(["evaluate", *files, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["made"]["command"] == (
        "edge-runtime evaluate --stock stock.pt --adapted adapted.pt --scenes 2 --only scenes "
        "--no-blur"
    )
    (scenes,) = report["sets"]
    assert [r["blur_sigma"] for r in scenes["rows"]] == [None] * 3
    stock, reordered, adapted = scenes["rows"]
    for figure in ("miou", "box", "corrected", "iou_error"):
        # the adapted file holds the same weights here
        assert reordered[figure] == adapted[figure]
    assert stock["objects"] == adapted["objects"] > 3
    assert set(stock["corrected"]) == {"1", "2", "3"}


def test_annotated_images_are_evaluated(weights, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "a.png")
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "segmentation": square}],
    }
    (tmp_path / "ann.json").write_text(json.dumps(content))
    files = ["--adapted", str(weights / "adapted.pt"), "--json", "--no-blur", "--threads", "1"]
    data = ["--annotations", str(tmp_path / "ann.json"), "--images", str(tmp_path)]
    assert main(["evaluate", *files, *data]) == 0
    ((row,),) = (s["rows"] for s in json.loads(capsys.readouterr().out)["sets"])
    assert (row["objects"], row["images"]) == (1, 1)
    assert 0 <= row["box"] <= 1
    assert set(row["corrected"]) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--annotations", "x.json"], "go together"),
        (["--annotations", "x.json", "--images", ".", "--only", "coins"], "exclude each other"),
        (["--stock", "none.pt"], "does not exist"),
    ],
)
def test_errors_are_one_line(args, said, capsys):
    assert main(["evaluate", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1 + err.count("\n  -> ")


def test_weights_in_the_wrong_option_are_refused_unread(weights, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("the weights were read"))
    assert main(["evaluate", "--stock", str(weights / "adapted.pt")]) == 1
    assert "give it as --adapted" in capsys.readouterr().err
    assert main(["evaluate", "--adapted", str(weights / "stock.pt")]) == 1
    assert "give it as --stock" in capsys.readouterr().err
