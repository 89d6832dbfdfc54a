"""Every study plans, one figure plans, and what is wrong stops before any job with one message."""

import re

import pytest
import yaml
from snakemake.utils import update_config

from clip_robustness.core.registry import load_study
from clip_robustness.data.plan import job_counts


@pytest.mark.parametrize("name", ["config", "mini", "published", "lite"])
def test_every_study_plans_the_jobs_that_plan_counts(house, name):
    """`plan` counts by arithmetic; Snakemake's own plan of the same, empty checkout agrees rule by rule."""
    path = f"config/{name}.yaml"
    jobs = house.jobs("--cores", "all", "--resources", "gpu=4", *(("--configfile", path) if name != "config" else ()))
    assert jobs == job_counts(load_study(yaml.safe_load((house.path / path).read_text()), house.path))
    assert jobs["draw_figure"] >= 1 and ("measure_shape_bias" in jobs or "import_published" in jobs)


SMALLER = """
attacks: {names: [fgsm, bim_transfer], models: [mini_resnet], settings: {fgsm: {substitute: true}}}
overlap: {corpora: [mini_train_unbiased], datasets: [mini_pose], vectors: {crawl: vectors}}
prompts: {also: [mini_7]}
datasets: {without: [mini_crawl, mini_pool, mini_filtered, mini_factors, mini_typographic]}
"""


def test_a_study_without_some_of_it_plans_the_jobs_that_plan_counts(house):
    """Vectors that were made elsewhere beside a corpus, an attack that is made a transferred one, and no search."""
    (house.path / "vectors").mkdir()
    (house.path / "smaller.yaml").write_text(SMALLER)
    config = yaml.safe_load((house.path / "config/mini.yaml").read_text())
    update_config(config, yaml.safe_load(SMALLER))
    jobs = house.jobs("--configfile", "config/mini.yaml", "smaller.yaml")
    assert jobs == job_counts(load_study(config, house.path))
    assert jobs["attack_images"] == 2 and jobs["find_duplicates"] == 1 and "search_prompts" not in jobs
    commands = house.snakemake("--dry-run", "--printshellcmds", "--configfile", "config/mini.yaml", "smaller.yaml")
    attacks = re.findall(r"-m clip_robustness attack --model.*", commands)
    assert len(attacks) == 2 and all("resources/mini/weights/mini_convnext" in attack for attack in attacks)
    assert "--names mini_train_unbiased crawl" in commands


def test_overlap_with_features_that_were_made_elsewhere(house):
    """What config.yaml says of overlap, its comment signs taken away."""
    text = (house.path / "config/config.yaml").read_text()
    told = yaml.safe_load(re.sub("^# ?", "", text[text.index("# overlap:") :], flags=re.M))
    changes = {"overlap": told["overlap"] | {"vectors": {"laion400m": "vectors"}}, "figures": ["data_overlap"]}
    changes |= {"datasets": {"names": ["imagenet_copies"]}, "local": {"imagenet_val": "vectors"}}
    changes |= {"models": {"sets": [], "names": ["vit-b-32.openai", "resnet50.tv_in1k"]}, "accept": ["objectnet"]}
    changes |= {"attacks": {"names": []}}
    (house.path / "vectors").mkdir()
    (house.path / "overlap.yaml").write_text(yaml.safe_dump(changes))
    config = yaml.safe_load(text)
    update_config(config, changes)
    jobs = house.jobs("--configfile", "config/config.yaml", "overlap.yaml")
    assert jobs == job_counts(load_study(config, house.path))
    assert jobs["find_duplicates"] == len(changes["overlap"]["datasets"]) and jobs["choose_threshold"] == 1


def test_one_figure_needs_only_its_own(house):
    jobs = house.jobs("figures/shape_bias.pdf")
    assert "embed_cue_conflict" in jobs
    assert not {"embed_natural", "measure_calibration", "fit_baselines"} & set(jobs)
    attacked = house.jobs("--configfile", "config/mini.yaml", "--", "figures/mini/adversarial.pdf")
    assert attacked["attack_images"] >= 40 and "train_mini" in attacked
    assert not {rule for rule in attacked if rule.startswith("embed_")}, "attacks need no embeddings"
    printed = house.jobs("--configfile", "config/mini.yaml", "--", "figures/mini/typographic.pdf")
    assert printed["derive_dataset"] >= 1 and "attack_images" not in printed


