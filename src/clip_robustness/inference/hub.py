"""Files of a model hub's repository: found, brought by huggingface_hub, compared with their checksums, pinned.

huggingface_hub's own cache, token and offline switch (HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE) hold. Where there is no
network, the cache serves what an earlier fetch has left in it.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import pin, pins_of


class Place(NamedTuple):
    """`OWNER/NAME[@REVISION][:FILE]`, as it stands after `hub:` in a line of models.tsv."""

    repository: str
    revision: str = ""
    file: str = ""

    @classmethod
    def parse(cls, text: str) -> "Place":
        repository, _, file = text.partition(":")
        repository, _, revision = repository.partition("@")
        return cls(repository, revision, file)


Bring = Callable[[str], Path]  # name of a file in a repository -> where it lies here


class Fetched(NamedTuple):
    commit: str
    files: Mapping[str, Path]


def fetch_files(
    where: str, key: str, place: Place, choose: Callable[[Sequence[str], Bring], Sequence[str]], lock: Path | None
) -> Fetched:
    """Bring the files that `choose` picks of a repository's file names, at one commit.

    where: what error messages begin with. choose: it may bring single files to look at before it picks.
    key: the entry of the lock file that pins the commit and every file's SHA-256 when they first come; it decides the
    commit unless `place` names a revision. Without a lock file nothing is pinned. The files lie in the hub's cache.
    Errors: `InputError` for a repository or revision that is missing or gated, for no network and nothing in the cache,
    for a file whose content is not what the hub, or the lock file, says.
    """
    from huggingface_hub import hf_hub_download

    pinned = pins_of(lock).get(key, {}) if lock else {}
    revision = place.revision or pinned.get("revision") or "main"
    with _errors_named(f"{where}, revision '{revision}'", place.repository):
        commit, expected = _look_up(place.repository, revision)

        def bring(name: str) -> Path:
            return Path(hf_hub_download(place.repository, name, revision=commit))

        files = {name: bring(name) for name in choose(sorted(expected), bring)}
    checksums = {name: _check(path, expected[name], where) for name, path in files.items()}
    if not lock:
        return Fetched(commit, files)
    try:
        pin(lock, key, {"revision": commit, "files": checksums})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Fetched(commit, files)


def _look_up(repository: str, revision: str) -> tuple[str, dict[str, str | None]]:
    """The commit, and each file's SHA-256 as far as it is known: by the hub, or by the name of the cache's blob."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        return str(info.sha), {f.rfilename: f.lfs.sha256 if f.lfs else None for f in info.siblings or ()}
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HTTPError, OSError) as error:
        try:  # no file is asked for: the folder is
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
        except errors.LocalEntryNotFoundError:
            raise error from None
    blobs = {path.relative_to(folder).as_posix(): path.resolve() for path in folder.rglob("*") if path.is_file()}
    named = {name: blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None for name, blob in blobs.items()}
    return folder.name, named


def _check(path: Path, expected: str | None, where: str) -> str:
    found = io.sha256_file(path)
    if expected not in (None, found):
        remedy = f"Remedy: delete {path.resolve()}, and run again where there is a network"
        raise InputError(f"{where}: {path.name} has the SHA-256 {found}, the hub says {expected}. {remedy}")
    return found


@contextlib.contextmanager
def _errors_named(where: str, repository: str) -> Iterator[None]:
    """Say in one line what a failure of the hub means, and what to do about it."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        remedy = f"accept its terms at {constants.ENDPOINT}/{repository} and log in with `hf auth login`"
        raise InputError(f"{where}: the repository is gated; {remedy}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{where}: the repository has no such revision; correct the line in models.tsv") from None
    except errors.RepositoryNotFoundError:
        remedy = "correct the line in models.tsv, or log in with `hf auth login` if it is private"
        raise InputError(f"{where}: no such repository; {remedy}") from None
    except errors.HFValidationError as error:
        raise InputError(f"{where}: not a repository's name ({error})") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        remedy = "run where there is a network, or name your copy as local:PATH"
        raise InputError(f"{where}: not in {constants.HF_HUB_CACHE}, and no hub to ask; {remedy} ({error})") from None
    except (errors.HTTPError, OSError) as error:
        remedy = "run again where there are a network and room; what came is kept"
        raise InputError(f"{where}: could not be fetched ({error}); {remedy}") from None
