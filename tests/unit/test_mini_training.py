"""Training of the mini zoo: it learns, repeats to the byte, and its folders are open_clip's and timm's own."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from clip_robustness.core.io import InputError, read_parquet, sha256_file
from clip_robustness.mini import architectures
from clip_robustness.mini.dataset import read_images, render_dataset
from clip_robustness.mini.train import (
    Batches,
    compact_vocabulary,
    fit_classifier,
    fit_clip,
    normalise,
    restore_vocabulary,
    train_model,
)
from clip_robustness.mini.world import CLASSES

torch.set_num_threads(1)
SETTINGS = {"epochs": 1, "batch_size": 32, "learning_rate": 5e-4, "weight_decay": 0.1, "warmup": 0.1}
TUNING = {**SETTINGS, "templates": ["a photo of a {}.", "a picture of a {}."]}
BLOCK = {
    **{"seed": 3, "fraction": 0.5, "clip": SETTINGS, "supervised": SETTINGS},
    **{"cross_entropy": TUNING, "contrastive": TUNING},
}


def _recipe(architecture: str, **changes):
    library = "timm" if architecture in architectures.CLASSIFIERS else "open_clip"
    row = {"model": "tiny", "library": library, "architecture": architecture, "family": "vit", "train_images": 256}
    return {**row, "finetuning": "none", "loss": "softmax", **BLOCK, **changes}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An index of 192 images and its label space."""
    folder = tmp_path_factory.mktemp("mini")
    world = {"name": "tiny", "images": 192, "seed": 1, "rho": 0.9, "style": "web"}
    render_dataset(world, folder / "tiny.tar", folder / "tiny.parquet")
    space = {"name": "mini", "base": None, "classes": list(CLASSES), "members": [[i] for i in range(12)], "pool": "max"}
    (folder / "labels.json").write_text(json.dumps(space))
    return folder / "tiny.parquet", folder / "labels.json"


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("parent") / "model"
    train_model(_recipe("mini_clip_vit"), data[0], out, data[1])
    return out


@pytest.fixture
def pixels(data):
    return torch.from_numpy(read_images(read_parquet(data[0]), data[0])[:8]).permute(0, 3, 1, 2)


def _losses(architecture: str, data, loss: str) -> tuple[float, float]:
    """The last loss of a run of two steps and of one of sixty that start alike, on 64 images."""
    columns = {name: column[:64] for name, column in read_parquet(data[0]).items()}
    images = read_images(columns, data[0])
    result = []
    for epochs in (1, 30):
        torch.manual_seed(0)
        batches = Batches(images, {**SETTINGS, "learning_rate": 1e-3, "epochs": epochs}, 0, "test")
        if loss == "cross_entropy":
            model = architectures.build_classifier(architecture, 12)
            result.append(fit_classifier(model, batches, torch.from_numpy(columns["label"].astype(np.int64))))
        else:
            result.append(fit_clip(architectures.build_clip(architecture), batches, list(columns["caption"]), loss))
    return result[0], result[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "loss"),
    [
        ("mini_clip_vit", "softmax"),
        ("mini_clip_vit_sigmoid", "sigmoid"),
        ("mini_resnet", "cross_entropy"),
        ("mini_vit", "cross_entropy"),
    ],
)
def test_training_lowers_the_loss(data, architecture, loss):
    first, last = _losses(architecture, data, loss)
    assert last < 0.85 * first


def test_clip_folder_is_open_clips_own(parent, pixels):
    import open_clip
    from PIL import Image

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{parent}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{parent}")
    ours, name = architectures.load_clip(parent)
    assert name == "mini_clip_vit"
    tokens = tokenizer(["a photo of a cube.", "a sketch of an octahedron"])
    assert tokens.shape == (2, architectures.CONTEXT)
    images = torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in pixels])
    torch.testing.assert_close(images, normalise(pixels))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image(images), ours.eval().encode_image(normalise(pixels)))
        torch.testing.assert_close(model.encode_text(tokens), ours.encode_text(tokens))
    assert model.token_embedding.weight.shape[0] == 49408


