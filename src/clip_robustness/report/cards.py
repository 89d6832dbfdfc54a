"""Model cards: one page a model, with every number of it, its ranks, where it is weak, and what it alone gets wrong."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clip_robustness.core import io
from clip_robustness.core.atomic import scratch
from clip_robustness.core.names import FAMILIES, GROUPS, dataset_title
from clip_robustness.core.tables import read_frame
from clip_robustness.report import drawings, markup
from clip_robustness.report.outliers import Pictures, Predictions, by_dataset
from clip_robustness.report.quantities import METRICS, MODEL_AXIS, PERCENT, POINTS, known_models, quantities
from clip_robustness.report.tables import records

_FACTS = (
    "model", "library", "architecture", "source", "train_images", "finetuning", "finetuned_on", "loss", "prompts",
    "params_m", "gflops", "image_size", "preprocess", "parent",
)  # fmt: skip
_WORST = 5
_OPEN = 24  # longer tables of an axis are folded, unless it is the only one

Row = Mapping[str, Any]


def write_cards(
    study: str,
    tables: Sequence[Path],
    out: Path,
    predictions: Sequence[Path] = (),
    datasets: Mapping[str, Mapping[str, str]] | None = None,
    labels: Sequence[Path] = (),
    indexes: Sequence[Path] = (),
) -> None:
    """Write the folder `out`: a page a model, index.html, and cards.json (model -> file name).

    tables: the study's (.parquet). predictions: of the data sets of `datasets`, as {model}/{dataset}.parquet.
    `datasets`: name -> `labels` (name of its label space) and `licence`. labels: label spaces (.json). indexes: of the
    data sets whose pictures may be shown (.parquet). Errors: `InputError` for a file that is missing or damaged.
    """
    frames = {Path(path).stem: read_frame(Path(path)) for path in sorted(tables)}
    models = known_models(frames)
    names = file_names(models["model"])
    titles = dict(zip(models["model"], models["title"], strict=True))
    rows: dict[str, list[Row]] = {}
    for row in records(_ranked(frames, models)):
        rows.setdefault(str(row["model"]), []).append(row)
    classes = _Classes(datasets or {}, predictions, labels, indexes, models)
    bins = _bins(frames)
    with scratch(out) as folder:
        for facts in records(models):
            model = str(facts["model"])
            measured = rows.get(model, [])
            body = [*_head(facts, titles, names, study), *_axes(measured), _reliability(bins.get(model)),
                    _weakest(measured), *classes.parts(model)]  # fmt: skip
            page = markup.page(str(facts["title"]), [part for part in body if part])
            (folder / names[model]).write_text(page, encoding="utf-8")
        (folder / "index.html").write_text(_index(models, names, rows, study), encoding="utf-8")
        io.write_json(folder / "cards.json", names)
        folder.rename(out)


def file_names(models: Iterable[str]) -> dict[str, str]:
    """Model -> file name: no path, no sign that a file system or an address may read otherwise, none twice."""
    found: dict[str, str] = {}
    taken = {"index.html"}
    for model in sorted(models):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", model).strip("-")[:80] or "model"
        if name != model or f"{name}.html".lower() in taken:
            name = f"{name}-{io.digest(model)[:8]}"
        found[model] = f"{name}.html"
        taken.add(found[model].lower())
    return found


def _ranked(frames: Mapping[str, pd.DataFrame], models: pd.DataFrame) -> pd.DataFrame:
    """Every value of every model, with its rank among the models of its group, and the group's range."""
    parts = [
        q.rows[["model", "value", "low", "high", "n"]].assign(
            key=q.key, axis=q.axis, title=q.title, metric=q.metric, slice=q.slice, dataset=q.dataset,
            convention=q.convention, unit=q.unit, better=q.better, table=q.key.partition(".")[0],
        )
        for q in quantities(frames) if q.axis != MODEL_AXIS
    ]  # fmt: skip
    if not parts:
        return pd.DataFrame(columns=["model"])
    every = pd.concat(parts, ignore_index=True).merge(models[["model", "group"]], on="model")
    every["signed"] = every["value"] * np.where(every["better"] < 0, -1, 1)
    within = every.groupby(["key", "group"], sort=False)
    every["rank"] = within["signed"].rank(ascending=False, method="min").astype(int)
    every["of"] = within["value"].transform("size")
    every["least"], every["most"] = within["value"].transform("min"), within["value"].transform("max")
    every["median"] = within["value"].transform("median")
    return every


