"""The registry: config/models.tsv, config/datasets.yaml, config/prompts.yaml and a study's config.

They are validated before any job is planned. Whatever is wrong is collected and raised as one
`InputError`, a line each: file, row, field, what was expected, and the nearest valid name.
"""

import csv
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")

# Which metric families a data set gets, by the part that it plays in a study.
METRICS_OF_ROLE = {
    "id": ("accuracy", "calibration"),
    "natural_shift": ("accuracy", "calibration"),
    "cue_conflict": ("shape_bias",),
    "pool": ("accuracy",),
    "train": (),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One line of models.tsv. `weights` is `mini`, `hub:OWNER/NAME[@REVISION]` or `local:PATH`."""

    model: str
    title: str
    library: str
    architecture: str
    weights: str
    preprocess: str
    group: str
    family: str
    source: str
    train_images: int | None
    finetuning: str
    finetuned_on: str
    loss: str
    parent: str
    params_m: float
    image_size: int
    licence: str
    sets: tuple[str, ...]
    note: str = ""

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.parse(self.preprocess)

    @property
    def has_text_tower(self) -> bool:
        return self.library == "open_clip" and self.finetuning != "cross_entropy"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One entry of datasets.yaml. `details` holds what only its family reads (a world, URLs, checksums)."""

    name: str
    title: str
    family: str
    labels: str
    role: str
    suite: str
    sets: tuple[str, ...]
    licence: str
    images: int | None = None
    access: str = "open"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        return METRICS_OF_ROLE[self.role]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a config selects: its models and data sets, by name and in the files' order."""

    name: str
    config: Mapping[str, Any]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    label_spaces: Mapping[str, Mapping[str, Any]]
    prompts: Mapping[str, Any]

    def base_space(self, dataset: str) -> str:
        space = self.datasets[dataset].labels
        return self.label_spaces[space].get("base") or space

    @property
    def id_dataset(self) -> str:
        """The in-distribution set: every shift's partner, and the one that temperatures are fitted on."""
        ids = [name for name, dataset in self.datasets.items() if dataset.role == "id"]
        return self.config["id_dataset"] or (ids[0] if ids else "")

    def partner(self, dataset: str) -> str:
        """The in-distribution partner of a shift, or '' where there is none."""
        if not self.id_dataset or dataset == self.id_dataset or self.datasets[dataset].role == "pool":
            return ""
        return self.id_dataset if self.base_space(dataset) == self.base_space(self.id_dataset) else ""

    @property
    def evaluated(self) -> list[str]:
        """Data sets that models are run on (training sets are not)."""
        return [name for name, dataset in self.datasets.items() if dataset.role != "train"]

    @property
    def suites(self) -> dict[str, list[str]]:
        """Suite -> its data sets: one model load embeds all of a suite."""
        suites: dict[str, list[str]] = {}
        for name in self.evaluated:
            suites.setdefault(self.datasets[name].suite, []).append(name)
        return suites

    @property
    def base_spaces(self) -> list[str]:
        return sorted({self.base_space(name) for name in self.evaluated})

    def with_metric(self, metric: str) -> list[str]:
        """Data sets that count for a metric family (a pool is measured only to be filtered)."""
        return [n for n in self.evaluated if metric in self.datasets[n].metrics and self.datasets[n].role != "pool"]


def load_study(config: Mapping[str, Any], root: Path) -> Study:
    """Validate `config` and everything that it names, below the folder `root` (the repository)."""
    problems: list[str] = []
    where = f"config of study '{config.get('study', '?')}'"
    config = _check(dict(config), _schema("config", root), where, problems)
    _stop(problems)
    models = load_models(root / config["models"]["table"], root)
    datasets, label_spaces = load_datasets(root / config["datasets"]["table"], root)
    prompts = _load_yaml(root / config["prompts"]["table"])

    chosen = _choose(models, config["models"], f"{where}, models", problems)
    used = _choose(datasets, config["datasets"], f"{where}, datasets", problems)
    for name in [config["prompts"]["default"], *config["prompts"]["also"]]:
        if name not in prompts:
            problems.append(f"{where}, prompts: {_unknown(name, prompts, config['prompts']['table'])}")
    _check_id_dataset(config, used, f"{where}, field 'id_dataset'", problems)
    for model in chosen.values():
        for needed in {model.parent} - {""} - set(chosen) if model.weights == "mini" else ():
            problems.append(f"{where}, models: '{model.model}' is fine-tuned from '{needed}', which is left out")
    _stop(problems)
    return Study(config["study"], config, chosen, used, label_spaces, prompts)


def load_models(path: Path, root: Path) -> dict[str, Model]:
    """Read and validate a table of models. Adding a model is adding a line."""
    problems: list[str] = []
    schema = _schema("model", root)
    fields = [field.name for field in dataclasses.fields(Model)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row and not row[0].startswith("#")]
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if header != fields:
        for name in [n for n in header if n not in fields]:
            problems.append(f"{path}, header: {_unknown(name, fields, 'the columns', 'column')}")
        missing = [n for n in fields if n not in header]
        problems.append(f"{path}, header: expected the columns {', '.join(fields)}; missing: {', '.join(missing)}")
        _stop(problems)
    models: dict[str, Model] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line} ({row[0]})"
        if len(row) != len(fields):
            problems.append(f"{where}: {len(row)} fields, expected {len(fields)} separated by tabs")
            continue
        values: dict[str, Any] = dict(zip(fields, row, strict=True))
        if values["model"] in models:
            problems.append(f"{where}, field 'model': the name is taken by line {lines[values['model']]}")
            continue
        for field, kind in (("train_images", int), ("params_m", float), ("image_size", int)):
            values[field] = _number(values[field], kind)
        values["sets"] = [name for name in values["sets"].split(",") if name]
        before = len(problems)
        _check(values, schema, where, problems)
        if len(problems) == before:
            try:
                Preprocessing.parse(values["preprocess"])
            except InputError as error:
                problems.append(f"{where}, field 'preprocess': {error}")
                continue
            models[values["model"]] = Model(**{**values, "sets": tuple(values["sets"])})
            lines[values["model"]] = line
    for model in models.values():
        if model.parent and model.parent not in models:
            where = f"{path}, line {lines[model.model]} ({model.model}), field 'parent'"
            problems.append(f"{where}: {_unknown(model.parent, models, path, 'model')}")
    _stop(problems)
    return models


