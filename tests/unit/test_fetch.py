"""Where data come from and are kept: mirrors, gated sets, lock file, cache, model hub. Faults: test_fetch_faults."""

import dataclasses
import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clip_robustness
from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.data import hub
from clip_robustness.data.fetch import BLOCK, fetch
from clip_robustness.data.hub import fetch_hub, pin

BODY = random.Random(3).randbytes(3 * BLOCK + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1]), hub.CACHE_VARIABLE: ""}


@dataclasses.dataclass(frozen=True)
class Reply:
    """One way in which a server answers. cut: bytes of its body after which it closes or, with `hold`, waits."""

    status: int = 200
    body: bytes = BODY
    kind: str = "application/x-tar"
    etag: str | None = '"v1"'
    modified: str | None = None
    cut: int | None = None
    hold: bool = False
    ranges: bool = True
    heeds_if_range: bool = True
    length: str = "announced"  # or "chunked", or "close"
    headers: tuple[tuple[str, str], ...] = ()


class Server(http.server.ThreadingHTTPServer):
    """Answers each path by its replies, in turn; the last stays. `seen`: path, Range and If-Range of each GET."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.released = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def url(self, path: str, *replies: Reply) -> str:
        self.replies[path] = list(replies) or [Reply()]
        return f"{self.address}/{path}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.seen]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path, asked, validator = self.path.strip("/"), self.headers["Range"], self.headers["If-Range"]
        self.server.seen.append((path, asked, validator))
        replies = self.server.replies.get(path, [Reply(404)])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply.status != 200:
            self.send_response(reply.status)
            for header in (*reply.headers, ("Content-Type", "text/html"), ("Content-Length", "0")):
                self.send_header(*header)
            self.end_headers()
            return
        fresh = validator in (None, reply.etag, reply.modified) or not reply.heeds_if_range
        start = int(asked[len("bytes=") : -1]) if asked and reply.ranges and fresh else 0
        if start and start >= len(reply.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(reply.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        body = reply.body[start:]
        optional = (("ETag", reply.etag), ("Last-Modified", reply.modified))
        for name, value in (("Content-Type", reply.kind), *optional, *reply.headers):
            if value:
                self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(reply.body) - 1}/{len(reply.body)}")
        if reply.length == "announced":
            self.send_header("Content-Length", str(len(body)))
        elif reply.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        self.close_connection = reply.length == "close" or reply.cut is not None
        self.end_headers()
        sent = body if reply.cut is None else body[: reply.cut]
        if reply.length == "chunked":
            sent = b"%x\r\n%s" % (len(body), sent) + (b"\r\n0\r\n\r\n" if reply.cut is None else b"")
        self.wfile.write(sent)
        self.wfile.flush()
        if reply.hold:
            self.server.released.wait(30)
            self.wfile.write(body[len(sent) :])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    httpd = Server()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield httpd
    httpd.released.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.CACHE_VARIABLE, "")


def dataset(*urls: str, **facts: Any) -> dict[str, Any]:
    return {"name": "x", "licence": "MIT", "archives": [{"file": "a.tar", "urls": list(urls), **facts}]}


def get(folder: Path, *urls: str, cache: Path | None = None, timeout: float = 5, **facts: Any) -> list[float]:
    """Fetch to `folder`/a.tar; the waits between tries, which nobody slept."""
    waits: list[float] = []
    fetch(
        dataset(*urls, **facts),
        "a.tar",
        folder / "a.tar",
        folder / "lock.json",
        cache,
        timeout=timeout,
        sleep=waits.append,
    )
    return waits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_another_process(folder: Path, url: str, **facts: Any) -> subprocess.Popen:
    code = f"""
