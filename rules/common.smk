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
from clip_robustness.core.gating import page
from clip_robustness.core.io import InputError, sha256_file
from clip_robustness.core.provenance import code_hash
from clip_robustness.core.registry import load_study
from clip_robustness.core.schema import load_yaml

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
    print("\n".join(["skip_unavailable:", *study.remarks]), file=sys.stderr)

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
TABLES_OF_METRIC = (
    "accuracy",
    "calibration",
    "shape_bias",
    "ood",
    "factors",
    "retrieval",
    "prompts",
    "typographic",
    "adversarial",
    "data_overlap",
    "correspondence",
    "choice",
    "overlap_thresholds",
)


def one_of(names):
    """A wildcard constraint: exactly these names (or nothing at all)."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


wildcard_constraints:
    model=one_of(study.models),
    dataset=one_of(study.datasets),
    space=one_of(study.label_spaces),
    prompts=one_of(study.prompts),
    spec=one_of(PIXEL_SPECS),
    metric=one_of(TABLES_OF_METRIC),
    figure=one_of(config["figures"]),
    attack=one_of(config["attacks"]["names"]),
    selector=one_of(config["lmm"]["selectors"]),


def of_family(*families):
    return one_of(n for n, d in study.datasets.items() if d.family in families)


def of_role(*roles):
    return one_of(n for n, d in study.datasets.items() if d.role in roles)


def of_weights(*schemes):
    return one_of(n for n, m in study.models.items() if m.scheme in schemes)


def download_json(wildcards, output):
    """What `fetch` needs. Snakemake does not track a parameter that takes `output`: a new mirror fetches nothing anew."""
    dataset = study.datasets[wildcards.dataset]
    known = {
        "name": dataset.name,
        "title": dataset.title,
        "licence": dataset.licence,
        "access": dataset.access,
    }
    wanted = ("archives", "hub", "note")
    return json.dumps(
        {**known, **{k: v for k, v in dataset.details.items() if k in wanted}},
        sort_keys=True,
    )


def dataset_json(wildcards):
    """What decides a data set's index."""
    dataset = study.datasets[wildcards.dataset]
    images = (
        None if dataset.derive else dataset.images
    )  # what is made has as many as there are
    known = {"name": dataset.name, "family": dataset.family, "images": images}
    wanted = ("path", "options")
    return json.dumps(
        {**known, **{k: v for k, v in dataset.details.items() if k in wanted}},
        sort_keys=True,
    )


def adapter_code(wildcards):
    return code_hash(
        "data.index", f"data.adapters.{study.datasets[wildcards.dataset].family}"
    )


def space_json(wildcards):
    """A label space's entry; a map's facts lie in a file of their own, so its hash stands for them."""
    space = study.label_spaces[wildcards.space]
    mapped = str(space["classes"]).startswith("map:")
    facts = {"maps": sha256_file(ROOT / "config/label_maps.json")} if mapped else {}
    return json.dumps({**space, **facts}, sort_keys=True)


def base_space_of_space(wildcards):
    base = study.label_spaces[wildcards.space].get("base")
    return f"<resources>/labels/{base}.json" if base else []


def known(function):
    """Keep a function's signature, for which Snakemake asks several times a job: a twentieth of a dry run."""
    function.__signature__ = inspect.signature(function)
    return function


@known
def labels_of_dataset(wildcards):
    return f"<resources>/labels/{study.datasets[wildcards.dataset].labels}.json"


ARCHIVES = {
    name: [a["file"] for a in dataset.archives]
    for name, dataset in study.datasets.items()
}


ANNOTATIONS = [n for n, d in study.datasets.items() if d.role == "annotation"]
INDEXED = [
    n for n, d in study.datasets.items() if not d.is_rendered and n not in ANNOTATIONS
]


def cache_option():
    return f"--cache {shlex.quote(config['cache'])}" if config["cache"] else ""


@functools.cache
def missing_page():
    """Asked for when a job of this run needs data that is not available: `stop_if_missing` must then stop it."""
    if workflow.dryrun or workflow.executor_plugin is None:  # as for --dag or --summary
        print(page(study), file=sys.stderr)
    return page(study)


def stop_if_missing():
    """Before the first job of a real run."""
    if missing_page.cache_info().currsize:
        raise WorkflowError(missing_page())


