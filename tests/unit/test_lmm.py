"""Asking vision-language models: likelihoods against transformers' own, invariances, rigged models, faults."""

import json

import numpy as np
import pytest
import torch

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import lmm, vision_language
from clip_robustness.inference.lmm import ask
from clip_robustness.inference.vision_language import QUESTION, Lmm
from clip_robustness.metrics.choice import measure_choice
from tests.unit import llavas
from tests.unit.llavas import COLOURS, NAMES

torch.set_num_threads(1)
N = 7
LOGP = ("truth_logp", "failure_logp", "truth_logp_swapped", "failure_logp_swapped")


@pytest.fixture(scope="module", params=["Llava", "LlavaNext"])
def folder(request, tmp_path_factory):
    return llavas.save(*llavas.llava(request.param), tmp_path_factory.mktemp("weights") / request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of different shapes, and one question about each."""
    where = tmp_path_factory.mktemp("data")
    images = [llavas.picture(COLOURS[i % 6], i, (30 + 20 * (i % 3), 26 + 30 * (i % 2))) for i in range(N)]
    truth, failure = [i % 6 for i in range(N)], [(i * i + 2 * i + 1) % 6 for i in range(N)]
    failure = [(f + 1) % 6 if f == t else f for f, t in zip(failure, truth, strict=True)]
    index = llavas.write_images(where, images, truth)
    ids = [f"{i:03d}.png" for i in range(N)]
    return index, llavas.write_questions(where / "q.parquet", ids, truth, failure), images, truth, failure


def run(folder, index, questions, out, **options):
    options = {"precision": "fp32", "max_new_tokens": 6, "work": out.parent / "work", **options}
    ask("tiny", folder, index, questions if isinstance(questions, list) else [questions], out, **options)
    return io.read_parquet(out), io.read_json(out.with_suffix(".json"))


def by_transformers(folder, image, first, second, option):
    """Log-likelihood of an option by one whole forward pass, and the greedy text, without cache or batch."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"<s>[INST] <image>\n{QUESTION.format(first, second)} [/INST]"
    plain = {"return_tensors": "pt", "add_special_tokens": False}
    inputs = processor(images=image, text=prompt, **plain)
    whole = processor(images=image, text=f"{prompt} {option}", **plain)
    begin, ids = inputs["input_ids"].shape[1], whole["input_ids"][0]
    with torch.no_grad():
        logp = model(**whole).logits[0].log_softmax(dim=-1)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, begin:]
    likelihood = sum(float(logp[i - 1, ids[i]]) for i in range(begin, len(ids)))
    return likelihood, len(ids) - begin, processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_answers_are_those_of_transformers(folder, data, tmp_path):
    index, questions, images, truth, failure = data
    found, manifest = run(folder, index, questions, tmp_path / "a.parquet", batch_size=3)
    assert manifest["asked"] == N and manifest["precision"] == "float32" and set(found["model"]) == {"tiny"}
    for i in range(N):
        a, b = NAMES[truth[i]], NAMES[failure[i]]
        for suffix, order in (("", (a, b)), ("_swapped", (b, a))):
            for name, option in (("truth", a), ("failure", b)):
                logp, count, text = by_transformers(folder, images[i], *order, option)
                assert found[f"{name}_logp{suffix}"][i] == pytest.approx(logp, abs=1e-4)
                assert found[f"{name}_tokens"][i] == count == len(option.split())
            assert found[f"answer{suffix}"][i] == text
    assert len(set(found["answer"])) > 1


def test_the_batch_does_not_matter(folder, data, tmp_path):
    index, questions, *_ = data
    one, _ = run(folder, index, questions, tmp_path / "1.parquet", batch_size=1, work=tmp_path / "w1")
    all_, _ = run(folder, index, questions, tmp_path / "n.parquet", batch_size=2 * N, work=tmp_path / "wn")
    for name in LOGP:
        np.testing.assert_allclose(one[name], all_[name], atol=1e-4)
    assert np.ptp(one["truth_logp"]) > 1e-2
    assert one["answer"].tolist() == all_["answer"].tolist()


def test_the_order_of_the_options_does_not_matter(folder, data, tmp_path):
    index, questions, _, truth, failure = data
    ids = [f"{i:03d}.png" for i in range(N)]
    swapped = llavas.write_questions(tmp_path / "swapped.parquet", ids, failure, truth)
    one, _ = run(folder, index, questions, tmp_path / "1.parquet")
    two, _ = run(folder, index, swapped, tmp_path / "2.parquet")
    for a, b in (("truth", "failure"), ("failure", "truth")):
        mean = (one[f"{a}_logp"] + one[f"{a}_logp_swapped"]) / 2
        np.testing.assert_allclose(mean, (two[f"{b}_logp"] + two[f"{b}_logp_swapped"]) / 2, atol=1e-5)
    # In one order alone it does matter, so there is something to average.
    assert np.abs(one["truth_logp"] - one["truth_logp_swapped"]).max() > 1e-3


