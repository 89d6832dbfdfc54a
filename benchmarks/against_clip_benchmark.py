"""Side by side with LAION CLIP_benchmark 1.6.2, on the same files, model and machine.

    python benchmarks/against_clip_benchmark.py --work FOLDER [--images 2000] [--classes 100] [--templates 80]
        [--second-templates 7] [--sets 3] [--own-classes] [--repeats 1] [--precisions fp32 default]

It makes all that it needs in FOLDER and keeps it for the next run: webdataset sets of photo-like JPEGs of 500x375,
one shard each; a ViT-B/32 with random weights; a virtual environment with CLIP_benchmark and this environment's
torch. Then, by turns, in fp32 and in each side's default precision (bf16 on a CPU for both where it has it):

* first evaluation: `clip_benchmark eval` over all sets, against `snakemake RESULTS/tables/accuracy.parquet` from
  nothing (index, decode, heads, embed, measure);
* second prompt set: `clip_benchmark eval` with other templates, against the study with another `prompts: default`;
* new metric: CLIP_benchmark keeps neither features nor predictions, so its time is that of the evaluation before
  once more; this project runs `snakemake RESULTS/tables/calibration.parquet`.

Times are wall time of whole commands. The sets share their class names, as ImageNet and its shifts do;
with --own-classes each has its own. CLIP_benchmark runs through its own `main`; three of its functions are wrapped
to note their time and the logits, which it would throw away. FOLDER/results.json and results.md hold the outcome.
"""

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from side_by_side import ARCHITECTURE, ENVIRONMENT, PREPROCESS, Setup, prepare, processor, version_of

from clip_robustness.core import io
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.core.study import Model
from clip_robustness.inference import heads, images

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 256  # images on which the parts are timed
CORES = os.cpu_count() or 1
# precision -> CLIP_benchmark's options, and `precision` of a study
PRECISIONS: dict[str, tuple[list[str], str]] = {"fp32": (["--no_amp"], "fp32"), "default": ([], "auto")}
# what is evaluated, by which prompts, and the table that is asked for
EVALUATIONS = (
    ("first evaluation", "first", "accuracy"),
    ("second prompt set", "second", "accuracy"),
    ("new metric", "second", "calibration"),
)

# Runs in CLIP_benchmark's environment, by its own command-line interface.
RECORDER = """
import functools, json, sys, time
import numpy as np
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification as metric

out, seconds = sys.argv.pop(1), []

def timed(module, name, keep=False):
    function = getattr(module, name)
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append((name, time.perf_counter() - start))
        if keep:
            done = sum(part == name for part, _ in seconds) - 1
            np.savez(f"{out}/{done}.npz", logits=result[0].numpy(), labels=result[1].numpy())
        return result
    setattr(module, name, wrapper)

timed(cli, "load_clip")
timed(metric, "zero_shot_classifier")
timed(metric, "run_classification", keep=True)
cli.main()
json.dump(seconds, open(f"{out}/seconds.json", "w"))
"""


def run_theirs(setup: Setup, precision: str, prompts: str) -> dict[str, Any]:
    """Wall seconds, seconds of its parts, and logits and labels of every set."""
    out = setup.work / "theirs" / f"{prompts}-{precision}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    names = [f"wds/{name}" for name in setup.sets]
    command = [setup.environment / "bin/python", "-c", RECORDER, out, "eval", "--dataset", *names]
    command += ["--dataset_root", setup.folder(prompts) / "{dataset}", "--task", "zeroshot_classification"]
    command += ["--model", ARCHITECTURE, "--pretrained", setup.model / "open_clip_model.safetensors"]
    command += ["--num_workers", "1", "--batch_size", "64", "--output", out / "{dataset}.json"]
    command += PRECISIONS[precision][0]
    start = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        run = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    seconds = time.perf_counter() - start
    if run.returncode:
        sys.exit(f"clip_benchmark failed; see {out / 'log.txt'}")
    parts: dict[str, float] = {}
    for name, part in io.read_json(out / "seconds.json"):
        parts[name] = parts.get(name, 0.0) + part
    answers = []
    for k, name in enumerate(setup.sets):
        with np.load(out / f"{k}.npz") as file:
            answers.append((file["logits"], file["labels"]))
        said, (logits, labels) = io.read_json(out / f"{name}.json")["metrics"]["acc1"], answers[-1]
        ties = logits == logits.max(axis=1, keepdims=True)  # bf16 has many, and top-k may take any of them
        best = ties[np.arange(len(labels)), labels]
        if not (best & (ties.sum(axis=1) == 1)).mean() - 1e-9 <= said <= best.mean() + 1e-9:
            sys.exit(f"{out / name}.json: its accuracy is not that of the logits noted")
    return {"seconds": seconds, "parts": parts, "answers": answers}


