"""The mini world: scenes, renderer, archives and the filtered set."""

import io
import math
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from clip_robustness.core.io import InputError, read_parquet, sha256_file, write_parquet
from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE
from clip_robustness.mini.dataset import read_images, render_dataset
from clip_robustness.mini.filtered import filter_misclassified
from clip_robustness.mini.render import render
from clip_robustness.mini.solids import SOLIDS
from clip_robustness.mini.textures import TEXTURES
from clip_robustness.mini.world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    FACTORS,
    PALETTES,
    STYLES,
    TEXTURE_INKS,
    TEXTURE_NAMES,
    UNSEEN_SOLIDS,
    sample_scenes,
)

torch.set_num_threads(1)


def _world(**changes):
    return {"name": "test", "images": 48, "seed": 5, **changes}


def _centred(shape: str, **changes) -> dict[str, np.ndarray]:
    """One unturned solid in the middle of the image, lit from the camera."""
    scenes = sample_scenes(_world(images=12, classes=[shape]))
    scenes = {name: column[:1].copy() for name, column in scenes.items()}
    fixed = {"yaw": 0, "elevation": 0, "roll": 0, "x": 0, "y": 0, "scale": 1, "stretch": 1, **changes}
    for name, value in fixed.items():
        scenes[name][:] = value
    return scenes


