"""docs/reference/faults.md and the tests name each other."""

import ast
import re
from pathlib import Path

FAULTS = Path(__file__).parent
TESTS = FAULTS.parent
PAGE = TESTS.parent / "docs/reference/faults.md"


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_has_tests_and_every_number_is_one():
    for title, text in sections().items():
        rows = re.findall(r"^\| (?!fault \|).*\| ([^|]*) \|$", text, re.MULTILINE)
        listed = re.findall(r"^(\d+)\. `[\w/]+\.py::test_\w+`", text, re.MULTILINE)
        assert rows and listed == [str(number) for number in range(1, len(listed) + 1)], title
        assert {number for row in rows for number in row.split(", ")} == set(listed), title


def test_every_test_that_is_named_is_there_and_every_test_of_this_folder_is_named():
    named: dict[str, set[str]] = {}
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8")):
        named.setdefault(file, set()).add(test)
    for file, tests in named.items():
        assert tests <= names_in(TESTS / file), f"{file}: {tests - names_in(TESTS / file)}"
    for path in FAULTS.glob("test_*.py"):
        if path != Path(__file__):
            assert names_in(path) == named[f"faults/{path.name}"], path.name