def _head(facts: Mapping[str, Any], titles: Mapping[str, str], names: Mapping[str, str], study: str) -> list[str]:
    given = {name: markup.cell(facts[name]) for name in _FACTS if name in facts}
    if facts.get("parent") in names:
        parent = facts["parent"]
        given["parent"] = f'<a href="{names[parent]}">{markup.text(titles[parent])}</a>'
    known = {
        "group": markup.text(GROUPS[facts["group"]][0]),
        "family": markup.text(FAMILIES[facts["family"]][0]),
        **given,
    }
    called = {name: METRICS.get(name, (name,))[0] for name in known}
    listed = "".join(f"<dt>{markup.words(called[name])}</dt><dd>{value}</dd>" for name, value in known.items() if value)
    return [
        f'<nav aria-label="Study"><a href="../report.html">Report of the study {markup.text(study)}</a>'
        '<a href="index.html">All models</a></nav>',
        f"<header><h1>{markup.text(facts['title'])}</h1></header>",
        f'<dl class="facts">{listed}</dl>',
    ]


def _axes(measured: list[Row]) -> list[str]:
    if not measured:
        return ["<p>Nothing was measured of this model in this study.</p>"]
    parts = [
        "<h2>All axes</h2><p>Ranks are among the models of its group that were measured by the same convention; 1 is "
        "best. In the strip, the line spans the group, the tick is its median, the dot this model with its 95 % "
        "interval.</p>"
    ]
    axes = list(dict.fromkeys(row["axis"] for row in measured))
    for axis in axes:
        rows = [row for row in measured if row["axis"] == axis]
        columns = ("quantity", "value, 95 % interval", "n", "rank", "in its group", "convention")
        shown = [
            (r["title"], shown_value(r), r["n"], _rank(r), drawings.strip(r), r["convention"].replace("_", " "))
            for r in rows
        ]
        opened = " open" if len(rows) <= _OPEN or len(axes) == 1 else ""
        table = markup.grid(axis, columns, shown, ("n",))
        parts.append(f"<details{opened}><summary>{markup.text(axis)} ({len(rows)})</summary>{table}</details>")
    return parts


def _rank(row: Row) -> str:
    return f"{row['rank']} of {row['of']}" if row["better"] else ""


def shown_value(row: Mapping[str, Any]) -> str:
    """Such as "61.2 % [59.9, 62.5]"."""
    factor, sign = (100, " %") if row["unit"] == PERCENT else (100, " points") if row["unit"] == POINTS else (1, "")
    value, low, high = (f"{factor * row[name]:.4g}" if pd.notna(row[name]) else "" for name in ("value", "low", "high"))
    return f"{value}{sign} [{low}, {high}]" if low and high else f"{value}{sign}"


