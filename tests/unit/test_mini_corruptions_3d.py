"""The 3D corruptions of the mini world: they follow the depth, and are ordered by severity, reproducible, indexed."""

import tarfile

import numpy as np
import pytest
import torch

from clip_robustness.core.io import InputError, read_parquet, sha256_file
from clip_robustness.data.adapters import imagenet_3dcc
from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE
from clip_robustness.mini.corruptions import write_corrupted
from clip_robustness.mini.corruptions_3d import (
    _STEPS,
    CORRUPTIONS_3D,
    GEOMETRIC,
    WALL,
    _bits,
    _coefficients,
    _decoded,
    corrupt_3d,
    scene,
    view,
)
from clip_robustness.mini.corruptions_3d import write_corrupted_3d as write
from clip_robustness.mini.dataset import read_images, render_dataset

torch.set_num_threads(1)
IMAGES = 24


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(index, geometry, images, depths) of photographs before busy backgrounds."""
    folder = tmp_path_factory.mktemp("clean")
    index, geometry = folder / "clean.parquet", folder / "clean.npz"
    world = {"name": "clean", "images": IMAGES, "seed": 3, "rho": 0.9, "background": "busy"}
    render_dataset(world, folder / "clean.tar", index, geometry)
    with np.load(geometry) as arrays:
        return index, geometry, read_images(read_parquet(index), index), arrays["depth"].astype(np.float32)


@pytest.fixture(scope="module")
def scenes(clean):
    return [scene(image, depth) for image, depth in zip(clean[2], clean[3], strict=True)]


def series(scenes, name):
    """[5, n, 48, 48, 3], each image with a seed of its own."""
    levels = range(1, 6)
    return np.array(
        [[corrupt_3d(one, name, s, np.random.default_rng(i)) for i, one in enumerate(scenes)] for s in levels]
    )


def flat(colour, depth=np.inf):
    """A scene of one colour, at one depth."""
    image = np.full((SIZE, SIZE, 3), colour, np.uint8)
    return image, np.full((SIZE, SIZE), depth, np.float32)


def test_the_types_are_those_of_imagenet_3dcc():
    assert set(GEOMETRIC) == set(imagenet_3dcc.GEOMETRIC)
    assert set(CORRUPTIONS_3D) == {*imagenet_3dcc.GEOMETRIC, *imagenet_3dcc.OTHERS}
    assert list(CORRUPTIONS_3D)[:6] == list(GEOMETRIC)
    assert all(len(strengths) == 5 for _, strengths in CORRUPTIONS_3D.values())


@pytest.mark.parametrize("name", list(CORRUPTIONS_3D))
def test_severity_orders_the_distance_from_the_clean_image(clean, scenes, name):
    drawn = series(scenes, name)
    assert drawn.dtype == np.uint8 and drawn.shape == (5, IMAGES, SIZE, SIZE, 3)
    distance = np.sqrt(((drawn / 255 - clean[2] / 255) ** 2).mean(axis=(2, 3, 4)))
    mean = distance.mean(axis=1)
    assert 0.005 < mean[0] < 0.2 and (np.diff(mean) > 0).all() and mean[4] > 1.4 * mean[0]
    assert (np.diff(distance, axis=0) > 0).mean() > 0.9  # and nearly every image's own


@pytest.mark.parametrize("name", list(CORRUPTIONS_3D))
def test_a_corruption_leaves_its_input_alone_and_repeats(clean, name):
    own = scene(clean[2][0], clean[3][0])
    before = [array.copy() for array in own]
    first, again = (corrupt_3d(own, name, 5, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for array, copy in zip(own, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def sharpness(images, where):
    """Mean square of the differences between neighbours, over the pixels `where` [n, 48, 48]."""
    steps = np.diff(images.astype(float), axis=1, append=images[:, -1:]) ** 2
    return float(steps.mean(axis=3)[where].mean())


def thirds(depths):
    """The near and the far third of each solid's depths, off its rim, and the wall away from it."""
    solid = np.isfinite(depths)
    inner, outer = solid.copy(), ~solid
    for down in range(-2, 3):
        for right in range(-2, 3):
            inner &= np.roll(solid, (down, right), (1, 2))
            outer &= ~np.roll(solid, (3 * down, 3 * right), (1, 2))
    limits = [np.quantile(depth[part], (1 / 3, 2 / 3)) if part.any() else (0, 0)
              for depth, part in zip(depths, solid, strict=True)]  # fmt: skip
    low, high = np.array(limits)[:, :, None, None].transpose(1, 0, 2, 3)
    return inner & (depths <= low), inner & (depths >= high), outer


