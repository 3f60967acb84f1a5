"""SHA-256 whose state can be kept and taken up by another process.

hashlib cannot give its state away; libcrypto's SHA256_CTX is plain data: eight chaining words, a bit count and the
bytes of the block that is not full yet. `kept` is written portably, so that a worker, a later version or a machine of
another byte order can go on where this one stopped. libcrypto lets the GIL go while it hashes, as hashlib does.

Where libcrypto cannot be used or proves wrong in the self-test, `begin` gives a hasher that cannot be kept, and the
upload's bytes are read again instead (docs/adr/0008-hash-state.md).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from typing import Protocol

# As the dynamic loader knows it, on Linux and macOS; Python's own hashlib is linked to it.
_NAMES = ("libcrypto.so.3", "libcrypto.3.dylib", "libcrypto.so.1.1")
_BLOCK_SIZE = 64
# Version 1: eight words, bits received, bytes in the block, the block.
_KEPT = struct.Struct(">B8IQB64s")
_VERSION = 1


class Hasher(Protocol):
    """What hashlib's objects do, as far as uploads need it."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Context(ctypes.Structure):
    """SHA256_CTX of openssl/sha.h; unchanged since OpenSSL 0.9.8, deprecated and present in 3.x."""

    _fields_ = (
        ("h", ctypes.c_uint32 * 8),
        ("bits_low", ctypes.c_uint32),
        ("bits_high", ctypes.c_uint32),
        ("block", ctypes.c_ubyte * _BLOCK_SIZE),
        ("count", ctypes.c_uint),
        ("digest_size", ctypes.c_uint),
    )


class KeepableSha256:
    """SHA-256 through libcrypto."""

    def __init__(self, crypto: ctypes.CDLL) -> None:
        self._crypto = crypto
        self._context = _Context()
        crypto.SHA256_Init(ctypes.byref(self._context))

    def update(self, data: bytes | memoryview, /) -> None:
        """Hash `data`; of a memoryview, one over writable bytes."""
        start = (
            data
            if isinstance(data, bytes)
            else ctypes.byref(ctypes.c_char.from_buffer(data))
            if data
            else b""
        )
        self._crypto.SHA256_Update(ctypes.byref(self._context), start, len(data))

    def hexdigest(self) -> str:
        """Of the bytes so far; more may follow."""
        copy = _Context.from_buffer_copy(self._context)
        out = ctypes.create_string_buffer(32)
        self._crypto.SHA256_Final(out, ctypes.byref(copy))
        return out.raw.hex()

    def keep(self) -> bytes:
        """The state, to be given to `take_up`."""
        context = self._context
        bits = context.bits_high << 32 | context.bits_low
        return _KEPT.pack(_VERSION, *context.h, bits, context.count, bytes(context.block))

    def _restore(self, kept: bytes) -> None:
        _, *words, bits, count, block = _KEPT.unpack(kept)
        self._context.h[:] = words
        self._context.bits_high, self._context.bits_low = bits >> 32, bits & 0xFFFFFFFF
        self._context.count = count
        self._context.block[:] = block


@functools.cache
def _libcrypto() -> ctypes.CDLL | None:
    for name in _NAMES:
        try:
            crypto = ctypes.CDLL(name)
            crypto.SHA256_Init.argtypes = (ctypes.c_void_p,)
            crypto.SHA256_Update.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            crypto.SHA256_Final.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        if _hashes_right(crypto):
            return crypto
    return None


def _hashes_right(crypto: ctypes.CDLL) -> bool:
    """The self-test: as hashlib does, also after the state was kept and restored."""
    content = bytes(range(256))
    for cut in (0, 1, 63, 64, 65, 200):
        first, second = KeepableSha256(crypto), KeepableSha256(crypto)
        first.update(content[:cut])
        second._restore(first.keep())
        second.update(content[cut:])
        if second.hexdigest() != hashlib.sha256(content).hexdigest():
            return False
    return True


def load() -> bool:
    """Load libcrypto and test it, once, before the event loop needs it; whether states can be kept."""
    return _libcrypto() is not None


def begin(algorithm: str) -> Hasher:
    """A fresh hasher; a `KeepableSha256` where that is possible."""
    crypto = _libcrypto() if algorithm == "sha256" else None
    return KeepableSha256(crypto) if crypto is not None else hashlib.new(algorithm, usedforsecurity=False)


def take_up(kept: bytes) -> KeepableSha256 | None:
    """The hasher that `keep` left; None where its state cannot be used: hash the bytes again."""
    crypto = _libcrypto()
    if crypto is None or len(kept) != _KEPT.size or kept[0] != _VERSION:
        return None
    hasher = KeepableSha256(crypto)
    hasher._restore(kept)
    return hasher
