"""The table of mask quality."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edge_runtime.cli import main
from exporters.coins import coins
from exporters.evaluate import Sample, blurred, evaluate, held_out_scenes, iou
from exporters.models import build_sam, reorder, save_checkpoint


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    sam = build_sam("tiny")
    save_checkpoint(sam, tmp_path / "stock.pt")
    reorder(sam)
    sam.adapted = True
    save_checkpoint(sam, tmp_path / "adapted.pt")
    return tmp_path


def test_iou():
    a = np.zeros((4, 4), bool)
    a[:2] = True
    assert iou(a, a) == 1
    assert iou(a, ~a) == 0
    assert iou(a, np.ones((4, 4), bool)) == 0.5
    assert iou(a & False, a & False) == 1


@pytest.mark.parametrize("honest", [True, False])
def test_the_mask_with_the_highest_predicted_iou_counts(monkeypatch, honest):
    truth = np.zeros((32, 32), bool)
    truth[4:20, 6:20] = True
    wrong = ~truth
    scores = np.array([0.1, 0.9, 0.2]) if honest else np.array([0.1, 0.2, 0.9])

    def answers(predictor, clicks, batch=32):
        for x, y in clicks:
            assert truth[y, x]
            yield np.stack([wrong, truth, wrong]), scores

    monkeypatch.setattr("exporters.evaluate.predict_clicks", answers)
    image = np.zeros((32, 32, 3), np.uint8)
    score = evaluate(build_sam("tiny"), [Sample(image, [truth], "one")])
    assert (score.miou, score.best_of_three) == ((1.0, 1.0) if honest else (0.0, 1.0))
    assert (score.objects, score.images, score.by_kind) == (1, 1, {"one": score.miou})


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


def test_the_coins_have_the_reference_of_scikit_images_recipe():
    photo, masks = coins()
    assert photo.shape == (303, 384, 3)
    assert len(masks) == 24
    assert not np.sum(masks, 0).max() > 1


def test_the_table(weights, capsys):
    files = ["--stock", str(weights / "stock.pt"), "--adapted", str(weights / "adapted.pt")]
    assert main(["evaluate", *files, "--scenes", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for row in ("stock order", "not adapted", "reordered, adapted", "sigma 4", "sigma 16"):
        assert row in out
    assert main(["evaluate", *files, "--scenes", "2", "--no-blur", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["made"]["command"] == (
        "edge-runtime evaluate --stock stock.pt --adapted adapted.pt --scenes 2 --no-blur"
    )
    assert [r["blur_sigma"] for r in report["rows"]] == [None] * 3
    stock, reordered, adapted = report["rows"]
    assert reordered["miou"] == adapted["miou"]  # the adapted file holds the same weights here
    assert stock["objects"] == adapted["objects"] > 3


def test_annotated_images(weights, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "a.png")
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "segmentation": square}],
    }
    (tmp_path / "ann.json").write_text(json.dumps(content))
    files = ["--adapted", str(weights / "adapted.pt"), "--json", "--no-blur"]
    data = ["--annotations", str(tmp_path / "ann.json"), "--images", str(tmp_path)]
    assert main(["evaluate", *files, *data]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["objects"], row["images"]) == (1, 1)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--annotations", "x.json"], "go together"),
        (["--stock", "none.pt"], "does not exist"),
    ],
)
def test_errors_are_one_line(args, said, capsys):
    assert main(["evaluate", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_weights_in_the_wrong_place(weights, capsys):
    assert main(["evaluate", "--stock", str(weights / "adapted.pt")]) == 1
    assert "give it as --adapted" in capsys.readouterr().err
    assert main(["evaluate", "--adapted", str(weights / "stock.pt")]) == 1
    assert "give it as --stock" in capsys.readouterr().err
