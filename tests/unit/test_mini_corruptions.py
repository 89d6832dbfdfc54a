"""The corruptions of the mini world: ordered by severity, reproducible image by image, found by their index."""

import tarfile

import numpy as np
import pytest
import torch

from clip_robustness.core.io import InputError, read_parquet, sha256_file
from clip_robustness.mini.camera import SIZE
from clip_robustness.mini.corruptions import CORRUPTIONS, SEVERITIES, corrupt, write_corrupted
from clip_robustness.mini.dataset import read_images, render_dataset

torch.set_num_threads(1)
# Hendrycks and Dietterich, arXiv 1903.12261, section 3.2
NAMES = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(index, images) of 36 photographs."""
    folder = tmp_path_factory.mktemp("clean")
    index = folder / "clean.parquet"
    render_dataset({"name": "clean", "images": 36, "seed": 3, "rho": 0.9}, folder / "clean.tar", index)
    return index, read_images(read_parquet(index), index)


def _series(images: np.ndarray, name: str) -> np.ndarray:
    """[5, n, 48, 48, 3], each image with a seed of its own."""
    rows = [
        [corrupt(image, name, severity, np.random.default_rng(i)) for i, image in enumerate(images)]
        for severity in range(1, SEVERITIES + 1)
    ]
    return np.array(rows)


def test_the_types_are_those_of_imagenet_c():
    assert set(CORRUPTIONS) == NAMES
    assert all(len(strengths) == SEVERITIES == 5 for _, strengths in CORRUPTIONS.values())


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_severity_orders_the_distance_from_the_clean_image(clean, name):
    drawn = _series(clean[1], name)
    assert drawn.dtype == np.uint8 and drawn.shape == (5, 36, SIZE, SIZE, 3)
    distance = np.sqrt(((drawn / 255 - clean[1] / 255) ** 2).mean(axis=(2, 3, 4)))
    mean = distance.mean(axis=1)
    assert 0.01 < mean[0] < 0.15 and (np.diff(mean) > 0).all() and mean[4] > 1.4 * mean[0]
    assert (np.diff(distance, axis=0) > 0).mean() > 0.9  # and nearly every image's own


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_leaves_its_input_alone_and_repeats(clean, name):
    image = clean[1][0].copy()
    first, again = (corrupt(image, name, 5, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, clean[1][0])


def _roughness(images: np.ndarray) -> np.ndarray:
    """Mean square of the differences between neighbours, an image each."""
    return (np.diff(images.astype(float), axis=1) ** 2).mean(axis=(1, 2, 3))


def test_types_do_what_their_names_say(clean):
    images = clean[1]
    for name in ("gaussian_noise", "shot_noise", "impulse_noise"):
        assert (_roughness(_series(images, name)[4]) > 2 * _roughness(images)).mean() > 0.8, name
    for name in ("defocus_blur", "motion_blur", "zoom_blur"):
        assert (_roughness(_series(images, name)[4]) < 0.6 * _roughness(images)).mean() > 0.9, name
    for name in ("snow", "frost", "fog", "brightness"):
        assert (_series(images, name)[4].mean(axis=(1, 2, 3)) > images.mean(axis=(1, 2, 3)) + 10).all(), name
    spread = _series(images, "contrast")[4].std(axis=(1, 2)) / images.std(axis=(1, 2))
    np.testing.assert_allclose(spread, 0.12, atol=0.04)


def test_a_flat_image_has_nothing_to_blur():
    flat = np.full((SIZE, SIZE, 3), (200, 100, 30), np.uint8)
    for name in (*BLURS, "elastic_transform", "contrast"):
        drawn = corrupt(flat, name, 5, np.random.default_rng(1)).astype(int)
        assert abs(drawn - flat).max() <= 1, name


def test_noise_has_the_strength_that_it_says():
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    drawn = corrupt(grey, "gaussian_noise", 3, np.random.default_rng(0)) / 255
    assert drawn.std() == pytest.approx(0.13, rel=0.05)
    drawn = corrupt(grey, "shot_noise", 2, np.random.default_rng(0)) / 255
    assert drawn.std() == pytest.approx(np.sqrt(128 / 255 / 60), rel=0.05)  # a Poisson variable's
    drawn = corrupt(grey, "impulse_noise", 5, np.random.default_rng(0))
    assert (drawn != 128).mean() == pytest.approx(0.22, abs=0.02) and set(np.unique(drawn)) == {0, 128, 255}


def test_pixels_become_blocks(clean):
    drawn = corrupt(clean[1][1], "pixelate", 5, np.random.default_rng(0))
    assert len(np.unique(drawn.reshape(-1, SIZE * 3), axis=0)) <= 11


def test_files_agree_and_repeat(clean, tmp_path):
    index, images = clean
    paths = tmp_path / "mini_c.tar", tmp_path / "mini_c.parquet"
    write_corrupted(index, *paths, images=4, seed=2)
    digests = [sha256_file(path) for path in paths]
    write_corrupted(index, *paths, images=4, seed=2)
    assert digests == [sha256_file(path) for path in paths]

    columns, source = read_parquet(paths[1]), read_parquet(index)
    assert list(columns) == ["image_id", "archive", "offset", "size", "label", "corruption", "severity"]
    assert len(set(columns["image_id"])) == len(columns["label"]) == 15 * 5 * 4
    assert columns["label"].dtype == columns["severity"].dtype == np.int32
    settings, counts = np.unique(columns["corruption"] + columns["severity"].astype(str), return_counts=True)
    assert len(settings) == 75 and set(counts) == {4}
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


def test_an_image_depends_on_its_id_and_the_seed_alone(clean, tmp_path):
    """In a larger selection it is the same; with another seed it is not."""

    def written(images: int, seed: int) -> dict[str, np.ndarray]:
        index = tmp_path / "c.parquet"
        write_corrupted(clean[0], tmp_path / "c.tar", index, images, seed)
        columns = read_parquet(index)
        return dict(zip(columns["image_id"], read_images(columns, index), strict=True))

    some, every, other = written(2, 1), written(6, 1), written(6, 2)
    shared = set(every) & set(other)
    assert set(some) < set(every)
    assert all((some[image_id] == every[image_id]).all() for image_id in some)
    noisy = [image_id for image_id in shared if image_id.startswith("gaussian_noise")]
    assert noisy and all((every[image_id] != other[image_id]).any() for image_id in noisy)


@pytest.mark.parametrize("images", [0, 37])
def test_too_many_or_no_images_are_refused(clean, tmp_path, images):
    with pytest.raises(InputError, match=rf"36 images, and {images} are to be corrupted"):
        write_corrupted(clean[0], tmp_path / "c.tar", tmp_path / "c.parquet", images)
    assert not list(tmp_path.iterdir())