def test_focus_keeps_its_own_depth_sharp_and_blurs_the_other(clean, scenes):
    _, _, images, depths = clean
    near, far, wall = thirds(depths)
    assert min(part.sum() for part in (near, far, wall)) > 1000
    left = {name: [sharpness(series(scenes, name)[3], part) / sharpness(images, part) for part in (near, far, wall)]
            for name in ("near_focus", "far_focus")}  # fmt: skip
    assert left["near_focus"][0] > 0.7 and left["near_focus"][0] > 1.5 * left["near_focus"][1]
    assert left["near_focus"][1] > left["near_focus"][2] and left["near_focus"][2] < 0.3
    assert left["far_focus"][2] == pytest.approx(1, abs=0.02) and left["far_focus"][1] < 0.5
    assert left["far_focus"][0] < left["far_focus"][1]


@pytest.mark.parametrize("severity", [3, 4, 5])
def test_a_point_out_of_focus_is_the_disc_of_a_thin_lens(severity):
    image, depth = flat(0)
    depth[:3, :3] = 4.0  # what the camera focuses on
    image[30, 30] = 255
    aperture = CORRUPTIONS_3D["near_focus"][1][severity - 1]
    drawn = CORRUPTIONS_3D["near_focus"][0](scene(image, depth), aperture, None)[:, :, 0]
    at = np.arange(SIZE) - 30.0
    radius = np.sqrt(2 * (drawn * (at[:, None] ** 2 + at**2)).sum() / drawn.sum())  # of a disc: half its square
    assert radius == pytest.approx(aperture * FOCAL * (1 / 4 - 1 / WALL), abs=0.5)
    assert drawn.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["near_focus", "far_focus", "xy_motion_blur", "z_motion_blur"])
def test_the_wall_does_not_shine_through_the_solid(name):
    """A red solid as steep as may be before a green wall stays red, and the wall green."""
    image, depth = flat((0, 255, 0))
    image[14:34, 6:42] = (255, 0, 0)
    depth[14:34, 6:42] = np.linspace(3.8, 6, 36)
    image[13, 6:42] = image[34, 6:42] = image[13:35, 5] = image[13:35, 42] = (255, 0, 0)
    drawn = corrupt_3d(scene(image, depth), name, 3, np.random.default_rng(0)).astype(int)
    assert abs(drawn[22:26, 18:30] - (255, 0, 0)).max() <= 12
    assert abs(drawn[:4] - (0, 255, 0)).max() <= 12


@pytest.mark.parametrize("depth", [4.0, np.inf])
def test_a_moving_camera_shifts_a_plane_by_its_depth(clean, depth):
    image = clean[2][0]
    own = scene(image, np.full((SIZE, SIZE), depth))
    unit = min(depth, WALL) / FOCAL  # one pixel
    stays, right, up = view(own, np.array([[0, 0, 0], [4 * unit, 0, 0], [0, 3 * unit, 0]]))
    np.testing.assert_allclose(stays, image / 255, atol=1e-3)
    np.testing.assert_allclose(right[:, :-5], image[:, 4:-1] / 255, atol=1e-3)
    np.testing.assert_allclose(up[4:], image[1:-3] / 255, atol=1e-3)


def dot(depth, down, right):
    """A white dot of 3 x 3 on black, that far from the middle, on a plane at `depth`."""
    image, depths = flat(0, depth)
    row, column = SIZE // 2 + down, SIZE // 2 + right
    image[row - 1 : row + 2, column - 1 : column + 2] = 255
    return scene(image, depths)


def moments(picture):
    """Centre (down, right) from the middle of the image, and covariance of where the light is."""
    at = np.arange(SIZE) - (SIZE - 1) / 2
    weight = picture.sum(axis=2) / picture.sum()
    centre = np.array([(weight.sum(axis=1) * at).sum(), (weight.sum(axis=0) * at).sum()])
    down, right = np.meshgrid(at - centre[0], at - centre[1], indexing="ij")
    off = (weight * down * right).sum()
    return centre, np.array([[(weight * down**2).sum(), off], [off, (weight * right**2).sum()]])


