"""A Slurm of one node with four GPUs, started and stopped by a test: real daemons, everything below one folder.

The GPUs are device files and no more. Slurm counts them and hands them out as it would real ones.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

GPUS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
TaskProlog={folder}/note_devices
ReturnToService=2
MinJobAge=86400
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=200000 Gres=gpu:{gpus}
PartitionName=cpu Nodes={host} Default=YES
PartitionName=gpu Nodes={host}
"""

NOTE_DEVICES = """#!/bin/sh
echo "$SLURM_JOB_ID ${{CUDA_VISIBLE_DEVICES:--}}" >> {folder}/devices
"""


# Snakemake's job step forgets SLURM_CONF, which real sites do not set: they have /etc/slurm.
SRUN = """#!/bin/sh
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""


class SlurmJob(NamedTuple):
    """A job as squeue tells of it. `name` is its rule and wildcards, which Snakemake puts into the comment."""

    id: int
    state: str
    name: str
    partition: str
    account: str
    limit: str
    memory: str
    start: str
    end: str

    @property
    def ended(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING")


def missing() -> str:
    """Why no Slurm can be started here, or ''."""
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no Slurm here ({', '.join(absent)} missing); Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root only"


class Cluster:
    """To be entered; leaving it ends every process that it started, and every job of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """That of programs which speak to this cluster."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_"))}
        return {**outer, "SLURM_CONF": str(self.conf), "PATH": os.pathsep.join(self._path())}

    def _path(self) -> list[str]:
        """Where programs lie, less sacct: nobody keeps accounts here, and Snakemake would ask it rather than squeue."""
        others = os.environ["PATH"].split(os.pathsep)
        return [f"{self.folder}/bin", *(folder for folder in others if not Path(folder, "sacct").exists())]

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            self._start("munged", "--foreground", "--force", *self._munge_files())
            wait_for(lambda: (self.folder / "munge.socket").exists(), "munged", self.log)
            self.start_controller()
            self._start("slurmd", "-D", "-f", str(self.conf))
            wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T").strip() == "idle", "an idle node", self.log)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _write_files(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(2)
        facts = {"folder": self.folder, "host": host, "gpus": GPUS}
        self.conf.write_text(SLURM_CONF.format(**facts, controller_port=ports[0], node_port=ports[1]))
        for i in range(GPUS):
            os.mknod(self.folder / f"nvidia{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/nvidia[0-{GPUS - 1}]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir()
        for program in Path(shutil.which("srun")).parent.iterdir():
            if program.name not in ("sacct", "srun"):
                (self.folder / "bin" / program.name).symlink_to(program)
        for name, script in (("note_devices", NOTE_DEVICES), ("bin/srun", SRUN)):
            (self.folder / name).write_text(script.format(folder=self.folder, srun=shutil.which("srun")))
            (self.folder / name).chmod(0o755)

    def _munge_files(self) -> list[str]:
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as out:
            self.daemons[program] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _end(self, program: str) -> None:
        if daemon := self.daemons.pop(program, None):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_controller(self) -> None:
        self._start("slurmctld", "-D", "-f", str(self.conf))
        wait_for(lambda: "UP" in self.ask("scontrol", "ping"), "slurmctld", self.log)

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def stop(self) -> None:
        """End the jobs, the daemons, and whatever they left."""
        for program in ("slurmctld", "slurmd", "munged"):
            self._end(program)
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=30)

    def _is_ours(self, process: psutil.Process) -> bool:
        """A job's process, or the daemon that watches over it: both have inherited where this cluster's files lie."""
        try:
            return process.environ().get("SLURM_CONF") == str(self.conf)
        except psutil.Error:
            return False

    def run(self, *command: str, **options: Any) -> str:
        """What a command prints that speaks to this cluster."""
        return subprocess.run(
            command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True, **options
        ).stdout

    def ask(self, *command: str) -> str:
        """The same, of one that may fail while the cluster starts."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def jobs(self, after: int = 0) -> list[SlurmJob]:
        """All jobs with an id beyond `after`, in the order of their ids."""
        form = "--format=%A|%T|%k|%P|%a|%l|%m|%S|%e"
        rows = [line.split("|") for line in self.run("squeue", "--states=all", "--noheader", form).splitlines()]
        return sorted(SlurmJob(int(row[0]), *row[1:]) for row in rows if int(row[0]) > after)

    @property
    def last(self) -> int:
        """The newest job's id."""
        return max((job.id for job in self.jobs()), default=0)

    def devices(self) -> dict[int, set[str]]:
        """Job -> what CUDA_VISIBLE_DEVICES was at the start of its tasks ('-' where it was not set)."""
        seen: dict[int, set[str]] = {}
        for line in (self.folder / "devices").read_text().splitlines():
            job, devices = line.split()
            seen.setdefault(int(job), set()).add(devices)
        return seen

    def log(self) -> str:
        """What the daemons have said, for a message."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.out")))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(done: Callable[[], bool], what: str, log: Callable[[], str] = str, seconds: float = 600) -> None:
    """Wait until something is so. `seconds` only ends a test that hangs: no result depends on it."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited in vain for {what}\n{log()}"
        time.sleep(0.3)
