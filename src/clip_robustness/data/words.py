"""Typographic attacks: the name of a wrong class printed on images (Goh et al. 2021; ImageNet-T of arXiv 2403.10499).

RoZ (github.com/wang-research-lab/roz, commit 6b4b7ff) prints in white at random places of the original image:

* ImageNet-T: 8 times, with OpenCV's FONT_HERSHEY_DUPLEX at scale 0.8, whose capitals are 16.8 px and a stroke high.
  Pillow's own font has capitals of 18 px at size 25, and is a little narrower.
* CIFAR-10-T: 4 times, in 20 points Times New Roman on a figure of matplotlib that shows the image at 554 px, with
  its axes and margins. Here the image is enlarged to 224 px, as CLIP's preprocessing does it (bicubic), so that it
  differs from the unprinted one by the words alone; the size 17 is as large beside the image as RoZ's.

RoZ fixed no seed and recorded the targets, not the places: the targets are RoZ's, the places are ours.
"""

import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.archive import load_index
from clip_robustness.core.io import InputError
from clip_robustness.data.adapters.class_folders import folder_labels
from clip_robustness.data.adapters.typographic import TARGETS
from clip_robustness.data.containers import is_image
from clip_robustness.data.pictures import as_csv, as_stored, change_images, encode, generator, write_tar
from clip_robustness.data.targets import Target, read_record

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

WHITE = (255, 255, 255)
SMALLEST = 4  # px: below, no letter has a shape
PLAIN = re.compile(r"[\w][\w -]*")


class Printed(NamedTuple):
    """An image with its words; `content` is None when the word has no room on it."""

    row: int
    target: Target
    content: bytes | None
    size: tuple[int, int]


def draw_words(
    index: Path,
    labels: Path,
    out: Path,
    copies: int,
    size: float,
    seed: int,
    targets: Path | None = None,
    words: str = "any",
    enlarge: int = 0,
    format: str = "png",
    quality: int = 95,
    workers: int = 1,
) -> int:
    """Print a wrong class's name `copies` times in white on the images of `index`; return the number of images.

    `labels` is their label space. `size` is the font's: pixels, or below 1 a share of the shorter side. `targets` is a
    record of the printed classes and their words (see `read_record`); images that it does not name are left out.
    Without it the class is drawn evenly from the wrong ones whose name has room on the image, and with `words`
    "single" is one word; the word is the label space's name of the class. Images whose shorter side is below
    `enlarge` px are enlarged to it first. Places are drawn evenly from those that lie wholly on the image; words may
    cross. An image without room for its word is dropped, and the log names it.

    `out` is an uncompressed tar of ``{class}/{image}.{format}`` and ``targets.csv``: `adapters.typographic` reads it.
    Targets and places follow from the seed and the image's id; the bytes also from the versions of Pillow and its
    libraries. Errors: `InputError` for an image without a label, a record that does not fit, a name that the font
    cannot print, an image that cannot be decoded, and when no image is left.
    """
    images, space = load_index(index), io.read_json(labels)
    names = _names(images, space, index, labels)
    if targets is None:
        recorded, chosen = None, [name for name in names if words == "any" or not set(name) & set(" ,")]
    else:
        recorded = read_record(targets, images["image_id"], space)
        chosen = [target.word for target in recorded.values()]
    check_printable(chosen, labels if targets is None else targets)
    rows = [row for row in as_stored(images) if recorded is None or images["image_id"][row] in recorded]
    folders = _folders(space)

    def change(row: int, image: "Image") -> Printed:
        image_id, label = images["image_id"][row], int(images["label"][row])
        image, rng = _enlarged(image, enlarge), generator(seed, image_id)
        pixels = max(round(size * min(image.size)), SMALLEST) if size < 1 else int(size)
        if recorded is None:
            target = draw_target(names, names[label], chosen, image.size, pixels, rng)
        else:
            target = recorded[image_id]
            if target.label == label:
                fault = f"the image '{image_id}' has its true class '{names[label]}' as target"
                raise InputError(f"{targets}: {fault}; this record belongs to other images than {index}")
        room = bool(target.word) and print_word(image, target.word, copies, pixels, rng)
        return Printed(row, target, encode(image, format, quality) if room else None, image.size)

    dropped: list[Printed] = []

    def files() -> Iterator[tuple[str, bytes]]:
        table: dict[str, tuple[str, str]] = {}
        progress = io.Progress("print words", len(rows))
        for printed in change_images(images, rows, change, workers, progress):
            if printed.content is None:
                dropped.append(printed)
                continue
            image_id = images["image_id"][printed.row]
            name = f"{folders[images['label'][printed.row]]}/{_file(image_id)}.{format}"
            if name in table:
                raise InputError(f"{index}: '{image_id}' and '{table[name][1]}' would both be '{name}'; rename one")
            table[name] = (folders[printed.target.label], image_id)
            yield name, printed.content
        if not table:
            remedy = "take a smaller 'size', or 'enlarge' the images"
            raise InputError(f"{index}: no image of {len(rows):,} has room for its word; {remedy}")
        yield TARGETS, as_csv(("image", "target", "source"), ((name, *rest) for name, rest in table.items()))

    write_tar(out, files())
    _report(images["image_id"], rows, dropped, targets)
    return len(rows) - len(dropped)


