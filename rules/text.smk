"""Weights, label spaces and zero-shot heads."""


localrules:
    fetch_weights,
    write_label_space,


rule fetch_weights:
    output:
        "<resources>/weights/{model}/manifest.json",
    log:
        "<logs>/fetch_weights/{model}.log",
    wildcard_constraints:
        model=of_weights("hub", "local"),
    retries: 2
    conda:
        "../envs/torch.yaml"
    params:
        library=model_field("library"),
        architecture=model_field("architecture"),
        weights=model_field("weights"),
        lock=str(HERE / config["lock"]),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m clip_robustness fetch-weights --model {wildcards.model:q} --library {params.library:q}"
        " --architecture {params.architecture:q} --weights {params.weights:q} --lock {params.lock:q}"
        " --out {params.folder:q} 2>&1 | tee -i {log:q}"


rule blend_weights:
    input:
        unpack(blended_weights),
    output:
        "<resources>/weights/{model}/manifest.json",
    log:
        "<logs>/blend_weights/{model}.log",
    wildcard_constraints:
        model=of_weights("blend"),
    conda:
        "../envs/torch.yaml"
    resources:
        mem_mb=memory_of_model,
    params:
        share=lambda wildcards: study.models[wildcards.model].blended[2],
        parent=subpath(input.parent, parent=True),
        finetuned=subpath(input.finetuned, parent=True),
        folder=subpath(output[0], parent=True),
        code=code_hash("inference.weights", "inference.checkpoints", imports=False),
    shell:
        "python -m clip_robustness blend-weights --model {wildcards.model:q} --parent {params.parent:q}"
        " --finetuned {params.finetuned:q} --share {params.share:q} --out {params.folder:q} 2> {log:q}"


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
        "python -m clip_robustness label-space --name {wildcards.space:q} --space {params.space:q}"
        " {params.base} --out {output:q} 2> {log:q}"


rule search_prompts:
    input:
        weights=weights_of_model,
        embeddings=searched_on("<results>/embeddings/{model}/{dataset}.npy"),
        index=searched_on("<resources>/index/{dataset}.parquet"),
        labels=searched_on("<resources>/labels/{labels}.json"),
    output:
        "<results>/prompts/{model}/{prompts}.txt",
    log:
        "<logs>/search_prompts/{model}/{prompts}.log",
    benchmark:
        "<benchmarks>/search_prompts/{model}/{prompts}.tsv"
    wildcard_constraints:
        prompts=one_of(study.searches),
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_prompts,
    params:
        weights=subpath(input.weights, parent=True),
        search=search_options,
        precision=config["precision"],
        seed=config["seed"],
        code=code_hash(
            "inference.prompt_search",
            "inference.heads",
            "inference.load",
            "core.features",
            imports=False,
        ),
    shell:
        "python -m clip_robustness search-prompts --weights {params.weights:q} --embeddings {input.embeddings:q}"
        " --index {input.index:q} --labels {input.labels:q} {params.search} --seed {params.seed:q}"
        " --precision {params.precision:q} --out {output:q} 2>&1 | tee -i {log:q}"


rule build_heads:
    input:
        weights=weights_of_model,
        labels=expand("<resources>/labels/{space}.json", space=study.base_spaces),
        searched=searched_prompts,
    output:
        expand(
            "<results>/heads/{{model}}/{{prompts}}.{space}.npz",
            space=study.base_spaces,
        ),
    log:
        "<logs>/build_heads/{model}/{prompts}.log",
    benchmark:
        "<benchmarks>/build_heads/{model}/{prompts}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_prompts,
    params:
        table=str(HERE / config["prompts"]["table"]),
        templates=templates_of_set,
        precision=config["precision"],
        weights=subpath(input.weights, parent=True),
        folder=subpath(output[0], parent=True),
        searched=optional("searched"),
        work=store("heads"),
        code=code_hash("inference.heads", "inference.load", imports=False),
    shell:
        "python -m clip_robustness heads --weights {params.weights:q} --prompts {params.table:q}"
        " --names {wildcards.prompts:q} --labels {input.labels:q} --out {params.folder:q}"
        " --work {params.work:q} --precision {params.precision:q} {params.searched} 2>&1 | tee -i {log:q}"


rule encode_captions:
    input:
        weights=weights_of_model,
        index="<resources>/index/{dataset}.parquet",
    output:
        captions="<results>/embeddings/{model}/{dataset}.captions.npy",
        manifest="<results>/embeddings/{model}/{dataset}.captions.json",
    log:
        "<logs>/encode_captions/{model}/{dataset}.log",
    conda:
        "../envs/torch.yaml"
    threads: config["threads"]
    resources:
        gpu=GPUS,
        mem_mb=memory_of_model,
        runtime=minutes_of_prompts,
    params:
        weights=subpath(input.weights, parent=True),
        work=store("captions"),
        precision=config["precision"],
        code=code_hash(
            "inference.captions",
            "inference.heads",
            "inference.load",
            "core.captions",
            imports=False,
        ),
    shell:
        "python -m clip_robustness encode-captions --model {wildcards.model:q} --weights {params.weights:q}"
        " --index {input.index:q} --out {output.captions:q} --work {params.work:q}"
        " --precision {params.precision:q} 2>&1 | tee -i {log:q}"
