"""Metric files into tidy tables, and what is fitted across models."""


localrules:
    fit_baselines,
    summarise_shifts,
    fit_factors,
    compare_six_factors,


if not config["published"]:

    localrules:
        gather_metric,
        gather_models,

    rule gather_metric:
        input:
            metric_files,
        output:
            parquet="<results>/tables/{metric}.parquet",
            csv="<results>/tables/{metric}.csv",
        log:
            "<logs>/gather_metric/{metric}.log",
        conda:
            "../envs/metrics.yaml"
        params:
            study=study.name,
            code=code_hash("metrics.gather"),
        shell:
            "python -m clip_robustness gather --study {params.study:q} --metrics {input:q}"
            " --out {output.parquet:q} 2> {log:q}"

    rule gather_models:
        output:
            parquet="<results>/tables/models.parquet",
            csv="<results>/tables/models.csv",
        log:
            "<logs>/gather_models.log",
        conda:
            "../envs/metrics.yaml"
        params:
            models=models_json(),
            code=code_hash("metrics.gather"),
        shell:
            "python -m clip_robustness gather-models --models {params.models:q} --out {output.parquet:q} 2> {log:q}"


rule fit_baselines:
    input:
        accuracy="<results>/tables/accuracy.parquet",
        models="<results>/tables/models.parquet",
    output:
        baselines="<results>/tables/baselines.parquet",
        effective_robustness="<results>/tables/effective_robustness.parquet",
    log:
        "<logs>/fit_baselines.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=fit_options(),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.effective_robustness"),
    shell:
        "python -m clip_robustness fit-baselines --accuracy {input.accuracy:q} --models {input.models:q}"
        " --baselines {output.baselines:q} --out {output.effective_robustness:q}"
        " {params.options} --seed {params.seed:q} --resamples {params.resamples:q} 2> {log:q}"


rule summarise_shifts:
    input:
        accuracy="<results>/tables/accuracy.parquet",
        models="<results>/tables/models.parquet",
        adversarial=table_if_measured("adversarial"),
    output:
        parquet="<results>/tables/synthetic.parquet",
        csv="<results>/tables/synthetic.csv",
    log:
        "<logs>/summarise_shifts.log",
    conda:
        "../envs/metrics.yaml"
    params:
        options=shift_options(),
        adversarial=optional("adversarial"),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.corruption"),
    shell:
        "python -m clip_robustness summarise-shifts --accuracy {input.accuracy:q} --models {input.models:q}"
        " {params.adversarial} {params.options} --seed {params.seed:q} --resamples {params.resamples:q}"
        " --out {output.parquet:q} 2> {log:q}"


rule fit_factors:
    input:
        factors="<results>/tables/factors.parquet",
        models="<results>/tables/models.parquet",
    output:
        fits="<results>/tables/factor_fits.parquet",
        rows="<results>/tables/factor_robustness.parquet",
    log:
        "<logs>/fit_factors.log",
    conda:
        "../envs/metrics.yaml"
    params:
        population=config["fit"]["population"],
        patterns=factor_patterns(),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.factors"),
    shell:
        "python -m clip_robustness fit-factors --factors {input.factors:q} --models {input.models:q}"
        " --fits {output.fits:q} --out {output.rows:q} --population {params.population:q} {params.patterns}"
        " --seed {params.seed:q} --resamples {params.resamples:q} 2> {log:q}"


rule compare_six_factors:
    input:
        base_tables(),
    output:
        "<results>/tables/six_factors.parquet",
    log:
        "<logs>/compare_six_factors.log",
    conda:
        "../envs/metrics.yaml"
    params:
        tables=subpath(output[0], parent=True),
        options=six_factors_options(),
        seed=config["seed"],
        resamples=config["resamples"],
        code=code_hash("metrics.six_factors"),
    shell:
        "python -m clip_robustness six-factors --tables {params.tables:q} --out {output:q} {params.options}"
        " --seed {params.seed:q} --resamples {params.resamples:q} 2> {log:q}"
