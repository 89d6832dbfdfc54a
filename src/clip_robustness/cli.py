"""One verb for each rule: ``python -m clip_robustness VERB --help``.

A verb's options are the arguments of the function behind it; the function's module is imported only when
its verb is called, so that `--help` costs nothing and a metric never loads torch.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_robustness import __version__


@dataclasses.dataclass(frozen=True)
class Option:
    """``--name``: required unless it has a default; `many` takes one or more values, a `flag` takes none."""

    name: str
    kind: Callable[[str], Any] = Path
    help: str = ""
    default: Any = ...
    many: bool = False
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Verb:
    """A function as ``module:name`` below the package, and its options. `exit_code`: it returns the process's."""

    function: str
    help: str
    options: tuple[Option, ...]
    exit_code: bool = False


# The parts of the package, in the order of the workflow, and what each is for.
WINGS = {
    "core": "a study's config",
    "data": "downloads, indexes, what a study needs",
    "inference": "weights, heads, embeddings, attacks, answers",
    "metrics": "numbers with intervals, and the tables that they make",
    "figures": "figures, from tables only",
    "report": "claims, reproduction, pages",
    "mini": "the rendered world and the models that are trained in it",
}


def _paths(*names: str, **helps: str) -> tuple[Option, ...]:
    return tuple(Option(name, help=helps.get(name, "")) for name in names)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


_LOGITS = (
    Option("embeddings", help="embeddings of the data set (.npy, with its manifest .json beside it)"),
    Option("index", help="the data set's index (.parquet)"),
    Option("labels", help="the data set's label space (.json)"),
    Option("head", help="zero-shot head (.npz); none for a classifier", default=None),
)
_DATASET = Option("dataset", json.loads, "its entry of datasets.yaml, as JSON")
_CONFIG = Option("config", help="config file of a study")
_DECODING = (
    Option("workers", int, "processes that decode", 1),
    Option("on-error", str, "what an unreadable image does: fail or mask", "fail"),
    Option("decode", str, "exact, or fast: one level of 255 apart, rarely two", "exact"),
)
_PRECISION = Option("precision", str, "auto, fp32 or bf16", "auto")
_PARTNER = tuple(Option(f"reference-{name}", default=None) for name in ("embeddings", "index", "labels"))
_POPULATION = Option("population", str, "group of the models that the baseline is fitted on", "standard")
_SEED = Option("seed", int, "seed of the bootstrap", 0)
_TRAINING = (
    Option("recipe", json.loads, "its line of models.tsv and the training settings, as JSON"),
    *_paths("index", "labels", "out"),
    Option("parent", help="weights folder that it is made from", default=None),
)
_RESAMPLES = Option("resamples", int, "bootstrap resamples", 1000)

