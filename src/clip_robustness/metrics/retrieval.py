"""Zero-shot retrieval: the images that belong to a text, the texts that belong to an image, by cosine.

    image_recall@k   text to image: share of the captions whose image is among the k nearest images
    text_recall@k    image to text: share of the images of which at least one caption is among the k nearest
                     (CLIP's convention: one is enough, of five)

Two conventions of what belongs together:

    own_captions         an image and its own captions: what COCO and Flickr30k results are
    duplicates_positive  a text also belongs to every image that has the same text as a caption; where captions are
                         few distinct sentences, own_captions asks for what cannot be known

Ties count as what a random order of the tied would give on average, so a model that sees no difference scores at
chance: neither at 0, as with the worst order, nor at 1, as with the best. Equal features tie to the last bit,
because each distinct feature is compared once, however often it occurs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_robustness.core import io, statistics
from clip_robustness.core.captions import read_captions
from clip_robustness.core.features import open_embeddings
from clip_robustness.core.io import InputError
from clip_robustness.metrics.logits import stored_blocks
from clip_robustness.metrics.rows import Row, row

KS = (1, 5, 10)
QUERIES = 128  # scored at a time: with 25,000 in the gallery a block of scores is 13 MB


class Ranks(NamedTuple):
    """Of each query [q]: what stands above its best match in the gallery, and what ties with it."""

    above: np.ndarray
    tied_wrong: np.ndarray
    tied_right: np.ndarray


def rank(queries: np.ndarray, gallery: np.ndarray, conventions: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Ranks]:
    """Rank the best match of every query, once for each convention of what matches.

    queries [q, d] and gallery [g, d]: finite features. A convention: (query, match), both [p]: the pairs of rows that
    belong together, each pair once, at least one for every query. Memory: the gallery as float32, and QUERIES x g
    scores, which all conventions share.
    """
    distinct, entry, copies = _distinct(gallery)
    pairs, ranks = [], []
    for query, match in conventions:
        order = np.argsort(query, kind="stable")
        pairs.append((query[order], entry[match[order]]))
        ranks.append(Ranks(*(np.empty(len(queries), np.int64) for _ in Ranks._fields)))
    for start in range(0, len(queries), QUERIES):
        part = slice(start, min(start + QUERIES, len(queries)))
        scores = queries[part].astype(np.float32) @ distinct
        for (query, match), found in zip(pairs, ranks, strict=True):
            some = slice(*np.searchsorted(query, [part.start, part.stop]))
            counted = _rank_block(scores, copies, query[some] - start, match[some])
            for whole, values in zip(found, counted, strict=True):
                whole[part] = values
    return ranks


def _rank_block(scores: np.ndarray, copies: np.ndarray, query: np.ndarray, match: np.ndarray) -> Ranks:
    own = scores[query, match]
    best = np.full(len(scores), -np.inf, np.float32)
    np.maximum.at(best, query, own)
    # What scores higher than the best match is no match.
    above = np.einsum("qg,g->q", scores > best[:, None], copies)
    tied = np.einsum("qg,g->q", scores == best[:, None], copies)
    tied_right = np.bincount(query[own == best[query]], minlength=len(scores))
    return Ranks(above, tied - tied_right, tied_right)


def hits(ranks: Ranks, k: int) -> np.ndarray:
    """Probability [q] that a match is among the first k when what ties is put in random order: 0 or 1 without ties."""
    places = k - ranks.above
    missed = np.ones(len(places))
    for i in range(k):
        # The place i after those above goes to a wrong one, given that all before it did.
        wrong = np.maximum(ranks.tied_wrong - i, 0) / np.maximum(ranks.tied_wrong + ranks.tied_right - i, 1)
        missed *= np.where(i < places, wrong, 1)
    return 1 - missed


def retrieval_rows(
    images: np.ndarray,
    captions: np.ndarray,
    texts: Sequence[str],
    owner: np.ndarray,
    ks: Sequence[int] = KS,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """Rows of both directions under both conventions.

    images [n, d] and captions [m, d]: L2-normalised features; texts [m]; owner [m]: the image's row, of every image
    at least once. n is the number of queries. Intervals: `text_recall` Clopper-Pearson over images; `image_recall`
    a bootstrap over images with all their captions (`duplicates_positive`: over groups of images that share texts),
    which are not independent queries.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    text = np.array([number[t] for t in texts])
    caption, image = _same_text_pairs(text, owner)
    conventions = {
        "own_captions": (np.arange(len(texts)), owner, owner),
        "duplicates_positive": (caption, image, _groups(text, owner)),
    }
    to_image = rank(captions, images, [(caption, image) for caption, image, _ in conventions.values()])
    to_text = rank(images, captions, [(image, caption) for caption, image, _ in conventions.values()])
    alone = np.arange(len(images))
    rows = []
    for (name, (_, _, group)), by_text, by_image in zip(conventions.items(), to_image, to_text, strict=True):
        for k in ks:
            rows.append(_recall(f"image_recall@{k}", hits(by_text, k), group, name, resamples, seed))
            rows.append(_recall(f"text_recall@{k}", hits(by_image, k), alone, name, resamples, seed))
    return rows


