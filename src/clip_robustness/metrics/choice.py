"""Two-way questions about images: which wrong class to offer, and how often the true one is chosen (ImageNet-D).

A selector, a CLIP or a classifier, picks the wrong class of each question: its top-1 where that is wrong, its top-2
where the top-1 is right. A model that answers in text and a model that scores classes then choose between the two.

The selector itself is no fair opponent. Where its top-1 was wrong, that class is the wrong option and scores above the
true one, so its two-way accuracy *is* its top-1 accuracy, whatever it could tell apart. Its rows therefore say
`two_way_own` where those of all other models say `two_way`, and accuracies are also given on the two halves apart:
slices `selector_right` and `selector_wrong`. Other models that are like the selector share part of the effect.

Conventions are `{selector}:{how}`.

    two_way, two_way_own     the true class has the larger logit; ties go to the first class, as everywhere
    likelihood               the true class's name has the larger log-likelihood, a mean over both orders of the
                             options; a tie is no right answer. Default: as the question names both options, nearly
                             all of a name's probability is decided by its first word, and dividing by its length
                             would favour long names
    likelihood_per_token     the same with log-likelihoods divided by the number of tokens
    greedy                   the greedy answer names the true class and not the other; an answer that names both or
                             none is dropped, as in the released code of ImageNet-D (chenshuang-zhang/imagenet_d)
    greedy_all               the same with dropped answers counted as wrong
    greedy_swapped(_all)     the same with the wrong class named first in the question; the release names the true
                             class first, which helps a model that prefers what comes first

Source: Zhang et al., ImageNet-D (CVPR 2024); Tu et al., arXiv 2410.01534 (LLaVA against CLIP).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import restriction
from clip_robustness.metrics.rows import Row, proportion_row, row

TRUE, FALSE, DOUBLE, NONE = "true", "false", "double", "none"  # what an answer names
QUESTION = ("selector", "selector_model", "image_id", "category", "label", "failure_label", "truth", "failure")
PREDICTION = ("model", "how", "selector", "image_id", "category", "truth", "failure", "selector_right", "correct")


def write_questions(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    selector: str,
    head: Path | None = None,
    *,
    category: str = "variation",
) -> None:
    """Write a question for each labelled image: its class and the likeliest wrong one by the model of `embeddings`.

    selector: a short name for the questions, such as `clip` or `resnet50`. category: the index's column that groups
    the images; without it there is one group, "". Columns of `out` (parquet): QUESTION and `selector_right`, whether
    the selector's top-1 is the true class. Ties go to the first class.
    Errors: `InputError` as of `measure.join`, and for a label space of fewer than two classes or no labelled image.
    """
    images = measure.join(embeddings, index, labels, head)
    names = np.array(images.space["classes"], dtype=object)
    rows = images.labelled
    if len(names) < 2 or not len(rows):
        raise InputError(f"{index}: {len(rows)} labelled images of {len(names)} classes; a question needs two classes")
    restrict = restriction(images.members, images.classes)
    first, second = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    for part, block in images.blocks(rows):
        logits = restrict(block).copy()
        first[part] = logits.argmax(axis=1)
        logits[np.arange(len(logits)), first[part]] = -np.inf
        second[part] = logits.argmax(axis=1)
    label = images.labels[rows].astype(np.int32)
    right = first == label
    failure = np.where(right, second, first).astype(np.int32)
    columns = io.read_parquet(index)
    groups = columns[category] if category in columns else np.full(len(images.labels), "", dtype=object)
    values: list[Any] = [[selector] * len(rows), [images.model] * len(rows), images.image_ids[rows], groups[rows]]
    values += [label, failure, names[label], names[failure]]
    io.write_parquet(out, {**dict(zip(QUESTION, values, strict=True)), "selector_right": right})


def measure_two_way(
    embeddings: Path,
    index: Path,
    labels: Path,
    questions: Sequence[Path],
    out: Path,
    predictions: Path,
    head: Path | None = None,
) -> None:
    """Write how often a CLIP or classifier scores the true class above the other: `choice_rows` of each selector.

    questions: files of `write_questions`, one a selector, over the classes of `labels`. predictions (parquet): the
    columns PREDICTION, one row a question. Masked images are left out.
    Errors: `InputError` as of `measure.join`; for questions over other classes, or without one image of the index.
    """
    images = measure.join(embeddings, index, labels, head)
    asked = _read(questions, (*QUESTION, "selector_right"))
    for ids, names in (("label", "truth"), ("failure_label", "failure")):
        _check_names(asked[ids], asked[names], images.space["classes"], labels)
    position = {image_id: row for row, image_id in zip(images.rows, images.image_ids[images.rows], strict=True)}
    rows = np.array([position.get(image_id, -1) for image_id in asked["image_id"]], np.int64)
    there = rows >= 0
    if not there.any():
        raise InputError(f"{questions[0]}: asks about none of the images of {index}; write the questions again")
    asked, rows = {name: column[there] for name, column in asked.items()}, rows[there]
    correct = np.empty(len(rows), bool)
    restrict = restriction(images.members, images.classes)
    for part, block in images.blocks(rows):
        logits, order = restrict(block), np.arange(part.stop - part.start)
        label, failure = asked["label"][part], asked["failure_label"][part]
        ahead = logits[order, label] - logits[order, failure]
        correct[part] = (ahead > 0) | ((ahead == 0) & (label < failure))  # as argmax, so that `own` is top-1 accuracy
    own = asked["selector_model"] == images.model
    how = np.where(own, "two_way_own", "two_way").astype(object)
    _write_predictions(predictions, asked, images.model, how, correct)
    found = [
        one
        for selector, some in _by_selector(asked)
        for one in choice_rows(asked, correct, f"{selector}:{how[some][0]}", some)
    ]
    measure.write_rows(out, images, found, selected_itself=sorted(set(asked["selector"][own])))


def measure_choice(answers: Path, out: Path, predictions: Path, synonyms: Path | None = None) -> None:
    """Write accuracies of a model that answers in text, under each convention, and the share of dropped answers.

    answers: parquet of `inference.lmm.ask`. synonyms: JSON, class name -> further names that an answer may use.
    Rows: `choice_rows` for each convention; `dropped`, the share of greedy answers that name both options or none
    (conventions greedy and greedy_swapped). predictions (parquet): PREDICTION by the convention `likelihood`, and
    `matched`, `matched_swapped`: what the greedy answers name (true, false, double, none; "" where none was asked).
    Errors: `InputError` for a file that lacks a column, and for a log-likelihood that is not finite.
    """
    scores = ("truth_logp", "failure_logp", "truth_logp_swapped", "failure_logp_swapped")
    columns = ("model", *QUESTION, "selector_right", "truth_tokens", "failure_tokens", *scores)
    asked = _read([answers], (*columns, "answer", "answer_swapped"))
    values = {name: asked[name].astype(float) for name in scores}
    for name, column in values.items():
        if len(bad := np.flatnonzero(~np.isfinite(column))):
            raise InputError(f"{answers}: row {bad[0]}: {name} is {column[bad[0]]}; delete it and ask again")
    names = _names(io.read_json(synonyms) if synonyms else {})
    truth = values["truth_logp"] + values["truth_logp_swapped"]
    failure = values["failure_logp"] + values["failure_logp_swapped"]
    correct = {
        "likelihood": truth > failure,
        "likelihood_per_token": truth / asked["truth_tokens"] > failure / asked["failure_tokens"],
    }
    matched = {name: _match_all(asked, f"answer{name}", names) for name in ("", "_swapped")}
    rows: list[Row] = []
    for selector, some in _by_selector(asked):
        for convention, right in correct.items():
            rows += choice_rows(asked, right, f"{selector}:{convention}", some)
        for suffix, found in matched.items():
            rows += _text_rows(asked, found, f"{selector}:greedy{suffix}", some)
    model, how = str(asked["model"][0]), np.full(len(truth), "likelihood", dtype=object)
    more = {f"matched{suffix}": found for suffix, found in matched.items()}
    _write_predictions(predictions, asked, model, how, correct["likelihood"], more)
    manifest = {"model": model, "n": len(truth), "ids_sha256": io.ids_digest(asked["image_id"])}
    io.write_json(out, {"manifest": manifest, "rows": [{**one, "source": "measured"} for one in rows]})


def compare_choice(
    predictions: Path,
    references: Sequence[Path],
    out: Path,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> None:
    """Write the rows `gain`: accuracy of one model minus that of each reference, on the same questions.

    predictions, references: parquet files of `measure_choice` or `measure_two_way`. Convention:
    `{selector}:{how}-{reference's how}:{reference}`; slices as of `choice_rows`; n: questions that both answered.
    Intervals: bootstrap over images, as pairs. Errors: `InputError` when two files share no question.
    """
    own = _read([predictions], PREDICTION)
    rows: list[Row] = []
    for path in references:
        other = _read([path], PREDICTION)
        key = {question: row for row, question in enumerate(_questions(other))}
        partner = np.array([key.get(question, -1) for question in _questions(own)], np.int64)
        if not (partner >= 0).any():
            raise InputError(f"{path}: has none of the questions of {predictions}; measure both on the same questions")
        kept = partner >= 0
        difference = np.zeros(len(kept))
        difference[kept] = own["correct"][kept].astype(float) - other["correct"][partner[kept]]
        for selector, some in _by_selector(own):
            if not (chosen := some & kept).any():
                continue
            first = np.flatnonzero(chosen)[0]
            hows = f"{own['how'][first]}-{other['how'][partner[first]]}"
            convention = f"{selector}:{hows}:{other['model'][partner[first]]}"
            for name, inside in _slices(own, chosen):
                rows.append(_gain(difference[inside], name, convention, resamples, seed))
    manifest = {"n": len(own["correct"]), "ids_sha256": io.ids_digest(own["image_id"])}
    io.write_json(out, {"manifest": manifest, "rows": [{**one, "source": "measured"} for one in rows]})


def choice_rows(
    asked: Mapping[str, np.ndarray], correct: np.ndarray, convention: str, chosen: np.ndarray, metric: str = "accuracy"
) -> list[Row]:
    """Rows of the share of `correct` among the `chosen` questions (bool [n] each), with Clopper-Pearson intervals.

    Slices: "", each category, `selector_right` and `selector_wrong`; one without questions has no row.
    """
    return [
        proportion_row(metric, int(correct[inside].sum()), int(inside.sum()), name, convention)
        for name, inside in _slices(asked, chosen)
    ]


def match(answer: str, truth: Iterable[str], failure: Iterable[str]) -> str:
    """Which option an answer names: `true`, `false`, `double` (both) or `none`.

    truth, failure: the names of each option. Case and punctuation do not count, a name may be in the plural, and a
    name that is only part of a longer name of the other option ("bottle" in "water bottle") does not count.
    """
    words = _words(answer)
    spans = [
        [found.span() for name in names for found in re.finditer(rf"(?<= ){re.escape(name)}(?:e?s)?(?= )", words)]
        for names in ({_words(name).strip() for name in option} - {""} for option in (truth, failure))
    ]
    right, wrong = (any(not _inside(span, spans[1 - side]) for span in spans[side]) for side in (0, 1))
    return {(True, False): TRUE, (False, True): FALSE, (True, True): DOUBLE, (False, False): NONE}[right, wrong]


def _inside(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    """Whether a strictly longer span of `others` covers `span`."""
    return any(a <= span[0] and span[1] <= b and b - a > span[1] - span[0] for a, b in others)


def _words(text: str) -> str:
    return f" {re.sub(r'[^a-z0-9]+', ' ', text.lower()).strip()} "


def _names(synonyms: Mapping[str, Sequence[str]]) -> Any:
    """Class name -> all its names: itself, without what stands in brackets, and its synonyms."""

    def names(name: str) -> list[str]:
        return [name, re.sub(r"\(.*?\)", "", name), *synonyms.get(name, ())]

    return names


def _match_all(asked: Mapping[str, np.ndarray], column: str, names: Any) -> np.ndarray:
    """What each answer names [n], "" where no text was asked for."""
    triples = zip(asked[column], asked["truth"], asked["failure"], strict=True)
    return np.array([match(text, names(a), names(b)) if text is not None else "" for text, a, b in triples], object)


def _text_rows(asked: Mapping[str, np.ndarray], matched: np.ndarray, convention: str, some: np.ndarray) -> list[Row]:
    answered = some & (matched != "")
    if not answered.any():
        return []
    right, clear = matched == TRUE, (matched == TRUE) | (matched == FALSE)
    rows = choice_rows(asked, right, convention, answered & clear)
    rows += choice_rows(asked, right, f"{convention}_all", answered)
    return rows + choice_rows(asked, ~clear, convention, answered, "dropped")


def _gain(difference: np.ndarray, name: str, convention: str, resamples: int, seed: int) -> Row:
    value, n = float(difference.mean()), len(difference)
    if np.ptp(difference) == 0:  # all alike: a bootstrap would collapse to a point
        slack = 1 - float(statistics.clopper_pearson(n, n)[0])
        low, high = max(value - slack, -1.0), min(value + slack, 1.0)
    else:
        low, high = statistics.bootstrap_mean(difference, resamples, seed)
    return row("gain", value, min(low, value), max(high, value), n, name, convention)


def _slices(asked: Mapping[str, np.ndarray], chosen: np.ndarray) -> list[tuple[str, np.ndarray]]:
    right = asked["selector_right"].astype(bool)
    parts = [("", chosen)]
    parts += [(name, chosen & (asked["category"] == name)) for name in sorted(set(asked["category"]) - {""})]
    parts += [("selector_right", chosen & right), ("selector_wrong", chosen & ~right)]
    return [(name, inside) for name, inside in parts if inside.any()]


def _by_selector(asked: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(name, asked["selector"] == name) for name in sorted(set(asked["selector"]))]


def _questions(asked: Mapping[str, np.ndarray]) -> list[tuple[str, str, str]]:
    return list(zip(asked["selector"], asked["image_id"], asked["failure"], strict=True))


def _read(paths: Sequence[Path], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of all files. Errors: `InputError` for a file without a column, or without rows, or a selector twice."""
    tables = []
    for path in paths:
        table = io.read_parquet(path)
        if lacking := [name for name in columns if name not in table]:
            raise InputError(f"{path}: no column '{lacking[0]}', expected {', '.join(columns)}; make it again")
        if not len(table[columns[0]]):
            raise InputError(f"{path}: holds no question; make it again")
        tables.append(table)
    together = {name: np.concatenate([table[name] for table in tables]) for name in columns}
    twice = sum(len(set(table["selector"])) for table in tables) - len(set(together["selector"]))
    if twice:
        raise InputError(f"{paths[0]}: its selector is also that of another file; name each selector differently")
    return together


def _check_names(ids: np.ndarray, names: np.ndarray, classes: Sequence[str], labels: Path) -> None:
    for label, name in zip(ids, names, strict=True):
        if not 0 <= label < len(classes) or classes[label] != name:
            raise InputError(f"{labels}: class {label} is not {name!r}, as the questions say; write them again")


def _write_predictions(
    path: Path,
    asked: Mapping[str, np.ndarray],
    model: str,
    how: np.ndarray,
    correct: np.ndarray,
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    own = {"model": np.full(len(correct), model, dtype=object), "how": how, "correct": correct}
    io.write_parquet(path, {name: own.get(name, asked.get(name)) for name in PREDICTION} | dict(more or {}))
