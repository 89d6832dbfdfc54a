"""A finished small study to spoil, a disk that fills, and a user that permissions bind."""

import ctypes
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from pyarrow import parquet

import clip_robustness
from clip_robustness.cli import main
from tests.workflow.conftest import SMALL_CONFIG

from .jobs import Job, jobs_of

SOURCE = str(Path(clip_robustness.__file__).parents[1])
MODEL, CLASSIFIER, DATASET = "mini_clip_vit_biased", "mini_resnet", "mini_val"


class Outcome(NamedTuple):
    code: int
    said: str


class Finished:
    """A copy of the finished small study whose files are links: write new ones, never into these."""

    def __init__(self, path: Path, capfd: pytest.CaptureFixture):
        self.path, self._capfd = path, capfd
        self.results, self.resources = Path("results/mini"), Path("resources/mini")

    def run(self, verb: str, **options: object) -> Outcome:
        """A verb with its options, in this process."""
        return self.call([verb, *words(options)])

    def call(self, arguments: Sequence[str]) -> Outcome:
        self._capfd.readouterr()
        try:
            code = main(list(arguments))
        except Exception:  # as a process would end
            traceback.print_exc()
            code = 1
        return Outcome(code, self._capfd.readouterr().err)

    def start(self, verb: str, before: Callable[[], object] | None = None, **options: object) -> subprocess.Popen:
        """The same in a process of its own, the first of a group, that does `before` first."""
        command = [sys.executable, "-m", "clip_robustness", verb, *words(options)]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=before,
        )

    def pixels(self, dataset: str = DATASET) -> Path:
        (found,) = (self.path / self.resources).glob(f"pixels/exact/*/{dataset}.npy")
        return found.relative_to(self.path)

    def embed(self, out: Path, model: str = MODEL, pixels: Path | None = None, **options: object) -> Outcome:
        return self.run("embed", **self.embedding(out, model, pixels), **options)

    def embedding(self, out: Path, model: str = MODEL, pixels: Path | None = None) -> dict[str, object]:
        library = "timm" if model == CLASSIFIER else "open_clip"
        facts = {"model": model, "library": library, "preprocess": SPEC, "weights": self.resources / "weights" / model}
        return {**facts, "pixels": pixels or self.pixels(), "out": out, "work": out / "work", "precision": "fp32"}

    def accuracy(self, out: Path, model: str = MODEL, **changed: object) -> Outcome:
        """`measure-accuracy` on the in-distribution set, into the folder `out`."""
        return self.run("measure-accuracy", **{**self.accuracy_options(out, model), **changed})

    def accuracy_options(self, out: Path, model: str = MODEL) -> dict[str, object]:
        head = {"head": self.results / f"heads/{model}/mini_1.mini.npz"} if model != CLASSIFIER else {}
        return {
            "embeddings": self.results / f"embeddings/{model}/{DATASET}.npy",
            "index": self.resources / f"index/{DATASET}.parquet",
            "labels": self.resources / "labels/mini.json",
            "out": out / "accuracy.json",
            "predictions": out / "predictions.parquet",
            **head,
        }


SPEC = "resize(48,bicubic)|center_crop(48)|normalize(0.5,0.5,0.5;0.5,0.5,0.5)"


def words(options: dict[str, object]) -> list[str]:
    found = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def own_copy(path: Path) -> Path:
    """The file with no other links, so that those stay whole."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def flip(path: Path, at: float = 0.5) -> None:
    """Turn one bit of a file over, as a disk does, at this share of its length; links to it stay whole."""
    flip_byte(path, int(at * (path.stat().st_size - 1)))


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(own_copy(path).read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def flip_value(path: Path, column: str, at: float = 0.99) -> None:
    """Turn one bit of a column of a parquet file over, at this share of its bytes; the last are values."""
    group = parquet.read_metadata(path).row_group(0)
    (chunk,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    flip_byte(path, start + int(at * chunk.total_compressed_size))


def visible(folder: Path) -> set[str]:
    """Files below a folder that have final names."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


@pytest.fixture
def finished(small_house, tmp_path, monkeypatch, capfd) -> Finished:
    path = tmp_path / "house"
    skipped = shutil.ignore_patterns(".snakemake", "__pycache__")
    shutil.copytree(small_house.path, path, copy_function=os.link, ignore=skipped)
    monkeypatch.chdir(path)
    return Finished(path, capfd)


@pytest.fixture(scope="session")
def jobs(small_house) -> list[Job]:
    """Those of the finished study."""
    return jobs_of(small_house, *SMALL_CONFIG)


@pytest.fixture
def copied(small_house, tmp_path):
    """A copy of the finished small study, times kept, for runs of Snakemake."""
    shutil.copytree(small_house.path, tmp_path / "copied", symlinks=True)
    return type(small_house)(tmp_path / "copied")


class SmallDisk(NamedTuple):
    path: Path

    def fill(self, left: int = 0) -> None:
        """Leave this many bytes free, or a page more."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            while (free := shutil.disk_usage(self.path).free - left) > 0:
                file.write(bytes(min(free, 1 << 20)))

    def empty(self) -> None:
        (self.path / "filler").unlink()

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that takes Linux and root")
    yield SmallDisk(path)
    subprocess.run(["umount", str(path)], check=True)


def as_a_user() -> None:
    """Before a program starts: permissions bind it, as root too."""
    if os.geteuid() == 0:
        drop, read_search, override = 24, 2, 1  # prctl's PR_CAPBSET_DROP, and two capabilities
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (override, read_search):
            if libc.prctl(drop, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "cannot give up a capability")
