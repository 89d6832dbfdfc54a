"""Correspondence from files of the official layouts to rows, against geometry and matches worked out anew here."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clip_robustness.core import archive, io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.inference import correspondence, pairs, views
from clip_robustness.inference.correspondence import PROTOCOLS, Matcher, keypoint_errors, match_pairs, point_errors
from clip_robustness.inference.dense import Dense, dense_features
from clip_robustness.inference.load import load_image_model
from clip_robustness.metrics.correspondence import correspondence_rows, measure_correspondence
from tests.unit.adapter_samples import build
from tests.unit.clips import timm_folder
from tests.unit.samples import encoded, make_folder
from tests.unit.test_adapters_correspondence import npz

NORMALIZE = "resize(32,bicubic)|center_crop(32)|normalize(openai)"


def paint(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """The colours of a painted plane: uint8 [..., 3], smooth, and nowhere twice the same within a few periods."""
    waves = [np.sin(x / period + y / (3 * period)), np.sin(1.3 * y / period - 1), np.sin((0.7 * x - 0.4 * y) / period)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def image_of(values: np.ndarray, **options: object) -> bytes:
    return encoded(Image.fromarray(values), "PNG", **options)


def about_z(degrees: float) -> np.ndarray:
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that a test can afford; all else is as in the protocols."""
    for family, size in (("scannet_pairs", (96, 128)), ("navi", (128, 128)), ("spair", (256, 256))):
        monkeypatch.setitem(PROTOCOLS, family, dataclasses.replace(PROTOCOLS[family], size=size))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return timm_folder(tmp_path / "vit")


def run(weights: Path, index: Path, family: str, out: Path, **options: object) -> tuple[dict, dict, list[dict]]:
    """(table, manifest, rows) of the job and the metric."""
    work = out.parent / "work"
    match_pairs("m", "timm", NORMALIZE, weights, index, family, out, work, precision="fp32", **options)
    measure_correspondence(out, out.with_suffix(".rows.json"))
    rows = io.read_json(out.with_suffix(".rows.json"))["rows"]
    return io.read_parquet(out), io.read_json(out.with_suffix(".json")), rows


def value(rows: list[dict], slice_: str, convention: str) -> float:
    (found,) = (row for row in rows if (row["slice"], row["convention"]) == (slice_, convention))
    assert found["metric"] == "recall" and found["low"] <= found["value"] <= found["high"]
    return found["value"]


# --- Scenes: a painted plane, seen by cameras that turn about their axis, move and come nearer -----------------------

PLANE = 2.0  # metres ahead of the world's origin
CAMERA = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])  # for depth maps of 64 x 48
POSES = {15: (0, (0, 0, 0)), 45: (0, (0.2, 0.1, 0)), 585: (25, (0.1, 0, 0.4)), 700: (70, (-0.1, 0.1, 0.2))}


def scannet_files(tmp_path: Path, listed: list[tuple[int, int]]) -> list[Path]:
    files = {}
    for frame, (turn, place) in POSES.items():
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = about_z(turn), place
        depth = PLANE - place[2]
        # Colour frames are twice as large as depth maps, as ScanNet's are larger.
        u, v = np.meshgrid((np.arange(128) + 0.5) / 2, (np.arange(96) + 0.5) / 2)
        rays = np.stack([(u - 32) / 60, (v - 24) / 60, np.ones_like(u)], axis=-1) * depth
        world = rays @ pose[:3, :3].T + pose[:3, 3]
        folder = "scannet_test_1500/scene0707_00"
        files[f"{folder}/color/{frame}.jpg"] = image_of(paint(world[..., 0], world[..., 1], 0.11))
        metres = np.full((48, 64), round(1000 * depth), np.uint16)
        metres[:4, :4] = 0  # a hole
        files[f"{folder}/depth/{frame}.png"] = image_of(metres)
        files[f"{folder}/pose/{frame}.txt"] = "\n".join(" ".join(map(str, row)) for row in pose.tolist()).encode()
    root = make_folder(tmp_path / "scannet", files) / "scannet_test_1500"
    (root / "test.npz").write_bytes(npz(name=np.array([(707, 0, *pair) for pair in listed], np.uint16)))
    (root / "intrinsics.npz").write_bytes(npz(scene0707_00=CAMERA))
    return [root]


