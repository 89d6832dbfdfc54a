"""Lines of models.tsv as they are, from a local hub cache to metrics: real architectures, random weights, no network.

A ViT, a ResNet, a ConvNeXt, a SigLIP, a fine-tuned and a plain timm model; beside them a blend of two, a learned
prompt set, a checkpoint of a training run, and a model whose predictions alone are given.
"""

import csv
import io as bytes_io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from clip_robustness.core import io
from clip_robustness.core.registry import load_models

from .conftest import build_house
from .test_lite import picture, write_tar

pytestmark = pytest.mark.slow

COMMIT = "c" * 40
CLIPS = {
    "rn50.openai": "open_clip_model.safetensors",
    "vit-b-32.laion2b_s34b_b79k": "open_clip_pytorch_model.bin",  # a pickle, as some repositories have nothing else
    "convnext_base_w.laion2b_s13b_b82k": "open_clip_model.safetensors",
    "vit-b-16-siglip.webli": "open_clip_model.safetensors",
}
CLASSIFIERS = ["vit_base_patch16_clip_224.openai_ft_in1k", "resnet50.tv_in1k"]
TUNED = {"library": "open_clip", "architecture": "RN50-quickgelu", "group": "clip_finetuned"}
OWN = {  # lines that a user adds
    "rn50.mine": {**TUNED, "weights": "local:mine/epoch_9.pt"},
    "rn50.half": {**TUNED, "weights": "blend:rn50.openai+rn50.mine@0.5"},
    "theirs": {"library": "predictions", "weights": "predictions:theirs", "group": "standard"},
}
STUDY = {
    "study": "real",
    "title": "Real architectures",
    "pathvars": {"results": "results/real", "figures": "figures/real", "logs": "logs/real"},
    "models": {"names": [*CLIPS, "rn50.openai.auto", *CLASSIFIERS, *OWN]},
    "datasets": {"names": ["imagenet_v2", "imagenet_v2_top"]},
    "id_dataset": "imagenet_v2",
    "prompts": {"default": "openai_1"},
    "figures": ["calibration"],
    "resamples": 100,
    "threads": 2,
}
CLASSES = range(0, 1000, 33)  # two images each


def publish(cache: Path, repository: str, files: dict[str, Path | bytes]) -> None:
    """Put files into the hub's cache as huggingface_hub lays it out: blobs by SHA-256, links at the commit."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    for name, content in files.items():
        source = folder / "blobs" / "new"
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            content.rename(source)
        blob = source.rename(source.with_name(io.sha256_file(source)))
        link = folder / f"snapshots/{COMMIT}" / name
        link.symlink_to(os.path.relpath(blob, link.parent))


def tokenizer(folder: Path) -> dict[str, bytes]:
    """A tokenizer of single letters in SigLIP's vocabulary, where the real one would be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_weights(models: dict, cache: Path, scratch: Path) -> None:
    """Half precision: the files are half as large, and loading must bring them to single precision."""
    import open_clip
    import timm
    import torch
    from safetensors.torch import save_file

    scratch.mkdir()
    for seed, name in enumerate([*CLIPS, *CLASSIFIERS]):
        torch.manual_seed(seed)
        line, file = models[name], CLIPS.get(name, "model.safetensors")
        built = (
            open_clip.create_model(line.architecture, pretrained_hf=False)
            if name in CLIPS
            else timm.create_model(line.architecture)
        )
        state = {key: v.half() if v.is_floating_point() else v for key, v in built.state_dict().items()}
        (torch.save if file.endswith(".bin") else save_file)(state, scratch / file)
        files: dict[str, Path | bytes] = {file: scratch / file}
        if name == "vit-b-16-siglip.webli":
            files |= tokenizer(scratch / "tokenizer")
        if name in CLASSIFIERS:
            config = {"architecture": line.architecture.partition(".")[0], "num_classes": 1000}
            config["pretrained_cfg"] = timm.get_pretrained_cfg(line.architecture).to_dict(remove_source=True)
            files["config.json"] = json.dumps(config).encode()
        publish(cache, line.weights.removeprefix("hub:"), files)


