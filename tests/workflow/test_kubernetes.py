"""The Kubernetes profile through the real Snakemake and its real plugins, on a cluster whose pods are processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clip_robustness.core.registry import load_study
from clip_robustness.data.plan import job_counts

from .cluster import cluster
from .conftest import House, build_house
from .test_container import download_wheels, variables

PROFILE = ("--workflow-profile", "profiles/kubernetes")


def on(volume: Path) -> tuple[str, ...]:
    """The profile with its volume elsewhere: a process has no mount of its own."""
    return (
        *PROFILE,
        *("--kubernetes-persistent-volumes", f"clip-robustness:{volume}"),
        *("--default-storage-prefix", str(volume / "store")),
        *("--local-storage-prefix", str(volume / "work"), "--remote-job-local-storage-prefix", str(volume / "work")),
    )


class Checkout(House):
    """Without --cores: the profile says how many pods."""

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).parent / "snakemake"), *arguments]


@pytest.fixture
def checkout(tmp_path, root) -> Checkout:
    """What the driver has: a git checkout, since Snakemake sends to the pods what git knows."""
    house = Checkout(build_house(tmp_path / "house", root).path)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *words], cwd=house.path, check=True)
    return house


@pytest.mark.parametrize("name", ["config", "mini"])
def test_a_study_is_planned(name, checkout, tmp_path):
    """Rule by rule the jobs of any other place: no input is looked for in the storage that no rule makes."""
    path = f"config/{name}.yaml"
    jobs = checkout.jobs(*on(tmp_path / "volume"), "--configfile", path)
    assert jobs == job_counts(load_study(yaml.safe_load((checkout.path / path).read_text()), checkout.path))


HEAD = "results/mini/heads/mini_clip_vit_third/mini_1.mini.npz"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("rsync"), reason="the storage plugin copies with rsync, which is not installed")
def test_pods_work_together(root, checkout, tmp_path, monkeypatch):
    """A model is rendered for, trained and given a head by pods that share nothing but the volume."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {"PATH": os.pathsep.join(path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"PIP_NO_INDEX": variables(root)["PIP_NO_INDEX"]}
    environment |= {"PIP_FIND_LINKS": str(download_wheels(root, tmp_path / "locked"))}
    volume = tmp_path / "volume"
    options = ("--configfile", "config/mini.yaml", "--config", "scale=0.02", "device=auto")
    with cluster(tmp_path / "cluster", environment) as kubernetes:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "cluster/kubeconfig"))
        quick = ("--seconds-between-status-checks", "1", "--retries", "0")
        checkout.snakemake(*on(volume), *options, *quick, "--", HEAD)
    assert (volume / "store" / HEAD).is_file()

    pods = {rule_of(pod): pod for pod in kubernetes.pods.values()}
    assert {"render_world", "train_mini", "build_heads"} <= pods.keys()
    assert set(kubernetes.states.values()) == {"succeeded"}
    for rule, pod in pods.items():
        requests, limits = pod["resources"]["requests"], pod["resources"]["limits"]
        assert limits["memory"] == requests["memory"]
        assert limits.get("nvidia.com/gpu") == ("1" if rule == "build_heads" else None)
        assert pod["image"] == profile(root)["container-image"]
        assert {"name": "clip-robustness", "mountPath": str(volume)} in pod["volumeMounts"]
        assert not pod["env"], "the volume needs no credentials"

    # What no rule declares, and the next pod reads: weights beside their manifest, an archive behind an index.
    copies = next((volume / "work").rglob("mini_clip_vit_third/manifest.json")).parent
    assert list(copies.glob("*.safetensors")) and not list((volume / "store").rglob("*.safetensors"))
    assert not list((tmp_path / "house").rglob("*.safetensors"))

    assert kubernetes.asked <= allowed(root), kubernetes.asked - allowed(root)


def rule_of(pod: dict) -> str:
    return pod["args"][1].split("--allowed-rules ")[1].split()[0]


def profile(root: Path) -> dict:
    return yaml.safe_load((root / "profiles/kubernetes/config.yaml").read_text())


def driver(root: Path) -> dict[str, dict]:
    documents = yaml.safe_load_all((root / "profiles/kubernetes/driver.yaml").read_text())
    return {document["kind"]: document for document in documents}


def allowed(root: Path) -> set[tuple[str, str, str]]:
    """(verb, API group, resource) that the driver's role grants."""
    return {
        (verb, group, resource)
        for rule in driver(root)["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_driver_is_one_of_the_pods(root):
    """It has their image and, at the same place, their volume; and it is the image's user, who can write to it."""
    pod, settings = driver(root)["Pod"]["spec"], profile(root)
    (container,) = pod["containers"]
    assert container["image"] == settings["container-image"]
    name, place = settings["kubernetes-persistent-volumes"][0].split(":")
    assert container["volumeMounts"] == [{"name": name, "mountPath": place}]
    assert pod["volumes"] == [{"name": name, "persistentVolumeClaim": {"claimName": name}}]
    assert driver(root)["PersistentVolumeClaim"]["metadata"]["name"] == name
    assert driver(root)["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    prefixes = ("default-storage-prefix", "local-storage-prefix", "remote-job-local-storage-prefix")
    assert all(settings[prefix].startswith(f"{place}/") for prefix in prefixes)
    assert settings["local-storage-prefix"] == settings["remote-job-local-storage-prefix"]
    binding = driver(root)["RoleBinding"]
    assert binding["roleRef"]["name"] == driver(root)["Role"]["metadata"]["name"]
    assert (
        binding["subjects"][0]["name"]
        == driver(root)["ServiceAccount"]["metadata"]["name"]
        == pod["serviceAccountName"]
    )
    uid = pod["securityContext"]["runAsUser"]
    assert uid == pod["securityContext"]["fsGroup"] and f"--uid {uid} " in (root / "Dockerfile").read_text()
