"""What a study runs on what: attacks, overlap, searched prompts, data sets for some models, synthetic shifts."""

import dataclasses

import pytest
import yaml

from clip_robustness.core.io import InputError
from clip_robustness.core.registry import load_study
from clip_robustness.core.study import TESTBED_PGD
from clip_robustness.data import plan

VICTIMS = ["mini_clip_vit_biased", "mini_clip_resnet_biased", "mini_vit", "mini_resnet"]


def load(root, name, **change):
    return load_study({**yaml.safe_load((root / f"config/{name}.yaml").read_text()), **change}, root)


@pytest.fixture(scope="module")
def mini(root):
    return load(root, "mini")


@pytest.fixture(scope="module")
def paper(root):
    return load(root, "config")


def sets_of(study, metric, model):
    return {dataset for name, dataset in study.measured(metric) if name == model}


# Attacks


def test_models_are_attacked_by_name_and_by_set(root, mini, paper):
    assert set(mini.attacked) == set(VICTIMS)
    assert mini.measured("adversarial") == [(model, "mini_val") for model in mini.attacked]
    assert paper.attacked == [name for name, sets in paper.sets_of_model.items() if "roz" in sets]
    attacks = {"names": ["fgsm"], "models": ["roz", "resnet152.tv_in1k", "rn50.openai"]}
    some = load(root, "config", attacks=attacks)
    assert set(some.attacked) == {*paper.attacked, "resnet152.tv_in1k"}, "named twice is attacked once"


def test_without_attacks_nothing_is_attacked(root):
    for attacks in ({"names": [], "models": ["mini"]}, {"names": ["fgsm"], "models": []}):
        study = load(root, "mini", attacks=attacks)
        assert study.measured("adversarial") == [] and "attack_images" not in plan.job_counts(study)
    lite = load(root, "lite")
    assert lite.attacked == [] and lite.measured("adversarial") == []


def test_what_only_gives_predictions_cannot_be_attacked(mini, tmp_path):
    (tmp_path / "mini_val.npy").write_bytes(b"")
    given = dataclasses.replace(mini.models["mini_vit"], library="predictions", weights=f"predictions:{tmp_path}")
    study = dataclasses.replace(mini, models={**mini.models, "mini_vit": given})
    assert set(study.attacked) == set(VICTIMS) - {"mini_vit"}
    assert sets_of(study, "accuracy", "mini_vit") == {"mini_val"}


def test_an_attack_is_a_job_for_each_victim_and_its_accuracy_one_for_each_victim(mini):
    counts = plan.job_counts(mini)
    assert counts["attack_images"] == 4 * len(mini.config["attacks"]["names"]) and counts["measure_adversarial"] == 4


# Synthetic shifts


def test_the_papers_average_has_seven_shifts(mini, paper):
    seven = {"imagenet_v2", "imagenet_sketch", "imagenet_r", "imagenet_a", "objectnet", "imagenet_vid_robust"}
    assert set(paper.natural_shifts) == {*seven, "ytbb_robust"} and len(paper.natural_shifts) == 7
    others = ["mini_fresh", "mini_pose", "mini_sketch", "mini_rendition", "mini_filtered", "mini_video"]
    assert mini.natural_shifts == others


def test_synthetic_shifts_are_named_with_their_parts(mini, paper):
    parts = "+".join(f"imagenet_c_{part}" for part in ("noise", "blur", "weather", "digital"))
    pgd = "+".join(f"imagenet_val:{attack}" for attack in TESTBED_PGD)
    assert paper.synthetic_shifts == [
        *("stylized_imagenet", "stylized_16", f"imagenet_c={parts}", f"imagenet_pgd={pgd}")
    ]
    assert mini.synthetic_shifts == ["mini_stylized", "mini_c"], "the mini study runs none of the testbed's attacks"


def test_the_testbeds_attacks_are_a_shift_of_those_that_are_run(root):
    attacks = {"names": ["pgd_l2_0.5", "fgsm", "pgd_linf_2"], "models": ["mini_resnet"]}
    shifts = load(root, "mini", attacks=attacks).synthetic_shifts
    assert shifts[-1] == "mini_pgd=mini_val:pgd_linf_2+mini_val:pgd_l2_0.5"
    nobody = load(root, "mini", attacks=attacks | {"models": []})
    assert nobody.synthetic_shifts == ["mini_stylized", "mini_c"]


