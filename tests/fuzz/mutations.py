"""Valid files, made invalid: every function takes a random generator and what it is to spoil.

The generator is Python's, or hypothesis's (which then shrinks what fails), or one that reads its choices from a
coverage-guided fuzzer's bytes.
"""

import csv
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 127, 128, 255, 511, 512, 513, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)
NAMES = (
    *("../x.jpg", "../../canary", "/etc/x.jpg", "a/../../x.jpg", "./x.jpg", "a//b.jpg", "..", ".", "", " ", "x"),
    *("a\0b.jpg", "a\nb.jpg", "a\tb.jpg", "C:\\x.jpg", "..\\x.jpg", "\u202egpj.x", "é\u0301.jpg", "a" * 300 + ".jpg"),
    *("-rf.jpg", "--out=x.jpg", "$(touch canary).jpg", "`touch canary`.jpg", "x;touch canary.jpg", "'.jpg", "*.jpg"),
    *(".hidden.jpg", "a/.b/c.jpg", "x.jpg/", "x.tar", "x.parquet", "CON.jpg", "<script>.jpg", "a.b.c.cls", "x.cls"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**400, 2**63, -(2**63), 1e308, float("inf"), float("nan")),
    *("", "a", "0", "-1", "1e999", "x" * 5000, "9" * 5000, "\0", "\ud800", "a\n", "../../canary", "-x", "~nobody/x"),
    *("$(touch canary)", "{}", "{x}", "%s", [], {}, [[]], [None], {"a": 1}, {"": ""}, ["a", "a"], [0, "a", None]),
    {"files": {"../canary": "0"}},
)


def spoil_bytes(data: bytes, random: Random, most: int = 4) -> bytes:
    """Flip, set, cut, repeat, insert and move bytes, one to `most` times."""
    raw = bytearray(data)
    for _ in range(random.randint(1, most)):
        place = random.randint(0, max(len(raw) - 1, 0))
        length = random.choice((1, 2, 4, 8, 16, 64, 512))
        match random.randint(0, 8):
            case 0 if raw:
                raw[place] ^= 1 << random.randint(0, 7)
            case 1 if raw:
                raw[place] = random.randint(0, 255)
            case 2:
                width, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
                number = random.choice(NUMBERS) % (1 << 8 * width)
                raw[place : place + width] = number.to_bytes(width, order)
            case 3:
                del raw[place : place + length]
            case 4:
                raw[place:place] = raw[place : place + length]
            case 5:
                raw[place:place] = bytes(random.randint(0, 255) for _ in range(random.randint(1, 8)))
            case 6:
                del raw[place:]
            case 7:
                raw[place : place + length] = bytes(min(length, len(raw) - place))
            case _:
                other = random.randint(0, max(len(raw) - 1, 0))
                raw[place : place + length] = raw[other : other + length]
    return bytes(raw)


def spoil_text(text: str, random: Random) -> str:
    """Lines are dropped, doubled and swapped, words replaced by odd ones; sometimes any character."""
    lines = text.splitlines(keepends=True)
    for _ in range(random.randint(1, 3)):
        if not lines:
            lines = ["\n"]
        row = random.randint(0, len(lines) - 1)
        match random.randint(0, 5):
            case 0:
                del lines[row]
            case 1:
                lines.insert(row, lines[row])
            case 2:
                other = random.randint(0, len(lines) - 1)
                lines[row], lines[other] = lines[other], lines[row]
            case 3:
                words = lines[row].split(" ")
                words[random.randint(0, len(words) - 1)] = str(random.choice((*VALUES, *NAMES)))
                lines[row] = " ".join(words)
            case 4:
                place = random.randint(0, len(lines[row]))
                lines[row] = (
                    lines[row][:place] + random.choice("\0\"'\t,:{}[]&*!|>%@`#\ud800\ufeff-~$") + lines[row][place:]
                )
            case _:
                lines[row] = spoil_bytes(lines[row].encode(errors="replace"), random).decode("latin-1")
    return "".join(lines)


def spoil_table(text: str, random: Random, delimiter: str = ",") -> str:
    """A cell becomes another's, or odd; or the text is spoiled."""
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    if not rows or random.random() < 0.3:
        return spoil_text(text, random)
    for _ in range(random.randint(1, 3)):
        row = random.choice(rows)
        if row:
            other = random.choice(random.choice(rows) or [""])
            row[random.randint(0, len(row) - 1)] = random.choice(
                (other, str(random.choice(VALUES)), random.choice(NAMES))
            )
    target = io.StringIO()
    writer = csv.writer(target, delimiter=delimiter, lineterminator="\n", escapechar="\\")
    writer.writerows([cell.replace("\0", "0") for cell in row] for row in rows)
    return target.getvalue()


