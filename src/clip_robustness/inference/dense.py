"""Dense features of a frozen image tower, and matches between two images by them.

One feature a cell of the last map: a vision transformer's patch tokens of its last block, a convolutional network's
last stage. Nothing that pools or projects comes after them. The protocol is that of Probe3D (El Banani et al. 2024,
mbanani/probe3d): patch tokens before the final norm, and convolutional maps resized bilinearly to stride 16, although
the last stage of ResNet and ConvNeXt has stride 32.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.io import InputError
from clip_robustness.inference.load import ImageModel, summary

STRIDE = 16  # of convolutional maps, as Probe3D resizes them
COARSEST = 32  # pixels a cell of a convolutional network's last stage
CHUNK = 1 << 25  # similarities at a time: 128 MB of float32
SMALLEST_DISTANCE = 1e-9  # Probe3D's, so that two equal neighbours have a ratio


class Dense(NamedTuple):
    """A map of features. The cell in row i, column j has its centre at `origin` + (j + 1/2, i + 1/2) * `stride`."""

    features: Tensor  # float32 [h, w, d]
    stride: float  # pixels of the input
    native: float  # the same, of the tower's own map
    origin: tuple[float, float]  # (x, y) in pixels of the input, negative where the input was padded


def dense_features(
    model: ImageModel,
    pixels: np.ndarray,
    stride: int = STRIDE,
    norm: bool = False,
    normalise: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Dense:
    """Features of one image, uint8 [H, W, 3] of any size, by the model's own mean and standard deviation.

    Position embeddings are interpolated to the image's grid (bicubic, antialiased: the libraries' own way), and an
    image that is no multiple of the patch is padded on all sides by the mean colour, as Probe3D does.

    stride: of convolutional maps, which are resized bilinearly; 0 leaves them as they are. A transformer's is its
    patch size, always. norm: patch tokens after the tower's final norm (what its head reads) instead of before it.
    normalise: L2, a cell at a time. Errors: `InputError` for a tower without such a map, and for features that are
    not finite.
    """
    tower = _trunk(model.tower)
    patch = _patch_size(tower)
    images = (torch.tensor(pixels[None]).to(model.mean.device).permute(0, 3, 1, 2).float() - model.mean) / model.std
    height, width = pixels.shape[:2]
    multiple = patch or (COARSEST, COARSEST)
    down, across = -height % multiple[0], -width % multiple[1]
    top, left = down // 2, across // 2
    images = functional.pad(images, (left, across - left, top, down - top))
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        grid = _last_map(tower, images, norm).float()
        native = images.shape[2] / grid.shape[2]
        if stride and not patch and stride != native:
            size = [math.ceil(side / stride) for side in images.shape[2:]]
            grid = functional.interpolate(grid, size, mode="bilinear", align_corners=False)
        features = grid[0].permute(1, 2, 0).contiguous()
        if normalise:
            features = functional.normalize(features, dim=2)
    if not features.isfinite().all():
        raise InputError("dense features are not finite; try `precision: fp32`")
    return Dense(features, images.shape[2] / grid.shape[2], native, (0.0 - left, 0.0 - top))


def _trunk(tower: nn.Module) -> Any:
    """The tower itself, or the timm model inside one of open_clip's."""
    return getattr(tower, "trunk", tower)


def _patch_size(tower: Any) -> tuple[int, int] | None:
    """(height, width) of a vision transformer's patches; None for a network whose map gets coarser by stages."""
    if hasattr(tower, "class_embedding"):
        return tower.patch_size
    if hasattr(tower, "blocks") and hasattr(getattr(tower, "patch_embed", None), "patch_size"):
        return tower.patch_embed.patch_size
    return None


