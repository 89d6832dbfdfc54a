"""pm-0 and pm-10 of video sets: against brute force, with YTBB's unmapped classes, and on damaged indexes."""

import numpy as np
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import clopper_pearson
from clip_robustness.metrics.video import measure_video

BASE = ["terrier", "spaniel", "tabby", "lynx", "car", "truck"]
SPACE = {
    "name": "pets", "base": "base", "pool": "max", "classes": ["dog", "cat", "vehicle"],
    "members": [[0, 1], [2, 3], [4, 5]], "unmapped": ["giraffe", "none"], "fill": None,
}  # fmt: skip
FRAMES = 7


def build(folder, logits, frames, space=SPACE, masked=(), model="m"):
    """Files of one model on a set of frames: rows (image_id, anchor, distance, labels)."""
    folder.mkdir(exist_ok=True)
    ids = [frame[0] for frame in frames]
    columns = dict(zip(("image_id", "anchor", "distance", "labels"), map(list, zip(*frames, strict=True)), strict=True))
    first = [next((k for k, c in enumerate(space["classes"]) if c in f[3].split("|")), -1) for f in frames]
    io.write_parquet(folder / "index.parquet", columns | {"label": np.array(first, np.int32)})
    io.write_json(folder / "labels.json", space)
    io.save_array(folder / "e.npy", np.asarray(logits, np.float16))
    facts = {"model": model, "dataset": "videos", "kind": "logits", "n": len(ids), "dim": len(BASE)}
    io.write_json(folder / "e.json", facts | {"ids_sha256": io.ids_digest(ids), "masked": list(masked)})
    return folder / "e.npy", folder / "index.parquet", folder / "labels.json"


def measure(folder, *files, **more):
    measure_video(*files, folder / "out.json", folder / "predictions.parquet", resamples=300, **more)
    rows = io.read_json(folder / "out.json")["rows"]
    return {(row["metric"], row["convention"]): row for row in rows}


def world(seed, sets=40, shift=0.0):
    """Random frames whose logits favour a right class; distances up to 12, of which pm-10 ignores the last two."""
    rng = np.random.default_rng(seed)
    frames, logits = [], []
    for number in range(sets):
        right = [SPACE["classes"][i] for i in rng.choice(3, size=rng.integers(1, 3), replace=False)]
        right += ["giraffe"] * (number % 9 == 0)
        distances = [0, *rng.choice([-12, -10, -6, -1, 2, 5, 10, 11], size=rng.integers(0, FRAMES), replace=False)]
        for distance in distances:
            frames.append((f"v{number}/{distance:+d}.jpg", f"v{number}/+0.jpg", int(distance), "|".join(right)))
            own = [m for name in right if name != "giraffe" for m in SPACE["members"][SPACE["classes"].index(name)]]
            values = rng.normal(size=6) + shift
            values[own] += 1.5
            logits.append(values)
    order = rng.permutation(len(frames))
    return [frames[i] for i in order], np.array(logits, np.float16)[order]


def brute_force(frames, logits, fill=None):
    """(pm-0, pm-10) of each set by name of its anchor."""
    names = SPACE["classes"] + (SPACE["unmapped"] if fill is not None else [])
    answers = {}
    for (image_id, *_), values in zip(frames, logits, strict=True):
        pooled = [max(float(values[m]) for m in member) for member in SPACE["members"]]
        pooled += [fill] * (len(names) - 3)
        answers[image_id] = names[int(np.argmax(pooled))]
    found = {}
    for anchor in sorted({frame[1] for frame in frames}):
        near = [f for f in frames if f[1] == anchor and abs(f[2]) <= 10]
        right = {f[0]: answers[f[0]] in f[3].split("|") for f in near}
        found[anchor] = (right[anchor], all(right.values()))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_is_brute_force(seed, tmp_path):
    frames, logits = world(seed)
    rows = measure(tmp_path, *build(tmp_path, logits, frames))
    expected = np.array(list(brute_force(frames, logits).values()))
    assert 0 < expected[:, 1].sum() < expected[:, 0].sum() < len(expected)
    for metric, k in zip(("pm0_accuracy", "pm10_accuracy"), expected.sum(axis=0), strict=True):
        row = rows[metric, "3_way"]
        assert (row["value"], row["n"]) == (pytest.approx(k / len(expected)), len(expected))
        assert [row["low"], row["high"]] == pytest.approx([float(v) for v in clopper_pearson(k, len(expected))])
    mean = rows["accuracy", "3_way"]
    assert mean["value"] == pytest.approx(expected.mean()) and mean["low"] < mean["value"] < mean["high"]
    # The bootstrap's standard error is that of a mean over sets.
    error = expected.mean(axis=1).std() / len(expected) ** 0.5
    assert (mean["high"] - mean["low"]) / 3.92 == pytest.approx(error, rel=0.2)
    assert rows["pm10_accuracy", "3_way"]["value"] <= rows["pm0_accuracy", "3_way"]["value"]


def test_a_fill_of_zero_beats_a_classifier_whose_logits_are_negative(tmp_path):
    """What the released code of YTBB-Robust did, and how it favours CLIP, whose logits are positive."""
    zero = tmp_path / "zero.json"
    io.write_json(zero, SPACE | {"name": "pets_zero", "fill": 0.0})
    for shift in (-3.0, 20.0):
        frames, logits = world(1, shift=shift)
        files = build(tmp_path, logits, frames)
        rows = measure(tmp_path, *files, released_labels=zero)
        for fill, convention in ((None, "3_way"), (0.0, "3_way_fill_zero")):
            expected = np.array(list(brute_force(frames, logits, fill).values())).mean(axis=0)
            got = [rows[metric, convention]["value"] for metric in ("pm0_accuracy", "pm10_accuracy")]
            assert got == pytest.approx(list(expected))
        before, after = (rows["accuracy", convention]["value"] for convention in ("3_way", "3_way_fill_zero"))
        assert after < before - 0.05 if shift < 0 else after == before
        # A label space that has the fill itself gives the same rows by its own.
        alone = measure(tmp_path, files[0], files[1], zero)
        assert {key[1] for key in alone} == {"3_way_fill_zero"}
        assert alone["accuracy", "3_way_fill_zero"]["value"] == after
        assert rows.keys() == {(m, c) for m in ("accuracy", "pm0_accuracy", "pm10_accuracy")
                               for c in ("3_way", "3_way_fill_zero")}  # fmt: skip


