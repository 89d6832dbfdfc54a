"""Where a report's numbers come from: command, config, versions, hashes of tables, data and weights; and the run.

What the config and the tables decide is the same whenever the page is written. Commit, machine, time and energy are
not, so they stand in one element of their own (`run`), which says so.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from clip_robustness.core import io, provenance
from clip_robustness.report import markup

_LIBRARIES = ("clip-robustness", "matplotlib", "numpy", "pandas", "scipy", "snakemake")
# For the estimate of energy: of a busy core, and of a GPU in use, in watts, of servers of the 2020s.
CORE_WATTS, GPU_WATTS = 10, 300


def sections(study: str, config: Mapping[str, Any], tables: Mapping[str, Path], results: Path | None) -> list[str]:
    """Markup of the provenance of a page. `results`: the study's folder, of which manifests and times are read."""
    chosen = "" if study == "paper" else f"--configfile config/{study}.yaml "
    written = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)
    manifests = _manifests(results)
    digests = [(name, io.sha256_file(path)) for name, path in sorted(tables.items())]
    found = provenance.versions(_LIBRARIES)
    parts = [
        f"<pre>{markup.text(f'snakemake {chosen}--cores all')}</pre>",
        f"<details><summary>The config, with its defaults</summary><pre>{markup.text(written)}</pre></details>"
        if config
        else "",
        _folded("Tables that this page was made from", pd.DataFrame(digests, columns=["table", "sha256"])),
        _folded("Versions of libraries", pd.DataFrame(list(found.items()), columns=["library", "version"])),
        _folded("Images of the data sets", _images(manifests)),
        _folded("Weights and how they were run", _weights(manifests)),
    ]
    return [part for part in [*parts, _run(results, manifests)] if part]


def _folded(title: str, frame: pd.DataFrame) -> str:
    if not len(frame):
        return ""
    table = markup.table(title, frame)
    return f"<details><summary>{markup.text(title)}</summary>{table}</details>"


def _manifests(results: Path | None) -> list[dict[str, Any]]:
    """Those of the embeddings, in order of model and data set; none where a study has none."""
    found = [io.read_json(path) for path in _files(results, "embeddings/*/*.json")]
    return [manifest for manifest in found if {"model", "dataset", "ids_sha256"} <= set(manifest)]


def _files(results: Path | None, pattern: str) -> list[Path]:
    return sorted(results.glob(pattern)) if results else []


def _images(manifests: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    kept = {(m["dataset"], m["ids_sha256"], m.get("n")) for m in manifests}
    rows = sorted(kept, key=lambda row: (row[0], row[1]))
    return pd.DataFrame(rows, columns=["data set", "sha256 of the ordered image ids", "images"])


def _weights(manifests: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    rows = {}
    for manifest in manifests:
        files = manifest.get("weights") or {}
        tensors = [digest for name, digest in sorted(files.items()) if name.endswith(".safetensors")]
        versions = ", ".join(f"{name} {value}" for name, value in sorted((manifest.get("versions") or {}).items()))
        rows[manifest["model"]] = (
            *(manifest["model"], ", ".join(tensors) or "none", manifest.get("precision", "")),
            *(manifest.get("preprocess", ""), versions),
        )
    return pd.DataFrame(
        list(rows.values()), columns=["model", "sha256 of the weights", "precision", "preprocessing", "versions"]
    )


def _run(results: Path | None, manifests: Iterable[Mapping[str, Any]]) -> str:
    """What differs from run to run: commit, machine, time, energy."""
    facts = [("commit", _commit()), ("this page was written on", _machine())]
    devices = sorted({str(m["device"]) for m in manifests if m.get("device")})
    times = _times(results)
    on_gpu = any(device != "cpu" for device in devices)
    if len(times):
        core, wall = times["core hours"].sum(), times["hours"].sum()
        energy = core * CORE_WATTS / 1000 + (wall * GPU_WATTS / 1000 if on_gpu else 0)
        with_gpu = f" and {GPU_WATTS} W a GPU in use" if on_gpu else ""
        facts += [
            ("models ran on", ", ".join(devices) or "unknown"),
            ("time of the timed jobs", f"{wall:.2f} hours, {core:.2f} core hours"),
            ("energy", f"about {_amount(energy)}, estimated at {CORE_WATTS} W a busy core{with_gpu}"),
        ]
    listed = "".join(f"<dt>{markup.text(name)}</dt><dd>{markup.text(value)}</dd>" for name, value in facts)
    table = _folded("Time by rule", times.round(4)) if len(times) else ""
    return (
        '<section id="run"><h3>This run</h3><p class="soft">What follows differs from run to run; no table depends on '
        f"it. Timed are the jobs that run models.</p><dl>{listed}</dl>{table}</section>"
    )


def _amount(kwh: float) -> str:
    return f"{kwh:.3g} kWh" if kwh >= 1 else f"{1000 * kwh:.2g} Wh"


def _commit() -> str:
    root = provenance.ROOT.parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:
            return "not a checkout"
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + (", with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{platform.system()}, {processor}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _times(results: Path | None) -> pd.DataFrame:
    """Jobs, hours, core hours and the largest memory of every rule that Snakemake has timed."""
    rows = []
    for folder in _files(results, "benchmarks/*"):
        files = sorted(folder.rglob("*.tsv"))
        frames = [pd.read_csv(path, sep="\t", na_values="-").head(1) for path in files]
        timed = pd.concat(frames) if frames else pd.DataFrame()
        if {"s", "cpu_time", "max_rss"} <= set(timed.columns):
            hours, core = timed["s"].sum() / 3600, timed["cpu_time"].sum() / 3600
            rows.append((folder.name, len(timed), hours, core, timed["max_rss"].max() / 1024))
    return pd.DataFrame(rows, columns=["rule", "jobs", "hours", "core hours", "largest memory, GiB"])