def stop_if_dated_in_the_future():
    """Before the first job of a real run."""
    folders = [study.config["pathvars"].get(k, k) for k in ("resources", "results")]
    try:
        check_clock(folders)
    except InputError as error:
        raise WorkflowError(str(error)) from None


def sources_of_dataset(wildcards):
    """Where a data set's files lie: what the user has of it, or what is downloaded."""
    name = wildcards.dataset
    dataset, owned = study.datasets[name], study.local(name)
    for path in owned:
        if not Path(path).exists():
            raise WorkflowError(f"local.{name}: {path}: no such file or folder")
    if owned:
        return local(owned)
    if name in study.unavailable:
        missing_page()
    if dataset.hub:
        return [f"<resources>/hub/{name}"]
    if dataset.derive:
        return [f"<resources>/archives/{name}/{name}.tar"]
    return [f"<resources>/archives/{name}/{file}" for file in ARCHIVES[name]]


def annotated_index(wildcards):
    """The index of the images that an annotation is about."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].annotates}.parquet"


def needed_index(wildcards):
    """The index of the images that a data set is made from."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].needs}.parquet"


def targets_of_dataset(wildcards):
    """The record of the words that are printed, where there is one."""
    targets = study.datasets[wildcards.dataset].derive.get("targets")
    return local(str(HERE / targets)) if targets else []


def all_data():
    return [
        f"<resources>/{'annotations' if d.role == 'annotation' else 'index'}/{n}.parquet"
        for n, d in study.datasets.items()
    ]


def model_field(name):
    return known(lambda wildcards: getattr(study.models[wildcards.model], name))


def store(kind):
    """The folder of finished work by content, below <results>, whose name Snakemake does not fill into a parameter."""
    return lambda wildcards, output: str(Path(output[0]).parents[2] / "store" / kind)


@known
def weights_of_model(wildcards):
    return f"<resources>/weights/{study.weights_of(wildcards.model)}/manifest.json"


def blended_weights(wildcards):
    parent, finetuned, _ = study.models[wildcards.model].blended
    names = {"parent": parent, "finetuned": finetuned}
    return {
        role: f"<resources>/weights/{study.weights_of(name)}/manifest.json"
        for role, name in names.items()
    }


def predictions_file(wildcards):
    return local(str(study.models[wildcards.model].predictions[wildcards.dataset]))


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


def minutes_of_suite(suite):
    images = sum(study.datasets[name].images or 0 for name in study.suites[suite])
    return grown(lambda wildcards: minutes_of_images(wildcards, images))


@grown
def minutes_of_prompts(wildcards):
    """As of images: a prompt costs less than an image, and there are up to 80 for each of 1,000 classes."""
    return minutes_of_images(wildcards, 80_000 * len(study.base_spaces))


@grown
def minutes_of_pixels(wildcards):
    """At 50 images a second and core, a fifth of what was measured."""
    images = study.datasets[wildcards.dataset].images or 0
    return 10 + round(images / 50 / config["threads"] / 60)


def templates_of_set(wildcards):
    """What decides a prompt set: its entry, and of a file its hash."""
    entry = study.prompts[wildcards.prompts]
    if isinstance(entry, dict) and "file" in entry:
        return sha256_file((ROOT / config["prompts"]["table"]).parent / entry["file"])
    return entry


def searched_on(pattern):
    """A file of the data set that a prompt set is searched on."""

    def file(wildcards):
        name = study.searches[wildcards.prompts]["dataset"]
        labels = study.datasets[name].labels
        return pattern.format(model=wildcards.model, dataset=name, labels=labels)

    return file


def search_options(wildcards):
    settings = study.searches[wildcards.prompts]
    return shlex.join(
        w for k, v in settings.items() if k != "dataset" for w in (f"--{k}", str(v))
    )


def searched_prompts(wildcards):
    is_searched = wildcards.prompts in study.searches
    return (
        f"<results>/prompts/{wildcards.model}/{wildcards.prompts}.txt"
        if is_searched
        else []
    )


PIXELS = (
    "inference.pixels",
    "inference.decoding",
    "inference.images",
    "inference.fast_pixels",
    "core.preprocessing",
)
CACHED = study.cached_pixels


def pixels_of_suite(suite):
    """A pixel cache of each data set, or its index where a cache is not worth its disk."""

    @known
    def pixels(wildcards):
        keys = {
            d: study.preprocessing(wildcards.model, d).key for d in study.suites[suite]
        }
        return [
            (
                f"<resources>/pixels/{config['decode']}/{key}/{name}.npy"
                if (key, name) in CACHED
                else f"<resources>/index/{name}.parquet"
            )
            for name, key in keys.items()
        ]

    return pixels


