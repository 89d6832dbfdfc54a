"""What is here, what is missing, and what to do about it: read only, and nothing is downloaded."""

import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core.gating import waits_for_another, what_to_type
from clip_robustness.core.io import InputError, read_manifest
from clip_robustness.core.provenance import versions
from clip_robustness.core.registry import load_study
from clip_robustness.core.schema import load_yaml
from clip_robustness.core.study import Dataset, Study
from clip_robustness.data.hub import Wanted, WrongCopy
from clip_robustness.data.plan import GB, download_of, stored_bytes, table

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("numpy", "pyarrow", "pillow", "snakemake", "matplotlib", "huggingface_hub")
INFERENCE = ("torch", "open_clip_torch", "timm")


def examine(config: Path, fast: bool = False) -> bool:
    """Print the state of a study; return whether it can run.

    `fast` compares the sizes of archives and not their checksums. Paths count from the working directory, as
    Snakemake's do.
    """
    study = load_study(load_yaml(config), ROOT)
    problems: list[str] = []
    parts = [f"{study.name}: {study.config['title']}"]
    parts += [_software(study, problems), _devices(study), _hub(study, problems)]
    parts += [_disk(study, problems), _data(study, fast, problems)]
    parts += ["\n".join(study.remarks)] if study.remarks else []
    parts += _older_versions(study, problems)
    print("\n\n".join([*parts, _verdict(study, problems)]))
    return not problems


def folder_of(study: Study, kind: str) -> Path:
    """Where the study keeps its `resources` or `results`."""
    return Path(study.config["pathvars"].get(kind, kind))


def state_of_archive(study: Study, dataset: Dataset, archive: Mapping[str, Any], fast: bool) -> tuple[str, str]:
    """(state, fault) of a downloaded file: `here` when it is what the table or the lock file says."""
    path = folder_of(study, "resources") / "archives" / dataset.name / archive["file"]
    if not path.is_file():
        return "to download", ""
    wanted = Wanted.of(archive, Path(study.config["lock"]), f"{dataset.name}/{archive['file']}")
    if fast:
        size = path.stat().st_size
        wrong = wanted.bytes is not None and size != wanted.bytes
        return ("damaged", f"{path}: {size:,} bytes, expected {wanted.bytes:,}") if wrong else ("here, unchecked", "")
    try:
        wanted.check(path)
    except WrongCopy as fault:
        return "damaged", f"{path}: {fault}"
    known = wanted.sha256 or wanted.md5
    return "here, checked" if known else "here, no checksum known", ""


def _software(study: Study, problems: list[str]) -> str:
    needed = LIBRARIES if study.config["published"] else (*LIBRARIES, *INFERENCE)
    found = versions(needed)
    for name, version in found.items():
        if version == "not installed":
            problems.append(f"{name} is not installed: run `make test`, or use `snakemake --sdm conda`")
    rows: list[Sequence[Any]] = [("SOFTWARE", "version"), ("python", platform.python_version()), *found.items()]
    return table(rows)


def _older_versions(study: Study, problems: list[str]) -> list[str]:
    """What to say of embeddings that other versions of the libraries made than those that are installed."""
    folder, installed, found = folder_of(study, "results") / "embeddings", versions(INFERENCE), Counter[str]()
    for path in (path for model in study.computed for path in sorted((folder / model).glob("*.json"))):
        try:
            made = read_manifest(path, model=str).get("versions", {})
        except InputError as fault:
            problems.append(str(fault))
            continue
        old = [f"{name} {made[name]}" for name in INFERENCE if made.get(name) not in (None, installed[name])]
        found.update([" and ".join(old)] if old else [])
    kept = f"they are kept; to make them again, delete {folder}"
    return [f"{n} embeddings were made by {old}, which is not installed now: {kept}" for old, n in found.items()]


def _devices(study: Study) -> str:
    gpus = _gpus() if study.config["device"] == "auto" else []
    cores = os.cpu_count()
    rows: list[Sequence[Any]] = [("DEVICES", ""), *((f"GPU {i}", gpu) for i, gpu in enumerate(gpus))]
    return table([*rows, ("CPU", f"{cores} cores"), *([] if gpus else [("GPU", "none: the CPU is used")])])


def _gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return run.stdout.split("\n")[:-1] if run.returncode == 0 else []


