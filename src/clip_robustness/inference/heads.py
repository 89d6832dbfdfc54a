"""Zero-shot heads: class names in prompts, through the text tower, into a linear classifier.

A class's weight is the mean over templates of L2-normalised text features, normalised again (Radford et
al. 2021, section 3.1.4). Scale and bias are the model's own learned ones.

Where the text tower is causal and pools at the end token, whatever stands behind that token cannot
change the feature: prompts are sorted by length and every batch is cut to its longest row. Whether a tower is of
that kind is found out by looking at it and by comparing both ways on a probe, not by its name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_robustness.core import io, provenance
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import load_clip, load_tokenizer, scale_and_bias

TOLERANCE = 1e-5  # between the trimmed and the full context, on normalised features
NUMBERS = ("inference.heads", "inference.load")  # the modules that decide a head's numbers


def templates(table: Path, name: str) -> list[str]:
    """The templates of a prompt set: a list of its own, or one that open_clip ships (`open_clip: NAME`)."""
    import yaml

    entry = yaml.safe_load(table.read_text(encoding="utf-8"))[name]
    if isinstance(entry, list):
        found = entry
    else:
        from open_clip import zero_shot_metadata

        functions = getattr(zero_shot_metadata, entry["open_clip"])
        found = [function("{}") for function in functions][: entry.get("first")]
    wrong = [text for text in found if text.count("{}") != 1]
    if wrong or not found:
        raise io.InputError(f"{table}, prompt set '{name}': every template needs one {{}}; not so: {wrong[:3]}")
    return found


def build_heads(
    weights: Path, prompts: Path, names: Sequence[str], labels: Sequence[Path], out: Path, work: Path
) -> None:
    """Write `out`/{prompt set}.{label space}.npz for every prompt set and base label space.

    Each holds `weight` float32 [C, d] (rows of norm 1), `scale` and `bias`. Heads live in `work` under a
    key of all that decides them, so a further prompt set costs only its own.
    """
    key = {"files": io.check_sealed(weights)["files"], "code": provenance.code_hash(*NUMBERS, imports=False)}
    todo = []
    for name in names:
        for path in labels:
            classes = io.read_json(path)["classes"]
            texts = templates(prompts, name)
            store = work / f"{io.digest(key, texts, classes)[:32]}.npz"
            todo.append((store, texts, classes, out / f"{name}.{path.stem}.npz"))
    missing = [job for job in todo if not job[0].is_file()]
    if missing:
        with lease() as device, torch.inference_mode():
            clip = load_clip(weights).to("cuda" if device is not None else "cpu")
            tokenizer = load_tokenizer(weights)
            scale, bias = scale_and_bias(clip)
            for store, texts, classes, target in missing:
                print(f"head {target.name}: {len(classes)} classes, {len(texts)} templates", file=sys.stderr)
                weight = class_weights(clip, tokenizer, texts, classes)
                with io.atomic(store) as temporary:
                    np.savez(temporary, weight=weight, scale=np.float32(scale), bias=np.float32(bias))
    for store, _, _, target in todo:
        io.place(store, target)


def class_weights(clip: Any, tokenizer: Any, texts: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Text features of every class [C, d]: mean over templates of normalised features, normalised again."""
    prompts = [template.replace("{}", name) for name in classes for template in texts]
    features = encode_texts(clip, tokenizer, prompts).reshape(len(classes), len(texts), -1)
    mean = features.mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def encode_texts(clip: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """L2-normalised text features [len(prompts), d], in the order given."""
    device = clip.logit_scale.device
    tokens = tokenizer(list(prompts))
    if not trims(clip, tokens[: min(8, len(tokens))].to(device)):
        parts = [clip.encode_text(part.to(device), normalize=True) for part in tokens.split(batch_size)]
        return torch.cat(parts).float()
    lengths = tokens.argmax(dim=-1) + 1
    order = torch.argsort(lengths, stable=True)
    features = torch.empty(len(tokens), clip.text_projection.shape[-1], device=device)
    for rows in order.split(batch_size):
        batch = tokens[rows, : int(lengths[rows].max())].to(device)
        features[rows] = _encode_trimmed(clip, batch).float()
    return features


def trims(clip: Any, probe: Tensor) -> bool:
    """Whether cutting the padding behind the end token leaves this tower's features as they are."""
    causal = getattr(clip, "attn_mask", None)
    projection = getattr(clip, "text_projection", None)
    if causal is None or getattr(clip, "text_pool_type", None) != "argmax" or not isinstance(projection, Tensor):
        return False
    length = int(probe.argmax(dim=-1).max()) + 1
    full = clip.encode_text(probe, normalize=True)
    return bool((full - _encode_trimmed(clip, probe[:, :length])).abs().max() <= TOLERANCE)


def _encode_trimmed(clip: Any, tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)
    x = x[torch.arange(len(tokens), device=x.device), tokens.argmax(dim=-1)] @ clip.text_projection
    return torch.nn.functional.normalize(x, dim=-1)