def specs_of_suite(suite):
    return known(
        lambda wildcards: [
            study.preprocessing(wildcards.model, d).pixel_spec
            for d in study.suites[suite]
        ]
    )


def head_of(dataset=None):
    """The head that a metric needs, as an input: nothing for a model that answers with logits."""

    @known
    def head(wildcards):
        if not study.models[wildcards.model].has_text_tower:
            return []
        base = study.base_space(dataset or wildcards.dataset)
        return f"<results>/heads/{wildcards.model}/{study.prompts_of(wildcards.model)}.{base}.npz"

    return head


def partner(pattern):
    """A file of a data set's in-distribution partner, or nothing where it has none."""

    @known
    def file(wildcards):
        name = study.partner(wildcards.dataset)
        if not study.answers(wildcards.model, name):
            return []
        labels = study.datasets[name].labels
        return pattern.format(model=wildcards.model, partner=name, labels=labels)

    return file


def released_labels(wildcards):
    """The same classes as released code filled them, where there is a label space of that name."""
    name = f"{study.datasets[wildcards.dataset].labels}_zero"
    return f"<resources>/labels/{name}.json" if name in study.label_spaces else []


def source(pattern):
    """A file of the data set that another one is made from, or nothing where the study has it not."""

    def file(wildcards):
        name = study.datasets[wildcards.dataset].needs
        if name not in study.datasets or not study.answers(wildcards.model, name):
            return []
        return pattern.format(model=wildcards.model, source=name)

    return file


def words(value):
    """A path, or several, as words of a shell command."""
    return shlex.join([value] if isinstance(value, str) else value)


def corpora(pattern):
    return [pattern.format(corpus=name) for name in study.overlap.get("corpora", ())]


def copied(pattern):
    """A file of the data set whose copies the threshold is chosen on."""
    name = study.overlap.get("copies", "")
    return pattern.format(source=study.datasets[name].needs if name else "")


def control_of(wildcards):
    control = study.overlap["controls"].get(wildcards.dataset)
    return f"--control {control}" if control else ""


def planted(wildcards):
    """Of a test set whose copies were planted in a corpus: the index of those."""
    if study.overlap["controls"].get(wildcards.dataset) != "planted":
        return []
    names = [
        n
        for n in study.overlap["corpora"]
        if study.datasets[n].needs == wildcards.dataset
    ]
    return expand("<resources>/index/{name}.parquet", name=names[:1])


def optional(*names):
    """Command-line options for those of a rule's named inputs that are there."""

    @known
    def options(wildcards, input):
        there = [name for name in names if input.get(name)]
        return " ".join(
            f"--{name.replace('_', '-')} {words(input[name])}" for name in there
        )

    return options


def metric_files(wildcards):
    if wildcards.metric == "overlap_thresholds":
        return ["<results>/overlap_threshold.json"]
    if wildcards.metric == "choice":
        return [
            *(
                f"<results>/metrics/choice/{m}/{d}.json"
                for m, d in study.measured("choice")
            ),
            *(f"<results>/metrics/gain/{m}/{d}.json" for m, d in study.asked),
        ]
    return [
        f"<results>/metrics/{wildcards.metric}/{m}/{d}.json"
        for m, d in study.measured(wildcards.metric)
    ]


def world_json(wildcards):
    """A rendered world's settings. `scale` shrinks every mini data set alike."""
    dataset = study.datasets[wildcards.dataset]
    images = max(1, round(dataset.images * config["scale"]))
    classes = study.label_spaces[dataset.labels]["classes"]
    facts = {"name": dataset.name, "images": images, "classes": classes}
    return json.dumps({**facts, **dataset.details["world"]}, sort_keys=True)


