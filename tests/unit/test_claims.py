"""The claims ledger: planted tables give each verdict, a wrong file says what is wrong, published numbers come out."""

import csv
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from clip_robustness.core import statistics
from clip_robustness.core.io import InputError
from clip_robustness.core.schema import load_yaml
from clip_robustness.data.published import import_published
from clip_robustness.figures import claims as figure
from clip_robustness.figures import frames
from clip_robustness.metrics.effective_robustness import fit_baselines_file
from clip_robustness.metrics.factors import fit_factors
from clip_robustness.report import claims
from clip_robustness.report.effects import FEW, KINDS

ROOT = Path(__file__).resolve().parents[2]
LEDGER, SCHEMA = ROOT / "config" / "claims.yaml", ROOT / "config" / "schemas" / "claims.schema.yaml"
CLIP, STANDARD = {"group": "clip_zero_shot"}, {"group": "standard"}
ID = {"table": "accuracy", "metric": "accuracy", "dataset": "val"}
SHIFT = {"table": "accuracy", "metric": "accuracy", "dataset": "shift"}


def row(model, dataset, value, slice_="", metric="accuracy", **more):
    low, high = (float(x) for x in statistics.clopper_pearson(value * 10_000, 10_000))
    known = {"study": "test", "model": model, "dataset": dataset, "metric": metric, "slice": slice_, "value": value,
             "low": low, "high": high, "n": 10_000, "convention": "", "source": "measured"}  # fmt: skip
    return known | more


@pytest.fixture
def study():
    """Eight CLIPs of two sources, 8 points above the line that eight standard models lie on; two fine-tuned ones."""
    rng = np.random.default_rng(0)
    models, rows = [], []
    for place in range(8):
        for group, gain in (("clip_zero_shot", 0.08), ("standard", 0.0)):
            name, accuracy = f"{group}_{place}", 0.5 + 0.05 * place
            source = "WIT" if place < 4 else "LAION"
            models.append({"model": name, "group": group, "source": source, "parent": "", "image_size": 224.0})
            shifted = accuracy - 0.2 + gain + rng.normal(0, 0.003)
            rows += [
                row(name, "val", accuracy),
                row(name, "shift", shifted),
                row(name, "shift", shifted + 0.02, "hard"),
            ]
    for place, size in enumerate((224.0, 336.0)):
        parent = f"clip_zero_shot_{place}"
        models.append({"model": f"tuned_{place}", "group": "clip_finetuned", "parent": parent, "image_size": size})
        rows.append(row(f"tuned_{place}", "val", 0.45 + 0.05 * place))
    return {"models": pd.DataFrame(models), "accuracy": pd.DataFrame(rows)}


def evaluate(tmp_path, tables, *entries):
    """The ledger of `entries`, (statistic, expect) pairs, on `tables`."""
    known = {"paper": "roz", "finding": "a finding that was made up", "source": "a test", "certainty": "inferred"}
    listed = [known | {"id": f"x.F{n}", "statistic": s, "expect": e} for n, (s, e) in enumerate(entries)]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": listed}))
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    paths, out = [tmp_path / f"{name}.parquet" for name in tables], tmp_path / "out" / "claims.parquet"
    claims.evaluate_claims(tmp_path / "claims.yaml", SCHEMA, paths, "test", out)
    assert len(pd.read_csv(out.with_suffix(".csv"))) == len(entries)
    return pd.read_parquet(out)


MEAN = {"kind": "mean", "of": SHIFT, "models": CLIP}
OFFSET = {"kind": "offset", "x": ID, "y": SHIFT, "models": CLIP, "line": STANDARD, "transform": "linear"}
DIFFERENCE = {"kind": "difference", "of": SHIFT, "models": CLIP, "minus_models": STANDARD}
PAIRED = {"kind": "difference", "of": {**SHIFT, "slices": ["hard"]}, "minus": SHIFT, "models": CLIP}
PARENT = {"kind": "difference", "of": ID, "models": {"group": "clip_finetuned"}, "matched": "parent"}
CORRELATION = {"kind": "correlation", "x": ID, "y": SHIFT, "models": [CLIP], "within": "source"}
SHARE = {"kind": "sign_share", "of": SHIFT, "models": CLIP, "minus_models": STANDARD}


