"""What the papers claim and publish, held against a study's tables, and the study's page."""


rule write_report:
    input:
        figures=expand("<figures>/{figure}.png", figure=config["figures"]),
        tables=study_tables(),
        captions=expand(
            str(HERE / "report/captions/{figure}.rst"), figure=config["figures"]
        ),
    output:
        "<figures>/report.html",
    log:
        "<logs>/write_report.log",
    conda:
        "../envs/plot.yaml"
    params:
        study=study.name,
        title=config["title"],
        captions=captions_folder,
        code=code_hash("report.page"),
    shell:
        "python -m clip_robustness report --study {params.study} --title {params.title:q}"
        " --figures {input.figures:q} --tables {input.tables:q} --captions {params.captions:q}"
        " --out {output:q} 2> {log:q}"


rule evaluate_claims:
    input:
        tables=[*base_tables(), "<results>/tables/six_factors.parquet"],
        claims=str(HERE / "config/claims.yaml"),
        schema=str(HERE / "config/schemas/claims.schema.yaml"),
    output:
        "<results>/tables/claims.parquet",
    log:
        "<logs>/evaluate_claims.log",
    conda:
        "../envs/plot.yaml"
    params:
        study=study.name,
        code=code_hash("report.claims"),
    shell:
        "python -m clip_robustness evaluate-claims --claims {input.claims:q} --schema {input.schema:q}"
        " --tables {input.tables:q} --study {params.study} --out {output:q} 2> {log:q}"


rule compare_published:
    input:
        tables=expand("<results>/tables/{name}.parquet", name=measured_tables()),
        models="<results>/tables/models.parquet",
        published=sorted(
            str(path) for path in (HERE / "config/published").glob("*.csv")
        ),
    output:
        "<results>/tables/reproduction.parquet",
    log:
        "<logs>/compare_published.log",
    conda:
        "../envs/plot.yaml"
    params:
        published=lambda wildcards, input: str(Path(input.published[0]).parent),
        precision=config["precision"],
        code=code_hash("report.reproduction"),
    shell:
        "python -m clip_robustness compare-published --tables {input.tables:q} --models {input.models:q}"
        " --published {params.published:q} --precision {params.precision} --out {output:q} 2> {log:q}"
