"""HTML from tables and text: everything that comes from a table, a caption or a name is escaped here.

A page holds its style and its scripts, and a policy that lets nothing else in: no request leaves the file, and no
script runs whose hash the policy does not name.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import pandas as pd

MOST_ROWS = 400  # a page stays readable and small; the table files hold every row


class Markup(str):
    """Text that is markup already."""


def resource(name: str) -> str:
    """A file of this package, such as its style sheet."""
    return resources.files("clip_robustness.report").joinpath(name).read_text(encoding="utf-8")


def page(title: str, body: Iterable[str], scripts: Sequence[str] = ()) -> str:
    """A whole page: `body` is markup, `scripts` are JavaScript texts, run in order after it."""
    style = "\n" + resource("page.css")
    for script in scripts:
        if "</script" in script or "<!--" in script:
            raise ValueError("a script that holds an end tag or a comment would end early")
    allowed = " ".join(_hash(script) for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            *body,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def data(name: str, value: Any) -> str:
    """A value for scripts: JSON in an element that does not run, in which nothing can end the element."""
    written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{written}</script>'


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


def words(name: str) -> str:
    """A name as words: "shape_bias" as "Shape bias"."""
    spaced = name.replace("_", " ")
    return text(spaced[:1].upper() + spaced[1:])


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def inline(caption: str) -> str:
    """The two marks that captions use: **strong** and *emphasis*."""
    escaped = html.escape(caption)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", escaped)


def picture(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def table(title: str, frame: pd.DataFrame, *, stacked: bool = False, links: Mapping[str, str] | None = None) -> str:
    """A data frame as `grid`; its numeric columns stand right."""
    numeric = [name for name in frame if pd.api.types.is_numeric_dtype(frame[name])]
    rows = list(frame.head(MOST_ROWS).itertuples(index=False, name=None))
    if links:
        rows = [(_linked(row[0], links), *row[1:]) for row in rows]
    more = f" The first {MOST_ROWS} of {len(frame):,} rows." if len(frame) > MOST_ROWS else ""
    return grid(f"{title}.{more}", [str(name) for name in frame], rows, [str(n) for n in numeric], stacked=stacked)


def grid(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numeric: Sequence[str] = (),
    *,
    stacked: bool = False,
) -> str:
    """A table that scrolls in its own frame; `stacked`: on a phone each row is a block."""
    names = [text(column).replace("_", " ") for column in columns]
    marks = [' class="number"' if column in numeric else "" for column in columns]
    labels = [f' data-label="{name}"' if stacked else "" for name in names]
    starts = [f"<td{mark}{label}>" for mark, label in zip(marks, labels, strict=True)]
    head = "".join(f'<th scope="col"{mark}>{name}</th>' for name, mark in zip(names, marks, strict=True))
    lines = [
        "<tr>" + "".join(f"{start}{cell(value)}</td>" for start, value in zip(starts, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="scroll{" stacked" if stacked else ""}" tabindex="0" role="region" aria-label="{text(title)}">'
        f"<table><caption>{text(title)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _linked(value: object, links: Mapping[str, str]) -> object:
    address = links.get(str(value))
    return Markup(f'<a href="{text(address)}">{cell(value)}</a>') if address else value


def cell(value: object) -> str:
    if isinstance(value, Markup):
        return value
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else text(value)