def spoil_value(value: Any, random: Random, most: int = 3) -> Any:
    """A JSON-like value of which one to `most` parts are odd, gone, doubled, renamed or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(random.randint(1, most)):
        value = _spoil_part(value, random)
    return value


def _spoil_part(value: Any, random: Random) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        match random.randint(0, 11):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                return {random.choice(NAMES) if name == key else name: part for name, part in value.items()}
            case 2:
                return {**value, random.choice((*NAMES, "model", "0", "files")): random.choice(VALUES)}
            case _:
                return {**value, key: _spoil_part(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        place = random.randint(0, len(value) - 1)
        match random.randint(0, 7):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
            case _:
                return [*value[:place], _spoil_part(value[place], random), *value[place + 1 :]]
    if random.random() < 0.05:
        for _ in range(random.choice((3, 40, 200))):
            value = [value]
        return value
    if isinstance(value, str) and random.random() < 0.4:
        return random.choice((value + "\n", value + ";touch canary", value.upper(), value[:-1], f"-{value}", value * 2))
    if isinstance(value, int | float) and random.random() < 0.4:
        return random.choice((-value, value + 1, str(value), *NUMBERS))
    return random.choice(VALUES)


def write_json(value: Any, random: Random) -> bytes:
    """As JSON, spoiled as text now and then."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    if random.random() < 0.15:
        text = random.choice((text[:-1], text + text, f"\ufeff{text}", "[" * 100_000, text.replace(":", ":9" * 3, 1)))
    return text.encode(errors="surrogatepass")


# ---- archives ---------------------------------------------------------------------------------------------------


