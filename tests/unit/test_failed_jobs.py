"""The end of a failed run names what failed, its log, and what that says."""

from pathlib import Path

import pytest

from clip_robustness.core.failed_jobs import ENDED, FailedJob, failed_jobs, fault_of, last_words

RUN = """
[Sun Nov 22 06:10:59 2026]
localrule gather_metric:
    input: a.json
    jobid: 3
    log: logs/gather.log
[Sun Nov 22 06:11:00 2026]
Error in rule gather_metric:
    message: None
    jobid: 3
    input: a.json
    log: logs/gather.log (check log file(s) for error details)
    shell:
        python -m clip_robustness gather
        (command exited with non-zero exit code)
[Sun Nov 22 06:11:01 2026]
Error in rule embed_natural:
    jobid: 4
    log: logs/one.log, logs/two.log (check log file(s) for error details)
[Sun Nov 22 06:11:02 2026]
Finished jobid: 3 (Rule: gather_metric)
Error in group measure_vit:
    jobs:
        rule measure_accuracy:
            jobid: 5
            output: b.json
            log: logs/b.log (check log file(s) for error details)
        rule measure_ood:
            jobid: 6
"""


def test_a_job_that_failed_and_a_later_attempt_finished_is_no_failed_job():
    found = failed_jobs(RUN.splitlines())
    assert found == [
        FailedJob("embed_natural", ("logs/one.log", "logs/two.log")),
        FailedJob("measure_accuracy", ("logs/b.log",)),
        FailedJob("measure_ood", ()),
    ]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("embed 3/9 images\nerror: x.tsv, line 3: wrong\n", "error: x.tsv, line 3: wrong"),
        ("error: first\nerror: last\nit has two lines\n", "error: last\n    it has two lines"),
        (
            "Traceback\nKeyError: 'x'\n",
            "no `error:` in it: the job was killed, or the program is at fault. It ends: KeyError: 'x'",
        ),
        ("", "nothing in it: the job was killed, or its machine was lost"),
    ],
)
def test_a_log_is_quoted_where_it_says_what_is_wrong(tmp_path, log, said):
    (tmp_path / "job.log").write_text(log)
    assert fault_of(str(tmp_path / "job.log")) == said


def test_a_long_message_is_cut(tmp_path):
    (tmp_path / "job.log").write_text("error: many\n" + "line\n" * 40)
    assert len(fault_of(str(tmp_path / "job.log")).splitlines()) == 13


def run_log(folder: Path, begin: str, job: str) -> str:
    """A run in which one job ended, with what its log says."""
    (folder / "job.log").write_text(job)
    error = f"Error in rule embed:\n    jobid: 1\n    log: {folder / 'job.log'} (check log file(s) for error details)\n"
    (folder / "run.log").write_text(begin + error)
    return str(folder / "run.log")


def test_a_killed_job_may_need_more_memory(tmp_path):
    assert "keys mem_mb and runtime" in last_words(run_log(tmp_path, "", ""))
    assert "keys mem_mb and runtime" not in last_words(run_log(tmp_path, "", "error: x.tsv: wrong\n"))


@pytest.mark.parametrize("sign", ENDED)
@pytest.mark.parametrize(
    "job", ["", "embed 3/9 images\n", "error: interrupted; run again: what was finished is kept\n"]
)
def test_a_run_that_was_ended_blames_no_job(tmp_path, sign, job):
    words = last_words(run_log(tmp_path, f"{sign}, this might take some time.\n", job))
    assert words == f"\n{ENDED[sign]}; what was finished is kept. Give the same command again.\n"


@pytest.mark.parametrize("sign", ENDED)
def test_a_fault_before_the_end_is_told(tmp_path, sign):
    words = last_words(run_log(tmp_path, f"{sign}\n", "error: x.tsv: wrong\n"))
    assert "1 job failed" in words and "error: x.tsv: wrong" in words


def test_a_log_that_is_quoted_is_not_the_run(tmp_path):
    """On a cluster it is that of a Snakemake of its own, which was told to end."""
    inner = "\n".join([*ENDED, "Error in rule embed:", "    jobid: 0", "=" * 9])
    quoted = f"Logfile a.log: empty file\nLogfile b.log:\n{'=' * 80}\n{inner}\n{'=' * 80}\n"
    words = last_words(run_log(tmp_path, quoted, "embed 3/9 images\n"))
    assert "1 job failed" in words and "Interrupted" not in words and "Ended" not in words


def test_of_many_failed_jobs_a_few_are_named(tmp_path):
    run = "".join(f"Error in rule embed_{n}:\n    jobid: {n}\n" for n in range(300))
    (tmp_path / "run.log").write_text(run)
    words = last_words([str(tmp_path / "run.log")])
    assert "300 jobs failed" in words and "and 295 more" in words and len(words.splitlines()) < 12
    assert "names no job" in last_words(str(tmp_path / "none.log"))
