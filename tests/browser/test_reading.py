"""A report is read by keyboard, by screen reader, on a phone, in the dark, on paper, without scripts; and its cards."""

import json

import pytest

from tests.browser.explorer import BOTH, MINI, STUDIES, points, scroll, text


@MINI
def test_the_keyboard_is_enough(report):
    made, page = report
    page.run("document.getElementById('y-axis').focus()")
    order = []
    while "CANVAS" not in order:
        order.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        page.press("Tab")
        assert len(order) < 40, "the plot is never reached"
    boxes = ["INPUT"] * made.tables["models"]["group"].nunique()
    axes = [f"{axis}-{part}" for axis in "yx" for part in ("axis", "scale", "quantity")]
    assert order == [*axes, *boxes, "search", "model-a", "model-b", "clear", "download", "CANVAS"]
    page.run("document.querySelector('#main-plot canvas').focus()")
    page.press("ArrowRight")
    first = min(points(page).items(), key=lambda item: item[1]["x"])[0]
    assert made.titles[first] in text(page, "spoken")
    assert made.titles[first] in page.run("document.querySelector('#main-plot .readout').textContent")
    page.press("Enter")
    assert page.run("document.getElementById('model-a').value") == made.titles[first]
    assert text(page, "spoken") == f"compared: {made.titles[first]}"
    page.press("ArrowRight", 2)
    page.press("Enter")
    assert not page.run("document.getElementById('comparison').hidden")


@MINI
def test_every_control_has_a_name(report):
    _, page = report
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "checkbox", "combobox", "searchbox", "textbox", "link", "image", "application", "region"}
    named = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored") and "role" in n
    ]
    controls = [(role, name) for role, name in named if role in roles]
    assert len(controls) > 30
    assert [role for role, name in controls if not name.strip()] == []
    assert page.run("document.getElementById('summary').getAttribute('aria-live')") == "polite"


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const worst = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((p, q) => q - p);
    if ((a + 0.05) / (b + 0.05) < 4.5) worst.push(e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 30));
  }
  return worst; })()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440], ids=["phone", "desk"])
@pytest.mark.parametrize("study", STUDIES)
def test_it_fits_and_can_be_read(study, width, dark, browser, request, tmp_path):
    made = request.getfixturevalue(study)
    page = browser.page(width, 844 if width < 600 else 900, dark).open(made.path)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(CONTRAST) == []
    assert page.picture(tmp_path / "top.png").stat().st_size > 5_000
    scroll(page, "main-plot")
    picture = page.picture(tmp_path / "plot.png")
    assert _colours(picture) >= {made.colour(model) for model in points(page)} - {"#000000"}
    assert page.complaints() == []


def _colours(path) -> set[str]:
    from PIL import Image

    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    return {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in found}


@MINI
def test_without_scripts_figures_and_tables_are_there(report, browser):
    made, _ = report
    page = browser.page()
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.call("Page.navigate", url=made.path.resolve().as_uri())
    page.until("document.readyState === 'complete'")
    assert page.run("document.querySelectorAll('figure img').length") == 2
    assert page.run("document.getElementById('controls').checkVisibility()") is False
    assert "needs JavaScript" in page.run("document.querySelector('noscript').textContent")


@MINI
def test_it_prints_without_its_controls(report):
    _, page = report
    page.call("Emulation.setEmulatedMedia", media="print")
    hidden = "['#controls', 'nav', '#panels'].map((s) => document.querySelector(s).checkVisibility())"
    assert page.run(hidden) == [False, False, False]
    assert page.run("getComputedStyle(document.querySelector('.scroll')).overflowY") == "visible"
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.call("Page.printToPDF")["data"]) > 50_000


@BOTH
def test_a_model_has_a_page(report, browser):
    made, page = report
    page.run("document.getElementById('plotted-details').open = true")
    page.until("document.querySelectorAll('#plotted a').length > 5")
    model = sorted(points(page))[0]
    address = page.run(
        "(() => { const d = JSON.parse(document.getElementById('explorer-data').textContent);"
        f"return d.models.card[d.models.id.indexOf({json.dumps(model)})]; }})()"
    )
    card = browser.page(390, 844).open(made.path.parent / address)
    assert card.run("document.querySelector('h1').textContent") == made.titles[model]
    assert card.run("document.documentElement.scrollWidth") <= 390
    assert card.run("document.querySelectorAll('svg.strip').length") > 3
    assert card.run("document.querySelector('nav a').href") == made.path.resolve().as_uri()
    assert card.complaints() == [] and len(card.requests()) == 1


@pytest.mark.slow
def test_the_small_mini_study_opens(small_house, browser):
    folder = small_house.path / "figures" / "mini"
    page = browser.page().open(folder / "report.html")
    assert len(points(page)) >= 5 and page.complaints() == []
    cards = json.loads((folder / "models" / "cards.json").read_text(encoding="utf-8"))
    card = browser.page().open(folder / "models" / cards["mini_resnet"])
    card.run("document.querySelector('.thumbnails').scrollIntoView()")
    card.until("[...document.querySelectorAll('.thumbnails img')].every((i) => i.complete && i.naturalWidth === 48)")
    assert card.run("document.querySelectorAll('svg.reliability circle').length") > 3
    assert card.complaints() == [] and len(card.requests()) == 1