@pytest.mark.parametrize(
    ("statistic", "value", "n", "unit"),
    [
        (MEAN, 0.555, 8, "models"),
        (OFFSET, 0.08, 8, "models"),
        (DIFFERENCE, 0.08, 16, "models"),
        (PAIRED, 0.02, 8, "pairs"),
        (PARENT, -0.05, 2, "images"),
        (CORRELATION, 1.0, 8, "models"),
        (SHARE, 1.0, 16, "models"),
    ],
)
def test_every_kind_recovers_what_was_planted(statistic, value, n, unit, study):
    effect = KINDS[statistic["kind"]](statistic, study)
    assert effect.value == pytest.approx(value, abs=0.004)
    assert effect.low <= effect.value <= effect.high
    assert (effect.n, effect.unit) == (n, unit)


@pytest.mark.parametrize(
    ("expect", "verdict"),
    [
        ({"above": 0.05}, "reproduced"),
        ({"above": 0.1}, "contradicted"),
        ({"below": 0.1}, "reproduced"),
        ({"below": 0.08}, "undecided"),
        ({"between": [0.0, 0.2]}, "reproduced"),
        ({"between": [-0.02, 0.02]}, "contradicted"),
        ({"outside": [-0.02, 0.02]}, "reproduced"),
        ({"outside": [0.0, 0.2]}, "contradicted"),
    ],
)
def test_the_interval_alone_decides(expect, verdict, study, tmp_path):
    [found] = evaluate(tmp_path, study, (OFFSET, expect)).to_dict("records")
    assert found["verdict"] == verdict
    assert (found["p"] < 0.05) == (verdict != "undecided")


@pytest.mark.parametrize(
    ("statistic", "missing"),
    [
        (MEAN | {"of": ID | {"table": "ood"}}, "table ood"),
        (MEAN | {"of": ID | {"metric": "top5"}}, "metric top5 in table accuracy"),
        (MEAN | {"of": ID | {"dataset": ["a", "b"]}}, "accuracy on a or b"),
        (MEAN | {"of": SHIFT | {"slices": ["hard", "harder"]}}, "accuracy of slice harder"),
        (MEAN | {"of": SHIFT | {"convention": "other"}}, "accuracy by convention other"),
        (MEAN | {"models": {"group": "human"}}, "models: group human"),
        (MEAN | {"models": {"finetuned_on": "ImageNet-1k"}}, "models: finetuned_on ImageNet-1k"),
        (MEAN | {"models": {"group": "clip_finetuned"}}, "models in table accuracy: group clip_finetuned"),
        (CORRELATION | {"above_x": 0.7}, f"{FEW} models with both quantities, but 3"),
    ],
)
def test_what_is_missing_is_said(statistic, missing, study, tmp_path):
    [found] = evaluate(tmp_path, study, (statistic, {"above": 0})).to_dict("records")
    assert (found["verdict"], found["missing"]) == ("not measured here", missing)
    assert pd.isna(found["value"]) and pd.isna(found["n"])


def test_no_verdict_without_an_interval(study, tmp_path):
    study["accuracy"] = study["accuracy"].assign(low=np.nan, high=np.nan)
    ledger = evaluate(tmp_path, study, (PARENT, {"below": 0}), (MEAN, {"above": 0.1}))
    assert list(ledger["verdict"]) == ["not measured here", "reproduced"]  # over models, images need no n


