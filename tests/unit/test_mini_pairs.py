"""Mini pairs: poses and depths of the index against the renderer's own camera, matches against brute force."""

import dataclasses
import functools
import io as bytes_io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.inference import views
from clip_robustness.inference.correspondence import PROTOCOLS, Matcher, match_pairs, point_errors
from clip_robustness.inference.dense import Dense, dense_features
from clip_robustness.inference.load import ImageModel
from clip_robustness.inference.pairs import pairs_of
from clip_robustness.metrics.correspondence import measure_correspondence
from clip_robustness.mini import architectures
from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE, rotation
from clip_robustness.mini.pairs import TURNS, _turned, render_pairs, thousandths
from clip_robustness.mini.world import sample_scenes
from tests.unit.adapter_samples import build
from tests.unit.samples import make_folder
from tests.unit.test_adapters_correspondence import scannet

WORLD = {"name": "pairs", "images": 12, "seed": 5, "background": "outdoor", "colours": "all", "style": "photo"}
PREPROCESS = "resize(48,bicubic)|center_crop(48)|normalize(0.5,0.5,0.5;0.5,0.5,0.5)"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    render_pairs(WORLD, folder / "pairs.tar", folder / "pairs.parquet")
    return folder / "pairs.parquet"


def scenes_of_both_views() -> list[dict[str, np.ndarray]]:
    first = sample_scenes(WORLD)
    return [first, _turned(first, np.random.default_rng([WORLD["seed"], 71]))]


