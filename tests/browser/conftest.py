"""Reports to open: a study like the mini one, one as large as the papers' zoo, the published one; and a Chromium."""

from pathlib import Path

import pandas as pd
import pytest

from clip_robustness.core.names import GROUPS
from clip_robustness.core.tables import read_frame
from clip_robustness.data.published import import_published
from clip_robustness.figures.draw import draw
from clip_robustness.metrics.effective_robustness import fit_baselines_file
from clip_robustness.report.cards import write_cards
from clip_robustness.report.page import write_report
from tests.browser.devtools import FOUND, Browser
from tests.unit import figure_tables

EVIL = """<img src="https://example.org/x.png" onerror="document.title='taken'">"""
FORMULA = '=HYPERLINK("https://example.org","x")'


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no Chromium here: install Debian's packages `chromium`, or another build of it")
    for item in items:
        if FOUND is None and Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


class Report:
    """A report in a folder, and the tables behind it."""

    def __init__(self, folder: Path, tables: dict[str, pd.DataFrame], root: Path, figures: tuple[str, ...] = ()):
        self.path, self.tables = folder / "report.html", tables
        (folder / "tables").mkdir()
        paths = []
        for name, table in tables.items():
            paths.append(folder / "tables" / f"{name}.parquet")
            table.to_parquet(paths[-1])
        for figure in figures:
            draw(figure, folder.name, folder / "tables", folder / f"{figure}.pdf", folder / f"{figure}.png")
        write_cards(folder.name, paths, folder / "models")
        pictures = [folder / f"{figure}.png" for figure in figures]
        captions = root / "report" / "captions"
        write_report(folder.name, "A study", pictures, paths, captions, self.path, cards=folder / "models")

    @property
    def titles(self) -> dict[str, str]:
        return dict(zip(self.tables["models"]["model"], self.tables["models"]["title"], strict=True))

    def values(self, table: str, **where: str) -> pd.DataFrame:
        """Rows by model."""
        rows = self.tables[table]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return rows.set_index("model")

    def colour(self, model: str) -> str:
        groups = dict(zip(self.tables["models"]["model"], self.tables["models"]["group"], strict=True))
        return GROUPS[groups[model]][1]


@pytest.fixture(scope="session")
def mini(tmp_path_factory, root) -> Report:
    """Like the mini study; one model has a name that is markup, another one that a spreadsheet would run."""
    tables = figure_tables.study()
    models = tables["models"]
    titles = models["title"].where(models["model"] != "vit", EVIL).where(models["model"] != "cnx", FORMULA)
    tables["models"] = models.assign(title=titles)
    return Report(tmp_path_factory.mktemp("mini"), tables, root, ("shape_bias", "retrieval"))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory, root) -> Report:
    """284 models, as many as the papers', and more than 40 quantities."""
    return Report(tmp_path_factory.mktemp("zoo"), figure_tables.crowd(), root)


@pytest.fixture(scope="session")
def published(tmp_path_factory, root) -> Report:
    """The numbers of config/published, real models all."""
    folder = tmp_path_factory.mktemp("published")
    tables = folder / "imported"
    import_published(root / "config" / "published", tables, "published")
    fit_baselines_file(
        tables / "accuracy.parquet",
        tables / "models.parquet",
        tables / "baselines.parquet",
        tables / "effective_robustness.parquet",
        sources=["testbed"],
        resamples=100,
    )
    return Report(folder, {path.stem: read_frame(path) for path in sorted(tables.glob("*.parquet"))}, root)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def report(request, browser):
    """By the name of the study: the report, and a page that shows it."""
    made = request.getfixturevalue(request.param)
    return made, browser.page().open(made.path)
