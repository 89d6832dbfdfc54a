"""One attack on one model: which images, the victim with its head inside, shards that outlive a killed job.

Attacks work on points: pixels in [0, 1], or, with `eps_space: normalized`, what CLIP's Normalize makes of them, in the
box [-1.8, 2.15]. The latter is the released code of RoZ (arXiv 2403.10499): its 8/255 are about 2.1/255 of a pixel, and
pixels may leave [0, 1] by a little. The model's own normalisation, its head and its logit scale are always inside.
Everything is float32.
"""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clip_robustness.core import io, provenance
from clip_robustness.core.archive import ArchiveReader, load_index
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import alone
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.attack_settings import Settings
from clip_robustness.inference.attacks import Problem, run_attack
from clip_robustness.inference.embed import CPU_BATCH
from clip_robustness.inference.gradients import Scores
from clip_robustness.inference.images import decode, preprocess
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import device_of
from clip_robustness.inference.pixels import Streamed
from clip_robustness.inference.victims import SPACES, Victim, in_space, to_space

SHARD = 50  # images: what a killed job loses
GPU_BATCH = 256
NUMBERS = tuple(
    f"inference.{name}" for name in ("attack", "attack_settings", "attacks", "gradients", "victims", "load")
)
SHOWN = 3


def attack_images(
    model: str,
    attack: str,
    library: str,
    preprocess: str,
    weights: Path,
    index: Path,
    labels: Path,
    settings: Mapping[str, Any],
    out: Path,
    work: Path,
    images: int = 1000,
    ids: Path | None = None,
    seed: int = 0,
    head: Path | None = None,
    substitute: Mapping[str, Any] | None = None,
    eps_space: str = "pixel",
    *,
    batch_size: int | str = "auto",
    workers: int = 1,
) -> None:
    """Attack `images` images of `index`; write `out` (.parquet), a row an image, and its manifest (.json) last.

    Columns: image_id, label, clean (answer without attack), distance (norm of the smallest perturbation found, in the
    attack's norm and space; 0 where `clean` is wrong, inf for none), prediction (the answer there, -1 for none), fault
    (0 none, 1 zero gradient, 2 not finite), queries (forward passes of the victim).
    settings: see `Settings`. ids: a file of image ids to take the first of; without one, a choice by the hash of `seed`
    and id, balanced over classes, of which a smaller number is a part. substitute: the model whose gradients a transfer
    follows (`weights`, `library`, `preprocess`, perhaps `head`). workers: threads that decode.
    Errors: `InputError` for settings, ids, labels, weights or heads that are wrong or do not belong together.
    """
    made = Settings.parse(attack, settings)
    substitute = substitute or None
    if made.substitute != (substitute is not None):
        needs = "needs a substitute model" if made.substitute else "takes no substitute model"
        raise InputError(f"attack '{attack}' {needs}")
    if eps_space not in SPACES:
        raise InputError(f"eps_space is '{eps_space}', expected {' or '.join(SPACES)}")
    spec = Preprocessing.parse(preprocess)
    members = read_members(labels)
    columns = load_index(index)
    rows = choose(columns, images, seed, index, ids)
    if columns["label"][rows].max() >= len(members):
        raise InputError(f"{index}: has a label beyond the {len(members)} classes of {labels}")
    everyone = columns["image_id"].tolist()
    chosen = [everyone[row] for row in rows]
    models = [{"library": library, "preprocess": preprocess, "weights": weights, "head": head}]
    models += [{"head": None, **substitute}] if substitute else []
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # not covered by the line above
    torch.backends.cudnn.deterministic = True
    with lease() as leased:
        device = device_of(leased)
        identity = {
            "settings": dataclasses.asdict(made),
            "models": [_facts(facts) for facts in models],
            "eps_space": eps_space,
            "seed": seed,
            "members": members,
            "n": len(rows),
            "ids_sha256": io.ids_digest(chosen),
            "images": Streamed(index, spec.pixel_spec).facts,
            "labels_sha256": io.digest(columns["label"][rows].tolist()),
            "device": device.type,
            "code": provenance.code_hash(*NUMBERS, imports=False),
            "versions": provenance.versions(["torch", "open_clip_torch", "timm", "numpy"]),
        }
        folder = work / io.digest(identity)[:32]
        with alone(folder):  # a model of another name may have the same weights
            if (manifest := io.sealed(folder)) is None:
                todo = _Work(models, members, made, eps_space, device, batch_size, seed)
                whole = folder / "attacked.parquet"
                if not whole.is_file():
                    shards = _attack_shards(todo, columns, rows, spec, folder, f"{attack} on {model}", workers)
                    _join(whole, shards)
                for shard in folder.glob("shard-*"):
                    shard.unlink()
                manifest = io.seal(folder, **identity)
        budgets = [made.radius(budget) for budget in made.budgets]
        io.place(folder / "attacked.parquet", out)
        facts = {"model": model, "attack": attack, "dataset": index.stem, "norm": made.norm, "budgets": budgets}
        io.write_json(out.with_suffix(".json"), {**manifest, **facts, "reported": made.radius(made.reported)})


