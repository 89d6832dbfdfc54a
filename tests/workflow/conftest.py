"""A copy of the checkout in which the workflow really runs, and may be spoilt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PARTS = ("Snakefile", "rules", "envs", "config", "profiles", "src", "report")

# The mini study, small enough for tests: fewer models and data sets, a share of the images and of the training.
SMALL = """
scale: 0.1
resamples: 200
fewest: 5
datasets:
  without: [mini_fresh, mini_pose, mini_sketch, mini_stylized, mini_crawl]
models:
  sets: []
  names:
    - mini_clip_vit_biased
    - mini_clip_vit_cross_entropy
    - mini_clip_vit_contrastive
    - mini_resnet
    - mini_vit_third
    - mini_convnext_third
    - mini_llava
correspondence:
  models: [mini_clip_vit_biased, mini_resnet]
normaliser: mini_resnet
attacks:
  names: [fgsm, deepfool, bim_transfer, nes]
  models: [mini_clip_vit_biased, mini_resnet]
  substitute: mini_convnext_third
  images: 12
  settings: {nes: {pairs: 5}}
overlap:
  detector: mini_clip_vit_biased
  corpora: [mini_train_biased]
  datasets: [mini_rendition]
  copies: mini_copies
  controls: {mini_rendition: disjoint}
"""


class House:
    """A checkout below a temporary folder."""

    def __init__(self, path: Path):
        self.path = path

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).parent / "snakemake"), "--cores", "2", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}

    def snakemake(self, *arguments: str, fails: bool = False) -> str:
        """Run Snakemake and return what it printed."""
        run = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (run.returncode != 0) == fails, run.stdout[-6000:]
        return run.stdout

    def jobs(self, *arguments: str) -> dict[str, int]:
        """What a dry run would do: rule -> number of jobs."""
        lines = iter(self.snakemake("--dry-run", "--quiet=rules", *arguments).splitlines())
        found = {}
        for line in lines:
            if line.startswith("job ") and "count" in line:
                next(lines)
                for row in lines:
                    parts = row.split()
                    if len(parts) != 2 or not parts[1].isdigit():
                        break
                    found[parts[0]] = int(parts[1])
                found.pop("total", None)
                return found
        return found

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.path / name
        text = path.read_text()
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1))


def build_house(path: Path, root: Path) -> House:
    path.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        source = root / part
        if source.is_dir():
            shutil.copytree(source, path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, path / part)
    return House(path)


SMALL_CONFIG = ("--configfile", "config/mini.yaml", "small.yaml", "--")