def write_study(setup: Setup, precision: str, prompts: str) -> Path:
    """A study's four files, as a user would write them."""
    folder = setup.work / "ours" / precision
    (folder / "config").mkdir(parents=True, exist_ok=True)
    values = {"model": "random", "title": "Random ViT-B/32", "library": "open_clip", "architecture": ARCHITECTURE}
    values |= {"weights": f"local:{setup.model}", "preprocess": PREPROCESS, "group": "clip_zero_shot", "family": "vit"}
    values |= {"source": "none", "finetuning": "none", "loss": "softmax", "params_m": "151.28", "gflops": "8.73"}
    values |= {"image_size": "224", "licence": "none", "listed": "own"}
    columns = [field.name for field in dataclasses.fields(Model)]
    line = "\t".join(values.get(column, "") for column in columns)
    (folder / "config/models.tsv").write_text("\t".join(columns) + "\n" + line + "\n")
    shared = len(set(map(tuple, setup.classes.values()))) == 1
    spaces = {name: setup.sets[0] if shared else name for name in setup.sets}
    entry = {"title": "Noise", "family": "webdataset", "suite": "all", "sets": ["all"], "licence": "none"}
    roles = ["id", *["natural_shift"] * (len(setup.sets) - 1)]
    datasets = {n: {**entry, "labels": spaces[n], "role": r} for n, r in zip(setup.sets, roles, strict=True)}
    document = {"label_spaces": {spaces[n]: {"classes": setup.classes[n]} for n in setup.sets}, "datasets": datasets}
    (folder / "config/datasets.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (folder / "config/prompts.yaml").write_text(yaml.safe_dump(setup.prompts, sort_keys=False))
    tables = {name: f"{folder}/config/{name}" for name in ("models.tsv", "datasets.yaml", "prompts.yaml")}
    study = {
        "study": "side_by_side",
        "title": "Side by side",
        "pathvars": {"results": "results", "figures": "figures", "resources": "resources", "logs": "logs"},
        "models": {"table": tables["models.tsv"], "names": ["random"]},
        "datasets": {"table": tables["datasets.yaml"], "sets": ["all"]},
        "prompts": {"table": tables["prompts.yaml"], "default": prompts},
        "local": {name: str(setup.folder("first") / name) for name in setup.sets},
        "figures": [],
        "precision": PRECISIONS[precision][1],
        "threads": CORES,
    }
    (folder / "config/study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def run_ours(setup: Setup, precision: str, prompts: str, table: str, fresh: bool = False) -> dict[str, Any]:
    """Wall seconds, when each job ran, and the predictions of every set."""
    if fresh:
        shutil.rmtree(setup.work / "ours" / precision, ignore_errors=True)
    folder = write_study(setup, precision, prompts)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--configfile", str(folder / "config/study.yaml"), "--cores", str(CORES)]
    command += ["--", f"results/tables/{table}.parquet"]
    start = time.perf_counter()
    with (folder / f"{prompts}-{table}.log").open("w") as log:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.stdout is not None
        jobs = list(job_times(run.stdout, log.write, start))
    if run.wait():
        sys.exit(f"snakemake failed; see {log.name}")
    seconds = time.perf_counter() - start
    answers = []
    for name in setup.sets:
        found = io.read_parquet(folder / f"results/predictions/random/{name}.parquet")
        order = np.argsort(found["image_id"])  # as they lie in the shard
        answers.append((found["prediction"][order], found["label"][order]))
    return {"seconds": seconds, "jobs": jobs, "answers": answers}


def job_times(lines: Iterable[str], keep: Callable[[str], Any], zero: float) -> Iterator[tuple[str, float, float]]:
    """(rule, start, end) in seconds since `zero`, as Snakemake tells of its jobs."""
    started: dict[str, float] = {}
    for line in lines:
        keep(line)
        now = time.perf_counter() - zero
        if match := re.match(r"\s+jobid: (\d+)", line):
            started[match[1]] = now
        elif match := re.match(r"Finished jobid: (\d+) \(Rule: (\w+)\)", line):
            yield match[2], started[match[1]], now


def parts_of_ours(setup: Setup, precision: str, first: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Where the first evaluation's time goes: (part, wall seconds, how it was found).

    Decode, resize, forward and text are timed apart, on a sample or whole, by the functions that the jobs
    call; forward is open_clip's own.
    """
    folder = setup.work / "ours" / precision
    index = io.read_parquet(folder / f"resources/index/{setup.sets[0]}.parquet")
    n, total = min(SAMPLE, len(index["size"])), len(setup.sets) * len(index["size"])
    spec = Preprocessing.parse(PREPROCESS)
    assert spec.mean is not None and spec.std is not None
    data = []
    with Path(index["archive"][0]).open("rb") as file:
        for offset, size in zip(index["offset"][:n], index["size"][:n], strict=True):
            file.seek(offset)
            data.append(file.read(size))
    decode, decoded = clock(lambda: [images.decode(one, "shard", "image") for one in data])
    resize, arrays = clock(lambda: np.stack([images.preprocess(image, spec) for image in decoded]))
    write, _ = clock(lambda: io.save_array(folder / "sample.npy", arrays))
    checksum, _ = clock(lambda: io.sha256_file(folder / "sample.npy"))
    model = open_clip.create_model(ARCHITECTURE, pretrained=str(setup.model / "open_clip_model.safetensors")).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (spec.mean, spec.std))
    batch = (torch.from_numpy(arrays).permute(0, 3, 1, 2).float() - mean) / std
    dtype = io.read_json(folder / f"results/embeddings/random/{setup.sets[0]}.json")["precision"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model.encode_image(batch[:8])  # the first call sets libraries up
        forward, _ = clock(lambda: model.encode_image(batch))
    with torch.inference_mode():
        tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        spaces = dict.fromkeys(map(tuple, setup.classes.values()))
        tokens = [heads.tokenize(tokenizer, setup.prompts["first"], names) for names in spaces]
        text, _ = clock(lambda: [heads.class_weights(model, one) for one in tokens])
    times = total / n
    rows = [
        ("decode", decode * times / CORES, f"{n} images, {CORES} processes"),
        ("resize and crop", resize * times / CORES, f"{n} images, {CORES} processes"),
        ("forward", forward * times, f"{n} images, {dtype}"),
        ("text", text, f"{len(spaces) * len(setup.prompts['first']) * len(next(iter(spaces))):,} prompts"),
        ("write and checksum of pixels", (write + checksum) * times, f"{n} images"),
    ]
    rest = first["seconds"] - sum(row[1] for row in rows)
    return [*rows, ("overhead: Snakemake, imports, weights, metrics", rest, "the rest"), ("all", first["seconds"], "")]


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def agreement(exact: dict[str, Any], other: dict[str, Any]) -> tuple[str, int, str]:
    """Predictions that are the same as those of `exact`, of how many classes they are, and how close the others are."""
    same = total = 0
    gap, seen = 0.0, set()
    for (logits, labels), (given, known) in zip(exact["answers"], other["answers"], strict=True):
        if not np.array_equal(labels, known):
            sys.exit("the two sides did not see the same images in the same order")
        prediction = given if given.ndim == 1 else given.argmax(1)
        same += int((logits.argmax(1) == prediction).sum())
        total += len(labels)
        gap = max(gap, float((logits.max(1) - logits[np.arange(len(labels)), prediction]).max()))
        seen |= set(prediction.tolist())
    return f"{same:,} of {total:,} ({100 * same / total:.2f} %)", len(seen), f"{gap:.2g}" if same < total else ""


def table(header: str, rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; seconds with one decimal."""
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]
    cells = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def jobs_of(run: dict[str, Any]) -> Iterator[tuple[str, str, str, int, float]]:
    """A rule's jobs and their seconds in one evaluation; jobs of one rule may run side by side."""
    jobs, what = run["jobs of ours"], (run["evaluation"], run["precision"])
    yield *what, "Snakemake, to the first job", 0, min(start for _, start, _ in jobs)
    for rule in dict.fromkeys(rule for rule, _, _ in jobs):
        spans = [end - start for name, start, end in jobs if name == rule]
        yield *what, rule, len(spans), sum(spans)


def compare(
    setup: Setup, repeats: int, precisions: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], tuple[Any, Any]]]:
    """Every evaluation by both sides, by turns; and (theirs, ours) of each prompt set and precision, last repeat."""
    rows, last = [], {}
    for repeat, precision in itertools.product(range(repeats), precisions):
        for evaluation, prompts, metric in EVALUATIONS:
            ours = run_ours(setup, precision, prompts, metric, fresh=evaluation == EVALUATIONS[0][0])
            if metric == "accuracy":
                last[prompts, precision] = run_theirs(setup, precision, prompts), ours
            theirs = last[prompts, precision][0]  # a new metric costs CLIP_benchmark the whole evaluation again
            row = {"evaluation": evaluation, "precision": precision, "repeat": repeat}
            row |= {"theirs": theirs["seconds"], "ours": ours["seconds"], "ratio": theirs["seconds"] / ours["seconds"]}
            print(row, flush=True)
            rows.append({**row, "parts of theirs": theirs["parts"], "jobs of ours": ours["jobs"]})
    return rows, last