def test_forward_motion_magnifies_by_depth():
    [drawn] = view(dot(4.0, 7, -11), np.array([[0, 0, 0.8]]))
    np.testing.assert_allclose(moments(drawn)[0], np.array([7.5, -10.5]) * 4 / 3.2, atol=0.1)


def test_z_motion_is_radial_and_xy_motion_is_the_same_everywhere():
    directions = {"xy_motion_blur": [], "z_motion_blur": []}
    places = [(0, 12), (9, 9), (-12, 3), (-8, -10)]
    for down, right in places:
        for name, found in directions.items():
            drawn = CORRUPTIONS_3D[name][0](dot(5.0, down, right), 0.8, np.random.default_rng(4))
            values, vectors = np.linalg.eigh(moments(drawn)[1])
            assert values[1] > 1.5 * values[0]
            found.append(vectors[:, 1])
    outward = np.array([(down + 0.5, right + 0.5) for down, right in places])
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    assert (abs((np.array(directions["z_motion_blur"]) * outward).sum(axis=1)) > 0.99).all()
    assert (abs(np.array(directions["xy_motion_blur"]) @ directions["xy_motion_blur"][0]) > 0.99).all()


def test_xy_motion_moves_what_is_near_more():
    lengths = []
    for depth in (4.0, 5.0, np.inf):
        drawn = CORRUPTIONS_3D["xy_motion_blur"][0](dot(depth, 0, 0), 0.6, np.random.default_rng(4))
        variance = np.trace(moments(drawn)[1]) - 2 * 2 / 3  # less the dot's own
        # Of nine places evenly over a path of length l: l^2 (1 + 2/8) / 12, with the interpolation's less than 1/3.
        lengths.append(np.sqrt(variance * 12 / 1.25))
    np.testing.assert_allclose(lengths, 0.6 * FOCAL / np.array([4, 5, WALL]), rtol=0.1)


def test_near_pixels_of_rendered_solids_change_most_by_motion(clean, scenes):
    _, _, images, depths = clean
    _, _, wall = thirds(depths)
    solid = np.isfinite(depths)
    for name in ("xy_motion_blur", "z_motion_blur"):
        drawn = series(scenes, name)[1]
        assert sharpness(drawn, solid) / sharpness(images, solid) < sharpness(drawn, wall) / sharpness(images, wall)


def test_fog_thickens_with_distance(clean, scenes):
    _, _, images, depths = clean
    drawn, density = series(scenes, "fog_3d")[2] / 255, CORRUPTIONS_3D["fog_3d"][1][2]
    fog = (images / 255).mean(axis=(1, 2, 3))[:, None, None, None]
    contrast = abs(images / 255 - fog)
    clear = (abs(drawn - fog) / np.maximum(contrast, 1e-6)).mean(axis=3)
    seen = (contrast > 0.15).all(axis=3)
    near, far, wall = ((part & seen) for part in thirds(depths))
    found = [float(clear[part].mean()) for part in (near, far, wall)]
    expected = [float(np.exp(-density * np.minimum(depths, WALL)[part]).mean()) for part in (near, far, wall)]
    assert found[0] > found[1] > found[2]
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_flash_falls_off_with_the_square_of_the_distance(clean, scenes):
    power = CORRUPTIONS_3D["flash"][1][1]
    for depth, times in ((DISTANCE, 1), (4.0, DISTANCE**2 / 16), (np.inf, (DISTANCE / WALL) ** 2)):
        drawn = corrupt_3d(scene(*flat(100, depth)), "flash", 2, np.random.default_rng(0))
        assert (drawn == round(100 * (1 + power * times))).all()
    _, _, images, depths = clean
    drawn, dark = series(scenes, "flash")[2], (images > 20).all(axis=3) & (images < 100).all(axis=3)
    gains = [float((drawn[part & dark] / images[part & dark]).mean()) for part in thirds(depths)]
    assert gains[0] > gains[1] > gains[2] > 1.1
    assert (corrupt_3d(scene(*flat(200, 4.0)), "flash", 5, np.random.default_rng(0)) == 255).all()