def test_an_unmapped_class_that_a_frame_shows_is_right_when_the_fill_answers_it(tmp_path):
    frames = [("a/0.jpg", "a/0.jpg", 0, "giraffe")]
    files = build(tmp_path, [[-1.0] * 6], frames, SPACE | {"fill": 0.0})
    assert measure(tmp_path, *files)["accuracy", "3_way_fill_zero"]["value"] == 1
    assert measure(tmp_path, *build(tmp_path, [[-1.0] * 6], frames))["accuracy", "3_way"]["value"] == 0


def test_predictions_and_the_reference(tmp_path):
    frames, logits = world(2)
    files = build(tmp_path, logits, frames)
    rng = np.random.default_rng(0)
    known = [(f"r{i}.jpg", f"r{i}.jpg", 0, SPACE["classes"][i % 3]) for i in range(30)]
    base = {"name": "base", "base": None, "pool": "max", "classes": BASE, "members": [[i] for i in range(6)]}
    other = build(tmp_path / "reference", rng.normal(size=(30, 6)) - 1, known, base)
    labels = rng.integers(0, 6, 30).astype(np.int32)
    io.write_parquet(other[1], {"image_id": [f[0] for f in known], "label": labels})
    io.write_json(tmp_path / "zero.json", SPACE | {"fill": 0.0})
    reference = dict(zip(("reference_embeddings", "reference_index", "reference_labels"), other, strict=True))
    rows = measure(tmp_path, *files, **reference, released_labels=tmp_path / "zero.json")
    array = np.load(other[0]).astype(float).reshape(30, 3, 2).max(axis=2)
    right = array.argmax(axis=1) == labels // 2
    assert rows["reference_accuracy", "class_subset"]["value"] == pytest.approx(right.mean())
    filled = right & (array.max(axis=1) > 0)
    assert rows["reference_accuracy", "class_subset_fill_zero"]["value"] == pytest.approx(filled.mean())
    assert filled.sum() < right.sum()
    table = io.read_parquet(tmp_path / "predictions.parquet")
    pooled = logits.astype(float).reshape(-1, 3, 2).max(axis=2)
    assert list(table["image_id"]) == [f[0] for f in frames]
    assert np.array_equal(table["prediction"], pooled.argmax(axis=1))


def test_a_set_with_an_unreadable_frame_is_left_out(tmp_path):
    frames, logits = world(3)
    lost = next(f for f in frames if f[2] == 5)
    far = next(f for f in frames if f[2] == 11 and f[1] != lost[1])
    rows = measure(tmp_path, *build(tmp_path, logits, frames, masked=[lost[0], far[0]]))
    outcomes = brute_force(frames, logits)
    del outcomes[lost[1]]
    assert rows["pm10_accuracy", "3_way"]["n"] == len(outcomes)
    assert rows["accuracy", "3_way"]["value"] == pytest.approx(np.mean(list(outcomes.values())))
    assert io.read_json(tmp_path / "out.json")["manifest"]["unreadable_sets"] == 1


def test_all_right_has_an_exact_interval(tmp_path):
    frames = [(f"{i}.jpg", f"{i}.jpg", 0, "dog") for i in range(20)]
    row = measure(tmp_path, *build(tmp_path, [[1.0, 0, 0, 0, 0, 0]] * 20, frames))["accuracy", "3_way"]
    assert row["value"] == row["high"] == 1
    assert row["low"] == pytest.approx(float(clopper_pearson(20, 20)[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [("x.jpg", "gone.jpg", 3, "dog"), *f[1:]], "anchor 'gone.jpg'"),
        (lambda f: [(*f[0][:2], 4 if f[0][2] == 0 else 0, f[0][3]), *f[1:]], "only one at distance 0"),
        (lambda f: [(*f[0][:3], "dog|unicorn"), *f[1:]], "'unicorn' is no class of 'pets'"),
    ],
)
def test_a_wrong_index_is_named(change, message, tmp_path):
    frames, logits = world(0)
    with pytest.raises(InputError, match=message):
        measure(tmp_path, *build(tmp_path, logits, change(frames)))


def test_no_set_left_and_no_column(tmp_path):
    frames, logits = world(0, sets=2)
    files = build(tmp_path, logits, frames, masked=[f[0] for f in frames if f[2] == 0])
    with pytest.raises(InputError, match="no set of"):
        measure(tmp_path, *files)
    columns = io.read_parquet(files[1])
    del columns["anchor"]
    io.write_parquet(files[1], columns)
    with pytest.raises(InputError, match="no column 'anchor'"):
        measure(tmp_path, *files)


@pytest.mark.parametrize("change", [{"fill": None}, {"classes": ["dog", "cat", "boat"]}])
def test_released_labels_are_of_the_same_space(change, tmp_path):
    frames, logits = world(0)
    io.write_json(tmp_path / "zero.json", SPACE | {"fill": 0.0} | change)
    with pytest.raises(InputError, match=r"zero\.json: "):
        measure(tmp_path, *build(tmp_path, logits, frames), released_labels=tmp_path / "zero.json")
