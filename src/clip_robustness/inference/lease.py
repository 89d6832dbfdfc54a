"""One GPU, one job. Snakemake only counts GPUs; it never says which one a job may use.

A job holds a GPU by binding a Unix socket of that GPU's name in Linux's abstract namespace, which the whole
machine shares: every user, whatever TMPDIR. No file means none to be deleted, owned by another user or swapped
for a link, and the kernel frees the name when the process ends, however it ends. In a Slurm allocation the
devices given to it are shared out among its own processes. No GPU means the CPU, said once in the log.
"""

import contextlib
import errno
import functools
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from clip_robustness.core.io import InputError

DEVICES_VARIABLE = "CLIP_ROBUSTNESS_DEVICES"  # declares devices by hand: "0,1", or "" for none
NODES = Path("/dev")
DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w./-]+")


def devices() -> list[str]:
    """The GPUs that this process may choose from, as CUDA_VISIBLE_DEVICES names them: by UUID where it is known.

    Numbers are nvidia-smi's. Errors: `InputError` for a CLIP_ROBUSTNESS_DEVICES that names no devices.
    """
    for variable in (DEVICES_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return list(dict.fromkeys(device for name in _listed(variable) for device in _named(name)))
    return list(itertools.chain(*_installed()))


def _listed(variable: str) -> list[str]:
    names = [part.strip() for part in os.environ[variable].split(",")]
    if variable == DEVICES_VARIABLE and names not in ([""], ["-1"]):
        wrong = next((name for name in names if not DEVICE.fullmatch(name)), None)
        if wrong is not None:
            wanted = "expected numbers or UUIDs of GPUs, such as 0,1, or nothing for the CPU"
            raise InputError(f"{variable}={os.environ[variable]}: '{wrong}' is no device; {wanted}")
    # As CUDA reads it: up to the first that is no device, such as -1, or the NoDevFiles of Slurm.
    return list(itertools.takewhile(DEVICE.fullmatch, names))


def _named(name: str) -> tuple[str, ...]:
    """A number or an abbreviated UUID as the UUID, so that two spellings of one GPU are one lease."""
    if name.isdigit():
        return _installed()[int(name)] if int(name) < len(_installed()) else (name,)
    matching = [uuid for uuid in itertools.chain(*_installed()) if uuid.startswith(name)]
    return tuple(matching) if len(matching) == 1 else (name,)


@functools.cache
def _installed() -> tuple[tuple[str, ...], ...]:
    """Each GPU of the machine, or of the container: itself, or the MIG instances that it is cut into."""
    try:
        tool = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        # CUDA counts from 0, whatever the numbers of the nodes: a container may be given nvidia3 alone.
        nodes = [path for path in NODES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        return tuple((str(number),) for number in range(len(nodes)))
    found: list[tuple[str, ...]] = []
    for uuid in re.findall(r"\(UUID: ([^)\s]+)\)", tool.stdout):
        if found and uuid.startswith("MIG-"):  # below the line of its GPU
            found[-1] = (*(other for other in found[-1] if other.startswith("MIG-")), uuid)
        else:
            found.append((uuid,))
    return tuple(found)


@contextlib.contextmanager
def lease(poll: float = 0.5) -> Iterator[str | None]:
    """Hold one GPU, or None where there is none; while it is held, CUDA_VISIBLE_DEVICES names it alone.

    To be entered before torch first looks at CUDA. Errors: as those of `devices`.
    """
    available = devices()
    if not available:
        print("no GPU: running on the CPU", file=sys.stderr, flush=True)
        yield None
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    device, claim = _wait_for_one(available, poll)
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield device
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        claim.close()


def _wait_for_one(available: list[str], poll: float) -> tuple[str, socket.socket]:
    # What Slurm gave belongs to this job alone, and each job may number its own from 0.
    given = "SLURM_JOB_ID" in os.environ and "CUDA_VISIBLE_DEVICES" in os.environ
    scope = f"slurm-{os.environ['SLURM_JOB_ID']}/" if given else ""
    waiting = False
    while True:
        for device in available:
            claim = _claim(f"clip_robustness-gpu/{scope}{device}")
            if claim is not None:
                return device, claim
        if not waiting:
            print(f"waiting for one of {len(available)} GPUs", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(poll)


def _claim(name: str) -> socket.socket | None:
    """A socket of that name, or None where another process has it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0{name}")
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return claim