def corrupted_index(wildcards):
    """The rendered images that are corrupted."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].details['corrupt']}.parquet"


def variations_of_dataset(wildcards):
    """The rendered sets that one is combined from."""
    names = study.datasets[wildcards.dataset].details["combine"].values()
    return expand("<resources>/index/{name}.parquet", name=names)


def corrupted_geometry(wildcards):
    """Depth behind the pixels of the rendered images that are corrupted."""
    return f"<resources>/geometry/{study.datasets[wildcards.dataset].details['corrupt']}.npz"


def corrupted_images(wildcards):
    """Of each type (15, where the data set names none) and each of the 5 severities."""
    dataset = study.datasets[wildcards.dataset]
    settings = 5 * len(dataset.details["options"].get("corruptions", range(15)))
    return max(1, round(dataset.images * config["scale"] / settings))


def pool_of_dataset(wildcards):
    """What a filtered data set is made from: a pool's index and the filtering model's predictions on it."""
    details = study.datasets[wildcards.dataset].details
    return {
        "index": f"<resources>/index/{details['pool']}.parquet",
        "predictions": f"<results>/predictions/{details['filter_model']}/{details['pool']}.parquet",
    }


def training_data(wildcards):
    """What a mini model learns from: a rendered set and, when it is fine-tuned, its parent's weights."""
    model = study.models[wildcards.model]
    source = model.finetuned_on or model.source
    files = {
        "index": f"<resources>/index/{source}.parquet",
        "labels": f"<resources>/labels/{study.datasets[source].labels}.json",
    }
    if model.parent and (model.finetuning != "none" or model.answers_in_text):
        files["parent"] = f"<resources>/weights/{model.parent}/manifest.json"
    return files


def parent_folder(wildcards, input):
    return (
        f"--parent {shlex.quote(str(Path(input.parent).parent))}"
        if input.get("parent")
        else ""
    )


def recipe_json(wildcards):
    """A mini model's line, as far as it decides the weights, and the settings that it is trained by."""
    model = study.models[wildcards.model]
    names = "model library architecture family finetuning loss train_images"
    row = {name: getattr(model, name) for name in names.split()}
    of_library = {"timm": "supervised", "transformers": "lmm"}
    kind = of_library.get(model.library, model.finetuning.replace("none", "clip"))
    settings = {name: config["training"][name] for name in ("seed", kind)}
    return json.dumps({**row, **settings, "fraction": config["scale"]}, sort_keys=True)


def models_json():
    """The rows of the models table."""
    columns = (
        "model title library architecture group family source train_images finetuning finetuned_on loss"
        " prompts params_m gflops parent image_size preprocess published"
    )
    rows = [
        [getattr(model, name) for name in columns.split()]
        for model in study.models.values()
    ]
    return json.dumps({"columns": columns.split(), "rows": rows})


def fit_options():
    """Which models the baseline is fitted on, and which set is in distribution."""
    fit = config["fit"]
    sources = ["--sources", *fit["sources"]] if fit["sources"] else []
    return shlex.join(
        [
            "--population",
            fit["population"],
            *sources,
            *(["--reference", ID] if ID else []),
            *(["--natural", *study.natural_shifts] if study.natural_shifts else []),
        ]
    )


def published_files():
    return local(
        sorted(str(path) for path in (HERE / config["published"]).glob("*.csv"))
    )


def captions_folder(wildcards, input):
    return str(Path(input.captions[0]).parent)


SETTINGS = load_yaml(ROOT / config["attacks"]["table"]) if study.attacked else {}


def settings_of_attack(wildcards):
    """Those of the table, with those that the study replaces."""
    changed = config["attacks"]["settings"].get(wildcards.attack, {})
    return {**SETTINGS[wildcards.attack], **changed}


def attack_json(wildcards):
    return json.dumps(settings_of_attack(wildcards), sort_keys=True)


def transfers(wildcards):
    return bool(settings_of_attack(wildcards).get("substitute"))


def substitute(pattern):
    """A file of the model whose gradients an attack uses, or nothing where it uses the victim's own."""

    def file(wildcards):
        name = config["attacks"]["substitute"]
        return (
            pattern.format(weights=study.weights_of(name), model=name)
            if transfers(wildcards)
            else []
        )

    return file


def substitute_json(wildcards, input):
    """Nothing ({}) for an attack that needs no substitute."""
    if not transfers(wildcards):
        return "{}"
    model = study.models[config["attacks"]["substitute"]]
    weights = str(Path(input.substitute_weights).parent)
    facts = {
        "weights": weights,
        "library": model.library,
        "preprocess": model.preprocess,
    }
    return json.dumps(facts, sort_keys=True)


def attack_ids():
    ids = config["attacks"]["ids"]
    return f"--ids {shlex.quote(str(HERE / ids))}" if ids else ""


