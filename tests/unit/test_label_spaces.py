"""Label spaces against the counts that the data sets' papers and repositories state."""

import json
from pathlib import Path

import numpy as np
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import label_spaces
from clip_robustness.metrics.logits import restrict

MAPS = json.loads(label_spaces.MAPS.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "imagenet_1k.json"
    label_spaces.write_label_space("imagenet_1k", {"classes": "open_clip:imagenet"}, None, out)
    return out


def write(base: Path, tmp_path: Path, classes: object, **more: object) -> dict:
    entry = {"base": "imagenet_1k", "classes": classes, **more}
    label_spaces.write_label_space("x", entry, base, tmp_path / "x.json")
    return io.read_json(tmp_path / "x.json")


def members_of(space: dict, name: str) -> list[int]:
    return space["members"][space["classes"].index(name)]


def test_the_base_space_is_in_the_order_of_wordnet_ids(base: Path) -> None:
    space = io.read_json(base)
    assert (len(space["classes"]), space["members"]) == (1000, [[i] for i in range(1000)])
    assert space["wnids"] == sorted(space["wnids"]) and len(set(space["wnids"])) == 1000
    assert (space["wnids"][0], space["classes"][0], space["wnids"][999]) == ("n01440764", "tench", "n15075141")


def test_the_two_masks_have_200_classes_each_and_differ(base: Path, tmp_path: Path) -> None:
    adversarial, renditions = (write(base, tmp_path, f"timm:imagenet_{x}") for x in "ar")
    for space in (adversarial, renditions):
        assert len(space["classes"]) == len({m for (m,) in space["members"]}) == 200
        assert space["members"] == sorted(space["members"])
        wnids = io.read_json(base)["wnids"]
        assert space["wnids"] == [wnids[m] for (m,) in space["members"]]
    assert adversarial["members"] != renditions["members"]
    # Neither list holds the other: whoever takes one mask for both is wrong for some images.
    assert set(adversarial["wnids"]) - set(renditions["wnids"]) and set(renditions["wnids"]) - set(adversarial["wnids"])


@pytest.mark.parametrize(
    ("name", "classes", "indices"),
    [
        ("objectnet_113", 113, 125),
        ("vid_robust_30", 30, 288),
        ("ytbb_robust_19", 19, 231),
        ("imagenet_d_113", 113, 125),
    ],
)
def test_counts_of_the_maps(base: Path, tmp_path: Path, name: str, classes: int, indices: int) -> None:
    space = write(base, tmp_path, f"map:{name}")
    pooled = [i for member in space["members"] for i in member]
    assert (len(space["classes"]), len(pooled), len(set(pooled))) == (classes, indices, indices)
    assert space["pool"] == "max"
    wnids = io.read_json(base)["wnids"]
    assert space["wnids"] == [[wnids[i] for i in member] for member in space["members"]]
    source = MAPS[name]["source"]
    assert source["licence"] == "MIT" and len(source["commit"]) == 40 and source["repository"].count("/") == 1


def test_classes_of_the_maps_hold_the_imagenet_classes_of_that_meaning(base: Path, tmp_path: Path) -> None:
    names = io.read_json(base)["classes"]
    objects = write(base, tmp_path, "map:objectnet_113")
    assert [names[i] for i in members_of(objects, "Chair")] == ["barber chair", "folding chair", "rocking chair"]
    assert [names[i] for i in members_of(objects, "Weight (exercise)")] == ["dumbbell"]
    assert objects["folders"] == sorted(objects["folders"]) and len(set(objects["folders"])) == 113
    folder = dict(zip(objects["classes"], objects["folders"], strict=True))
    assert folder["Still Camera"] == "still_camera" and folder["Butcher's knife"] == "butchers_knife"
    videos = write(base, tmp_path, "map:vid_robust_30")
    assert videos["classes"] == sorted(videos["classes"])
    assert [names[i] for i in members_of(videos, "antelope")] == ["hartebeest", "impala (antelope)", "gazelle"]
    assert len(members_of(videos, "dog")) == 118 and len(members_of(videos, "bird")) == 59
    diffusion = write(base, tmp_path, "map:imagenet_d_113")
    assert [names[i] for i in members_of(diffusion, "skirt")] == ["hoop skirt", "miniskirt", "overskirt"]


def test_imagenet_d_pools_as_objectnet_does_but_for_names(base: Path, tmp_path: Path) -> None:
    """Its classes come from ObjectNet's, under names of its own."""
    spaces = [write(base, tmp_path, f"map:{name}") for name in ("objectnet_113", "imagenet_d_113")]
    assert sorted(spaces[0]["members"]) == sorted(sorted(m) for m in spaces[1]["members"])


def test_ytbb_has_five_columns_without_an_imagenet_class_and_two_fills(base: Path, tmp_path: Path) -> None:
    right = write(base, tmp_path, "map:ytbb_robust_19")
    released = write(base, tmp_path, "map:ytbb_robust_19", fill=0)
    assert right["unmapped"] == ["cow", "giraffe", "skateboard", "toilet", "none"]
    assert len(right["columns"]) == 24 and set(right["columns"]) == {*right["classes"], *right["unmapped"]}
    assert (right["fill"], released["fill"]) == (None, 0.0)
    assert right["classes"] == released["classes"] and right["members"] == released["members"]
    assert write(base, tmp_path, "map:ytbb_robust_19", fill="-inf")["fill"] is None


def test_pooled_logits_are_the_largest_of_the_members(base: Path, tmp_path: Path) -> None:
    space = write(base, tmp_path, "map:vid_robust_30")
    logits = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    pooled = restrict(logits, space["members"])
    assert pooled.shape == (3, 30)
    assert np.array_equal(pooled[:, space["classes"].index("bus")], logits[:, [654, 779, 874]].max(axis=1))


def test_the_16_categories_hold_207_classes_and_average_probabilities(base: Path, tmp_path: Path) -> None:
    import yaml

    entry = yaml.safe_load((label_spaces.MAPS.parent / "datasets.yaml").read_text())["label_spaces"]["cue_conflict"]
    space = write(base, tmp_path, entry["classes"])
    pooled = [i for member in space["members"] for i in member]
    assert (len(space["classes"]), len(pooled), len(set(pooled))) == (16, 207, 207)
    assert space["pool"] == "mean_probability" and "fill" not in space


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"classes": "map:objectnet_114"}, "no map 'objectnet_114' in .*label_maps.json; expected objectnet_113, "),
        ({"classes": "timm:imagenet_o"}, "no list 'timm:imagenet_o'"),
        ({"classes": ["tench", "no fish"]}, r"\['no fish'\] are no classes of 'imagenet_1k'"),
        ({"classes": {"a": "8, 998-1000"}}, r"class 'a': \[1000\] not in 0..999 of 'imagenet_1k'"),
        ({"classes": "map:ytbb_robust_19", "fill": 1}, "fill is 1, expected -inf or 0"),
        ({"classes": "map:vid_robust_30", "fill": 0}, "'fill' is for a map with unmapped classes"),
    ],
)
def test_what_is_no_label_space(base: Path, tmp_path: Path, entry: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(base, tmp_path, **entry)
    assert not (tmp_path / "x.json").exists()


def test_a_space_without_a_base_lists_its_own_classes(tmp_path: Path) -> None:
    label_spaces.write_label_space("cifar10", {"classes": ["airplane", "automobile"]}, None, tmp_path / "x.json")
    assert io.read_json(tmp_path / "x.json")["members"] == [[0], [1]]
    with pytest.raises(InputError, match="label space 'x': 'map:objectnet_113' needs a base space"):
        label_spaces.write_label_space("x", {"classes": "map:objectnet_113"}, None, tmp_path / "y.json")
