"""The container recipe, step by step, as far as it goes without a container: the registry's image is out of reach."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pathspec
import pytest
import yaml
from dockerfile_parse import DockerfileParser

LOCKED = "/opt/clip_robustness"  # where the recipe puts the lock and the wheels
LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]


def recipe(root: Path) -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, in order."""
    with (root / "Dockerfile").open("rb") as file:
        steps = DockerfileParser(fileobj=file).structure
    return [(step["instruction"], step["value"]) for step in steps if step["instruction"] != "COMMENT"]


def values(root: Path, instruction: str) -> list[str]:
    return [value for name, value in recipe(root) if name == instruction]


def variables(root: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in values(root, "ENV") for pair in line.split())


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """A RUN step as Docker runs it, in this environment, and in `folder` for /opt/clip_robustness."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = command.replace(LOCKED, str(folder))
    return subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True)


def download_wheels(root: Path, folder: Path) -> Path:
    """The step that puts the storage plugin into the image."""
    (step,) = (run for run in values(root, "RUN") if "pip download" in run)
    folder.mkdir()
    shutil.copy(root / "requirements.lock", folder)
    run = shell(step, folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "wheels"


@pytest.fixture(scope="module")
def context(root, tmp_path_factory) -> Path:
    """What Docker gets for the build, and COPY . puts into the image: what .dockerignore leaves of the checkout."""
    ignored = pathspec.PathSpec.from_lines("gitignore", (root / ".dockerignore").read_text().splitlines())
    folder = tmp_path_factory.mktemp("context")
    listed = subprocess.run(LISTED, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        if not ignored.match_file(name) and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    return folder


def test_the_image_is_pinned_and_has_the_python_of_the_envs(root):
    name, tag = values(root, "FROM")[0].split(":")
    assert name == "python" and tag.endswith("-slim-bookworm")
    version = tag.removesuffix("-slim-bookworm")
    assert version.count(".") == 2
    for path in (root / "envs").glob("*.yaml"):
        assert f"python={version.rpartition('.')[0]}" in yaml.safe_load(path.read_text())["dependencies"]


def test_it_runs_without_root_and_holds_no_secret(root, context):
    steps = recipe(root)
    last_user = max(index for index, (name, _) in enumerate(steps) if name == "USER")
    assert steps[last_user][1] not in ("root", "0")
    assert "RUN" not in [name for name, _ in steps[last_user:]]
    assert not {"ADD", "ARG"} & {name for name, _ in steps}
    assert set(variables(root)) == {
        "HOME",
        "PYTHONPATH",
        "PIP_NO_INDEX",
        "PIP_FIND_LINKS",
        "NVIDIA_DRIVER_CAPABILITIES",
    }
    kept = {path.name for path in context.iterdir()}
    assert kept >= {"Snakefile", "rules", "config", "src", "report", "profiles", "envs", "requirements.lock"}
    assert not {".git", ".env", ".venv", "results", "resources", "figures", "tests"} & kept


def test_what_is_copied_is_there(root, context):
    """The lock comes first and alone: a change of code leaves the layers below as they are."""
    sources = [[word for word in copy.split() if not word.startswith("--")][:-1] for copy in values(root, "COPY")]
    assert sources == [["requirements.lock"], ["."]]
    assert (context / "requirements.lock").is_file()


def test_the_lock_is_what_is_installed(root, tmp_path):
    """The step itself, where the lock is installed already: it changes nothing, and no package lacks another."""
    (step,) = (run for run in values(root, "RUN") if "pip install" in run)
    shutil.copy(root / "requirements.lock", tmp_path)
    run = shell(step, tmp_path)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "No broken requirements found." in run.stdout
    assert run.stdout.count("Requirement already satisfied: ") > 100 and "Collecting" not in run.stdout


def test_every_step_is_shell(root):
    for step in values(root, "RUN"):
        assert subprocess.run(["/bin/sh", "-n", "-c", step]).returncode == 0, step


@pytest.mark.slow
def test_pods_install_the_storage_plugin_without_a_network(root, tmp_path):
    wheels = download_wheels(root, tmp_path / "locked")
    found = variables(root) | {"PIP_FIND_LINKS": str(wheels)}
    assert variables(root)["PIP_FIND_LINKS"] == f"{LOCKED}/wheels" and found["PIP_NO_INDEX"] == "1"
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(target),
        "snakemake-storage-plugin-fs",
    ]
    subprocess.run(
        command, check=True, env=os.environ | {name: found[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    )
    assert (target / "snakemake_storage_plugin_fs").is_dir()


def test_what_is_copied_is_enough(root, context):
    """The image's own command, and a study planned, where only what the image has is there."""
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(context)}
    environment["PYTHONPATH"] = variables(root)["PYTHONPATH"].replace("/project", str(context))
    (command,) = values(root, "CMD")
    for words in (json.loads(command), ["snakemake", "--configfile", "config/published.yaml", "--dry-run"]):
        run = subprocess.run(words, cwd=context, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
