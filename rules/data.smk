"""Archives -> indexes. Downloads are local rules: a GPU node needs no network."""


localrules:
    fetch_archive,


rule fetch_archive:
    output:
        protected("<resources>/archives/{dataset}/{archive}"),
    log:
        "<logs>/fetch_archive/{dataset}.{archive}.log",
    wildcard_constraints:
        dataset=of_family("class_folders", "cue_conflict"),
        archive=r"[\w.-]+",
    retries: 2
    conda:
        "../envs/data.yaml"
    params:
        dataset=dataset_json,
    shell:
        "python -m clip_robustness fetch --dataset {params.dataset:q} --out {output:q} 2>&1 | tee {log:q}"


rule index_dataset:
    input:
        source=source_of_dataset,
        labels=labels_of_dataset,
    output:
        "<resources>/index/{dataset}.parquet",
    log:
        "<logs>/index_dataset/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("class_folders", "cue_conflict"),
    conda:
        "../envs/data.yaml"
    params:
        dataset=dataset_json,
        code=code_hash("data.index"),
    shell:
        "python -m clip_robustness index --dataset {params.dataset:q} --source {input.source:q}"
        " --labels {input.labels:q} --out {output:q} 2> {log:q}"
