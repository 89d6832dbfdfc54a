"""The small mini study, from nothing to figures, and what reruns when something changes."""

import json
import shutil

import pytest
import yaml

from clip_robustness.core import io

from . import invariants
from .conftest import SMALL, SMALL_CONFIG

pytestmark = pytest.mark.slow


def test_it_makes_tables_and_figures(small_house):
    figures = small_house.path / "figures/mini"
    for name in yaml.safe_load((small_house.path / "config/mini.yaml").read_text())["figures"]:
        assert (figures / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (figures / "report.html").read_text()
    rows = io.read_parquet(small_house.path / "results/mini/tables/accuracy.parquet")
    assert set(rows["source"]) == {"measured"} and (rows["low"] <= rows["value"]).all()
    assert (rows["value"] <= rows["high"]).all() and (rows["n"] > 0).all()


def test_what_holds_of_its_numbers_by_construction(small_house):
    results, small = small_house.path / "results/mini", yaml.safe_load(SMALL)
    models = set(small["models"]["names"]) - {"mini_llava"}
    tables, attacks = results / "tables", small["attacks"]
    invariants.check_attacks(tables, set(attacks["models"]), set(attacks["names"]), 2.0, attacks["images"])
    invariants.check_printed_words(tables, models)
    invariants.check_overlap(tables, models, {"mini_rendition"})
    invariants.check_corruptions(tables, models, "mini_resnet")
    invariants.check_video(tables, models)
    invariants.check_searched_prompts(results, {"mini_clip_vit_biased"}, "mini_auto_5", 5)
    invariants.check_corruptions_3d(tables, models)
    invariants.check_correspondence(tables, set(small["correspondence"]["models"]))
    invariants.check_questions(tables, {"clip": "mini_clip_vit_biased", "resnet": "mini_resnet"}, {"mini_llava"})
    controls = io.read_parquet(tables / "data_overlap.parquet")["convention"]
    assert set(controls) == {"disjoint", "one_sided", "one_sided_bonferroni_6"}


def test_everything_lies_below_the_studys_folders(small_house):
    assert {path.name for path in (small_house.path / "results/mini/store").iterdir()} >= {"embeddings", "heads"}
    assert not [path.name for path in small_house.path.iterdir() if "<" in path.name]


def test_a_second_run_has_nothing_to_do(small_house):
    assert small_house.jobs(*SMALL_CONFIG) == {}
    assert "Nothing to be done" in small_house.snakemake(*SMALL_CONFIG)


def test_embeddings_and_labels_are_of_the_same_images(small_house):
    results = small_house.path / "results/mini"
    for path in results.glob("embeddings/*/*.json"):
        manifest = json.loads(path.read_text())
        dataset = manifest["dataset"]  # also that of captions
        index = io.read_parquet(small_house.path / f"resources/mini/index/{dataset}.parquet", ["image_id"])
        assert manifest["ids_sha256"] == io.ids_digest(index["image_id"])


@pytest.fixture
def changed(small_house, tmp_path):
    """A copy of the finished study, times kept, for a change."""
    shutil.copytree(small_house.path, tmp_path / "house", symlinks=True)
    return type(small_house)(tmp_path / "house")


def test_an_edited_metric_reruns_that_metric_and_what_depends_on_it(changed):
    changed.edit("src/clip_robustness/metrics/calibration.py", "BINS = 15", "BINS = 10")
    jobs = changed.jobs(*SMALL_CONFIG)
    own = {"fit_temperature", "measure_calibration", "measure_prompts"}
    after = {"gather_metric", "compare_six_factors", "evaluate_claims", "compare_published", "draw_figure"}
    assert set(jobs) == own | after | {"write_report", "write_cards", "all"}
    assert jobs["gather_metric"] == 2  # calibration, prompts
    assert jobs["draw_figure"] == 5  # these, and what is made from all tables: six_factors, claims, reproduction


def test_another_setting_of_an_attack_reruns_that_attack(changed):
    small = changed.path / "small.yaml"
    small.write_text(small.read_text().replace("{pairs: 5}", "{pairs: 6}"))
    jobs = changed.jobs(*SMALL_CONFIG)
    assert jobs["attack_images"] == jobs["measure_adversarial"] == 2, "nes, of two models"
    assert jobs["gather_metric"] == 1 and not {rule for rule in jobs if rule.startswith(("embed_", "train_"))}


def test_an_edited_threshold_reruns_overlap_and_no_search(changed):
    small = changed.path / "small.yaml"
    small.write_text(
        small.read_text().replace("copies: mini_copies\n", "copies: mini_copies\n  false_positives: 0.1\n")
    )
    jobs = changed.jobs(*SMALL_CONFIG)
    assert jobs["choose_threshold"] == 1 and jobs["measure_overlap"] == 6 and jobs["gather_metric"] == 2
    assert not {"find_duplicates", "derive_dataset", "embed_overlap"} & set(jobs)


def test_an_edited_search_reruns_it_and_its_heads(changed):
    table = changed.path / "config/mini/prompts.yaml"
    table.write_text(table.read_text().replace("steps: 100, keep: 5", "steps: 90, keep: 5"))
    jobs = changed.jobs(*SMALL_CONFIG)
    assert jobs["search_prompts"] == jobs["build_heads"] == 1
    assert jobs["measure_prompts"] >= 4 and not {"measure_accuracy", "attack_images"} & set(jobs)


def test_an_edited_comment_reruns_nothing(changed):
    path = changed.path / "src/clip_robustness/metrics/calibration.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert changed.jobs(*SMALL_CONFIG) == {}


def test_an_edited_figure_redraws_that_figure(changed):
    path = changed.path / "src/clip_robustness/figures/shape_bias.py"
    path.write_text(path.read_text() + "\nUNUSED = 1\n")
    jobs = changed.jobs(*SMALL_CONFIG)
    assert set(jobs) == {"draw_figure", "write_report", "all"} and jobs["draw_figure"] == 1


def test_another_seed_keeps_the_embeddings(changed):
    small = changed.path / "small.yaml"
    small.write_text(small.read_text() + "seed: 5\n")
    jobs = changed.jobs(*SMALL_CONFIG)
    assert not {"embed_natural", "cache_pixels", "train_mini", "derive_dataset"} & set(jobs)
    assert jobs["search_prompts"] == jobs["build_heads"] == 1, "the head of prompts that are searched by that seed"


def test_one_new_model_line_embeds_one_model(changed):
    """The new line points at weights that lie in a folder: one copy, one embed, its metrics, the tables."""
    table = changed.path / "config/mini/models.tsv"
    lines = table.read_text().splitlines()
    line = next(text for text in lines if text.startswith("mini_clip_vit_contrastive\t")).split("\t")
    line[lines[0].split("\t").index("model")] = "mine"
    line[lines[0].split("\t").index("weights")] = "local:resources/mini/weights/mini_clip_vit_contrastive"
    table.write_text("\n".join([*lines, "\t".join(line)]) + "\n")
    small = changed.path / "small.yaml"
    last = "    - mini_convnext_third\n"
    small.write_text(small.read_text().replace(last, f"{last}    - mine\n"))
    jobs = changed.jobs(*SMALL_CONFIG)
    assert jobs["embed_natural"] == jobs["build_heads"] == jobs["fetch_weights"] == 1
    assert "train_mini" not in jobs and "render_world" not in jobs
    changed.snakemake(*SMALL_CONFIG)
    rows = io.read_parquet(changed.path / "results/mini/tables/accuracy.parquet")
    by_model = {
        name: rows["value"][(rows["model"] == name) & (rows["metric"] == "accuracy")].tolist()
        for name in ("mine", "mini_clip_vit_contrastive")
    }
    assert by_model["mine"] and by_model["mine"] == by_model["mini_clip_vit_contrastive"]
