"""Places in a compressed layer where inflating can begin, and how they are kept.

    head      magic, version, compression, size of the blob, count of rows; CRC-32 of these and of the rows
    rows      in ascending order: offset, position, where the window is in here and how long; 0 for none
    windows   zlib streams, one behind the other

Little endian, the same on every machine. To begin somewhere takes the head, the rows and one window, which has a checksum
of its own. What blob the checkpoints are of, beyond its size, is for the caller to know: they are kept by its digest.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

WINDOW_SIZE_MAX: Final = 32 * 1024  # RFC 1951, 3.2.5: the furthest distance

_HEAD = struct.Struct("<4sB4s3xQII")
_ROW = struct.Struct("<QQQI")
_MAGIC, _VERSION = b"MKCP", 1
_CRC_SIZE = 4


class CheckpointsInvalid(ValueError):
    """Checkpoints that are damaged, of another version or of another blob: to be made again."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place where one can begin.

    Attributes:
        offset: in the inflated layer, in bytes.
        position: in the stored blob, in bits.
        window: what comes before `offset`, up to 32 KiB, if a deflate block begins here; None if a member or a frame does.
    """

    offset: int
    position: int
    window: bytes | None = None


START: Final = Checkpoint(0, 0)


class CheckpointWriter:
    """Checkpoints of one blob, in ascending order, on their way into a record."""

    def __init__(self, compression: str, size: int) -> None:
        self._compression = compression
        self._size = size
        self._rows: list[tuple[int, int, int]] = []
        self._windows: list[bytes] = []

    def add(self, checkpoint: Checkpoint) -> None:
        window = b"" if checkpoint.window is None else zlib.compress(checkpoint.window)
        self._rows.append((checkpoint.offset, checkpoint.position, len(window)))
        self._windows.append(window)

    def packed(self) -> bytes:
        """For `checkpoint_before`; empty if there are none."""
        if not self._rows:
            return b""
        window_start = _HEAD.size + len(self._rows) * _ROW.size
        rows = bytearray()
        for offset, position, window_size in self._rows:
            rows += _ROW.pack(offset, position, window_start, window_size)
            window_start += window_size
        head = _HEAD.pack(_MAGIC, _VERSION, self._compression.encode(), self._size, len(self._rows), 0)
        crc = _crc(head, rows)
        return b"".join((head[:-_CRC_SIZE], crc.to_bytes(_CRC_SIZE, "little"), rows, *self._windows))


def checkpoint_before(offset: int, packed: bytes, compression: str, size: int) -> Checkpoint:
    """The last one at or before byte `offset` of the inflated layer; its start, if there is none.

    Args:
        packed: as `CheckpointWriter` left it, or from an untrusted place: what comes of it is checked.
        size: of the stored blob.

    Raises:
        CheckpointsInvalid: `packed` is not for such a blob.
    """
    if not packed:
        return START
    count = _row_count(packed, compression, size)
    index = bisect_right(range(count), offset, key=lambda index: _row(packed, index)[0]) - 1
    if index < 0:
        return START
    found, position, window_start, window_size = _row(packed, index)
    if position > size * 8:
        raise CheckpointsInvalid(f"a checkpoint is at bit {position} of a blob of {size} bytes")
    window = _window(packed[window_start : window_start + window_size]) if window_size else None
    return Checkpoint(found, position, window)


def _row(packed: bytes, index: int) -> tuple[int, int, int, int]:
    offset, position, window_start, window_size = _ROW.unpack_from(packed, _HEAD.size + index * _ROW.size)
    return offset, position, window_start, window_size


def _row_count(packed: bytes, compression: str, size: int) -> int:
    if len(packed) < _HEAD.size:
        raise CheckpointsInvalid(f"{len(packed)} bytes are too few for checkpoints")
    magic, version, kind, blob_size, count, crc = _HEAD.unpack_from(packed)
    if (magic, version) != (_MAGIC, _VERSION):
        raise CheckpointsInvalid(f"these are not checkpoints of version {_VERSION}")
    rows = memoryview(packed)[_HEAD.size : _HEAD.size + count * _ROW.size]
    if len(rows) != count * _ROW.size or _crc(packed[: _HEAD.size], rows) != crc:
        raise CheckpointsInvalid("the checkpoints are damaged or cut off")
    if (kind, blob_size) != (compression.encode(), size):
        raise CheckpointsInvalid(
            f"the checkpoints are of {blob_size} bytes of {kind!a}, not of {size} of {compression}"
        )
    return int(count)


def _crc(head: bytes, rows: bytearray | memoryview) -> int:
    return zlib.crc32(rows, zlib.crc32(head[:-_CRC_SIZE]))


def _window(deflated: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        window = stream.decompress(deflated, WINDOW_SIZE_MAX)
    except zlib.error as error:
        raise CheckpointsInvalid(f"the window of a checkpoint is damaged: {error}") from error
    if not stream.eof:
        raise CheckpointsInvalid("the window of a checkpoint is cut off, or too large")
    return window
