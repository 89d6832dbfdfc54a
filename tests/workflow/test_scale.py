"""The paper's size: what a plan of it takes, that a thousand jobs are scheduled, that metrics stream.

Seconds are measured by benchmarks/scale.py, whose parts these tests run at a smaller size.
"""

import importlib.util
import re

import pytest
import yaml

from clip_robustness.core import io
from clip_robustness.core.registry import load_study
from clip_robustness.data.plan import job_counts


@pytest.fixture(scope="module")
def scale(root):
    spec = importlib.util.spec_from_file_location("scale", root / "benchmarks/scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(scale, tmp_path):
    return scale.copy_checkout(tmp_path / "house")


def study_of(copied):
    return load_study(yaml.safe_load((copied / "config/config.yaml").read_text()), copied)


@pytest.mark.slow
def test_the_papers_plan_fits_into_a_gigabyte(scale, copied):
    used = scale.snakemake(copied, "--dry-run")
    jobs = int(re.findall(r"^total +(\d+)$", used.output, re.M)[-1])
    assert jobs == sum(job_counts(study_of(copied)).values()) > 10_000
    assert 100 < used.megabytes < 1000


@pytest.mark.slow
def test_a_thousand_jobs_of_the_paper_are_scheduled_once(scale, copied):
    """By their real rules, whose jobs do no more than write something to their outputs."""
    house = scale.simulate(copied)
    target = "results/tables/shape_bias.parquet"
    first = scale.snakemake(house, "--cores", "8", "--resources", "gpu=8", "--", target)
    done = int(re.findall(r"^(\d+) of \1 steps \(100%\) done", first.output, re.M)[-1])
    measured = study_of(house).measured("shape_bias")
    assert done > 3 * len(measured) > 800
    files = [house / f"results/metrics/shape_bias/{model}/{dataset}.json" for model, dataset in measured]
    assert all(path.is_file() for path in (*files, house / target))
    assert "Nothing to be done" in scale.snakemake(house, "--cores", "8", "--", target).output


@pytest.mark.parametrize("name", ["measure-corruption", "measure-accuracy"])
def test_a_metric_takes_a_share_of_what_it_reads(scale, tmp_path, name):
    """Of logits that are four times as many (all 0: the first class is answered) no more stays than ids and answers."""
    peaks, sizes = [], []
    for settings in (20, 80):
        folder = tmp_path / str(settings)
        scale.write_corrupted(folder, 2000, settings)
        more = ("--predictions", "predictions.parquet") if name == "measure-accuracy" else ()
        peaks.append(scale.verb(folder, name, *more).megabytes)
        sizes.append(settings * 2000 * scale.CLASSES * 2 / 1e6)
        rows = {row["slice"]: row for row in io.read_json(folder / "out.json")["rows"]}
        assert rows[""]["value"] == pytest.approx(1 / scale.CLASSES)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3
