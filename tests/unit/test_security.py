"""What an attacker may try: names that are commands, files that are bombs, links that lead elsewhere, code in weights.

Spoiled files of every kind are in tests/fuzz; malicious archives in test_members, test_zips and test_containers.
"""

import ast
import contextlib
import gzip
import http.server
import itertools
import os
import re
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from packaging.version import Version

from clip_robustness.core import archive, io, lock
from clip_robustness.core.io import InputError
from clip_robustness.core.registry import load_datasets, load_study
from clip_robustness.core.schema import check, load_yaml
from clip_robustness.data import hub, members
from clip_robustness.data.adapters import imagenet_val, scannet_pairs
from clip_robustness.data.rows import Member
from clip_robustness.inference import checkpoints
from clip_robustness.inference.architectures import read_configuration
from clip_robustness.report import landing
from tests.unit import packed, test_fetch
from tests.unit.samples import make_tar
from tests.unit.test_fetch import Reply, Server, get

server, no_cache = test_fetch.server, test_fetch.no_cache  # fixtures
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# ---- shell commands -------------------------------------------------------------------------------------------------

# Parameters that hold several words, or none: rules/common/ makes them with shlex, or of constants.
WORDS = {
    *("options", "base", "cache", "compile", "control", "head", "ids", "indexes", "parent", "patterns", "searched"),
    *("search", "targets", "adversarial", "optional"),
}
PLACE = re.compile(r"(?<!\{)\{(\w+)((?:\.\w+|\[\w+\])*)(?::([^{}]*))?\}(?!\})")


