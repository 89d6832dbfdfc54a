"""The jobs of a finished study as Snakemake itself lists them: rule, outputs, and the command's words."""

import csv
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    rule: str
    outputs: tuple[str, ...]
    words: tuple[str, ...]  # the verb and its options

    @property
    def verb(self) -> str:
        return self.words[0]

    @property
    def store(self) -> str | None:
        """The folder of finished work, without which the job has all to do."""
        return self.words[self.words.index("--work") + 1] if "--work" in self.words else None


def jobs_of(house, *config: str) -> list[Job]:
    """All jobs of a study that call a verb."""
    run = house.snakemake(*config[:-1], "--detailed-summary", *config[-1:])
    lines = run.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("output_file\t"))
    outputs: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(lines[start:], delimiter="\t", quoting=csv.QUOTE_NONE):
        if row.get("shellcmd"):
            outputs.setdefault((row["rule"], row["shellcmd"]), []).append(row["output_file"])
    return [Job(rule, tuple(files), _words(command)) for (rule, command), files in outputs.items()]


def _words(command: str) -> tuple[str, ...]:
    call = re.sub(r"\s(2>&1 \| tee|2>)\s.*$", "", command.partition("-m clip_robustness ")[2])
    return tuple(shlex.split(call))


def one_of_each(jobs: list[Job]) -> dict[str, Job]:
    """The last job of every rule: late models are small."""
    return {job.rule: job for job in sorted(jobs, key=lambda job: job.outputs)}


def redirected(job: Job, folder: Path) -> list[str]:
    """The words of a job that writes into another folder: its outputs by name, or the folder that holds them."""
    named = set(job.outputs) & set(job.words)
    moved = {output: str(folder / output) for output in named}
    if not named:
        moved = {str(Path(output).parent): str(folder / Path(output).parent) for output in job.outputs}
    if job.store:
        moved[job.store] = str(folder / job.store)
    return [moved.get(word, word) for word in job.words]


def remove(folder: Path, job: Job) -> None:
    """Take a job's outputs away, and what its work folder keeps of them."""
    for output in job.outputs:
        path = folder / output
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if job.store:
        shutil.rmtree(folder / job.store, ignore_errors=True)
