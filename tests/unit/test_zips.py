"""Zips in place, and encrypted ones (and gzips) unpacked once."""

import gzip
import io as streams
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import clip_robustness
from clip_robustness.core.archive import largest_inflated
from clip_robustness.core.io import InputError
from clip_robustness.data import containers, members, unpack, zipcrypto
from tests.unit.packed import encrypted_zip, make_zip
from tests.unit.samples import make_tar

FILES = {"top/b/2.JPEG": os.urandom(800), "top/a/1.png": b"one" * 500, "top/a/empty.jpg": b"", "top/labels.csv": b"a,b"}


def contents(source: Path, password: str | None = None) -> dict[str, bytes]:
    return {member.name: members.read(member) for member in members.list_members([source], password)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_in_place(tmp_path: Path, method: int) -> None:
    path = make_zip(
        tmp_path / "a.zip", FILES | {"top/": b"", "__MACOSX/top/._1.png": b"no", "top/ä ö/日本.jpg": b"u"}, method
    )
    found = members.list_members([path])
    assert contents(path) == FILES | {"top/ä ö/日本.jpg": b"u"}
    assert {member.codec for member in found} == {"deflate" if method else ""}
    assert list(tmp_path.iterdir()) == [path]
    raw = path.read_bytes()
    for member in found:  # the offset is that of the data, as the index has it
        part = raw[member.offset : member.offset + member.size]
        assert (zlib.decompress(part, -15) if method else part) == members.read(member)


def test_a_zip_that_was_streamed_or_has_a_prefix_or_zip64_fields(tmp_path: Path, monkeypatch) -> None:
    class Pipe(streams.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # sizes and CRC follow the data
        for name, content in FILES.items():
            with archive.open(name, "w", force_zip64=True) as file:  # local headers are longer than the directory says
                file.write(content)
    (tmp_path / "a.zip").write_bytes(pipe.data)
    assert contents(tmp_path / "a.zip") == FILES
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 30 + pipe.data)
    assert contents(tmp_path / "b.zip") == FILES
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 700)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    make_zip(tmp_path / "c.zip", FILES)
    monkeypatch.undo()
    assert b"PK\x06\x06" in (tmp_path / "c.zip").read_bytes()
    assert contents(tmp_path / "c.zip") == FILES


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("../n1/x.jpg", stat.S_IFREG, "leads out of the archive"),
        ("n1/../../x.csv", stat.S_IFREG, "leads out of the archive"),
        ("/etc/x.jpg", stat.S_IFREG, "leads out of the archive"),
        ("n1\\x.jpg", stat.S_IFREG, "no plain path"),
        ("n1/a\nb.jpg", stat.S_IFREG, "no plain path"),
        ("n1/x.jpg", stat.S_IFLNK, "the image is a link"),
        ("dev/sda", stat.S_IFBLK, "device or pipe"),
        ("dev/null", stat.S_IFCHR, "device or pipe"),
        ("n1/x.jpg", stat.S_IFIFO, "device or pipe"),
        ("./n1//y.jpg", stat.S_IFREG, "stands there twice"),
    ],
)
def test_a_malicious_zip_is_refused(tmp_path: Path, name: str, mode: int, message: str) -> None:
    path = make_zip(tmp_path / "a.zip", {"n1/y.jpg": b"y"})
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, b"/etc/passwd")
    with pytest.raises(InputError, match=message) as caught:
        members.list_members([path])
    assert f"{path}, member '" in str(caught.value)


def test_a_member_without_a_name_is_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"x")
        archive.writestr("a.png", b"y")
    assert contents(tmp_path / "a.zip") == {"a.png": b"y"}


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"n1/x.jpg_.exe": b"x"})
    path.write_bytes(path.read_bytes().replace(b"x.jpg_.exe", b"x.jpg\0.exe"))
    with pytest.raises(InputError, match="no plain path"):
        members.list_members([path])


