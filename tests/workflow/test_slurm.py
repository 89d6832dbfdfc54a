"""The small mini study on a real one-node Slurm with four GPUs, and what can happen to it there."""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_robustness.core import io
from clip_robustness.core.lock import alone
from clip_robustness.core.registry import load_study

from .conftest import SMALL, SMALL_CONFIG, House
from .slurm_cluster import GPUS, Cluster, SlurmJob, missing, wait_for

on_slurm = pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")
PROFILE = "profiles/slurm/config.yaml"
HERE = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10")  # tests wait less than users should


def profile(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / PROFILE).read_text())


def rules(root: Path) -> dict[str, str]:
    """Rule -> its text; that of the rules which embed, made in a loop, is under `embed`."""
    text = "\n".join(path.read_text() for path in sorted((root / "rules").glob("*.smk")))
    parts = re.split(r"^ *rule ?(\w*):$", text, flags=re.M)
    return {name or "embed": body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_profile_names_every_rule_that_takes_a_gpu(root):
    wanted = {name for name, body in rules(root).items() if "gpu=GPUS" in body}
    assert {"embed", "ask"} < wanted
    for config in ("config", "mini", "lite"):
        suites = load_study(yaml.safe_load((root / f"config/{config}.yaml").read_text()), root).suites
        wanted |= {f"embed_{suite}" for suite in suites}
    assert set(profile(root)["set-resources"]) == wanted - {"embed"}


def test_the_profile_groups_every_metric_of_a_model(root):
    metrics = {name for name in rules(root) if name.startswith("measure_")}
    assert set(profile(root)["groups"]) == metrics | {"fit_temperature", "compare_choice"}
    assert set(profile(root)["groups"].values()) == set(profile(root)["group-components"]) == {"measure_{model}"}


def test_no_rule_knows_a_site(root):
    for name, body in rules(root).items():
        assert not re.search(r"slurm|partition|gpu_model|account", body, re.I), name


class OnSlurm(House):
    """A checkout on a cluster's login node."""

    def __init__(self, path: Path, cluster: Cluster):
        super().__init__(path)
        self.cluster = cluster

    def command(self, *arguments: str) -> list[str]:
        return [super().command()[0], "--workflow-profile", "slurm", *HERE, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        cluster = self.cluster.environment
        return {**super().environment, **{name: cluster[name] for name in ("SLURM_CONF", "PATH")}}

    @contextlib.contextmanager
    def started(self, *models: str):
        """Snakemake at work on models' accuracy. What of it still runs at the end is killed, its Slurm jobs are not."""
        with (self.path / "said").open("a") as said:
            command = self.command(*SMALL_CONFIG, *(accuracy_of(model) for model in models))
            run = subprocess.Popen(command, cwd=self.path, env=self.environment, stdout=said, stderr=said)
        try:
            yield run
        finally:
            run.kill()
            run.wait()

    def said(self) -> str:
        return (self.path / "said").read_text()[-6000:]

    def waits(self, model: str) -> bool:
        """Whether a job is at the model's images and waits, as for another process that is at them."""
        log = self.path / f"logs/mini/embed_natural/{model}.log"
        return log.is_file() and "waiting for it" in log.read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def submitted(cluster, small_house, tmp_path):
    """A copy of the small study whose data and weights are there, and nothing measured; its profile is this site's."""
    shutil.copytree(small_house.path, tmp_path / "house", symlinks=True)
    house = OnSlurm(tmp_path / "house", cluster)
    for folder in ("results", "figures", "logs"):
        shutil.rmtree(house.path / folder)
    house.edit(PROFILE, "  # slurm_account: my_account\n  # slurm_partition: cpu", "  slurm_account: lab")
    # The study's device is the CPU, for which no GPU is asked. Here it is, and the jobs still compute on the CPU.
    house.edit(PROFILE, "    slurm_partition: gpu ", "    gpu: 1\n    slurm_partition: gpu ")
    yield house
    cluster.run("scancel", "--user=root")
    wait_for(lambda: not cluster.run("squeue", "--noheader"), "an empty queue", cluster.log)


def accuracy_of(model: str) -> str:
    return f"results/mini/metrics/accuracy/{model}/mini_val.json"


def same_accuracy(house: House, other: House, model: str) -> bool:
    return (house.path / accuracy_of(model)).read_bytes() == (other.path / accuracy_of(model)).read_bytes()


def jobs_of(cluster: Cluster, model: str, after: int) -> list[SlurmJob]:
    """The jobs so far that embed a model's natural images."""
    return [job for job in cluster.jobs(after) if job.name == f"rule_embed_natural_wildcards_{model}"]


def store_of(house: House, model: str) -> Path:
    """Where a model's features of the validation set are kept by content, below the checkout."""
    files = io.read_json(house.path / f"results/mini/embeddings/{model}/mini_val.json")["files"]
    kept = house.path.glob("results/mini/store/embeddings/*/manifest.json")
    (folder,) = (path.parent for path in kept if io.read_json(path)["files"] == files)
    return folder.relative_to(house.path)


def tables(house: House) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((house.path / "results/mini/tables").iterdir())}


@on_slurm
@pytest.mark.slow
def test_the_study_runs_there_and_gives_the_same_tables(submitted, small_house):
    """To the report. What computes is a job with a device of its own, a model's metrics are one, tables are none."""
    cluster, before = submitted.cluster, submitted.cluster.last
    submitted.snakemake(*SMALL_CONFIG)
    assert tables(submitted) == tables(small_house)
    assert (submitted.path / "figures/mini/report.html").is_file()
    jobs = cluster.jobs(before)
    assert {(job.state, job.account) for job in jobs} == {("COMPLETED", "lab")}
    check_devices(cluster, jobs)
    names = [re.sub("_wildcards_.*", "", job.name) for job in jobs]
    for model in yaml.safe_load(SMALL)["models"]["names"]:
        assert len([name for name in names if name.startswith(f"rule_measure_{model}_")]) == 1, model
    assert {"rule_embed_natural", "rule_build_heads", "rule_attack_images", "rule_measure_pool"} < set(names)
    at_login = "fetch|gather|fit|summarise|compare|draw|write_(report|questions|label_space)|evaluate|choose"
    assert not [name for name in names if re.match(f"rule_({at_login})", name)]


def check_devices(cluster, jobs):
    """A job of the GPUs' partition sees one device, which no other has at that time; another job sees none."""
    seen, users = cluster.devices(), {}
    for job in jobs:
        (devices,) = seen[job.id]
        assert (devices in {"0", "1", "2", "3"}) == (job.partition == "gpu"), job
        users.setdefault(devices, []).append((job.start, job.end))
    assert len(users) == GPUS + 1, users.keys()
    assert users.pop("-")
    for times in users.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(times))), times


