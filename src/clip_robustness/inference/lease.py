"""One GPU, one job. Snakemake only counts GPUs; it never says which one a job may use.

A job takes an exclusive lock on one file a device, in a folder that all users of the machine share, and
sees only that device. The kernel frees the lock when the process ends, however it ends. An allocation by
Slurm is taken as it is given. No GPU means the CPU, said once in the log.
"""

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DEVICES_VARIABLE = "CLIP_ROBUSTNESS_DEVICES"  # declares devices by hand: "0,1", or "" for none


def devices() -> list[str]:
    """Ids of the GPUs that this process may choose from."""
    for variable in (DEVICES_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [part.strip() for part in os.environ[variable].split(",") if part.strip() not in ("", "-1")]
    nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in nodes if match), key=int)


def folder() -> Path:
    """The folder of the lock files, writable by every user."""
    path = Path(tempfile.gettempdir()) / "clip_robustness-devices"
    path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # it belongs to the user who came first
        path.chmod(0o1777)
    return path


@contextlib.contextmanager
def lease(poll: float = 0.5) -> Iterator[str | None]:
    """Hold one GPU, or None where there is none; while it is held, CUDA_VISIBLE_DEVICES names it alone.

    To be entered before torch first looks at CUDA.
    """
    available = devices()
    if not available:
        print("no GPU: running on the CPU", file=sys.stderr, flush=True)
        yield None
        return
    if "SLURM_JOB_ID" in os.environ and "CUDA_VISIBLE_DEVICES" in os.environ:
        yield available[0]
        return
    device, handle = _wait_for_one(available, poll)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield device
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        os.close(handle)


def _wait_for_one(available: list[str], poll: float) -> tuple[str, int]:
    waiting = False
    while True:
        for device in available:
            name = re.sub(r"[^\w.-]", "_", device)
            # Read-only is enough for flock, and works on a file of another user.
            handle = os.open(folder() / f"{name}.lock", os.O_RDONLY | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return device, handle
            except BlockingIOError:
                os.close(handle)
        if not waiting:
            print(f"waiting for one of {len(available)} GPUs", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(poll)
