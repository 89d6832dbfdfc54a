"""The house holds: no import between wings, none upwards, none in a circle; light where it must be light."""

import ast
import os
import subprocess
import sys
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


def test_help_imports_nothing_heavy():
    code = "import sys, clip_robustness.cli as c\ntry: c.main(['--help'])\n"
    code += "except SystemExit: pass\nprint(sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    loaded = set(ast.literal_eval(out.strip().splitlines()[-1]))
    assert not loaded & {"numpy", "torch", "pandas", "matplotlib", "pyarrow", "scipy", "snakemake"}


def test_every_verb_names_a_function_with_exactly_its_options():
    """Reads the source: a verb's options are its function's arguments, without importing torch here."""
    from clip_robustness.cli import VERBS

    for name, verb in VERBS.items():
        module, _, function = verb.function.partition(":")
        tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())
        found = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function), None)
        assert found is not None, f"{name}: {verb.function} does not exist"
        arguments = {a.arg for a in found.args.args + found.args.kwonlyargs}
        required = len(found.args.args) - len(found.args.defaults)
        needed = {a.arg for a in found.args.args[:required]}
        options = {o.name.replace("-", "_") for o in verb.options}
        assert needed <= options <= arguments, f"{name}: {sorted(options ^ arguments)}"
