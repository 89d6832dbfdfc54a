"""`attack_images`: which images, the head inside, shards that outlive a killed job, and inputs that do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clip_robustness
from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import attack as module
from clip_robustness.inference.attack import attack_images, choose, read_pixels
from clip_robustness.inference.pixels import cache_pixels
from clip_robustness.inference.victims import Victim
from clip_robustness.metrics.adversarial import measure_adversarial
from tests.unit.clips import clip_folder, timm_folder
from tests.unit.embedding import SPEC
from tests.unit.embedding import run as embed_one
from tests.unit.samples import encoded, picture

N = 30
BIM = {"method": "gradient", "steps": 3, "step": 0.4, "budgets": [0.5, 2, 8], "reported": 2, "bisections": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures labelled by a classifier's answers, a classifier, a CLIP with its head, another classifier."""
    base = tmp_path_factory.mktemp("world")
    timm_folder(base / "timm")
    clip_folder(base / "clip")
    other = timm_folder(base / "other")
    state = {name: v + 0.05 * torch.randn_like(v) for name, v in load_file(other / "model.safetensors").items()}
    save_file(state, other / "model.safetensors")
    io.seal(other, model="other")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 24)).astype(np.float32)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    np.savez(base / "head.npz", weight=weight, scale=np.float32(30), bias=np.float32(-2))
    paths = [base / f"ILSVRC2012_val_{i:08d}.png" for i in range(1, N + 1)]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(picture(40 + i % 3, 44, i), "PNG"))
    columns = {"image_id": [path.stem for path in paths], "archive": [str(path) for path in paths]}
    columns["offset"] = np.zeros(N, np.int64)
    columns["size"] = np.array([path.stat().st_size for path in paths])
    columns["label"] = np.zeros(N, np.int32)
    io.write_parquet(base / "set.parquet", columns)
    io.write_json(base / "base.json", space([[i] for i in range(7)]))
    io.write_json(base / "coarse.json", space([[0, 3], [1], [2, 4, 5, 6]]))
    for name, labels, model in (
        ("set", "base", {"weights": base / "timm", "library": "timm", "head": None}),
        ("clip_set", "base", {"weights": base / "clip", "library": "open_clip", "head": base / "head.npz"}),
        ("coarse_set", "coarse", {"weights": base / "timm", "library": "timm", "head": None}),
    ):
        columns["label"] = answers(base / "set.parquet", model, base / f"{labels}.json")
        io.write_parquet(base / f"{name}.parquet", columns)
    return base


def space(members):
    names = [str(i) for i in range(len(members))]
    return {"name": "toy", "base": None, "classes": names, "members": members, "pool": "max"}


def pixels_of(index):
    columns = module.load_index(index)
    return read_pixels(columns, np.arange(N), module.Preprocessing.parse(SPEC), workers=3)


def logits(index, model, labels):
    victim = Victim({"preprocess": SPEC, **model}, io.read_json(labels)["members"], CPU)
    return victim(torch.from_numpy(pixels_of(index)).permute(0, 3, 1, 2).float() / 255).detach().numpy()


def answers(index, model, labels):
    return logits(index, model, labels).argmax(1).astype(np.int32)


def run(world, out, kind="timm", attack="bim", settings=BIM, **options):
    given = {
        "timm": {"library": "timm", "weights": world / "timm", "index": world / "set.parquet"},
        "clip": {
            "library": "open_clip",
            "weights": world / "clip",
            "index": world / "clip_set.parquet",
            "head": world / "head.npz",
        },
    }[kind]
    given |= {"labels": world / "base.json", "work": out / "work", "out": out / f"{attack}.parquet"}
    attack_images(**{"model": "m", "attack": attack, "preprocess": SPEC, "settings": settings, **given, **options})
    return io.read_parquet(out / f"{attack}.parquet"), json.loads((out / f"{attack}.json").read_text())


# Results


@pytest.mark.parametrize("kind", ["timm", "clip"])
def test_a_job_writes_a_row_an_image_and_its_manifest(world, tmp_path, kind):
    found, manifest = run(world, tmp_path, kind)
    types = {name: str(values.dtype) for name, values in found.items()}
    assert types == {
        "image_id": "object",
        "label": "int32",
        "clean": "int32",
        "distance": "float32",
        "prediction": "int32",
        "fault": "int8",
        "queries": "int64",
    }
    assert (found["clean"] == found["label"]).all() and not found["fault"].any()
    broken = np.isfinite(found["distance"])
    assert broken.sum() > 10 and (found["distance"][broken] > 0).all()
    assert ((found["prediction"] >= 0) == broken).all() and (found["prediction"] != found["label"]).all()
    assert manifest["budgets"] == [0.5 / 255, 2 / 255, 8 / 255] and manifest["reported"] == 2 / 255
    assert manifest["ids_sha256"] == io.ids_digest(found["image_id"]) and manifest["n"] == N
    named = {name: manifest[name] for name in ("model", "attack", "dataset", "norm", "eps_space")}
    dataset = {"timm": "set", "clip": "clip_set"}[kind]
    assert named == {"model": "m", "attack": "bim", "dataset": dataset, "norm": "linf", "eps_space": "pixel"}


