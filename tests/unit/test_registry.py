"""The registry: what is wrong is said in one message with file, row, field, expectation and nearest name."""

import collections
import dataclasses
import re
import shutil
from urllib.parse import urlparse

import pytest
import yaml

from clip_robustness.core.gating import page
from clip_robustness.core.io import InputError
from clip_robustness.core.registry import load_datasets, load_models, load_study, model_sets
from clip_robustness.core.study import METRICS_OF_FIGURE, METRICS_OF_ROLE


@pytest.fixture
def house(root, tmp_path):
    """A copy of config/ that a test may spoil."""
    shutil.copytree(root / "config", tmp_path / "config", ignore=shutil.ignore_patterns("published"))
    return tmp_path


def config(house, name="lite"):
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
    assert len({study.config["prompts"]["default"], *study.config["prompts"]["also"]}) == 4


ROW = "resnet50.tv_in1k\t"


def first_line(path):
    """The number of the table's row that the spoils change (the header is line 1)."""
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(ROW))


def set_field(house, field, value):
    path = house / "config/models.tsv"
    lines = path.read_text().splitlines()
    fields = lines[first_line(path) - 1].split("\t")
    fields[lines[0].split("\t").index(field)] = value
    lines[first_line(path) - 1] = "\t".join(fields)
    path.write_text("\n".join(lines) + "\n")
    return ["models.tsv", f"line {first_line(path)} ", f"'{field}'"]


def spoil_group(house):
    return [*set_field(house, "group", "standart"), "did you mean 'standard'"]


def spoil_duplicate(house):
    path = house / "config/models.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[first_line(path) - 1]]) + "\n")
    return ["models.tsv", f"line {len(lines) + 1}", "'model'", f"taken by line {first_line(path)}"]


def spoil_columns(house):
    edit(house / "config/models.tsv", "preprocess", "preproces")
    return ["models.tsv", "header", "preproces", "did you mean 'preprocess'"]


def spoil_short_row(house):
    path = house / "config/models.tsv"
    path.write_text(path.read_text() + "another\tonly two\n")
    return ["models.tsv", "another", "2 fields, expected"]


def spoil_preprocess(house):
    return [*set_field(house, "preprocess", "resise(256,bicubic)"), "resise", "resize"]


def spoil_number(house):
    return [*set_field(house, "params_m", "many"), "'many'", "expected number"]


def spoil_parent(house):
    return [*set_field(house, "parent", "resnet101.tv_in1"), "did you mean 'resnet101.tv_in1k'"]


def spoil_weights(house):
    return [*set_field(house, "weights", "hub:timm"), "hub:OWNER/NAME"]


def spoil_blend(house):
    return [*set_field(house, "weights", "blend:rn50.openai+rn51.openai@0.5"), "did you mean 'rn50.openai'"]


def spoil_share(house):
    return [*set_field(house, "weights", "blend:rn50.openai+rn101.openai@1.5"), "blend:PARENT+FINETUNED@SHARE"]


def spoil_gflops(house):
    return [*set_field(house, "gflops", ""), "expected a number"]


def spoil_predictions(house):
    path, line, _ = set_field(house, "library", "predictions")
    set_field(house, "weights", "predictions:nowhere")
    return [path, line, "'weights'", "no .npy or .parquet file"]


def spoil_library(house):
    path, line, _ = set_field(house, "weights", "predictions:somewhere")
    return [path, line, "'library'", "'predictions' needs both"]


def spoil_prompts(house):
    path, *_ = set_field(house, "prompts", "roz_auto_rn51")
    return [path, "(resnet50.tv_in1k), field 'prompts'", "did you mean 'roz_auto_rn50"]


def spoil_condition(house):
    edit(house / "config/model_sets.yaml", "family: [vit, convnext]", "familly: [vit, convnext]")
    return ["model_sets.yaml", "closer_look", "did you mean 'family'"]


def spoil_labels(house):
    edit(house / "config/datasets.yaml", "labels: imagenet_a", "labels: imagenet_aa")
    return ["datasets.yaml", ".labels", "imagenet_aa", "did you mean 'imagenet_a'"]


def spoil_role(house):
    edit(house / "config/datasets.yaml", "role: natural_shift", "role: natural_shit")
    return ["datasets.yaml", "role", "did you mean 'natural_shift'"]


