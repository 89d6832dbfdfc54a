"""A conda for tests: py-rattler solves and installs from a channel on this machine; Python and pip's part are a venv.

As a program of its own, since py-rattler's threads may outlive an interpreter that ends. `CONDA_STAND_IN` is a folder
with `channel`, `venvs` (one an env of envs/, and `bare`) and `log`, a line a call.
"""

import asyncio
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

PLATFORMS = ("linux-64", "noarch")
# The newest pip and Pythons of the channel do not fit the envs: a solver has to choose.
PACKAGES = [
    *(("linux-64", "python", version, []) for version in ("3.10.18", "3.11.13", "3.11.14", "3.12.11", "3.13.7")),
    ("noarch", "pip", "25.2", ["python >=3.9,<3.13.0a0"]),
    ("noarch", "pip", "25.3", ["python >=3.12"]),
]


def call(*words: str | Path) -> str:
    """What this program prints."""
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def pip_part(env: Path) -> list[str]:
    return next(item["pip"] for item in yaml.safe_load(env.read_text())["dependencies"] if isinstance(item, dict))


def build_channel(folder: Path) -> None:
    """Packages without content, and the index that a solver reads."""
    import rattler.index

    for subdir, name, version, depends in PACKAGES:
        index = {
            "name": name,
            "version": version,
            "build": "0",
            "build_number": 0,
            "depends": depends,
            "subdir": subdir,
        }
        index |= {"noarch": "python"} if subdir == "noarch" else {}
        files = {"index.json": index, "paths.json": {"paths": [], "paths_version": 1}, "about.json": {}}
        (folder / subdir).mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / subdir / f"{name}-{version}-0.tar.bz2", "w:bz2") as package:
            for path, content in files.items():
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"info/{path}")
                member.size = len(data)
                package.addfile(member, io.BytesIO(data))
    asyncio.run(rattler.index.index_fs(folder))


def create(env: Path, channel: Path, prefix: Path) -> None:
    """Solve the conda part of an env, each spec read strictly, install it, and print the packages' addresses."""
    import rattler

    listed = yaml.safe_load(env.read_text())["dependencies"]
    specs = [rattler.MatchSpec(item, strict=True) for item in listed if isinstance(item, str)]
    records = asyncio.run(rattler.solve([channel.resolve().as_uri()], specs, platforms=PLATFORMS))
    asyncio.run(rattler.install(records, prefix))
    print(*(record.url for record in records), sep="\n")


def answer(stand_in: Path, words: list[str]) -> None:
    """As conda answers Snakemake."""
    with (stand_in / "log").open("a") as log:
        print(*words, file=log)
    answers = {
        "info --json": json.dumps({"conda_prefix": str(stand_in), "platform": PLATFORMS[0]}),
        "--version": "conda 25.1.0",
        "config --get channel_priority --json": json.dumps({"get": {"channel_priority": "strict"}}),
        "clean -y --tarballs": "",
    }
    if " ".join(words) in answers:
        print(answers[" ".join(words)])
        return
    options = dict(itertools.pairwise(words))
    file, prefix = Path(options["--file"]), Path(options["--prefix"])
    if words[:2] == ["env", "create"]:
        create(file, stand_in / "channel", prefix)
        (env,) = (path for path in Path("envs").glob("*.yaml") if pip_part(path) == pip_part(file))
        name = env.stem
    else:
        assert words[0] == "create" and file.read_text().startswith("@EXPLICIT\n"), words
        prefix.mkdir()
        name = "bare"  # an explicit list has no part of pip's
    (prefix / "bin").symlink_to(stand_in / "venvs" / name / "bin")


if __name__ == "__main__":
    if sys.argv[1] == "build-channel":
        build_channel(Path(sys.argv[2]))
    elif sys.argv[1] == "create-from":
        create(*map(Path, sys.argv[2:]))
    else:
        answer(Path(os.environ["CONDA_STAND_IN"]), sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