def test_few_models_get_an_interval_over_images(study):
    study["models"] = study["models"][study["models"]["model"].isin(["clip_zero_shot_0", "clip_zero_shot_1"])]
    own = study["accuracy"].query("dataset == 'shift' and slice == ''")[:4:2]
    effect = KINDS["mean"](MEAN, study)
    assert (effect.unit, effect.low, effect.high) == ("images", own["low"].mean(), own["high"].mean())


def test_a_bootstrap_over_models_covers_the_truth():
    """Six models, 200 times: the widened percentile interval holds the mean in about 95 % (a plain one in 86 %)."""
    rng = np.random.default_rng(1)
    models = pd.DataFrame({"model": [f"m{i}" for i in range(6)], "group": "clip_zero_shot"})
    hits = 0
    for _ in range(200):
        rows = pd.DataFrame(
            [row(m, "shift", v) for m, v in zip(models["model"], rng.normal(0.5, 0.05, 6), strict=True)]
        )
        effect = KINDS["mean"](MEAN, {"models": models, "accuracy": rows})
        hits += effect.low < 0.5 < effect.high
    assert 0.90 <= hits / 200 <= 0.99


def test_holm_rejects_step_by_step():
    assert claims._holm([0.01, None, 0.02, 0.04, 0.6]) == [True, False, False, False, False]
    assert claims._holm([0.01, 0.012, 0.02]) == [True, True, True]


def test_first_convention_and_first_slice_that_a_model_has(study):
    extra = [row("clip_zero_shot_0", "shift", 0.9, "best"), row("clip_zero_shot_0", "shift", 0.1, convention="other")]
    study["accuracy"] = pd.concat([study["accuracy"], pd.DataFrame(extra)])
    one = MEAN | {"models": {"model": "clip_zero_shot_0"}}
    assert KINDS["mean"](one | {"of": SHIFT | {"slice": ["best", ""]}}, study).value == 0.9
    assert KINDS["mean"](one | {"of": SHIFT | {"convention": ["other", ""]}}, study).value == 0.1
    assert KINDS["mean"](one, study).value == pytest.approx(0.38, abs=0.01)


def test_a_share_kept_is_relative_to_the_reference(study):
    kept = KINDS["mean"](MEAN | {"of": SHIFT | {"over": ID}}, study)
    accuracy = study["accuracy"].query("model.str.startswith('clip_zero') and slice == ''").pivot(
        index="model", columns="dataset", values="value"
    )  # fmt: skip
    assert kept.value == pytest.approx((accuracy["shift"] / accuracy["val"]).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"grup": "standard"}}, "unknown field 'grup'; did you mean 'group'?"),
        ({"of": ID | {"table": "acuracy"}}, "'acuracy' is not one of accuracy, .*did you mean 'accuracy'?"),
        ({"kind": "median"}, "'median' is not one of mean"),
        ({"transform": "logit"}, "a statistic of kind mean has no field 'transform'"),
        ({"kind": "correlation"}, "a statistic of kind correlation needs the field 'x'"),
        ({"kind": "difference"}, "needs one of the fields minus_models, minus, matched"),
    ],
)
def test_a_wrong_statistic_is_named(change, message, study, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, study, (MEAN | change, {"above": 0}))


@pytest.mark.parametrize(
    ("expect", "message"),
    [({}, "non-empty"), ({"above": 0, "below": 1}, "too many"), ({"between": [1]}, "too short"), ({"near": 0}, "near")],
)
def test_a_wrong_expectation_is_named(expect, message, study, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, study, (MEAN, expect))


def test_a_missing_table_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"ood\.parquet: no such table"):
        claims.evaluate_claims(LEDGER, SCHEMA, [tmp_path / "ood.parquet"], "test", tmp_path / "claims.parquet")


# ---- The project's own ledger ----


def test_every_finding_of_the_papers_has_a_claim():
    found = {claim["id"].rstrip("abcdefghijklmnopqrstuvwxyz") for claim in claims.load_claims(LEDGER, SCHEMA)}
    assert found == {f"tu.F{n}" for n in range(1, 13)} | {f"roz.F{n}" for n in range(1, 10)}


