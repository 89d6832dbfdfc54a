"""Download an archive: mirrors in order, resumed where it broke off, checked before it gets its name.

The transport is requests: it brings redirects, proxies, TLS and netrc logins, and notices a body that is cut. What goes
beyond one answer of one server stands here, because no library does it for archives of 150 GB (read in their sources):
pooch 1.9 deletes its temporary file and starts anew at byte 0 whenever a connection breaks; Snakemake's http storage
plugin 0.3 copies one answer to the file, without resume, retry or checksum; huggingface_hub 2.4 resumes within a call,
but a killed process leaves nothing, and of a file it checks the size only: hub.py uses it for the hub's own
repositories and compares the checksums itself.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness import __version__
from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.data.hub import FULL, LIMIT, Cache, Wanted, WrongCopy, alone, pin, say

BLOCK = 1 << 18
TIMEOUT = 60.0  # seconds without a byte
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try of a mirror that brings nothing
PATIENCE = 600  # seconds that a server may ask us to wait


def fetch(
    dataset: Mapping[str, Any],
    archive: str,
    out: Path,
    lock: Path,
    cache: Path | None = None,
    *,
    timeout: float = TIMEOUT,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Bring one archive of a data set to `out`: what is there, the user's cache, then the mirrors, in this order.

    dataset: its entry of datasets.yaml and its `name`. archive: the `file` of one of its `archives`. lock: the file
    that pins the SHA-256 of an archive whose entry has none when it first comes; later ones must match. cache: the
    folder that all checkouts share (see `hub.Cache`). timeout: seconds without a byte. sleep: waits between tries.
    Errors: `InputError` that lists what each mirror answered, and the remedy.
    """
    name = dataset.get("name", out.parent.name)
    key, entry = f"{name}/{archive}", _entry(dataset, name, archive)
    urls = entry.get("urls") or []
    with alone(out):
        wanted = Wanted.of(entry, lock, key)
        store = Cache(cache, [wanted.sha256] if wanted.sha256 else [f"url-{io.digest(url)}" for url in urls])
        transfer = _Transfer(key, out, wanted, timeout, sleep)
        if transfer.part.is_symlink():  # of somebody else, to take the bytes elsewhere
            transfer.part.unlink()
        for path in filter(Path.is_file, (out, *store.paths())):
            try:
                sha256 = wanted.check(path)
                break
            except WrongCopy as fault:
                say(f"{path}: {fault}; it is not used")
        else:
            if not urls:
                raise InputError(_by_hand(dataset, name, archive))
            say(f"fetch {key}; its licence: {dataset.get('licence', 'not known')}")
            path, sha256 = transfer.part, transfer.from_mirrors(urls)
        if wanted.sha256 is None:
            pin(lock, key, {"bytes": path.stat().st_size, "sha256": sha256})
        if path == transfer.part:
            path.replace(out)
        elif path != out:
            say(f"{key}: taken from {path}")
            io.place(path, out)
        transfer.discard()
        if path not in store.paths():
            store.keep(out, sha256)


def _entry(dataset: Mapping[str, Any], name: str, archive: str) -> Mapping[str, Any]:
    entries = {entry["file"]: entry for entry in dataset.get("archives") or []}
    if entries and archive not in entries:
        raise InputError(f"datasets.yaml, datasets.{name}.archives: no file '{archive}', only {', '.join(entries)}")
    return entries.get(archive, {})


def _by_hand(dataset: Mapping[str, Any], name: str, archive: str) -> str:
    access, licence = dataset.get("access", "open"), dataset.get("licence", "not known")
    return (
        f"data set {name} ({dataset.get('title', name)}): {archive} has no 'urls' in datasets.yaml, it comes from your "
        f"own hands (access: {access}; licence: {licence}).\n  Where: {dataset.get('note', 'see its paper')}\n"
        f"  Then write into the study's config:\n    local: {{{name}: /path/to/{archive}}}"
    )


