"""Search for near-duplicates: against brute force, with planted copies of photographs, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import clip_robustness
from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import duplicates
from clip_robustness.inference.duplicates import find_duplicates
from clip_robustness.metrics.overlap import choose_threshold
from tests.unit.samples import encoded

WEIGHTS = {"model.safetensors": "a" * 64}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder, name, rows, ids=None, columns=None, **facts):
    """Embeddings as `embed` leaves them, with their index; the path of the .npy file."""
    ids = [f"{name}/{i}" for i in range(len(rows))] if ids is None else ids
    path = folder / f"{name}.npy"
    io.save_array(path, np.asarray(rows, np.float16))
    manifest = {"model": "detector", "dataset": name, "kind": "features", "n": len(rows), "dim": rows.shape[1]}
    manifest |= {"weights": WEIGHTS, "preprocess": "resize(32)", "ids_sha256": io.ids_digest(ids)}
    io.write_json(path.with_suffix(".json"), manifest | facts)
    io.write_parquet(path.with_suffix(".parquet"), {"image_id": ids} | (columns or {}))
    return path


def search(test, references, **options):
    out = test.with_name("matches.parquet")
    find_duplicates(test, test.with_suffix(".parquet"), references, out, **options)
    return io.read_parquet(out)


def brute_force(queries, corpora, own=None):
    """(corpus, row, similarity) of the first of the nearest; `own`: the corpus that is the test set itself."""
    found = []
    for number, query in enumerate(queries.astype(np.float64)):
        cosines = []
        for corpus, rows in enumerate(corpora):
            rows = rows.astype(np.float64)
            values = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
            if corpus == own:
                values[number] = -np.inf
            cosines.append(values.astype(np.float32))
        best = max(values.max() for values in cosines)
        corpus = next(i for i, values in enumerate(cosines) if values.max() == best)
        found.append((corpus, int(cosines[corpus].argmax()), float(best)))
    return found


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_the_nearest_are_those_of_brute_force(tmp_path, monkeypatch, block):
    """Two corpora, one made elsewhere in shards; many equal rows, in one block and across blocks and corpora."""
    monkeypatch.setattr(duplicates, "BLOCK", block)
    rng = np.random.default_rng(0)
    queries, own, other = (unit(rng.normal(size=(n, 24))).astype(np.float16) for n in (40, 150, 130))
    own[20:60] = own[5]
    own[100:110] = queries[3]
    other[[0, 50, 129]] = queries[3]
    other[7] = own[5]
    other[[25, 115]] = queries[15]  # in the shards 2 and 10
    queries[11] = own[5]
    test, corpus = write(tmp_path, "test", queries), write(tmp_path, "corpus", own)
    for number, part in enumerate(np.array_split(other, 12)):
        io.save_array(tmp_path / "laion" / f"img_emb_{number}.npy", part)
    places = np.concatenate([[f"img_emb_{n}.npy:{i}" for i in range(len(p))]
                             for n, p in enumerate(np.array_split(other, 12))])  # fmt: skip
    table = search(test, [corpus, tmp_path / "laion"], indexes=[corpus.with_suffix(".parquet")])
    expected = brute_force(queries, [own, other])
    names = ([f"corpus/{i}" for i in range(150)], places)
    assert list(table["match"]) == [names[c][row] for c, row, _ in expected]
    assert list(table["corpus"]) == [("corpus", "laion")[c] for c, _, _ in expected]
    assert table["similarity"].dtype == np.float32
    np.testing.assert_allclose(table["similarity"], [s for *_, s in expected], atol=2e-7)
    assert table["match"][3] == "corpus/100" and table["match"][11] == "corpus/5"
    manifest = json.loads((tmp_path / "matches.json").read_text())
    assert manifest["references"] == {"corpus": 150, "laion": 130} and manifest["n"] == 40


def test_of_equal_references_the_first_are_searched():
    """However many there are, and whatever faiss makes of ties."""
    rows = np.float32([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    assert duplicates._distinct(rows, np.array([], int), 1).tolist() == [0, 1]
    assert duplicates._distinct(rows, np.array([], int), 2).tolist() == [0, 1, 2, 4]
    assert duplicates._distinct(rows, np.array([0, 4]), 2).tolist() == [1, 2, 3]


@pytest.mark.parametrize("block", [5, 4096])
def test_an_image_is_not_its_own_duplicate(tmp_path, monkeypatch, block):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    rows = unit(np.random.default_rng(1).normal(size=(30, 16))).astype(np.float16)
    rows[[2, 9, 21, 22, 23, 24, 25]] = rows[2]  # the same picture under seven ids
    test = write(tmp_path, "val", rows)
    table = search(test, [test], indexes=[test.with_suffix(".parquet")])
    assert list(table["match"]) == [f"val/{row}" for _, row, _ in brute_force(rows, [rows], own=0)]
    assert table["match"][2] == "val/9" and table["match"][9] == "val/2" and table["similarity"][9] == 1
    assert not np.any(table["match"] == table["image_id"])


def test_images_that_could_not_be_read_are_no_matches(tmp_path):
    rows = unit(np.random.default_rng(2).normal(size=(9, 8)))
    test = write(tmp_path, "test", rows[:4], masked=["test/1"])
    corpus = write(tmp_path, "corpus", rows, masked=["corpus/0", "corpus/8"])
    with pytest.raises(InputError, match=r"corpus.npy: 2 of its images .* index"):
        search(test, [corpus])
    table = search(test, [corpus], indexes=[corpus.with_suffix(".parquet")])
    assert list(table["image_id"]) == ["test/0", "test/2", "test/3"]
    assert list(table["match"][1:]) == ["corpus/2", "corpus/3"] and table["similarity"][0] < 0.99


def test_bytes_do_not_depend_on_threads(tmp_path):
    rng = np.random.default_rng(3)
    test = write(tmp_path, "test", unit(rng.normal(size=(300, 64))))
    corpus = write(tmp_path, "corpus", unit(np.repeat(rng.normal(size=(500, 64)), 3, axis=0)))
    code = (
        "import sys; from pathlib import Path; from clip_robustness.inference.duplicates import find_duplicates\n"
        "t, c, o = map(Path, sys.argv[1:]); find_duplicates(t, t.with_suffix('.parquet'), [c], o)"
    )
    contents = []
    for threads in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1])}
        out = tmp_path / f"{threads}.parquet"
        command = [sys.executable, "-c", code, str(test), str(corpus), str(out)]
        subprocess.run(command, check=True, env=environment | {"OMP_NUM_THREADS": threads}, capture_output=True)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak memory, mapped pages included, of a corpus of 5 and of 60 MB, in blocks of 1,024."""
    rng = np.random.default_rng(4)
    test = write(tmp_path, "test", unit(rng.normal(size=(20, 256))))
    code = (
        "import sys; from pathlib import Path; from clip_robustness.inference import duplicates as d\n"
        "d.BLOCK = 1024; t, c, o = map(Path, sys.argv[1:])\n"
        "d.find_duplicates(t, t.with_suffix('.parquet'), [c], o)\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    rows = unit(rng.normal(size=(10_000, 256))).astype(np.float16)
    peaks = []
    for copies in (1, 12):
        corpus = tmp_path / f"corpus{copies}.npy"
        io.save_array(corpus, np.tile(rows, (copies, 1)))
        environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1])}
        command = [sys.executable, "-c", code, str(test), str(corpus), str(tmp_path / "out.parquet")]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 10_000  # kB; mapped as a whole, the corpus would add 56,000


