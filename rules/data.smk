"""Archives -> indexes. Downloads are local rules: a GPU node needs no network."""


localrules:
    fetch_archive,
    fetch_hub,


onstart:
    stop_if_missing()
    stop_if_dated_in_the_future()
    stop_if_read_only()


rule fetch_archive:
    output:
        protected("<resources>/archives/{dataset}/{archive}"),
    log:
        "<logs>/fetch_archive/{dataset}/{archive}.log",
    wildcard_constraints:
        archive=one_of(sorted({file for files in ARCHIVES.values() for file in files})),
    retries: 2
    conda:
        "../envs/data.yaml"
    params:
        dataset=download_json,
        lock=lambda wildcards, output: config["lock"],
        cache=lambda wildcards, output: cache_option(),
    shell:
        "python -m clip_robustness fetch --dataset {params.dataset:q} --archive {wildcards.archive:q}"
        " --lock {params.lock:q} {params.cache} --out {output:q} 2>&1 | tee -i {log:q}"


rule fetch_hub:
    output:
        directory("<resources>/hub/{dataset}"),
    log:
        "<logs>/fetch_hub/{dataset}.log",
    retries: 2
    conda:
        "../envs/data.yaml"
    params:
        dataset=download_json,
        lock=lambda wildcards, output: config["lock"],
    shell:
        "python -m clip_robustness fetch-hub --dataset {params.dataset:q} --lock {params.lock:q}"
        " --out {output:q} 2>&1 | tee -i {log:q}"


rule derive_dataset:
    input:
        index=needed_index,
        labels=labels_of_dataset,
        targets=targets_of_dataset,
    output:
        "<resources>/archives/{dataset}/{dataset}.tar",
    log:
        "<logs>/derive_dataset/{dataset}.log",
    wildcard_constraints:
        dataset=one_of([n for n, d in study.datasets.items() if d.derive]),
    conda:
        "../envs/data.yaml"
    threads: config["threads"]
    params:
        derive=lambda wildcards: json.dumps(
            study.datasets[wildcards.dataset].derive, sort_keys=True
        ),
        targets=optional("targets"),
        code=lambda wildcards: code_hash(
            f"data.{study.datasets[wildcards.dataset].derive['by']}"
        ),
    shell:
        "python -m clip_robustness derive --entry {params.derive:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.targets} --workers {threads} --out {output:q} 2>&1 | tee -i {log:q}"


rule index_dataset:
    input:
        sources=sources_of_dataset,
        labels=labels_of_dataset,
    output:
        "<resources>/index/{dataset}.parquet",
    log:
        "<logs>/index_dataset/{dataset}.log",
    wildcard_constraints:
        dataset=one_of(INDEXED),
    conda:
        "../envs/data.yaml"
    params:
        dataset=dataset_json,
        code=adapter_code,
    shell:
        "python -m clip_robustness index --dataset {params.dataset:q} --sources {input.sources:q}"
        " --labels {input.labels:q} --out {output:q} 2> {log:q}"


rule annotate_images:
    input:
        annotations=sources_of_dataset,
        index=annotated_index,
    output:
        "<resources>/annotations/{dataset}.parquet",
    log:
        "<logs>/annotate_images/{dataset}.log",
    wildcard_constraints:
        dataset=one_of([n for n in ANNOTATIONS if not study.datasets[n].is_rendered]),
    conda:
        "../envs/data.yaml"
    params:
        code=code_hash("data.adapters.imagenet_x"),
    shell:
        "python -m clip_robustness annotate --annotations {input.annotations:q} --index {input.index:q}"
        " --out {output:q} 2> {log:q}"