@pytest.mark.parametrize("architecture", list(architectures.CLASSIFIERS))
def test_classifier_folder_is_timms_own(data, pixels, tmp_path, architecture):
    import timm

    out = tmp_path / "model"
    torch.manual_seed(0)
    built = architectures.build_classifier(architecture, 12).eval()
    architectures.save_classifier(built, architecture, out)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config["input_size"]) == (3, 48, 48) and tuple(config["mean"]) == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0 and config["interpolation"] == "bicubic"
    with torch.no_grad():
        torch.testing.assert_close(loaded(normalise(pixels)), built(normalise(pixels)))
        assert loaded(normalise(pixels)).shape == (8, 12)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mini_clip_resnet", "mini_resnet"])
def test_the_same_recipe_gives_the_same_bytes(data, tmp_path, architecture):
    digests = []
    for run, seed in enumerate((3, 3, 4)):
        torch.rand(run + 1)  # whatever ran before must not matter
        train_model(_recipe(architecture, seed=seed, train_images=128), data[0], tmp_path / str(run), data[1])
        weights = next((tmp_path / str(run)).glob("*.safetensors"))
        digests.append(sha256_file(weights))
    assert digests[0] == digests[1] != digests[2]


def test_full_vocabulary_equals_the_compact_one():
    from open_clip import SimpleTokenizer

    torch.manual_seed(0)
    model = architectures.build_clip("mini_clip_vit").eval()
    tokens = SimpleTokenizer(context_length=model.context_length)(["a red cube.", "a photo of an hourglass"])
    before = model.token_embedding.weight.detach().clone()
    with torch.no_grad():
        expected = model.encode_text(tokens)
        full, used = compact_vocabulary(model, tokens)
        assert model.token_embedding.weight.shape[0] == len(used) < 20
        compact = torch.searchsorted(used, tokens)
        assert (compact.argmax(dim=1) == tokens.argmax(dim=1)).all()
        torch.testing.assert_close(model.encode_text(compact), expected)
        model.token_embedding.weight += 0.5  # a training step
        trained = model.encode_text(compact)
        restore_vocabulary(model, full, used)
        torch.testing.assert_close(model.encode_text(tokens), trained)
    moved = (model.token_embedding.weight != before).any(dim=1).nonzero().squeeze(1)
    assert torch.equal(moved, used)


def test_cross_entropy_tuning_writes_a_classifier(data, parent, pixels, tmp_path):
    import open_clip

    out = tmp_path / "model"
    recipe = _recipe("mini_clip_vit", finetuning="cross_entropy", loss="cross_entropy")
    train_model(recipe, data[0], out, data[1], parent)
    head = load_file(out / "classifier.safetensors")
    assert head["weight"].shape == (12, 64) and head["bias"].shape == (12,)
    tuned = open_clip.create_model_from_pretrained(f"local-dir:{out}", return_transform=False).eval()
    old, _ = architectures.load_clip(parent)
    with torch.no_grad():
        feature = tuned.encode_image(normalise(pixels), normalize=True)
        assert not torch.allclose(feature, old.eval().encode_image(normalise(pixels), normalize=True))
        tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a photo of a cube."])
        torch.testing.assert_close(tuned.encode_text(tokens), old.encode_text(tokens))  # the text tower stays
        logits = feature @ head["weight"].T + head["bias"]
    assert logits.shape == (8, 12) and logits.abs().max() > 1  # the scale is in the weights


