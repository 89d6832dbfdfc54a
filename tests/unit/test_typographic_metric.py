"""A printed word: accuracy, how often the word is believed, and what it changes on the same images."""

import numpy as np
import pytest
import scipy.stats

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.metrics.typographic import measure_typographic

N, CLASSES, DIMENSIONS = 200, 5, 8
NAMES = list("abcde")


def write(folder, name, ids, features, labels, **columns):
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    ids = np.array(ids, object)
    io.save_array(folder / f"{name}.npy", features)
    manifest = {"model": "tiny", "kind": "features", "dataset": name, "n": len(ids), "dim": features.shape[1]}
    io.write_json(folder / f"{name}.json", {**manifest, "ids_sha256": io.ids_digest(ids)})
    index = {"image_id": ids, "label": labels.astype(np.int32)}
    io.write_parquet(folder / f"{name}.parquet", index | columns)


@pytest.fixture
def made(tmp_path):
    """Printed images that lean to the printed class, in another order and with other names than their sources."""
    rng = np.random.default_rng(0)
    weight = np.linalg.qr(rng.normal(size=(DIMENSIONS, CLASSES)))[0].T
    labels = np.sort(rng.integers(0, CLASSES, N))
    target = (labels + rng.integers(1, CLASSES, N)) % CLASSES
    clean = weight[labels] + 0.35 * rng.normal(size=(N, DIMENSIONS))
    write(tmp_path, "source", [f"train/{i:05d}" for i in range(N)], clean, labels)
    order = rng.permutation(N)[: N - 20]  # the word did not fit on the others
    printed = clean[order] + 0.9 * weight[target[order]]
    ids = [f"{NAMES[labels[i]]}/{i:05d}.png" for i in order]
    write(tmp_path, "printed", ids, printed, labels[order], target_class=target[order].astype(np.int32))
    head = {"weight": weight.astype(np.float32), "scale": np.float32(10), "bias": np.float32(0)}
    np.savez(tmp_path / "one.base.npz", **head)
    space = {"name": "base", "base": None, "classes": NAMES, "members": [[i] for i in range(CLASSES)], "pool": "max"}
    io.write_json(tmp_path / "space.json", space)
    return tmp_path


def measured(folder, source=True, **options):
    paths = [folder / name for name in ("printed.npy", "printed.parquet", "space.json", "out.json")]
    if source:
        options = {"source_embeddings": folder / "source.npy", "source_index": folder / "source.parquet", **options}
    measure_typographic(*paths, **{"head": folder / "one.base.npz", **options})
    content = io.read_json(folder / "out.json")
    return {row["metric"]: row for row in content["rows"]}, content["manifest"]


def answers(folder, name):
    """The answer to each image, by its number."""
    index = io.read_parquet(folder / f"{name}.parquet")
    weight = np.load(folder / "one.base.npz")["weight"]
    answer = (np.load(folder / f"{name}.npy").astype(float) @ weight.T).argmax(axis=1)
    number = [i.rpartition("/")[2].removesuffix(".png") for i in index["image_id"]]
    return dict(zip(number, answer.tolist(), strict=True)), dict(zip(number, range(len(number)), strict=True)), index


def test_rows_are_those_of_a_loop_over_images(made):
    rows, manifest = measured(made)
    (printed, at, index), (clean, *_) = answers(made, "printed"), answers(made, "source")
    counts = dict.fromkeys(("accuracy", "attack_success_rate", "clean_accuracy", "clean_success_rate"), 0)
    for number, row in at.items():
        label, target = index["label"][row], index["target_class"][row]
        counts["accuracy"] += printed[number] == label
        counts["attack_success_rate"] += printed[number] == target
        counts["clean_accuracy"] += clean[number] == label
        counts["clean_success_rate"] += clean[number] == target
    n = N - 20
    for metric, k in counts.items():
        interval = scipy.stats.binomtest(int(k), n).proportion_ci(method="exact")
        expected = {"value": k / n, "low": interval.low, "high": interval.high, "n": n}
        assert {name: rows[metric][name] for name in expected} == pytest.approx(expected)
        assert (rows[metric]["model"], rows[metric]["dataset"], rows[metric]["convention"]) == (
            "tiny", "printed", "5_way",
        )  # fmt: skip
    drop = rows["accuracy_drop"]
    assert drop["value"] == pytest.approx((counts["clean_accuracy"] - counts["accuracy"]) / n)
    assert drop["low"] < drop["value"] < drop["high"] and drop["low"] > 0.1
    assert counts["clean_accuracy"] > counts["accuracy"] and counts["attack_success_rate"] > 0.2 * n
    assert (manifest["measured"], manifest["paired"]) == (n, n)


