"""Classes that a model gets unusually wrong or right, and images that it alone gets wrong, from its predictions."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clip_robustness.core import archive, io, statistics
from clip_robustness.core.io import InputError

MOST_IMAGES = 6  # pictures of a card
LARGEST_PICTURE = 64_000  # bytes
_TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"))
CLASS_COLUMNS = ("model", "dataset", "class", "value", "low", "high", "others", "difference", "n")


class Predictions:
    """Which images of a data set its models get right: `right` [models, images], -1 where there is no prediction."""

    def __init__(self, dataset: str, files: Mapping[str, Path], labels: Path):
        self.dataset, self.models = dataset, sorted(files)
        self.classes = [str(name) for name in io.read_json(labels)["classes"]]
        ids: np.ndarray = np.array([], object)
        for place, model in enumerate(self.models):
            table = io.read_parquet(files[model], ["image_id", "label", "prediction"])
            kept = table["label"] >= 0
            own, label = table["image_id"][kept].astype(str), table["label"][kept].astype(int)
            if place == 0:
                order = np.argsort(own, kind="stable")
                ids, self.labels = own[order], label[order]
                self.right = np.full((len(self.models), len(ids)), -1, np.int8)
            at = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
            known = ids[at] == own
            self.right[place, at[known]] = (label == table["prediction"][kept])[known]
        if len(self.labels) and self.labels.max() >= len(self.classes):
            raise InputError(f"{labels}: {len(self.classes)} classes, and a label {self.labels.max()}; measure again")
        self.ids = ids

    def classes_of_models(self, groups: Mapping[str, str]) -> pd.DataFrame:
        """A row a model and class (CLASS_COLUMNS): its accuracy with a Clopper-Pearson interval; the mean of the other
        models of its group (of all, where there are fewer than two); and the difference."""
        known = self.right >= 0
        one_hot = np.zeros((len(self.ids), len(self.classes)), np.float32)
        one_hot[np.arange(len(self.ids)), self.labels] = 1
        n, hits = known.astype(np.float32) @ one_hot, (self.right == 1).astype(np.float32) @ one_hot
        with np.errstate(invalid="ignore"):
            accuracy = hits / n
        low, high = statistics.clopper_pearson(hits, n)
        others = np.stack([np.nanmean(accuracy[self._others(place, groups)], axis=0) for place in range(len(n))])
        columns = {"value": accuracy, "low": low, "high": high, "others": others, "difference": accuracy - others}
        table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
        table = table.assign(
            model=np.repeat(self.models, len(self.classes)),
            dataset=self.dataset,
            n=n.ravel().astype(int),
            **{"class": np.tile(self.classes, len(self.models))},
        )
        return table[table["n"] > 0].dropna(subset=["others"])[list(CLASS_COLUMNS)]

    def _others(self, place: int, groups: Mapping[str, str]) -> list[int]:
        rest = [other for other in range(len(self.models)) if other != place]
        same = [o for o in rest if groups.get(self.models[o]) == groups.get(self.models[place])]
        return same if len(same) >= 2 else rest or [place]

    def alone_wrong(self, model: str) -> list[tuple[str, str, float]]:
        """(image id, class, share of the other models that are right) of images that the model gets wrong, and most
        others right; the largest share first."""
        if model not in self.models or len(self.models) < 2:
            return []
        place = self.models.index(model)
        others = np.delete(self.right, place, axis=0)
        counted = (others >= 0).sum(axis=0)
        share = np.where(counted > 0, (others == 1).sum(axis=0) / np.maximum(counted, 1), 0.0)
        rows = np.flatnonzero((self.right[place] == 0) & (share > 0.5))
        best = sorted(rows, key=lambda row: (-share[row], self.ids[row]))[:MOST_IMAGES]
        return [(str(self.ids[row]), self.classes[self.labels[row]], float(share[row])) for row in best]


class Pictures:
    """Images of data sets, by their index, as data URIs; only of data sets whose licence lets them be shown."""

    def __init__(self, indexes: Mapping[str, Path]):
        self._reader = archive.ArchiveReader()
        self._rows: dict[str, dict[str, Any]] = {}
        for dataset, path in indexes.items():
            index = archive.load_index(path)
            places = {image_id: place for place, image_id in enumerate(index["image_id"])}
            self._rows[dataset] = {"index": index, "places": places}

    def has(self, dataset: str) -> bool:
        return dataset in self._rows

    def uri(self, dataset: str, image_id: str) -> str:
        """ "" where there is none, or it is of another format than PNG and JPEG, or too large for a page."""
        found = self._rows.get(dataset)
        if found is None or image_id not in found["places"]:
            return ""
        index, row = found["index"], found["places"][image_id]
        codec = str(index["codec"][row]) if "codec" in index else ""
        content = self._reader.read(
            str(index["archive"][row]), int(index["offset"][row]), int(index["size"][row]), image_id, codec
        )
        kind = next((kind for start, kind in _TYPES if content.startswith(start)), "")
        if not kind or len(content) > LARGEST_PICTURE:
            return ""
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def by_dataset(paths: Iterable[Path]) -> dict[str, dict[str, Path]]:
    """Data set -> model -> file, of predictions that lie as {model}/{dataset}.parquet."""
    found: dict[str, dict[str, Path]] = {}
    for path in map(Path, paths):
        found.setdefault(path.stem, {})[path.parent.name] = path
    return found
