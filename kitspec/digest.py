"""Digests: `algorithm:encoded`, checked once and then trusted.

Source: image-spec 1.1.1, descriptor.md, "Digests". Only the registered algorithms are spoken: sha256 and sha512.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Self

from kitspec.errors import DigestInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import ReadableBuffer

# fullmatch: `$` would let a trailing newline pass.
_GRAMMAR = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}", re.ASCII)

ENCODED_LENGTH = {"sha256": 64, "sha512": 128}
"""Hex digits of each algorithm that is spoken."""


class Digest(str):
    """A digest whose grammar has been checked; compares and serialises as plain text."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check `text`.

        Raises:
            DigestInvalid: not `sha256:` with 64 or `sha512:` with 128 lower-case hex digits.
        """
        if _GRAMMAR.fullmatch(text) is None:
            raise DigestInvalid(
                f"not a digest this registry speaks: {text[:160]!a}; "
                "wanted sha256: and 64, or sha512: and 128, lower-case hex digits"
            )
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        return self.partition(":")[2]

    @classmethod
    def of(cls, content: ReadableBuffer, algorithm: str = "sha256") -> Self:
        """The digest of bytes that are in memory."""
        return cls(f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}")

    @classmethod
    def of_chunks(cls, chunks: Iterable[ReadableBuffer], algorithm: str = "sha256") -> Self:
        """The digest of the concatenation of `chunks`."""
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        for chunk in chunks:
            hasher.update(chunk)
        return cls(f"{algorithm}:{hasher.hexdigest()}")


def check_algorithm(text: str) -> str:
    """`text`, if it is an algorithm that is spoken.

    Raises:
        DigestInvalid: it is not.
    """
    if text not in ENCODED_LENGTH:
        raise DigestInvalid(f"unsupported digest algorithm: {text[:40]!a}; wanted sha256 or sha512")
    return text
