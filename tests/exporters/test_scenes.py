"""Procedural scenes: equal for equal seeds, with exact masks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from exporters.scenes import (
    HELD_OUT,
    KINDS,
    PHOTO_LIKE,
    click_of,
    depth_of,
    make_scene,
    objects_of,
)


@pytest.mark.parametrize("kind", [*KINDS, PHOTO_LIKE])
def test_a_scene_follows_from_its_seed(kind):
    a, b, c = make_scene(5, 96, kind), make_scene(5, 96, kind), make_scene(6, 96, kind)
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.labels, b.labels)
    assert not np.array_equal(a.image, c.image)
    assert a.image.shape == (96, 96, 3)
    assert a.image.dtype == a.labels.dtype == np.uint8


def test_kinds_are_drawn_in_about_their_shares():
    kinds = [make_scene(HELD_OUT + i, 48).kind for i in range(200)]
    counts = {k: kinds.count(k) for k in KINDS}
    assert set(counts) == set(KINDS)
    assert 40 <= counts["alike"] <= 100
    assert 30 <= counts["partition"] <= 85


def test_partitions_leave_no_common_background():
    sizes = [np.bincount(make_scene(i, 96, "partition").labels.ravel()) for i in range(20)]
    assert np.median([s.max() / s.sum() for s in sizes]) < 0.5


def test_alike_scenes_repeat_one_texture_that_differs_from_the_background():
    found = 0
    for seed in range(12):
        scene = make_scene(seed, 192, "alike")
        objects = [k for k in objects_of(scene.labels) if k]
        if len(objects) < 4:
            continue
        found += 1
        means = np.array([scene.image[scene.labels == k].mean(0) for k in objects])
        ground = scene.image[scene.labels == 0].mean(0)
        assert np.median(np.ptp(means, 0)) < 160
        assert np.abs(np.median(means, 0) - ground).max() > 5
    assert found >= 6


def test_masks_follow_the_picture_exactly():
    """The strongest edges of a plain scene are on the borders between labels."""
    scene = make_scene(3, 192, "partition")
    border = depth_of(scene.labels) <= 2
    image = scene.image.astype(float)
    step = np.abs(np.diff(image, axis=1)).max(2)[:, 5:-5]
    strong = step > np.quantile(step, 0.995)
    assert border[:, 5:-6][strong].mean() > 0.5


def test_click_is_the_point_farthest_from_the_border():
    mask = np.zeros((40, 60), bool)
    mask[10:21, 20:51] = True
    x, y = click_of(mask)
    assert y == 15
    assert 25 <= x <= 45
    assert click_of(np.ones((9, 9), bool)) == (4, 4)
    single = np.zeros((5, 5), bool)
    single[1, 3] = True
    assert click_of(single) == (3, 1)


def test_small_objects_are_left_out():
    labels = np.zeros((100, 100), np.uint8)
    labels[:2, :2] = 1
    labels[50:60, 50:60] = 2
    assert objects_of(labels, 0.005) == [0, 2]


def test_the_held_out_scenes_are_those_of_the_published_figures():
    """Figures of different versions can be compared only on the same pictures."""
    scenes = [make_scene(seed) for seed in range(HELD_OUT, HELD_OUT + 12)]
    digest = hashlib.sha256(b"".join(scene.labels.tobytes() for scene in scenes))
    assert digest.hexdigest() == (
        "ccce191fae94abee547f7c5b3be99d865688c16c0262d4d5c995abdff291959e"
    )
    brightness = [137.4, 102.7, 113.1, 104.1, 161.2, 114.7, 95.0, 39.0, 38.5, 64.9, 116.9, 147.7]
    assert np.allclose([scene.image.mean() for scene in scenes], brightness, atol=0.1)


def test_photo_like_scenes_have_large_objects_and_wholes_made_of_parts():
    scenes = [make_scene(seed, 96, PHOTO_LIKE) for seed in range(40)]
    largest = [
        np.bincount(s.labels[s.labels > 0]).max() / s.labels.size for s in scenes if s.labels.any()
    ]
    assert sum(share > 1 / 3 for share in largest) >= 10
    wholes = [(s, whole) for s in scenes for whole in s.wholes]
    assert len(wholes) >= 5
    for scene, whole in wholes:
        assert len(whole) > 1
        assert set(whole) <= set(range(1, 256))
        assert scene.image.shape == (96, 96, 3)
