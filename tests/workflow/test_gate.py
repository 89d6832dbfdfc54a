"""Data that needs registration or a licence click stops a run before its first job, and only a run that needs it."""

import re

import pytest

PAGE = "needs data that no program may fetch unasked"


def made(house) -> list[str]:
    """What jobs leave behind."""
    return [name for name in ("resources", "results", "figures", "logs") if (house.path / name).exists()]


def test_a_run_stops_before_any_job_with_one_page(house):
    output = house.snakemake("--resources", "gpu=4", fails=True)
    assert output.count(PAGE) == 1 and "Traceback" not in output
    for part in (
        "imagenet_val: ImageNet validation",
        "register at https://image-net.org",
        "    imagenet_val: /path/to/imagenet_val",
        "  accept: [objectnet]",
        "snakemake figures/shape_bias.pdf",
        "imagenet_v2 stands in for it",
    ):
        assert part in output
    assert not made(house) and "rule fetch" not in output


def test_a_dry_run_warns_and_plans(house):
    output = house.snakemake("--dry-run", "--quiet", "rules")
    assert output.count(PAGE) == 1
    assert house.jobs()["embed_natural"] > 0


def test_one_figure_is_not_stopped_by_data_that_it_does_not_show(house):
    """A real run towards shape bias, as far as its label spaces: no download, and ImageNet's gate stays silent."""
    assert PAGE not in house.snakemake("--dry-run", "figures/shape_bias.pdf")
    output = house.snakemake("figures/shape_bias.pdf", "--until", "write_label_space")
    assert PAGE not in output and "Finished jobid" in output
    assert (house.path / "resources/labels/imagenet_1k.json").is_file()


@pytest.mark.parametrize("value", ["true", "True"])
def test_skipping_plans_what_can_be_made_and_says_so_once(house, value):
    output = house.snakemake("--dry-run", "--quiet", "rules", "--config", f"skip_unavailable={value}")
    assert output.count("imagenet_v2 stands in for it") == 1 and PAGE not in output
    jobs = house.jobs("--config", f"skip_unavailable={value}")
    assert jobs["draw_figure"] == 16  # of 17, without visual factors
    assert jobs["index_dataset"] == 30  # of 34, without ImageNet, ObjectNet, Stylized-ImageNet and ImageNet-T
    full = house.snakemake("--dry-run", "--printshellcmds", "--config", f"skip_unavailable={value}")
    assert not re.search(r"(imagenet_val|objectnet)\.(parquet|npy)", full)
    assert "--reference imagenet_v2" in full
    attack = next(line for line in full.splitlines() if "-m clip_robustness attack --model" in line)
    assert "index/imagenet_v2.parquet" in attack and "--ids" not in attack, "a list names images of ImageNet"


def test_what_the_user_has_opens_the_gate(house):
    for name in ("val.tar", "devkit.tar.gz"):
        (house.path / name).write_bytes(b"")
    house.edit(
        "config/config.yaml", "# local:", "local: {imagenet_val: [val.tar, devkit.tar.gz]}\naccept: [objectnet]\n#"
    )
    output = house.snakemake("--dry-run", "resources/index/imagenet_val.parquet", "resources/index/objectnet.parquet")
    assert PAGE not in output
    assert re.search(r"input: val.tar, devkit.tar.gz, resources/labels/imagenet_1k.json", output)
    assert "resources/archives/objectnet/objectnet-1.0.zip" in output
    assert "resources/archives/imagenet_val" not in output


def test_a_local_path_that_is_not_there_is_one_message(house):
    house.edit("config/config.yaml", "# local:", "local: {imagenet_val: /nowhere/val}\n#")
    output = house.snakemake("--dry-run", fails=True)
    assert "local.imagenet_val: /nowhere/val: no such file or folder" in output


def test_all_data_of_the_study_on_demand(house):
    jobs = house.jobs("--config", "skip_unavailable=true", "--", "data")
    assert {"fetch_archive", "fetch_hub", "index_dataset", "write_label_space"} <= set(jobs)
    assert "cache_pixels" not in jobs and "fetch_weights" not in jobs
    house.edit("config/config.yaml", "# local:", "local: {imagenet_val: Snakefile}\n#")
    jobs = house.jobs("--", "resources/annotations/imagenet_x.parquet")
    assert jobs == {"fetch_archive": 1, "index_dataset": 1, "write_label_space": 1, "annotate_images": 1}


def test_a_made_data_set_comes_from_the_images_that_the_user_has(house):
    house.edit("config/config.yaml", "# local:", "local: {imagenet_val: Snakefile}\n#")
    jobs = house.jobs("--", "resources/index/imagenet_t.parquet")
    assert jobs == {"derive_dataset": 1, "index_dataset": 2, "write_label_space": 1}
    output = house.snakemake("--dry-run", "--printshellcmds", "resources/index/imagenet_t.parquet")
    assert PAGE not in output and "config/typographic/imagenet_t.csv" in output


def test_a_made_data_set_waits_for_its_images(house):
    output = house.snakemake("resources/index/imagenet_t.parquet", fails=True)
    assert output.count(PAGE) == 1 and "imagenet_t: /path/to" not in output and not made(house)


def test_a_hub_data_set_comes_from_the_hub(house):
    output = house.snakemake("--dry-run", "resources/index/flickr30k.parquet")
    assert "resources/hub/flickr30k" in output and "rule fetch_hub" in output


@pytest.mark.parametrize("target", ["resources/archives/imagenet_r/other.tar", "resources/index/imagenet_x.parquet"])
def test_only_what_the_table_lists_can_be_asked_for(house, target):
    assert "MissingRuleException" in house.snakemake("--dry-run", target, fails=True)
