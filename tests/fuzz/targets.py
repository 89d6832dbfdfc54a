"""What is fuzzed: every reader of what a user gives, or of what was downloaded."""

import contextlib
import functools
import io as streams
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from clip_robustness.core import archive, features, io, lock
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.core.registry import load_datasets, load_models, load_study, model_sets
from clip_robustness.core.schema import check, load_checked, load_yaml, schema, stop
from clip_robustness.data import members
from clip_robustness.data.adapters.imagenet_x import write_factors
from clip_robustness.data.derive import check_derive
from clip_robustness.data.fetch import fetch
from clip_robustness.data.hub import _fill
from clip_robustness.data.index import build_index
from clip_robustness.data.pictures import decode
from clip_robustness.data.published import import_published
from clip_robustness.data.targets import read_record
from tests.fuzz import mutations as spoil
from tests.fuzz.harness import Target
from tests.unit import packed
from tests.unit.samples import encoded, make_tar, picture

ROOT = Path(__file__).resolve().parents[2]
MOST_READ = 12
TARGETS: dict[str, Target] = {}


def target(run: Callable[[Random, Path], object]) -> Callable[[Random, Path], object]:
    TARGETS[run.__name__] = Target(run.__name__, run)
    return run


def made(write: Callable[[Path], object]) -> bytes:
    """The bytes of a file that a helper of the tests writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write(path)
        return path.read_bytes()


@functools.cache
def pictures() -> dict[str, bytes]:
    jpeg, png = encoded(picture(16, 12)), encoded(picture(8, 8, 1), "PNG")
    return {"a/x.jpg": jpeg, "a/y.png": png, "b/" + "z" * 120 + ".jpg": jpeg, "b/labels.txt": b"x 1\ny 2\n"}


def read_all(sources: list[Path], password: str | None = None) -> None:
    """List and read; what is listed lies inside its archive, under a name that leads nowhere else."""
    found = members.list_members(sources, password)
    with archive.ArchiveReader() as reader:
        for member in found[:MOST_READ]:
            parts = member.name.split("/")
            assert member.name.isprintable() and not {"", ".", ".."} & set(parts), member.name
            assert member.offset >= 0 and member.size >= 0
            try:
                content = reader.read(member.archive, member.offset, member.size, member.name, member.codec)
            except InputError:
                continue
            assert member.codec or len(content) == member.size
    members.group_by_key(members.images(found))


# ---- archives and containers --------------------------------------------------------------------------------------


@target
def tar(random: Random, folder: Path) -> None:
    data = spoil.write_tar(pictures(), random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    (folder / "x.tar").write_bytes(spoil.spoil_tar(data, random))
    read_all([folder / "x.tar"])


@target
def tar_of_tars(random: Random, folder: Path) -> None:
    inner = spoil.spoil_tar(spoil.write_tar(pictures()), random)
    data = spoil.write_tar({"n01.tar": inner, "n02.tar": spoil.write_tar(pictures())})
    (folder / "x.tar").write_bytes(spoil.spoil_tar(data, random) if random.random() < 0.3 else data)
    read_all([folder / "x.tar"])


@target
def tar_gz(random: Random, folder: Path) -> None:
    data = spoil.spoil_deflate(spoil.write_tar(pictures()), random, spoil.spoil_tar)
    (folder / "x.tar.gz").write_bytes(data)
    read_all([folder / "x.tar.gz"])


@functools.cache
def zips() -> list[bytes]:
    plain = [made(lambda path, method=method: packed.make_zip(path, pictures(), method)) for method in (0, 8)]
    short = dict(list(pictures().items())[:2])
    for deflate in (False, True):
        plain.append(made(lambda path, deflate=deflate: packed.encrypted_zip(path, short, deflate, ("a/y.png",))))
    return plain


@target
def zip_in_place(random: Random, folder: Path) -> None:
    (folder / "x.zip").write_bytes(spoil.spoil_zip(random.choice(zips()[:2]), random))
    read_all([folder / "x.zip"])


@target
def zip_encrypted(random: Random, folder: Path) -> None:
    (folder / "x.zip").write_bytes(spoil.spoil_zip(random.choice(zips()[2:]), random))
    read_all([folder / "x.zip"], random.choice(("secret", "secret", "secret", "wrong", "", None)))


@functools.cache
def shards() -> list[bytes]:
    kept = made(lambda path: packed.write_parquet(path, {**pictures(), None: None}))
    bare = pyarrow.table({"img": pyarrow.array(list(pictures().values())), "label": ["a", None, "b", "c"]})
    return [kept, made(lambda path: pyarrow.parquet.write_table(bare, path, compression="none"))]


@target
def parquet_shard(random: Random, folder: Path) -> None:
    path = folder / "x.parquet"
    if random.random() < 0.6:
        path.write_bytes(spoil.spoil_bytes(random.choice(shards()), random))
    else:
        _odd_table(random, path)
    read_all([path])
    with contextlib.suppress(InputError):
        members.label_names(str(path))
        assert all(isinstance(column, np.ndarray) for column in members.columns(str(path)).values())


def _odd_table(random: Random, path: Path) -> None:
    """Columns of odd types under the names that count, with odd metadata."""
    rows = random.choice((0, 1, 5))
    columns = [[random.choice((b"x", None, *pictures().values())) for _ in range(rows)]]
    columns += [[random.choice((*spoil.NAMES, None)) for _ in range(rows)], [{"bytes": b"x", "path": None}] * rows]
    columns += [[random.choice(([], [1], ["a"])) for _ in range(rows)] if random.random() < 0.2 else [1.5] * rows]
    columns += [
        [{"bytes": b"x", "path": random.choice(spoil.NAMES)} for _ in range(rows)],
        [True] * rows,
        [2**62] * rows,
    ]
    names = ["image", "img", "label", "image.bytes", "captions", "", "path"]
    arrays, kept = [], []
    for _ in range(random.randint(1, 4)):
        values = random.choice(columns)
        try:
            arrays.append(pyarrow.array(values))
        except (pyarrow.ArrowException, UnicodeEncodeError):
            continue
        kept.append(random.choice(names))
    if not arrays:
        raise InputError("nothing to write")
    features = random.choice(({"label": {"names": ["a", 1]}}, {"label": 5}, [], {"label": {"names": 3}}, None))
    text = random.choice((json.dumps({"info": {"features": features}}), "[", "[" * 2000, '{"info": 5}'))
    table = pyarrow.Table.from_arrays(arrays, names=kept).replace_schema_metadata({"huggingface": text})
    pyarrow.parquet.write_table(table, path, row_group_size=random.choice((1, 2, 100)))


@target
def index(random: Random, folder: Path) -> None:
    """An index that anybody may have written, and what its reader makes of it."""
    store = folder / "x.tar"
    store.write_bytes(spoil.write_tar(pictures()))
    rows = 4
    odd_ints = (*spoil.NUMBERS, -1, -(2**63), 512)
    columns: dict[str, Any] = {
        "image_id": [f"{i}.jpg" for i in range(rows)],
        "archive": [str(store)] * rows,
        "offset": [512, 1536, 0, 3],
        "size": [10, 20, 0, 1],
        "codec": ["", "deflate", "", "parquet"],
        "label": [0, 1, -1, 2],
    }
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(columns))
        values = list(columns[name])
        match random.randint(0, 4):
            case 0:
                del columns[name]
                if not columns:
                    raise InputError("no columns")
            case 1:
                columns[name] = [random.choice((*odd_ints, None)) for _ in values]
            case 2:
                columns[name] = [
                    random.choice((*spoil.NAMES, str(folder), "/dev/zero", str(store), None)) for _ in values
                ]
            case 3:
                columns[name] = [random.choice(((1.5), float("nan"), None)) for _ in values]
            case _:
                values[random.randint(0, rows - 1)] = random.choice(
                    odd_ints if isinstance(values[0], int) else spoil.NAMES
                )
                columns[name] = values
    try:
        table = pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()})
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        raise InputError("no table") from None
    path = folder / "index.parquet"
    pyarrow.parquet.write_table(table, path)
    if random.random() < 0.3:
        path.write_bytes(spoil.spoil_bytes(path.read_bytes(), random))
    found = archive.load_index(path, archives=random.random() < 0.8)
    places = zip(*(found[name].tolist() for name in ("archive", "offset", "size", "image_id", "codec")), strict=True)
    for place in places:
        try:
            archive.read_member(*place)
        except InputError:
            continue


# ---- data sets ----------------------------------------------------------------------------------------------------


@functools.cache
def layouts() -> list[tuple[str, dict[str, bytes], dict, dict]]:
    """(family, files, label space, options) of every adapter."""
    from tests.unit import test_adapters_classification as classes
    from tests.unit import test_adapters_correspondence as pairs
    from tests.unit import test_adapters_imagenet_val as val
    from tests.unit import test_adapters_other as other
    from tests.unit import test_adapters_video as video
    from tests.unit.adapter_samples import BASE
    from tests.unit.layouts import base_space, space_of

    jpeg = next(iter(pictures().values()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vid, ytbb = (space_of(folder, f"map:{kind}") for kind in ("vid_robust_30", "ytbb_robust_19"))
        coco = {path.name: path.read_bytes() for path in other.coco(folder)}
        scannet, lists = pairs.scannet(folder)
        scannet |= {path.name: path.read_bytes() for path in lists}
        devkit = val.tar_gz(folder / "ILSVRC2012_devkit_t12.tar.gz", val.devkit()).read_bytes()
    captions = {n: c for n, c in coco.items() if not n.endswith(".zip")}
    few = {"a": "ant", "b": "bee", "c": "cat"}
    cues = {f"{a}/{a}1-{b}2.png": jpeg for a in few.values() for b in few.values()}
    web = {
        f"test/{i}.{kind}": content for i in "01" for kind, content in (("jpg", jpeg), ("cls", b"1"), ("txt", b"a\nb"))
    }
    words = {
        "ant/1.png": jpeg,
        "bee/2.png": jpeg,
        "targets.csv": b"image,target,source\nant/1.png,cat,x\nbee/2.png,ant,y\n",
    }
    copies = {"0.png": jpeg, "copies.csv": b"image,source,transform,label\n0.png,s,mirror,1\n"}
    objects = base_space() | {
        "classes": ["Alarm clock", "Banana"],
        "members": [[1], [2]],
        "folders": ["alarm_clock", "banana"],
    }
    mapping = {"alarm_clock": "Alarm clock", "banana": "Banana", "x": "Other"}
    objectnet = {f"o/images/{f}/1.png": jpeg for f in mapping}
    objectnet["o/mappings/folder_to_objectnet_label.json"] = json.dumps(mapping).encode()
    coco_options = {"annotations": "dataset_coco.json", "per_image": 1}
    cifar, _ = classes.cifar_files([0, 1, 2])
    return [
        ("class_folders", {f"x/{c}/{i}.jpg": jpeg for c in few.values() for i in "12"}, BASE, {}),
        ("webdataset", web, BASE, {}),
        ("webdataset", web, BASE, {"captions": True, "per_image": 2}),
        ("imagenet_val", val.flat() | val.devkit(), base_space(), {}),
        ("imagenet_val", val.flat() | {"ILSVRC2012_devkit_t12.tar.gz": devkit}, base_space(), {}),
        (
            "imagenet_val",
            val.flat() | {"val.txt": b"".join(b"%b.JPEG 65\n" % s.encode() for s in val.STEMS)},
            base_space(),
            {},
        ),
        ("imagenet_c", classes.corrupted("fog", "snow"), base_space(), {"corruptions": ["fog"], "severities": [1, 3]}),
        ("cifar10", cifar, BASE | {"classes": classes.CIFAR, "members": [[i] for i in range(10)]}, {}),
        ("objectnet", objectnet, objects, {"others": True}),
        ("cue_conflict", cues, BASE, {}),
        ("typographic", words, BASE, {}),
        ("copies", copies, BASE, {}),
        ("video_robust", video.vid_files(), vid, {"set": "vid"}),
        ("video_robust", video.ytbb_files(), ytbb, {"set": "ytbb"}),
        ("navi", pairs.navi(), BASE, {}),
        ("scannet_pairs", scannet, BASE, {}),
        ("spair", pairs.spair(), BASE, {}),
        ("unlabelled", other.mos() | {"list.txt": b"images/sun_a.jpg -1\n"}, BASE, {"list": "list.txt"}),
        ("dtd", other.dtd(), BASE, {"list": "labels/test1.txt"}),
        ("imagenet_d", other.imagenet_d(), other.OBJECTS, {}),
        ("captions", captions | {"x/COCO_val2014_000000391895.jpg": jpeg}, BASE, coco_options),
    ]


@target
def adapter(random: Random, folder: Path) -> None:
    """A data set whose files, or whose archive, are not what its makers publish."""
    family, files, space, options = random.choice(layouts())
    data = spoil.write_tar(spoil.spoil_files(files, random))
    (folder / "x.tar").write_bytes(data)
    io.write_json(folder / "space.json", space)
    if random.random() < 0.2:
        options = spoil.spoil_value(options, random)
        rules = schema("datasets", ROOT)
        problems: list[str] = []
        check(options, {"$defs": rules["$defs"], **rules["$defs"]["options"]}, "options", problems)
        stop(problems)
    _build({"name": "x", "family": family, "options": options}, [folder / "x.tar"], folder)


@target
def hub_parquet(random: Random, folder: Path) -> None:
    path = folder / "test-0.parquet"
    if random.random() < 0.5:
        _odd_table(random, path)
    else:
        labels = random.choice(([0, 1, 2, 1], ["ant", "bee", "cat", None], [0.0, None, 2.0, 1.0], [[1], [2], [], [0]]))
        images = [{"bytes": content, "path": name} for name, content in pictures().items()]
        texts = random.choice(([["a", "b"]] * 4, ["a"] * 4, [[]] * 4, [[1]] * 4, [None] * 4))
        table = pyarrow.table(
            {"image": images, "label": pyarrow.array(labels), "captions": texts, "split": ["test"] * 4}
        )
        pyarrow.parquet.write_table(table, path)
        if random.random() < 0.3:
            path.write_bytes(spoil.spoil_bytes(path.read_bytes(), random, 1))
    options = random.choice(
        ({}, {"labels": "name"}, {"labels": "base"}, {"captions": "captions", "per_image": 1}, {"unlabelled": True})
    ) | random.choice(
        ({}, {"rows": {"captions": "a"}}, {"split": "test"}, {"attributes": ["label", "captions", "image"]})
    )
    from tests.unit.adapter_samples import BASE

    io.write_json(folder / "space.json", BASE)
    family = random.choice(("hub_parquet", "class_folders", "imagenet_val"))
    _build({"name": "x", "family": family, "options": options}, [path], folder)


def _build(dataset: Mapping[str, Any], sources: list[Path], folder: Path) -> None:
    build_index(dataset, sources, folder / "space.json", folder / "index.parquet")
    found = archive.load_index(folder / "index.parquet")
    assert len(found["image_id"]) and all(Path(name).parent == folder for name in found["archive"])


@functools.cache
def wheel() -> tuple[dict[str, bytes], list[str]]:
    from tests.unit import test_adapters_imagenet_val as val

    entries = [val.annotation(number, number % 3, "pose") for number in range(1, 4)]
    with tempfile.TemporaryDirectory() as name:
        path = val.wheel(Path(name) / "x.whl", entries, entries, (1,))
        return {"x.whl": path.read_bytes()}, [entry["file_name"].partition(".")[0] for entry in entries]


@target
def annotations(random: Random, folder: Path) -> None:
    """ImageNet-X's lists."""
    import zipfile

    files, ids = wheel()
    with zipfile.ZipFile(streams.BytesIO(files["x.whl"])) as whole:
        inside = {name: whole.read(name) for name in whole.namelist()}
    make_tar(folder / "x.tar", spoil.spoil_files(inside, random))
    columns = {"image_id": ids, "archive": ["x"] * 3, "offset": [0] * 3, "size": [1] * 3, "label": [1, 2, 0]}
    io.write_parquet(folder / "val.parquet", {name: np.array(values) for name, values in columns.items()})
    write_factors([folder / "x.tar"], folder / "val.parquet", folder / "out.parquet")