def measure_retrieval(
    embeddings: Path,
    captions: Path,
    index: Path,
    out: Path,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> None:
    """Write `retrieval_rows` of one model to `out` (.json).

    embeddings: image features (.npy, manifest beside it); captions: text features (…captions.npy, manifest beside
    it); index: of the data set, with its captions. Images that the manifest lists as masked are left out, with
    their captions.
    Errors: `InputError` when a file is missing or damaged, holds a value that is not finite, or the files are not
    proven to be of one model and of the same images and captions in the same order.
    """
    ids, texts, owner = read_captions(index)
    images, about_images = _load(embeddings, "features")
    features, about_captions = _load(captions, "captions")
    for path, manifest in ((embeddings, about_images), (captions, about_captions)):
        if manifest["ids_sha256"] != io.ids_digest(ids):
            raise InputError(f"{path}: made from other images, or another order, than {index}; make it again")
    if about_captions["captions_sha256"] != io.digest(texts):
        raise InputError(f"{captions}: made from other captions than those of {index}; encode them again")
    for name in ("model", "weights"):  # features of two models cannot be compared
        if about_images[name] != about_captions[name]:
            raise InputError(f"{captions}: '{name}' of its manifest differs from {embeddings}'s; encode them again")
    kept = ~np.isin(ids, list(about_images.get("masked") or ()))
    position = np.cumsum(kept) - 1
    own = np.flatnonzero(kept[owner])
    rows = retrieval_rows(
        images if kept.all() else images[kept],
        features if kept.all() else features[own],
        [texts[i] for i in own],
        position[owner[own]],
        resamples=resamples,
        seed=seed,
    )
    manifest = {name: about_images[name] for name in ("model", "dataset", "ids_sha256", "n")}
    manifest |= {"masked": int((~kept).sum()), "captions": len(texts), "distinct_captions": len(set(texts))}
    who = {"model": manifest["model"], "dataset": manifest["dataset"], "source": "measured"}
    io.write_json(out, {"manifest": manifest, "rows": [{**who, **one} for one in rows]})


def _load(path: Path, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    array, manifest = open_embeddings(path)
    if manifest["kind"] != kind:
        raise InputError(f"{path}: holds {manifest['kind']}, expected {kind}; make it again")
    for _ in stored_blocks(array, name=str(path)):
        pass  # it names the row that is not finite
    return array, manifest


def _distinct(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct features as float32 columns [d, u], the column of each row [g], and how many rows each has [u]."""
    columns: dict[bytes, int] = {}
    # Adding 0 turns -0 into 0, which is equal and has other bytes.
    entry = np.array([columns.setdefault((row + 0).tobytes(), len(columns)) for row in features])
    del columns  # as large as the features themselves
    first = np.unique(entry, return_index=True)[1]
    return np.ascontiguousarray(features[first].T, dtype=np.float32), entry, np.bincount(entry)


def _same_text_pairs(text: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (caption, image) [p] such that the image has a caption of the same text; each pair once."""
    has = np.unique(np.column_stack([text, owner]), axis=0)
    start, stop = np.searchsorted(has[:, 0], text), np.searchsorted(has[:, 0], text, side="right")
    counts = stop - start
    caption = np.repeat(np.arange(len(text)), counts)
    within = np.arange(len(caption)) - np.repeat(np.cumsum(counts) - counts, counts)
    return caption, has[np.repeat(start, counts) + within, 1]


def _groups(text: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """A number for each caption [m]: the same for captions of one image, and of images that share a text."""
    group = owner.copy()
    while True:
        of_text = np.full(text.max() + 1, len(owner))
        np.minimum.at(of_text, text, group)
        of_image = np.full(owner.max() + 1, len(owner))
        np.minimum.at(of_image, owner, of_text[text])
        if np.array_equal(of_image[owner], group):
            return group
        group = of_image[owner]


def _recall(metric: str, found: np.ndarray, group: np.ndarray, convention: str, resamples: int, seed: int) -> Row:
    """The mean of `found` [q], with an interval over groups of queries that are not independent."""
    value = float(found.mean())
    _, group = np.unique(group, return_inverse=True)
    sizes = np.bincount(group)
    # One query a group: the binomial interval is exact. All or none found: a bootstrap would collapse to a point.
    if sizes.max() == 1 or value in (0.0, 1.0):
        low, high = (float(limit) for limit in statistics.clopper_pearson(value * len(sizes), len(sizes)))
    else:
        low, high = statistics.bootstrap_ratio(np.bincount(group, found), sizes, resamples, seed)
    return row(metric, value, min(low, value), max(high, value), len(found), convention=convention)