@pytest.fixture(scope="module")
def real(tmp_path_factory, root):
    import open_clip
    import torch

    base = tmp_path_factory.mktemp("real")
    house = build_house(base / "house", root)
    models = load_models(house.path / "config/models.tsv", house.path)
    write_weights(models, base / "hub", base / "scratch")
    (house.path / "mine").mkdir()
    torch.manual_seed(9)
    trained = {f"module.{k}": v for k, v in open_clip.create_model("RN50").state_dict().items()}
    torch.save({"epoch": 9, "state_dict": trained}, house.path / "mine/epoch_9.pt")

    table = house.path / "config/models.tsv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    like = next(row for row in rows if row["model"] == "rn50.openai")
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        for name, changes in OWN.items():
            writer.writerow(
                {**like, "model": name, "title": name, "published": "", "top1": "", "listed": "own", **changes}
            )

    document = yaml.safe_load((house.path / "config/datasets.yaml").read_text())
    STUDY["local"] = {}
    for name, folder in (("imagenet_v2", "matched-frequency"), ("imagenet_v2_top", "top-images")):
        pairs = [(c, copy) for c in CLASSES for copy in (0, 1)]
        files = {f"imagenetv2-{folder}-format-val/{c}/{copy}.jpeg": picture(c, copy, "JPEG") for c, copy in pairs}
        write_tar(base / f"{name}.tar", files)
        STUDY["local"][name] = str(base / f"{name}.tar")
        document["datasets"][name]["images"] = len(files)
    (house.path / "config/datasets.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (house.path / "real.yaml").write_text(yaml.safe_dump(STUDY))
    give_predictions(house.path / "theirs")
    learned = house.path / "config/prompts/roz_auto_rn50.txt"  # 49 templates are many minutes on a CPU
    learned.write_text("\n".join([line for line in learned.read_text().splitlines() if "{}" in line][:1]))

    os.environ |= {"HF_HUB_CACHE": str(base / "hub"), "HF_HUB_OFFLINE": "1"}
    try:
        house.snakemake("--configfile", "real.yaml", "--", "tables")
    finally:
        del os.environ["HF_HUB_CACHE"], os.environ["HF_HUB_OFFLINE"]
    return house


def give_predictions(folder: Path) -> None:
    """Logits for one of the two data sets, in an order of their own; every second image is right."""
    pairs = [(c, copy) for c in reversed(CLASSES) for copy in (0, 1)]
    folder.mkdir()
    np.save(folder / "imagenet_v2.npy", 10 * np.eye(1000, dtype=np.float32)[[(c + copy) % 1000 for c, copy in pairs]])
    (folder / "imagenet_v2.ids.txt").write_text("".join(f"{c}/{copy}.jpeg\n" for c, copy in pairs))


def accuracy(house):
    table = io.read_parquet(house.path / "results/real/tables/accuracy.parquet")
    rows = zip(*(table[name].tolist() for name in ("model", "dataset", "metric", "value")), strict=True)
    return {(model, dataset): value for model, dataset, metric, value in rows if metric == "accuracy"}


def test_every_model_is_measured_on_every_data_set(real):
    computed = [name for name in STUDY["models"]["names"] if name != "theirs"]
    expected = {(m, d) for m in computed for d in ("imagenet_v2", "imagenet_v2_top")} | {("theirs", "imagenet_v2")}
    assert set(accuracy(real)) == expected


def test_given_predictions_are_measured_as_they_are(real):
    assert accuracy(real)["theirs", "imagenet_v2"] == 0.5
    calibration = io.read_parquet(real.path / "results/real/tables/calibration.parquet")
    assert "theirs" in set(calibration["model"].tolist())


def test_weights_are_sealed_as_safetensors_and_pinned(real):
    folders = {path.name for path in (real.path / "resources/weights").iterdir()}
    assert "rn50.openai.auto" not in folders and "theirs" not in folders  # the one shares, the other has none
    for folder in folders:
        names = set(io.check_sealed(real.path / "resources/weights" / folder)["files"])
        assert not [name for name in names if name.endswith((".bin", ".pt"))]
    pins = json.loads((real.path / "config/downloads.lock.json").read_text())
    assert pins["hub:timm/resnet50.tv_in1k"]["revision"] == COMMIT and len(pins) == len(CLIPS) + len(CLASSIFIERS)


def test_features_are_the_librarys_own(real):
    """One CLIP end to end, against open_clip's loader, transform and tower in single precision."""
    import open_clip
    import torch
    from PIL import Image

    folder = real.path / "resources/weights/convnext_base_w.laion2b_s13b_b82k"
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    images = [Image.open(bytes_io.BytesIO(picture(c, 0, "JPEG"))) for c in CLASSES[:4]]
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([transform(i) for i in images]), normalize=True).numpy()
    index = io.read_parquet(real.path / "resources/index/imagenet_v2.parquet")["image_id"].tolist()
    stored = np.load(real.path / "results/real/embeddings/convnext_base_w.laion2b_s13b_b82k/imagenet_v2.npy")
    rows = [index.index(f"{c}/0.jpeg") for c in CLASSES[:4]]
    assert (stored[rows].astype(np.float32) * expected).sum(axis=1).min() > 0.999


