"""Pixels once a preprocessing spec, then one model load a suite.

There is a rule for each suite, since its data sets are the rule's outputs.
"""


rule cache_pixels:
    input:
        "<resources>/index/{dataset}.parquet",
    output:
        pixels="<resources>/pixels/{spec}/{dataset}.npy",
        manifest="<resources>/pixels/{spec}/{dataset}.json",
    log:
        "<logs>/cache_pixels/{spec}/{dataset}.log",
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        mem_mb=4000,
    params:
        spec=lambda wildcards: PIXEL_SPECS[wildcards.spec],
        on_unreadable=config["on_unreadable"],
        code=code_hash("inference.pixels", "core.preprocessing", imports=False),
    shell:
        "python -m clip_robustness cache-pixels --index {input:q} --spec {params.spec:q}"
        " --workers {threads} --on-error {params.on_unreadable} --out {output.pixels:q} 2> {log:q}"


for suite in study.suites:

    rule:
        name:
            f"embed_{suite}"
        input:
            weights="<resources>/weights/{model}/manifest.json",
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
        conda:
            "../envs/torch.yaml"
        threads: config["threads"]
        resources:
            gpu=GPUS,
            mem_mb=16000,
        params:
            library=model_field("library"),
            preprocess=model_field("preprocess"),
            precision=config["precision"],
            batch_size=config["batch_size"],
            weights=subpath(input.weights, parent=True),
            folder=subpath(output[0], parent=True),
            work="<results>/store/embeddings",
            code=code_hash(
                "inference.embed",
                "inference.load",
                "inference.pixels",
                "core.preprocessing",
                imports=False,
            ),
        shell:
            "python -m clip_robustness embed --model {wildcards.model} --library {params.library}"
            " --preprocess {params.preprocess:q} --weights {params.weights:q} --pixels {input.pixels:q}"
            " --precision {params.precision} --batch-size {params.batch_size}"
            " --out {params.folder:q} --work {params.work:q} 2>&1 | tee {log:q}"
