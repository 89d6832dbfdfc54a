"""Pairs of views of the same solid with its depth and the camera's pose: true correspondences, in ScanNet's schema.

The second view is the first from another side: the solid's yaw and elevation change, and nothing else does.
"""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError, Progress, atomic, write_parquet
from clip_robustness.mini.dataset import add_png
from clip_robustness.mini.world import sample_scenes

TURNS = ((3, 15), (15, 30), (30, 60), (60, 90))  # degrees of yaw between two views; each range equally often
TILT = 8.0  # degrees of elevation, at most
TO_OPENCV = np.diag([1.0, -1.0, -1.0])  # the renderer looks along -z with y up; ScanNet's cameras along z, y down
LONGEST = 65.535  # world units that 16 bits of thousandths hold


def render_pairs(world: Mapping[str, Any], archive: Path, index: Path) -> None:
    """Render two views of every scene of a world (see `world`) into `archive`, and describe them in `index`.

    archive  uncompressed tar of {name}/{00000}/{0, 1}.png, 48 x 48 RGB, and .depth.png, 16-bit thousandths of a world
             unit along the optical axis, 0 off the solid
    index    parquet with two rows a scene, label -1, and the columns of the adapter of ScanNet: `scene`, `frame`,
             `pose` (JSON 4 x 4, camera to world, the solid's own frame; x right, y down, z ahead), `intrinsics`
             (JSON 3 x 3, pixels), `pairs` and where the depth lies (`depth_archive`, ...)

    The same world gives the same bytes. Errors: `InputError` for a world that does not hold, or with clutter, which
    would not turn with the solid.
    """
    import torch

    from clip_robustness.mini.render import render

    torch.set_num_threads(1)
    scenes = sample_scenes(world)
    n = len(scenes["label"])
    if world.get("clutter", "none") != "none" or (scenes["objects"] != 1).any():
        raise InputError(f"world of {world['name']}: a pair of views needs `clutter: none`")
    views = [scenes, _turned(scenes, np.random.default_rng([int(world["seed"]), 71]))]
    rendered = [render(view) for view in views]
    poses = [camera_poses(view) for view in views]
    rows: list[dict[str, Any]] = []
    progress = Progress(f"write {world['name']}", n, "pairs")
    with atomic(archive) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, scene in enumerate(scenes["image_id"]):
            ids = [f"{scene}/{frame}.png" for frame in (0, 1)]
            for frame, view in enumerate(rendered):
                offset, size = add_png(tar, ids[frame], view.images[i])
                depth = add_png(tar, f"{scene}/{frame}.depth.png", thousandths(view.depth[i]))
                place = {"offset": offset, "size": size, "depth_offset": depth[0], "depth_size": depth[1]}
                pairs = [[i, ids[1]]] if frame == 0 else []
                seen = {"scene": str(scene), "frame": frame, "pose": _json(poses[frame][i].tolist())}
                rows.append({"image_id": ids[frame], **place, **seen, "pairs": _json(pairs)})
            progress.update(1)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"archive": [str(archive)] * 2 * n, "depth_archive": [str(archive)] * 2 * n}
    columns |= {"codec": [""] * 2 * n, "depth_codec": [""] * 2 * n, "intrinsics": [_json(intrinsics())] * 2 * n}
    write_parquet(index, columns | {"label": np.full(2 * n, -1, np.int32)})


def _turned(scenes: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The same scenes from another side."""
    n = len(scenes["label"])
    low, high = np.array(TURNS, float)[rng.permutation(np.arange(n) % len(TURNS))].T
    yaw = rng.uniform(low, high) * rng.choice([-1, 1], n)
    turned = {"yaw": scenes["yaw"] + yaw, "elevation": scenes["elevation"] + rng.uniform(-TILT, TILT, n)}
    return {**scenes, **{name: values.astype(np.float32) for name, values in turned.items()}}


def camera_poses(scenes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Camera (OpenCV's axes) to the frame in which the solid stands still: float64 [n, 4, 4], world units.

    The renderer puts a point p of the solid at R p + c of its own camera, so p = R' (F q - c) for q = F (R p + c),
    where F turns the axes.
    """
    import torch

    from clip_robustness.mini.camera import DISTANCE, rotation

    angles = (torch.from_numpy(np.asarray(scenes[name], np.float64)) for name in ("yaw", "elevation", "roll"))
    back = rotation(*angles).numpy().transpose(0, 2, 1)
    centre = np.stack([scenes["x"], scenes["y"], np.full(len(back), -DISTANCE)], axis=1).astype(np.float64)
    poses = np.tile(np.eye(4), (len(back), 1, 1))
    poses[:, :3, :3] = back @ TO_OPENCV
    poses[:, :3, 3] = -(back @ centre[:, :, None])[:, :, 0]
    return poses


def intrinsics() -> list[list[float]]:
    """The renderer's camera, 3 x 3: pixel centres lie at whole numbers plus a half."""
    from clip_robustness.mini.camera import FOCAL, SIZE

    return [[FOCAL, 0.0, SIZE / 2], [0.0, FOCAL, SIZE / 2], [0.0, 0.0, 1.0]]


def thousandths(depth: np.ndarray) -> np.ndarray:
    """World units -> uint16 thousandths, 0 where there is no surface."""
    known = np.where(np.isfinite(depth), depth, 0).astype(np.float64)
    if known.max(initial=0) > LONGEST:
        raise ValueError(f"a depth of {known.max()} world units does not fit into 16 bits")
    return np.round(1000 * known).astype(np.uint16)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
