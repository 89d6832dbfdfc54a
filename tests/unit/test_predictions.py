"""Predictions of another program become embeddings that every metric reads, or one clear error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference.predictions import import_predictions
from clip_robustness.metrics.measure import join

IDS = [f"img_{i:03d}.jpg" for i in range(40)]


@pytest.fixture
def house(tmp_path):
    """An index of 40 images in 5 classes, in the order of IDS."""
    labels = np.arange(40, dtype=np.int32) % 5
    io.write_parquet(tmp_path / "toy.index.parquet", {"image_id": np.array(IDS), "label": labels})
    names = list("abcde")
    space = {"name": "five", "base": None, "classes": names, "members": [[i] for i in range(5)], "pool": "max"}
    io.write_json(tmp_path / "five.json", space)
    return tmp_path


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 4, (40, 5)).astype(np.float32)


def give(house, kind, ids, values):
    table = {"image_id": list(ids), kind: [list(map(float, row)) for row in values]}
    parquet.write_table(pa.table(table), house / "toy.parquet")
    return house / "toy.parquet"


def run(house, path):
    out = house / "out" / "toy.npy"
    import_predictions("theirs", path, house / "toy.index.parquet", house / "five.json", out)
    return np.load(out), json.loads(out.with_suffix(".json").read_text())


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_rows_are_joined_by_image_id_whatever_their_order(house, logits):
    order = np.random.default_rng(1).permutation(40)
    more = [*np.array(IDS)[order], "not_in_this_set.jpg"]
    values, manifest = run(house, give(house, "logits", more, np.vstack([logits[order], logits[:1]])))
    assert np.array_equal(values, logits.astype(np.float16))
    assert manifest["model"] == "theirs" and manifest["ids_sha256"] == io.ids_digest(IDS)
    images = join(house / "out/toy.npy", house / "toy.index.parquet", house / "five.json")
    assert len(images.labelled) == 40


def test_npy_with_ids_beside_it_gives_the_same(house, logits):
    from_parquet, _ = run(house, give(house, "logits", IDS, logits))
    np.save(house / "toy.npy", logits[::-1])
    (house / "toy.ids.txt").write_text("\n".join(IDS[::-1]) + "\n")
    from_npy, _ = run(house, house / "toy.npy")
    assert np.array_equal(from_npy, from_parquet)


def test_probabilities_keep_their_softmax(house, logits):
    values, manifest = run(house, give(house, "probabilities", IDS, softmax(logits)))
    assert manifest["given"] == "probabilities"
    assert np.abs(softmax(values.astype(np.float64)) - softmax(logits)).max() < 5e-3
    assert np.array_equal(values.argmax(axis=1), logits.argmax(axis=1))


def test_a_probability_of_zero_is_far_below_all_others(house):
    values, _ = run(house, give(house, "probabilities", IDS, np.eye(5)[np.arange(40) % 5]))
    assert np.isfinite(values).all() and values.min() < -60 and values.max() == 0


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "logits",
            lambda ids, v: (ids[:30], v[:30]),
            ["no prediction for 10 of 40", "img_030.jpg", "ids must be those"],
        ),
        ("logits", lambda ids, v: ([*ids, ids[3]], np.vstack([v, v[:1]])), ["more than once", "img_003.jpg"]),
        ("logits", lambda ids, v: (ids, v[:, :4]), ["[40, 4]", "expected [n, 5]", "five.json"]),
        ("logits", lambda ids, v: (ids, np.where(np.eye(40, 5, -7) > 0, np.nan, v)), ["not finite", "img_007.jpg"]),
        ("logits", lambda ids, v: (ids, v * 1e6), ["float16"]),
        ("probabilities", lambda ids, v: (ids, v), ["not finite, not negative, of sum 1", "40 rows"]),
        ("scores", lambda ids, v: (ids, v), ["columns image_id, scores", "either logits or probabilities"]),
    ],
)
def test_what_cannot_be_taken_is_said(house, logits, kind, change, said):
    path = give(house, kind, *change(IDS, logits))
    with pytest.raises(InputError) as caught:
        run(house, path)
    assert all(text in str(caught.value) for text in ["toy.parquet", *said])
    assert not (house / "out").exists()


def test_npy_without_ids_and_a_file_that_was_cut(house, logits):
    np.save(house / "toy.npy", logits)
    with pytest.raises(InputError, match=r"toy\.ids\.txt: cannot read the image ids"):
        run(house, house / "toy.npy")
    path = give(house, "logits", IDS, logits)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole parquet file"):
        run(house, path)