def load_datasets(path: Path, root: Path) -> tuple[dict[str, Dataset], dict[str, dict[str, Any]]]:
    """Read and validate datasets.yaml: its data sets and its label spaces."""
    problems: list[str] = []
    document = _check(_load_yaml(path), _schema("datasets", root), str(path), problems)
    _stop(problems)
    spaces, entries = document["label_spaces"], document["datasets"]
    for name, space in spaces.items():
        base = space.get("base")
        if base and base not in spaces:
            problems.append(f"{path}, label_spaces.{name}.base: {_unknown(base, spaces, path, 'label space')}")
    common = {field.name for field in dataclasses.fields(Dataset)} - {"name", "details"}
    datasets = {}
    for name, entry in entries.items():
        where = f"{path}, datasets.{name}"
        if not NAME.fullmatch(name):
            problems.append(f"{where}: a name is lower-case letters, digits, '_', '-' and '.'")
        if entry["labels"] not in spaces:
            problems.append(f"{where}.labels: {_unknown(entry['labels'], spaces, path, 'label space')}")
        known = {key: entry[key] for key in common & set(entry)}
        details = {key: value for key, value in entry.items() if key not in common}
        datasets[name] = Dataset(name=name, **{**known, "sets": tuple(entry["sets"])}, details=details)
    _stop(problems)
    return datasets, spaces


def describe_study(config: Path) -> None:
    """Validate a study's config file with all that it names, and print what it holds."""
    root = Path(__file__).resolve().parents[3]
    study = load_study(_load_yaml(config), root)
    print(f"{study.name}: {len(study.models)} models, {len(study.evaluated)} data sets to evaluate")
    for suite, names in study.suites.items():
        print(f"  suite {suite}: {', '.join(names)}")


def _check_id_dataset(config: Mapping[str, Any], used: Mapping[str, Dataset], where: str, problems: list[str]) -> None:
    ids = [name for name, dataset in used.items() if dataset.role == "id"]
    given = config["id_dataset"]
    if given and given not in used:
        problems.append(f"{where}: {_unknown(given, used, 'this study', 'data set')}")
    if not given and len(ids) != 1 and any(dataset.metrics for dataset in used.values()):
        found = f"{len(ids)} ({', '.join(ids)})" if ids else "none"
        problems.append(f"{where}: expected one data set with role 'id' in the study, found {found}; name one here")


def _choose(table: Mapping[str, Any], choice: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """The rows that `choice` names one by one (`names`) or by set (`sets`), less those in `without`."""
    known_sets = {name for row in table.values() for name in row.sets}
    for name in choice["sets"]:
        if name not in known_sets:
            problems.append(f"{where}.sets: {_unknown(name, known_sets, 'the sets', 'set')}")
    for name in [*choice["names"], *choice["without"]]:
        if name not in table:
            problems.append(f"{where}: {_unknown(name, table, choice['table'])}")
    wanted = set(choice["sets"])
    return {
        name: row
        for name, row in table.items()
        if (name in choice["names"] or wanted & set(row.sets)) and name not in choice["without"]
    }


def nearest(name: str, valid: Iterable[str]) -> str:
    """', did you mean X?' or ''."""
    found = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def _unknown(name: str, valid: Iterable[str], place: object, what: str = "entry") -> str:
    return f"'{name}' is no {what} of {place}{nearest(name, valid)}"


def _number(text: str, kind: type) -> Any:
    if text == "":
        return None
    try:
        return kind(text)
    except ValueError:
        return text  # the schema says what was expected


@functools.cache
def _schema(name: str, root: Path) -> dict[str, Any]:
    return _load_yaml(root / "config" / "schemas" / f"{name}.schema.yaml")


def _load_yaml(path: Path) -> dict[str, Any]:
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


def _check(value: dict[str, Any], schema: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
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


def _stop(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))