@target
def image(random: Random, folder: Path) -> None:
    from clip_robustness.inference.images import decode as decode_for_models

    forms = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
    whole = encoded(picture(9, 7, random.randint(0, 3)), random.choice(forms))
    data = spoil.spoil_bytes(whole, random)
    for read in (decode, decode_for_models):
        try:
            found = read(data, "x.tar", "x.jpg")
        except InputError:
            continue
        assert found.mode == "RGB" and found.width * found.height < 2e8


# ---- downloads ----------------------------------------------------------------------------------------------------


@target
def download(random: Random, folder: Path) -> None:
    """What an earlier run left, and the lock file, say odd things: no wrong byte gets the final name."""
    content = bytes(random.randint(0, 255) for _ in range(50)) * 20
    (folder / "mirror.tar").write_bytes(content)
    out, pins = folder / "a" / "x.tar", folder / "lock.json"
    out.parent.mkdir()
    url = (folder / "mirror.tar").as_uri()
    facts = {"url": url, "size": len(content), "etag": '"1-2"', "last_modified": None}
    right = {"bytes": len(content), "sha256": io.sha256_file(folder / "mirror.tar")}
    if random.random() < 0.8:
        part = content[: random.randint(0, 1000)]
        (out.parent / "x.tar.part").write_bytes(part if random.random() < 0.5 else spoil.spoil_bytes(part, random))
        (out.parent / "x.tar.part.json").write_bytes(spoil.write_json(spoil.spoil_value(facts, random), random))
    if random.random() < 0.5:
        pins.write_bytes(spoil.write_json(spoil.spoil_value({"x/x.tar": right}, random), random))
    entry = {"file": "x.tar", "urls": [url], **(right if random.random() < 0.7 else {})}
    fetch({"name": "x", "archives": [entry]}, "x.tar", out, pins, cache=folder / "cache", sleep=lambda seconds: None)
    assert "sha256" not in entry or out.read_bytes() == content


