"""The captions of an image-text data set, as its index holds them."""

import json
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError


def read_captions(index: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(image ids [n], texts [m], owner [m]): every caption of every image, and the row of the image that it is of.

    They stand in the index's column `captions` (a JSON list of texts an image) or `caption` (one text an image), and
    come in the order of the index. Errors: `InputError` for an index without either, and for an image without a text.
    """
    table = io.read_parquet(index)
    if "captions" in table:
        lists = [_texts(cell, f"{index}, row {row}") for row, cell in enumerate(table["captions"])]
    elif "caption" in table:
        lists = [[str(text)] for text in table["caption"]]
    else:
        raise InputError(f"{index}: no column 'captions' or 'caption'; retrieval needs a data set with captions")
    owner = np.repeat(np.arange(len(lists)), [len(texts) for texts in lists])
    return table["image_id"], [text for texts in lists for text in texts], owner


def _texts(cell: str, where: str) -> list[str]:
    try:
        texts = json.loads(cell)
    except (TypeError, ValueError):
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: 'captions' is {cell!r}, expected a JSON list of texts; index the data set again")
    return texts
