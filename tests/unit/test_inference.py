"""The embedding path on real architectures: loading, heads, embedding, and what stops them."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import embed as embed_module
from clip_robustness.inference import heads, load
from clip_robustness.inference.embed import embed
from clip_robustness.inference.pixels import cache_pixels
from tests.unit.clips import SIGLIP_TEXT, clip_folder, timm_folder

SPEC = "resize(32,bicubic)|center_crop(32)|normalize(openai)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    siglip = {"text_cfg": SIGLIP_TEXT, "custom_text": True, "init_logit_bias": -10.0}
    return {
        "clip": clip_folder(base / "clip"),
        "siglip": clip_folder(base / "siglip", **siglip),
        "timm": timm_folder(base / "timm"),
    }


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """150 images as a data set would have them: files, an index, a pixel cache."""
    base = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    names, sizes = [], []
    for i in range(150):
        path = base / f"{i:03d}.png"
        Image.fromarray(random.integers(0, 256, (40 + i % 7, 50, 3), dtype=np.uint8)).save(path)
        names.append(str(path))
        sizes.append(path.stat().st_size)
    columns = {
        "image_id": [Path(n).name for n in names],
        "archive": names,
        "offset": [0] * 150,
        "size": sizes,
    }
    columns = {k: np.array(v) for k, v in columns.items()} | {"label": np.arange(150, dtype=np.int32) % 7}
    io.write_parquet(base / "toy.parquet", columns)
    cache_pixels(base / "toy.parquet", "resize(32,bicubic)|center_crop(32)", base / "toy.npy")
    return base / "toy.npy"


def run(folder, pixels, out, library="open_clip", **options):
    options = {"precision": "fp32", "work": out / "work", **options}
    embed("m", library, SPEC, folder, [pixels], out, **options)
    return np.load(out / "toy.npy"), json.loads((out / "toy.json").read_text())


def reference(folder, pixels, library):
    """The library's own way: its model, its normalisation, in one batch."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (torch.from_numpy(np.load(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        if library == "timm":
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images).numpy()
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        return model.eval().encode_image(images, normalize=True).numpy()


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_embeddings_are_the_librarys_own(folders, pixels, tmp_path, library):
    folder = folders["timm" if library == "timm" else "clip"]
    values, manifest = run(folder, pixels, tmp_path, library)
    expected = reference(folder, pixels, library)
    assert values.dtype == np.float16 and np.abs(values - expected).max() < 1e-3 * max(1, np.abs(expected).max())
    assert manifest["kind"] == ("logits" if library == "timm" else "features")
    assert manifest["n"] == 150 and manifest["dim"] == values.shape[1]
    ids = [f"{i:03d}.png" for i in range(150)]
    assert manifest["ids_sha256"] == io.ids_digest(ids)


def test_an_image_does_not_depend_on_its_batch(folders, pixels):
    model = load.load_image_model(folders["clip"], "open_clip", (0.5,) * 3, (0.5,) * 3)
    images = torch.from_numpy(np.load(pixels)[:16])
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(one[None]) for one in images])
    assert (together - alone).abs().max() < 1e-5


def test_a_linear_head_makes_a_classifier(folders, pixels, tmp_path):
    folder = clip_folder(tmp_path / "tuned")
    torch.manual_seed(1)
    weight, bias = torch.randn(5, 24), torch.randn(5)
    save_file({"weight": weight, "bias": bias}, folder / load.CLASSIFIER)
    io.seal(folder, model="tuned")
    logits, manifest = run(folder, pixels, tmp_path / "out")
    expected = torch.from_numpy(reference(folders["clip"], pixels, "open_clip")) @ weight.T + bias
    assert manifest["kind"] == "logits" and np.abs(logits - expected.numpy()).max() < 1e-2


