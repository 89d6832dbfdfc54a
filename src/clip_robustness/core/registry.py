"""The registry: config/models.tsv, config/datasets.yaml, config/prompts.yaml and a study's config.

They are validated before any job is planned. Whatever is wrong is collected and raised as one
`InputError`, a line each: file, row, field, what was expected, and the nearest valid name.
"""

import csv
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_robustness.core.gating import without_unavailable
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.core.schema import as_number, check, load_checked, load_yaml, schema, stop, unknown
from clip_robustness.core.schema import nearest as nearest  # published tables say it in the same words
from clip_robustness.core.study import Dataset, Model, Study

# A family is a file of the data wing, so it is known without importing that wing; the mini study has two more.
ADAPTERS = Path(__file__).resolve().parents[1] / "data" / "adapters"
ROOT = Path(__file__).resolve().parents[3]
MADE_HERE = (
    "mini_world",
    "mini_filtered",
    "mini_factors",
    "mini_corrupted",
    "mini_corrupted_3d",
    "mini_pairs",
    "mini_combined",
)
NUMBERS = {"train_images": int, "params_m": float, "gflops": float, "image_size": int, "top1": float}
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def load_study(config: Mapping[str, Any], root: Path) -> Study:
    """Validate `config` and everything that it names, below the folder `root` (the repository)."""
    problems: list[str] = []
    where = f"config of study '{config.get('study', '?')}'"
    config = check(_plain_switches(config), schema("config", root), where, problems)
    stop(problems)
    models = load_models(root / config["models"]["table"], root)
    datasets, label_spaces = load_datasets(root / config["datasets"]["table"], root)
    prompts = load_checked(root / config["prompts"]["table"], "prompts", root)

    sets = model_sets(root / config["models"]["definitions"], models)
    chosen = _choose(models, sets, config["models"], f"{where}, models", problems)
    named = {name: set(dataset.sets) for name, dataset in datasets.items()}
    used = _choose(datasets, named, config["datasets"], f"{where}, datasets", problems)
    wanted = dict.fromkeys([config["prompts"]["default"], *config["prompts"]["also"]], f"{where}, prompts")
    wanted |= {
        m.prompts: f"{config['models']['table']} ({m.model}), field 'prompts'" for m in chosen.values() if m.prompts
    }
    for name, place in wanted.items():
        if name not in prompts:
            problems.append(f"{place}: {unknown(name, prompts, config['prompts']['table'])}")
    for name in config["prompts"]["models"]:
        if name not in models:
            problems.append(f"{where}, prompts.models: {unknown(name, models, config['models']['table'])}")
    _check_id_dataset(config, used, f"{where}, field 'id_dataset'", problems)
    told = {
        "local": config["local"],
        "accept": config["accept"],
        "average": config["average"],
        "overlap.controls": config["overlap"]["controls"],
    }
    for field, names in told.items():
        for name in [name for name in names if name not in datasets]:
            problems.append(f"{where}, {field}: {unknown(name, datasets, config['datasets']['table'])}")
    for model in chosen.values():
        for needed in sorted(_made_from(model) - set(chosen)):
            problems.append(f"{where}, models: '{model.model}' is made from '{needed}', which is left out")
    for name, dataset in used.items():
        if dataset.needs and dataset.needs not in used:
            how = "annotates" if dataset.annotates else "is made from"
            problems.append(f"{where}, datasets: '{name}' {how} '{dataset.needs}', which is left out")
        known = set().union(*sets.values())
        for group in [group for group in dataset.models if group not in known]:
            fault = unknown(group, known, config["models"]["definitions"], "set")
            problems.append(f"{config['datasets']['table']}, datasets.{name}.models: {fault}")
    for name in wanted:
        entry = prompts.get(name)
        source = entry.get("search", {}).get("dataset", "") if isinstance(entry, dict) else ""
        if source and source not in used:
            problems.append(f"{config['prompts']['table']}, {name}: {unknown(source, used, 'this study', 'data set')}")
    problems += _faults_of_attacks(config, chosen, sets, root, where)
    problems += _faults_of_overlap(config, used, chosen, where)
    selectors = {f"selectors.{key}": name for key, name in config["lmm"]["selectors"].items()}
    for field, name in [*selectors.items(), *(("references", name) for name in config["lmm"]["references"])]:
        if name not in models:
            problems.append(f"{where}, lmm.{field}: {unknown(name, models, config['models']['table'])}")
    stop(problems)
    absent = [f"lmm.{field} is {name}" for field, name in selectors.items() if name not in chosen]
    asked = any(dataset.role == "lmm" for dataset in used.values())
    remarks = (f"no questions are asked: {', '.join(absent)}, left out of this study",) if absent and asked else ()
    study = Study(config["study"], config, chosen, used, label_spaces, prompts, sets, remarks=remarks)
    return without_unavailable(study) if config["skip_unavailable"] else study


