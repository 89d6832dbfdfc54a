"""`plan`: its arithmetic, checked against sums by hand; its numbers of jobs are compared with Snakemake's elsewhere."""

import subprocess
import sys

import pytest
import yaml

from clip_robustness.core.registry import load_study
from clip_robustness.data import plan


def study(root, name="lite", **change):
    return load_study({**yaml.safe_load((root / f"config/{name}.yaml").read_text()), **change}, root)


def test_downloads_count_each_archive_once(root):
    paper = study(root, "config")
    assert plan.download_of(paper, ["imagenet_r", "imagenet_a"]) == (2_191_079_936 + 687_552_512, 0, 0)
    shared = plan.download_of(paper, ["imagenet_vid_robust", "ytbb_robust"])
    assert shared == (0, 0, 2)  # one archive for both, and the reviews of the second
    assert plan.download_of(paper, ["ninco", "ninco_popular"]) == (0, 0, 1)
    assert plan.download_of(paper, ["flickr30k"]).about > 0


def test_what_the_user_has_is_not_downloaded(root):
    mine = study(root, local={"imagenet_r": "/data/imagenet-r"})
    assert plan.download_of(mine, ["imagenet_r", "imagenet_a"]).known == 687_552_512


def test_corruptions_are_the_large_part(root):
    names = [f"imagenet_c_{part}" for part in ("noise", "blur", "weather", "digital")]
    known = 22_565_673_785 + 7_112_704_951 + 12_797_438_995 + 7_757_510_705
    assert plan.download_of(study(root, "config"), names).known == known


def test_disk_is_images_times_pixels(root):
    one = study(root, models={"names": ["resnet50.tv_in1k"]})
    images = 10_000 + 30_000 + 7_500 + 1_280 + 5_640
    stored = plan.stored_bytes(one)
    assert stored["pixel caches (at most 400)"] == images * 224 * 224 * 3
    assert stored["embeddings"] == images * 1000 * 2
    assert stored["weights"] == round(one.models["resnet50.tv_in1k"].params_m * 4e6)
    two = study(root, models={"names": ["resnet50.tv_in1k", "resnet101.tv_in1k"]})
    key = "pixel caches (at most 400)"
    assert plan.stored_bytes(two)[key] == stored[key], "two models of one spec share its pixels"


def test_pixels_that_most_models_share_are_cached_as_far_as_the_disk_goes(root):
    names = ["vit-b-32.openai", "vit-b-16.openai", "convnext_tiny.fb_in1k"]
    small = 8.3  # GB: the five sets of the shared spec, and nothing that one model has to itself
    some = study(root, models={"names": names}, pixel_cache_gb=small)
    assert {key for key, _ in some.cached_pixels} == {"resize224-bicubic_crop224"} and len(some.cached_pixels) == 5
    assert sum(v for k, v in plan.stored_bytes(some).items() if k.startswith("pixel")) <= small * 1e9
    assert not study(root, models={"names": names}, pixel_cache_gb=0).cached_pixels
    assert plan.job_counts(study(root, models={"names": names}, pixel_cache_gb=0)).get("cache_pixels") is None


def test_gpu_time_is_images_times_operations(root):
    models = study(root, "config").models
    small, large = models["vit-b-32.openai"], models["vit-l-14.openai"]
    assert small.gflops == pytest.approx(8.82, abs=0.05), "open_clip's own profile of ViT-B/32"
    assert plan.gpu_seconds(small, 1000, 40) == pytest.approx(small.gflops * 1e9 * 1000 / 40e12)
    assert plan.gpu_seconds(large, 1000, 40) / plan.gpu_seconds(small, 1000, 40) == pytest.approx(
        large.gflops / small.gflops
    )
    assert plan.gpu_seconds(small, 2000, 80) == pytest.approx(plan.gpu_seconds(small, 1000, 40))


def test_lines_of_one_checkpoint_share_its_weights(root):
    """CLIP with learned prompts is a line of its own, and neither downloaded nor stored again."""
    names = ["rn50.openai", "rn50.openai.auto"]
    both, one = (study(root, models={"names": chosen}) for chosen in (names, names[:1]))
    assert plan.stored_bytes(both)["weights"] == plan.stored_bytes(one)["weights"]
    assert plan.job_counts(both)["fetch_weights"] == 1 and plan.job_counts(both)["build_heads"] == 2


def test_jobs_of_one_model_by_hand(root):
    one = study(root, models={"names": ["resnet50.tv_in1k"]})
    assert plan.job_counts(one) == {
        "all": 1,
        "write_report": 1,
        "write_cards": 1,
        "draw_figure": 7,
        "fetch_archive": 5,
        "index_dataset": 5,
        "write_label_space": 4,  # imagenet_1k and the three that are cut or pooled from it
        "fetch_weights": 1,
        "cache_pixels": 5,
        "embed_natural": 1,
        "embed_cue_conflict": 1,
        "embed_ood": 1,
        "measure_accuracy": 3,
        "measure_calibration": 3,
        "measure_shape_bias": 1,
        "measure_ood": 1,
        "fit_temperature": 1,
        "gather_metric": 4,
        "gather_models": 1,
        "fit_baselines": 1,
        "compare_six_factors": 1,
        "evaluate_claims": 1,
        "compare_published": 1,
    }


def test_a_published_study_computes_nothing(root):
    counts = plan.job_counts(study(root, "published"))
    tables = {"import_published": 1, "fit_baselines": 1, "fit_factors": 1, "compare_six_factors": 1}
    tables |= {"evaluate_claims": 1, "compare_published": 1}
    tables["summarise_shifts"] = 1
    assert counts == {**tables, "draw_figure": 8, "write_report": 1, "write_cards": 1, "all": 1}


def test_a_table_is_aligned():
    text = plan.table([("NAME", "count", "GB"), ("a", 1000, 0.5), ("longer", 7, 12.25)])
    assert text.splitlines() == [
        "NAME    count     GB",
        "--------------------",
        "a       1,000   0.50",
        "longer      7  12.25",
    ]


@pytest.mark.parametrize("name", ["config", "lite", "published"])
def test_the_verb_prints_all_parts_and_starts_nothing(root, tmp_path, name):
    command = [sys.executable, "-m", "clip_robustness", "plan", "--config", str(root / f"config/{name}.yaml")]
    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root / "src")}, capture_output=True, text=True, check=True
    )
    for part in ("DOWNLOADS", "DISK", "GPU-HOURS", "JOBS", "TFLOP/s sustained"):
        assert part in run.stdout
    assert not list(tmp_path.iterdir())
    waiting = "waiting for you (registration)" in run.stdout
    assert waiting == (name == "config")


def test_it_does_not_import_snakemake_or_torch(root):
    code = "import sys; from clip_robustness.data import plan, doctor; print(sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root / "src")}, capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split("'"))
    assert not loaded & {"snakemake", "torch", "pandas", "pyarrow", "huggingface_hub", "requests", "matplotlib"}
