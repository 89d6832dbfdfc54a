"""How long a metric job takes as a whole process: python benchmarks/metric_job.py [images] [classes]

Writes features (512-d, float16), a head, an index and label spaces of the given size to a temporary folder,
runs each metric in a fresh single-threaded Python, imports included, and prints the best of three. The
job `accuracy with reference` goes through two sets of images of the given size.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from clip_robustness.core import io

DIMENSIONS = 512
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def write_dataset(folder: Path, name: str, n: int, classes: int, weight: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n).astype(np.int32)
    features = rng.standard_normal((n, DIMENSIONS), dtype=np.float32) / DIMENSIONS**0.5 + 0.17 * weight[label]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ids = np.array([f"{name}/{i:08d}.jpg" for i in range(n)], object)
    io.save_array(folder / f"{name}.npy", features.astype(np.float16))
    facts = {"model": "random", "dataset": name, "kind": "features", "n": n, "dim": DIMENSIONS}
    io.write_json(folder / f"{name}.json", {**facts, "ids_sha256": io.ids_digest(ids)})
    texture = rng.integers(0, classes, n).astype(np.int32)
    io.write_parquet(folder / f"{name}.parquet", {"image_id": ids, "label": label, "texture_class": texture})


def write_inputs(folder: Path, n: int, classes: int) -> None:
    weight = np.random.default_rng(0).standard_normal((classes, DIMENSIONS), dtype=np.float32)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    head = {"weight": weight, "scale": np.float32(60), "bias": np.float32(0)}
    np.savez(folder / "prompts.base.npz", allow_pickle=False, **head)
    names = [f"class {i}" for i in range(classes)]
    space = {"name": "base", "base": None, "classes": names, "members": [[i] for i in range(classes)]}
    io.write_json(folder / "space.json", {**space, "pool": "max"})
    write_dataset(folder, "val", n, classes, weight, 1)
    write_dataset(folder, "shift", n, classes, weight, 2)


def best_time(folder: Path, code: str) -> tuple[float, float]:
    """Wall and processor seconds of the fastest of three runs; they differ when the machine is busy."""
    setup = f"from pathlib import Path; F = Path({str(folder)!r}); H = F / 'prompts.base.npz'\n"
    setup += "def of(name): return F / f'{name}.npy', F / f'{name}.parquet', F / 'space.json'\n"
    source = str(Path(io.__file__).resolve().parents[2])
    environment = {**os.environ, **ONE_CORE, "PYTHONPATH": source}
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", setup + code], check=True, env=environment)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append((after.elapsed - before.elapsed, used))
    return min(seconds)


def main() -> None:
    n, classes = (int(value) for value in (*sys.argv[1:], "50000", "1000")[:2])
    package = "from clip_robustness.metrics"
    jobs = {
        "accuracy": f"{package}.accuracy import measure_accuracy as m\n"
        "m(*of('shift'), F / 'a.json', F / 'a.parquet', H)",
        "accuracy with reference": f"{package}.accuracy import measure_accuracy as m\n"
        "m(*of('shift'), F / 'a.json', F / 'a.parquet', H, *of('val'))",
        "temperature": f"{package}.calibration import fit_temperature_file as m\n"
        "m(*of('val'), F / 'temperature.json', H)",
        "calibration": f"{package}.calibration import measure_calibration as m\n"
        "m(*of('shift'), F / 'temperature.json', F / 'c.json', H)",
        "shape bias": f"{package}.shape_bias import measure_shape_bias as m\nm(*of('shift'), F / 's.json', H)",
    }
    print(f"{n:,} images, {classes:,} classes, {DIMENSIONS} dimensions, float16, one core")
    print(f"{'job':28}wall s   CPU s")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), n, classes)
        for name, code in jobs.items():
            wall, used = best_time(Path(folder), code)
            print(f"{name:28}{wall:6.2f}  {used:6.2f}", flush=True)


if __name__ == "__main__":
    main()
