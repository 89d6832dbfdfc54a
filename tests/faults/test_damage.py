"""A flipped bit, a cut file, a manifest of another version: each is noticed where the file is read, and named."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_robustness.core import io
from tests.unit.samples import encoded, picture

from .conftest import CLASSIFIER, DATASET, MODEL, Finished, flip, flip_value, visible
from .jobs import one_of_each, redirected


def remake(path: Path, content: dict) -> None:
    path.unlink()
    io.write_json(path, content)


# Embeddings


@pytest.mark.parametrize("model", [MODEL, CLASSIFIER])
@pytest.mark.parametrize("at", [0.1, 0.5, 1.0])
def test_a_flipped_bit_in_an_embedding(finished: Finished, tmp_path, model, at):
    assert finished.accuracy(tmp_path / "before", model).code == 0
    damaged = finished.results / f"embeddings/{model}/{DATASET}.npy"
    flip(damaged, at)
    code, said = finished.accuracy(tmp_path / "after", model)
    assert code == 1 and f"error: {damaged}: its SHA-256 is not that of {DATASET}.json" in said
    assert "delete both and run again" in said and not (tmp_path / "after").exists()


def test_a_flipped_bit_is_mended_by_deleting_and_running_again(finished: Finished, tmp_path):
    """The embedding's twin in the store has the same bit, where both are one file: it is made again too."""
    first = finished.embed(tmp_path)
    assert first.code == 0, first.said
    whole = (tmp_path / f"{DATASET}.npy").read_bytes()
    (stored,) = tmp_path.glob("work/*/embeddings.npy")
    assert stored.samefile(tmp_path / f"{DATASET}.npy")
    flip(stored)
    (tmp_path / f"{DATASET}.npy").unlink()
    code, said = finished.embed(tmp_path)
    assert code == 0 and f"{stored}: its SHA-256 is not that of the manifest beside it; made again" in said
    assert (tmp_path / f"{DATASET}.npy").read_bytes() == whole == stored.read_bytes()


def test_a_whole_store_costs_no_second_pass(finished: Finished, tmp_path):
    finished.embed(tmp_path)
    flip(tmp_path / f"{DATASET}.npy")  # the link alone
    code, said = finished.embed(tmp_path)
    assert code == 0 and "images/s" not in said and "made again" not in said
    assert finished.accuracy(tmp_path / "after", embeddings=tmp_path / f"{DATASET}.npy").code == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "notes", "no notes"])
def test_a_damaged_shard_is_embedded_again_and_the_others_are_kept(finished, tmp_path, monkeypatch, damage):
    from clip_robustness.inference import embed as module

    monkeypatch.setattr(module, "SHARD", 64)
    assert finished.embed(tmp_path / "whole").code == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.io, "join_arrays", interrupted)
        code, said = finished.embed(tmp_path / "out")
    assert code == 130 and "error: interrupted; run again: what was finished is kept" in said
    (work,) = (path for path in (tmp_path / "out/work").iterdir() if path.is_dir())
    shards = sorted(work.glob("shard-*.npy"))
    assert len(shards) >= 2
    if damage == "flip":
        flip(shards[1])
    elif damage == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-7])
    elif damage == "notes":
        shards[1].with_suffix(".json").write_text("{")
    else:
        shards[1].with_suffix(".json").unlink()
    code, said = finished.embed(tmp_path / "out")
    n = len(np.load(tmp_path / f"whole/{DATASET}.npy"))
    lost = min(64, n - 64)
    assert code == 0 and f"{n - lost} were there" in said
    if damage != "no notes":
        assert f"{shards[1]}: damaged since it was written; its images are embedded again" in said
    assert (tmp_path / f"out/{DATASET}.npy").read_bytes() == (tmp_path / f"whole/{DATASET}.npy").read_bytes()