def homography(first: int, second: int) -> np.ndarray:
    """Pixels of one depth map to those of another, by the plane alone: H = K (R + t n' / d) K^-1."""
    (turn_0, place_0), (turn_1, place_1) = POSES[first], POSES[second]
    rotation = about_z(turn_1).T @ about_z(turn_0)
    shift = about_z(turn_1).T @ (np.array(place_0) - place_1)
    induced = rotation + np.outer(shift, [0, 0, 1]) / (PLANE - place_0[2])
    return CAMERA @ induced @ np.linalg.inv(CAMERA)


def brute_force_errors(weights: Path, images: list[np.ndarray], warp: np.ndarray) -> np.ndarray:
    """Errors, in pixels of the grid of every fourth, of all matches by ratio: without depth, poses or `sample`."""
    model = load_image_model(weights, "timm", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    grids = []
    for pixels in images:
        raw = dense_features(model, pixels, normalise=False).features.permute(2, 0, 1)[None]
        grid = functional.interpolate(raw, (12, 16), mode="bilinear")[0].permute(1, 2, 0).double().numpy()
        grids.append(grid / np.linalg.norm(grid, axis=2, keepdims=True))
    points = [(r, c) for r in range(12) for c in range(16) if (r, c) != (0, 0)]  # the hole is one of the grid
    found = []
    for r, c in points:
        distances = {other: 1 - float(grids[0][r, c] @ grids[1][other]) for other in points}
        nearest, second = sorted(points, key=distances.__getitem__)[:2]
        x, y, w = warp @ [4 * (c + 0.5), 4 * (r + 0.5), 1]
        error = np.hypot(x / w - 4 * (nearest[1] + 0.5), y / w - 4 * (nearest[0] + 0.5)) / 4
        found.append((distances[nearest] / distances[second], error))
    return np.array([error for _, error in sorted(found)])


@pytest.mark.usefixtures("small")
def test_a_homography_gives_the_errors_of_brute_force(tmp_path: Path, weights: Path) -> None:
    listed = [(15, 45), (15, 585), (45, 700), (15, 15)]
    build(tmp_path, scannet_files(tmp_path, listed), "scannet_pairs")
    table, manifest, rows = run(weights, tmp_path / "index.parquet", "scannet_pairs", tmp_path / "m.parquet")
    assert manifest["n"] == 4 and manifest["dataset"] == "index"
    one = table["convention"] == "probe3d-stride8"
    assert table["pair"][one].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(table["viewpoint"][one], [0, 25, 70, 0], atol=1e-4)
    columns = archive.load_index(tmp_path / "index.parquet")
    members = views.Members(columns, "")
    rows_of = {int(frame): row for row, frame in enumerate(columns["frame"])}
    expected = []
    for (first, second), errors in zip(listed, table["px"][one], strict=True):
        images = [np.asarray(members.image(rows_of[frame])) for frame in (first, second)]
        expected.append(brute_force_errors(weights, images, homography(first, second)))
        np.testing.assert_allclose(np.sort(errors), np.sort(expected[-1]), atol=1e-3)
    recalls = [float(np.mean(errors < 5)) for errors in expected]
    assert recalls[3] == 1 and 0.1 < recalls[1] < 1  # identical images, and a pair that is neither lost nor trivial
    assert value(rows, "5px", "probe3d-stride8") == pytest.approx(np.mean(recalls), abs=1e-6)
    finer = [float(np.mean(4 * errors < 10)) for errors in expected]
    assert value(rows, "10px", "input_pixels-stride8") == pytest.approx(np.mean(finer), abs=1e-6)
    by_turn = {name: value(rows, f"10px:{name}", "probe3d-stride8") for name in ("0-15", "15-30", "60-180")}
    assert by_turn["15-30"] == pytest.approx(np.mean(expected[1] < 10))
    assert not any(row["slice"].endswith("30-60") for row in rows)


@pytest.mark.usefixtures("small")
def test_a_job_that_was_killed_goes_on(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, scannet_files(tmp_path, [(15, 45), (15, 585), (45, 700), (15, 15), (700, 15)]), "scannet_pairs")
    index, whole = tmp_path / "index.parquet", tmp_path / "whole" / "m.parquet"
    run(weights, index, "scannet_pairs", whole)
    monkeypatch.setattr(correspondence, "SHARD", 2)
    done, call = [], Matcher.__call__

    def until_four(self: Matcher, pair: pairs.Pair) -> list:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(pair.number)
        return call(self, pair)

    monkeypatch.setattr(Matcher, "__call__", until_four)
    with pytest.raises(KeyboardInterrupt):
        run(weights, index, "scannet_pairs", tmp_path / "again" / "m.parquet")
    done.clear()
    monkeypatch.setattr(Matcher, "__call__", lambda self, pair: (done.append(pair.number), call(self, pair))[1])
    run(weights, index, "scannet_pairs", tmp_path / "again" / "m.parquet")
    assert done == [2, 3, 4]
    table, again = io.read_parquet(whole), io.read_parquet(tmp_path / "again" / "m.parquet")
    assert [list(px) for px in table["px"]] == [list(px) for px in again["px"]]
    done.clear()
    run(weights, index, "scannet_pairs", tmp_path / "again" / "n.parquet")
    assert not done
    _, _, rows = run(weights, index, "scannet_pairs", tmp_path / "again" / "n.parquet", norm=True)
    assert len(done) == 5
    assert {row["convention"] for row in rows} == {"probe3d-stride8-normed", "input_pixels-stride8-normed"}


# --- Objects: a painted disc in photographs that lie on their side ---------------------------------------------------

SPOT = 60.0  # radius of the disc, millimetres
TURNS = (0, 20, 50, 110, 170, 200, 250, 300)


def navi_files() -> dict[str, bytes]:
    """Photographs of 96 x 128 px (upright), stored on their side with an EXIF tag that says so."""
    files, entries = {}, []
    for n, turn in enumerate(TURNS):
        height, width, focal, distance = 128, 96, 150.0, 300.0 + 20 * n
        u, v = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
        shift = np.array([5.0 * n - 20, 3.0 * n, distance])
        seen = np.stack([u / focal * distance, v / focal * distance, np.full_like(u, distance)], axis=-1) - shift
        thing = seen @ about_z(turn)  # camera = R object + t, so object = R' (camera - t)
        on = np.hypot(thing[..., 0], thing[..., 1]) < SPOT
        pixels = np.where(on[..., None], paint(thing[..., 0], thing[..., 1], 11.0), np.uint8(30))
        inverse = np.where(on, round(655350 / distance), 0).astype(np.uint16)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        side = np.rot90(pixels).copy()
        files[f"navi/duck/wild_set/images/{n:03d}.jpg"] = image_of(side, exif=exif)
        files[f"navi/duck/wild_set/depth/{n:03d}.png"] = image_of(inverse)
        files[f"navi/duck/wild_set/masks/{n:03d}.png"] = image_of(255 * on.astype(np.uint8))
        half = np.radians(turn) / 2
        camera = {"q": [2 * np.cos(half), 0, 0, 2 * np.sin(half)], "t": shift.tolist(), "focal_length": focal}
        entry = {"filename": f"{n:03d}.jpg", "camera": camera, "occluded": False, "split": "val"}
        entries.append(entry | {"image_size": [height, width]})
    return files | {"navi/duck/wild_set/annotations.json": json.dumps(entries).encode()}


def test_an_object_view_knows_where_its_pixels_lie(tmp_path: Path) -> None:
    columns = build(tmp_path, [make_folder(tmp_path / "f", navi_files()) / "navi"], "navi")
    members = views.Members(columns, "index")
    for row in range(len(TURNS)):
        view = views.object_view(members, row, (512, 512), 4)
        assert view.pixels.shape == (512, 512, 3) and len(view.xyz) > 8000  # most of a circle in its square
        thing = view.xyz @ view.pose[:3, :3].T + view.pose[:3, 3]
        assert np.abs(thing[:, 2]).max() < 1e-3  # metres off the plane: the depth map's rounding
        radius = 1000 * np.hypot(*thing[:, :2].T)
        assert SPOT - 3 < radius.max() < SPOT + 3
        x, y = np.floor(view.points).astype(int).T
        painted = paint(1000 * thing[:, 0], 1000 * thing[:, 1], 11.0)
        off = np.abs(view.pixels[y, x].astype(int) - painted).max(axis=1)
        assert np.median(off[radius < 50]) < 25  # a pixel of these photographs is 2 to 3 mm
        # The camera of the crop puts its points where they are, up to a shift.
        there = (view.xyz @ view.camera.T)[:, :2] / view.xyz[:, 2:] - view.points
        assert np.ptp(there, axis=0).max() < 10 * 512 / 100  # the photograph's own pixels are that large


@pytest.mark.usefixtures("small")
def test_navi_from_its_layout_to_rows(tmp_path: Path, weights: Path) -> None:
    columns = build(tmp_path, [make_folder(tmp_path / "f", navi_files()) / "navi"], "navi")
    table, manifest, rows = run(weights, tmp_path / "index.parquet", "navi", tmp_path / "m.parquet")
    assert manifest["n"] == 2 and set(table["convention"]) == {"probe3d-stride8"}  # of 8 images every fourth
    assert set(table["cluster"]) == {"duck"}
    turn = dict(zip(columns["image_id"], TURNS, strict=True))
    for first, second, angle in zip(table["first"], table["second"], table["viewpoint"], strict=True):
        apart = abs(turn[first] - turn[second]) % 360
        assert angle == pytest.approx(min(apart, 360 - apart), abs=1e-3) and 0 < angle <= 120
    overall = [value(rows, name, "probe3d-stride8") for name in ("1cm", "2cm", "5cm")]
    assert overall == sorted(overall) and 0 < overall[2] < 1
    for name in ("5px", "25px", "50px"):
        value(rows, name, "probe3d-stride8")
    assert sum(row["n"] for row in rows if row["slice"].startswith("2cm:")) == 2


def test_a_photograph_that_is_not_upright_is_refused(tmp_path: Path) -> None:
    files = navi_files()
    name = "navi/duck/wild_set/images/000.jpg"
    flat = np.zeros((96, 128, 3), np.uint8)
    columns = build(tmp_path, [make_folder(tmp_path / "f", files | {name: image_of(flat)}) / "navi"], "navi")
    with pytest.raises(InputError, match="upright it has 128 x 96 px, the annotation says 96 x 128"):
        views.object_view(views.Members(columns, "index"), 0, (512, 512), 4)


def test_a_depth_map_of_8_bits_is_refused(tmp_path: Path) -> None:
    files = navi_files() | {"navi/duck/wild_set/depth/000.png": image_of(np.zeros((128, 96), np.uint8))}
    columns = build(tmp_path, [make_folder(tmp_path / "f", files) / "navi"], "navi")
    with pytest.raises(InputError, match=r"depth of 'duck/wild_set/000\.jpg': a picture of mode L, expected one chann"):
        views.object_view(views.Members(columns, "index"), 0, (512, 512), 4)


def test_the_box_of_an_object() -> None:
    known = np.zeros((40, 40), bool)
    known[10:21, 5:10] = True  # 11 rows, 5 columns: 10 and 4 between the first and the last
    assert views.square_box(known) == (2, 10, 10)
    known[:] = False
    known[10:31, 0:5] = True  # centred it would leave the image
    assert views.square_box(known) == (0, 10, 20)
    known[:] = False
    assert views.square_box(known) == (0, 0, 40)
    known[39, 39] = True
    assert views.square_box(known) == (39, 39, 1)


# --- Keypoints -------------------------------------------------------------------------------------------------------


def spair_files(flips: bool = False) -> dict[str, bytes]:
    """Two categories; pairs of an image with itself, or (`flips`) with keypoints that do not belong together."""
    files, number = {}, 0
    for category in ("cat", "dog"):
        for n in range(3):
            rng = np.random.default_rng([n, len(category), ord(category[0])])
            name, size = f"2008_00000{n}", (90 + 10 * n, 128)
            noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            files[f"SPair-71k/JPEGImages/{category}/{name}.jpg"] = image_of(noise)
            files[f"SPair-71k/Segmentation/{category}/{name}.png"] = image_of(np.ones(size, np.uint8))
            points = (4 * rng.integers(3, 20, (5, 2)) + 2).tolist()  # centres of cells of 8 of 256 px
            pair = {
                "pair_id": number, "category": category, "src_imname": f"{name}.jpg", "trg_imname": f"{name}.jpg",
                "src_kps": points, "trg_kps": [[89 - p, 89 - q] for p, q in points] if flips else points,
                "kps_ids": ["0", "1", "2", "3", "4"], "src_bndbox": [5, 5, 85, 85], "trg_bndbox": [5, 5, 85, 65],
                "viewpoint_variation": n, "scale_variation": 0, "truncation": 0, "occlusion": 0,
            }  # fmt: skip
            path = f"SPair-71k/PairAnnotation/test/{number:06d}-{name}-{name}:{category}.json"
            files[path] = json.dumps(pair).encode()
            number += 1
    return files


@pytest.mark.usefixtures("small")
def test_spair_from_its_layout_to_rows(tmp_path: Path, weights: Path) -> None:
    build(tmp_path, [make_folder(tmp_path / "f", spair_files()) / "SPair-71k"], "spair")
    table, manifest, rows = run(weights, tmp_path / "index.parquet", "spair", tmp_path / "m.parquet")
    assert manifest["n"] == 6
    centred = "cell_centres-stride8"
    assert [value(rows, f"0.10{part}", centred) for part in ("", ":0", ":1", ":2")] == [1, 1, 1, 1]  # the same image
    assert max(errors.max() for errors in table["box"][table["convention"] == centred]) < 1e-6
    assert {row["n"] for row in rows if row["slice"] == "0.10"} == {6}
    # Half a cell off, and looked up between cells: nearly always there, and never at the very place.
    assert value(rows, "0.10", "probe3d-stride8") > 0.85
    assert min(errors.min() for errors in table["box"][table["convention"] == "probe3d-stride8"]) > 0.01
    (tmp_path / "flipped").mkdir()
    build(tmp_path / "flipped", [make_folder(tmp_path / "flipped", spair_files(flips=True)) / "SPair-71k"], "spair")
    _, _, rows = run(weights, tmp_path / "flipped" / "index.parquet", "spair", tmp_path / "flipped" / "m.parquet")
    assert value(rows, "0.10", "probe3d-stride8") < 0.5


def test_keypoint_errors_are_those_of_a_search_over_cells() -> None:
    rng = np.random.default_rng(0)
    maps = [functional.normalize(torch.tensor(rng.normal(size=(10, 10, 6))), dim=2).float() for _ in range(2)]
    one, two = (Dense(features, 16.0, 16.0, (0.0, 0.0)) for features in maps)
    source, target = rng.uniform(0, 400, (7, 2)), rng.uniform(0, 300, (7, 2))
    pair = {"number": 3, "src_kps": source, "trg_kps": target, "trg_bndbox": [10, 20, 110, 270]}
    errors = keypoint_errors(one, two, 160, (400, 300), pair)
    for name, shift, grid in (("probe3d", 0.0, source / 400 * 9), ("cell_centres", 0.5, source / 400 * 10 - 0.5)):
        expected = []
        for (x, y), place in zip(np.clip(grid, 0, 9), target, strict=True):
            left, top = min(int(x), 8), min(int(y), 8)
            a, b, square = x - left, y - top, maps[0][top : top + 2, left : left + 2].numpy()
            query = (1 - b) * ((1 - a) * square[0, 0] + a * square[0, 1]) + b * (
                (1 - a) * square[1, 0] + a * square[1, 1]
            )
            best = max(np.ndindex(10, 10), key=lambda cell: float(maps[1][cell].numpy() @ query))
            found = (np.array(best[::-1]) + shift) / 10 * 300
            expected.append(np.linalg.norm(found - place) / 250)
        np.testing.assert_allclose(errors[name]["box"], expected, atol=1e-5)


def test_an_empty_box_is_named() -> None:
    dense = Dense(torch.ones(2, 2, 3), 16.0, 16.0, (0.0, 0.0))
    pair = {"number": 3, "src_kps": [[1, 1]], "trg_kps": [[1, 1]], "trg_bndbox": [5, 5, 5, 5]}
    with pytest.raises(InputError, match=r"pair 3: the box \[5, 5, 5, 5\] of its target is empty"):
        keypoint_errors(dense, dense, 32, (32, 32), pair)


def keypoint_index(count: int) -> dict[str, np.ndarray]:
    listed = [{"number": n, "target": "a", "viewpoint_variation": n % 3 // 2} for n in range(count)]
    return {"image_id": np.array(["a"]), "category": np.array(["cat"]), "pairs": np.array([json.dumps(listed)])}


def test_how_many_pairs_of_keypoints_are_drawn() -> None:
    drawn = pairs.keypoint_pairs(keypoint_index(900), seed=20)  # 600 of variation 0, 300 of 1
    assert sum(pair.overall for pair in drawn) == 200
    assert [sum(pair.viewpoint == variation for pair in drawn) for variation in (0, 1)] == [200, 200]
    again = pairs.keypoint_pairs(keypoint_index(900), seed=20)
    assert [pair.number for pair in drawn] == [pair.number for pair in again]
    assert [pair.number for pair in drawn] != [pair.number for pair in pairs.keypoint_pairs(keypoint_index(900), 21)]
    assert len(pairs.keypoint_pairs(keypoint_index(90), seed=20)) == 90


# --- Chance, points, and what is refused -----------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_features_of_noise_give_chance(tmp_path: Path) -> None:
    build(tmp_path, scannet_files(tmp_path, [(15, 45), (15, 585), (45, 700), (585, 700)]), "scannet_pairs")
    columns = archive.load_index(tmp_path / "index.parquet")
    protocol = dataclasses.replace(PROTOCOLS["scannet_pairs"], step=1, matches=3000)
    rng = np.random.default_rng(0)

    def noise(pixels: np.ndarray, normalise: bool = True) -> Dense:
        return Dense(torch.tensor(rng.normal(size=(96, 128, 8)), dtype=torch.float32), 1.0, 1.0, (0.0, 0.0))

    matcher = Matcher(views.Members(columns, ""), protocol, noise)
    recalls, chances = [], []
    for pair in pairs.scene_pairs(columns, 0):
        (found,) = matcher(pair)
        first, second = (matcher.seen(row)[0] for row in pair.rows)
        i, j = rng.integers(len(first.xyz), size=20000), rng.integers(len(second.xyz), size=20000)
        recalls.append(np.mean(found["px"] < 10))
        chances.append(np.mean(point_errors(first, second, i, j)[0] < 10))
    assert 0.02 < np.mean(chances) < 0.2
    assert np.mean(recalls) == pytest.approx(np.mean(chances), abs=0.015)


def test_point_errors_in_two_units() -> None:
    camera = np.diag([100.0, 100, 1])
    xyz = np.array([[0, 0, 2.0], [0.1, 0, 2.0]])
    pose = np.eye(4)
    pose[:3, 3] = [0, 0, -1]  # one metre behind the first
    first = views.View(np.zeros(0), np.zeros(0), xyz, camera, np.eye(4))
    second = views.View(np.zeros(0), np.zeros(0), xyz + np.array([0, 0, 1]), camera, pose)
    px, cm = point_errors(first, second, np.array([0, 0, 1]), np.array([0, 1, 1]))
    np.testing.assert_allclose(cm, [0, 10, 0], atol=1e-9)
    np.testing.assert_allclose(px, [0, 100 * 0.1 / 3, 0], atol=1e-9)


@pytest.mark.usefixtures("small")
def test_what_the_job_refuses(tmp_path: Path, weights: Path) -> None:
    build(tmp_path, scannet_files(tmp_path, [(15, 45)]), "scannet_pairs")
    index = tmp_path / "index.parquet"
    with pytest.raises(InputError, match="no protocol for the family 'coco'; there are navi, scannet_pairs, spair"):
        run(weights, index, "coco", tmp_path / "m.parquet")
    with pytest.raises(InputError, match="the column 'object' is missing; index the data set again"):
        run(weights, index, "navi", tmp_path / "m.parquet")
    columns = io.read_parquet(index)
    for text, message in (('[[4,"x.jpg"]]', r"pair 4: there is no image 'x\.jpg'"), ("[]", "there is no pair of im")):
        lost = np.array([text, *["[]"] * (len(columns["pairs"]) - 1)], dtype=object)
        io.write_parquet(tmp_path / "lost.parquet", columns | {"pairs": lost})
        with pytest.raises(InputError, match=message):
            run(weights, tmp_path / "lost.parquet", "scannet_pairs", tmp_path / "m.parquet")


# --- Rows ------------------------------------------------------------------------------------------------------------


def table_of(rows: list[dict]) -> dict[str, np.ndarray]:
    lists = {name: [row.get(name) for row in rows] for name in ("cm", "px", "box")}
    columns: dict = {name: np.empty(len(rows), object) for name in lists}
    for name, values in lists.items():
        for i, some in enumerate(values):
            columns[name][i] = None if some is None else np.array(some, np.float32)
    plain = {"convention": "c", "overall": True, "viewpoint": 0.0, "cluster": "a"}
    for name in ("pair", "convention", "overall", "viewpoint", "cluster"):
        columns[name] = np.array([({"pair": i} | plain | row)[name] for i, row in enumerate(rows)])
    return columns


SCENES = {"what": "scenes", "scored": [["px", 5], ["px", 10]], "binned": ["px", 10], "bins": [0, 15, 30, 180]}
KEYPOINTS = {"what": "keypoints", "scored": [["box", 0.1]], "binned": ["box", 0.1], "bins": []}


def test_recall_of_pairs_by_threshold_and_bin() -> None:
    errors = ([1, 5, 9.99, 30], [1, 1], [10, 20, 30, 40], [])
    seen = zip(errors, (14.999, 15.0, 180.0, 3.0), strict=True)
    made = [{"px": px, "viewpoint": angle, "cluster": f"s{i}"} for i, (px, angle) in enumerate(seen)]
    rows = {row["slice"]: row for row in correspondence_rows(table_of(made), SCENES)}
    assert list(rows) == ["5px", "10px", "10px:0-15", "10px:15-30", "10px:30-180"]
    assert rows["5px"]["value"] == pytest.approx((0.25 + 1 + 0) / 3) and rows["5px"]["n"] == 3
    assert rows["10px"]["value"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert [rows[f"10px:{name}"]["value"] for name in ("0-15", "15-30", "30-180")] == [0.75, 1, 0]


def test_pairs_of_one_scene_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    made = [{"px": [1.0] if rng.random() < p else [99.0], "cluster": f"s{p}"} for p in (0.1, 0.9) for _ in range(200)]
    together = correspondence_rows(table_of(made), SCENES)[0]
    alone = correspondence_rows(table_of([row | {"cluster": f"{i:03d}"} for i, row in enumerate(made)]), SCENES)[0]
    assert together["value"] == alone["value"] == pytest.approx(0.5, abs=0.05)
    assert together["high"] - together["low"] > 0.6 and alone["high"] - alone["low"] < 0.12
    single = correspondence_rows(table_of([row | {"cluster": "s"} for row in made]), SCENES)[0]
    assert (single["low"], single["high"]) == (alone["low"], alone["high"])
    each = [row["px"][0] < 5 for row in made]
    assert (alone["low"], alone["high"]) == pytest.approx(statistics.bootstrap_mean(each))


def test_recall_of_keypoints_is_a_mean_over_categories() -> None:
    made = [
        {"box": [0.05, 0.2], "cluster": "cat", "viewpoint": 0},
        {"box": [0.05] * 8, "cluster": "cat", "viewpoint": 1},
        {"box": [0.5], "cluster": "dog", "viewpoint": 1},
        {"box": [0.01], "cluster": "dog", "viewpoint": 1, "overall": False},
    ]
    rows = {row["slice"]: row for row in correspondence_rows(table_of(made), KEYPOINTS)}
    assert rows["0.10"]["value"] == pytest.approx((9 / 10 + 0) / 2) and rows["0.10"]["n"] == 3
    assert rows["0.10:0"]["value"] == 0.5 and rows["0.10:1"]["value"] == pytest.approx((1 + 0.5) / 2)


def test_a_table_without_matches_is_refused(tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist([], correspondence._schema())
    io.write_parquet(tmp_path / "m.parquet", table)
    io.write_json(tmp_path / "m.json", {"model": "m", "dataset": "d"})
    with pytest.raises(InputError, match="no 'protocol' in it or its manifest; match the pairs again"):
        measure_correspondence(tmp_path / "m.parquet", tmp_path / "out.json")
    io.write_json(tmp_path / "m.json", {"model": "m", "dataset": "d", "protocol": SCENES})
    with pytest.raises(InputError, match="no pair has a match"):
        measure_correspondence(tmp_path / "m.parquet", tmp_path / "out.json")
