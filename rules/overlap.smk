"""Test images that stand in training corpora: found by a detector's features, then left out of the accuracy."""

OVERLAP = study.overlap

if OVERLAP:
    DETECTOR = OVERLAP["detector"]

    localrules:
        choose_threshold,

    rule find_duplicates:
        input:
            embeddings=f"<results>/embeddings/{DETECTOR}/{{dataset}}.npy",
            index="<resources>/index/{dataset}.parquet",
            references=corpora(f"<results>/embeddings/{DETECTOR}/{{corpus}}.npy"),
            vectors=local(list(OVERLAP["vectors"].values())),
            indexes=corpora("<resources>/index/{corpus}.parquet"),
        output:
            matches="<results>/overlap/{dataset}.parquet",
            manifest="<results>/overlap/{dataset}.json",
        log:
            "<logs>/find_duplicates/{dataset}.log",
        conda:
            "../envs/torch.yaml"
        threads: config["threads"]
        resources:
            mem_mb=grown(3000),
        params:
            names=[*OVERLAP["corpora"], *OVERLAP["vectors"]],
            indexes=optional("indexes"),
            code=code_hash("inference.duplicates", "core.features", imports=False),
        shell:
            "python -m clip_robustness find-duplicates --embeddings {input.embeddings:q} --index {input.index:q}"
            " --references {input.references:q} {input.vectors:q} --names {params.names:q} {params.indexes}"
            " --out {output.matches:q} 2>&1 | tee -i {log:q}"

    rule choose_threshold:
        input:
            copies=f"<results>/embeddings/{DETECTOR}/{OVERLAP['copies']}.npy",
            copies_index=f"<resources>/index/{OVERLAP['copies']}.parquet",
            sources=copied(f"<results>/embeddings/{DETECTOR}/{{source}}.npy"),
            sources_index=copied("<resources>/index/{source}.parquet"),
        output:
            "<results>/overlap_threshold.json",
        log:
            "<logs>/choose_threshold.log",
        conda:
            "../envs/metrics.yaml"
        params:
            false_positives=OVERLAP["false_positives"],
            seed=config["seed"],
            code=code_hash("metrics.overlap"),
        shell:
            "python -m clip_robustness choose-threshold --copies {input.copies:q} --copies-index {input.copies_index:q}"
            " --sources {input.sources:q} --sources-index {input.sources_index:q} --seed {params.seed:q}"
            " --false-positives {params.false_positives:q} --out {output:q} 2> {log:q}"

    rule measure_overlap:
        input:
            predictions="<results>/predictions/{model}/{dataset}.parquet",
            matches="<results>/overlap/{dataset}.parquet",
            threshold="<results>/overlap_threshold.json",
            copies_index=planted,
        output:
            "<results>/metrics/data_overlap/{model}/{dataset}.json",
        log:
            "<logs>/measure_overlap/{model}/{dataset}.log",
        conda:
            "../envs/metrics.yaml"
        params:
            options=optional("copies_index"),
            control=control_of,
            tests=len(study.measured("data_overlap")),
            seed=config["seed"],
            code=code_hash("metrics.overlap"),
        shell:
            "python -m clip_robustness measure-overlap --predictions {input.predictions:q}"
            " --matches {input.matches:q} --threshold {input.threshold:q} {params.options} {params.control}"
            " --tests {params.tests:q} --seed {params.seed:q} --out {output:q} 2> {log:q}"
