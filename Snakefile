"""How robust are CLIP models? Downloads, embeds, measures and draws; see README.md.

snakemake --cores all --resources gpu=4                  # reproduce the papers
snakemake figures/shape_bias.pdf                         # one figure
snakemake --configfile config/mini.yaml --cores all      # the offline study on models trained here
"""

from snakemake.utils import min_version

min_version("9.20")

if "study" not in config:

    configfile: "config/config.yaml"


pathvars:
    figures="figures",
    benchmarks="<results>/benchmarks",


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/text.smk"
include: "rules/embed.smk"
include: "rules/attack.smk"
include: "rules/correspondence.smk"
include: "rules/lmm.smk"
include: "rules/metrics.smk"
include: "rules/overlap.smk"
include: "rules/tables.smk"
include: "rules/published.smk"
include: "rules/figures.smk"
include: "rules/report.smk"


if any(dataset.is_rendered for dataset in study.datasets.values()):

    include: "rules/mini.smk"


report: "report/workflow.rst"


onerror:
    print(last_words(log), file=sys.stderr)


rule all:
    default_target: True
    input:
        "<figures>/report.html",
        expand("<figures>/{figure}.pdf", figure=config["figures"]),


rule tables:
    input:
        study_tables(),


# All data sets of the study, downloaded and indexed: also those that no figure shows yet.
rule data:
    input:
        all_data(),