def test_what_the_solid_hides_is_filled_from_around_it(clean):
    image, depth = flat((10, 200, 30))
    image[10:30, 12:36], depth[10:30, 12:36] = (250, 0, 0), 5.0
    image[9, 12:36] = (130, 100, 15)  # a grazed pixel shows both and belongs to the solid
    own = scene(image, depth)
    np.testing.assert_allclose(own.wall, np.broadcast_to(np.array([10, 200, 30]) / 255, own.wall.shape), atol=1e-6)
    assert own.solid.sum() == 22 * 26 and (own.depth[9:31, 11:37] == 5).all() and own.depth[0, 0] == WALL
    np.testing.assert_allclose(own.surface, 5, atol=1e-5)
    finite = clean[3][np.isfinite(clean[3])]
    assert finite.max() < WALL  # the wall is behind every solid


def test_sensors_do_what_their_names_say(clean, scenes):
    grey = scene(*flat(128))
    drawn = corrupt_3d(grey, "iso_noise", 4, np.random.default_rng(0)) / 255
    assert drawn.std() == pytest.approx(np.hypot(CORRUPTIONS_3D["iso_noise"][1][3], np.sqrt(0.5 / 120)), rel=0.05)
    for severity, bits in enumerate(CORRUPTIONS_3D["color_quant"][1], 1):
        drawn = corrupt_3d(scenes[0], "color_quant", severity, np.random.default_rng(0))
        assert 1 < len(np.unique(drawn)) <= 2**bits
    light = series(scenes, "low_light").mean(axis=(1, 2, 3, 4))
    assert (np.diff(light) < 0).all() and light[0] < clean[2].mean() and light[4] < 0.4 * clean[2].mean()


def test_coded_blocks_keep_the_image_or_their_bits(scenes):
    exact = _coefficients(scenes[0].image)
    np.testing.assert_allclose(_decoded(exact), scenes[0].image, atol=1e-6)
    assert exact.shape == (3, 36, 8, 8)
    grey = _coefficients(np.full((SIZE, SIZE, 3), 1.0))
    assert grey[0, :, 0, 0] == pytest.approx(8 * 127) and abs(grey[1:]).max() < 1e-9

    step = CORRUPTIONS_3D["h265_crf"][1][2]
    coded = CORRUPTIONS_3D["h265_crf"][0](scenes[0], step, None)
    assert abs(_coefficients(coded) - exact).max() <= step / 2 + 1e-6
    for own in scenes[:8]:
        exact, finest = _coefficients(own.image), _STEPS[0]
        most = _bits(np.rint(exact / finest))
        coded = _coefficients(CORRUPTIONS_3D["h265_abr"][0](own, 6, None))
        steps = [s for s in _STEPS if np.allclose(np.rint(exact / s) * s, coded, atol=1e-6)]
        assert len(steps) == 1 and _bits(np.rint(coded / steps[0])) <= most / 6
        finer = _STEPS[_STEPS.tolist().index(steps[0]) - 1]
        assert _bits(np.rint(exact / finer)) > most / 6


def test_a_bit_error_hits_blocks_and_runs_on_to_the_end_of_a_row(scenes):
    function, rates = CORRUPTIONS_3D["bit_error"]
    whole = function(scenes[0], 0, np.random.default_rng(0))
    assert abs(whole - scenes[0].image).max() < 0.2
    shares = []
    for rate in rates[::2]:
        hit = np.array([function(scenes[0], rate, np.random.default_rng(seed)) for seed in range(8)])
        blocks = abs(hit - whole).mean(axis=3).reshape(8, 6, 8, 6, 8).max(axis=(2, 4)) > 1e-6
        shares.append(float(blocks.mean()))
    assert 0 < shares[0] < shares[1] < shares[2]
    grey, rows = scene(*flat(90)), []
    for seed in range(60):
        drawn = function(grey, rates[0], np.random.default_rng(seed))
        means = drawn.mean(axis=2).reshape(6, 8, 6, 8).mean(axis=(1, 3))
        rows.append(abs(means - np.median(means)) > 1e-3)
    wrong = np.concatenate(rows)
    assert wrong[:, :-1].sum() > 20 and wrong[:, 1:][wrong[:, :-1]].mean() > 0.9
    assert wrong.mean() < 0.2


