"""Every fault of a download: a clear message, nothing lost, and the next run goes on where this one stopped."""

import contextlib
import email.utils
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.data import fetch as module
from clip_robustness.data.fetch import BLOCK, WAITS
from clip_robustness.data.hub import alone
from tests.unit import test_fetch
from tests.unit.test_fetch import BODY, ENVIRONMENT, MD5, SHA256, Reply, Server, get, in_another_process, names

server, no_cache = test_fetch.server, test_fetch.no_cache  # fixtures
SIZE = len(BODY)


def until(true: Callable[[], bool]) -> None:
    """Wait for another process to get there."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise TimeoutError


def fault(folder: Path, *urls: str, **facts: object) -> str:
    with pytest.raises(InputError) as caught:
        get(folder, *urls, **facts)  # type: ignore[arg-type]
    return str(caught.value)


# A connection that is cut


@pytest.mark.parametrize("cut", [1, 255, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, SIZE - 1])
@pytest.mark.parametrize("length", ["announced", "chunked"])
def test_a_cut_at_any_byte_is_resumed_there(server: Server, tmp_path: Path, cut: int, length: str) -> None:
    waits = get(tmp_path, server.url("a", Reply(cut=cut, length=length), Reply(length=length)))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    start = cut if length == "announced" else cut // BLOCK * BLOCK  # half a chunk is none
    assert server.seen == [("a", None, None), ("a", f"bytes={start}-" if start else None, '"v1"' if start else None)]
    assert waits == [1]
    assert names(tmp_path) == ["a.tar", "lock.json"]


def test_a_connection_cut_at_the_headers(server: Server, tmp_path: Path) -> None:
    waits = get(tmp_path, server.url("a", Reply(cut=0), Reply()), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert waits == [1]


def test_many_cuts_are_outlived_as_long_as_something_comes(server: Server, tmp_path: Path) -> None:
    """Tries are counted from the last one that brought something: a long download may break a hundred times."""
    waits = get(tmp_path, server.url("a", *[Reply(cut=BLOCK // 3)] * 9, Reply()))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, *(f"bytes={i * (BLOCK // 3)}-" for i in range(1, 10))]
    assert waits == [1, 2, 4, 1, 1, 2, 4, 1, 1]


def test_a_later_run_goes_on_where_this_one_gave_up(server: Server, tmp_path: Path) -> None:
    message = fault(tmp_path, server.url("a", Reply(cut=BLOCK), Reply(404)))
    assert "HTTP 404" in message and f"{BLOCK:,} bytes are kept in {tmp_path}/a.tar.part" in message
    assert names(tmp_path) == ["a.tar.part", "a.tar.part.json"]
    server.seen.clear()
    get(tmp_path, server.url("a"))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.seen == [("a", f"bytes={BLOCK}-", '"v1"')]
    assert names(tmp_path) == ["a.tar", "lock.json"]


def test_a_stalled_connection_times_out_and_is_resumed(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("a", Reply(cut=2 * BLOCK, hold=True), Reply()), timeout=0.2)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={2 * BLOCK}-"]


def test_a_whole_part_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    """Killed between the last byte and the name."""
    for facts, size in (({"sha256": SHA256}, SIZE), ({}, SIZE), ({"sha256": SHA256}, None), ({}, None)):
        url = server.url("a")
        (tmp_path / "a.tar.part").write_bytes(BODY)
        io.write_json(tmp_path / "a.tar.part.json", {"url": url, "etag": '"v1"', "size": size})
        server.seen.clear()
        get(tmp_path, url, **facts)
        assert (tmp_path / "a.tar").read_bytes() == BODY
        assert server.ranges == ([] if size else [f"bytes={SIZE}-"])  # answered by 416
        (tmp_path / "a.tar").unlink()


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(BODY + b"more")
    io.write_json(tmp_path / "a.tar.part.json", {"url": server.url("a"), "etag": '"v1"', "size": None})
    get(tmp_path, server.url("a"))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [f"bytes={SIZE + 4}-", None]


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_part_of_unknown_origin_is_not_trusted(server: Server, tmp_path: Path, text: str | None) -> None:
    (tmp_path / "a.tar.part").write_bytes(bytes(BLOCK))
    if text is not None:
        (tmp_path / "a.tar.part.json").write_text(text)
    get(tmp_path, server.url("a"))
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_a_part_with_wrong_bytes_costs_one_download_more(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(bytes(BLOCK))
    io.write_json(tmp_path / "a.tar.part.json", {"url": server.url("a"), "etag": '"v1"', "size": SIZE})
    assert get(tmp_path, server.url("a"), sha256=SHA256) == [0]
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [f"bytes={BLOCK}-", None]


# A file that changes, and servers that cannot resume


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("field", ["etag", "modified"])
def test_a_file_that_changes_between_two_tries_starts_anew(
    server: Server, tmp_path: Path, field: str, heeds: bool
) -> None:
    old, new = (email.utils.formatdate(0), email.utils.formatdate(9)) if field == "modified" else ('"v1"', '"v2"')
    first = Reply(body=bytes(SIZE), cut=BLOCK, **{"etag": None, field: old})  # type: ignore[arg-type]
    then = Reply(heeds_if_range=heeds, **{"etag": None, field: new})  # type: ignore[arg-type]
    get(tmp_path, server.url("a", first, then))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.seen[1] == ("a", f"bytes={BLOCK}-", old)
    assert len(server.seen) == (2 if heeds else 3)


def test_a_file_that_changes_its_size_starts_anew(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("a", Reply(body=bytes(2 * SIZE), cut=BLOCK), Reply()))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={BLOCK}-", None]


@pytest.mark.parametrize("etag", ['W/"v1"', None])
def test_without_a_strong_validator_only_a_checksum_allows_to_resume(
    server: Server, tmp_path: Path, etag: str | None
) -> None:
    get(tmp_path / "one", server.url("a", Reply(etag=etag, cut=BLOCK), Reply(etag=etag)))
    get(tmp_path / "two", server.url("a", Reply(etag=etag, cut=BLOCK), Reply(etag=etag)), md5=MD5)
    assert server.seen == [("a", None, None)] * 3 + [("a", f"bytes={BLOCK}-", None)]
    for name in ("one", "two"):
        assert (tmp_path / name / "a.tar").read_bytes() == BODY


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("a", Reply(ranges=False, cut=2 * BLOCK), Reply(ranges=False)))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={2 * BLOCK}-"]


def test_a_server_without_ranges_that_always_breaks_is_given_up(server: Server, tmp_path: Path) -> None:
    message = fault(tmp_path, server.url("a", Reply(ranges=False, cut=2 * BLOCK)))
    assert "the connection failed" in message and "tries" in message
    assert len(server.seen) == len(WAITS) + 2  # the first one brought something


# Answers other than the file


@pytest.mark.parametrize("status", [403, 404, 410, 451])
def test_a_mirror_without_the_file_is_left_at_once(server: Server, tmp_path: Path, status: int) -> None:
    assert get(tmp_path, server.url("gone", Reply(status)), server.url("a"), sha256=SHA256) == []
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert [path for path, *_ in server.seen] == ["gone", "a"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    assert get(tmp_path, server.url("a", Reply(status), Reply(status), Reply()), sha256=SHA256) == [1, 2]
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_a_server_that_stays_in_trouble_is_left(server: Server, tmp_path: Path) -> None:
    assert get(tmp_path, server.url("bad", Reply(500)), server.url("a"), sha256=SHA256) == list(WAITS)
    assert (tmp_path / "a.tar").read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("text", "wait"), [("7", 7), ("0", 0), ("soon", 1), ("", 1)])
def test_retry_after_in_seconds(server: Server, tmp_path: Path, status: int, text: str, wait: int) -> None:
    busy = Reply(status, headers=(("Retry-After", text),))
    assert get(tmp_path, server.url("a", busy, Reply())) == [wait]


def test_retry_after_as_a_date(server: Server, tmp_path: Path) -> None:
    busy = Reply(429, headers=(("Retry-After", email.utils.formatdate(time.time() + 30, usegmt=True)),))
    (wait,) = get(tmp_path, server.url("a", busy, Reply()))
    assert 20 < wait <= 30


def test_a_server_that_asks_for_too_much_patience_is_left(server: Server, tmp_path: Path) -> None:
    busy = server.url("busy", Reply(429, headers=(("Retry-After", "3600"),)))
    assert get(tmp_path / "one", busy, server.url("a")) == []
    message = fault(tmp_path / "two", busy)
    assert "HTTP 429" in message and "it asks to wait 3,600 s" in message


PAGES = [
    Reply(body=b"\xef\xbb\xbf\n <!DOCTYPE html><title>Sign in"),
    Reply(body=b"<html>Quota exceeded"),
    Reply(body=b"Sign in", kind="text/html; charset=utf-8"),
]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("facts", [{}, {"bytes": 7}, {"sha256": SHA256}])
def test_a_web_page_in_place_of_the_archive(server: Server, tmp_path: Path, page: Reply, facts: dict) -> None:
    message = fault(tmp_path, server.url("a", page), **facts)
    assert "a web page in place of the archive; open it in a browser" in message
    assert names(tmp_path) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_web_page_does_not_cost_what_has_come(server: Server, tmp_path: Path, page: Reply) -> None:
    changed = Reply(body=page.body, kind=page.kind, etag='"page"')
    message = fault(tmp_path, server.url("a", Reply(cut=BLOCK), changed))
    assert "a web page" in message and f"{BLOCK:,} bytes are kept" in message
    get(tmp_path, server.url("a"))
    assert server.ranges[-1] == f"bytes={BLOCK}-"
    assert (tmp_path / "a.tar").read_bytes() == BODY


# A file that is not the right one


@pytest.mark.parametrize("facts", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_wrong_checksum(server: Server, tmp_path: Path, facts: dict) -> None:
    message = fault(tmp_path, server.url("a"), **facts)
    found = SHA256 if "sha256" in facts else MD5
    assert f"wrong checksum: {next(iter(facts))} {found}, expected {next(iter(facts.values()))}" in message
    assert "datasets.yaml" in message and server.address in message
    assert names(tmp_path) == []
    assert len(server.seen) == 1


def test_after_a_wrong_checksum_the_next_mirror_is_asked(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("bad", Reply(body=bytes(SIZE))), server.url("a"), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, None]


def test_the_next_mirror_goes_on_where_the_first_broke(server: Server, tmp_path: Path) -> None:
    broken = server.url("broken", Reply(cut=2 * BLOCK), Reply(404))
    get(tmp_path, broken, server.url("a", Reply(etag='"other"')), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.seen[-1] == ("a", f"bytes={2 * BLOCK}-", None)


def test_without_a_checksum_two_mirrors_are_never_mixed(server: Server, tmp_path: Path) -> None:
    broken = server.url("broken", Reply(body=bytes(SIZE), cut=2 * BLOCK), Reply(404))
    get(tmp_path, broken, server.url("a"))
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={2 * BLOCK}-", None]


@pytest.mark.parametrize("declared", [SIZE - 1, SIZE + 1])
def test_a_wrong_size_is_seen_before_the_first_byte(server: Server, tmp_path: Path, declared: int) -> None:
    message = fault(tmp_path, server.url("a"), bytes=declared)
    assert f"{SIZE:,} bytes announced, expected {declared:,}" in message
    assert names(tmp_path) == []


def test_a_body_beyond_the_declared_size_is_cut_off(server: Server, tmp_path: Path) -> None:
    message = fault(tmp_path, server.url("a", Reply(length="chunked")), bytes=BLOCK)
    assert f"more than the expected {BLOCK:,} bytes" in message
    assert names(tmp_path) == []


def test_a_body_short_of_the_declared_size(server: Server, tmp_path: Path) -> None:
    message = fault(tmp_path, server.url("a", Reply(length="close")), bytes=SIZE + 1)
    assert f"{SIZE:,} bytes announced, expected {SIZE + 1:,}" in message
    assert server.ranges == [None, f"bytes={SIZE}-"]


def test_an_undeclared_size_has_a_cap(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", BLOCK)
    assert f"{SIZE:,} bytes announced, over {BLOCK:,}" in fault(tmp_path, server.url("a"))
    assert "more than the expected" in fault(tmp_path, server.url("a", Reply(length="chunked")))
    assert names(tmp_path) == []
    get(tmp_path, server.url("a"), bytes=SIZE)


def test_an_empty_file(server: Server, tmp_path: Path) -> None:
    assert "0 bytes, expected some" in fault(tmp_path, server.url("a", Reply(body=b"")))
    assert names(tmp_path) == []


# Nobody there


def test_a_failed_download_keeps_what_was_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"old")
    fault(tmp_path, server.url("a", Reply(404)), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == b"old"


def test_every_mirror_is_in_the_message(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/a"
    urls = [server.url("gone", Reply(404)), closed, "file:///no/such.tar", "http://", "gopher://x/a"]
    message = fault(tmp_path, *urls)
    for part in (*urls, "HTTP 404", "Connection refused", "No such file", "Remedy: ", "x/a.tar"):
        assert part in message
    assert len(message.splitlines()) == 2 + len(urls)


def test_a_circle_of_redirects(server: Server, tmp_path: Path) -> None:
    url = f"{server.address}/a"
    assert "redirects" in fault(tmp_path, server.url("a", Reply(302, headers=(("Location", url),))))


# The disk


def test_too_little_room_is_said_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is still missing counts."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE - 1))
    message = fault(tmp_path, server.url("a"), server.url("b"))
    assert f"{SIZE:,} bytes are still to come, {SIZE - 1:,} are free; make room" in message
    assert names(tmp_path) == [] and len(server.seen) == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE))
    fault(tmp_path, server.url("a", Reply(cut=BLOCK), Reply(404)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE - BLOCK))
    get(tmp_path, server.url("a"))
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_a_part_that_is_replaced_makes_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE))
    once = Reply(ranges=False, cut=BLOCK)
    fault(tmp_path, server.url("a", once, Reply(404)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE - BLOCK))
    get(tmp_path, server.url("a", Reply(ranges=False)))
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_a_disk_that_fills_up_keeps_what_has_come(server: Server, tmp_path: Path) -> None:
    """The kernel refuses bytes beyond a limit as a full disk does; the next run, with room, goes on there."""
    limit = 2 * BLOCK + 5
    code = f"""
