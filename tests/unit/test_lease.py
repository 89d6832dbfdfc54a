"""One GPU, one job."""

import os
import subprocess
import sys
import textwrap
import uuid

import pytest

from clip_robustness.core.io import InputError
from clip_robustness.inference import lease as lease_module
from clip_robustness.inference.lease import devices, lease

JOB = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from clip_robustness.inference.lease import lease
    out, rounds = Path(sys.argv[1]), int(sys.argv[2])
    for _ in range(rounds):
        with lease(poll=0.01) as device:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == device
            inside = out / f"using-{device}"
            handle = os.open(inside, os.O_CREAT | os.O_EXCL)  # fails where two hold one device
            time.sleep(0.02)
            os.close(handle)
            inside.unlink()
            with open(out / "log", "a") as log:
                log.write(device + "\\n")
    """
)
HOLD = textwrap.dedent(
    """
    import time
    from clip_robustness.inference.lease import lease
    with lease() as device:
        print(device, flush=True)
        time.sleep(600)
    """
)
# As nvidia-smi -L prints them; the second GPU is cut into two.
TWO_GPUS = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-7a12f3d0-0b5e-4c55-9a3f-6d0f4a1b2c3d)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
"""
FIRST = "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"
CUT = ["MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"]


@pytest.fixture
def names():
    """Two devices that no other process of this machine declares."""
    return [f"GPU-{uuid.uuid4()}" for _ in range(2)]


@pytest.fixture(autouse=True)
def environment(root, tmp_path, monkeypatch):
    """A machine without GPUs, tools and allocations."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", lease_module.DEVICES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(lease_module, "NODES", tmp_path / "dev")
    lease_module._installed.cache_clear()
    yield {**os.environ, "PYTHONPATH": str(root / "src")}
    lease_module._installed.cache_clear()


def install_tool(tmp_path, prints="", code=0):
    tool = tmp_path / "bin/nvidia-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\necho '{prints}'\nexit {code}\n")
    tool.chmod(0o755)


def start(script, environment, *arguments):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_jobs_on_two_devices_never_share_one(environment, names, tmp_path):
    environment[lease_module.DEVICES_VARIABLE] = ",".join(names)
    jobs = [start(JOB, environment, str(tmp_path), "8") for _ in range(4)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, errors
    used = (tmp_path / "log").read_text().split()
    assert len(used) == 32 and set(used) == set(names)


def test_a_killed_job_frees_its_device_at_once(environment, names, tmp_path):
    environment[lease_module.DEVICES_VARIABLE] = names[0]
    with start(HOLD, environment) as holder:
        assert holder.stdout.readline().strip() == names[0]
        holder.kill()
        holder.wait()
        assert lease_module._claim(f"clip_robustness-gpu/{names[0]}") is not None


def test_jobs_meet_whatever_their_temporary_folders(environment, names, tmp_path):
    """Users, and Snakemake's jobs, often have a TMPDIR of their own."""
    environment[lease_module.DEVICES_VARIABLE] = names[0]
    with start(HOLD, environment | {"TMPDIR": str(tmp_path)}) as holder:
        assert holder.stdout.readline().strip() == names[0]
        with start(HOLD, environment) as second:
            assert second.stderr.readline().strip() == "waiting for one of 1 GPUs"
            holder.kill()
            assert second.stdout.readline().strip() == names[0]
            second.kill()


def test_without_a_gpu_it_says_so_once_and_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setenv(lease_module.DEVICES_VARIABLE, "")
    with lease() as device:
        assert device is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert capsys.readouterr().err.count("no GPU") == 1


def test_the_environment_is_put_back(monkeypatch, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    with lease() as device:
        assert device in names and os.environ["CUDA_VISIBLE_DEVICES"] == device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(names)


def test_processes_of_one_slurm_allocation_share_out_its_devices(environment, names):
    environment |= {"SLURM_JOB_ID": names[0], "CUDA_VISIBLE_DEVICES": "0,1"}
    with start(HOLD, environment) as one, start(HOLD, environment) as other:
        assert {one.stdout.readline().strip(), other.stdout.readline().strip()} == {"0", "1"}
        one.kill()
        other.kill()


def test_slurm_allocations_never_wait_for_each_other(environment, names):
    """Each may number its devices from 0."""
    environment["CUDA_VISIBLE_DEVICES"] = "0"
    first, second = (start(HOLD, environment | {"SLURM_JOB_ID": name}) for name in names)
    with first, second:
        assert first.stdout.readline() == second.stdout.readline() == "0\n"
        first.kill()
        second.kill()


def test_devices_in_order_of_authority(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a,GPU-9b")
    assert devices() == ["GPU-8a", "GPU-9b"]
    monkeypatch.setenv(lease_module.DEVICES_VARIABLE, "0,1,2")
    assert devices() == ["0", "1", "2"]


@pytest.mark.parametrize(("value", "expected"), [("0,-1,1", ["0"]), ("NoDevFiles", []), ("", []), ("1,1", ["1"])])
def test_a_list_is_read_as_cuda_reads_it(value, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices() == expected


@pytest.mark.parametrize("value", ["cuda:0", "0;1", "all", "0,", "../0"])
def test_a_wrong_declaration_is_said(value, monkeypatch):
    monkeypatch.setenv(lease_module.DEVICES_VARIABLE, value)
    with pytest.raises(InputError, match=r"CLIP_ROBUSTNESS_DEVICES=.*is no device; expected numbers or UUIDs"):
        devices()


def test_gpus_are_named_by_uuid(monkeypatch, tmp_path):
    """However a job names its GPU, jobs that name it otherwise lease the same."""
    install_tool(tmp_path, TWO_GPUS)
    assert devices() == [FIRST, *CUT]
    for spelling in ("0", "GPU-5c8", FIRST):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", spelling)
        assert devices() == [FIRST]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7,GPU-other")
    assert devices() == [*CUT, "7", "GPU-other"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{CUT[1]},0")
    assert devices() == [CUT[1], FIRST]


@pytest.mark.parametrize("tool", [None, 9])
def test_a_container_counts_from_0(tool, tmp_path):
    """It was given the fourth GPU of the host, and has no working nvidia-smi."""
    (tmp_path / "dev").mkdir()
    for node in ("nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / "dev" / node).touch()
    if tool is not None:
        install_tool(tmp_path, code=tool)
    assert devices() == ["0"]


def test_a_machine_without_a_gpu(tmp_path):
    assert devices() == []
    lease_module._installed.cache_clear()
    install_tool(tmp_path, "No devices were found")
    assert devices() == []