def wrong_inputs(folder):
    rows = unit(np.random.default_rng(5).normal(size=(6, 8)))
    bad = {"nan": rows.copy(), "long": rows.copy(), "half": np.array(rows, np.float16)[:, :4]}
    bad["nan"][3, 2] = np.nan
    bad["long"][4] *= 1.5
    for name, array in bad.items():
        io.save_array(folder / f"{name}.npy", np.asarray(array, np.float16))
    (folder / "cut.npy").write_bytes((folder / "nan.npy").read_bytes()[:-20])
    (folder / "empty").mkdir()
    write(folder, "other", rows, weights={"model.safetensors": "b" * 64})
    write(folder, "larger", rows, preprocess="resize(64)")
    write(folder, "logits", rows, kind="logits")
    write(folder, "short", rows, n=7)
    write(folder / "again", "test", rows, ids=list("abcdef"))
    write(folder, "one", rows[:1])


@pytest.mark.parametrize(
    ("reference", "message"),
    {
        "nan.npy": r"nan.npy: row 3: NaN or infinite",
        "long.npy": r"long.npy: row 4: norm 1\.[45]",
        "half.npy": r"half.npy: shape \(6, 4\), expected \[n, 8\]",
        "cut.npy": r"cut.npy: not a whole .npy array",
        "absent.npy": r"absent.npy: no such file",
        "empty": r"empty: no .npy file",
        "other.npy": r"other.npy: 'weights' differs",
        "larger.npy": r"larger.npy: 'preprocess' differs",
        "logits.npy": r"logits.npy: holds logits",
        "short.npy": r"short.npy: shape \(6, 8\), its manifest says \(7, 8\)",
        "again/test.npy": r"again/test.npy: other images of 'test'",
    }.items(),
)
def test_inputs_it_refuses(tmp_path, reference, message):
    wrong_inputs(tmp_path)
    test = write(tmp_path, "test", unit(np.random.default_rng(6).normal(size=(5, 8))))
    with pytest.raises(InputError, match=message):
        search(test, [tmp_path / reference])
    assert not (tmp_path / "matches.parquet").exists()