def test_a_killed_job_loses_one_shard(folders, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "SHARD", 32)
    whole, _ = run(folders["clip"], pixels, tmp_path / "whole")
    calls = []
    plain = embed_module._Encoder.__call__

    def dying(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, images)

    monkeypatch.setattr(embed_module._Encoder, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        run(folders["clip"], pixels, tmp_path / "resumed")
    assert not (tmp_path / "resumed/toy.npy").exists()
    resumed, manifest = run(folders["clip"], pixels, tmp_path / "resumed")
    assert sum(calls) == 150 + 32 and np.array_equal(resumed, whole)
    # a rerun for a reason that does not touch the numbers computes nothing
    (tmp_path / "resumed/toy.npy").unlink()
    before = len(calls)
    run(folders["clip"], pixels, tmp_path / "resumed")
    assert len(calls) == before
    assert not list((tmp_path / "resumed/work").rglob("shard-*"))
    assert manifest["n"] == 150


def test_other_weights_or_code_are_another_key(folders, pixels, tmp_path, monkeypatch):
    run(folders["clip"], pixels, tmp_path)
    monkeypatch.setattr(embed_module.provenance, "code_hash", lambda *m, **k: "other")
    run(folders["clip"], pixels, tmp_path)
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_weights_that_changed_are_refused(pixels, tmp_path):
    folder = clip_folder(tmp_path / "clip")
    path = folder / "open_clip_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"open_clip_model.safetensors: its SHA-256 is not"):
        run(folder, pixels, tmp_path / "out")


def test_weights_of_another_shape_are_refused(pixels, tmp_path):
    folder = clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 96
    io.write_json(folder / "open_clip_config.json", config)
    io.seal(folder)
    with pytest.raises(InputError, match="do not fit the architecture"):
        run(folder, pixels, tmp_path / "out")


def test_a_pickle_with_code_is_refused(pixels, tmp_path):
    folder = clip_folder(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    bomb = b"cbuiltins\nexec\n(V__import__('pathlib').Path('%s').touch()\ntR." % str(tmp_path / "hit").encode()
    (folder / "open_clip_pytorch_model.bin").write_bytes(bomb)
    io.seal(folder)
    with pytest.raises(InputError, match="do not fit the architecture"):
        run(folder, pixels, tmp_path / "out")
    assert not (tmp_path / "hit").exists()


def test_values_that_are_not_finite_name_their_row(pixels, tmp_path):
    folder = clip_folder(tmp_path / "clip")
    path = folder / "open_clip_model.safetensors"
    from safetensors.torch import load_file

    state = load_file(path)
    state["visual.proj"] = torch.full_like(state["visual.proj"], float("nan"))
    save_file(state, path)
    io.seal(folder)
    with pytest.raises(InputError, match=r"not finite in float16 for image rows \[0, 1"):
        run(folder, pixels, tmp_path / "out")
    assert not (tmp_path / "out/toy.npy").exists()


def test_pixels_of_another_spec_are_refused(folders, pixels, tmp_path):
    spec = "resize(24,bicubic)|center_crop(24)|normalize(openai)"
    with pytest.raises(InputError, match=r"made for resize\(32"):
        embed("m", "open_clip", spec, folders["clip"], [pixels], tmp_path, tmp_path / "work")


# Heads


def classes(tmp_path, names):
    io.write_json(tmp_path / "toy.json", {"name": "toy", "base": None, "classes": names})
    return tmp_path / "toy.json"


PROMPTS = "one: ['a photo of a {}.']\nthree: ['a {}', 'a bad photo of the {} on a table', '{}']\n"
EIGHTY = "eighty: {open_clip: OPENAI_IMAGENET_TEMPLATES}\nthirty: {open_clip: OPENAI_IMAGENET_TEMPLATES, first: 30}\n"
NAMES = ["sphere", "traffic light, traffic signal, stoplight", "kite (bird of prey)", "Mexican hairless dog"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_heads_are_open_clips_own(folders, tmp_path, kind):
    table = tmp_path / "prompts.yaml"
    table.write_text(PROMPTS + EIGHTY)
    names = ["one", "three", "eighty"]
    heads.build_heads(folders[kind], table, names, [classes(tmp_path, NAMES)], tmp_path / "out", tmp_path / "work")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folders[kind]}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")
    for name in names:
        texts = heads.templates(table, name)
        expected = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, [t.format for t in texts])
        with np.load(tmp_path / f"out/{name}.toy.npz") as head:
            assert np.abs(head["weight"] - expected.T.numpy()).max() < 1e-5
            assert np.isclose(head["scale"], model.logit_scale.exp().item())
            assert head["bias"] == (-10 if kind == "siglip" else 0)


def test_trimming_is_decided_by_the_tower(folders):
    for kind, expected in (("clip", True), ("siglip", False)):
        clip = load.load_clip(folders[kind])
        with torch.inference_mode():
            assert heads.trims(clip, load.load_tokenizer(folders[kind])(NAMES)) is expected


def test_a_tower_that_is_not_causal_is_not_trimmed(folders):
    clip = load.load_clip(folders["clip"])
    clip.attn_mask = torch.zeros_like(clip.attn_mask)  # looks like CLIP, sees the padding
    with torch.inference_mode():
        assert not heads.trims(clip, load.load_tokenizer(folders["clip"])(NAMES))


def test_a_second_prompt_set_costs_only_its_own(folders, tmp_path, monkeypatch):
    table = tmp_path / "prompts.yaml"
    table.write_text(PROMPTS + EIGHTY)
    where = ([classes(tmp_path, NAMES)], tmp_path / "out", tmp_path / "work")
    heads.build_heads(folders["clip"], table, ["eighty"], *where)
    built = []
    plain = heads.class_weights
    monkeypatch.setattr(heads, "class_weights", lambda *a: built.append(len(a[2])) or plain(*a))
    heads.build_heads(folders["clip"], table, ["eighty", "one"], *where)
    assert built == [1]


def test_templates(tmp_path):
    table = tmp_path / "prompts.yaml"
    table.write_text(PROMPTS + EIGHTY + "bad: ['a photo']\n")
    assert len(heads.templates(table, "eighty")) == 80 and len(heads.templates(table, "thirty")) == 30
    with pytest.raises(InputError, match="every template needs one"):
        heads.templates(table, "bad")