def on_the_solid(scene: dict[str, np.ndarray], i: int, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Points of the image as points of the solid, by the renderer's conventions: y up, looking along -z."""
    x, y = (points[:, 0] - SIZE / 2) / FOCAL * depth, (SIZE / 2 - points[:, 1]) / FOCAL * depth
    seen = np.stack([x, y, -depth], axis=1) - [scene["x"][i], scene["y"][i], -DISTANCE]
    return seen @ turn_of(scene, i)


def turn_of(scene: dict[str, np.ndarray], i: int) -> np.ndarray:
    angles = (torch.tensor([float(scene[name][i])], dtype=torch.float64) for name in ("yaw", "elevation", "roll"))
    return rotation(*angles)[0].numpy()


def seen_at(scene: dict[str, np.ndarray], i: int, solid: np.ndarray) -> np.ndarray:
    """Points of the solid as points of the image."""
    camera = solid @ turn_of(scene, i).T + [scene["x"][i], scene["y"][i], -DISTANCE]
    depth = -camera[:, 2]
    return np.stack([SIZE / 2 + FOCAL * camera[:, 0] / depth, SIZE / 2 - FOCAL * camera[:, 1] / depth], axis=1)


def test_the_schema_is_that_of_scannets_adapter(index: Path, tmp_path: Path) -> None:
    files, lists = scannet(tmp_path)
    theirs = build(tmp_path, [make_folder(tmp_path / "f", files), *lists], "scannet_pairs")
    ours = archive.load_index(index)
    assert set(ours) == set(theirs)
    assert {name: column.dtype.kind for name, column in ours.items()} == {n: c.dtype.kind for n, c in theirs.items()}
    assert set(ours["label"]) == {-1} and len(ours["label"]) == 24
    assert ours["image_id"][:3].tolist() == ["pairs/00000/0.png", "pairs/00000/1.png", "pairs/00001/0.png"]
    assert json.loads(ours["pairs"][2]) == [[1, "pairs/00001/1.png"]] and ours["pairs"][3] == "[]"


def test_the_same_world_gives_the_same_bytes(index: Path, tmp_path: Path) -> None:
    render_pairs(WORLD, tmp_path / "pairs.tar", tmp_path / "pairs.parquet")
    assert (tmp_path / "pairs.tar").read_bytes() == (index.parent / "pairs.tar").read_bytes()
    one, two = (io.read_parquet(path) for path in (index, tmp_path / "pairs.parquet"))
    assert all(one[name].tolist() == two[name].tolist() for name in one if "archive" not in name)


def test_turns_fill_every_bin(index: Path) -> None:
    pairs = pairs_of("scenes", archive.load_index(index), 0, "")
    counts, _ = np.histogram([pair.viewpoint for pair in pairs], PROTOCOLS["mini_pairs"].bins)
    assert counts.sum() == WORLD["images"] and counts.min() >= 1
    first, second = scenes_of_both_views()
    yaw = np.abs(second["yaw"] - first["yaw"])
    assert all(((yaw >= low) & (yaw < high)).sum() == 3 for low, high in TURNS)


def test_poses_and_depths_are_the_renderers(index: Path) -> None:
    columns, scenes = archive.load_index(index), scenes_of_both_views()
    members = views.Members(columns, "")
    for row in range(len(columns["label"])):
        view = views.scene_view(members, row, (192, 192), 1)
        solid = on_the_solid(scenes[row % 2], row // 2, view.points / 4, view.xyz[:, 2])
        np.testing.assert_allclose(view.xyz @ view.pose[:3, :3].T + view.pose[:3, 3], solid, atol=1e-5)


def test_what_both_views_see_is_at_one_place(index: Path) -> None:
    """A point of the first view lies, in the second, on the surface that is rendered there, or is hidden by it."""
    columns = archive.load_index(index)
    members = views.Members(columns, "")
    pixel = DISTANCE / FOCAL
    for pair in pairs_of("scenes", columns, 0, ""):
        first, second = (views.scene_view(members, row, (48, 48), 1) for row in pair.rows)
        move = np.linalg.inv(second.pose) @ first.pose
        moved = first.xyz @ move[:3, :3].T + move[:3, 3]
        there = np.floor((moved @ second.camera.T)[:, :2] / moved[:, 2:]).astype(int)
        rendered = np.asarray(members.depth(pair.rows[1])) / 1000
        inside = ((there >= 0) & (there < SIZE)).all(axis=1)
        surface = rendered[there[inside, 1], there[inside, 0]]
        behind = moved[inside, 2] - surface
        known = surface > 0
        assert (behind[known] > -2 * pixel).mean() > 0.97  # nothing in front of the surface, but for its steep edges
        if pair.viewpoint < 30:
            assert (np.abs(behind[known]) < pixel).mean() > 0.75


def test_features_that_know_the_surface_find_it(index: Path) -> None:
    """Where a feature is the place on the solid, what both views see is found, and near turns show nearly all of it."""
    columns = archive.load_index(index)
    members = views.Members(columns, "")
    look = {row: views.scene_view(members, row, (48, 48), 1) for row in range(len(columns["label"]))}
    by_pixels = {view.pixels.tobytes(): view for view in look.values()}
    assert len(by_pixels) == len(look)

    def surface(pixels: np.ndarray, normalise: bool = True) -> Dense:
        view = by_pixels[pixels.tobytes()]
        features = np.zeros((SIZE, SIZE, 4), np.float32)
        x, y = np.floor(view.points).astype(int).T
        features[y, x, :3] = view.xyz @ view.pose[:3, :3].T + view.pose[:3, 3]
        features[y, x, 3] = 2  # so that directions differ from place to place
        return Dense(torch.tensor(features), 1.0, 1.0, (0.0, 0.0))

    near = Matcher(members, dataclasses.replace(PROTOCOLS["mini_pairs"], size=(48, 48)), surface)
    recalls = {}
    for pair in pairs_of("scenes", columns, 0, ""):
        ((_, errors),) = [(row["convention"], row["px"]) for row in near(pair)]
        recalls[pair.viewpoint] = float(np.mean(errors < 2))
    assert min(recall for turn, recall in recalls.items() if turn < 30) > 0.9


def test_a_random_tower_is_at_chance_where_the_pixels_tell_nothing(index: Path) -> None:
    """Of pictures it finds far more: random filters still tell colours apart."""
    columns = archive.load_index(index)
    members, pairs, rng = views.Members(columns, ""), pairs_of("scenes", columns, 0, ""), np.random.default_rng(0)
    torch.manual_seed(0)
    model = ImageModel(architectures.build_clip("mini_clip_resnet").visual.eval(), "features", (0.5,) * 3, (0.5,) * 3)

    def noise(pixels: np.ndarray, normalise: bool = True) -> Dense:
        return dense_features(model, rng.integers(0, 256, pixels.shape, dtype=np.uint8), normalise=normalise)

    recall = {}
    for name, look in (("noise", noise), ("pictures", functools.partial(dense_features, model))):
        matcher = Matcher(members, PROTOCOLS["mini_pairs"], look)
        recall[name] = np.mean([np.mean(matcher(pair)[0]["px"] < 2) for pair in pairs])
    chances = []
    for first, second in ([matcher.seen(row)[0] for row in pair.rows] for pair in pairs):
        i, j = (rng.integers(len(view.xyz), size=5000) for view in (first, second))
        chances.append(np.mean(point_errors(first, second, i, j)[0] < 2))
    assert recall["noise"] == pytest.approx(np.mean(chances), abs=0.015)
    assert recall["pictures"] > 5 * np.mean(chances)


def save_tower(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    architectures.save_clip(architectures.build_clip("mini_clip_vit"), "mini_clip_vit", folder)
    io.seal(folder)
    return folder


def test_a_mini_tower_gives_the_recall_of_brute_force(index: Path, tmp_path: Path) -> None:
    weights, out = save_tower(tmp_path / "weights"), tmp_path / "pairs.parquet"
    match_pairs("m", "open_clip", PREPROCESS, weights, index, "mini_pairs", out, tmp_path / "work", precision="fp32")
    measure_correspondence(out, tmp_path / "rows.json")
    rows = io.read_json(tmp_path / "rows.json")["rows"]
    assert {row["convention"] for row in rows} == {"probe3d-stride12"}
    recall = {row["slice"]: row["value"] for row in rows}
    expected = np.mean([brute_force(weights, index, i) for i in range(WORLD["images"])], axis=0)
    assert [recall[name] for name in ("1px", "2px", "4px")] == pytest.approx(expected.tolist(), abs=2e-3)
    assert recall["1px"] < recall["2px"] < recall["4px"] < 1


def brute_force(weights: Path, index: Path, i: int) -> list[float]:
    """Recall at 1, 2 and 4 px of pair i: the renderer's geometry, all distances at once, no code of the job."""
    columns, scenes = archive.load_index(index), scenes_of_both_views()
    model, _ = architectures.load_clip(weights)
    features, points, depths = [], [], []
    for row in (2 * i, 2 * i + 1):
        image, depth = (Image.open(member(columns, row, prefix)) for prefix in ("", "depth_"))
        known = np.asarray(depth) > 0
        rows, cols = np.nonzero(known)
        chosen = tokens(model.visual, image.resize((192, 192), Image.Resampling.BILINEAR))[rows, cols]
        features.append(chosen / np.linalg.norm(chosen, axis=1, keepdims=True))
        points.append(np.stack([cols, rows], axis=1) + 0.5)
        depths.append(np.asarray(depth)[rows, cols] / 1000)
    distances = 1 - features[0] @ features[1].T
    order = np.argsort(distances, axis=1)[:, :2]
    two = np.take_along_axis(distances, order, axis=1)
    best = np.argsort(two[:, 0] / two[:, 1], kind="stable")[:100]
    there = seen_at(scenes[1], i, on_the_solid(scenes[0], i, points[0][best], depths[0][best]))
    errors = np.linalg.norm(there - points[1][order[best, 0]], axis=1)
    return [float(np.mean(errors < threshold)) for threshold in (1, 2, 4)]


def member(columns: dict[str, np.ndarray], row: int, prefix: str) -> bytes_io.BytesIO:
    place = (columns[prefix + name][row] for name in ("archive", "offset", "size"))
    return bytes_io.BytesIO(archive.read_member(*place))


@torch.no_grad()
def tokens(tower: torch.nn.Module, image: Image.Image) -> np.ndarray:
    """Patch tokens of the last block for an image of 192 px, interpolated to 48 x 48: float64 [48, 48, 96]."""
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    grid = tower.positional_embedding[1:].T.reshape(1, 96, 4, 4)
    grid = functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    first = (tower.class_embedding + tower.positional_embedding[0])[None, None]
    x = tower.ln_pre(torch.cat([first, x + grid.flatten(2).transpose(1, 2)], dim=1))
    for block in tower.transformer.resblocks:
        x = block(x)
    dense = x[:, 1:].transpose(1, 2).reshape(1, 96, 16, 16)
    return functional.interpolate(dense, (48, 48), mode="bilinear")[0].permute(1, 2, 0).double().numpy()


def test_clutter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="world of pairs: a pair of views needs `clutter: none`"):
        render_pairs(WORLD | {"clutter": "much"}, tmp_path / "a.tar", tmp_path / "a.parquet")


def test_depth_in_thousandths() -> None:
    assert thousandths(np.array([np.inf, 4.5, 5.0004], np.float64)).tolist() == [0, 4500, 5000]
    with pytest.raises(ValueError, match=r"a depth of 66\.0 world units"):
        thousandths(np.array([66.0]))