@target
def sealed_folder(random: Random, folder: Path) -> None:
    """The manifest of a folder that others may write to; a renewed download removes what it lists, and nothing else."""
    out = folder / "hub"
    out.mkdir()
    for name in ("a.parquet", "b.parquet"):
        (out / name).write_bytes(name.encode())
    io.seal(out, dataset="x")
    manifest = spoil.spoil_value(io.read_json(out / "manifest.json"), random)
    (out / "manifest.json").write_bytes(spoil.write_json(manifest, random))
    with contextlib.suppress(InputError):
        io.check_sealed(out)
    _fill(out, {"a.parquet": out / "a.parquet"})


@target
def lock_file(random: Random, folder: Path) -> None:
    known = {"x/x.tar": {"bytes": 3, "sha256": "0" * 64}, "hub:a/b": {"revision": "1", "files": {"x": "0"}}}
    path = folder / "lock.json"
    path.write_bytes(spoil.write_json(spoil.spoil_value(known, random), random))
    lock.pins_of(path)
    lock.pin(path, random.choice(("new", "x/x.tar")), {"bytes": 3, "sha256": "0" * 64})


# ---- arrays, manifests and tables ---------------------------------------------------------------------------------


@functools.cache
def array() -> bytes:
    target = streams.BytesIO()
    values = np.random.default_rng(0).normal(size=(4, 8))
    np.save(target, (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16))
    return target.getvalue()


