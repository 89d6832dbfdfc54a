"""One verb for each rule: ``python -m clip_robustness VERB --help``.

A verb's options are the parameters of the function behind it. The function's module is imported only when its verb
is called, so that `--help` costs nothing and a metric never loads torch.
"""

import argparse
import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any

from clip_robustness import __version__

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

# Verb -> its function, as module:name below the package, and a line of help.
VERBS = {
    "validate": ("core.registry:describe_study", "check a study's config, models and data sets; print what it holds"),
    "plan": ("data.plan:plan_study", "say what a study downloads, stores and computes, before anything starts"),
    "doctor": (
        "data.doctor:examine",
        "say what is here, what is missing, and what to do; exit code 1 when the study cannot run",
    ),
    "describe-model": ("inference.describe:describe_model", "print a line for models.tsv"),
    "label-space": ("inference.label_spaces:write_label_space", "write a label space"),
    "fetch": ("data.fetch:fetch", "download an archive of a data set"),
    "fetch-hub": ("data.hub:fetch_hub", "take a data set from the model hub"),
    "derive": ("data.derive:derive_dataset", "make a data set from another one's images"),
    "index": ("data.index:build_index", "index archives or folders where they lie"),
    "annotate": ("data.adapters.imagenet_x:write_factors", "write the visual factors of a data set's images"),
    "fetch-weights": ("inference.weights:fetch_weights", "fetch a model's weights into a sealed folder"),
    "blend-weights": ("inference.weights:blend_weights", "interpolate between a model and what was fine-tuned from it"),
    "import-predictions": (
        "inference.predictions:import_predictions",
        "bring logits or probabilities of another program into the form of embeddings",
    ),
    "cache-pixels": ("inference.pixels:cache_pixels", "decode a data set once for a preprocessing spec"),
    "heads": ("inference.heads:build_heads", "build a CLIP's zero-shot heads"),
    "embed": ("inference.embed:embed", "run a model over a suite of data sets"),
    "measure-accuracy": (
        "metrics.accuracy:measure_accuracy",
        "top-1 accuracy on a data set and on its in-distribution partner",
    ),
    "measure-video": ("metrics.video:measure_video", "pm-0 and pm-10 accuracy on sets of frames"),
    "measure-corruption": ("metrics.corruption:measure_corruption", "accuracy by corruption and severity"),
    "summarise-shifts": (
        "metrics.corruption:summarise_corruptions",
        "accuracy, retention, effective robustness and corruption errors of synthetic shifts",
    ),
    "measure-typographic": (
        "metrics.typographic:measure_typographic",
        "accuracy and attack success on images with a printed wrong word",
    ),
    "attack": ("inference.attack:attack_images", "one adversarial attack on one model"),
    "match-pairs": ("inference.correspondence:match_pairs", "match pairs of images by a model's dense features"),
    "measure-correspondence": (
        "metrics.correspondence:measure_correspondence",
        "recall of matches by threshold and viewpoint",
    ),
    "write-questions": (
        "metrics.choice:write_questions",
        "two-way questions: the true class, and the likeliest wrong one by a model",
    ),
    "measure-two-way": (
        "metrics.choice:measure_two_way",
        "how often a CLIP or classifier chooses the true class of two",
    ),
    "ask": ("inference.lmm:ask", "ask a model that answers in text"),
    "measure-choice": (
        "metrics.choice:measure_choice",
        "accuracy of answers in text, by likelihood and by what was written",
    ),
    "compare-choice": (
        "metrics.choice:compare_choice",
        "accuracy of one model minus that of others, on the same questions",
    ),
    "combine-variations": ("mini.variations:combine_variations", "several rendered sets as one"),
    "measure-adversarial": (
        "metrics.adversarial:measure_adversarial",
        "accuracy under attack and smallest perturbations, of one model",
    ),
    "find-duplicates": (
        "inference.duplicates:find_duplicates",
        "the nearest image of training corpora for every test image",
    ),
    "choose-threshold": (
        "metrics.overlap:choose_threshold",
        "the similarity above which two images are copies, from planted ones",
    ),
    "measure-overlap": (
        "metrics.overlap:measure_overlap",
        "accuracy on all images, on clean ones and on those that stand in a corpus",
    ),
    "search-prompts": (
        "inference.prompt_search:search_prompts",
        "search a CLIP's prompts for tokens that raise its accuracy",
    ),
    "fit-temperature": (
        "metrics.calibration:fit_temperature_file",
        "fit a model's temperature on half of its in-distribution set",
    ),
    "measure-calibration": (
        "metrics.calibration:measure_calibration",
        "ECE, NLL and reliability bins before and after temperature scaling",
    ),
    "measure-ood": ("metrics.ood:measure_ood", "how well an OOD set is told from the ID set"),
    "measure-factors": ("metrics.factors:measure_factors", "accuracy by visual factor"),
    "fit-factors": (
        "metrics.factors:fit_factors",
        "fit factor accuracy on overall accuracy; effective robustness by factor",
    ),
    "mini-factors": ("mini.factors:write_mini_factors", "visual factors of a rendered data set"),
    "encode-captions": ("inference.captions:encode_captions", "run a CLIP's text tower over captions"),
    "measure-retrieval": (
        "metrics.retrieval:measure_retrieval",
        "zero-shot retrieval, image to text and text to image",
    ),
    "measure-prompts": (
        "metrics.prompts:measure_prompts",
        "what the number of prompts does to accuracy, calibration, factors and OOD detection",
    ),
    "six-factors": (
        "metrics.six_factors:six_factors",
        "the effect of each factor of a model on each axis, from matched pairs",
    ),
    "evaluate-claims": ("report.claims:evaluate_claims", "test the papers' findings on a study's tables"),
    "compare-published": ("report.reproduction:compare_published", "hold what was measured against what was published"),
    "measure-shape-bias": ("metrics.shape_bias:measure_shape_bias", "shape bias on cue conflicts"),
    "gather": ("metrics.gather:gather", "collect metric files into one tidy table"),
    "gather-models": ("metrics.gather:gather_models", "write the table of a study's models"),
    "fit-baselines": (
        "metrics.effective_robustness:fit_baselines_file",
        "fit accuracy under shift against accuracy in distribution; effective robustness of every model",
    ),
    "import-published": ("data.published:import_published", "turn published results into tables"),
    "draw": ("figures.draw:draw", "draw one figure from tables"),
    "report": ("report.page:write_report", "write a study's page: claims, explorer, axes, provenance"),
    "cards": ("report.cards:write_cards", "write a page for every model"),
    "page-index": ("report.landing:write_index", "write a page that shows the studies' reports"),
    "render-world": ("mini.dataset:render_dataset", "render a data set of the mini world"),
    "render-pairs": ("mini.pairs:render_pairs", "render two views of every scene of a world, with depth and pose"),
    "corrupt-world": ("mini.corruptions:write_corrupted", "corrupt rendered images by every type at every severity"),
    "corrupt-world-3d": (
        "mini.corruptions_3d:write_corrupted_3d",
        "corrupt rendered images by types that know their depth, at every severity",
    ),
    "filter-misclassified": (
        "mini.filtered:filter_misclassified",
        "keep the images that a reference classifier gets wrong",
    ),
    "train-mini": ("mini.train:train_model", "train a model of the mini zoo"),
    "train-lmm": ("mini.lmm:train_lmm", "train the mini zoo's model that answers in text"),
}


