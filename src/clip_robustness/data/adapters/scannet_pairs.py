"""ScanNet-1500: 1,500 pairs of frames of ScanNet's test scenes (Sarlin et al. 2020), for correspondence.

Sources: the tar of zju3dv/LoFTR, ``scannet_test_1500/scene0707_00/`` with ``color/15.jpg``, ``depth/15.png`` and
``pose/15.txt``, and beside it that repository's ``test.npz`` and ``intrinsics.npz``. In test.npz, `name` is
uint16 [1500, 4]: scene, scan, first and second frame. In intrinsics.npz, one float64 [3, 3] a scene: the camera
at 640 x 480, the size of the depth maps, so a colour frame (1296 x 968) is resized to that first.

A pose is the 4 x 4 matrix from camera to world coordinates in metres; a depth map is a 16-bit PNG in
millimetres, 0 for none. The scenes, pair numbers and intrinsics were verified against the two files; the folders
inside the tar only by the readers of LoFTR and Probe3D, since the archive needs ScanNet's terms of use.

Options `pairs` and `intrinsics` name the two files, if they are called otherwise.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, compact, find, label_of, place, read_text
from clip_robustness.data.members import read
from clip_robustness.data.rows import Member, Row

LARGEST = 64 << 20  # bytes of the arrays; they have 13 kB and 150 kB


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """One row a frame that stands in a pair, label -1, id ``scene0707_00/15.jpg``.

    Attributes: `scene`, `frame`, `pose` (JSON 4 x 4), `intrinsics` (JSON 3 x 3), where the depth lies
    (`depth_archive`, ...), and `pairs`: a JSON list of [number of the pair, id of its second frame] for the pairs
    whose first frame this is. So a pair stands in the index once, and its number is its row in test.npz.
    """
    source = find(members, options.get("pairs", "test.npz"), where)
    cameras = find(members, options.get("intrinsics", "intrinsics.npz"), where)
    names = _arrays(source).get("name")
    if names is None or names.ndim != 2 or names.shape[1] != 4 or names.dtype.kind not in "iu":
        raise InputError(f"{label_of(source)}: no array 'name' of whole numbers [pairs, 4]; {AGAIN}")
    intrinsics = _arrays(cameras)
    tails = {"/".join(member.name.split("/")[-3:]): member for member in members}
    pairs: dict[tuple[str, int], list[Any]] = {}
    for number, (scene, scan, first, second) in enumerate(names.tolist()):
        scene = f"scene{scene:04d}_{scan:02d}"
        pairs.setdefault((scene, first), []).append([number, f"{scene}/{second}.jpg"])
        pairs.setdefault((scene, second), [])
    rows = []
    for (scene, frame), seconds in pairs.items():
        matrix = intrinsics.get(scene)
        if matrix is None or matrix.shape != (3, 3):
            raise InputError(f"{label_of(cameras)}: no 3 x 3 matrix of the scene '{scene}'; {AGAIN}")
        color, depth, pose = (
            _part(tails, f"{scene}/{part}", where)
            for part in (f"color/{frame}.jpg", f"depth/{frame}.png", f"pose/{frame}.txt")
        )
        attributes = {
            "scene": scene,
            "frame": frame,
            "pose": compact(_pose(pose)),
            "intrinsics": compact(matrix.tolist()),
            "pairs": compact(seconds),
            **place("depth", depth),
        }
        rows.append(Row(f"{scene}/{frame}.jpg", color, -1, attributes))
    return rows


def _part(tails: Mapping[str, Member], name: str, where: str) -> Member:
    if name not in tails:
        raise InputError(f"{where}: there is no file '{name}', which a pair needs; {AGAIN}")
    return tails[name]


def _arrays(member: Member) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(data := read(member))) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"it grows to {size:,} bytes, more than {LARGEST:,}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile and NumPy raise a dozen types for broken files
        raise InputError(f"{label_of(member)}: not a whole .npz of arrays ({error}); {AGAIN}") from None


def _pose(member: Member) -> list[list[float]]:
    try:
        values = np.array(read_text(member).split(), dtype=float).reshape(4, 4)
    except ValueError:
        values = np.full((4, 4), np.nan)
    if not np.isfinite(values).all():  # ScanNet writes -inf where its tracking failed
        raise InputError(f"{label_of(member)}: expected a pose of 4 x 4 finite numbers; {AGAIN}")
    return values.tolist()