def selector(pattern):
    """A file of the model that chooses the wrong classes of the questions."""
    return lambda wildcards: pattern.format(
        model=config["lmm"]["selectors"][wildcards.selector], dataset=wildcards.dataset
    )


def question_head(model, dataset):
    if not study.models[model].has_text_tower:
        return []
    prompts = config["lmm"]["prompts"] or study.prompts_of(model)
    return f"<results>/heads/{model}/{prompts}.{study.base_space(dataset)}.npz"


def head_of_selector(wildcards):
    return question_head(
        config["lmm"]["selectors"][wildcards.selector], wildcards.dataset
    )


def head_of_question(wildcards):
    return question_head(wildcards.model, wildcards.dataset)


def questions_of_dataset(wildcards):
    return [
        f"<results>/questions/{name}/{wildcards.dataset}.parquet"
        for name in config["lmm"]["selectors"]
    ]


@grown
def minutes_of_questions(wildcards):
    """Each image is asked about by every selector, in both orders."""
    images = study.datasets[wildcards.dataset].images or 0
    return minutes_of_images(wildcards, 2 * len(config["lmm"]["selectors"]) * images)


@grown
def minutes_of_pairs(wildcards):
    """At most 20,000 pairs, whose images are up to 13 times as large as a model's own."""
    return minutes_of_images(wildcards, 2 * 13 * 20_000)


@grown
def minutes_of_attack(wildcards):
    """A quarter of an hour, and as many passes over the images as the strongest attacks make."""
    return minutes_of_images(wildcards, 10_000 * config["attacks"]["images"])


FIGURE_TABLES = {
    "effective_robustness": ("accuracy", "models", "baselines", "effective_robustness"),
    "shape_bias": ("shape_bias", "models"),
    "calibration": ("calibration", "accuracy", "models"),
    "visual_factors": ("factors", "models", "factor_fits", "factor_robustness"),
    "retrieval": ("retrieval", "accuracy", "models"),
    "ood_detection": ("ood", "accuracy", "models"),
    "prompts": ("prompts", "models"),
    "natural_shifts": ("accuracy", "effective_robustness", "synthetic", "models"),
    "synthetic_shifts": ("synthetic", "models"),
    "corruption_3d": ("accuracy", "models"),
    "correspondence": ("correspondence", "accuracy", "models"),
    "lmm": ("choice", "models"),
    "adversarial": ("adversarial", "models"),
    "typographic": ("typographic", "models"),
    "data_overlap": ("data_overlap", "overlap_thresholds", "models"),
    "six_factors": ("six_factors",),
    "claims": ("claims",),
    "reproduction": ("reproduction", "models"),
}


def table_if_measured(name):
    return [f"<results>/tables/{name}.parquet"] if study.measured(name) else []


def shift_options():
    """The synthetic shifts, their yardsticks, and the models of the baseline."""
    shifts, fit, normaliser = config["shifts"], config["fit"], config["normaliser"]
    return shlex.join(
        [
            *("--shifts", *(shifts or study.synthetic_shifts)),
            *("--reference", ID or "imagenet_val", "--population", fit["population"]),
            *(["--sources", *fit["sources"]] if fit["sources"] else []),
            *(["--normaliser", normaliser] if normaliser else []),
        ]
    )


def tables_of_figure(wildcards):
    """Those of a figure's tables that the study has."""
    there = study_tables()
    tables = [
        f"<results>/tables/{name}.parquet" for name in FIGURE_TABLES[wildcards.figure]
    ]
    return [table for table in tables if table in there]


def measured_tables():
    """Tables that are gathered from metrics, or imported."""
    if config["published"]:
        return ["accuracy", "shape_bias", "factors", "retrieval"]
    tables = [metric for metric in TABLES_OF_METRIC[:-1] if study.measured(metric)]
    return tables + ["overlap_thresholds"] * bool(study.overlap)


def base_tables():
    """Measured tables, and what is fitted across models."""
    names = [*measured_tables(), "models"]
    if "accuracy" in names:
        names += ["baselines", "effective_robustness"]
    if study.synthetic_shifts or config["shifts"]:
        names += ["synthetic"]
    if "factors" in names:
        names += ["factor_fits", "factor_robustness"]
    return [f"<results>/tables/{name}.parquet" for name in names]


