"""The end of a failed run names what failed, its log, and what that says."""

import pytest

from clip_robustness.core.failed_jobs import FailedJob, failed_jobs, fault_of, last_words

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
        ("", "nothing in it: the job was killed before it began, or its machine was lost"),
    ],
)
def test_a_log_is_quoted_where_it_says_what_is_wrong(tmp_path, log, said):
    (tmp_path / "job.log").write_text(log)
    assert fault_of(str(tmp_path / "job.log")) == said


def test_a_long_message_is_cut(tmp_path):
    (tmp_path / "job.log").write_text("error: many\n" + "line\n" * 40)
    assert len(fault_of(str(tmp_path / "job.log")).splitlines()) == 13


def test_of_many_failed_jobs_a_few_are_named(tmp_path):
    run = "".join(f"Error in rule embed_{n}:\n    jobid: {n}\n" for n in range(300))
    (tmp_path / "run.log").write_text(run)
    words = last_words([str(tmp_path / "run.log")])
    assert "300 jobs failed" in words and "and 295 more" in words and len(words.splitlines()) < 12
    assert "names no job" in last_words(str(tmp_path / "none.log"))
