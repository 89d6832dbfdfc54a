"""The notebooks run, on the published study's tables."""

import nbformat
import pytest
from nbclient import NotebookClient

from clip_robustness.data.published import import_published
from clip_robustness.metrics.effective_robustness import fit_baselines_file


@pytest.mark.slow
def test_the_notebook_runs(root, tmp_path, monkeypatch):
    import_published(root / "config/published", tmp_path, "published")
    files = [tmp_path / f"{name}.parquet" for name in ("accuracy", "models", "baselines", "effective_robustness")]
    fit_baselines_file(*files, sources=["testbed"], resamples=100)
    monkeypatch.setenv("TABLES", str(tmp_path))
    notebook = nbformat.read(root / "notebooks/tables.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120).execute()
    shown = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert "clip_zero_shot" in shown and "imagenet_v2" in shown
