"""Several GPUs on one box, through the real Snakemake: it counts them, the leases share them out."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from clip_robustness.inference.lease import DEVICES_VARIABLE

SNAKEFILE = textwrap.dedent(
    """
    rule all:
        input:
            expand("done/{job}", job=range(int(config["jobs"]))),

    rule work:
        output:
            "done/{job}",
        resources:
            gpu=1,
        shell:
            "{config[python]} job.py {config[meeting]} {config[wanted]} {output} && touch {output}"
    """
)
# Holds a device until as many jobs as wanted have come as far, and fails where another job holds the same.
JOB = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from clip_robustness.inference.lease import lease
    meeting, wanted, me = Path(sys.argv[1]), sys.argv[2], f"{os.getuid()}-{os.getpid()}"
    kind, number = wanted.split("=")
    def come(where):
        (meeting / where / me).touch()
        return len(os.listdir(meeting / where))
    come("started")
    with lease(poll=0.01) as device:
        using = meeting / f"using-{device}"
        os.close(os.open(using, os.O_CREAT | os.O_EXCL))
        come("held")
        deadline = time.monotonic() + 120
        while len(os.listdir(meeting / kind)) < int(number):
            assert time.monotonic() < deadline, f"{kind}: {os.listdir(meeting / kind)}"
            time.sleep(0.01)
        (meeting / "together" / f"{len(list(meeting.glob('using-*')))}-{me}").touch()
        using.unlink()
    """
)


class Box:
    """A machine of four GPUs, as far as leases know, on which Snakemake runs in several folders."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root
        self.meeting = path / "meeting"
        for folder in ("started", "held", "together"):
            (self.meeting / folder).mkdir(parents=True)
            (self.meeting / folder).chmod(0o777)
        self.meeting.chmod(0o777)
        self.devices = [f"GPU-{uuid.uuid4()}" for _ in range(4)]

    def folder(self, name: str, job: str = JOB) -> Path:
        folder = self.path / name
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "Snakefile").write_text(SNAKEFILE)
        (folder / "job.py").write_text(job)
        shutil.copytree(self.root / "profiles/default", folder / "profiles/default")
        return folder

    def snakemake(self, folder: Path, *options: str, jobs: int, wanted: str = "started=1", prefix=()):
        config = {"jobs": jobs, "wanted": wanted, "meeting": self.meeting, "python": sys.executable}
        settings = [f"{name}={value}" for name, value in config.items()]
        command = [str(Path(sys.executable).parent / "snakemake"), "--cores", "4", *options, "--config", *settings]
        environment = {**os.environ, "PYTHONPATH": str(self.root / "src"), "HOME": str(folder), "TMPDIR": str(folder)}
        environment |= {DEVICES_VARIABLE: ",".join(self.devices), "XDG_CACHE_HOME": str(folder / "cache")}
        return subprocess.Popen(
            [*prefix, *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def came(self, where: str) -> list[str]:
        """The jobs (user-process) that started, or held a device."""
        return [path.name for path in (self.meeting / where).iterdir()]

    def together(self) -> set[int]:
        """How many devices were in use at once."""
        return {int(name.split("-")[0]) for name in self.came("together")}


@pytest.fixture
def box(tmp_path, root) -> Box:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):  # pytest's are closed to other users
        folder.chmod(0o755)
    return Box(tmp_path, root)


def ends_well(run: subprocess.Popen) -> None:
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output[-4000:]


def test_four_gpus_are_leased_at_once(box):
    """No job goes on until four hold a device, each another one."""
    ends_well(box.snakemake(box.folder("one"), "--resources", "gpu=4", jobs=6, wanted="held=4"))
    assert len(box.came("held")) == 6 and 4 in box.together()


def test_without_resources_one_at_a_time(box):
    """Of four GPUs: profiles/default says so, and loads by itself."""
    ends_well(box.snakemake(box.folder("one"), jobs=3))
    assert len(box.came("held")) == 3 and box.together() == {1}


def test_two_runs_share_the_gpus(box):
    """Eight jobs start before the first lets go: four wait for the leases of the other run."""
    runs = [
        box.snakemake(box.folder(name), "--resources", "gpu=4", jobs=4, wanted="started=8") for name in ("one", "two")
    ]
    for run in runs:
        ends_well(run)
    assert len(box.came("held")) == 8 and max(box.together()) == 4


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to be two users")
def test_two_users_share_the_gpus(box):
    """The other user may read what root may (where this Python lies), and nothing more."""
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    reads = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    ours = box.snakemake(box.folder("ours"), "--resources", "gpu=4", jobs=4, wanted="started=8")
    theirs = box.snakemake(
        box.folder("theirs"), "--resources", "gpu=4", jobs=4, wanted="started=8", prefix=(*nobody, *reads)
    )
    ends_well(ours)
    ends_well(theirs)
    users = {name.split("-")[0] for name in box.came("held")}
    assert users == {"0", "65534"} and max(box.together()) == 4


# The first to come holds the device until it is killed; every other one goes on as soon as it has it.
HOLDS = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from clip_robustness.inference.lease import lease
    meeting = Path(sys.argv[1])
    (meeting / "started" / str(os.getpid())).touch()
    with lease(poll=0.01):
        first = not os.listdir(meeting / "held")
        (meeting / "held" / str(os.getpid())).touch()
        time.sleep(600 if first else 0)
    """
)


def until(happened, run: subprocess.Popen) -> None:
    while not happened():
        assert run.poll() is None, run.communicate()[0][-4000:]
        time.sleep(0.02)


def test_a_killed_job_s_gpu_goes_to_the_next(box):
    box.devices = box.devices[:1]
    run = box.snakemake(box.folder("one", HOLDS), "--resources", "gpu=2", "--retries", "1", jobs=2)
    until(lambda: len(box.came("started")) == 2 and box.came("held"), run)
    (holder,) = box.came("held")
    os.kill(int(holder), signal.SIGKILL)
    ends_well(run)
    assert len(box.came("held")) == 3  # the killed one's second try among them
