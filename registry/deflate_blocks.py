"""Where the blocks of a deflate stream begin: to stop there, and to begin there.

Python's zlib knows neither. `BlockStream` is zlib's own inflate(), which can stop: reached by ctypes, for the one pass over
a whole layer. `stream_at` begins inside a byte with nothing but Python's zlib, so spans are read without libz too.

Source: RFC 1951; zlib.h, "inflate", "inflateGetDictionary".
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from typing import Final

from registry.checkpoints import WINDOW_SIZE_MAX

# ---- to begin


def stream_at(window: bytes, *, bits_before: int, byte: int) -> tuple[zlib._Decompress, bytes]:
    """What inflates a deflate stream from a block on that begins inside `byte`, and what to feed it first.

    Python's zlib begins with whole bytes only. So the bits of `byte` that belong to the block before give way to blocks
    that stand for nothing, as many as make the rest of it come to its place.

    Args:
        window: the bytes that came before, up to 32 KiB.
        bits_before: 0 to 7, the lowest of `byte`; if 0, `byte` does not count, and nothing is to be fed first.
    """
    lead, size = _EMPTY_ODD if bits_before % 2 else (0, 0)
    while size % 8 != bits_before:
        lead, size = _joined((lead, size), _EMPTY_EVEN)
    if bits_before:
        lead, size = _joined((lead, size), (byte >> bits_before, 8 - bits_before))
    return zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=window), lead.to_bytes(size // 8, "little")


def _joined(*fields: tuple[int, int]) -> tuple[int, int]:
    """Fields of (value, width in bits), the first in the lowest bits, as one."""
    joined = size = 0
    for value, width in fields:
        joined |= value << size
        size += width
    return joined, size


# Blocks that are not the last and give nothing, RFC 1951, 3.2.3 to 3.2.7.
# 10 bits: type 1, fixed codes, in which the end of the block is seven zeros.
_EMPTY_EVEN: Final = _joined((0, 1), (1, 2), (0, 7))
# 91 bits: type 2, with 258 codes for literals and lengths, 1 for distances, and 18 for code lengths, of which two have one
# bit: 0 is "one bit", 1 is "that many zeros". So: 138 and 118 zeros, then one bit each for the end of the block, for a length
# (a single code would not be complete) and for a distance. Then the end of the block.
_EMPTY_ODD: Final = _joined(
    (0, 1), (2, 2), (258 - 257, 5), (1 - 1, 5), (18 - 4, 4),
    (0, 3), (0, 3), (1, 3), *((0, 3),) * 14, (1, 3),
    (1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7), (0, 1), (0, 1), (0, 1),
    (0, 1),
)  # fmt: skip


# ---- to stop


class _ZStream(ctypes.Structure):
    """z_stream of zlib.h; inflateInit2_() is told its size and refuses another."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


# Of zlib.h.
_Z_OK, _Z_STREAM_END, _Z_DATA_ERROR, _Z_BUF_ERROR = 0, 1, -3, -5
_Z_NO_FLUSH, _Z_BLOCK = 0, 5
_GZIP_ONLY = 16 + zlib.MAX_WBITS
# Of data_type, in which inflate() says where it stands.
_UNUSED_BITS, _IN_LAST_BLOCK, _AT_BLOCK = 7, 64, 128

# As the dynamic loader knows it, on Linux and macOS. Python's zlib is linked to it, unless it was built in.
_LIBZ_NAMES = ("libz.so.1", "libz.1.dylib")


@functools.cache
def libz() -> ctypes.CDLL | None:
    """zlib itself; None where it cannot be found, or lacks what is needed."""
    for name in _LIBZ_NAMES:
        try:
            library = ctypes.CDLL(name)
            stream = ctypes.POINTER(_ZStream)
            library.zlibVersion.restype = ctypes.c_char_p
            library.inflateInit2_.argtypes = (stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
            library.inflate.argtypes = (stream, ctypes.c_int)
            library.inflateReset.argtypes = library.inflateEnd.argtypes = (stream,)
            library.inflateGetDictionary.argtypes = (
                stream,
                ctypes.c_char_p,
                ctypes.POINTER(ctypes.c_uint),
            )
        except (OSError, AttributeError):
            continue
        return library
    return None


class BlockStream:
    """inflate() on gzip members, checksums included, that can stop where a block begins. Lets the GIL go. To be closed.

    `feed` it when it `wants_input`, `inflate` until it `is_over`, then `begin_member` with the input that is left.

    Args:
        size_max: bytes that come out at a time, at most.
    """

    def __init__(self, library: ctypes.CDLL, size_max: int) -> None:
        self._libz = library
        self._stream = _ZStream()
        self._by_reference = ctypes.byref(self._stream)
        self._input = b""  # zlib reads it where it is: it must live as long
        self._output = ctypes.create_string_buffer(size_max)
        self.is_over = False
        done = library.inflateInit2_(
            self._by_reference, _GZIP_ONLY, library.zlibVersion(), ctypes.sizeof(_ZStream)
        )
        if done != _Z_OK:
            raise MemoryError(f"zlib does not begin: {done}")

    @property
    def wants_input(self) -> bool:
        return self.input_left == 0

    @property
    def input_left(self) -> int:
        """Bytes that were fed and are not used yet."""
        return int(self._stream.avail_in)

    @property
    def is_at_block(self) -> bool:
        """Whether the last `inflate` stopped where another block of this member begins."""
        return int(self._stream.data_type) & (_AT_BLOCK | _IN_LAST_BLOCK) == _AT_BLOCK

    @property
    def unused_bits(self) -> int:
        """At a block: how many bits of the last used byte belong to it."""
        return int(self._stream.data_type) & _UNUSED_BITS

    def feed(self, chunk: bytes) -> None:
        self._input = chunk
        self._stream.next_in = ctypes.cast(ctypes.c_char_p(chunk), ctypes.c_void_p)
        self._stream.avail_in = len(chunk)

    def inflate(self, size: int, *, stop_at_block: bool) -> bytes:
        """The next bytes, `size` at most, and no more than fit; perhaps none.

        Raises:
            zlib.error: the stream is damaged, or not gzip; as Python's zlib raises it.
        """
        self._stream.next_out = ctypes.addressof(self._output)
        self._stream.avail_out = room = min(size, len(self._output))
        done = self._libz.inflate(self._by_reference, _Z_BLOCK if stop_at_block else _Z_NO_FLUSH)
        if done == _Z_DATA_ERROR:
            raise zlib.error((self._stream.msg or b"").decode("ascii", "replace"))
        # Z_BUF_ERROR says that it cannot go on without input.
        if done not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
            raise MemoryError(f"zlib does not go on: {done}")
        self.is_over = done == _Z_STREAM_END
        return ctypes.string_at(self._output, room - self._stream.avail_out)

    def window(self) -> bytes:
        """The last 32 KiB of this member, or as many as there are."""
        window, size = ctypes.create_string_buffer(WINDOW_SIZE_MAX), ctypes.c_uint()
        self._libz.inflateGetDictionary(self._by_reference, window, ctypes.byref(size))
        return window.raw[: size.value]

    def begin_member(self) -> None:
        self._libz.inflateReset(self._by_reference)
        self.is_over = False

    def close(self) -> None:
        self._libz.inflateEnd(self._by_reference)
