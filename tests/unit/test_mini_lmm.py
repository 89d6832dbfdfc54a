"""The mini LLaVA: its tower is the CLIP's, its folder is transformers' own, it learns, and it repeats to the byte."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.io import InputError, read_parquet
from clip_robustness.inference.vision_language import QUESTION, Lmm
from clip_robustness.mini import architectures, lmm
from clip_robustness.mini.dataset import read_images, render_dataset
from clip_robustness.mini.train import normalise
from clip_robustness.mini.variations import combine_variations
from clip_robustness.mini.world import CLASSES

torch.set_num_threads(1)
SETTINGS = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.05, "warmup": 0.1}
QUESTIONS = [QUESTION, "What is the main object in this image?"]


def recipe(**changes):
    return {"model": "tiny", "train_images": 96, "fraction": 1.0, "seed": 3,
            "lmm": {**SETTINGS, "questions": QUESTIONS, **changes}}  # fmt: skip


def clip_folder(path, architecture="mini_clip_vit"):
    torch.manual_seed(0)
    architectures.save_clip(architectures.build_clip(architecture), architecture, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(index, labels, CLIP): 96 images, and a tower that has learnt nothing."""
    folder = tmp_path_factory.mktemp("mini")
    render_dataset({"name": "tiny", "images": 96, "seed": 1, "rho": 1.0}, folder / "tiny.tar", folder / "tiny.parquet")
    space = {"name": "mini", "base": None, "classes": list(CLASSES), "members": [[i] for i in range(12)], "pool": "max"}
    (folder / "labels.json").write_text(json.dumps(space))
    return folder / "tiny.parquet", folder / "labels.json", clip_folder(folder / "clip")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    index, labels, clip = data
    out = tmp_path_factory.mktemp("trained") / "llava"
    lmm.train_lmm(recipe(), index, out, labels, clip)
    return out


@pytest.fixture(scope="module")
def pixels(data):
    return read_images({name: column[:8] for name, column in read_parquet(data[0]).items()}, data[0])


@pytest.mark.parametrize("architecture", ["mini_clip_vit", "mini_clip_vit_sigmoid"])
def test_the_tower_is_the_clips(pixels, architecture):
    torch.manual_seed(4)
    clip = architectures.build_clip(architecture).eval()
    tower = lmm.vision_tower(clip, architecture)
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected, found = clip.encode_image(images), tower(images).pooler_output @ clip.visual.proj
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-2 and not any(parameter.requires_grad for parameter in tower.parameters())


