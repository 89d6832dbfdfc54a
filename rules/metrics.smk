"""One job for each metric family, model and data set; none of them imports torch."""


rule measure_accuracy:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of(),
        reference_embeddings=partner("<results>/embeddings/{model}/{partner}.npy"),
        reference_index=partner("<resources>/index/{partner}.parquet"),
        reference_labels=partner("<resources>/labels/{labels}.json"),
    output:
        metrics="<results>/metrics/accuracy/{model}/{dataset}.json",
        predictions="<results>/predictions/{model}/{dataset}.parquet",
    log:
        "<logs>/measure_accuracy/{model}/{dataset}.log",
    wildcard_constraints:
        dataset=one_of(
            n
            for n, d in study.datasets.items()
            if d.role not in ("video_shift", "corruption", "corruption_3d", "pool")
        ),
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional(
            "head", "reference_embeddings", "reference_index", "reference_labels"
        ),
        code=code_hash("metrics.accuracy"),
    shell:
        "python -m clip_robustness measure-accuracy --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.options} --out {output.metrics:q}"
        " --predictions {output.predictions:q} 2> {log:q}"


# Other data sets are made from it. On a cluster, a model's metrics are one job, which could not wait for itself.
use rule measure_accuracy as measure_pool with:
    wildcard_constraints:
        dataset=of_role("pool"),


rule measure_video:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        released_labels=released_labels,
        head=head_of(),
        reference_embeddings=partner("<results>/embeddings/{model}/{partner}.npy"),
        reference_index=partner("<resources>/index/{partner}.parquet"),
        reference_labels=partner("<resources>/labels/{labels}.json"),
    output:
        metrics="<results>/metrics/accuracy/{model}/{dataset}.json",
        predictions="<results>/predictions/{model}/{dataset}.parquet",
    log:
        "<logs>/measure_video/{model}/{dataset}.log",
    wildcard_constraints:
        dataset=of_role("video_shift"),
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional(
            "head",
            "released_labels",
            "reference_embeddings",
            "reference_index",
            "reference_labels",
        ),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.video"),
    shell:
        "python -m clip_robustness measure-video --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.options} --seed {params.seed:q} --resamples {params.resamples:q}"
        " --out {output.metrics:q} --predictions {output.predictions:q} 2> {log:q}"


rule measure_corruption:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of(),
    output:
        "<results>/metrics/accuracy/{model}/{dataset}.json",
    log:
        "<logs>/measure_corruption/{model}/{dataset}.log",
    wildcard_constraints:
        dataset=of_role("corruption", "corruption_3d"),
    conda:
        "../envs/metrics.yaml"
    resources:
        mem_mb=memory_of_metric(500),
    params:
        options=optional("head"),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.corruption"),
    shell:
        "python -m clip_robustness measure-corruption --embeddings {input.embeddings:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.options} --seed {params.seed:q}"
        " --resamples {params.resamples:q} --out {output:q} 2> {log:q}"


rule measure_typographic:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of(),
        source_embeddings=source("<results>/embeddings/{model}/{source}.npy"),
        source_index=source("<resources>/index/{source}.parquet"),
    output:
        "<results>/metrics/typographic/{model}/{dataset}.json",
    log:
        "<logs>/measure_typographic/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head", "source_embeddings", "source_index"),
        seed=config["seed"],
        code=code_hash("metrics.typographic"),
    shell:
        "python -m clip_robustness measure-typographic --embeddings {input.embeddings:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.options} --seed {params.seed:q}"
        " --out {output:q} 2> {log:q}"


rule fit_temperature:
    input:
        embeddings=f"<results>/embeddings/{{model}}/{ID}.npy",
        index=f"<resources>/index/{ID}.parquet",
        labels=f"<resources>/labels/{ID_LABELS}.json",
        head=head_of(ID),
    output:
        "<results>/metrics/temperature/{model}.json",
    log:
        "<logs>/fit_temperature/{model}.log",
    conda:
        "../envs/metrics.yaml"
    resources:
        mem_mb=memory_of_metric(4000, ID),
    params:
        options=optional("head"),
        seed=config["seed"],
        code=code_hash("metrics.calibration"),
    shell:
        "python -m clip_robustness fit-temperature --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.options} --seed {params.seed:q} --out {output:q} 2> {log:q}"