def _bins(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Model -> reliability bins in distribution: when (before or after scaling), confidence, value, low, high, n."""
    table = frames.get("calibration", pd.DataFrame(columns=["metric"]))
    home = table.loc[table["metric"] == "temperature"]
    rows = table[table["metric"].isin(["bin_accuracy", "bin_confidence"])]
    if not len(home) or not len(rows):
        return {}
    rows = rows[rows["dataset"] == home["dataset"].iloc[0]]
    confidence = rows[rows["metric"] == "bin_confidence"].set_index(["model", "slice"])["value"]
    accuracy = rows[rows["metric"] == "bin_accuracy"].set_index(["model", "slice"])[["value", "low", "high", "n"]]
    joined = accuracy.join(confidence.rename("confidence"), how="inner").reset_index()
    joined = joined.assign(when=joined["slice"].str.partition(":")[0], dataset=home["dataset"].iloc[0])
    return {str(model): some for model, some in joined.groupby("model")}


def _reliability(bins: pd.DataFrame | None) -> str:
    if bins is None or not len(bins):
        return ""
    where = markup.text(dataset_title(str(bins["dataset"].iloc[0])))
    shown = bins[["when", "confidence", "value", "low", "high", "n"]].rename(columns={"value": "accuracy"})
    return (
        f"<h2>Reliability</h2><figure>{drawings.reliability(bins)}<figcaption>Accuracy by confidence on {where}, with "
        "95 % intervals of Clopper and Pearson. Hollow: as the model is; filled: after temperature scaling. On the "
        "diagonal, confidence and accuracy agree; the area of a point grows with its share of the images.</figcaption>"
        "</figure>"
        f"<details><summary>The bins</summary>{markup.table('Reliability bins', shown)}</details>"
    )


def _weakest(measured: list[Row]) -> str:
    """The visual factors that cost the model most: against the baseline where it is known, else by accuracy."""
    for table, what in (("factor_robustness", "effective robustness"), ("factors", "accuracy")):
        rows = [row for row in measured if row["table"] == table]
        if rows:
            covered = collections.Counter(row["convention"] for row in rows)
            convention = min(covered, key=lambda name: (-covered[name], name))
            worst = sorted((r for r in rows if r["convention"] == convention), key=lambda row: row["value"])[:_WORST]
            shown = [(r["slice"].replace("_", " "), shown_value(r), r["n"], _rank(r)) for r in worst]
            title = f"By {what} ({convention.replace('_', ' ')})"
            columns = ("factor", "value, 95 % interval", "n", "rank")
            return f"<h2>Worst visual factors</h2>{markup.grid(title, columns, shown, ('n',))}"
    return ""


class _Classes:
    """Per-class outliers of every model, over the data sets whose predictions were given."""

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, str]],
        predictions: Iterable[Path],
        labels: Iterable[Path],
        indexes: Iterable[Path],
        models: pd.DataFrame,
    ):
        files, spaces = by_dataset(predictions), {Path(path).stem: Path(path) for path in labels}
        groups = dict(zip(models["model"], models["group"], strict=True))
        self._datasets = {name: facts for name, facts in datasets.items() if name in files}
        self._predictions = {n: Predictions(n, files[n], spaces[f["labels"]]) for n, f in self._datasets.items()}
        tables = [found.classes_of_models(groups) for found in self._predictions.values()]
        every = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["model"])
        self._classes = {str(model): some for model, some in every.groupby("model")}
        self._pictures = Pictures({Path(path).stem: Path(path) for path in indexes})

    def parts(self, model: str) -> list[str]:
        rows = self._classes.get(model)
        if rows is None:
            return []
        ordered = rows.sort_values(["difference", "dataset", "class"])
        shown = pd.concat([ordered.head(_WORST), ordered.tail(3)]).drop_duplicates()
        table = pd.DataFrame(
            {
                "class": shown["class"],
                "data set": shown["dataset"].map(dataset_title),
                "accuracy, 95 % interval": [
                    f"{100 * v:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
                    for v, low, high in zip(shown["value"], shown["low"], shown["high"], strict=True)
                ],
                "n": shown["n"],
                "others, mean": [f"{100 * value:.1f} %" for value in shown["others"]],
                "difference": [f"{100 * value:+.1f} points" for value in shown["difference"]],
            }
        )
        return [
            "<h2>Class outliers</h2><p>Classes whose accuracy differs most from the mean of the other models of its "
            "group (of all models, where the group has fewer than three): the most extreme of "
            f"{len(rows):,} pairs of class and data set, of which chance alone would make some.</p>",
            markup.table("Class outliers", table),
            *self._alone_wrong(model),
        ]

    def _alone_wrong(self, model: str) -> list[str]:
        parts = []
        for dataset, found in self._predictions.items():
            licence, cells = self._datasets[dataset].get("licence", ""), []
            for image_id, name, share in found.alone_wrong(model):
                uri = self._pictures.uri(dataset, image_id)
                label = f"{markup.text(name)}<br>{100 * share:.0f} % of others right"
                image = f'<img src="{uri}" alt="{markup.text(name)}">' if uri else ""
                cells.append(f"<li>{image}<code>{markup.text(image_id)}</code> {label}</li>")
            if cells:
                why = "" if self._pictures.has(dataset) else ": no pictures here"
                parts.append(
                    f"<h3>Wrong where most are right: {markup.text(dataset_title(dataset))}</h3>"
                    f'<p class="soft">Licence of the images: {markup.text(licence)}{why}.</p>'
                    f'<ul class="thumbnails">{"".join(cells)}</ul>'
                )
        return parts


def _index(models: pd.DataFrame, names: Mapping[str, str], rows: Mapping[str, list[Row]], study: str) -> str:
    body = [
        f'<nav aria-label="Study"><a href="../report.html">Report of the study {markup.text(study)}</a></nav>',
        "<header><h1>All models</h1></header>",
    ]
    for group in (group for group in GROUPS if (models["group"] == group).any()):
        members = models[models["group"] == group].sort_values(["title", "model"])
        links = [
            f'<li><a href="{names[model]}">{markup.text(title)}</a> '
            f'<span class="soft">{len(rows.get(model, ())):,} numbers</span></li>'
            for model, title in zip(members["model"], members["title"], strict=True)
        ]
        heading = f"<h2>{markup.text(GROUPS[group][0])} ({len(members)})</h2>"
        body.append(f'{heading}<ul class="columns">{"".join(links)}</ul>')
    return markup.page(f"All models of the study {study}", body)
