"""Kill -9, the memory killer, Ctrl-C and a time limit at random moments of every stage: nothing is lost.

Five rounds; CLIP_ROBUSTNESS_KILLS sets another number (`make faults`: 50).
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from clip_robustness.core import io
from tests.workflow.conftest import SMALL, SMALL_CONFIG, build_house

from .jobs import Job, one_of_each, remove

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("CLIP_ROBUSTNESS_KILLS", "5"))
FIRST = ("train_mini", "embed_natural", "attack_images", "cache_pixels", "draw_figure")  # one of each wing
PATIENCE = 1800  # seconds until a stage begins, or a stopped run ends


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        parent = psutil.Process(pid)
        below = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [parent, *below]


def commands(processes: list[psutil.Process]) -> dict[int, list[str]]:
    found = {}
    for process in processes:
        try:
            found[process.pid] = process.cmdline()
        except psutil.Error:
            continue
    return found


def of_verb(pid: int, verb: str) -> list[int]:
    """The processes below `pid` that are that verb's."""
    return [p for p, words in commands(family(pid)[1:]).items() if "clip_robustness" in words and verb in words[:6]]


def kill_all(run: subprocess.Popen, verb: str) -> None:
    """What a machine that loses its power does."""
    for process in family(run.pid):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def kill_snakemake(run: subprocess.Popen, verb: str) -> None:
    """Its jobs go on as orphans, perhaps while the next run is at the same files."""
    run.kill()


def kill_job(run: subprocess.Popen, verb: str) -> None:
    """What the kernel does when memory runs out."""
    for pid in of_verb(run.pid, verb):
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue


def interrupt(run: subprocess.Popen, verb: str) -> None:
    """Ctrl-C in a terminal."""
    os.killpg(run.pid, signal.SIGINT)


def terminate(run: subprocess.Popen, verb: str) -> None:
    """A time limit, or a machine that is shut down."""
    os.killpg(run.pid, signal.SIGTERM)


FATES: tuple[Callable[[subprocess.Popen, str], None], ...] = (
    kill_all,
    interrupt,
    kill_job,
    kill_snakemake,
    terminate,
)


SAID = {  # how the run ends
    kill_job: ("1 job failed; what was finished is kept.", "the job was killed", "keys mem_mb and runtime"),
    interrupt: ("Interrupted; what was finished is kept. Give the same command again.",),
    terminate: ("Ended from outside (SIGTERM, as by a shutdown); what was finished is kept.",),
}


def strike(
    house, targets: list[str], job: Job, fate: Callable, delay: float, log: Path, orphans: list[psutil.Process]
) -> tuple[bool, str]:
    """Run Snakemake until that job has begun, and `delay` longer; whether it was struck, and what it printed."""
    with started(house, targets, log) as run:
        wait_for(run, job, log)
        time.sleep(delay)
        if run.poll() is not None:
            return False, log.read_text()
        before = family(run.pid)
        fate(run, job.verb)
        run.wait(PATIENCE)
        if fate is kill_snakemake:
            orphans += before
        else:
            _, left = psutil.wait_procs(before, timeout=60)
            assert not left, f"after {fate.__name__} of {job.rule}, still running: {commands(left)}"
    return run.returncode != 0, log.read_text()  # 0: all was done in that moment


