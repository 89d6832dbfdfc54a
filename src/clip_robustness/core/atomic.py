"""Files that appear under their names only when they are whole, and what a killed process leaves behind."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # never of a file that is read
HOST = re.sub(r"[^\w-]", "_", os.uname().nodename)


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it.

    The temporary name keeps the suffix, because some writers choose a format by it. What a killed process has left of
    the same file is removed. Errors: an `OSError` names `path`, also where the system names nothing (a full disk).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _named(path, temporary):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A temporary folder beside the folder `out`, as of `atomic`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(out)
    try:
        with _named(out, folder):
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """An error of the system names `path`, where it names nothing, the temporary file, or a file that was copied."""
    try:
        yield
    except OSError as error:
        of_temporary = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not (of_temporary or error.errno in FULL):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _temporary(path: Path) -> Path:
    """A new name beside `path`. What stands under such names of processes that are no more is removed."""
    name = re.compile(rf"\.{re.escape(path.stem)}\.{HOST}-(\d+)\.[0-9a-f]{{8}}{re.escape(path.suffix)}")
    for left in list(path.parent.iterdir()):
        if (match := name.fullmatch(left.name)) and not _is_running(int(match[1])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f".{path.stem}.{HOST}-{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


def _is_running(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