def spoil_field(house):
    edit(house / "config/datasets.yaml", "licence: MIT", "license: MIT")
    return ["datasets.yaml", "'license'", "did you mean 'licence'"]


def spoil_family(house):
    edit(house / "config/datasets.yaml", "family: class_folders", "family: class_folder")
    return ["datasets.yaml", ".family", "did you mean 'class_folders'"]


def spoil_checksum(house):
    edit(house / "config/datasets.yaml", "sha256: 18c6bf49", "sha256: 18C6BF49")
    return ["datasets.yaml", "datasets.imagenet_r.archives.0.sha256", "does not match"]


def spoil_address(house):
    edit(house / "config/datasets.yaml", "https://people.eecs.berkeley.edu", "people.eecs.berkeley.edu")
    return ["datasets.yaml", "archives.0.urls.0", "people.eecs", "does not match"]


def spoil_sources(house):
    edit(
        house / "config/datasets.yaml",
        "    archives:\n",
        "    hub: {repository: a/b, files: [x], format: parquet}\n    archives:\n",
    )
    return ["datasets.yaml", "both 'archives' and 'hub'"]


def spoil_source_twice(house):
    edit(house / "config/datasets.yaml", "file: far_focus.tar.gz", "file: near_focus.tar.gz")
    return ["datasets.yaml", "imagenet_3dcc.archives", "'near_focus.tar.gz' stands there twice"]


def spoil_from(house):
    edit(house / "config/datasets.yaml", "from: imagenet_val", "from: imagenet_vall")
    return ["datasets.yaml", "imagenet_x.from", "did you mean 'imagenet_val'"]


def spoil_derive(house):
    edit(house / "config/datasets.yaml", "derive: {from: imagenet_val", "derive: {from: imagenet_vall")
    return ["datasets.yaml", "imagenet_t.derive.from", "did you mean 'imagenet_val'"]


def spoil_suite(house):
    edit(house / "config/datasets.yaml", "models: [roz]", "models: [lite]")
    return ["datasets.yaml", "imagenet_c_blur.models", "imagenet_c_noise of the same suite is for other models"]


def spoil_twice(house):
    path = house / "config/datasets.yaml"
    path.write_text(path.read_text() + "\nlabel_spaces: {}\n")
    return ["datasets.yaml", "label_spaces", "twice"]


def spoil_yaml(house):
    path = house / "config/datasets.yaml"
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


