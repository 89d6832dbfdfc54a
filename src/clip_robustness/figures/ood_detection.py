"""How well a model's confidence tells images of unknown classes from those of its own, against its accuracy."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("ood", "accuracy", "models")
_SCORES = ("mcm_t1", "msp")  # the default score is the first that a model has
_METRICS = {  # metric -> (axis, convention preferred)
    "auroc": ("AUROC (%)", "id_positive"),
    "fpr95": ("FPR95 (%)", "id_recall_at_least"),
}
_AVERAGE = "mean"
_COLUMNS = 4
_LEAST_FIT = 3  # models of a source that a trend line needs
_DASHES = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_SHADES = ("#0072B2", "#00324F", "#5AA9D6", "#004B76", "#2E8BC0", "#8FBFE0")  # of the zero-shot CLIPs' blue


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """AUROC and FPR95 against ID accuracy, a panel an OOD set and their mean; score histograms of two models.

    One point a model: `mcm_t1` (MCM at temperature 1) for zero-shot CLIPs, `msp` for classifiers, with 95 %
    intervals up to 60 models. Lines: least squares over the zero-shot CLIPs of one training source; the last
    panel of a block has their Pearson's r. Answers the OOD figure of Tu et al. (NeurIPS 2023, arXiv 2402.07410;
    findings F5 and F6).
    """
    ood, accuracy, models = (frames.table(tables, name) for name in TABLES)
    points = {metric: _points(ood, accuracy, models, metric) for metric in _METRICS}
    sets = frames.dataset_order(points["auroc"]["dataset"])
    sets = [name for name in sets if name != _AVERAGE] + [_AVERAGE] * (len(sets) > 1)
    if not sets:
        return style.unmeasured("OOD detection")
    sources = _sources(points["auroc"])
    columns = min(_COLUMNS, len(sets) + 1)
    blocks = -(-(len(sets) + 1) // columns)
    figure = style.figure(style.DOUBLE, min(1.55 * 2 * blocks + 1.85, style.PAGE))
    parts = figure.add_gridspec(3, 1, height_ratios=[blocks, blocks, 0.95])
    for number, metric in enumerate(_METRICS):
        grid = parts[number].subgridspec(blocks, columns)
        for position, name in enumerate(sets):
            axes = figure.add_subplot(grid[position // columns, position % columns])
            _panel(axes, points[metric], name, metric, sources)
            if position % columns == 0:
                axes.set_ylabel(_METRICS[metric][0])
        last = figure.add_subplot(grid[len(sets) // columns, len(sets) % columns])
        _correlations(last, points[metric], sets, sources, metric)
    _histograms(figure, parts[2], ood, points["auroc"])
    lines = [Line2D([], [], label=f"Fit, {frames.source_title(name)}", **_look(name, sources)) for name in sources]
    shown = points["auroc"]
    handles = style.group_handles(shown["group"]) + style.family_handles(shown["family"])
    style.legend(figure, handles + lines if len(shown) else [], columns=6)
    return figure


def _points(ood: pd.DataFrame, accuracy: pd.DataFrame, models: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a model and OOD set, and one for the mean of the models that have all sets: x, y, low, high."""
    home = frames.in_distribution(accuracy)
    x = frames.pick(accuracy, metric="accuracy", dataset=home, slice="")[["model", "value"]]
    rows = ood[(ood["metric"] == metric) & ood["slice"].isin(_SCORES)].dropna(subset=["value"])
    rows = frames.one_convention(rows, [_METRICS[metric][1]])
    rows = rows.assign(_rank=rows["slice"].map(list(_SCORES).index)).sort_values(["_rank", "model"], kind="stable")
    rows = rows.drop_duplicates(["model", "dataset"]).drop(columns="_rank")
    numbers = ["value", "low", "high"]
    # The limits of the mean are the mean limits: conservative, as if the errors of all sets went together.
    average = rows.groupby("model", as_index=False)[numbers].mean()
    complete = rows.groupby("model")["dataset"].nunique() == rows["dataset"].nunique()
    average = average[average["model"].map(complete).astype(bool)].assign(dataset=_AVERAGE, n=np.nan)
    both = pd.concat([rows, average], ignore_index=True) if rows["dataset"].nunique() > 1 else rows
    joined = both.rename(columns={"value": "y"}).merge(x.rename(columns={"value": "x"}), on="model")
    joined = joined.sort_values(["dataset", "model"], kind="stable")
    return frames.describe(joined.dropna(subset=["x"]), models)


