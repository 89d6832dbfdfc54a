"""`doctor`: what it says of archives, folders, pins, room and gates, and when its exit code is 1."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from clip_robustness.cli import main
from clip_robustness.core.registry import load_study
from clip_robustness.data import doctor


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory: paths of a study count from it."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write_config(root, here, name="lite", **change) -> Path:
    config = yaml.safe_load((root / f"config/{name}.yaml").read_text()) | change
    (here / "study.yaml").write_text(yaml.safe_dump(config))
    return here / "study.yaml"


def small(root, here, **change) -> Path:
    """One model and the cue conflicts: a study for which any machine has room."""
    choice = {"models": {"names": ["resnet50.tv_in1k"]}, "datasets": {"names": ["cue_conflict", "textures"]}}
    return write_config(root, here, **({**choice, "id_dataset": "cue_conflict", "figures": ["shape_bias"]} | change))


def archive_of(here, study_file, root, name) -> Path:
    study = load_study(yaml.safe_load(study_file.read_text()), root)
    return here / "resources/archives" / name / study.datasets[name].archives[0]["file"]


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def state(root, study_file, name, fast=False):
    study = load_study(yaml.safe_load(study_file.read_text()), root)
    dataset = study.datasets[name]
    return doctor.state_of_archive(study, dataset, dataset.archives[0], fast)


def test_a_study_that_can_run(root, here, capsys):
    assert doctor.examine(small(root, here))
    out = capsys.readouterr().out
    for part in ("SOFTWARE", "DEVICES", "WEIGHTS", "DISK", "DATA", "This study can run."):
        assert part in out
    assert "CC BY 4.0" in out, "licences"
    assert not (here / "resources").exists(), "it only reads"


def test_the_paper_study_waits_for_imagenet(root, here, capsys):
    assert main(["doctor", "--fast", "--config", str(write_config(root, here, "config"))]) == 1
    out = capsys.readouterr().out
    assert "THIS STUDY CANNOT RUN" in out
    blocking = next(line.strip() for line in out.splitlines() if ": not available, and needed for" in line)
    assert blocking.startswith("imagenet_val, imagenet_x, objectnet, stylized_imagenet, imagenet_t: not available")
    state = {
        line.split()[0]: line.split("  ")[1:] for line in out.splitlines() if line.startswith(("cifar", "imagenet_t"))
    }
    assert "made here" in " ".join(state["cifar10_t"]) and "waiting for you" in " ".join(state["imagenet_t"])
    assert "  imagenet_t: " not in out, "nothing is to be done for what is made from ImageNet"
    assert "to download" in out and "(on demand)" not in out, "some figure needs each"
    assert "imagenet_val: /path/to/imagenet_val" in out and "accept: [objectnet]" in out
    assert "register at https://image-net.org/download.php" in out
    assert "CC BY-NC 4.0 (the annotations; fetched at run time" in out, "a licence note for each"


def test_skipping_what_is_missing_makes_it_run(root, here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**15, 0, 10**15))
    assert doctor.examine(write_config(root, here, "config", skip_unavailable=True))
    out = capsys.readouterr().out
    assert "left out" in out and "imagenet_v2 stands in" in out


def test_an_archive_against_the_table(root, here, capsys):
    """DTD's size and SHA-256 are declared: another file is damaged, whichever of the two is looked at."""
    config = small(root, here)
    path = archive_of(here, config, root, "textures")
    assert state(root, config, "textures") == ("to download", "")
    put(path, b"something else")
    for fast in (True, False):
        found, fault = state(root, config, "textures", fast)
        assert found == "damaged" and str(path.relative_to(here)) in fault and "625239812" in fault.replace(",", "")
    assert not doctor.examine(config)
    assert "delete it, and the next run fetches it again" in capsys.readouterr().out


def test_an_archive_against_its_pin(root, here, capsys):
    """The cue conflicts have no declared checksum: what came first is pinned, and holds from then on."""
    config = small(root, here)
    content = b"the archive"
    path = put(archive_of(here, config, root, "cue_conflict"), content)
    assert state(root, config, "cue_conflict") == ("here, no checksum known", "")
    pin = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    put(here / "config/downloads.lock.json", json.dumps({f"cue_conflict/{path.name}": pin}).encode())
    assert state(root, config, "cue_conflict") == ("here, checked", "")
    assert state(root, config, "cue_conflict", fast=True) == ("here, unchecked", "")
    path.write_bytes(b"THE ARCHIVE")
    found, fault = state(root, config, "cue_conflict")
    assert found == "damaged" and "wrong checksum" in fault
    assert state(root, config, "cue_conflict", fast=True) == ("here, unchecked", ""), "the size is the same"
    assert not doctor.examine(config) and "wrong checksum" in capsys.readouterr().out


def test_your_own_copy(root, here, capsys):
    config = small(root, here, local={"cue_conflict": [str(here / "mine"), str(here / "more.tar")]})
    assert not doctor.examine(config)
    out = capsys.readouterr().out
    assert f"local.cue_conflict: {here / 'mine'}: no such file or folder" in out and "more.tar" in out
    (here / "mine").mkdir()
    put(here / "more.tar", b"")
    assert doctor.examine(config)
    assert "yours" in capsys.readouterr().out


def test_too_little_room(root, here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert not doctor.examine(small(root, here))
    assert "are still needed and 0.0 are free; make room" in capsys.readouterr().out


def test_what_is_there_is_no_longer_needed(root, here, capsys):
    config = small(root, here)
    doctor.examine(config)
    before = capsys.readouterr().out
    put(here / "resources/weights/resnet50.tv_in1k/manifest.json", b"x" * 20_000_000)
    doctor.examine(config)
    after = capsys.readouterr().out
    assert "0 here, 1 to come" in before and "1 here, 0 to come" in after
    assert "there already         0.00" in before and "there already         0.02" in after


def test_a_folder_of_weights_that_is_gone(root, here, capsys):
    shutil.copytree(root / "config", here / "config", ignore=shutil.ignore_patterns("published"))
    table = here / "config/models.tsv"
    table.write_text(table.read_text().replace("hub:timm/resnet50.tv_in1k", "local:weights/nowhere"))
    models = {"names": ["resnet50.tv_in1k"], "table": str(table)}
    assert not doctor.examine(small(root, here, models=models))
    assert "model resnet50.tv_in1k: its weights weights/nowhere do not exist" in capsys.readouterr().out


def test_a_library_that_is_missing(root, here, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "INFERENCE", ("torch", "no-such-library"))
    assert not doctor.examine(small(root, here))
    assert "no-such-library is not installed" in capsys.readouterr().out


def test_gpus_are_those_that_the_driver_lists(here, monkeypatch):
    program = here / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100, 81920 MiB'\necho 'NVIDIA A100, 81920 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:/usr/bin:/bin")
    assert doctor._gpus() == ["NVIDIA A100, 81920 MiB"] * 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._gpus() == []


def test_a_config_with_a_fault_is_one_message(root, here, capsys):
    assert main(["doctor", "--config", str(small(root, here, accept=["objectnett"]))]) == 1
    assert "did you mean 'objectnet'" in capsys.readouterr().err
