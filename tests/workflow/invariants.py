"""What holds of a study's tables by construction, however well its models were trained."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clip_robustness.core import io

WHITE_BOX = ("fgsm", "bim", "mim", "dim", "deepfool", "pgd")
KINDS, SEVERITIES = 15, range(1, 6)


def values(tables: Path, name: str, *columns: str, **where: str) -> Mapping:
    """(value, n) of the rows that equal `where`, by these columns, or by one as it is."""
    rows = io.read_parquet(tables / f"{name}.parquet")
    kept = [i for i in range(len(rows["value"])) if all(rows[key][i] == value for key, value in where.items())]
    keys = [tuple(rows[column][i] for column in columns) for i in kept]
    assert len(set(keys)) == len(keys), "every row is another"
    single = len(columns) == 1
    return {key[0] if single else key: (rows["value"][i], rows["n"][i]) for key, i in zip(keys, kept, strict=True)}


def check_attacks(tables: Path, models: set[str], attacks: set[str], reported: float, images: int) -> None:
    """A larger budget breaks no fewer images, and no attack leaves more than no attack."""
    reached = values(tables, "adversarial", "model", "slice", metric="accuracy_at")
    clean = values(tables, "adversarial", "model", metric="clean_accuracy")
    union = values(tables, "adversarial", "model", metric="accuracy", slice="white_box_union")
    accuracy = values(tables, "adversarial", "model", "slice", metric="accuracy")
    assert set(clean) == models and {n for _, n in clean.values()} == {images}
    assert {slice_ for _, slice_ in accuracy} == attacks | {"white_box_union"}
    for model in models:
        for attack in attacks:
            budgets = {
                float(s.split(":")[1]): v
                for (m, s), (v, _) in reached.items()
                if (m, s.split(":")[0]) == (model, attack)
            }
            curve = [budgets[eps] for eps in sorted(budgets)]
            assert len(curve) >= 3 and (np.diff(curve) <= 0).all(), (model, attack)
            assert accuracy[model, attack][0] == budgets[reported]
            assert curve[0] <= clean[model][0] + 1e-9
            if attack in WHITE_BOX:
                assert union[model][0] <= accuracy[model, attack][0] + 1e-9


def check_printed_words(tables: Path, models: set[str]) -> None:
    """The drop is that of the same images, and an answer is not both right and the printed word."""
    names = ("accuracy", "clean_accuracy", "accuracy_drop", "attack_success_rate", "clean_success_rate")
    rows = [values(tables, "typographic", "model", dataset="mini_typographic", metric=name) for name in names]
    assert all(set(row) == models for row in rows)
    for model in models:
        (printed, n), (clean, same), (drop, paired), (printed_word, _), (clean_word, _) = (row[model] for row in rows)
        assert n == same == paired and np.isclose(drop, clean - printed, atol=1e-9)
        assert printed + printed_word <= 1 + 1e-9 and clean + clean_word <= 1 + 1e-9


def check_overlap(tables: Path, models: set[str], datasets: set[str]) -> None:
    """All images are the clean and the overlapping ones; the same images overlap for every model."""
    share = values(tables, "data_overlap", "model", "dataset", metric="overlap_share")
    gain = values(tables, "data_overlap", "model", "dataset", metric="gain")
    parts = values(tables, "data_overlap", "model", "dataset", "slice", metric="accuracy")
    home = values(tables, "accuracy", "model", "dataset", metric="accuracy", slice="")
    assert set(share) == {(model, dataset) for model in models for dataset in datasets} == set(gain)
    for dataset in datasets:
        assert len({share[model, dataset] for model in models}) == 1
    for key, (portion, n) in share.items():
        whole, total = parts[(*key, "all")]
        assert n == total and np.isclose(whole, home[key][0], atol=1e-12)
        halves = [(name, parts[(*key, name)]) for name in ("clean", "overlap") if (*key, name) in parts]
        assert sum(m for _, (_, m) in halves) == n
        assert np.isclose(sum(v * m for _, (v, m) in halves), whole * n)
        assert np.isclose(portion * n, sum(m for name, (_, m) in halves if name == "overlap"))
        if "clean" in dict(halves):
            assert np.isclose(gain[key][0], whole - dict(halves)["clean"][0], atol=1e-9)
    detector = values(tables, "overlap_thresholds", "metric", slice="")
    assert {"threshold", "recall", "precision", "false_positive_rate"} <= set(detector)


def check_corruptions(tables: Path, models: set[str], normaliser: str) -> None:
    """The mean over 15 kinds of the mean over 5 severities; the normaliser's own error is one."""
    by_slice = values(tables, "synthetic", "model", "slice", dataset="mini_c", metric="accuracy")
    kinds = {name for _, name in by_slice if name and not name.startswith("severity:") and ":" not in name}
    assert len(kinds) == KINDS and {model for model, _ in by_slice} == models
    for model in models:
        of_kinds = [by_slice[model, kind][0] for kind in kinds]
        of_severities = [by_slice[model, f"severity:{s}"][0] for s in SEVERITIES]
        assert np.isclose(by_slice[model, ""][0], np.mean(of_kinds))
        assert np.isclose(by_slice[model, ""][0], np.mean(of_severities))
    for metric in ("mce", "relative_mce"):
        assert np.isclose(values(tables, "synthetic", "model", dataset="mini_c", metric=metric)[normaliser][0], 1)
    home = values(tables, "accuracy", "model", dataset="mini_val", metric="accuracy", slice="")
    kept = values(tables, "synthetic", "model", dataset="mini_c", metric="retention", slice="")
    assert all(np.isclose(kept[m][0] * home[m][0], by_slice[m, ""][0]) for m in models)


