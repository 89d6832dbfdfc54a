"""The verb `draw`: one figure, from a folder of tables, as PDF and PNG."""

import importlib
from pathlib import Path

from clip_robustness.core.io import sha256_file
from clip_robustness.core.tables import read_frame
from clip_robustness.figures import style


def draw(figure: str, study: str, tables: Path, pdf: Path, png: Path) -> None:
    """Draw `figure` (a module of this wing) from `tables`/{name}.parquet; a table that a study lacks is empty."""
    module = importlib.import_module(f"clip_robustness.figures.{figure}")
    paths = {name: tables / f"{name}.parquet" for name in module.TABLES}
    frames = {name: read_frame(path) for name, path in paths.items() if path.is_file()}
    provenance = {name: sha256_file(paths[name]) for name in frames}
    style.save(module.draw(frames), pdf, png, title=figure, study=study, inputs=provenance)
