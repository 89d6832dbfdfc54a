"""`embed`: the library's own numbers, independent of batches and faults, in bounded memory."""

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference import embed as module
from clip_robustness.inference import load
from clip_robustness.inference.pixels import cache_pixels
from tests.unit.clips import VISION, clip_folder, timm_folder
from tests.unit.embedding import SPEC, make_pixels, reference, run, run_in_a_process
from tests.unit.samples import encoded, make_tar, picture

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32, "patch_size": None}
HALF_STEP = 2**-12  # of float16 between 0.5 and 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("weights")
    return {
        "clip": clip_folder(base / "clip"),
        "resnet": clip_folder(base / "resnet", vision_cfg=RESNET),
        "timm": timm_folder(base / "timm"),
    }


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return make_pixels(tmp_path_factory.mktemp("data") / "toy.npy", 150)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 32)


# Numbers


@pytest.mark.parametrize("kind", ["clip", "resnet", "timm"])
def test_embeddings_are_the_librarys_own(folders, pixels, tmp_path, kind):
    library = "timm" if kind == "timm" else "open_clip"
    values, manifest = run(folders[kind], pixels, tmp_path, library)
    expected = reference(folders[kind], pixels, library)
    assert values.dtype == np.float16 and np.abs(values - expected).max() < 1e-3 * max(1, np.abs(expected).max())
    assert manifest["kind"] == ("logits" if library == "timm" else "features")
    assert manifest["n"] == 150 and manifest["dim"] == values.shape[1]
    assert manifest["ids_sha256"] == io.ids_digest(f"{i:06d}.png" for i in range(150))


@pytest.mark.parametrize("kind", ["clip", "resnet"])
def test_an_image_does_not_depend_on_its_batch(folders, pixels, kind):
    model = load.load_image_model(folders[kind], "open_clip", (0.5,) * 3, (0.5,) * 3)
    images = torch.from_numpy(np.load(pixels)[:16])
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(one[None]) for one in images])
    assert (together - alone).abs().max() < 1e-5


def test_float16_moves_a_feature_by_half_a_step_and_keeps_the_answers(folders, pixels, tmp_path):
    stored, _ = run(folders["clip"], pixels, tmp_path)
    exact = reference(folders["clip"], pixels, "open_clip")
    assert np.abs(stored - exact).max() <= HALF_STEP + 1e-6
    head = np.random.default_rng(0).standard_normal((1000, exact.shape[1]))
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    assert np.mean((stored @ head.T).argmax(1) == (exact @ head.T).argmax(1)) >= 0.99
    assert np.abs(stored @ head.T - exact @ head.T).max() < 1e-3


@pytest.mark.parametrize("kind", ["clip", "resnet", "timm"])
def test_weights_cast_once_give_what_autocast_gives(folders, pixels, kind):
    library = "timm" if kind == "timm" else "open_clip"
    model = load.load_image_model(folders[kind], library, (0.5,) * 3, (0.5,) * 3)
    images = torch.from_numpy(np.load(pixels)[:16])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        module._cast_weights(model, torch.bfloat16)
        assert torch.equal(model(images), expected)


# The key of finished embeddings


def test_models_with_the_same_weights_share_their_embeddings(folders, pixels, tmp_path, monkeypatch):
    first, _ = run(folders["clip"], pixels, tmp_path, name="one")
    monkeypatch.setattr(module, "load_image_model", None)  # a second run that loads a model would fail
    second, manifest = run(folders["clip"], pixels, tmp_path, name="two", batch_size=7)
    assert np.array_equal(first, second) and manifest["model"] == "two"


def test_other_weights_code_or_precision_are_another_key(folders, pixels, tmp_path, monkeypatch):
    run(folders["clip"], pixels, tmp_path)
    run(folders["clip"], pixels, tmp_path, precision="bf16")
    run(folders["resnet"], pixels, tmp_path)
    monkeypatch.setattr(module.provenance, "code_hash", lambda *m, **k: "other")
    run(folders["clip"], pixels, tmp_path)
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) == 4


# Memory


