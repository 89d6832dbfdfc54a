"""The lock file, which pins what was downloaded first so that every later download is the same, and file locks."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_robustness.core import io
from clip_robustness.core.io import InputError


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pin(lock: Path, key: str, facts: Mapping[str, Any]) -> None:
    """Enter `facts` under `key` in the lock file, or compare them with what stands there."""
    with alone(lock):
        pins = pins_of(lock)
        if key in pins:
            if pins[key] != facts:
                remedy = "Remedy: fetch it again; if you trust a changed release, remove that entry"
                raise InputError(f"{lock}, {key}: pinned {pins[key]}, found {dict(facts)}. {remedy}")
            return
        io.write_json(lock, {**pins, key: facts})
        say(f"{key}: pinned in {lock}; commit that file")


def pins_of(lock: Path) -> dict[str, Any]:
    """What is pinned, by key; nothing where there is no file yet. Errors: `InputError` for a file that is no lock."""
    try:
        pins = io.read_json(lock) if lock.exists() else {}
    except InputError as error:  # to delete it would be to forget all pins
        raise InputError(f"{str(error).partition('; ')[0]}; take the committed file again") from None
    if not isinstance(pins, dict) or not all(isinstance(pin, dict) and _states(pin) for pin in pins.values()):
        raise InputError(f"{lock}: expected an object of objects; take the committed file again")
    return pins


def _states(pin: Mapping[str, Any]) -> bool:
    """Whether it has nothing but texts, whole numbers, and texts by name."""
    inner = [part for fact in pin.values() for part in (fact.values() if isinstance(fact, dict) else [fact])]
    return all(isinstance(fact, str | int | None) for fact in inner)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time for `path`; the kernel frees the lock when a process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    guard = path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # no link of somebody else's
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{path}: another process is at it; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), guard.stat()):
                break
        os.close(handle)  # its holder has removed it: a newer one may be held
    try:
        yield
    finally:
        guard.unlink(missing_ok=True)
        os.close(handle)
