"""The mini world's visual factors: what deviates from a training world, and by how much an image surprises."""

import numpy as np
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.metrics.factors import measure_factors
from clip_robustness.mini.factors import deviations, top_factors, write_mini_factors
from clip_robustness.mini.world import check_world, sample_scenes

TRAINED = {"name": "train", "images": 300, "seed": 1, "rho": 1.0, "colours": "warm", "style": "web"}


def flagged(**changes) -> set[str]:
    """Factors of one habitual photo after some of its columns were changed."""
    scenes = sample_scenes(TRAINED)
    photo = np.flatnonzero(scenes["style"] == "photo")[:1]
    image = {name: column[photo] for name, column in scenes.items()}
    image |= {name: np.array([value]) for name, value in changes.items()}
    return {factor for factor, values in deviations(image, check_world(TRAINED)).items() if values[0] > 0}


@pytest.mark.parametrize(
    ("factor", "changes"),
    [
        ("pose", {"yaw": 46.0}),
        ("pose", {"elevation": 19.0}),
        ("pose", {"roll": -6.0}),
        ("pose", {"x": 0.25}),
        ("background", {"background": "tiles"}),
        ("background", {"background_colour": "teal"}),
        ("color", {"colour": "teal"}),
        ("texture", {"texture": "dotted", "texture_class": -1}),
        ("shape", {"stretch": 1.2}),
        ("smaller", {"scale": 0.7}),
        ("larger", {"scale": 1.15}),
        ("darker", {"brightness": 0.6}),
        ("brighter", {"brightness": 1.3}),
        ("light", {"light_elevation": -10.0}),
        ("object_blocking", {"occlusion": 0.2}),
        ("multiple_objects", {"objects": 2}),
        ("style", {"style": "stylized"}),
    ],
)
def test_one_unusual_thing_is_one_factor(factor, changes):
    assert flagged(**changes) == {factor}


def test_what_is_habitual_is_no_factor():
    assert flagged() == set()
    assert flagged(roll=4.9, yaw=-45.0) == set()
    scenes, habits = sample_scenes(TRAINED), check_world(TRAINED)
    assert set(scenes["style"]) == {"photo", "sketch", "rendition"}
    assert not any(values.any() for values in deviations(scenes, habits).values())
    widest = {**TRAINED, "pose": "unusual", "light": "unusual"}
    assert not any(values.any() for values in deviations(sample_scenes(widest), check_world(widest)).values())


def test_where_texture_tells_nothing_no_texture_is_unusual():
    scenes = sample_scenes({**TRAINED, "rho": 0.0, "style": "photo"})
    assert deviations(scenes, check_world(TRAINED))["texture"].mean() == pytest.approx(11 / 12, abs=0.1)
    assert not deviations(scenes, check_world({**TRAINED, "rho": 0.0}))["texture"].any()


def test_the_top_factor_is_the_rarest_deviation():
    deviation = {
        "pose": np.array([0.9, 0.2, 0.3, 0.4, 0.0]),
        "texture": np.array([1.0, 1.0, 0.0, 0.0, 0.0]),
        "smaller": np.array([0.0, 0.0, 0.0, 0.1, 0.0]),
    }
    # Image 0: of five, one is turned as far and two have as rare a texture. Image 1: four are turned as far.
    assert top_factors(deviation).tolist() == ["pose", "texture", "pose", "smaller", ""]


@pytest.fixture
def annotated(tmp_path):
    """The factor table of 600 images that differ from the training world in many ways."""
    world = {"name": "varied", "images": 600, "seed": 2, "rho": 0.8, "pose": "slightly_wider", "clutter": "some"}
    scenes = sample_scenes({**world, "background": "outdoor", "colours": "all"})
    io.write_parquet(tmp_path / "index.parquet", scenes)
    assert write_mini_factors(tmp_path / "index.parquet", TRAINED, tmp_path / "factors.parquet") == 600
    return tmp_path, scenes, io.read_parquet(tmp_path / "factors.parquet")


def test_the_table_has_the_shape_of_imagenet_xs(annotated):
    _, scenes, table = annotated
    assert list(table)[:4] == ["image_id", "label", "top_factor", "prototype"]
    assert table["image_id"].tolist() == scenes["image_id"].tolist()
    factors = list(table)[4:]
    assert all(table[factor].dtype == bool for factor in factors)
    some = np.any([table[factor] for factor in factors], axis=0)
    np.testing.assert_array_equal(table["prototype"], ~some)
    for i, top in enumerate(table["top_factor"]):
        assert table[top][i] if some[i] else top == ""


def test_a_factor_that_hurts_by_construction_ranks_last(annotated):
    """A model that errs on 10 % of all images, and on 70 % of those with an unusual texture for their class."""
    folder, scenes, table = annotated
    chance = np.where(table["texture"], 0.7, 0.1)
    wrong = np.random.default_rng(0).random(600) < chance
    prediction = np.where(wrong, scenes["label"] + 1, scenes["label"]).astype(np.int32)
    ids = {"image_id": scenes["image_id"], "label": scenes["label"]}
    io.write_parquet(folder / "predictions.parquet", {**ids, "prediction": prediction})
    measure_factors(*(folder / name for name in ("predictions.parquet", "factors.parquet", "out.json")), fewest=20)
    rows = io.read_json(folder / "out.json")["rows"]
    for convention in ("top", "multi"):
        own = {r["slice"]: r for r in rows if r["convention"] == convention and r["slice"]}
        assert len(own) >= 6
        assert min(own, key=lambda factor: own[factor]["value"]) == "texture"
        assert own["texture"]["low"] < 0.3 < own["texture"]["high"] < own["pose"]["low"]


def test_only_a_rendered_set_has_known_factors(tmp_path):
    io.write_parquet(tmp_path / "index.parquet", {"image_id": ["a"], "label": [0]})
    with pytest.raises(InputError, match="no column 'shape'; factors are known for rendered data sets only"):
        write_mini_factors(tmp_path / "index.parquet", TRAINED, tmp_path / "out.parquet")
