import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from clip_robustness.core.io import InputError
from clip_robustness.data import containers, members, unpack
from clip_robustness.data.rows import Member
from tests.unit.samples import make_folder, make_tar


def add_member(path: Path, name: str, kind: bytes, link: str = "") -> Path:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return path


def content_by_name(found: list[Member]) -> dict[str, bytes]:
    return {member.name: members.read(member) for member in found}


FILES = {"top/b/2.JPEG": b"two" * 400, "top/a/1.png": b"one", "top/a/empty.jpg": b"", "top/README.txt": b"no"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_gives_the_same_bytes(tmp_path: Path, form: int) -> None:
    long = "top/" + "deep/" * 30 + "x" * 90 + ".jpg"
    names = {"top/ä ö/日本.jpg": b"u", long: b"l" * 600} if form != tarfile.USTAR_FORMAT else {}
    files = FILES | names
    found = members.list_members([make_tar(tmp_path / "a.tar", files, form)])
    assert content_by_name(found) == FILES | names
    assert found == sorted(found)


def test_folder_tar_and_gzip_agree(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", FILES)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "a.tar", FILES).read_bytes()))
    results = [members.list_members([tmp_path / name]) for name in ("f", "a.tar", "b.tar.gz")]
    assert content_by_name(results[0]) == content_by_name(results[1]) == content_by_name(results[2]) == FILES
    assert results[2][0].archive == str(tmp_path / "b.tar")


def test_a_gzip_is_unpacked_once_and_again_when_it_is_newer(tmp_path: Path) -> None:
    packed = tmp_path / "b.tgz"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "a.tar", FILES).read_bytes()))
    plain = unpack.unpack_gzip(packed)
    first = plain.stat()
    unpack.unpack_gzip(packed)
    assert plain.stat().st_mtime_ns == first.st_mtime_ns
    packed.write_bytes(gzip.compress(b"other"))
    os.utime(packed, ns=(first.st_mtime_ns + 10**9, first.st_mtime_ns + 10**9))
    assert unpack.unpack_gzip(packed).read_bytes() == b"other"


@pytest.mark.parametrize("damage", ["cut", "bits", "none_at_all"])
def test_a_damaged_gzip_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(os.urandom(100_000))
    flipped = whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:]
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes({"cut": whole[:-2000], "bits": flipped, "none_at_all": b"<html>"}[damage])
    with pytest.raises(InputError, match=r"b\.tar\.gz: not a whole gzip .* fetch it again"):
        members.list_members([packed])
    assert list(tmp_path.iterdir()) == [packed]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "SMALL", 1 << 20)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(bytes(64 << 20)))
    with pytest.raises(InputError, match="too much for images"):
        members.list_members([packed])
    assert list(tmp_path.iterdir()) == [packed]


def test_too_little_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(b"x"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="10 are free; make room"):
        members.list_members([packed])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../n1/x.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("n1/../../x.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("/etc/x.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("n1\\x.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("n1/a\nb.jpg", tarfile.REGTYPE, "no plain path"),
        ("n1/a\udce4.jpg", tarfile.REGTYPE, "no plain path"),
        ("n1/x.jpg", tarfile.SYMTYPE, "the image is a link"),
        ("n1/x.jpg", tarfile.LNKTYPE, "the image is a link"),
        ("n1/x.jpg", tarfile.GNUTYPE_SPARSE, "not stored as plain bytes"),
        ("n1/x.jpg", tarfile.CHRTYPE, "device or pipe"),
        ("dev/sda", tarfile.BLKTYPE, "device or pipe"),
        ("n1/x.jpg", tarfile.FIFOTYPE, "device or pipe"),
        ("top/a/1.png", tarfile.REGTYPE, "stands there twice"),
        ("./top//a/1.png", tarfile.REGTYPE, "stands there twice"),
    ],
)
def test_a_malicious_tar_is_refused(tmp_path: Path, name: str, kind: bytes, message: str) -> None:
    path = add_member(make_tar(tmp_path / "a.tar", FILES), name, kind, "/etc/passwd")
    with pytest.raises(InputError, match=message) as caught:
        members.list_members([path])
    assert str(path) in str(caught.value)
    assert "member '" in str(caught.value)


def test_links_that_are_no_images_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", FILES | {"top/a/._1.png": b"apple", "top/.DS_Store": b""})
    add_member(path, "LICENSE", tarfile.SYMTYPE, "README.txt")
    assert content_by_name(members.list_members([path])) == FILES