@target
def npy(random: Random, folder: Path) -> None:
    path = folder / "x.npy"
    path.write_bytes(spoil.spoil_npy(array(), random))
    for mapped in (True, False):
        try:
            found = io.load_array(path, mmap=mapped)
        except InputError:
            continue
        assert isinstance(found, np.ndarray) and found.nbytes <= path.stat().st_size and not found.dtype.hasobject


@target
def embeddings(random: Random, folder: Path) -> None:
    path = folder / "x.npy"
    path.write_bytes(spoil.spoil_npy(array(), random) if random.random() < 0.4 else array())
    manifest = {"model": "m", "dataset": "x", "kind": "features", "n": 4, "dim": 8, "ids_sha256": io.ids_digest("abcd")}
    manifest |= {"embeddings_sha256": io.sha256_file(path)} if random.random() < 0.5 else {}
    (folder / "x.json").write_bytes(spoil.write_json(spoil.spoil_value(manifest, random), random))
    found = features.read_manifest(path)
    assert found["kind"] == "features"
    assert features.unit_rows(path).shape == (found["n"], found["dim"])


@target
def head(random: Random, folder: Path) -> None:
    target = streams.BytesIO()
    np.savez(
        target, weight=np.eye(4, 8, dtype=np.float32), scale=np.float32(100), bias=np.float32(0), templates=np.int64(1)
    )
    data = spoil.spoil_zip(target.getvalue(), random)
    (folder / "x.npz").write_bytes(data)
    assert features.read_head(folder / "x.npz")["weight"].ndim == 2


