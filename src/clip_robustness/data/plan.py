"""What a study will download, store and compute, before anything starts: arithmetic on the registry, nothing is read.

The assumptions are printed with the numbers, because a plan is only as good as they are.
"""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core.registry import load_study
from clip_robustness.core.schema import load_yaml
from clip_robustness.core.study import METRICS, Dataset, Model, Study

ROOT = Path(__file__).resolve().parents[3]
GB = 1e9
INDEX_BYTES = 40  # a row of an index; paths compress well
EMBEDDING_BYTES = 2 * 1000  # a row of logits, float16; features are half to one time that
DECODED = 500  # images that one core decodes and resizes in a second
SIZES = ((50, "up to 50 M"), (100, "50 to 100 M"), (200, "100 to 200 M"), (500, "200 to 500 M"), (1e9, "above 500 M"))
RULE_OF_ROLE = {  # instead of measure_accuracy
    "video_shift": "measure_video",
    "corruption": "measure_corruption",
    "corruption_3d": "measure_corruption",
    "pool": "measure_pool",
}


class Download(NamedTuple):
    """Bytes that are declared exactly, and about, and the number of files whose size is not declared."""

    known: int
    about: int
    unknown: int


def plan_study(config: Path, tflops: float = 40.0) -> None:
    """Print downloads, disk, GPU-hours and jobs of a study. `tflops`: what one GPU sustains, in 10^12 operations/s."""
    study = load_study(load_yaml(config), ROOT)
    print("\n\n".join([_head(study), _downloads(study), _disk(study), _compute(study, tflops), _jobs(study)]))


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text: the first column to the left, numbers to the right; the first row is the header."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [i > 0 and any(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _text(cell: Any) -> str:
    return f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def download_of(study: Study, names: Iterable[str]) -> Download:
    """What these data sets download; an archive that several share counts once, what the user has not at all."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in names:
        dataset = study.datasets[name]
        if study.local(name):
            continue
        for archive in dataset.archives:
            size = archive.get("bytes", 0)
            key = archive.get("urls", [f"{name}/{archive['file']}"])[0]
            sizes[key] = (size, 0 if size else archive.get("about_bytes", 0))
        if dataset.hub:
            sizes[f"hub:{dataset.hub['repository']}"] = (0, dataset.hub.get("about_bytes", 0))
    known, about = (sum(pair[i] for pair in sizes.values()) for i in (0, 1))
    return Download(known, about, sum(pair == (0, 0) for pair in sizes.values()))


def stored_bytes(study: Study) -> dict[str, int]:
    """Bytes that the evaluated part of the study takes on disk, by kind; images of unknown number count as none."""
    shown = {name: study.datasets[name].images or 0 for name in study.evaluated}
    sizes = {spec.key: spec.size for spec in (study.preprocessing(m, d) for m in study.computed for d in shown)}
    cached = sum(3 * sizes[key][0] * sizes[key][1] * shown[name] for key, name in study.cached_pixels)
    embedded = [name for name, model in study.models.items() if not model.answers_in_text]
    return {
        "archives, as far as declared": sum(download_of(study, study.evaluated)[:2]),
        "weights": sum(study.models[name].weight_bytes for name in study.weighted),
        "indexes": sum(shown.values()) * INDEX_BYTES,
        f"pixel caches (at most {study.config['pixel_cache_gb']:g})": cached,
        "embeddings": sum(_images(study, m, s) for m in embedded for s in study.suites) * EMBEDDING_BYTES,
    }


def _images(study: Study, model: str, suite: str) -> int:
    """Images of a suite that a model is run on: all of them, or none where no data set of it is for the model.

    A model that answers in text is asked for each selector, in both orders of the options.
    """
    names = study.suites[suite]
    if not any(study.is_for(model, n) for n in names):
        return 0
    passes = 2 * len(study.config["lmm"]["selectors"]) if study.models[model].answers_in_text else 1
    return passes * sum(study.datasets[n].images or 0 for n in names)


def gpu_seconds(model: Model, images: int, tflops: float) -> float:
    return images * (model.gflops or 0) / (tflops * 1e3)


def job_counts(study: Study) -> dict[str, int]:
    """Jobs of the default target by rule, as a dry run of an empty checkout counts them."""
    counts: collections.Counter[str] = collections.Counter()
    counts["draw_figure"] = len(study.config["figures"])
    for rule in ("write_report", "write_cards", "all", "compare_six_factors", "evaluate_claims", "compare_published"):
        counts[rule] = 1
    if study.config["published"]:
        shifts = int(bool(study.config["shifts"]))
        counts.update(import_published=1, fit_baselines=1, fit_factors=1, summarise_shifts=shifts)
        return {rule: count for rule, count in counts.items() if count}
    metrics = [metric for metric in METRICS if study.measured(metric)]
    filters = _filters(study)
    for metric in metrics:
        counts[f"measure_{metric.removeprefix('data_')}"] = len(study.measured(metric))
    annotated = {(m, study.datasets[d].annotates) for m, d in study.measured("factors")}
    counts["measure_accuracy"] = 0
    for _, dataset in filters | annotated | set(study.measured("accuracy")):
        counts[RULE_OF_ROLE.get(study.datasets[dataset].role, "measure_accuracy")] += 1
    counts["fit_temperature"] = len({model for model, _ in study.measured("calibration")})
    counts["encode_captions"] = len(study.measured("retrieval"))
    counts["import_predictions"] = sum(
        study.answers(name, d) for name, m in study.models.items() if m.scheme == "predictions" for d in study.evaluated
    )
    counts["write_questions"] = len(study.questioned) * len(study.config["lmm"]["selectors"])
    counts["ask"] = counts["measure_choice"] = counts["compare_choice"] = len(study.asked)
    counts["measure_two_way"] = len(study.questioned) * len(study.choosers)
    counts["match_pairs"] = len(study.measured("correspondence"))
    counts["attack_images"] = len(study.attacked) * len(study.config["attacks"]["names"])
    counts["find_duplicates"] = len(study.overlap.get("datasets", ()))
    counts["choose_threshold"] = int(bool(study.overlap))
    counts["summarise_shifts"] = int(bool(study.synthetic_shifts))
    counts["gather_metric"], counts["gather_models"] = len(metrics) + bool(study.overlap), 1
    counts["fit_baselines"], counts["fit_factors"] = int("accuracy" in metrics), int("factors" in metrics)
    others = ("prompts", "choice", "retrieval", "correspondence")  # heads of their own, or none
    answering = {m for metric in metrics if metric not in others for m, _ in study.measured(metric)}
    answering |= {m for m, _ in filters}
    heads = {(m, study.prompts_of(m)) for m in answering if study.models[m].has_text_tower}
    heads |= {(m, prompts) for m, _ in study.measured("prompts") for prompts in study.prompt_sets}
    asked = [m for m in study.choosers if study.questioned and study.models[m].has_text_tower]
    heads |= {(m, study.config["lmm"]["prompts"] or study.prompts_of(m)) for m in asked}
    counts["build_heads"] = len(heads)
    searched = {(m, prompts) for m, prompts in heads if prompts in study.searches}
    counts["search_prompts"] = len(searched)
    of_scheme = collections.Counter(study.models[name].scheme for name in study.weighted)
    counts["train_mini"], counts["blend_weights"] = of_scheme["mini"], of_scheme["blend"]
    counts["fetch_weights"] = of_scheme["hub"] + of_scheme["local"]
    used = filters | annotated | {pair for metric in metrics for pair in study.measured(metric)}
    used |= {(m, study.searches[prompts]["dataset"]) for m, prompts in searched}
    used |= {(study.overlap["detector"], name) for name in study.searched}
    pixels = set()
    for suite, names in study.suites.items():
        runs = [m for m in study.computed if any((m, name) in used for name in names)]
        counts[f"embed_{suite}"] = len(runs)
        pixels |= {(study.preprocessing(m, name).key, name) for m in runs for name in names}
    counts["cache_pixels"] = len(pixels & study.cached_pixels)
    counts.update(_data_jobs(study))
    return {rule: count for rule, count in counts.items() if count}


def _filters(study: Study) -> set[tuple[str, str]]:
    """(model, pool) whose predictions choose the images of a filtered data set."""
    details = [study.datasets[name].details for name in study.evaluated]
    return {(d["filter_model"], d["pool"]) for d in details if "pool" in d}


def _data_jobs(study: Study) -> dict[str, int]:
    sources = {m.finetuned_on or m.source for m in study.models.values() if m.weights == "mini"}
    needed = {*study.evaluated, *(name for name in sources if name in study.datasets), *study.with_metric("factors")}
    needed |= {dataset for _, dataset in study.measured("correspondence")}
    needed |= {study.datasets[name].needs for name in needed} - {""}
    needed |= {part for name in needed for part in study.datasets[name].details.get("combine", {}).values()}
    entries = [study.datasets[name] for name in needed]
    fetched = [d for d in entries if not study.local(d.name)]
    spaces = {d.labels for d in entries} | set(study.base_spaces)
    spaces |= {study.base_space(d.name) for d in entries}
    spaces |= {f"{d.labels}_zero" for d in entries if d.role == "video_shift"} & set(study.label_spaces)
    return {
        "render_world": sum("world" in d.details and d.family != "mini_pairs" for d in entries),
        "combine_variations": sum(d.family == "mini_combined" for d in entries),
        "render_pairs": sum(d.family == "mini_pairs" for d in entries),
        "filter_misclassified": sum("pool" in d.details for d in entries),
        "index_dataset": sum(not d.is_rendered and not d.annotates for d in entries),
        **_annotation_jobs(study),
        "derive_dataset": sum(bool(d.derive) for d in fetched),
        "corrupt_world": sum(d.family == "mini_corrupted" for d in entries),
        "corrupt_world_3d": sum(d.family == "mini_corrupted_3d" for d in entries),
        "fetch_archive": sum(len(d.archives) for d in fetched),
        "fetch_hub": sum(bool(d.hub) for d in fetched),
        "write_label_space": len(spaces),
    }


def _annotation_jobs(study: Study) -> dict[str, int]:
    rendered = [study.datasets[name].is_rendered for name in study.with_metric("factors")]
    return {"write_mini_factors": sum(rendered), "annotate_images": len(rendered) - sum(rendered)}


def _head(study: Study) -> str:
    lines = [f"{study.name}: {study.config['title']}"]
    evaluated, demand = len(study.evaluated), len(study.datasets) - len(study.evaluated)
    lines.append(f"{len(study.models)} models; {evaluated} data sets to evaluate, {demand} more on demand")
    if study.unavailable:
        names = ", ".join(study.unavailable)
        lines.append(f"waiting for you (`python -m clip_robustness doctor` says what to do): {names}")
    return "\n".join([*lines, *study.remarks])


def _downloads(study: Study) -> str:
    demand = [name for name in study.datasets if name not in study.evaluated]
    rows: list[Sequence[Any]] = [("DOWNLOADS", "images", "GB", "about GB", "files of unknown size", "")]
    for title, names in (("evaluated", study.evaluated), ("on demand", demand)):
        for name in names:
            size, dataset = download_of(study, [name]), study.datasets[name]
            note = "yours" if study.local(name) else _waits(study, dataset)
            rows.append((name, dataset.images or "?", size.known / GB, size.about / GB, size.unknown, note))
        total = download_of(study, names)
        images = sum(study.datasets[name].images or 0 for name in names)
        rows.append((f"all {title}", images, total.known / GB, total.about / GB, total.unknown, ""))
    weights = sum(study.models[n].weight_bytes for n in study.weighted if study.models[n].scheme == "hub")
    rows.append(("weights", "", 0.0, weights / GB, 0, "4 bytes a parameter, 2 where it answers in text"))
    notes = [
        "GB: declared to the byte; about GB: declared roughly. What you have is not counted; an archive that several",
        "data sets share is counted once in a sum.",
        "On demand: `snakemake data` downloads and indexes them; no figure shows them yet.",
    ]
    return "\n".join([table(rows), *notes])


def _waits(study: Study, dataset: Dataset) -> str:
    if dataset.name not in study.unavailable:
        return ""
    return "waiting for you" + ("" if dataset.access == "open" else f" ({dataset.access.replace('_', ' ')})")


def _disk(study: Study) -> str:
    stored = stored_bytes(study)
    rows: list[Sequence[Any]] = [("DISK", "GB"), *((kind, size / GB) for kind, size in stored.items())]
    notes = [
        f"Assumed: {INDEX_BYTES} bytes a row of an index, {EMBEDDING_BYTES} bytes an image and model.",
        "A gzipped archive takes its size once more: it is unpacked to a tar beside it.",
    ]
    return "\n".join([table([*rows, ("all", sum(stored.values()) / GB)]), *notes])


def _compute(study: Study, tflops: float) -> str:
    suites = {suite: sum(study.datasets[n].images or 0 for n in names) for suite, names in study.suites.items()}
    titles = [f"{suite} ({images:,})" for suite, images in suites.items()]
    rows: list[Sequence[Any]] = [("GPU-HOURS by parameters", "models", *titles, "all")]
    smaller = 0.0
    for largest, title in SIZES:
        models = [m for m in study.models.values() if smaller < (m.params_m or 0) <= largest]
        smaller = largest
        if models:
            rows.append((title, len(models), *_hours(study, models, tflops)))
    rows.append(("all", len(study.models), *_hours(study, study.models.values(), tflops)))
    run = {(s, study.models[m].preprocessing.key) for m in study.computed for s in suites if _images(study, m, s)}
    decode, specs = sum(suites[suite] for suite, _ in run) / DECODED / 3600, len({key for _, key in run})
    notes = [
        f"The image tower's operations (column gflops of the models table), {tflops:g} TFLOP/s sustained (--tflops).",
        "In brackets: images.",
        f"Decoding: {decode:.2f} core-hours at {DECODED} images a second and core, {specs} specs once each;",
        "what the pixel caches do not hold is decoded for each model.",
    ]
    return "\n".join([table(rows), *notes])


def _hours(study: Study, models: Iterable[Model], tflops: float) -> list[float]:
    chosen = list(models)
    hours = [
        sum(gpu_seconds(m, _images(study, m.model, suite), tflops) for m in chosen) / 3600 for suite in study.suites
    ]
    return [*hours, sum(hours)]


def _jobs(study: Study) -> str:
    counts = job_counts(study)
    rows: list[Sequence[Any]] = [("JOBS of the default target", "number"), *sorted(counts.items())]
    return table([*rows, ("all rules", sum(counts.values()))])
