"""Two-way questions and their scores against brute force; the selection effect; what an answer names; faults."""

import numpy as np
import pytest
import scipy.stats

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.metrics import choice
from clip_robustness.metrics.choice import compare_choice, match, measure_choice, measure_two_way, write_questions

N, BASE = 90, 7
MEMBERS = [[0, 5], [2], [1, 3], [6]]  # of four classes; base class 4 belongs to none
NAMES = ["cup", "desk lamp", "bow", "pen"]
CATEGORIES = ("background", "material", "texture")


@pytest.fixture
def images(tmp_path):
    """An index with labels and categories, and its label space: one image is unlabelled."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, N).astype(np.int32)
    label[5] = -1
    columns = {"image_id": [f"{i:03d}.png" for i in range(N)], "label": label}
    io.write_parquet(tmp_path / "d.parquet", columns | {"variation": np.array(CATEGORIES, object)[np.arange(N) % 3]})
    space = {"name": "four", "base": "seven", "classes": NAMES, "members": MEMBERS, "pool": "max"}
    io.write_json(tmp_path / "four.json", space)
    return tmp_path, label


def embed(folder, model, seed, masked=()):
    """Random logits of a classifier, and the same restricted to the four classes."""
    logits = np.random.default_rng(seed).normal(size=(N, BASE)).astype(np.float16)
    io.save_array(folder / model / "d.npy", logits)
    ids = io.ids_digest(f"{i:03d}.png" for i in range(N))
    facts = {"model": model, "dataset": "d", "kind": "logits", "n": N, "dim": BASE, "ids_sha256": ids}
    io.write_json(folder / model / "d.json", {**facts, **({"masked": list(masked)} if masked else {})})
    return folder / model / "d.npy", np.stack([logits[:, m].max(axis=1) for m in MEMBERS], axis=1)


def ask(folder, embeddings, selector):
    out = folder / f"{selector}.parquet"
    write_questions(embeddings, folder / "d.parquet", folder / "four.json", out, selector)
    return out


def two_way(folder, embeddings, questions):
    model = embeddings.parent.name
    out, predictions = folder / "m" / f"{model}.json", folder / "p" / f"{model}.parquet"
    measure_two_way(embeddings, folder / "d.parquet", folder / "four.json", questions, out, predictions)
    return io.read_json(out), io.read_parquet(predictions)


def pick(rows, **equal):
    found = [row for row in rows if all(row[name] == value for name, value in equal.items())]
    assert len(found) == 1
    return found[0]


def test_questions_are_those_of_brute_force(images):
    folder, label = images
    embeddings, logits = embed(folder, "a", 1)
    asked = io.read_parquet(ask(folder, embeddings, "clip"))
    kept = [i for i in range(N) if label[i] >= 0]
    assert asked["image_id"].tolist() == [f"{i:03d}.png" for i in kept]
    for row, i in enumerate(kept):
        order = sorted(range(4), key=lambda k: (-logits[i, k], k))
        wrong = order[1] if order[0] == label[i] else order[0]
        assert (asked["label"][row], asked["failure_label"][row]) == (label[i], wrong)
        assert (asked["truth"][row], asked["failure"][row]) == (NAMES[label[i]], NAMES[wrong])
        assert asked["selector_right"][row] == (order[0] == label[i])
        assert asked["category"][row] == CATEGORIES[i % 3]
    assert set(asked["selector"]) == {"clip"} and set(asked["selector_model"]) == {"a"}


def test_the_selector_scores_its_own_accuracy_and_is_flagged(images):
    folder, label = images
    embeddings, logits = embed(folder, "a", 1)
    other, _ = embed(folder, "b", 2)
    questions = [ask(folder, embeddings, "clip"), ask(folder, other, "resnet")]
    metrics, predictions = two_way(folder, embeddings, questions)
    assert metrics["manifest"]["selected_itself"] == ["clip"]
    kept = label >= 0
    own = pick(metrics["rows"], convention="clip:two_way_own", slice="")
    assert own["value"] == (logits.argmax(axis=1) == label)[kept].mean() and own["n"] == kept.sum()
    assert pick(metrics["rows"], convention="clip:two_way_own", slice="selector_right")["value"] == 1
    assert pick(metrics["rows"], convention="clip:two_way_own", slice="selector_wrong")["value"] == 0
    conventions = {row["convention"] for row in metrics["rows"]}
    assert conventions == {"clip:two_way_own", "resnet:two_way"}
    fair = predictions["selector"] == "resnet"
    assert set(predictions["how"][fair]) == {"two_way"} and set(predictions["how"][~fair]) == {"two_way_own"}


def test_a_tie_goes_to_the_first_class_as_in_top_1(images):
    folder, _ = images
    embeddings, _ = embed(folder, "a", 1)
    io.save_array(embeddings, np.zeros((N, BASE), np.float16))
    rows = two_way(folder, embeddings, [ask(folder, embeddings, "clip")])[0]["rows"]
    assert pick(rows, slice="selector_right")["value"] == 1 and pick(rows, slice="selector_wrong")["value"] == 0


def test_the_two_way_choice_of_another_model(images):
    folder, _ = images
    selector, _ = embed(folder, "a", 1)
    embeddings, logits = embed(folder, "b", 2, masked=["001.png", "002.png"])
    questions = ask(folder, selector, "clip")
    asked = io.read_parquet(questions)
    metrics, predictions = two_way(folder, embeddings, [questions])
    right = {}
    for image_id, truth, failure in zip(asked["image_id"], asked["label"], asked["failure_label"], strict=True):
        if image_id not in ("001.png", "002.png"):
            right[image_id] = bool(logits[int(image_id[:3]), truth] > logits[int(image_id[:3]), failure])
    assert dict(zip(predictions["image_id"], predictions["correct"].tolist(), strict=True)) == right
    for place, category in enumerate(CATEGORIES):
        some = [value for image_id, value in right.items() if int(image_id[:3]) % 3 == place]
        row = pick(metrics["rows"], slice=category)
        interval = scipy.stats.binomtest(sum(some), len(some)).proportion_ci(0.95, method="exact")
        assert (row["value"], row["n"]) == (pytest.approx(np.mean(some)), len(some))
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval))


# ---- answers in words ------------------------------------------------------------------------------------------------


def answers(path, **columns):
    """Four answered questions of one selector; `columns` replace the defaults."""
    n = 4
    default = {
        "model": ["lmm"] * n, "selector": ["clip"] * n, "selector_model": ["a"] * n,
        "image_id": [f"{i}.png" for i in range(n)], "category": ["texture", "texture", "material", "material"],
        "label": np.zeros(n, np.int32), "failure_label": np.ones(n, np.int32), "truth": ["cup"] * n,
        "failure": ["desk lamp"] * n, "selector_right": [True, False, True, False],
        "truth_tokens": np.full(n, 1, np.int32), "failure_tokens": np.full(n, 2, np.int32),
        "truth_logp": [-1.0] * n, "failure_logp": [-3.0] * n, "truth_logp_swapped": [-1.0] * n,
        "failure_logp_swapped": [-3.0] * n, "answer": ["a cup"] * n, "answer_swapped": ["a cup"] * n,
    }  # fmt: skip
    io.write_parquet(path, default | columns)
    return path


def measured(tmp_path, synonyms=None, **columns):
    path = answers(tmp_path / "a.parquet", **columns)
    measure_choice(path, tmp_path / "m.json", tmp_path / "p.parquet", synonyms)
    return io.read_json(tmp_path / "m.json")["rows"], io.read_parquet(tmp_path / "p.parquet")


def test_likelihood_is_the_mean_over_both_orders(tmp_path):
    rows, predictions = measured(
        tmp_path, truth_logp=[-1, -1, -5, -2], failure_logp=[-3, -3, -2, -2], truth_logp_swapped=[-1, -4, -1, -2],
        failure_logp_swapped=[-3, -1, -3, -2],
    )  # fmt: skip
    # -2 against -6, -5 against -4 (though -1 against -3 in one order), -6 against -5, and a tie
    assert predictions["correct"].tolist() == [True, False, False, False]
    assert pick(rows, convention="clip:likelihood", slice="")["value"] == 0.25
    assert pick(rows, convention="clip:likelihood", slice="texture")["value"] == 0.5
    # Divided by 1 and 2 tokens the longer name wins all but the first, whose difference is large enough.
    per_token = pick(rows, convention="clip:likelihood_per_token", slice="")
    assert per_token["value"] == 0.25
    assert pick(rows, convention="clip:likelihood", slice="selector_wrong")["n"] == 2


def test_dividing_by_the_number_of_tokens_can_turn_an_answer(tmp_path):
    rows, _ = measured(tmp_path, truth_logp=[-2.0] * 4, truth_logp_swapped=[-2.0] * 4)
    assert pick(rows, convention="clip:likelihood", slice="")["value"] == 1
    assert pick(rows, convention="clip:likelihood_per_token", slice="")["value"] == 0


def test_dropped_answers_are_counted_both_ways(tmp_path):
    said = ["It is a Cup.", "a desk lamp", "a cup on a desk lamp", "I cannot say"]
    rows, predictions = measured(tmp_path, answer=said, answer_swapped=["cup"] * 4)
    assert predictions["matched"].tolist() == ["true", "false", "double", "none"]
    assert pick(rows, metric="accuracy", convention="clip:greedy", slice="")["value"] == 0.5
    assert pick(rows, metric="accuracy", convention="clip:greedy", slice="")["n"] == 2
    assert pick(rows, metric="accuracy", convention="clip:greedy_all", slice="")["value"] == 0.25
    assert pick(rows, metric="dropped", convention="clip:greedy", slice="")["value"] == 0.5
    assert pick(rows, metric="dropped", convention="clip:greedy", slice="material")["value"] == 1
    assert not [row for row in rows if row["convention"] == "clip:greedy" and row["slice"] == "material"
                and row["metric"] == "accuracy"]  # fmt: skip
    assert pick(rows, metric="accuracy", convention="clip:greedy_swapped", slice="")["value"] == 1


def test_a_model_that_wrote_nothing_has_no_text_conventions(tmp_path):
    rows, predictions = measured(tmp_path, answer=[None] * 4, answer_swapped=[None] * 4)
    assert {row["convention"] for row in rows} == {"clip:likelihood", "clip:likelihood_per_token"}
    assert predictions["matched"].tolist() == [""] * 4


def test_synonyms_of_the_file_are_heard(tmp_path, root):
    io.write_json(tmp_path / "s.json", {"cup": ["mug"]})
    rows, _ = measured(tmp_path, tmp_path / "s.json", answer=["two mugs", "a smug cat", "mug", "a cup or mug"])
    assert pick(rows, metric="accuracy", convention="clip:greedy_all", slice="")["value"] == 0.75
    classes = io.read_json(root / "config" / "label_maps.json")["imagenet_d_113"]["classes"]
    synonyms = io.read_json(root / "config" / "synonyms.json")
    assert set(synonyms) <= set(classes)
    heard = [word.casefold() for words in synonyms.values() for word in words]
    assert len(heard) == len(set(heard)) and not set(heard) & {name.casefold() for name in classes}


@pytest.mark.parametrize(
    ("answer", "truth", "failure", "expected"),
    [
        ("cup", ["cup"], ["pen"], "true"),
        ("The main object is a PEN.", ["cup"], ["pen"], "false"),
        ("a cup and a pen", ["cup"], ["pen"], "double"),
        ("neither", ["cup"], ["pen"], "none"),
        ("", ["cup"], ["pen"], "none"),
        ("cups", ["cup"], ["pen"], "true"),
        ("toothbrushes", ["toothbrush"], ["pen"], "true"),
        ("open", ["cup"], ["pen"], "none"),  # no word, only a part of one
        ("a bow tie", ["bow"], ["bow tie"], "false"),
        ("a bow", ["bow"], ["bow tie"], "true"),
        ("a bow beside a bow tie", ["bow"], ["bow tie"], "double"),
        ("water bottle", ["water bottle"], ["bottle"], "true"),
        ("T-shirt", ["t-shirt", "tee"], ["tie"], "true"),
        ("mixing/salad bowl.", ["mixing/salad bowl"], ["soup bowl"], "true"),
        ("a c++ (book)", ["cup"], ["pen"], "none"),
    ],
)
def test_what_an_answer_names(answer, truth, failure, expected):
    assert match(answer, truth, failure) == expected
    turned = {"true": "false", "false": "true"}
    assert match(answer, failure, truth) == turned.get(expected, expected)


def test_a_name_counts_without_its_brackets(tmp_path):
    rows, _ = measured(tmp_path, truth=["iron (for clothes)"] * 4, answer=["an iron"] * 4)
    assert pick(rows, metric="accuracy", convention="clip:greedy_all", slice="")["value"] == 1


# ---- gains -----------------------------------------------------------------------------------------------------------


def prediction(path, model, how, correct, selector="clip"):
    n = len(correct)
    columns = {"model": [model] * n, "how": [how] * n, "selector": [selector] * n, "category": ["texture"] * n}
    columns |= {"image_id": [f"{i}.png" for i in range(n)], "truth": ["cup"] * n, "failure": ["pen"] * n}
    columns |= {"selector_right": [i % 2 == 0 for i in range(n)], "correct": np.array(correct, bool)}
    io.write_parquet(path, {name: columns[name] for name in choice.PREDICTION})
    return path


def test_gains_are_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.8, rng.random(400) < 0.6
    own = prediction(tmp_path / "a.parquet", "lmm", "likelihood", a)
    order = rng.permutation(300)  # the reference answers fewer questions, in another order
    table = {name: column[order] for name, column in io.read_parquet(
        prediction(tmp_path / "b.parquet", "clip_b", "two_way_own", b)).items()}  # fmt: skip
    io.write_parquet(tmp_path / "b.parquet", table)
    compare_choice(own, [tmp_path / "b.parquet"], tmp_path / "g.json")
    rows = io.read_json(tmp_path / "g.json")["rows"]
    convention = "clip:likelihood-two_way_own:clip_b"
    difference = a[:300].astype(float) - b[:300]
    row = pick(rows, slice="", convention=convention)
    assert (row["value"], row["n"]) == (pytest.approx(difference.mean()), 300)
    half = 1.96 * difference.std() / np.sqrt(300)
    assert (row["low"], row["high"]) == (
        pytest.approx(row["value"] - half, abs=0.01),
        pytest.approx(row["value"] + half, abs=0.01),
    )
    assert pick(rows, slice="selector_wrong")["value"] == pytest.approx(difference[1::2].mean())
    assert {row["slice"] for row in rows} == {"", "texture", "selector_right", "selector_wrong"}


@pytest.mark.parametrize(("mine", "theirs", "value"), [(True, False, 1), (True, True, 0), (False, True, -1)])
def test_a_gain_that_is_the_same_everywhere_still_has_an_interval(tmp_path, mine, theirs, value):
    own = prediction(tmp_path / "a.parquet", "lmm", "likelihood", [mine] * 20)
    other = prediction(tmp_path / "b.parquet", "b", "two_way", [theirs] * 20)
    compare_choice(own, [other], tmp_path / "g.json", resamples=50)
    row = pick(io.read_json(tmp_path / "g.json")["rows"], slice="")
    assert row["value"] == value and -1 <= row["low"] <= value <= row["high"] <= 1 and row["high"] - row["low"] > 0.1


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_faults(images):
    folder, _ = images
    embeddings, _ = embed(folder, "a", 1)
    questions = ask(folder, embeddings, "clip")
    with pytest.raises(InputError, match="its selector is also that of another file"):
        two_way(folder, embeddings, [questions, questions])
    table = io.read_parquet(questions)
    io.write_parquet(folder / "other.parquet", table | {"truth": table["failure"]})
    with pytest.raises(InputError, match=r"four\.json: class \d is not '.*', as the questions say"):
        two_way(folder, embeddings, [folder / "other.parquet"])
    io.write_parquet(folder / "other.parquet", table | {"image_id": [f"x{i}" for i in range(len(table["label"]))]})
    with pytest.raises(InputError, match="asks about none of the images"):
        two_way(folder, embeddings, [folder / "other.parquet"])
    one = {"name": "four", "base": "seven", "classes": ["cup"], "members": [[0]], "pool": "max"}
    io.write_json(folder / "four.json", one)
    io.write_parquet(folder / "d.parquet", io.read_parquet(folder / "d.parquet") | {"label": np.zeros(N, np.int32)})
    with pytest.raises(InputError, match="a question needs two classes"):
        ask(folder, embeddings, "clip")


def test_faulty_answers(tmp_path):
    with pytest.raises(InputError, match="row 2: failure_logp is nan"):
        measured(tmp_path, failure_logp=[-1.0, -1.0, float("nan"), -1.0])
    io.write_parquet(tmp_path / "b.parquet", {"model": ["a"]})
    with pytest.raises(InputError, match="no column 'selector'"):
        measure_choice(tmp_path / "b.parquet", tmp_path / "m.json", tmp_path / "p.parquet")
    own = prediction(tmp_path / "a.parquet", "lmm", "likelihood", [True])
    with pytest.raises(InputError, match="has none of the questions"):
        compare_choice(own, [prediction(tmp_path / "b.parquet", "b", "two_way", [True], "resnet")], tmp_path / "g.json")
