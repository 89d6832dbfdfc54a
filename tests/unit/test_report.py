"""The report: captions carry their numbers, pages are self-contained, escaped and reproducible."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from clip_robustness.core.io import InputError
from clip_robustness.report import captions, page

TEMPLATES = Path(__file__).resolve().parents[2] / "report" / "captions"
EVIL = "<script>alert('x')</script>"


def tables():
    row = {"study": "s", "low": 0.1, "high": 0.9, "convention": "top", "source": "measured", "slice": ""}
    models = [
        {"model": "clip", "title": EVIL, "group": "clip_zero_shot", "family": "vit", "source": 'A & "B"'},
        {"model": "rn", "title": "ResNet", "group": "standard", "family": "resnet", "source": "C"},
    ]

    def rows(dataset, *metrics, n=1200, **more):
        return [
            row | {"model": m, "dataset": dataset, "metric": metric, "value": 0.5, "n": n} | more
            for m in ("clip", "rn")
            for metric in metrics
        ]

    line = {"dataset": "shift", "reference": "val", "transform": "logit", "estimator": "ols", "slope": 1.0,
            "intercept": 0.0, "r": 0.9, "n": 7, "source": "measured"}  # fmt: skip
    found = {
        "models": models,
        "accuracy": rows("val", "accuracy") + rows("shift", "accuracy", "reference_accuracy", n=900),
        "effective_robustness": rows("shift", "effective_robustness", n=900, slice="val", convention="logit-ols"),
        "baselines": [line],
        "shape_bias": rows("cue", "shape_bias", n=777),
        "calibration": rows("val", "ece", "nll", slice="before", n=650),
        "factors": rows("imagenet_x", "factor_accuracy", slice="pose", n=15064),
        "retrieval": rows("coco", "image_recall@1", "text_recall@1", n=5000),
        "ood": rows("places", "auroc", slice="msp", n=60_000),
        "prompts": rows("val", "accuracy", slice="mini_1", n=900),
        "synthetic": rows("stylized", "retention", n=960),
        "adversarial": rows("val", "accuracy", slice="bim", convention="linf_2", n=96),
        "typographic": rows("printed", "accuracy", "attack_success_rate", n=400),
        "data_overlap": rows("val", "gain", n=1_500) + rows("val", "overlap_share", n=1_500),
    }
    return {name: pd.DataFrame(table) for name, table in found.items()}


@pytest.fixture
def files(tmp_path):
    """Figures and tables of a study on disk."""
    paths = {"figures": [], "tables": []}
    for name, table in tables().items():
        paths["tables"].append(tmp_path / f"{name}.parquet")
        table.to_parquet(paths["tables"][-1])
    for name in ("shape_bias", "retrieval"):
        paths["figures"].append(tmp_path / f"{name}.png")
        Image.linear_gradient("L").save(paths["figures"][-1])
    return paths


def write(files, out, title="A title"):
    page.write_report("mini", title, files["figures"], files["tables"], TEMPLATES, out)
    return out.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("figure", captions.MEASURED)
def test_captions_hold_their_numbers(figure):
    n = {"effective_robustness": "900", "shape_bias": "777", "calibration": "650", "visual_factors": "15,064"}
    n |= {"adversarial": "on 96 images", "typographic": "(400 images each)", "data_overlap": "(1,500 images each)"}
    text = captions.caption(figure, TEMPLATES / f"{figure}.rst", tables(), "mini")
    assert "2 models" in text and 'Study "mini"' in text and "$" not in text
    assert "standard n = 1" in text or figure == "retrieval"
    if figure in n and figure != "visual_factors":
        assert n[figure] in text
    if figure == "effective_robustness":
        assert "n = 7 models" in text


@pytest.mark.parametrize("figure", captions.MEASURED)
def test_captions_of_an_empty_study(figure):
    assert "no models" in captions.caption(figure, TEMPLATES / f"{figure}.rst", {}, "mini")


def test_caption_of_a_span_of_images():
    some = tables()
    some["shape_bias"].loc[0, "n"] = 1000
    assert "777 to 1,000" in captions.caption("shape_bias", TEMPLATES / "shape_bias.rst", some, "mini")


def test_caption_errors_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"missing\.rst"):
        captions.caption("shape_bias", tmp_path / "missing.rst", {}, "mini")
    (tmp_path / "bad.rst").write_text("$unheard of")
    with pytest.raises(InputError, match=r"bad\.rst.*unheard"):
        captions.caption("shape_bias", tmp_path / "bad.rst", {}, "mini")


def test_page_is_self_contained_and_escaped(files, tmp_path):
    text = write(files, tmp_path / "out" / "report.html", title=EVIL)
    parsed = Tags(text)
    assert parsed.open == []
    assert "script" not in parsed.seen and EVIL not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 3  # title, heading, models table
    assert "A &amp; &quot;B&quot;" in text
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in parsed.links)
    assert parsed.seen.count("img") == 2 and "@import" not in text and "url(" not in text
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))


def test_page_shows_tables_provenance_and_command(files, tmp_path):
    from clip_robustness.core.io import sha256_file

    text = write(files, tmp_path / "report.html")
    for path in files["tables"]:
        assert sha256_file(path) in text
    assert "snakemake --configfile config/mini.yaml" in text
    assert "<td>clip_zero_shot</td>" in text and '<td class="number">777</td>' in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text), "a date would change the page from run to run"


def test_page_is_byte_identical(files, tmp_path):
    one = write(files, tmp_path / "one.html")
    files["tables"].reverse()
    assert one == write(files, tmp_path / "two.html")


def test_page_errors_name_the_file(files, tmp_path):
    files["figures"][0].unlink()
    with pytest.raises(InputError, match=r"shape_bias\.png"):
        write(files, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_index_links_reports_and_shows_thumbnails(files, tmp_path):
    reports = [tmp_path / study / "report.html" for study in ("mini", "published")]
    for number, report in enumerate(reports):
        write(files, report, title=f"Study {number} {EVIL}")
    page.write_index(reports, tmp_path / "index.html")
    first = (tmp_path / "index.html").read_bytes()
    parsed = Tags(first.decode())
    assert parsed.open == [] and "script" not in parsed.seen
    assert parsed.seen.count("img") == 4
    assert {"mini/report.html", "published/report.html#figure-retrieval"} <= set(parsed.links)
    page.write_index(reports, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_bytes() == first
    with pytest.raises(InputError, match="nowhere"):
        page.write_index([tmp_path / "nowhere.html"], tmp_path / "index.html")
