"""Guided by coverage: ``python -m tests.fuzz.guided [TARGET ...]`` for FUZZ_MINUTES minutes (10).

It needs atheris (``pip install atheris``), which is no dependency of the project. libFuzzer's bytes are not the spoiled
file but the choices of how to spoil it, so that what it learns is which choices lead further into a reader.
"""

import collections
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from random import Random

PRINTED = 1_000  # cases from one table of totals to the next: libFuzzer ends the process without a last word


class Choices(Random):
    """A generator whose numbers are read from bytes; when they are used up, each is 0."""

    def __new__(cls, data: bytes) -> "Choices":
        return super().__new__(cls)

    def __init__(self, data: bytes):
        self._data, self._at = data, 0
        super().__init__(0)

    def random(self) -> float:
        return int.from_bytes(self._take(2)) / 65536

    def getrandbits(self, k: int) -> int:
        count = -(-k // 8)
        return int.from_bytes(self._take(count)) >> (8 * count - k)

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")


def main() -> int:
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed; `make fuzz` runs without it")
        return 0
    import atheris

    with atheris.instrument_imports(include=["clip_robustness", "tarfile", "zipfile", "yaml", "jsonschema"]):
        from tests.fuzz.__main__ import outcome_of, report
        from tests.fuzz.targets import TARGETS, warm

        names = sys.argv[1:] or sorted(TARGETS)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    findings: dict[str, str] = {}
    folder = tempfile.mkdtemp(prefix="fuzz-")

    def once(data: bytes) -> None:
        choices = Choices(data)
        target = TARGETS[names[choices.randrange(len(names))]]
        counts[target.name, outcome_of(target, choices, data.hex(), Path(folder) / "w", findings)] += 1
        if sum(counts.values()) % PRINTED == 0:
            report(names, counts, findings)

    warm()
    seconds = round(60 * float(os.environ.get("FUZZ_MINUTES", "10")))
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-max_len=512", "-rss_limit_mb=6000", "-verbosity=0"], once
    )
    atheris.Fuzz()  # which ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
