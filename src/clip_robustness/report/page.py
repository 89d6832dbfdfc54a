"""One self-contained page a study: the claims, an explorer, each axis, measured against published, provenance.

Figures, tables, captions and config decide its bytes, but for the section "This run": see `provenance`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.tables import read_frame
from clip_robustness.report import explorer, markup, provenance
from clip_robustness.report.axes import AXES, Axis, Shown
from clip_robustness.report.captions import caption
from clip_robustness.report.claims import NOT_MEASURED
from clip_robustness.report.quantities import known_models
from clip_robustness.report.tables import records

_MODEL_COLUMNS = (
    "title", "model", "library", "group", "family", "source", "train_images", "finetuning", "loss", "params_m",
    "image_size", "parent",
)  # fmt: skip
_ROW = ("title", "dataset", "metric", "slice", "value", "low", "high", "n", "convention", "source")
# Columns of whole tables that say little to a reader.
_HIDDEN = ("study", "scale", "inside", "edge_low", "edge_high", "kind", "p", "pairs", "published_as")
_VERDICTS = ("reproduced", "contradicted", "undecided", NOT_MEASURED)


def write_report(
    study: str,
    title: str,
    figures: Sequence[Path],
    tables: Sequence[Path],
    captions: Path,
    out: Path,
    config: Mapping[str, Any] | None = None,
    lacking: Mapping[str, Any] | None = None,
    results: Path | None = None,
    cards: Path | None = None,
    captions_out: Path | None = None,
) -> None:
    """Write the page of a study to `out`, and its captions, filled in, to `captions_out` (.json) if it is given.

    `figures` are PNGs named after their figure, `tables` parquet files named after their table, `captions`
    the folder of {figure}.rst templates. `config`: the study's. `lacking`: what it leaves out, as `skipped` (data
    set -> title, licence and note), `remarks` and `figures`. `results`: the study's folder, for manifests and times.
    `cards`: the folder of model cards, beside `out`. Errors: `InputError` when a file is missing or a caption does
    not fit.
    """
    named = {Path(path).stem: Path(path) for path in tables}
    frames = {name: read_frame(path) for name, path in sorted(named.items())}
    pictures = {Path(path).stem: Path(path) for path in figures}
    if strangers := sorted(set(pictures) - {"claims", "reproduction", *(axis.figure for axis in AXES)}):
        raise InputError(f"{', '.join(strangers)}: no section of the page shows it; add an Axis to report/axes.py")
    texts = {name: caption(name, Path(captions) / f"{name}.rst", frames, study) for name in pictures}
    drawn = {name: _figure(path, texts[name]) for name, path in pictures.items()}
    addresses = _addresses(cards, out)
    parts = {
        "claims": ("Claims", [*_claims(frames), drawn.get("claims", "")]),
        "explorer": ("Explorer", explorer.section(frames, addresses)),
        **{axis.figure: (axis.title, _axis(axis, drawn[axis.figure], frames)) for axis in AXES if axis.figure in drawn},
        "reproduction": ("Measured against published", _reproduction(frames, drawn.get("reproduction", ""))),
        "not-measured": ("Not measured, and why", _not_measured(frames, lacking or {}, set(drawn))),
        "models": ("Models", _models(frames, addresses)),
        "reproduce": ("Provenance", provenance.sections(study, config or {}, named, results)),
    }
    parts = {name: (heading, [part for part in body if part]) for name, (heading, body) in parts.items()}
    parts = {name: part for name, part in parts.items() if part[1]}
    links = "".join(f'<a href="#{name}">{markup.text(heading)}</a>' for name, (heading, _) in parts.items())
    body = [
        '<a class="skip" href="#main">To the content</a>',
        f"<header><h1>{markup.text(title)}</h1>\n<p>{_what(study, frames)}</p></header>",
        f'<nav aria-label="Sections">{links}</nav>',
        '<main id="main">',
        *(
            f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{markup.text(heading)}</h2>\n'
            + "\n".join(inner)
            + "</section>"
            for name, (heading, inner) in parts.items()
        ),
        "</main>",
    ]
    io.write_text(out, markup.page(title, body, explorer.scripts() if "explorer" in parts else ()))
    if captions_out is not None:
        io.write_json(captions_out, texts)


def _figure(path: Path, text: str) -> str:
    try:
        data = markup.picture(path.read_bytes())
    except OSError:
        raise InputError(f"{path}: no such figure; draw it first") from None
    name = path.stem
    return (
        f'<figure id="figure-{markup.slug(name)}"><img src="{data}" alt="{markup.words(name)}: see the caption" '
        f'loading="lazy" decoding="async"><figcaption>{markup.inline(text)}</figcaption></figure>'
    )


def _addresses(cards: Path | None, out: Path) -> dict[str, str]:
    """Model -> address of its card from the page's folder."""
    if cards is None:
        return {}
    listed = io.read_json(Path(cards) / "cards.json")
    return {model: f"{Path(cards).name}/{name}" for model, name in listed.items()}