import clip_robustness.data.fetch as f
from pathlib import Path
out = Path({str(folder)!r})
f.fetch({dataset(url, **facts)!r}, "a.tar", out / "a.tar", out / "lock.json", timeout=20)
"""
    return subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


# Mirrors


@pytest.mark.parametrize("length", ["announced", "chunked", "close"])
@pytest.mark.parametrize("facts", [{"bytes": len(BODY), "sha256": SHA256}, {"sha256": SHA256}, {"md5": MD5}, {}])
def test_a_good_mirror(server: Server, tmp_path: Path, length: str, facts: dict) -> None:
    waits = get(tmp_path / "new", server.url("a", Reply(length=length)), **facts)
    assert (tmp_path / "new" / "a.tar").read_bytes() == BODY
    assert waits == []
    assert names(tmp_path / "new") == (["a.tar"] if "sha256" in facts else ["a.tar", "lock.json"])
    assert server.seen == [("a", None, None)]


def test_a_redirect_is_followed_with_the_range(server: Server, tmp_path: Path) -> None:
    target = server.url("good", Reply(cut=BLOCK), Reply())
    moved = server.url("moved", Reply(302, headers=(("Location", target),)))
    get(tmp_path, moved, sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.seen[-1] == ("good", f"bytes={BLOCK}-", '"v1"')


def test_an_encoding_of_the_file_is_not_undone(server: Server, tmp_path: Path) -> None:
    """Servers that say 'Content-Encoding: x-gzip' of a .tar.gz mean the file itself."""
    get(tmp_path, server.url("a", Reply(headers=(("Content-Encoding", "gzip"),))), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_a_file_url(tmp_path: Path) -> None:
    source = tmp_path / "my archives" / "source.tar"
    source.parent.mkdir()
    source.write_bytes(BODY)
    get(tmp_path / "out", source.as_uri(), sha256=SHA256)
    assert (tmp_path / "out" / "a.tar").read_bytes() == BODY
    assert not (tmp_path / "out" / "a.tar").samefile(source)


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_url_is_resumed_unless_the_file_changed(tmp_path: Path, changed: bool) -> None:
    source = tmp_path / "source.tar"
    source.write_bytes(BODY)
    etag = f'"{source.stat().st_mtime_ns - changed}-{len(BODY)}"'
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.tar.part").write_bytes(bytes(BLOCK))
    io.write_json(tmp_path / "out" / "a.tar.part.json", {"url": source.as_uri(), "etag": etag, "size": len(BODY)})
    get(tmp_path / "out", source.as_uri())
    assert (tmp_path / "out" / "a.tar").read_bytes() == (BODY if changed else bytes(BLOCK) + BODY[BLOCK:])


def test_what_is_there_is_checked_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(BODY)
    get(tmp_path, server.url("a"), sha256=SHA256)
    assert server.seen == []
    (tmp_path / "a.tar").write_bytes(b"x" + BODY[1:])
    get(tmp_path, server.url("a"), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert len(server.seen) == 1


def test_progress_is_told_in_megabytes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(io.Progress.__init__, "__defaults__", ("MB", 0.0))
    body = BODY * 3
    get(tmp_path, server.url("a", Reply(body=body, cut=2 * 10**6), Reply(body=body)))
    err = capsys.readouterr().err
    assert "fetch x/a.tar 1/3 MB, " in err and " MB/s, " in err and " left" in err
    assert err.count("fetch x/a.tar 3/3 MB, ") == 1 and "2 were there" in err
    assert "its licence: MIT" in err


@pytest.mark.parametrize("access", ["registration", "licence_click", "open"])
@pytest.mark.parametrize("archives", [None, [{"file": "val.tar"}]])
def test_a_gated_set_names_the_place_and_the_line_to_write(tmp_path: Path, access: str, archives: list | None) -> None:
    entry = {
        "name": "imagenet_val",
        "title": "ImageNet validation",
        "access": access,
        "licence": "for research",
        "note": "register at image-net.org",
        "archives": archives,
    }
    with pytest.raises(InputError) as caught:
        fetch(entry, "val.tar", tmp_path / "val.tar", tmp_path / "lock.json")
    message = str(caught.value)
    for part in ("ImageNet validation", access, "for research", "register at image-net.org"):
        assert part in message
    assert "local: {imagenet_val: /path/to/val.tar}" in message
    assert names(tmp_path) == []
    (tmp_path / "val.tar").write_bytes(BODY)
    fetch(entry, "val.tar", tmp_path / "val.tar", tmp_path / "lock.json")
    assert io.read_json(tmp_path / "lock.json")["imagenet_val/val.tar"]["sha256"] == SHA256


def test_an_archive_that_the_entry_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"datasets\.x\.archives: no file 'b\.tar', only a\.tar"):
        fetch(dataset("file:///a"), "b.tar", tmp_path / "b.tar", tmp_path / "lock.json")


# The lock file


def test_the_first_download_is_pinned_and_later_ones_must_match(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("a"))
    text = (tmp_path / "lock.json").read_text()
    assert json.loads(text) == {"x/a.tar": {"bytes": len(BODY), "sha256": SHA256}}
    (tmp_path / "a.tar").unlink()
    get(tmp_path, server.url("a"))
    assert (tmp_path / "lock.json").read_text() == text

    (tmp_path / "a.tar").unlink()
    other = bytes(len(BODY))
    with pytest.raises(InputError, match=r"pinned in .*lock\.json") as caught:
        get(tmp_path, server.url("a", Reply(body=other)))
    assert SHA256 in str(caught.value) and hashlib.sha256(other).hexdigest() in str(caught.value)
    with pytest.raises(InputError, match=f"5 bytes announced, expected {len(BODY):,} .pinned in .*remove the entry"):
        get(tmp_path, server.url("a", Reply(body=b"other")))
    assert names(tmp_path) == ["lock.json"]
    assert (tmp_path / "lock.json").read_text() == text


def test_an_archive_known_by_md5_is_pinned_by_sha256(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("a"), md5=MD5, bytes=len(BODY))
    assert io.read_json(tmp_path / "lock.json")["x/a.tar"]["sha256"] == SHA256


def test_processes_do_not_lose_each_others_pins(tmp_path: Path) -> None:
    lock = tmp_path / "config" / "data.lock.json"
    code = """