def test_a_tar_cut_anywhere_is_never_taken_for_whole(tmp_path: Path) -> None:
    files = {f"n1/{i}.jpg": os.urandom(300 + 200 * i) for i in range(4)}
    whole = make_tar(tmp_path / "a.tar", files).read_bytes()
    end = len(whole.rstrip(b"\0"))
    blocks_with_data = -(-end // 512)
    cut = tmp_path / "cut.tar"
    for length in sorted({*range(0, blocks_with_data * 512 + 1, 512), *range(1, end, 97)}):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.tar"):
            members.list_members([cut])
    cut.write_bytes(whole[: (blocks_with_data + 1) * 512])
    assert content_by_name(members.list_members([cut])) == files


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {f"n1/{i}.jpg": b"x" * 100 for i in range(4)})
    raw = bytearray(path.read_bytes())
    raw[2 * 1024 + 20] ^= 255
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"after member 'n1/1\.jpg': not a whole tar .*damaged header at byte 2048"):
        members.list_members([path])


def test_a_header_that_leads_backwards_ends_the_walk(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {f"n1/{i}.jpg": b"x" * 100 for i in range(3)})
    raw = bytearray(path.read_bytes())
    header = bytearray(raw[1024:1536])
    header[124:136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")  # base-256: size -512, so that it follows itself
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[1024:1536] = header
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"backwards|not a whole tar"):
        members.list_members([path])


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 100, os.urandom(4096)])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar: not a whole tar .*fetch it again"):
        members.list_members([path])


def test_other_sources(tmp_path: Path) -> None:
    (tmp_path / "a.rar").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (("a.rar", "expected a folder"), ("gone", "no such file"), ("empty", "holds no file")):
        with pytest.raises(InputError, match=message):
            members.list_members([tmp_path / name])


def test_links_in_a_folder_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    make_folder(tmp_path / "real", {"a/1.png": b"1"})
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "real" / "a")
    (folder / "loop").symlink_to(folder)
    assert content_by_name(members.list_members([folder])) == {"a/1.png": b"1"}
    (folder / "broken.png").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"broken\.png: cannot read it"):
        members.list_members([folder])


def test_headers_of_gigabytes_are_not_read_into_memory(tmp_path: Path) -> None:
    """A long name, a pax record, global pax records that pile up: what they claim is only bounded by the file."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n1/" + "x" * (containers.LARGEST_HEADER + 1) + ".jpg"))
    with pytest.raises(InputError, match=r"a\.tar: headers of more than 1,048,576 bytes are a bomb"):
        members.list_members([path])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("n1/x.jpg")
        info.pax_headers = {"comment": "x" * containers.LARGEST_HEADER}
        tar.addfile(info)
    with pytest.raises(InputError, match="are a bomb"):
        members.list_members([path])
    with path.open("wb") as file:
        for i in range(9):
            file.write(tarfile.TarInfo.create_pax_global_header({f"comment{i}": "x" * 200_000}))
            file.write(tarfile.TarInfo(f"n1/{i}.jpg").tobuf())
        file.write(bytes(1024))
    with pytest.raises(InputError, match="are a bomb"):
        members.list_members([path])


def test_a_chain_of_headers_ends(tmp_path: Path) -> None:
    """Each extended header makes tarfile call itself for the next."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4
    (tmp_path / "a.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")) * 5000)
    with pytest.raises(InputError, match=r"a\.tar: (not a whole tar|headers of more)"):
        members.list_members([tmp_path / "a.tar"])


