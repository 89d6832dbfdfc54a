"""Snakemake's own report of a study: figures with their captions, and the page, by category."""

import html
import json
import re

import pytest

from tests.workflow.conftest import SMALL_CONFIG


@pytest.mark.slow
def test_snakemakes_report_shows_captions_and_categories(small_house, browser):
    small_house.snakemake("--report", "snakemake.html", *SMALL_CONFIG)
    path = small_house.path / "snakemake.html"
    text = html.unescape(path.read_text(encoding="utf-8"))
    captions = json.loads((small_house.path / "figures/mini/captions.json").read_text(encoding="utf-8"))
    assert "shape_bias" in captions
    for caption in captions.values():
        title = re.match(r"\*\*(.+?)\*\*", caption)[1]
        assert f"<strong>{title}</strong>" in text
    assert "Claims, explorer, axes, provenance" in text
    page = browser.page().open(path)
    page.until("document.body.textContent.includes('Figures') && document.body.textContent.includes('Report')")
    assert page.requests() == [path.resolve().as_uri()]