ATTACK = {"names": ["fgsm"], "models": ["lite"]}
OVERLAP = {"detector": "vit-b-32.openai", "datasets": ["imagenet_a"], "corpora": ["imagenet_r"], "copies": "textures"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"models": {"names": ["vit-b-32.openia"]}}, ["models", "did you mean 'vit-b-32.openai'"]),
        ({"models": {"sets": ["light"]}}, ["models.sets", "did you mean 'lite'"]),
        ({"prompts": {"default": "openai_90"}}, ["prompts", "openai_90", "did you mean 'openai_"]),
        ({"figures": ["shape_bais"]}, ["figures", "did you mean 'shape_bias'"]),
        ({"id_dataset": "imagenet_v"}, ["'id_dataset'", "did you mean 'imagenet_"]),
        ({"local": {"imagenet_vall": "/x"}}, ["local", "did you mean 'imagenet_val'"]),
        ({"local": {"imagenet_a": []}}, ["local.imagenet_a", "non-empty"]),
        ({"accept": ["objectnett"]}, ["accept", "did you mean 'objectnet'"]),
        ({"skip_unavailable": "perhaps"}, ["'skip_unavailable'", "expected boolean"]),
        ({"datasets": {"names": ["imagenet_x"]}, "id_dataset": ""}, ["annotates 'imagenet_val'", "left out"]),
        ({"datasets": {"names": ["imagenet_t"]}}, ["'imagenet_t' is made from 'imagenet_val', which is left out"]),
        ({"attacks": {"names": ["fgms"]}}, ["attacks.names", "attacks.yaml", "did you mean 'fgsm'"]),
        ({"attacks": {"names": ["fgsm"], "models": ["litee"]}}, ["attacks.models", "did you mean 'lite'"]),
        ({"attacks": {"settings": {"bimm": {"steps": 3}}}}, ["attacks.settings", "did you mean 'bim'"]),
        (
            {"attacks": ATTACK | {"settings": {"fgsm": {"budgets": [0, 1]}}}},
            ["attacks.yaml, fgsm, field 'budgets.0'", "0"],
        ),
        ({"attacks": ATTACK | {"settings": {"fgsm": {"stepz": 3}}}}, ["attacks.yaml, fgsm", "did you mean 'step"]),
        (
            {"attacks": ATTACK | {"settings": {"fgsm": {"norm": "l1"}}}},
            ["attacks.yaml, fgsm, field 'norm'", "linf, l2"],
        ),
        (
            {"attacks": ATTACK | {"names": ["bim_transfer"]}},
            ["attacks.substitute", "bim_transfer needs one", "no model"],
        ),
        ({"attacks": ATTACK | {"settings": {"fgsm": {"substitute": True}}}}, ["attacks.substitute", "fgsm needs one"]),
        ({"attacks": ATTACK | {"eps_space": "pixels"}}, ["'attacks.eps_space'", "did you mean 'pixel'"]),
        (
            {"overlap": OVERLAP | {"detector": "vit-b-32.openia"}},
            ["overlap.detector", "did you mean 'vit-b-32.openai'"],
        ),
        ({"overlap": OVERLAP | {"datasets": ["imagenet_aa"]}}, ["overlap.datasets", "did you mean 'imagenet_a'"]),
        ({"overlap": OVERLAP | {"corpora": ["imagenet_rr"]}}, ["overlap.corpora", "did you mean 'imagenet_r'"]),
        ({"overlap": OVERLAP | {"copies": ""}}, ["overlap.copies", "'' is no data set"]),
        (
            {"overlap": OVERLAP | {"controls": {"imagenet_aa": "planted"}}},
            ["overlap.controls", "did you mean 'imagenet_a'"],
        ),
        ({"overlap": OVERLAP | {"controls": {"imagenet_a": "plantd"}}}, ["'overlap.controls.imagenet_a'", "'planted'"]),
        ({"overlap": OVERLAP | {"false_positives": 0}}, ["'overlap.false_positives'", "0"]),
        ({"sead": 3}, ["'sead'", "did you mean 'seed'"]),
        ({"resamples": "many"}, ["resamples", "expected integer"]),
        ({"id_dataset": ""}, ["'id_dataset'", "found none"]),
    ],
)
def test_a_fault_in_a_config_is_one_clear_message(house, change, expected):
    with pytest.raises(InputError) as caught:
        load_study({**config(house), **change}, house)
    for part in expected:
        assert part in str(caught.value)


def test_a_data_set_for_an_unknown_set_of_models(house):
    table = house / "config/datasets.yaml"
    table.write_text(table.read_text().replace("models: [roz]", "models: [rozz]"))
    with pytest.raises(InputError, match=r"datasets.yaml, datasets.imagenet_c_noise.models: 'rozz'.*mean 'roz'"):
        load_study(config(house, "config"), house)


def test_prompts_are_searched_on_a_data_set_of_the_study(house):
    table = house / "config/prompts.yaml"
    search = "  search: {dataset: imagenet_%s, tokens: 4, steps: 100, keep: 5}"
    table.write_text(table.read_text() + f"found:\n{search % 'aa'}\nelsewhere:\n{search % 'val'}\n")
    for change in ({"default": "found"}, {"default": "openai_1", "also": ["found"]}):
        with pytest.raises(InputError, match=r"prompts.yaml, found: 'imagenet_aa' is no .* did you mean 'imagenet_a'"):
            load_study({**config(house), "prompts": change}, house)
    assert load_study(config(house), house).searches == {}, "a set that the study does not use needs no data"


def test_settings_are_filled_in_where_a_config_names_some(root):
    some = load_study({**config(root), "attacks": ATTACK, "overlap": {"corpora": ["imagenet_a"]}}, root).config
    assert some["attacks"]["images"] == 1000 and some["attacks"]["eps_space"] == "pixel"
    assert some["attacks"]["names"] == ["fgsm"] and some["attacks"]["settings"] == {}
    assert some["overlap"]["detector"] == "" and some["overlap"]["false_positives"] == 0.001
    none = load_study(config(root), root).config
    assert none["attacks"]["names"] == none["overlap"]["corpora"] == none["shifts"] == []
    assert none["normaliser"] == ""


