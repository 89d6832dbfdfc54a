"""The site builds without a warning or a network, asks for nothing elsewhere, and names what there is to name."""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_robustness.cli import VERBS, function_of
from clip_robustness.core.schema import load_yaml
from clip_robustness.core.tables import MEASUREMENT
from clip_robustness.options import options_of

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("docs", "notebooks", "src", "config", "profiles", "README.md", "SECURITY.md", "Snakefile")
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with the notebooks as they are committed (test_notebooks.py runs them)."""
    folder = tmp_path_factory.mktemp("site")
    for part in PARTS:
        ignored = shutil.ignore_patterns("_build", "generated", "__pycache__")
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    command = ["-m", "sphinx", "--fail-on-warning", "-D", "nb_execution_mode=off", "docs", "html"]
    environment = {**os.environ, **NO_NETWORK, "PYTHONPATH": str(folder / "src")}
    run = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder / "html"


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_a_page_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"([^\"]+)\"", text)
        assert loaded and not [address for address in loaded if "//" in address], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_every_link_leads_to_something(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for address in re.findall(r"<a\b[^>]*?href=\"([^\"]+)\"", text):
            if "://" in address:
                continue
            path, _, anchor = address.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page}: {address}"
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), f"{page}: {address}"


@pytest.mark.parametrize("name", ["config", "model"])
def test_every_key_of_a_user_is_explained_in_its_schema(name):
    for key, value in load_yaml(ROOT / f"config/schemas/{name}.schema.yaml")["properties"].items():
        assert value.get("description"), key


@pytest.mark.slow
def test_the_reference_is_whole(site):
    verbs = text_of(site / "generated/verbs.html")
    for name in VERBS:
        assert name in verbs and all(option in verbs for option in options_of(function_of(name))), name
    config = text_of(site / "generated/config.html")
    for key, value in load_yaml(ROOT / "config/schemas/config.schema.yaml")["properties"].items():
        assert key in config and value.get("description", "") in config, key
    models = text_of(site / "generated/models.html")
    assert all(key in models for key in load_yaml(ROOT / "config/schemas/model.schema.yaml")["properties"])
    metrics = text_of(site / "generated/metrics.html")
    for convention in ("Clopper-Pearson", "bins of equal width", "clopper_pearson(successes, n, level)"):
        assert convention in metrics, convention


@pytest.mark.slow
def test_every_table_and_column_is_explained(site):
    from clip_robustness.metrics import effective_robustness, factors, six_factors
    from clip_robustness.report import claims, reproduction

    text = text_of(site / "reference/tables.html")
    sections = {part.split("¶")[0].split("#")[0].strip(): part for part in re.split(r"\n(?=[\w ]+[¶#]\n)", text)}
    columns = {
        "Measurements": MEASUREMENT,
        "baselines": effective_robustness.BASELINE_COLUMNS,
        "factor_fits": factors.FIT_COLUMNS,
        "six_factors": six_factors.COLUMNS,
        "claims": claims.COLUMNS,
        "reproduction": reproduction.COLUMNS,
    }
    for section, names in columns.items():
        words = set(re.findall(r"\w+", sections[section]))
        assert set(names) <= words, f"{section}: {set(names) - words}"
    rules = (ROOT / "rules/common/tables.smk").read_text(encoding="utf-8")
    figures = rules.split("FIGURE_TABLES = {")[1].split("}")[0]
    tables = {name for line in re.findall(r"\(([^)]*)\)", figures) for name in re.findall(r"\w+", line)}
    assert len(tables) > 15 and tables <= set(re.findall(r"\w+", text)), tables - set(re.findall(r"\w+", text))


@pytest.mark.slow
def test_a_new_reader_finds_the_four_answers_on_the_first_page(site):
    first = text_of(site / "index.html")
    for question in ("How to run it", "How to add a model", "What a number means", "How sure it is"):
        assert question in first
