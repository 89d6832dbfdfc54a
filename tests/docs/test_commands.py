"""What the documentation tells a reader to type and to write is typed and written here, in copies of the checkout."""

import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from clip_robustness.core import io
from tests.docs.pages import ACTIONS, BINARIES, DRY, Block, blocks, follow, shell
from tests.unit.samples import encoded, picture

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    *("Snakefile", "rules", "envs", "config", "profiles", "src", "report", "docs", "notebooks", "tests"),
    *("Makefile", "README.md", "SECURITY.md", "pyproject.toml", "requirements.lock"),
)
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not {"_build", "generated"} & set(page.parts)]
SEQUELS = ("howto/metric.md", "howto/figure.md")  # the second goes on from the first
COMMANDS = ("make", "snakemake", "python", "source")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.fixture
def house(tmp_path) -> Path:
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        options = (
            {"ignore": shutil.ignore_patterns("__pycache__", "_build", "generated")} if copy != shutil.copy else {}
        )
        copy(ROOT / part, tmp_path / part, **options)
    (tmp_path / ".venv").symlink_to(BINARIES.parent)
    (tmp_path / "home").mkdir()
    return tmp_path


def add_photographs(house: Path) -> None:
    """What howto/dataset.md supposes that the reader has."""
    for number, folder in enumerate(("n01440764", "1", "bald eagle")):
        path = house / "home/photos" / folder / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(picture(64, 48, number), "JPEG"))


SETTING = {"howto/dataset.md": add_photographs}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_is_done_with_it(page):
    for block in blocks(page, ROOT):
        assert block.action in ACTIONS, block.where
        assert bool(block.path) == (block.action in ("new", "append", "change")), block.where


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if name_of(page) not in SEQUELS and blocks(page, ROOT)], ids=name_of
)
def test_the_steps_of_a_page(page, house):
    SETTING.get(name_of(page), lambda house: None)(house)
    for block in blocks(page, ROOT):
        follow(block, house)


@pytest.mark.slow
def test_a_metric_and_a_figure_are_added_as_the_pages_say(house):
    for name in SEQUELS:
        for block in blocks(ROOT / "docs" / name, ROOT):
            follow(block, house)
    rows = io.read_parquet(house / "results/tiny/tables/balanced.parquet")
    assert set(rows["model"]) == {"mini_resnet", "mini_resnet_third"} and set(rows["metric"]) == {"balanced_accuracy"}
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"]) & (rows["n"] > 0)).all()
    assert (house / "figures/tiny/balanced.pdf").read_bytes().startswith(b"%PDF")


def readme_commands() -> list[str]:
    tokens = MarkdownIt("commonmark").parse((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = [line for token in tokens if token.type in ("code_block", "fence") for line in token.content.splitlines()]
    return [line for line in lines if line.split(" ")[0] in COMMANDS]


@pytest.mark.slow
def test_the_commands_of_the_readme(house):
    """Runs of Snakemake and make as dry runs; verbs as they stand (`doctor` may find that a study cannot run)."""
    commands = readme_commands()
    assert len(commands) >= 10
    for command in commands:
        if "--sdm conda" in command and not shutil.which("conda"):
            continue
        allowed = " || test $? = 1" if " doctor " in command else ""
        line = command.partition("  #")[0].replace(" …", "") + allowed
        shell(DRY + line, Block("README.md", 0, "sh", "plan", "", command), house)


def test_a_page_that_is_not_true_fails(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("one\ntwo\n")

    def block(language: str, action: str, text: str, path: str = "") -> Block:
        return Block("page.md", 1, language, action, path, text)

    for wrong in (
        block("sh", "run", "true\nfalse | cat\n"),
        block("sh", "plan", "exit 3\n"),
        block("python", "run", "assert 1 == 2\n"),
        block("diff", "change", " one\n-three\n+four\n", "file"),
        block("sh", "rnu", "true\n"),
    ):
        with pytest.raises(AssertionError, match=r"page\.md, line 1"):
            follow(wrong, tmp_path)
    with pytest.raises(FileExistsError):
        follow(block("text", "new", "three\n", "file"), tmp_path)
    follow(block("diff", "change", " one\n-two\n+three\n", "file"), tmp_path)
    assert (tmp_path / "file").read_text() == "one\nthree\n"
