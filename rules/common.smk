"""Helpers of the rule files. The registry is read here, before any job is planned."""

import functools
import gc
import inspect
import json
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

ROOT = Path(workflow.basedir)
HERE = Path(
    os.path.relpath(ROOT)
)  # in inputs and params, so that a checkout may move without a rerun
sys.path.insert(0, str(ROOT / "src"))

from clip_robustness.core.clock import check_clock
from clip_robustness.core.failed_jobs import last_words
from clip_robustness.core.failures import check_writable
from clip_robustness.core.gating import page
from clip_robustness.core.io import InputError, sha256_file
from clip_robustness.core.provenance import code_hash
from clip_robustness.core.registry import load_study
from clip_robustness.core.schema import load_yaml
from clip_robustness.core.study import METRICS

# A plan is millions of small objects, of which none is garbage: looking for it took a fifth of a dry run.
gc.set_threshold(500_000)

if os.environ.get("NO_COLOR"):  # Snakemake has only an option for it
    for handler in logger.handlers:
        handler.nocolor = True

try:
    study = load_study(config, ROOT)
except InputError as error:
    raise WorkflowError(f"the study cannot be planned:\n{error}") from None

config = study.config  # with the schema's defaults filled in
if study.remarks and workflow.is_main_process:
    print("\n".join(["This study:", *study.remarks]), file=sys.stderr)


# Jobs import the package from this checkout, and without conda they use the Python that runs Snakemake.
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={shlex.quote(str(ROOT / 'src'))}; "
    + ("export CLIP_ROBUSTNESS_DEVICES=; " if config["device"] == "cpu" else "")
    + (
        ""
        if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
        else f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    )
)


GPUS = 0 if config["device"] == "cpu" else 1
ID = study.id_dataset
ID_LABELS = study.datasets[ID].labels if ID else ""
PIXEL_SPECS = {
    spec.key: spec.pixel_spec
    for spec in {
        study.preprocessing(m, d) for m in study.computed for d in study.evaluated
    }
}
GATHERED = (*METRICS, "overlap_thresholds")


def one_of(names):
    """A wildcard constraint: exactly these names (or nothing at all)."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


wildcard_constraints:
    model=one_of(study.models),
    dataset=one_of(study.datasets),
    space=one_of(study.label_spaces),
    prompts=one_of(study.prompts),
    spec=one_of(PIXEL_SPECS),
    metric=one_of(GATHERED),
    figure=one_of(config["figures"]),
    attack=one_of(config["attacks"]["names"]),
    selector=one_of(config["lmm"]["selectors"]),


def of_family(*families):
    return one_of(n for n, d in study.datasets.items() if d.family in families)


def of_role(*roles):
    return one_of(n for n, d in study.datasets.items() if d.role in roles)


def of_weights(*schemes):
    return one_of(n for n, m in study.models.items() if m.scheme in schemes)


def known(function):
    """Keep a function's signature, for which Snakemake asks several times a job: a twentieth of a dry run."""
    function.__signature__ = inspect.signature(function)
    return function


@known
def labels_of_dataset(wildcards):
    return f"<resources>/labels/{study.datasets[wildcards.dataset].labels}.json"


def model_field(name):
    return known(lambda wildcards: getattr(study.models[wildcards.model], name))


def base_labels(wildcards):
    return f"<resources>/labels/{study.base_space(wildcards.dataset)}.json"


def grown(need):
    """A resource of a job. With each attempt more of it is asked for, since the job before may have run out of it."""
    return lambda wildcards, attempt: (
        attempt * (need(wildcards) if callable(need) else need)
    )


@grown
def memory_of_model(wildcards):
    """MB of main memory of a job that loads a model: its weights twice while they are read, and the libraries."""
    return 4000 + round(2 * study.models[wildcards.model].weight_bytes / 1e6)


def memory_of_metric(kept, dataset=None):
    """MB of a metric that keeps so many bytes of each image. Embeddings are read in blocks, however large they are."""

    def need(wildcards):
        images = study.datasets[dataset or wildcards.dataset].images or 0
        return 1000 + round(kept * images / 1e6)

    return grown(need)


def minutes_of_images(wildcards, images):
    """A generous limit: a quarter of an hour, and the images at 5 TFLOP/s (a GPU) or 50 GFLOP/s (two cores)."""
    gflop = images * (study.models[wildcards.model].gflops or 0)
    return 15 + round(gflop / (5000 if GPUS else 50) / 60)


def words(value):
    """A path, or several, as words of a shell command."""
    return shlex.join([value] if isinstance(value, str) else value)


def optional(*names):
    """Command-line options for those of a rule's named inputs that are there."""

    @known
    def options(wildcards, input):
        there = [name for name in names if input.get(name)]
        return " ".join(
            f"--{name.replace('_', '-')} {words(input[name])}" for name in there
        )

    return options


def id_labels(wildcards):
    return f"<resources>/labels/{ID_LABELS}.json"


include: "common/data.smk"
include: "common/models.smk"
include: "common/metrics.smk"
include: "common/tables.smk"
