"""Download an archive: mirrors in order, checked before it gets its name.

urllib and no download library, because the checks that matter come between the headers and the first byte
on disk (size, room, an HTML page in place of the archive), and pooch shows neither to its caller.
"""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from clip_robustness import __version__
from clip_robustness.core import io
from clip_robustness.core.io import InputError

BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte


def fetch(dataset: Mapping[str, Any], out: Path, timeout: float = TIMEOUT) -> None:
    """Fetch a data set's archive to `out` from the first of its `urls` that gives the right file.

    `bytes` and `sha256` of the entry are checked where given, before the file gets its name.
    Errors: `InputError` that lists what each mirror answered, and the remedy.
    """
    name, urls = dataset.get("name", out.name), dataset.get("urls") or []
    remedy = f"Remedy: fetch it by hand to {out}, or name your copy under 'local:' in the config"
    if not urls:
        access = dataset.get("access", "open")
        raise InputError(f"data set {name}: no 'urls' in datasets.yaml (access: {access}). {remedy}")
    faults = []
    for url in urls:
        try:
            with io.atomic(out) as temporary, temporary.open("wb") as file:
                _download(url, file, dataset.get("bytes"), dataset.get("sha256"), timeout)
            return
        except _MirrorFault as fault:
            faults.append(f"  {url}: {fault}")
    raise InputError("\n".join([f"{out}: no mirror of {name} gave it:", *faults, remedy]))


class _MirrorFault(Exception):
    """This mirror failed; the next may do."""


def _download(url: str, file: BinaryIO, expected: int | None, sha256: str | None, timeout: float) -> None:
    hasher, received = hashlib.sha256(), 0
    with _open(url, timeout) as response:
        block = _read(response)
        if _is_web_page(response, block):
            raise _MirrorFault("a web page in place of the archive; open it in a browser, it may ask something")
        size = _size(response, expected)
        _check_room(Path(file.name).parent, size or 0)
        progress = io.Progress(f"fetch {url.rpartition('/')[2]}", (size or 0) >> 20, "MiB")
        while block:
            if size is not None and received + len(block) > size:
                raise _MirrorFault(f"more than the expected {size:,} bytes")
            file.write(block)
            hasher.update(block)
            received += len(block)
            progress.update((received >> 20) - progress.done)
            block = _read(response)
    if size is not None and received != size:
        raise _MirrorFault(f"the connection ended after {received:,} of {size:,} bytes")
    if sha256 is not None and hasher.hexdigest() != sha256:
        raise _MirrorFault(f"wrong checksum: sha256 {hasher.hexdigest()}, expected {sha256}")


def _open(url: str, timeout: float) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": f"clip_robustness/{__version__}"})
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise _MirrorFault(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorFault(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _read(response: Any) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorFault(f"the connection broke ({str(error) or type(error).__name__})") from None


def _is_web_page(response: Any, block: bytes) -> bool:
    start = block[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return response.headers.get_content_type() == "text/html" or start.startswith((b"<!doctype html", b"<html"))


def _size(response: Any, expected: int | None) -> int | None:
    announced = response.headers.get("Content-Length", "")
    if not announced.isdecimal():
        return expected
    if expected is not None and int(announced) != expected:
        raise _MirrorFault(f"{int(announced):,} bytes announced, expected {expected:,}")
    return int(announced)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {needed:,} bytes needed, {free:,} are free; make room, or link it elsewhere")
