"""Images, archives and folders that several tests make."""

import io as bytes_io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width)[None, :, None] + np.zeros((height, width, 3))
    return Image.fromarray(((noise.astype(float) + ramp) / 2).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = bytes_io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def broken_images() -> dict[str, bytes]:
    jpeg, png = encoded(picture(80, 60)), encoded(picture(80, 60), "PNG")
    return {
        "zero.jpg": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "head.jpg": jpeg[:20],
        "cut.png": png[: len(png) // 2],
        "crc.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "page.jpg": b"<html>not found</html>",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n",
        "format_of_no_data_set.pcx": encoded(picture(80, 60), "PCX"),
        "bomb.png": png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:],
    }


def make_tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, bytes_io.BytesIO(content))
    return path


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