def shell_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(rule, shell command) of a rule file."""
    rule = ""
    for block in re.split(r"(?m)^(?=\s*rule\b)", path.read_text()):
        rule = block.strip().partition(":")[0] or rule
        for match in re.finditer(r'(?m)^\s+shell:\n((?:\s+(?:r|f)?".*"\n?)+)', block):
            yield rule, "".join(ast.literal_eval(line.strip()) for line in match[1].splitlines() if line.strip())


@pytest.mark.parametrize("path", sorted((ROOT / "rules").glob("*.smk")), ids=lambda path: path.name)
def test_every_value_in_a_shell_command_is_quoted(path: Path) -> None:
    for rule, text in shell_texts(path):
        for name, parts, form in PLACE.findall(text):
            part = parts.lstrip(".")
            free = name == "threads" or (name == "params" and part in WORDS)
            assert form == "q" or free, f"{path.name}, {rule}: {{{name}{parts}}} is not quoted"


def test_every_rule_with_a_command_is_looked_at() -> None:
    texts = [text for path in (ROOT / "rules").glob("*.smk") for _, text in shell_texts(path)]
    assert len(texts) == sum(path.read_text().count("shell:") for path in (ROOT / "rules").glob("*.smk")) > 40
    assert all(text.startswith("python -m clip_robustness ") for text in texts)


EVIL = "x;touch canary"


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("datasets", {"label_spaces": {EVIL: {"classes": ["a", "b"]}}}),
        ("datasets", {"label_spaces": {"../../x": {"classes": ["a", "b"]}}}),
        ("datasets", {"part_of": EVIL}),
        ("datasets", {"suite": "x\n"}),
        ("datasets", {"options": {"seed": "1; touch canary"}}),
        ("datasets", {"options": {"corruptions": ["$(touch canary)"]}}),
        ("datasets", {"combine": {"--out": "x"}}),
        ("datasets", {"derive": {"from": "x", "by": "words", "targets": "../../../etc/passwd"}}),
        ("datasets", {"derive": {"from": "x", "by": "words", "targets": "/etc/passwd"}}),
        *(
            ("datasets", {"archives": [{"file": name}]})
            for name in ("../../x", "/x", "-x", ".x", "x\n", "a/b", "", "x;y")
        ),
        ("datasets", {"hub": {"repository": "../..", "files": ["*"], "format": "parquet"}}),
        ("datasets", {"hub": {"repository": "a/b", "revision": "../../x", "files": ["*"], "format": "parquet"}}),
        ("prompts", {EVIL: ["a {}"]}),
        ("prompts", {"../x": ["a {}"]}),
        ("prompts", {"x": {"file": "../../../etc/passwd"}}),
        ("prompts", {"x": {"file": "/etc/passwd"}}),
        ("prompts", {"x": {"open_clip": "__builtins__"}}),
        ("prompts", {"x": {"search": {"dataset": "y", "out": "/etc/x"}}}),
        ("prompts", {"x": {"search": {"dataset": "y", "steps": "1; touch canary"}}}),
        ("model_sets", {EVIL: [{"model": "x"}]}),
        ("config", {"study": "x\n"}),
        ("config", {"study": EVIL}),
        ("config", {"local": {"x": "--out=/etc/x"}}),
        ("config", {"local": {"x": ["/data", "-x"]}}),
        ("config", {"local": {"x": "~nobody/x"}}),
        ("config", {"fit": {"population": EVIL}}),
        ("config", {"fit": {"sources": ["--out=/etc/x"]}}),
        ("config", {"fit": {"factors_only": ["--out=/etc/x"]}}),
        ("config", {"shifts": ["--out=/etc/x"]}),
        ("config", {"normaliser": EVIL}),
        ("config", {"attacks": {"names": [EVIL]}}),
        ("config", {"attacks": {"settings": {"x": 5}}}),
        ("config", {"lmm": {"selectors": {EVIL: "x"}}}),
        ("config", {"lmm": {"prompts": "../x"}}),
        ("config", {"overlap": {"vectors": {"--out": "/x"}}}),
        ("config", {"overlap": {"vectors": {"x": "--out=/x"}}}),
        ("config", {"batch_size": "auto\n"}),
        ("config", {"precision": "fp32; touch canary"}),
        ("config", {"seed": "0; touch canary"}),
        ("config", {"threads": 2.0}),
        ("model", {"model": "../x"}),
        ("model", {"model": "x y"}),
        ("model", {"weights": "hub:../.."}),
        ("model", {"weights": "hub:a/b@../x"}),
        ("model", {"weights": "hub:a/b:../x.bin"}),
        ("model", {"weights": "hub:a/b:.."}),
        ("model", {"library": "timm; touch canary"}),
        ("model", {"family": "$(touch canary)"}),
    ],
)
def test_what_would_be_a_command_an_option_or_a_way_out_is_refused(table: str, change: dict) -> None:
    """Said of the field itself, whatever else the tables lack."""
    name = next(iter(change))
    rules = load_yaml(ROOT / "config" / "schemas" / f"{table}.schema.yaml")
    value = change
    if table == "datasets" and "label_spaces" not in change:
        value = {"label_spaces": {}, "datasets": {"x": change}}
    problems: list[str] = []
    check(value, rules, "x", problems)
    own = [line for line in problems if "required property" not in line]
    assert own and (str(name) in own[0] or EVIL in own[0] or "../x" in own[0]), problems


def test_the_shipped_tables_are_none_of_these() -> None:
    for name in ("config", "lite", "mini", "published"):
        load_study(load_yaml(ROOT / "config" / f"{name}.yaml"), ROOT)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "https://user:secret@example.org/x.tar",
            "https://secret@example.org/x",
            "ftp://example.org/x",
            "file://host/x",
        ),
        *("https://example.org/x y", "https:///x", "javascript:alert(1)", "https://example.org/x\n", "//example.org/x"),
    ],
)
def test_an_address_with_a_password_or_of_another_kind_is_refused(tmp_path: Path, address: str) -> None:
    entry = {
        "title": "X",
        "family": "dtd",
        "labels": "s",
        "role": "train",
        "suite": "x",
        "sets": ["x"],
        "licence": "MIT",
    }
    entry["archives"] = [{"file": "x.tar", "urls": [address]}]
    document = {"label_spaces": {"s": {"classes": ["a", "b"]}}, "datasets": {"x": entry}}
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=r"archives\.0\.urls\.0.*without a user name or a password"):
        load_datasets(tmp_path / "datasets.yaml", ROOT)


# ---- configuration files --------------------------------------------------------------------------------------------


def powers(first: str, line: str) -> str:
    """Lines of which each holds the one before ten times."""
    return f"a: &a {first}\n" + "".join(
        line.format(b, ", ".join([f"*{a}"] * 10)) for a, b in itertools.pairwise("abcdefghi")
    )


ALIASES, MERGES = powers("[x]", "{0}: &{0} [{1}]\n"), powers("{k: 1}", "{0}: &{0} {{<<: [{1}]}}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "more than 200,000 values"),
        (MERGES, "merges"),
        ("a: &a [*a]", "nested deeper than 50"),
        ("a: &a {b: *a}", "nested deeper than 50"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper than 50"),
        ("a: !!python/object/apply:os.system [touch canary]", "not valid YAML"),
        ("a: !!binary aGk=", "of the kind bytes; put it in quotes"),
        ("a: 2024-02-03", "of the kind date; put it in quotes"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: !!timestamp 5", "not valid YAML"),
        ("1: a", "the key 1 is no plain text"),
        ("no: a", "the key False is no plain text"),
        ("a: .nan", "a finite one"),
        ("a: 1" + "0" * 30, "too large"),
        ('a: {b: "x\\0y"}', "field 'a.b': .* holds characters that no text has"),
        ("a: \udcff", "not valid YAML"),
    ],
    ids=range(16),
)  # fmt: skip
def test_odd_yaml_is_one_message_soon(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


# ---- files that lie -------------------------------------------------------------------------------------------------


def test_a_manifest_cannot_have_files_removed_elsewhere(tmp_path: Path) -> None:
    """The old files that a renewed download removes are those that the manifest in the folder lists."""
    out, precious = tmp_path / "hub" / "x", tmp_path / "precious"
    out.mkdir(parents=True)
    precious.write_text("mine")
    for name in (str(precious), "../../precious", "..", ".", "", "a/../../../precious", "x\0y", "a" * 300):
        io.write_json(out / "manifest.json", {"files": {name: "0" * 64}})
        for read in (io.check_sealed, lambda folder: hub._fill(folder, {})):
            with pytest.raises(InputError, match=r"manifest\.json: lists .* which is no file's name"):
                read(out)
    assert precious.read_text() == "mine"


def test_a_lock_file_names_no_path(tmp_path: Path) -> None:
    for sha256 in ("../../../etc/passwd", ["a"], None, 5, "A" * 64):
        io.write_json(
            tmp_path / "lock.json", {"x/a.tar": {"bytes": 3, "sha256": sha256}} if sha256 != ["a"] else {"x/a.tar": []}
        )
        with pytest.raises(InputError, match="take the committed file again"):
            hub.Wanted.of({"file": "a.tar"}, tmp_path / "lock.json", "x/a.tar")


def test_a_planted_link_takes_no_bytes(server: Server, tmp_path: Path) -> None:
    """In a folder that others may write to: neither the part of a download nor its lock follows a link."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "a.tar.part").symlink_to(precious)
    (folder / "a.tar.part.json").symlink_to(precious)
    get(folder, server.url("a.tar", Reply(body=b"new bytes")))
    assert (folder / "a.tar").read_bytes() == b"new bytes" and precious.read_text() == "mine"
    (folder / ".b.lock").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic"), lock.alone(folder / "b"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg: a device or pipe has no place"):
        members.list_members([tmp_path])