def test_selectors_that_agree_ask_once(folder, data, tmp_path):
    index, questions, _, truth, failure = data
    ids = [f"{i:03d}.png" for i in range(N)]
    other = [(f + 1) % 6 if i == 2 and (f + 1) % 6 != truth[i] else f for i, f in enumerate(failure)]
    more = llavas.write_questions(tmp_path / "q2.parquet", ids, truth, other, "resnet")
    found, manifest = run(folder, index, [questions, more], tmp_path / "a.parquet")
    assert manifest["asked"] == N + 1 and manifest["n"] == 2 * N
    assert found["selector"].tolist() == ["clip"] * N + ["resnet"] * N
    same = np.array(other) == np.array(failure)
    assert (found["truth_logp"][:N] == found["truth_logp"][N:]).tolist() == same.tolist()


def test_a_second_run_asks_nothing_and_a_killed_one_only_the_rest(folder, data, tmp_path, monkeypatch):
    index, questions, *_ = data
    monkeypatch.setattr(lmm, "SHARD", 3)
    first, _ = run(folder, index, questions, tmp_path / "a.parquet")
    shards = sorted((tmp_path / "work").rglob("shard-*.parquet"))
    assert len(shards) == 3
    before = (tmp_path / "a.parquet").read_bytes()
    shards[1].unlink()
    asked = []
    answer = Lmm.answer
    monkeypatch.setattr(Lmm, "answer", lambda self, images, *a: asked.append(len(images)) or answer(self, images, *a))
    run(folder, index, questions, tmp_path / "a.parquet")
    assert sum(asked) == 6 and (tmp_path / "a.parquet").read_bytes() == before  # three questions, both orders
    monkeypatch.setattr(lmm, "Lmm", None)
    again, _ = run(folder, index, questions, tmp_path / "b.parquet")
    assert again["truth_logp"].tolist() == first["truth_logp"].tolist()