def study_tables():
    """Tables of this study: what its data sets' roles allow, or what its published tables hold."""
    names = ["six_factors", "claims", "reproduction"]
    return [*base_tables(), *(f"<results>/tables/{name}.parquet" for name in names)]


def annotated_predictions(wildcards):
    """A model's predictions on the images that a table of factors is about."""
    images = study.datasets[wildcards.dataset].annotates
    return f"<results>/predictions/{wildcards.model}/{images}.parquet"


def habits_json(wildcards):
    """The training world whose habits mini factors deviate from."""
    habits = study.datasets[study.datasets[wildcards.dataset].details["habits"]]
    facts = {"name": habits.name, "images": habits.images}
    return json.dumps({**facts, **habits.details["world"]}, sort_keys=True)


def id_labels(wildcards):
    return f"<resources>/labels/{ID_LABELS}.json"


def heads_of_sets(wildcards):
    """The heads of every prompt set; an OOD set is scored over the ID set's classes."""
    is_ood = study.datasets[wildcards.dataset].role == "ood"
    base = study.base_space(ID if is_ood else wildcards.dataset)
    return [
        f"<results>/heads/{wildcards.model}/{name}.{base}.npz"
        for name in study.prompt_sets
    ]


def labels_of_prompts(wildcards):
    is_ood = study.datasets[wildcards.dataset].role == "ood"
    return id_labels(wildcards) if is_ood else labels_of_dataset(wildcards)


def if_ood(pattern):
    """A file of the ID set, for an OOD set."""

    def file(wildcards):
        is_ood = study.datasets[wildcards.dataset].role == "ood"
        return pattern.format(model=wildcards.model, reference=ID) if is_ood else []

    return file


def factors_of_images(wildcards):
    name = study.annotation_of(wildcards.dataset)
    return f"<resources>/annotations/{name}.parquet" if name else []


def factor_patterns():
    options = {
        "--only": config["fit"]["factors_only"],
        "--without": config["fit"]["factors_without"],
    }
    return shlex.join([w for o, names in options.items() if names for w in (o, *names)])


def six_factors_options():
    natural = study.natural_shifts
    return shlex.join(
        [
            *(["--reference", ID] if ID else []),
            *(["--natural", *natural] if natural else []),
        ]
    )


def assets(*kinds):
    """Style, markup and scripts of the report."""
    folder = HERE / "src/clip_robustness/report"
    return local(
        sorted(str(path) for kind in kinds for path in folder.glob(f"*.{kind}"))
    )


def config_json():
    """The config as a report shows it: without what is of this machine alone."""
    shown = {k: v for k, v in study.config.items() if k not in ("cache", "captions")}
    return json.dumps({**shown, "local": sorted(study.config["local"])}, sort_keys=True)


def lacking_json():
    """What the study leaves out, and why."""
    skipped = {
        name: {
            "title": dataset.title,
            "licence": dataset.licence,
            "note": dataset.details.get("note", ""),
        }
        for name, dataset in {**study.unavailable, **study.skipped}.items()
    }
    figures = [figure for figure in FIGURE_TABLES if figure not in config["figures"]]
    facts = {"skipped": skipped, "remarks": study.remarks, "figures": figures}
    return json.dumps(facts, sort_keys=True)


# Data sets whose classes a model card looks at.
CLASSED = {
    name: dataset
    for name, dataset in study.datasets.items()
    if dataset.role in ("id", "natural_shift")
}


def predictions_of_cards():
    return [
        f"<results>/predictions/{m}/{d}.parquet"
        for m, d in study.measured("accuracy")
        if d in CLASSED
    ]


def labels_of_cards():
    spaces = sorted({dataset.labels for dataset in CLASSED.values()})
    return [f"<resources>/labels/{space}.json" for space in spaces]


def indexes_of_cards():
    """Of data sets whose pictures may be shown: those that are rendered here."""
    rendered = [name for name, dataset in CLASSED.items() if dataset.is_rendered]
    return [f"<resources>/index/{name}.parquet" for name in rendered]


def datasets_of_cards_json():
    facts = {
        name: {"labels": dataset.labels, "licence": dataset.licence}
        for name, dataset in CLASSED.items()
    }
    return json.dumps(facts, sort_keys=True)


def filled_captions():
    """Figure -> caption with its numbers, as the last report has them: `snakemake --report` shows them."""
    path = Path(config["pathvars"].get("figures", "figures")) / "captions.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


config["captions"] = filled_captions()
