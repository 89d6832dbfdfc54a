"""ZipCrypto, the old encryption of zip files, for many members at once.

Each byte depends on the one before, so Python's zipfile takes one after the other: 1.6 MB a second, a day and
a half for ObjectNet. Members do not depend on each other: here a thousand of them go side by side.
"""

import numpy as np

HEADER = 12  # bytes before a member's data that only mix the keys; the last one checks the password
START = (0x12345678, 0x23456789, 0x34567890)
POLYNOMIAL, FACTOR = 0xEDB88320, np.uint32(134775813)


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


CRC = _crc_table()


def password_keys(password: str) -> np.ndarray:
    """The keys uint32 [3] after the password. Source: PKWARE's APPNOTE.TXT, section 6.1.5."""
    keys = np.array(START, np.uint32)[:, None]
    for byte in password.encode():
        _update(keys, np.array([byte], np.uint8))
    return keys[:, 0]


def decrypt(data: np.ndarray, keys: np.ndarray) -> None:
    """Decrypt uint8 [bytes, members] in place and take the keys uint32 [3, members] along. Source: section 6.1.6."""
    for row in data:
        mixed = keys[2] | np.uint32(2)
        row ^= ((mixed * (mixed ^ np.uint32(1))) >> np.uint32(8)).astype(np.uint8)
        _update(keys, row)


def _update(keys: np.ndarray, plain: np.ndarray) -> None:
    eight = np.uint32(8)
    keys[0] = CRC[keys[0].astype(np.uint8) ^ plain] ^ keys[0] >> eight
    keys[1] = (keys[1] + (keys[0] & np.uint32(255))) * FACTOR + np.uint32(1)
    keys[2] = CRC[keys[2].astype(np.uint8) ^ (keys[1] >> np.uint32(24)).astype(np.uint8)] ^ keys[2] >> eight
