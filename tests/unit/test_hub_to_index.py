"""A data set of a model hub, from the local hub cache to pictures and labels: webdataset shards and parquet."""

import io as streams
from pathlib import Path

import pytest
from PIL import Image

from clip_robustness.core import archive, io
from clip_robustness.data.hub import fetch_hub
from clip_robustness.data.index import build_index
from tests.unit import test_fetch
from tests.unit.layouts import parquet
from tests.unit.samples import encoded, make_tar, picture

SPACE = {"name": "two", "base": None, "classes": ["ant", "bee"], "members": [[0], [1]], "pool": "max", "wnids": []}
PICTURES = [encoded(picture(8, 8, seed), "PNG") for seed in range(4)]


def shards(tmp_path: Path, form: str) -> dict[str, bytes]:
    if form == "parquet":
        rows = [(f"{i}.png", PICTURES[i], i % 2) for i in range(4)]
        return {"data/test-00000-of-00001.parquet": parquet(tmp_path / "shard.parquet", rows).read_bytes()}
    found = {}
    for shard in range(2):
        files = {}
        for i in range(2 * shard, 2 * shard + 2):
            files |= {f"s{i:04d}.png": PICTURES[i], f"s{i:04d}.cls": str(i % 2).encode()}
        found[f"test/{shard}.tar"] = make_tar(tmp_path / f"{shard}.tar", files).read_bytes()
    return found


@pytest.mark.parametrize(("form", "family"), [("webdataset", "webdataset"), ("parquet", "hub_parquet")])
def test_from_the_hub_cache_to_pictures_and_labels(tmp_path, monkeypatch, form, family):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(test_fetch, "SHARDS", shards(tmp_path, form))
    store = test_fetch.hub_cache(tmp_path / "cache")
    source = {"repository": "clip/set", "revision": test_fetch.COMMIT, "files": ["*"], "format": form}
    dataset = {"name": "x", "family": family, "licence": "MIT", "hub": source, "images": 4}
    fetch_hub(dataset, tmp_path / "x", tmp_path / "lock.json", hub_cache=store)
    io.write_json(tmp_path / "two.json", SPACE)
    assert build_index(dataset, [tmp_path / "x"], tmp_path / "two.json", tmp_path / "x.parquet") == 4
    index = archive.load_index(tmp_path / "x.parquet")
    assert sorted(index["label"].tolist()) == [0, 0, 1, 1]
    places = zip(*(index[name].tolist() for name in ("archive", "offset", "size", "image_id", "codec")), strict=True)
    read = [archive.read_member(*place) for place in places]
    assert [PICTURES.index(content) % 2 for content in read] == index["label"].tolist()
    assert all(Image.open(streams.BytesIO(content)).size == (8, 8) for content in read)
