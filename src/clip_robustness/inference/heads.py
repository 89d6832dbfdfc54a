"""Zero-shot heads: class names in prompts, through the text tower, into a linear classifier.

A class's weight is the mean over templates of L2-normalised text features, normalised again (Radford et
al. 2021, section 3.1.4). Scale and bias are the model's own learned ones. Everything is float32, on a GPU too.

Where the text tower is causal and pools at the end token, whatever stands behind that token cannot
change the feature: prompts are sorted by length, and a batch is of one length and cut to it. Whether a tower is of
that kind is found out by looking at it and by comparing both ways on a probe, not by its name.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_robustness.core import io, provenance
from clip_robustness.inference.lease import devices, lease
from clip_robustness.inference.load import (
    check_while_importing,
    compute_dtype,
    device_of,
    import_library,
    load_clip,
    load_tokenizer,
    scale_and_bias,
)

TOLERANCE = 1e-5  # between the trimmed and the full context, on normalised features
BATCH_TOKENS = 4096  # rows times length: it bounds memory, and is about what a processor's cache likes best
LEARNED = re.compile(r"(?:<\|\d+\|>)*")  # what a template may begin with
NUMBERS = ("inference.heads", "inference.load")  # the modules that decide a head's numbers


def templates(table: Path, name: str, searched: Path | None = None) -> list[str]:
    """The templates of a prompt set: its own list, one that open_clip ships (`open_clip: NAME`), or a `file: PATH`.

    The path is relative to the table's folder; the file has one template a line, and comments that begin with '#'.
    The templates of a set that is searched for (`search`) stand in such a file too, `searched`.
    Errors: `InputError` for a set, list or file that is not there, and for a template without one {} for the class
    name or with learned tokens elsewhere than at its beginning.
    """
    import yaml

    sets = yaml.safe_load(table.read_text(encoding="utf-8"))
    if name not in sets:
        raise io.InputError(f"{table}: no prompt set '{name}'; it has {', '.join(sets)}")
    entry = sets[name]
    if isinstance(entry, list):
        found = entry
    elif "search" in entry:
        if searched is None:
            raise io.InputError(f"{table}, prompt set '{name}': its templates are searched for; expected their file")
        found = _lines(searched)
    elif "file" in entry:
        found = _lines(table.parent / entry["file"])
    else:
        found = _shipped(entry.get("open_clip"), f"{table}, prompt set '{name}'")[: entry.get("first")]
    wrong = [text for text in found if text.count("{}") != 1 or "<|" in LEARNED.sub("", text, count=1)]
    if wrong or not found:
        raise io.InputError(
            f"{table}, prompt set '{name}': every template needs one {{}}, and may have learned tokens <|ID|> only at "
            f"its beginning; not so: {wrong[:3]}"
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise io.InputError(f"{path}: cannot read this file of templates ({error})") from None
    return [line for line in lines if line and not line.startswith("#")]


def _shipped(name: str | None, where: str) -> list[str]:
    functions = getattr(import_library("open_clip").zero_shot_metadata, name or "", None)
    if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
        raise io.InputError(f"{where}: expected a list of templates, `file: PATH` or a list that open_clip ships")
    return [function("{}") for function in functions]


def build_heads(
    weights: Path,
    prompts: Path,
    names: Sequence[str],
    labels: Sequence[Path],
    out: Path,
    work: Path,
    precision: str = "auto",
    searched: Path | None = None,
) -> None:
    """Write `out`/{prompt set}.{label space}.npz for every prompt set in `names` and base label space in `labels`.

    Each holds `weight` float32 [C, d] (rows of norm 1), `scale`, `bias` and the number of `templates`. Heads live in
    `work` under a key of all that decides them, so a further prompt set costs only its own. precision: as of `embed`;
    searched: as of `templates`.
    Errors: `InputError` as those of `templates`, `tokenize` and `load_clip`.
    """
    device = "cuda" if devices() else "cpu"
    key = {
        "files": check_while_importing(weights, "open_clip")["files"],
        "code": provenance.code_hash(*NUMBERS, imports=False),
        # What `auto` is on a GPU is known only where one is held.
        "precision": [device, precision if device == "cuda" else str(compute_dtype(precision, device))],
    }
    todo = []
    for name in names:
        texts = templates(prompts, name, searched)
        for path in labels:
            classes = io.read_json(path)["classes"]
            store = work / f"{io.digest(key, texts, classes)[:32]}.npz"
            todo.append((store, texts, classes, out / f"{name}.{path.stem}.npz"))
    missing = [job for job in todo if not job[0].is_file()]
    if missing:
        tokenizer = load_tokenizer(weights)
        # Before a GPU is taken: tokens take the processor a while, and a wrong prompt shows here.
        tokens = [tokenize(tokenizer, texts, classes) for _, texts, classes, _ in missing]
        torch.set_float32_matmul_precision("highest")
        with lease() as leased, torch.inference_mode():
            clip = load_clip(weights).to(device_of(leased))
            dtype = compute_dtype(precision, device)
            scale, bias = scale_and_bias(clip)
            numbers: dict[str, Any] = {"scale": np.float32(scale), "bias": np.float32(bias)}
            for (store, texts, _, target), rows in zip(missing, tokens, strict=True):
                weight = class_weights(clip, rows, f"head {target.stem}", dtype)
                with io.atomic(store) as temporary:
                    np.savez(temporary, weight=weight, templates=np.int64(len(texts)), **numbers)
    for store, _, _, target in todo:
        io.place(store, target)


def tokenize(tokenizer: Any, texts: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Token ids [C, T, context] of every class in every template, padded with 0.

    Learned tokens <|ID|> at the beginning of a template go in as they are, between the start token and the rest.
    Errors: `InputError` for a learned token outside the vocabulary, or for a tokenizer other than CLIP's BPE, whose ids
    they are; and, with CLIP's BPE, for a prompt that the context cuts.
    """
    from open_clip import SimpleTokenizer

    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None:
        for text in texts:
            if text.startswith("<|"):
                raise io.InputError(
                    f"prompt '{text}': its learned tokens are ids of CLIP's BPE vocabulary, and this model's tokenizer "
                    f"is another ({type(tokenizer).__name__}); give the model another prompt set"
                )
        rows = tokenizer([text.replace("{}", name) for name in classes for text in texts])
        return rows.view(len(classes), len(texts), -1)
    tokens = torch.zeros(len(classes), len(texts), tokenizer.context_length, dtype=torch.long)
    for t, text in enumerate(texts):
        learned, rest = _learned(text, tokenizer.sot_token_id)
        for c, name in enumerate(classes):
            ids = [tokenizer.sot_token_id, *learned, *tokenizer.encode(rest.replace("{}", name))]
            room = tokenizer.context_length - 1  # for all but the end token
            if len(ids) > room:
                raise io.InputError(
                    f"prompt '{text}' with class '{name}' has {len(ids) + 1} tokens, and the model reads {room + 1}: "
                    f"'{tokenizer.decode(ids[room:]).strip()}' would be cut; shorten the template or the class name"
                )
            tokens[c, t, : len(ids) + 1] = torch.tensor([*ids, tokenizer.eot_token_id])
    return tokens


