"""Two-way questions about images: to models that answer in text, and to CLIPs and classifiers by their logits."""


localrules:
    write_questions,


rule write_questions:
    input:
        embeddings=selector("<results>/embeddings/{model}/{dataset}.npy"),
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        head=head_of_selector,
    output:
        "<results>/questions/{selector}/{dataset}.parquet",
    log:
        "<logs>/write_questions/{selector}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head"),
        code=code_hash("metrics.choice"),
    shell:
        "python -m clip_robustness write-questions --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.options} --selector {wildcards.selector:q} --out {output:q} 2> {log:q}"


rule measure_two_way:
    input:
        embeddings="<results>/embeddings/{model}/{dataset}.npy",
        index="<resources>/index/{dataset}.parquet",
        labels=labels_of_dataset,
        questions=questions_of_dataset,
        head=head_of_question,
    output:
        metrics="<results>/metrics/choice/{model}/{dataset}.json",
        predictions="<results>/choices/{model}/{dataset}.parquet",
    log:
        "<logs>/measure_two_way/{model}/{dataset}.log",
    wildcard_constraints:
        model=one_of(n for n, m in study.models.items() if not m.answers_in_text),
    conda:
        "../envs/metrics.yaml"
    params:
        options=optional("head"),
        code=code_hash("metrics.choice"),
    shell:
        "python -m clip_robustness measure-two-way --embeddings {input.embeddings:q} --index {input.index:q}"
        " --labels {input.labels:q} --questions {input.questions:q} {params.options}"
        " --out {output.metrics:q} --predictions {output.predictions:q} 2> {log:q}"


rule ask:
    input:
        weights=weights_of_model,
        index="<resources>/index/{dataset}.parquet",
        questions=questions_of_dataset,
    output:
        answers="<results>/answers/{model}/{dataset}.parquet",
        manifest="<results>/answers/{model}/{dataset}.json",
    log:
        "<logs>/ask/{model}/{dataset}.log",
    benchmark:
        "<benchmarks>/ask/{model}/{dataset}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_questions,
    params:
        weights=subpath(input.weights, parent=True),
        precision=config["precision"],
        quantise=config["lmm"]["quantise"],
        work=store("answers"),
        code=code_hash(
            "inference.lmm",
            "inference.vision_language",
            "inference.images",
            imports=False,
        ),
    shell:
        "python -m clip_robustness ask --model {wildcards.model:q} --weights {params.weights:q}"
        " --index {input.index:q} --questions {input.questions:q} --precision {params.precision:q}"
        " --quantise {params.quantise:q} --out {output.answers:q} --work {params.work:q} 2>&1 | tee -i {log:q}"


rule measure_choice:
    input:
        answers="<results>/answers/{model}/{dataset}.parquet",
        synonyms=local(str(HERE / config["lmm"]["synonyms"])),
    output:
        metrics="<results>/metrics/choice/{model}/{dataset}.json",
        predictions="<results>/choices/{model}/{dataset}.parquet",
    log:
        "<logs>/measure_choice/{model}/{dataset}.log",
    wildcard_constraints:
        model=one_of(n for n, m in study.models.items() if m.answers_in_text),
    conda:
        "../envs/metrics.yaml"
    params:
        code=code_hash("metrics.choice"),
    shell:
        "python -m clip_robustness measure-choice --answers {input.answers:q} --synonyms {input.synonyms:q}"
        " --out {output.metrics:q} --predictions {output.predictions:q} 2> {log:q}"


rule compare_choice:
    input:
        predictions="<results>/choices/{model}/{dataset}.parquet",
        references=expand(
            "<results>/choices/{reference}/{{dataset}}.parquet",
            reference=study.choosers,
        ),
    output:
        "<results>/metrics/gain/{model}/{dataset}.json",
    log:
        "<logs>/compare_choice/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.choice"),
    shell:
        "python -m clip_robustness compare-choice --predictions {input.predictions:q}"
        " --references {input.references:q} --seed {params.seed:q} --resamples {params.resamples:q}"
        " --out {output:q} 2> {log:q}"