@contextlib.contextmanager
def started(house, targets: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A run of Snakemake in a session of its own, which ends with the test, however that ends."""
    with log.open("w") as file:
        run = subprocess.Popen(
            house.command(*SMALL_CONFIG, *targets),
            cwd=house.path,
            env=house.environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield run
    finally:
        if run.poll() is None:
            kill_all(run, "")
            run.wait()


def wait_for(run: subprocess.Popen, job: Job, log: Path) -> None:
    """Until a process of the job's verb runs, or the run has ended."""
    deadline = time.monotonic() + PATIENCE
    while run.poll() is None and not of_verb(run.pid, job.verb):
        assert time.monotonic() < deadline, f"{job.rule} never began:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def check_no_half_file(path: Path) -> None:
    """Every file under a final name is whole; half-written ones have a temporary name."""
    readers = {".npy": io.load_array, ".json": io.read_json, ".parquet": io.read_parquet}
    for folder in ("results", "resources"):
        for file in (path / folder).rglob("*"):
            if file.suffix in readers and file.name[0] != ".":
                readers[file.suffix](file)
    for manifest in path.glob("resources/*/weights/*/manifest.json"):
        io.check_sealed(manifest.parent)


def differing(path: Path, other: Path, names: Iterable[str] = ("results", "figures", "resources")) -> list[str]:
    """What is not in both, byte for byte, of all that a study leaves but logs, times, and its store."""

    def files(top: Path) -> dict[str, Path]:
        found = (
            file for name in names for file in ([top / name] if (top / name).is_file() else (top / name).rglob("*"))
        )
        left = {str(file.relative_to(top)): file for file in found if file.is_file()}
        return {name: file for name, file in left.items() if not {"benchmarks", "store"} & set(file.parts)}

    mine, theirs = files(path), files(other)
    return sorted(
        name
        for name in mine.keys() | theirs.keys()
        if not name.endswith(".lock")
        and (name not in mine or name not in theirs or content(mine[name]) != content(theirs[name]))
    )


def content(file: Path) -> bytes:
    """Of the study's page without its section on the run, whose times differ from run to run."""
    return re.sub(rb'<section id="run".*?</section>', b"", file.read_bytes(), flags=re.DOTALL)


def keep_dates(path: Path, like: Path, names: Iterable[str]) -> None:
    """So that what is made from these files, which are as before, need not be made again for this test."""
    for name in names:
        for file in [path / name, *(path / name).rglob("*")]:
            times = (like / file.relative_to(path)).stat()
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_whatever_ends_a_run_at_any_moment_nothing_is_lost(small_house, copied, jobs, tmp_path):
    """Every stage in turn, by every fate in turn: strike, look for half files and orphans, go on.

    In the end every file is, byte for byte, that of the uninterrupted run.
    """
    stages, moments = one_of_each(jobs), random.Random(ROUNDS)
    order = [rule for rule in reversed(FIRST) if rule in stages]
    orphans: list[psutil.Process] = []
    struck = 0
    while struck < ROUNDS:
        if not order:
            order = moments.sample(sorted(stages), len(stages))
        job, fate = stages[order.pop()], FATES[struck % len(FATES)]
        remove(copied.path, job)
        hit, said = strike(copied, job.outputs[:1], job, fate, 4 * moments.random() ** 2, tmp_path / "log", orphans)
        print(f"{job.rule}: {fate.__name__ if hit else 'it was done'}")
        if hit:
            struck += 1
            check_no_half_file(copied.path)
            ended = "(100%) done" in said  # in the moment of the blow
            if fate is kill_all and not ended:
                refused = copied.snakemake(*SMALL_CONFIG, job.outputs[0], fails=True)
                assert "LockException" in refused and "--unlock" in refused, refused[-3000:]
            if fate in (kill_all, kill_snakemake):
                copied.snakemake("--unlock", *SMALL_CONFIG)
            assert ended or all(words in said for words in SAID.get(fate, ())), said[-3000:]
            copied.snakemake(*SMALL_CONFIG, job.outputs[0])
        assert differing(copied.path, small_house.path, job.outputs) == []
        keep_dates(copied.path, small_house.path, job.outputs)
    psutil.wait_procs(orphans, timeout=PATIENCE)
    assert differing(copied.path, small_house.path) == []
    assert copied.jobs(*SMALL_CONFIG) == {}
    assert not list(copied.path.glob("re*/**/.*-*.????????*")), "what killed jobs left was swept away"


@pytest.mark.skipif(ROUNDS <= 5, reason="long; `make faults` runs it")
def test_a_study_that_is_killed_again_and_again_from_its_beginning_is_finished(small_house, root, tmp_path):
    """Kill -9 at random moments of a whole run, until one comes to its end."""
    house, moments, kills = build_house(tmp_path / "house", root), random.Random(1), 0
    (house.path / "small.yaml").write_text(SMALL)
    while True:
        with started(house, [], tmp_path / "log") as run:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(moments.uniform(10, 60))
            if run.poll() is not None:
                break
        kills += 1
        check_no_half_file(house.path)
        house.snakemake("--unlock", *SMALL_CONFIG)
    assert run.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert kills >= 5 and differing(house.path, small_house.path) == []