def test_all_faults_are_listed_at_once(house):
    spoil_group(house)
    spoil_number(house)
    with pytest.raises(InputError) as caught:
        load_models(house / "config/models.tsv", house)
    assert len(str(caught.value).splitlines()) >= 2


def test_a_model_that_is_trained_here_needs_its_parent(house):
    """The mini zoo fine-tunes its own models, so a parent that is left out cannot be trained."""
    set_field(house, "weights", "mini")
    set_field(house, "parent", "vit-b-32.openai")
    with pytest.raises(InputError, match=r"made from 'vit-b-32.openai', which is left out"):
        load_study({**config(house), "models": {"names": ["resnet50.tv_in1k"]}}, house)


def test_a_dataset_is_one_entry(house):
    path = house / "config/datasets.yaml"
    entry = (
        "  imagenet_mine:\n    {title: Mine, family: class_folders, labels: imagenet_1k, images: 100,\n"
        "     role: natural_shift, suite: natural, sets: [lite], licence: MIT,\n"
        "     archives: [{file: mine.tar, urls: ['https://example.org/mine.tar']}]}\n"
    )
    path.write_text(path.read_text().rstrip() + "\n" + entry)
    datasets, _ = load_datasets(path, house)
    assert datasets["imagenet_mine"].metrics == ("accuracy", "calibration", "prompts")
    study = load_study(config(house), house)
    assert "imagenet_mine" in study.suites["natural"] and "imagenet_mine" in study.with_metric("calibration")


# --- the papers' data sets ---


@pytest.fixture(scope="module")
def papers(root):
    return load_datasets(root / "config/datasets.yaml", root)[0]


def test_every_data_set_of_the_papers_is_there(papers):
    """The lists of the three papers: natural and synthetic shifts, out of distribution, retrieval, 3D, multimodal."""
    natural = {"imagenet_v2", "imagenet_v2_threshold", "imagenet_v2_top", "imagenet_r", "imagenet_a"}
    natural |= {"imagenet_sketch", "objectnet", "imagenet_vid_robust", "ytbb_robust"}
    corruptions = {f"imagenet_c_{part}" for part in ("noise", "blur", "weather", "digital", "extra")}
    corruptions |= {"imagenet_3dcc", "imagenet_3dcc_video", "stylized_imagenet", "cue_conflict"}
    ood = {"inaturalist", "sun", "places", "textures", "imagenet_o", "ninco", "ninco_popular"}
    others = {"coco", "flickr30k", "navi", "scannet_pairs", "spair", "imagenet_d", "cifar10", "imagenet_t", "cifar10_t"}
    own = {"imagenet_val", "imagenet_train", "imagenet_x"}
    assert natural | corruptions | ood | others | own <= set(papers)


def test_counts_are_the_releases(papers):
    images = {name: dataset.images for name, dataset in papers.items()}
    assert images["imagenet_val"] == 50_000 and images["imagenet_train"] == 1_281_167
    assert images["imagenet_sketch"] == 50_889 and images["textures"] == 5_640
    assert images["ninco"] == 5_879 and images["ninco_popular"] == 2_715
    # 15 corruptions and 4 more, 12 of the three-dimensional kind; 5 severities of 50,000 images each
    main = [f"imagenet_c_{part}" for part in ("noise", "blur", "weather", "digital")]
    assert sum(images[name] for name in main) == 15 * 5 * 50_000
    assert images["imagenet_c_extra"] == 4 * 5 * 50_000
    assert images["imagenet_3dcc"] + images["imagenet_3dcc_video"] == 12 * 5 * 50_000


def test_an_archive_has_a_checksum_or_is_pinned(papers):
    """What is declared is whole: a known size and checksum where a source states them, an address each."""
    archives = {archive["file"]: archive for dataset in papers.values() for archive in dataset.archives}
    assert archives["imagenet-r.tar"]["bytes"] == 2_191_079_936 and archives["imagenet-a.tar"]["bytes"] == 687_552_512
    assert archives["noise.tar"]["md5"] == "e80562d7f6c3f8834afb1ecf27252745"
    assert "sha256" not in archives["imagenetv2-matched-frequency.tar.gz"]  # known for another host's file only
    for dataset in papers.values():
        for archive in dataset.archives:
            assert dataset.access == "registration" or archive["urls"], dataset.name
            for url in archive.get("urls", []):
                assert urlparse(url).hostname and not re.search(r"\s", url)