def test_the_four_of_the_testbed_have_settings_and_one_budget_each(root):
    table = yaml.safe_load((root / "config/attacks.yaml").read_text())
    for name in TESTBED_PGD:
        _, norm, eps = name.split("_")
        assert table[name].get("norm", "linf") == norm and table[name]["budgets"] == [float(eps)]


# Overlap


def test_the_detector_sees_what_is_tested_searched_and_labelled(mini, paper):
    assert mini.searched == [
        *("mini_train_biased", "mini_val", "mini_fresh", "mini_pose", "mini_rendition", "mini_copies", "mini_crawl")
    ]
    assert set(mini.searched) <= set(mini.evaluated), "each needs embeddings"
    assert {"mini_train_biased", "mini_crawl", "mini_copies"} <= set(mini.suites["overlap"] + mini.suites["train"])
    assert paper.overlap == {} and paper.searched == [] and paper.measured("data_overlap") == []


def test_all_models_are_measured_where_overlap_is_looked_for(mini):
    assert set(mini.measured("data_overlap")) == {
        (model, dataset) for model in mini.computed for dataset in ("mini_fresh", "mini_rendition", "mini_pose")
    }
    assert mini.figures_of("mini_train_biased") == ["data_overlap"]
    assert mini.figures_of("mini_copies") == ["data_overlap"]
    assert "data_overlap" in mini.figures_of("mini_fresh") and "data_overlap" not in mini.figures_of("mini_sketch")


def test_the_source_of_the_copies_is_embedded_whatever_its_role(mini):
    train = mini.datasets["mini_train_unbiased"]
    copies = dataclasses.replace(mini.datasets["mini_copies"], details={"derive": {"from": train.name, "by": "copies"}})
    assert train.name not in mini.evaluated
    assert train.name in dataclasses.replace(mini, datasets={**mini.datasets, "mini_copies": copies}).evaluated


def test_without_a_detector_nothing_is_looked_for(root, mini):
    study = load(root, "mini", overlap={**mini.config["overlap"], "detector": ""})
    assert study.overlap == {} and study.measured("data_overlap") == [] and study.searched == []
    assert not {"mini_train_biased", "mini_copies", "mini_crawl"} & set(study.evaluated)
    gone = {"find_duplicates", "choose_threshold", "measure_overlap", "embed_overlap", "embed_train"}
    assert gone <= set(plan.job_counts(mini)) and not gone & set(plan.job_counts(study))


# Searched prompts


def test_prompts_are_searched_only_where_a_study_uses_them(root, mini):
    assert set(mini.searches) == {"mini_auto_5"} and mini.searches["mini_auto_5"]["dataset"] == "mini_pool"
    assert plan.job_counts(mini)["search_prompts"] == len(mini.prompted) == 4
    plain = load(root, "mini", prompts={**mini.config["prompts"], "also": ["mini_7"]})
    assert plain.searches == {} and "search_prompts" not in plan.job_counts(plain)


def test_prompts_of_a_models_own_line_are_searched_too(root, mini):
    plain = load(root, "mini", prompts={**mini.config["prompts"], "also": []})
    own = dataclasses.replace(plain.models["mini_clip_resnet_biased"], prompts="mini_auto_5")
    study = dataclasses.replace(plain, models={**plain.models, own.model: own})
    assert set(study.searches) == {"mini_auto_5"} and plan.job_counts(study)["search_prompts"] == 1


def test_what_prompts_are_searched_on_is_embedded_whatever_its_role(mini):
    found = {"mini_auto_5": {"search": {"dataset": "mini_train_unbiased", "tokens": 4, "steps": 10, "keep": 5}}}
    study = dataclasses.replace(mini, prompts={**mini.prompts, **found})
    assert "mini_train_unbiased" not in mini.evaluated and "mini_train_unbiased" in study.evaluated


# Data sets for some models, and classes for some models