def test_every_data_set_of_the_ledger_is_known():
    """A data set that no file knows is a slip of the pen. What is an average, or attacked, is made by the workflow."""
    known = {"natural_average", "imagenet_pgd", "mini_pgd"}
    for table in ("datasets.yaml", "mini/datasets.yaml"):
        known |= set(load_yaml(ROOT / "config" / table)["datasets"])
    for path in (ROOT / "config" / "published").glob("*.csv"):
        if path.name not in ("models.csv", "sources.csv"):
            known |= set(pd.read_csv(path, usecols=["dataset"])["dataset"])

    def names(value):
        if isinstance(value, dict):
            own = value.get("dataset", [])
            yield from [own] if isinstance(own, str) else own
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from names(part)

    used = {name for claim in claims.load_claims(LEDGER, SCHEMA) for name in names(claim["statistic"])}
    assert not used - known


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(ledger of the published study, its tables)."""
    out = tmp_path_factory.mktemp("published")
    import_published(ROOT / "config" / "published", out, "published")
    own = {name: out / f"{name}.parquet" for name in ("accuracy", "models", "baselines", "effective_robustness")}
    fit_baselines_file(*own.values(), sources=["testbed"], estimators=["ols"], resamples=100)
    factors = [out / f"{name}.parquet" for name in ("factors", "models", "factor_fits", "factor_robustness")]
    only = {"only": ["testbed.*"], "without": ["*simclrv2*"], "transforms": ["logit"], "estimators": ["huber"]}
    fit_factors(*factors, **only, resamples=100)
    tables = sorted(out.glob("*.parquet"))
    claims.evaluate_claims(LEDGER, SCHEMA, tables, "published", out / "claims" / "claims.parquet")
    ledger = pd.read_parquet(out / "claims" / "claims.parquet").set_index("id")
    return ledger, {path.stem: pd.read_parquet(path) for path in tables}


def expected(name, **where):
    """Values by model of a golden file, computed without this project's code."""
    lines = (ROOT / "tests" / "golden" / name).read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {r["model"]: float(r["value"]) for r in rows if all(r[k] == v for k, v in where.items())}


def test_published_shape_bias(published):
    ledger, _ = published
    bias = expected("published_expectations.cc-by-sa.csv", quantity="shape_bias")
    bias |= expected("published_expectations.cc-by-sa.csv", quantity="shape_bias", convention="16way_80_templates")
    resnets = [bias[f"open_clip.{name}.openai"] for name in ("rn50", "rn101")]
    assert ledger.loc["tu.F4b", "value"] == pytest.approx(np.mean(resnets), abs=1e-4)
    tuned = {"224.openai_ft_in1k": "", "224.openai_ft_in12k_in1k": "", "336.openai_ft_in12k_in1k": "-336"}
    drops = [bias[f"timm.vit_large_patch14_clip_{t}"] - bias[f"open_clip.vit-l-14{p}.openai"] for t, p in tuned.items()]
    assert ledger.loc["tu.F4e", "value"] == pytest.approx(np.mean(drops), abs=1e-4)
    verdicts = ["reproduced", "contradicted", "reproduced", "undecided", "reproduced"]
    assert list(ledger.loc["tu.F4a":"tu.F4e", "verdict"]) == verdicts


def test_published_natural_and_stylized_shifts(published):
    """CLIP gains on the average of the natural shifts; on stylized images the sign depends on the measure."""
    ledger, _ = published
    average = expected("published_expectations.csv", kind="average7", quantity="effective_robustness")
    clips = [average[f"testbed.{name}_clip_zeroshot"] for name in ("resnet50", "vit_b_32")]
    assert ledger.loc["roz.F1a", "value"] == pytest.approx(np.mean(clips), abs=1e-4)
    assert list(ledger.loc["roz.F1a":"roz.F1h", "verdict"]) == ["reproduced"] * 8
    assert list(ledger.loc["roz.F2a":"roz.F2c", "verdict"]) == ["reproduced", "reproduced", "contradicted"]
    assert list(ledger.loc["roz.F2a":"roz.F2c", "value"]) == pytest.approx([-0.1025, -0.0685, 0.0693], abs=5e-4)
    # From one frame to twenty: the means of -6.80 and -4.58, and of -1.59 and -0.82 points.
    assert list(ledger.loc["roz.F8a":"roz.F8b", "value"]) == pytest.approx([-0.0569, -0.0120], abs=1e-4)