@target
def pixels(random: Random, folder: Path) -> None:
    from clip_robustness.inference.pixels import open_pixels, read_rows

    values = np.zeros((3, 8, 8, 3), np.uint8)
    path = folder / "x.npy"
    np.save(path, values)
    facts = {
        "spec": "center_crop(8)",
        "n": 3,
        "bytes": path.stat().st_size,
        "ids_sha256": io.ids_digest("abc"),
        "masked": [],
    }
    if random.random() < 0.5:
        path.write_bytes(spoil.spoil_npy(path.read_bytes(), random))
        facts["bytes"] = path.stat().st_size
    (folder / "x.json").write_bytes(spoil.write_json(spoil.spoil_value(facts, random), random))
    found, _ = open_pixels(path, "abc")
    assert read_rows(found, 0, 3).shape == (3, 8, 8, 3)


@target
def predictions(random: Random, folder: Path) -> None:
    from clip_robustness.inference.predictions import import_predictions
    from tests.unit.adapter_samples import BASE

    ids, path = ["a", "b", "c", "d"], folder / "x.npy"
    io.write_parquet(folder / "index.parquet", {"image_id": np.array(ids, object)})
    io.write_json(folder / "base.json", BASE)
    match random.randint(0, 2):
        case 0:
            np.save(path, np.zeros((4, 3), np.float32))
            path.write_bytes(spoil.spoil_npy(path.read_bytes(), random))
            text = "a\nb\nc\nd\n"
            path.with_suffix(".ids.txt").write_text(spoil.spoil_text(text, random), errors="replace")
        case 1:
            path = folder / "x.parquet"
            kind = random.choice(("logits", "probabilities", "other"))
            rows = random.choice(([[1.0, 0, 0]] * 4, [[1.0]] * 4, [1.0] * 4, [None, [1.0, 2, 3], [], []], [["a"]] * 4))
            names = random.choice((ids, [1, 2, 3, 4], ["a", "a", "b", None], ["a", "b", "c", "z"]))
            pyarrow.parquet.write_table(pyarrow.table({"image_id": names, kind: rows}), path)
        case _:
            path = folder / "x.parquet"
            table = pyarrow.table({"image_id": ids, "logits": [[1.0, 0, 0]] * 4})
            pyarrow.parquet.write_table(table, path)
            path.write_bytes(spoil.spoil_bytes(path.read_bytes(), random))
    import_predictions("m", path, folder / "index.parquet", folder / "base.json", folder / "out" / "x.npy")
    assert np.isfinite(io.load_array(folder / "out" / "x.npy")).all()