VERBS = {
    "validate": Verb(
        "core.registry:describe_study",
        "check a study's config, models and data sets; print what it holds",
        (_CONFIG,),
    ),
    "plan": Verb(
        "data.plan:plan_study",
        "say what a study downloads, stores and computes, before anything starts",
        (_CONFIG, Option("tflops", float, "sustained speed of one GPU, in TFLOP/s", 40.0)),
    ),
    "doctor": Verb(
        "data.doctor:examine",
        "say what is here, what is missing, and what to do; exit code 1 when the study cannot run",
        (_CONFIG, Option("fast", flag=True, help="leave out the checksums")),
        exit_code=True,
    ),
    "describe-model": Verb(
        "inference.describe:describe_model",
        "print a line for models.tsv",
        (
            Option("library", str, "open_clip, timm, transformers or predictions"),
            Option("architecture", str, "the library's name of it"),
            Option("weights", str, "hub:OWNER/NAME[@REVISION][:FILE], local:PATH or predictions:FOLDER"),
            Option("name", str, "its name here", ""),
        ),
    ),
    "label-space": Verb(
        "inference.label_spaces:write_label_space",
        "write a label space",
        (
            Option("name", str),
            Option("space", json.loads, "its entry of datasets.yaml, as JSON"),
            Option("base", help="the base space's file", default=None),
            Option("out"),
        ),
    ),
    "fetch": Verb(
        "data.fetch:fetch",
        "download an archive of a data set",
        (
            _DATASET,
            Option("archive", str, "the file among its archives"),
            Option("lock", help="file that pins checksums"),
            Option("cache", help="folder that checkouts share", default=None),
            Option("out"),
        ),
    ),
    "fetch-hub": Verb(
        "data.hub:fetch_hub",
        "take a data set from the model hub",
        (_DATASET, Option("lock", help="file that pins revision and checksums"), Option("out")),
    ),
    "derive": Verb(
        "data.derive:derive_dataset",
        "make a data set from another one's images",
        (
            Option("entry", json.loads, "its field `derive` of datasets.yaml, as JSON"),
            *_paths("index", "labels", "out"),
            Option("targets", help="record of the words that are printed", default=None),
            Option("workers", int, "processes", 1),
        ),
    ),
    "index": Verb(
        "data.index:build_index",
        "index archives or folders where they lie",
        (_DATASET, Option("sources", many=True), *_paths("labels", "out")),
    ),
    "annotate": Verb(
        "data.adapters.imagenet_x:write_factors",
        "write the visual factors of a data set's images",
        (Option("annotations", many=True), *_paths("index", "out")),
    ),
    "fetch-weights": Verb(
        "inference.weights:fetch_weights",
        "fetch a model's weights into a sealed folder",
        (
            Option("model", str),
            Option("library", str),
            Option("architecture", str),
            Option("weights", str, "hub:OWNER/NAME[@REVISION][:FILE] or local:PATH"),
            Option("lock", help="file of revisions and checksums (.json)"),
            Option("out"),
        ),
    ),
    "blend-weights": Verb(
        "inference.weights:blend_weights",
        "interpolate between a model and what was fine-tuned from it",
        (
            Option("model", str),
            *_paths("parent", "finetuned"),
            Option("share", float, "of the fine-tuned model, 0 to 1"),
            Option("out"),
        ),
    ),
    "import-predictions": Verb(
        "inference.predictions:import_predictions",
        "bring logits or probabilities of another program into the form of embeddings",
        (
            Option("model", str),
            *_paths("predictions", "index"),
            Option("labels", help="base label space (.json)"),
            Option("out"),
        ),
    ),
    "cache-pixels": Verb(
        "inference.pixels:cache_pixels",
        "decode a data set once for a preprocessing spec",
        (
            Option("index"),
            Option("spec", str, "preprocessing spec, such as resize(224,bicubic)|center_crop(224)"),
            Option("out"),
            *_DECODING,
        ),
    ),
    "heads": Verb(
        "inference.heads:build_heads",
        "build a CLIP's zero-shot heads",
        (
            Option("weights", help="sealed weights folder"),
            Option("prompts", help="prompts.yaml"),
            Option("names", str, "prompt sets", many=True),
            Option("labels", help="base label spaces (.json)", many=True),
            Option("searched", help="templates of a set that is searched for", default=None),
            *_paths("out", "work"),
            _PRECISION,
        ),
    ),
    "embed": Verb(
        "inference.embed:embed",
        "run a model over a suite of data sets",
        (
            Option("model", str),
            Option("library", str),
            Option("preprocess", str),
            Option("weights", help="sealed weights folder"),
            Option("pixels", help="pixel caches (.npy), or indexes (.parquet) to decode as needed", many=True),
            Option("specs", str, "the pixel spec of each", (), many=True),
            *_paths("out", "work"),
            _PRECISION,
            Option("batch-size", _batch_size, "images in a batch, or auto", "auto"),
            Option("compile", flag=True, help="run the image tower through torch.compile"),
            *_DECODING,
        ),
    ),
    "measure-accuracy": Verb(
        "metrics.accuracy:measure_accuracy",
        "top-1 accuracy on a data set and on its in-distribution partner",
        (*_LOGITS, *_PARTNER, *_paths("out", "predictions")),
    ),
    "measure-video": Verb(
        "metrics.video:measure_video",
        "pm-0 and pm-10 accuracy on sets of frames",
        (
            *_LOGITS,
            Option("released-labels", help="the label space as released code filled it", default=None),
            *_PARTNER,
            *(_SEED, _RESAMPLES),
            *_paths("out", "predictions"),
        ),
    ),
    "measure-corruption": Verb(
        "metrics.corruption:measure_corruption",
        "accuracy by corruption and severity",
        (*_LOGITS, _SEED, _RESAMPLES, Option("out")),
    ),
    "summarise-shifts": Verb(
        "metrics.corruption:summarise_corruptions",
        "accuracy, retention, effective robustness and corruption errors of synthetic shifts",
        (
            *_paths("accuracy", "models", "out"),
            Option("shifts", str, "NAME, or NAME=PART+PART", many=True),
            Option("reference", str, "the in-distribution data set"),
            Option("adversarial", help="table of attacks", default=None),
            Option("normaliser", str, "model whose errors corruption errors are divided by (AlexNet's)", None),
            _POPULATION,
            Option("sources", str, "sources of the accuracies (all)", None, many=True),
            _SEED,
            _RESAMPLES,
        ),
    ),
    "measure-typographic": Verb(
        "metrics.typographic:measure_typographic",
        "accuracy and attack success on images with a printed wrong word",
        (
            *_LOGITS,
            Option("source-embeddings", help="of the images without the word", default=None),
            Option("source-index", default=None),
            _SEED,
            Option("out"),
        ),
    ),
    "attack": Verb(
        "inference.attack:attack_images",
        "one adversarial attack on one model",
        (
            Option("model", str),
            Option("attack", str, "its name in the table of attacks"),
            Option("library", str),
            Option("preprocess", str, "its preprocessing spec"),
            *_paths("weights", "index", "labels"),
            Option("head", default=None),
            Option("settings", json.loads, "of the attack, as JSON"),
            Option("substitute", json.loads, "weights, library and preprocess of the other model, as JSON", None),
            Option("images", int, "how many", 1000),
            Option("ids", help="file that lists the images in order", default=None),
            Option("eps-space", str, "pixel or normalized", "pixel"),
            Option("seed", int, "of every random draw", 0),
            *_paths("out", "work"),
        ),
    ),
    "match-pairs": Verb(
        "inference.correspondence:match_pairs",
        "match pairs of images by a model's dense features",
        (
            Option("model", str),
            Option("library", str),
            Option("preprocess", str, "its preprocessing spec"),
            *_paths("weights", "index"),
            Option("family", str, "of the data set; it decides the protocol"),
            Option("stride", int, "of the features, in pixels; 0 is the tower's own", 16),
            _PRECISION,
            *_paths("out", "work"),
        ),
    ),
    "measure-correspondence": Verb(
        "metrics.correspondence:measure_correspondence",
        "recall of matches by threshold and viewpoint",
        (*_paths("matches", "out"), _SEED, _RESAMPLES),
    ),
    "write-questions": Verb(
        "metrics.choice:write_questions",
        "two-way questions: the true class, and the likeliest wrong one by a model",
        (*_LOGITS, Option("selector", str, "short name of that model"), Option("out")),
    ),
    "measure-two-way": Verb(
        "metrics.choice:measure_two_way",
        "how often a CLIP or classifier chooses the true class of two",
        (*_LOGITS, Option("questions", many=True), *_paths("out", "predictions")),
    ),
    "ask": Verb(
        "inference.lmm:ask",
        "ask a model that answers in text",
        (
            Option("model", str),
            *_paths("weights", "index", "out", "work"),
            Option("questions", many=True),
            _PRECISION,
            Option("quantise", int, "bits of quantised weights on a GPU: 0, 4 or 8", 0),
        ),
    ),
    "measure-choice": Verb(
        "metrics.choice:measure_choice",
        "accuracy of answers in text, by likelihood and by what was written",
        _paths("answers", "synonyms", "out", "predictions"),
    ),
    "compare-choice": Verb(
        "metrics.choice:compare_choice",
        "accuracy of one model minus that of others, on the same questions",
        (
            *_paths("predictions", "out"),
            Option("references", help="of the other models", many=True),
            _SEED,
            _RESAMPLES,
        ),
    ),
    "combine-variations": Verb(
        "mini.variations:combine_variations",
        "several rendered sets as one",
        (Option("indexes", many=True), Option("variations", str, many=True), Option("out")),
    ),
    "measure-adversarial": Verb(
        "metrics.adversarial:measure_adversarial",
        "accuracy under attack and smallest perturbations, of one model",
        (Option("attacks", help="results of `attack`", many=True), Option("out")),
    ),
    "find-duplicates": Verb(
        "inference.duplicates:find_duplicates",
        "the nearest image of training corpora for every test image",
        (
            *_paths("embeddings", "index"),
            Option("references", help="features of corpora: .npy, or folders of them", many=True),
            Option("names", str, "of the corpora", (), many=True),
            Option("indexes", help="of corpora made by this project", default=(), many=True),
            Option("out"),
        ),
    ),
    "choose-threshold": Verb(
        "metrics.overlap:choose_threshold",
        "the similarity above which two images are copies, from planted ones",
        (
            *_paths("copies", "copies-index", "sources", "sources-index", "out"),
            Option("false-positives", float, "share of distinct images that may pass", 0.001),
            _SEED,
        ),
    ),
    "measure-overlap": Verb(
        "metrics.overlap:measure_overlap",
        "accuracy on all images, on clean ones and on those that stand in a corpus",
        (
            *_paths("predictions", "matches", "threshold", "out"),
            Option("tests", int, "tests made side by side", 1),
            Option("control", str, "planted, disjoint or none", ""),
            Option("copies-index", default=None),
            _SEED,
        ),
    ),
    "search-prompts": Verb(
        "inference.prompt_search:search_prompts",
        "search a CLIP's prompts for tokens that raise its accuracy",
        (
            *_paths("weights", "embeddings", "index", "labels", "out"),
            Option("tokens", int, "learned tokens before the class name", 4),
            Option("steps", int, "of the search", 200),
            Option("candidates", int, "prompts tried in a step", 32),
            Option("keep", int, "prompts to keep", 5),
            Option("images", int, "used, half of them held out", 10_000),
            Option("start", str, "words that the tokens begin as", "a photo of a"),
            Option("seed", int, "of the search", 0),
            _PRECISION,
        ),
    ),
    "fit-temperature": Verb(
        "metrics.calibration:fit_temperature_file",
        "fit a model's temperature on half of its in-distribution set",
        (*_LOGITS, _SEED, Option("out")),
    ),
    "measure-calibration": Verb(
        "metrics.calibration:measure_calibration",
        "ECE, NLL and reliability bins before and after temperature scaling",
        (
            *_LOGITS,
            Option("temperature"),
            Option("held-out", int, "1: only the half that did not fit it", 0),
            _SEED,
            _RESAMPLES,
            Option("out"),
        ),
    ),
    "measure-ood": Verb(
        "metrics.ood:measure_ood",
        "how well an OOD set is told from the ID set",
        (*_LOGITS, *_paths("reference-embeddings", "reference-index", "out"), _SEED, _RESAMPLES),
    ),
    "measure-factors": Verb(
        "metrics.factors:measure_factors",
        "accuracy by visual factor",
        (
            *_paths("predictions", "factors", "out"),
            Option("prototypes", flag=True, help="with prototypes too"),
            Option("fewest", int, "images that a factor needs", 150),
        ),
    ),
    "fit-factors": Verb(
        "metrics.factors:fit_factors",
        "fit factor accuracy on overall accuracy; effective robustness by factor",
        (
            *_paths("factors", "models", "fits", "out"),
            _POPULATION,
            Option("only", str, "patterns of their names (default: any)", (), many=True),
            Option("without", str, "patterns of names to leave out", (), many=True),
            _SEED,
            _RESAMPLES,
        ),
    ),
    "mini-factors": Verb(
        "mini.factors:write_mini_factors",
        "visual factors of a rendered data set",
        (Option("index"), Option("world", json.loads, "the training world, as JSON"), Option("out")),
    ),
    "encode-captions": Verb(
        "inference.captions:encode_captions",
        "run a CLIP's text tower over captions",
        (Option("model", str), *_paths("weights", "index", "out", "work"), _PRECISION),
    ),
    "measure-retrieval": Verb(
        "metrics.retrieval:measure_retrieval",
        "zero-shot retrieval, image to text and text to image",
        (*_paths("embeddings", "captions", "index", "out"), _SEED, _RESAMPLES),
    ),
    "measure-prompts": Verb(
        "metrics.prompts:measure_prompts",
        "what the number of prompts does to accuracy, calibration, factors and OOD detection",
        (
            *_paths("embeddings", "index", "labels"),
            Option("heads", help="zero-shot heads (.npz)", many=True),
            Option("factors", default=None),
            Option("reference-embeddings", default=None),
            Option("reference-index", default=None),
            Option("held-out", int, "1: of the ID set", 0),
            Option("fewest", int, "images that a factor needs", 150),
            _SEED,
            _RESAMPLES,
            Option("out"),
        ),
    ),
    "six-factors": Verb(
        "metrics.six_factors:six_factors",
        "the effect of each factor of a model on each axis, from matched pairs",
        (
            *_paths("tables", "out"),
            Option("reference", str, "the in-distribution set", None),
            Option("natural", str, "the natural shifts", None, many=True),
            _SEED,
            _RESAMPLES,
        ),
    ),
    "evaluate-claims": Verb(
        "report.claims:evaluate_claims",
        "test the papers' findings on a study's tables",
        (*_paths("claims", "schema"), Option("tables", many=True), Option("study", str), Option("out")),
    ),
    "compare-published": Verb(
        "report.reproduction:compare_published",
        "hold what was measured against what was published",
        (
            Option("tables", help="measured tables (.parquet)", many=True),
            Option("models", help="table of models (.parquet)"),
            Option("published", help="folder of published tables"),
            Option("precision", str, "of the study", ""),
            Option("out"),
        ),
    ),
    "measure-shape-bias": Verb(
        "metrics.shape_bias:measure_shape_bias",
        "shape bias on cue conflicts",
        (*_LOGITS, Option("out")),
    ),
    "gather": Verb(
        "metrics.gather:gather",
        "collect metric files into one tidy table",
        (
            Option("study", str),
            Option("metrics", many=True),
            Option("out", help="table (.parquet; .csv beside it)"),
        ),
    ),
    "gather-models": Verb(
        "metrics.gather:gather_models",
        "write the table of a study's models",
        (Option("models", json.loads, "columns and rows, as JSON"), Option("out")),
    ),
    "fit-baselines": Verb(
        "metrics.effective_robustness:fit_baselines_file",
        "fit accuracy under shift against accuracy in distribution; effective robustness of every model",
        (
            *_paths("accuracy", "models", "baselines", "out"),
            Option("reference", str, "in-distribution data set (default: the one named *_val)", None),
            Option("natural", str, "the natural shifts of the average", None, many=True),
            _POPULATION,
            Option("sources", str, "sources of their accuracies (default: all)", None, many=True),
            _SEED,
            _RESAMPLES,
        ),
    ),
    "import-published": Verb(
        "data.published:import_published",
        "turn published results into tables",
        (Option("folder"), Option("out"), Option("study", str)),
    ),
    "draw": Verb(
        "figures.draw:draw",
        "draw one figure from tables",
        (
            Option("figure", str),
            Option("study", str),
            Option("tables", help="folder of tables"),
            *_paths("pdf", "png"),
        ),
    ),
    "report": Verb(
        "report.page:write_report",
        "write a study's page: claims, explorer, axes, provenance",
        (
            Option("study", str),
            Option("title", str),
            Option("figures", help="figures (.png)", many=True),
            Option("tables", help="tables (.parquet)", many=True),
            *_paths("captions", "out"),
            Option("config", json.loads, "the study's, as JSON", None),
            Option("lacking", json.loads, "what the study leaves out, as JSON", None),
            Option("results", help="the study's folder, for manifests and times", default=None),
            Option("cards", help="folder of model cards", default=None),
            Option("captions-out", help="the captions, filled in (.json)", default=None),
        ),
    ),
    "cards": Verb(
        "report.cards:write_cards",
        "write a page for every model",
        (
            Option("study", str),
            Option("tables", help="tables (.parquet)", many=True),
            Option("out", help="folder"),
            Option("predictions", help="as {model}/{dataset}.parquet", default=(), many=True),
            Option("datasets", json.loads, "label space and licence of each data set, as JSON", None),
            Option("labels", help="label spaces (.json)", default=(), many=True),
            Option("indexes", help="of data sets whose pictures may be shown", default=(), many=True),
        ),
    ),
    "page-index": Verb(
        "report.landing:write_index",
        "write a page that shows the studies' reports",
        (Option("reports", many=True), Option("out")),
    ),
    "render-world": Verb(
        "mini.dataset:render_dataset",
        "render a data set of the mini world",
        (
            Option("world", json.loads, "its settings, as JSON"),
            *_paths("archive", "index"),
            Option("geometry", help="depth, normals and masks (.npz)", default=None),
        ),
    ),
    "render-pairs": Verb(
        "mini.pairs:render_pairs",
        "render two views of every scene of a world, with depth and pose",
        (Option("world", json.loads, "its settings, as JSON"), *_paths("archive", "index")),
    ),
    "corrupt-world": Verb(
        "mini.corruptions:write_corrupted",
        "corrupt rendered images by every type at every severity",
        (
            *_paths("index", "out-archive", "out-index"),
            Option("images", int, "corrupted images of each setting"),
            Option("seed", int, "of the corruptions", 0),
        ),
    ),
    "corrupt-world-3d": Verb(
        "mini.corruptions_3d:write_corrupted_3d",
        "corrupt rendered images by types that know their depth, at every severity",
        (
            *_paths("index", "geometry", "out-archive", "out-index"),
            Option("images", int, "corrupted images of each setting"),
            Option("corruptions", str, "types (all)", (), many=True),
            Option("seed", int, "of the corruptions", 0),
        ),
    ),
    "filter-misclassified": Verb(
        "mini.filtered:filter_misclassified",
        "keep the images that a reference classifier gets wrong",
        (
            *_paths("index", "predictions", "out-index"),
            Option("limit", int, "images to keep at most"),
            _SEED,
        ),
    ),
    "train-mini": Verb("mini.train:train_model", "train a model of the mini zoo", _TRAINING),
    "train-lmm": Verb("mini.lmm:train_lmm", "train the mini zoo's model that answers in text", _TRAINING),
}


