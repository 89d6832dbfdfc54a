"""A failed run ends with what failed, which log, and what to do; colours are for terminals that want them."""

import os
import pty
import subprocess

import pytest

TABLE = "results/published/tables/models.parquet"
STUDY = ("--configfile", "config/published.yaml", "--", TABLE)


@pytest.mark.slow
def test_a_failed_run_ends_with_the_jobs_error(house):
    path = house.path / "config/published/open_clip.csv"
    path.write_text(path.read_text().replace("accuracy", "acuracy"))
    output = house.snakemake(*STUDY, fails=True)
    words = output[output.rindex("1 job failed") :]
    assert "import_published: logs/published/import_published.log" in words
    assert "error: config/published/open_clip.csv" in words or "open_clip.csv" in words.split("error: ")[1]
    assert "Do what each `error:` says" in words and "Traceback" not in words


@pytest.mark.slow
@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_a_terminal_that_wants_them(house, no_color):
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        house.command("--dry-run", *STUDY),
        cwd=house.path,
        env={**house.environment, "NO_COLOR": no_color, "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert run.wait() == 0 and b"import_published" in shown
    assert (b"\x1b[" in shown) == (no_color == "")
    assert "\x1b[" not in house.snakemake("--dry-run", *STUDY)
