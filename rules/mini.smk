"""The mini study's world and zoo: rendered and trained here, from nothing."""


rule render_world:
    output:
        archive="<resources>/archives/{dataset}.tar",
        index="<resources>/index/{dataset}.parquet",
        geometry="<resources>/geometry/{dataset}.npz",
    log:
        "<logs>/render_world/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_world"),
    conda:
        "../envs/torch.yaml"
    params:
        world=world_json,
        code=code_hash("mini.dataset"),
    shell:
        "python -m clip_robustness render-world --world {params.world:q} --archive {output.archive:q}"
        " --index {output.index:q} --geometry {output.geometry:q} 2> {log:q}"


rule corrupt_world:
    input:
        corrupted_index,
    output:
        archive="<resources>/archives/{dataset}.tar",
        index="<resources>/index/{dataset}.parquet",
    log:
        "<logs>/corrupt_world/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_corrupted"),
    conda:
        "../envs/torch.yaml"
    params:
        images=corrupted_images,
        seed=lambda wildcards: study.datasets[wildcards.dataset].details["options"][
            "seed"
        ],
        code=code_hash("mini.corruptions"),
    shell:
        "python -m clip_robustness corrupt-world --index {input:q} --out-archive {output.archive:q}"
        " --out-index {output.index:q} --images {params.images} --seed {params.seed} 2> {log:q}"


rule filter_misclassified:
    input:
        unpack(pool_of_dataset),
    output:
        "<resources>/index/{dataset}.parquet",
    log:
        "<logs>/filter_misclassified/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_filtered"),
    conda:
        "../envs/torch.yaml"
    params:
        limit=lambda wildcards: study.datasets[wildcards.dataset].images,
        seed=lambda wildcards: study.datasets[wildcards.dataset].details["options"][
            "seed"
        ],
        code=code_hash("mini.filtered"),
    shell:
        "python -m clip_robustness filter-misclassified --index {input.index:q}"
        " --predictions {input.predictions:q} --limit {params.limit} --seed {params.seed}"
        " --out-index {output:q} 2> {log:q}"


rule train_mini:
    input:
        unpack(training_data),
    output:
        "<resources>/weights/{model}/manifest.json",
    log:
        "<logs>/train_mini/{model}.log",
    wildcard_constraints:
        model=of_weights("mini"),
    conda:
        "../envs/torch.yaml"
    resources:
        mem_mb=2000,
    params:
        recipe=recipe_json,
        folder=subpath(output[0], parent=True),
        parent=parent_folder,
        code=code_hash("mini.train"),
    shell:
        "python -m clip_robustness train-mini --recipe {params.recipe:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.parent} --out {params.folder:q} 2>&1 | tee {log:q}"


rule write_mini_factors:
    input:
        annotated_index,
    output:
        "<resources>/annotations/{dataset}.parquet",
    log:
        "<logs>/write_mini_factors/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_factors"),
    conda:
        "../envs/torch.yaml"
    params:
        world=habits_json,
        code=code_hash("mini.factors"),
    shell:
        "python -m clip_robustness mini-factors --index {input:q} --world {params.world:q} --out {output:q} 2> {log:q}"
