"""A pod that is lost: evicted, preempted, or on a node that went away."""

import contextlib
import os
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import psutil
import pytest

from tests.workflow.cluster import cluster
from tests.workflow.test_container import download_wheels, variables
from tests.workflow.test_kubernetes import checkout, on

from .test_kills import commands

__all__ = ["checkout"]  # a fixture
WORLD = "resources/mini/archives/mini_val.tar"


def evict(verb: str, over: threading.Event) -> None:
    """Kill all of the first pod in which the verb runs."""
    while not over.wait(0.02):
        for pod in psutil.Process().children():
            family = [pod, *pod.children(recursive=True)]
            if any(verb in words for words in commands(family).values()):
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                return


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("rsync"), reason="the storage plugin copies with rsync, which is not installed")
def test_an_evicted_pod_is_made_again(root, checkout, tmp_path, monkeypatch):
    """By the profile's retries, within the same run."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": str(tmp_path), "PIP_NO_INDEX": variables(root)["PIP_NO_INDEX"]}
    environment |= {"PIP_FIND_LINKS": str(download_wheels(root, tmp_path / "locked"))}
    volume, over = tmp_path / "volume", threading.Event()
    options = (*on(volume), "--configfile", "config/mini.yaml", "--config", "scale=0.02")
    with cluster(tmp_path / "cluster", environment) as kubernetes:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "cluster/kubeconfig"))
        killer = threading.Thread(target=evict, args=("render-world", over))
        killer.start()
        try:
            said = checkout.snakemake(*options, "--seconds-between-status-checks", "1", "--", WORLD)
        finally:
            over.set()
            killer.join()
    assert list(kubernetes.states.values()) == ["failed", "succeeded"], kubernetes.states
    assert "Error in rule render_world" in said and "Trying to restart job" in said, said[-3000:]
    with tarfile.open(volume / "store" / WORLD) as world:
        assert len(world.getmembers()) > 5
    assert not list((volume / "store").rglob(".*"))