def test_a_million_members_are_too_many_where_the_limit_is_lower(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(containers, "MOST_MEMBERS", 3)
    path = make_tar(tmp_path / "a.tar", FILES)
    with pytest.raises(InputError, match=r"a\.tar: more than 3 members"):
        members.list_members([path])


def test_a_tar_of_tars_is_read_in_place(tmp_path: Path) -> None:
    """ImageNet's training set: ILSVRC2012_img_train.tar holds one tar a class."""
    inner = {
        f"n0144{c}.tar": make_tar(
            tmp_path / "inner.tar", {f"n0144{c}_{i}.JPEG": b"%d%d" % (c, i) for i in range(3)}
        ).read_bytes()
        for c in range(2)
    }
    path = make_tar(tmp_path / "train.tar", inner | {"README": b"r"})
    found = members.list_members([path])
    expected = {f"n0144{c}/n0144{c}_{i}.JPEG": b"%d%d" % (c, i) for c in range(2) for i in range(3)}
    assert content_by_name(found) == expected | {"README": b"r"}
    assert {member.archive for member in found} == {str(path)}
    make_tar(path, {name: content[:1024] for name, content in inner.items()})  # an inner one is cut, the outer whole
    with pytest.raises(InputError, match=r"train\.tar.*: not a whole tar .*its end mark is missing"):
        members.list_members([path])
    found = members.list_members([make_tar(path, {"a.tar": inner["n01440.tar"], "x.jpg": b"x"})])
    assert [member.name for member in found] == ["a.tar", "x.jpg"]


def test_a_member_of_an_inner_tar_cannot_reach_out_of_it(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.JPEG")
    info.size = 5000
    path = make_tar(tmp_path / "train.tar", {"n1.tar": info.tobuf() + bytes(2048), "secret.bin": b"s" * 9000})
    with pytest.raises(InputError, match="not a whole tar"):
        members.list_members([path])


def test_a_tar_under_the_name_of_a_gzip_is_read_in_place(tmp_path: Path) -> None:
    """ImageNet-V2's archives are such."""
    path = make_tar(tmp_path / "imagenetv2.tar.gz", FILES)
    found = members.list_members([path])
    assert content_by_name(found) == FILES
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_shards_is_what_its_shards_hold(tmp_path: Path) -> None:
    shards = make_folder(tmp_path / "shards", {"labels.csv": b"a,b"})
    make_tar(shards / "00000.tar", {"000.jpg": b"0", "000.cls": b"7"})
    make_tar(shards / "00001.tar", {"001.jpg": b"1", "001.cls": b"8"})
    packed = shards / "00002.tar.gz"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "b.tar", {"002.jpg": b"2"}).read_bytes()))
    expected = {
        "000.jpg": b"0",
        "000.cls": b"7",
        "001.jpg": b"1",
        "001.cls": b"8",
        "002.jpg": b"2",
        "labels.csv": b"a,b",
    }
    assert content_by_name(members.list_members([shards])) == expected
    assert content_by_name(members.list_members([shards])) == expected  # the unpacked tar is no second copy


def test_an_archive_beside_images_stays_shut(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "val", {"n1/x.jpg": b"x", ".cache/y.jpg": b"y", ".DS_Store": b""})
    make_tar(folder / "ILSVRC2012_img_val.tar", {"x.jpg": b"again"})
    assert [member.name for member in members.list_members([folder])] == ["ILSVRC2012_img_val.tar", "n1/x.jpg"]


def test_several_sources_are_one(tmp_path: Path) -> None:
    first = make_tar(tmp_path / "1.tar", {"b/x.jpg": b"1", "labels.txt": b"one"})
    second = make_tar(tmp_path / "2.tar", {"a/x.jpg": b"2", "labels.txt": b"two"})
    (tmp_path / "pmk.json").write_bytes(b"{}")
    found = members.list_members([second, first, tmp_path / "pmk.json"])
    assert found == members.list_members([tmp_path / "pmk.json", first, second])
    assert [(member.name, members.read(member)) for member in found] == [
        ("a/x.jpg", b"2"),
        ("b/x.jpg", b"1"),
        ("labels.txt", b"one"),
        ("labels.txt", b"two"),
        ("pmk.json", b"{}"),
    ]
    assert list(members.read_all(found)) == [b"2", b"1", b"one", b"two", b"{}"]
    assert [member.name for member in members.images(found)] == ["a/x.jpg", "b/x.jpg"]


def test_samples_of_webdataset_shards(tmp_path: Path) -> None:
    first = make_tar(tmp_path / "s-0.tar", {"a/00.JPG": b"0", "a/00.seg.png": b"s", "a/00.cls": b"3"})
    second = make_tar(tmp_path / "s-1.tar", {"a/01.jpg": b"1", "a/01.cls": b"4"})
    samples = members.group_by_key(members.list_members([first, second]))
    read = {key: {name: members.read(m) for name, m in sample.items()} for key, sample in samples.items()}
    assert read == {"a/00": {"jpg": b"0", "seg.png": b"s", "cls": b"3"}, "a/01": {"jpg": b"1", "cls": b"4"}}
    make_tar(second, {"a/00.jpg": b"1", "a/00.cls": b"4"})
    samples = members.group_by_key(members.list_members([second, first]))
    assert list(samples) == ["s-0/a/00", "s-1/a/00"]
    assert members.read(samples["s-1/a/00"]["cls"]) == b"4"
    (tmp_path / "other").mkdir()
    twin = make_tar(tmp_path / "other" / "s-0.tar", {"a/00.jpg": b"1"})
    with pytest.raises(InputError, match=r"s-0\.tar, member 'a/00\..*': its sample holds two 'jpg'"):
        members.group_by_key(members.list_members([first, twin]))


def test_a_name_in_a_folder_that_is_no_text(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", {"a/x.jpg": b"", "a/Icon\r": b""})
    assert [member.name for member in members.list_members([tmp_path / "f"])] == ["a/x.jpg"]
    (tmp_path / "f" / "a\nb.jpg").touch()
    with pytest.raises(InputError, match=r"'a\\nb\.jpg': the name is not plain text; rename it"):
        members.list_members([tmp_path / "f"])