def function_of(verb: str) -> Callable[..., Any]:
    """The function behind a verb; its module is imported now."""
    module, _, name = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(f"clip_robustness.{module}"), name)


def _listing() -> str:
    """Every verb with one line, grouped by wing."""
    width = max(map(len, VERBS)) + 2
    lines = []
    for wing, title in WINGS.items():
        lines += ["", f"{wing}: {title}"]
        lines += [f"  {verb:<{width}}{line}" for verb, (where, line) in VERBS.items() if where.startswith(f"{wing}.")]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_robustness",
        usage="%(prog)s VERB [--option …]   (VERB --help tells a verb's options)",
        description=f"How robust are CLIP models? The rules of the workflow call these verbs.\n{_listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Call the function of a verb. The exit code is 0; 1 after an error that is explained, or when it returns False."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0].startswith("-"):
        parser = _parser()
        parser.parse_args(given)
        parser.print_help()
        return 0
    verb, *values = given
    if verb not in VERBS:
        from clip_robustness.core.schema import nearest

        _parser().error(f"'{verb}' is no verb{nearest(verb, VERBS)}; without one, all are listed")

    from clip_robustness.core.failures import explain

    try:
        from clip_robustness.options import parser_of

        gc.disable()  # collections while torch or pandas are imported free nothing
        function = function_of(verb)
        gc.enable()
        options = parser_of(verb, VERBS[verb][1], function).parse_args(values)
        result = function(**vars(options))
    except (Exception, KeyboardInterrupt) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return int(result is False)
