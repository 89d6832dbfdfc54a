"""Loading a sealed folder, and what stops it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import load
from tests.unit.clips import clip_folder, timm_folder
from tests.unit.embedding import make_pixels, reference, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    return {
        "clip": clip_folder(base / "clip"),
        "timm": timm_folder(base / "timm"),
    }


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return make_pixels(tmp_path_factory.mktemp("data") / "toy.npy", 150)


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
    with pytest.raises(InputError, match="a pickle that holds more than tensors") as caught:
        run(folder, pixels, tmp_path / "out")
    assert "weights_only" not in str(caught.value), "torch tells how to run it"
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
