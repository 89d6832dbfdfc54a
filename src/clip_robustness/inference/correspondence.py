"""How well dense features find the same point in two images: the job `match_pairs`, by the protocol of Probe3D.

Source: El Banani et al. 2024, "Probing the 3D awareness of visual foundation models", and its code, mbanani/probe3d.

Objects (NAVI): an image, upright by its EXIF, is reduced to 512 px, cropped to the depth map's square box and enlarged
to 512 x 512 px; a partner within 120 degrees is drawn for every fourth image. Scenes (ScanNet-1500): frames of
480 x 640 px in given pairs. Both: every fourth pixel with depth has a feature, by interpolation, and its nearest
neighbour in the other image; of the 1,000 most distinct matches (`ratio_matches`), the error is the distance of the
two points, in centimetres in the second camera's frame (`cm`) and in pixels of its image (`px`). Keypoints
(SPair-71k): images of 800 x 800 px, padded white to squares; a keypoint's feature is compared with all cells of the
target, and the error is the distance of the best cell from the target's keypoint over the longer side of the object's
box (`box`).

Where Probe3D's code does something that changes numbers, a pair has a row under each convention:

    probe3d        as there: errors of scenes are in pixels of the grid of every fourth pixel, 120 x 160; a cell of a
                   keypoint's target stands for its upper left corner, and keypoints are looked up in between corners
    input_pixels   scenes: pixels of the frame itself, 480 x 640
    cell_centres   keypoints: a cell stands for its centre, and so it is looked up

Differences that remain: pairs are drawn by NumPy's generator, since Probe3D draws from unsorted listings of folders,
and what a patch of 14 px makes of an image is placed where it lies, where Probe3D stretches the padded image's map.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from clip_robustness.core import io, provenance
from clip_robustness.core.archive import load_index
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import alone
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference import views
from clip_robustness.inference.dense import STRIDE, Dense, dense_features, ratio_matches, sample
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import compute_dtype, device_of, load_image_model
from clip_robustness.inference.pairs import AGAIN, Pair, pairs_of

SHARD = 64  # pairs
KEPT = 16  # images whose features wait for another pair
NUMBERS = (
    "inference.load",
    "inference.images",
    "inference.correspondence",
    "inference.dense",
    "inference.views",
    "inference.pairs",
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is matched in which images, and what is counted. `scored` and `binned`: (kind of error, threshold)."""

    what: str  # objects, scenes or keypoints
    size: tuple[int, int]  # of the tower's input, (height, width)
    scored: tuple[tuple[str, float], ...]
    binned: tuple[str, float]  # the one that is also counted by viewpoint
    bins: tuple[float, ...] = ()  # degrees; none where viewpoint has classes
    step: int = 4
    matches: int = 1000
    seed: int = 8


PROTOCOLS = {  # by the family of the data set
    "navi": Protocol(
        "objects",
        (512, 512),
        (("cm", 1), ("cm", 2), ("cm", 5), ("px", 5), ("px", 25), ("px", 50)),
        ("cm", 2),
        (0, 30, 60, 90, 120),
    ),
    "scannet_pairs": Protocol(
        "scenes", (480, 640), (("px", 5), ("px", 10), ("px", 20)), ("px", 10), (0, 15, 30, 60, 180)
    ),
    "spair": Protocol("keypoints", (800, 800), (("box", 0.10),), ("box", 0.10), seed=20),
    # Depth maps of 48 x 48 px: 1 px of them is ScanNet's 10 of 480, and a twentieth of the grid are its 1,000 matches.
    "mini_pairs": Protocol(
        "scenes", (192, 192), (("px", 1), ("px", 2), ("px", 4)), ("px", 2), (0, 15, 30, 60, 180), step=1, matches=100
    ),
}


