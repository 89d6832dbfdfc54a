"""YAML tables and their schemas: what is wrong with a file, in words that a user can act on."""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError

# A few aliases of YAML can stand for billions of values. The largest table here, datasets.yaml, has 5,000 values.
MOST_VALUES, DEEPEST = 200_000, 50


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

        def flatten_mapping(self, node):
            super().flatten_mapping(node)
            if len(node.value) > MOST_VALUES // 100:
                raise InputError(f"{path}: merges (<<) of more than {MOST_VALUES // 100:,} keys; write them out")

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key in [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
                if key in seen:
                    line = node.start_mark.line + 1
                    raise InputError(f"{path}, mapping that starts at line {line}: the key '{key}' stands there twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.load(file, Loader=UniqueKeyLoader)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except Exception as error:  # PyYAML raises half a dozen types for dates, numbers and tags that are none
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping")
    _refuse_odd(value, str(path))
    return value


def load_checked(path: Path, name: str, root: Path) -> dict[str, Any]:
    """A YAML file with the defaults of config/schemas/`name`.schema.yaml. Errors: `InputError`, a line a problem."""
    problems: list[str] = []
    document = check(load_yaml(path), schema(name, root), str(path), problems)
    stop(problems)
    return document


def _refuse_odd(value: Any, where: str) -> None:
    """Errors: `InputError` for what JSON cannot hold, text with a zero byte, and too many or too deep values."""
    waiting, count = [(value, "", 0)], 0
    while waiting:
        value, place, depth = waiting.pop()
        at, count = f"{where}, field '{place[1:]}'" if place else where, count + 1
        if count > MOST_VALUES or depth > DEEPEST:
            most = f"more than {MOST_VALUES:,} values, or nested deeper than {DEEPEST}"
            raise InputError(f"{where}: {most} (aliases count as often as they are used); write less")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not _is_text(key):
                    raise InputError(f"{at}: the key {key!r} is no plain text; put it in quotes")
            waiting += [(part, f"{place}.{key}", depth + 1) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(part, place, depth + 1) for part in value]
        elif isinstance(value, str):
            if not _is_text(value):
                raise InputError(f"{at}: {value[:60]!r} holds characters that no text has; remove them")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InputError(f"{at}: {value} is no number; expected a finite one")
        elif isinstance(value, int):
            if abs(value) >= 2**63:
                raise InputError(f"{at}: a number of {len(hex(value)) - 2} hexadecimal digits is too large")
        elif value is not None:
            raise InputError(f"{at}: {value!r} is of the kind {type(value).__name__}; put it in quotes")


def _is_text(value: str) -> bool:
    return not re.search("[\0\ud800-\udfff]", value)


def as_number(text: str, kind: type) -> Any:
    """A table's cell: None where it is empty, the text itself where it is no finite number, which a schema refuses."""
    try:
        number = kind(text) if text else None
        return number if number is None or math.isfinite(number) else text
    except (ValueError, OverflowError):
        return text


@functools.cache
def _validator() -> Any:
    """As of JSON schema, but for `$`, which to Python matches before a last line break too, and for 1.0, no integer."""
    import jsonschema

    def pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterable[Any]:
        strict = re.sub(r"(?<!\\)\$(?=$|\))", r"\\Z", pattern)
        if isinstance(value, str) and not re.search(strict, value):
            yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")

    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(draft, {"pattern": pattern}, type_checker=types)


def check(value: Mapping[str, Any], schema: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Validate against a JSON schema, append readable problems, and return `value` with defaults filled in.

    Errors: `InputError` for values that no JSON could hold.
    """
    _refuse_odd(value, where)
    filled: dict[str, Any] = _with_defaults(value, schema)
    validator = _validator()(schema)
    for error in sorted(validator.iter_errors(filled), key=lambda e: [str(part) for part in e.absolute_path]):
        field = ".".join(str(part) for part in error.absolute_path)
        problems.append(f"{where}{f', field {field!r}' if field else ''}: {_readable(error)}")
    return filled


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
    if not isinstance(value, Mapping) or not isinstance(schema, dict):
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
