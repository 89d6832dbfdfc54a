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
        " --out-index {output.index:q} --images {params.images:q} --seed {params.seed:q} 2> {log:q}"


rule corrupt_world_3d:
    input:
        index=corrupted_index,
        geometry=corrupted_geometry,
    output:
        archive="<resources>/archives/{dataset}.tar",
        index="<resources>/index/{dataset}.parquet",
    log:
        "<logs>/corrupt_world_3d/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_corrupted_3d"),
    conda:
        "../envs/torch.yaml"
    params:
        images=corrupted_images,
        corruptions=lambda wildcards: study.datasets[wildcards.dataset].details[
            "options"
        ]["corruptions"],
        seed=lambda wildcards: study.datasets[wildcards.dataset].details["options"][
            "seed"
        ],
        code=code_hash("mini.corruptions_3d"),
    shell:
        "python -m clip_robustness corrupt-world-3d --index {input.index:q} --geometry {input.geometry:q}"
        " --out-archive {output.archive:q} --out-index {output.index:q} --images {params.images:q}"
        " --corruptions {params.corruptions:q} --seed {params.seed:q} 2> {log:q}"


rule render_pairs:
    output:
        archive="<resources>/archives/{dataset}.tar",
        index="<resources>/index/{dataset}.parquet",
    log:
        "<logs>/render_pairs/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_pairs"),
    conda:
        "../envs/torch.yaml"
    params:
        world=world_json,
        code=code_hash("mini.pairs"),
    shell:
        "python -m clip_robustness render-pairs --world {params.world:q} --archive {output.archive:q}"
        " --index {output.index:q} 2> {log:q}"


rule combine_variations:
    input:
        variations_of_dataset,
    output:
        "<resources>/index/{dataset}.parquet",
    log:
        "<logs>/combine_variations/{dataset}.log",
    wildcard_constraints:
        dataset=of_family("mini_combined"),
    conda:
        "../envs/torch.yaml"
    params:
        names=lambda wildcards: list(
            study.datasets[wildcards.dataset].details["combine"]
        ),
        code=code_hash("mini.variations"),
    shell:
        "python -m clip_robustness combine-variations --indexes {input:q} --variations {params.names:q}"
        " --out {output:q} 2> {log:q}"


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
        " --predictions {input.predictions:q} --limit {params.limit:q} --seed {params.seed:q}"
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
        mem_mb=grown(2000),
    params:
        recipe=recipe_json,
        folder=subpath(output[0], parent=True),
        parent=parent_folder,
        verb=lambda wildcards: (
            "train-lmm"
            if study.models[wildcards.model].answers_in_text
            else "train-mini"
        ),
        code=lambda wildcards: code_hash(
            "mini.lmm"
            if study.models[wildcards.model].answers_in_text
            else "mini.train"
        ),
    shell:
        "python -m clip_robustness {params.verb:q} --recipe {params.recipe:q} --index {input.index:q}"
        " --labels {input.labels:q} {params.parent} --out {params.folder:q} 2>&1 | tee -i {log:q}"


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