def peak_of(script: str) -> int:
    """Bytes of the largest memory of a process that runs `script`; ru_maxrss would be this process's, if larger."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak from /proc")
    code = f"{script}\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return int(run.stdout.split()[-1]) * 1024


def test_a_header_of_digits_takes_no_quadratic_time(tmp_path: Path) -> None:
    """CVE-2024-6232: a quarter of an hour for this one, in Pythons of 2024."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 900_000
    path = make_tar(tmp_path / "x.tar", {"x.jpg": b"x"})
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"1" * 900_096 + path.read_bytes())
    before = time.process_time()
    with pytest.raises(InputError, match=r"x\.tar: a header of digits alone is a bomb"):
        members.list_members([path])
    assert time.process_time() - before < 20  # of the processor: 0.01 s here


def test_headers_for_all_members_are_few(tmp_path: Path) -> None:
    """Python applies each to each member: a hundred thousand of both would take days."""
    path = make_tar(tmp_path / "x.tar", {"x.jpg": b"x"})
    path.write_bytes(tarfile.TarInfo.create_pax_global_header({f"k{i}": "v" for i in range(101)}) + path.read_bytes())
    with pytest.raises(InputError, match="more than 100 headers for all members are a bomb"):
        members.list_members([path])


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_parquet_bomb_is_refused_in_little_memory(tmp_path: Path, column: str) -> None:
    """A million bytes, 40,000 times by a dictionary: 40 GB in a file of some kB."""
    kind = pyarrow.binary() if column == "image" else pyarrow.string()
    big = pyarrow.array([b"\0" * 1_000_000], kind)
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(40_000, np.int32)), big)
    path = tmp_path / "x.parquet"
    table = pyarrow.table({column: repeated, **({} if column == "image" else {"image": [b"x"] * 40_000})})
    table = table.cast(
        pyarrow.schema(
            [
                (n, pyarrow.dictionary(pyarrow.int32(), kind) if n == column else pyarrow.binary())
                for n in table.column_names
            ]
        )
    )
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10**6
    reads = {
        "image": "archive.read_member(path, 0, 0, 'x', 'parquet')",
        "caption": "members.columns(path)",
    }
    script = f"""
from clip_robustness.core import archive
from clip_robustness.core.io import InputError
from clip_robustness.data import members
archive.LARGEST_GROUP = archive.LARGEST_TABLE = 1 << 28
path = {str(path)!r}
try:
    {reads[column]}
except InputError as error:
    assert "hold" in str(error) and "more than" in str(error), error
else:
    raise SystemExit("accepted")
"""
    assert peak_of(script) < 3 << 29