def test_links_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("LICENSE")
        info.external_attr = stat.S_IFLNK << 16
        archive.writestr(info, b"../LICENSE")
    assert contents(path) == FILES


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    size = largest_inflated(1) + 1
    bomb = make_zip(tmp_path / "a.zip", {"x.jpg": bytes(size)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"member 'x\.jpg': .* grow to 16,777,217, more than 16,777,216: a bomb"):
        members.list_members([bomb])
    # One that lies about its size is stopped when it is read.
    bomb.write_bytes(bomb.read_bytes().replace(size.to_bytes(4, "little"), (99).to_bytes(4, "little")))
    (member,) = members.list_members([bomb])
    with pytest.raises(InputError, match=r"a\.zip, image 'x\.jpg': .* bytes grow beyond 16,777,216"):
        members.read(member)


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A directory may name the same bytes a million times: that is how a small file holds petabytes."""
    path = make_zip(tmp_path / "a.zip", {"x.jpg": b"x" * 1000, "y.jpg": b"y" * 1000})
    raw = bytearray(path.read_bytes())
    second = raw.rindex(b"PK\x01\x02")
    raw[second + 42 : second + 46] = bytes(4)  # where its local header lies
    path.write_bytes(raw)
    with pytest.raises(InputError, match="shares bytes with another"):
        members.list_members([path])


@pytest.mark.parametrize("damage", ["cut", "directory", "local", "page", "empty", "method"])
def test_what_is_no_whole_zip(tmp_path: Path, damage: str) -> None:
    path = make_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_BZIP2 if damage == "method" else zipfile.ZIP_STORED)
    raw = path.read_bytes()
    broken = {
        "cut": raw[:-40],
        "directory": raw.replace(b"PK\x01\x02", b"PK\x01\x03"),
        "local": raw.replace(b"PK\x03\x04", b"PK\x03\x05"),
        "page": b"<html>",
        "empty": b"",
        "method": raw,
    }
    path.write_bytes(broken[damage])
    with pytest.raises(InputError, match=r"a\.zip.*(not a whole zip|damaged header|compression method 12)"):
        members.list_members([path])


def test_a_zip_cut_anywhere_is_never_taken_for_whole(tmp_path: Path) -> None:
    whole = make_zip(tmp_path / "a.zip", {f"{i}.jpg": os.urandom(90) for i in range(3)}).read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.zip"):
            members.list_members([cut])


def test_a_damaged_deflate_stream_is_an_error(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"x.jpg": os.urandom(50) * 40}, zipfile.ZIP_DEFLATED)
    (member,) = members.list_members([path])
    raw = path.read_bytes()
    for size in (0, 5, member.size - 1, member.size + 1):
        with pytest.raises(InputError, match=r"a\.zip, image 'x\.jpg': damaged"):
            members.read(member._replace(size=size))
    path.write_bytes(raw[: member.offset] + b"\xff" + raw[member.offset + 1 :])
    with pytest.raises(InputError, match=r"a\.zip, image 'x\.jpg': damaged"):
        members.read(member)


def test_a_directory_of_gigabytes_is_not_read_into_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(containers, "LARGEST_DIRECTORY", 1000)
    path = make_zip(tmp_path / "a.zip", {f"{i}.jpg": b"" for i in range(40)})
    with pytest.raises(InputError, match=r"a\.zip: headers of more than 1,000 bytes are a bomb"):
        members.list_members([path])


SECRETS = {"top/a/1.png": os.urandom(5000), "top/b/2.png": b"", "top/c.csv": b"a,b\n" * 900, "top/d.jpg": b"d"}


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("plain", [(), ("top/c.csv", "top/b/2.png")])
def test_an_encrypted_zip_is_repacked_once(tmp_path: Path, monkeypatch, deflate: bool, plain: tuple[str, ...]) -> None:
    monkeypatch.setattr(unpack, "LANES", 2)
    monkeypatch.setattr(unpack, "STEP", 700)
    path = encrypted_zip(tmp_path / "objectnet-1.0.zip", SECRETS, deflate, plain)
    with zipfile.ZipFile(path) as archive:  # the test's own writing is right
        assert {name: archive.read(name, b"secret") for name in SECRETS} == SECRETS
    assert contents(path, "secret") == SECRETS
    assert {member.archive for member in members.list_members([path], "secret")} == {str(path.with_suffix(".tar"))}
    first = path.with_suffix(".tar").stat().st_mtime_ns
    assert contents(path) == SECRETS  # no password is needed any more
    assert path.with_suffix(".tar").stat().st_mtime_ns == first
    assert {member.name for member in members.list_members([tmp_path])} == set(SECRETS)  # nor in a folder of both


def test_many_members_side_by_side_equal_zipfiles_one_by_one() -> None:
    data = np.random.default_rng(0).integers(0, 256, (700, 5), np.uint8)
    keys = np.repeat(zipcrypto.password_keys("sécret")[:, None], 5, axis=1)
    ours = data.copy()
    for start in range(0, 700, 123):
        zipcrypto.decrypt(ours[start : start + 123], keys)
    for lane in range(5):
        assert ours[:, lane].tobytes() == zipfile._ZipDecrypter("sécret".encode())(data[:, lane].tobytes())


def damaged(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[200] ^= 255
    path.write_bytes(raw)


def test_what_goes_wrong_with_an_encrypted_zip_leaves_no_tar(tmp_path: Path, monkeypatch) -> None:
    path = encrypted_zip(tmp_path / "a.zip", SECRETS, deflate=False)
    with pytest.raises(InputError, match=r"a\.zip: is encrypted; give the password .* 'password' in the data set's"):
        members.list_members([path])
    with pytest.raises(InputError, match=r"a\.zip, member 'top/.*': wrong password"):
        members.list_members([path], "Secret")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"unpacking needs at least 12,800 bytes, 10 are free; make room"):
            members.list_members([path], "secret")
    for deflate in (False, True):
        damaged(encrypted_zip(path, SECRETS, deflate))
        with pytest.raises(InputError, match=r"a\.zip, member 'top/a/1\.png': damaged, or a wrong password \("):
            members.list_members([path], "secret")
    assert list(tmp_path.iterdir()) == [path]


def test_a_strongly_encrypted_zip_says_what_to_do(tmp_path: Path) -> None:
    path = encrypted_zip(tmp_path / "a.zip", {"x.jpg": b"x"}, deflate=True)
    path.write_bytes(path.read_bytes().replace(b"\x01\0\x08\0", b"\x01\0\x63\0"))
    with pytest.raises(InputError, match=r"'x\.jpg': AES encryption cannot be read in place; unpack it and name"):
        members.list_members([path], "secret")


def listing_process(path: Path, **options: object) -> subprocess.Popen:
    code = "from pathlib import Path; from clip_robustness.data.members import list_members as l;"
    code += f"l([Path({str(path)!r})], 'secret')"
    environment = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_disk_that_is_full_while_unpacking(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.zip":
        encrypted_zip(path, {"x.png": os.urandom(100_000)}, deflate=True)
    else:
        path.write_bytes(gzip.compress(make_tar(tmp_path / "b.tar", {"x.png": os.urandom(100_000)}).read_bytes()))
        (tmp_path / "b.tar").unlink()
    limit = (50_000, 50_000)
    job = listing_process(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert f"a.tar: cannot unpack {name} there (File too large); make room" in said
    assert list(tmp_path.iterdir()) == [path]


def test_a_repack_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    path = encrypted_zip(tmp_path / "a.zip", {f"{i}.png": os.urandom(200_000) for i in range(3)}, deflate=False)
    job = listing_process(path)
    deadline = time.monotonic() + 60
    while job.poll() is None and len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert not path.with_suffix(".tar").exists()
    assert len(contents(path, "secret")) == 3
