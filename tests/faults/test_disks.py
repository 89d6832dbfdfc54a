"""A disk that is full, and folders that may not be written to, under every rule's outputs.

Five rules of different wings; CLIP_ROBUSTNESS_KILLS above 5 (`make faults`) takes all. Downloads:
tests/unit/test_fetch_faults.py; unpacking: tests/unit/test_zips.py; the middle of a shard and of a pixel cache:
tests/unit/test_embed.py and test_pixel_cache.py.
"""

import subprocess

import pytest

from tests.workflow.conftest import SMALL_CONFIG

from .conftest import DATASET, MODEL, Finished, as_a_user, own_copy, visible
from .jobs import Job, one_of_each, redirected
from .test_kills import ROUNDS

SOME = ("cache_pixels", "embed_natural", "build_heads", "measure_accuracy", "gather_metric", "draw_figure")
SOME += ("index_dataset", "attack_images", "write_report")
SLOW = ("train_mini", "search_prompts")  # tested by what they share with others: `core.atomic`


def chosen(jobs: list[Job]) -> list[Job]:
    return [job for rule, job in one_of_each(jobs).items() if rule in SOME or (ROUNDS > 5 and rule not in SLOW)]


@pytest.mark.parametrize("left", [0, 6000])
def test_a_full_disk_under_every_kind_of_output(finished: Finished, small_disk, jobs, left):
    """None has half a file, all name one of theirs and the remedy, and with room they come whole."""
    for job in chosen(jobs):
        words = redirected(job, small_disk.path)
        small_disk.fill(left)
        code, said = finished.call(words)
        if left == 0 or code:
            assert code == 1, f"{job.rule} did not notice"
            assert f"error: {small_disk.path}" in said, f"{job.rule} names no file of its own: {said}"
            assert "No space left on device" in said and "make room" in said, (job.rule, said)
            assert "Traceback" not in said, (job.rule, said)
        half = {name: (small_disk.path / name).read_bytes() for name in visible(small_disk.path) - {"filler"}}
        small_disk.empty()
        code, said = finished.call(words)
        assert code == 0, (job.rule, said)
        assert all((small_disk.path / output).exists() for output in job.outputs), job.rule
        for name, content in half.items():
            path = small_disk.path / name
            assert not path.is_file() or path.read_bytes() == content, f"{job.rule}: {name} was not whole"
        small_disk.clear()


def test_a_read_only_disk_under_every_kind_of_output(finished: Finished, small_disk, jobs):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.path)], check=True)
    for job in chosen(jobs):
        code, said = finished.call(redirected(job, small_disk.path))
        assert code == 1 and "Read-only file system" in said, (job.rule, said)
        assert "mount it for writing" in said or "choose a folder that you may write to" in said, (job.rule, said)
        assert f"error: {small_disk.path}" in said and "Traceback" not in said, (job.rule, said)


def test_a_folder_of_another_user(finished: Finished, tmp_path):
    """Permissions bind root's jobs here as they bind a user's."""
    out = tmp_path / "theirs"
    out.mkdir(mode=0o555)
    metrics = sorted((finished.results / "metrics/accuracy").glob("*/*.json"))
    job = finished.start("gather", as_a_user, study="mini", metrics=metrics, out=out / "t.parquet")
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1 and f"error: {out / 't.parquet'}: Permission denied; give yourself the right" in said
    assert "Traceback" not in said and list(out.iterdir()) == []
    job = finished.start("gather", as_a_user, study="mini", metrics=metrics, out=out / "new/t.parquet")
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1 and f"error: {out / 'new'}: Permission denied; give yourself the right" in said


@pytest.mark.parametrize("of", ["embedding", "head", "table"])
def test_what_may_not_be_read_is_not_called_damaged(finished: Finished, tmp_path, of):
    """Nor is anybody told to delete it."""
    path = (
        finished.results
        / {
            "embedding": f"embeddings/{MODEL}/{DATASET}.npy",
            "head": f"heads/{MODEL}/mini_1.mini.npz",
            "table": "tables/shape_bias.parquet",
        }[of]
    )
    own_copy(path).chmod(0)
    verb, options = ("measure-accuracy", finished.accuracy_options(tmp_path))
    if of == "table":
        files = {"pdf": tmp_path / "f.pdf", "png": tmp_path / "f.png"}
        verb, options = "draw", {"figure": "shape_bias", "study": "mini", "tables": path.parent, **files}
    job = finished.start(verb, as_a_user, **options)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1 and f"error: {path}: Permission denied; give yourself the right to read" in said, said
    assert "delete" not in said and "Traceback" not in said


@pytest.mark.slow
def test_results_that_may_not_be_written_to_stop_a_run_and_harm_nothing(copied):
    """One table is gone and its folder closed; opened again, the same command goes on."""
    tables = copied.path / "results/mini/tables"
    whole = (tables / "shape_bias.parquet").read_bytes()
    (tables / "shape_bias.parquet").unlink()
    tables.chmod(0o555)
    target = "results/mini/tables/shape_bias.parquet"
    command = copied.command(*SMALL_CONFIG, target)
    run = subprocess.run(command, cwd=copied.path, env=copied.environment, text=True, capture_output=True,
                         preexec_fn=as_a_user)  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 1 and "results/mini/tables: Permission denied; give yourself the right" in said
    assert "Traceback" not in said and not (tables / "shape_bias.parquet").exists()
    tables.chmod(0o755)
    copied.snakemake(*SMALL_CONFIG, target)
    assert (tables / "shape_bias.parquet").read_bytes() == whole


@pytest.mark.slow
def test_a_run_whose_figures_find_no_room_goes_on_when_there_is_some(copied, small_disk):
    figures = copied.path / "figures/mini"
    whole = (figures / "shape_bias.pdf").read_bytes()
    subprocess.run(["mount", "--bind", str(small_disk.path), str(figures)], check=True)
    try:
        small_disk.fill()
        said = copied.snakemake(*SMALL_CONFIG, "figures/mini/shape_bias.pdf", fails=True)
        assert "error: figures/mini/shape_bias.pdf: No space left on device; make room, then run again" in said
        assert "Traceback" not in said
        small_disk.empty()
        copied.snakemake(*SMALL_CONFIG, "figures/mini/shape_bias.pdf")
        assert (figures / "shape_bias.pdf").read_bytes() == whole
    finally:
        subprocess.run(["umount", "--lazy", str(figures)], check=True)
