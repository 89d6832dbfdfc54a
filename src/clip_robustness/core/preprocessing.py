"""Preprocessing as a readable string: what happens to an image between decoding and the model.

    resize(224,bicubic)|center_crop(224)|normalize(openai)

Operations, each at most once and in this order:

    border_crop(2)            cut 2 px off each side of the decoded image (ObjectNet's red frame)
    resize(224,bicubic)       shorter side to 224 px, aspect ratio kept
    resize(256x320,bicubic)   exactly 256 px high and 320 px wide ("squash")
    center_crop(224)          the middle 224 x 224 px, or HxW; black is added where the image is smaller
    normalize(MEAN;STD)       three numbers each, or one of the names openai, imagenet, inception

All but `normalize` is the pixel spec, the key of the uint8 pixel cache: models that differ in mean and
standard deviation only share one cache. The meaning of each operation is torchvision's (PIL back end).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable

from clip_robustness.core.io import InputError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
OPERATIONS = ("border_crop", "resize", "center_crop", "normalize")

Triple = tuple[float, float, float]

# Mean and standard deviation of RGB in 0..1: OpenAI CLIP's, torchvision's ImageNet ones, and Inception's.
STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """A parsed spec. Sizes are (height, width) in pixels; `shorter_side` and `squash` exclude each other."""

    border: int = 0
    shorter_side: int | None = None
    squash: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    crop: tuple[int, int] | None = None
    mean: Triple | None = None
    std: Triple | None = None

    @classmethod
    def parse(cls, text: str) -> "Preprocessing":
        """Read a spec. Errors: `InputError` with the column, what was expected, and the nearest name."""
        fields: dict[str, object] = {}
        last = -1
        column = 1
        for part in text.split("|"):
            where = f"preprocessing '{text}', column {column + len(part) - len(part.lstrip())}"
            match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", part)
            if not match:
                expected = f"expected operation(arguments), the operation one of {', '.join(OPERATIONS)}"
                raise InputError(f"{where}: {expected}; found '{part.strip()}'")
            name, arguments = match.groups()
            if name not in OPERATIONS:
                raise InputError(f"{where}: {_unknown(name, OPERATIONS, 'operation')}")
            if OPERATIONS.index(name) <= last:
                raise InputError(f"{where}: {name} is out of place; the order is {' | '.join(OPERATIONS)}")
            last = OPERATIONS.index(name)
            fields |= _READERS[name](arguments, f"preprocessing '{text}', column {column + match.start(2)}")
            column += len(part) + 1
        spec = cls(**fields)  # type: ignore[arg-type]
        if spec.crop is None and spec.squash is None:
            remedy = "end with center_crop(N), or resize to an exact HxW"
            raise InputError(f"preprocessing '{text}': images of different shapes would come out; {remedy}")
        return spec

    def __str__(self) -> str:
        normalize = []
        if self.mean is not None and self.std is not None:
            names = [name for name, pair in STATISTICS.items() if pair == (self.mean, self.std)]
            numbers = ";".join(",".join(map(repr, triple)) for triple in (self.mean, self.std))
            normalize = [f"normalize({names[0] if names else numbers})"]
        return "|".join([*self._pixel_operations(), *normalize])

    @property
    def pixel_spec(self) -> str:
        """Everything but `normalize`: what decides the uint8 pixels."""
        return "|".join(self._pixel_operations())

    @property
    def key(self) -> str:
        """The pixel spec as a file name, e.g. ``resize224-bicubic_crop224``."""
        short = self.pixel_spec.replace("border_crop", "border").replace("center_crop", "crop")
        return short.replace("(", "").replace(")", "").replace(",", "-").replace("|", "_")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        size = self.crop or self.squash
        assert size is not None, "parse() lets no spec of unknown size through"
        return size

    @property
    def of_cropped(self) -> "Preprocessing":
        """For images that were cropped when they were made, such as ImageNet-C: resized to the size, none cut again."""
        return dataclasses.replace(self, shorter_side=None, squash=self.size, crop=None)

    def _pixel_operations(self) -> list[str]:
        operations = [f"border_crop({self.border})"] if self.border else []
        if self.shorter_side is not None:
            operations.append(f"resize({self.shorter_side},{self.interpolation})")
        if self.squash is not None:
            operations.append(f"resize({self.squash[0]}x{self.squash[1]},{self.interpolation})")
        if self.crop is not None:
            height, width = self.crop
            operations.append(f"center_crop({height if height == width else f'{height}x{width}'})")
        return operations


def _read_border(text: str, where: str) -> dict[str, object]:
    return {"border": _size(text, where, "a number of pixels")[0]}


def _read_resize(text: str, where: str) -> dict[str, object]:
    size, comma, interpolation = (part.strip() for part in text.partition(","))
    if not comma:
        raise InputError(f"{where}: expected SIZE,INTERPOLATION such as 224,bicubic; found '{text}'")
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"{where}: {_unknown(interpolation, INTERPOLATIONS, 'interpolation')}")
    sides = _size(size, where, "N (shorter side) or HxW (exactly)", may_be_pair=True)
    resized: dict[str, object] = {"shorter_side": sides[0]} if len(sides) == 1 else {"squash": sides}
    return resized | {"interpolation": interpolation}


def _read_crop(text: str, where: str) -> dict[str, object]:
    sides = _size(text, where, "N or HxW", may_be_pair=True)
    return {"crop": (sides[0], sides[-1])}


def _read_normalize(text: str, where: str) -> dict[str, object]:
    text = text.strip()
    if text in STATISTICS:
        return {"mean": STATISTICS[text][0], "std": STATISTICS[text][1]}
    if re.fullmatch(r"[A-Za-z_]\w*", text):
        raise InputError(f"{where}: {_unknown(text, STATISTICS, 'pair of mean and standard deviation')}")
    try:
        mean, std = (tuple(float(number) for number in half.split(",")) for half in text.split(";"))
    except ValueError:
        mean = std = ()
    usable = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
    if not usable:
        expected = "expected three means; three positive standard deviations, such as 0.5,0.5,0.5;0.5,0.5,0.5"
        raise InputError(f"{where}: {expected}, or one of {', '.join(STATISTICS)}; found '{text}'")
    return {"mean": mean, "std": std}


_READERS = {
    "border_crop": _read_border,
    "resize": _read_resize,
    "center_crop": _read_crop,
    "normalize": _read_normalize,
}


def _size(text: str, where: str, expected: str, may_be_pair: bool = False) -> tuple[int, ...]:
    pattern = r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?" if may_be_pair else r"[1-9][0-9]{0,4}"
    if not re.fullmatch(pattern, text.strip(), re.ASCII):
        raise InputError(f"{where}: expected {expected}, of 1 to 99999 pixels; found '{text.strip()}'")
    return tuple(int(side) for side in text.split("x"))


def _unknown(name: str, valid: Iterable[str], what: str) -> str:
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown {what} '{name}', expected {', '.join(names)}{hint}"