class _Interrupted(Exception):
    """Nothing more came, but may: try again, after `wait` seconds if the server named a time."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a server sends: the bytes of a file from `start` on, and what it says of the file."""

    start: int
    size: int | None
    facts: Mapping[str, Any]
    blocks: Iterator[bytes]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """One file on its way: `{out}.part` has the bytes so far, `{out}.part.json` says what they are the beginning of."""

    key: str
    out: Path
    wanted: Wanted
    timeout: float
    sleep: Callable[[float], Any]

    @property
    def part(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    @property
    def facts_path(self) -> Path:
        return self.out.with_name(self.out.name + ".part.json")

    @property
    def here(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def facts(self) -> dict[str, Any]:
        with contextlib.suppress(InputError, TypeError, ValueError):
            facts = dict(io.read_json(self.facts_path))
            return {name: fact for name, fact in facts.items() if isinstance(fact, int if name == "size" else str)}
        return {}

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.facts_path.unlink(missing_ok=True)

    def from_mirrors(self, urls: Sequence[str]) -> str:
        """Complete the part from the first mirror that can; its SHA-256."""
        faults = []
        for url in urls:
            try:
                return self._from_mirror(url)
            except WrongCopy as fault:
                faults.append(f"  {url}: {fault}")
                say(f"fetch {self.key}:{faults[-1]}")
            except OSError as error:
                if error.errno not in FULL:
                    raise
                kept = f"{self.here:,} bytes are kept. Remedy: make room and run again, it goes on from there"
                raise InputError(f"{self.part}: {error.strerror}; {kept}") from None
        kept = f"; {self.here:,} bytes are kept in {self.part}" if self.here else ""
        remedy = f"Remedy: run again later, or fetch it by hand and name your copy under 'local:' in the config{kept}"
        raise InputError("\n".join([f"{self.out}: no mirror gave {self.key}:", *faults, remedy]))

    def _from_mirror(self, url: str) -> str:
        mark, fruitless, anew = self.here, 0, False
        while True:
            try:
                resumed = self._receive(url)
                try:
                    return self.wanted.check(self.part)
                except WrongCopy as fault:
                    self.discard()
                    if anew or not resumed:
                        raise
                    anew = True  # the old bytes may be of another mirror or release: once more, from byte 0
                    raise _Interrupted(str(fault), 0) from None
            except _Interrupted as broken:
                fruitless += 1
                if self.here >= mark + BLOCK:
                    mark, fruitless = self.here, 0
                if fruitless > len(WAITS):
                    raise WrongCopy(f"{broken}; {fruitless} tries") from None
                wait = broken.wait if broken.wait is not None else WAITS[max(fruitless, 1) - 1]
                if wait > PATIENCE:
                    raise WrongCopy(f"{broken}; it asks to wait {wait:,.0f} s") from None
                say(f"fetch {self.key}: {broken}; {self.here:,} bytes are here, again in {wait:g} s")
                self.sleep(wait)

    def _receive(self, url: str) -> bool:
        """Bring the part to its end; whether bytes of an earlier connection are in it."""
        facts, wanted = self.facts(), self.wanted
        asked, validator = self._where_to_resume(url, facts)
        if asked and asked == facts.get("size"):
            return True
        with _ask(url, asked, validator, self.timeout) as answer:
            first = next(answer.blocks, b"")
            _refuse_web_page(answer, first)
            start, size = answer.start, wanted.bytes if answer.size is None else answer.size
            if wanted.bytes is not None and size != wanted.bytes:
                raise WrongCopy(f"{size:,} bytes announced, expected {wanted.bytes:,} ({wanted.origin})")
            if size is not None and wanted.bytes is None and size > LIMIT:
                raise WrongCopy(f"{size:,} bytes announced, over {LIMIT:,}; declare its 'bytes' if that is right")
            if start and (start != asked or _differs(facts, {**answer.facts, "url": url, "size": size})):
                self.discard()  # a server that does not know If-Range sends the end of another file
                raise _Interrupted("the file on the server has changed", 0)
            self._check_room(start, size)
            if start == 0:  # before the facts are written: a kill in between must not join old bytes to new facts
                self.part.write_bytes(b"")
            io.write_json(self.facts_path, {**answer.facts, "url": url, "size": size})
            self._write(itertools.chain((first,), answer.blocks), size)
        if size is not None and self.here != size:
            raise _Interrupted(f"the connection ended after {self.here:,} of {size:,} bytes")
        return start > 0

    def _where_to_resume(self, url: str, facts: Mapping[str, Any]) -> tuple[int, str | None]:
        """The byte to go on from, and what the server is to compare; 0 where nothing would tell another file."""
        has_checksum = bool(self.wanted.sha256 or self.wanted.md5)
        if facts.get("url") != url:
            return (self.here if has_checksum and facts else 0), None
        etag = facts.get("etag") or ""
        validator = etag if etag.startswith('"') else facts.get("last_modified")  # a weak tag, W/"…", is not for this
        return (self.here if validator or has_checksum else 0), validator

    def _check_room(self, start: int, size: int | None) -> None:
        free = shutil.disk_usage(self.out.parent).free + (self.here if start == 0 else 0)
        if free < (missing := (size or 0) - start):
            room = f"{missing:,} bytes are still to come, {free:,} are free"
            raise InputError(f"{self.out.parent}: {room}; make room, or make it a link to a larger disk")

    def _write(self, blocks: Iterable[bytes], size: int | None) -> None:
        here, limit = self.here, LIMIT if size is None else size
        progress = io.Progress(f"fetch {self.key}", -(-(size or 0) // 10**6), "MB")
        progress.skipped = here // 10**6
        with self.part.open("ab") as file:
            for block in blocks:
                here += len(block)
                if here > limit:
                    self.discard()
                    raise WrongCopy(f"more than the expected {limit:,} bytes")
                file.write(block)
                shown = progress.total if here == size else here // 10**6
                if size and (step := shown - progress.done - progress.skipped):
                    progress.update(step)
            file.flush()
            os.fsync(file.fileno())


def _differs(facts: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    same_place = facts.get("url") == now["url"]
    keys = ("size", "etag", "last_modified") if same_place else ("size",)
    return any(facts.get(key) and now.get(key) and facts[key] != now[key] for key in keys)


@contextlib.contextmanager
def _ask(url: str, start: int, validator: str | None, timeout: float) -> Iterator[_Answer]:
    if url.startswith("file:"):
        with _open(url) as file:
            state = os.fstat(file.fileno())
            etag = f'"{state.st_mtime_ns}-{state.st_size}"'
            start = file.seek(start if start <= state.st_size and validator in (None, etag) else 0)
            yield _Answer(start, state.st_size, {"etag": etag}, iter(lambda: file.read(BLOCK), b""))
        return
    import requests
    import urllib3

    headers = {"User-Agent": f"clip_robustness/{__version__}", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    headers |= {"If-Range": validator} if start and validator else {}
    fatal = (requests.exceptions.SSLError, requests.TooManyRedirects, ValueError)
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if url.startswith("https:") and not all(r.url.startswith("https:") for r in (*response.history, response)):
                raise WrongCopy("it leads on to an address without TLS; name that address if you trust it")
            yield _read_head(response, start)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise (WrongCopy if isinstance(error, fatal) else _Interrupted)(_reason(error)) from None


def _open(url: str) -> Any:
    try:
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).open("rb")
    except OSError as error:
        raise WrongCopy(str(error.strerror)) from None


def _read_head(response: Any, asked: int) -> _Answer:
    status, headers = response.status_code, response.headers
    covered, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if status == 416:  # the part is the whole file, or is longer than the file that is now there
        return _Answer(asked if total == str(asked) else -1, _whole(total), {}, iter(()))
    if status in (408, 425, 429) or status >= 500:
        raise _Interrupted(f"HTTP {status} {response.reason}", _retry_after(headers.get("Retry-After", "")))
    if status not in (200, 206):
        raise WrongCopy(f"HTTP {status} {response.reason}")
    start = _whole(covered.partition("-")[0]) if status == 206 else 0
    size = total if status == 206 else headers.get("Content-Length", "")
    return _Answer(
        -1 if start is None else start,
        _whole(size),
        {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")},
        response.raw.stream(BLOCK, decode_content=False),
        headers.get("Content-Type", ""),
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _retry_after(text: str) -> float | None:
    import urllib3

    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return urllib3.Retry(retry_after_max=10**9).parse_retry_after(text) if text else None
    return None


def _reason(error: BaseException) -> str:
    """The first cause: what wraps it repeats the address and its own name."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"the connection failed ({str(error) or type(error).__name__})"


def _refuse_web_page(answer: _Answer, block: bytes) -> None:
    head = block[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower() if answer.start == 0 else b""
    if answer.kind.startswith("text/html") or head.startswith((b"<!doctype html", b"<html")):
        raise WrongCopy("a web page in place of the archive; open it in a browser, it may ask something")
