"""Figures, from tables only."""


localrules:
    draw_figure,


rule draw_figure:
    input:
        tables_of_figure,
    output:
        pdf=report(
            "<figures>/{figure}.pdf",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        png="<figures>/{figure}.png",
    log:
        "<logs>/draw_figure/{figure}.log",
    conda:
        "../envs/plot.yaml"
    params:
        study=study.name,
        tables=subpath(input[0], parent=True),
        code=lambda wildcards: code_hash("figures.draw", f"figures.{wildcards.figure}"),
    shell:
        "python -m clip_robustness draw --figure {wildcards.figure:q} --study {params.study:q}"
        " --tables {params.tables:q} --pdf {output.pdf:q} --png {output.png:q} 2> {log:q}"
