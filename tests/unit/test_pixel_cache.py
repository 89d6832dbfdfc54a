import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import clip_robustness
from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference import pixels
from clip_robustness.inference.images import decode, preprocess
from tests.unit.samples import broken_images, encoded, make_tar, picture

SPEC = "resize(16,bicubic)|center_crop(16)"


def make_index(tmp_path: Path, images: dict[str, bytes]) -> Path:
    """A tar that holds the images backwards, and a folder for every third: rows are not in the files' order."""
    archive = make_tar(tmp_path / "a.tar", dict(reversed(images.items())))
    with tarfile.open(archive) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    places = {name: (str(archive), offsets[name]) for name in images}
    for name in list(images)[::3]:
        (tmp_path / name).write_bytes(images[name])
        places[name] = (str(tmp_path / name), 0)
    columns = {
        "image_id": list(images),
        "archive": [places[name][0] for name in images],
        "offset": np.array([places[name][1] for name in images], np.int64),
        "size": np.array([len(data) for data in images.values()], np.int64),
        "label": np.zeros(len(images), np.int32),
    }
    io.write_parquet(tmp_path / "index.parquet", columns)
    return tmp_path / "index.parquet"


def many_images(n: int) -> dict[str, bytes]:
    return {f"{i:03d}.png": encoded(picture(20 + i % 5, 18 + i % 3, seed=i), "PNG") for i in range(n)}


