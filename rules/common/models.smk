"""What the rules that run models take and ask for: weights, prompts, pixels, attacks."""


def store(kind):
    """The folder of finished work by content, below <results>, whose name Snakemake does not fill into a parameter."""
    return lambda wildcards, output: str(Path(output[0]).parents[2] / "store" / kind)


@known
def weights_of_model(wildcards):
    return f"<resources>/weights/{study.weights_of(wildcards.model)}/manifest.json"


def blended_weights(wildcards):
    parent, finetuned, _ = study.models[wildcards.model].blended
    names = {"parent": parent, "finetuned": finetuned}
    return {
        role: f"<resources>/weights/{study.weights_of(name)}/manifest.json"
        for role, name in names.items()
    }


def predictions_file(wildcards):
    return local(str(study.models[wildcards.model].predictions[wildcards.dataset]))


def minutes_of_suite(suite):
    images = sum(study.datasets[name].images or 0 for name in study.suites[suite])
    return grown(lambda wildcards: minutes_of_images(wildcards, images))


@grown
def minutes_of_prompts(wildcards):
    """As of images: a prompt costs less than an image, and there are up to 80 for each of 1,000 classes."""
    return minutes_of_images(wildcards, 80_000 * len(study.base_spaces))


@grown
def minutes_of_pixels(wildcards):
    """At 50 images a second and core, a fifth of what was measured."""
    images = study.datasets[wildcards.dataset].images or 0
    return 10 + round(images / 50 / config["threads"] / 60)


def templates_of_set(wildcards):
    """What decides a prompt set: its entry, and of a file its hash."""
    entry = study.prompts[wildcards.prompts]
    if isinstance(entry, dict) and "file" in entry:
        return sha256_file((ROOT / config["prompts"]["table"]).parent / entry["file"])
    return entry


def searched_on(pattern):
    """A file of the data set that a prompt set is searched on."""

    def file(wildcards):
        name = study.searches[wildcards.prompts]["dataset"]
        labels = study.datasets[name].labels
        return pattern.format(model=wildcards.model, dataset=name, labels=labels)

    return file


def search_options(wildcards):
    settings = study.searches[wildcards.prompts]
    return shlex.join(
        w for k, v in settings.items() if k != "dataset" for w in (f"--{k}", str(v))
    )


def searched_prompts(wildcards):
    is_searched = wildcards.prompts in study.searches
    return (
        f"<results>/prompts/{wildcards.model}/{wildcards.prompts}.txt"
        if is_searched
        else []
    )


PIXELS = (
    "inference.pixels",
    "inference.decoding",
    "inference.images",
    "inference.fast_pixels",
    "core.preprocessing",
)
CACHED = study.cached_pixels


def pixels_of_suite(suite):
    """A pixel cache of each data set, or its index where a cache is not worth its disk."""

    @known
    def pixels(wildcards):
        keys = {
            d: study.preprocessing(wildcards.model, d).key for d in study.suites[suite]
        }
        return [
            (
                f"<resources>/pixels/{config['decode']}/{key}/{name}.npy"
                if (key, name) in CACHED
                else f"<resources>/index/{name}.parquet"
            )
            for name, key in keys.items()
        ]

    return pixels


def specs_of_suite(suite):
    return known(
        lambda wildcards: [
            study.preprocessing(wildcards.model, d).pixel_spec
            for d in study.suites[suite]
        ]
    )


def training_data(wildcards):
    """What a mini model learns from: a rendered set and, when it is fine-tuned, its parent's weights."""
    model = study.models[wildcards.model]
    source = model.finetuned_on or model.source
    files = {
        "index": f"<resources>/index/{source}.parquet",
        "labels": f"<resources>/labels/{study.datasets[source].labels}.json",
    }
    if model.parent and (model.finetuning != "none" or model.answers_in_text):
        files["parent"] = f"<resources>/weights/{model.parent}/manifest.json"
    return files


def parent_folder(wildcards, input):
    return (
        f"--parent {shlex.quote(str(Path(input.parent).parent))}"
        if input.get("parent")
        else ""
    )


def recipe_json(wildcards):
    """A mini model's line, as far as it decides the weights, and the settings that it is trained by."""
    model = study.models[wildcards.model]
    names = "model library architecture family finetuning loss train_images"
    row = {name: getattr(model, name) for name in names.split()}
    of_library = {"timm": "supervised", "transformers": "lmm"}
    kind = of_library.get(model.library, model.finetuning.replace("none", "clip"))
    settings = {name: config["training"][name] for name in ("seed", kind)}
    return json.dumps({**row, **settings, "fraction": config["scale"]}, sort_keys=True)


SETTINGS = load_yaml(ROOT / config["attacks"]["table"]) if study.attacked else {}


def settings_of_attack(wildcards):
    """Those of the table, with those that the study replaces."""
    changed = config["attacks"]["settings"].get(wildcards.attack, {})
    return {**SETTINGS[wildcards.attack], **changed}


def attack_json(wildcards):
    return json.dumps(settings_of_attack(wildcards), sort_keys=True)


def transfers(wildcards):
    return bool(settings_of_attack(wildcards).get("substitute"))


def substitute(pattern):
    """A file of the model whose gradients an attack uses, or nothing where it uses the victim's own."""

    def file(wildcards):
        name = config["attacks"]["substitute"]
        return (
            pattern.format(weights=study.weights_of(name), model=name)
            if transfers(wildcards)
            else []
        )

    return file


def substitute_json(wildcards, input):
    """Nothing ({}) for an attack that needs no substitute."""
    if not transfers(wildcards):
        return "{}"
    model = study.models[config["attacks"]["substitute"]]
    weights = str(Path(input.substitute_weights).parent)
    facts = {
        "weights": weights,
        "library": model.library,
        "preprocess": model.preprocess,
    }
    return json.dumps(facts, sort_keys=True)


def attack_ids():
    ids = config["attacks"]["ids"]
    return f"--ids {shlex.quote(str(HERE / ids))}" if ids else ""


@grown
def minutes_of_pairs(wildcards):
    """At most 20,000 pairs, whose images are up to 13 times as large as a model's own."""
    return minutes_of_images(wildcards, 2 * 13 * 20_000)


@grown
def minutes_of_attack(wildcards):
    """A quarter of an hour, and as many passes over the images as the strongest attacks make."""
    return minutes_of_images(wildcards, 10_000 * config["attacks"]["images"])