def test_cross_entropy_tuning_starts_at_the_zero_shot_head(data, parent, tmp_path):
    import open_clip

    still = {**TUNING, "learning_rate": 0.0}
    recipe = _recipe("mini_clip_vit", finetuning="cross_entropy", loss="cross_entropy", cross_entropy=still)
    train_model(recipe, data[0], tmp_path / "model", data[1], parent)
    head = load_file(tmp_path / "model" / "classifier.safetensors")
    model = open_clip.create_model_from_pretrained(f"local-dir:{parent}", return_transform=False).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{parent}")
    with torch.no_grad():
        texts = [model.encode_text(tokenizer([t.format(c) for c in CLASSES])) for t in TUNING["templates"]]
        mean = sum(t / t.norm(dim=1, keepdim=True) for t in texts)
        expected = mean / mean.norm(dim=1, keepdim=True) * model.logit_scale.exp()
    torch.testing.assert_close(head["weight"], expected, atol=1e-4, rtol=1e-4)


def test_contrastive_tuning_moves_both_towers(data, parent, tmp_path):
    recipe = _recipe("mini_clip_vit", finetuning="contrastive")
    train_model(recipe, data[0], tmp_path / "model", data[1], parent)
    old = load_file(parent / "open_clip_model.safetensors")
    new = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert old.keys() == new.keys()
    for name in ("visual.proj", "text_projection"):
        assert not torch.equal(old[name], new[name])
    assert not (tmp_path / "model" / "classifier.safetensors").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("mini_clip_vit", {"finetuning": "contrastive"}, "needs a parent"),
        ("mini_clip_vit", {"finetuning": "lora"}, "finetuning is 'lora'"),
        ("mini_clip_vit", {"loss": "hinge"}, "loss is 'hinge'"),
        ("mini_clip_vit", {"fraction": 0.1}, "26 images for model tiny, expected at least one batch of 32"),
        ("mini_clip_vit", {"clip": {**SETTINGS, "epochs": {"resnet": 1}}}, "epochs says nothing of 'vit'"),
        ("mini_clip_huge", {}, "no mini CLIP"),
        ("mini_clip_huge", {"library": "timm"}, "no mini classifier"),
    ],
)
def test_wrong_recipes_are_named(data, tmp_path, architecture, changes, message):
    with pytest.raises(InputError) as error:
        train_model(_recipe(architecture, **changes), data[0], tmp_path / "model", data[1])
    assert message in str(error.value)


def test_the_configured_zoo_is_what_it_says(request):
    """Every mini row of models.tsv: known architecture, true parameter count, data and parents that exist."""
    config = request.config.rootpath / "config"
    lines = [line.split("\t") for line in (config / "mini" / "models.tsv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["library"] != "transformers"]  # test_mini_lmm.py has that one
    datasets = yaml.safe_load((config / "mini" / "datasets.yaml").read_text())["datasets"]
    training = yaml.safe_load((config / "mini.yaml").read_text())["training"]
    assert len(rows) >= 11 and sum(row["group"] == "standard" for row in rows) >= 5
    counted: dict[str, int] = {}
    for row in rows:
        architecture = row["architecture"]
        if architecture not in counted:
            timm_model = row["library"] == "timm"
            model = (architectures.build_classifier if timm_model else lambda a, _: architectures.build_clip(a))(
                architecture, 12
            )
            counted[architecture] = sum(p.numel() for p in model.parameters())
        head = 12 * 64 + 12 if row["finetuning"] == "cross_entropy" else 0
        assert float(row["params_m"]) == pytest.approx((counted[architecture] + head) / 1e6, abs=6e-4)
        source = datasets[row["finetuned_on"] or row["source"]]
        assert source["role"] == "train" and int(row["train_images"]) <= source["images"]
        assert (row["finetuning"] == "none") == (row["parent"] == "")
        if row["parent"]:
            assert any(other["model"] == row["parent"] and other["parent"] == "" for other in rows)
        assert row["library"] == "timm" or row["finetuning"] != "none" or row["loss"] in ("softmax", "sigmoid")
        epochs = training["clip"]["epochs"]
        assert row["family"] in epochs or row["library"] == "timm"