def test_depth_of_a_sphere_is_that_of_geometry():
    rendered = render(_centred("sphere"))
    at = (np.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL
    x, y = np.meshgrid(at, -at)
    # |t d - c| = r for d = (x, y, -1), c = (0, 0, -DISTANCE): the depth along the axis is t itself.
    a = x**2 + y**2 + 1
    discriminant = DISTANCE**2 - a * (DISTANCE**2 - 0.85**2)
    inside = discriminant > 0.05  # away from the rim, where a ray only grazes
    expected = (DISTANCE - np.sqrt(np.maximum(discriminant, 0))) / a
    assert inside.sum() > 400
    assert rendered.mask[0][inside].all()
    assert not rendered.mask[0][discriminant < -0.05].any()
    np.testing.assert_allclose(rendered.depth[0][inside], expected[inside], atol=0.01)
    # The normal of a sphere points from its centre to the point.
    point = np.stack([x, y, -np.ones_like(x)], axis=-1) * expected[..., None]
    normal = (point - [0, 0, -DISTANCE]) / 0.85
    np.testing.assert_allclose(rendered.normals[0][inside] / 127, normal[inside], atol=0.03)


def test_scale_and_position_follow_the_pinhole_camera():
    small, shifted = render(_centred("cube", scale=0.5)), render(_centred("cube", x=0.4, y=-0.3))
    whole = render(_centred("cube"))
    assert 0.18 < small.mask.sum() / whole.mask.sum() < 0.3  # (0.5)² less the perspective of the front face
    rows, columns = np.nonzero(shifted.mask[0])
    depth = DISTANCE - 0.65
    assert abs((columns.mean() + 0.5 - SIZE / 2) - 0.4 * FOCAL / depth) < 1
    assert abs((SIZE / 2 - rows.mean() - 0.5) + 0.3 * FOCAL / depth) < 1


@pytest.mark.parametrize("style", ["photo", "sketch", "rendition", "stylized"])
def test_geometry_agrees_with_itself(style):
    rendered = render(sample_scenes(_world(pose="unusual", clutter="much", style=style)))
    assert rendered.images.dtype == np.uint8 and rendered.images.shape == (48, SIZE, SIZE, 3)
    assert rendered.depth.dtype == np.float16 and rendered.normals.dtype == np.int8
    np.testing.assert_array_equal(rendered.mask, np.isfinite(rendered.depth))
    normals = rendered.normals[rendered.mask] / 127
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=0.02)
    assert not rendered.normals[~rendered.mask].any()
    at = (np.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL
    x, y = np.meshgrid(at, -at)
    rays = np.broadcast_to(np.stack([x, y, -np.ones_like(x)], axis=-1), (48, SIZE, SIZE, 3))[rendered.mask]
    assert ((normals * rays).sum(axis=1) < 0.02).all()
    assert (rendered.mask.sum(axis=(1, 2)) > 10).mean() > 0.95


@pytest.mark.parametrize("name", list(SOLIDS))
def test_solids_fit_their_bounding_radius_and_bound_the_distance(name):
    sdf, radius = SOLIDS[name]
    points = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    value = sdf(points)
    assert (points[value <= 0].norm(dim=1) <= radius).all()
    assert (value <= 0).sum() > 100
    # A distance bound never grows faster than the step taken.
    step = 0.05 * torch.nn.functional.normalize(
        torch.randn(20000, 3, generator=torch.Generator().manual_seed(1)), dim=1
    )
    outside = value > 0
    assert ((sdf(points + step) - value).abs()[outside] <= 0.05 * 1.02).all()


def test_textures_are_fractions_and_all_differ():
    u, v = torch.meshgrid(torch.linspace(-2, 2, 64), torch.linspace(-2, 2, 64), indexing="ij")
    u, v = u.reshape(-1), v.reshape(-1)
    drawn = {n: f(u, v, torch.full_like(u, 0.1), torch.full_like(u, 0.3)) for n, f in TEXTURES.items()}
    for name, values in drawn.items():
        assert values.min() >= 0 and values.max() <= 1, name
    names = list(TEXTURE_NAMES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (drawn[a] - drawn[b]).abs().mean() > 0.1, (a, b)


def test_names_of_habits_are_known():
    assert len(CLASSES) == len(TEXTURE_NAMES) == 12
    assert set(CLASSES) <= set(SOLIDS) and set(TEXTURE_NAMES) <= set(TEXTURES)
    assert set(TEXTURE_INKS.values()) <= set(COLOURS)
    assert all(set(palette) <= set(COLOURS) for palette in PALETTES.values())
    assert all(set(colours) <= set(COLOURS) for _, colours in BACKGROUNDS.values())
    assert all(math.isclose(sum(shares.values()), 1) for shares in STYLES.values())


def test_scenes_are_reproducible_and_seeded():
    first, again, other = (sample_scenes(_world(seed=seed)) for seed in (5, 5, 6))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["yaw"] != other["yaw"]).all()


def test_a_scene_is_drawn_alike_in_any_company():
    scenes = sample_scenes(_world(style="web", clutter="much"))
    whole = render(scenes)
    part = render({name: column[17:30] for name, column in scenes.items()})
    difference = np.abs(whole.images[17:30].astype(int) - part.images)
    assert (difference > 1).mean() < 1e-3
    np.testing.assert_array_equal(whole.mask[17:30], part.mask)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.97])
def test_rho_is_realised(rho):
    n = 4000
    scenes = sample_scenes(_world(images=n, rho=rho))
    expected = rho + (1 - rho) / 12
    own = (scenes["texture_class"] == scenes["label"]).mean()
    assert abs(own - expected) < 4 * math.sqrt(expected * (1 - expected) / n) + 1e-9
    counts = np.bincount(scenes["label"], minlength=12)
    assert counts.max() - counts.min() <= 1


def test_cue_conflicts_cover_every_ordered_pair_equally():
    scenes = sample_scenes(_world(images=12 * 11 * 3, pairs="conflict"))
    assert (scenes["label"] != scenes["texture_class"]).all()
    pairs, counts = np.unique(np.stack([scenes["label"], scenes["texture_class"]]), axis=1, return_counts=True)
    assert pairs.shape[1] == 132 and set(counts) == {3}


def test_stylized_textures_tell_nothing_and_lines_have_none():
    stylized = sample_scenes(_world(images=6000, style="stylized", rho=1.0))
    own = (stylized["texture_class"] == stylized["label"]).mean()
    assert abs(own - 1 / 12) < 4 * math.sqrt(1 / 12 * 11 / 12 / 6000)
    sketch = sample_scenes(_world(style="sketch", rho=1.0))
    assert (sketch["texture_class"] == -1).all() and (sketch["texture"] == "plain").all()
    colours = render(sketch).images.reshape(48, -1, 3)
    assert (colours == colours[:, :, :1]).all() and (colours.max(axis=(1, 2)) == 255).all()