def match_pairs(
    model: str,
    library: str,
    preprocess: str,
    weights: Path,
    index: Path,
    family: str,
    out: Path,
    work: Path,
    stride: int = STRIDE,
    precision: str = "auto",
    *,
    norm: bool = False,
) -> None:
    """Match the pairs of `index` by the dense features of one model, and write the errors to `out` (.parquet).

    A row a pair and convention: `pair`, `first` and `second` (image ids), `cluster`, `viewpoint`, `overall`,
    `convention`, and the errors of the matches, lists of float32: `cm`, `px` or `box`; a pair without a point to
    match has an empty list. Beside it a manifest (.json) with the protocol. `stride` and `norm`: as of
    `dense_features`. Finished shards lie below `work`, as in `embed`.
    Errors: `InputError` for a family without a protocol, an index without its columns or with a pair of an image that
    it lacks, images and depth maps that cannot be decoded, and as of `load_image_model` and `dense_features`.
    """
    if family not in PROTOCOLS:
        raise InputError(f"{index}: no protocol for the family '{family}'; there are {', '.join(PROTOCOLS)}")
    protocol, spec = PROTOCOLS[family], Preprocessing.parse(preprocess)
    if spec.mean is None or spec.std is None:
        raise InputError(f"model '{model}': its preprocessing '{preprocess}' lacks normalize(…)")
    sealed, columns = io.check_sealed(weights), load_index(index)
    pairs = pairs_of(protocol.what, columns, protocol.seed, str(index))
    torch.set_float32_matmul_precision("highest")
    with lease() as leased:
        device = device_of(leased)
        dtype = compute_dtype(precision, device.type)
        identity = {
            **{"library": library, "weights": sealed["files"], "mean": spec.mean, "std": spec.std},
            **{"index": io.sha256_file(index), "protocol": dataclasses.asdict(protocol), "stride": stride},
            **{"norm": norm, "precision": str(dtype).removeprefix("torch."), "device": device.type},
            "code": provenance.code_hash(*NUMBERS, imports=False),
            "versions": provenance.versions(["torch", "open_clip_torch", "timm", "numpy", "pillow"]),
        }
        folder = work / io.digest(identity)[:32]
        with alone(folder):
            if (manifest := io.sealed(folder)) is None:
                if not (folder / "matches.parquet").is_file():
                    tower = load_image_model(weights, library, spec.mean, spec.std).to(device)
                    look = functools.partial(dense_features, tower, stride=stride, norm=norm, dtype=dtype)
                    matcher = Matcher(views.Members(columns, str(index)), protocol, look)
                    _match_shards(matcher, pairs, folder, f"{model} on {index.stem}")
                for shard in folder.glob("shard-*"):
                    shard.unlink()
                manifest = io.seal(folder, **identity, n=len(pairs))
    io.place(folder / "matches.parquet", out)
    io.write_json(out.with_suffix(".json"), {**manifest, "model": model, "dataset": index.stem})


def _match_shards(matcher: "Matcher", pairs: list[Pair], folder: Path, what: str) -> None:
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    progress, shards = io.Progress(what, len(pairs), "pairs"), []
    for start in range(0, len(pairs), SHARD):
        shards.append(folder / f"shard-{start:09d}.parquet")
        some = pairs[start : start + SHARD]
        if shards[-1].is_file():
            progress.skip(len(some))
            continue
        rows = []
        for pair in some:
            rows += matcher(pair)
            progress.update(1)
        io.write_parquet(shards[-1], pyarrow.Table.from_pylist(rows, _schema()))
    io.write_parquet(folder / "matches.parquet", pyarrow.concat_tables(map(io.read_table, shards)))


def _schema() -> Any:
    import pyarrow

    text, floats = pyarrow.string(), pyarrow.list_(pyarrow.float32())
    kinds = {"pair": pyarrow.int64(), "first": text, "second": text, "cluster": text, "viewpoint": pyarrow.float64()}
    kinds |= {"overall": pyarrow.bool_(), "convention": text, "cm": floats, "px": floats, "box": floats}
    return pyarrow.schema(kinds.items())