HOLD = """
import os, sys, time
from pathlib import Path
from clip_robustness.inference.lease import lease
out = Path(sys.argv[1])
with lease() as device:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device
    (out / os.environ["SLURM_JOB_ID"]).write_text(device)
    end = time.monotonic() + 200
    while len(list(out.iterdir())) < 4 and time.monotonic() < end:
        time.sleep(0.1)
"""


@on_slurm
@pytest.mark.slow
def test_a_lease_takes_the_device_that_slurm_gives(cluster, root, tmp_path):
    """Four jobs: each stays inside its lease until all four are in theirs."""
    held, before = tmp_path / "held", cluster.last
    held.mkdir()
    script = tmp_path / "hold.sh"
    command = shlex.join([sys.executable, "-c", HOLD, str(held)])
    script.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(root / 'src'))} exec {command}\n")
    for _ in range(GPUS):
        cluster.run("sbatch", "--partition=gpu", "--gpus=1", "--mem=100", f"--output={tmp_path}/%j.out", str(script))
    wait_for(lambda: all(job.ended for job in cluster.jobs(before)), "four jobs", cluster.log)
    assert [job.state for job in cluster.jobs(before)] == ["COMPLETED"] * GPUS
    assert sorted(path.read_text() for path in held.iterdir()) == ["0", "1", "2", "3"]