def _sources(points: pd.DataFrame) -> list[str]:
    """The training sources with a trend line: those of most zero-shot CLIPs, by name."""
    clip = points[(points["group"] == "clip_zero_shot") & (points["training"] != "")]
    counts = clip.groupby("training")["model"].nunique()
    counts = counts[counts >= _LEAST_FIT]
    return sorted(sorted(counts.index, key=lambda name: (-counts[name], name))[: len(_DASHES)])


def _look(source: str, sources: list[str]) -> dict:
    position = sources.index(source)
    return {"color": _SHADES[position], "linestyle": _DASHES[position], "linewidth": 1.0}


def _of_source(points: pd.DataFrame, source: str) -> pd.DataFrame:
    some = points[(points["group"] == "clip_zero_shot") & (points["training"] == source)]
    return some if len(some) >= _LEAST_FIT and some["x"].nunique() > 1 else some.iloc[:0]


def _panel(axes: Axes, points: pd.DataFrame, name: str, metric: str, sources: list[str]) -> None:
    some = points[points["dataset"] == name]
    title = f"Mean of {points['dataset'].nunique() - 1} sets" if name == _AVERAGE else frames.dataset_title(name)
    images = frames.fmt_n(some)
    axes.set_title(f"{title}\n{f'n = {images}' if images else 'models with all'}" if metric == "auroc" else title)
    if not len(some):
        style.empty(axes)
        return
    style.scatter(axes, some, errors=len(some) <= 60)
    for source in sources:
        fitted = _of_source(some, source)
        if len(fitted):
            line = statistics.fit_line(fitted["x"], fitted["y"], "linear", "ols")
            ends = np.array([fitted["x"].min(), fitted["x"].max()])
            axes.plot(ends, line.predict(ends), zorder=3.5, **_look(source, sources))
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.locator_params(nbins=5)
    axes.set_xlabel("ID accuracy (%)")


def _correlations(axes: Axes, points: pd.DataFrame, sets: list[str], sources: list[str], metric: str) -> None:
    """Pearson's r over the zero-shot CLIPs of a source: small, each OOD set; large, their mean (Fisher's interval)."""
    axes.set_title("r with ID accuracy\nby training source" if metric == "auroc" else "r with ID accuracy")
    main = sets[-1]
    titles: list[str] = []
    for source in sources:
        fitted = {name: _of_source(points[points["dataset"] == name], source) for name in sets}
        r = {name: statistics.pearson(some["x"], some["y"]) for name, some in fitted.items() if len(some)}
        if main not in r:
            continue
        at, look = len(titles), _look(source, sources)
        n = len(fitted[main])
        low, high = strips.pearson_interval(r[main], n)
        axes.hlines(at, low, high, color=look["color"], linewidth=1.1)
        others = [value for name, value in r.items() if name != main]
        axes.plot(others, [at] * len(others), linestyle="none", marker="o", markersize=2, color=look["color"],
                  alpha=0.5, markeredgewidth=0)  # fmt: skip
        (dot,) = axes.plot(r[main], at, linestyle="none", marker="o", color=style.color("clip_zero_shot"),
                           markersize=4.2, markeredgecolor="black", markeredgewidth=0.6, zorder=3)  # fmt: skip
        style.mark_group(dot, "clip_zero_shot")
        left = r[main] >= 0  # the name stands where the points do not, and above an interval that reaches there
        above = low < 0 < high
        name = f"{frames.source_title(source)} ({n})"
        note = axes.text(0.02 if left else 0.98, at - 0.1 * above, name, fontsize=5.4, zorder=4,
                         ha="left" if left else "right", va="bottom" if above else "center",
                         transform=axes.get_yaxis_transform())  # fmt: skip
        note.set_path_effects(style.OUTLINE)
        titles.append(source)
    if not titles:
        style.empty(axes, "no source with\nthree zero-shot CLIPs")
        return
    strips.categories(axes, [""] * len(titles))
    axes.set_xlim(-1.05, 1.05)
    axes.axvline(0, color="black", linewidth=0.6, zorder=1)
    axes.set_xlabel("Pearson's r")