def _learned(text: str, first_special: int) -> tuple[list[int], str]:
    """The learned tokens that a template begins with, and the rest of it."""
    rest = LEARNED.sub("", text, count=1)
    ids = [int(number) for number in re.findall(r"\d+", text.removesuffix(rest))]
    for i in ids:
        if i >= first_special:
            raise io.InputError(
                f"prompt '{text}': learned token {i} is outside the vocabulary, which has 0 to {first_special - 1}"
            )
    return ids, rest


def class_weights(clip: Any, tokens: Tensor, what: str = "head", dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Weights float32 [C, d] of token ids [C, T, context]: mean over templates of features, normalised again."""
    features = encode_tokens(clip, tokens.flatten(0, 1), what, dtype).unflatten(0, tokens.shape[:2])
    return normalize(features.mean(dim=1), dim=-1).cpu().numpy()


def encode_tokens(
    clip: Any,
    tokens: Tensor,
    what: str = "text",
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """L2-normalised text features float32 [n, d] of token ids [n, context], on the model's device.

    what: of the line that shows progress ("": none). dtype: of the matrix products; bf16 goes through autocast, which
    leaves norms and softmax in float32. Out of GPU memory, a batch is halved.
    Errors: `InputError` where not even one prompt fits.
    """
    device = clip.logit_scale.device
    lengths = tokens.argmax(dim=-1) + 1
    # The longest first: where memory is short, that shows at once.
    order = torch.argsort(lengths, descending=True, stable=True)
    trimmed = trims(clip, tokens[order[:: -(-len(order) // 8)]].to(device))
    if not trimmed:
        lengths = torch.full_like(lengths, tokens.shape[1])
    progress = io.Progress(what, len(tokens), "prompts") if what else None
    parts: list[Tensor] = []
    start = 0
    while start < len(order):
        length = int(lengths[order[start]])
        rows = order[start : start + max(1, batch_tokens // length)]
        rows = rows[lengths[rows] == length]  # a smaller batch costs less than padding
        batch = tokens[rows, :length].to(device)
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                features = _encode_trimmed(clip, batch) if trimmed else clip.encode_text(batch, normalize=True)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise io.InputError(f"{what}: out of GPU memory with a single prompt; use a larger GPU") from None
            batch_tokens //= 2
            torch.cuda.empty_cache()
            print(f"out of GPU memory: batches of {batch_tokens} tokens from here on", file=sys.stderr)
            continue
        parts.append(normalize(features.float(), dim=-1))
        start += len(rows)
        if progress:
            progress.update(len(rows))
    return torch.cat(parts)[torch.argsort(order)]


def trims(clip: Any, probe: Tensor) -> bool:
    """Whether cutting the padding behind the end token leaves this tower's features of the probe as they are."""
    tower = getattr(clip, "text", clip)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if pool != "argmax" or tower.attn_mask is None or tower.text_projection is None:
        return False
    length = int(probe.argmax(dim=-1).max()) + 1
    full = clip.encode_text(probe, normalize=True)
    return bool((full - _encode_trimmed(clip, probe[:, :length])).abs().max() <= TOLERANCE)


def _encode_trimmed(clip: Any, tokens: Tensor) -> Tensor:
    """A causal tower's features, pooled at the end token; the tower is the model itself, or its `text`."""
    tower = getattr(clip, "text", clip)
    length = tokens.shape[1]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    # Only the end token's row goes further: what follows works row by row.
    x = tower.ln_final(x[torch.arange(len(tokens), device=x.device), tokens.argmax(dim=-1)])
    projection = tower.text_projection
    return normalize(projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection, dim=-1)
