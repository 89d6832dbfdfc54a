"""The axes of a report: which tables stand behind a figure, what of them a reader sees, and the conventions."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shown:
    """Rows of a table that a page shows: those of `metrics` (none: all rows) and of data sets that match a pattern.
    `overall`: without those by slice."""

    table: str
    title: str
    metrics: tuple[str, ...] = ()
    overall: bool = False
    datasets: str = "*"


@dataclasses.dataclass(frozen=True)
class Axis:
    """`explore`: its axis in the explorer, as `quantities.KINDS` names it."""

    figure: str
    title: str
    shown: tuple[Shown, ...]
    conventions: str
    explore: str = ""


AXES = (
    Axis(
        "effective_robustness", "Effective robustness",
        (
            Shown("effective_robustness", "Effective robustness, as a fraction above the baseline",
                  ("effective_robustness",)),
            Shown("baselines", "Baselines"),
        ),
        "Accuracy minus the accuracy that a line predicts from accuracy in distribution. The line is fitted on "
        "standard models, in the space that the convention names first, by the estimator that it names second. "
        "Slice val: x is accuracy on the whole in-distribution set; class_subset: on the shift's classes only.",
        "Effective robustness",
    ),
    Axis(
        "natural_shifts", "Natural shifts",
        (Shown("accuracy", "Accuracy by data set", ("accuracy", "pm0_accuracy", "pm10_accuracy"), overall=True),),
        "Top-1 accuracy; N_way says among how many classes the answer is sought. Sets with a part of ImageNet's "
        "classes are cut to them before the softmax. Video: pm-0 is the anchor frame, pm-10 counts a set of frames "
        "when all within ten are right. Intervals are Clopper and Pearson's.",
        "Accuracy",
    ),
    Axis(
        "synthetic_shifts", "Synthetic shifts",
        (Shown("synthetic", "Retention and corruption errors", ("retention", "mce", "relative_mce"), overall=True),),
        "Retention is accuracy under the shift over accuracy in distribution. Corruption errors are divided by "
        "those of the model that the convention names. ImageNet-C is resized to the model's input and not cropped "
        "again.",
        "Synthetic shifts",
    ),
    Axis(
        "corruption_3d", "3D corruptions",
        (Shown("accuracy", "Accuracy by corruption and severity", ("accuracy",), datasets="*3dcc"),),
        "Accuracy by corruption and severity, of images that were corrupted with knowledge of their depth.",
        "Accuracy",
    ),
    Axis(
        "visual_factors", "Visual factors",
        (
            Shown("factors", "Accuracy by visual factor", ("factor_accuracy",)),
            Shown("factor_robustness", "Effective robustness by visual factor", ("effective_robustness",)),
            Shown("factor_fits", "Baselines of visual factors"),
        ),
        "top: images whose most salient factor it is; multi: all images that have it. Prototypes are left out. "
        "Effective robustness is over a line through standard models, of accuracy with the factor on overall "
        "accuracy.",
        "Visual factors",
    ),
    Axis(
        "shape_bias", "Shape bias", (Shown("shape_bias", "Shape bias", ("shape_bias", "cue_accuracy"), overall=True),),
        "Shape decisions over shape and texture decisions, on images whose two cues belong to different classes. "
        "1000_way_mean_probability averages the probabilities of the classes of each of 16 categories; 16_way asks "
        "for the categories themselves.",
        "Shape bias",
    ),
    Axis(
        "calibration", "Calibration",
        (Shown("calibration", "Calibration", ("temperature", "ece", "adaptive_ece", "nll", "brier")),),
        "ECE in 15 bins of equal width, each open below and closed above, on the top confidence; adaptive ECE in 15 "
        "bins of equal mass. before and after: one temperature, fitted on half of the in-distribution set.",
        "Calibration",
    ),
    Axis(
        "ood_detection", "OOD detection", (Shown("ood", "OOD detection", ("auroc", "fpr95")),),
        "In-distribution images are the positive class. Scores: mcm_t1 (maximum concept matching at temperature 1, "
        "zero-shot models), msp (maximum softmax probability), energy, max_logit. FPR95 by three thresholds, which "
        "the convention names; id_recall_at_least keeps 95 % of ID or more.",
        "OOD detection",
    ),
    Axis(
        "retrieval", "Retrieval", (Shown("retrieval", "Retrieval", ("image_recall@1", "text_recall@1")),),
        "Karpathy's test splits. One of an image's captions among the first k is enough; ties count at their "
        "expectation.",
        "Retrieval",
    ),
    Axis(
        "correspondence", "Correspondence", (Shown("correspondence", "Recall of matches", ("recall",)),),
        "Share of matched points whose error is below the threshold that the slice names, over pairs of images. The "
        "convention names the kind of error and the stride of the features.",
        "Correspondence",
    ),
    Axis(
        "lmm", "Two-way questions", (Shown("choice", "Two-way questions", ("accuracy", "gain")),),
        "How often the true one of two classes is chosen; the wrong one is a selector's likeliest. likelihood: the "
        "likelier name, mean over both orders; greedy: what the model writes; two_way: the larger logit; "
        "two_way_own: of the selector itself, whose value is its top-1 accuracy by construction.",
        "Two-way questions",
    ),
    Axis(
        "adversarial", "Adversarial attacks",
        (Shown("adversarial", "Accuracy under attack and smallest perturbations",
               ("clean_accuracy", "accuracy", "median_distance", "faults")),),
        "linf_N: within N/255 of every pixel. An image counts as robust when no perturbation within the budget was "
        "found, by a smaller one neither. Medians beyond the largest budget are censored. Images whose gradient is "
        "zero or not finite are left out and counted as faults.",
        "Adversarial attacks",
    ),
    Axis(
        "typographic", "Printed words", (Shown("typographic", "Printed words"),),
        "Accuracy on images with a printed wrong word, and how often the answer is that word.",
        "Printed words",
    ),
    Axis(
        "prompts", "Prompts",
        (Shown("prompts", "Prompt sets against the largest",
               ("accuracy_difference", "ece_difference", "auroc_difference")),),
        "Differences from the largest prompt set of the study, on the same images.",
        "Prompts",
    ),
    Axis(
        "data_overlap", "Data overlap",
        (Shown("data_overlap", "Data overlap", ("overlap_share", "gain", "accuracy_difference", "binomial_p")),
         Shown("overlap_thresholds", "The detector's threshold")),
        "Accuracy on all test images, on clean ones and on those found in a corpus. The threshold is chosen on "
        "planted copies. The binomial test is one-sided, with Bonferroni's correction beside it.",
        "Data overlap",
    ),
    Axis(
        "six_factors", "Six factors", (Shown("six_factors", "The effect of each factor"),),
        "Mean difference over matched pairs of models, equal in all else that the table of models knows. Intervals "
        "are over clusters of pairs that share a model, over images where there are fewer than five.",
    ),
)  # fmt: skip