def test_rows_that_a_parquet_file_only_claims(tmp_path: Path) -> None:
    path = packed.write_parquet(tmp_path / "x.parquet", {"a.jpg": b"a", "b.jpg": b"b"})
    found = archive.ParquetImages(str(path))
    found._ends = np.array([1])
    with pytest.raises(InputError, match="row 2 of a parquet file of 2 rows"):
        found.read(2, "x")
    found.close()


def test_a_packed_devkit_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(gzip.compress(bytes(imagenet_val.LARGEST_DEVKIT + 1)))
    member = Member(path.name, str(path), 0, path.stat().st_size)
    with pytest.raises(InputError, match="grows beyond 67,108,864 bytes"):
        imagenet_val._packed_devkit(member)


def test_a_table_that_takes_its_reader_down_is_one_message(tmp_path: Path) -> None:
    """SciPy's reader follows a null pointer when a type's number is none of MATLAB's: found by tests/fuzz."""
    from tests.unit.test_adapters_imagenet_val import meta_mat

    whole, path = meta_mat(), tmp_path / "meta.mat"
    member = Member(path.name, str(path), 0, len(whole))
    assert imagenet_val._wnids(whole, member)
    with pytest.raises(InputError, match=r"meta\.mat.*not the devkit's table of classes"):
        imagenet_val._wnids(whole.replace(b"\x0c\0\0\0", b"\x08\0\0\0"), member)


def test_arrays_in_a_zip_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, name=np.zeros(scannet_pairs.LARGEST, np.uint8))
    with pytest.raises(InputError, match="it grows to 67,"):
        scannet_pairs._arrays(Member(path.name, str(path), 0, path.stat().st_size))


# ---- weights --------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2), "b": Runs(tmp_path / "canary")}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="code in it"):
        checkpoints.to_safetensors(source, tmp_path / "out.safetensors", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_tensor_that_repeats_one_value_is_no_bomb(tmp_path: Path) -> None:
    source = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, source)
    with pytest.raises(InputError, match=r"would become 4,398,046,511,104 \(views that repeat one value\)"):
        checkpoints.to_safetensors(source, tmp_path / "out.safetensors", "x")


CODE = {"AutoTokenizer": ["tokenizer.Evil", None]}


