"""What tests do with an open report."""

import json

import pytest

from tests.browser.devtools import Page

STUDIES = ["mini", "published"]
BOTH = pytest.mark.parametrize("report", STUDIES, indirect=True)
MINI = pytest.mark.parametrize("report", ["mini"], indirect=True)
MAIN = "Chart.getChart(document.querySelector('#main-plot canvas'))"


def points(page: Page, chart: str = MAIN) -> dict[str, dict]:
    """Model -> its point: x and y as drawn, px and py on the screen, and whether it is marked."""
    found = page.run(
        f"""(() => {{ const chart = {chart}, data = JSON.parse(document.getElementById('explorer-data').textContent);
        const box = chart.canvas.getBoundingClientRect();
        return chart.data.datasets.flatMap((set, s) => set.data.map((p, k) => {{
          const element = chart.getDatasetMeta(s).data[k];
          return [data.models.id[p.m], {{ x: p.x, y: p.y, px: box.left + element.x, py: box.top + element.y,
            marked: Boolean(set.strong), colour: set.backgroundColor[k], shape: set.pointStyle[k] }}]; }})); }})()"""
    )
    return dict(found)


def text(page: Page, element: str) -> str:
    return page.run(f"document.getElementById({json.dumps(element)}).textContent")


def select(page: Page, axis: str, quantity: str) -> None:
    """Choose a quantity (by the start of its key) for an axis of the main plot."""
    name = page.run(
        "(() => { const data = JSON.parse(document.getElementById('explorer-data').textContent);"
        f"const q = data.quantities.find((q) => q.k.startsWith({json.dumps(quantity)})); return [q.a, q.k]; }})()"
    )
    page.choose(f"{axis}-axis", name[0])
    page.choose(f"{axis}-quantity", name[1])


def scroll(page: Page, element: str) -> None:
    page.run(f"document.getElementById({json.dumps(element)}).scrollIntoView()")
    page.settle()
