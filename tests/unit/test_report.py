"""The report: captions carry their numbers, pages are self-contained, escaped and reproducible."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.study import METRICS_OF_FIGURE
from clip_robustness.report import captions, landing, markup, page, provenance
from clip_robustness.report.axes import AXES
from clip_robustness.report.quantities import KINDS

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
        "correspondence": rows("pairs", "recall", slice="2cm", n=150),
        "choice": rows("two_way", "accuracy", n=480),
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


def write(files, out, title="A title", **more):
    page.write_report("mini", title, files["figures"], files["tables"], TEMPLATES, out, **more)
    return out.read_text(encoding="utf-8")


def without_run(text):
    """The page without its section on the run, the only part that may differ."""
    return re.sub(r'<section id="run">.*?</section>', "", text, flags=re.DOTALL)


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("figure", captions.MEASURED)
def test_captions_hold_their_numbers(figure):
    n = {"effective_robustness": "900", "shape_bias": "777", "calibration": "650", "visual_factors": "15,064"}
    n |= {"adversarial": "on 96 images", "typographic": "(400 images each)", "data_overlap": "(1,500 images each)"}
    text = captions.caption(figure, TEMPLATES / f"{figure}.rst", tables(), "mini")
    assert "2 models" in text and 'Study "mini"' in text and "$" not in text
    assert "standard n = 1" in text or figure in ("retrieval", "corruption_3d", "lmm")
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
    assert EVIL not in text and "alert(" in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 3  # title, heading, models table
    assert r"\u003cscript\u003ealert('x')\u003c/script\u003e" in text  # the explorer's data
    assert "A &amp; &quot;B&quot;" in text
    assert all(link.startswith(("data:image/png;base64,", "data:,", "#")) for link in parsed.links)
    assert parsed.seen.count("img") == 2 and "@import" not in text and "url(" not in text
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))


def test_the_policy_names_every_script_and_style_of_the_page_and_nothing_else(files, tmp_path):
    text = write(files, tmp_path / "report.html")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    rules = {part.split()[0]: set(part.split()[1:]) for part in policy.split("; ")}
    parts = [re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")]
    digests = [{f"'{hash_of(part)}'" for part in some} for some in parts]
    assert len(parts[0]) == 3 and rules["script-src"] == digests[0] and rules["style-src"] == digests[1]
    assert rules["default-src"] == {"'none'"} and rules["img-src"] == {"data:"}
    assert " style=" not in text and not re.search(
        r"\son[a-z]+=", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    )


def hash_of(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_chart_library_is_the_one_that_was_taken():
    """A vendored file must be what its project released: version, licence, content."""
    text = markup.resource("chart.umd.min.js")
    assert "Chart.js v4.6.1" in text[:200] and "MIT License" in text[:300] and "sourceMappingURL" not in text
    assert "MIT License" in markup.resource("chart.LICENSE.md")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "c17f2ce49fb9c71ef7fb39c03f868804ac5ab34730149976eebe6b7f807bef0c"


def test_claims_come_first_then_explorer_and_axes(files, tmp_path):
    claim = {"id": "tu.F1", "paper": "holistic", "finding": "CLIP is robust", "certainty": "secondary", "source": "s",
             "kind": "mean", "expected": "above 0", "edge_low": 0.0, "edge_high": None, "inside": True, "value": 0.12,
             "low": 0.05, "high": 0.2, "n": 7, "unit": "models", "scale": "points", "p": 0.01, "verdict": "reproduced",
             "verdict_holm": "undecided", "missing": "", "study": "mini"}  # fmt: skip
    missing = claim | dict.fromkeys(("value", "low", "high", "n", "p")) | {"id": "tu.F2", "finding": "It swims"}
    missing |= {"verdict": "not measured here", "verdict_holm": "not measured here", "missing": "table pool"}
    pd.DataFrame([missing, claim]).to_parquet(tmp_path / "claims.parquet")
    files["tables"].append(tmp_path / "claims.parquet")
    lacking = {"skipped": {"objectnet": {"title": "ObjectNet", "licence": "CC BY", "note": "accept it"}},
               "figures": ["lmm", "retrieval"], "remarks": ["ImageNet-V2 stands in"]}  # fmt: skip
    text = write(files, tmp_path / "report.html", lacking=lacking, config={"study": "mini", "local": ["imagenet_val"]})
    sections = re.findall(r'<section id="([\w-]+)" aria-labelledby="h-[\w-]+"><h2', text)
    assert sections[:2] == ["claims", "explorer"] and set(sections[2:4]) == {"shape_bias", "retrieval"}
    assert sections[4:] == ["not-measured", "models", "reproduce"]
    assert "12 [5, 20]; n = 7, interval over models" in text and '<li class="reproduced"><strong>1</strong>' in text
    absent = text[text.index('id="not-measured"') :]
    for reason in (
        "accept it (licence: CC BY)",
        "not among the study&#x27;s figures",
        "table pool",
        "ImageNet-V2 stands in",
    ):
        assert reason in absent
    assert "<td>retrieval</td><td>figure</td>" not in re.sub(r' data-label="[^"]*"', "", absent)
    assert "&quot;imagenet_val&quot;" in text


def test_axes_state_their_conventions_and_tables(files, tmp_path):
    text = write(files, tmp_path / "report.html")
    part = text[text.index('<section id="shape_bias"') : text.index('<section id="retrieval"')]
    assert "Conventions.</strong> Shape decisions over" in part and '<td class="number">777</td>' in part


def test_every_figure_but_the_ledgers_is_an_axis():
    assert {axis.figure for axis in AXES} == set(METRICS_OF_FIGURE) - {"claims", "reproduction"}
    assert all(axis.conventions.endswith(".") for axis in AXES)
    assert {axis.explore for axis in AXES} - {""} <= {kind.axis for kind in KINDS}


def test_page_shows_tables_provenance_and_command(files, tmp_path):
    from clip_robustness.core.io import sha256_file

    text = write(files, tmp_path / "report.html")
    for path in files["tables"]:
        assert sha256_file(path) in text
    assert "snakemake --configfile config/mini.yaml" in text
    assert "<td>clip_zero_shot</td>" in text and '<td class="number">777</td>' in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text), "a date would change the page from run to run"


def test_page_is_byte_identical_but_for_the_run(files, tmp_path):
    one = write(files, tmp_path / "one.html")
    files["tables"].reverse()
    results = run_of_a_model(tmp_path / "results")
    timed = write(files, tmp_path / "two.html", results=results)
    assert without_run(one) == without_run(write(files, tmp_path / "three.html"))
    (results / "benchmarks/embed_all/clip.tsv").write_text("s\tmax_rss\tcpu_time\n720\t2048\t1440\n")
    again = write(files, tmp_path / "four.html", results=results)
    assert without_run(timed) == without_run(again) and timed != again
    assert "0.20 hours, 0.40 core hours" in again and "about 64 Wh, estimated at 10 W a busy core and 300 W" in again


def run_of_a_model(results):
    """Manifest of an embedding and time of its job."""
    manifest = {"model": "clip", "dataset": "val", "ids_sha256": "1234", "n": 900, "precision": "bfloat16",
                "device": "cuda", "weights": {"a.safetensors": "abcd"}, "versions": {"torch": "2.14.1"}}  # fmt: skip
    io.write_json(results / "embeddings/clip/val.json", manifest)
    (results / "benchmarks/embed_all").mkdir(parents=True)
    (results / "benchmarks/embed_all/clip.tsv").write_text("s\tmax_rss\tcpu_time\n360\t2048\t720\n")
    return results


def test_provenance_names_data_weights_and_times(tmp_path):
    text = "".join(provenance.sections("paper", {"seed": 0}, {}, run_of_a_model(tmp_path)))
    for fact in ("<td>1234</td>", "<td>abcd</td>", "bfloat16", "torch 2.14.1", "0.10 hours, 0.20 core hours"):
        assert fact in text
    assert "snakemake --cores all" in text and "&quot;seed&quot;: 0" in text


def test_captions_are_written_for_snakemakes_own_report(files, tmp_path):
    write(files, tmp_path / "report.html", captions_out=tmp_path / "captions.json")
    found = io.read_json(tmp_path / "captions.json")
    assert set(found) == {"shape_bias", "retrieval"} and "777 decisions" in found["shape_bias"]


def test_a_figure_that_no_section_shows_is_an_error(files, tmp_path):
    files["figures"].append(files["figures"][0].with_name("colour_bias.png"))
    with pytest.raises(InputError, match=r"colour_bias: no section .*report/axes\.py"):
        write(files, tmp_path / "report.html")


def test_page_errors_name_the_file(files, tmp_path):
    files["figures"][0].unlink()
    with pytest.raises(InputError, match=r"shape_bias\.png"):
        write(files, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_index_links_reports_and_shows_thumbnails(files, tmp_path):
    reports = [tmp_path / study / "report.html" for study in ("mini", "published")]
    for number, report in enumerate(reports):
        write(files, report, title=f"Study {number} {EVIL}")
    landing.write_index(reports, tmp_path / "index.html")
    first = (tmp_path / "index.html").read_bytes()
    parsed = Tags(first.decode())
    assert parsed.open == [] and "script" not in parsed.seen
    assert parsed.seen.count("img") == 4
    assert {"./mini/report.html", "./published/report.html#figure-retrieval"} <= set(parsed.links)
    landing.write_index(reports, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_bytes() == first
    with pytest.raises(InputError, match="nowhere"):
        landing.write_index([tmp_path / "nowhere.html"], tmp_path / "index.html")
