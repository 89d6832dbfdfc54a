"""Model cards: quantities, ranks, reliability, outliers and pictures are those of the tables and predictions."""

import re

import numpy as np
import pandas as pd
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.report import cards, outliers
from clip_robustness.report.quantities import MODEL_AXIS, encode, known_models, quantities
from tests.unit import figure_tables
from tests.unit.samples import encoded, make_tar, picture


def write_tables(tables, folder):
    folder.mkdir()
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    return sorted(folder.glob("*.parquet"))


def test_quantities_are_the_tables_values_one_a_convention():
    frames = figure_tables.study()
    found = {quantity.key: quantity for quantity in quantities(frames)}
    recalls = [q for q in found.values() if q.metric == "text_recall@10"]
    assert {q.convention for q in recalls} == {"own_captions", "duplicates_positive"}
    row = frames["shape_bias"].query("model == 'vit' and slice == ''").iloc[0]
    shape = next(q for q in found.values() if q.metric == "shape_bias" and "vit" in set(q.rows["model"]))
    assert shape.rows.set_index("model").loc["vit", "value"] == row["value"] and shape.unit == "percent"
    assert not any(":" in quantity.slice for quantity in found.values()), "no bins"
    assert found["model.train_images"].axis == MODEL_AXIS


def test_a_quantity_is_encoded_by_place_with_exact_counts():
    frames = figure_tables.study()
    models = known_models(frames)
    places = {name: place for place, name in enumerate(models["model"])}
    quantity = next(q for q in quantities(frames) if q.metric == "auroc")
    coded = encode(quantity, places)
    assert [models["model"][place] for place in coded["m"]] == list(quantity.rows["model"])
    np.testing.assert_allclose(coded["v"], quantity.rows["value"], rtol=1e-4)
    assert coded["n"] == 60000 and len(coded["l"]) == len(coded["h"]) == len(coded["m"])


def test_models_that_no_table_of_models_knows_are_there():
    frames = {"accuracy": pd.DataFrame([figure_tables.measure("stray", "val", "accuracy", 0.5)])}
    models = known_models(frames)
    assert list(models["model"]) == ["stray"] and list(models["group"]) == ["unlisted"]


def test_ranks_are_within_the_group_and_by_what_is_better(tmp_path):
    tables = figure_tables.study()
    write = write_tables(tables, tmp_path / "tables")
    cards.write_cards("mini", write, tmp_path / "models")
    clips = tables["models"].query("group == 'clip_zero_shot'")["model"]
    text = (tmp_path / "models" / "clip_b.html").read_text(encoding="utf-8")
    for metric, name, ascending in (("accuracy", "Val, accuracy", False), ("nll", "Val, NLL, before", True)):
        table = tables["accuracy" if metric == "accuracy" else "calibration"]
        rows = table[
            (table["metric"] == metric) & (table["dataset"] == "mini_val") & table["slice"].isin(["", "before"])
        ]
        rows = rows[rows["model"].isin(clips)].set_index("model")["value"]
        rank = int(rows.rank(ascending=ascending)["clip_b"])
        cells = re.search(rf"<tr><td>{name}</td>(.*?)</tr>", text)[1]
        assert f"<td>{rank} of {len(rows)}</td>" in cells
    assert "Worst visual factors" in text and text.count('class="strip"') > 10


def test_the_reliability_diagram_holds_every_bin(tmp_path):
    tables = figure_tables.study()
    cards.write_cards("mini", write_tables(tables, tmp_path / "tables"), tmp_path / "models")
    text = (tmp_path / "models" / "rn.html").read_text(encoding="utf-8")
    drawn = text[text.index('<svg class="reliability"') :].partition("</svg>")[0]
    bins = tables["calibration"].query("model == 'rn' and metric == 'bin_accuracy'")
    assert drawn.count("<circle") == len(bins) == 18 and drawn.count('class="hollow"') == 9
    person = (tmp_path / "models" / "person.html").read_text(encoding="utf-8")
    assert "CLIP" not in person.partition("<h2>")[0] and "Human" in person