def draw_target(
    names: Sequence[str],
    true: str,
    chosen: Sequence[str],
    size: tuple[int, int],
    pixels: int,
    rng: np.random.Generator,
) -> Target:
    """A class of `chosen` that is not the `true` one and has room on the image; the word "" when there is none."""
    for word in (chosen[i] for i in rng.permutation(len(chosen))):
        if word != true and _has_room(stamp(word, pixels), size):
            return Target(names.index(word), word)
    return Target(-1, "")


def print_word(image: "Image", word: str, copies: int, pixels: int, rng: np.random.Generator) -> bool:
    """Print a word at random places that lie wholly on the image; False, and nothing printed, without room."""
    mask = stamp(word, pixels)
    if not _has_room(mask, image.size):
        return False
    for x, y in places(image.size, mask.size, copies, rng):
        image.paste(WHITE, (x, y), mask)
    return True


def places(
    image: tuple[int, int], word: tuple[int, int], copies: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """The upper left corners (x, y) of `copies` words of a size (width, height) on an image of a size."""
    corners = (rng.integers(0, (image[0] - word[0] + 1, image[1] - word[1] + 1)) for _ in range(copies))
    return [(int(x), int(y)) for x, y in corners]


@functools.lru_cache(8192)
def stamp(word: str, pixels: int) -> "Image":
    """How much white a word puts on each pixel, 0..255, cut to its ink, in Pillow's own font of that size.

    Strokes thinner than a pixel, those of sizes below 12 or so, are made white too where they are whitest.
    """
    from PIL import Image, ImageDraw

    font = _font(pixels)
    mask = Image.new("L", (int(font.getlength(word)) + 2 * pixels, 3 * pixels))
    ImageDraw.Draw(mask).text((pixels, pixels), word, 255, font)
    whitest = int(np.asarray(mask).max())
    return mask.crop(mask.getbbox()).point([min(round(value * 255 / whitest), 255) for value in range(256)])


@functools.cache
def _font(pixels: int) -> "FreeTypeFont":
    from PIL import ImageFont

    font = ImageFont.load_default(pixels)
    assert isinstance(font, ImageFont.FreeTypeFont)
    # The basic layout is there in every build of Pillow; Raqm's would move letters where it is installed.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _has_room(mask: "Image", size: tuple[int, int]) -> bool:
    return mask.width <= size[0] and mask.height <= size[1]


def _enlarged(image: "Image", side: int) -> "Image":
    from PIL import Image

    short = min(image.size)
    if short >= side:
        return image
    width, height = (round(length * side / short) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def check_printable(words: Sequence[str], where: Path) -> None:
    """Errors: `InputError` for no word at all, and for one with characters that Pillow's own font does not have."""
    if not words:
        raise InputError(f"{where}: no class whose name is a single word; leave 'words' out")
    for word in words:
        if not word.strip() or not (word.isascii() and word.isprintable()):
            raise InputError(f"{where}: the font cannot print {word!r}; expected a name in plain ASCII letters")


def _names(
    images: Mapping[str, np.ndarray], space: Mapping[str, Sequence[str]], index: Path, labels: Path
) -> list[str]:
    names = list(space["classes"])
    for row in np.flatnonzero((images["label"] < 0) | (images["label"] >= len(names)))[:1]:
        fault = f"the image '{images['image_id'][row]}' has the label {images['label'][row]}"
        raise InputError(f"{index}: {fault}, expected 0..{len(names) - 1} of {labels}; give its own label space")
    return names


def _folders(space: Mapping[str, Any]) -> list[str]:
    """A folder's name for each class: of those that stand for it, its WordNet id, else its name, else its index."""
    standing: list[list[str]] = [[] for _ in space["classes"]]
    for key, label in folder_labels(space).items():
        if PLAIN.fullmatch(key):
            standing[label].append(key)
    names = space["classes"]
    given = space.get("wnids") or [None] * len(names)
    folders = []
    for keys, name, wnid in zip(standing, names, given, strict=True):
        usable = [key for key in (wnid, name) if key in keys] + keys
        if not usable:
            raise InputError(f"label space '{space.get('name', '?')}': no name or index is the class '{name}' alone")
        folders.append(usable[0])
    return folders


def _file(image_id: str) -> str:
    """A file's name, without ending, that says which image it was."""
    return (image_id.rpartition(".")[0] if is_image(image_id) else image_id).replace("/", "-")


def _report(image_ids: np.ndarray, rows: Sequence[int], dropped: Sequence[Printed], targets: Path | None) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if targets is not None and len(rows) < len(image_ids):
        say(f"{len(image_ids) - len(rows):,} of {len(image_ids):,} images are not in {targets}: left out")
    say(f"{len(dropped):,} of {len(rows):,} images dropped: no room for the word")
    for image in dropped:
        word = f"'{image.target.word}'" if image.target.word else "any wrong class"
        say(f"  {image_ids[image.row]}: {image.size[0]} x {image.size[1]} px, {word}")