def check_video(tables: Path, models: set[str]) -> None:
    """A set counts for pm-10 only where its anchor is right."""
    one, all_, mean = (
        values(tables, "accuracy", "model", dataset="mini_video", metric=metric)
        for metric in ("pm0_accuracy", "pm10_accuracy", "accuracy")
    )
    assert set(one) == set(all_) == set(mean) == models
    for model in models:
        assert all_[model][0] <= one[model][0] and all_[model][1] == one[model][1]
        assert np.isclose(mean[model][0], (one[model][0] + all_[model][0]) / 2)


def check_searched_prompts(results: Path, models: set[str], name: str, keep: int) -> None:
    """A prompt set of each model's own, measured beside the others on every set that they are."""
    measured = values(results / "tables", "prompts", "model", "dataset", "slice", metric="accuracy")
    assert {model for model, _, _ in measured} == models
    for model in models:
        sets = {slice_: {d for m, d, s in measured if (m, s) == (model, slice_)} for slice_ in (name, "mini_1")}
        assert sets[name] == sets["mini_1"] and "mini_val" in sets[name]
        lines = (results / f"prompts/{model}/{name}.txt").read_text().splitlines()
        templates = [line for line in lines if line and not line.startswith("#")]
        assert 1 <= len(templates) <= keep and all(t.count("{}") == 1 and t.startswith("<|") for t in templates)
        rows = values(results / "tables", "prompts", "model", "dataset", "slice", metric="templates")
        assert {value for (m, _, s), (value, _) in rows.items() if (m, s) == (model, name)} == {len(templates)}


def check_corruptions_3d(tables: Path, models: set[str]) -> None:
    """Every type at every severity, as many images each; a set's accuracy is their mean."""
    types = {"mini_3dcc": 6, "mini_3dcc_video": 6}
    for dataset, number in types.items():
        by_slice = values(tables, "accuracy", "model", "slice", dataset=dataset, metric="accuracy")
        assert {model for model, _ in by_slice} == models
        for model in models:
            cells = {s: v for (m, s), v in by_slice.items() if m == model and re.fullmatch(r"\w+:[1-5]", s)}
            cells = {s: v for s, v in cells.items() if not s.startswith("severity")}
            assert len(cells) == 5 * number and len({n for _, n in cells.values()}) == 1
            assert np.isclose(by_slice[model, ""][0], np.mean([value for value, _ in cells.values()]))


def check_correspondence(tables: Path, models: set[str]) -> None:
    """A wider threshold loses no match."""
    recall = values(tables, "correspondence", "model", "convention", "slice", dataset="mini_pairs", metric="recall")
    assert {model for model, _, _ in recall} == models
    for model, convention in {key[:2] for key in recall}:
        plain = {s: v for (m, c, s), (v, _) in recall.items() if (m, c) == (model, convention) and ":" not in s}
        wider = sorted(plain, key=lambda slice_: float(re.sub(r"[a-z]+", "", slice_)))
        for unit in {re.sub(r"[\d.]+", "", slice_) for slice_ in wider}:
            curve = [plain[slice_] for slice_ in wider if slice_.endswith(unit)]
            assert len(curve) >= 2 and (np.diff(curve) >= 0).all(), (model, convention, unit)


def check_questions(tables: Path, selectors: Mapping[str, str], asked: set[str]) -> None:
    """A selector is always right where it was right, and never where it was wrong, on its own questions."""
    accuracy = values(tables, "choice", "model", "convention", "slice", metric="accuracy")
    own = {name: f"{name}:two_way_own" for name in selectors}
    for name, model in selectors.items():
        assert accuracy[model, own[name], "selector_right"][0] == 1
        assert accuracy[model, own[name], "selector_wrong"][0] == 0
    gain = values(tables, "choice", "model", "convention", "slice", metric="gain")
    for model in asked:
        for name, selector in selectors.items():
            right, count = accuracy[model, f"{name}:likelihood", ""]
            theirs, same = accuracy[selector, own[name], ""]
            difference, n = gain[model, f"{name}:likelihood-two_way_own:{selector}", ""]
            assert count == same == n and np.isclose(difference, right - theirs)
