"""Near-duplicates of a data set's images, planted: what a search for overlap must find, with the truth known.

A copy differs from its source by one transform, of a strength drawn for it:

    downscale   to 0.5 to 0.75 of width and height         upscale      to 1.5 to 2 times
    recompress  as a JPEG of quality 30 to 60              crop         to 80 to 95 % of the area, at any place
    mirror      left to right                              brightness   times 0.6 to 0.8 or 1.2 to 1.4
    colour      red, green and blue times 0.75 to 1.25 each
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.archive import load_index
from clip_robustness.core.io import InputError
from clip_robustness.data.adapters.copies import COLUMNS, TABLE
from clip_robustness.data.pictures import as_csv, change_images, encode, generator, write_tar

if TYPE_CHECKING:
    from PIL.Image import Image

Generator = np.random.Generator
QUALITY = (30, 60)
AREA = (0.8, 0.95)


def write_copies(
    index: Path,
    out: Path,
    seed: int,
    share: float | None = None,
    number: int | None = None,
    transforms: Sequence[str] | None = None,
    workers: int = 1,
) -> int:
    """Write copies of a seeded choice of the images of `index`, one of each; return their number.

    `share` of the images (rounded, at least one), or `number` of them; with neither, all. `transforms` (all, if not
    given) come in turn, so that each makes as many copies, to one.

    `out` is an uncompressed tar of ``{n:05d}-{transform}.png`` (``.jpg`` of recompress) and ``copies.csv``, which
    `adapters.copies` reads. Choice, transform and strength follow from the seed and the images' ids, not from the order
    of the index. Errors: `InputError` for more copies than images, an unknown transform, a damaged image.
    """
    images = load_index(index)
    kinds = list(TRANSFORMS if transforms is None else transforms)
    if unknown := [kind for kind in kinds if kind not in TRANSFORMS] or ["none"] * (not kinds):
        raise InputError(f"transforms: '{unknown[0]}' is not one of {', '.join(TRANSFORMS)}")
    rows = _choose(images["image_id"], share, number, seed, index)
    kind_of = {row: kinds[turn % len(kinds)] for turn, row in enumerate(rows)}

    def change(row: int, image: "Image") -> bytes:
        kind = kind_of[row]
        rng = generator(seed, kind, images["image_id"][row])
        quality = int(rng.integers(QUALITY[0], QUALITY[1] + 1)) if kind == "recompress" else 95
        return encode(TRANSFORMS[kind](image, rng), _suffix(kind), quality)

    def files() -> Iterator[tuple[str, bytes]]:
        table: list[tuple[Any, ...]] = []
        contents = change_images(images, rows, change, workers, io.Progress("copy", len(rows)))
        for turn, (row, content) in enumerate(zip(rows, contents, strict=True)):
            kind = kind_of[row]
            name = f"{turn:05d}-{kind}.{_suffix(kind)}"
            table.append((name, images["image_id"][row], kind, int(images["label"][row])))
            yield name, content
        yield TABLE, as_csv(COLUMNS, table)

    write_tar(out, files())
    return len(rows)


def _choose(image_ids: np.ndarray, share: float | None, number: int | None, seed: int, index: Path) -> list[int]:
    """Rows in an order that only the seed and the ids decide; a larger share holds the smaller one."""
    if share is not None and number is not None:
        raise InputError("copies: both 'share' and 'number' are given, expected one of them")
    count = len(image_ids) if share is None else max(round(share * len(image_ids)), 1)
    count = count if number is None else number
    if not 0 < count <= len(image_ids):
        raise InputError(f"{index}: {count:,} copies of {len(image_ids):,} images; expected 1 to {len(image_ids):,}")
    order = sorted(range(len(image_ids)), key=lambda row: io.digest(seed, image_ids[row]))
    return order[:count]


def _suffix(kind: str) -> str:
    return "jpg" if kind == "recompress" else "png"


def _resize(image: "Image", factor: float) -> "Image":
    from PIL import Image

    width, height = (max(round(side * factor), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _downscale(image: "Image", rng: Generator) -> "Image":
    return _resize(image, rng.uniform(0.5, 0.75))


def _upscale(image: "Image", rng: Generator) -> "Image":
    return _resize(image, rng.uniform(1.5, 2.0))


def _same(image: "Image", rng: Generator) -> "Image":
    return image


def _crop(image: "Image", rng: Generator) -> "Image":
    # Rounded upwards, so that the area of a small image does not fall below its share.
    side = float(np.sqrt(rng.uniform(*AREA)))
    width, height = (int(np.ceil(length * side)) for length in image.size)
    left, top = (int(rng.integers(0, spare + 1)) for spare in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def _mirror(image: "Image", rng: Generator) -> "Image":
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _gain(image: "Image", gains: Sequence[float]) -> "Image":
    return image.point([min(round(value * gain), 255) for gain in gains for value in range(256)])


def _brightness(image: "Image", rng: Generator) -> "Image":
    darker, brighter = rng.uniform(0.6, 0.8), rng.uniform(1.2, 1.4)
    return _gain(image, [darker if rng.random() < 0.5 else brighter] * 3)


def _colour(image: "Image", rng: Generator) -> "Image":
    return _gain(image, rng.uniform(0.75, 1.25, 3).tolist())


TRANSFORMS: Mapping[str, Callable[["Image", Generator], "Image"]] = {
    "downscale": _downscale,
    "upscale": _upscale,
    "recompress": _same,
    "crop": _crop,
    "mirror": _mirror,
    "brightness": _brightness,
    "colour": _colour,
}
