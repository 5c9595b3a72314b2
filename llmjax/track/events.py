"""TensorBoard event files, written by hand: scalars need three protobuf messages and a checksum.

The usual writers import TensorFlow or torch (seconds at start-up where they are installed) and pin protobuf. Formats:
TFRecord (tensorflow/core/lib/io/record_writer.h), Event and Summary (tensorflow/core/util/event.proto,
framework/summary.proto), CRC-32C with Castagnoli's polynomial (RFC 3720, appendix B.4).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

# Protobuf keys: field number << 3 | wire type (0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes).
EVENT_WALL_TIME, EVENT_STEP, EVENT_FILE_VERSION, EVENT_SUMMARY, EVENT_SESSION_LOG = 0x09, 0x10, 0x1A, 0x2A, 0x3A
SUMMARY_VALUE, VALUE_TAG, VALUE_SIMPLE, SESSION_STATUS = 0x0A, 0x0A, 0x15, 0x08
SESSION_START = 1


class EventFile:
    """One append-only event file; `first_step` is the first that will follow.

    Points of that step and later ones in earlier files of the folder (a run that died after its last checkpoint) are
    withdrawn, which TensorBoard does on a session start.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._append(_bytes(EVENT_FILE_VERSION, b"brain.Event:2"))
        self._append(_int(EVENT_STEP, first_step) + _bytes(EVENT_SESSION_LOG, _int(SESSION_STATUS, SESSION_START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point for every value."""
        summary = b"".join(_bytes(SUMMARY_VALUE, _bytes(VALUE_TAG, tag.encode()) + _float(VALUE_SIMPLE, value))
                           for tag, value in values.items())
        self._append(_int(EVENT_STEP, step) + _bytes(EVENT_SUMMARY, summary))

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _append(self, fields: bytes) -> None:
        event = struct.pack("<Bd", EVENT_WALL_TIME, time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(key: int, value: int) -> bytes:
    return bytes([key]) + _varint(value)


def _bytes(key: int, value: bytes) -> bytes:
    return bytes([key]) + _varint(len(value)) + value


def _float(key: int, value: float) -> bytes:
    return struct.pack("<Bf", key, value)


def _crc_entry(index: int) -> int:
    for _ in range(8):
        index = index >> 1 ^ (0x82F63B78 if index & 1 else 0)
    return index


CRC_TABLE = tuple(_crc_entry(index) for index in range(256))


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated by 15 bits and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
