"""Logits: the zero-shot head, restriction to a label space, softmax, and the top answer.

Everything is float32 and works row by row, so that 50,000 x 1,000 never has to be in memory at once.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from clip_robustness.core.io import InputError

# Rows a block: large enough for a fast matrix product, small enough for the caches (1 MB at 1,000 classes).
BLOCK = 256
# Blocks of a mapped file that stay in memory once they are read: 32 MB of float16 at 1,000 columns.
KEPT = 64
# exp(-40) is 4e-18: nothing beside the top's 1. The squares of smaller ones are denormal numbers, ten times slower.
SMALLEST_EXPONENT = np.float32(-40)


def zero_shot_blocks(
    features: np.ndarray,
    weight: np.ndarray,
    scale: float = 1.0,
    bias: float = 0.0,
    rows: np.ndarray | None = None,
    name: str = "features",
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (positions, scale * features[rows] @ weight.T + bias) block by block, float32 [block, C].

    features [n, d] float16 or float32 (may be a memory map), weight [C, d], rows: indices (None: all);
    positions count within `rows`. The array is reused for the next block: copy what must stay.
    Errors: InputError that names file and row when a feature is NaN or infinite.
    """
    head = np.ascontiguousarray(weight.T, dtype=np.float32) * np.float32(scale)
    buffer = np.empty((BLOCK, head.shape[1]), np.float32)
    for part, values in stored_blocks(features, rows, name):
        logits = buffer[: len(values)]
        np.matmul(values, head, out=logits)
        if bias:
            logits += np.float32(bias)
        yield part, logits


def stored_blocks(
    array: np.ndarray, rows: np.ndarray | None = None, name: str = "logits"
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (positions, array[rows] as float32) block by block, checked and reused as in `zero_shot_blocks`."""
    count = len(array) if rows is None else len(rows)
    buffer = np.empty((min(BLOCK, count), *array.shape[1:]), np.float32)
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        values = buffer[: part.stop - start]
        values[:] = array[part if rows is None else rows[part]]
        finite = np.isfinite(values)
        if not finite.all():
            bad = start + int(np.flatnonzero(~finite.all(axis=1))[0])
            number = bad if rows is None else rows[bad]
            raise InputError(f"{name}: row {number}: a value is NaN or infinite; delete it and embed again")
        yield part, values
        if start // BLOCK % KEPT == KEPT - 1:
            _give_back(array)
    _give_back(array)


def _give_back(array: np.ndarray) -> None:
    """Take what was read of a mapped file out of the process's memory: a larger file than that can be read."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def zero_shot_logits(features: np.ndarray, weight: np.ndarray, scale: float = 1.0, bias: float = 0.0) -> np.ndarray:
    """All logits at once, float32 [n, C]: see `zero_shot_blocks`."""
    logits = np.empty((len(features), len(weight)), np.float32)
    for part, block in zero_shot_blocks(features, weight, scale, bias):
        logits[part] = block
    return logits


def restrict(logits: np.ndarray, members: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits [n, C] of the base space to logits [n, K]: for each class the maximum over its members.

    This comes before any softmax (masked spaces such as ImageNet-A and -R; wise-ft's pooling of ObjectNet and
    the video sets). Errors: InputError when a class has no member or a member is not a base class.
    """
    return restriction(members, logits.shape[1])(logits)


def restriction(members: Sequence[Sequence[int]], classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """`restrict` for many blocks of logits over `classes` base classes: `members` is checked only once."""
    _check_members(members, classes)
    if len(members) == classes and all(list(member) == [i] for i, member in enumerate(members)):
        return lambda logits: logits
    first = [member[0] for member in members]
    further = []
    for position in range(1, max(map(len, members))):
        longer = [k for k, member in enumerate(members) if len(member) > position]
        further.append((longer, [members[k][position] for k in longer]))

    def pool(logits: np.ndarray) -> np.ndarray:
        pooled = logits[:, first]
        for longer, indices in further:
            pooled[:, longer] = np.maximum(pooled[:, longer], logits[:, indices])
        return pooled

    return pool


def category_probabilities(logits: np.ndarray, members: Sequence[Sequence[int]]) -> np.ndarray:
    """Softmax over the whole base space, then the mean over the members of each category -> [n, K].

    The 16-way decision of the cue-conflict literature (rgeirhos/texture-vs-shape). Rows do not sum to 1.
    """
    _check_members(members, logits.shape[1])
    mean = np.zeros((logits.shape[1], len(members)), np.float32)
    for category, indices in enumerate(members):
        # Adding, so that a base class that is listed twice counts twice in the mean.
        np.add.at(mean[:, category], list(indices), 1 / len(indices))
    return softmax(logits) @ mean


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """exp(logits / temperature), normalised over the last axis; safe for any finite logits."""
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / np.float32(temperature)
    np.exp(scaled, out=scaled)
    return scaled / scaled.sum(axis=-1, keepdims=True)


def top1(logits: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class (int32) and its softmax probability (float32) for each row; ties go to the first class.

    The probability is 1 / sum(exp(difference to the top)), which never exceeds 1.
    Errors: InputError that names the row when a logit is NaN or infinite.
    """
    prediction, differences = from_top(logits)
    return prediction, 1 / exponentials(differences, temperature, out=differences).sum(axis=1)


def from_top(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class (int32), and every logit's difference to that class's: [n] and [n, K]. Errors as of `top1`."""
    prediction = logits.argmax(axis=1)
    top = np.take_along_axis(logits, prediction[:, None], axis=1)
    # argmax finds a NaN first; minus infinity shows in the sum, which is finite for finite logits.
    with np.errstate(invalid="ignore"):
        differences = logits - top
        bad = np.flatnonzero(~np.isfinite(differences.sum(axis=1)))
    if len(bad):
        raise InputError(f"logits: row {bad[0]}: a value is NaN or infinite; compute them again")
    return prediction.astype(np.int32), differences


def exponentials(differences: np.ndarray, temperature: float = 1.0, out: np.ndarray | None = None) -> np.ndarray:
    """exp(differences / temperature), of what `from_top` found: the softmax, but for its sum. `out`: where to."""
    scaled = np.divide(differences, np.float32(temperature), out=out)
    np.maximum(scaled, SMALLEST_EXPONENT, out=scaled)
    return np.exp(scaled, out=scaled)


def negative_log_likelihood(
    logits: np.ndarray,
    labels: np.ndarray,
    prediction: np.ndarray,
    confidence: np.ndarray,
    temperature: float = 1.0,
) -> np.ndarray:
    """-log softmax(logits / temperature)[label] in nats, float64 [n], from what `top1` found."""
    everyone = np.arange(len(labels))
    gap = logits[everyone, prediction].astype(float) - logits[everyone, labels]
    return gap / temperature - np.log(confidence.astype(float))


def _check_members(members: Sequence[Sequence[int]], classes: int) -> None:
    for position, indices in enumerate(members):
        if not indices or min(indices) < 0 or max(indices) >= classes:
            raise InputError(
                f"label space: members[{position}] = {list(indices)}; expected at least one index in "
                f"0..{classes - 1}: is this the space of these logits?"
            )
