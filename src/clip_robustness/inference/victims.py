"""A model under attack as one function: logits from pixels in [0, 1], normalisation and zero-shot head inside."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clip_robustness.core.features import read_head
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import STATISTICS, Preprocessing
from clip_robustness.inference.load import load_image_model

SPACES = {"pixel": (0.0, 1.0), "normalized": (-1.8, 2.15)}  # of points, and their boxes


class Victim:
    """Pixels in [0, 1], float [n, 3, h, w], to logits [n, classes] of a label space; gradients flow through it.

    model: `library`, `preprocess`, `weights` and `head` (None for a classifier). Pixels of another size than the
    model's are resized first (bilinear, antialiased). Errors: `InputError` for a CLIP without a head, a classifier with
    one, and a number of classes that is not the label space's.
    """

    def __init__(self, model: Mapping[str, Any], members: Sequence[Sequence[int]], device: torch.device):
        weights, head, spec = Path(model["weights"]), model["head"], Preprocessing.parse(model["preprocess"])
        if spec.mean is None or spec.std is None:
            raise InputError(f"{weights}: its preprocessing '{spec}' lacks normalize(…)")
        self.size = spec.size
        self.model = load_image_model(weights, model["library"], spec.mean, spec.std).to(device).requires_grad_(False)
        if (self.model.kind == "features") != (head is not None):
            fault = (
                "answers with features and needs a head" if head is None else "answers with logits and takes no head"
            )
            raise InputError(f"{weights}: this model {fault}")
        self.head = None if head is None else _read_head(Path(head), device)
        self.members = None
        with torch.no_grad():
            try:
                classes = self(torch.zeros(1, 3, *self.size, device=device)).shape[1]
            except (RuntimeError, AssertionError) as error:  # timm asserts the size
                raise InputError(f"{head or weights}: does not fit the model or its preprocessing ({error})") from None
        if all(list(member) == [i] for i, member in enumerate(members)):
            fits = classes == len(members)
        else:
            fits = classes > max(map(max, members))
            # Rows of one length: a class that is named twice does not change its maximum.
            longest = max(map(len, members))
            rows = [[*member, *[member[0]] * (longest - len(member))] for member in members]
            self.members = torch.tensor(rows, device=device)
        if not fits:
            needs = f"the label space has {len(members)} of up to {1 + max(map(max, members))}"
            raise InputError(f"{head or weights}: {classes} classes, and {needs}")

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.shape[2:] != self.size:
            pixels = functional.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        logits = self.model.encode(pixels * 255)
        if self.head is not None:
            weight, scale, bias = self.head
            logits = scale * logits @ weight.T + bias
        return logits if self.members is None else logits[:, self.members].amax(2)


def _read_head(path: Path, device: torch.device) -> tuple[Tensor, float, float]:
    head = read_head(path)
    return torch.from_numpy(head["weight"]).to(device), float(head["scale"]), float(head["bias"])


def to_space(pixels: Tensor, space: str) -> Tensor:
    """Pixels in [0, 1] to points of the space: themselves, or normalised as CLIP's are.

    CLIP's normalisation whatever the model's own, so that a budget is the same for all models.
    """
    if space == "pixel":
        return pixels
    mean, std = _normalisation(pixels.device)
    return (pixels - mean) / std


def in_space(victim: Callable[[Tensor], Tensor], space: str) -> Callable[[Tensor], Tensor]:
    """The victim as a function of points of the space."""
    if space == "pixel":
        return victim

    def logits(points: Tensor) -> Tensor:
        mean, std = _normalisation(points.device)
        return victim(points * std + mean)

    return logits


def _normalisation(device: torch.device) -> list[Tensor]:
    return [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in STATISTICS["openai"]]
