"""YAML tables and their schemas: what is wrong with a file, in words that a user can act on."""

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError


def nearest(name: str, valid: Iterable[str]) -> str:
    """', did you mean X?' or ''."""
    found = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def unknown(name: str, valid: Iterable[str], place: object, what: str = "entry") -> str:
    return f"'{name}' is no {what} of {place}{nearest(name, valid)}"


@functools.cache
def schema(name: str, root: Path) -> dict[str, Any]:
    return load_yaml(root / "config" / "schemas" / f"{name}.schema.yaml")


def load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """YAML that refuses a mapping with the same key twice: the second would silently win."""

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    line = node.start_mark.line + 1
                    raise InputError(f"{path}, mapping that starts at line {line}: the key '{key}' stands there twice")
            return super().construct_mapping(node, deep)

    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.load(file, Loader=UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping")
    return value


def check(value: dict[str, Any], schema: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Validate against a JSON schema, append readable problems, and return `value` with defaults filled in."""
    import jsonschema

    value = _with_defaults(value, schema)
    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(value), key=lambda e: [str(part) for part in e.absolute_path]):
        field = ".".join(str(part) for part in error.absolute_path)
        problems.append(f"{where}{f', field {field!r}' if field else ''}: {_readable(error)}")
    return value


def _readable(error: Any) -> str:
    expected = error.schema.get("description", "") if isinstance(error.schema, dict) else ""
    hint = f" ({expected.strip()})" if expected else ""
    match error.validator:
        case "enum":
            valid = [str(v) for v in error.validator_value]
            return f"'{error.instance}' is not one of {', '.join(valid)}{nearest(error.instance, valid)}{hint}"
        case "additionalProperties":
            known = list(error.schema["properties"])
            unknown = [name for name in error.instance if name not in known]
            return "; ".join(f"unknown field '{n}'{nearest(n, known)}" for n in unknown)
        case "type":
            types = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
            return f"{error.instance!r} given, expected {' or '.join(types)}{hint}"
        case "pattern":
            return f"{error.instance!r} does not match {error.validator_value}{hint}"
        case _:
            return f"{error.message}{hint}"


def _with_defaults(value: Any, schema: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    filled = dict(value)
    for name, part in schema.get("properties", {}).items():
        if name not in filled and isinstance(part, dict) and "default" in part:
            filled[name] = part["default"]
        if name in filled:
            filled[name] = _with_defaults(filled[name], part)
    return filled


def stop(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))