rule measure_calibration:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of(),
        temperature="<results>/metrics/temperature/{model}.json",
    output:
        "<results>/metrics/calibration/{model}/{dataset}.json",
    log:
        "<logs>/measure_calibration/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head", "temperature"),
        held_out=lambda wildcards: int(wildcards.dataset == ID),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.calibration"),
    shell:
        "python -m clip_robustness measure-calibration --embeddings {input.embeddings:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.options}"
        " --held-out {params.held_out:q} --seed {params.seed:q} --resamples {params.resamples:q}"
        " --out {output:q} 2> {log:q}"


rule measure_shape_bias:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of(),
    output:
        "<results>/metrics/shape_bias/{model}/{dataset}.json",
    log:
        "<logs>/measure_shape_bias/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head"),
        code=code_hash("metrics.shape_bias"),
    shell:
        "python -m clip_robustness measure-shape-bias --embeddings {input.embeddings:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.options} --out {output:q} 2> {log:q}"


rule measure_ood:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=f"<resources>/labels/{ID_LABELS}.json",
        head=head_of(ID),
        reference_embeddings=f"<results>/embeddings/{{model}}/{ID}.npy",
        reference_index=f"<resources>/index/{ID}.parquet",
    output:
        "<results>/metrics/ood/{model}/{dataset}.json",
    log:
        "<logs>/measure_ood/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head", "reference_embeddings", "reference_index"),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.ood"),
    shell:
        "python -m clip_robustness measure-ood --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.options} --seed {params.seed:q} --resamples {params.resamples:q}"
        " --out {output:q} 2> {log:q}"


rule measure_factors:
    input:
        predictions=annotated_predictions,
        factors="<resources>/annotations/{dataset}.parquet",
    output:
        "<results>/metrics/factors/{model}/{dataset}.json",
    log:
        "<logs>/measure_factors/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        fewest=config["fewest"],
        code=code_hash("metrics.factors"),
    shell:
        "python -m clip_robustness measure-factors --predictions {input.predictions:q}"
        " --factors {input.factors:q} --fewest {params.fewest:q} --out {output:q} 2> {log:q}"


rule measure_retrieval:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        captions="<results>/embeddings/{model}/{dataset}.captions.npy",
        index="<resources>/index/{dataset}.parquet",
    output:
        "<results>/metrics/retrieval/{model}/{dataset}.json",
    log:
        "<logs>/measure_retrieval/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.retrieval"),
    shell:
        "python -m clip_robustness measure-retrieval --embeddings {input.embeddings:q}"
        " --captions {input.captions:q} --index {input.index:q} --seed {params.seed:q}"
        " --resamples {params.resamples:q} --out {output:q} 2> {log:q}"


rule measure_prompts:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_prompts,
        heads=heads_of_sets,
        factors=factors_of_images,
        reference_embeddings=if_ood("<results>/embeddings/{model}/{reference}.npy"),
        reference_index=if_ood("<resources>/index/{reference}.parquet"),
    output:
        "<results>/metrics/prompts/{model}/{dataset}.json",
    log:
        "<logs>/measure_prompts/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    resources:
        mem_mb=memory_of_metric(12000),
    params:
        options=optional("factors", "reference_embeddings", "reference_index"),
        held_out=lambda wildcards: int(wildcards.dataset == ID),
        fewest=config["fewest"],
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.prompts"),
    shell:
        "python -m clip_robustness measure-prompts --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} --heads {input.heads:q} {params.options} --held-out {params.held_out:q}"
        " --fewest {params.fewest:q} --seed {params.seed:q} --resamples {params.resamples:q} --out {output:q} 2> {log:q}"
