"""What the rules take that make tables, figures and pages of all models."""


def models_json():
    """The rows of the models table."""
    columns = (
        "model title library architecture group family source train_images finetuning finetuned_on loss"
        " prompts params_m gflops parent image_size preprocess published"
    )
    rows = [
        [getattr(model, name) for name in columns.split()]
        for model in study.models.values()
    ]
    return json.dumps({"columns": columns.split(), "rows": rows})


def fit_options():
    """Which models the baseline is fitted on, and which set is in distribution."""
    fit = config["fit"]
    sources = ["--sources", *fit["sources"]] if fit["sources"] else []
    return shlex.join(
        [
            "--population",
            fit["population"],
            *sources,
            *(["--reference", ID] if ID else []),
            *(["--natural", *study.natural_shifts] if study.natural_shifts else []),
        ]
    )


def published_files():
    return local(
        sorted(str(path) for path in (HERE / config["published"]).glob("*.csv"))
    )


FIGURE_TABLES = {
    "effective_robustness": ("accuracy", "models", "baselines", "effective_robustness"),
    "shape_bias": ("shape_bias", "models"),
    "calibration": ("calibration", "accuracy", "models"),
    "visual_factors": ("factors", "models", "factor_fits", "factor_robustness"),
    "retrieval": ("retrieval", "accuracy", "models"),
    "ood_detection": ("ood", "accuracy", "models"),
    "prompts": ("prompts", "models"),
    "natural_shifts": ("accuracy", "effective_robustness", "synthetic", "models"),
    "synthetic_shifts": ("synthetic", "models"),
    "corruption_3d": ("accuracy", "models"),
    "correspondence": ("correspondence", "accuracy", "models"),
    "lmm": ("choice", "models"),
    "adversarial": ("adversarial", "models"),
    "typographic": ("typographic", "models"),
    "data_overlap": ("data_overlap", "overlap_thresholds", "models"),
    "six_factors": ("six_factors",),
    "claims": ("claims",),
    "reproduction": ("reproduction", "models"),
}


def table_if_measured(name):
    return [f"<results>/tables/{name}.parquet"] if study.measured(name) else []


def shift_options():
    """The synthetic shifts, their yardsticks, and the models of the baseline."""
    shifts, fit, normaliser = config["shifts"], config["fit"], config["normaliser"]
    return shlex.join(
        [
            *("--shifts", *(shifts or study.synthetic_shifts)),
            *("--reference", ID or "imagenet_val", "--population", fit["population"]),
            *(["--sources", *fit["sources"]] if fit["sources"] else []),
            *(["--normaliser", normaliser] if normaliser else []),
        ]
    )


def tables_of_figure(wildcards):
    """Those of a figure's tables that the study has."""
    there = study_tables()
    tables = [
        f"<results>/tables/{name}.parquet" for name in FIGURE_TABLES[wildcards.figure]
    ]
    return [table for table in tables if table in there]


def measured_tables():
    """Tables that are gathered from metrics, or imported."""
    if config["published"]:
        return ["accuracy", "shape_bias", "factors", "retrieval"]
    tables = [metric for metric in METRICS if study.measured(metric)]
    return tables + ["overlap_thresholds"] * bool(study.overlap)


def base_tables():
    """Measured tables, and what is fitted across models."""
    names = [*measured_tables(), "models"]
    if "accuracy" in names:
        names += ["baselines", "effective_robustness"]
    if study.synthetic_shifts or config["shifts"]:
        names += ["synthetic"]
    if "factors" in names:
        names += ["factor_fits", "factor_robustness"]
    return [f"<results>/tables/{name}.parquet" for name in names]


def study_tables():
    """Tables of this study: what its data sets' roles allow, or what its published tables hold."""
    names = ["six_factors", "claims", "reproduction"]
    return [*base_tables(), *(f"<results>/tables/{name}.parquet" for name in names)]


def factor_patterns():
    options = {
        "--only": config["fit"]["factors_only"],
        "--without": config["fit"]["factors_without"],
    }
    return shlex.join([w for o, names in options.items() if names for w in (o, *names)])


def six_factors_options():
    natural = study.natural_shifts
    return shlex.join(
        [
            *(["--reference", ID] if ID else []),
            *(["--natural", *natural] if natural else []),
        ]
    )


def assets(*kinds):
    """Style, markup and scripts of the report."""
    folder = HERE / "src/clip_robustness/report"
    return local(
        sorted(str(path) for kind in kinds for path in folder.glob(f"*.{kind}"))
    )


def config_json():
    """The config as a report shows it: without what is of this machine alone."""
    shown = {k: v for k, v in study.config.items() if k not in ("cache", "captions")}
    return json.dumps({**shown, "local": sorted(study.config["local"])}, sort_keys=True)


def lacking_json():
    """What the study leaves out, and why."""
    skipped = {
        name: {
            "title": dataset.title,
            "licence": dataset.licence,
            "note": dataset.details.get("note", ""),
        }
        for name, dataset in {**study.unavailable, **study.skipped}.items()
    }
    figures = [figure for figure in FIGURE_TABLES if figure not in config["figures"]]
    facts = {"skipped": skipped, "remarks": study.remarks, "figures": figures}
    return json.dumps(facts, sort_keys=True)


# Data sets whose classes a model card looks at.
CLASSED = {
    name: dataset
    for name, dataset in study.datasets.items()
    if dataset.role in ("id", "natural_shift")
}


def predictions_of_cards():
    return [
        f"<results>/predictions/{m}/{d}.parquet"
        for m, d in study.measured("accuracy")
        if d in CLASSED
    ]


def labels_of_cards():
    spaces = sorted({dataset.labels for dataset in CLASSED.values()})
    return [f"<resources>/labels/{space}.json" for space in spaces]


def indexes_of_cards():
    """Of data sets whose pictures may be shown: those that are rendered here."""
    rendered = [name for name, dataset in CLASSED.items() if dataset.is_rendered]
    return [f"<resources>/index/{name}.parquet" for name in rendered]


def datasets_of_cards_json():
    facts = {
        name: {"labels": dataset.labels, "licence": dataset.licence}
        for name, dataset in CLASSED.items()
    }
    return json.dumps(facts, sort_keys=True)


def filled_captions():
    """Figure -> caption with its numbers, as the last report has them: `snakemake --report` shows them."""
    path = Path(config["pathvars"].get("figures", "figures")) / "captions.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


config["captions"] = filled_captions()
