"""Captions through a model's text tower, for retrieval: `encode_captions`."""

from pathlib import Path

import numpy as np
import torch

from clip_robustness.core import io, provenance
from clip_robustness.core.captions import read_captions
from clip_robustness.inference.heads import encode_tokens
from clip_robustness.inference.lease import devices, lease
from clip_robustness.inference.load import compute_dtype, device_of, load_clip, load_tokenizer, to_float16

NUMBERS = ("inference.captions", "inference.heads", "inference.load")  # the modules that decide the numbers


def encode_captions(model: str, weights: Path, index: Path, out: Path, work: Path, precision: str = "auto") -> None:
    """Write the text features of all captions in `index` to `out` (…/{data set}.captions.npy) with a manifest (.json).

    float16 [m, d], L2-normalised, in the order of `core.captions.read_captions`; texts as they stand, no prompt
    around them. A text that occurs more than once is encoded once, so that equal texts have equal features to the
    last bit. Features live in `work` under a key of all that decides them.
    Errors: `InputError` for weights that fail their checksum or do not fit, captions that cannot be read, and
    features that are not finite.
    """
    image_ids, texts, _ = read_captions(index)
    distinct = sorted(set(texts))
    device = "cuda" if devices() else "cpu"
    facts = {
        "weights": io.check_sealed(weights)["files"],
        "code": provenance.code_hash(*NUMBERS, imports=False),
        "precision": [device, precision if device == "cuda" else str(compute_dtype(precision, device))],
    }
    store = work / f"{io.digest(facts, distinct)[:32]}.npy"
    if not store.is_file():
        tokens = load_tokenizer(weights)(distinct)
        with lease() as leased, torch.inference_mode():
            clip = load_clip(weights).to(device_of(leased))
            features = encode_tokens(clip, tokens, f"captions of {index.stem}", compute_dtype(precision, device))
        io.save_array(store, to_float16(features.cpu().numpy(), f"{model} on the captions of {index}"))
    row_of = {text: row for row, text in enumerate(distinct)}
    captions = io.load_array(store)[np.array([row_of[text] for text in texts])]
    io.save_array(out, captions)
    manifest = {
        "model": model,
        "dataset": out.name.removesuffix(".captions.npy"),
        "kind": "captions",
        "n": len(captions),
        "dim": captions.shape[1],
        "ids_sha256": io.ids_digest(image_ids),
        "captions_sha256": io.digest(texts),
        "embeddings_sha256": io.sha256_file(out),
        **facts,
    }
    io.write_json(out.with_suffix(".json"), manifest)
