"""Zero-shot heads: prompt sets, and text features that are open_clip's own, trimmed or not."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from open_clip.factory import get_model_config

from clip_robustness.core.io import InputError
from clip_robustness.inference import heads, load
from clip_robustness.inference.label_spaces import write_label_space
from tests.unit.clips import SIGLIP_TEXT, TEXT, VISION, clip_folder

CONFIG = Path(__file__).parents[2] / "config"
PROMPTS = CONFIG / "prompts.yaml"
NAMES = ["sphere", "traffic light, traffic signal, stoplight", "kite (bird of prey)", "Mexican hairless dog"]
CUE_CONFLICT = yaml.safe_load((CONFIG / "datasets.yaml").read_text())["label_spaces"]["cue_conflict"]
SIXTEEN = list(CUE_CONFLICT["classes"])
TOKENIZER = open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    kinds = {
        "clip": {},
        "custom_text": {"custom_text": True},
        "siglip": {"custom_text": True, "text_cfg": SIGLIP_TEXT, "init_logit_bias": -10.0},
    }
    return {kind: clip_folder(base / kind, **config) for kind, config in kinds.items()}


@pytest.fixture
def prompts(tmp_path):
    """Write prompt sets, and files beside them, for `heads.templates`."""

    def write(text, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.txt").write_text(content)
        (tmp_path / "prompts.yaml").write_text(text)
        return tmp_path / "prompts.yaml"

    return write


def spaces(tmp_path, **classes):
    for name, names in classes.items():
        write_label_space(name, {"classes": names}, None, tmp_path / f"{name}.json")
    return [tmp_path / f"{name}.json" for name in classes]


# Prompt sets


def test_the_sets_that_come_with_the_project():
    counts = {"openai_1": 1, "simple_7": 7, "openai_30": 30, "openai_80": 80}
    # as many as the released evaluation of shifts reads of each search log
    learned = {"rn50": 49, "rn101": 8, "rn50x4": 7, "rn50x16": 22, "vit_b_32": 188, "vit_b_16": 84}
    counts |= {f"roz_auto_{model}": n for model, n in learned.items()}
    sets = {name: heads.templates(PROMPTS, name) for name in counts}
    assert {name: len(found) for name, found in sets.items()} == counts
    assert all(len(set(found)) == len(found) for found in sets.values())
    assert sets["openai_80"][:30] == sets["openai_30"]


def test_the_learned_prompts_are_words_of_clips_vocabulary():
    for model, words in (("rn50", "annually ates ] interesting"), ("vit_b_32", "awesome cooingled")):
        first = heads.templates(PROMPTS, f"roz_auto_{model}")[0]
        assert heads.LEARNED.sub("", first) == " {}"
        tokens = heads.tokenize(TOKENIZER, [first], [""])[0, 0]
        assert TOKENIZER.decode(tokens[1:5].tolist()).split() == words.split()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("['a photo']", r"every template needs one \{\}"),
        ("['a {} and a {}']", r"every template needs one \{\}"),
        ("['a <|5|> {}']", "only at its beginning"),
        ("['<|five|> {}']", "only at its beginning"),
        ("{file: gone.txt}", r"gone.txt: cannot read this file of templates"),
        ("{file: empty.txt}", r"every template needs one \{\}"),
        ("{open_clip: NO_SUCH_TEMPLATES}", "expected a list of templates"),
    ],
)
def test_a_set_that_is_none(prompts, entry, message):
    with pytest.raises(InputError, match=message):
        heads.templates(prompts(f"bad: {entry}", empty="# nothing\n"), "bad")


def test_a_file_of_templates(prompts):
    table = prompts("mine: {file: mine.txt}", mine="# learned\n\n<|5|><|6|> {}\na {} indeed  \n")
    assert heads.templates(table, "mine") == ["<|5|><|6|> {}", "a {} indeed"]
    with pytest.raises(InputError, match="no prompt set 'other'; it has mine"):
        heads.templates(table, "other")


def test_the_templates_of_a_search_stand_in_a_file_of_the_model(prompts, tmp_path):
    """One prompt set, and for each model its own templates; sets that are not searched for stay what they are."""
    table = prompts(
        "auto: {search: {dataset: pool, tokens: 1, steps: 9, keep: 2}}\nmine: {file: mine.txt}\nplain: ['a {}']",
        mine="my {}\n", found="# 9 steps\n<|5|> {}\n<|7|> {}\n", other="<|8|> {}\n",
    )  # fmt: skip
    assert heads.templates(table, "auto", tmp_path / "found.txt") == ["<|5|> {}", "<|7|> {}"]
    assert heads.templates(table, "auto", tmp_path / "other.txt") == ["<|8|> {}"]
    assert heads.templates(table, "plain", tmp_path / "found.txt") == ["a {}"]
    assert heads.templates(table, "mine", tmp_path / "found.txt") == ["my {}"]
    with pytest.raises(InputError, match=r"gone.txt: cannot read this file of templates"):
        heads.templates(table, "auto", tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"prompt set 'auto': its templates are searched for"):
        heads.templates(table, "auto")


def test_searched_templates_make_the_head_of_a_file_with_them(folders, prompts, tmp_path):
    table = prompts(
        "auto: {search: {dataset: pool}}\nmine: {file: found.txt}", found="<|320|><|1125|> {}\n<|539|><|320|> {}\n"
    )
    labels, found = spaces(tmp_path, toy=NAMES), tmp_path / "found.txt"
    for name, searched in (("auto", found), ("mine", None)):
        heads.build_heads(folders["clip"], table, [name], labels, tmp_path, tmp_path / name, searched=searched)
    one, two = (np.load(tmp_path / f"{name}.toy.npz") for name in ("auto", "mine"))
    assert np.array_equal(one["weight"], two["weight"]) and one["weight"].shape[0] == len(NAMES)


# Tokens


def test_plain_prompts_have_the_tokenizers_own_tokens():
    texts = heads.templates(PROMPTS, "openai_80")
    expected = TOKENIZER([text.replace("{}", name) for name in NAMES for text in texts])
    assert torch.equal(heads.tokenize(TOKENIZER, texts, NAMES).flatten(0, 1), expected)


def test_learned_tokens_stand_between_the_start_token_and_the_rest():
    ids = TOKENIZER.encode("a photo of")
    learned = "".join(f"<|{i}|>" for i in ids)
    texts = [learned + " a {}.", learned + " {}"]  # these tokens are words, so the tokenizer knows the answer
    expected = TOKENIZER(["a photo of a red fox.", "a photo of red fox"])
    assert torch.equal(heads.tokenize(TOKENIZER, texts, ["red fox"])[0], expected)


def test_learned_tokens_that_cannot_be_had():
    with pytest.raises(InputError, match="learned token 49406 is outside the vocabulary, which has 0 to 49405"):
        heads.tokenize(TOKENIZER, ["<|5|><|49406|> {}"], NAMES)
    masking = open_clip.SimpleTokenizer(reduction_mask="simple")
    with pytest.raises(InputError, match=r"this model's tokenizer is another \(SimpleTokenizer"):
        heads.tokenize(masking, ["<|5|> {}"], NAMES)


def test_a_prompt_that_would_be_cut_names_what_would_be_lost():
    short = open_clip.SimpleTokenizer(context_length=8)
    fits, cut = "<|5|><|6|> a {}", "<|5|><|6|> photo of {}"
    assert heads.tokenize(short, [fits], ["big red fox"])[0, 0, -1] == short.eot_token_id
    with pytest.raises(
        InputError, match=r"photo of \{\}' with class 'big red fox' has 9 tokens.*reads 8: 'fox' would be"
    ):
        heads.tokenize(short, [fits, cut], ["fox", "big red fox"])


# Heads


@pytest.mark.parametrize("kind", ["clip", "custom_text", "siglip"])
def test_heads_are_open_clips_own(folders, tmp_path, kind):
    """1, 7, 30 and 80 templates; 16 classes, and a data set's own names."""
    labels = spaces(tmp_path, sixteen=SIXTEEN, own=NAMES)
    names = ["openai_1", "simple_7", "openai_30", "openai_80"]
    heads.build_heads(folders[kind], PROMPTS, names, labels, tmp_path / "out", tmp_path / "work", "fp32")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folders[kind]}")
    for name in names:
        formats = [text.format for text in heads.templates(PROMPTS, name)]
        for space, classes in (("sixteen", SIXTEEN), ("own", NAMES)):
            expected = open_clip.build_zero_shot_classifier(model.eval(), TOKENIZER, classes, formats).T.numpy()
            with np.load(tmp_path / f"out/{name}.{space}.npz") as head:
                assert head["weight"].shape == expected.shape and np.abs(head["weight"] - expected).max() < 1e-5
                assert np.isclose(head["scale"], model.logit_scale.exp().item())
                assert head["bias"] == (-10 if kind == "siglip" else 0)


