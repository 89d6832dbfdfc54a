"""Write a mini data set: a tar of PNGs, its index, and the geometry behind every pixel."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError, Progress, atomic, write_parquet
from clip_robustness.mini.world import sample_scenes

CHUNK = 1152  # images in memory at a time


def render_dataset(world: Mapping[str, Any], archive: Path, index: Path, geometry: Path | None = None) -> None:
    """Render a world (see `world`) into `archive` and describe it in `index`, and in `geometry` if given.

    archive   uncompressed tar of {name}/{00000}.png, 48 x 48 RGB
    index     parquet: image_id, archive, offset, size, label, caption, and the other columns of `world.sample_scenes`
    geometry  .npz in the index's order: depth float16 [n, 48, 48] (world units, infinite off the solid),
              normals int8 [n, 48, 48, 3] (127 times the unit normal, camera frame), mask bool [n, 48, 48]

    The same world gives the same bytes. Errors: `InputError` for a world that does not hold.
    """
    import torch

    from clip_robustness.mini.render import render

    torch.set_num_threads(1)
    scenes = sample_scenes(world)
    n = len(scenes["label"])
    offsets, sizes = np.zeros(n, np.int64), np.zeros(n, np.int64)
    shapes = []
    progress = Progress(f"render {world['name']}", n)
    with atomic(archive) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(0, n, CHUNK):
            part = render({name: column[start : start + CHUNK] for name, column in scenes.items()})
            for i, image in enumerate(part.images, start):
                offsets[i], sizes[i] = add_png(tar, f"{scenes['image_id'][i]}.png", image)
            if geometry is not None:
                shapes.append(part[1:])
            progress.update(len(part.images))
    if geometry is not None:
        depth, normals, mask = (np.concatenate(arrays) for arrays in zip(*shapes, strict=True))
        with atomic(geometry) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, depth=depth, normals=normals, mask=mask)
    columns: dict[str, Any] = {"image_id": scenes["image_id"], "archive": [str(archive)] * n}
    columns |= {"offset": offsets, "size": sizes, "label": scenes["label"], "caption": scenes["caption"]}
    write_parquet(index, columns | {name: column for name, column in scenes.items() if name not in columns})


def add_png(tar: tarfile.TarFile, name: str, image: np.ndarray) -> tuple[int, int]:
    """Append a PNG and return where its bytes stand in the tar."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    member = tarfile.TarInfo(name)  # its defaults are mtime 0, no owner
    member.size = buffer.tell()
    buffer.seek(0)
    offset = tar.offset + tarfile.BLOCKSIZE  # an ustar header is one block
    tar.addfile(member, buffer)
    return offset, member.size


def read_images(columns: Mapping[str, np.ndarray], source: Path) -> np.ndarray:
    """Decode the images of an index, uint8 [n, 48, 48, 3]. Errors: `InputError` naming the image that fails."""
    from PIL import Image

    images = []
    for path in dict.fromkeys(columns["archive"]):
        if not Path(path).is_file():
            raise InputError(f"{source}: its archive {path} is missing; render the data set again")
    data = {path: np.memmap(path, np.uint8, mode="r") for path in dict.fromkeys(columns["archive"])}
    rows = zip(columns["image_id"], columns["archive"], columns["offset"], columns["size"], strict=True)
    for image_id, path, offset, size in rows:
        try:
            with Image.open(io.BytesIO(data[path][offset : offset + size].tobytes())) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise InputError(f"{source}: image {image_id} in {path}: {error}; render it again") from None
    return np.stack(images)