class Matcher:
    """Errors of a pair's matches. `look`: pixels -> `Dense`, with or without the argument `normalise`."""

    def __init__(self, members: views.Members, protocol: Protocol, look: Any):
        self.members, self.protocol, self.look = members, protocol, look
        self.seen = functools.lru_cache(KEPT)(self._seen)

    def __call__(self, pair: Pair) -> list[dict[str, Any]]:
        """The pair's rows of the table, one a convention."""
        (first, one), (second, two) = (self.seen(row) for row in pair.rows)
        if self.protocol.what == "keypoints":
            assert pair.keypoints is not None
            errors = keypoint_errors(one, two, self.protocol.size[0], (first, second), pair.keypoints)
        else:
            mode = "bicubic" if self.protocol.what == "objects" else "bilinear"
            points = (first.points, second.points)
            i, j = ratio_matches(sample(one, points[0], mode), sample(two, points[1], mode), self.protocol.matches)
            errors = self._conventions(*point_errors(first, second, i, j))
        names = [self.members.name(row) for row in pair.rows]
        facts = {"pair": pair.number, "first": names[0], "second": names[1], "cluster": pair.cluster}
        facts |= {"viewpoint": float(pair.viewpoint), "overall": pair.overall}
        return [{**facts, "convention": name + _stride_of(one), **values} for name, values in errors.items()]

    def _seen(self, row: int) -> tuple[Any, Dense]:
        size = self.protocol.size
        if self.protocol.what == "keypoints":
            pixels, side = views.keypoint_view(self.members, row, size)
            return side, self.look(pixels)
        read = views.object_view if self.protocol.what == "objects" else views.scene_view
        view = read(self.members, row, size, self.protocol.step)
        # Interpolated before they are normalised, as in Probe3D.
        return view, self.look(view.pixels, normalise=False)

    def _conventions(self, px: np.ndarray, cm: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        if self.protocol.what == "objects":
            return {"probe3d": {"px": px, "cm": cm}}
        finer = {"input_pixels": {"px": self.protocol.step * px}} if self.protocol.step > 1 else {}
        return {"probe3d": {"px": px}} | finer


def _stride_of(dense: Dense) -> str:
    """Such as ``-stride14``, or ``-stride32to16`` of a map that was resized."""
    return f"-stride{dense.native:g}" + (f"to{dense.stride:g}" if dense.stride != dense.native else "")


def point_errors(first: views.View, second: views.View, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the matches of points `i` of `first` with points `j` of `second`: pixels [n] and centimetres [n]."""
    move = np.linalg.inv(second.pose) @ first.pose
    moved = first.xyz[i] @ move[:3, :3].T + move[:3, 3]
    apart = _project(moved, second.camera) - _project(second.xyz[j], second.camera)
    return np.linalg.norm(apart, axis=1), 100 * np.linalg.norm(moved - second.xyz[j], axis=1)


def _project(xyz: np.ndarray, camera: np.ndarray) -> np.ndarray:
    ahead = xyz @ camera.T
    return ahead[:, :2] / np.maximum(ahead[:, 2:], 1e-9)  # what lies behind the camera lands far off


def keypoint_errors(
    one: Dense, two: Dense, size: int, sides: tuple[int, int], pair: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Errors of a pair's keypoints under both conventions, over the longer side of the target's box.

    one, two: L2-normalised features of the square images, of `size` px a side, and of `sides` px before that.
    """
    source, target = (np.array(pair[name], float) for name in ("src_kps", "trg_kps"))
    left, top, right, bottom = pair["trg_bndbox"]
    longest = max(right - left, bottom - top)
    if longest <= 0:
        raise InputError(f"pair {pair['number']}: the box {pair['trg_bndbox']} of its target is empty; {AGAIN}")
    rows, columns = two.features.shape[:2]
    corners = torch.as_tensor(2 * source / sides[0] - 1).to(one.features)[None, None]
    at_corners = functional.grid_sample(one.features.permute(2, 0, 1)[None], corners, align_corners=True)[0, :, 0].T
    at_centres = sample(one, source / sides[0] * size)
    found = {}
    for name, queries in (("probe3d", at_corners), ("cell_centres", at_centres)):
        best = (queries @ two.features.flatten(0, 1).T).argmax(dim=1).cpu().numpy()
        cells = np.stack([best % columns, best // columns], axis=1)
        if name == "probe3d":
            place = cells / [columns, rows]
        else:
            place = (np.array(two.origin) + (cells + 0.5) * two.stride) / size
        found[name] = {"box": np.linalg.norm(place * sides[1] - target, axis=1) / longest}
    return found
