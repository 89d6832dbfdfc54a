"""The long run: ``python -m tests.fuzz``, or ``make fuzz``.

FUZZ_MINUTES says for how long (10), FUZZ_TARGETS which (all), FUZZ_SEED where it begins (0). What fails is printed with
the two words that repeat it:

    python -m tests.fuzz TARGET SEED
"""

import collections
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.harness import Target, run_case
from tests.fuzz.targets import TARGETS, warm

MEMORY = 6 << 30  # bytes of address space: what grows beyond is an error, not a full machine
ROUND = 50  # cases of a target before the next one's turn


def main() -> int:
    if len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as work:
            print(
                "accepted" if run_case(TARGETS[sys.argv[1]], Random(int(sys.argv[2])), Path(work) / "w") else "refused"
            )
        return 0
    end = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "10"))
    names = os.environ.get("FUZZ_TARGETS", "").split() or sorted(TARGETS)
    first = int(os.environ.get("FUZZ_SEED", "0"))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warm()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        while time.monotonic() < end:
            for name in names:
                _round(name, range(first, first + ROUND), Path(work), end, counts, findings)
            first += ROUND
    return report(names, counts, findings)


def _round(
    name: str,
    seeds: range,
    work: Path,
    end: float,
    counts: collections.Counter[tuple[str, str]],
    findings: dict[str, str],
) -> None:
    """In a process of its own, since a fault of a library may end it."""
    context = multiprocessing.get_context("fork")
    at, notes = context.Value("q", seeds.start), work / "notes.json"

    def cases() -> None:
        found: collections.Counter[str] = collections.Counter()
        for seed in seeds:
            if time.monotonic() > end:
                break
            at.value = seed
            found[outcome_of(TARGETS[name], Random(seed), str(seed), work / "w", findings)] += 1
            notes.write_text(json.dumps([found, findings]))

    notes.unlink(missing_ok=True)
    process = context.Process(target=cases)
    process.start()
    process.join()
    if notes.exists():
        found, more = json.loads(notes.read_text())
        counts.update({(name, outcome): count for outcome, count in found.items()})
        findings.update(more)
    if process.exitcode:
        counts[name, "found"] += 1
        _note(f"{name} ended with {process.exitcode}", f"python -m tests.fuzz {name} {at.value}", "", findings)
        if at.value + 1 < seeds.stop:
            _round(name, range(at.value + 1, seeds.stop), work, end, counts, findings)


def outcome_of(target: Target, random: Random, seed: str, work: Path, findings: dict[str, str]) -> str:
    """Run a case; a finding is printed once for each place in the code, with the `seed` that repeats it."""
    try:
        return "accepted" if run_case(target, random, work) else "refused"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "clip_robustness" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "harness"
        key = f"{target.name} {type(error).__name__} {place}"
        _note(key, f"python -m tests.fuzz {target.name} {seed}", str(error), findings)
        return "found"


def _note(key: str, again: str, words: str, findings: dict[str, str]) -> None:
    if key not in findings:
        findings[key] = again
        print(f"FOUND {key}: {words[:200]!r}\n    {again}", flush=True)


def report(names: list[str], counts: collections.Counter, findings: dict[str, str]) -> int:
    print(f"{'target':<16}{'cases':>10}{'refused':>10}{'accepted':>10}{'found':>8}")
    columns: list[Callable[[str], int]] = [
        lambda name: sum(n for (target, _), n in counts.items() if target == name),
        *(lambda name, what=what: counts[name, what] for what in ("refused", "accepted", "found")),
    ]
    for name in names:
        print(
            f"{name:<16}" + "".join(f"{column(name):>{w}}" for column, w in zip(columns, (10, 10, 10, 8), strict=True))
        )
    print(f"{sum(counts.values()):,} cases, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