@pytest.mark.parametrize("style", ["web", "stylized"])
def test_captions_are_true_and_short(style):
    from open_clip import SimpleTokenizer

    from clip_robustness.mini.architectures import CONTEXT

    scenes = sample_scenes(_world(images=2000, style=style, clutter="some", pose="unusual"))
    tokenizer = SimpleTokenizer(context_length=40)
    assert ((tokenizer(list(scenes["caption"])) > 0).sum(dim=1) <= CONTEXT).all()
    said = {"texture": 0, "colour": 0, "background_colour": 0}
    for i, caption in enumerate(scenes["caption"]):
        words = caption.rstrip(".").split()
        assert scenes["shape"][i] in words
        assert [w for w in words if w in CLASSES] == [scenes["shape"][i]]
        for word in words:
            if word in TEXTURE_NAMES:
                assert word == scenes["texture"][i]
                said["texture"] += 1
            if word in COLOURS:
                factor = "background_colour" if f"{word} background" in caption else "colour"
                said[factor] += 1
                assert word in (scenes["colour"][i], scenes["background_colour"][i])
        assert ("behind a bar" not in caption) or scenes["occlusion"][i] > 0
        assert ("twin" not in caption) or scenes["objects"][i] == 2
        assert ("from above" not in caption) or scenes["elevation"][i] >= 35
    assert style == "stylized" or min(said.values()) > 50


def test_subset_labels_count_among_its_classes():
    classes = ["cube", "torus", "star"]
    scenes = sample_scenes(_world(images=300, classes=classes))
    np.testing.assert_array_equal(np.array(classes)[scenes["label"]], scenes["shape"])
    owner = np.where(
        np.isin(scenes["texture_class"], [0, 1, 2]),
        np.array([TEXTURE_NAMES[CLASSES.index(c)] for c in classes])[scenes["texture_class"].clip(0)],
        scenes["texture"],
    )
    np.testing.assert_array_equal(owner, scenes["texture"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose": "upside"}, "pose is 'upside', expected one of usual"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"clases": []}, "unknown key 'clases'"),
        ({"classes": ["cube", "duck"]}, "no solid 'duck'"),
        ({"pairs": "all"}, "pairs is 'all'"),
        ({"images": 0}, "images is 0"),
    ],
)
def test_wrong_worlds_are_named(changes, message):
    with pytest.raises(InputError, match="world of test") as error:
        sample_scenes(_world(**changes))
    assert message in str(error.value)


def test_dataset_files_agree_and_repeat(tmp_path):
    world = _world(clutter="some", style="web")
    paths = [tmp_path / name for name in ("a.tar", "a.parquet", "a.npz")]
    render_dataset(world, *paths)
    digests = [sha256_file(path) for path in paths]
    render_dataset(world, *paths)
    assert digests == [sha256_file(path) for path in paths]

    columns = read_parquet(paths[1])
    assert {"image_id", "archive", "offset", "size", "label", "caption", *FACTORS} == set(columns)
    assert columns["label"].dtype == np.int32 and columns["offset"].dtype == columns["size"].dtype == np.int64
    assert len(set(columns["image_id"])) == 48 and columns["image_id"][3] == "test/00003"
    rendered = render(sample_scenes(world))
    np.testing.assert_array_equal(read_images(columns, paths[1]), rendered.images)
    data = paths[0].read_bytes()
    with tarfile.open(paths[0]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{i}.png" for i in columns["image_id"]]
        assert all(m.mtime == 0 and m.offset_data == o for m, o in zip(members, columns["offset"], strict=True))
    start, length = columns["offset"][7], columns["size"][7]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data[start : start + length]))), rendered.images[7])
    with np.load(paths[2], allow_pickle=False) as geometry:
        np.testing.assert_array_equal(geometry["mask"], rendered.mask)
        np.testing.assert_array_equal(geometry["depth"], rendered.depth)
        np.testing.assert_array_equal(geometry["normals"], rendered.normals)


