"""The 15 corruptions of ImageNet-C at five severities, made for 48 pixels: names as there, code and strengths our own.

    write_corrupted(index, out_archive, out_index, images=96)

Types: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations",
arXiv 1903.12261, section 3.2. A strength that suits 224 pixels is another at 48, so severities are set anew here: from
barely visible to hard to read, such that each is further from the clean image than the one before.
What is random about an image is drawn once for all severities of a type, so that they differ by strength alone.
"""

import functools
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError, Progress, atomic, read_parquet, write_parquet
from clip_robustness.mini.camera import SIZE
from clip_robustness.mini.dataset import add_png, read_images

SEVERITIES = 5
_PAD = 12  # pixels mirrored at each side before a blur; no kernel reaches further
_AT = np.arange(SIZE, dtype=np.float32)
_MIDDLE = (SIZE - 1) / 2


def write_corrupted(index: Path, out_archive: Path, out_index: Path, images: int, seed: int = 0) -> None:
    """Corrupt `images` of the images of `index`, drawn with `seed`, by every type at every severity.

    Outputs: see `write_settings`. Errors: `InputError` when `index` has too few images.
    """
    rows, _ = choose(index, images, seed)
    clean = read_images(rows, index)

    def made(image: int, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
        return corrupt(clean[image], name, severity, rng)

    write_settings(rows, list(CORRUPTIONS), made, out_archive, out_index, seed)


def choose(index: Path, images: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of `images` rows of `index`, and their positions there, ascending; more images, the same among them."""
    rows = read_parquet(index, ["image_id", "archive", "offset", "size", "label"])
    count = len(rows["image_id"])
    if not 1 <= images <= count:
        raise InputError(f"{index}: {count} images, and {images} are to be corrupted; expected 1..{count}")
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:images])
    return {name: column[chosen] for name, column in rows.items()}, chosen


def write_settings(
    rows: Mapping[str, np.ndarray],
    names: Sequence[str],
    corrupted: Callable[[int, str, int, np.random.Generator], np.ndarray],
    out_archive: Path,
    out_index: Path,
    seed: int,
) -> None:
    """Write `corrupted(image, name, severity, rng)`, uint8 [48, 48, 3], of each row by each type at each severity.

    out_archive  uncompressed tar of PNGs, 48 x 48 RGB
    out_index    parquet: image_id ({corruption}/{severity}/{source id}), archive, offset, size, label, corruption,
                 severity (int32, 1..5); by type, then severity, then the order of `rows`
    A corrupted image depends on its id and the seed alone: `rng` is the same for all severities of a type.
    """
    images = len(rows["image_id"])
    kinds = [(name, severity) for name in names for severity in range(1, SEVERITIES + 1)]
    ids = [f"{name}/{severity}/{image_id}" for name, severity in kinds for image_id in rows["image_id"]]
    places: list[tuple[int, int]] = []
    progress = Progress(f"corrupt {out_index.stem}", len(ids))
    with atomic(out_archive) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, severity in kinds:
            for image, image_id in enumerate(rows["image_id"]):
                rng = np.random.default_rng(_number(seed, name, image_id))
                picture = corrupted(image, name, severity, rng)
                places.append(add_png(tar, f"{ids[len(places)]}.png", picture))
            progress.update(images)
    offsets, sizes = np.array(places, np.int64).T
    columns = {"image_id": ids, "archive": [str(out_archive)] * len(ids), "offset": offsets, "size": sizes}
    columns["label"] = np.tile(rows["label"], len(kinds))
    columns["corruption"] = np.repeat([name for name, _ in kinds], images)
    columns["severity"] = np.repeat(np.array([severity for _, severity in kinds], np.int32), images)
    write_parquet(out_index, columns)


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """One image, uint8 [48, 48, 3], by the type `name` at `severity` 1..5."""
    function, strengths = CORRUPTIONS[name]
    result = function(image.astype(np.float32) / 255, strengths[severity - 1], rng)
    return np.rint(np.clip(result, 0, 1) * 255).astype(np.uint8)


def _number(seed: int, name: str, image_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{image_id}".encode()).digest()[:16], "big")


# Convolution by FFT, on mirrored borders: matrix products would change in the last bit with the number of threads.


def _frequencies(kernel: np.ndarray) -> np.ndarray:
    """The transfer function of a kernel [k, k], k odd, whose sum becomes 1, on the padded image."""
    size, reach = SIZE + 2 * _PAD, len(kernel) // 2
    full = np.zeros((size, size), np.float32)
    full[: len(kernel), : len(kernel)] = kernel / kernel.sum()
    return np.fft.rfft2(np.roll(full, (-reach, -reach), (0, 1)))[:, :, None]


def convolve(image: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    """An image [48, 48, c] by a transfer function as `disc` gives it."""
    padded = np.pad(image, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="symmetric")
    spread = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, padded.shape[:2], axes=(0, 1))
    return spread[_PAD:-_PAD, _PAD:-_PAD].astype(np.float32)


@functools.cache
def _gaussian(sigma: float) -> np.ndarray:
    at = np.arange(-_PAD, _PAD + 1)
    weight = np.exp(-(at**2) / (2 * sigma**2))
    return _frequencies(weight[:, None] * weight)


@functools.cache
def disc(radius: float) -> np.ndarray:
    """The transfer function of defocus; radius in pixels."""
    at = np.arange(-_PAD, _PAD + 1)
    return _frequencies(np.clip(radius + 0.5 - np.hypot(at[:, None], at), 0, 1))


@functools.lru_cache(maxsize=1024)
def _line(length: float, degrees: int) -> np.ndarray:
    """A straight stroke through the middle."""
    at = np.arange(-_PAD, _PAD + 1)
    along = np.deg2rad(degrees)
    u = at * np.cos(along) + at[:, None] * np.sin(along)
    v = at[:, None] * np.cos(along) - at * np.sin(along)
    return _frequencies(np.clip(length / 2 + 0.5 - abs(u), 0, 1) * np.clip(1 - abs(v), 0, 1))


def sample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear values [..., c] of an image at places in pixels, which broadcast; the border's beyond the border."""
    rows, columns = (np.clip(at, 0, SIZE - 1.001) for at in (rows, columns))
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = ((at - whole).astype(np.float32)[..., None] for at, whole in ((rows, top), (columns, left)))
    flat, at = image.reshape(SIZE * SIZE, -1), top * SIZE + left
    upper = flat.take(at, axis=0) * (1 - right) + flat.take(at + 1, axis=0) * right
    lower = flat.take(at + SIZE, axis=0) * (1 - right) + flat.take(at + SIZE + 1, axis=0) * right
    return upper * (1 - down) + lower * down


def _cloud(rng: np.random.Generator, power: float) -> np.ndarray:
    """Noise [48, 48, 1] in 0..1 whose amplitude falls with that power of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)) * SIZE
    white = np.fft.rfft2(rng.standard_normal((SIZE, SIZE), np.float32))
    values = np.fft.irfft2(white / np.maximum(frequency, 1) ** power, (SIZE, SIZE))
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)[:, :, None]


# The types: an image [48, 48, 3] in 0..1, a strength, and what is random -> an image, yet to be clipped to 0..1.


def _gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + sigma * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    hit, white = rng.random((2, *image.shape), np.float32)
    return np.where(hit < share, white < 0.5, image)


def _defocus_blur(image: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    return convolve(image, disc(radius))


def _glass_blur(image: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Each pixel is taken from a place so far away in a random direction, and what comes of it is blurred."""
    distance, sigma = strength
    down, right = distance * rng.uniform(-1, 1, (2, SIZE, SIZE))
    rows, columns = (np.clip(np.rint(at), 0, SIZE - 1).astype(int) for at in (_AT[:, None] + down, _AT + right))
    return convolve(image[rows, columns], _gaussian(sigma))


def _motion_blur(image: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    return convolve(image, _line(length, int(rng.integers(180))))


def _zoom_blur(image: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    zooms = np.linspace(1, largest, 7)
    places = [(_AT - _MIDDLE) / zoom + _MIDDLE for zoom in zooms]
    return np.mean([sample(image, at[:, None], at) for at in places], axis=0)


def _snow(image: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Falling flakes, drawn out by the wind, before a paler scene; `strength`: share of flakes, paleness."""
    share, pale = strength
    flakes: np.ndarray = (rng.random((SIZE, SIZE, 1), np.float32) < share).astype(np.float32)
    flakes = 2.2 * convolve(flakes, _line(4.0, 60 + int(rng.integers(60))))
    grey = image.max(axis=2, keepdims=True) * 0.5 + 0.45
    return image * (1 - pale) + np.maximum(image, grey) * pale + flakes


def _frost(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Needles of ice in three directions, densest where a slow noise is high."""
    seeds = (rng.random((SIZE, SIZE, 1), np.float32) < 0.06).astype(np.float32)
    first = int(rng.integers(60))
    needles = np.max([convolve(seeds, _line(11.0, first + turn)) for turn in (0, 60, 120)], axis=0)
    ice = np.clip(0.35 * _cloud(rng, 1.6) + 3.5 * needles, 0, 1) * np.clip(2.4 * _cloud(rng, 2.0) - 0.5, 0, 1)
    return image * (1 - 0.5 * strength * ice) + strength * ice * np.array([0.68, 0.80, 0.92], np.float32)


def _fog(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    thick = strength * (0.55 + 0.45 * _cloud(rng, 1.5))
    return image * (1 - thick) + 0.82 * thick


def _brightness(image: np.ndarray, more: float, rng: np.random.Generator) -> np.ndarray:
    """The largest channel grows by `more`, the others in proportion: hue and saturation stay."""
    value = np.maximum(image.max(axis=2, keepdims=True), 0.02)
    return image * np.minimum(value + more, 1) / value


def _contrast(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean(axis=(0, 1))
    return mean + factor * (image - mean)


def _elastic_transform(image: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """Each place moves by a smooth field; `pixels` is its root mean square along each axis."""
    field = convolve(rng.standard_normal((SIZE, SIZE, 2), np.float32), _gaussian(3.5))
    field *= pixels / field.std()
    return sample(image, _AT[:, None] + field[:, :, 0], _AT + field[:, :, 1])


def _pixelate(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(np.rint(image * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)) / np.float32(255)


def _jpeg_compression(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer)) / np.float32(255)


CORRUPTIONS: dict[str, tuple[Callable[..., np.ndarray], Sequence]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.13, 0.20, 0.30)),  # standard deviation
    "shot_noise": (_shot_noise, (150, 60, 25, 12, 6)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.07, 0.13, 0.22)),  # share of values
    "defocus_blur": (_defocus_blur, (0.7, 1.1, 1.6, 2.3, 3.2)),  # radius, pixels
    "glass_blur": (_glass_blur, ((0.7, 0.4), (1.0, 0.5), (1.6, 0.6), (2.2, 0.7), (3.0, 0.8))),
    "motion_blur": (_motion_blur, (2.5, 4.0, 6.0, 8.5, 12.0)),  # length, pixels
    "zoom_blur": (_zoom_blur, (1.06, 1.12, 1.20, 1.32, 1.50)),  # largest factor
    "snow": (_snow, ((0.006, 0.05), (0.014, 0.1), (0.026, 0.16), (0.042, 0.24), (0.065, 0.34))),
    "frost": (_frost, (0.25, 0.45, 0.65, 0.85, 1.1)),  # opacity
    "fog": (_fog, (0.25, 0.42, 0.58, 0.72, 0.86)),  # share of the light that is the fog's
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.55)),
    "contrast": (_contrast, (0.65, 0.45, 0.3, 0.2, 0.12)),  # factor
    "elastic_transform": (_elastic_transform, (0.6, 1.1, 1.7, 2.4, 3.2)),  # pixels
    "pixelate": (_pixelate, (34, 26, 20, 15, 11)),  # pixels along a side
    "jpeg_compression": (_jpeg_compression, (45, 25, 15, 9, 5)),  # quality
}
