"""Time and memory of the search for near-duplicates: python benchmarks/overlap.py [references] [queries] [dimensions]

Writes float16 features of norm 1 to a temporary folder (1 GB at 1,000,000 x 512), in shards of 100,000 as LAION
publishes them and then as a single file, with a noisy copy of every hundredth query. Each search is a process
of its own; its peak memory counts the pages of the files that it maps. Threads: OMP_NUM_THREADS.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from clip_robustness.core import io

SHARD = 100_000
SEARCH = """
import sys, time
from pathlib import Path
from clip_robustness.inference.duplicates import find_duplicates
folder, start = Path(sys.argv[1]), time.monotonic()
find_duplicates(folder / "test.npy", folder / "test.parquet", [Path(sys.argv[2])], folder / "matches.parquet")
print(time.monotonic() - start, Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def unit(rng: np.random.Generator, n: int, dimensions: int) -> np.ndarray:
    rows = rng.standard_normal((n, dimensions), dtype=np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write(folder: Path, references: int, queries: int, dimensions: int) -> int:
    """Returns how many queries have a copy: every hundredth, spread over the shards."""
    rng = np.random.default_rng(0)
    test = unit(rng, queries, dimensions)
    ids = [f"{i:06d}" for i in range(queries)]
    io.save_array(folder / "test.npy", test)
    facts = {"model": "random", "dataset": "test", "kind": "features", "n": queries, "dim": dimensions}
    io.write_json(folder / "test.json", {**facts, "ids_sha256": io.ids_digest(ids)})
    io.write_parquet(folder / "test.parquet", {"image_id": ids})
    copied, shards = test[::100], -(-references // SHARD)
    for shard in range(shards):
        rows = unit(rng, min(SHARD, references - shard * SHARD), dimensions)
        noisy = copied[shard::shards] + 0.1 * unit(rng, len(copied[shard::shards]), dimensions)
        rows[: len(noisy)] = noisy / np.linalg.norm(noisy.astype(np.float32), axis=1, keepdims=True)
        io.save_array(folder / "shards" / f"img_emb_{shard}.npy", rows)
    io.join_arrays(folder / "one.npy", sorted((folder / "shards").iterdir()))
    return len(copied)


def main() -> None:
    defaults = (1_000_000, 10_000, 512)
    references, queries, dimensions = *map(int, sys.argv[1:]), *defaults[len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies = write(folder, references, queries, dimensions)
        environment = {**os.environ, "PYTHONPATH": str(Path(io.__file__).resolve().parents[2])}
        print(f"{queries:,} queries, {references:,} references, {dimensions} dimensions, float16")
        for corpus in ("shards", "one.npy"):
            before = os.times()
            command = [sys.executable, "-c", SEARCH, name, str(folder / corpus)]
            result = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            used = os.times()
            seconds, peak = (float(word) for word in result.stdout.split())
            cpu = used.children_user + used.children_system - before.children_user - before.children_system
            found = int((io.read_parquet(folder / "matches.parquet")["similarity"] > 0.9).sum())
            print(f"{corpus:8} {seconds:7.1f} s, {cpu:7.1f} s of CPU, {peak / 1024:,.0f} MB, {found} of {copies} found")


if __name__ == "__main__":
    main()