def _faults_of_attacks(
    config: Mapping[str, Any], models: Mapping[str, Model], sets: Mapping[str, set[str]], root: Path, where: str
) -> list[str]:
    attacks, where = config["attacks"], f"{where}, attacks"
    known = load_yaml(root / attacks["table"]) if attacks["names"] or attacks["settings"] else {}
    faults = [f"{attacks['table']}, {n}: expected its settings" for n in known if not isinstance(known[n], dict)]
    faults += [
        f"{where}.{field}: {unknown(n, known, attacks['table'])}"
        for field in ("names", "settings")  # a config file that is laid over another leaves settings of other names
        for n in attacks[field]
        if n not in known
    ]
    wanted = {*models, *set().union(*sets.values())}
    faults += [f"{where}.models: {unknown(n, wanted, 'models and sets')}" for n in attacks["models"] if n not in wanted]
    whole = [n for n in attacks["names"] if isinstance(known.get(n), dict)]
    entries = {n: {**known[n], **attacks["settings"].get(n, {})} for n in whole}
    for name, entry in entries.items():
        check(entry, schema("attack", root), f"{attacks['table']}, {name}", faults)
    transferred = [name for name, entry in entries.items() if entry.get("substitute")]
    if transferred and attacks["substitute"] not in models:
        missing = unknown(attacks["substitute"], models, "this study", "model")
        faults.append(f"{where}.substitute: {transferred[0]} needs one; {missing}")
    return faults


def _faults_of_overlap(
    config: Mapping[str, Any], datasets: Mapping[str, Dataset], models: Mapping[str, Model], where: str
) -> list[str]:
    overlap, where = config["overlap"], f"{where}, overlap"
    if not overlap["detector"]:
        return []
    faults = []
    if overlap["detector"] not in models:
        faults.append(f"{where}.detector: {unknown(overlap['detector'], models, 'this study', 'model')}")
    for field in ("datasets", "corpora", "copies"):
        for name in [overlap[field]] if field == "copies" else overlap[field]:
            if name not in datasets:
                faults.append(f"{where}.{field}: {unknown(name, datasets, 'this study', 'data set')}")
    return faults


def _plain_switches(config: Mapping[str, Any]) -> dict[str, Any]:
    """Snakemake's `--config skip_unavailable=true` gives the text 'true'."""
    switches = {"true": True, "false": False}
    given = str(config.get("skip_unavailable")).lower()
    return dict(config) | ({"skip_unavailable": switches[given]} if given in switches else {})


def load_models(path: Path, root: Path) -> dict[str, Model]:
    """Read and validate a table of models. Adding a model is adding a line."""
    problems: list[str] = []
    rules = schema("model", root)
    fields = [field.name for field in dataclasses.fields(Model)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row and not row[0].startswith("#")]
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table in UTF-8, separated by tabs ({error})") from None
    if header != fields:
        for name in [n for n in header if n not in fields]:
            problems.append(f"{path}, header: {unknown(name, fields, 'the columns', 'column')}")
        missing = [n for n in fields if n not in header]
        problems.append(f"{path}, header: expected the columns {', '.join(fields)}; missing: {', '.join(missing)}")
        stop(problems)
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
        for field, kind in NUMBERS.items():
            values[field] = as_number(values[field], kind)
        values["listed"] = [name for name in values["listed"].split(",") if name]
        before = len(problems)
        check(values, rules, where, problems)
        if len(problems) == before:
            model = Model(**{**values, "listed": tuple(values["listed"])})
            problems += _faults_of_model(model, where)
            models[model.model] = model
            lines[model.model] = line
    for model in models.values():
        named = {"parent": {model.parent} - {""}, "weights": _made_from(model)}
        for field, names in named.items():
            for name in sorted(names - set(models)):
                where = f"{path}, line {lines[model.model]} ({model.model}), field '{field}'"
                problems.append(f"{where}: {unknown(name, models, path, 'model')}")
    stop(problems)
    return models


def _made_from(model: Model) -> set[str]:
    """Models whose weights its own are made from by this workflow."""
    if model.scheme == "blend":
        return set(model.blended[:2])
    return {model.parent} - {""} if model.scheme == "mini" else set()


def _faults_of_model(model: Model, where: str) -> list[str]:
    """What only the fields together show."""
    if (model.library == "predictions") != (model.scheme == "predictions"):
        return [f"{where}, field 'library': '{model.library}' with weights '{model.weights}'; 'predictions' needs both"]
    if model.scheme == "predictions":
        return [] if model.predictions else [f"{where}, field 'weights': no .npy or .parquet file in that folder"]
    faults = [
        f"{where}, field '{field}': expected a number"
        for field in ("params_m", "gflops", "image_size")
        if not getattr(model, field)
    ]
    if model.answers_in_text and not model.preprocess:  # its own processor knows
        return faults
    try:
        Preprocessing.parse(model.preprocess)
    except InputError as error:
        faults.append(f"{where}, field 'preprocess': {error}")
    return faults


