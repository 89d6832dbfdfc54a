"""What the whole paper study costs the scheduler: python benchmarks/scale.py [plan | run | stream | all]

plan     dry run and `plan` of the paper, lite and mini studies: jobs, seconds, peak memory
run      the paper study, simulated: its real rules, inputs, outputs, parameters and command lines, in a temporary
         folder where `python` does nothing and every job writes {} to its outputs. Then once more, with nothing to do
stream   metrics on embeddings that are larger than the memory they may take

A simulated run costs what Snakemake costs: choosing jobs, starting shells, recording what was done. CPU is that of the
scheduler's own process; shells are what the jobs' processes took.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from clip_robustness.core import io

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "rules", "envs", "config", "profiles", "src", "report")
STUDIES = ("config", "lite", "mini")
CLASSES = 1000


class Used(NamedTuple):
    """What a command took: seconds of its own process and of its children, and of the clock, and MB at its peak."""

    cpu: float
    children: float
    wall: float
    megabytes: float
    output: str


def measured(command: Sequence[str | Path], folder: Path) -> Used:
    """Run a command in `folder`. Errors: SystemExit with the end of what it printed, when it fails."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = psutil.Popen([str(word) for word in command], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        own, peak = process.cpu_times(), 0
        while process.poll() is None:
            try:
                own, peak = process.cpu_times(), max(peak, _peak(process.pid))
            except (psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError):
                break
            time.sleep(0.02)
        code = process.wait()
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if code:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {code}\n{text[-3000:]}")
    return Used(own.user + own.system, own.children_user + own.children_system, wall, peak / 1e6, text)


