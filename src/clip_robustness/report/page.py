"""One self-contained page a study, and a landing page over the studies: static HTML, no script, no request.

The same figures, tables and captions give the same bytes: the page carries hashes and versions, no time.
Everything that comes from a table, a caption or a name is escaped.
"""

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from clip_robustness.core import io, provenance
from clip_robustness.core.io import InputError
from clip_robustness.report.captions import caption
from clip_robustness.report.tables import read_table

_LIBRARIES = ("clip-robustness", "matplotlib", "numpy", "pandas", "scipy", "snakemake")
_MOST_ROWS = 400  # a page stays readable and small; the table files hold every row
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c63; --paper: #fdfdfc;
        --line: #dedede; --zebra: #f5f5f3; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #a8a8ae; --paper: #17181a; --line: #37383b; --zebra: #1f2023; --link: #7db8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { max-width: 46rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; margin: 1rem 0; }
nav a { margin-right: 1rem; white-space: nowrap; }
figure { margin: 1.2rem 0 2.2rem; }
figure img { width: 100%; height: auto; background: #fff; padding: .6rem; border: 1px solid var(--line);
             border-radius: 6px; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; max-width: 54rem; }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; }
thead th { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); }
tbody tr:nth-child(even) { background: var(--zebra); }
pre, code { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; overflow-x: auto; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.cards a { display: block; border: 1px solid var(--line); border-radius: 6px; padding: .5rem;
           text-decoration: none; }
.cards img { width: 100%; height: 11rem; object-fit: contain; background: #fff; }
""".strip()

_MODEL_COLUMNS = (
    "title", "model", "library", "group", "family", "source", "train_images", "finetuning", "loss", "params_m",
    "image_size", "parent",
)  # fmt: skip
_VALUES = ("value", "low", "high", "n")
# Tables that are shown as they are, but for columns that say little to a reader.
_HIDDEN = ("study", "scale", "inside", "edge_low", "edge_high", "kind", "p", "pairs", "published_as")
_WHOLE = {
    "claims": "Claims",
    "reproduction": "Measured against published",
    "six_factors": "The effect of each factor",
    "baselines": "Baselines",
    "factor_fits": "Baselines of visual factors",
}


def write_report(
    study: str, title: str, figures: Sequence[Path], tables: Sequence[Path], captions: Path, out: Path
) -> None:
    """Write the page of a study to `out`.

    `figures` are PNGs named after their figure, `tables` parquet files named after their table, `captions`
    the folder of {figure}.rst templates. Errors: `InputError` when a file is missing or a caption does not fit.
    """
    named = {Path(path).stem: Path(path) for path in tables}
    frames = {name: read_table(path) for name, path in sorted(named.items())}
    pictures = [_figure(Path(path), Path(captions), frames, study) for path in figures]
    links = "".join(f'<a href="#{_id(Path(path).stem)}">{_words(Path(path).stem)}</a>' for path in figures)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_what(study, frames)}</p>",
        f'<nav>{links}<a href="#tables">Tables</a><a href="#reproduce">How to reproduce</a></nav>',
        "<h2>Figures</h2>",
        *pictures,
        '<h2 id="tables">Tables</h2>',
        *_key_tables(frames),
        '<h2 id="reproduce">How to reproduce</h2>',
        f"<pre>{html.escape(_command(study))}</pre>",
        _provenance(named),
    ]
    io.write_text(out, _page(title, sections))


def write_index(reports: Sequence[Path], out: Path) -> None:
    """Write a landing page that links to `reports` and shows a thumbnail of each of their figures.

    Pictures are taken from the reports themselves, so that the page needs no file beside them. Errors:
    `InputError` when a report is missing.
    """
    sections = [
        "<h1>How robust are CLIP models?</h1>",
        "<p>One report a study; every figure leads to its caption.</p>",
    ]
    for report in reports:
        try:
            text = Path(report).read_text(encoding="utf-8")
        except OSError:
            raise InputError(f"{report}: no such report; write it first") from None
        link = html.escape(Path(os.path.relpath(report, Path(out).parent)).as_posix(), quote=True)
        heading = re.search(r"<h1>(.*?)</h1>\s*<p>(.*?)</p>", text, re.DOTALL)
        name, what = heading.groups() if heading else (html.escape(Path(report).parent.name), "")
        sections.append(f'<h2><a href="{link}">{name}</a></h2><p>{what}</p><div class="cards">')
        pattern = r'<figure id="([\w-]+)"><img src="(data:image/png;base64,[A-Za-z0-9+/=]+)"'
        for number, (figure, data) in enumerate(re.findall(pattern, text), start=1):
            label = _words(figure.removeprefix("figure-"))
            picture = f'<img src="{_thumbnail(data)}" alt="{label}">'
            sections.append(f'<a href="{link}#{figure}">{picture}<br>{number}. {label}</a>')
        sections.append("</div>")
    io.write_text(out, _page("How robust are CLIP models?", sections))


def _page(title: str, sections: Iterable[str]) -> str:
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(sections) + "\n</body>\n</html>\n"


def _id(figure: str) -> str:
    return "figure-" + re.sub(r"[^\w-]", "-", figure)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return html.escape(words[:1].upper() + words[1:])


def _figure(path: Path, captions: Path, frames: Mapping[str, pd.DataFrame], study: str) -> str:
    name = path.stem
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        raise InputError(f"{path}: no such figure; draw it first") from None
    text = _inline(caption(name, captions / f"{name}.rst", frames, study))
    return (
        f'<figure id="{_id(name)}"><img src="data:image/png;base64,{data}" alt="{_words(name)}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _inline(text: str) -> str:
    """The two marks that captions use: **strong** and *emphasis*."""
    escaped = html.escape(text)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", escaped)


def _what(study: str, frames: Mapping[str, pd.DataFrame]) -> str:
    measured = [frame for frame in frames.values() if {"dataset", "metric", "value"} <= set(frame.columns)]
    rows = sum(len(frame) for frame in measured)
    models = len({name for frame in measured for name in frame["model"].unique()})
    datasets = len({name for frame in measured for name in frame["dataset"].unique()})
    sources = {str(name) for frame in measured if "source" in frame for name in frame["source"].unique()}
    origin = "measured by this workflow" if sources <= {"measured"} else "published by others (see the source column)"
    return (
        f"Study <code>{html.escape(study)}</code>: {models:,} models on {datasets:,} data sets, "
        f"{rows:,} numbers {origin}. Every number has its n and, where n is known, a 95 % interval."
    )


def _key_tables(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Models with their factors, then the measurements that the figures show."""
    parts = []
    models = frames.get("models", pd.DataFrame())
    titles = dict(zip(models["model"], models["title"], strict=True)) if len(models) else {}
    if len(models):
        shown = [column for column in _MODEL_COLUMNS if column in models]
        parts.append(_table("Models", models.sort_values(["group", "model"], kind="stable")[shown]))
    wanted = (
        ("accuracy", ("accuracy",), "Accuracy by data set"),
        (
            "effective_robustness",
            ("effective_robustness",),
            "Effective robustness (fraction above the baseline)",
        ),
        ("shape_bias", ("shape_bias",), "Shape bias"),
        ("calibration", ("temperature", "ece", "nll", "brier"), "Calibration"),
        ("factors", ("factor_accuracy",), "Accuracy by visual factor"),
        ("factor_robustness", ("effective_robustness",), "Effective robustness by visual factor"),
        ("ood", ("auroc", "fpr95"), "OOD detection"),
        ("retrieval", ("image_recall@1", "text_recall@1"), "Retrieval"),
        ("prompts", ("accuracy_difference", "ece_difference", "auroc_difference"), "Prompt sets against the largest"),
    )
    for name, metrics, title in wanted:
        frame = frames.get(name, pd.DataFrame())
        if not len(frame):
            continue
        rows = frame[frame["metric"].isin(metrics)]
        if name == "shape_bias":
            rows = rows[rows["slice"] == ""]
        rows = rows.assign(title=rows["model"].map(titles).fillna(rows["model"]))
        order = ["title", "dataset", "metric", "slice", *_VALUES, "convention", "source"]
        rows = rows.sort_values(["dataset", "metric", "slice", "model"], kind="stable")
        varying = [c for c in order if c in rows and (c in ("title", *_VALUES) or rows[c].nunique() > 1)]
        parts.append(_table(title, rows[varying]))
    for name, title in _WHOLE.items():
        if len(frame := frames.get(name, pd.DataFrame())):
            frame = frame.sort_values("flagged", ascending=False, kind="stable") if "flagged" in frame else frame
            parts.append(_table(title, frame[[column for column in frame if column not in _HIDDEN]]))
    return parts


def _table(title: str, frame: pd.DataFrame) -> str:
    numeric = {column for column in frame if pd.api.types.is_numeric_dtype(frame[column])}
    mark = {column: ' class="number"' if column in numeric else "" for column in frame}
    head = "".join(f"<th{mark[c]}>{html.escape(str(c)).replace('_', ' ')}</th>" for c in frame)
    body = [
        "<tr>" + "".join(f"<td{mark[c]}>{_cell(v)}</td>" for c, v in zip(frame, row, strict=True)) + "</tr>"
        for row in frame.head(_MOST_ROWS).itertuples(index=False, name=None)
    ]
    more = f'<p class="soft">The first {_MOST_ROWS} of {len(frame):,} rows.</p>' if len(frame) > _MOST_ROWS else ""
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    return f'<h3>{html.escape(title)}</h3>{more}<div class="scroll">{table}</div>'


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _command(study: str) -> str:
    chosen = "" if study == "paper" else f"--configfile config/{study}.yaml "
    return f"snakemake {chosen}--cores all"


def _provenance(tables: Mapping[str, Path]) -> str:
    digests = [(name, io.sha256_file(path)) for name, path in sorted(tables.items())]
    hashes = pd.DataFrame(digests, columns=["table", "sha256"])
    versions = pd.DataFrame(list(provenance.versions(_LIBRARIES).items()), columns=["library", "version"])
    return _table("Tables that this page was made from", hashes) + _table("Versions", versions)


_WIDTH = 420  # pixels of a thumbnail: its card at twice the density


def _thumbnail(data: str) -> str:
    """A PNG data URI at the size of a card; small enough that the landing page stays light."""
    import io as memory

    from PIL import Image

    source = memory.BytesIO(base64.b64decode(data.partition(",")[2]))
    with Image.open(source) as picture:
        height = max(1, round(picture.height * _WIDTH / picture.width))
        small = picture.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)
    target = memory.BytesIO()
    small.quantize(64, dither=Image.Dither.NONE).save(target, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()