def test_the_metric_of_attacks_reads_what_a_job_writes(world, tmp_path):
    found, _ = run(world, tmp_path)
    run(world, tmp_path, attack="deepfool", settings={"method": "deepfool", "budgets": [0.5, 2, 8], "reported": 2})
    measure_adversarial([tmp_path / "bim.parquet", tmp_path / "deepfool.parquet"], tmp_path / "metrics.json")
    rows = {(row["metric"], row["slice"]): row["value"] for row in io.read_json(tmp_path / "metrics.json")["rows"]}
    assert rows["accuracy", "bim"] == np.mean(found["distance"] > 2 / 255 + 1e-6)
    assert rows["clean_accuracy", ""] == 1 and rows["accuracy", "white_box_union"] <= rows["accuracy", "deepfool"]


def test_the_head_inside_gives_the_logits_of_the_stored_features(world, tmp_path):
    cache_pixels(world / "set.parquet", SPEC.rpartition("|")[0], tmp_path / "set.npy")
    features, _ = embed_one(world / "clip", tmp_path / "set.npy", tmp_path)
    with np.load(world / "head.npz") as head:
        expected = float(head["scale"]) * features.astype(np.float32) @ head["weight"].T + float(head["bias"])
    model = {"weights": world / "clip", "library": "open_clip", "head": world / "head.npz"}
    assert np.abs(logits(world / "set.parquet", model, world / "base.json") - expected).max() < 0.02


def test_a_space_with_members_pools_by_their_maximum(world, tmp_path):
    model = {"weights": world / "timm", "library": "timm", "head": None}
    base, coarse = (logits(world / "set.parquet", model, world / f"{name}.json") for name in ("base", "coarse"))
    pooled = [base[:, members].max(1) for members in ([0, 3], [1], [2, 4, 5, 6])]
    assert np.abs(coarse - np.stack(pooled, 1)).max() < 1e-5
    found, _ = run(world, tmp_path, index=world / "coarse_set.parquet", labels=world / "coarse.json")
    assert set(found["prediction"]) <= {-1, 0, 1, 2} and np.isfinite(found["distance"]).sum() > 5


def test_a_substitute_with_its_own_size_and_normalisation_transfers(world, tmp_path):
    other = {"weights": world / "clip", "library": "open_clip", "head": world / "head.npz"}
    other["preprocess"] = "resize(32,bicubic)|center_crop(32)|normalize(0.4,0.5,0.6;0.2,0.3,0.2)"
    settings = {**BIM, "substitute": True, "bisections": 0}
    crop = "resize(40,bicubic)|center_crop(40)|normalize(openai)"
    victim = Victim({"weights": world / "timm", "library": "timm", "head": None, "preprocess": SPEC}, [[0]] * 7, CPU)
    with pytest.raises(AssertionError):  # its architecture takes no other size than its own
        victim.model.encode(torch.zeros(1, 3, 40, 40))
    assert victim(torch.zeros(1, 3, 40, 40)).shape == (1, 7)
    own = {"weights": world / "timm", "library": "timm", "preprocess": SPEC}
    white, _ = run(world, tmp_path / "a", settings={**BIM, "bisections": 0})
    same, _ = run(world, tmp_path / "b", settings=settings, substitute=own)
    far, manifest = run(world, tmp_path / "c", settings=settings, substitute=other)
    robust = [np.isinf(found["distance"]).mean() for found in (white, same, far)]
    assert robust[0] <= robust[1] < robust[2]
    assert len(manifest["models"]) == 2 and far["queries"].max() == 4  # clean, and once a budget
    with pytest.raises(InputError, match="does not fit the model or its preprocessing"):
        run(world, tmp_path / "d", preprocess=crop)


# Shards


SHARDED = """
import json, os, signal
from pathlib import Path
from clip_robustness.inference import attack as module
module.SHARD, calls, plain = 8, [], module._attack_shard
def dying(*arguments, **named):
    calls.append(1)
    return plain(*arguments, **named) if len(calls) < 3 else os.kill(os.getpid(), signal.SIGKILL)
module._attack_shard = dying
module.attack_images(**{name: Path(v) if name in PATHS else v for name, v in GIVEN.items()})
"""