@on_slurm
@pytest.mark.slow
def test_a_killed_job_and_a_late_one_come_back_and_the_controller_may_restart(submitted, small_house):
    """Three models, whose jobs wait, as for another process that is at their images, until their fault has come."""
    cluster, before = submitted.cluster, submitted.cluster.last
    killed, late, other = "mini_clip_vit_biased", "mini_resnet", "mini_vit_third"
    minutes = f"attempt if wildcards.model == '{late}' else 30 * attempt"
    limits = f'{{slurm_partition: gpu, gpu: 1, runtime: "{minutes}"}}'
    submitted.edit(PROFILE, "embed_natural: *gpu", f"embed_natural: {limits}")

    def tries(model: str) -> list[str]:
        return [job.state for job in jobs_of(cluster, model, before)]

    with contextlib.ExitStack() as stack:
        locks = {model: stack.enter_context(contextlib.ExitStack()) for model in (killed, late, other)}
        for model, lock in locks.items():
            lock.enter_context(alone(submitted.path / store_of(small_house, model)))
        run = stack.enter_context(submitted.started(*locks))
        wait_for(lambda: all(submitted.waits(model) for model in locks), "three jobs that wait", submitted.said)

        cluster.stop_controller()
        locks[other].close()
        made = submitted.path / f"results/mini/embeddings/{other}/mini_val.json"
        wait_for(made.is_file, "a job that ends while there is no controller", submitted.said)
        time.sleep(75)  # Snakemake asks in vain, more often than the plugin puts up with by itself
        cluster.start_controller()

        (victim,) = jobs_of(cluster, killed, before)
        cluster.run("scancel", str(victim.id))
        locks[killed].close()
        wait_for(lambda: tries(late)[:1] == ["TIMEOUT"], "the time limit", submitted.said)
        locks[late].close()
        wait_for(lambda: run.poll() is not None, "the end of the run", submitted.said)
    assert run.returncode == 0, submitted.said()
    assert tries(killed) == ["CANCELLED", "COMPLETED"] and tries(other) == ["COMPLETED"]
    first, second = jobs_of(cluster, late, before)
    assert (first.state, first.limit) == ("TIMEOUT", "1:00") and (second.state, second.limit) == ("COMPLETED", "2:00")
    assert int(second.memory.removesuffix("M")) == 2 * int(first.memory.removesuffix("M"))
    assert all(same_accuracy(submitted, small_house, model) for model in locks)


@on_slurm
@pytest.mark.slow
def test_a_killed_snakemake_goes_on_with_the_rest(submitted, small_house):
    """Kill -9 on the login node. A job of the first run is still at work when the second one submits it anew."""
    cluster, before = submitted.cluster, submitted.cluster.last
    done, rest = "mini_resnet", "mini_vit_third"

    def measured(model: str) -> list[str]:
        return [job.state for job in cluster.jobs(before) if job.name.startswith(f"rule_measure_{model}_")]

    def embedded() -> list[str]:
        return [job.state for job in jobs_of(cluster, rest, before)]

    with contextlib.ExitStack() as lock:
        lock.enter_context(alone(submitted.path / store_of(small_house, rest)))
        with submitted.started(done, rest):
            wait_for(lambda: measured(done) == ["COMPLETED"], "one model", submitted.said)
            wait_for(lambda: submitted.waits(rest), "the other model's job", submitted.said)
        killed = cluster.last
        submitted.snakemake("--unlock", *SMALL_CONFIG)
        with submitted.started(done, rest) as run:
            wait_for(lambda: embedded() == ["RUNNING"] * 2, "the same job twice", submitted.said)
            lock.close()
            wait_for(lambda: run.poll() is not None, "the end of the run", submitted.said)
    assert run.returncode == 0, submitted.said()
    assert embedded() == ["COMPLETED"] * 2 and measured(rest) == measured(done) == ["COMPLETED"]
    assert len(cluster.jobs(killed)) == 2, "the second run's: one embeds, one measures"
    assert same_accuracy(submitted, small_house, done) and same_accuracy(submitted, small_house, rest)
