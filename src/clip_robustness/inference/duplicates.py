"""Near-duplicates of a test set in reference corpora: the nearest reference of every image, by cosine.

The search is exact, by faiss, a block of references at a time: time grows with the corpus and memory does not. An
approximate index would not pay: to file N references under its c centroids takes N x c products and the search itself
N x q, and c, about 4 sqrt(N), passes the q = 10,000 images of a test set before N reaches 10 million. It would also
miss some copies, and so count contaminated images as clean.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import features, io
from clip_robustness.core.io import InputError

BLOCK = 32_768  # references at a time: 64 MiB of float32 at 512 dimensions
CANDIDATES = 4
QUERIES = 2048  # whose candidates are compared in double precision at a time
# More than the rounding of a float32 product of unit vectors, which depends on a row's place and the threads.
MARGIN = 1e-5


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: Path
    corpus: str
    n: int
    ids: np.ndarray | None
    masked: np.ndarray  # positions of images that could not be read
    itself: bool  # whether its rows are the images of the test set

    def name(self, row: int) -> str:
        return f"{self.path.name}:{row}" if self.ids is None else str(self.ids[row])


def find_duplicates(
    embeddings: Path,
    index: Path,
    references: Sequence[Path],
    out: Path,
    names: Sequence[str] = (),
    indexes: Sequence[Path] = (),
) -> None:
    """Write the nearest reference of every readable image of a test set to `out` (.parquet: a row an image).

    embeddings: features of the test set by the detector (.npy, manifest beside it); index: of the test set.
    references: .npy files of features, or folders of them, in order of their numbers; those of this project have a
    manifest, those made elsewhere (LAION's img_emb_*.npy) need not, and then only their dimension can be checked.
    names: of the corpora, one for each of `references`; default the data set, else the folder or file. indexes: of
    references made by this project ({data set}.parquet), which names matches by image id rather than file:row.
    Columns: image_id, match, corpus, similarity (float32 cosine; of equal ones the first corpus and its lowest row).
    Where a corpus is the test set itself, an image is not compared with itself. A manifest lies beside `out` (.json).
    Errors: `InputError` for features of another detector or dimension, that are not finite or not normalised, for ids
    that do not fit, and when there is nothing to compare with.
    Method: Radford et al. 2021 (CLIP), section 5 and appendix C.
    """
    manifest = features.read_manifest(embeddings)
    ids = features.read_index(index, manifest)["image_id"]
    shards = _shards(embeddings, manifest, references, names, indexes)
    readable = np.flatnonzero(~np.isin(ids, list(manifest.get("masked") or ())))
    search = _Search(features.unit_rows(embeddings)[readable], readable)
    progress = io.Progress(f"search {manifest['dataset']}", sum(shard.n for shard in shards), "references")
    for number, shard in enumerate(shards):
        for start in range(0, shard.n, BLOCK):
            rows = features.unit_rows(shard.path, start, start + BLOCK)
            search.add(number, start, rows, shard.masked - start, shard.itself)
            progress.update(len(rows))
    if (search.row < 0).any():
        raise InputError(f"{references[0]}: no reference to compare {embeddings} with; give a corpus")
    found = [shards[number] for number in search.shard]
    table = {
        "image_id": ids[readable],
        "match": [shard.name(row) for shard, row in zip(found, search.row, strict=True)],
        "corpus": [shard.corpus for shard in found],
        "similarity": search.similarity,
    }
    io.write_parquet(out, table)
    sizes: dict[str, int] = {}
    for shard in shards:
        sizes[shard.corpus] = sizes.get(shard.corpus, 0) + shard.n - len(shard.masked)
    facts = {name: manifest.get(name) for name in ("model", "dataset", "ids_sha256", *features.DETECTOR)}
    io.write_json(out.with_suffix(".json"), {**facts, "n": len(readable), "references": sizes})


class _Search:
    """The nearest reference so far of each query [q, d]; `own`: its row in the test set."""

    def __init__(self, queries: np.ndarray, own: np.ndarray):
        self.queries, self.own = queries, own
        self.similarity = np.full(len(queries), -np.inf, np.float32)
        self.shard = np.full(len(queries), -1)
        self.row = np.full(len(queries), -1)

    def add(self, shard: int, start: int, rows: np.ndarray, masked: np.ndarray, itself: bool) -> None:
        """Compare with the unit rows `start` and on of a shard; `masked` [m] of them are left out.

        faiss finds in single precision whose best may have changed; only these few are compared in double precision,
        so that the result depends neither on blocks nor on threads.
        """
        import faiss

        # One copy is enough, and an image of the test set itself must find another than its own.
        distinct = _distinct(rows, masked, 2 if itself else 1)
        if not len(distinct):
            return
        rows = rows if len(distinct) == len(rows) else rows[distinct]
        inner = faiss.METRIC_INNER_PRODUCT
        top, _ = faiss.knn(self.queries, rows, 1, metric=inner)
        contenders = np.flatnonzero(top[:, 0] >= self.similarity - MARGIN)
        for some in np.split(contenders, range(QUERIES, len(contenders), QUERIES)):
            _, near = faiss.knn(self.queries[some], rows, min(CANDIDATES, len(rows)), metric=inner)
            near = np.sort(near, axis=1)
            exact = np.einsum("qd,qkd->qk", self.queries[some].astype(float), rows[near].astype(float))
            near = distinct[near] + start
            if itself:
                exact[near == self.own[some, None]] = -np.inf
            first = exact.astype(np.float32).argmax(axis=1)[:, None]
            best = np.take_along_axis(exact, first, axis=1)[:, 0].astype(np.float32)
            better = best > self.similarity[some]
            improved = some[better]
            self.similarity[improved], self.shard[improved] = best[better], shard
            self.row[improved] = np.take_along_axis(near, first, axis=1)[better, 0]


def _distinct(rows: np.ndarray, masked: np.ndarray, most: int) -> np.ndarray:
    """Positions of the first `most` of equal rows. One picture may be in a corpus more often than CANDIDATES."""
    left_out = set(masked.tolist())
    count: dict[bytes, int] = {}
    kept = []
    for position, row in enumerate(rows):
        key = row.tobytes()
        count[key] = count.get(key, 0) + (position not in left_out)
        if position not in left_out and count[key] <= most:
            kept.append(position)
    return np.array(kept, np.int64)


def _shards(
    embeddings: Path,
    manifest: dict[str, Any],
    references: Sequence[Path],
    names: Sequence[str],
    indexes: Sequence[Path],
) -> list[_Shard]:
    if names and len(names) != len(references):
        raise InputError(f"{len(names)} names for {len(references)} references: {', '.join(names)}; name each, or none")
    by_stem = {path.stem: path for path in indexes}
    shards = []
    for number, reference in enumerate(references):
        paths = sorted(reference.glob("*.npy"), key=_by_number) if reference.is_dir() else [reference]
        if not paths:
            raise InputError(f"{reference}: no .npy file in this folder; expected shards of features")
        for path in paths:
            name = names[number] if names else ""
            shards.append(_shard(path, name or reference.stem, bool(name), embeddings, manifest, by_stem))
    return shards


def _shard(
    path: Path, name: str, named: bool, embeddings: Path, manifest: dict[str, Any], indexes: dict[str, Path]
) -> _Shard:
    shape = io.load_array(path).shape
    if len(shape) != 2 or shape[1] != manifest["dim"]:
        raise InputError(
            f"{path}: shape {shape}, expected [n, {manifest['dim']}] as of {embeddings}; is it of the same detector?"
        )
    if not path.with_suffix(".json").is_file():
        return _Shard(path, name, shape[0], None, np.empty(0, np.int64), False)
    own = features.read_manifest(path)
    features.check_detector(path, own, embeddings, manifest)
    itself = own["ids_sha256"] == manifest["ids_sha256"]
    if own["dataset"] == manifest["dataset"] and not itself:
        raise InputError(f"{path}: other images of {own['dataset']!r} than {embeddings}; embed the data set again")
    index, unread = indexes.get(own["dataset"]), own.get("masked") or ()
    if unread and index is None:
        raise InputError(f"{path}: {len(unread):,} of its images could not be read; give the index that tells which")
    ids = None if index is None else features.read_index(index, own)["image_id"]
    masked = np.empty(0, np.int64) if ids is None else np.flatnonzero(np.isin(ids, list(unread)))
    return _Shard(path, name if named else own["dataset"], shape[0], ids, masked, itself)


def _by_number(path: Path) -> tuple[list[int], str]:
    """img_emb_2 before img_emb_10."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name