def test_a_data_set_for_a_set_of_models_is_measured_on_no_other(paper):
    roz = {name for name, sets in paper.sets_of_model.items() if "roz" in sets}
    corrupted = [name for name, dataset in paper.datasets.items() if dataset.models]
    assert {"imagenet_c_noise", "imagenet_t", "cifar10_t"} <= set(corrupted)
    for name in corrupted:
        own = {model for metric in ("accuracy", "typographic") for model, d in paper.measured(metric) if d == name}
        assert own and own <= roz, name
    assert {model for model, dataset in paper.measured("accuracy") if dataset == "imagenet_c_noise"} == roz
    assert plan.job_counts(paper)["embed_corruptions"] == len(roz)
    outside = next(model for model in paper.models if model not in roz)
    assert sets_of(paper, "accuracy", outside) >= {"imagenet_val", "imagenet_r", "imagenet_vid_robust"}


def test_a_classifier_answers_with_the_classes_of_its_training(paper):
    clip, classifier = "vit-b-32.openai", "resnet152.tv_in1k"
    assert {"roz"} <= paper.sets_of_model[clip] & paper.sets_of_model[classifier]
    assert sets_of(paper, "typographic", clip) == {"imagenet_t", "cifar10_t"}
    assert sets_of(paper, "typographic", classifier) == {"imagenet_t"}
    assert "cifar10" in sets_of(paper, "accuracy", clip) and "cifar10" not in sets_of(paper, "accuracy", classifier)


def test_no_disk_and_no_time_is_planned_for_what_is_not_run(root, paper):
    """A CLIP and a classifier of the set, and one outside it: corruptions are the two's alone."""
    roz = ["vit-b-32.openai", "resnet152.tv_in1k"]
    outside = next(n for n, m in paper.models.items() if m.group == "standard" and "roz" not in paper.sets_of_model[n])
    study = load(root, "config", models={"names": [*roz, outside]}, pixel_cache_gb=1e5)
    keys = {key for key, name in study.cached_pixels if name.startswith("imagenet_c_")}
    assert keys == {study.preprocessing(model, "imagenet_c_noise").key for model in roz}
    images = {s: sum(study.datasets[n].images or 0 for n in names) for s, names in study.suites.items()}
    run = {suite: plan._images(study, outside, suite) for suite in images}
    assert run == images | {"corruptions": 0, "typographic": 0}
    assert plan._images(study, roz[0], "corruptions") == 4 * 937_500
    each = 2 * sum(images.values()) + sum(run.values())
    assert plan.stored_bytes(study)["embeddings"] == each * plan.EMBEDDING_BYTES


# Cropped when they were made


def test_what_was_cropped_when_it_was_made_is_not_cropped_again(paper):
    cropped = {name for name, dataset in paper.datasets.items() if dataset.cropped}
    assert {"imagenet_c_noise", "imagenet_c_digital", "imagenet_3dcc"} <= cropped and "imagenet_val" not in cropped
    wide = next(m for m in paper.models.values() if m.preprocessing.size == (336, 336) and m.preprocessing.crop)
    spec = paper.preprocessing(wide.model, "imagenet_c_noise")
    assert spec.pixel_spec == "resize(336x336,bicubic)" and spec.mean == wide.preprocessing.mean
    assert paper.preprocessing(wide.model, "imagenet_val") == wide.preprocessing
    red = paper.preprocessing(wide.model, "objectnet")
    assert red.border == paper.datasets["objectnet"].border_crop > 0 and red.crop == (336, 336)


# Questions


def test_without_their_selectors_no_questions_are_asked_and_the_study_says_so(root, mini):
    assert mini.questioned and not mini.remarks
    absent = "mini_clip_vit_sigmoid"
    models = {**mini.config["models"], "sets": [], "names": [name for name in mini.models if name != absent]}
    study = load(root, "mini", models=models, lmm={"selectors": {**mini.config["lmm"]["selectors"], "other": absent}})
    assert not study.questioned and not study.measured("choice")
    assert study.remarks == (f"no questions are asked: lmm.selectors.other is {absent}, left out of this study",)


def test_a_typo_in_a_selector_stops_the_plan(root):
    with pytest.raises(
        InputError, match=r"lmm.selectors.clip: 'mini_resnt' is no entry of .*did you mean 'mini_resnet'"
    ):
        load(root, "mini", lmm={"selectors": {"clip": "mini_resnt"}})
