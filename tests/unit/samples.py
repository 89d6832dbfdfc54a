"""Images, archives and folders that several tests make."""

import functools
import http.server
import io as bytes_io
import tarfile
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from clip_robustness.core.io import sha256_file
from clip_robustness.data.fetch import fetch


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


def download(sources: list[Path], folder: Path) -> list[Path]:
    """Serve every file of `sources` by HTTP and fetch it, as a data set's archives; folders stay where they lie."""
    fetched = []
    for position, source in enumerate(sources):
        if not source.is_file():
            fetched.append(source)
            continue
        handler = functools.partial(QuietHandler, directory=str(source.parent))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}/{quote(source.name)}"
            entry = {"file": source.name, "urls": [url], "bytes": source.stat().st_size, "sha256": sha256_file(source)}
            target = folder / "downloaded" / str(position) / source.name
            if not target.is_file() or sha256_file(target) != entry["sha256"]:
                fetch({"name": "x", "archives": [entry]}, source.name, target, folder / "lock.json")
            server.shutdown()
        fetched.append(target)
    return fetched


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing: pytest would show it."""
