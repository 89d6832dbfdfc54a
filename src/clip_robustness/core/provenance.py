"""What a number was made from: hashes of the code behind a rule, and the versions of libraries.

Snakemake tracks a rule's command, not the modules that the command imports. So every rule carries
`params: code=code_hash("metrics.accuracy")`: when that module, or one that it imports, changes what it
does, the rule runs again. Comments, docstrings and formatting do not count.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "clip_robustness"
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def code_hash(*modules: str, imports: bool = True) -> str:
    """Hash of modules (`"metrics.accuracy"`) and, unless told otherwise, of all they import from here."""
    todo, seen = list(modules), set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += _facts(module)[1] if imports else ()
    text = "\n".join(f"{module} {_facts(module)[0]}" for module in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def package_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it, as dotted names below the package."""
    return _imports_of(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of distributions, for manifests."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _below(dotted: str) -> str:
    return dotted.partition(".")[2] if dotted.split(".")[0] == PACKAGE else dotted


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if _file(_below(name)) else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    return {_below(name) for name in found} - {""}


@functools.cache
def _facts(module: str) -> tuple[str, tuple[str, ...]]:
    """A module's hash, and the modules of this package that it imports."""
    path = _file(module)
    if path is None:
        raise ValueError(f"no module {PACKAGE}.{module}")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    imported = tuple(sorted(_imports_of(nodes)))
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported
