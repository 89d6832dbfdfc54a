"""Dense correspondence: the same point in two images, by the features of a frozen tower."""


rule match_pairs:
    input:
        weights=weights_of_model,
        index="<resources>/index/{dataset}.parquet",
    output:
        matches="<results>/matches/{model}/{dataset}.parquet",
        manifest="<results>/matches/{model}/{dataset}.json",
    log:
        "<logs>/match_pairs/{model}/{dataset}.log",
    benchmark:
        "<benchmarks>/match_pairs/{model}/{dataset}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_pairs,
    params:
        library=model_field("library"),
        preprocess=model_field("preprocess"),
        weights=subpath(input.weights, parent=True),
        family=lambda wildcards: study.datasets[wildcards.dataset].family,
        stride=config["correspondence"]["stride"],
        precision=config["precision"],
        work=store("matches"),
        code=code_hash(
            "inference.correspondence",
            "inference.dense",
            "inference.views",
            "inference.pairs",
            "inference.images",
            "inference.load",
            imports=False,
        ),
    shell:
        "python -m clip_robustness match-pairs --model {wildcards.model:q} --library {params.library:q}"
        " --preprocess {params.preprocess:q} --weights {params.weights:q} --index {input.index:q}"
        " --family {params.family:q} --stride {params.stride:q} --precision {params.precision:q}"
        " --out {output.matches:q} --work {params.work:q} 2>&1 | tee -i {log:q}"


rule measure_correspondence:
    input:
        matches="<results>/matches/{model}/{dataset}.parquet",
        manifest="<results>/matches/{model}/{dataset}.json",
    output:
        "<results>/metrics/correspondence/{model}/{dataset}.json",
    log:
        "<logs>/measure_correspondence/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.correspondence"),
    shell:
        "python -m clip_robustness measure-correspondence --matches {input.matches:q} --seed {params.seed:q}"
        " --resamples {params.resamples:q} --out {output:q} 2> {log:q}"
