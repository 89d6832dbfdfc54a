"""The documentation's blocks, and what is done with each: one plain convention, in the word after the language.

    ```sh run                  runs as it stands, in the page's copy of the checkout, one block after the other
    ```sh plan                 the same, `snakemake` and `make` as dry runs: they would take hours, or a cluster
    ```sh shown                is only looked at by the shell's parser: it needs what no test has
    ```python run              runs
    ```yaml config             a part of a study's config: laid over config/config.yaml, it must be valid
    ```LANGUAGE new=PATH       is written to that file
    ```LANGUAGE append=PATH    is written to the end of it
    ```diff change=PATH        lines with - are replaced by lines with +, the others must stand there

A block without a language, or indented, is output or a picture.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt
from snakemake.utils import update_config

from clip_robustness.core.registry import load_study

BINARIES = Path(sys.executable).parent
DRY = """
snakemake() { command snakemake --dry-run --quiet=rules "$@"; }
make() { command make --dry-run "$@"; }
"""
ACTIONS = ("run", "plan", "shown", "config", "new", "append", "change")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    action: str
    path: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(page: Path, root: Path) -> list[Block]:
    """The fenced blocks of a page, but for the site builder's own directives."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type != "fence" or not token.info or token.info.startswith("{"):
            continue
        language, _, action = token.info.partition(" ")
        action, _, path = action.partition("=")
        line = (token.map or [0])[0] + 1
        found.append(Block(str(page.relative_to(root)), line, language, action, path, token.content))
    return found


def follow(block: Block, house: Path) -> None:
    """Do what a block says in the copy `house` of the checkout; it fails as a reader would see it fail."""
    match block.action:
        case "run" if block.language == "python":
            shell("python - <<'END_OF_BLOCK'\n" + block.text + "END_OF_BLOCK\n", block, house)
        case "run":
            shell(block.text, block, house)
        case "plan":
            shell(DRY + block.text, block, house)
        case "shown":
            subprocess.run(["bash", "-n", "-c", block.text], check=True)
        case "config":
            config = yaml.safe_load((house / "config/config.yaml").read_text())
            update_config(config, yaml.safe_load(block.text))
            load_study(config, house)
        case "new":
            write(house / block.path, block.text, "x")
        case "append":
            write(house / block.path, block.text, "a")
        case "change":
            change(house / block.path, block)
        case _:
            raise AssertionError(f"{block.where}: ```{block.language} needs one of {', '.join(ACTIONS)} behind it")


def write(path: Path, text: str, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)


def change(path: Path, block: Block) -> None:
    lines = block.text.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    whole = old.endswith("\n") and text.count(old) == 1
    if not whole:  # the last line may be the beginning of a longer one
        old, new = old.rstrip("\n"), new.rstrip("\n")
    assert text.count(old) == 1, f"{block.where}: {path} has these lines {text.count(old)} times, expected once:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def shell(script: str, block: Block, house: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    environment = {
        **kept,
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(house / "src"),
        "HOME": str(house / "home"),
    }
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=house,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"{block.where}:\n{block.text}\n{run.stdout[-6000:]}"