def test_a_killed_job_loses_one_shard(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SHARD", 8)
    whole, _ = run(world, tmp_path / "whole")
    out = tmp_path / "out"
    given = {"model": "m", "attack": "bim", "library": "timm", "preprocess": SPEC, "settings": BIM}
    given |= {"weights": f"{world}/timm", "index": f"{world}/set.parquet", "labels": f"{world}/base.json"}
    given |= {"out": f"{out}/bim.parquet", "work": f"{out}/work"}
    script = f"PATHS, GIVEN = ['weights', 'index', 'labels', 'out', 'work'], {given!r}\n{SHARDED}"
    environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -9
    assert not (out / "bim.parquet").exists()
    assert len(list((out / "work").rglob("shard-*"))) == 2
    capsys.readouterr()
    resumed, _ = run(world, out)
    assert "30/30 images" in (said := capsys.readouterr().err) and "16 were there" in said
    for name, values in whole.items():
        assert np.array_equal(resumed[name], values), name
    left = sorted(path.name for path in next((out / "work").iterdir()).iterdir())
    assert left == ["attacked.parquet", "manifest.json"]


def test_a_job_that_was_killed_before_its_seal_is_not_run_again(world, tmp_path, monkeypatch):
    run(world, tmp_path)
    manifest = next((tmp_path / "work").rglob("manifest.json"))
    expected = manifest.read_text()
    manifest.unlink()
    (manifest.parent / "shard-000000000.parquet").touch()  # was not removed yet
    monkeypatch.setattr(module, "_attack_shards", None)
    run(world, tmp_path)
    assert manifest.read_text() == expected


@pytest.mark.parametrize("settings", [BIM, {**BIM, "method": "score", "pairs": 5}, {**BIM, "diversity": 0.5}])
def test_results_depend_on_neither_shards_nor_batches(world, tmp_path, monkeypatch, settings):
    whole, _ = run(world, tmp_path / "a", settings=settings)
    monkeypatch.setattr(module, "SHARD", 7)
    parts, _ = run(world, tmp_path / "b", settings=settings, batch_size=3, workers=2)
    assert np.allclose(whole["distance"], parts["distance"], rtol=1e-2)
    assert np.mean(whole["prediction"] == parts["prediction"]) > 0.9


def test_what_decides_the_numbers_decides_the_key(world, tmp_path, monkeypatch):
    run(world, tmp_path)
    monkeypatch.setattr(module, "_attack_shards", None)  # another run of the attack would fail
    other, manifest = run(world, tmp_path, attack="bim_again", batch_size=2)
    assert manifest["attack"] == "bim_again" and len(other["image_id"]) == N
    monkeypatch.undo()
    run(world, tmp_path, images=20)
    run(world, tmp_path, seed=1)
    run(world, tmp_path, eps_space="normalized")
    run(world, tmp_path, settings={**BIM, "steps": 2})
    run(world, tmp_path, weights=world / "other")
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) == 6


def test_the_normalized_space_has_smaller_budgets(world, tmp_path):
    pixel, _ = run(world, tmp_path / "a")
    normalized, manifest = run(world, tmp_path / "b", eps_space="normalized")
    assert manifest["eps_space"] == "normalized" and manifest["budgets"][0] == 0.5 / 255
    both = np.isfinite(pixel["distance"]) & np.isfinite(normalized["distance"])
    ratio = np.median(normalized["distance"][both] / pixel["distance"][both])
    assert 2.5 < ratio < 5  # one over CLIP's standard deviations, 3.6 to 3.8


# Which images


def index_of(labels, ids=None):
    names = ids or [f"x/{i:05d}" for i in range(len(labels))]
    return {"image_id": np.array(names, object), "label": np.array(labels, np.int32)}


def test_a_choice_is_balanced_and_a_smaller_one_is_part_of_it():
    labels = np.repeat([0, 1, 2, 3, -1], [50, 30, 5, 200, 40])
    columns = index_of(labels)
    rows = choose(columns, 80, 0, Path("set.parquet"))
    assert (np.diff(rows) > 0).all() and np.bincount(labels[rows]).tolist() == [25, 25, 5, 25]
    assert set(choose(columns, 41, 0, Path("set.parquet"))) <= set(rows)
    assert set(choose(columns, 80, 1, Path("set.parquet"))) != set(rows)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    again = choose({name: values[shuffled] for name, values in columns.items()}, 80, 0, Path("set.parquet"))
    assert set(shuffled[again]) == set(rows)  # the order of the index does not matter
    assert len(choose(columns, 1000, 0, Path("set.parquet"))) == 285  # all that have a label


