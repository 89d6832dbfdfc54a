"""What a command that failed says: one message that names the file, the fault and the remedy, and no traceback.

Only what a user or a machine can cause is explained; a fault of this program keeps its traceback.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from clip_robustness.core.io import InputError

KEPT = "then run again: what was finished is kept"
OWNER = "give yourself the right to read and write it, or link the folder elsewhere"
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EROFS: "mount it for writing, or link the folder elsewhere",
    errno.EACCES: OWNER,
    errno.EPERM: OWNER,
    errno.EIO: "check the disk or the network behind it",
}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")


def explain(error: BaseException) -> str | None:
    """The message of an error that has one, or None for what is a fault of the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {KEPT.removeprefix('then ')}"
    if is_out_of_memory(error):
        remedy = "give the job more (`set-resources`, key mem_mb), or take a smaller `batch_size` or fewer `threads`"
        return f"out of memory ({str(error).partition(chr(10))[0] or 'no room for an object'}); {remedy}, {KEPT}"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{os.strerror(error.errno)}; {REMEDIES.get(error.errno, 'see to it')}, {KEPT}"
    return None


def check_writable(files: Iterable[str | os.PathLike]) -> None:
    """Errors: `InputError` for a folder into which one of these files is to be written and cannot be."""
    folders = {Path(file).parent for file in files}
    for folder in sorted({next(f for f in (folder, *folder.parents) if f.exists()) for folder in folders}):
        if not os.access(folder, os.W_OK | os.X_OK):
            read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
            raise InputError(str(explain(OSError(errno.EROFS if read_only else errno.EACCES, "", str(folder)))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, where libraries raise a plain RuntimeError."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
