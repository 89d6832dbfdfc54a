"""Pages that say what the code and the schemas say: written at every build into docs/generated/, never committed.

conf.py calls `write_pages`; `python docs/generate.py` does the same by hand.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/generated"
PACKAGE = ROOT / "src/clip_robustness"
sys.path.insert(0, str(ROOT / "src"))

from clip_robustness.cli import VERBS, WINGS, function_of  # noqa: E402
from clip_robustness.core.schema import load_yaml  # noqa: E402
from clip_robustness.core.tables import KEY, MEANING  # noqa: E402
from clip_robustness.options import options_of  # noqa: E402

# Page -> the schema that it is made from, and what stands above the table.
SCHEMAS = {
    "config": ("config", "# The config of a study", "Keys of `config/*.yaml`. A key without a default must be given."),
    "models": ("model", "# The columns of models.tsv", "One line a model, columns separated by tabs."),
    "datasets": ("datasets", "# The fields of datasets.yaml", "What an option means, [its family](families.md) says."),
    "attacks": ("attack", "# The settings of an attack", "Fields of an entry of `config/attacks.yaml`."),
    "prompts": ("prompts", "# The fields of prompts.yaml", "`NAME` is the name of a prompt set."),
    "claims": (
        "claims",
        "# The fields of a claim",
        "Fields of `config/claims.yaml`, the ledger of the papers' claims.",
    ),
}
README_PARTS = {"architecture": "How it works", "conventions": "Conventions", "remedies": "When something goes wrong"}
# Modules with public functions that say by which convention a number is made, in the order of the page.
STATISTICS = ("core/statistics.py",)
NO_METRICS = ("__init__", "gather", "measure", "rows")  # they join, collect and write


def write_pages(out: Path = OUT) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pages = {name: schema_page(*source) for name, source in SCHEMAS.items()}
    pages |= {name: readme_part(title) for name, title in README_PARTS.items()}
    pages |= {"verbs": verbs_page(), "metrics": metrics_page(), "families": families_page()}
    pages |= {"measurement": measurement_table(), "security": without_links((ROOT / "SECURITY.md").read_text("utf-8"))}
    for name, text in pages.items():
        (out / f"{name}.md").write_text(text, encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, out / path.name)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def schema_page(name: str, title: str, intro: str) -> str:
    schema = load_yaml(ROOT / f"config/schemas/{name}.schema.yaml")
    parts = [title, f"{intro} Made from `config/schemas/{name}.schema.yaml`, which every run is checked against."]
    parts += _schema_table(schema)
    for part, definition in schema.get("$defs", {}).items():
        meaning = definition.get("description", "")
        parts += [f"## {part}", sentence(f"{meaning}: {kind_of(definition)}" if meaning else kind_of(definition))]
        parts += _schema_table(definition)
    return "\n\n".join(parts) + "\n"


def _schema_table(part: Mapping[str, Any]) -> list[str]:
    rows = [[f"`{key}`", *rest] for key, *rest in schema_rows(part)]
    return [table(("key", "value", "meaning"), rows)] if rows else []


def schema_rows(part: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, kind of value and default, meaning) of all properties below `part`, parents before their parts."""
    inner = [(f"{above}.{name}" if above else name, value) for name, value in part.get("properties", {}).items()]
    if isinstance(part.get("additionalProperties"), Mapping):
        inner.append((f"{above}.NAME" if above else "NAME", part["additionalProperties"]))
    for key, value in inner:
        required = key.rpartition(".")[2] in part.get("required", ())
        if key.endswith("NAME") and "description" not in value:
            yield from schema_rows(value, key)
            continue
        yield key, "; ".join(filter(None, (kind_of(value), default_of(value, required)))), value.get("description", "")
        for one in (value, *value.get("anyOf", ())):
            yield from schema_rows(one, key)
            if "properties" in one.get("items", {}):
                yield from schema_rows(one["items"], f"{key}[]")