def write_tar(files: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return target.getvalue()


def spoil_tar(data: bytes, random: Random) -> bytes:
    """Fields of headers get odd contents and right checksums; or any bytes are spoiled."""
    raw = bytearray(data)
    starts = [i for i in range(0, len(raw) - 511, 512) if raw[i + 257 : i + 262] == b"ustar"]
    if not starts or random.random() < 0.2:
        return spoil_bytes(data, random)
    for _ in range(random.randint(1, 3)):
        at = random.choice(starts)
        match random.randint(0, 8):
            case 0:
                _put(raw, at, 100, random.choice(NAMES).encode(errors="surrogatepass"))
            case 1:  # octal, or base 256: also negative
                number = random.choice(NUMBERS)
                base256 = random.choice((b"\x80", b"\xff")) + (number % 2**88).to_bytes(11, "big")
                octal = b"%011o\0" % (number % 8**11)
                _put(raw, at + 124, 12, random.choice((octal, base256, b"-0000000001\0", b"           \0", b"\0" * 12)))
            case 2:
                _put(raw, at + 156, 1, random.choice(b"\x0001234567xgLKSVDNM").to_bytes(1, "little"))
            case 3:
                _put(raw, at + 157, 100, random.choice(NAMES).encode(errors="surrogatepass"))
            case 4:
                _put(raw, at + 345, 155, random.choice(NAMES).encode(errors="surrogatepass"))
            case 5:  # sparse: an old GNU map that claims any sizes
                numbers = b"".join(b"%011o\0" % (random.choice(NUMBERS) % 8**11) for _ in range(8))
                _put(raw, at + 156, 1, b"S")
                _put(raw, at + 386, 96, numbers)
                _put(raw, at + 482, 13, random.choice((b"\1", b"\0")) + b"%011o\0" % (random.choice(NUMBERS) % 8**11))
            case 6:
                raw[at:at] = _pax(random)
                starts = [i for i in range(0, len(raw) - 511, 512) if raw[i + 257 : i + 262] == b"ustar"]
                continue
            case 7:
                raw[at + 512 : at + 1024] = raw[at : at + 512]
            case _:
                place = at + random.randint(0, 511)
                raw[place] = random.randint(0, 255)
        raw[at + 148 : at + 156] = b"%06o\0 " % (sum(raw[at : at + 148]) + 256 + sum(raw[at + 156 : at + 512]))
    return bytes(raw) if random.random() < 0.9 else spoil_bytes(bytes(raw), random, 1)


def _put(raw: bytearray, at: int, width: int, content: bytes) -> None:
    raw[at : at + width] = content[:width].ljust(width, b"\0")


def _pax(random: Random) -> bytes:
    """Extended headers: known keys with odd values, and lengths that are wrong."""
    records = b""
    for _ in range(random.randint(1, 4)):
        keys = ("path", "linkpath", "size", "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.map", "GNU.sparse.size")
        key = random.choice((*keys, "GNU.sparse.name", "GNU.sparse.offset", "GNU.sparse.numbytes", "hdrcharset", "x"))
        value = random.choice((*NAMES, *map(str, NUMBERS), "-1", "1,2,3", "9" * 100, "BINARY"))
        body = f" {key}={value}\n".encode(errors="surrogatepass")
        length = random.choice((len(body) + len(str(len(body) + 2)), 0, 5, 10**6, len(body)))
        records += b"%d%b" % (length, body)
    info = tarfile.TarInfo("pax")
    info.type, info.size = random.choice((tarfile.XHDTYPE, tarfile.XGLTYPE)), len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


# Bytes from a header's signature to its fields, as (offset, width).
ZIP_FIELDS = {
    b"PK\x01\x02": (
        *((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4)),
        *((24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4)),
    ),
    b"PK\x03\x04": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


def spoil_zip(data: bytes, random: Random) -> bytes:
    raw = bytearray(data)
    found = [(i, fields) for signature, fields in ZIP_FIELDS.items() for i in _all(raw, signature)]
    if not found or random.random() < 0.2:
        return spoil_bytes(data, random)
    for _ in range(random.randint(1, 3)):
        at, fields = random.choice(found)
        if random.random() < 0.25 and raw[at : at + 4] == b"PK\x01\x02":
            name = random.choice(NAMES).encode(errors="surrogatepass")
            width = int.from_bytes(raw[at + 28 : at + 30], "little")
            _put(raw, at + 46, width, name.ljust(width, b"x"))
        else:
            offset, width = random.choice(fields)
            number = int.from_bytes(raw[at + offset : at + offset + width], "little")
            number = random.choice((*NUMBERS, number + 1, number - 1, number ^ 1, number * 2)) % (1 << 8 * width)
            raw[at + offset : at + offset + width] = number.to_bytes(width, "little")
    return bytes(raw) if random.random() < 0.9 else spoil_bytes(bytes(raw), random, 1)


def _all(raw: bytes | bytearray, part: bytes) -> list[int]:
    found, at = [], raw.find(part)
    while at >= 0:
        found.append(at)
        at = raw.find(part, at + 1)
    return found


def spoil_npy(data: bytes, random: Random) -> bytes:
    """The header claims another type, order or shape."""
    if random.random() < 0.3:
        return spoil_bytes(data, random)
    descr = random.choice(
        ("<f2", "<f4", ">f8", "<i8", "|b1", "|O", "|V8", "<U9", "", "<f99", "|S0", [["a", "<f4"]], [["a"]], 5)
    )
    sizes = (*NUMBERS, -1, 4, 8, None, "4", 1.5, True)
    shape: Any = tuple(random.choice(sizes) for _ in range(random.randint(0, 4)))
    order = random.choice((True, False, False, 1, "no"))
    header: Any = {"descr": descr, "fortran_order": order, "shape": random.choice((shape, (4, 8), list(shape), 4))}
    text = random.choice(
        (repr(header), repr(header)[:-1], "(" * 200, "{[]: 1}", repr({**header, "more": 1}), "9" * 5000)
    )
    magic = b"\x93NUMPY" + random.choice((b"\1\0", b"\2\0", b"\3\0", b"\4\0"))
    encoded = text.encode("latin-1", errors="replace") + b"\n"
    length = random.choice((len(encoded), len(encoded), len(encoded), 0, 60_000))
    body = data[data.find(b"\n") + 1 :]
    return magic + struct.pack("<H" if magic[6] == 1 else "<I", length) + encoded + body


def spoil_deflate(data: bytes, random: Random, spoil: Callable[[bytes, Random], bytes], head: int = 0) -> bytes:
    """Gzip of spoiled content, or a spoiled gzip."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    if random.random() < 0.7:
        data = spoil(data, random)
        return packer.compress(data) + packer.flush()
    return spoil_bytes(packer.compress(data) + packer.flush(), random)


def spoil_files(files: Mapping[str, bytes], random: Random, untouched: Sequence[str] = ()) -> dict[str, bytes]:
    """One or two files of a layout are renamed, gone, doubled, or have other contents of their kind."""
    found = dict(files)
    for _ in range(random.randint(1, 2)):
        if not found:
            return found
        texts = [
            name for name in sorted(found) if name.endswith((".json", ".jsonl", ".csv", ".txt", ".cls", ".npz", ".mat"))
        ]
        name = random.choice(texts if texts and random.random() < 0.7 else sorted(found))
        content = found[name]
        match random.randint(0, 9):
            case 0:
                del found[name]
            case 1:
                odd = random.choice(NAMES).replace("\0", "0") or "x"
                found[random.choice((odd, f"{name.rpartition('/')[0]}/{odd}"))] = found.pop(name)
            case 2:
                found[f"copy/{name}"] = content
            case _:
                found[name] = spoil_content(name, content, random)
    return found


def spoil_content(name: str, content: bytes, random: Random) -> bytes:
    try:
        if name.endswith(".json"):
            return write_json(spoil_value(json.loads(content), random), random)
        if name.endswith(".csv"):
            delimiter = "\t" if b"\t" in content[:200] else ","
            return spoil_table(content.decode(), random, delimiter).encode(errors="surrogatepass")
        if name.endswith((".txt", ".jsonl", ".cls", ".tsv", ".yaml")):
            return spoil_text(content.decode(), random).encode(errors="surrogatepass")
    except (ValueError, RecursionError, csv.Error):  # spoiled before, so that it cannot be read
        pass
    return spoil_bytes(content, random)
