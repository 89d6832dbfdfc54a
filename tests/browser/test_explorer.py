"""A reader with a browser points, searches, compares, downloads, and passes the address on."""

import csv
import json
import math

import pytest

from tests.browser.conftest import EVIL, FORMULA
from tests.browser.explorer import BOTH, MINI, points, scroll, select, text


def logit(p: float) -> float:
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


def alone(found: dict[str, dict]) -> str:
    """A model whose point no other is near."""

    def room(name: str) -> float:
        own = found[name]
        others = (other for key, other in found.items() if key != name)
        return min(math.hypot(own["px"] - other["px"], own["py"] - other["py"]) for other in others)

    return max(sorted(found), key=room)


@BOTH
def test_it_asks_for_nothing_and_complains_of_nothing(report):
    made, page = report
    for section in page.run("[...document.querySelectorAll('main > section')].map((s) => s.id)"):
        scroll(page, section)
    page.choose("search", "vit")
    assert page.requests() == [made.path.resolve().as_uri()]
    assert page.complaints() == []


@MINI
def test_its_policy_stops_what_is_not_its_own(report):
    _, page = report
    page.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.taken = 1';"
        "const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(s, i); })()"
    )
    page.settle()
    assert page.run("window.taken") is None
    assert any("Content Security Policy" in said for said in page.complaints())


@BOTH
def test_pointing_names_the_model_and_its_numbers(report):
    made, page = report
    dataset = "shape_bias.shape_bias.cue" if "cue" in set(made.tables["shape_bias"]["dataset"]) else "accuracy.accuracy"
    select(page, "y", dataset)
    scroll(page, "main-plot")
    found = points(page)
    model = alone(found)
    page.point(found[model]["px"], found[model]["py"])
    shown = page.run("document.querySelector('#main-plot .readout').textContent")
    assert made.titles[model] in shown
    key = page.run("document.getElementById('y-quantity').value").split(".")
    row = made.values(key[0], metric=key[1], dataset=key[2], slice="").loc[[model]].iloc[0]
    assert f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}], n = {row['n']:,}" in shown
    page.point(2, 2)
    assert page.run("document.querySelector('#main-plot .readout').hidden")


@BOTH
def test_points_are_the_tables_values_in_the_groups_colours(report):
    made, page = report
    x, y = (page.run(f"document.getElementById('{axis}-quantity').value").split(".") for axis in "xy")
    across = made.values(x[0], metric=x[1], dataset=x[2], slice=x[3])["value"]
    up = made.values(y[0], metric=y[1], dataset=y[2], slice=y[3])["value"]
    found = points(page)
    assert set(found) == set(across.index) & set(up.index)
    for model, point in found.items():
        assert point["x"] == pytest.approx(logit(across[model]), abs=2e-3)
        assert point["y"] == pytest.approx(logit(up[model]), abs=2e-3)
        assert point["colour"] == made.colour(model)
    page.choose("y-scale", "linear")
    assert points(page)[model]["y"] == pytest.approx(up[model], rel=1e-4)
    page.choose("y-scale", "log")
    assert points(page)[model]["y"] == pytest.approx(math.log10(up[model]), abs=1e-4)
    assert page.complaints() == []


@BOTH
def test_groups_toggle(report):
    made, page = report
    before = points(page)
    page.run("[...document.querySelectorAll('#groups label')].find((l) => l.textContent.includes('Standard')).click()")
    page.settle()
    groups = dict(zip(made.tables["models"]["model"], made.tables["models"]["group"], strict=True))
    kept = {model for model in before if groups[model] != "standard"}
    assert 0 < len(kept) < len(before) and set(points(page)) == kept
    assert text(page, "summary").startswith(f"{len(kept)} of ")
    assert "hide=Standard" in page.run("location.hash")


@BOTH
def test_a_search_marks_its_models_in_every_plot(report):
    made, page = report
    model = sorted(points(page))[0]
    page.choose("search", model)
    hits = [name for name in made.titles if model in f"{name} {made.titles[name]}".lower()]
    assert text(page, "found").startswith(f"{len(hits)} found")
    panels = page.run("document.querySelectorAll('#panels canvas').length")
    seen = 0
    for number in range(panels):
        page.run(f"document.querySelectorAll('#panels canvas')[{number}].scrollIntoView()")
        page.until(f"Chart.getChart(document.querySelectorAll('#panels canvas')[{number}]) !== undefined")
        page.settle()
        some = points(page, f"Chart.getChart(document.querySelectorAll('#panels canvas')[{number}])")
        marked = {name for name, point in some.items() if point["marked"]}
        assert marked == set(some) & set(hits)
        assert all(len(point["colour"]) == 9 for name, point in some.items() if name not in hits), "others fade"
        seen += bool(marked)
    assert panels >= 3 and seen >= 1
    assert {name for name, point in points(page).items() if point["marked"]} == set(hits) & set(points(page))


