"""Data that no program may fetch unasked: what is missing, what to type, and what can be made without it."""

import dataclasses
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.core.schema import stop
from clip_robustness.core.study import METRICS_OF_FIGURE, Study


def without_unavailable(study: Study) -> Study:
    """The study that can be made today, with `remarks` on what is missing and what stands in for it.

    An in-distribution set that is missing is replaced by the first shift that has all classes of the base space
    (ImageNet-V2 for ImageNet validation): a fresh sample of the same classes. A list of its images that are attacked
    goes with it, and overlap is looked for in what is left. A figure whose metrics have no data set left is dropped.
    Errors: `InputError` when nothing is left, or when prompts are searched on what is missing.
    """
    missing = study.unavailable
    if not missing:
        return study
    remarks = [f"left out, since they are not available: {', '.join(missing)}"]
    kept = {name: dataset for name, dataset in study.datasets.items() if name not in missing}
    config = dict(study.config)
    if study.id_dataset in missing:
        base = study.base_space(study.id_dataset)
        fresh = [n for n, d in kept.items() if d.role == "natural_shift" and d.labels == base]
        config["id_dataset"] = fresh[0] if fresh else ""
        instead = f"{fresh[0]} stands in for it" if fresh else "none stands in for it"
        remarks.append(f"the in-distribution set {study.id_dataset} is not available: {instead}")
        if ids := config["attacks"]["ids"]:
            config["attacks"] = {**config["attacks"], "ids": ""}
            remarks.append(f"{ids} lists images of it: others are attacked, chosen by the seed")
    config["overlap"] = _overlap_in(study, set(kept))
    searches = {name: search["dataset"] for name, search in study.searches.items()}
    stop([f"prompt set '{name}': {source} is not available" for name, source in searches.items() if source in missing])
    rest = dataclasses.replace(study, config=config, datasets=kept)
    config["figures"] = [f for f in config["figures"] if _can_draw(rest, f)]
    for figure in study.config["figures"]:
        if figure not in config["figures"]:
            remarks.append(f"the figure {figure} is dropped: it needs data that is not available")
    if not config["figures"] and study.config["figures"]:
        stop([*remarks, "nothing is left of this study; see `python -m clip_robustness doctor`"])
    return dataclasses.replace(rest, skipped=missing, remarks=(*study.remarks, *remarks))


def _overlap_in(study: Study, kept: set[str]) -> dict[str, Any]:
    """The config's search for overlap among the data sets that are there; no detector where nothing can be found."""
    overlap = dict(study.config["overlap"])
    for field in ("datasets", "corpora"):
        overlap[field] = [name for name in overlap[field] if name in kept]
    whole = overlap["datasets"] and overlap["copies"] in kept and (overlap["corpora"] or overlap["vectors"])
    return overlap if whole else {**overlap, "detector": ""}


def _can_draw(study: Study, figure: str) -> bool:
    measured = [pair for metric in METRICS_OF_FIGURE[figure] for pair in study.measured(metric)]
    if figure == "effective_robustness":
        return any(study.partner(dataset) for _, dataset in measured)
    return bool(measured)


def page(study: Study) -> str:
    """What is missing, where to get it, what to type, and which figures can be made without it."""
    missing = study.unavailable
    roots = [name for name, dataset in missing.items() if not waits_for_another(study, name)]
    blocking = [name for name in roots if any(study.metrics_of(n) for n in _with_dependents(study, name))]
    lines = [f"The study '{study.name}' needs data that no program may fetch unasked."]
    for name in sorted(roots, key=lambda name: name not in blocking):
        lines += ["", *_entry(study, name)]
    lines += ["", "Type into the study's config file, with your own paths:", "", *what_to_type(study, roots), ""]
    lines += ["Without it:", *_figures_without(study)]
    return "\n".join(lines)


def waits_for_another(study: Study, name: str) -> bool:
    """Whether nothing but the data set that it annotates, or that it is made from, is missing."""
    return study.datasets[name].needs in study.unavailable


def what_to_type(study: Study, names: list[str]) -> list[str]:
    """The lines of the config that make these data sets available."""
    clicks = [name for name in names if study.datasets[name].downloads]
    others = [name for name in names if name not in clicks]
    lines = ["  local:", *(f"    {name}: /path/to/{name}" for name in others)] if others else []
    return lines + ([f"  accept: [{', '.join(clicks)}]"] if clicks else [])


def _entry(study: Study, name: str) -> list[str]:
    dataset = study.datasets[name]
    names = _with_dependents(study, name)
    shown = [f for f in study.config["figures"] if any(f in study.figures_of(n) for n in names)]
    facts = {
        "licence": dataset.licence,
        "get it": dataset.details.get("note", "name your copy under 'local'"),
        "figures": ", ".join(shown) or "none yet; only `snakemake data` needs it",
        "also for": ", ".join(names[1:]),
    }
    return [f"{name}: {dataset.title}", *(f"    {key + ':':<9} {text}" for key, text in facts.items() if text)]


def _with_dependents(study: Study, name: str) -> list[str]:
    """A data set, its annotations, and what is made from it."""
    return [name, *(n for n in study.unavailable if study.datasets[n].needs == name)]


def _figures_without(study: Study) -> list[str]:
    folder, missing = study.config["pathvars"].get("figures", "figures"), study.unavailable
    touched = {figure for name in missing for figure in study.figures_of(name)}
    lines = [f"    snakemake {folder}/{f}.pdf" for f in study.config["figures"] if f not in touched]
    try:
        rest = without_unavailable(study)
    except InputError:
        return lines or ["    no figure of this study can be made"]
    made = ", ".join(rest.config["figures"])
    return [*lines, f"    snakemake --config skip_unavailable=true    makes {made}", *_indented(rest.remarks[1:])]


def _indented(remarks: tuple[str, ...]) -> list[str]:
    return [f"        {remark}" for remark in remarks]
