"""Weights, label spaces and zero-shot heads."""


localrules:
    fetch_weights,


rule fetch_weights:
    output:
        "<resources>/weights/{model}/manifest.json",
    log:
        "<logs>/fetch_weights/{model}.log",
    wildcard_constraints:
        model=f"{of_weights('hub')}|{of_weights('local')}",
    retries: 2
    conda:
        "../envs/torch.yaml"
    params:
        library=model_field("library"),
        weights=model_field("weights"),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m clip_robustness fetch-weights --model {wildcards.model} --library {params.library}"
        " --weights {params.weights:q} --out {params.folder:q} 2>&1 | tee {log:q}"


rule write_label_space:
    input:
        base=base_space_of_space,
    output:
        "<resources>/labels/{space}.json",
    log:
        "<logs>/write_label_space/{space}.log",
    conda:
        "../envs/torch.yaml"
    params:
        space=space_json,
        base=optional("base"),
        code=code_hash("inference.label_spaces"),
    shell:
        "python -m clip_robustness label-space --name {wildcards.space} --space {params.space:q}"
        " {params.base} --out {output:q} 2> {log:q}"


rule build_heads:
    input:
        weights="<resources>/weights/{model}/manifest.json",
        labels=expand("<resources>/labels/{space}.json", space=study.base_spaces),
    output:
        expand(
            "<results>/heads/{{model}}/{prompts}.{space}.npz",
            prompts=PROMPTS,
            space=study.base_spaces,
        ),
    log:
        "<logs>/build_heads/{model}.log",
    benchmark:
        "<benchmarks>/build_heads/{model}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=16000,
    params:
        prompts=str(HERE / config["prompts"]["table"]),
        templates=[study.prompts[name] for name in PROMPTS],
        names=PROMPTS,
        weights=subpath(input.weights, parent=True),
        folder=subpath(output[0], parent=True),
        work="<results>/store/heads",
        code=code_hash("inference.heads", "inference.load", imports=False),
    shell:
        "python -m clip_robustness heads --weights {params.weights:q} --prompts {params.prompts:q}"
        " --names {params.names} --labels {input.labels:q} --out {params.folder:q}"
        " --work {params.work:q} 2>&1 | tee {log:q}"