def test_a_cache_holds_every_image_in_its_row(tmp_path: Path) -> None:
    images = many_images(150)
    index = make_index(tmp_path, images)
    out = tmp_path / "new" / "cache.npy"
    pixels.cache_pixels(index, f"{SPEC}|normalize(openai)", out, workers=1)
    array, manifest = pixels.open_pixels(out, images)
    assert array.shape == (150, 16, 16, 3)
    for row, data in enumerate(images.values()):
        assert np.array_equal(array[row], preprocess(decode(data, "", ""), Preprocessing.parse(SPEC)))
    assert manifest["spec"] == SPEC
    assert manifest["n"] == 150
    assert manifest["masked"] == []
    assert manifest["ids_sha256"] == io.ids_digest(images)
    assert manifest["index_sha256"] == io.sha256_file(index)
    checksums = [hashlib.sha256(np.load(out).tobytes()).hexdigest()]
    assert manifest["blocks_sha256"] == checksums and manifest["pixels_sha256"] == io.digest(*checksums)
    assert sorted(p.name for p in out.parent.iterdir()) == ["cache.json", "cache.npy"]


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    index = make_index(tmp_path, many_images(200))
    for workers in (1, 2, 4):
        pixels.cache_pixels(index, SPEC, tmp_path / f"{workers}.npy", workers=workers)
    for suffix in ("npy", "json"):
        first, *others = [(tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (1, 2, 4)]
        assert others == [first, first]


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_fail_the_job_or_are_masked(tmp_path: Path, workers: int) -> None:
    broken = broken_images()
    images = many_images(70) | broken | {f"z{i}": b"zero" for i in range(20)}
    index = make_index(tmp_path, images)
    out = tmp_path / "out" / "cache.npy"
    with pytest.raises(InputError) as caught:
        pixels.cache_pixels(index, SPEC, out, workers)
    message = str(caught.value)
    assert f"{len(broken) + 20} of {len(images)} images cannot be read" in message
    assert all(f"image '{name}': cannot decode it" in message for name in broken)
    assert message.count("cannot decode it") == 20
    assert f"and {len(broken)} more" in message
    assert list(out.parent.iterdir()) == []

    pixels.cache_pixels(index, SPEC, out, workers, on_error="mask")
    array, manifest = pixels.open_pixels(out, images)
    bad = [row for row, name in enumerate(images) if row >= 70]
    assert manifest["masked"] == [name for row, name in enumerate(images) if row >= 70]
    assert not array[bad].any()
    assert all(array[row].any() for row in range(70))


def test_when_nothing_can_be_read_masking_is_no_way_out(tmp_path: Path) -> None:
    index = make_index(tmp_path, {"a.jpg": b"x", "b.jpg": b"y"})
    with pytest.raises(InputError, match=r"not one of 2 images can be read; the first: .*'a\.jpg'"):
        pixels.cache_pixels(index, SPEC, tmp_path / "c.npy", on_error="mask")
    with pytest.raises(InputError, match="expected fail or mask"):
        pixels.cache_pixels(index, SPEC, tmp_path / "c.npy", on_error="ignore")


def test_an_image_too_small_for_its_border_is_named(tmp_path: Path) -> None:
    index = make_index(tmp_path, many_images(2) | {"tiny.png": encoded(picture(4, 9), "PNG")})
    with pytest.raises(InputError, match=r"image 'tiny\.png': 4x9 px have nothing inside a border of 2 px"):
        pixels.cache_pixels(index, f"border_crop(2)|{SPEC}", tmp_path / "c.npy")


@pytest.mark.parametrize(
    "damage", ["short", "long", "other_shape", "no_manifest", "other_ids", "old_manifest", "no_array"]
)
def test_a_cache_that_does_not_fit_its_manifest_is_refused(tmp_path: Path, damage: str) -> None:
    images = many_images(4)
    out, manifest = tmp_path / "c.npy", tmp_path / "c.json"
    pixels.cache_pixels(make_index(tmp_path, images), SPEC, out)
    ids = list(images)
    if damage == "short":
        out.write_bytes(out.read_bytes()[:-1])
    elif damage == "long":
        out.write_bytes(out.read_bytes() + b"x")
    elif damage == "other_shape":
        np.save(out, np.zeros((4, 16, 12, 4), np.uint8))
    elif damage == "no_manifest":
        manifest.unlink()
    elif damage == "other_ids":
        ids.reverse()
    elif damage == "no_array":
        out.unlink()
    else:
        manifest.write_text(json.dumps({"n": 4}))
    with pytest.raises(InputError, match=r"c\.(npy|json): "):
        pixels.open_pixels(out, ids)


def cache_in_a_process(index: Path, out: Path, workers: int, **options: object) -> subprocess.Popen:
    script = index.parent / "job.py"
    script.write_text(f"""
from pathlib import Path
from clip_robustness.inference.pixels import cache_pixels
if __name__ == "__main__":
    cache_pixels(Path({str(index)!r}), {SPEC!r}, Path({str(out)!r}), {workers})
""")
    environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1])}
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_file_and_no_old_manifest(tmp_path: Path, workers: int) -> None:
    index = make_index(tmp_path, many_images(100))
    out = tmp_path / "out" / "c.npy"
    pixels.cache_pixels(index, SPEC, out)
    before = out.read_bytes()
    limit = 40_000
    job = cache_in_a_process(
        index, out, workers, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "no room for 76,928 bytes (File too large); make room" in said
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == before
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        pixels.open_pixels(out)


def test_a_disk_that_fills_up_while_images_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that promises room and does not keep it: the reservation is left out."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    index = make_index(tmp_path, many_images(100))
    out = tmp_path / "out" / "c.npy"
    real, written = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, position: int) -> int:
        written.append(position)
        if len(written) > 50:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        pixels.cache_pixels(index, SPEC, out)
    assert list(out.parent.iterdir()) == []


def children(pid: int) -> set[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found}


def running(tmp_path: Path) -> tuple[subprocess.Popen, set[int], Path]:
    """A job that decodes 9,000 images with two workers, its children, and what it will write."""
    images = many_images(30)
    index = make_index(tmp_path, {f"{i}-{name}": data for i in range(300) for name, data in images.items()})
    out = tmp_path / "out" / "c.npy"
    job = cache_in_a_process(index, out, 2)
    deadline = time.monotonic() + 30
    workers: set[int] = set()
    while time.monotonic() < deadline and job.poll() is None and len(workers) < 3:  # two and a resource tracker
        workers = children(job.pid)
        time.sleep(0.01)
    assert len(workers) == 3
    return job, workers, out


FROM_PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the process tree from /proc")


@FROM_PROC
def test_a_killed_worker_is_said_and_leaves_no_half_file(tmp_path: Path) -> None:
    job, workers, out = running(tmp_path)
    for pid in workers:
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            break
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and "a process that decodes was killed" in said and "take fewer `threads`" in said
    assert list(out.parent.iterdir()) == []


@FROM_PROC
def test_a_killed_job_leaves_no_worker_and_no_half_file(tmp_path: Path) -> None:
    job, workers, out = running(tmp_path)
    deadline = time.monotonic() + 30
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not out.exists()
    assert not out.with_suffix(".json").exists()
