"""What a study holds: its models, its data sets, and what follows from the parts that they play in it."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core.preprocessing import Preprocessing

# Which metric families a data set gets, by the part that it plays in a study. What has none is fetched and
# indexed on demand (`snakemake data`), and no model is run on it.
METRICS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "id": ("accuracy", "calibration", "prompts"),
    "natural_shift": ("accuracy", "calibration", "prompts"),
    "cue_conflict": ("shape_bias",),
    "pool": ("accuracy",),
    "train": (),
    "video_shift": ("accuracy",),
    "synthetic_shift": ("accuracy",),
    "corruption": ("accuracy",),
    "corruption_3d": ("accuracy",),
    "ood": ("ood", "prompts"),
    "retrieval": ("retrieval",),
    "correspondence": (),
    "lmm": (),
    "annotation": ("factors",),
    "clean": ("accuracy",),  # what a typographic set is drawn from
    "typographic": ("typographic",),
    "corpus": (),
    "copies": (),
}
# Those that data sets are measured for because the config names models, pairs or questions for it.
METRICS_OF_CONFIG = ("adversarial", "data_overlap", "correspondence", "choice")
METRICS = tuple(dict.fromkeys([*(m for metrics in METRICS_OF_ROLE.values() for m in metrics), *METRICS_OF_CONFIG]))
TESTBED_PGD = ("pgd_linf_0.5", "pgd_linf_2", "pgd_l2_0.1", "pgd_l2_0.5")  # the third synthetic shift of Taori et al.

# Which metric families a figure draws.
METRICS_OF_FIGURE = {
    "effective_robustness": ("accuracy",),
    "shape_bias": ("shape_bias",),
    "calibration": ("calibration",),
    "visual_factors": ("factors",),
    "retrieval": ("retrieval",),
    "ood_detection": ("ood",),
    "prompts": ("prompts",),
    "natural_shifts": ("accuracy",),
    "synthetic_shifts": ("accuracy",),
    "corruption_3d": ("accuracy",),
    "correspondence": ("correspondence",),
    "lmm": ("choice",),
    "adversarial": ("adversarial",),
    "typographic": ("typographic",),
    "data_overlap": ("data_overlap",),
    "six_factors": ("accuracy",),
    "claims": ("accuracy",),
    "reproduction": ("accuracy",),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One line of models.tsv; config/schemas/model.schema.yaml says what each field may hold."""

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
    released: str
    finetuning: str
    finetuned_on: str
    loss: str
    parent: str
    prompts: str
    params_m: float | None
    gflops: float | None
    image_size: int | None
    licence: str
    published: str
    top1: float | None
    listed: tuple[str, ...]
    note: str = ""

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.parse(self.preprocess)

    @property
    def has_text_tower(self) -> bool:
        return self.library == "open_clip" and self.finetuning != "cross_entropy"

    @property
    def answers_in_text(self) -> bool:
        """It writes, and gives neither features nor logits of classes."""
        return self.library == "transformers"

    @property
    def weight_bytes(self) -> int:
        """About, of its files: most are stored in float32, and those of models that answer in text in float16."""
        return round((self.params_m or 0) * 1e6 * (2 if self.answers_in_text else 4))

    @property
    def scheme(self) -> str:
        """Where its weights come from: hub, local, blend, mini, or predictions (nothing is computed then)."""
        return self.weights.partition(":")[0]

    @functools.cached_property
    def predictions(self) -> Mapping[str, Path]:
        """Data set -> file, of a model whose outputs the user has."""
        if self.scheme != "predictions":
            return {}
        folder = Path(self.weights.partition(":")[2]).expanduser()
        return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in (".npy", ".parquet")}

    @functools.cached_property
    def blended(self) -> tuple[str, str, float]:
        """(parent, fine-tuned model, the latter's share) of `blend:PARENT+FINETUNED@SHARE`."""
        names, _, share = self.weights.removeprefix("blend:").rpartition("@")
        parent, _, finetuned = names.partition("+")
        return parent, finetuned, float(share)


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
    cropped: bool = False
    models: tuple[str, ...] = ()
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
        return not {"world", "pool", "habits", "corrupt", "combine"}.isdisjoint(self.details)

    @property
    def derive(self) -> Mapping[str, Any]:
        """How its archive is made from another data set (`from`), or nothing."""
        return self.details.get("derive", {})

    @property
    def needs(self) -> str:
        """The data set that it is made from or that it is about, or ''."""
        return self.annotates or self.derive.get("from", "")

    @property
    def downloads(self) -> bool:
        """A program can bring all of it."""
        if self.derive:
            return True
        if self.archives:
            return all(archive.get("urls") for archive in self.archives)
        return bool(self.hub or self.is_rendered)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a config selects: its models and data sets, by name and in the files' order.

    `sets_of_model`: the model sets that each model is in.
    `skipped`: what `skip_unavailable` left out, and `remarks`: what that changed.
    """

    name: str
    config: Mapping[str, Any]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    label_spaces: Mapping[str, Mapping[str, Any]]
    prompts: Mapping[str, Any]
    sets_of_model: Mapping[str, set[str]] = dataclasses.field(default_factory=dict)
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
        if dataset.needs and self._waits(dataset.needs):
            return True
        accepted = dataset.access == "open" or name in self.config["accept"]
        return not (dataset.downloads and accepted)

    def metrics_of(self, dataset: str) -> set[str]:
        """The metric families that a data set counts for: by its role, or because the config has it measured so."""
        metrics = {metric for metric in METRICS_OF_CONFIG if any(name == dataset for _, name in self.measured(metric))}
        return {*self.datasets[dataset].metrics, *metrics, *(["data_overlap"] if dataset in self.searched else [])}

    def figures_of(self, dataset: str) -> list[str]:
        """The study's figures that show a data set, or need it to show others."""
        metrics = self.metrics_of(dataset)
        return [f for f in self.config["figures"] if metrics & set(METRICS_OF_FIGURE[f])]

    def base_space(self, dataset: str) -> str:
        space = self.datasets[dataset].labels
        return self.label_spaces[space].get("base") or space

    @functools.cached_property
    def id_dataset(self) -> str:
        """The in-distribution set: every shift's partner, and the one that temperatures are fitted on."""
        ids = [name for name, dataset in self.datasets.items() if dataset.role == "id"]
        return self.config["id_dataset"] or (ids[0] if ids else "")

    def preprocessing(self, model: str, dataset: str) -> Preprocessing:
        """How `model` sees `dataset`: its own preprocessing, after the border that the data set is freed from."""
        own = self.models[model].preprocessing
        own = own.of_cropped if self.datasets[dataset].cropped else own
        return dataclasses.replace(own, border=self.datasets[dataset].border_crop)

    def partner(self, dataset: str) -> str:
        """The in-distribution partner of a shift, or '' where there is none."""
        if not self.id_dataset or dataset == self.id_dataset or self.datasets[dataset].role == "pool":
            return ""
        return self.id_dataset if self.base_space(dataset) == self.base_space(self.id_dataset) else ""

    @functools.cached_property
    def evaluated(self) -> list[str]:
        """Data sets that models are run on: those with images of their own that some metric needs."""
        needed = {*self.searched, *self.questioned, *(search["dataset"] for search in self.searches.values())}
        return [n for n, d in self.datasets.items() if (d.metrics and not d.annotates) or n in needed]

    @property
    def overlap(self) -> Mapping[str, Any]:
        """How test images are looked for in training corpora, or nothing."""
        overlap = self.config["overlap"]
        return overlap if overlap["detector"] else {}

    @functools.cached_property
    def searched(self) -> list[str]:
        """Data sets whose images the detector looks at: the tested ones, the corpora, and the labelled pairs."""
        named = (*self.overlap.get("datasets", ()), *self.overlap.get("corpora", ()), self.overlap.get("copies", ""))
        pairs = [self.datasets[name].needs for name in named[-1:] if name in self.datasets]
        return [name for name in self.datasets if name in {*named, *pairs}]

    @functools.cached_property
    def questioned(self) -> list[str]:
        """Data sets whose images two-way questions are asked about: none where a selector is not in this study."""
        selectors = self.config["lmm"]["selectors"].values()
        able = selectors and all(name in self.models for name in selectors)
        return [name for name, dataset in self.datasets.items() if dataset.role == "lmm" and able]

    @functools.cached_property
    def choosers(self) -> list[str]:
        """CLIPs and classifiers that choose between two classes by their logits: the selectors, and those named."""
        named = {*self.config["lmm"]["selectors"].values(), *self.config["lmm"]["references"]}
        return [name for name in self.models if name in named]

    @property
    def asked(self) -> list[tuple[str, str]]:
        """(model that answers in text, data set)."""
        texts = [name for name, model in self.models.items() if model.answers_in_text]
        return [(m, d) for d in self.questioned for m in texts if self.is_for(m, d)]

    @functools.cached_property
    def attacked(self) -> list[str]:
        """Models that are attacked."""
        return self.named_models(self.config["attacks"]["models"])

    def named_models(self, names: Sequence[str]) -> list[str]:
        """Models that are run here, of those that a config names one by one or by set."""
        wanted = set(names)
        return [m for m in self.computed if m in wanted or wanted & self.sets_of_model.get(m, set())]

    @functools.cached_property
    def suites(self) -> dict[str, list[str]]:
        """Suite -> its data sets: one model load embeds all of a suite."""
        suites: dict[str, list[str]] = {}
        for name in self.evaluated:
            suites.setdefault(self.datasets[name].suite, []).append(name)
        return suites

    def answers(self, model: str, dataset: str) -> bool:
        """Whether there can be outputs of `model` on `dataset`: not where its user gives none."""
        return bool(dataset) and (
            self.models[model].scheme != "predictions" or dataset in self.models[model].predictions
        )

    def is_for(self, model: str, dataset: str) -> bool:
        """Whether a data set is meant for a model, and asks for classes that it can answer with."""
        sets = self.datasets[dataset].models
        if sets and not set(sets) & self.sets_of_model.get(model, set()):
            return False
        if self.models[model].answers_in_text:
            return dataset in self.questioned
        if self.models[model].has_text_tower or not self.id_dataset:
            return True
        return self.base_space(dataset) == self.base_space(self.id_dataset)  # a classifier knows those of its training

    def weights_of(self, model: str) -> str:
        """The first model of the study with the same weights: two lines may differ in their prompts only."""
        return self._weights_of[model]

    @functools.cached_property
    def _weights_of(self) -> dict[str, str]:
        first: dict[tuple[str, ...], str] = {}
        found = {}
        for name, model in self.models.items():
            own = (name,) if model.scheme == "mini" else ()  # trained here, each its own
            found[name] = first.setdefault((model.library, model.architecture, model.weights, *own), name)
        return found

    def prompts_of(self, model: str) -> str:
        """The prompt set that a model's metrics use."""
        return self.models[model].prompts or self.config["prompts"]["default"]

    @functools.cached_property
    def computed(self) -> list[str]:
        """Models whose embeddings are computed here, and not read from their user's files."""
        return [n for n, m in self.models.items() if m.scheme != "predictions" and not m.answers_in_text]

    @property
    def weighted(self) -> list[str]:
        """Models whose weights are kept: those that are run here, and of several with the same weights the first."""
        run = {*self.computed, *(name for name, _ in self.asked)}
        return [name for name in self.models if name in run and self.weights_of(name) == name]

    @functools.cached_property
    def cached_pixels(self) -> set[tuple[str, str]]:
        """(key of a pixel spec, data set) whose pixels are kept on disk; those of others are decoded for each model.

        Those that most models share come first, the smaller before the larger, as far as `pixel_cache_gb` goes.
        """
        sharing: collections.Counter[tuple[str, str]] = collections.Counter()
        sizes: dict[tuple[str, str], int] = {}
        for model in self.computed:
            for name in (name for name in self.evaluated if self.is_for(model, name)):
                spec = self.preprocessing(model, name)
                sharing[spec.key, name] += 1
                sizes[spec.key, name] = 3 * spec.size[0] * spec.size[1] * (self.datasets[name].images or 0)
        room, kept = self.config["pixel_cache_gb"] * 1e9, set()
        for pair in sorted(sharing, key=lambda pair: (-sharing[pair], sizes[pair], pair)):
            if sizes[pair] <= room:
                kept.add(pair)
                room -= sizes[pair]
        return kept

    @functools.cached_property
    def base_spaces(self) -> list[str]:
        return sorted({self.base_space(name) for name in self.evaluated})

    @property
    def natural_shifts(self) -> list[str]:
        """Those that the average is over: the ones that the config names, as far as they are there, or all."""
        roles = ("natural_shift", "video_shift")
        natural = [name for name, dataset in self.datasets.items() if dataset.role in roles]
        return [name for name in self.config["average"] if name in natural] or natural

    @property
    def synthetic_shifts(self) -> list[str]:
        """The synthetic shifts as the table of them takes them: a name, or a name and the parts that it is made of.

        Data sets that say that they are `part_of` one shift are one. The testbed's attacks are another.
        """
        shifts: dict[str, list[str]] = {}
        for name, dataset in self.datasets.items():
            if dataset.role in ("synthetic_shift", "corruption") and dataset.metrics:
                shifts.setdefault(dataset.details.get("part_of", name), []).append(name)
        pgd = [f"{self.id_dataset}:{attack}" for attack in TESTBED_PGD if attack in self.config["attacks"]["names"]]
        if pgd and self.attacked:
            shifts[f"{self.id_dataset.removesuffix('_val')}_pgd"] = pgd
        return [name if parts == [name] else f"{name}={'+'.join(parts)}" for name, parts in shifts.items()]

    def with_metric(self, metric: str) -> list[str]:
        """Data sets that count for a metric family (a pool is measured only for what is made of it)."""
        return [n for n, d in self.datasets.items() if metric in d.metrics and d.role != "pool"]

    def measured(self, metric: str) -> list[tuple[str, str]]:
        """(model, data set) of every job of a metric family."""
        return self._measured[metric]

    @functools.cached_property
    def _measured(self) -> dict[str, list[tuple[str, str]]]:
        found = {
            "adversarial": [(m, self.id_dataset) for m in self.attacked if self.config["attacks"]["names"]],
            "correspondence": [
                (m, name)
                for name, dataset in self.datasets.items()
                if dataset.role == "correspondence"
                for m in self.named_models(self.config["correspondence"]["models"])
            ],
            "choice": [*((m, d) for d in self.questioned for m in self.choosers), *self.asked],
            "data_overlap": [
                (m, d)
                for d in self.overlap.get("datasets", ())
                for m in self.models
                if "accuracy" in self.datasets[d].metrics and self._can_measure("accuracy", m, d)
            ],
        }
        for metric in [metric for metric in METRICS if metric not in found]:
            datasets = self.with_metric(metric)
            if metric == "prompts":
                datasets += [d for d in self.evaluated if self.annotation_of(d) and d not in datasets]
            found[metric] = [(m, d) for d in datasets for m in self.models if self._can_measure(metric, m, d)]
        return found

    def _can_measure(self, metric: str, model: str, dataset: str) -> bool:
        if not self.is_for(model, dataset) or self.models[model].answers_in_text:
            return False
        text = self.models[model].has_text_tower
        needed = [self.datasets[dataset].annotates or dataset]
        if metric in ("calibration", "ood"):  # the temperature, and the side that is in distribution
            needed.append(self.id_dataset)
        if metric == "retrieval" and not text:
            return False
        if metric == "prompts" and model not in self.prompted:
            return False
        return all(self.answers(model, name) for name in needed)

    @property
    def prompt_sets(self) -> list[str]:
        """Those that `prompted` models are compared under; the default comes first."""
        return [self.config["prompts"]["default"], *self.config["prompts"]["also"]]

    @functools.cached_property
    def searches(self) -> Mapping[str, Mapping[str, Any]]:
        """Prompt set -> settings of the search for it, of those that the study uses."""
        used = {*self.prompt_sets, *(model.prompts for model in self.models.values())}
        entries = {name: self.prompts[name] for name in self.prompts if name in used}
        return {name: e["search"] for name, e in entries.items() if isinstance(e, dict) and "search" in e}

    @functools.cached_property
    def prompted(self) -> list[str]:
        """Models that are measured with several prompt sets: those that the config names, or all that read text."""
        named = self.config["prompts"]["models"]
        able = [name for name, model in self.models.items() if model.has_text_tower and not model.prompts]
        return [name for name in able if name in named or not named] if len(self.prompt_sets) > 1 else []

    def annotation_of(self, dataset: str) -> str:
        """The table of visual factors of a data set's images, or ''."""
        factors = self.with_metric("factors")
        return next((name for name in factors if self.datasets[name].annotates == dataset), "")