def _listing() -> str:
    """Every verb with one line, grouped by wing."""
    width = max(map(len, VERBS)) + 2
    lines = []
    for wing, title in WINGS.items():
        lines += ["", f"{wing}: {title}"]
        own = {name: verb for name, verb in VERBS.items() if verb.function.partition(".")[0] == wing}
        lines += [f"  {name:<{width}}{verb.help}" for name, verb in own.items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_robustness",
        usage="%(prog)s VERB [--option …]   (VERB --help tells a verb's options)",
        description=f"How robust are CLIP models? The rules of the workflow call these verbs.\n{_listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", help=argparse.SUPPRESS)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, prog=f"python -m clip_robustness {name}", description=verb.help)
        for option in verb.options:
            if option.flag:
                sub.add_argument(f"--{option.name}", action="store_true", help=option.help)
                continue
            sub.add_argument(
                f"--{option.name}",
                type=option.kind,
                help=option.help,
                required=option.default is ...,
                default=None if option.default is ... else option.default,
                nargs="+" if option.many else None,
            )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser, given = _parser(), sys.argv[1:] if arguments is None else arguments
    if given and given[0] not in VERBS and not given[0].startswith("-"):
        from clip_robustness.core.schema import nearest

        parser.error(f"'{given[0]}' is no verb{nearest(given[0], VERBS)}; without one, all are listed")
    values = vars(parser.parse_args(given))
    if values["verb"] is None:
        parser.print_help()
        return 0
    verb = VERBS[values.pop("verb")]
    module, _, function = verb.function.partition(":")

    from clip_robustness.core.failures import explain

    try:
        gc.disable()  # collections while torch or pandas are imported free nothing
        imported = importlib.import_module(f"clip_robustness.{module}")
        gc.enable()
        code = getattr(imported, function)(**values)
    except (Exception, KeyboardInterrupt) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return code if verb.exit_code else 0