def _last_map(tower: Any, images: Tensor, norm: bool) -> Tensor:
    """float [1, d, h, w]"""
    try:
        if hasattr(tower, "class_embedding"):
            return _clip_tokens(tower, images, norm)
        if hasattr(tower, "attnpool"):  # open_clip's ModifiedResNet
            return tower.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][-1]
        if hasattr(tower, "dynamic_img_size"):
            from timm.layers import Format

            tower.dynamic_img_size, tower.patch_embed.strict_img_size = True, False
            tower.patch_embed.flatten, tower.patch_embed.output_fmt = False, Format.NHWC
            if hasattr(getattr(tower, "rope", None), "update_feat_shape"):  # EVA's, which is cached for one grid
                tower.rope.update_feat_shape(tower.patch_embed.dynamic_feat_size(images.shape[2:]))
        return tower.forward_intermediates(images, indices=1, norm=norm, intermediates_only=True)[-1]
    except Exception as error:  # whatever a library says of a tower that it cannot take apart or resize
        size = f"{images.shape[2]} x {images.shape[3]} px"
        if is_out_of_memory(error):
            raise InputError(f"out of {images.device.type} memory with one image of {size}") from None
        fault = f"no dense features of a {type(tower).__name__} at {size}: {summary(error)}"
        raise InputError(f"{fault} Leave the model out of the correspondence models") from error


def _clip_tokens(tower: Any, images: Tensor, norm: bool) -> Tensor:
    """Patch tokens of open_clip's VisionTransformer, whose own methods take one image size only."""
    patches = tower.conv1(images)
    rows, columns = patches.shape[2:]
    tokens = patches.flatten(2).transpose(1, 2)
    positions = tower.positional_embedding.to(tokens.dtype)
    own = positions[1:].T.unflatten(1, tower.grid_size)[None]
    if tuple(tower.grid_size) != (rows, columns):
        own = functional.interpolate(own.float(), (rows, columns), mode="bicubic", antialias=True).to(tokens.dtype)
    first = (tower.class_embedding.to(tokens.dtype) + positions[0]).expand(1, 1, -1)
    tokens = torch.cat([first, tokens + own.flatten(2).transpose(1, 2)], dim=1)
    tokens = tower.transformer(tower.ln_pre(tokens))
    if norm:
        tokens = tower.ln_post(tokens)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


def sample(dense: Dense, points: np.ndarray, mode: str = "bilinear") -> Tensor:
    """Features [n, d] at `points` [n, 2] (x, y in pixels of the input), interpolated by `mode`: bilinear or bicubic.

    A point nearer to the border than the first cell's centre takes that cell's feature.
    """
    rows, columns = dense.features.shape[:2]
    cells = (torch.as_tensor(points, dtype=torch.float64) - torch.tensor(dense.origin)) / dense.stride
    inside = (2 * cells / torch.tensor([columns, rows]) - 1).to(dense.features)
    grid = dense.features.permute(2, 0, 1)[None]
    found = functional.grid_sample(grid, inside[None, None], mode, padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def ratio_matches(queries: Tensor, gallery: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The `most` matches that are most distinct: rows of `queries` [n, d] and of `gallery` [m, d], best first.

    A query's match is its nearest neighbour by cosine. Matches are ranked by Lowe's ratio, the distance 1 - cosine of
    the nearest over that of the second nearest; ties keep the order of the queries. Memory: `CHUNK` similarities.
    """
    queries, gallery = (functional.normalize(features.float(), dim=1) for features in (queries, gallery))
    nearest = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    ratio = torch.empty(len(queries), device=queries.device)
    step = max(CHUNK // max(len(gallery), 1), 1)
    for start in range(0, len(queries), step):
        similar, found = (queries[start : start + step] @ gallery.T).topk(min(2, len(gallery)), dim=1)
        distance = (1 - similar).clamp(min=SMALLEST_DISTANCE)
        nearest[start : start + step] = found[:, 0]
        ratio[start : start + step] = distance[:, 0] / distance[:, -1]
    best = ratio.argsort(stable=True)[:most]
    return best.cpu().numpy(), nearest[best].cpu().numpy()