@pytest.mark.parametrize(
    ("rule", "module", "column"),
    [("attack_images", "attack", "label"), ("match_pairs", "correspondence", "pair"), ("ask", "lmm", "truth_logp")],
)
def test_a_damaged_shard_of_a_table_is_named_and_the_others_are_kept(
    finished, jobs, tmp_path, monkeypatch, rule, module, column
):
    monkeypatch.setattr(importlib.import_module(f"clip_robustness.inference.{module}"), "SHARD", 7)
    job = one_of_each(jobs)[rule]
    words, (out, *_) = redirected(job, tmp_path), (tmp_path / output for output in job.outputs)
    write = io.write_parquet

    def interrupted(path, columns):
        if not Path(path).name.startswith("shard-"):
            raise KeyboardInterrupt
        write(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(io, "write_parquet", interrupted)
        assert finished.call(words).code == 130 and not out.exists()
    _, shard, *_ = sorted((tmp_path / job.store).glob("*/shard-*.parquet"))
    flip_value(shard, column)
    code, said = finished.call(words)
    assert code == 1 and f"error: {shard}: not a whole parquet file" in said and "delete it and run again" in said
    assert not out.exists()
    shard.unlink()
    code, said = finished.call(words)
    assert code == 0 and "were there" in said
    assert out.read_bytes() == (finished.path / job.outputs[0]).read_bytes()


# What embeddings are made from


@pytest.mark.parametrize("on_error", ["fail", "mask"])
def test_images_that_cannot_be_read_are_named_or_left_out(finished: Finished, tmp_path, on_error):
    """One is cut off; one has a side of a pixel, and would take 12 GB where the other is enlarged with it."""
    whole = encoded(picture(64, 48), "PNG")
    data = {"cut.png": whole[:-40], "good.png": whole, "long.png": encoded(Image.new("RGB", (60_000, 1)), "PNG")}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    columns = {"image_id": [*data], "archive": [str(tmp_path / name) for name in data], "offset": [0] * 3}
    index = tmp_path / "index.parquet"
    io.write_parquet(index, {**columns, "size": [*map(len, data.values())], "label": [0] * 3})
    out = tmp_path / "out/p.npy"
    options = {"index": index, "spec": "resize(224,bicubic)|center_crop(224)", "out": out, "on_error": on_error}
    code, said = finished.run("cache-pixels", **options, workers=1)
    if on_error == "mask":
        assert code == 0 and io.read_json(out.with_suffix(".json"))["masked"] == ["cut.png", "long.png"]
        assert not io.load_array(out)[[0, 2]].any() and io.load_array(out)[1].any()
        return
    assert code == 1 and f"error: {index}: 2 of 3 images cannot be read" in said and not visible(out.parent)
    assert f"{tmp_path / 'cut.png'}, image 'cut.png': cannot decode it" in said
    assert f"{tmp_path / 'long.png'}, image 'long.png': 60000x1 px would be resized to 224 x 13,440,000" in said
    assert "or set `on_unreadable: mask` in the config to leave them out" in said


@pytest.mark.parametrize("at", [0.3, 1.0])
def test_a_flipped_bit_in_a_pixel_cache(finished: Finished, tmp_path, at):
    flip(finished.pixels(), at)
    code, said = finished.embed(tmp_path)
    assert code == 1 and f"{finished.pixels()}, images 0 to" in said
    assert "not the bytes that were written (SHA-256)" in said and "delete it and run again" in said
    assert not list(tmp_path.glob("*.npy")), "nothing was embedded"


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json"])
def test_a_flipped_bit_in_weights(finished: Finished, tmp_path, name):
    weights = finished.resources / "weights" / MODEL
    flip(weights / name)
    code, said = finished.embed(tmp_path)
    assert code == 1 and f"error: {weights / name}: its SHA-256 is not that of the manifest beside it" in said
    assert "delete the folder" in said


@pytest.mark.parametrize("at", [0.0, 0.4, 0.97, 1.0])
def test_a_flipped_bit_in_a_head(finished: Finished, tmp_path, at):
    """Never another number. The zip's directory has unused fields; where the weights lie, a bit is always noticed."""
    head = finished.results / f"heads/{MODEL}/mini_1.mini.npz"
    assert finished.accuracy(tmp_path / "before").code == 0
    flip(head, at)
    code, said = finished.accuracy(tmp_path / "after")
    if code == 0 and at > 0.9:
        assert visible(tmp_path / "after") == visible(tmp_path / "before")
        for name in visible(tmp_path / "after"):
            assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    else:
        assert code == 1 and f"error: {head}: not a whole head" in said and "delete it and run again" in said
        assert "pickle" not in said, "NumPy tells how to run what it does not know"


# Tables: every page of a parquet file has a checksum


@pytest.mark.parametrize("column", ["image_id", "label"])
@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_a_flipped_bit_in_an_index(finished: Finished, tmp_path, column, at):
    index = finished.resources / f"index/{DATASET}.parquet"
    flip_value(index, column, at)
    code, said = finished.accuracy(tmp_path / "out")
    assert code == 1 and f"error: {index}: not a whole parquet file" in said and "delete it and run again" in said
    assert not (tmp_path / "out").exists()


def test_no_bit_of_a_tables_values_can_turn_unnoticed(tmp_path):
    """Every tenth byte of a table, one after the other: it is refused, or reads as before."""
    table, values = tmp_path / "t.parquet", np.random.default_rng(0).random(200)
    io.write_parquet(table, {"name": [f"row {i % 7}" for i in range(200)], "value": values})
    data, refused = table.read_bytes(), 0
    for place in range(0, len(data), 10):
        table.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            again = io.read_parquet(table)
        except io.InputError as error:
            assert str(error).startswith(f"{table}: ")
            refused += 1
            continue
        if set(again) == {"name", "value"}:
            assert np.array_equal(again["value"], values) and again["name"][8] == "row 1", place
    assert refused > 0.8 * len(data) / 10


def test_a_damaged_table_is_named_by_figure_and_report(finished: Finished, tmp_path):
    tables = finished.results / "tables"
    damaged = tables / "shape_bias.parquet"
    flip(damaged, 0.1)
    options = {"study": "mini", "tables": tables, "pdf": tmp_path / "f.pdf", "png": tmp_path / "f.png"}
    code, said = finished.run("draw", figure="shape_bias", **options)
    assert code == 1 and f"error: {damaged}: not a whole parquet file" in said and "delete it and run again" in said
    assert not (tmp_path / "f.pdf").exists()
    claims = {"claims": "config/claims.yaml", "schema": "config/schemas/claims.schema.yaml", "tables": damaged}
    code, said = finished.run("evaluate-claims", **claims, study="mini", out=tmp_path / "claims.parquet")
    assert code == 1 and f"error: {damaged}: not a whole parquet file" in said


def test_a_damaged_metric_file(finished: Finished, tmp_path):
    metric = finished.results / f"metrics/accuracy/{MODEL}/{DATASET}.json"
    text = metric.read_text()
    metric.unlink()
    metric.write_text(text[: len(text) // 2])
    code, said = finished.run("gather", study="mini", metrics=[metric], out=tmp_path / "t.parquet")
    assert code == 1 and f"error: {metric}: not valid JSON" in said and "delete it and run again" in said


# Manifests of other versions


@pytest.mark.parametrize("field", ["n", "dim", "kind", "ids_sha256", "model"])
def test_a_manifest_that_lacks_a_field(finished: Finished, tmp_path, field):
    path = finished.results / f"embeddings/{MODEL}/{DATASET}.json"
    manifest = json.loads(path.read_text())
    del manifest[field]
    remake(path, manifest)
    code, said = finished.accuracy(tmp_path)
    assert code == 1 and f"error: {path}: no '{field}'" in said and "another version" in said and "run again" in said


@pytest.mark.parametrize(
    "change", [{"n": "12"}, {"kind": 3}, {"schema": 9, "new": [1]}, {"embeddings_sha256": None}], ids=str
)
def test_a_manifest_of_another_version(finished: Finished, tmp_path, change):
    """A field of another type is refused; one that this version does not know, or that was not yet there, is not."""
    path = finished.results / f"embeddings/{MODEL}/{DATASET}.json"
    remake(path, {**json.loads(path.read_text()), **change})
    code, said = finished.accuracy(tmp_path)
    if set(change) & {"n", "kind"}:
        assert code == 1 and f"error: {path}: no '{next(iter(change))}'" in said and "another version" in said
    else:
        assert code == 0, said


@pytest.mark.parametrize("content", ["[]", "3", '{"model": "m"}', "{"])
@pytest.mark.parametrize("of", ["weights", "pixels", "embeddings"])
def test_what_is_no_manifest_at_all(finished: Finished, tmp_path, of, content):
    path = {
        "weights": finished.resources / f"weights/{MODEL}/manifest.json",
        "pixels": finished.pixels().with_suffix(".json"),
        "embeddings": finished.results / f"embeddings/{MODEL}/{DATASET}.json",
    }[of]
    path.unlink()
    path.write_text(content)
    code, said = finished.accuracy(tmp_path) if of == "embeddings" else finished.embed(tmp_path)
    assert code == 1 and f"error: {path}: no" in said and "again" in said and "Traceback" not in said


def test_a_store_of_another_version_is_made_again(finished: Finished, tmp_path):
    finished.embed(tmp_path)
    (sealed,) = tmp_path.glob("work/*/manifest.json")
    sealed.write_text('{"schema": 0}')
    whole = (tmp_path / f"{DATASET}.npy").read_bytes()
    code, said = finished.embed(tmp_path)
    assert code == 0 and "another version of this project, or no manifest; made again" in said
    assert (tmp_path / f"{DATASET}.npy").read_bytes() == whole
