"""The lite study, from archives on a local server to its figures: official layouts, small random-weight models.

Every image has a colour of its class, so that a model can be right; the archives are tiny, the classes are all there.
"""

import csv
import functools
import http.server
import io as bytes_io
import json
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.registry import load_study
from clip_robustness.data.plan import job_counts

from .conftest import House, build_house

pytestmark = pytest.mark.slow

SPEC = "resize(32,bicubic)|center_crop(32)|normalize(openai)"
LITE = ("--configfile", "config/lite.yaml", "small.yaml", "--")
STYLES = ("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog", "elephant")
STYLES += ("keyboard", "knife", "oven", "truck")
PER_CLASS = {"imagenet_v2": 2, "imagenet_r": 1, "imagenet_a": 1}


def wordnet_ids(name: str) -> list[str]:
    import importlib.resources

    path = importlib.resources.files("timm").joinpath("data", "_info", f"{name}_synsets.txt")
    return path.read_text(encoding="utf-8").split()


def picture(label: int, copy: int, form: str) -> bytes:
    """8 x 8 pixels: a pattern of the class and a little noise of the copy."""
    pattern = np.random.default_rng(label).integers(0, 256, (8, 8, 3))
    noise = np.random.default_rng([label, copy]).integers(-20, 21, (8, 8, 3))
    buffer = bytes_io.BytesIO()
    Image.fromarray(np.clip(pattern + noise, 0, 255).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, bytes_io.BytesIO(content))


def layouts() -> dict[str, dict[str, bytes]]:
    """Data set -> its archive's members, named as in the release. ImageNet-V2's folders are class indices."""
    base = wordnet_ids("imagenet")
    jpeg = functools.partial(picture, form="JPEG")
    v2 = {f"imagenetv2-matched-frequency-format-val/{c}/{i}.jpeg": jpeg(c, i) for c in range(1000) for i in range(2)}
    shifts = {}
    for name in ("imagenet_a", "imagenet_r"):
        folder, suffix = name.replace("_", "-"), "jpg"
        files = {f"{folder}/{w}/0.000_{w}.{suffix}": jpeg(base.index(w), 7) for w in wordnet_ids(name)}
        shifts[name] = {f"{folder}/README.txt": b"200 classes", **files}
    root = "texture-vs-shape-ccd0c01d42c0a8a834e90ec141e7f24fa915dc23/stimuli"
    cues = {
        f"{root}/style-transfer-preprocessed-512/{shape}/{shape}1-{texture}{number}.png": picture(i, j, "PNG")
        for i, shape in enumerate(STYLES)
        for j, texture in enumerate(STYLES)
        for number in (2,)
    }
    cues[f"{root}/filled-silhouettes/cat/cat1.png"] = picture(0, 0, "PNG")  # another condition: not part of the set
    textures = {f"dtd/images/{t}/{t}_0001.jpg": jpeg(i, 3) for i, t in enumerate(("banded", "blotchy", "zigzagged"))}
    textures |= {"dtd/labels/test1.txt": b"banded/banded_0001.jpg\n", "dtd/imdb/imdb.mat": b"MATLAB"}
    return {"imagenet_v2": v2, **shifts, "cue_conflict": cues, "textures": textures}


def write_clip(folder: Path, seed: int) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True)
    io.write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {"size": 32}})
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