def test_the_drop_is_better_known_than_by_two_separate_samples(made):
    rows, _ = measured(made)
    drop, accuracy, clean = (rows[name] for name in ("accuracy_drop", "accuracy", "clean_accuracy"))
    assert drop["high"] - drop["low"] < accuracy["high"] - accuracy["low"] + clean["high"] - clean["low"]


def test_a_word_that_changes_nothing_drops_nothing(made):
    for suffix in (".npy", ".json", ".parquet"):
        (made / f"source{suffix}").write_bytes((made / f"printed{suffix}").read_bytes())
    rows, _ = measured(made)
    assert rows["clean_accuracy"]["value"] == rows["accuracy"]["value"]
    assert rows["clean_success_rate"]["value"] == rows["attack_success_rate"]["value"]
    assert rows["accuracy_drop"]["value"] == 0 and rows["accuracy_drop"]["low"] < 0 < rows["accuracy_drop"]["high"]


def test_without_the_source_only_the_printed_images_are_measured(made):
    rows, manifest = measured(made, source=False)
    assert set(rows) == {"accuracy", "attack_success_rate"} and manifest["paired"] == 0


def test_a_source_that_could_not_be_read_is_left_out_of_the_pairs(made):
    manifest = io.read_json(made / "source.json")
    (_, at, index), (clean, *_) = answers(made, "printed"), answers(made, "source")
    gone = list(at)[:7]
    io.write_json(made / "source.json", {**manifest, "masked": [f"train/{number}" for number in gone]})
    rows, facts = measured(made)
    assert facts["paired"] == rows["clean_accuracy"]["n"] == rows["accuracy_drop"]["n"] == N - 27
    assert rows["accuracy"]["n"] == N - 20
    kept = [clean[number] == index["label"][row] for number, row in at.items() if number not in gone]
    assert rows["clean_accuracy"]["value"] == pytest.approx(np.mean(kept))


def change(folder, name, **columns):
    table = io.read_parquet(folder / f"{name}.parquet")
    io.write_parquet(folder / f"{name}.parquet", table | columns)


def rename(folder, ids):
    manifest = io.read_json(folder / "source.json")
    io.write_json(folder / "source.json", {**manifest, "ids_sha256": io.ids_digest(ids)})
    change(folder, "source", image_id=np.array(ids, object))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f, "printed", target_class=io.read_parquet(f / "printed.parquet")["label"]), "another class"),
        (lambda f: change(f, "printed", target_class=np.full(N - 20, -1, np.int32)), "another class as target_class"),
        (lambda f: change(f, "printed", target_class=np.full(N - 20, 9, np.int32)), r"9; expected -1..4"),
        (lambda f: change(f, "source", label=np.zeros(N, np.int32)), "label of .* differs"),
        (lambda f: rename(f, [f"x/{i}" for i in range(N)]), "no image of the name"),
        (lambda f: io.write_json(f / "source.json", io.read_json(f / "source.json") | {"model": "b"}), "of model 'b'"),
    ],
)
def test_what_does_not_belong_together_is_refused(made, spoil, message):
    spoil(made)
    with pytest.raises(InputError, match=message):
        measured(made)


def test_half_a_source_is_refused(made):
    with pytest.raises(InputError, match="alone; needed: embeddings and index"):
        measured(made, source_index=None)


def test_a_name_that_two_sources_have_is_refused(made):
    printed = answers(made, "printed")[0]
    names = [f"train/{i:05d}" for i in range(N)]
    twin = next(i for i, name in enumerate(names) if name.removeprefix("train/") not in printed)
    number = min(printed)
    rename(made, [f"other/{number}" if i == twin else name for i, name in enumerate(names)])
    with pytest.raises(InputError, match=rf"2 images of the name '{number}'"):
        measured(made)


def test_equal_ids_come_before_equal_names(made):
    """Ids that are shared are taken as they are, though file names repeat (a folder a class, numbered anew)."""
    for name in ("printed", "source"):
        index, manifest = io.read_parquet(made / f"{name}.parquet"), io.read_json(made / f"{name}.json")
        numbers = [int(i.rpartition("/")[2].removesuffix(".png")) for i in index["image_id"]]
        ids = np.array([f"{number // 2}/{number % 2}.png" for number in numbers], object)
        change(made, name, image_id=ids)
        io.write_json(made / f"{name}.json", {**manifest, "ids_sha256": io.ids_digest(ids)})
    assert measured(made)[0]["accuracy_drop"]["n"] == N - 20