def details(setup: Setup, last: dict[tuple[str, str], tuple[Any, Any]]) -> Iterator[str]:
    rows = []
    for prompts in setup.prompts:
        runs = {precision: last[prompts, precision] for precision in PRECISIONS if (prompts, precision) in last}
        first = next(iter(runs))
        named = {f"this project, {precision}": ours for precision, (_, ours) in runs.items()}
        named |= {
            f"CLIP_benchmark, {precision}": theirs for precision, (theirs, _) in runs.items() if precision != first
        }
        rows += [(prompts, name, *agreement(runs[first][0], other)) for name, other in named.items()]
    yield table(
        "prompts | side | same top-1 as CLIP_benchmark (in fp32 if run) | classes | where not, logits apart at most",
        rows,
    )
    for precision in (precision for precision in PRECISIONS if ("first", precision) in last):
        theirs, ours = last["first", precision]
        yield table(
            f"first evaluation, {precision}, this project | s | found by", parts_of_ours(setup, precision, ours)
        )
        yield table(f"first evaluation, {precision}, CLIP_benchmark | s", theirs["parts"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; 3 GB")
    for name, default in (("images", 2000), ("classes", 100), ("templates", 80), ("second-templates", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--own-classes", action="store_true", help="no two sets share their classes")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    setup = prepare(options)
    distributions = ("torch", "torchvision", "open_clip_torch", "pillow", "numpy", "snakemake")
    facts = {
        "size": f"{options.sets} sets of {options.images:,} images, {options.classes} classes"
        f"{' each its own' * options.own_classes}, {options.templates} and {options.second_templates} templates",
        "processor": f"{processor()}, {CORES} cores, load {os.getloadavg()[0]:.1f} at the start",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in distributions),
    }
    rows, last = compare(setup, options.repeats, options.precisions)
    io.write_json(setup.work / "results.json", {"facts": facts, "options": vars(options), "runs": rows})
    columns = ("evaluation", "precision", "theirs", "ours", "ratio")
    timed = table(
        "evaluation | precision | CLIP_benchmark s | this project s | ratio", ([r[c] for c in columns] for r in rows)
    )
    jobs = table("evaluation | precision | rule | jobs | s", (job for run in rows for job in jobs_of(run)))
    text = "\n".join([*(f"{key}: {value}\n" for key, value in facts.items()), timed, *details(setup, last), jobs])
    io.write_text(setup.work / "results.md", text)
    print(text)


if __name__ == "__main__":
    main()