@MINI
def test_two_models_are_compared_with_intervals(report, tmp_path):
    made, page = report
    for box, model in (("model-a", "clip_a"), ("model-b", "rn")):
        page.choose(box, made.titles[model])
    assert text(page, "h-comparison") == "CLIP ViT, world A against ResNet, supervised"
    page.run("document.getElementById('every').click()")
    rows = page.run(
        "[...document.querySelectorAll('#compared tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    values = made.values("accuracy", metric="accuracy", dataset="mini_val")
    a, b = values.loc["clip_a"], values.loc["rn"]
    shown = next(row for row in rows if row[1].startswith("Val, accuracy"))
    low = a["value"] - b["value"] - math.hypot(a["value"] - a["low"], b["high"] - b["value"])
    high = a["value"] - b["value"] + math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    assert shown[2].startswith(f"{100 * a['value']:.1f} % [{100 * a['low']:.1f}")
    assert shown[4] == f"{100 * (a['value'] - b['value']):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert len({row[0] for row in rows}) >= 6, "every axis"
    path = page.downloads(tmp_path, lambda: page.run("document.getElementById('download-comparison').click()"))
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert path.name == "comparison.csv" and len(lines) == 2 * len(rows)
    line = next(line for line in lines if line["model"] == "clip_a" and line["quantity"] == "Val, accuracy")
    assert [float(line[name]) for name in ("value", "low", "high")] == pytest.approx(
        list(a[["value", "low", "high"]]), rel=1e-4
    )


@BOTH
def test_what_is_plotted_downloads(report, tmp_path):
    made, page = report
    path = page.downloads(tmp_path, lambda: page.run("document.getElementById('download').click()"))
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    found = points(page)
    assert len(lines) == 2 * len(found) and {line["model"] for line in lines} == set(found)
    y = page.run("document.getElementById('y-quantity').value").split(".")
    values = made.values(y[0], metric=y[1], dataset=y[2], slice=y[3])
    for line in lines[::2]:
        assert float(line["value"]) == pytest.approx(values.loc[line["model"], "value"], rel=1e-4)


@BOTH
def test_the_address_holds_the_state(report, browser):
    made, page = report
    select(page, "y", "shape_bias.shape_bias")
    page.choose("y-scale", "linear")
    page.choose("search", "clip")
    page.run("document.querySelectorAll('#groups input')[1].click()")
    names = sorted(points(page))[:2]
    for box, model in zip(("model-a", "model-b"), names, strict=True):
        page.choose(box, made.titles[model])
    panel = page.run(
        "(() => { const s = document.getElementById('panel-1'); return s.options[s.options.length - 1].value; })()"
    )
    page.choose("panel-1", panel)
    controls = "[...document.querySelectorAll('#explorer select, #explorer input')]"
    script = f"{controls}.map((e) => e.type === 'checkbox' ? e.checked : e.value)"
    chosen, fragment = page.run(script), page.run("location.hash")
    again = browser.page().open(made.path, fragment)
    assert again.run(script) == chosen and again.run("location.hash") == fragment
    assert points(again).keys() == points(page).keys()
    page.run("document.getElementById('clear').click()")
    assert page.run("location.hash") in ("", "#")
    page.run(f"location.hash = {json.dumps(fragment)}")
    page.until(f"({script}).join() === {json.dumps(page.run(f'({json.dumps(chosen)}).join()'))}")


@pytest.mark.parametrize(
    "fragment", ["#x=nothing&y=__proto__&xs=cubic&hide=%00&a=%3Cimg%3E&p0=&p99=x&q=%22", "#=&&&=", "#claims"]
)
def test_an_address_that_means_nothing_changes_nothing(mini, browser, fragment):
    page = browser.page().open(mini.path, fragment)
    usual = browser.page().open(mini.path)
    assert points(page).keys() == points(usual).keys()
    assert page.complaints() == []


@MINI
def test_names_are_text_and_no_formulas(report, tmp_path):
    _, page = report
    page.choose("search", "cnx")
    page.choose("model-a", EVIL)
    page.choose("model-b", FORMULA)
    page.run("document.getElementById('plotted-details').open = true")
    page.until("document.querySelectorAll('#plotted tbody tr').length > 5")
    assert EVIL in text(page, "h-comparison") and EVIL in text(page, "plotted")
    assert page.run("document.querySelectorAll('img[onerror]').length") == 0
    assert page.run("document.title") == "A study" and page.complaints() == []
    path = page.downloads(tmp_path, lambda: page.run("document.getElementById('download').click()"))
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert {line["title"] for line in lines if line["model"] == "cnx"} == {"'" + FORMULA}


@pytest.mark.parametrize("report", ["zoo"], indirect=True)
def test_a_zoo_with_hundreds_of_models_and_quantities_works(report):
    made, page = report
    quantities = page.run("JSON.parse(document.getElementById('explorer-data').textContent).quantities.length")
    assert quantities >= 40 and len(points(page)) == len(made.tables["models"]) >= 255
    for quantity in ("calibration.ece", "accuracy.accuracy.objectnet", "shape_bias.shape_bias"):
        select(page, "y", quantity)
        assert len(points(page)) > 100
    page.choose("search", "laion-2b")
    assert 0 < sum(point["marked"] for point in points(page).values()) < 255
    assert page.complaints() == []