import resource, sys
from pathlib import Path
from clip_robustness.core.io import InputError
from clip_robustness.data.fetch import fetch
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
folder = Path({str(tmp_path)!r})
try:
    fetch({test_fetch.dataset(server.url("a"), sha256=SHA256)!r}, "a.tar", folder / "a.tar", folder / "lock.json")
except InputError as error:
    sys.exit(f"error: {{error}}")
"""
    run = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"a.tar.part: File too large; {limit:,} bytes are kept. Remedy: make room and run again" in run.stderr
    get(tmp_path, server.url("a"), sha256=SHA256)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={limit}-"]


# Processes


def test_two_processes_at_once_download_once(server: Server, tmp_path: Path) -> None:
    url = server.url("a", Reply(cut=2 * BLOCK, hold=True), Reply(404))
    part = tmp_path / "a.tar.part"
    with in_another_process(tmp_path, url) as first:
        until(lambda: part.exists() and part.stat().st_size >= 2 * BLOCK)
        with in_another_process(tmp_path, url) as second:
            assert second.stderr is not None
            assert "another process is at it" in second.stderr.readline()
            server.released.set()
            assert first.wait(30) == second.wait(30) == 0
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert len(server.seen) == 1
    assert names(tmp_path) == ["a.tar", "lock.json"]


def test_a_kill_in_the_middle_loses_nothing(server: Server, tmp_path: Path) -> None:
    url = server.url("a", Reply(cut=2 * BLOCK, hold=True), Reply())
    part = tmp_path / "a.tar.part"
    with in_another_process(tmp_path, url) as run:
        until(lambda: part.exists() and part.stat().st_size >= 2 * BLOCK)
        run.send_signal(signal.SIGKILL)
        assert run.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "a.tar").exists()
    get(tmp_path, url)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.seen[1:] == [("a", f"bytes={2 * BLOCK}-", '"v1"')]
    assert names(tmp_path) == ["a.tar", "lock.json"]


def test_who_waits_on_a_lock_file_that_is_gone_asks_again(tmp_path: Path) -> None:
    """A holder removes its lock file; who waited on that one must not hold it while another holds the new one."""
    guard, held = tmp_path / ".a.lock", []
    stale = os.open(guard, os.O_RDWR | os.O_CREAT)
    fcntl.flock(stale, fcntl.LOCK_EX)
    code = f"""
from pathlib import Path
from clip_robustness.data.hub import alone
with alone(Path({str(tmp_path / "a")!r})):
    print("mine", flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stderr is not None and run.stdout is not None
        assert "another process is at it" in run.stderr.readline()
        guard.unlink()
        with alone(tmp_path / "a"):
            os.close(stale)
            assert "another process is at it" in run.stderr.readline()
            held.append(True)
        assert run.stdout.readline() == "mine\n"
    assert held and names(tmp_path) == []


def test_the_lock_is_freed_by_an_error(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), alone(tmp_path / "a"):
        raise ZeroDivisionError
    with alone(tmp_path / "a"):
        assert names(tmp_path) == [".a.lock"]
    assert names(tmp_path) == []
