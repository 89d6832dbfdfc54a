"""All metrics of one classifier, as its rules run them: python benchmarks/metrics.py [--images 50000] [--sets 8]

Logits (float16, 1,000 classes) of an in-distribution set and of shifts are made in a temporary folder: a model that
is right on about four in five images and less on a shift, and sure of most. Each verb then runs as a process of its own
on one core, imports included: accuracy of every set (a shift's with its reference), the temperature, calibration of
every set before and after it, with 1,000 resamples. Prints seconds of processor and wall, and the peak memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clip_robustness.core import io

CLASSES = 1000
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def write_dataset(folder: Path, name: str, n: int, margin: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % CLASSES).astype(np.int32)
    logits = np.empty((n, CLASSES), np.float16)
    for start in range(0, n, 1000):
        block = rng.standard_normal((min(1000, n - start), CLASSES), dtype=np.float32) * 1.6
        block[np.arange(len(block)), label[start : start + 1000]] += rng.normal(margin, 4, len(block))
        logits[start : start + 1000] = block
    ids = [f"{name}/ILSVRC2012_val_{i:08d}.JPEG" for i in range(n)]
    io.save_array(folder / f"{name}.npy", logits)
    facts = {"model": "random", "dataset": name, "kind": "logits", "n": n, "dim": CLASSES}
    io.write_json(folder / f"{name}.json", {**facts, "ids_sha256": io.ids_digest(ids)})
    io.write_parquet(folder / f"{name}.parquet", {"image_id": ids, "label": label})


def jobs(folder: Path, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Verb and arguments of every job, as of rules/metrics.smk."""
    space, temperature = str(folder / "space.json"), str(folder / "temperature.json")

    def of(name: str, prefix: str = "") -> list[str]:
        files = {"embeddings": folder / f"{name}.npy", "index": folder / f"{name}.parquet", "labels": space}
        return [word for option, path in files.items() for word in (f"--{prefix}{option}", str(path))]

    for name in names:
        partner = of(names[0], "reference-") if name != names[0] else []
        out = ["--out", str(folder / f"{name}.accuracy.json"), "--predictions", str(folder / f"{name}.top1.parquet")]
        yield "measure-accuracy", [*of(name), *partner, *out]
    yield "fit-temperature", [*of(names[0]), "--out", temperature]
    for name in names:
        held_out = ["--held-out", str(int(name == names[0]))]
        out = ["--out", str(folder / f"{name}.calibration.json")]
        yield "measure-calibration", [*of(name), "--temperature", temperature, *held_out, *out]


def run(verb: str, arguments: list[str]) -> tuple[float, float, int]:
    """Seconds of processor and wall, and bytes of memory at the peak, of one verb."""
    environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(Path(io.__file__).resolve().parents[2])}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "clip_robustness", verb, *arguments], env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{verb} {' '.join(arguments)}: exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="in each set")
    parser.add_argument("--sets", type=int, default=8, help="the in-distribution set and shifts")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many counts")
    parser.add_argument("--keep", type=Path, help="folder to keep inputs and results in; inputs there are used again")
    options = parser.parse_args()
    names = ["val", *(f"shift{i}" for i in range(1, options.sets))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        classes = [f"class {i}" for i in range(CLASSES)]
        space = {"name": "base", "base": None, "classes": classes, "members": [[i] for i in range(CLASSES)]}
        io.write_json(folder / "space.json", {**space, "pool": "max"})
        for i, name in enumerate(names):
            if not (folder / f"{name}.parquet").is_file():
                write_dataset(folder, name, options.images, 9 if name == "val" else 8 - i, i)
        found: dict[str, list[tuple[float, float, int]]] = {}
        for verb, arguments in jobs(folder, names):
            found.setdefault(verb, []).append(min(run(verb, arguments) for _ in range(options.repeats)))
    print(f"{options.sets} x {options.images:,} images x {CLASSES:,} logits, one core")
    print(f"{'verb':24}jobs    CPU s    wall s  peak MB")
    found["sum"] = [used for runs in found.values() for used in runs]
    for verb, runs in found.items():
        used, wall, memory = zip(*runs, strict=True)
        print(f"{verb:24}{len(runs):4}{sum(used):9.2f}{sum(wall):10.2f}{max(memory) / 1e6:9.0f}")


if __name__ == "__main__":
    main()
