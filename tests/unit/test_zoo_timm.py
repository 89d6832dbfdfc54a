"""Every timm line of config/models.tsv against timm itself, on the meta device: no weight is loaded."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.core.registry import load_models
from clip_robustness.inference.images import preprocess

ROOT = Path(__file__).resolve().parents[2]
MODELS = load_models(ROOT / "config" / "models.tsv", ROOT)
ZOO = {name: line for name, line in MODELS.items() if line.weights.startswith("hub:timm/") and line.library == "timm"}
LISTED = Counter(tag for line in ZOO.values() for tag in line.listed)
# What has seen CLIP: its weights, its features as the target of masked modelling, or it as the teacher.
SEEN_CLIP = ("clip", "eva", "mim_", "beitv2", "beit3", "tiny_vit", "dinov2")
each_line = pytest.mark.parametrize("line", ZOO.values(), ids=list(ZOO))


def rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / "config" / "published" / name).read_text().splitlines()))


def evaluation(line) -> dict:
    """timm's evaluation transform, at the test size: how its published results were measured."""
    return resolve_data_config(pretrained_cfg=get_pretrained_cfg(line.architecture).to_dict(), use_test_size=True)


@each_line
def test_a_line_builds_from_a_folder_of_the_hubs_layout(line, tmp_path):
    """As inference.load does; the size of the input, the parameters and the cost are those of the line."""
    config = {
        "architecture": line.architecture.partition(".")[0],
        "pretrained_cfg": get_pretrained_cfg(line.architecture).to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as cost:
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=False).eval()
        logits = model(torch.empty(1, 3, line.image_size, line.image_size))
    assert logits.shape == (1, 1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == line.params_m
    assert round(cost.get_total_flops() / 1e9, 2) == line.gflops


@each_line
def test_a_line_names_the_weights_that_timm_lists(line):
    config = get_pretrained_cfg(line.architecture)
    assert line.model == line.architecture and line.weights == f"hub:{config.hf_hub_id}"
    assert line.licence == config.license.lower()
    assert line.preprocessing.size == evaluation(line)["input_size"][1:] == (line.image_size, line.image_size)
    assert "2019-01" < line.released <= "2023-05"  # timm 0.9, whose results the papers had


@pytest.mark.parametrize("spec", sorted({line.preprocess for line in ZOO.values()}))
def test_pixels_are_those_of_timms_own_transform(spec):
    """To the last bit, on images of any shape, smaller than the crop too; mean and std are the same numbers."""
    parsed = Preprocessing.parse(spec)
    lines = [line for line in ZOO.values() if line.preprocess == spec]
    random = np.random.default_rng(0)
    for config in {json.dumps(evaluation(line)): evaluation(line) for line in lines}.values():
        assert (parsed.mean, parsed.std) == (tuple(config["mean"]), tuple(config["std"]))
        transform = create_transform(**config, normalize=False)
        for height, width in ((333, 500), (601, 231), (97, 61), (479, 640)):
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            expected = transform(image)
            assert expected.dtype == torch.uint8
            np.testing.assert_array_equal(preprocess(image, parsed), expected.permute(1, 2, 0).numpy())


def test_published_accuracy_is_joined():
    """At the size of the line: the published table has the same group, size and top-1 for the same weights."""
    facts = {row["model"]: row for row in rows("models.csv")}
    top1 = {
        row["model"]: float(row["value"])
        for row in rows("timm.csv")
        if (row["dataset"], row["metric"]) == ("imagenet_val", "accuracy")
    }
    for line in ZOO.values():
        assert line.published == f"timm.{line.model.lower()}"
        assert line.top1 == pytest.approx(top1[line.published], abs=1e-9)
        published = facts[line.published]
        assert (published["group"], int(published["image_size"])) == (line.group, line.image_size), line.model


def test_counts(capsys):
    groups = Counter(line.group for line in ZOO.values() if "r127" in line.listed)
    families = Counter(line.family for line in ZOO.values() if "r127" in line.listed)
    with capsys.disabled():
        print(f"\ntimm: {dict(LISTED)}; r127: {dict(groups)}, {len(families)} families")
    assert groups == {"standard": 80, "more_data": 35, "self_supervised": 12}
    assert LISTED == {"ft35": 35, "r127": 127, "roz": 7, "lite": 6}
    assert sum(line.family == "eva" for line in ZOO.values() if "ft35" in line.listed) == 2


def test_the_127_spread_over_accuracy_families_and_training_data():
    lines = [line for line in ZOO.values() if "r127" in line.listed]
    accuracy = np.sort([line.top1 for line in lines])
    assert accuracy[0] < 0.60 and accuracy[-1] > 0.88 and np.diff(accuracy).max() < 0.06
    assert len({line.family for line in lines}) >= 20
    extra = {line.source for line in lines if line.group == "more_data"}
    assert extra == {"ImageNet-21k", "ImageNet-12k", "JFT-300M", "IG-1B", "IG-3.6B", "YFCC100M"}
    assert {line.source for line in lines if line.group == "standard"} == {"ImageNet-1k"}


def test_only_fine_tuned_clips_have_seen_clip():
    for line in ZOO.values():
        assert (line.group == "clip_finetuned") == ("ft35" in line.listed), line.model
        if line.group != "clip_finetuned":
            assert not [name for name in SEEN_CLIP if name in line.architecture], line.model
            assert not line.parent


def test_a_fine_tuned_clip_has_a_parent_of_the_same_training_data():
    for line in (line for line in ZOO.values() if line.group == "clip_finetuned"):
        parent = MODELS[line.parent]
        assert parent.group == "clip_zero_shot"
        assert (parent.source, parent.train_images, parent.family) == (line.source, line.train_images, line.family)
        assert line.finetuned_on == ("ImageNet-12k+ImageNet-1k" if "in12k" in line.model else "ImageNet-1k")