def test_more_that_it_refuses(tmp_path):
    wrong_inputs(tmp_path)
    one = tmp_path / "one.npy"
    with pytest.raises(InputError, match="no reference to compare"):
        search(one, [one])
    with pytest.raises(InputError, match=r"other\.parquet: other images"):
        find_duplicates(one, tmp_path / "other.parquet", [one], tmp_path / "matches.parquet")
    with pytest.raises(InputError, match="2 names for 1 references"):
        search(one, [one], names=["a", "b"])


# --- planted copies of photographs, found by a detector


def photographs():
    """Crops of foolbox's 20 ImageNet photographs at 64 px, three of each: whole, left and right part."""
    folder = Path(foolbox.__file__).parent / "data"
    pictures = []
    for path in sorted(folder.glob("imagenet_*.jpg")):
        with Image.open(path) as picture:
            width, height = picture.size
            boxes = ((0, 0, width, height), (0, 0, width // 2, height // 2), (width // 2, height // 2, width, height))
            pictures += [picture.convert("RGB").crop(box).resize((64, 64), Image.Resampling.BICUBIC) for box in boxes]
    return pictures


def reopen(data):
    import io as bytes_io

    return Image.open(bytes_io.BytesIO(data)).convert("RGB")


TRANSFORMS = {
    "resized": lambda p: p.resize((28, 28), Image.Resampling.BILINEAR),
    "recompressed": lambda p: reopen(encoded(p, "JPEG", quality=30)),
    "cropped": lambda p: p.crop((3, 3, 61, 61)),
    "mirrored": lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def detect(pictures):
    """Features [n, d] that see where colours and edges are, but not left from right: random filters, pooled 4 x 4."""
    torch.manual_seed(0)
    filters = torch.cat([torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 5, 5) / 25, torch.randn(45, 3, 5, 5) / 8])
    features = []
    for picture in pictures:
        small = picture.filter(ImageFilter.GaussianBlur(picture.width / 40)).resize((48, 48), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255 - 0.45
        both = torch.cat([pixels, pixels.flip(3)])
        maps = torch.nn.functional.conv2d(both, filters).relu()
        features.append(torch.nn.functional.adaptive_avg_pool2d(maps, 4).sum(0).flatten().numpy())
    features = np.array(features)
    features -= features.mean(axis=0)
    return unit(features / (features.std(axis=0) + 1e-3))


def test_planted_copies_are_found_and_a_disjoint_set_is_not(tmp_path):
    """60 pictures: the corpus has four copies of each of the first half, and nothing of the other half."""
    pictures = photographs()
    copies = [(number, name, make(p)) for number, p in enumerate(pictures) for name, make in TRANSFORMS.items()]
    everything = detect(pictures + [copy for *_, copy in copies])
    originals, copied = everything[: len(pictures)], everything[len(pictures) :]
    sources = write(tmp_path, "sources", originals)
    columns = {"source": [f"sources/{n}" for n, *_ in copies], "transform": [name for _, name, _ in copies]}
    planted = write(tmp_path, "copies", copied, columns=columns)
    threshold = tmp_path / "threshold.json"
    choose_threshold(planted, planted.with_suffix(".parquet"), sources, sources.with_suffix(".parquet"), threshold,
                     false_positives=0.02)  # fmt: skip
    content = json.loads(threshold.read_text())
    rows = {(row["metric"], row["slice"]): row for row in content["rows"]}
    assert {name for metric, name in rows if metric == "recall"} == {"", *TRANSFORMS}
    for name in ("", *TRANSFORMS):
        assert rows["recall", name]["value"] >= 0.9, name
    assert rows["precision", ""]["value"] >= 0.9
    assert rows["false_positive_rate", ""]["low"] <= 0.02

    # The search as a whole: the first 30 have copies in the corpus, the last 30 have not.
    numbers = np.array([number for number, *_ in copies])
    corpus = write(tmp_path, "corpus", copied[numbers < 30])
    similarity = search(sources, [corpus])["similarity"]
    found = similarity >= content["manifest"]["threshold"]
    assert found[:30].all() and found[30:].mean() <= rows["false_positive_rate", ""]["high"]