def test_batches_are_halved_when_memory_runs_out(folder, data, tmp_path, monkeypatch, capsys):
    index, questions, *_ = data
    expected, _ = run(folder, index, questions, tmp_path / "a.parquet", work=tmp_path / "w")
    answer = Lmm.answer

    def small(self, images, *arguments):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, images, *arguments)

    monkeypatch.setattr(Lmm, "answer", small)
    found, _ = run(folder, index, questions, tmp_path / "b.parquet", batch_size=8)
    np.testing.assert_allclose(found["truth_logp"], expected["truth_logp"], atol=1e-4)
    assert "2 prompts at once" in capsys.readouterr().err
    monkeypatch.setattr(Lmm, "answer", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(InputError, match="out of cpu memory with a single image"):
        run(folder, index, questions, tmp_path / "c.parquet", work=tmp_path / "w2")


def test_without_text(folder, data, tmp_path):
    index, questions, *_ = data
    found, _ = run(folder, index, questions, tmp_path / "a.parquet", max_new_tokens=0)
    assert found["answer"].tolist() == [None] * N


def test_a_processor_without_a_template_gets_the_plain_prompt(tmp_path):
    model, processor = llavas.llava()
    processor.chat_template = None
    asked = Lmm(llavas.save(model, processor, tmp_path / "plain"))
    prompt = asked.prompt("cup", "pen")
    assert prompt == f"USER: <image>\n{QUESTION.format('cup', 'pen')} ASSISTANT:"
    assert np.isfinite(asked.answer([llavas.picture(COLOURS[0])], [("cup", "pen")])[0].logp).all()


def test_an_option_is_read_as_what_follows_the_prompt():
    """With a tokenizer to which a word after a space, and the first of a text, is another than one after a new line."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "▁say:", "▁cup", "cup", "▁tie", "▁say:\n"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "merged_with_previous"), pre_tokenizers.Metaspace(prepend_scheme="first")
    ])  # fmt: skip
    asked = object.__new__(Lmm)
    asked.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert asked.option("say:", "cup") == [2] and asked.option("say:", "cup tie") == [2, 4]
    assert asked.option("say:\n", "cup") == [3]


# ---- rigged models, from the pixels to the accuracy ------------------------------------------------------------------


def accuracy(model, processor, tmp_path):
    """Accuracy by convention, on all ordered pairs of the classes."""
    names = range(4)
    pairs = [(a, b) for a in names for b in names if a != b]
    images = [llavas.picture(COLOURS[a], seed=10 + i) for i, (a, _) in enumerate(pairs)]
    index = llavas.write_images(tmp_path, images, [a for a, _ in pairs])
    ids = [f"{i:03d}.png" for i in range(len(pairs))]
    questions = llavas.write_questions(tmp_path / "q.parquet", ids, [a for a, _ in pairs], [b for _, b in pairs])
    run(llavas.save(model, processor, tmp_path / "weights"), index, questions, tmp_path / "a.parquet")
    measure_choice(tmp_path / "a.parquet", tmp_path / "m.json", tmp_path / "p.parquet")
    rows = io.read_json(tmp_path / "m.json")["rows"]
    return {row["convention"]: row["value"] for row in rows if row["metric"] == "accuracy" and not row["slice"]}


RIGGED = ("cup", "desk lamp", "pen", "very old clock")


def test_a_model_that_always_knows_scores_1(tmp_path, monkeypatch):
    monkeypatch.setattr(llavas, "NAMES", RIGGED)
    found = accuracy(*llavas.oracle(RIGGED), tmp_path)
    assert found["clip:likelihood"] == found["clip:likelihood_per_token"] == 1


def test_a_model_that_ignores_the_image_scores_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(llavas, "NAMES", RIGGED)
    model, processor = llavas.oracle(RIGGED)
    found = accuracy(llavas.blind(model), processor, tmp_path)
    # Every pair stands once in either role, and what ignores the image prefers the same of the two each time.
    assert found["clip:likelihood"] == found["clip:likelihood_per_token"] == 0.5


# ---- faults ----------------------------------------------------------------------------------------------------------


def broken(tmp_path, change):
    model, processor = llavas.llava()
    folder = llavas.save(model, processor, tmp_path / "weights")
    change(folder)
    io.seal(folder, model="llava")
    return folder


def without_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)


def edit_config(folder, **text):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without_head(tensors):
    return {name: value for name, value in tensors.items() if "lm_head" not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_processor, "no processor of images and text"),
        (lambda f: (f / "model.safetensors").unlink(), "these weights do not fit"),
        (lambda f: edit_tensors(f, without_head), r"missing keys: lm_head\.weight \(1 in all\)"),
        (lambda f: edit_config(f, num_hidden_layers=3), "missing keys"),
        (lambda f: edit_config(f, num_hidden_layers=1), "unexpected keys"),
        (lambda f: edit_config(f, intermediate_size=48), "these weights do not fit"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, data, change, message):
    with pytest.raises(InputError, match=message):
        run(broken(tmp_path, change), *data[:2], tmp_path / "a.parquet")


def test_logits_that_are_not_finite(tmp_path, data):
    def poison(tensors):
        name = next(n for n in tensors if n.endswith("lm_head.weight"))
        return tensors | {name: torch.full_like(tensors[name], float("nan"))}

    folder = broken(tmp_path, lambda f: edit_tensors(f, poison))
    with pytest.raises(InputError, match=r"image '000\.png': a logit is not finite"):
        run(folder, *data[:2], tmp_path / "a.parquet")


def test_questions_that_cannot_be_asked(folder, data, tmp_path):
    strange = llavas.write_questions(tmp_path / "q.parquet", ["nowhere.png"], [0], [1])
    with pytest.raises(InputError, match=r"asks about 'nowhere\.png', which .*set\.parquet does not have"):
        run(folder, data[0], strange, tmp_path / "a.parquet")
    table = io.read_parquet(data[1])
    io.write_parquet(tmp_path / "short.parquet", {n: v for n, v in table.items() if n != "failure"})
    with pytest.raises(InputError, match="no column 'failure'"):
        run(folder, data[0], tmp_path / "short.parquet", tmp_path / "a.parquet")
    changed = tmp_path / "changed"
    llavas.save(*llavas.llava(), changed)
    (changed / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: its SHA-256 is not that of the manifest"):
        run(changed, *data[:2], tmp_path / "a.parquet")


def test_quantised_loading_says_what_it_needs(folder, data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="quantise is 3, expected 0, 8 or 4"):
        run(folder, *data[:2], tmp_path / "a.parquet", quantise=3)
    monkeypatch.setattr(vision_language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantise: 8 needs the package bitsandbytes; install it"):
        run(folder, *data[:2], tmp_path / "a.parquet", quantise=8)
    monkeypatch.setattr(vision_language.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="quantise: 4 needs a GPU"):
        run(folder, *data[:2], tmp_path / "a.parquet", quantise=4)
