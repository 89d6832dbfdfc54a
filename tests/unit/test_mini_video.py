"""A moving camera: sets of frames that drift smoothly about their anchor."""

import numpy as np
import pytest
import torch

from clip_robustness.core.io import InputError, read_parquet
from clip_robustness.mini.dataset import read_images, render_dataset
from clip_robustness.mini.video import move_camera
from clip_robustness.mini.world import CLASSES, FACTORS, sample_scenes

torch.set_num_threads(1)
MOVING = {"yaw", "elevation", "scale", "x", "y"}


def _world(**changes):
    return {"name": "film", "images": 12 * 21, "seed": 5, "frames": 10, "pose": "slightly_wider", **changes}


def test_sets_have_an_anchor_in_their_middle():
    scenes = sample_scenes(_world())
    ids, anchor, distance = (scenes[name].reshape(12, 21) for name in ("image_id", "anchor", "distance"))
    assert len(set(scenes["image_id"])) == 252 and ids[3, 0] == "film/00003/000"
    assert (anchor == ids[:, [10]]).all()
    assert distance.dtype == np.int32 and (distance == np.arange(-10, 11)).all()
    assert (scenes["labels"] == np.array(CLASSES)[scenes["label"]]).all()
    assert sorted(scenes["label"].reshape(12, 21)[:, 0]) == list(range(12))


def test_the_camera_moves_smoothly_and_nothing_else_does():
    scenes = sample_scenes(_world(images=120 * 21))
    for name in FACTORS:
        values = scenes[name].reshape(120, 21)
        if name not in MOVING:
            assert (values == values[:, :1]).all(), name
            continue
        ends = np.abs(values[:, [0, 20]] - values[:, [10]])
        steps = np.abs(np.diff(values, axis=1))
        assert (ends.max(axis=1) > 0).all(), name
        assert np.median(ends) > 4 * np.median(steps), name
        assert np.abs(np.diff(values, 2, axis=1)).max() < 0.35 * steps.max(), name  # no jerk
    assert scenes["scale"].min() > 0.3


def test_the_anchor_stays_where_it_was():
    still = {"yaw": np.float32([3, -8]), "elevation": np.float32([20, 30]), "scale": np.float32([1, 1])}
    still |= {"x": np.float32([0, 0.1]), "y": np.float32([0, 0]), "label": np.int32([4, 5])}
    moved = move_camera(still, 3, np.random.default_rng(0))
    for name, values in still.items():
        np.testing.assert_array_equal(moved[name].reshape(2, 7)[:, 3], values)
    assert moved["yaw"].dtype == np.float32 and (moved["label"] == np.repeat([4, 5], 7)).all()


def test_captions_stay_true():
    scenes = sample_scenes(_world(images=100 * 21))
    from_above = np.array(["from above" in caption for caption in scenes["caption"]])
    assert from_above.any() and (scenes["elevation"][from_above] >= 35).all()


def test_a_still_world_is_as_before():
    still = sample_scenes(_world(frames=0, images=24))
    assert set(still) == {"image_id", "label", "caption", *FACTORS} and len(still["label"]) == 24


def test_a_shrunken_world_keeps_whole_sets():
    assert len(sample_scenes(_world(images=100))["label"]) == 4 * 21
    assert len(sample_scenes(_world(images=5))["label"]) == 21


def test_neighbours_look_alike(tmp_path):
    index = tmp_path / "film.parquet"
    render_dataset(_world(images=4 * 21), tmp_path / "film.tar", index)
    columns = read_parquet(index)
    assert {"image_id", "archive", "offset", "size", "label", "anchor", "distance", "labels"} < set(columns)
    frames = read_images(columns, index).reshape(4, 21, 48, 48, 3).astype(float)
    near = np.abs(np.diff(frames, axis=1)).mean(axis=(2, 3, 4))
    ends = np.abs(frames[:, [0, 20]] - frames[:, [10]]).mean(axis=(2, 3, 4))
    assert (near > 0).all() and (near.mean(axis=1) < 0.5 * ends.mean(axis=1)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": -1}, "frames is -1, expected a whole number"),
        ({"frames": 2.0}, r"frames is 2\.0, expected a whole number"),
        ({"clutter": "some"}, "a twin in the clutter would change sides"),
        ({"unseen": "solids"}, "unseen solids have no label"),
    ],
)
def test_worlds_that_cannot_be_filmed(changes, message):
    with pytest.raises(InputError, match=f"world of film: .*{message}"):
        sample_scenes(_world(**changes))
