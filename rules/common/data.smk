"""What the rules take that fetch, index, derive and render data sets, and what stops a run before its first job."""


def download_json(wildcards, output):
    """What `fetch` needs. Snakemake does not track a parameter that takes `output`: a new mirror fetches nothing anew."""
    dataset = study.datasets[wildcards.dataset]
    known = {
        "name": dataset.name,
        "title": dataset.title,
        "licence": dataset.licence,
        "access": dataset.access,
    }
    wanted = ("archives", "hub", "note")
    return json.dumps(
        {**known, **{k: v for k, v in dataset.details.items() if k in wanted}},
        sort_keys=True,
    )


def dataset_json(wildcards):
    """What decides a data set's index."""
    dataset = study.datasets[wildcards.dataset]
    images = (
        None if dataset.derive else dataset.images
    )  # what is made has as many as there are
    known = {"name": dataset.name, "family": dataset.family, "images": images}
    wanted = ("path", "options")
    return json.dumps(
        {**known, **{k: v for k, v in dataset.details.items() if k in wanted}},
        sort_keys=True,
    )


def adapter_code(wildcards):
    return code_hash(
        "data.index", f"data.adapters.{study.datasets[wildcards.dataset].family}"
    )


def space_json(wildcards):
    """A label space's entry; a map's facts lie in a file of their own, so its hash stands for them."""
    space = study.label_spaces[wildcards.space]
    mapped = str(space["classes"]).startswith("map:")
    facts = {"maps": sha256_file(ROOT / "config/label_maps.json")} if mapped else {}
    return json.dumps({**space, **facts}, sort_keys=True)


def base_space_of_space(wildcards):
    base = study.label_spaces[wildcards.space].get("base")
    return f"<resources>/labels/{base}.json" if base else []


ARCHIVES = {
    name: [a["file"] for a in dataset.archives]
    for name, dataset in study.datasets.items()
}


ANNOTATIONS = [n for n, d in study.datasets.items() if d.role == "annotation"]
INDEXED = [
    n for n, d in study.datasets.items() if not d.is_rendered and n not in ANNOTATIONS
]


def cache_option():
    return f"--cache {shlex.quote(config['cache'])}" if config["cache"] else ""


@functools.cache
def missing_page():
    """Asked for when a job of this run needs data that is not available: `stop_if_missing` must then stop it."""
    if workflow.dryrun or workflow.executor_plugin is None:  # as for --dag or --summary
        print(page(study), file=sys.stderr)
    return page(study)


def stop_if_missing():
    """Before the first job of a real run."""
    if missing_page.cache_info().currsize:
        raise WorkflowError(missing_page())


def stop_if_dated_in_the_future():
    """Before the first job of a real run."""
    folders = [study.config["pathvars"].get(k, k) for k in ("resources", "results")]
    try:
        check_clock(folders)
    except InputError as error:
        raise WorkflowError(str(error)) from None


def stop_if_read_only():
    """Before the first job of a real run: when it comes to such a folder, Snakemake ends with a traceback."""
    jobs = workflow.dag.needrun_jobs()
    try:
        check_writable(path for job in jobs for path in (*job.output, *job.log))
    except InputError as error:
        raise WorkflowError(str(error)) from None


def sources_of_dataset(wildcards):
    """Where a data set's files lie: what the user has of it, or what is downloaded."""
    name = wildcards.dataset
    dataset, owned = study.datasets[name], study.local(name)
    for path in owned:
        if not Path(path).exists():
            raise WorkflowError(f"local.{name}: {path}: no such file or folder")
    if owned:
        return local(owned)
    if name in study.unavailable:
        missing_page()
    if dataset.hub:
        return [f"<resources>/hub/{name}"]
    if dataset.derive:
        return [f"<resources>/archives/{name}/{name}.tar"]
    return [f"<resources>/archives/{name}/{file}" for file in ARCHIVES[name]]


def annotated_index(wildcards):
    """The index of the images that an annotation is about."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].annotates}.parquet"


def needed_index(wildcards):
    """The index of the images that a data set is made from."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].needs}.parquet"


def targets_of_dataset(wildcards):
    """The record of the words that are printed, where there is one."""
    targets = study.datasets[wildcards.dataset].derive.get("targets")
    return local(str(HERE / targets)) if targets else []


def all_data():
    return [
        f"<resources>/{'annotations' if d.role == 'annotation' else 'index'}/{n}.parquet"
        for n, d in study.datasets.items()
    ]


def world_json(wildcards):
    """A rendered world's settings. `scale` shrinks every mini data set alike."""
    dataset = study.datasets[wildcards.dataset]
    images = max(1, round(dataset.images * config["scale"]))
    classes = study.label_spaces[dataset.labels]["classes"]
    facts = {"name": dataset.name, "images": images, "classes": classes}
    return json.dumps({**facts, **dataset.details["world"]}, sort_keys=True)


def corrupted_index(wildcards):
    """The rendered images that are corrupted."""
    return f"<resources>/index/{study.datasets[wildcards.dataset].details['corrupt']}.parquet"


def variations_of_dataset(wildcards):
    """The rendered sets that one is combined from."""
    names = study.datasets[wildcards.dataset].details["combine"].values()
    return expand("<resources>/index/{name}.parquet", name=names)


def corrupted_geometry(wildcards):
    """Depth behind the pixels of the rendered images that are corrupted."""
    return f"<resources>/geometry/{study.datasets[wildcards.dataset].details['corrupt']}.npz"


def corrupted_images(wildcards):
    """Of each type (15, where the data set names none) and each of the 5 severities."""
    dataset = study.datasets[wildcards.dataset]
    settings = 5 * len(dataset.details["options"].get("corruptions", range(15)))
    return max(1, round(dataset.images * config["scale"] / settings))


def pool_of_dataset(wildcards):
    """What a filtered data set is made from: a pool's index and the filtering model's predictions on it."""
    details = study.datasets[wildcards.dataset].details
    return {
        "index": f"<resources>/index/{details['pool']}.parquet",
        "predictions": f"<results>/predictions/{details['filter_model']}/{details['pool']}.parquet",
    }


def habits_json(wildcards):
    """The training world whose habits mini factors deviate from."""
    habits = study.datasets[study.datasets[wildcards.dataset].details["habits"]]
    facts = {"name": habits.name, "images": habits.images}
    return json.dumps({**facts, **habits.details["world"]}, sort_keys=True)