def test_learned_prompts_share_the_embeddings_and_have_a_head_of_their_own(real):
    folder = real.path / "results/real"
    one, auto = (folder / "embeddings" / name / "imagenet_v2.npy" for name in ("rn50.openai", "rn50.openai.auto"))
    assert one.samefile(auto)
    heads = {
        name: sorted(p.name for p in (folder / "heads" / name).iterdir())
        for name in ("rn50.openai", "rn50.openai.auto")
    }
    assert heads == {"rn50.openai": ["openai_1.imagenet_1k.npz"], "rn50.openai.auto": ["roz_auto_rn50.imagenet_1k.npz"]}
    weights = [np.load(folder / "heads" / name / file[0])["weight"] for name, file in heads.items()]
    assert weights[0].shape == weights[1].shape == (1000, 1024) and not np.allclose(*weights)


def test_a_blend_lies_between_its_parents(real):
    from safetensors import safe_open

    tensors = []
    for name in ("rn50.openai", "rn50.half", "rn50.mine"):
        with safe_open(real.path / f"resources/weights/{name}/open_clip_model.safetensors", "np") as file:
            tensors.append(file.get_tensor("visual.attnpool.k_proj.weight").astype(np.float32))
    assert np.allclose(tensors[1], (tensors[0] + tensors[2]) / 2, atol=1e-3)


def test_a_gpu_node_needs_no_network(real):
    """From fetched weights on, everything runs where a connection is refused."""
    (real.path / "no_network").mkdir(exist_ok=True)
    refuse = "import socket\n\ndef refuse(*_):\n    raise OSError('no network')\n\nsocket.socket.connect = refuse\n"
    (real.path / "no_network/sitecustomize.py").write_text(refuse)
    weights = real.path / "resources/weights/vit-b-16-siglip.webli"
    arguments = ["heads", "--weights", str(weights), "--prompts", "config/prompts.yaml", "--names", "openai_1"]
    arguments += ["--labels", "resources/labels/imagenet_1k.json", "--out", "elsewhere", "--work", "elsewhere/work"]
    environment = {**os.environ, "PYTHONPATH": f"no_network{os.pathsep}src", "CLIP_ROBUSTNESS_DEVICES": ""}
    run = [sys.executable, "-m", "clip_robustness", *arguments]
    subprocess.run(run, cwd=real.path, env=environment, check=True)
    again = np.load(real.path / "elsewhere/openai_1.imagenet_1k.npz")["weight"]
    first = np.load(real.path / "results/real/heads/vit-b-16-siglip.webli/openai_1.imagenet_1k.npz")["weight"]
    assert np.allclose(again, first, atol=1e-5)