def write_classifier(folder: Path, seed: int) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    model = timm.create_model("test_resnet", num_classes=1000)
    config = {"architecture": "test_resnet", "num_classes": 1000}
    io.write_json(
        folder / "config.json", {**config, "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 1000}}
    )
    save_file(model.state_dict(), folder / "model.safetensors")


def write_models(house: House) -> None:
    """A CLIP and three classifiers, in lines of models.tsv, whose weights lie in folders of the house."""
    path = house.path / "config/models.tsv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    lines = {group: next(row for row in rows if row["group"] == group) for group in ("clip_zero_shot", "standard")}
    chosen = []
    for seed, group in enumerate(["clip_zero_shot"] + ["standard"] * 3):
        name = f"small-{group.replace('_', '-')}-{seed}"
        write = write_clip if group == "clip_zero_shot" else write_classifier
        write(house.path / "weights" / name, seed)
        changes = {"model": name, "title": name, "weights": f"local:weights/{name}", "preprocess": SPEC}
        changes["architecture"] = "small-clip" if group == "clip_zero_shot" else "test_resnet"
        chosen.append(
            {
                **lines[group],
                **changes,
                "image_size": "32",
                "params_m": "1",
                "gflops": "1",
                "listed": "lite",
                "parent": "",
            }
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writeheader()
        writer.writerows(chosen)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, without a line on standard error for each request."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def lite(tmp_path_factory, root):
    """The lite study, run once, its archives served by a local server that is gone afterwards."""
    base = tmp_path_factory.mktemp("lite")
    house = build_house(base / "house", root)
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=base / "served")
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = house.path / "config/datasets.yaml"
        document = yaml.safe_load(table.read_text())
        for name, files in layouts().items():
            (archive,) = document["datasets"][name]["archives"]
            write_tar(base / "served" / archive["file"], files)
            address = f"http://127.0.0.1:{server.server_port}/{archive['file']}"
            nowhere = f"http://127.0.0.1:{server.server_port}/gone/{archive['file']}"
            document["datasets"][name]["archives"] = [{"file": archive["file"], "urls": [nowhere, address]}]
            document["datasets"][name]["images"] = len([n for n in files if is_image_of(name, n)])
        table.write_text(yaml.safe_dump(document, sort_keys=False))
        write_models(house)
        (house.path / "small.yaml").write_text("prompts: {default: openai_1}\nresamples: 200\nthreads: 1\n")
        os.environ["CLIP_ROBUSTNESS_CACHE"] = str(base / "cache")
        try:
            house.planned = house.jobs(*LITE)
            house.snakemake(*LITE)
            house.snakemake(*LITE[:-1], "--", "data")
        finally:
            del os.environ["CLIP_ROBUSTNESS_CACHE"]
            server.shutdown()
    return house


def is_image_of(name: str, member: str) -> bool:
    wanted = "style-transfer-preprocessed-512" if name == "cue_conflict" else ""
    return member.endswith((".jpeg", ".jpg", ".png")) and wanted in member


def test_it_makes_its_figures(lite):
    for name in ("effective_robustness", "shape_bias", "calibration"):
        assert (lite.path / f"figures/lite/{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "<html" in (lite.path / "figures/lite/report.html").read_text()


def test_the_indexes_are_the_archives(lite):
    """Rows, order and labels, for class indices, WordNet ids and shapes with textures."""
    base = wordnet_ids("imagenet")
    index = {name: io.read_parquet(lite.path / f"resources/index/{name}.parquet") for name in layouts()}
    v2 = index["imagenet_v2"]
    assert len(v2["label"]) == 2000 and (np.bincount(v2["label"]) == 2).all()
    assert all(int(i.split("/")[0]) == label for i, label in zip(v2["image_id"], v2["label"], strict=True))
    for name in ("imagenet_a", "imagenet_r"):
        space = json.loads((lite.path / f"resources/labels/{name}.json").read_text())
        assert len(space["classes"]) == 200 and sorted(index[name]["label"]) == list(range(200))
        for image, label in zip(index[name]["image_id"], index[name]["label"], strict=True):
            assert space["members"][label] == [base.index(image.split("/")[0])]
    cues = index["cue_conflict"]
    assert len(cues["label"]) == 256 and (cues["label"] == cues["texture_class"]).sum() == 16
    for image, shape, texture in zip(cues["image_id"], cues["label"], cues["texture_class"], strict=True):
        assert image == f"{STYLES[shape]}/{STYLES[shape]}1-{STYLES[texture]}2.png"
    assert (index["textures"]["label"] == -1).all() and len(index["textures"]["label"]) == 3


def test_what_was_downloaded_is_pinned_and_kept(lite):
    pins = json.loads((lite.path / "config/downloads.lock.json").read_text())
    archives = {
        path.relative_to(lite.path / "resources/archives"): path for path in lite.path.glob("resources/archives/*/*")
    }
    fetched = {str(key): path for key, path in archives.items() if str(key) in pins}
    assert len(fetched) == len(pins) == 5
    for key, path in fetched.items():
        assert pins[key] == {"bytes": path.stat().st_size, "sha256": io.sha256_file(path)}
        assert not os.access(path, os.W_OK) or os.geteuid() == 0
    assert list((lite.path.parent / "cache").iterdir())


def test_all_numbers_are_there(lite):
    rows = io.read_parquet(lite.path / "results/lite/tables/accuracy.parquet")
    plain = rows["metric"] == "accuracy"
    assert set(rows["dataset"][plain]) >= set(PER_CLASS)
    for name, each in PER_CLASS.items():
        chosen = plain & (rows["dataset"] == name)
        classes = 1000 if name == "imagenet_v2" else 200
        assert set(rows["n"][chosen]) == {each * classes} and chosen.sum() == 4
    bias = io.read_parquet(lite.path / "results/lite/tables/shape_bias.parquet")
    assert len(set(bias["model"])) == 4


def test_the_dry_run_had_the_jobs_that_plan_counts(lite, root):
    """`plan` counts jobs by arithmetic; Snakemake's own plan of the same, empty checkout agrees rule by rule."""
    config = yaml.safe_load((lite.path / "config/lite.yaml").read_text())
    small = yaml.safe_load((lite.path / "small.yaml").read_text())
    assert job_counts(load_study({**config, **small}, lite.path)) == lite.planned


def test_a_second_run_has_nothing_to_do(lite):
    assert lite.jobs(*LITE) == {}


def test_a_new_mirror_or_note_fetches_nothing_anew(lite):
    table = lite.path / "config/datasets.yaml"
    before = table.read_text()
    try:
        table.write_text(before.replace("/gone/", "/elsewhere/").replace("title: ImageNet-A", "title: Naturally hard"))
        assert lite.jobs(*LITE) == {}
    finally:
        table.write_text(before)
