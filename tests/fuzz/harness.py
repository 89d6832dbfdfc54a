"""One case: a folder, a spoiled input, a reader; and what must hold whatever the input is."""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from clip_robustness.core.io import InputError

SECONDS = 20  # of processor time; the slowest honest case takes a hundredth


class Stray(AssertionError):
    """Something outside the case's folder was written, changed or removed."""


class TooSlow(AssertionError):
    """More processor time than any case of this size may take."""


@dataclasses.dataclass(frozen=True)
class Target:
    """`run(random, folder)` writes a spoiled input to the empty folder and reads it by the project's own code."""

    name: str
    run: Callable[[Random, Path], object]


def run_case(target: Target, random: Random, work: Path) -> bool:
    """Whether the input was accepted; `InputError` is the only other way out.

    Errors: whatever else the reader raises, `Stray` and `TooSlow`.
    """
    shutil.rmtree(work, ignore_errors=True)
    folder, elsewhere = work / "here" / "case", work / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    for canary in _canaries(work):
        canary.write_text("untouched")
    before = Path.cwd()
    os.chdir(elsewhere)
    try:
        with _processor_time(), contextlib.redirect_stderr(io.StringIO()):
            target.run(random, folder)
        accepted = True
    except InputError as error:
        assert str(error).strip(), "an error without words"
        accepted = False
    finally:
        os.chdir(before)
    _check_strays(work)
    return accepted


def _canaries(work: Path) -> list[Path]:
    return [work / "canary", work / "here" / "canary", work / "elsewhere" / "canary"]


def _check_strays(work: Path) -> None:
    found = sorted(path for path in work.rglob("*") if work / "here" / "case" not in (path, *path.parents))
    if found != sorted([*_canaries(work), work / "here", work / "elsewhere"]):
        raise Stray(f"found {[str(path.relative_to(work)) for path in found]}")
    for canary in _canaries(work):
        if canary.read_text() != "untouched":
            raise Stray(f"{canary.relative_to(work)} was changed")


@contextlib.contextmanager
def _processor_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