def test_files_agree_and_repeat(clean, tmp_path):
    index, geometry, images, _ = clean
    paths = tmp_path / "mini_3dcc.tar", tmp_path / "mini_3dcc.parquet"
    write(index, geometry, *paths, images=4, seed=2)
    digests = [sha256_file(path) for path in paths]
    write(index, geometry, *paths, images=4, seed=2)
    assert digests == [sha256_file(path) for path in paths]

    columns, source = read_parquet(paths[1]), read_parquet(index)
    assert list(columns) == ["image_id", "archive", "offset", "size", "label", "corruption", "severity"]
    assert len(set(columns["image_id"])) == len(columns["label"]) == 12 * 5 * 4
    assert columns["label"].dtype == columns["severity"].dtype == np.int32
    drawn = read_images(columns, paths[1])
    position = {image_id: row for row, image_id in enumerate(source["image_id"])}
    for row, image_id in enumerate(columns["image_id"]):
        name, severity, source_id = image_id.split("/", 2)
        assert (name, int(severity)) == (columns["corruption"][row], columns["severity"][row])
        assert columns["label"][row] == source["label"][position[source_id]]
        if severity == "1":
            likeness = [np.corrcoef(drawn[row].ravel(), image.ravel())[0, 1] for image in images]
            assert np.argmax(likeness) == position[source_id], image_id
    with tarfile.open(paths[0]) as tar:
        assert [member.name for member in tar] == [f"{image_id}.png" for image_id in columns["image_id"]]


def test_depth_is_that_of_the_image(clean, scenes, tmp_path):
    """An archive's images are what the scenes of the same rows give."""
    index, geometry, _, _ = clean
    paths = tmp_path / "c.tar", tmp_path / "c.parquet"
    write(index, geometry, *paths, images=5, seed=9, corruptions=["flash", "near_focus"])
    columns, source = read_parquet(paths[1]), read_parquet(index)
    assert list(dict.fromkeys(columns["corruption"])) == ["flash", "near_focus"]
    position = {image_id: row for row, image_id in enumerate(source["image_id"])}
    for drawn, image_id in zip(read_images(columns, paths[1]), columns["image_id"], strict=True):
        name, severity, source_id = image_id.split("/", 2)
        own = corrupt_3d(scenes[position[source_id]], name, int(severity), np.random.default_rng(0))
        np.testing.assert_array_equal(drawn, own)


def test_an_image_depends_on_its_id_and_the_seed_alone(clean, tmp_path):
    """In a larger selection it is the same; with another seed it is not. A seed picks what it picks for mini_c."""
    noisy = ["iso_noise", "xy_motion_blur"]

    def written(images, seed):
        index = tmp_path / "c.parquet"
        write(*clean[:2], tmp_path / "c.tar", index, images, seed, noisy)
        columns = read_parquet(index)
        return dict(zip(columns["image_id"], read_images(columns, index), strict=True))

    some, every, other = written(2, 1), written(6, 1), written(6, 2)
    assert set(some) < set(every)
    assert all((some[image_id] == every[image_id]).all() for image_id in some)
    shared = set(every) & set(other)
    assert shared and all((every[image_id] != other[image_id]).any() for image_id in shared)
    write_corrupted(clean[0], tmp_path / "c.tar", tmp_path / "c.parquet", 6, 1)
    sources = {image_id.split("/", 2)[2] for image_id in read_parquet(tmp_path / "c.parquet")["image_id"]}
    assert sources == {image_id.split("/", 2)[2] for image_id in every}


def test_what_does_not_fit_is_refused(clean, tmp_path):
    index, geometry, _, _ = clean
    paths = tmp_path / "c.tar", tmp_path / "c.parquet"
    with pytest.raises(InputError, match="no 3D corruption 'snow'; expected some of near_focus"):
        write(index, geometry, *paths, images=4, corruptions=["flash", "snow"])
    with pytest.raises(InputError, match=rf"{IMAGES} images, and {IMAGES + 1} are to be corrupted"):
        write(index, geometry, *paths, images=IMAGES + 1)
    other = tmp_path / "other.npz"
    for content in (None, b"not an archive", np.zeros((4, SIZE, SIZE), np.float16), np.zeros((IMAGES, 9, 9))):
        if isinstance(content, bytes):
            other.write_bytes(content)
        elif content is not None:
            np.savez(other, depth=content)
        with pytest.raises(InputError, match=r"other\.npz: .*(render the data set again|render both again)"):
            write(index, other, *paths, images=IMAGES)
    np.savez(other, mask=np.zeros(3))
    with pytest.raises(InputError, match="render the data set again"):
        write(index, other, *paths, images=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz"]
