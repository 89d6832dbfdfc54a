import hashlib
import http.server
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import clip_robustness
from clip_robustness.core.io import InputError
from clip_robustness.data.fetch import BLOCK, fetch

BODY = os.urandom(2 * BLOCK + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Each path is a way in which a server answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        way = self.path.strip("/")
        if way.isdecimal():
            self.send_error(int(way))
            return
        if way == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        pages = {"page": b"\xef\xbb\xbf\n <!DOCTYPE html><title>Sign in", "typed_page": b"Sign in"}
        body = pages.get(way, BODY)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if way == "typed_page" else "application/x-tar")
        if way in ("chunked", "chunked_cut"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            sent = body if way == "chunked" else body[:-1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(sent), sent) + (b"0\r\n\r\n" if way == "chunked" else b""))
        elif way == "unannounced":
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if way in ("cut", "stall") else body)
        if way == "stall":
            self.wfile.flush()
            self.server.hold.wait(30)  # type: ignore[attr-defined]
        self.close_connection = way != "good"

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.hold = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.hold.set()  # type: ignore[attr-defined]
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("way", ["good", "moved", "chunked", "unannounced"])
def test_a_good_mirror(server: str, tmp_path: Path, way: str) -> None:
    out = tmp_path / "new" / "a.tar"
    fetch({"name": "x", "urls": [f"{server}/{way}"], "bytes": len(BODY), "sha256": SHA256}, out)
    assert out.read_bytes() == BODY
    assert list(out.parent.iterdir()) == [out]
    fetch({"name": "x", "urls": [f"{server}/{way}"]}, out)
    assert out.read_bytes() == BODY


def test_a_file_url(tmp_path: Path) -> None:
    (tmp_path / "source.tar").write_bytes(BODY)
    fetch({"urls": [(tmp_path / "source.tar").as_uri()], "sha256": SHA256}, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == BODY


@pytest.mark.parametrize(
    ("way", "entry", "message"),
    [
        ("404", {}, "HTTP 404"),
        ("429", {}, "HTTP 429"),
        ("500", {}, "HTTP 500"),
        ("page", {"bytes": 7}, "a web page in place of the archive"),
        ("typed_page", {"bytes": 7}, "a web page in place of the archive"),
        ("cut", {}, "the connection ended after|the connection broke"),
        ("chunked_cut", {}, "the connection broke"),
        ("unannounced", {"bytes": len(BODY) + 1}, "the connection ended after"),
        ("unannounced", {"bytes": BLOCK}, "more than the expected"),
        ("good", {"bytes": len(BODY) - 1}, "bytes announced, expected"),
        ("good", {"sha256": "0" * 64}, "wrong checksum: sha256 [0-9a-f]{64}, expected 0{64}"),
        ("stall", {}, "timed out"),
    ],
)
def test_a_bad_mirror_leaves_nothing_and_the_next_is_asked(
    server: str, tmp_path: Path, way: str, entry: dict, message: str
) -> None:
    out = tmp_path / "a.tar"
    with pytest.raises(InputError, match=message) as caught:
        fetch({"name": "some_set", "urls": [f"{server}/{way}"], **entry}, out, timeout=0.5)
    for part in (f"{server}/{way}", str(out), "some_set", "Remedy: "):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if not entry:
        fetch({"urls": [f"{server}/{way}", f"{server}/good"], "sha256": SHA256}, out, timeout=0.5)
        assert out.read_bytes() == BODY


def test_a_failed_download_keeps_what_was_there(server: str, tmp_path: Path) -> None:
    out = tmp_path / "a.tar"
    out.write_bytes(b"old")
    with pytest.raises(InputError):
        fetch({"urls": [f"{server}/404", f"{server}/cut"]}, out)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no 'urls' in datasets.yaml"),
        (["http://127.0.0.1:1/a.tar"], "Connection refused"),
        (["file:///none/such.tar"], "No such file"),
    ],
)
def test_nobody_to_ask(tmp_path: Path, urls: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch({"name": "x", "urls": urls}, tmp_path / "a.tar")


def test_too_little_room_is_said_before_the_first_byte(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=rf"{len(BODY):,} bytes needed, 1,000 are free"):
        fetch({"urls": [f"{server}/good"]}, tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(server: str, tmp_path: Path) -> None:
    out = tmp_path / "a.tar"
    code = f"""
from pathlib import Path
from clip_robustness.data.fetch import fetch
fetch({{"urls": ["{server}/good"]}}, Path({str(out)!r}))
"""
    limit = BLOCK + 5
    run = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"PYTHONPATH": str(Path(clip_robustness.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "File too large" in run.stderr
    assert list(tmp_path.iterdir()) == []
