"""Every env is pinned as the lock is, holds what its wing imports and no more, and runs it alone."""

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
    content = yaml.safe_load((root / f"envs/{env}.yaml").read_text())
    listed = next(item["pip"] for item in content["dependencies"] if isinstance(item, dict))
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


@pytest.mark.slow
def test_each_env_alone_runs_its_wing(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    classes = ["cube", "arch"]
    make_tar(tmp_path / "few.tar", {f"{name}/1.png": encoded(picture(64, 48, 1), "PNG") for name in classes})
    io.write_json(tmp_path / "few.json", {"name": "few", "base": None, "classes": classes, "members": [[0], [1]]})
    for env in ALL:
        folder = tmp_path / env
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        listed = [f"{name}=={version}" for name, version in pins(root, env).items()]
        subprocess.run([str(folder / "bin/pip"), "install", "--quiet", *listed], check=True)
        for verb in VERBS[env]:
            command = shlex.split(verb.format(root=root, work=tmp_path))
            run = subprocess.run(
                [str(folder / "bin/python"), "-m", "clip_robustness", *command],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, f"{env}: {verb}: {run.stderr[-3000:]}"
    assert (tmp_path / "report.html").is_file()
