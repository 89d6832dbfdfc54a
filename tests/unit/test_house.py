"""The house holds: no import between wings, none upwards, none in a circle; light where it must be light."""

import ast
from pathlib import Path

import pytest

from clip_robustness.core import provenance

PACKAGE = provenance.ROOT
WINGS = ("data", "inference", "metrics", "figures", "report", "mini")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_wing_imports_itself_and_core_only(path):
    room = module_of(path).split(".")[0]
    reached = {name.split(".")[0] for name in provenance.package_imports(path)}
    if room == "core":
        assert reached <= {"core"}
    elif room in WINGS:
        assert reached <= {"core", room}


def test_no_import_runs_in_a_circle():
    edges = {module_of(path): provenance.package_imports(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in edges.get(module, ()):
                if other != module:
                    visit(other, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("room", ["core", "metrics", "figures", "report", "data"])
def test_no_torch_outside_inference_and_mini(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"torch", "torchvision", "open_clip", "timm"}
            assert not heavy, f"{path} imports {heavy}"
