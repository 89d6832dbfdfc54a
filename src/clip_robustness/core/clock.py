"""Whether dates can be trusted: what is made again is decided by which file is newer."""

import contextlib
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from clip_robustness.core.io import InputError

SLACK = 60.0  # seconds by which the clocks of a cluster's machines may differ


def check_clock(folders: Iterable[str | os.PathLike]) -> None:
    """Errors: `InputError` when a file below `folders` is dated in the future.

    A result made now would then be older than what it is made from: it would be made again for ever, and one that is
    out of date could pass for fresh.
    """
    there = [Path(folder) for folder in folders if Path(folder).exists()]
    now = time.time()
    ahead = [(date, path) for folder in there for date, path in _dates(folder) if date > now + SLACK]
    if not ahead:
        return
    date, path = max(ahead)
    more = f" and {len(ahead) - 1:,} more files are" if len(ahead) > 1 else " is"
    names = shlex.join(str(folder) for folder in there)
    raise InputError(
        f"{path} ({_text(date)}){more} dated in the future: the clock says {_text(now)}.\n"
        "It was set back, or was wrong when they were written, so what is newer than what cannot be told.\n"
        "Remedy: if the clock is wrong, set it right. If it is right, make these files old, and what depends on them "
        f"is checked anew:\n    find {names} -newermt now -exec touch -d 2000-01-01 {{}} +"
    )


def _dates(folder: Path) -> Iterator[tuple[float, str]]:
    waiting = [str(folder)]
    while waiting:
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:  # another run is at work
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False).st_mtime, entry.path


def _text(date: float) -> str:
    return datetime.fromtimestamp(date).isoformat(" ", "seconds")
