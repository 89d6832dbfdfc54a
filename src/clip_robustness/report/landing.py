"""A landing page over the studies: a link to each report, and a thumbnail of each of its figures."""

import base64
import html
import io as memory
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.report import markup

_WIDTH = 420  # pixels of a thumbnail: its card at twice the density
_TITLE = "How robust are CLIP models?"


def write_index(reports: Sequence[Path], out: Path) -> None:
    """Write a page that links to `reports`.

    Titles and pictures are taken from the reports themselves, so that the page needs no file beside them. Errors:
    `InputError` when a report is missing.
    """
    body = [f"<h1>{_TITLE}</h1>", "<p>One report a study; every figure leads to its caption.</p>"]
    for report in reports:
        try:
            text = Path(report).read_text(encoding="utf-8")
        except OSError:
            raise InputError(f"{report}: no such report; write it first") from None
        # "./", since a folder may be named like a scheme, "javascript:".
        link = "./" + quote(Path(os.path.relpath(report, Path(out).parent)).as_posix())
        heading = re.search(r"<h1>(.*?)</h1>\s*<p>(.*?)</p>", text, re.DOTALL)
        name, what = (
            (_plain(part) for part in heading.groups()) if heading else (markup.text(Path(report).parent.name), "")
        )
        body.append(f'<h2><a href="{link}">{name}</a></h2><p>{what}</p><div class="cards">')
        pattern = r'<figure id="([\w-]+)"><img src="(data:image/png;base64,[A-Za-z0-9+/=]+)"'
        for number, (figure, data) in enumerate(re.findall(pattern, text), start=1):
            label = markup.words(figure.removeprefix("figure-"))
            picture = f'<img src="{_thumbnail(data)}" alt="">'
            body.append(f'<a href="{link}#{figure}">{picture}{number}. {label}</a>')
        body.append("</div>")
    io.write_text(out, markup.page(_TITLE, body))


def _plain(markup_of_report: str) -> str:
    """The words of a report's markup, whoever wrote that page."""
    return markup.text(html.unescape(re.sub(r"<[^>]*>?", "", markup_of_report)))


def _thumbnail(data: str) -> str:
    """A PNG data URI at the size of a card; small enough that the landing page stays light."""
    from PIL import Image

    source = memory.BytesIO(base64.b64decode(data.partition(",")[2]))
    with Image.open(source, formats=["PNG"]) as picture:  # whatever it says it is
        height = max(1, round(picture.height * _WIDTH / picture.width))
        small = picture.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)
    target = memory.BytesIO()
    small.quantize(64, dither=Image.Dither.NONE).save(target, format="PNG", optimize=True)
    return markup.picture(target.getvalue())