def test_every_model_and_data_set_is_planned_once(house):
    jobs = house.jobs("--configfile", "config/mini.yaml")
    output = house.snakemake("--dry-run", "--configfile", "config/mini.yaml")
    embedded = set(re.findall(r"results/mini/embeddings/([\w.-]+)/mini_val.npy", output))
    trained = set(re.findall(r"resources/mini/weights/([\w.-]+)/manifest.json", output))
    assert jobs["embed_natural"] == len(embedded) >= 10
    assert jobs["train_mini"] == len(trained) and trained > embedded


@pytest.mark.parametrize(
    "target",
    [
        "figures/shape_bais.pdf",
        "results/metrics/accuracy/../../x/imagenet_r.json",
        "results/embeddings/nobody/imagenet_r.npy",
    ],
)
def test_a_wildcard_takes_names_of_the_registry_only(house, target):
    assert "MissingRuleException" in house.snakemake("--dry-run", target, fails=True)


def test_a_typo_stops_the_plan_with_one_message(house):
    house.edit("config/mini.yaml", "study: mini", "study: mini\nsead: 1")
    output = house.snakemake("--dry-run", "--configfile", "config/mini.yaml", fails=True)
    assert "unknown field 'sead'; did you mean 'seed'?" in output
    assert "Traceback" not in output


def test_a_wrong_model_line_stops_the_plan(house):
    house.edit("config/models.tsv", "\tresnet50.tv_in1k\thub:", "\tresnet50.tv_in1k\thubb:")
    output = house.snakemake("--dry-run", fails=True)
    assert re.search(r"models.tsv, line \d+ \(resnet50.tv_in1k\), field 'weights': 'hubb:", output)
    assert "Traceback" not in output


def test_adding_a_model_is_one_line(house):
    before = house.jobs()
    table = house.path / "config/models.tsv"
    line = next(text for text in table.read_text().splitlines() if text.startswith("resnet50.tv_in1k"))
    table.write_text(table.read_text() + line.replace("resnet50.tv_in1k", "resnet34.tv_in1k") + "\n")
    after = house.jobs()
    grown = {rule: after[rule] - before[rule] for rule in after if after[rule] != before[rule]}
    once = ("fetch_weights", "embed_natural", "embed_cue_conflict", "measure_shape_bias")
    assert dict.fromkeys(once, 1).items() <= grown.items()


def test_lint_has_no_finding(house):
    assert "Congratulations" in house.snakemake("--lint")


def test_every_rule_carries_a_code_hash_and_an_env(root):
    """Downloads are the exception to the hash: their checksum is their identity."""
    for path in sorted((root / "rules").glob("*.smk")):
        for rule in re.split(r"\n\s*rule ?", path.read_text())[1:]:
            name = re.match(r"(\w+)?:", rule)[1] or "embed"
            assert "conda:" in rule, f"{path.name}: rule {name}"
            assert "log:" in rule, f"{path.name}: rule {name}"
            assert "code=" in rule or name.startswith("fetch_"), f"{path.name}: rule {name}"
            assert "run:" not in rule


def test_a_rule_draws_from_the_tables_that_its_figure_names(root):
    text = (root / "rules/common/tables.smk").read_text()
    block = text[text.index("FIGURE_TABLES = {") :].split("}")[0]
    for name, tables in re.findall(r'"(\w+)": \(([^)]*)\)', block):
        source = (root / f"src/clip_robustness/figures/{name}.py").read_text()
        declared = re.search(r"^TABLES = \(([^)]*)\)", source, re.M)[1]
        assert sorted(re.findall(r"\w+", tables)) == sorted(re.findall(r"\w+", declared)), name
