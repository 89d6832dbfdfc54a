"""Retrieval: against brute force over every order of the tied, and from a model's text tower to rows."""

import itertools
import json

import numpy as np
import pytest
import torch

from clip_robustness.core import io, statistics
from clip_robustness.core.captions import read_captions
from clip_robustness.core.io import InputError
from clip_robustness.inference.captions import encode_captions
from clip_robustness.inference.load import load_clip, load_tokenizer
from clip_robustness.metrics import retrieval
from tests.unit.clips import SIGLIP_TEXT, clip_folder


def brute_force(queries, gallery, right, k):
    """The mean, over all orders of the gallery, of whether a stable sort puts a match (right [q, g]) in the first k."""
    scores = queries.astype(float) @ gallery.astype(float).T
    orders = np.array(list(itertools.permutations(range(len(gallery)))))
    first = [orders[np.arange(len(orders))[:, None], np.argsort(-s[orders], kind="stable")[:, :k]] for s in scores]
    return [right[q, places].any(axis=1).mean() for q, places in enumerate(first)]


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_those_of_every_order_of_what_ties(seed):
    """Few small whole numbers: equal rows, equal scores of unequal rows, several matches, and a -0."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-1, 2, (7, 3)).astype(np.float16)
    gallery = rng.integers(-1, 2, (6, 3)).astype(np.float16) * np.float16(-1)
    right = rng.random((7, 6)) < 0.3
    right[np.arange(7), rng.integers(0, 6, 7)] = True
    pairs = rng.permutation(np.argwhere(right))
    (ranks,) = retrieval.rank(queries, gallery, [(pairs[:, 0], pairs[:, 1])])
    for k in (1, 2, 5, 6, 10):
        np.testing.assert_allclose(retrieval.hits(ranks, k), brute_force(queries, gallery, right, k), atol=1e-12)


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def test_blocks_make_no_difference(monkeypatch):
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng.normal(size=(50, 16))), unit(rng.normal(size=(30, 16)))
    pairs = [(np.arange(50), rng.integers(0, 30, 50))]
    (whole,) = retrieval.rank(queries, gallery, pairs)
    scores = queries.astype(float) @ gallery.astype(float).T
    np.testing.assert_array_equal(whole.above, (scores > scores[pairs[0]][:, None]).sum(axis=1))
    monkeypatch.setattr(retrieval, "QUERIES", 7)
    for one, other in zip(whole, retrieval.rank(queries, gallery, pairs)[0], strict=True):
        np.testing.assert_array_equal(one, other)


def rows_of(images, captions, texts, owner, **options):
    rows = retrieval.retrieval_rows(images, captions, texts, np.asarray(owner), **options)
    return {(row["metric"], row["convention"]): row for row in rows}


def test_one_of_five_captions_is_enough_for_an_image_and_each_counts_for_itself():
    images = np.eye(2, dtype=np.float16)
    captions = images[[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]  # of the first image's five, the third is right
    rows = rows_of(images, captions, [f"text {i}" for i in range(10)], [0] * 5 + [1] * 5)
    assert rows["text_recall@1", "own_captions"]["value"] == pytest.approx((1 + 5 / 9) / 2)  # nine tie for the second
    assert rows["image_recall@1", "own_captions"]["value"] == pytest.approx(6 / 10)
    assert (rows["text_recall@1", "own_captions"]["n"], rows["image_recall@1", "own_captions"]["n"]) == (2, 10)


def test_a_text_of_several_images_is_right_for_all_of_them_if_duplicates_count():
    """Four images in two looks, one sentence for each look."""
    look = [0, 0, 1, 1]
    images = captions = np.eye(2, dtype=np.float16)[look]
    rows = rows_of(images, captions, [["a cube", "a cone"][i] for i in look], range(4), ks=(1, 2))
    for metric in ("image_recall", "text_recall"):
        assert rows[f"{metric}@1", "own_captions"]["value"] == 0.5
        assert rows[f"{metric}@2", "own_captions"]["value"] == 1
        assert rows[f"{metric}@1", "duplicates_positive"]["value"] == 1


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_a_model_that_sees_no_difference_is_at_chance(k):
    same = np.ones((8, 4), np.float16) / 2
    rows = rows_of(same, same, [f"text {i}" for i in range(8)], range(8), ks=(k,))
    np.testing.assert_allclose([row["value"] for row in rows.values()], min(k / 8, 1))


def test_the_interval_of_image_recall_is_a_bootstrap_over_images():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), 5)
    centre = rng.normal(size=(40, 8))
    images, captions = unit(centre), unit(centre[owner] + rng.normal(size=(40, 8))[owner] + 0.3)
    row = rows_of(images, captions, [f"text {i}" for i in range(200)], owner, ks=(1,), seed=3)
    found = row["image_recall@1", "own_captions"]
    scores = captions.astype(float) @ images.astype(float).T
    right = (scores.argmax(axis=1) == owner).reshape(40, 5)
    draws = [right[np.random.default_rng(i).integers(0, 40, 40)].mean() for i in range(2000)]
    assert found["value"] == pytest.approx(right.mean())
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.03)
    # Captions of one image stand and fall together here: as 200 independent queries they would look surer.
    naive = np.ptp(statistics.clopper_pearson(right.sum(), 200))
    assert found["high"] - found["low"] > 1.3 * naive


def test_images_that_share_a_text_are_resampled_together():
    texts = np.array([0, 1, 1, 2, 3, 3, 4])
    owner = np.array([0, 0, 1, 2, 2, 3, 4])
    groups = retrieval._groups(texts, owner)
    assert [sorted(set(owner[groups == g].tolist())) for g in np.unique(groups)] == [[0, 1], [2, 3], [4]]


CAPTIONS = [["a red cube", "a cube."], ["a torus seen from above", "a red cube"], ["a sketch of a cone"]]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def encoded(request, tmp_path_factory):
    """Weights, an index of three images with five captions, and what the text tower made of them."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = {"text_cfg": SIGLIP_TEXT, "custom_text": True} if request.param == "siglip" else {}
    weights, index = clip_folder(folder / "weights", **kind), folder / "index.parquet"
    io.write_parquet(index, {"image_id": ["a", "b", "c"], "captions": [json.dumps(texts) for texts in CAPTIONS]})
    out = folder / "coco.captions.npy"
    encode_captions("tiny", weights, index, out, folder / "work", "fp32")
    return weights, index, out


