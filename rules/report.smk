"""The study's page."""


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