def test_a_list_names_images_by_id_or_number(tmp_path):
    columns = index_of([0, 1, 2, 0], [f"ILSVRC2012_val_{i:08d}" for i in (1, 20, 3, 400)])
    listed = tmp_path / "ids.txt"
    listed.write_text("# comment\n400\n20 # another\n\nILSVRC2012_val_00000001\n3\n")
    assert choose(columns, 3, 0, Path("set.parquet"), listed).tolist() == [0, 1, 3]
    listed.write_text("400\n7\n")
    with pytest.raises(InputError, match=r"1 of its images are not in set.parquet, such as \['7'\]"):
        choose(columns, 1, 0, Path("set.parquet"), listed)
    with pytest.raises(InputError, match="cannot read this list"):
        choose(columns, 1, 0, Path("set.parquet"), tmp_path / "none.txt")
    columns["label"][3] = -1
    listed.write_text("400\n")
    with pytest.raises(InputError, match="have no label"):
        choose(columns, 1, 0, Path("set.parquet"), listed)


def test_robustbenchs_list_is_whole(root):
    columns = index_of(np.zeros(50_000), [f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001)])
    rows = choose(columns, 10_000, 0, Path("set.parquet"), root / "config/attacks/robustbench_ids.txt")
    assert len(rows) == 5000
    text = (root / "config/attacks/robustbench_ids.txt").read_text()
    assert "MIT" in text and "RobustBench/robustbench" in text
    first = [line for line in text.splitlines() if line[0] != "#"][:3]
    assert first == ["15253", "20685", "39611"]


# Inputs that do not fit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "head.npz"}, "answers with logits and takes no head"),
        ({"kind": "clip", "head": None}, "answers with features and needs a head"),
        ({"labels": "coarse.json"}, "label beyond the 3 classes"),
        ({"labels": "eight.json"}, "7 classes, and the label space has 8"),
        ({"labels": "mean.json"}, "pools by mean"),
        ({"substitute": {"weights": "x"}}, "'bim' takes no substitute"),
        ({"settings": {**BIM, "substitute": True}}, "'bim' needs a substitute"),
        ({"settings": {**BIM, "step_size": 1}}, "unknown field 'step_size'"),
        ({"eps_space": "clip"}, "eps_space is 'clip', expected pixel or normalized"),
        ({"preprocess": "resize(32,bicubic)|center_crop(32)"}, "lacks normalize"),
        ({"index": "unlabelled.parquet"}, "holds no labelled image"),
        ({"index": "broken.parquet"}, "image 'ILSVRC2012_val_00000003': cannot decode"),
    ],
)
def test_inputs_that_do_not_fit(world, tmp_path, options, said):
    io.write_json(world / "eight.json", space([[i] for i in range(8)]))
    io.write_json(world / "mean.json", {**space([[0, 1]]), "pool": "mean"})
    columns = io.read_parquet(world / "set.parquet")
    io.write_parquet(world / "unlabelled.parquet", {**columns, "label": np.full(N, -1, np.int32)})
    columns["size"] = np.where(np.arange(N) == 2, 30, columns["size"])
    io.write_parquet(world / "broken.parquet", columns)
    files = {"labels", "index", "head"}
    options = {name: world / v if name in files and v else v for name, v in options.items()}
    kind, preprocess = options.pop("kind", "timm"), options.pop("preprocess", SPEC)
    with pytest.raises(InputError, match=said):
        given = {"weights": world / kind, "library": {"timm": "timm", "clip": "open_clip"}[kind]}
        given |= {"index": world / "set.parquet", "labels": world / "base.json", "settings": BIM, **options}
        attack_images("m", "bim", preprocess=preprocess, out=tmp_path / "o.parquet", work=tmp_path / "w", **given)
    assert not (tmp_path / "o.parquet").exists()


def test_a_damaged_head_says_so(world, tmp_path):
    (tmp_path / "head.npz").write_bytes(b"none")
    with pytest.raises(InputError, match=r"head.npz: not a whole head .*; delete it and run again"):
        run(world, tmp_path, "clip", head=tmp_path / "head.npz")
    np.savez(tmp_path / "head.npz", weight=np.zeros((7, 5), np.float32), scale=1.0, bias=0.0)
    with pytest.raises(InputError, match="does not fit the model"):
        run(world, tmp_path, "clip", head=tmp_path / "head.npz")