def _peak(pid: int) -> int:
    """The process's peak of resident memory in bytes, as Linux counts it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def copy_checkout(folder: Path) -> Path:
    """What the workflow needs, without results."""
    for part in PARTS:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def simulate(folder: Path) -> Path:
    """Change a copy of the checkout so that jobs do nothing but write `{}` to each of their outputs.

    The command lines stay, with a `python` that does nothing: what is too long for the system fails here too.
    """
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(shutil.which("true") or "/bin/true")
    _edit(folder / "rules/common.smk", "Path(sys.executable).parent", "ROOT / 'bin'")
    _edit(folder / "rules/data.smk", "    stop_if_missing()", "    pass")  # what must be registered for is there too
    for path in (folder / "rules").glob("*.smk"):
        rules = re.split(r"^(?=\s*rule\b)", path.read_text(), flags=re.M)
        for number, rule in enumerate(rules):
            make = "mkdir -p {output:q}" if "directory(" in rule else "tee {output:q} <<< '{{}}' > /dev/null"
            rules[number] = re.sub(r"^( +)shell:\n", rf'\g<0>\1    "{make}; "\n', rule, flags=re.M)
        path.write_text("".join(rules))
    return folder


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise SystemExit(f"{path}: has no {old!r} any more; change this benchmark with it")
    path.write_text(text.replace(old, new))


def snakemake(folder: Path, *arguments: str) -> Used:
    return measured([sys.executable, "-m", "snakemake", *arguments], folder)


def plans(folder: Path) -> None:
    copy_checkout(folder)
    print(f"{'study':8}{'':10}{'jobs':>8}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}")
    for study in STUDIES:
        config = f"config/{study}.yaml"
        dry = snakemake(folder, "--dry-run", "--configfile", config)
        plan = measured([sys.executable, "-m", "clip_robustness", "plan", "--config", config], folder)
        jobs, hours, disk, network = totals(plan.output)
        for name, used, number in (
            ("dry run", dry, int(re.findall(r"^total +(\d+)$", dry.output, re.M)[-1])),
            ("plan", plan, jobs),
        ):
            print(f"{study:8}{name:10}{number:8}{used.cpu:8.1f}{used.wall:8.1f}{used.megabytes:9.0f}")
        print(
            f"{study:8}in sum: {hours:,.0f} GPU-hours, {disk:,.0f} GB of disk, {network:,.0f} GB from the network",
            flush=True,
        )


def totals(plan: str) -> tuple[int, float, float, float]:
    """Jobs, GPU-hours, GB on disk and GB from the network, of what the verb `plan` printed."""
    rows = [re.split(r"  +", line.replace(",", "")) for line in plan.splitlines()]
    named = {name: [row for row in rows if row[0] == name] for name in ("all", "all rules", "all evaluated", "weights")}
    network = sum(float(number) for number in (*named["all evaluated"][0][2:4], *named["weights"][0][1:3]))
    disk, hours = (float(row[-1]) for row in named["all"][:2])
    return int(named["all rules"][0][-1]), hours, disk, network


def runs(folder: Path, cores: Sequence[str], options: Sequence[str], targets: Sequence[str]) -> None:
    print(f"{'cores':>5}  {'run':18}{'jobs':>7}{'CPU s':>8}{'shells':>8}{'wall s':>8}{'ms a job':>9}{'peak MB':>9}")
    for number in cores:
        house = simulate(copy_checkout(folder / number))
        for run in ("first", "nothing to do"):
            used = snakemake(house, "--cores", number, "--resources", f"gpu={number}", *options, "--", *targets)
            done = re.findall(r"^(\d+) of \d+ steps \(100%\) done", used.output, re.M)
            jobs = int(done[-1]) if done else 0
            each = f"{1000 * used.cpu / jobs:9.1f}" if jobs else f"{'':9}"
            print(
                f"{number:>5}  {run:18}{jobs:7}{used.cpu:8.1f}{used.children:8.1f}{used.wall:8.1f}{each}"
                f"{used.megabytes:9.0f}",
                flush=True,
            )


def write_corrupted(folder: Path, photographs: int, settings: int) -> None:
    """Logits (float16, all 0, so that the file takes no disk) of photographs under 5 severities of corruptions."""
    folder.mkdir(parents=True, exist_ok=True)
    n, names = photographs * settings, [f"corruption_{k}" for k in range(settings // 5)]
    ids = [f"{c}/{s}/n01440764/ILSVRC2012_val_{i:08d}" for c in names for s in range(1, 6) for i in range(photographs)]
    np.lib.format.open_memmap(folder / "e.npy", "w+", np.float16, (n, CLASSES)).flush()
    facts = {"model": "none", "dataset": "corrupted", "kind": "logits", "n": n, "dim": CLASSES}
    io.write_json(folder / "e.json", {**facts, "ids_sha256": io.ids_digest(ids)})
    columns = {
        "corruption": np.repeat(np.array(names, object), 5 * photographs),
        "severity": np.tile(np.repeat(np.arange(1, 6, dtype=np.int32), photographs), len(names)),
        "label": np.tile(np.arange(photographs, dtype=np.int32) % CLASSES, settings),
        "archive": np.repeat(np.array([f"{name}.tar" for name in names], object), 5 * photographs),
        "offset": np.arange(n, dtype=np.int64),
    }
    io.write_parquet(folder / "index.parquet", {"image_id": ids, **columns})
    classes = [f"class {i}" for i in range(CLASSES)]
    space = {"name": "base", "base": None, "pool": "max", "classes": classes, "members": [[i] for i in range(CLASSES)]}
    io.write_json(folder / "space.json", space)


def verb(folder: Path, name: str, *more: str) -> Used:
    files = ("--embeddings", "e.npy", "--index", "index.parquet", "--labels", "space.json", "--out", "out.json")
    return measured([sys.executable, "-m", "clip_robustness", name, *files, *more], folder)


def streams(folder: Path, settings: Sequence[int]) -> None:
    print(f"{'verb':20}{'images':>10}{'array MB':>9}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}")
    for number in settings:
        here = folder / f"stream{number}"
        write_corrupted(here, 50_000, number)
        for name, more in (("measure-corruption", ()), ("measure-accuracy", ("--predictions", "p.parquet"))):
            used, n = verb(here, name, *more), 50_000 * number
            size = n * CLASSES * 2 / 1e6
            print(f"{name:20}{n:10,}{size:9,.0f}{used.cpu:8.1f}{used.wall:8.1f}{used.megabytes:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "run", "stream", "all"), nargs="?", default="all")
    parser.add_argument("--cores", nargs="+", default=["2"], help="of the simulated run; each is a run from nothing")
    parser.add_argument("--targets", nargs="+", default=[], help="of the simulated run (default: the whole study)")
    parser.add_argument("--options", default="", help="further options of Snakemake, such as '--scheduler ilp'")
    parser.add_argument("--settings", type=int, nargs="+", default=[5, 30], help="x 50,000 images, to stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.part in ("plan", "all"):
            plans(folder / "plan")
        if options.part in ("run", "all"):
            runs(folder / "run", options.cores, options.options.split(), options.targets)
        if options.part in ("stream", "all"):
            streams(folder, options.settings)


if __name__ == "__main__":
    main()
