"""Zips and parquet files that several tests make."""

import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED, **changes: object) -> Path:
    """`changes` are attributes that every member gets, such as a Unix mode."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, (2020, 5, 6, 7, 8, 10))
            info.compress_type = method
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def zip_crypto(data: bytes, password: bytes) -> bytes:
    """Encrypt by the format's definition (APPNOTE.TXT, section 6.1), one byte after the other."""
    keys = [0x12345678, 0x23456789, 0x34567890]

    def update(byte: int) -> None:
        keys[0] = zlib.crc32(bytes([byte]), keys[0] ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
        keys[1] = ((keys[1] + (keys[0] & 255)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = zlib.crc32(bytes([keys[1] >> 24]), keys[2] ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    for byte in password:
        update(byte)
    result = bytearray()
    for byte in data:
        mixed = (keys[2] & 0xFFFF) | 2
        result.append(byte ^ (mixed * (mixed ^ 1) >> 8 & 255))
        update(byte)
    return bytes(result)


def encrypted_zip(path: Path, files: dict[str, bytes], deflate: bool, plain: tuple[str, ...] = ()) -> Path:
    """A zip with the password `secret`; the members in `plain` are not encrypted."""
    raw, directory = b"", b""
    for name, content in files.items():
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = packer.compress(content) + packer.flush() if deflate else content
        crc, start = zlib.crc32(content), len(raw)
        if name not in plain:
            data = zip_crypto(os.urandom(11) + bytes([crc >> 24]) + data, b"secret")
        fields = [20, int(name not in plain), 8 * deflate, 0, 33, crc, len(data), len(content), len(name), 0]
        widths = [2, 2, 2, 2, 2, 4, 4, 4, 2, 2]
        header = b"".join(value.to_bytes(width, "little") for value, width in zip(fields, widths, strict=True))
        raw += b"PK\x03\x04" + header + name.encode() + data
        directory += b"PK\x01\x02\x14\x03" + header + bytes(10) + start.to_bytes(4, "little") + name.encode()
    tail = 2 * len(files).to_bytes(2, "little") + len(directory).to_bytes(4, "little") + len(raw).to_bytes(4, "little")
    path.write_bytes(raw + directory + b"PK\x05\x06" + bytes(4) + tail + bytes(2))
    return path


def write_parquet(path: Path, files: dict[str | None, bytes | None], group: int = 2, column: str = "image") -> Path:
    """As the library `datasets` writes images: a struct of bytes and path, a label, and features in the metadata."""
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({column: pyarrow.array(images, kind), "label": np.arange(len(images)) % 3})
    names = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}, column: {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path
