"""Every env is pinned as the lock is, holds what its wing imports and no more, solves, and runs its wing alone."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clip_robustness.core import io
from tests.unit.samples import encoded, make_tar, picture

from . import conda
from .conftest import build_house

WINGS_OF = {
    "data": ("data",),
    "torch": ("inference", "mini"),
    "metrics": ("metrics",),
    "plot": ("figures", "report"),
}
# import name -> distribution, where they differ
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "faiss": "faiss-cpu"}
# imported by others only: timm and open_clip need torchvision
INDIRECT = {"torch": {"torchvision", "transformers"}}  # of open_clip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(root: Path, env: str) -> dict[str, str]:
    listed = conda.pip_part(root / f"envs/{env}.yaml")
    assert all("==" in line for line in listed)
    return {normal(name): version for name, version in (line.split("==") for line in listed)}


def imported(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0] for name in names}
    outside = found - set(sys.stdlib_module_names) - {"clip_robustness"}
    return {normal(DISTRIBUTION.get(name, name)) for name in outside}


def test_there_is_one_env_a_wing(root):
    assert {path.stem for path in (root / "envs").glob("*.yaml")} == set(WINGS_OF)
    rules = "".join(path.read_text() for path in (root / "rules").glob("*.smk"))
    used = set(re.findall(r"envs/(\w+)\.yaml", rules))
    assert used == set(WINGS_OF)


@pytest.mark.parametrize("env", WINGS_OF)
def test_pins_are_the_locks(root, env):
    lines = [line.split(";")[0].strip() for line in (root / "requirements.lock").read_text().splitlines()]
    lock = {normal(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    assert pins(root, env).items() <= lock.items()


@pytest.mark.parametrize("env", WINGS_OF)
def test_an_env_lacks_and_over_declares_nothing(root, env):
    package = root / "src/clip_robustness"
    own = set.union(*(imported(package / wing) for wing in WINGS_OF[env]))
    core = imported(package / "core")
    declared = set(pins(root, env))
    assert own <= declared, f"missing in envs/{env}.yaml: {own - declared}"
    assert declared <= own | core | INDIRECT.get(env, set()), f"nothing imports {declared - own - core}"


@pytest.fixture(scope="module")
def channel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conda") / "channel"
    conda.call("build-channel", folder)
    return folder


@pytest.mark.parametrize("env", WINGS_OF)
def test_an_env_solves(root, env, channel, tmp_path):
    """By py-rattler, specs read strictly, from a channel with newer Pythons and a pip that fits none of ours."""
    content = yaml.safe_load((root / f"envs/{env}.yaml").read_text())
    assert content.keys() == {"channels", "dependencies"} and content["channels"] == ["conda-forge", "nodefaults"]
    urls = conda.call("create-from", root / f"envs/{env}.yaml", channel, tmp_path / env).splitlines()
    expected = {"python-3.11.14-0", "pip-25.2-0"}
    assert {url.rpartition("/")[2] for url in urls} == {f"{name}.tar.bz2" for name in expected}
    assert {path.stem for path in (tmp_path / env / "conda-meta").glob("*.json")} == expected


LIGHT = ("data", "metrics", "plot")
ALL = LIGHT + (("torch",) if os.environ.get("CLIP_ROBUSTNESS_ALL_ENVS") else ())

# A verb of the wing that does real work on what is in the checkout (or on what an earlier env made).
VERBS = {
    "data": [
        "import-published --folder {root}/config/published --out {work}/tables --study published",
        """index --dataset '{{"name": "few", "family": "class_folders"}}' --sources {work}/few.tar """
        "--labels {work}/few.json --out {work}/few.parquet",
        """derive --entry '{{"from": "few", "by": "words", "copies": 1, "size": 9, "seed": 1}}' """
        "--index {work}/few.parquet --labels {work}/few.json --out {work}/printed.tar",
    ],
    "metrics": [
        "fit-baselines --accuracy {work}/tables/accuracy.parquet --models {work}/tables/models.parquet "
        "--baselines {work}/tables/baselines.parquet --out {work}/tables/effective_robustness.parquet "
        "--sources testbed --resamples 100"
    ],
    "plot": [
        "draw --figure retrieval --study published --tables {work}/tables "
        "--pdf {work}/retrieval.pdf --png {work}/retrieval.png",
        "report --study published --title Published --figures {work}/retrieval.png --out {work}/report.html "
        "--tables {work}/tables/retrieval.parquet {work}/tables/models.parquet --captions {root}/report/captions",
    ],
    "torch": [
        """label-space --name toy --space '{{"classes": "open_clip:imagenet"}}' --out {work}/toy.json""",
        """render-world --world '{{"name": "toy", "images": 24, "seed": 1}}' --archive {work}/toy.tar """
        "--index {work}/toy.parquet",
        "cache-pixels --index {work}/toy.parquet --spec 'resize(32,bicubic)|center_crop(32)' --out {work}/toy.npy",
    ],
}


@pytest.fixture(scope="module")
def venvs(root, tmp_path_factory) -> Path:
    """A folder with each env, installed from its pins alone, and one without any."""
    folder = tmp_path_factory.mktemp("envs")
    for env in ("bare", *ALL):
        subprocess.run([sys.executable, "-m", "venv", str(folder / env)], check=True)
        listed = [] if env == "bare" else [f"{name}=={version}" for name, version in pins(root, env).items()]
        if listed:
            subprocess.run([str(folder / env / "bin/pip"), "install", "--quiet", *listed], check=True)
    return folder


@pytest.mark.slow
def test_each_env_alone_runs_its_wing(root, venvs, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    classes = ["cube", "arch"]
    make_tar(tmp_path / "few.tar", {f"{name}/1.png": encoded(picture(64, 48, 1), "PNG") for name in classes})
    io.write_json(tmp_path / "few.json", {"name": "few", "base": None, "classes": classes, "members": [[0], [1]]})
    for env in ALL:
        for verb in VERBS[env]:
            command = shlex.split(verb.format(root=root, work=tmp_path))
            run = subprocess.run(
                [str(venvs / env / "bin/python"), "-m", "clip_robustness", *command],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, f"{env}: {verb}: {run.stderr[-3000:]}"
    assert (tmp_path / "report.html").is_file()


class CondaHouse:
    """A checkout in which `snakemake --sdm conda` finds a conda: the solver is real, what it installs is `venvs`."""

    def __init__(self, root: Path, path: Path, channel: Path, venvs: Path):
        self.house, self.stand_in = build_house(path / "house", root), path / "conda"
        (self.stand_in / "bin").mkdir(parents=True)
        (self.stand_in / "channel").symlink_to(channel)
        (self.stand_in / "venvs").symlink_to(venvs)
        program = f'#!/bin/sh\nPYTHONPATH= exec {sys.executable} {Path(conda.__file__)} "$@"\n'
        (self.stand_in / "bin/conda").write_text(program)
        (self.stand_in / "bin/conda").chmod(0o755)
        activate = (
            'export PATH="$(readlink -f "$1/bin"):$PATH" CONDA_PREFIX="$1"\necho activate "$1" >> $CONDA_STAND_IN/log\n'
        )
        (self.stand_in / "bin/activate").write_text(activate)

    def snakemake(self, monkeypatch, *arguments: str) -> list[str]:
        """Run it, and return the calls of conda."""
        monkeypatch.setenv("CONDA_STAND_IN", str(self.stand_in))
        monkeypatch.setenv("PATH", f"{self.stand_in / 'bin'}{os.pathsep}{os.environ['PATH']}")
        self.house.snakemake("--sdm", "conda", "--configfile", "config/published.yaml", *arguments)
        return (self.stand_in / "log").read_text().splitlines()


@pytest.fixture
def conda_house(root, tmp_path, channel, venvs) -> CondaHouse:
    return CondaHouse(root, tmp_path, channel, venvs)


@pytest.mark.slow
def test_a_study_runs_with_sdm_conda(conda_house, monkeypatch):
    """Each rule in the env that it names: three wings, and nothing but their pins."""
    targets = ["figures/published/retrieval.pdf", "results/published/tables/factor_fits.parquet"]
    calls = conda_house.snakemake(monkeypatch, "--config", "resamples=100", "--", *targets)
    created = [call.split("--prefix ")[1] for call in calls if call.startswith("env create")]
    activated = {call.removeprefix("activate ") for call in calls if call.startswith("activate")}
    assert len(created) == 3 and {Path(path).name for path in created} == {Path(path).name for path in activated}
    envs = {(Path(path) / "bin").resolve().parent.name for path in created}
    assert envs == {"data", "metrics", "plot"}
    assert all((conda_house.house.path / target).is_file() for target in targets)


@pytest.mark.slow
def test_an_explicit_pin_file_takes_the_place_of_the_yaml(conda_house, channel, tmp_path, monkeypatch):
    """As README tells how to add one: it has no part of pip's, so a script beside it installs that."""
    envs = conda_house.house.path / "envs"
    urls = conda.call("create-from", envs / "plot.yaml", channel, tmp_path / "solved")
    (envs / "plot.linux-64.pin.txt").write_text(f"@EXPLICIT\n{urls}")
    (envs / "plot.post-deploy.sh").write_text('python -m pip freeze > "$CONDA_PREFIX.freeze"\n')
    calls = conda_house.snakemake(monkeypatch, "--conda-create-envs-only", "figures/published/retrieval.pdf")
    (explicit,) = (call for call in calls if call.startswith("create"))
    assert ".pin.txt --prefix " in explicit
    prefix = Path(explicit.split("--prefix ")[1].split(" --yes")[0])
    assert prefix.with_name(f"{prefix.name}.freeze").read_text() == ""