def test_the_corruptions_of_an_entry_are_those_of_its_archives(papers):
    from clip_robustness.data.adapters.imagenet_3dcc import GEOMETRIC, OTHERS
    from clip_robustness.data.adapters.imagenet_c import ARCHIVES

    for part in ("noise", "blur", "weather", "digital", "extra"):
        listed = papers[f"imagenet_c_{part}"].details["options"]["corruptions"]
        assert set(listed) == set(ARCHIVES[f"{part}.tar"])
    for name, kinds in (("imagenet_3dcc", GEOMETRIC), ("imagenet_3dcc_video", OTHERS)):
        assert papers[name].details["options"]["corruptions"] == list(kinds)
        assert [archive["file"] for archive in papers[name].archives] == [f"{kind}.tar.gz" for kind in kinds]


def test_the_adapters_know_the_options(papers):
    """An option that no adapter reads would be silently ignored; `password` is read by the index itself."""
    import importlib
    import inspect

    for name, dataset in papers.items():
        module = importlib.import_module(f"clip_robustness.data.adapters.{dataset.family}")
        assert hasattr(module, "write_factors" if dataset.role == "annotation" else "adapt"), name
        source = inspect.getsource(module)
        if dataset.family == "imagenet_3dcc":
            source += inspect.getsource(importlib.import_module("clip_robustness.data.adapters.imagenet_c"))
        for option in {*dataset.details.get("options", {})} - {"password"}:
            assert f'"{option}"' in source, f"{name}: {option}"


def test_guessing_is_one_over_the_classes(papers):
    for name, dataset in papers.items():
        guess = dataset.details.get("random_guess")
        if guess is not None and name != "imagenet_d":
            assert guess == pytest.approx(1 / dataset.details["classes"], rel=0.01), name


def test_roles_and_figures_know_each_other(root, papers):
    schema = yaml.safe_load((root / "config/schemas/datasets.schema.yaml").read_text())
    entry = schema["properties"]["datasets"]["additionalProperties"]["properties"]
    assert set(entry["role"]["enum"]) == set(METRICS_OF_ROLE)
    figures = yaml.safe_load((root / "config/schemas/config.schema.yaml").read_text())["properties"]["figures"]
    assert set(figures["items"]["enum"]) == set(METRICS_OF_FIGURE)


def test_a_data_set_without_a_metric_is_not_embedded(root):
    study = load_study(config(root, "config"), root)
    assert "navi" in study.datasets and "navi" not in study.evaluated
    shifts = {"natural", "video", "synthetic", "corruptions", "corruptions_3d", "typographic"}
    assert set(study.suites) == {*shifts, "cue_conflict", "ood", "retrieval", "lmm"}
    assert study.base_spaces == ["cifar10", "imagenet_1k"]


def test_what_is_measured_on_what(root):
    """Captions need a text tower, factors are measured by their table's name, prompts where the config says."""
    study = load_study(config(root, "config"), root)
    assert {m for m, _ in study.measured("retrieval")} == {n for n, m in study.models.items() if m.has_text_tower}
    assert {d for _, d in study.measured("factors")} == {"imagenet_x"} and "imagenet_x" not in study.evaluated
    assert study.annotation_of("imagenet_val") == "imagenet_x"
    assert {m for m, _ in study.measured("prompts")} == set(study.config["prompts"]["models"])


