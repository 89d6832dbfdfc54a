import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from clip_robustness.core import archive
from clip_robustness.core.io import InputError
from clip_robustness.data import members
from tests.unit.samples import make_folder, make_tar


def add_member(path: Path, name: str, kind: bytes, link: str = "") -> Path:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return path


def content_by_name(found: list[members.Member]) -> dict[str, bytes]:
    return {m.name: archive.read_member(m.archive, m.offset, m.size) for m in found}


FILES = {"top/b/2.JPEG": b"two" * 400, "top/a/1.png": b"one", "top/a/empty.jpg": b"", "top/README.txt": b"no"}
IMAGES = {name: content for name, content in FILES.items() if not name.endswith(".txt")}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_gives_the_same_bytes(tmp_path: Path, form: int) -> None:
    long = "top/" + "deep/" * 30 + "x" * 90 + ".jpg"
    names = {"top/ä ö/日本.jpg": b"u", long: b"l" * 600} if form != tarfile.USTAR_FORMAT else {}
    files = FILES | names
    found = members.index_tar(make_tar(tmp_path / "a.tar", files, form))
    assert content_by_name(found) == IMAGES | names
    assert found == sorted(found)


def test_folder_tar_and_gzip_agree(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", FILES)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "a.tar", FILES).read_bytes()))
    results = [members.list_images(tmp_path / name) for name in ("f", "a.tar", "b.tar.gz")]
    assert content_by_name(results[0]) == content_by_name(results[1]) == content_by_name(results[2]) == IMAGES
    assert results[2][0].archive == str(tmp_path / "b.tar")


def test_a_gzip_is_unpacked_once_and_again_when_it_is_newer(tmp_path: Path) -> None:
    packed = tmp_path / "b.tgz"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "a.tar", FILES).read_bytes()))
    plain = members.unpack_gzip(packed)
    first = plain.stat()
    members.unpack_gzip(packed)
    assert plain.stat().st_mtime_ns == first.st_mtime_ns
    packed.write_bytes(gzip.compress(b"other"))
    os.utime(packed, ns=(first.st_mtime_ns + 10**9, first.st_mtime_ns + 10**9))
    assert members.unpack_gzip(packed).read_bytes() == b"other"


@pytest.mark.parametrize("damage", ["cut", "bits", "none_at_all"])
def test_a_damaged_gzip_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(os.urandom(100_000))
    flipped = whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:]
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes({"cut": whole[:-2000], "bits": flipped, "none_at_all": b"<html>"}[damage])
    with pytest.raises(InputError, match=r"b\.tar\.gz: not a whole gzip .* fetch it again"):
        members.list_images(packed)
    assert list(tmp_path.iterdir()) == [packed]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "SMALL", 1 << 20)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(bytes(64 << 20)))
    with pytest.raises(InputError, match="too much for images"):
        members.list_images(packed)
    assert list(tmp_path.iterdir()) == [packed]


def test_too_little_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(b"x"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="10 are free; make room"):
        members.list_images(packed)


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
        members.index_tar(path)
    assert str(path) in str(caught.value)
    assert "member '" in str(caught.value)


def test_links_that_are_no_images_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", FILES | {"top/a/._1.png": b"apple", "top/.DS_Store": b""})
    add_member(path, "LICENSE", tarfile.SYMTYPE, "README.txt")
    assert content_by_name(members.index_tar(path)) == IMAGES


def test_a_tar_cut_anywhere_is_never_taken_for_whole(tmp_path: Path) -> None:
    files = {f"n1/{i}.jpg": os.urandom(300 + 200 * i) for i in range(4)}
    whole = make_tar(tmp_path / "a.tar", files).read_bytes()
    end = len(whole.rstrip(b"\0"))
    blocks_with_data = -(-end // 512)
    cut = tmp_path / "cut.tar"
    for length in sorted({*range(0, blocks_with_data * 512 + 1, 512), *range(1, end, 97)}):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.tar"):
            members.index_tar(cut)
    cut.write_bytes(whole[: (blocks_with_data + 1) * 512])
    assert content_by_name(members.index_tar(cut)) == files


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {f"n1/{i}.jpg": b"x" * 100 for i in range(4)})
    raw = bytearray(path.read_bytes())
    raw[2 * 1024 + 20] ^= 255
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"after member 'n1/1\.jpg': not a whole tar .*damaged header at byte 2048"):
        members.index_tar(path)


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
        members.index_tar(path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 100, os.urandom(4096)])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar: not a whole tar .*fetch it again"):
        members.index_tar(path)


def test_other_sources(tmp_path: Path) -> None:
    (tmp_path / "a.rar").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (("a.rar", "expected a folder"), ("gone", "no such file"), ("empty", "no image")):
        with pytest.raises(InputError, match=message):
            members.list_images(tmp_path / name)


def test_links_in_a_folder_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    make_folder(tmp_path / "real", {"a/1.png": b"1"})
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "real" / "a")
    (folder / "loop").symlink_to(folder)
    assert content_by_name(members.index_folder(folder)) == {"a/1.png": b"1"}
    (folder / "broken.png").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"broken\.png: cannot read it"):
        members.index_folder(folder)