def model_sets(path: Path, models: Mapping[str, Model]) -> dict[str, set[str]]:
    """Model -> the names of the sets that it is in, by the conditions on columns in the file `path`."""
    problems: list[str] = []
    definitions = load_checked(path, "model_sets", ROOT)
    fields = {field.name for field in dataclasses.fields(Model)}
    for name, conditions in definitions.items():
        for condition in conditions:
            for column in set(condition) - fields:
                problems.append(f"{path}, {name}: {unknown(column, fields, 'models.tsv', 'column')}")
    stop(problems)

    def fits(model: Model, condition: Mapping[str, Any]) -> bool:
        for column, wanted in condition.items():
            value = getattr(model, column)
            if not set(wanted if isinstance(wanted, list) else [wanted]) & set(
                value if isinstance(value, tuple) else [value]
            ):
                return False
        return True

    return {
        name: {key for key, conditions in definitions.items() if any(fits(model, c) for c in conditions)}
        for name, model in models.items()
    }


def load_datasets(path: Path, root: Path) -> tuple[dict[str, Dataset], dict[str, dict[str, Any]]]:
    """Read and validate datasets.yaml: its data sets and its label spaces."""
    problems: list[str] = []
    document = load_checked(path, "datasets", root)
    spaces, entries = document["label_spaces"], document["datasets"]
    for name, space in spaces.items():
        base = space.get("base")
        if base and base not in spaces:
            problems.append(f"{path}, label_spaces.{name}.base: {unknown(base, spaces, path, 'label space')}")
    common = {field.name for field in dataclasses.fields(Dataset)} - {"name", "details"}
    families = [*sorted(file.stem for file in ADAPTERS.glob("[a-z]*.py")), *MADE_HERE]
    datasets = {}
    for name, entry in entries.items():
        where = f"{path}, datasets.{name}"
        if not NAME.fullmatch(name):
            problems.append(f"{where}: a name is lower-case letters, digits, '_', '-' and '.'")
        if entry["labels"] not in spaces:
            problems.append(f"{where}.labels: {unknown(entry['labels'], spaces, path, 'label space')}")
        if entry["family"] not in families:
            problems.append(f"{where}.family: {unknown(entry['family'], families, ADAPTERS.name, 'family')}")
        problems += _faults_of_source(entry, entries, where)
        known = {key: entry[key] for key in common & set(entry)}
        details = {key: value for key, value in entry.items() if key not in common}
        tuples = {"sets": tuple(entry["sets"]), "models": tuple(entry.get("models", ()))}
        datasets[name] = Dataset(name=name, **{**known, **tuples}, details=details)
        first = next(d for d in datasets.values() if d.suite == entry["suite"])
        if set(first.models) != set(tuples["models"]):
            problems.append(
                f"{where}.models: {first.name} of the same suite is for other models; a suite is embedded whole"
            )
    stop(problems)
    return datasets, spaces


def _faults_of_source(entry: Mapping[str, Any], entries: Mapping[str, Any], where: str) -> list[str]:
    files = [archive["file"] for archive in entry.get("archives", [])]
    faults = [f"{where}.archives: the file '{file}' stands there twice" for file in files if files.count(file) > 1]
    if files and "hub" in entry:
        faults.append(f"{where}: both 'archives' and 'hub' are given, expected one of them")
    named = [(field, entry.get(field)) for field in ("from", "corrupt", "pool", "habits")]
    named += [("derive.from", entry.get("derive", {}).get("from"))]
    for field, source in named + [("combine", name) for name in entry.get("combine", {}).values()]:
        if source and source not in entries:
            faults.append(f"{where}.{field}: {unknown(source, entries, 'this file', 'data set')}")
    return faults[:1]


def describe_study(config: Path) -> None:
    """Validate a study's config file with all that it names, and print what it holds."""
    study = load_study(load_yaml(config), ROOT)
    print(f"{study.name}: {len(study.models)} models, {len(study.evaluated)} data sets to evaluate")
    for suite, names in study.suites.items():
        print(f"  suite {suite}: {', '.join(names)}")


def _check_id_dataset(config: Mapping[str, Any], used: Mapping[str, Dataset], where: str, problems: list[str]) -> None:
    ids = [name for name, dataset in used.items() if dataset.role == "id"]
    given = config["id_dataset"]
    if given and given not in used:
        problems.append(f"{where}: {unknown(given, used, 'this study', 'data set')}")
    if not given and len(ids) != 1 and any(dataset.metrics for dataset in used.values()):
        found = f"{len(ids)} ({', '.join(ids)})" if ids else "none"
        problems.append(f"{where}: expected one data set with role 'id' in the study, found {found}; name one here")


def _choose(
    table: Mapping[str, Any], sets: Mapping[str, set[str]], choice: Mapping[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """The rows that `choice` names one by one (`names`) or by set (`sets`), less those in `without`."""
    known_sets = set().union(*sets.values())
    for name in choice["sets"]:
        if name not in known_sets:
            problems.append(f"{where}.sets: {unknown(name, known_sets, 'the sets', 'set')}")
    for name in [*choice["names"], *choice["without"]]:
        if name not in table:
            problems.append(f"{where}: {unknown(name, table, choice['table'])}")
    wanted = set(choice["sets"])
    return {
        name: row
        for name, row in table.items()
        if (name in choice["names"] or wanted & sets[name]) and name not in choice["without"]
    }
