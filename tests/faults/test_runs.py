"""Two runs in one folder, and clocks that jump."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import SMALL_CONFIG

from .conftest import DATASET, MODEL
from .jobs import remove
from .test_kills import family, started, wait_for

pytestmark = pytest.mark.slow
FIGURE = "figures/mini/shape_bias.pdf"


@pytest.fixture
def training(copied, jobs, tmp_path):
    """A run that trains, halted for as long as others are looked at."""
    job = next(job for job in jobs if job.outputs == ("resources/mini/weights/mini_vit_third/manifest.json",))
    remove(copied.path, job)
    with started(copied, [job.outputs[0]], tmp_path / "log") as run:
        wait_for(run, job, tmp_path / "log")
        assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
        for process in family(run.pid)[1:]:
            process.suspend()
        yield run


def test_a_second_run_of_a_study_is_stopped_and_the_first_goes_on(copied, training, tmp_path):
    said = copied.snakemake(*SMALL_CONFIG, FIGURE, fails=True)
    assert "LockException" in said and "cannot be locked" in said and "--unlock" in said
    assert training.poll() is None and family(training.pid)[1:]
    for process in family(training.pid)[1:]:
        process.resume()
    assert training.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    assert copied.jobs(*SMALL_CONFIG, "resources/mini/weights/mini_vit_third/manifest.json") == {}


def test_another_study_runs_beside_it(copied, training):
    """Studies with folders of their own do not wait for one another."""
    copied.snakemake("--configfile", "config/published.yaml", "--", "results/published/tables/models.parquet")
    assert (copied.path / "results/published/tables/models.parquet").is_file() and training.poll() is None


def test_a_study_that_shares_what_is_being_made_is_stopped_and_one_that_does_not_is_not(copied, training):
    """Two studies over one `resources`: what one makes, the other may not make or read meanwhile."""
    folders = {"results": "results/other", "figures": "figures/other", "logs": "logs/other"}
    folders["resources"] = "resources/mini"
    (copied.path / "other.yaml").write_text(f"pathvars: {folders}\n")
    config = ("--configfile", "config/mini.yaml", "small.yaml", "other.yaml", "--")
    said = copied.snakemake(*config, "results/other/embeddings/mini_vit_third/mini_val.npy", fails=True)
    assert "LockException" in said and "--unlock" in said
    copied.snakemake(*config, f"results/other/embeddings/{MODEL}/{DATASET}.npy")
    made, own = (copied.path / f"results/{name}/embeddings/{MODEL}/{DATASET}.npy" for name in ("other", "mini"))
    assert made.read_bytes() == own.read_bytes()


# Clocks


def date(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() + seconds,) * 2)


def test_results_of_the_future_stop_a_run_before_its_first_job(copied):
    """The clock was set back a day. Neither is anything made for ever, nor does what is out of date pass for fresh."""
    tables = copied.path / "results/mini/tables"
    shape_bias, embedding = (
        tables / "shape_bias.parquet",
        copied.path / f"results/mini/embeddings/{MODEL}/{DATASET}.npy",
    )
    for path in (*tables.iterdir(), embedding):
        date(path, 86_400)
    metric = copied.path / f"results/mini/metrics/shape_bias/{MODEL}/mini_cue_conflict.json"
    metric.write_text(metric.read_text().replace('"n"', ' "n"', 1))  # a new content, older than the table by its date
    assert copied.jobs(*SMALL_CONFIG, FIGURE) == {}, "by the dates alone all is fresh"
    (tables / "shape_bias.csv").unlink()  # something to do
    said = copied.snakemake(*SMALL_CONFIG, FIGURE, "results/mini/tables/shape_bias.csv", fails=True)
    assert "more files are dated in the future" in said and "It was set back" in said and "Error in rule" not in said
    assert not (tables / "shape_bias.csv").exists(), "no job ran"
    (remedy,) = re.findall(r"^\s+(find results.* \+|find resources.* \+)$", said, re.MULTILINE)
    subprocess.run(remedy, shell=True, cwd=copied.path, check=True)
    jobs = copied.jobs(*SMALL_CONFIG, FIGURE)
    assert jobs.get("gather_metric"), "the metric that changed is gathered again"
    copied.snakemake(*SMALL_CONFIG, FIGURE)
    assert shape_bias.stat().st_mtime > time.time() - 3600
    assert copied.jobs(*SMALL_CONFIG, FIGURE) == {}, "and that was all"


def test_dates_of_the_past_make_nothing_anew_and_never_for_ever(copied):
    """As after a copy that keeps no dates, or a clock that stood at 1970: contents are compared."""
    for path in (copied.path / "results/mini/tables").iterdir():
        os.utime(path, (1, 1))
    before = copied.jobs(*SMALL_CONFIG, FIGURE)
    copied.snakemake(*SMALL_CONFIG, FIGURE)
    assert not {rule for rule in before if rule.startswith(("embed_", "train_", "render_"))}
    assert copied.jobs(*SMALL_CONFIG, FIGURE) == {}


def test_an_input_of_the_future_that_is_no_result(copied):
    """Snakemake says so when the job ends, as of a clock that jumps back under a run. Set right, it goes on."""
    claims, table = copied.path / "config/claims.yaml", "results/mini/tables/claims.parquet"
    whole = (copied.path / table).read_bytes()
    date(claims, 86_400)
    (copied.path / table).unlink()
    said = copied.snakemake(*SMALL_CONFIG, table, fails=True)
    assert "has older modification time" in said and "config/claims.yaml" in said and "clock skew" in said
    date(claims, -60)
    copied.snakemake(*SMALL_CONFIG, table)
    assert (copied.path / table).read_bytes() == whole and copied.jobs(*SMALL_CONFIG, table) == {}
