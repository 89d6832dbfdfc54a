"""What a study holds: its models, its data sets, and what follows from the parts that they play in it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core.preprocessing import Preprocessing

# Which metric families a data set gets, by the part that it plays in a study. What has none is fetched and
# indexed on demand (`snakemake data`), and no model is run on it.
METRICS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "id": ("accuracy", "calibration"),
    "natural_shift": ("accuracy", "calibration"),
    "cue_conflict": ("shape_bias",),
    "pool": ("accuracy",),
    "train": (),
    "video_shift": (),
    "synthetic_shift": (),
    "corruption": (),
    "ood": (),
    "retrieval": (),
    "correspondence": (),
    "lmm": (),
    "annotation": (),
    "typographic": (),
    "attack": (),
}

# Which metric families a figure draws.
METRICS_OF_FIGURE = {
    "effective_robustness": ("accuracy",),
    "shape_bias": ("shape_bias",),
    "calibration": ("calibration",),
    "visual_factors": ("factors",),
    "retrieval": ("retrieval",),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One line of models.tsv. `weights` is `mini`, `hub:OWNER/NAME[@REVISION]` or `local:PATH`."""

    model: str
    title: str
    library: str
    architecture: str
    weights: str
    preprocess: str
    group: str
    family: str
    source: str
    train_images: int | None
    finetuning: str
    finetuned_on: str
    loss: str
    parent: str
    params_m: float
    image_size: int
    licence: str
    sets: tuple[str, ...]
    note: str = ""

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.parse(self.preprocess)

    @property
    def has_text_tower(self) -> bool:
        return self.library == "open_clip" and self.finetuning != "cross_entropy"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One entry of datasets.yaml. `details` holds what only its family and the download read."""

    name: str
    title: str
    family: str
    labels: str
    role: str
    suite: str
    sets: tuple[str, ...]
    licence: str
    images: int | None = None
    border_crop: int = 0
    access: str = "open"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        return METRICS_OF_ROLE[self.role]

    @property
    def archives(self) -> Sequence[Mapping[str, Any]]:
        """The files that it is downloaded as: file, and urls, bytes, sha256, md5 as far as they are known."""
        return self.details.get("archives", ())

    @property
    def hub(self) -> Mapping[str, Any]:
        """The model-hub repository that it is taken from, or nothing."""
        return self.details.get("hub", {})

    @property
    def annotates(self) -> str:
        """The data set whose images it is about, or '' where it has images of its own."""
        return self.details.get("from", "") if self.role == "annotation" else ""

    @property
    def is_rendered(self) -> bool:
        return "world" in self.details or "pool" in self.details

    @property
    def downloads(self) -> bool:
        """A program can bring all of it."""
        if self.archives:
            return all(archive.get("urls") for archive in self.archives)
        return bool(self.hub or self.is_rendered)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a config selects: its models and data sets, by name and in the files' order.

    `skipped`: what `skip_unavailable` left out, and `remarks`: what that changed.
    """

    name: str
    config: Mapping[str, Any]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    label_spaces: Mapping[str, Mapping[str, Any]]
    prompts: Mapping[str, Any]
    skipped: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def local(self, dataset: str) -> list[str]:
        """The folders and archives that the user has of a data set."""
        given = self.config["local"].get(dataset, [])
        return [str(Path(path).expanduser()) for path in ([given] if isinstance(given, str) else given)]

    @property
    def unavailable(self) -> dict[str, Dataset]:
        """Data sets that the user must do something for first: register, accept a licence, or name a copy."""
        return {name: dataset for name, dataset in self.datasets.items() if self._waits(name)}

    def _waits(self, name: str) -> bool:
        dataset = self.datasets[name]
        if dataset.annotates and self._waits(dataset.annotates):
            return True
        if self.local(name):
            return False
        accepted = dataset.access == "open" or name in self.config["accept"]
        return not (dataset.downloads and accepted)

    def figures_of(self, dataset: str) -> list[str]:
        """The study's figures that show a data set, or need it to show others."""
        metrics = set(self.datasets[dataset].metrics)
        return [f for f in self.config["figures"] if metrics & set(METRICS_OF_FIGURE[f])]

    def base_space(self, dataset: str) -> str:
        space = self.datasets[dataset].labels
        return self.label_spaces[space].get("base") or space

    @property
    def id_dataset(self) -> str:
        """The in-distribution set: every shift's partner, and the one that temperatures are fitted on."""
        ids = [name for name, dataset in self.datasets.items() if dataset.role == "id"]
        return self.config["id_dataset"] or (ids[0] if ids else "")

    def preprocessing(self, model: str, dataset: str) -> Preprocessing:
        """How `model` sees `dataset`: its own preprocessing, after the border that the data set is freed from."""
        return dataclasses.replace(self.models[model].preprocessing, border=self.datasets[dataset].border_crop)

    def partner(self, dataset: str) -> str:
        """The in-distribution partner of a shift, or '' where there is none."""
        if not self.id_dataset or dataset == self.id_dataset or self.datasets[dataset].role == "pool":
            return ""
        return self.id_dataset if self.base_space(dataset) == self.base_space(self.id_dataset) else ""

    @property
    def evaluated(self) -> list[str]:
        """Data sets that models are run on: those that some metric is measured on."""
        return [name for name, dataset in self.datasets.items() if dataset.metrics]

    @property
    def suites(self) -> dict[str, list[str]]:
        """Suite -> its data sets: one model load embeds all of a suite."""
        suites: dict[str, list[str]] = {}
        for name in self.evaluated:
            suites.setdefault(self.datasets[name].suite, []).append(name)
        return suites

    @property
    def base_spaces(self) -> list[str]:
        return sorted({self.base_space(name) for name in self.evaluated})

    def with_metric(self, metric: str) -> list[str]:
        """Data sets that count for a metric family (a pool is measured only to be filtered)."""
        return [n for n in self.evaluated if metric in self.datasets[n].metrics and self.datasets[n].role != "pool"]
