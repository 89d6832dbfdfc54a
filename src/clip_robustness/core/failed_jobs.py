"""What a run that failed ends with: the jobs that failed, their logs, what these say, and what to do."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SHOWN = 5  # jobs; of hundreds that failed for one reason, a few tell it
LONGEST = 12  # lines of a message
LINES = {
    "rule": re.compile(r"\s*(?:Error in rule|rule) (\S+):$"),
    "jobid": re.compile(r"\s*jobid: (\d+)$"),
    "log": re.compile(r"\s*log: (.+?) \(check log file\(s\) for error details\)$"),
    "finished": re.compile(r"Finished jobid: (\d+)\b"),
}
ENDED = {  # by what Snakemake notes
    "Terminating processes on user request": "Interrupted",
    "Will exit after finishing currently running jobs": "Ended from outside (SIGTERM, as by a shutdown)",
}
RUN_AGAIN = "Do what each `error:` says, then give the same command again."
KILLED = "the job was killed"
MORE = "If it was for want of memory or time: fewer jobs at a time, or `set-resources` (keys mem_mb and runtime)."


class FailedJob(NamedTuple):
    rule: str
    logs: tuple[str, ...]


def last_words(run_logs: str | Sequence[str]) -> str:
    """The end of a failed run, from Snakemake's own logs of it: each failed job with what its log says last."""
    texts = [_text(path) for path in ([run_logs] if isinstance(run_logs, str) else run_logs)]
    run = list(own_lines("\n".join(texts)))
    jobs, ended = failed_jobs(run), [ENDED[sign] for line in run for sign in ENDED if line.startswith(sign)]
    if ended:  # its jobs ended with it, but for those that had a fault of their own
        jobs = [job for job in jobs if any(map(_is_own, map(fault_of, job.logs)))]
    if ended and not jobs:
        return f"\n{ended[0]}; what was finished is kept. Give the same command again.\n"
    if not jobs:
        return "\nThe run failed; its log names no job (`--quiet` hides them): see above, and the newest logs.\n"
    lines = ["", f"{len(jobs)} job{'s'[: len(jobs) > 1]} failed; what was finished is kept."]
    for job in jobs[:SHOWN]:
        lines += [f"  {job.rule}: {', '.join(job.logs) or 'it has no log; see above'}"]
        lines += [f"    {fault_of(log)}" for log in job.logs]
    if len(jobs) > SHOWN:
        lines.append(f"  and {len(jobs) - SHOWN} more, see above")
    lines += [RUN_AGAIN, MORE] if any(KILLED in line for line in lines) else [RUN_AGAIN]
    return "\n".join([*lines, ""])


def own_lines(text: str) -> Iterator[str]:
    """The lines of a run's log without the logs of failed jobs that it quotes: on a cluster these are runs, too."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("Logfile ") and line.endswith(":"):
            end = next(lines, "")
            next((quoted for quoted in lines if quoted == end), None)
        else:
            yield line


def failed_jobs(lines: Iterable[str]) -> list[FailedJob]:
    """The jobs that a run's log calls failed and, with a later attempt, not finished; in their order."""
    failed: dict[str, FailedJob] = {}
    rule = jobid = ""
    for line in lines:
        if found := LINES["finished"].match(line):
            failed.pop(found[1], None)
            rule = ""
        elif found := LINES["rule"].match(line):
            # Snakemake announces a job as `rule NAME:`, too; one that failed in a group is further to the right.
            rule = found[1] if line.startswith(("Error", " ")) else ""
        elif rule and (found := LINES["jobid"].match(line)):
            jobid = found[1]
            failed[jobid] = FailedJob(rule, ())
        elif rule and jobid in failed and (found := LINES["log"].match(line)):
            failed[jobid] = FailedJob(rule, tuple(found[1].split(", ")))
    return list(failed.values())


def fault_of(log: str) -> str:
    """The last `error:` of a job's log with the lines that belong to it, else how the log ends."""
    lines = [line for line in _text(log).splitlines() if line.strip()]
    begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if begins:
        message = lines[begins[-1] :]
        return "\n    ".join([*message[:LONGEST], *["… (the log has the rest)"][: len(message) > LONGEST]])
    if lines:
        return f"no `error:` in it: {KILLED}, or the program is at fault. It ends: {lines[-1].strip()}"
    return f"nothing in it: {KILLED}, or its machine was lost"


def _is_own(fault: str) -> bool:
    return fault.startswith("error: ") and not fault.startswith("error: interrupted")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
