"""A GPU that is not there, memory that runs out, Ctrl-C, and packages that were upgraded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from clip_robustness.core import io
from clip_robustness.data import doctor
from clip_robustness.inference import lease, load
from tests.unit.samples import encoded, picture

from .conftest import CLASSIFIER, DATASET, MODEL, SOURCE, Finished, visible, words
from .jobs import one_of_each, redirected

DEVICE_VERBS = {"embed", "heads", "attack", "match-pairs", "encode-captions", "search-prompts", "ask"}


def test_a_leased_gpu_that_torch_cannot_use(finished: Finished, jobs, root, tmp_path, monkeypatch):
    """Every verb that leases one: an error that names it and what to do, never a silent run on the CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv(lease.DEVICES_VARIABLE, "3")
    wanted = yaml.safe_load((root / "profiles/slurm/config.yaml").read_text())["set-resources"]  # all that take a GPU
    tested = {job.verb: job for rule, job in one_of_each(jobs).items() if rule in wanted}
    assert set(tested) == DEVICE_VERBS
    for job in tested.values():
        before = visible(finished.path / finished.results)
        code, said = finished.call(redirected(job, tmp_path))
        assert code == 1 and f"error: GPU 3: torch {torch.__version__} cannot use it" in said, (job.rule, said)
        assert "`device: cpu`" in said and "Traceback" not in said, (job.rule, said)
        assert "CUDA_VISIBLE_DEVICES" not in os.environ, "the lease was given back"
        assert visible(finished.path / finished.results) == before and not visible(tmp_path / finished.results)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from clip_robustness.cli import main
import clip_robustness.{module}, pyarrow.parquet
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
sys.exit(main(sys.argv[1:]))
"""


measured = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from /proc")


def with_little_memory(module: str, room: int, verb: str, **options: object) -> subprocess.CompletedProcess:
    """A verb that may take `room` bytes more than its libraries have."""
    command = [sys.executable, "-c", OUT_OF_MEMORY.format(module=module, room=room), verb, *words(options)]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check_out_of_memory(said: str) -> None:
    assert "error: out of memory" in said and "mem_mb" in said and "what was finished is kept" in said, said[-3000:]
    assert "delete" not in said and "Traceback" not in said, said[-3000:]


@measured
def test_memory_that_runs_out(finished: Finished, tmp_path):
    run = with_little_memory("inference.embed", 2_000_000, "embed", **finished.embedding(tmp_path))
    check_out_of_memory(run.stderr)
    assert run.returncode == 1 and not (tmp_path / f"{DATASET}.npy").exists()
    assert finished.embed(tmp_path).code == 0, "with memory, it goes on"


@measured
def test_memory_that_runs_out_leaves_no_image_out(tmp_path):
    """Whether an image can be read is decided by the image, not by the machine."""
    names = ["small.jpg", "large.png"]
    (tmp_path / "small.jpg").write_bytes(encoded(picture(64, 48, 0), "JPEG"))
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGB", (6000, 5000)), "PNG"))
    files = [tmp_path / name for name in names]
    columns = {"image_id": names, "archive": [str(file) for file in files], "offset": [0, 0], "label": [0, 0]}
    io.write_parquet(tmp_path / "index.parquet", {**columns, "size": [file.stat().st_size for file in files]})
    options = {"index": tmp_path / "index.parquet", "spec": "resize(16,bicubic)|center_crop(16)", "workers": 1}
    options |= {"out": tmp_path / "out/p.npy", "on_error": "mask"}
    run = with_little_memory("inference.pixels", 60_000_000, "cache-pixels", **options)
    check_out_of_memory(run.stderr)
    assert run.returncode == 1 and not visible(tmp_path / "out")
    run = with_little_memory("inference.pixels", 1_000_000_000, "cache-pixels", **options)
    assert run.returncode == 0 and io.read_json(tmp_path / "out/p.json")["masked"] == []


@pytest.mark.parametrize("model", [MODEL, CLASSIFIER])
def test_memory_that_runs_out_while_weights_are_loaded(finished: Finished, tmp_path, monkeypatch, model):
    """They fit their configuration as before: nobody is told to delete them."""

    def build(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(load, "build_model", build)
    code, said = finished.embed(tmp_path, model)
    check_out_of_memory(said)
    assert code == 1 and not (tmp_path / f"{DATASET}.npy").exists()


def decoded(out: Path) -> bool:
    """Whether some images of a pixel cache, which is laid out as zeros before, are there."""
    return any(part.read_bytes()[128:].strip(b"\0") for part in out.parent.glob(f".{out.stem}.*{out.suffix}"))


def test_ctrl_c_stops_a_job_and_its_workers_with_one_line(finished: Finished, tmp_path):
    """The signal goes to the whole group, as from a terminal. No orphan, no half file, no traceback."""
    columns = io.read_parquet(finished.resources / "index/mini_train_biased.parquet")
    many = {name: np.tile(values, 5) for name, values in columns.items()}  # nobody enlarges these in a moment
    many["image_id"] = np.array([str(i) for i in range(len(many["label"]))], object)
    io.write_parquet(tmp_path / "index.parquet", many)
    spec, out = "resize(1500,lanczos)|center_crop(16)", tmp_path / "out" / "p.npy"
    job = finished.start("cache-pixels", index=tmp_path / "index.parquet", spec=spec, out=out, workers=2)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 300
    while not (len(workers) == 3 and decoded(out)):  # two, and a resource tracker
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.05)
        workers = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130 and "error: interrupted; run again: what was finished is kept" in said
    assert "Traceback" not in said
    _, left = psutil.wait_procs(workers, timeout=30)
    assert not left and list(out.parent.iterdir()) == []


def test_what_a_killed_job_left_goes_when_it_runs_again(finished: Finished, tmp_path):
    """Temporary files carry the number of their process: a running one's stay."""
    table = tmp_path / "out/t.parquet"
    table.parent.mkdir()
    from clip_robustness.core import atomic

    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = table.parent / f".t.{atomic.HOST}-{gone.pid}.0123abcd.parquet"
    live = table.parent / f".t.{atomic.HOST}-{os.getpid()}.0123abcd.parquet"
    other = table.parent / f".t.elsewhere-{gone.pid}.0123abcd.parquet"
    for path in (dead, live, other):
        path.write_bytes(b"half")
    metrics = sorted((finished.results / "metrics/accuracy").glob("*/*.json"))
    assert finished.run("gather", study="mini", metrics=metrics, out=table).code == 0
    assert sorted(table.parent.iterdir()) == sorted([live, other, table, table.with_suffix(".csv")])