def test_learned_prompts_make_a_head(folders, prompts, tmp_path):
    learned = "".join(f"<|{i}|>" for i in TOKENIZER.encode("a photo of"))
    table = prompts(f"words: ['a photo of a {{}}.']\nids: ['{learned} a {{}}.']\n")
    where = ([*spaces(tmp_path, own=NAMES)], tmp_path / "out", tmp_path / "work")
    heads.build_heads(folders["clip"], table, ["words", "ids"], *where)
    words, ids = (np.load(tmp_path / f"out/{name}.own.npz")["weight"] for name in ("words", "ids"))
    assert np.array_equal(words, ids)


def test_a_second_prompt_set_costs_only_its_own(folders, tmp_path, monkeypatch):
    where = (spaces(tmp_path, own=NAMES), tmp_path / "out", tmp_path / "work")
    heads.build_heads(folders["clip"], PROMPTS, ["simple_7"], *where)
    built = []
    plain = heads.class_weights
    monkeypatch.setattr(heads, "class_weights", lambda *a: built.append(a[1].shape[1]) or plain(*a))
    heads.build_heads(folders["clip"], PROMPTS, ["simple_7", "openai_1"], *where)
    assert built == [1]


def test_bf16_gives_nearly_the_same_head(folders, tmp_path):
    """Rows stay of norm 1, and the store holds both."""
    weights = {}
    for precision in ("fp32", "bf16"):
        where = (spaces(tmp_path, own=NAMES), tmp_path / precision, tmp_path / "work")
        heads.build_heads(folders["clip"], PROMPTS, ["simple_7"], *where, precision)
        weights[precision] = np.load(tmp_path / precision / "simple_7.own.npz")["weight"]
    assert np.allclose(np.linalg.norm(weights["bf16"], axis=1), 1, atol=1e-5)
    assert 0.999 < (weights["fp32"] * weights["bf16"]).sum(axis=1).min() < 1
    assert len(list((tmp_path / "work").glob("*.npz"))) == 2