def kind_of(part: Mapping[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "enum" in part:
        return "one of " + ", ".join(f"`{value}`" for value in part["enum"])
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(map(kind_of, part["anyOf"])))
    kinds = part.get("type", "any")
    names = {"object": "mapping", "string": "text", "null": "nothing", "boolean": "`true` or `false`"}
    listed = [names.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if "array" in listed:
        items = kind_of(part.get("items", {}))
        listed[listed.index("array")] = f"list of {items}" if items != "any" else "list"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    return ", ".join([" or ".join(listed), *(f"{word} {part[key]}" for key, word in limits.items() if key in part)])


def default_of(part: Mapping[str, Any], required: bool) -> str:
    if required:
        return "must be given"
    if "default" not in part:
        return ""
    value = part["default"]
    empty = {"": "empty", "[]": "none", "{}": "none", "None": "none"}
    shown = empty.get(str(value)) or f"`{str(value).lower() if isinstance(value, bool) else value}`"
    return f"default {shown}"


def readme_part(title: str) -> str:
    """A section of the README, without its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise SystemExit(f"README.md: no section '{title}', which docs/generate.py includes; name the new one there")
    return without_links(found[1])


def without_links(text: str) -> str:
    """Markdown of the repository, whose files do not lie where the site does: their names stay."""
    plain = re.sub(r"\[([^]]+)\]\((?!https?://)([^)]+)\)", r"`\2`", text)
    return re.sub(r"<a [^>]*>|</a>", "", plain)


def measurement_table() -> str:
    rows = [[f"`{name}`", meaning, "yes" if name in KEY else ""] for name, meaning in MEANING.items()]
    return table(("column", "meaning", "names the row"), rows) + "\n"


def verbs_page() -> str:
    intro = "Every rule calls one of these. `python -m clip_robustness VERB --help` says the same."
    parts = ["# Verbs", intro]
    for wing, title in WINGS.items():
        parts.append(f"## {wing}: {title}")
        for name, (where, line) in VERBS.items():
            if where.startswith(f"{wing}."):
                options = options_of(function_of(name)).items()
                rows = [[f"`{option}`", option_value(**told), told["help"]] for option, told in options]
                parts += [f"### {name}", sentence(line), table(("option", "value", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def option_value(metavar: str = "", nargs: str = "", required: bool = False, default: Any = None, **_: Any) -> str:
    if not metavar:
        return "a switch"
    many = ", one or more" if nargs else ""
    shown = "none" if default in (None, "", ()) else f"`{default}`"
    return f"{metavar}{many}; {'must be given' if required else f'default {shown}'}"


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def metrics_page() -> str:
    intro = "What each number is, as the docstring of the function that computes it says it."
    metrics = sorted(p for p in (PACKAGE / "metrics").glob("*.py") if p.stem not in NO_METRICS)
    return docstrings_page("# Metrics and statistics", intro, [*metrics, *(PACKAGE / name for name in STATISTICS)])


def families_page() -> str:
    intro = "What `family` of a data set may be: how its files lie, and which `options` it takes."
    paths = sorted(p for p in (PACKAGE / "data/adapters").glob("[a-z]*.py"))
    return docstrings_page("# Families of data sets", intro, paths, functions=False)


def docstrings_page(title: str, intro: str, paths: Iterable[Path], functions: bool = True) -> str:
    """What the modules, and their public functions, say of themselves."""
    parts = [title, intro]
    for path in paths:
        module = ast.parse(path.read_text(encoding="utf-8"))
        name = path.stem.replace("_", " ") if functions else f"`{path.stem}`"
        parts += [f"## {name}", markdown(ast.get_docstring(module) or "")]
        for node in module.body if functions else ():
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and (text := ast.get_docstring(node)):
                arguments = ", ".join(argument.arg for argument in node.args.args)
                parts += [f"### `{node.name}({arguments})`", markdown(text)]
    return "\n\n".join(parts) + "\n"


def markdown(docstring: str) -> str:
    """A docstring as Markdown: what is indented stands as it is, and no character of the rest is markup."""
    lines = []
    for line in docstring.splitlines():
        if line.startswith(("    ", "* ")):
            lines.append(line)
        else:
            pieces = re.split(r"(`+[^`]*`+)", line)
            lines.append("".join(p if p.startswith("`") else re.sub(r"([\[\]_*<>$])", r"\\\1", p) for p in pieces))
    return "\n".join(lines)


if __name__ == "__main__":
    write_pages()