import sys
from pathlib import Path
from clip_robustness.data.hub import pin
for i in range(20):
    pin(Path(sys.argv[1]), f"{sys.argv[2]}/{i}", {"sha256": "0"})
"""
    command = [sys.executable, "-c", code, str(lock)]
    runs = [subprocess.Popen([*command, name], env=ENVIRONMENT, stderr=subprocess.DEVNULL) for name in "abc"]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert sorted(io.read_json(lock)) == sorted(f"{name}/{i}" for name in "abc" for i in range(20))
    assert names(lock.parent) == [lock.name]


def test_a_pin_that_differs_shows_both(tmp_path: Path) -> None:
    pin(tmp_path / "lock.json", "x", {"sha256": "one"})
    with pytest.raises(InputError, match=r"pinned .*one.* found .*two.* Remedy"):
        pin(tmp_path / "lock.json", "x", {"sha256": "two"})


@pytest.mark.parametrize("text", ["{", "[]", '{"x/a.tar": 1}'])
def test_a_damaged_lock_file_is_never_overwritten(server: Server, tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(InputError, match=r"lock\.json: .*; take the committed file again"):
        get(tmp_path, server.url("a"))
    assert (tmp_path / "lock.json").read_text() == text
    assert server.seen == []


# The user's cache


@pytest.mark.parametrize("facts", [{"sha256": SHA256}, {"md5": MD5}, {}])
def test_a_cached_archive_needs_no_network(server: Server, tmp_path: Path, facts: dict) -> None:
    cache, url = tmp_path / "cache", server.url("a")
    get(tmp_path / "one", url, cache=cache, **facts)
    get(tmp_path / "two", url, cache=cache, **facts)
    assert len(server.seen) == 1
    assert (tmp_path / "two" / "a.tar").read_bytes() == BODY
    assert (tmp_path / "two" / "a.tar").samefile(cache / SHA256)
    assert len(names(cache)) == (1 if "sha256" in facts else 2)


def test_the_cache_is_named_by_a_variable_and_off_when_that_is_empty(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    get(tmp_path / "one", server.url("a"), sha256=SHA256)
    assert not (tmp_path / "home").exists()
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "mine"))
    get(tmp_path / "two", server.url("a"), sha256=SHA256)
    assert names(tmp_path / "mine") == [SHA256]
    monkeypatch.delenv(hub.CACHE_VARIABLE)
    get(tmp_path / "three", server.url("a"), sha256=SHA256)
    assert names(tmp_path / "home" / ".cache" / "clip_robustness" / "archives") == [SHA256]


@pytest.mark.skipif(sys.platform != "linux", reason="needs two file systems: here /dev/shm is one")
@pytest.mark.parametrize("named", [True, False])
def test_only_a_cache_that_the_user_named_takes_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        monkeypatch.delenv(hub.CACHE_VARIABLE)
        folder = Path(other) / "clip_robustness" / "archives"
        (tmp_path / "source.tar").write_bytes(BODY)
        url = (tmp_path / "source.tar").as_uri()
        get(tmp_path / "one", url, cache=folder if named else None, sha256=SHA256)
        assert names(folder) == ([SHA256] if named else [])
        (tmp_path / "source.tar").unlink()
        if named:
            get(tmp_path / "two", url, cache=folder, sha256=SHA256)
            assert (tmp_path / "two" / "a.tar").read_bytes() == BODY


def test_a_damaged_or_unwritable_cache_does_no_harm(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / SHA256).write_bytes(bytes(len(BODY)))
    get(tmp_path / "one", server.url("a"), cache=cache, sha256=SHA256)
    assert (tmp_path / "one" / "a.tar").read_bytes() == (cache / SHA256).read_bytes() == BODY
    assert "wrong checksum" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    get(tmp_path / "two", server.url("a"), cache=tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "two" / "a.tar").read_bytes() == BODY
    assert "not kept there" in capsys.readouterr().err


# The model hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {"test/0.tar": BODY[:3000], "test/1.tar": BODY[3000:7000], "classnames.txt": b"cat\ndog\n", "README.md": b"#"}
LARGE = (".tar",)


def blob_name(name: str, body: bytes) -> str:
    """A large file is named by its SHA-256, a small one by its Git object id."""
    if name.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def hub_cache(folder: Path, left_out: str = "") -> Path:
    """A cache as huggingface_hub lays it out: blobs, a ref, and links at the commit."""
    repository = folder / "datasets--clip--set"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for name, body in SHARDS.items():
        if name != left_out:
            blob = repository / "blobs" / blob_name(name, body)
            blob.write_bytes(body)
            link = repository / "snapshots" / COMMIT / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def hub_dataset(**facts: Any) -> dict[str, Any]:
    source = {"repository": "clip/set", "files": ["test/*.tar", "classnames.txt"], "format": "webdataset"}
    return {"name": "x", "licence": "MIT", "hub": source | facts}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", [COMMIT, None])
def test_a_hub_source_from_the_local_hub_cache(tmp_path: Path, revision: str | None) -> None:
    """In a process of its own, by the variables that a user would set."""
    store, out, lock = hub_cache(tmp_path / "hub"), tmp_path / "archives" / "x", tmp_path / "lock.json"
    facts = {"revision": revision} if revision else {}
    code = f"""
