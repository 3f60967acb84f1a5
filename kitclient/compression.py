"""Layers smaller and larger again: gzip and zstd, piece by piece, with limits on what comes out.

Not every byte that kit's own gzip writes can be written again here: the deflate stream is the library's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from kitclient.errors import ClientError

Compression = Literal["none", "gzip", "gzip-fastest", "zstd"]

PIECE_SIZE = 1024 * 1024

# Go's encoder writes no more than 8 MiB, `zstd --ultra --long` 128 MiB; a window is memory that the packer makes us take.
_ZSTD_WINDOW_MAX = 128 * 1024 * 1024
# A frame is the only place where a reader can begin. Frames of this size take at most 0.3 % more room than one for the whole,
# and no more time (docs/adr/0014-inflated-spans.md).
_ZSTD_FRAME_SIZE = 8 * 1024 * 1024
# A block of 4 bytes can stand for 128 KiB: 2 KiB in are at most 64 MiB out.
_ZSTD_STEP = 2048
# pigz and bgzip write many members; more than this is an attack on our patience.
_GZIP_MEMBERS_MAX = 1000

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class LayerBroken(ClientError):
    """A layer's bytes are not what its media type, its config or its own format say."""


class Inflater(Protocol):
    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What `chunk`, the next of the blob, stands for; in pieces of a bounded size."""
        ...

    def end(self) -> None:
        """The blob is over.

        Raises:
            LayerBroken: the stream is not.
        """
        ...


def compression_of_bytes(start: bytes) -> str | None:
    """What the first bytes of a blob say it is compressed with."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def inflater(compression: str | None) -> Inflater:
    """For the suffix of a media type: None, `gzip` or `zstd`.

    Raises:
        LayerBroken: nobody here knows it.
    """
    if compression is None:
        return _Identity()
    if compression == "gzip":
        return _Gunzip()
    if compression == "zstd":
        return _Unzstd()
    raise LayerBroken(f"layers compressed with {compression[:40]!a} cannot be read; known are gzip and zstd")


class _Identity:
    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk

    def end(self) -> None:
        pass


class _Gunzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._members = 1
        self._started = False

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        while chunk:
            if self._stream.eof:
                self._next_member()
            self._started = True
            try:
                piece = self._stream.decompress(chunk, PIECE_SIZE)
            except zlib.error as error:
                raise LayerBroken(f"the gzip stream is damaged: {error}") from error
            if piece:
                yield piece
            chunk = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    def end(self) -> None:
        if not self._stream.eof:
            raise LayerBroken("the gzip stream ends early" if self._started else "the gzip stream is empty")

    def _next_member(self) -> None:
        self._members += 1
        if self._members > _GZIP_MEMBERS_MAX:
            raise LayerBroken(f"the gzip stream has more than {_GZIP_MEMBERS_MAX} members")
        self._stream = zlib.decompressobj(wbits=31)


class _Unzstd:
    def __init__(self) -> None:
        import zstandard

        self._failed = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
        self._stream = self._decompressor.decompressobj()

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        view = memoryview(chunk)
        for position in range(0, len(view), _ZSTD_STEP):
            step = bytes(view[position : position + _ZSTD_STEP])
            while step:
                if self._stream.eof:
                    self._stream = self._decompressor.decompressobj()
                try:
                    piece = self._stream.decompress(step)
                except self._failed as error:
                    raise LayerBroken(
                        f"the zstd stream is damaged or wants too much memory: {error}"
                    ) from error
                if piece:
                    yield piece
                step = self._stream.unused_data if self._stream.eof else b""

    def end(self) -> None:
        if not self._stream.eof:
            raise LayerBroken("the zstd stream ends early")


class Deflater(Protocol):
    def compress(self, piece: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


def deflater(compression: Compression) -> Deflater | None:
    """None for `none`."""
    if compression == "none":
        return None
    if compression == "zstd":
        return _Zstd()
    return _Gzip(1 if compression == "gzip-fastest" else 6)


class _Gzip:
    """A gzip member with the header that kit writes: no name, no time, unknown system."""

    def __init__(self, level: int) -> None:
        # RFC 1952, 2.3: XFL 4 is "fastest algorithm"; kit leaves it 0 for the default level.
        self._header = b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + (b"\x04" if level == 1 else b"\x00") + b"\xff"
        self._stream = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._crc = 0
        self._size = 0

    def compress(self, piece: bytes) -> bytes:
        self._crc = zlib.crc32(piece, self._crc)
        self._size += len(piece)
        header, self._header = self._header, b""
        return header + self._stream.compress(piece)

    def flush(self) -> bytes:
        return self._header + self._stream.flush() + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)


class _Zstd:
    """Frames of `_ZSTD_FRAME_SIZE` inflated bytes, each with a checksum.

    How the bytes are cut into pieces makes no difference to what is written.
    """

    def __init__(self) -> None:
        import zstandard

        self._compressor = zstandard.ZstdCompressor(write_checksum=True)
        self._begin_frame()

    def _begin_frame(self) -> None:
        self._frame = self._compressor.compressobj()
        self._room = _ZSTD_FRAME_SIZE

    def compress(self, piece: bytes) -> bytes:
        smaller = []
        left = memoryview(piece)
        while left:
            # Not when it fills up, but when more comes: the last frame is never empty.
            if not self._room:
                smaller.append(self._frame.flush())
                self._begin_frame()
            part = left[: self._room]
            smaller.append(self._frame.compress(part))
            self._room -= len(part)
            left = left[len(part) :]
        return b"".join(smaller)

    def flush(self) -> bytes:
        return self._frame.flush()


class UnpackLimit:
    """How much one unpack may write, over all its layers, so that a small blob cannot fill the disk.

    Args:
        size_max: bytes, all files together.
        ratio_max: bytes out for one byte in; None: no bound. Only asked after `_RATIO_FREE` bytes.
    """

    _RATIO_FREE = 64 * 1024 * 1024
    _ENTRIES_MAX = 1_000_000

    def __init__(self, size_max: int, ratio_max: int | None) -> None:
        self._size_max = size_max
        self._ratio_max = ratio_max
        self._written = 0
        self._entries = 0

    def add_bytes(self, count: int, layer_out: int, layer_in: int) -> None:
        """`count` more bytes are about to be written; of this layer `layer_out` came out of `layer_in`.

        Raises:
            LayerBroken: that is too much.
        """
        self._written += count
        if self._written > self._size_max:
            raise LayerBroken(
                f"more than {self._size_max} bytes would be written; --max-unpacked allows more, where there is room"
            )
        if (
            self._ratio_max is not None
            and layer_out > self._RATIO_FREE
            and layer_out > layer_in * self._ratio_max
        ):
            raise LayerBroken(
                f"{layer_in} bytes grow to more than {layer_out}, over {self._ratio_max} times their size; "
                "--max-unpacked allows it"
            )

    def add_entry(self) -> None:
        self._entries += 1
        if self._entries > self._ENTRIES_MAX:
            raise LayerBroken(f"more than {self._ENTRIES_MAX} files and folders")


_: Callable[[], Inflater] = _Identity