def test_captions_are_what_the_text_tower_says_one_by_one(encoded):
    weights, index, out = encoded
    clip, tokenizer = load_clip(weights), load_tokenizer(weights)
    _, texts, owner = read_captions(index)
    assert owner.tolist() == [0, 0, 1, 1, 2]
    with torch.inference_mode():
        expected = np.concatenate([clip.encode_text(tokenizer([text]), normalize=True).numpy() for text in texts])
    features, manifest = io.load_array(out), io.read_json(out.with_suffix(".json"))
    assert features.dtype == np.float16
    np.testing.assert_allclose(features, expected, atol=1e-3)
    np.testing.assert_array_equal(features[0], features[3])  # the same text
    assert (manifest["dataset"], manifest["n"], manifest["dim"]) == ("coco", 5, 24)


def test_captions_are_encoded_once(encoded, tmp_path):
    """A second index with the same texts in other places needs no model: the features are in the store."""
    weights, index, out = encoded
    io.write_parquet(tmp_path / "index.parquet", {"image_id": ["c", "a"], "caption": ["a cube.", "a red cube"]})
    extra = {"image_id": ["x", "y"], "captions": [json.dumps(CAPTIONS[2] + CAPTIONS[0]), json.dumps(CAPTIONS[1])]}
    io.write_parquet(tmp_path / "again.parquet", extra)
    store = list((index.parent / "work").iterdir())
    encode_captions(
        "tiny", weights, tmp_path / "again.parquet", tmp_path / "x.captions.npy", index.parent / "work", "fp32"
    )
    assert list((index.parent / "work").iterdir()) == store
    np.testing.assert_array_equal(io.load_array(tmp_path / "x.captions.npy"), io.load_array(out)[[4, 0, 1, 2, 3]])
    encode_captions("tiny", weights, tmp_path / "index.parquet", tmp_path / "y.captions.npy", tmp_path / "work", "fp32")
    np.testing.assert_allclose(io.load_array(tmp_path / "y.captions.npy"), io.load_array(out)[[1, 0]], atol=1e-3)