@pytest.mark.parametrize("batch_size", [1, 7, 64, "auto"])
def test_a_batch_size_changes_rounding_alone(folders, pixels, tmp_path, batch_size):
    values, _ = run(folders["clip"], pixels, tmp_path / "a", batch_size=batch_size)
    whole, _ = run(folders["clip"], pixels, tmp_path / "b", batch_size=150)
    assert np.abs(values.astype(float) - whole).max() <= 2 * HALF_STEP


def test_a_batch_is_halved_until_it_fits_the_gpu(capsys):
    def model(images):
        if len(images) > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return images.float().flatten(1)

    images = np.random.default_rng(0).integers(0, 256, (150, 4, 4, 3), dtype=np.uint8)
    encoder = module._Encoder(model, torch.device("cpu"), torch.float32, 64)
    assert np.array_equal(encoder(images), images.reshape(150, -1))
    assert encoder.batch_size == 16  # for the rest of the job
    assert capsys.readouterr().err.count("out of memory") == 2
    tiny = module._Encoder(lambda images: model(images.repeat(21, 1, 1, 1)), encoder.device, torch.float32, 4)
    with pytest.raises(InputError, match="with a single image"):
        tiny(images)


def test_other_errors_are_not_taken_for_a_want_of_memory():
    def model(images):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        module._Encoder(model, torch.device("cpu"), torch.float32, 64)(np.zeros((8, 4, 4, 3), np.uint8))


LIMITED = """
plain = module._make_encoder
def limited(*arguments):
    encoder = plain(*arguments)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
    return encoder
module._make_encoder = limited
"""


def test_memory_that_runs_out_halves_the_batch(tmp_path):
    folder = clip_folder(tmp_path / "clip", vision_cfg=VISION | {"width": 256})
    pixels = make_pixels(tmp_path / "many.npy", 1024)
    free = run_in_a_process(folder, pixels, tmp_path / "free", batch_size=1024)
    tight = run_in_a_process(folder, pixels, tmp_path / "tight", LIMITED, batch_size=1024)
    assert (free.returncode, tight.returncode) == (0, 0), tight.stderr
    assert "out of memory: batches of 512" in tight.stderr and "out of memory" not in free.stderr
    expected, values = (np.load(tmp_path / name / "many.npy").astype(float) for name in ("free", "tight"))
    assert np.abs(values - expected).max() <= 2 * HALF_STEP


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    folder = clip_folder(tmp_path / "clip", vision_cfg=VISION | {"patch_size": 32, "layers": 1})
    peaks = []
    for n in (4096, 8 * 4096):  # 12 and 100 MB of pixels
        done = run_in_a_process(folder, make_pixels(tmp_path / f"{n}.npy", n), tmp_path / "out", "module.SHARD = 1024")
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 10_000


def test_the_batch_that_a_gpu_holds():
    gigabyte = 10**9
    assert module.fitting_batch(2 * gigabyte, 8 * gigabyte, 80 * gigabyte) == 64
    assert module.fitting_batch(10**6, 10**6, 80 * gigabyte) == module.LARGEST_BATCH
    assert module.fitting_batch(9 * gigabyte, 12 * gigabyte, gigabyte) == 1


# Faults


def test_a_killed_job_loses_one_shard(folders, pixels, tmp_path, small_shards, capsys):
    killed = "module.SHARD, calls, plain = 32, [], module._Encoder.__call__\n"
    killed += "def dying(self, images):\n    calls.append(1)\n"
    killed += "    return plain(self, images) if len(calls) < 4 else os.kill(os.getpid(), signal.SIGKILL)\n"
    killed += "module._Encoder.__call__ = dying"
    whole, _ = run(folders["clip"], pixels, tmp_path / "whole")
    assert run_in_a_process(folders["clip"], pixels, tmp_path / "out", killed).returncode == -9
    assert not (tmp_path / "out/toy.npy").exists()
    capsys.readouterr()
    resumed, _ = run(folders["clip"], pixels, tmp_path / "out")
    assert np.array_equal(resumed, whole) and "96 were there" in capsys.readouterr().err
    assert not list((tmp_path / "out/work").rglob("shard-*"))


FULL = """
module.SHARD, saved, plain = 32, [], module.io.save_array
def save(path, array):
    saved.append(path)
    if len(saved) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    plain(path, array)
module.io.save_array = save
"""