# Batches


@pytest.fixture(scope="module")
def clip(folders):
    return load.load_clip(folders["clip"])


@pytest.fixture(scope="module")
def tokens():
    return heads.tokenize(TOKENIZER, heads.templates(PROMPTS, "simple_7"), NAMES).flatten(0, 1)


@torch.inference_mode()
def test_a_feature_does_not_depend_on_its_batch(clip, tokens):
    together = heads.encode_tokens(clip, tokens)
    for batch_tokens in (1, 40, 200):
        assert (heads.encode_tokens(clip, tokens, batch_tokens=batch_tokens) - together).abs().max() < 1e-5


@pytest.fixture
def device_with_room(clip, monkeypatch):
    """A device whose memory holds so many tokens: a larger batch is out of memory."""
    monkeypatch.setattr(heads, "trims", lambda *_: True)  # its probe would be the first to be refused
    hooks = []

    def room(limit):
        def refuse(_, arguments):
            rows, length, _ = arguments[0].shape
            if rows * length > limit:
                raise torch.OutOfMemoryError

        hooks.append(clip.transformer.register_forward_pre_hook(refuse))

    yield room
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def test_short_memory_halves_the_batch(clip, tokens, device_with_room, capsys):
    tokens = tokens[:4].repeat_interleave(50, 0)  # enough of one length to fill a batch
    expected = heads.encode_tokens(clip, tokens)
    device_with_room(100)
    found = heads.encode_tokens(clip, tokens, batch_tokens=256)
    assert (found - expected).abs().max() < 1e-5
    halved = [line for line in capsys.readouterr().err.splitlines() if line.startswith("out of GPU memory")]
    assert halved == [f"out of GPU memory: batches of {n} tokens from here on" for n in (128, 64)]


@torch.inference_mode()
def test_no_memory_for_one_prompt(clip, tokens, device_with_room):
    device_with_room(0)
    with pytest.raises(InputError, match="out of GPU memory with a single prompt"):
        heads.encode_tokens(clip, tokens)


# Trimming

TRIMMED = ["ViT-B-32-quickgelu", "EVA02-B-16", "MobileCLIP-B", "PE-Core-B-16"]
# bidirectional towers, a class token behind the padding, pooling at another token than the largest
REFUSED = [
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "ViT-L-14-CLIPA",
    "coca_ViT-B-32",
    "MobileCLIP-S2",
    "ViT-H-14-worldwide",
]


def tower(name):
    """An architecture's own text tower with random weights, two layers deep; the image tower is a small one."""
    torch.manual_seed(0)
    small = {"layers": 2, "width": 64, "heads": 2, "vocab_size": TEXT["vocab_size"]}
    config = get_model_config(name)
    vision = {**VISION, **{k: v for k, v in config["vision_cfg"].items() if k in ("attentional_pool", "output_tokens")}}
    return open_clip.create_model(name, vision_cfg=vision, text_cfg={**config["text_cfg"], **small}).eval()


@pytest.mark.parametrize("name", [*TRIMMED, *REFUSED])
@torch.inference_mode()
def test_trimming_is_decided_by_the_tower(name):
    clip = tower(name)
    tokenizer = open_clip.SimpleTokenizer(context_length=get_model_config(name)["text_cfg"]["context_length"])
    tokens = heads.tokenize(tokenizer, heads.templates(PROMPTS, "simple_7"), NAMES[:2]).flatten(0, 1)
    assert heads.trims(clip, tokens) is (name in TRIMMED)
    expected = clip.encode_text(tokens, normalize=True)
    assert (heads.encode_tokens(clip, tokens) - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_a_tower_that_sees_the_padding_is_not_trimmed(folders, tokens):
    clip = load.load_clip(folders["clip"])
    clip.attn_mask = torch.zeros_like(clip.attn_mask)  # it looks like CLIP
    assert not heads.trims(clip, tokens)