@pytest.mark.parametrize(
    "config",
    [
        {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}}}},
        {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"tokenizer_type": "x"}}}},
        {"model_cfg": {"vision_cfg": {"timm_model_name": "hf-hub:evil/x"}}},
        {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:/tmp/x"}}},
        {"auto_map": CODE},
        {"a": [{"b": {"auto_map": CODE}}]},
        {"attn_implementation": "evil/kernel"},
        {"text_config": {"_attn_implementation_internal": {"": "evil/kernel"}}},
    ],
)
def test_a_configuration_that_names_code_is_refused(tmp_path: Path, config: dict) -> None:
    path = tmp_path / "open_clip_config.json"
    io.write_json(path, config)
    with pytest.raises(InputError, match="names code of the repository"):
        read_configuration("x", path)


def test_open_clip_would_have_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `tokenizer_kwargs` is looked at: the library hands them on, and a folder's own module is imported."""
    import open_clip

    folder = tmp_path / "weights"
    folder.mkdir()
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    io.write_json(folder / "open_clip_config.json", {"model_cfg": {"embed_dim": 4, "text_cfg": text}})
    io.write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenizer_evil.Evil", None]}})
    io.write_json(folder / "config.json", {"model_type": "bert"})
    canary = tmp_path / "canary"
    (folder / "tokenizer_evil.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with contextlib.suppress(Exception):
        open_clip.get_tokenizer(f"local-dir:{folder}")
    if not canary.exists():
        pytest.skip("this version of transformers does not run it")
    with pytest.raises(InputError, match=r"tokenizer_kwargs: trust_remote_code"):
        read_configuration("x", folder / "open_clip_config.json")


# ---- network --------------------------------------------------------------------------------------------------------


class Leads(http.server.BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def tls_server(folder: Path, target: str) -> Iterator[str]:
    """A server with TLS that sends everybody on to `target`."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("To", (Leads,), {"target": target})) as found:
        found.socket = context.wrap_socket(found.socket, server_side=True)
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield f"https://127.0.0.1:{found.server_address[1]}/a.tar"
        found.shutdown()


def test_a_download_does_not_leave_tls(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with tls_server(tmp_path, server.url("a.tar", Reply(body=b"from anybody"))) as address:
        with pytest.raises(InputError, match="certificate verify failed"):
            get(out, address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        with pytest.raises(InputError, match="leads on to an address without TLS"):
            get(out, address)
    assert not (out / "a.tar").exists()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)"])
def test_a_redirect_leads_to_no_file(server: Server, tmp_path: Path, target: str) -> None:
    url = server.url("a.tar", Reply(302, headers=(("Location", target),)))
    with pytest.raises(InputError, match="no mirror gave"):
        get(tmp_path, url)
    assert not (tmp_path / "a.tar").exists()


@pytest.mark.parametrize("headers", [(("Content-Range", "bytes 0-1/" + "9" * 5000),), (("Retry-After", "9" * 5000),)])
def test_absurd_numbers_in_headers(server: Server, tmp_path: Path, headers: tuple) -> None:
    get(tmp_path, server.url("a.tar", Reply(503, headers=headers), Reply(body=b"right")))
    assert (tmp_path / "a.tar").read_bytes() == b"right"


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_a_landing_page_takes_words_from_a_report_and_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "javascript:alert(1)" / 'a"b'
    folder.mkdir(parents=True)
    body = "<h1>Study <img src=x onerror=alert(1)> &amp; co</h1>\n<p>It <script>alert(2)</script>is <b"
    (folder / "report.html").write_text(f"{body}onclick=x>bold</b></p>")
    landing.write_index([folder / "report.html"], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "onerror" not in text and "<script" not in text and "onclick" not in text
    assert 'href="./javascript%3Aalert%281%29/a%22b/report.html"' in text
    assert "Study  &amp; co" in text


def test_a_picture_in_a_report_is_a_png_or_nothing(tmp_path: Path) -> None:
    """Pillow would hand PostScript to a program of the machine."""
    import base64

    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    data = base64.b64encode(postscript).decode()
    page = f'<h1>x</h1><p>y</p><figure id="figure-x"><img src="data:image/png;base64,{data}" alt=""></figure>'
    (tmp_path / "report.html").write_text(page)
    with pytest.raises(Exception, match="cannot identify image file"):
        landing.write_index([tmp_path / "report.html"], tmp_path / "index.html")


# ---- the code -------------------------------------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|os\.system|os\.popen|.*\.extractall|.*\.extract|pickle\.\w+|joblib\.\w+|marshal\.\w+"
    r"|shelve\.\w+|.*\.read_pickle|yaml\.(unsafe_|full_)?load_all|yaml\.(unsafe|full)_load|tempfile\.mktemp|input)"
)
ALLOWED = {"re.compile", "torch.compile"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    for name, node in calls(path):
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)[:80]}"
        assert not FORBIDDEN.fullmatch(name) or name in ALLOWED, where
        assert given.get("shell", "False") == "False", where
        assert given.get("verify", "True") == "True", where
        assert "trust_remote_code" not in given, where
        if name == "torch.load":
            assert given["weights_only"] == "True", where
        if name in ("np.load", "numpy.load"):
            assert given["allow_pickle"] == "False", where
        if name == "yaml.load":
            assert given["Loader"] == "UniqueKeyLoader", where
        if name in ("requests.get", "requests.head", "requests.post"):
            assert "timeout" in given, where
        if name == "Image.open" and "mini" not in path.parts:
            assert "formats" in given, where


def test_no_module_hands_on_the_environment() -> None:
    """Tokens stand there. It is asked for single variables, and nowhere written, printed or hashed as a whole."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
                used = parents[node]
                single = isinstance(used, ast.Subscript | ast.Compare) or ast.unparse(used) in (
                    "os.environ.get",
                    "os.environ.pop",
                )
                assert single, f"{path.name}:{node.lineno}: {ast.unparse(used)}"
        text = path.read_text()
        for secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "get_token(", "netrc.netrc", "SSH_", "AWS_"):
            assert secret not in text or path.name in ("hub.py", "fetch.py"), f"{path.name}: {secret}"


# ---- dependencies ---------------------------------------------------------------------------------------------------

# The first release without a fault that is known by name. `make audit` asks a database, where there is a network.
FIXED = {
    "torch": ("2.10.0", "CVE-2025-32434, CVE-2026-24747: weights_only=True could be got round"),
    "pillow": ("12.1.1", "CVE-2023-50447, CVE-2025-48379 and a later write out of bounds"),
    "requests": ("2.32.4", "CVE-2024-47081: .netrc passwords to another host"),
    "urllib3": ("2.6.3", "CVE-2025-66418, CVE-2025-66471, CVE-2026-21441: bombs in compressed answers"),
    "Jinja2": ("3.1.6", "CVE-2025-27516: out of the sandbox"),
    "tornado": ("6.5.3", "CVE-2025-47287 and later ones: denial of service"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: code in Arrow files"),
    "PyYAML": ("5.4", "CVE-2020-14343: code in YAML"),
    "transformers": ("4.53.0", "CVE-2024-11392 to -11394, and regular expressions without end"),
    "GitPython": ("3.1.41", "CVE-2024-22190"),
    "certifi": ("2024.7.4", "CVE-2024-39689: roots that are no longer trusted"),
    "idna": ("3.7", "CVE-2024-3651"),
    "h11": ("0.16.0", "CVE-2025-43859: smuggled requests"),
    "tqdm": ("4.66.3", "CVE-2024-34062"),
    "joblib": ("1.2.0", "CVE-2022-21797"),
    "scikit-learn": ("1.5.0", "CVE-2024-5206"),
    "fonttools": ("4.60.2", "CVE-2025-66034: XML that writes files"),
    "filelock": ("3.20.3", "CVE-2025-68146, CVE-2026-22701: links under a lock's name"),
    "jupyter_core": ("5.8.1", "CVE-2025-30167"),
    "black": ("24.3.0", "CVE-2024-21503"),
    "pydantic": ("2.4.0", "CVE-2024-3772"),
    "ipython": ("8.10.0", "CVE-2023-24816"),
    "Pygments": ("2.15.1", "CVE-2022-40896"),
    "numpy": ("1.22.0", "CVE-2021-41496"),
}


def test_no_pin_is_older_than_a_fix_that_is_known() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line)
    for name, (fixed, what) in FIXED.items():
        if name in pins:
            assert Version(pins[name]) >= Version(fixed), f"{name} {pins[name]} is older than {fixed}: {what}"
    assert {"torch", "pillow", "requests", "urllib3", "PyYAML", "pyarrow"} <= set(pins)