def test_cards_are_reproducible_linked_and_self_contained(tmp_path):
    paths = write_tables(figure_tables.study(), tmp_path / "tables")
    cards.write_cards("mini", paths, tmp_path / "one")
    cards.write_cards("mini", paths[::-1], tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    listed = io.read_json(tmp_path / "one" / "cards.json")
    assert set(listed.values()) | {"index.html", "cards.json"} == set(one)
    for content in one.values():
        for link in re.findall(r'(?:href|src)="([^"]+)"', content.decode()):
            assert link in one or link.startswith("data:") or link == "../report.html"
    assert f'href="{listed["clip_a"]}"' in one[listed["tuned"]].decode(), "a child names its parent"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "con:aux", ".hidden", "x" * 300, "", "naïve", "index", "%2e%2e"]
)
def test_a_name_is_never_a_path(name):
    found = cards.file_names([name, name.upper(), "plain"])
    assert len({file.lower() for file in found.values()}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,100}\.html", file) for file in found.values())
    assert "index.html" not in found.values() and found["plain"] == "plain.html"


@pytest.fixture
def predicted(tmp_path):
    """Four models on 40 images of two classes: `odd` gets the cubes wrong that all others get right."""
    ids, labels = np.array([f"img/{k:02d}" for k in range(40)], object), np.arange(40) % 2
    names = {"clip_a": 0, "clip_b": 0, "clip_rn": 0, "clip_third": 12}
    for model, wrong in names.items():
        answer = labels.copy()
        answer[np.flatnonzero(labels == 1)[:wrong]] = 0
        columns = {"image_id": ids, "label": labels.astype(np.int32), "prediction": answer.astype(np.int32)}
        io.write_parquet(tmp_path / "predictions" / model / "mini_val.parquet", columns | {"confidence": np.ones(40)})
    io.write_json(
        tmp_path / "mini.json", {"classes": ["arch", "cube"], "members": [[0], [1]], "name": "mini", "base": None}
    )
    images = {f"img/{k:02d}": encoded(picture(48, 48, k), "PNG") for k in range(40)}
    make_tar(tmp_path / "images.tar", images)
    return tmp_path, sorted((tmp_path / "predictions").rglob("*.parquet"))


def index_of(tar, out):
    import tarfile

    with tarfile.open(tar) as archive:
        members = [(m.name, m.offset_data, m.size) for m in archive]
    names, offsets, sizes = zip(*members, strict=True)
    columns = {
        "image_id": list(names),
        "archive": [str(tar)] * len(names),
        "offset": list(offsets),
        "size": list(sizes),
    }
    io.write_parquet(out, columns | {"label": [0] * len(names)})
    return out


def test_class_outliers_and_pictures(predicted):
    folder, files = predicted
    tables = write_tables(figure_tables.study(), folder / "tables")
    index = index_of(folder / "images.tar", folder / "mini_val.parquet")
    facts = {"mini_val": {"labels": "mini", "licence": "MIT"}}
    given = {"predictions": files, "datasets": facts, "labels": [folder / "mini.json"]}
    cards.write_cards("mini", tables, folder / "shown", **given, indexes=[index])
    text = (folder / "shown" / "clip_third.html").read_text(encoding="utf-8")
    assert "<td>cube</td><td>Val</td><td>40.0 % [19.1, 63.9]</td>" in text and "-60.0 points" in text
    part = text[text.index("thumbnails") :]
    assert (
        part.count("data:image/png;base64,") == outliers.MOST_IMAGES
        and "img/01" in part
        and "100 % of others right" in part
    )
    other = (folder / "shown" / "clip_a.html").read_text(encoding="utf-8")
    assert "thumbnails" not in other.partition("</style>")[2] and "Class outliers" in other
    cards.write_cards("mini", tables, folder / "hidden", **given)
    text = (folder / "hidden" / "clip_third.html").read_text(encoding="utf-8")
    assert "data:image" not in text and "Licence of the images: MIT: no pictures here" in text


def test_images_that_a_model_lacks_count_for_nobody(predicted):
    folder, files = predicted
    short = io.read_parquet(files[0])
    io.write_parquet(files[0], {name: values[3:] for name, values in short.items()})
    found = outliers.Predictions("mini_val", outliers.by_dataset(files)["mini_val"], folder / "mini.json")
    assert found.right.shape == (4, 37), "images are those of the first model by name"
    assert set(np.unique(found.right)) == {0, 1}


def test_labels_beyond_the_classes_are_an_error(predicted):
    folder, files = predicted
    io.write_json(folder / "mini.json", {"classes": ["arch"], "members": [[0]], "name": "mini", "base": None})
    with pytest.raises(InputError, match=r"mini\.json: 1 classes, and a label 1"):
        outliers.Predictions("mini_val", outliers.by_dataset(files)["mini_val"], folder / "mini.json")