def _histograms(figure: Figure, cell, ood: pd.DataFrame, points: pd.DataFrame) -> None:
    """Scores of ID and OOD images on the easiest and the hardest set, for two models."""
    rows = ood[ood["metric"].isin(["score_histogram_id", "score_histogram_ood"])]
    chosen = _representatives(points[points["model"].isin(set(rows["model"]))])
    if not chosen:
        axes = figure.add_subplot(cell)
        axes.set_title("Score histograms")
        style.empty(axes)
        return
    grid = cell.subgridspec(1, 2 * len(chosen))
    for number, model in enumerate(chosen):
        own = points[(points["model"] == model) & (points["dataset"] != _AVERAGE)]
        own = own[own["dataset"].isin(set(rows.loc[rows["model"] == model, "dataset"]))]
        own = own.sort_values(["y", "dataset"], ascending=[False, True], kind="stable")
        for place, row in enumerate(frames.records(own.iloc[[0, -1]] if len(own) > 1 else own)):
            axes = figure.add_subplot(grid[0, 2 * number + place])
            _histogram(axes, ood[(ood["model"] == model) & (ood["dataset"] == row.dataset)], row)
            if number == place == 0:
                axes.set_ylabel("Share of images (%)")


def _representatives(points: pd.DataFrame) -> list[str]:
    """The most accurate zero-shot CLIP, and the most accurate model of the first other group that there is."""
    ranked = points.sort_values(["x", "model"], ascending=[False, True], kind="stable").drop_duplicates("group")
    best = ranked.set_index("group")["model"]
    order = [group for group in ("clip_zero_shot", "clip_finetuned", "standard") if group in best.index]
    return [str(best[group]) for group in [*order, *sorted(set(best.index) - set(order))][:2]]


def _histogram(axes: Axes, rows: pd.DataFrame, point) -> None:
    colour = style.color(point.group)
    axes.set_title(f"{style.short(point.title, 24)}\n{frames.dataset_title(point.dataset)}")
    limits = frames.pick(rows, metric=["score_minimum", "score_maximum"], slice=point.slice)
    limit = limits.set_index("metric")["value"].reindex(["score_minimum", "score_maximum"]).to_numpy(float)
    bars = frames.pick(rows, metric=["score_histogram_id", "score_histogram_ood"])
    bars = frames.split_slice(bars, "score", "bin")
    bars = bars.assign(bin=pd.to_numeric(bars["bin"], errors="coerce")).dropna(subset=["bin"])
    shares = bars[bars["score"] == point.slice].pivot(index="bin", columns="metric", values="value").fillna(0.0)
    if not len(shares) or not np.isfinite(limit).all():
        style.empty(axes)
        return
    count = int(shares.index.max()) + 1
    shares = 100 * shares.reindex(range(count), fill_value=0.0)
    half = 0.0 if limit[0] < limit[1] else 0.5  # all scores equal
    edges = np.linspace(limit[0] - half, limit[1] + half, count + 1)
    for side, filled in (("id", True), ("ood", False)):
        values = shares.get(f"score_histogram_{side}", pd.Series(0.0, index=shares.index))
        axes.stairs(values, edges, fill=filled, color=colour if filled else "black", alpha=0.55 if filled else 1.0,
                    linewidth=0.8, label=side.upper())  # fmt: skip
    axes.set_ylim(0, 1.35 * max(shares.to_numpy().max(), 1e-9))
    axes.legend(loc="upper left", fontsize=5.8, ncols=2, handlelength=1.0, borderaxespad=0.1, columnspacing=0.8,
                title=f"AUROC {100 * point.y:.1f} %", title_fontsize=5.8, alignment="left")  # fmt: skip
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=False)
    axes.xaxis.get_offset_text().set_fontsize(5.5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("MCM score (t = 1)" if point.slice == "mcm_t1" else f"Score ({point.slice})")