@functools.cache
def published_files() -> dict[str, bytes]:
    """The first lines of two published tables, with what they refer to."""
    source = ROOT / "config" / "published"
    tables = {name: (source / name).read_text().splitlines()[:6] for name in ("open_clip.csv", "retrieval.csv")}
    bias = (source / "shape_bias.cc-by-sa.csv").read_text().splitlines()[:7]
    tables["shape_bias.csv"] = bias
    used = {line.split(",")[0] for lines in tables.values() for line in lines[1:]}
    models = (source / "models.csv").read_text().splitlines()
    kept = [line for line in models[1:] if line.split(",")[0] in used]
    names = {line.split(",")[0] for line in kept}
    while parents := {line.split(",")[10] for line in kept if line.count(",") == 11} - names - {""}:
        kept += [line for line in models[1:] if line.split(",")[0] in parents]
        names |= parents
    tables["models.csv"] = [models[0], *kept]
    found = {name: "\n".join(lines).encode() + b"\n" for name, lines in tables.items()}
    return found | {"sources.csv": (source / "sources.csv").read_bytes()}


@target
def published(random: Random, folder: Path) -> None:
    (folder / "given").mkdir()
    files = dict(published_files())
    name = random.choice(sorted(files))
    files[name] = spoil.spoil_content(name, files[name], random)
    for name, content in files.items():
        (folder / "given" / name).write_bytes(content)
    import_published(folder / "given", folder / "out", "x")
    assert io.read_parquet(folder / "out" / "models.parquet")


@target
def target_words(random: Random, folder: Path) -> None:
    from tests.unit.adapter_samples import BASE

    text = "# comment\ntarget,word,image,numbers\nant,,x_##.jpg,1-3 7\nbee,a bee,y.jpg,\n"
    (folder / "x.csv").write_bytes(spoil.spoil_table(text, random).encode(errors="surrogatepass"))
    read_record(folder / "x.csv", ["x_01.jpg", "y.jpg", "z.jpg"], BASE)


# ---- configuration ------------------------------------------------------------------------------------------------


@functools.cache
def mini() -> dict[str, Any]:
    return load_yaml(ROOT / "config" / "mini.yaml")


def mapping(value: Any) -> dict[str, Any]:
    """Snakemake hands over nothing else."""
    return value if isinstance(value, dict) else {}


@target
def config(random: Random, folder: Path) -> None:
    """The mapping that Snakemake hands over: of YAML files and of `--config`."""
    load_study(mapping(spoil.spoil_value(mini(), random)), ROOT)