def test_published_retrieval(published):
    ledger, _ = published
    rows = ledger.loc["tu.F8a":"tu.F8e"]
    assert list(rows["value"]) == pytest.approx([0.924, 0.948, 0.934, 0.923, 0.998], abs=5e-4)
    assert list(rows["n"]) == [94, 94, 94, 94, 11] and set(rows["verdict"]) == {"reproduced"}


def test_published_factor_robustness(published):
    """The two CLIPs whose effective robustness is printed elsewhere, to half a unit of its last digit."""
    _, tables = published
    lines = (ROOT / "tests" / "golden" / "factor_fits.cc-by-nc.csv").read_text(encoding="utf-8").splitlines()
    for printed in csv.DictReader(line for line in lines if not line.startswith("#")):
        of = {"table": "factor_robustness", "metric": "effective_robustness", "dataset": "imagenet_x",
              "slices": [printed["factor"]], "convention": f"{printed['convention']}-logit-huber"}  # fmt: skip
        effect = KINDS["mean"]({"of": of, "models": {"model": "testbed.*_clip_zeroshot"}}, tables)
        points = (float(printed["vit_b_32"]) + float(printed["resnet50"])) / 2
        assert 100 * effect.value == pytest.approx(points, abs=0.051)


def test_published_study_says_what_it_lacks(published):
    ledger, _ = published
    lacking = ledger[ledger["verdict"] == "not measured here"]["missing"]
    assert lacking["tu.F5a"] == "table ood" and lacking["tu.F7a"] == "table calibration"
    assert lacking["roz.F3a"] == "table adversarial" and lacking["tu.F10a"] == "table choice"
    decided = ledger[ledger["verdict"].isin(["reproduced", "contradicted"])]
    assert (decided["low"] <= decided["value"]).all() and (decided["value"] <= decided["high"]).all()


# ---- Figure and caption ----


def test_the_figure_shows_every_claim_with_mark_and_word(published):
    ledger, _ = published
    drawn = figure.draw({"claims": ledger.reset_index()})
    words = [text.get_text().removesuffix(" *") for axes in drawn.axes for text in axes.texts]
    for verdict, count in ledger["verdict"].value_counts().items():
        assert words.count(verdict.replace(" here", "")) == count
    assert len({(shape, filled, colour) for shape, filled, colour in figure.VERDICTS.values()}) == 4
    drawn.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in drawn.axes for text in axes.texts]
    apart = [not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :]]
    assert all(apart) and max(box.x1 for box in boxes) <= drawn.bbox.x1


def test_the_claimed_side_is_right(published):
    ledger, _ = published
    for claim in frames.records(ledger):
        if claim.verdict in ("reproduced", "contradicted"):
            _, low, high = figure.claimed_side(claim)
            assert (low > 0) if claim.verdict == "reproduced" else (high < 0)


def test_the_caption_counts_the_tests(published):
    ledger, _ = published
    numbers = claims.caption_numbers(ledger.reset_index())
    assert int(numbers["tested"]) == (ledger["verdict"] != "not measured here").sum()
    assert int(numbers["holm"]) <= int(numbers["reproduced"]) + int(numbers["contradicted"])
    template = (ROOT / "report" / "captions" / "claims.rst").read_text(encoding="utf-8")
    assert all(f"${name}" in template for name in numbers)
    assert fnmatchcase(template, "*Holm's correction*")