def test_a_model_that_answers_in_text_is_asked_and_nothing_else(root):
    """It has no embeddings, and its weights are wanted where a data set has questions."""
    study = load_study(config(root, "config"), root)
    texts = {name for name, model in study.models.items() if model.answers_in_text}
    assert len(texts) == 6 and texts == {name for name, model in study.models.items() if model.group == "vlm"}
    assert not texts & {*study.computed, *study.prompted, *study.attacked} and texts <= set(study.weighted)
    assert {(m, d) for m in texts for d in study.datasets if study.is_for(m, d)} == {(m, "imagenet_d") for m in texts}
    for metrics in (*METRICS_OF_ROLE.values(), ("adversarial", "data_overlap", "correspondence")):
        assert not any(name in texts for metric in metrics for name, _ in study.measured(metric))
    assert len(study.asked) == 6 and set(study.asked) == {pair for pair in study.measured("choice") if pair[0] in texts}
    silent = load_study({**config(root, "config"), "lmm": {}}, root)
    assert not silent.asked and not texts & set(silent.weighted) and len(silent.weighted) == len(study.weighted) - 6
    assert study.models["llava_1_5_7b"].weight_bytes == pytest.approx(14.13e9, rel=0.01)  # of its three shards, float16


def test_a_model_with_a_processor_of_its_own_needs_no_preprocessing(house):
    path = house / "config/models.tsv"
    spec = "resize(336,bicubic)|center_crop(336)|normalize(openai)"
    lines = path.read_text().splitlines()
    lines = [line.replace(spec, "") if line.startswith("llava_1_6_34b") else line for line in lines]
    path.write_text("\n".join(lines) + "\n")
    assert load_models(path, house)["llava_1_6_34b"].preprocess == ""
    set_field(house, "preprocess", "")
    with pytest.raises(InputError, match=r"\(resnet50.tv_in1k\), field 'preprocess'"):
        load_models(path, house)


def test_the_papers_sets_are_columns_of_the_table(root):
    """84 zero-shot CLIPs and 29 of the scaling laws, 44 fine-tuned, 127 classifiers, 6 LLaVAs; one's own joins them."""
    table = root / "config/model_sets.yaml"
    models = load_models(root / "config/models.tsv", root)
    groups = collections.Counter(models[n].group for n, sets in model_sets(table, models).items() if "holistic" in sets)
    assert groups["clip_zero_shot"] == 84 + 29 and groups["clip_finetuned"] == 44
    assert groups["standard"] + groups["more_data"] + groups["self_supervised"] == 127 and groups["vlm"] == 6
    closer = [models[n] for n, sets in model_sets(table, models).items() if "closer_look" in sets]
    assert sum(m.group == "clip_zero_shot" for m in closer) == 51
    mine = dataclasses.replace(models["rn50.openai"], model="mine", listed=("own",))
    assert model_sets(table, {"mine": mine})["mine"] == {"closer_look", "holistic", "roz", "lite", "mini"}


# --- what needs the user ---


def paper(root, **change):
    return load_study({**config(root, "config"), **change}, root)


def test_what_waits_for_the_user(root):
    waiting = set(paper(root).unavailable)
    assert waiting == {"imagenet_val", "imagenet_x", "objectnet", "stylized_imagenet", "imagenet_t"}
    given = paper(root, local={"imagenet_val": ["/data/val.tar", "/data/devkit"]}, accept=["objectnet"])
    assert set(given.unavailable) == {"stylized_imagenet"}
    assert given.local("imagenet_val") == ["/data/val.tar", "/data/devkit"]


def test_annotations_wait_for_their_images(root):
    assert "imagenet_x" in paper(root, local={"imagenet_x": "imagenetx.tar.gz"}).unavailable
    words = paper(root, local={"imagenet_t": "words"})
    assert "imagenet_t" not in words.unavailable and "imagenet_val" in words.unavailable


def test_what_is_made_from_a_set_that_is_missing_waits_for_that_set_alone(root):
    """Nothing is to be typed for ImageNet-T: it is drawn on ImageNet's images."""
    text = page(paper(root))
    assert "also for: imagenet_x, imagenet_t" in text and "imagenet_t:" not in text
    own = page(paper(root, local={"imagenet_t": "words"}))
    assert "also for: imagenet_x\n" in own and "imagenet_t" not in own


def test_a_licence_click_is_a_line_of_the_config(root):
    assert "objectnet" in paper(root).unavailable
    assert "objectnet" not in paper(root, accept=["objectnet"]).unavailable
    assert "objectnet" not in paper(root, local={"objectnet": "~/objectnet"}).unavailable
    assert "imagenet_val" in paper(root, accept=["imagenet_val"]).unavailable  # no program may fetch it