def _facts(model: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a model's logits."""
    head = None if model["head"] is None else io.sha256_file(model["head"])
    facts = {"library": model["library"], "preprocess": str(Preprocessing.parse(model["preprocess"])), "head": head}
    return {**facts, "weights": io.check_sealed(Path(model["weights"]))["files"]}


def read_members(labels: Path) -> list[list[int]]:
    """For each class of a label space the base classes that it pools.

    Errors: `InputError` for a space that averages probabilities: its score is not a logit.
    """
    space = io.read_json(labels)
    if space["pool"] != "max" or not all(space["members"]):
        raise InputError(f"{labels}: pools by {space['pool']}; only one that pools base classes by max can be attacked")
    return space["members"]


def choose(columns: Mapping[str, Any], n: int, seed: int, index: Path, ids: Path | None = None) -> np.ndarray:
    """Rows of an index to attack, int64 [n] ascending: the first `n` that `ids` lists, or a balanced choice.

    `ids` holds an image id a line, or a number for the image whose id ends with it (15253: ILSVRC2012_val_00015253);
    '#' begins a comment. Without it, the images of every class are ordered by the hash of `seed` and id, and the first
    of each class is taken, then the second.
    Errors: `InputError` for an id that the index has not, and where no labelled image is left.
    """
    known = columns["image_id"].tolist()
    if ids is not None:
        rows = _listed(ids, known, index)[:n]
        without = [known[row] for row in rows if columns["label"][row] < 0]
        if without:
            raise InputError(f"{ids}: {len(without):,} of these images have no label in {index}, such as {without[0]}")
    else:
        classes: dict[int, list[tuple[str, int]]] = {}
        for row, (image_id, label) in enumerate(zip(known, columns["label"].tolist(), strict=True)):
            if label >= 0:
                key = hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()
                classes.setdefault(label, []).append((key, row))
        turns = [(turn, key, row) for each in classes.values() for turn, (key, row) in enumerate(sorted(each))]
        rows = [row for _, _, row in sorted(turns)[:n]]
    if not rows:
        raise InputError(f"{ids or index}: holds no labelled image to attack")
    return np.sort(np.array(rows, np.int64))


def _listed(ids: Path, known: Sequence[str], index: Path) -> list[int]:
    try:
        lines = [line.partition("#")[0].strip() for line in ids.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{ids}: cannot read this list of images ({error})") from None
    rows = {image_id: row for row, image_id in enumerate(known)}
    for row, image_id in enumerate(known):
        digits = image_id[len(image_id.rstrip("0123456789")) :]
        rows.setdefault(str(int(digits)) if digits else image_id, row)
    wanted = [line for line in lines if line]
    missing = [line for line in wanted if line not in rows]
    if missing:
        raise InputError(f"{ids}: {len(missing):,} of its images are not in {index}, such as {missing[:SHOWN]}")
    return list(dict.fromkeys(rows[line] for line in wanted))


def read_pixels(columns: Mapping[str, Any], rows: np.ndarray, spec: Preprocessing, workers: int = 1) -> np.ndarray:
    """The images of `rows`, uint8 [n, h, w, 3]. Errors: `InputError` for one that cannot be read."""

    def decoded(data: bytes, row: int) -> np.ndarray:
        return preprocess(decode(data, columns["archive"][row], columns["image_id"][row]), spec)

    where = ("archive", "offset", "size", "image_id", "codec")
    with ArchiveReader() as reader, concurrent.futures.ThreadPoolExecutor(workers) as threads:
        data = [reader.read(**{name: columns[name][row] for name in where}) for row in rows.tolist()]
        return np.stack(list(threads.map(decoded, data, rows.tolist())))


class _Work(NamedTuple):
    """What is attacked and how, whichever the images."""

    models: Sequence[Mapping[str, Any]]  # the victim, and the substitute if there is one
    members: Sequence[Sequence[int]]
    settings: Settings
    space: str
    device: torch.device
    batch_size: int | str
    seed: int


def _attack_shards(
    todo: _Work,
    columns: Mapping[str, Any],
    rows: np.ndarray,
    spec: Preprocessing,
    folder: Path,
    what: str,
    workers: int,
) -> list[Path]:
    size = {"cuda": GPU_BATCH, "cpu": CPU_BATCH}[todo.device.type] if todo.batch_size == "auto" else todo.batch_size
    victims = (Victim(model, todo.members, todo.device) for model in todo.models)
    scores = [Scores(in_space(victim, todo.space), todo.device, int(size)) for victim in victims]
    progress, shards = io.Progress(what, len(rows)), []
    for start in range(0, len(rows), SHARD):
        part = rows[start : start + SHARD]
        shards.append(folder / f"shard-{start:09d}.parquet")
        if shards[-1].is_file():
            progress.skip(len(part))
            continue
        given = {name: columns[name][part] for name in ("image_id", "label")}
        found = _attack_shard(todo, scores, read_pixels(columns, part, spec, workers), **given)
        io.write_parquet(shards[-1], {**given, **found})
        progress.update(len(part))
    return shards


def _attack_shard(
    todo: _Work, scores: Sequence[Scores], pixels: np.ndarray, image_id: np.ndarray, label: np.ndarray
) -> dict[str, np.ndarray]:
    points = to_space(torch.from_numpy(pixels).to(todo.device).permute(0, 3, 1, 2).float() / 255, todo.space)
    seeds = [int(io.digest(todo.seed, name)[:15], 16) for name in image_id.tolist()]
    labels = torch.from_numpy(label.astype(np.int64)).to(todo.device)
    problem = Problem(scores[0], scores[-1], points, labels, seeds, SPACES[todo.space])
    outcome = run_attack(problem, todo.settings)
    kinds = {"clean": "int32", "distance": "float32", "prediction": "int32", "fault": "int8", "queries": "int64"}
    return {name: getattr(outcome, name).cpu().numpy().astype(kind) for name, kind in kinds.items()}


def _join(path: Path, shards: Sequence[Path]) -> None:
    parts = [io.read_parquet(shard) for shard in shards]
    io.write_parquet(path, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