@functools.cache
def tables() -> dict[str, str]:
    names = ("datasets.yaml", "prompts.yaml", "models.tsv")
    found = {name: (ROOT / "config" / "mini" / name).read_text() for name in names}
    return found | {name: (ROOT / "config" / name).read_text() for name in ("model_sets.yaml", "attacks.yaml")}


@target
def config_tables(random: Random, folder: Path) -> None:
    """A study whose tables are spoiled."""
    name = random.choice(sorted(tables()))
    text = tables()[name]
    if name.endswith(".tsv"):
        text = spoil.spoil_table(text, random, "\t")
    elif random.random() < 0.6:
        text = yaml.safe_dump(spoil.spoil_value(yaml.safe_load(text), random), allow_unicode=random.random() < 0.5)
    else:
        text = spoil.spoil_text(text, random)
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    changed = json.loads(json.dumps(mini()))
    part, key = {"model_sets.yaml": ("models", "definitions")}.get(name, (name.partition(".")[0], "table"))
    changed[part][key] = str(folder / name)
    load_study(changed, ROOT)


@target
def yaml_file(random: Random, folder: Path) -> None:
    """YAML of any kind: aliases, merges, tags, odd numbers and dates."""
    parts = (
        *("a: &a [x, x, x, x, x, x, x, x, x]", "b: &b [*a, *a, *a, *a, *a, *a, *a]", "c: &c [*b, *b, *b, *b, *b, *b]"),
        *(
            "d: &d {<<: *c}",
            "e: {<<: [*d, *d]}",
            "j: &j [*j]",
            "k: &k {k: *k}",
            "z: &z {<<: [{a: 1}, {b: 2}]}",
            "y: *no",
        ),
        *("datasets: &d2 {x: *z}", "l: !!binary a", "m: !!set {a, b}", "aa: !!omap [a: 1]", "bb: !!pairs [a: 1]"),
        *("h: !!python/object/apply:os.system [ls]", "t: !!float x", "w: !!int 0b_", "x: !!timestamp 5", "s: ="),
        *("f: 2024-13-45", "g: 0x_", "i: .nan", "n: 1e400", "u: 1:99:99", "v: " + "9" * 5000, "1: 2", "~: ~", "a: 1"),
        *(
            "[1]: 2",
            "? {a: b} : c",
            "o: " + "[" * 3000,
            "p: " + "{a: " * 500,
            'q: "\\0"',
            'r: "\\ud800"',
            "- 5",
            "cc: |\n  x",
        ),
        *("---", "...", "%YAML 9.9", "\t- x"),
    )
    text = "\n".join(random.choice(parts) for _ in range(random.randint(1, 12))) + "\n"
    if random.random() < 0.4:
        text = spoil.spoil_text(text, random)
    (folder / "x.yaml").write_bytes(text.encode(errors="surrogatepass"))
    json.dumps(load_yaml(folder / "x.yaml"), allow_nan=False)
    if random.random() < 0.3:
        load_checked(folder / "x.yaml", random.choice(("datasets", "prompts", "model_sets", "config")), ROOT)


@target
def model_lines(random: Random, folder: Path) -> None:
    lines = (ROOT / "config" / "models.tsv").read_text().splitlines()
    chosen = "\n".join([lines[0], *(random.choice(lines[1:]) for _ in range(3))]) + "\n"
    (folder / "models.tsv").write_bytes(spoil.spoil_table(chosen, random, "\t").encode(errors="surrogatepass"))
    models = load_models(folder / "models.tsv", ROOT)
    model_sets(ROOT / "config" / "model_sets.yaml", models)
    for model in models.values():
        assert model.preprocess == "" or model.preprocessing.size


@target
def label_spaces(random: Random, folder: Path) -> None:
    from clip_robustness.inference.label_spaces import write_label_space

    entries = yaml.safe_load((ROOT / "config" / "datasets.yaml").read_text())
    name = random.choice(sorted(entries["label_spaces"]))
    entry = spoil.spoil_value({name: entries["label_spaces"][name]}, random)
    document = {"label_spaces": entry, "datasets": {}}
    (folder / "datasets.yaml").write_text(yaml.safe_dump(document), errors="surrogatepass")
    _, spaces = load_datasets(folder / "datasets.yaml", ROOT)
    base = {"name": "imagenet_1k", "classes": [str(i) for i in range(1000)], "wnids": [], "base": None}
    from tests.unit.layouts import base_space

    io.write_json(folder / "base.json", base | base_space())
    for name, space in spaces.items():
        write_label_space(name, space, folder / "base.json" if space.get("base") else None, folder / "out.json")


