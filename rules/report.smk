"""What the papers claim and publish, held against a study's tables, and the study's page."""


localrules:
    write_report,
    evaluate_claims,
    compare_published,


rule write_report:
    input:
        tables=study_tables(),
        figures=expand("<figures>/{figure}.png", figure=config["figures"]),
        captions=local(
            expand(
                str(HERE / "report/captions/{figure}.rst"), figure=config["figures"]
            )
        ),
        cards="<figures>/models",
        assets=assets("css", "html", "js"),
    output:
        page=report(
            "<figures>/report.html",
            caption="../report/page.rst",
            category="Report",
            labels={"page": "Claims, explorer, axes, provenance"},
        ),
        captions="<figures>/captions.json",
    log:
        "<logs>/write_report.log",
    conda:
        "../envs/plot.yaml"
    params:
        study=study.name,
        title=config["title"],
        captions=captions_folder,
        config=config_json(),
        lacking=lacking_json(),
        results=subpath(input[0], ancestor=2),
        code=code_hash("report.page"),
    shell:
        "python -m clip_robustness report --study {params.study:q} --title {params.title:q}"
        " --figures {input.figures:q} --tables {input.tables:q} --captions {params.captions:q}"
        " --cards {input.cards:q} --config {params.config:q} --lacking {params.lacking:q}"
        " --results {params.results:q} --out {output.page:q} --captions-out {output.captions:q} 2> {log:q}"


rule write_cards:
    input:
        tables=study_tables(),
        predictions=predictions_of_cards(),
        labels=labels_of_cards(),
        indexes=indexes_of_cards(),
        assets=assets("css"),
    output:
        directory("<figures>/models"),
    log:
        "<logs>/write_cards.log",
    conda:
        "../envs/plot.yaml"
    params:
        study=study.name,
        datasets=datasets_of_cards_json(),
        optional=optional("predictions", "labels", "indexes"),
        code=code_hash("report.cards"),
    shell:
        "python -m clip_robustness cards --study {params.study:q} --tables {input.tables:q}"
        " --datasets {params.datasets:q} {params.optional} --out {output:q} 2> {log:q}"


rule evaluate_claims:
    input:
        tables=[*base_tables(), "<results>/tables/six_factors.parquet"],
        claims=local(str(HERE / "config/claims.yaml")),
        schema=local(str(HERE / "config/schemas/claims.schema.yaml")),
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
        " --tables {input.tables:q} --study {params.study:q} --out {output:q} 2> {log:q}"


rule compare_published:
    input:
        tables=expand("<results>/tables/{name}.parquet", name=measured_tables()),
        models="<results>/tables/models.parquet",
        published=local(
            sorted(str(path) for path in (HERE / "config/published").glob("*.csv"))
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
        " --published {params.published:q} --precision {params.precision:q} --out {output:q} 2> {log:q}"
