"""Two views of a pair as Probe3D's protocol prepares them: pixels for the tower, and where each pixel lies in space.

Source: evals/datasets of mbanani/probe3d, whose order of resizing and cropping is kept, nearest pixels included.
"""

import io as bytes_io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from clip_robustness.core.archive import REMEDY, ArchiveReader
from clip_robustness.core.io import InputError
from clip_robustness.inference.images import decode

SHORTER_SIDE = 1024  # to which Probe3D reduces NAVI's photographs before all else
NAVI_METRES = 655.350  # depth in metres = this / value of the depth map (google/navi)
WHITE = (255, 255, 255)


class View(NamedTuple):
    """What one camera sees at those pixels of a grid that have depth; all lengths in metres."""

    pixels: np.ndarray  # uint8 [H, W, 3], what the tower sees
    points: np.ndarray  # float64 [n, 2], the grid's pixels as x, y of `pixels`
    xyz: np.ndarray  # float64 [n, 3], camera frame: x right, y down, z ahead
    camera: np.ndarray  # float64 [3, 3], intrinsics in the pixels that errors are counted in
    pose: np.ndarray  # float64 [4, 4], from this camera to a frame that both views share


class Members:
    """Images, and other members, of the rows of an index."""

    def __init__(self, columns: Mapping[str, np.ndarray], where: str):
        self.columns, self.where, self._reader = columns, where, ArchiveReader()

    def image(self, row: int) -> Image.Image:
        return decode(self._read(row, ""), self.columns["archive"][row], self.name(row))

    def depth(self, row: int) -> Image.Image:
        """A depth map of 16 bits. Errors: `InputError` for anything else."""
        where = f"{self.columns['depth_archive'][row]}, depth of '{self.name(row)}'"
        try:
            with Image.open(bytes_io.BytesIO(self._read(row, "depth_")), formats=("PNG",)) as image:
                image.load()
        except (InputError, MemoryError):
            raise
        except Exception as error:  # as in `decode`
            raise InputError(f"{where}: cannot decode it ({type(error).__name__}); {REMEDY}") from None
        if image.mode not in ("I;16", "I"):
            raise InputError(f"{where}: a picture of mode {image.mode}, expected one channel of 16 bits; {REMEDY}")
        return image

    def json(self, row: int, column: str) -> Any:
        return json.loads(self.columns[column][row])

    def name(self, row: int) -> str:
        return str(self.columns["image_id"][row])

    def _read(self, row: int, prefix: str) -> bytes:
        archive, offset, size, codec = (self.columns[prefix + n][row] for n in ("archive", "offset", "size", "codec"))
        return self._reader.read(archive, int(offset), int(size), self.name(row), codec)