from pathlib import Path
from clip_robustness.data.hub import fetch_hub
fetch_hub({hub_dataset(**facts)!r}, Path({str(out)!r}), Path({str(lock)!r}))
"""
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(store)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    manifest = io.check_sealed(out)
    assert list(manifest["files"]) == ["classnames.txt", "test--0.tar", "test--1.tar"]
    assert (out / "test--1.tar").read_bytes() == SHARDS["test/1.tar"]
    assert (out / "test--1.tar").samefile(store / "datasets--clip--set" / "snapshots" / COMMIT / "test" / "1.tar")
    assert not (out / "test--1.tar").is_symlink()
    assert (manifest["repository"], manifest["revision"], manifest["dataset"]) == ("clip/set", COMMIT, "x")
    assert io.read_json(lock)["x"]["revision"] == COMMIT
    assert names(out.parent) == ["x"]


@pytest.mark.usefixtures("offline")
def test_a_hub_source_again_with_other_files(tmp_path: Path) -> None:
    store, out, lock = hub_cache(tmp_path / "hub"), tmp_path / "x", tmp_path / "lock.json"
    fetch_hub(hub_dataset(), out, lock, hub_cache=store)
    first = (out / "manifest.json").read_bytes()
    (store / "datasets--clip--set" / "refs" / "main").write_text("f" * 40)  # the hub has moved on, the pin has not
    fetch_hub(hub_dataset(), out, lock, hub_cache=store)
    assert (out / "manifest.json").read_bytes() == first
    with pytest.raises(
        InputError, match=r"lock\.json, x: pinned .*'files': 3.* found .*'files': 1.* remove that entry"
    ):
        fetch_hub(hub_dataset(files=["test/0.tar"]), out, lock, hub_cache=store)
    lock.unlink()
    fetch_hub(hub_dataset(files=["test/0.tar"], revision=COMMIT), out, lock, hub_cache=store)
    assert names(out) == ["manifest.json", "test--0.tar"]
    (out / "mine.tar").write_text("")
    with pytest.raises(InputError, match=r"holds files that are not of this data set .mine\.tar."):
        fetch_hub(hub_dataset(files=["test/0.tar"]), out, lock, hub_cache=store)


@pytest.mark.usefixtures("offline")
def test_a_hub_cache_that_lacks_a_shard_is_found_by_the_pin(tmp_path: Path) -> None:
    fetch_hub(hub_dataset(), tmp_path / "x", tmp_path / "lock.json", hub_cache=hub_cache(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"'files': 3.* found .*'files': 2"):
        fetch_hub(
            hub_dataset(), tmp_path / "y", tmp_path / "lock.json", hub_cache=hub_cache(tmp_path / "other", "test/1.tar")
        )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"files": ["test/*.tar", "val/*"]}, r"no file 'val/\*'; correct 'hub.files'"),
        ({"revision": "f" * 40}, "not whole in .*run where there is a network, or name your copy under 'local:'"),
        ({"repository": "clip/other"}, "not whole in .*run where there is a network"),
    ],
)
def test_what_the_hub_cache_lacks(tmp_path: Path, facts: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch_hub(hub_dataset(**facts), tmp_path / "x", tmp_path / "lock.json", hub_cache=hub_cache(tmp_path / "hub"))
    assert names(tmp_path) == ["hub"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["test/0.tar", "classnames.txt"])
def test_a_damaged_blob_of_the_hub_cache(tmp_path: Path, name: str) -> None:
    store = hub_cache(tmp_path / "hub")
    (store / "datasets--clip--set" / "snapshots" / COMMIT / name).write_bytes(bytes(len(SHARDS[name])))
    with pytest.raises(InputError, match=f"wrong checksum: .*{blob_name(name, SHARDS[name])}.*Remedy: delete it"):
        fetch_hub(hub_dataset(), tmp_path / "x", tmp_path / "lock.json", hub_cache=store)
    assert names(tmp_path) == ["hub"]


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of a model hub's interface that downloading a data set needs, as huggingface_hub asks for it."""

    protocol_version = "HTTP/1.1"
    gets: list[str]
    fault: tuple[int, str] | None = None

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.gets.append(self.path)
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path, headers = self.path.partition("?")[0], {"X-Repo-Commit": COMMIT}
        status, body = 200, b""
        if self.fault:
            status, headers["X-Error-Code"] = self.fault
        elif path == "/api/datasets/clip/set/revision/main":
            body = json.dumps({"id": "clip/set", "sha": COMMIT}).encode()
        elif path == f"/api/datasets/clip/set/tree/{COMMIT}":
            body = json.dumps([self.listed(*shard) for shard in SHARDS.items()]).encode()
        elif path.startswith(f"/datasets/clip/set/resolve/{COMMIT}/"):
            name = path.partition(f"{COMMIT}/")[2]
            body = SHARDS[name]
            headers["ETag"] = f'"{blob_name(name, body)}"'
        else:
            status = 404
        self.send_response(status)
        for item in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(*item)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    @staticmethod
    def listed(name: str, body: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": blob_name(name, body)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": entry["oid"], "size": len(body), "pointerSize": 100}
        return entry

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("ThisHub", (Hub,), {"gets": [], "fault": None})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    yield handler
    httpd.shutdown()
    httpd.server_close()