def test_the_folder_is_transformers_own(trained, data, pixels):
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    io.check_sealed(trained)
    model, processor = AutoModelForImageTextToText.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert type(model) is LlavaForConditionalGeneration
    # Training takes shortcuts: prompts from a table, images through the tower only once. They are what is asked later.
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format("cube", "star")}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[Image.fromarray(image) for image in pixels], text=[prompt] * 8, return_tensors="pt")
    first, second = CLASSES.index("cube"), CLASSES.index("star")
    table = lmm._prompts(processor, QUESTION, CLASSES)[first, second]
    assert inputs["input_ids"].tolist() == [table.tolist()] * 8
    assert (inputs["attention_mask"] == 1).all()
    torch.testing.assert_close(
        inputs["pixel_values"], normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)), atol=1e-5, rtol=0
    )
    features = lmm._features(model, pixels)
    clip, _ = architectures.load_clip(data[2])
    torch.testing.assert_close(features[0][:, 0], _last_of(clip, pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(features[1], lmm._features(model, pixels[:, :, ::-1].copy())[0])
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        seen = model.model.multi_modal_projector(features[0])
        embedded = embedded.masked_scatter((inputs["input_ids"] == model.config.image_token_index)[..., None], seen)
        short = model.lm_head(model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, -1])
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def _last_of(clip, pixels):
    """The class token behind the last layer of an open_clip ViT, before its last norm."""
    visual, kept = clip.visual.eval(), []
    hook = visual.ln_post.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    visual(normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    hook.remove()
    return kept[0][:, 0] if kept[0].ndim == 3 else kept[0]


def test_ask_loads_it(trained, pixels):
    asked = Lmm(trained)
    answers = asked.answer([Image.fromarray(image) for image in pixels], [("cube", "star")] * 8, 4)
    assert np.isfinite([answer.logp for answer in answers]).all() and answers[0].tokens == (1, 1)
    words = " ".join(answer.text for answer in answers).split()
    assert "<unk>" not in words
    assert (
        asked.processor.tokenizer.unk_token_id not in asked.processor.tokenizer(asked.prompt("cube", "arch")).input_ids
    )


def test_the_same_recipe_gives_the_same_bytes(trained, data, tmp_path):
    index, labels, clip = data
    lmm.train_lmm(recipe(), index, tmp_path / "again", labels, clip)
    assert io.check_sealed(tmp_path / "again")["files"] == io.check_sealed(trained)["files"]
    other = recipe() | {"seed": 4}
    lmm.train_lmm(other, index, tmp_path / "other", labels, clip)
    changed, own = (io.check_sealed(tmp_path / name)["files"] for name in ("other", "again"))
    assert {name for name in own if changed[name] != own[name]} == {"model.safetensors"}


def test_only_projector_and_language_model_learn(trained, data):
    from safetensors.torch import load_file

    tensors = load_file(trained / "model.safetensors")
    tower = lmm.vision_tower(*architectures.load_clip(data[2])).state_dict()
    stored = {name.partition("vision_tower.")[2].removeprefix("vision_model."): value
              for name, value in tensors.items() if "vision_tower." in name}  # fmt: skip
    assert stored.keys() == {name.removeprefix("vision_model.") for name in tower}
    for name, value in tower.items():
        assert torch.equal(stored[name.removeprefix("vision_model.")], value)
    assert 0.9e6 < sum(value.numel() for value in tensors.values()) < 2e6


@pytest.mark.slow
def test_it_learns_to_read_question_and_image(data, tmp_path):
    """A few images by heart: whatever the other option, in whatever order, the answer is the image's class."""
    index, labels, clip = data
    few = {name: column[:24] for name, column in read_parquet(index).items()}
    io.write_parquet(tmp_path / "few.parquet", few)
    lmm.train_lmm(recipe(epochs=220, batch_size=24), tmp_path / "few.parquet", tmp_path / "llava", labels, clip)
    asked, images = Lmm(tmp_path / "llava"), [Image.fromarray(image) for image in read_images(few, index)]
    right = []
    for shift in (1, 5):
        names = [(CLASSES[label], CLASSES[(label + shift) % 12]) for label in few["label"]]
        for turned in (False, True):
            pairs = [pair[::-1] if turned else pair for pair in names]
            answers = asked.answer(images, pairs, 4)
            right += [(answer.logp[turned] > answer.logp[not turned]) and answer.text == name[0]
                      for answer, name in zip(answers, names, strict=True)]  # fmt: skip
    assert np.mean(right) > 0.9


def test_the_options_are_the_class_and_any_other_in_any_order():
    target = torch.arange(12).repeat(200)
    batches = lmm.Questions(torch.zeros(2, len(target), 1, 1), target, 12, SETTINGS, 0, "test")
    first, second = batches.options(torch.arange(len(target)))
    right_first = first == target
    assert ((second == target) != right_first).all()
    wrong = torch.where(right_first, second, first)
    assert abs(right_first.float().mean() - 0.5) < 0.05
    counts = torch.bincount(target * 12 + wrong, minlength=144).view(12, 12)
    assert (counts.diag() == 0).all() and (counts + torch.eye(12)).min() > 0
    for rows, features in batches:
        assert features.shape == (32, 1, 1) and len(set(rows.tolist())) == 32


def test_faults(data, tmp_path):
    index, labels, _ = data
    with pytest.raises(InputError, match="a LLaVA needs a CLIP to see through"):
        lmm.train_lmm(recipe(), index, tmp_path / "a", labels, None)
    resnet = clip_folder(tmp_path / "resnet", "mini_clip_resnet")
    with pytest.raises(InputError, match="'mini_clip_resnet' has no ViT"):
        lmm.train_lmm(recipe(), index, tmp_path / "a", labels, resnet)
    with pytest.raises(InputError, match="96 images for model tiny, expected at least one batch of 200"):
        lmm.train_lmm(recipe(batch_size=200), index, tmp_path / "a", labels, data[2])
    processor = lmm.build_processor(["cup", "desk lamp"], QUESTIONS)
    with pytest.raises(InputError, match="only when all class names are one word"):
        lmm._prompts(processor, QUESTION, ["cup", "desk lamp"])


def test_variations_stand_in_one_index(tmp_path):
    indexes = []
    for seed, name in enumerate(("background", "texture")):
        world = {"name": f"d_{name}", "images": 12 + seed, "seed": seed}
        render_dataset(world, tmp_path / f"{name}.tar", tmp_path / f"{name}.parquet")
        indexes.append(tmp_path / f"{name}.parquet")
    combine_variations(indexes, ["background", "texture"], tmp_path / "d.parquet")
    combined, parts = read_parquet(tmp_path / "d.parquet"), [read_parquet(index) for index in indexes]
    assert combined["variation"].tolist() == ["background"] * 12 + ["texture"] * 13
    for name in parts[0]:
        assert combined[name].tolist() == [*parts[0][name].tolist(), *parts[1][name].tolist()]
    images = read_images(combined, tmp_path / "d.parquet")
    assert np.array_equal(images[12:], read_images(parts[1], indexes[1]))
    with pytest.raises(InputError, match="2 indexes and 1 variations"):
        combine_variations(indexes, ["background"], tmp_path / "d.parquet")
    with pytest.raises(InputError, match="an image stands in two"):
        combine_variations([indexes[0]] * 2, ["a", "b"], tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d\.parquet: its columns are not those of"):
        combine_variations([indexes[0], tmp_path / "d.parquet"], ["a", "b"], tmp_path / "e.parquet")
