"""The search for learned prompts: it climbs to a hidden prefix, repeats, and writes what the heads read."""

import itertools
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import heads, prompt_search
from clip_robustness.inference.load import load_clip, load_tokenizer
from clip_robustness.inference.prompt_search import search_prompts
from tests.unit.clips import SIGLIP_TEXT, TEXT, clip_folder, timm_folder

torch.set_num_threads(1)
CLASSES = ["sphere", "cube", "cone", "torus", "cylinder", "fire truck", "pyramid", "octahedron", "cross", "star"]
HIDDEN = (3628, 41844, 9854, 1408)
IMAGES = 600
NOISE = 0.25  # length of what is added to a feature of norm 1
STEPS = {"steps": 40, "candidates": 16, "precision": "fp32"}
KINDS = {
    "clip": {},
    "custom_text": {"custom_text": True},
    "bidirectional": {"custom_text": True, "text_cfg": SIGLIP_TEXT, "init_logit_bias": -10.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    return {kind: clip_folder(base / kind, **config) for kind, config in KINDS.items()}


def template(prefix) -> str:
    return "".join(f"<|{token}|>" for token in prefix) + " {}"


@torch.inference_mode()
def class_weights(folder, prefix) -> np.ndarray:
    rows = heads.tokenize(load_tokenizer(folder), [template(prefix)], CLASSES)
    return heads.class_weights(load_clip(folder), rows)


def rig(folder, out, weights) -> dict:
    """A search set whose images lie about the given class weights; the first three have no label or were not read."""
    random = np.random.default_rng(0)
    labels = np.arange(IMAGES, dtype=np.int32) % len(CLASSES)
    features = weights[labels] + random.normal(0, NOISE / weights.shape[1] ** 0.5, (IMAGES, weights.shape[1]))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ids = [f"{i:04d}.png" for i in range(IMAGES)]
    manifest = {"model": "clip", "dataset": "rigged", "kind": "features", "n": IMAGES, "dim": weights.shape[1]}
    manifest |= {"ids_sha256": io.ids_digest(ids), "masked": [ids[2]], "weights": io.check_sealed(folder)["files"]}
    labels[:2] = -1
    space = {"name": "solids", "base": None, "classes": CLASSES, "members": [[i] for i in range(10)], "pool": "max"}
    files = {"embeddings": out / "rigged.npy", "index": out / "rigged.parquet", "labels": out / "solids.json"}
    io.save_array(files["embeddings"], features.astype(np.float16))
    io.write_json(files["embeddings"].with_suffix(".json"), manifest)
    io.write_parquet(files["index"], {"image_id": ids, "label": labels})
    io.write_json(files["labels"], space)
    return {"weights": folder, **files}


@pytest.fixture(scope="module")
def rigged(folders, tmp_path_factory):
    """For each kind of text tower, images that are the hidden prefix's text features and noise."""
    out = tmp_path_factory.mktemp("rigged")
    return {kind: rig(folder, out / kind, class_weights(folder, HIDDEN)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def searched(rigged, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "clip.txt"
    search_prompts(**rigged["clip"], out=out, **STEPS)
    return out


def read(path) -> tuple[list[tuple[int, float, str]], list[str]]:
    """(the log's steps, accuracies and templates; the templates that are to be used)."""
    lines = path.read_text().splitlines()
    log = [re.fullmatch(r"# +(\d+) (\d\.\d+) (<.*)", line) for line in lines]
    steps = [(int(found[1]), float(found[2]), found[3]) for found in log if found]
    return steps, [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_climbs(rigged, tmp_path, kind, capsys):
    search_prompts(**rigged[kind], out=tmp_path / "found.txt", **STEPS)
    log, best = read(tmp_path / "found.txt")
    accuracies = [accuracy for _, accuracy, _ in log]
    assert log[0][::2] == (0, template(load_tokenizer(rigged[kind]["weights"]).encode("a photo of a")))
    assert accuracies == sorted(accuracies) and accuracies[-1] > accuracies[0] + 0.15
    assert best == [found for _, _, found in log[::-1]][:5]
    said = capsys.readouterr().err
    assert all(f"step {step}: {accuracy:.4f} of the held-out images, {found}" in said for step, accuracy, found in log)


def test_a_step_changes_one_token(searched):
    log, _ = read(searched)
    prefixes = [re.findall(r"\d+", found) for _, _, found in log]
    assert len(log) > 5 and len({step for step, _, _ in log}) == len(log)
    assert all(len(prefix) == 4 for prefix in prefixes)
    for old, new in itertools.pairwise(prefixes):
        assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_the_log_says_what_heads_of_these_prompts_get_right(rigged, searched, tmp_path):
    """Each better than the one before on both halves: on the held-out half, and where it was proposed."""
    log, best = read(searched)
    (tmp_path / "searched.txt").write_text(searched.read_text())
    sets = [f"step_{step}: ['{found}']" for step, _, found in log]
    (tmp_path / "prompts.yaml").write_text("\n".join(["all: {file: searched.txt}", *sets]))
    assert heads.templates(tmp_path / "prompts.yaml", "all") == best
    names = [f"step_{step}" for step, _, _ in log]
    where = ([rigged["clip"]["labels"]], tmp_path / "heads", tmp_path / "work")
    heads.build_heads(rigged["clip"]["weights"], tmp_path / "prompts.yaml", [*names, "all"], *where, "fp32")

    features = np.load(rigged["clip"]["embeddings"]).astype(np.float32)[3:]
    labels = io.read_parquet(rigged["clip"]["index"])["label"][3:]
    order = np.random.default_rng(0).permutation(len(labels))
    before = (0.0, 0.0)
    for name, (_, accuracy, _) in zip(names, log, strict=True):
        head = np.load(tmp_path / f"heads/{name}.solids.npz")
        right = (features @ head["weight"].T).argmax(axis=1) == labels
        after = right[order[::2]].mean(), right[order[1::2]].mean()
        assert after[1] == pytest.approx(accuracy, abs=1e-6)
        assert after >= before and after[1] >= before[1]
        before = after


def test_the_same_seed_gives_the_same_file(rigged, searched, tmp_path):
    search_prompts(**rigged["clip"], out=tmp_path / "again.txt", **STEPS)
    assert (tmp_path / "again.txt").read_bytes() == searched.read_bytes()
    search_prompts(**rigged["clip"], out=tmp_path / "other.txt", **STEPS, seed=1)
    assert (tmp_path / "other.txt").read_bytes() != searched.read_bytes()


def test_where_the_start_is_best_it_stays(folders, tmp_path):
    start = tuple(load_tokenizer(folders["clip"]).encode("a photo of a"))
    where = rig(folders["clip"], tmp_path, 10 * class_weights(folders["clip"], start))  # little noise: all are right
    search_prompts(**where, out=tmp_path / "none.txt", steps=0)
    assert read(tmp_path / "none.txt") == ([(0, 1.0, template(start))], [template(start)])


def test_settings_count(rigged, tmp_path):
    words = {"tokens": 2, "start": "a photo", "keep": 2, "images": 200}
    search_prompts(**rigged["clip"], out=tmp_path / "two.txt", **STEPS, **words)
    log, best = read(tmp_path / "two.txt")
    assert len(best) == 2 and all(len(re.findall(r"\d+", found)) == 2 for found in best)
    assert all(accuracy == round(accuracy, 2) for _, accuracy, _ in log)  # of 100 held-out images


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(folders, kind, monkeypatch):
    """Of a prefix whose tokens stand nowhere else, so that the embedding itself can be moved."""
    clip = load_clip(folders[kind]).double().requires_grad_(False)
    monkeypatch.setattr(prompt_search, "CLASSES_AT_ONCE", 4)
    text = prompt_search._Text(clip, folders[kind], CLASSES, "a photo of a", 4, torch.float32)
    prefix = (3628, 41844, 9854, 1408)
    generator = torch.Generator().manual_seed(1)
    toward = torch.randn(len(CLASSES), 24, generator=generator)
    gradient = text.gradient(prefix, toward)
    table = text.embedding.weight.data
    for place, token in enumerate(prefix):
        step = 3e-4 * torch.randn(table.shape[1], generator=generator).double()
        moved = []
        for sign in (1, -1):
            table[token] += sign * step
            moved.append(float((text.weights([prefix])[0] * toward).sum()))
            table[token] -= sign * step
        assert moved[0] - moved[1] == pytest.approx(float(2 * gradient[place].double() @ step), rel=0.02, abs=1e-5)


def test_promising_tokens_are_better_than_others(rigged):
    """The first of the ranks lower the loss, the last raise it; special tokens and the present one are not there."""
    where = rigged["clip"]
    features, labels, classes, _ = prompt_search._search_set(
        where["embeddings"], where["index"], where["labels"], io.check_sealed(where["weights"])["files"]
    )
    half = prompt_search._Half(torch.from_numpy(features), torch.from_numpy(labels))
    assert len(labels) == IMAGES - 3
    text = prompt_search._Text(load_clip(where["weights"]), where["weights"], classes, "a photo of a", 4, torch.float32)
    weight = text.weights([text.start])[0].detach()
    ranks = prompt_search._ranked(text, half, text.start, weight)
    losses = []
    for place, ranked in enumerate(ranks):
        assert len(ranked) == 49406 - 1 and ranked.max() == 49405 and text.start[place] not in ranked
        tries = [*ranked[:8].tolist(), *ranked[-8:].tolist()]
        prefixes = [(*text.start[:place], token, *text.start[place + 1 :]) for token in tries]
        with torch.inference_mode():
            losses.append([float(half.loss(weight, text.scale)) for weight in text.weights(prefixes)])
    assert (
        np.mean(losses, axis=0)[:8].mean() < float(half.loss(weight, text.scale)) < np.mean(losses, axis=0)[8:].mean()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "a photo"}, "the start 'a photo' has 2 tokens, and 4 are searched"),
        ({"candidates": 0}, "tokens, candidates and keep must be at least 1"),
        ({"images": 1}, "1 labelled images for the search, expected at least 2"),
    ],
)
def test_settings_that_cannot_be(rigged, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        search_prompts(**rigged["clip"], out=tmp_path / "out.txt", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "logits"}, "holds logits"),
        ({"weights": {"a": "b"}}, "made with other weights than those"),
        ({"ids_sha256": "0"}, "other images, or another order"),
        ({"base": "imagenet"}, "a part of 'imagenet'; prompts are searched over a base label space"),
        ({"classes": CLASSES[:4]}, r"column label: row 4: 4; expected -1\.\.3"),
    ],
)
def test_a_search_set_that_does_not_fit(folders, tmp_path, changes, message):
    where = rig(folders["clip"], tmp_path, class_weights(folders["clip"], HIDDEN))
    for path in (where["embeddings"].with_suffix(".json"), where["labels"]):
        value = io.read_json(path)
        io.write_json(path, value | {name: new for name, new in changes.items() if name in value})
    with pytest.raises(InputError, match=message):
        search_prompts(**where, out=tmp_path / "out.txt", steps=1)
    assert not (tmp_path / "out.txt").exists()


def test_towers_of_another_vocabulary_are_refused(rigged, tmp_path):
    """As SigLIP's: its tokenizer is one of the transformers library."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "photo"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {**TEXT, "vocab_size": len(words), "context_length": 8, "hf_tokenizer_name": "some/where"}
    folder = clip_folder(tmp_path / "siglip", custom_text=True, text_cfg=text)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    io.seal(folder, model="siglip")
    where = rig(folder, tmp_path, np.eye(10, 24))
    with pytest.raises(
        InputError, match=r"text tower \(HFTokenizer\).*ids of another; give the model prompts in words"
    ):
        search_prompts(**where, out=tmp_path / "out.txt")


def test_a_classifier_has_no_prompts(rigged, tmp_path):
    folder = timm_folder(tmp_path / "vit")
    where = rigged["clip"] | {"weights": folder}
    with pytest.raises(InputError, match="made with other weights"):
        search_prompts(**where, out=tmp_path / "out.txt")