@pytest.fixture
def embedded(encoded, tmp_path):
    """Image features for the encoded captions: each image's own first caption, so that recall is perfect."""
    weights, index, out = encoded
    features = io.load_array(out)[[1, 2, 4]]
    facts = {"model": "tiny", "dataset": "coco", "kind": "features", "n": 3, "dim": 24}
    manifest = {**facts, "ids_sha256": io.ids_digest("abc"), "weights": io.check_sealed(weights)["files"]}
    io.save_array(tmp_path / "coco.npy", features)
    io.write_json(tmp_path / "coco.json", manifest)
    return tmp_path / "coco.npy", out, index, tmp_path / "out.json", manifest


def test_from_files_to_rows(embedded):
    *paths, manifest = embedded
    retrieval.measure_retrieval(*paths)
    content = io.read_json(paths[3])
    rows = {(r["metric"], r["convention"]): r for r in content["rows"]}
    assert len(rows) == 12
    text = rows["text_recall@1", "own_captions"]
    assert (text["value"], text["n"], text["model"], text["dataset"]) == (1, 3, "tiny", "coco")
    assert rows["image_recall@10", "own_captions"]["n"] == 5
    io.write_json(paths[0].with_suffix(".json"), {**manifest, "masked": ["b"]})
    retrieval.measure_retrieval(*paths)
    content = io.read_json(paths[3])
    assert {(r["metric"].partition("@")[0], r["n"]) for r in content["rows"]} == {
        ("image_recall", 3),
        ("text_recall", 2),
    }
    assert (content["manifest"]["captions"], content["manifest"]["masked"]) == (5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "'model' of its manifest differs"),
        ({"weights": {}}, "'weights' of its manifest differs"),
        ({"ids_sha256": io.ids_digest("acb")}, "made from other images"),
        ({"kind": "logits"}, "holds logits"),
        ({"n": 4}, r"its manifest says \(4, 24\)"),
    ],
)
def test_features_of_something_else_are_refused(embedded, change, message):
    *paths, manifest = embedded
    io.write_json(paths[0].with_suffix(".json"), {**manifest, **change})
    with pytest.raises(InputError, match=message):
        retrieval.measure_retrieval(*paths)


def test_other_captions_and_broken_features_are_refused(embedded, tmp_path):
    embeddings, captions, _, out, _ = embedded
    other = [json.dumps(texts) for texts in [["a"], ["b"], ["c"]]]
    io.write_parquet(tmp_path / "index.parquet", {"image_id": ["a", "b", "c"], "captions": other})
    with pytest.raises(InputError, match="made from other captions"):
        retrieval.measure_retrieval(embeddings, captions, tmp_path / "index.parquet", out)
    io.save_array(embeddings, np.full((3, 24), np.nan, np.float16))
    with pytest.raises(InputError, match=r"coco.npy: row 0: a value is NaN"):
        retrieval.measure_retrieval(*embedded[:4])


@pytest.mark.parametrize(
    ("column", "message"),
    [({"captions": ["no list"]}, "row 0: 'captions' is"), ({"captions": ["[]"]}, "row 0"), ({"x": [1]}, "no column")],
)
def test_an_index_without_captions_is_refused(column, message, tmp_path):
    io.write_parquet(tmp_path / "index.parquet", {"image_id": ["a"], **column})
    with pytest.raises(InputError, match=message):
        read_captions(tmp_path / "index.parquet")
