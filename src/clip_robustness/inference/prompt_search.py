"""Search for the learned prompts of a CLIP: `search_prompts`, after RoZ's CLIP-Auto (arXiv 2403.10499).

A few learned tokens stand before the bare class name. As in AutoPrompt (Shin et al. 2020, arXiv 2010.15980), the
gradient of the loss with respect to a token's embedding says, to first order, which other token would lower the loss
most (HotFlip, Ebrahimi et al. 2018, arXiv 1712.06751): the best of these are tried. RoZ released the log of its search
and not the program, so the rest is our own.

The images are cut in two halves. One proposes and compares; the other, held out from that, only accepts or refuses the
one candidate that a step puts forward. The accuracy that is logged is of the held-out half. It has been chosen by, if
only once a step: what a prompt is worth is to be measured on images that the search has not seen at all.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clip_robustness.core import io
from clip_robustness.core.features import read_index, read_manifest, unit_rows
from clip_robustness.inference.heads import encode_tokens, tokenize
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import compute_dtype, device_of, load_clip, load_tokenizer, scale_and_bias

CLASSES_AT_ONCE = 128  # of a gradient, whose memory grows with them


@dataclasses.dataclass(frozen=True, order=True)
class _Score:
    """Of a prompt on one half of the images; the larger is the better, and the loss decides between equals."""

    accuracy: float
    minus_loss: float


@dataclasses.dataclass(frozen=True)
class _Half:
    features: Tensor  # float32 [n, d]
    labels: Tensor  # int64 [n]

    def loss(self, weight: Tensor, scale: float) -> Tensor:
        """Cross-entropy of the zero-shot logits; a bias is the same for all classes, and no softmax sees it."""
        return cross_entropy(scale * self.features @ weight.T, self.labels)

    def score(self, weight: Tensor, scale: float) -> _Score:
        logits = scale * self.features @ weight.T
        right = (logits.argmax(dim=1) == self.labels).double().mean()
        return _Score(float(right), -float(cross_entropy(logits, self.labels)))


@dataclasses.dataclass(frozen=True)
class _Found:
    step: int  # 0: the start
    prefix: tuple[int, ...]
    held_out: _Score

    @property
    def template(self) -> str:
        return _template(self.prefix)


def search_prompts(
    weights: Path,
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    tokens: int = 4,
    steps: int = 200,
    candidates: int = 32,
    keep: int = 5,
    images: int = 10_000,
    start: str = "a photo of a",
    seed: int = 0,
    precision: str = "auto",
) -> None:
    """Write the `keep` best prompts that a search of `steps` steps finds, best first, as a file of templates `out`.

    embeddings: float16 features [n, d] of the search set with their manifest, in the order of `index`; labels: its
    base label space. The search set should be none that is reported, such as a part of a training set.
    tokens: length of the prefix, which begins as the words `start`; candidates: prompts tried in a step, all of which
    differ from the current one in one place; images: how many are used, drawn with `seed`, half of them held out.
    A step is accepted when its best candidate is better on both halves: more images right, or as many at a lower loss.
    The file's comments list every accepted prompt with its held-out accuracy. precision: as of `build_heads`.
    Errors: `InputError` for a text tower whose tokens are not CLIP's, embeddings that are not this model's features of
    the images of `index`, labels that are not of a base space, and a start of another length.
    """
    if min(tokens, candidates, keep) < 1 or steps < 0:
        raise io.InputError(f"{out}: tokens, candidates and keep must be at least 1, and steps at least 0")
    sealed = io.check_sealed(weights)
    features, targets, classes, manifest = _search_set(embeddings, index, labels, sealed["files"])
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(targets))[:images]
    if len(chosen) < 2:
        raise io.InputError(f"{embeddings}: {len(chosen)} labelled images for the search, expected at least 2")
    with lease() as leased:
        device = device_of(leased)
        dtype = compute_dtype(precision, device.type)
        torch.set_float32_matmul_precision("highest")
        text = _Text(load_clip(weights).to(device), weights, classes, start, tokens, dtype)
        search, held_out = (
            _Half(torch.from_numpy(features[rows]).to(device), torch.from_numpy(targets[rows]).to(device))
            for rows in (np.sort(chosen[::2]), np.sort(chosen[1::2]))
        )
        found = _climb(text, search, held_out, steps, candidates, random)
    best = sorted(found, key=lambda one: (one.held_out, one.step), reverse=True)[:keep]
    facts = f"seed {seed}, {steps} steps of {candidates} candidates, {len(chosen)} images, half of them held out"
    lines = [f"# Learned prompts of {sealed['model']}, searched on {manifest['dataset']}", f"# ({facts})."]
    lines.append("# Every accepted step, with the share of the held-out images that the prompt gets right:")
    lines += [f"#   {one.step} {one.held_out.accuracy:.6f} {one.template}" for one in found]
    io.write_text(out, "\n".join([*lines, *(one.template for one in best)]) + "\n")


def _search_set(
    embeddings: Path, index: Path, labels: Path, files: dict[str, str]
) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, Any]]:
    """Features float32 [n, d] and labels int64 [n] of all images that were read and have one; classes; manifest."""
    manifest, space = read_manifest(embeddings), io.read_json(labels)
    if manifest.get("weights", files) != files:
        raise io.InputError(f"{embeddings}: made with other weights than those whose prompts are searched")
    if space["base"] is not None:
        raise io.InputError(f"{labels}: a part of '{space['base']}'; prompts are searched over a base label space")
    rows = read_index(index, manifest, ("label",))
    wrong = np.flatnonzero((rows["label"] < -1) | (rows["label"] >= len(space["classes"])))
    if len(wrong):
        got = f"row {wrong[0]}: {rows['label'][wrong[0]]}"
        raise io.InputError(f"{index}: column label: {got}; expected -1..{len(space['classes']) - 1} as of {labels}")
    use = (rows["label"] >= 0) & ~np.isin(rows["image_id"], manifest.get("masked") or [])
    return unit_rows(embeddings)[use], rows["label"][use].astype(np.int64), space["classes"], manifest


class _Text:
    """The text side: class weights of a prefix, and the gradient of a loss with respect to its tokens' embeddings."""

    def __init__(self, clip: Any, weights: Path, classes: Sequence[str], start: str, tokens: int, dtype: torch.dtype):
        from open_clip import SimpleTokenizer

        self.clip, self.dtype = clip.requires_grad_(False), dtype
        self.scale = scale_and_bias(clip)[0]
        self.embedding = getattr(getattr(clip, "text", clip), "token_embedding", None)
        self.tokenizer = load_tokenizer(weights)
        if type(self.tokenizer) is not SimpleTokenizer or not isinstance(self.embedding, nn.Embedding):
            kind = type(self.tokenizer).__name__
            raise io.InputError(
                f"{weights}: no prompts can be searched for this text tower ({kind}): a learned token is an id of "
                "CLIP's BPE vocabulary, and SigLIP and towers of the transformers library read ids of another; "
                "give the model prompts in words"
            )
        self.start = tuple(self.tokenizer.encode(start))
        if len(self.start) != tokens:
            raise io.InputError(f"the start '{start}' has {len(self.start)} tokens, and {tokens} are searched")
        # Prefixes change, what stands around them does not.
        self.rows = tokenize(self.tokenizer, [_template(self.start)], classes)[:, 0]

    def weights(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        """L2-normalised features [k, C, d] of every class behind every prefix."""
        rows = self._rows(prefixes)
        return encode_tokens(self.clip, rows.flatten(0, 1), "", self.dtype).unflatten(0, rows.shape[:2])

    def gradient(self, prefix: tuple[int, ...], of_weights: Tensor) -> Tensor:
        """Of a loss with respect to the prefix's embeddings [tokens, width], all classes together.

        of_weights: its gradient with respect to the class weights [C, d]. Class by class, because a graph of all would
        take a lot of memory.
        """
        width = self.embedding.embedding_dim  # type: ignore[union-attr]
        delta = torch.zeros(len(prefix), width, device=of_weights.device, requires_grad=True)
        total = torch.zeros_like(delta)
        behind = 1 + len(prefix)

        def shift(_module: nn.Module, _arguments: Any, embedded: Tensor) -> Tensor:
            return torch.cat([embedded[:, :1], embedded[:, 1:behind] + delta, embedded[:, behind:]], dim=1)

        handle = self.embedding.register_forward_hook(shift)  # type: ignore[union-attr]
        try:
            parts = zip(self._rows([prefix])[0].split(CLASSES_AT_ONCE), of_weights.split(CLASSES_AT_ONCE), strict=True)
            for rows, of_part in parts:
                features = encode_tokens(self.clip, rows, "", self.dtype)
                total += torch.autograd.grad((features * of_part).sum(), delta)[0]
        finally:
            handle.remove()
        return total

    def _rows(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        rows = self.rows.repeat(len(prefixes), 1, 1)
        rows[:, :, 1 : 1 + len(self.start)] = torch.tensor(prefixes)[:, None]
        return rows


def _climb(
    text: _Text, search: _Half, held_out: _Half, steps: int, candidates: int, random: np.random.Generator
) -> list[_Found]:
    """The start and every accepted prompt, in order; each is better on both halves than the one before."""
    weight = text.weights([text.start])[0]
    best, current = search.score(weight, text.scale), _Found(0, text.start, held_out.score(weight, text.scale))
    found, ranks = [current], _ranked(text, search, current.prefix, weight)
    tried = [0] * len(text.start)
    _say(text, current)
    progress = io.Progress("search prompts", steps, "steps")
    for step in range(1, steps + 1):
        # While the prompt stays, so does the gradient: a place that comes again goes on down its list.
        place = int(random.integers(len(text.start)))
        others = ranks[place][tried[place] : tried[place] + candidates].tolist()
        tried[place] += len(others)
        prefixes = [(*current.prefix[:place], token, *current.prefix[place + 1 :]) for token in others]
        if prefixes:
            weights = text.weights(prefixes)
            scores = [search.score(weight, text.scale) for weight in weights]
            first = scores.index(max(scores))
            if scores[first] > best:
                score = held_out.score(weights[first], text.scale)
                if score > current.held_out:
                    best, current = scores[first], _Found(step, prefixes[first], score)
                    found.append(current)
                    ranks = _ranked(text, search, current.prefix, weights[first])
                    tried = [0] * len(tried)
                    _say(text, current)
        progress.update(1)
    return found


def _ranked(text: _Text, search: _Half, prefix: tuple[int, ...], weight: Tensor) -> list[Tensor]:
    """For each place the other tokens of the vocabulary [V - 1], the most promising first.

    To first order a change of token moves the loss by (its embedding - the present one) · gradient.
    """
    weight = weight.detach().requires_grad_()
    of_weights = torch.autograd.grad(search.loss(weight, text.scale), weight)[0]
    gradient = text.gradient(prefix, of_weights)
    words = text.embedding.weight[: text.tokenizer.sot_token_id]  # type: ignore[union-attr]  # none of the special tokens
    ranks = torch.argsort(words @ gradient.T, dim=0, stable=True).T.cpu()
    return [ranks[place][ranks[place] != token] for place, token in enumerate(prefix)]


def _template(prefix: Sequence[int]) -> str:
    return "".join(f"<|{token}|>" for token in prefix) + " {}"


def _say(text: _Text, found: _Found) -> None:
    words = text.tokenizer.decode(list(found.prefix)).strip()
    what = f"step {found.step}: {found.held_out.accuracy:.4f} of the held-out images, {found.template} ({words!r})"
    print(what, file=sys.stderr, flush=True)
