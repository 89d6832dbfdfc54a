"""One GPU, one job."""

import os
import subprocess
import sys
import textwrap

import pytest

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


@pytest.fixture
def environment(root, tmp_path, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", lease_module.DEVICES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lease_module.tempfile, "tempdir", str(tmp_path))
    return {**os.environ, "PYTHONPATH": str(root / "src"), "TMPDIR": str(tmp_path)}


def test_four_jobs_on_two_devices_never_share_one(environment, tmp_path):
    environment[lease_module.DEVICES_VARIABLE] = "0,1"
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path), "8"], env=environment, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    errors = [job.communicate()[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, errors
    used = (tmp_path / "log").read_text().split()
    assert len(used) == 32 and set(used) == {"0", "1"}


def test_a_killed_job_frees_its_device_at_once(environment, tmp_path):
    environment[lease_module.DEVICES_VARIABLE] = "0"
    holding = (
        "import time\nfrom clip_robustness.inference.lease import lease\n"
        "with lease():\n print('held', flush=True)\n time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holding], env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
        holder.wait()
        subprocess.run([sys.executable, "-c", JOB, str(tmp_path), "1"], env=environment, check=True, timeout=60)


def test_without_a_gpu_it_says_so_once_and_runs_on_the_cpu(environment, monkeypatch, capsys):
    monkeypatch.setenv(lease_module.DEVICES_VARIABLE, "")
    with lease() as device:
        assert device is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert capsys.readouterr().err.count("no GPU") == 1


def test_the_environment_is_put_back(environment, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with lease() as device:
        assert device in ("3", "5") and os.environ["CUDA_VISIBLE_DEVICES"] == device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_slurm_allocation_is_taken_as_given(environment, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with (
        lease() as first,
        lease() as second,
    ):  # no lock is taken: Slurm has given the device to this job alone
        assert first == second == "2"
    assert not list((lease_module.folder()).glob("*.lock"))


def test_devices_in_order_of_authority(environment, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a,GPU-9b")
    assert devices() == ["GPU-8a", "GPU-9b"]
    monkeypatch.setenv(lease_module.DEVICES_VARIABLE, "0,1,2")
    assert devices() == ["0", "1", "2"]
