"""Pixels once a preprocessing spec, as far as they are cached, then one model load a suite.

There is a rule for each suite, since its data sets are the rule's outputs. What other programs made of the images
is brought into the same form.
"""


rule cache_pixels:
    input:
        "<resources>/index/{dataset}.parquet",
    output:
        pixels=f"<resources>/pixels/{config['decode']}/{{spec}}/{{dataset}}.npy",
        manifest=f"<resources>/pixels/{config['decode']}/{{spec}}/{{dataset}}.json",
    log:
        "<logs>/cache_pixels/{spec}/{dataset}.log",
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        mem_mb=grown(4000),
        runtime=minutes_of_pixels,
    params:
        spec=lambda wildcards: PIXEL_SPECS[wildcards.spec],
        on_unreadable=config["on_unreadable"],
        decode=config["decode"],
        code=code_hash(*PIXELS, imports=False),
    shell:
        "python -m clip_robustness cache-pixels --index {input:q} --spec {params.spec:q}"
        " --workers {threads} --on-error {params.on_unreadable:q}"
        " --decode {params.decode:q} --out {output.pixels:q} 2>&1 | tee -i {log:q}"


for suite in study.suites:

    rule:
        name:
            f"embed_{suite}"
        input:
            weights=weights_of_model,
            pixels=pixels_of_suite(suite),
        output:
            embeddings=expand(
                "<results>/embeddings/{{model}}/{dataset}.npy",
                dataset=study.suites[suite],
            ),
            manifests=expand(
                "<results>/embeddings/{{model}}/{dataset}.json",
                dataset=study.suites[suite],
            ),
        log:
            f"<logs>/embed_{suite}/{{model}}.log",
        benchmark:
            f"<benchmarks>/embed_{suite}/{{model}}.tsv"
        wildcard_constraints:
            model=one_of(study.computed),
        conda:
            "../envs/torch.yaml"
        threads: config["threads"]
        resources:
            gpu=GPUS,
            mem_mb=memory_of_model,
            runtime=minutes_of_suite(suite),
        params:
            library=model_field("library"),
            preprocess=model_field("preprocess"),
            specs=specs_of_suite(suite),
            precision=config["precision"],
            batch_size=config["batch_size"],
            compile="--compile" if config["compile"] else "",
            weights=subpath(input.weights, parent=True),
            folder=subpath(output[0], parent=True),
            work=store("embeddings"),
            on_unreadable=config["on_unreadable"],
            decode=config["decode"],
            code=code_hash("inference.embed", "inference.load", *PIXELS, imports=False),
        shell:
            "python -m clip_robustness embed --model {wildcards.model:q} --library {params.library:q}"
            " --preprocess {params.preprocess:q} --weights {params.weights:q} --pixels {input.pixels:q}"
            " --specs {params.specs:q} --workers {threads} --on-error {params.on_unreadable:q} --decode {params.decode:q}"
            " --precision {params.precision:q} --batch-size {params.batch_size:q} {params.compile}"
            " --out {params.folder:q} --work {params.work:q} 2>&1 | tee -i {log:q}"


rule import_predictions:
    input:
        predictions=predictions_file,
        index="<resources>/index/{dataset}.parquet",
        labels=base_labels,
    output:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        manifest="<results>/embeddings/{model}/{dataset}.json",
    log:
        "<logs>/import_predictions/{model}/{dataset}.log",
    wildcard_constraints:
        model=of_weights("predictions"),
    conda:
        "../envs/torch.yaml"
    params:
        code=code_hash("inference.predictions", imports=False),
    shell:
        "python -m clip_robustness import-predictions --model {wildcards.model:q} --predictions {input.predictions:q}"
        " --index {input.index:q} --labels {input.labels:q} --out {output.embeddings:q} 2> {log:q}"
