"""Two-way questions from a local hub cache to the figure: a LLaVA of the real architecture, random and tiny.

ImageNet-D comes as an archive of the official layout; a CLIP and a classifier with random weights choose the wrong
options. Lines of models.tsv and of datasets.yaml are those of the paper study.
"""

import csv
import os
import zipfile

import numpy as np
import pytest
import yaml

from clip_robustness.core import io
from clip_robustness.core.registry import load_study
from clip_robustness.core.schema import load_yaml
from clip_robustness.data.adapters.imagenet_d import VARIATIONS, folder_name
from clip_robustness.data.plan import job_counts
from tests.unit.llavas import llava

from .conftest import build_house
from .test_lite import picture, write_models
from .test_real_models import publish

pytestmark = pytest.mark.slow

LLAVA, CLIP, CLASSIFIER = "llava_1_5_7b", "small-clip-zero-shot-0", "small-standard-1"
STUDY = {
    "study": "questions",
    "title": "Questions",
    "pathvars": {"results": "results/questions", "figures": "figures/questions", "logs": "logs/questions"},
    "models": {"names": [LLAVA, CLIP, CLASSIFIER]},
    "datasets": {"names": ["imagenet_d"]},
    "lmm": {"selectors": {"clip": CLIP, "resnet": CLASSIFIER}, "prompts": "openai_1"},
    "figures": ["lmm"],
    "resamples": 100,
    "threads": 1,
}
FIGURE = ("--configfile", "questions.yaml", "--", "figures/questions/lmm.pdf")
CLASSES, COPIES = range(0, 113, 10), 2


@pytest.fixture(scope="module")
def questions(tmp_path_factory, root):
    base = tmp_path_factory.mktemp("questions")
    house = build_house(base / "house", root)
    table = house.path / "config/models.tsv"
    with table.open(newline="") as file:
        line = next(r for r in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if r[0] == LLAVA)
    write_models(house)
    with table.open("a", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n").writerow(line)

    (house.path / "questions.yaml").write_text(yaml.safe_dump(STUDY))
    house.snakemake("--configfile", "questions.yaml", "--", "resources/labels/imagenet_d.json")
    names = io.read_json(house.path / "resources/labels/imagenet_d.json")["classes"]
    archive = base / "ImageNet-D.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for seed, variation in enumerate(VARIATIONS):
            for c in CLASSES:
                for copy in range(COPIES):
                    name = f"ImageNet-D/{variation}/{folder_name(names[c])}/{copy}.png"
                    file.writestr(name, picture(c, 10 * seed + copy, "PNG"))
    document = yaml.safe_load((house.path / "config/datasets.yaml").read_text())
    document["datasets"]["imagenet_d"]["images"] = len(VARIATIONS) * len(CLASSES) * COPIES
    (house.path / "config/datasets.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (house.path / "questions.yaml").write_text(yaml.safe_dump({**STUDY, "local": {"imagenet_d": str(archive)}}))

    model, processor = llava(names=names)
    model.save_pretrained(base / "llava")
    processor.save_pretrained(base / "llava")
    files = {path.name: path.read_bytes() for path in (base / "llava").iterdir()}
    publish(base / "hub", line[4].removeprefix("hub:"), files)
    os.environ |= {"HF_HUB_CACHE": str(base / "hub"), "HF_HUB_OFFLINE": "1"}
    try:
        house.planned = house.jobs("--configfile", "questions.yaml")
        house.snakemake(*FIGURE)
    finally:
        del os.environ["HF_HUB_CACHE"], os.environ["HF_HUB_OFFLINE"]
    return house


def test_the_figure_is_drawn(questions):
    assert (questions.path / "figures/questions/lmm.pdf").read_bytes().startswith(b"%PDF")


def test_every_image_is_asked_about_for_each_selector_and_answered(questions):
    answers = io.read_parquet(questions.path / f"results/questions/answers/{LLAVA}/imagenet_d.parquet")
    index = io.read_parquet(questions.path / "resources/index/imagenet_d.parquet", ["image_id"])
    images = len(VARIATIONS) * len(CLASSES) * COPIES
    assert len(set(index["image_id"])) == images
    asked = {(s, i) for s, i in zip(answers["selector"], answers["image_id"], strict=True)}
    assert asked == {(s, i) for s in STUDY["lmm"]["selectors"] for i in index["image_id"]}


def test_random_models_are_at_chance_and_selectors_at_their_own_accuracy(questions):
    rows = io.read_parquet(questions.path / "results/questions/tables/choice.parquet")
    overall = {
        (rows["model"][i], rows["convention"][i]): (rows["low"][i], rows["value"][i], rows["high"][i])
        for i in range(len(rows["value"]))
        if rows["metric"][i] == "accuracy" and rows["slice"][i] == ""
    }
    low, _, high = overall[LLAVA, "clip:likelihood"]
    assert low <= 0.5 <= high
    for name, selector in (("clip", CLIP), ("resnet", CLASSIFIER)):
        assert overall[selector, f"{name}:two_way_own"][1] < 0.2, "one of a hundred classes, by chance"
    assert {model for model, _ in overall} == {LLAVA, CLIP, CLASSIFIER}


def test_weights_are_sealed_and_pinned(questions):
    sealed = io.check_sealed(questions.path / f"resources/weights/{LLAVA}")
    assert any(name.endswith(".safetensors") for name in sealed["files"])
    assert "hub:llava-hf/llava-1.5-7b-hf" in io.read_json(questions.path / "config/downloads.lock.json")


def test_the_dry_run_had_the_jobs_that_plan_counts(questions):
    study = load_study(load_yaml(questions.path / "questions.yaml"), questions.path)
    # the label spaces were there before the dry run
    planned = {rule: n for rule, n in job_counts(study).items() if rule != "write_label_space"}
    assert {rule: n for rule, n in questions.planned.items() if rule != "write_label_space"} == planned


def test_the_mini_study_asks_the_question_that_its_model_has_learnt(root):
    from clip_robustness.inference.vision_language import QUESTION

    assert load_yaml(root / "config/mini.yaml")["training"]["lmm"]["questions"][0] == QUESTION


def test_options_are_told_apart_by_their_words(questions):
    """A random model answers at random, but by what it reads: the options' likelihoods are no ties."""
    answers = io.read_parquet(questions.path / f"results/questions/answers/{LLAVA}/imagenet_d.parquet")
    truth, failure = (np.array(answers[f"{side}_logp"]) for side in ("truth", "failure"))
    assert np.isfinite([truth, failure]).all() and (truth < 0).all() and (truth != failure).all()
