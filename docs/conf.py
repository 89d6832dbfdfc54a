"""The documentation site: `make docs`. What is generated comes from generate.py, what is executed from notebooks/."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import generate  # noqa: E402

from clip_robustness import __version__  # noqa: E402

generate.write_pages()

project = "clip_robustness"
version = release = __version__
author = copyright = "the clip_robustness maintainers, MIT licence"
extensions = ["myst_nb"]
exclude_patterns = [
    "_build",
    # parts that pages include
    *(f"generated/{name}.md" for name in (*generate.README_PARTS, "measurement")),
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes = False  # a quote of a schema stays as it is typed

html_theme = "furo"
html_title = "clip_robustness"
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sourcelink = html_copy_source = False
html_show_sphinx = html_use_index = False

# Notebooks are shown with what they give here: `make docs` has made the published study before, and they run from it.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