def test_without_imagenet_another_set_stands_in_and_it_is_said(root):
    study = paper(root, skip_unavailable="true")
    assert study.id_dataset == "imagenet_v2" and study.partner("imagenet_sketch") == "imagenet_v2"
    assert "imagenet_val" not in study.datasets and "objectnet" in study.skipped
    assert "visual_factors" not in study.config["figures"] and "ood_detection" in study.config["figures"]
    assert any("imagenet_v2 stands in" in remark for remark in study.remarks)


def test_images_are_attacked_of_what_stands_in(root):
    """A list names images of ImageNet validation, which another set has not."""
    assert paper(root).config["attacks"]["ids"] == "config/attacks/robustbench_ids.txt"
    study = paper(root, skip_unavailable=True)
    assert study.config["attacks"]["ids"] == "" and any("robustbench_ids.txt" in r for r in study.remarks)
    assert {d for _, d in study.measured("adversarial")} == {"imagenet_v2"}
    assert "imagenet_v2_pgd=imagenet_v2:pgd_linf_0.5" in " ".join(study.synthetic_shifts)


def test_overlap_is_looked_for_in_what_is_left(root):
    overlap = {"detector": "rn50.openai", "datasets": ["imagenet_val", "imagenet_r"], "copies": "textures"}
    vectors = {"vectors": {"laion": "/data/laion"}}
    for more, left in (
        ({"corpora": ["stylized_imagenet", "places"]}, ["places"]),
        ({"corpora": ["stylized_imagenet"]} | vectors, []),
    ):
        study = paper(root, overlap={**overlap, **more}, skip_unavailable=True)
        assert study.overlap["datasets"] == ["imagenet_r"] and study.overlap["corpora"] == left
        assert {d for _, d in study.measured("data_overlap")} == {"imagenet_r"}
    figures = {"figures": ["data_overlap", "shape_bias"]}
    study = paper(root, overlap={**overlap, "corpora": ["stylized_imagenet"]}, **figures, skip_unavailable=True)
    assert study.overlap == {} and study.config["figures"] == ["shape_bias"]
    waits = page(paper(root, overlap={**overlap, "corpora": ["stylized_imagenet"]}, **figures))
    assert "get it:   " in waits and "figures:  data_overlap" in waits


def test_prompts_that_are_searched_on_what_is_missing_are_one_message(house):
    table = house / "config/prompts.yaml"
    table.write_text(table.read_text() + "found: {search: {dataset: imagenet_val, tokens: 4, steps: 100, keep: 5}}\n")
    change = {"prompts": {"default": "openai_1", "also": ["found"]}, "skip_unavailable": True}
    with pytest.raises(InputError, match="prompt set 'found': imagenet_val is not available"):
        load_study({**config(house, "config"), **change}, house)


def test_a_figure_without_data_is_dropped_and_it_is_said(root):
    choice = {"sets": ["closer_look"], "without": ["imagenet_v2", "imagenet_v2_threshold", "imagenet_v2_top"]}
    choice["without"] += ["imagenet_sketch"]
    study = paper(root, datasets=choice, skip_unavailable=True)
    assert study.id_dataset == "" and {"shape_bias", "claims"} <= set(study.config["figures"])
    dropped = {remark.split()[2] for remark in study.remarks if "is dropped" in remark}
    assert {"effective_robustness", "calibration", "visual_factors", "ood_detection"} <= dropped
    with pytest.raises(InputError, match="nothing is left"):
        paper(root, datasets={"names": ["imagenet_val"]}, figures=["calibration"], skip_unavailable=True)


def test_with_all_data_nothing_is_skipped(root):
    study = load_study({**config(root), "skip_unavailable": True}, root)
    assert not study.skipped and not study.remarks and study.id_dataset == "imagenet_v2"


def test_the_page_says_what_where_how_and_what_else(root):
    text = page(paper(root))
    for part in (
        "imagenet_val: ImageNet validation",
        "https://image-net.org/download.php",
        "imagenet_val: /path/to/imagenet_val",
        "accept: [objectnet]",
        "snakemake figures/shape_bias.pdf",
        "--config skip_unavailable=true",
        "imagenet_v2 stands in",
    ):
        assert part in text
    assert len(text.splitlines()) < 60, "one page"
