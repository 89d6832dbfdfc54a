"""Two-way questions about images to a model that answers in text: `ask`.

Each question is asked in both orders of its options. The image and the question are read once; from there the model
says how likely each option is as the answer, and then writes its own answer greedily.

What a model has answered lies in shards below a key of everything that decides the numbers, as in `embed`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_robustness.core import io, provenance
from clip_robustness.core.archive import ArchiveReader, load_index
from clip_robustness.core.failures import is_out_of_memory
from clip_robustness.core.io import InputError
from clip_robustness.core.lock import alone
from clip_robustness.inference.images import decode
from clip_robustness.inference.lease import lease
from clip_robustness.inference.load import compute_dtype, device_of
from clip_robustness.inference.vision_language import Answer, Lmm

SHARD = 256  # questions
BATCH = {"cuda": 16, "cpu": 4}  # prompts at once, halved when memory runs out
NUMBERS = ("inference.lmm", "inference.vision_language", "inference.images")
COLUMNS = ("selector", "selector_model", "image_id", "category", "label", "failure_label", "truth", "failure")


def ask(
    model: str,
    weights: Path,
    index: Path,
    questions: Sequence[Path],
    out: Path,
    work: Path,
    precision: str = "auto",
    quantise: int = 0,
    *,
    batch_size: int | str = "auto",
    max_new_tokens: int = 64,
) -> None:
    """Ask every question of `questions` (parquet files of `metrics.choice`) about the images of `index`.

    Two selectors that offer the same wrong class ask once. Writes `out` (parquet): a row a question, with the columns
    of the questions, `model`, the log-likelihoods `truth_logp` and `failure_logp` (true class named first) and
    `*_logp_swapped` (named last), `truth_tokens`, `failure_tokens`, and the greedy texts `answer` and `answer_swapped`
    (null when `max_new_tokens` is 0); beside it a manifest (.json). batch_size: prompts at once.
    Errors: `InputError` as of `Lmm`; for a question about an image that is not in the index or cannot be decoded, for
    logits that are not finite, and when one prompt does not fit the memory.
    """
    sealed = io.check_sealed(weights)
    asked = _read_questions(questions)
    columns = load_index(index)
    row_of = {image_id: row for row, image_id in enumerate(columns["image_id"])}
    if lacking := [image_id for image_id in asked["image_id"] if image_id not in row_of]:
        raise InputError(f"{questions[0]}: asks about '{lacking[0]}', which {index} does not have; write it again")
    keys = list(zip(asked["image_id"], asked["truth"], asked["failure"], strict=True))
    once = sorted(set(keys), key=lambda key: (row_of[key[0]], key[2]))
    with lease() as leased:
        device = device_of(leased).type
        dtype = compute_dtype(precision, device)
        used = [columns[name][[row_of[key[0]] for key in once]].tolist() for name in ("archive", "offset", "size")]
        files = {name: Path(name).stat() for name in sorted(set(used[0]))}
        identity = {
            "weights": sealed["files"],
            "questions": io.digest(once),
            "archives": io.digest([(s.st_size, s.st_mtime_ns) for s in files.values()], used[1], used[2]),
            "precision": str(dtype).removeprefix("torch."),
            "quantise": quantise,
            "max_new_tokens": max_new_tokens,
            "device": device,
            "code": provenance.code_hash(*NUMBERS, imports=False),
            "versions": provenance.versions(["torch", "transformers", "tokenizers", "pillow"]),
        }
        folder = work / io.digest(identity)[:32]
        with alone(folder):
            parts = [(folder / f"shard-{i:07d}.parquet", once[i : i + SHARD]) for i in range(0, len(once), SHARD)]
            missing = [part for part in parts if not part[0].is_file()]
            progress = io.Progress(f"{model} on {index.stem}", len(once), "questions")
            if done := len(once) - sum(len(some) for _, some in missing):
                progress.skip(done)
            if missing:
                lmm = Lmm(weights, device, dtype, quantise)
                size = BATCH[device] if batch_size == "auto" else int(batch_size)
                with ArchiveReader() as reader:
                    asker = _Asker(lmm, columns, row_of, reader, size, max_new_tokens, progress)
                    for path, some in missing:
                        io.write_parquet(path, asker(some))
            tables = [io.read_parquet(path) for path, _ in parts]
    answers = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    position = {key: row for row, key in enumerate(once)}
    rows = np.array([position[key] for key in keys])
    io.write_parquet(out, {"model": [model] * len(keys), **asked, **{n: column[rows] for n, column in answers.items()}})
    facts = {"model": model, "dataset": index.stem, "n": len(keys), "asked": len(once)}
    io.write_json(out.with_suffix(".json"), {**identity, **facts, "ids_sha256": io.ids_digest(asked["image_id"])})


class _Asker:
    """Questions (image id, true class, wrong class) in both orders, in batches that memory holds."""

    def __init__(
        self,
        lmm: Lmm,
        columns: Mapping[str, np.ndarray],
        row_of: Mapping[str, int],
        reader: ArchiveReader,
        batch_size: int,
        max_new_tokens: int,
        progress: io.Progress,
    ):
        self.lmm, self.columns, self.row_of, self.reader = lmm, columns, row_of, reader
        self.batch_size, self.max_new_tokens, self.progress = batch_size, max_new_tokens, progress

    def __call__(self, questions: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        prompts = [(i, *pair) for i, a, b in questions for pair in ((a, b), (b, a))]
        answers: list[Answer] = []
        while len(answers) < len(prompts):
            part = self._try(prompts[len(answers) : len(answers) + self.batch_size])
            if part is None:
                self._halve()
                continue
            before = len(answers) // 2
            answers += part
            self.progress.update(len(answers) // 2 - before)
        straight, swapped = answers[::2], answers[1::2]
        return {
            "truth_logp": [one.logp[0] for one in straight],
            "failure_logp": [one.logp[1] for one in straight],
            "truth_logp_swapped": [one.logp[1] for one in swapped],
            "failure_logp_swapped": [one.logp[0] for one in swapped],
            "truth_tokens": np.array([one.tokens[0] for one in straight], np.int32),
            "failure_tokens": np.array([one.tokens[1] for one in straight], np.int32),
            "answer": [one.text for one in straight],
            "answer_swapped": [one.text for one in swapped],
        }

    def _try(self, prompts: Sequence[tuple[str, str, str]]) -> list[Answer] | None:
        images = [self._image(image_id) for image_id, *_ in prompts]
        try:
            answers = self.lmm.answer(images, [(a, b) for _, a, b in prompts], self.max_new_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        for (image_id, *_), answer in zip(prompts, answers, strict=True):
            if not np.isfinite(answer.logp).all():
                remedy = "try `precision: fp32`, or fetch the weights again"
                raise InputError(f"{self.lmm.folder}, image '{image_id}': a logit is not finite; {remedy}")
        return answers

    def _image(self, image_id: str) -> Image.Image:
        row = self.row_of[image_id]
        archive, offset, size, codec = (self.columns[name][row] for name in ("archive", "offset", "size", "codec"))
        return decode(self.reader.read(archive, int(offset), int(size), image_id, codec), archive, image_id)

    def _halve(self) -> None:
        if self.batch_size == 1:
            raise InputError(f"out of {self.lmm.device.type} memory with a single image; set `quantise: 8` or 4")
        self.batch_size //= 2
        if self.lmm.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: {self.batch_size} prompts at once from here on", file=sys.stderr, flush=True)


def _read_questions(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    tables = [io.read_parquet(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if lacking := [name for name in (*COLUMNS, "selector_right") if name not in table]:
            raise InputError(f"{path}: no column '{lacking[0]}'; write the questions again")
    return {name: np.concatenate([table[name] for table in tables]) for name in (*COLUMNS, "selector_right")}