@target
def claims(random: Random, folder: Path) -> None:
    from clip_robustness.report.claims import load_claims

    document = yaml.safe_load((ROOT / "config" / "claims.yaml").read_text())
    some = {"claims": random.choice((document["claims"][:3], document["claims"][-3:]))}
    text = yaml.safe_dump(spoil.spoil_value(some, random))
    (folder / "claims.yaml").write_bytes(text.encode(errors="surrogatepass"))
    load_claims(folder / "claims.yaml", ROOT / "config" / "schemas" / "claims.schema.yaml")


@target
def prompts(random: Random, folder: Path) -> None:
    """A table of prompt sets and a file of templates, as a job reads them."""
    from clip_robustness.inference.heads import templates

    table = {
        "a": ["a photo of a {}."],
        "b": {"file": "x.txt"},
        "c": {"open_clip": "SIMPLE_IMAGENET_TEMPLATES", "first": 2},
    }
    text = yaml.safe_dump(spoil.spoil_value(table, random) if random.random() < 0.6 else table)
    (folder / "prompts.yaml").write_bytes(text.encode(errors="surrogatepass"))
    lines = spoil.spoil_text("# learned\n<|1|><|2|>{}\na {} b\n", random)
    (folder / "x.txt").write_bytes(lines.encode(errors="surrogatepass"))
    load_checked(folder / "prompts.yaml", "prompts", ROOT)
    for name in load_yaml(folder / "prompts.yaml"):
        found = templates(folder / "prompts.yaml", name)
        assert found and all(text.count("{}") == 1 for text in found)


@target
def preprocessing(random: Random, folder: Path) -> None:
    known = ("border_crop(2)|resize(224,bicubic)|center_crop(224)|normalize(openai)", "resize(256x320,bilinear)")
    known += ("center_crop(8)|normalize(0.5,0.5,0.5;0.5,0.5,0.5)",)
    text = spoil.spoil_text(random.choice(known), random)
    spec = Preprocessing.parse(text)
    assert Preprocessing.parse(str(spec)) == spec and "/" not in spec.key and len(spec.size) == 2


@target
def derived(random: Random, folder: Path) -> None:
    entry = {"from": "x", "by": "words", "targets": "a.csv", "copies": 8, "size": 25, "seed": 1, "format": "jpg"}
    other = {"from": "x", "by": "copies", "share": 0.1, "transforms": ["mirror"], "seed": 1}
    check_derive(mapping(spoil.spoil_value(random.choice((entry, other)), random)), "x: derive")


# ---- weights ------------------------------------------------------------------------------------------------------


@functools.cache
def checkpoints() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    state = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.zeros(3, dtype=torch.bfloat16)}
    found = {"x.safetensors": save(state)}
    for name, form in (("x.bin", True), ("x.pt", False)):
        target = streams.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, target, _use_new_zipfile_serialization=form)
        found[name] = target.getvalue()
    return found


@target
def checkpoint(random: Random, folder: Path) -> None:
    from clip_robustness.inference import checkpoints as read

    name = random.choice(sorted(checkpoints()))
    data = checkpoints()[name]
    if name == "x.safetensors" and random.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = spoil.write_json(spoil.spoil_value(json.loads(data[8 : 8 + length]), random), random)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif name == "x.bin" and random.random() < 0.5:
        data = spoil.spoil_zip(data, random)
    else:
        data = spoil.spoil_bytes(data, random)
    (folder / name).write_bytes(data)
    target = folder / "out.safetensors"
    if not read.is_plain(folder / name, "x"):
        read.to_safetensors(folder / name, target, "x")
    else:
        shutil.copyfile(folder / name, target)
    read.check_finite(target, "x")
    assert read.shapes_of(target, "x")


@target
def configuration(random: Random, folder: Path) -> None:
    """What lies beside weights: no code of it may be named."""
    from clip_robustness.inference.architectures import read_configuration

    known = {
        "model_cfg": {"embed_dim": 4, "text_cfg": {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "lower"}}}
    }
    (folder / "x.json").write_bytes(spoil.write_json(spoil.spoil_value(known, random), random))
    read_configuration("x", folder / "x.json")


def warm() -> None:
    """Make the valid files once, before processes are forked."""
    for make in (pictures, zips, shards, layouts, wheel, array, published_files, mini, tables, checkpoints):
        make()
