"""Published results as tables: real models, no inference."""

if config["published"]:

    rule import_published:
        input:
            published_files(),
        output:
            expand(
                "<results>/tables/{table}.parquet",
                table=["models", "accuracy", "shape_bias", "factors", "retrieval"],
            ),
        log:
            "<logs>/import_published.log",
        conda:
            "../envs/data.yaml"
        params:
            folder=str(HERE / config["published"]),
            out=subpath(output[0], parent=True),
            study=study.name,
            code=code_hash("data.published"),
        shell:
            "python -m clip_robustness import-published --folder {params.folder:q} --out {params.out:q}"
            " --study {params.study:q} 2> {log:q}"
