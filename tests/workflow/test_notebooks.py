"""The notebooks run in a copy of the checkout, and are committed without what they give."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .conftest import House, build_house

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(name: str, house: House, monkeypatch) -> str:
    """What a notebook's cells show, as text. A cell that fails raises."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(house.path / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(house.path / "ipython"))
    notebook = nbformat.read(house.path / f"notebooks/{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(house.path / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(str(output.get("text") or output["data"].get("text/plain")) for output in outputs)


@pytest.fixture(scope="module")
def published_house(tmp_path_factory, root) -> House:
    house = build_house(tmp_path_factory.mktemp("published") / "house", root)
    shutil.copytree(root / "notebooks", house.path / "notebooks")
    house.snakemake("--configfile", "config/published.yaml")
    return house


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_holds_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) <= 8 and all(len(cell.source.splitlines()) <= 20 for cell in cells)
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_quickstart(published_house, monkeypatch):
    shown = executed("quickstart", published_house, monkeypatch)
    assert "figures/published/effective_robustness.pdf" in shown and "vit_b_32_clip_zeroshot" in shown
    assert "DOWNLOADS" in shown


@pytest.mark.slow
def test_read_the_tables(published_house, monkeypatch):
    shown = executed("tables", published_house, monkeypatch)
    assert "clip_zero_shot" in shown and "imagenet_v2" in shown and "slope" in shown


@pytest.mark.slow
def test_reproduce_one_claim(published_house, monkeypatch):
    """The notebook itself compares the number by hand with the ledger's."""
    shown = executed("claim", published_house, monkeypatch)
    assert "reproduced" in shown and "16way_80_templates" in shown


@pytest.mark.slow
def test_add_your_own_model(house, root, monkeypatch):
    import pandas as pd

    shutil.copytree(root / "notebooks", house.path / "notebooks")
    shown = executed("own_model", house, monkeypatch)
    rows = pd.read_parquet(house.path / "results/own/tables/accuracy.parquet")
    rows = rows[(rows["metric"] == "accuracy") & (rows["dataset"] == "mini_val")].set_index("model")
    assert rows.loc["mine", "low"] < 1 / 12 < rows.loc["mine", "high"], "it was never trained"
    assert rows.loc["mini_resnet", "low"] > 1 / 12, "this one was"
    assert "mine" in shown and "mini_resnet" in shown