def scene_view(members: Members, row: int, size: tuple[int, int], step: int) -> View:
    """A frame of ScanNet's schema, resized to `size` (height, width); every `step`-th pixel of its depth map.

    `camera` is that of the grid, whose pixels are `step` of the depth map's: errors are counted in these.
    """
    image = members.image(row)
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    depth = np.asarray(members.depth(row)).astype(float) / 1000
    scale = np.array([size[1] / depth.shape[1], size[0] / depth.shape[0]])
    camera = np.array(members.json(row, "intrinsics"), float)
    camera[:2] /= step
    rows, columns = (step * np.arange(side // step) for side in depth.shape)
    z = depth[np.ix_(rows, columns)]
    grid = _centres(*z.shape)
    xyz = z[..., None] * (grid @ np.linalg.inv(camera).T)
    points = grid[..., :2] * step * scale
    known = z > 0
    pose = np.array(members.json(row, "pose"), float)
    return View(np.array(image), points[known], xyz[known], camera, pose)


def object_view(members: Members, row: int, size: tuple[int, int], step: int) -> View:
    """A photograph of NAVI, cropped to the object and enlarged to `size`; every `step`-th pixel of it."""
    image, depth = (ImageOps.exif_transpose(picture) for picture in (members.image(row), members.depth(row)))
    height, width = members.json(row, "image_size")
    _check_upright(image, (width, height), members, row)
    side = min(size)
    pixels = _shortened(image, Image.Resampling.BILINEAR, side)
    inverse = _shortened(depth, Image.Resampling.NEAREST, side).astype(float)
    z = np.divide(NAVI_METRES, inverse, out=np.zeros_like(inverse), where=inverse > 0)
    focal = members.json(row, "camera")["focal_length"] * side / min(height, width)
    left, top, box = square_box(z > 0)
    rows, columns = top + _nearest(box, size[0]), left + _nearest(box, size[1])
    pixels = pixels[np.ix_(rows, columns)]
    rows, columns = rows[::step], columns[::step]
    z = z[np.ix_(rows, columns)]
    x, y = np.meshgrid((columns + 0.5 - side / 2) / focal, (rows + 0.5 - side / 2) / focal)
    xyz = z[..., None] * np.stack([x, y, np.ones_like(z)], axis=-1)
    points = step * _centres(*z.shape)[..., :2]
    known = z > 0
    enlarged = focal * side / box
    camera = np.diag([enlarged, enlarged, 1.0])  # errors are differences, which no principal point changes
    return View(pixels, points[known], xyz[known], camera, np.linalg.inv(object_pose(members.json(row, "camera"))))


def keypoint_view(members: Members, row: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """An image of SPair-71k as uint8 [H, W, 3], padded white at the right and bottom; its longer side in pixels."""
    image = members.image(row)
    side = max(image.size)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image)
    return np.array(square.resize((size[1], size[0]), Image.Resampling.BICUBIC)), side


def object_pose(camera: Mapping[str, Any]) -> np.ndarray:
    """Object to camera [4, 4], metres: NAVI's quaternion `q` (w, x, y, z) and its translation `t` in millimetres."""
    w, x, y, z = np.array(camera["q"], float) / np.linalg.norm(camera["q"])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = np.array(camera["t"], float) / 1000
    return pose


def turn_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angle in degrees of the rotation between poses [..., 4, 4]."""
    trace = np.einsum("...ij,...ij->...", first[..., :3, :3], second[..., :3, :3])
    return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1)))


def square_box(known: np.ndarray) -> tuple[int, int, int]:
    """(left, top, side) of a square inside the square image `known` [n, n] (bool) that holds what is known.

    Probe3D's: centred on the object where the image allows it, else shifted to the upper left. Nothing known: all.
    """
    if not known.any():
        return 0, 0, len(known)
    rows, columns = np.flatnonzero(known.any(axis=1)), np.flatnonzero(known.any(axis=0))
    corner, sides = np.array([columns[0], rows[0]]), np.array([np.ptp(columns), np.ptp(rows)])
    side = max(int(sides.max()), 1)
    spare = side - sides
    centred = corner - spare // 2
    if (centred < 0).any() or (centred + side > len(known)).any():
        centred = np.clip(corner - spare, 0, len(known) - side)
    return int(centred[0]), int(centred[1]), side


def _shortened(image: Image.Image, filter: Image.Resampling, side: int) -> np.ndarray:
    """The central `side` x `side` px of an image whose shorter side is reduced to `side`, by way of SHORTER_SIDE."""
    factor = SHORTER_SIDE / min(image.size)
    pixels = np.asarray(image.resize((int(image.width * factor), int(image.height * factor)), filter))
    short = min(pixels.shape[:2])
    rows, columns = (_nearest(length, side * length // short) for length in pixels.shape[:2])
    rows, columns = (places[round((len(places) - side) / 2) :][:side] for places in (rows, columns))
    return pixels[np.ix_(rows, columns)]


def _nearest(length: int, wanted: int) -> np.ndarray:
    """Which of `length` pixels stand for `wanted` ones: torch's and OpenCV's `nearest`, which round down."""
    return np.arange(wanted) * length // wanted


def _centres(height: int, width: int) -> np.ndarray:
    """Homogeneous pixel centres (x, y, 1), float64 [height, width, 3]."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def _check_upright(image: Image.Image, size: tuple[int, int], members: Members, row: int) -> None:
    if abs(image.width * size[1] - image.height * size[0]) > 0.01 * size[0] * size[1]:
        found = f"{image.width} x {image.height} px, the annotation says {size[0]} x {size[1]}"
        raise InputError(f"{members.where}, image '{members.name(row)}': upright it has {found}; {REMEDY}")