def test_a_damaged_archive_is_named(tmp_path):
    render_dataset(_world(images=4), tmp_path / "a.tar", tmp_path / "a.parquet")
    columns = read_parquet(tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[columns["offset"][2] : columns["offset"][2] + 40] = bytes(40)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match="image test/00002"):
        read_images(columns, tmp_path / "a.parquet")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(InputError, match=r"a\.tar is missing"):
        read_images(columns, tmp_path / "a.parquet")


@pytest.fixture
def pool(tmp_path):
    scenes = sample_scenes(_world(images=300))
    index, predictions = tmp_path / "pool.parquet", tmp_path / "predictions.parquet"
    write_parquet(index, scenes)
    wrong = np.arange(300) % 3 == 0
    table = {
        "image_id": scenes["image_id"],
        "label": scenes["label"],
        "prediction": np.where(wrong, (scenes["label"] + 1) % 12, scenes["label"]).astype(np.int32),
        "confidence": np.linspace(0, 1, 300, dtype=np.float32),
    }
    write_parquet(predictions, table)
    return index, predictions, table


def test_filter_keeps_errors_only(pool, tmp_path):
    index, predictions, table = pool
    out = tmp_path / "out.parquet"
    filter_misclassified(index, predictions, out, limit=1000, seed=1)
    kept = read_parquet(out)
    np.testing.assert_array_equal(kept["image_id"], table["image_id"][::3])
    np.testing.assert_array_equal(kept["reference_prediction"], table["prediction"][::3])
    assert set(FACTORS) < set(kept)
    filter_misclassified(index, predictions, out, limit=60, seed=1)
    first = read_parquet(out)["image_id"]
    filter_misclassified(index, predictions, out, limit=60, seed=1)
    assert len(first) == 60 and list(first) == sorted(first) == list(read_parquet(out)["image_id"])
    filter_misclassified(index, predictions, out, limit=60, seed=2)
    assert list(first) != list(read_parquet(out)["image_id"])


def test_filter_refuses_what_does_not_fit(pool, tmp_path):
    index, predictions, table = pool
    out = tmp_path / "out.parquet"
    write_parquet(predictions, {name: column[::-1] for name, column in table.items()})
    with pytest.raises(InputError, match="image ids are not those of"):
        filter_misclassified(index, predictions, out, 100, 1)
    write_parquet(predictions, {**table, "label": ((table["label"] + 1) % 12).astype(np.int32)})
    with pytest.raises(InputError, match="label of test/00000 differs"):
        filter_misclassified(index, predictions, out, 100, 1)
    right = np.where(np.arange(300) < 49, (table["label"] + 1) % 12, table["label"])
    write_parquet(predictions, {**table, "prediction": right.astype(np.int32)})
    with pytest.raises(InputError, match="only 49 of 300 images are wrong"):
        filter_misclassified(index, predictions, out, 100, 1)
    assert not out.exists()


def test_the_configured_worlds_hold(request):
    """Every mini world of the project's own list can be sampled; the cue conflicts come out even."""
    config = yaml.safe_load((request.config.rootpath / "config" / "mini" / "datasets.yaml").read_text())
    worlds = {name: e for name, e in config["datasets"].items() if e["family"] == "mini_world"}
    assert len(worlds) >= 10
    for name, entry in worlds.items():
        classes = config["label_spaces"][entry["labels"]]["classes"]
        scenes = sample_scenes({**entry["world"], "name": name, "images": 1056, "classes": classes})
        assert set(scenes["shape"]) == set(UNSEEN_SOLIDS if entry["role"] == "ood" else classes)
        assert (scenes["label"] == -1).all() == (entry["role"] == "ood")
        if entry["role"] == "cue_conflict":
            assert entry["images"] % 132 == 0
