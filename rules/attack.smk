"""Adversarial attacks on the in-distribution set: a job for each model and attack."""


rule attack_images:
    input:
        weights=weights_of_model,
        index=f"<resources>/index/{ID}.parquet",
        labels=f"<resources>/labels/{ID_LABELS}.json",
        head=head_of(ID),
        substitute_weights=substitute("<resources>/weights/{weights}/manifest.json"),
    output:
        attacked="<results>/attacks/{model}/{attack}.parquet",
        manifest="<results>/attacks/{model}/{attack}.json",
    log:
        "<logs>/attack_images/{model}/{attack}.log",
    benchmark:
        "<benchmarks>/attack_images/{model}/{attack}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_attack,
    params:
        library=model_field("library"),
        preprocess=model_field("preprocess"),
        weights=subpath(input.weights, parent=True),
        settings=attack_json,
        substitute=substitute_json,
        head=optional("head"),
        images=config["attacks"]["images"],
        ids=attack_ids(),
        eps_space=config["attacks"]["eps_space"],
        seed=config["seed"],
        work=store("attacks"),
        code=code_hash(
            "inference.attack",
            "inference.attack_settings",
            "inference.attacks",
            "inference.gradients",
            "inference.victims",
            "inference.load",
            *PIXELS,
            imports=False,
        ),
    shell:
        "python -m clip_robustness attack --model {wildcards.model:q} --attack {wildcards.attack:q}"
        " --library {params.library:q} --preprocess {params.preprocess:q} --weights {params.weights:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.head} --settings {params.settings:q}"
        " --substitute {params.substitute:q} --images {params.images:q} {params.ids}"
        " --eps-space {params.eps_space:q} --seed {params.seed:q} --out {output.attacked:q} --work {params.work:q}"
        " 2>&1 | tee -i {log:q}"


rule measure_adversarial:
    input:
        expand(
            "<results>/attacks/{{model}}/{attack}.parquet",
            attack=config["attacks"]["names"],
        ),
    output:
        "<results>/metrics/adversarial/{model}/{dataset}.json",
    log:
        "<logs>/measure_adversarial/{model}/{dataset}.log",
    conda:
        "../envs/metrics.yaml"
    params:
        code=code_hash("metrics.adversarial"),
    shell:
        "python -m clip_robustness measure-adversarial --attacks {input:q}"
        " --out {output:q} 2> {log:q}"