def test_a_disk_that_is_full_in_the_middle_of_a_shard(folders, pixels, tmp_path, small_shards):
    whole, _ = run(folders["clip"], pixels, tmp_path / "whole")
    failed = run_in_a_process(folders["clip"], pixels, tmp_path / "out", FULL)
    assert failed.returncode == 1 and "File too large" in failed.stderr
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [name for name in left if name.endswith(".npy")] == ["shard-000000000.npy", "shard-000000032.npy"]
    resumed, _ = run(folders["clip"], pixels, tmp_path / "out")
    assert np.array_equal(resumed, whole)


def test_a_value_that_is_not_finite_names_its_row(folders, pixels, tmp_path, monkeypatch, small_shards):
    plain, seen = module._Encoder.forward, []

    def broken(self, images):
        values = plain(self, images)
        seen.extend(range(len(seen), len(seen) + len(images)))
        if 77 in seen[-len(images) :]:
            values[seen[-len(images) :].index(77)] = np.nan
        return values

    monkeypatch.setattr(module._Encoder, "forward", broken)
    with pytest.raises(InputError, match=r"m on toy: not finite in float16 for image rows \[77\]"):
        run(folders["clip"], pixels, tmp_path, batch_size=8)
    assert not list(tmp_path.glob("toy.*")) and not list(tmp_path.rglob("embeddings.npy"))
    monkeypatch.undo()
    assert np.isfinite(run(folders["clip"], pixels, tmp_path)[0]).all()


def test_pixels_that_become_fewer_under_the_job(folders, tmp_path, monkeypatch, small_shards):
    pixels = make_pixels(tmp_path / "toy.npy", 150)
    plain = module._Encoder.__call__
    monkeypatch.setattr(
        module._Encoder, "__call__", lambda self, images: os.truncate(pixels, 200_000) or plain(self, images)
    )
    with pytest.raises(InputError, match=re.escape(f"{pixels}: became shorter")):
        run(folders["clip"], pixels, tmp_path / "out")
    assert not list((tmp_path / "out").glob("toy.*"))


def test_pixels_of_another_spec_are_refused(folders, pixels, tmp_path):
    spec = "resize(24,bicubic)|center_crop(24)|normalize(openai)"
    with pytest.raises(InputError, match=r"made for resize\(32"):
        module.embed("m", "open_clip", spec, folders["clip"], [pixels], tmp_path, tmp_path / "work")


CROPPED = Preprocessing.parse(SPEC).of_cropped.pixel_spec


@pytest.mark.parametrize("kind", ["cached", "streamed"])
def test_images_that_were_cropped_when_they_were_made_are_taken(folders, pictures, tmp_path, kind):
    """Beside a data set of the model's own preprocessing, in one job: the features of the whole images."""
    index = pictures(broken=False)
    paths = [tmp_path / "own.npy", tmp_path / "whole.npy"]
    cache_pixels(index, SPEC.rpartition("|")[0], paths[0])
    cache_pixels(index, CROPPED, paths[1])
    given = [paths[0], paths[1] if kind == "cached" else index]
    names = [SPEC.rpartition("|")[0], CROPPED]
    out, work = tmp_path / "out", tmp_path / "work"
    module.embed("m", "open_clip", SPEC, folders["clip"], given, out, work, precision="fp32", specs=names)
    for path, pixels in zip(given, paths, strict=True):
        expected = reference(folders["clip"], pixels, "open_clip")
        assert np.abs(np.load(out / f"{path.stem}.npy") - expected).max() < 1e-3
    assert not np.array_equal(np.load(paths[0]), np.load(paths[1])), "pictures that are not square"


def test_cropped_images_of_another_size_or_filter_are_refused(folders, tmp_path):
    for other in ("resize(24x24,bicubic)", "resize(32x32,bilinear)", "resize(32x24,bicubic)", "center_crop(32)"):
        pixels = make_pixels(tmp_path / "toy.npy", 2)
        size = Preprocessing.parse(other).size
        io.save_array(pixels, np.zeros((2, *size, 3), np.uint8))
        manifest = io.read_json(pixels.with_suffix(".json"))
        io.write_json(pixels.with_suffix(".json"), manifest | {"spec": other, "bytes": pixels.stat().st_size})
        with pytest.raises(InputError, match=re.escape(f"made for {other}")):
            run(folders["clip"], pixels, tmp_path / "out")