def _hub(study: Study, problems: list[str]) -> str:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    rows: list[Sequence[Any]] = [("WEIGHTS", "", "")]
    rows.append(("hub cache", str(cache), "here" if cache.is_dir() else "not there yet"))
    rows.append(("hub offline", "yes (HF_HUB_OFFLINE)" if offline else "no", ""))
    waiting = []
    for name in study.weighted:
        model = study.models[name]
        _, _, place = model.weights.partition(":")
        here = (folder_of(study, "resources") / "weights" / name / "manifest.json").is_file()
        if model.scheme == "local" and not here and not Path(place).expanduser().exists():
            problems.append(f"model {name}: its weights {place} do not exist")
        if not here:
            waiting.append(model)
    size = sum(m.weight_bytes for m in waiting) / GB
    rows.append(("models", f"{len(study.models) - len(waiting)} here, {len(waiting)} to come", f"about {size:.1f} GB"))
    return table(rows)


def _disk(study: Study, problems: list[str]) -> str:
    folders = [folder_of(study, kind) for kind in ("resources", "results")]
    there = sum(_bytes_below(folder) for folder in folders)
    needed = max(0, sum(stored_bytes(study).values()) - there)
    free = shutil.disk_usage(_nearest(folders[0])).free
    rows: list[Sequence[Any]] = [("DISK", "GB"), ("free", free / GB), ("there already", there / GB)]
    rows.append(("still needed, about", needed / GB))
    if needed > free:
        lacking = f"{needed / GB:,.1f} GB are still needed and {free / GB:,.1f} are free"
        problems.append(f"{folders[0].absolute()}: {lacking}; make room, or link resources/ and results/ elsewhere")
    unknown = download_of(study, study.evaluated).unknown
    return table(rows) + (f"\n{unknown} archives of unknown size are not counted." if unknown else "")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _nearest(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _data(study: Study, fast: bool, problems: list[str]) -> str:
    rows: list[Sequence[Any]] = [("DATA", "state", "licence")]
    for name, dataset in {**study.datasets, **study.skipped}.items():
        state, faults = _state(study, dataset, fast)
        problems += faults
        on_demand = name in study.datasets and not study.metrics_of(name)
        rows.append((name, state + " (on demand)" * on_demand, dataset.licence))
    return table(rows)


def _state(study: Study, dataset: Dataset, fast: bool) -> tuple[str, list[str]]:
    name = dataset.name
    if name in study.skipped:
        return "left out", []
    if local := study.local(name):
        gone = [path for path in local if not Path(path).exists()]
        return (
            ("yours, not found", [f"local.{name}: {path}: no such file or folder" for path in gone])
            if gone
            else (
                "yours",
                [],
            )
        )
    if name in study.unavailable:
        return "waiting for you", []
    if dataset.is_rendered or dataset.derive:
        return "made here", []
    if dataset.hub:
        here = (folder_of(study, "resources") / "hub" / name / "manifest.json").is_file()
        return "here, checked when it came" if here else "to download", []
    found = [state_of_archive(study, dataset, archive, fast) for archive in dataset.archives]
    remedy = "delete it, and the next run fetches it again"
    faults = [f"{fault}; {remedy}" for _, fault in found if fault]
    return ", ".join(sorted({state for state, _ in found})), faults


def _verdict(study: Study, problems: list[str]) -> str:
    missing = study.unavailable
    blocking = [name for name in missing if study.metrics_of(name)]
    lines = []
    if missing:
        own = [name for name in missing if not waits_for_another(study, name)]
        notes = [f"  {name}: {missing[name].details.get('note', missing[name].licence)}" for name in own]
        lines = ["WAITING FOR YOU", *notes, "Type into the study's config file, with your own paths:"]
        lines += [*what_to_type(study, own), ""]
    if blocking:
        figures = {figure for name in blocking for figure in study.figures_of(name)}
        shown = ", ".join(f for f in study.config["figures"] if f in figures)
        instead = "`--config skip_unavailable=true` plans without them"
        problems.append(f"{', '.join(blocking)}: not available, and needed for {shown}; {instead}")
    if problems:
        return "\n".join([*lines, "THIS STUDY CANNOT RUN", *(f"  {problem}" for problem in problems)])
    return "\n".join([*lines, "This study can run."])
