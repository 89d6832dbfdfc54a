"""Copies that others keep, and which of them is the right one: the model hub, the user's cache.

A model-hub repository comes through huggingface_hub, whose own cache, token and offline switch (HF_HUB_OFFLINE) hold.
It names a blob by its checksum but compares only sizes, so every shard is hashed here before it gets its final name.
"""

import contextlib
import errno
import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import alone, pin, pins_of, say

CACHE_VARIABLE = "CLIP_ROBUSTNESS_CACHE"
LIMIT = 400 * 10**9  # bytes of a download whose size is not declared; the largest archive known has 156 GB
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WrongCopy(Exception):
    """This copy cannot serve; another may."""


class Wanted(NamedTuple):
    """What is known of a file beforehand, and where the checksum comes from."""

    bytes: int | None
    sha256: str | None
    md5: str | None
    origin: str

    @classmethod
    def of(cls, entry: Mapping[str, Any], lock: Path, key: str) -> "Wanted":
        """From an entry of `archives`; where it has no SHA-256, from the lock file."""
        known, origin = entry, "datasets.yaml"
        if not entry.get("sha256") and (found := pins_of(lock).get(key)):
            if not re.fullmatch("[0-9a-f]{64}", str(found.get("sha256"))) or not isinstance(found.get("bytes", 0), int):
                raise InputError(f"{lock}, {key}: no 'bytes' and 'sha256' of a file; take the committed file again")
            known, origin = found, f"pinned in {lock}; if you trust a changed release, remove the entry '{key}' there"
        return cls(entry.get("bytes", known.get("bytes")), known.get("sha256"), entry.get("md5"), origin)

    def check(self, path: Path) -> str:
        """The SHA-256 of the file, if it is the right one. Errors: `WrongCopy` with what it is and should be."""
        size = path.stat().st_size
        if size == 0 or size != (self.bytes or size):
            raise WrongCopy(f"{size:,} bytes, expected {self.bytes or 'some'} ({self.origin})")
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        by_md5 = self.md5 is not None and self.sha256 is None
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                if by_md5:
                    md5.update(block)
        found, right = (md5.hexdigest(), self.md5) if by_md5 else (sha256.hexdigest(), self.sha256)
        if right is not None and found != right:
            kind = "md5" if by_md5 else "sha256"
            raise WrongCopy(f"wrong checksum: {kind} {found}, expected {right} ({self.origin})")
        return sha256.hexdigest()


class Cache:
    """The folder of archives that all checkouts of a user share, by name: the SHA-256, or one made of the address.

    folder: it, instead of `$CLIP_ROBUSTNESS_CACHE` (none when that is empty) or ~/.cache/clip_robustness/archives. The
    last, which nobody has named, takes only hard links, since they cost no space; a named one takes copies too.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]):
        named = os.environ.get(CACHE_VARIABLE)
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        default = Path(named or f"{home}/clip_robustness/archives").expanduser()
        self.folder = folder or (None if named == "" else default)
        self.takes_copies = bool(folder or named)
        self.names = names

    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names] if self.folder else []

    def keep(self, file: Path, sha256: str) -> None:
        """Put a checked file in; a cache that cannot take it is no reason to fail."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            linked = file.stat().st_dev == self.folder.stat().st_dev
            if not linked and not (self.takes_copies and shutil.disk_usage(self.folder).free > file.stat().st_size):
                return
            first = self.folder / sha256
            if not first.is_file() or not first.samefile(file):
                io.place(file, first)
            for store in self.paths():
                if store != first:
                    io.place(first, store)
        except OSError as error:
            say(f"{self.folder}: not kept there ({error.strerror})")


def fetch_hub(dataset: Mapping[str, Any], out: Path, lock: Path, *, hub_cache: Path | None = None) -> None:
    """Bring a data set's files of a model-hub repository into the folder `out`, and seal it.

    dataset: its entry of datasets.yaml and its `name`; its `hub` has repository, files (glob patterns) and, best as a
    commit, revision. lock: the file that pins the commit and the files' checksums when they first come; later ones must
    match. hub_cache: instead of HF_HUB_CACHE. A file gets its path in the repository as its name, with `--` for `/`.
    Errors: `InputError` for a repository that is missing, gated or changed, for a pattern that no file matches, for too
    little room, and where there is no network and the hub's cache lacks a file.
    """
    name, hub = dataset["name"], dataset["hub"]
    revision = hub.get("revision") or pins_of(lock).get(name, {}).get("revision", "main")
    where = f"data set {name}, hub:{hub['repository']}@{revision}"
    with alone(out):
        say(f"fetch {where}; its licence: {dataset.get('licence', 'not known')}")
        snapshot = _snapshot(where, hub, revision, out, hub_cache)
        chosen = _choose(where, snapshot, hub["files"])
        checksums = {local: _check_blob(path.resolve()) for local, path in chosen.items()}
        facts = {"repository": hub["repository"], "revision": snapshot.name}
        pin(lock, name, {**facts, "files": len(chosen), "sha256": io.digest(sorted(checksums.items()))})
        _fill(out, chosen)
        io.seal(out, dataset=name, format=hub.get("format", ""), **facts)
        if io.read_json(out / "manifest.json")["files"] != checksums:
            raise InputError(f"{out}: a file changed while it was copied; delete the folder and run again")