def test_what_cannot_be_compiled_says_so(folders, pixels, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(InputError, match=r"torch\.compile: .*set `compile: false`"):
        run(folders["clip"], pixels, tmp_path, compile=True)
    assert not (tmp_path / "toy.json").exists()


def test_a_manifest_is_written_last_and_whole(folders, pixels, tmp_path):
    _, manifest = run(folders["clip"], pixels, tmp_path)
    assert manifest["files"]["embeddings.npy"] == io.sha256_file(tmp_path / "toy.npy")
    assert json.loads((tmp_path / "toy.json").read_text())["dataset"] == "toy"


# Without a cache: decoded part after part


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The index of 90 pictures in a tar, the seventieth of which is broken when asked for."""

    def make(broken: bool):
        base = tmp_path_factory.mktemp("pictures")
        files = {f"{i:03d}.png": encoded(picture(40 + i % 5, 50, i), "PNG") for i in range(90)}
        if broken:
            files["070.png"] = files["070.png"][:60]
        tar = make_tar(base / "set.tar", files)
        with tarfile.open(tar) as archive:
            members = {member.name: member for member in archive.getmembers()}
        columns = {"image_id": np.array(list(files)), "archive": np.array([str(tar)] * 90)}
        columns["offset"] = np.array([members[name].offset_data for name in files])
        columns["size"] = np.array([members[name].size for name in files])
        io.write_parquet(base / "set.parquet", columns | {"label": np.zeros(90, np.int32)})
        return base / "set.parquet"

    return make


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_gives_what_a_cache_gives(folders, pictures, tmp_path, small_shards, workers):
    index = pictures(broken=False)
    cache_pixels(index, SPEC.rpartition("|")[0], tmp_path / "set.npy")
    cached, _ = run(folders["clip"], tmp_path / "set.npy", tmp_path / "a")
    streamed, manifest = run(folders["clip"], index, tmp_path / "b", workers=workers)
    assert np.array_equal(cached, streamed)
    assert manifest["dataset"] == "set" and manifest["ids_sha256"] == io.ids_digest(f"{i:03d}.png" for i in range(90))
    store = next((tmp_path / "b/work").iterdir())
    assert sorted(path.name for path in store.iterdir()) == ["embeddings.npy", "manifest.json", "masked.json"]


def test_an_unreadable_image_of_a_stream_fails_the_job_or_is_masked(folders, pictures, tmp_path, small_shards):
    index = pictures(broken=True)
    with pytest.raises(InputError, match=r"1 of 90 images cannot be read[\s\S]*070.png"):
        run(folders["clip"], index, tmp_path)
    values, manifest = run(folders["clip"], index, tmp_path, on_error="mask")
    assert manifest["masked"] == ["070.png"] and len(values) == 90


def test_a_stream_goes_on_at_the_shard_where_it_was_killed(
    folders, pictures, tmp_path, small_shards, monkeypatch, capsys
):
    index, calls = pictures(broken=True), []

    def killed(self, images, original=module._Encoder.forward):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Encoder, "forward", killed)
        run(folders["clip"], index, tmp_path, on_error="mask", batch_size=32)
    (next((tmp_path / "work").iterdir()) / "pixels-left").mkdir()  # as a kill -9 leaves it
    again, manifest = run(folders["clip"], index, tmp_path, on_error="mask", batch_size=32)
    assert manifest["masked"] == ["070.png"]
    whole, _ = run(folders["clip"], index, tmp_path / "whole", on_error="mask", batch_size=32)
    assert np.array_equal(again, whole)


def test_an_archive_that_changed_is_embedded_anew(folders, pictures, tmp_path, small_shards):
    index = pictures(broken=False)
    run(folders["clip"], index, tmp_path)
    archive = Path(io.read_parquet(index)["archive"][0])
    os.utime(archive, ns=(1, 1))
    run(folders["clip"], index, tmp_path)
    assert len(list((tmp_path / "work").glob("*/manifest.json"))) == 2
