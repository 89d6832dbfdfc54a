"""The embedding path on real architectures: loading, embedding, and what stops them."""

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
from clip_robustness.inference import load
from clip_robustness.inference.embed import embed
from clip_robustness.inference.pixels import cache_pixels
from tests.unit.clips import clip_folder, timm_folder

SPEC = "resize(32,bicubic)|center_crop(32)|normalize(openai)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    return {
        "clip": clip_folder(base / "clip"),
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


def test_a_linear_head_makes_a_classifier(folders, pixels, tmp_path):
    folder = clip_folder(tmp_path / "tuned")
    torch.manual_seed(1)
    weight, bias = torch.randn(5, 24), torch.randn(5)
    save_file({"weight": weight, "bias": bias}, folder / load.CLASSIFIER)
    io.seal(folder, model="tuned")
    logits, manifest = run(folder, pixels, tmp_path / "out")
    expected = torch.from_numpy(reference(folders["clip"], pixels, "open_clip")) @ weight.T + bias
    assert manifest["kind"] == "logits" and np.abs(logits - expected.numpy()).max() < 1e-2


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