def _snapshot(where: str, hub: Mapping[str, Any], revision: str, out: Path, hub_cache: Path | None) -> Path:
    """The folder of the hub's cache that shows the repository's files at one commit, the folder's name."""
    from huggingface_hub import constants, errors, snapshot_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": list(hub["files"])}
    options["cache_dir"] = Path(hub_cache or constants.HF_HUB_CACHE)
    yours = "or name your copy under 'local:' in the config"
    try:
        with contextlib.suppress(errors.DryRunError):  # offline: then nothing is to come
            files = snapshot_download(hub["repository"], **options, dry_run=True)
            _check_room(where, files, out, options["cache_dir"], hub.get("bytes"))
        return Path(snapshot_download(hub["repository"], **options))
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/datasets/{hub['repository']}"
        remedy = f"accept its terms at {page} and log in with `hf auth login`, {yours}"
        raise InputError(f"{where}: the repository is gated; {remedy}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{where}: no such revision; correct 'hub.revision' in datasets.yaml") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{where}: no such repository (or a private one: log in with `hf auth login`)") from None
    except errors.HFValidationError as error:
        raise InputError(f"{where}: not a repository's name ({error}); correct it in datasets.yaml") from None
    except errors.LocalEntryNotFoundError as error:
        remedy = f"run where there is a network, {yours}"
        raise InputError(
            f"{where}: not whole in {options['cache_dir']}, and no hub to ask; {remedy} ({error})"
        ) from None
    except (errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) in FULL:
            raise InputError(f"{options['cache_dir']}: {error}; make room and run again") from None
        raise InputError(f"{where}: the hub failed ({error}); what came is kept, run again, {yours}") from None


def _check_room(where: str, files: Sequence[Any], out: Path, hub_cache: Path, declared: int | None) -> None:
    total = sum(file.file_size or 0 for file in files)
    if declared not in (None, total) or total > (declared or LIMIT):
        expected = (
            f"expected {declared:,}" if declared else f"more than {LIMIT:,}; declare 'hub.bytes' if that is right"
        )
        raise InputError(f"{where}: {total:,} bytes in {len(files)} files, {expected}")
    store, target = _existing(hub_cache), _existing(out)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    needs = {store: missing}
    if store.stat().st_dev != target.stat().st_dev:  # no hard link leads there
        needs[target] = total
    for folder, needed in needs.items():
        if (free := shutil.disk_usage(folder).free) < needed:
            raise InputError(f"{folder}: {needed:,} bytes are still to come, {free:,} are free; make room ({where})")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _choose(where: str, snapshot: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Local name -> file of the snapshot, sorted, for the files that match a pattern as the hub reads it."""
    paths = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    chosen: dict[str, Path] = {}
    for pattern in patterns:
        names = [name for name in paths if fnmatch.fnmatchcase(name, pattern + ("*" if pattern.endswith("/") else ""))]
        if not names:
            raise InputError(f"{where}: no file '{pattern}'; correct 'hub.files' in datasets.yaml")
        chosen |= {name.replace("/", "--"): paths[name] for name in names if not name.startswith(".")}
    if "manifest.json" in chosen:
        raise InputError(f"{where}: manifest.json is a name of ours; narrow 'hub.files' in datasets.yaml")
    return dict(sorted(chosen.items()))


def _check_blob(blob: Path) -> str:
    """The SHA-256 of a file of the hub's cache, whose name is its SHA-256 (large files) or its Git object id."""
    try:
        if re.fullmatch("[0-9a-f]{40}", blob.name):
            content = blob.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            if found != blob.name:
                raise WrongCopy(f"wrong checksum: Git object {found}, expected {blob.name}")
            return hashlib.sha256(content).hexdigest()
        expected = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None
        return Wanted(None, expected, None, "its name").check(blob)
    except WrongCopy as fault:
        raise InputError(f"{blob}: {fault}. Remedy: delete it, and run again where there is a network") from None


def _fill(out: Path, chosen: Mapping[str, Path]) -> None:
    """Link (or copy) the files to `out`; what an earlier seal lists and is no longer wanted goes."""
    manifest = out / "manifest.json"
    old = set(io.read_seal(out)["files"]) if manifest.exists() else set()
    there = {path.name for path in out.iterdir() if path.name[0] != "."} if out.exists() else set()
    if strange := sorted(there - old - set(chosen) - {manifest.name}):
        raise InputError(f"{out}: holds files that are not of this data set ({', '.join(strange)}); move them away")
    manifest.unlink(missing_ok=True)
    for name in sorted(old - set(chosen)):
        (out / name).unlink(missing_ok=True)
    for name, path in chosen.items():
        io.place(path.resolve(), out / name)
