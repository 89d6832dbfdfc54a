"""A GPU that is not there, memory that runs out, Ctrl-C, and packages that were upgraded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clip_robustness.data import doctor
from clip_robustness.inference import lease

from .conftest import DATASET, MODEL, SOURCE, Finished, words
from .jobs import one_of_each

DEVICE_RULES = ("embed_natural", "build_heads", "attack_images", "match_pairs", "encode_captions", "search_prompts")
DEVICE_RULES += ("ask_model",)


def test_a_leased_gpu_that_torch_cannot_use(finished: Finished, jobs, tmp_path, monkeypatch):
    """Every verb that leases one: an error that names it and what to do, never a silent run on the CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv(lease.DEVICES_VARIABLE, "3")
    rules = one_of_each(jobs)
    tested = [rules[rule] for rule in DEVICE_RULES if rule in rules]
    assert len(tested) >= 5
    for job in tested:
        words = list(job.words)
        if job.store:
            words[words.index(job.store)] = str(tmp_path / "work")
        code, said = finished.call(words)
        assert code == 1 and f"error: GPU 3: torch {torch.__version__} cannot use it" in said, (job.rule, said)
        assert "`device: cpu`" in said and "Traceback" not in said, (job.rule, said)
        assert "CUDA_VISIBLE_DEVICES" not in os.environ, "the lease was given back"


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from clip_robustness.cli import main
import clip_robustness.{module} as module
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from /proc")
@pytest.mark.parametrize(("verb", "module", "room"), [("embed", "inference.embed", 2_000_000)])
def test_memory_that_runs_out(finished: Finished, tmp_path, verb, module, room):
    script = OUT_OF_MEMORY.format(module=module, room=room)
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    options = words(finished.embedding(tmp_path))
    command = [sys.executable, "-c", script, verb, *options]
    run = subprocess.run(command, cwd=finished.path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "error: out of memory" in run.stderr, run.stderr[-3000:]
    assert "mem_mb" in run.stderr and "what was finished is kept" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / f"{DATASET}.npy").exists()


def test_ctrl_c_stops_a_job_and_its_workers_with_one_line(finished: Finished, tmp_path):
    """The signal goes to the whole group, as from a terminal. No orphan, no half file, no traceback."""
    index = finished.resources / "index/mini_train_biased.parquet"
    spec, out = "resize(448,bicubic)|center_crop(448)", tmp_path / "out" / "p.npy"
    job = finished.start("cache-pixels", index=index, spec=spec, out=out, workers=2)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while job.poll() is None and len(workers) < 3 and time.monotonic() < deadline:  # two, and a resource tracker
        workers = psutil.Process(job.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(0.5)
    assert job.poll() is None and len(workers) == 3
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