# Upgrades


@pytest.fixture
def newer_torch(tmp_path, monkeypatch) -> Path:
    """A folder on the path in which torch's version is another."""
    folder = tmp_path / "site"
    (folder / "torch-99.1.dist-info").mkdir(parents=True)
    (folder / "torch-99.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.1\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def test_an_upgraded_package_keeps_results_and_is_said(finished: Finished, newer_torch, capfd, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", finished.path)
    capfd.readouterr()
    doctor.examine(Path("config/mini.yaml"), fast=True)
    said = capfd.readouterr().out
    assert "embeddings were made by torch 2" in said and "which is not installed now: they are kept" in said
    assert f"delete {finished.results / 'embeddings'}" in said


def test_embeddings_of_an_upgraded_package_lie_beside_the_old_ones(finished: Finished, tmp_path, newer_torch):
    """Made again, they have a key of their own and say what made them."""
    before = {path.name for path in (finished.results / "store/embeddings").iterdir() if path.is_dir()}
    work = finished.results / "store/embeddings"
    options = {**finished.embedding(tmp_path), "work": work, "precision": "auto"}
    assert finished.run("embed", **options).code == 0
    after = {path.name for path in work.iterdir() if path.is_dir()}
    assert before < after and len(after - before) == 1
    manifest = json.loads((tmp_path / f"{DATASET}.json").read_text())
    assert manifest["versions"]["torch"] == "99.1" and manifest["model"] == MODEL
    old = json.loads((finished.results / f"embeddings/{MODEL}/{DATASET}.json").read_text())
    assert old["versions"]["torch"] != "99.1" and old["embeddings_sha256"]
