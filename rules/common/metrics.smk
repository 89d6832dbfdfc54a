"""What the rules that measure one model on one data set take."""


def head_of(dataset=None):
    """The head that a metric needs, as an input: nothing for a model that answers with logits."""

    @known
    def head(wildcards):
        if not study.models[wildcards.model].has_text_tower:
            return []
        base = study.base_space(dataset or wildcards.dataset)
        return f"<results>/heads/{wildcards.model}/{study.prompts_of(wildcards.model)}.{base}.npz"

    return head


def partner(pattern):
    """A file of a data set's in-distribution partner, or nothing where it has none."""

    @known
    def file(wildcards):
        name = study.partner(wildcards.dataset)
        if not study.answers(wildcards.model, name):
            return []
        labels = study.datasets[name].labels
        return pattern.format(model=wildcards.model, partner=name, labels=labels)

    return file


def released_labels(wildcards):
    """The same classes as released code filled them, where there is a label space of that name."""
    name = f"{study.datasets[wildcards.dataset].labels}_zero"
    return f"<resources>/labels/{name}.json" if name in study.label_spaces else []


def source(pattern):
    """A file of the data set that another one is made from, or nothing where the study has it not."""

    def file(wildcards):
        name = study.datasets[wildcards.dataset].needs
        if name not in study.datasets or not study.answers(wildcards.model, name):
            return []
        return pattern.format(model=wildcards.model, source=name)

    return file


def corpora(pattern):
    return [pattern.format(corpus=name) for name in study.overlap.get("corpora", ())]


def copied(pattern):
    """A file of the data set whose copies the threshold is chosen on."""
    name = study.overlap.get("copies", "")
    return pattern.format(source=study.datasets[name].needs if name else "")


def control_of(wildcards):
    control = study.overlap["controls"].get(wildcards.dataset)
    return f"--control {control}" if control else ""


def planted(wildcards):
    """Of a test set whose copies were planted in a corpus: the index of those."""
    if study.overlap["controls"].get(wildcards.dataset) != "planted":
        return []
    names = [
        n
        for n in study.overlap["corpora"]
        if study.datasets[n].needs == wildcards.dataset
    ]
    return expand("<resources>/index/{name}.parquet", name=names[:1])


def metric_files(wildcards):
    if wildcards.metric == "overlap_thresholds":
        return ["<results>/overlap_threshold.json"]
    if wildcards.metric == "choice":
        return [
            *(
                f"<results>/metrics/choice/{m}/{d}.json"
                for m, d in study.measured("choice")
            ),
            *(f"<results>/metrics/gain/{m}/{d}.json" for m, d in study.asked),
        ]
    return [
        f"<results>/metrics/{wildcards.metric}/{m}/{d}.json"
        for m, d in study.measured(wildcards.metric)
    ]


def captions_folder(wildcards, input):
    return str(Path(input.captions[0]).parent)


def selector(pattern):
    """A file of the model that chooses the wrong classes of the questions."""
    return lambda wildcards: pattern.format(
        model=config["lmm"]["selectors"][wildcards.selector], dataset=wildcards.dataset
    )


def question_head(model, dataset):
    if not study.models[model].has_text_tower:
        return []
    prompts = config["lmm"]["prompts"] or study.prompts_of(model)
    return f"<results>/heads/{model}/{prompts}.{study.base_space(dataset)}.npz"


def head_of_selector(wildcards):
    return question_head(
        config["lmm"]["selectors"][wildcards.selector], wildcards.dataset
    )


def head_of_question(wildcards):
    return question_head(wildcards.model, wildcards.dataset)


def questions_of_dataset(wildcards):
    return [
        f"<results>/questions/{name}/{wildcards.dataset}.parquet"
        for name in config["lmm"]["selectors"]
    ]


@grown
def minutes_of_questions(wildcards):
    """Each image is asked about by every selector, in both orders."""
    images = study.datasets[wildcards.dataset].images or 0
    return minutes_of_images(wildcards, 2 * len(config["lmm"]["selectors"]) * images)


def annotated_predictions(wildcards):
    """A model's predictions on the images that a table of factors is about."""
    images = study.datasets[wildcards.dataset].annotates
    return f"<results>/predictions/{wildcards.model}/{images}.parquet"


def heads_of_sets(wildcards):
    """The heads of every prompt set; an OOD set is scored over the ID set's classes."""
    is_ood = study.datasets[wildcards.dataset].role == "ood"
    base = study.base_space(ID if is_ood else wildcards.dataset)
    return [
        f"<results>/heads/{wildcards.model}/{name}.{base}.npz"
        for name in study.prompt_sets
    ]


def labels_of_prompts(wildcards):
    is_ood = study.datasets[wildcards.dataset].role == "ood"
    return id_labels(wildcards) if is_ood else labels_of_dataset(wildcards)


def if_ood(pattern):
    """A file of the ID set, for an OOD set."""

    def file(wildcards):
        is_ood = study.datasets[wildcards.dataset].role == "ood"
        return pattern.format(model=wildcards.model, reference=ID) if is_ood else []

    return file


def factors_of_images(wildcards):
    name = study.annotation_of(wildcards.dataset)
    return f"<resources>/annotations/{name}.parquet" if name else []