def _what(study: str, frames: Mapping[str, pd.DataFrame]) -> str:
    measured = [frame for frame in frames.values() if {"dataset", "metric", "value"} <= set(frame.columns)]
    rows = sum(len(frame) for frame in measured)
    models = len({name for frame in measured for name in frame["model"].unique()})
    datasets = len({name for frame in measured for name in frame["dataset"].unique()})
    sources = {str(name) for frame in measured if "source" in frame for name in frame["source"].unique()}
    origin = "measured by this workflow" if sources <= {"measured"} else "published by others (see the source column)"
    return (
        f"Study <code>{markup.text(study)}</code>: {models:,} models on {datasets:,} data sets, "
        f"{rows:,} numbers {origin}. Every number has its n and, where n is known, a 95 % interval."
    )


def _claims(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    claims = frames.get("claims", pd.DataFrame())
    if not len(claims):
        return []
    rank = {verdict: place for place, verdict in enumerate(_VERDICTS)}
    claims = claims.assign(_rank=claims["verdict"].map(rank).fillna(len(rank)))
    claims = claims.sort_values("_rank", kind="stable")
    counts = claims["verdict"].value_counts()
    tally = "".join(
        f'<li class="{markup.slug(verdict)}"><strong>{int(counts.get(verdict, 0))}</strong> {verdict}</li>'
        for verdict in _VERDICTS
    )
    shown = pd.DataFrame(
        {
            "verdict": claims["verdict"],
            "finding": claims["finding"],
            "claimed": claims["expected"],
            "found, 95 % interval": [_effect(row) for row in records(claims)],
            "after Holm": claims["verdict_holm"],
            "what is missing": claims["missing"],
            "source": claims["paper"] + ", " + claims["certainty"] + " (" + claims["id"] + ")",
        }
    )
    return [
        f'<ul class="tally">{tally}</ul>',
        "<p>A verdict comes from the interval alone: reproduced when all of it lies where the claim says, contradicted "
        "when none of it does. Numbers are in points unless a unit follows.</p>",
        markup.table("Claims ledger", shown, stacked=True),
    ]


def _effect(row: Mapping[str, Any]) -> str:
    if not pd.notna(row["value"]):
        return ""
    factor = 100 if row["scale"] == "points" else 1
    value, low, high = (f"{factor * row[name]:.3g}" for name in ("value", "low", "high"))
    unit = "" if row["scale"] == "points" else f" {row['scale']}"
    return f"{value} [{low}, {high}]{unit}; n = {int(row['n']):,}, interval over {row['unit']}"


def _axis(axis: Axis, drawn: str, frames: Mapping[str, pd.DataFrame]) -> list[str]:
    tables = [(shown.title, _shown(shown, frames)) for shown in axis.shown]
    return [
        drawn,
        f"<p><strong>Conventions.</strong> {markup.text(axis.conventions)}</p>",
        *(
            f"<details open><summary>{markup.text(title)}</summary>{table}</details>"
            for title, table in tables
            if table
        ),
    ]


def _shown(shown: Shown, frames: Mapping[str, pd.DataFrame]) -> str:
    rows = frames.get(shown.table, pd.DataFrame())
    if not len(rows):
        return ""
    if not shown.metrics and not {"model", "metric", "dataset"} <= set(rows.columns):
        return markup.table(shown.title, rows[[column for column in rows if column not in _HIDDEN]])
    kept = rows[rows["metric"].isin(shown.metrics or rows["metric"].unique())]
    kept = kept[kept["dataset"].map(lambda name: fnmatchcase(name, shown.datasets)).astype(bool)]
    kept = kept[kept["slice"] == ""] if shown.overall else kept
    models = known_models(frames)
    titles = dict(zip(models["model"], models["title"], strict=True))
    kept = kept.assign(title=kept["model"].map(titles).fillna(kept["model"]))
    kept = kept.sort_values(["dataset", "metric", "slice", "model"], kind="stable")
    always = ("title", "value", "low", "high", "n")
    columns = [c for c in _ROW if c in kept and (c in always or kept[c].nunique() > 1)]
    return markup.table(shown.title, kept[columns]) if len(kept) else ""


def _reproduction(frames: Mapping[str, pd.DataFrame], drawn: str) -> list[str]:
    table = frames.get("reproduction", pd.DataFrame())
    if not len(table):
        return [drawn, "<p>No model of this study is one whose results others published.</p>"] if drawn else []
    ordered = table.sort_values("flagged", ascending=False, kind="stable")
    shown = ordered[[column for column in ordered if column not in _HIDDEN]]
    return [drawn, markup.table("Measured against published", shown)]


def _not_measured(frames: Mapping[str, pd.DataFrame], lacking: Mapping[str, Any], drawn: set[str]) -> list[str]:
    rows = [
        (
            facts.get("title", name),
            "data set",
            f"{facts.get('note') or 'not available'} (licence: {facts.get('licence', '')})",
        )
        for name, facts in sorted(lacking.get("skipped", {}).items())
    ]
    rows += [
        (name, "figure", "not among the study's figures") for name in lacking.get("figures", ()) if name not in drawn
    ]
    claims = frames.get("claims", pd.DataFrame())
    if len(claims):
        absent = claims[claims["verdict"] == NOT_MEASURED]
        rows += [
            (finding, "claim", missing) for finding, missing in zip(absent["finding"], absent["missing"], strict=True)
        ]
    parts = [f"<p>{markup.text(remark)}</p>" for remark in lacking.get("remarks", ())]
    if coverage := _coverage(frames):
        parts.append(markup.table("Models measured, by table", pd.DataFrame(coverage)))
    if rows:
        listed = pd.DataFrame(rows, columns=["what", "kind", "why not, or what it would need"])
        parts.append(markup.table("Not measured in this study", listed, stacked=True))
    return parts


def _coverage(frames: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    total = len(known_models(frames))
    measured = {n: f for n, f in frames.items() if {"dataset", "metric", "value", "model"} <= set(f.columns) and len(f)}
    return [
        {
            "table": markup.words(name),
            "models": frame["model"].nunique(),
            "of": total,
            "data sets": frame["dataset"].nunique(),
            "numbers": len(frame),
        }
        for name, frame in measured.items()
    ]


def _models(frames: Mapping[str, pd.DataFrame], addresses: Mapping[str, str]) -> list[str]:
    models = frames.get("models", pd.DataFrame())
    if not len(models):
        return []
    shown = [column for column in _MODEL_COLUMNS if column in models]
    links = {title: addresses[m] for m, title in zip(models["model"], models["title"], strict=True) if m in addresses}
    table = markup.table("Models", models.sort_values(["group", "model"], kind="stable")[shown], links=links)
    index = next(iter(addresses.values()), "").rpartition("/")[0]
    more = f'<p><a href="{markup.text(index)}/index.html">A page for every model</a></p>' if index else ""
    return [more, table]