def test_a_hub_source_from_a_hub(online: type[Hub], tmp_path: Path) -> None:
    store, out, lock = tmp_path / "hub", tmp_path / "x", tmp_path / "lock.json"
    size = sum(len(body) for name, body in SHARDS.items() if name != "README.md")
    fetch_hub(hub_dataset(bytes=size), out, lock, hub_cache=store)
    assert list(io.check_sealed(out)["files"]) == ["classnames.txt", "test--0.tar", "test--1.tar"]
    assert (out / "test--0.tar").read_bytes() == SHARDS["test/0.tar"]
    assert sorted(path.rpartition("/")[2] for path in online.gets if "/resolve/" in path) == [
        "0.tar",
        "1.tar",
        "classnames.txt",
    ]
    online.gets.clear()
    fetch_hub(hub_dataset(bytes=size), tmp_path / "y", lock, hub_cache=store)  # the pinned commit is in the hub's cache
    assert [path for path in online.gets if "/resolve/" in path] == []


@pytest.mark.parametrize(
    ("facts", "fault", "message"),
    [
        ({}, (403, "GatedRepo"), "gated; accept its terms at http.*/datasets/clip/set and log in with `hf auth login`"),
        ({}, (404, "RepoNotFound"), "no such repository"),
        ({}, (404, "RevisionNotFound"), "no such revision; correct 'hub.revision'"),
        ({"bytes": 5}, None, "7,008 bytes in 3 files, expected 5"),
    ],
)
def test_what_a_hub_refuses(
    online: type[Hub], tmp_path: Path, facts: dict, fault: tuple[int, str] | None, message: str
) -> None:
    online.fault = fault
    with pytest.raises(InputError, match=f"data set x, hub:clip/set@main: .*{message}"):
        fetch_hub(hub_dataset(**facts), tmp_path / "x", tmp_path / "lock.json", hub_cache=tmp_path / "hub")
    assert not (tmp_path / "x").exists() and not (tmp_path / "lock.json").exists()


def test_too_little_room_for_a_hub_source(online: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=7007)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="7,008 bytes are still to come, 7,007 are free; make room"):
        fetch_hub(hub_dataset(), tmp_path / "x", tmp_path / "lock.json", hub_cache=tmp_path / "hub")
    assert [path for path in online.gets if "/resolve/" in path] == []
