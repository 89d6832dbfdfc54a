"""Published numbers through the project's own code: fits, averages, ratios and correlations.

The expectations beside this file were computed from the original result files without this project's code.
"""

import csv
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.data.published import TABLE, import_published
from clip_robustness.metrics.effective_robustness import SEVEN_SHIFTS, natural_average

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "config" / "published"
POINT = 0.01
Values = dict[str, float]

# The seven natural shifts and the ImageNet images that each is compared with; the two video sets count as the
# mean of pm-0 and pm-10 (Radford et al. 2021, section 3.3).
SEVEN = {
    "imagenet_v2": ("imagenet_v2",),
    "imagenet_sketch": ("imagenet_sketch",),
    "imagenet_r": ("imagenet_r",),
    "imagenet_a": ("imagenet_a",),
    "objectnet": ("objectnet",),
    "imagenet_vid_pm0": ("imagenet_vid_pm0", "imagenet_vid_pm10"),
    "ytbb_pm0": ("ytbb_pm0", "ytbb_pm10"),
}


def _expectations() -> dict[tuple[str, str, str, str], dict[tuple[str, str], float]]:
    """(kind, x, y, convention) -> (quantity, model) -> value."""
    expected: dict[tuple[str, str, str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for path in sorted(HERE.glob("published_expectations*.csv")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for row in csv.DictReader(lines):
            key = (row["kind"], row["x"], row["y"], row["convention"])
            expected[key][row["quantity"], row["model"]] = float(row["value"])
    return dict(expected)


EXPECTED = _expectations()


def _of(kind: str) -> list[tuple[str, str, str, str]]:
    keys = [key for key in EXPECTED if key[0] == kind]
    assert keys, f"no expectation of kind {kind}"
    return keys


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("published")
    import_published(FOLDER, out, "published")
    return {path.stem: io.read_parquet(path) for path in sorted(out.glob("*.parquet"))}


@pytest.fixture(scope="module")
def values(tables: dict[str, dict[str, np.ndarray]]) -> Callable[..., Values]:
    """values("metric:dataset:slice:convention", source) -> model -> value; slice "" unless given."""
    cells: dict[tuple[str, ...], Values] = defaultdict(dict)
    fields = ("metric", "dataset", "slice", "convention", "source", "model", "value")
    for name in ("accuracy", "factors", "retrieval"):
        for metric, dataset, slice, convention, source, model, value in zip(
            *(tables[name][field] for field in fields), strict=True
        ):
            cells[metric, dataset, slice, "", source][model] = value
            cells[metric, dataset, slice, convention, source][model] = value

    def find(name: str, source: str) -> Values:
        metric, dataset, slice, convention = [*name.split(":"), "", ""][:4]
        return cells[metric, dataset, slice, convention, source]

    return find


@pytest.fixture(scope="module")
def groups(tables: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    return dict(zip(tables["models"]["model"], tables["models"]["group"], strict=True))


@pytest.fixture(scope="module")
def population(values: Callable[..., Values], groups: dict[str, str]) -> list[str]:
    """The fit population of Taori et al. 2020: standard models with at least 55 % on ImageNet."""
    val = values("accuracy:imagenet_val", "testbed")
    return [model for model, value in val.items() if groups[model] == "standard" and value >= 0.55]


def _column(values: Values, models: list[str]) -> np.ndarray:
    return np.array([values.get(model, np.nan) for model in models])


def _check_line(
    line: statistics.Line, expected: dict[tuple[str, str], float], x: Values, y: Values, tolerance: float
) -> None:
    compared = 0
    for (quantity, model), value in expected.items():
        if quantity == "effective_robustness":
            found = float(statistics.effective_robustness(line, x[model], y[model]))
            assert found == pytest.approx(value, abs=0.05 * POINT + tolerance), (quantity, model)
        elif quantity in ("slope", "intercept", "r", "n"):
            assert getattr(line, quantity) == pytest.approx(value, abs=tolerance), quantity
        else:
            continue
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("key", _of("testbed"), ids=lambda key: f"{key[1]} -> {key[2]} {key[3]}")
def test_testbed_baselines_and_effective_robustness(key, values, population):
    _, x_name, y_name, convention = key
    transform, estimator = convention.split("-")
    x, y = values(x_name, "testbed"), values(y_name, "testbed")
    line = statistics.fit_line(_column(x, population), _column(y, population), transform, estimator)
    _check_line(line, EXPECTED[key], x, y, tolerance=1e-4)


def _average7(values: Callable[..., Values]) -> tuple[Values, Values]:
    """Mean over the seven shifts (y) and over their ImageNet partners (x), for models that have them all."""
    val = values("accuracy:imagenet_val", "testbed")
    y_parts, x_parts = [], []
    for partner, members in SEVEN.items():
        columns = [values(f"accuracy:{name}", "testbed") for name in members]
        y_parts.append({m: float(np.mean([c[m] for c in columns])) for m in val if all(m in c for c in columns)})
        x_parts.append(values(f"reference_accuracy:{partner}", "testbed") or val)
    models = [m for m in val if all(m in part for part in (*x_parts, *y_parts))]
    x, y = ({m: float(np.mean([part[m] for part in parts])) for m in models} for parts in (x_parts, y_parts))
    return x, y


def test_average_of_seven_natural_shifts(values, population):
    (key,) = _of("average7")
    x, y = _average7(values)
    line = statistics.fit_line(_column(x, population), _column(y, population))
    _check_line(line, EXPECTED[key], x, y, tolerance=1e-4)
    for (quantity, model), value in EXPECTED[key].items():
        if quantity in ("accuracy", "reference_accuracy"):
            found = (y if quantity == "accuracy" else x)[model]
            assert found == pytest.approx(value, abs=0.05 * POINT), (quantity, model)


def test_resnet101_makes_five_times_as_many_mistakes_under_natural_shift(tables):
    """As Radford et al. 2021, section 3.3, say; 41.49 % on the seven shifts against 88.33 %, an error ratio of 5.01."""
    table = tables["accuracy"]
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    found = natural_average(rows, "imagenet_val", SEVEN_SHIFTS)
    own = {row["metric"]: row["value"] for row in found if row["model"] == "testbed.resnet101"}
    assert own == pytest.approx({"accuracy": 0.4149, "reference_accuracy": 0.8833}, abs=6e-5)
    assert (1 - own["accuracy"]) / (1 - own["reference_accuracy"]) == pytest.approx(5.01, abs=0.005)


@pytest.mark.parametrize("key", _of("imagenet_x"), ids=lambda key: key[2])
def test_visual_factor_baselines(key, values, groups):
    """ImageNet-X counts SimCLRv2 as self-supervised; the fit is on the testbed's other standard models."""
    _, x_name, y_name, convention = key
    x, y = values(x_name, "imagenet_x"), values(y_name, "imagenet_x")
    fitted = [m for m in x if m.startswith("testbed.") and groups[m] == "standard" and "simclr" not in m]
    line = statistics.fit_line(_column(x, fitted), _column(y, fitted), *convention.split("-"))
    _check_line(line, EXPECTED[key], x, y, tolerance=6e-4)  # the expectations have three decimals


@pytest.mark.parametrize("key", _of("shape_bias"), ids=lambda key: key[3])
def test_shape_bias_from_counts(key, tables):
    table = tables["shape_bias"]
    overall = table["slice"] == ""
    for (metric, model), value in EXPECTED[key].items():
        chosen = overall & (table["metric"] == metric) & (table["model"] == model) & (table["convention"] == key[3])
        (row,) = np.flatnonzero(chosen)
        assert table["value"][row] == pytest.approx(value, abs=1e-3), (metric, model)
        assert table["low"][row] < table["value"][row] < table["high"][row]


def test_shape_bias_slices_add_up(tables):
    """Every class has 75 of the 1,200 conflicts; decisions overall are the sum over classes."""
    table = tables["shape_bias"]
    for model, conflicts in (("open_clip.vit-l-14.openai", 1200), ("human.observers", 12000)):
        of_model = (table["model"] == model) & np.isin(table["convention"], ["16way_80_templates", "16way_observers"])
        for metric in ("shape_bias", "cue_accuracy"):
            n = table["n"][of_model & (table["metric"] == metric)]
            slices = table["slice"][of_model & (table["metric"] == metric)]
            assert n[slices == ""].sum() == n[slices != ""].sum()
            assert len(n) == 17
            if metric == "cue_accuracy":
                assert set(n[slices != ""]) == {conflicts // 16}


@pytest.mark.parametrize("key", _of("retrieval"), ids=lambda key: f"{key[3]} {key[2]}")
def test_accuracy_predicts_retrieval(key, values, tables):
    _, x_name, y_name, which = key
    if which == "open_clip":
        x, y = values(x_name, "open_clip"), values(y_name, "open_clip_retrieval")
        models = [m for m in x if x[m] > 0.5 and "mscoco_finetuned" not in m and "nllb" not in m]
        assert len(models) == 94
    else:
        x, y = values(x_name, "scaling_laws"), values(y_name, "scaling_laws")
        training = dict(zip(tables["models"]["model"], tables["models"]["source"], strict=True))
        models = [m for m in x if training[m] == which]
    for (quantity, _), value in EXPECTED[key].items():
        columns = _column(x, models), _column(y, models)
        found = statistics.pearson(*columns) if quantity == "pearson" else spearmanr(*columns).statistic
        assert found == pytest.approx(value, abs=6e-4)


def test_tables_keep_their_contract(tables):
    for name in ("accuracy", "shape_bias", "factors", "retrieval"):
        table = tables[name]
        assert list(table) == list(TABLE)
        keys = list(
            zip(
                *(table[c] for c in ("model", "dataset", "metric", "slice", "convention", "source")),
                strict=True,
            )
        )
        assert len(keys) == len(set(keys)) > 100
        assert keys == sorted(keys)
        assert np.all((table["low"] <= table["value"]) & (table["value"] <= table["high"]))
        assert np.all((table["low"] >= 0) & (table["high"] <= 1) & (table["n"] > 0))
        assert set(table["model"]) <= set(tables["models"]["model"])
        assert all(len(commit) == 40 for commit in set(table["commit"]))
        assert all(table["repository"]) and all(table["licence"])
    pairs = list(zip(*(tables["accuracy"][c] for c in ("model", "dataset", "metric", "slice")), strict=True))
    assert len(pairs) == len(set(pairs)), "two sources give one model two accuracies"


def test_restricted_licences_stand_in_files_of_their_own():
    found = {}
    for path in FOLDER.glob("*.csv"):
        if path.name not in ("models.csv", "sources.csv"):
            with path.open(newline="", encoding="utf-8") as file:
                found[path.name] = {row["source"] for row in csv.DictReader(file)}
    with (FOLDER / "sources.csv").open(newline="", encoding="utf-8") as file:
        licence = {row["source"]: row["licence"] for row in csv.DictReader(file)}
    for name, sources in found.items():
        assert any("NC" in licence[s] for s in sources) == ("cc-by-nc" in name), name
        assert any("SA" in licence[s] for s in sources) == ("cc-by-sa" in name), name


def test_import_twice_is_byte_identical(tmp_path):
    for name in ("a", "b"):
        import_published(FOLDER, tmp_path / name, "published")
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(written) == 10
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_csv_and_parquet_agree(tmp_path):
    import_published(FOLDER, tmp_path, "published")
    with (tmp_path / "retrieval.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = io.read_parquet(tmp_path / "retrieval.parquet")
    for column in ("value", "low", "high", "n"):
        assert [float(row[column]) for row in rows] == table[column].tolist()
    assert [row["model"] for row in rows] == table["model"].tolist()


# A small folder of our own, in which each test breaks one thing.
SOURCES = "source,repository,path,commit,licence,what\nlab,owner/lab,results.csv," + "0" * 40 + ",MIT,numbers\n"
MODELS = (
    "model,title,library,group,family,source,train_images,finetuning,loss,params_m,parent,image_size\n"
    "resnet50,ResNet-50,timm,standard,resnet,ImageNet-1k,1281167,none,cross_entropy,25.6,,224\n"
    "clip-b-32,CLIP,open_clip,clip_zero_shot,vit,WIT,,none,softmax,,,\n"
)
HEADER = "model,dataset,metric,slice,value,n,convention,source\n"
ROWS = (
    "resnet50,imagenet_val,accuracy,,0.76,50000,1000_way,lab\n"
    "resnet50,imagenet_a,accuracy,,0,7500,200_way,lab\n"
    "clip-b-32,imagenet_val,accuracy,,0.633,,1000_way,lab\n"
    "resnet50,cue_conflict,n_shape,,200,1200,16way,lab\n"
    "resnet50,cue_conflict,n_texture,,600,1200,16way,lab\n"
    "resnet50,cue_conflict,n_conflict,,1200,1200,16way,lab\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "numbers"
    folder.mkdir()
    (folder / "sources.csv").write_text(SOURCES)
    (folder / "models.csv").write_text(MODELS)
    (folder / "lab.csv").write_text(HEADER + ROWS)
    return folder


def _refused(folder: Path) -> str:
    out = folder.parent / "tables"
    with pytest.raises(InputError) as error:
        import_published(folder, out, "test")
    assert not out.exists(), "tables were written although the input is wrong"
    return str(error.value)


def test_unknown_n_has_no_interval(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_published(folder, tmp_path / "tables", "test")
    with (tmp_path / "tables" / "accuracy.csv").open(newline="", encoding="utf-8") as file:
        clip, zero, resnet = csv.DictReader(file)
    assert (clip["model"], clip["value"], clip["n"], clip["low"], clip["high"]) == (
        "clip-b-32",
        "0.633",
        "",
        "",
        "",
    )
    assert (zero["value"], zero["low"]) == ("0.0", "0.0")
    assert 0 < float(zero["high"]) < 1e-3
    assert resnet["study"] == "test"
    # Clopper-Pearson for 38,000 of 50,000 is nearly normal here: 0.76 -+ 1.96 sqrt(0.76 * 0.24 / 50000).
    assert float(resnet["low"]) == pytest.approx(0.75623, abs=2e-5)
    assert float(resnet["high"]) == pytest.approx(0.76373, abs=2e-5)
    bias = io.read_parquet(tmp_path / "tables" / "shape_bias.parquet")
    assert bias["metric"].tolist() == ["cue_accuracy", "shape_bias"]
    assert bias["value"].tolist() == pytest.approx([800 / 1200, 0.25])
    assert bias["n"].tolist() == [1200, 800]
    assert len(io.read_parquet(tmp_path / "tables" / "retrieval.parquet")["model"]) == 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("resnet05,imagenet_val,accuracy,,0.7,1,x,lab", ("'model'", "resnet05", "did you mean 'resnet50'")),
        ("resnet50,imagenet_val,accuracy,,0.7,1,x,lap", ("'source'", "'lap'", "did you mean 'lab'")),
        ("resnet50,imagenet_val,acuracy,,0.7,1,x,lab", ("'metric'", "acuracy", "did you mean 'accuracy'")),
        ("resnet50,ImageNet,accuracy,,0.7,1,x,lab", ("'dataset'", "'ImageNet'")),
        ("resnet50,imagenet_r,accuracy,,76.1,1,x,lab", ("'value'", "'76.1'", "0..1 (not per cent)")),
        ("resnet50,imagenet_r,accuracy,,-0.1,1,x,lab", ("'value'", "'-0.1'", "0..1")),
        ("resnet50,imagenet_r,accuracy,,nan,1,x,lab", ("'value'", "'nan'", "0..1")),
        ("resnet50,imagenet_r,accuracy,,inf,1,x,lab", ("'value'", "'inf'", "0..1")),
        ("resnet50,imagenet_r,accuracy,,0_7,1,x,lab", ("'value'", "'0_7'", "0..1")),
        ("resnet50,imagenet_r,accuracy,,,1,x,lab", ("'value'", "''", "0..1")),
        ("resnet50,imagenet_r,accuracy,,0.7,1.5,x,lab", ("'n'", "'1.5'", "whole number")),
        ("resnet50,imagenet_r,accuracy,,0.7,0,x,lab", ("'n'", "'0'", "1 or more")),
        ("resnet50,cue_conflict,n_shape,cat,1.5,75,16way,lab", ("'value'", "'1.5'", "whole number")),
        ("resnet50,cue_conflict,n_shape,cat,-1,75,16way,lab", ("'value'", "'-1'", "whole number")),
        ("resnet50,cue_conflict,n_shape,cat,1,75,16way,lab", ("'metric'", "n_texture, n_conflict")),
        ("resnet50,imagenet_val,accuracy,,0.7,1,1000_way,lab", ("repeats lab.csv, row 2", "one row for")),
        ("resnet50,imagenet_r,accuracy,0.7,1,x,lab", ("7 fields", "expected 8")),
    ],
)
def test_a_wrong_row_is_named(folder, row, expected):
    with (folder / "lab.csv").open("a") as file:
        file.write(row + "\n")
    message = _refused(folder)
    for part in (str(folder / "lab.csv"), "row 8", *expected):
        assert part in message, message
    assert len(message.splitlines()) == 1, message


def test_more_decisions_than_conflicts(folder):
    text = (folder / "lab.csv").read_text().replace("n_conflict,,1200", "n_conflict,,700")
    (folder / "lab.csv").write_text(text)
    assert "800 decisions; expected n_shape + n_texture at most n_conflict, 700" in _refused(folder)


def test_the_same_row_in_two_files(folder):
    shutil.copy(folder / "lab.csv", folder / "more.csv")
    message = _refused(folder)
    assert f"{folder / 'more.csv'}, row 2: repeats lab.csv, row 2" in message
    assert len(message.splitlines()) == 6


def test_an_unknown_column(folder):
    text = (folder / "lab.csv").read_text().replace("convention", "convension")
    (folder / "lab.csv").write_text(text)
    message = _refused(folder)
    assert "row 1: unknown column 'convension'; did you mean 'convention'?" in message
    assert "expected exactly the columns model,dataset,metric" in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("timm,standard", "timm,standart", ("row 2", "'group'", "did you mean 'standard'")),
        ("clip-b-32,", "resnet50,", ("row 3", "'model'", "taken by row 2")),
        ("clip-b-32,", "CLIP-B-32,", ("row 3", "'model'", "lower-case")),
        ("25.6,,224", "25.6,clip-b-23,224", ("row 2", "'parent'", "did you mean 'clip-b-32'")),
        ("25.6,,224", "25.6,,big", ("row 2", "'image_size'", "'big'", "positive number")),
        ("25.6,,224", "-1,,224", ("row 2", "'params_m'", "'-1'", "positive number")),
        ("ResNet-50", "", ("row 2", "'title'")),
    ],
)
def test_a_wrong_model_is_named(folder, old, new, expected):
    path = folder / "models.csv"
    path.write_text(path.read_text().replace(old, new))
    message = _refused(folder)
    for part in (str(path), *expected):
        assert part in message, message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (",MIT,", ",,", ("row 2", "'licence'", "every field")),
        (SOURCES, SOURCES + SOURCES.splitlines()[1] + "\n", ("row 3", "'source'", "stands twice")),
    ],
)
def test_a_wrong_source_is_named(folder, old, new, expected):
    path = folder / "sources.csv"
    path.write_text(path.read_text().replace(old, new))
    message = _refused(folder)
    for part in (str(path), *expected):
        assert part in message, message


def test_all_problems_come_in_one_message(folder):
    with (folder / "lab.csv").open("a") as file:
        file.write("resnet05,imagenet_r,accuracy,,76,1,x,lab\n" * 20)
    (folder / "models.csv").write_text(MODELS.replace("standard", "usual"))
    lines = _refused(folder).splitlines()
    assert len(lines) == 31
    assert lines[-1] == "... and 11 more"
    assert "'group'" in lines[0]


@pytest.mark.parametrize("name", ["models.csv", "sources.csv"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    assert f"{folder / name}: cannot read it" in _refused(folder)


def test_no_measurements(folder):
    (folder / "lab.csv").unlink()
    assert "no measurements" in _refused(folder)


def test_a_file_that_is_no_text(folder):
    (folder / "lab.csv").write_bytes(b"\xff\xfe\x00model")
    assert "not a CSV file in UTF-8" in _refused(folder)
