"""Real weights through the project's own classifier path: EfficientNet-Lite0 on 20 ImageNet photos."""

from clip_robustness.core import io
from clip_robustness.inference.embed import embed
from clip_robustness.inference.label_spaces import write_label_space
from clip_robustness.inference.pixels import cache_pixels
from clip_robustness.metrics.accuracy import measure_accuracy
from tests.golden.lite0 import PIXELS, SPEC, lite0_folder, photo_index


def test_efficientnet_lite0_scores_0_90(tmp_path):
    weights = lite0_folder(tmp_path / "weights")
    photo_index(tmp_path / "photos.parquet")
    write_label_space("imagenet_1k", {"classes": "open_clip:imagenet"}, None, tmp_path / "imagenet_1k.json")
    assert io.read_json(tmp_path / "imagenet_1k.json")["wnids"][243] == "n02108422"  # bull mastiff

    cache_pixels(tmp_path / "photos.parquet", PIXELS, tmp_path / "photos.npy")
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
