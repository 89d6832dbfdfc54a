"""The registry: what is wrong is said in one message with file, row, field, expectation and nearest name."""

import shutil

import pytest
import yaml

from clip_robustness.core.io import InputError
from clip_robustness.core.registry import load_datasets, load_models, load_study


@pytest.fixture
def house(root, tmp_path):
    """A copy of config/ that a test may spoil."""
    shutil.copytree(root / "config", tmp_path / "config", ignore=shutil.ignore_patterns("published"))
    return tmp_path


def config(house, name="mini"):
    return yaml.safe_load((house / "config" / f"{name}.yaml").read_text())


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", ["config", "lite", "mini", "published"])
def test_every_study_that_is_shipped_holds(root, name):
    study = load_study(yaml.safe_load((root / f"config/{name}.yaml").read_text()), root)
    assert study.name in (name, "paper")


def test_the_mini_zoo_covers_the_six_factors(root):
    study = load_study(yaml.safe_load((root / "config/mini.yaml").read_text()), root)
    clips = [m for m in study.models.values() if m.library == "open_clip"]
    assert len(study.models) >= 10
    assert {m.family for m in clips} >= {"vit", "resnet"}
    assert len({m.source for m in clips}) == 2 and len({m.train_images for m in clips}) >= 2
    assert {m.finetuning for m in clips} == {"none", "cross_entropy", "contrastive"}
    assert {m.loss for m in clips} >= {"softmax", "sigmoid"}
    assert len({study.config["prompts"]["default"], *study.config["prompts"]["also"]}) == 3


def spoil_group(house):
    edit(house / "config/mini/models.tsv", "\tclip_zero_shot\t", "\tclip_zeroshot\t")
    return ["models.tsv", "line ", "'group'", "did you mean 'clip_zero_shot'"]


def spoil_duplicate(house):
    path = house / "config/mini/models.tsv"
    lines = path.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("mini_"))
    path.write_text("\n".join([*lines, lines[row]]) + "\n")
    return ["models.tsv", f"line {len(lines) + 1}", "'model'", f"taken by line {row + 1}"]


def spoil_columns(house):
    edit(house / "config/mini/models.tsv", "preprocess", "preproces")
    return ["models.tsv", "header", "preproces", "did you mean 'preprocess'"]


def spoil_short_row(house):
    path = house / "config/mini/models.tsv"
    path.write_text(path.read_text() + "mini_new\tonly two\n")
    return ["models.tsv", "mini_new", "2 fields, expected"]


def spoil_preprocess(house):
    edit(house / "config/mini/models.tsv", "resize(48,bicubic)", "resise(48,bicubic)")
    return ["models.tsv", "'preprocess'", "resise", "resize"]


def spoil_number(house):
    path = house / "config/mini/models.tsv"
    lines = path.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("mini_"))
    fields = lines[row].split("\t")
    fields[lines[0].split("\t").index("params_m")] = "many"
    lines[row] = "\t".join(fields)
    path.write_text("\n".join(lines) + "\n")
    return ["models.tsv", "'params_m'", "'many'", "expected number"]


def spoil_parent(house):
    edit(house / "config/mini/models.tsv", "\tmini_clip_vit_biased\t", "\tmini_clip_vit_biassed\t")
    return ["models.tsv", "'parent'", "did you mean 'mini_clip_vit_biased'"]


def spoil_labels(house):
    edit(house / "config/mini/datasets.yaml", "labels: mini_subset", "labels: mini_subsett")
    return ["datasets.yaml", ".labels", "mini_subsett", "did you mean 'mini_subset'"]


def spoil_role(house):
    edit(house / "config/mini/datasets.yaml", "role: natural_shift", "role: natural_shit")
    return ["datasets.yaml", "role", "did you mean 'natural_shift'"]


def spoil_field(house):
    edit(house / "config/mini/datasets.yaml", "licence: MIT", "license: MIT")
    return ["datasets.yaml", "'license'", "did you mean 'licence'"]


def spoil_twice(house):
    path = house / "config/mini/datasets.yaml"
    path.write_text(path.read_text() + "\nlabel_spaces: {}\n")
    return ["datasets.yaml", "label_spaces", "twice"]


def spoil_yaml(house):
    path = house / "config/mini/datasets.yaml"
    path.write_text(path.read_text() + "\n  : [\n")
    return ["datasets.yaml", "not valid YAML"]


SPOILS = [f for name, f in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_a_fault_in_a_table_is_one_clear_message(house, spoil):
    expected = spoil(house)
    with pytest.raises(InputError) as caught:
        load_study(config(house), house)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"models": {"names": ["mini_clip_vit_biasd"]}}, ["models", "did you mean 'mini_clip_vit_biased'"]),
        ({"models": {"sets": ["mimi"]}}, ["models.sets", "did you mean 'mini'"]),
        ({"prompts": {"default": "mini_70"}}, ["prompts", "mini_70", "did you mean 'mini_7'"]),
        ({"figures": ["shape_bais"]}, ["figures", "did you mean 'shape_bias'"]),
        ({"id_dataset": "mini_vall"}, ["'id_dataset'", "did you mean 'mini_val'"]),
        ({"sead": 3}, ["'sead'", "did you mean 'seed'"]),
        ({"resamples": "many"}, ["resamples", "expected integer"]),
        ({"datasets": {"sets": ["mini"], "without": ["mini_val"]}}, ["'id_dataset'", "found none"]),
        ({"models": {"sets": [], "names": ["mini_clip_vit_contrastive"]}}, ["fine-tuned from", "left out"]),
    ],
)
def test_a_fault_in_a_config_is_one_clear_message(house, change, expected):
    with pytest.raises(InputError) as caught:
        load_study(merged(config(house), change), house)
    for part in expected:
        assert part in str(caught.value)


def merged(config, change):
    return {**config, **{k: {**config[k], **v} if isinstance(v, dict) else v for k, v in change.items()}}


def test_all_faults_are_listed_at_once(house):
    spoil_group(house)
    spoil_preprocess(house)
    with pytest.raises(InputError) as caught:
        load_models(house / "config/mini/models.tsv", house)
    assert len(str(caught.value).splitlines()) >= 2


def test_a_dataset_is_one_entry(house):
    path = house / "config/mini/datasets.yaml"
    entry = (
        "  mini_extra:\n    {title: Extra, family: mini_world, labels: mini, images: 100, role: natural_shift,\n"
        "     suite: natural, sets: [mini], licence: MIT, world: {seed: 9, rho: 0.5}}\n"
    )
    path.write_text(path.read_text().rstrip() + "\n" + entry)
    datasets, _ = load_datasets(path, house)
    assert datasets["mini_extra"].metrics == ("accuracy", "calibration")
    study = load_study(config(house), house)
    assert "mini_extra" in study.suites["natural"] and "mini_extra" in study.with_metric("calibration")
