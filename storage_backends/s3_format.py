"""What an object in the bucket looks like: the bytes, then 32 bytes about them. Pure.

    record    content                                                tail
    pointer   JSON: where the content is; blanks to a multiple of 512  tail
    upload    JSON; note; bytes not yet in a part                    tail
    trash     a record: JSON, the keys of bytes whose pointer goes   tail

The tail has what an object store does not tell: the kind; the size that the caller sees, of a record, of the content, of an
upload so far; and a nonce. Because of the nonce the ETag, a hash of the object in most stores, differs after every write,
and is the version: the store compares it, and PUT, GET, HEAD and LIST all tell it. Metadata would not do: LIST has none, and
an ETag does not change with it.

A listing tells a size and no kind. Pointers alone have to be asked for theirs, and only what has a multiple of 512 bytes can
be one; a record that happens to costs one request more.

What cannot be read of it, `Malformed` says.

The key of a data object begins with a mark of the upload that makes it. So whoever sweeps (s3_sweep.py) sees from a list of the
uploads alone what they may need.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from storage_backends.checks import INTERNAL
from storage_backends.interface import ObjectInfo, Span
from storage_backends.s3_client import Part

T = TypeVar("T")

RECORD, POINTER, UPLOAD = b"r", b"p", b"u"
"""Kinds of objects."""

_TAIL: Final = struct.Struct(">7scQ16s")
_MAGIC: Final = b"kitobj1"
TAIL_SIZE: Final = _TAIL.size
POINTER_STEP: Final = 512

UPLOADS: Final = f"{INTERNAL}/uploads/"
PROBES: Final = f"{INTERNAL}/probe/"
DATA: Final = f"{INTERNAL}/data/"
TRASH: Final = f"{INTERNAL}/trash/"
_DATA_KEY: Final = re.compile(rf"{DATA}([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})")
_TRASH_KEY: Final = re.compile(rf"{TRASH}[0-9a-f]{{32}}")
_PROBE_KEY: Final = re.compile(rf"{PROBES}[0-9a-f]{{16}}(?:/[!-~]{{1,3}})?")
_HALF_SIZE: Final = 16


def new_data_key(upload_id: str) -> str:
    """A key for content that was never used and never will be again, so that deleting what is there is always safe."""
    return data_key(upload_mark(upload_id) + secrets.token_bytes(_HALF_SIZE))


def upload_mark(upload_id: str) -> bytes:
    """What the ids of all data objects of an upload begin with."""
    return hashlib.sha256(upload_id.encode()).digest()[:_HALF_SIZE]


def mark_of_data(data_id: bytes) -> bytes:
    return data_id[:_HALF_SIZE]


def data_key(data_id: bytes) -> str:
    name = data_id.hex()
    return f"{DATA}{name[:2]}/{name}"


def data_id(key: str) -> bytes | None:
    """What tells a data object from all others, in 32 bytes; None of a key that is none of ours."""
    match = _DATA_KEY.fullmatch(key)
    return None if match is None else bytes.fromhex(match[2])


def new_trash_key() -> str:
    return TRASH + secrets.token_hex(_HALF_SIZE)


def is_trash_key(key: str) -> bool:
    return _TRASH_KEY.fullmatch(key) is not None


def is_probe_key(key: str) -> bool:
    return _PROBE_KEY.fullmatch(key) is not None


class Malformed(ValueError):
    """Bytes that this program did not write so."""


@dataclass(frozen=True, slots=True)
class Tail:
    kind: bytes
    size: int
    nonce: bytes

    def to_bytes(self) -> bytes:
        return _TAIL.pack(_MAGIC, self.kind, self.size, self.nonce)

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """Of the end of an object. Raises: Malformed."""
        if len(stored) >= TAIL_SIZE:
            magic, kind, size, nonce = _TAIL.unpack(stored[-TAIL_SIZE:])
            if magic == _MAGIC:
                return cls(kind, size, nonce)
        raise Malformed("its end is none of ours")


@dataclass(frozen=True, slots=True)
class Found:
    """An object as the store has it now.

    Attributes:
        asked: when it was asked, by the store's clock.
        stored_size: bytes in the bucket.
        end: its last bytes; all of it where it has at most 512.
    """

    key: str
    tail: Tail
    version: str
    modified: float
    asked: float
    stored_size: int
    end: bytes

    @property
    def info(self) -> ObjectInfo:
        return ObjectInfo(self.key, self.tail.size, self.version, self.modified)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of content: the first `size` bytes of an object, which may have more."""

    key: str
    size: int
    version: str


def record_to_bytes(content: bytes) -> tuple[bytes, bytes]:
    """The object of a record, and its nonce."""
    return _with_tail(RECORD, len(content), content)


def pointer_to_bytes(segments: Sequence[Segment]) -> tuple[bytes, bytes]:
    """The object that stands for content, and its nonce."""
    document = json.dumps({"segments": [[item.key, item.size, item.version] for item in segments]}).encode()
    padded_size = -(-(len(document) + TAIL_SIZE) // POINTER_STEP) * POINTER_STEP - TAIL_SIZE
    return _with_tail(POINTER, sum(item.size for item in segments), document.ljust(padded_size))


def pointer_from_bytes(stored: bytes) -> tuple[Segment, ...]:
    """Raises: Malformed."""
    return _decoded(_pointer, stored)


def _pointer(stored: bytes) -> tuple[Segment, ...]:
    segments = tuple(map(_segment, json.loads(stored[:-TAIL_SIZE])["segments"]))
    _refuse_size(sum(segment.size for segment in segments), stored)
    return segments


def _segment(item: list[Any]) -> Segment:
    key, size, version = item
    if data_id(key) is None or size < 0 or not isinstance(version, str):
        raise ValueError("no segment")
    return Segment(key, size, version)


def _refuse_size(size: int, stored: bytes) -> None:
    if size != Tail.from_bytes(stored).size:
        raise ValueError("another size than its end says")


def _decoded(decode: Callable[[bytes], T], stored: bytes) -> T:
    try:
        return decode(stored)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Malformed("its JSON is none of ours") from error


def renewed(stored: bytes) -> tuple[bytes, bytes]:
    """The same object with another nonce, and that: another version, of the same size."""
    tail = Tail.from_bytes(stored)
    return _with_tail(tail.kind, tail.size, stored[:-TAIL_SIZE])


def trash_to_bytes(segments: Sequence[Segment]) -> tuple[bytes, bytes]:
    """The record that says which bytes go, and its nonce."""
    return record_to_bytes(json.dumps({"data": [segment.key for segment in segments]}).encode())


def trash_from_bytes(stored: bytes) -> tuple[bytes, ...]:
    """The ids of what a record in the trash names. Raises: Malformed."""
    return _decoded(_trash, stored)


def _trash(stored: bytes) -> tuple[bytes, ...]:
    _refuse_size(len(stored) - TAIL_SIZE, stored)
    ids = tuple(map(data_id, json.loads(stored[:-TAIL_SIZE])["data"]))
    found = tuple(each for each in ids if each is not None)
    if len(found) < len(ids):
        raise ValueError("no key of data")
    return found


def may_be_pointer(stored_size: int) -> bool:
    return stored_size > 0 and stored_size % POINTER_STEP == 0


def pieces_of(segments: Sequence[Segment], span: Span) -> Iterator[tuple[Segment, Span]]:
    """The stretches of segments that `span` of the whole is made of, none of them empty."""
    begin = 0
    for segment in segments:
        start, stop = max(span.start - begin, 0), min(span.stop - begin, segment.size)
        if start < stop:
            yield segment, Span(start, stop)
        begin += segment.size


@dataclass(frozen=True, slots=True)
class Target:
    """A multipart upload that is under way.

    Attributes:
        key: of the data object that it will be.
        number_next: parts from this number on are nobody's yet.
    """

    key: str
    multipart: str
    number_next: int = 1
    parts: tuple[Part, ...] = ()

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def to_json(self) -> list[Any]:
        parts = [[part.number, part.size, part.etag] for part in self.parts]
        return [self.key, self.multipart, self.number_next, parts]

    @classmethod
    def from_json(cls, document: list[Any]) -> Self:
        key, multipart, number_next, parts = document
        if data_id(key) is None:
            raise ValueError("no key of data")
        return cls(key, multipart, number_next, tuple(Part(*part) for part in parts))


@dataclass(frozen=True, slots=True)
class UploadState:
    """An upload, so that any process can go on with it.

    Its bytes are those of `segments`, then of the parts of `targets`, then `rest`.

    Attributes:
        segments: content that is complete.
        targets: all full but the last one.
        is_sealed: `targets` may be completed from now on, by anybody, with these parts and no others.
        is_closing: a commit has begun: nothing more can be appended.
        is_aborted: its bytes are being removed: it has ended.
    """

    note: bytes
    segments: tuple[Segment, ...] = ()
    targets: tuple[Target, ...] = ()
    rest: bytes = b""
    is_sealed: bool = False
    is_closing: bool = False
    is_aborted: bool = False

    @property
    def offset(self) -> int:
        in_segments = sum(segment.size for segment in self.segments)
        return in_segments + sum(target.size for target in self.targets) + len(self.rest)

    def to_bytes(self) -> tuple[bytes, bytes]:
        """The object that keeps it, and its nonce."""
        head = {
            "segments": [[item.key, item.size, item.version] for item in self.segments],
            "targets": [target.to_json() for target in self.targets],
            "sealed": self.is_sealed,
            "closing": self.is_closing,
            "aborted": self.is_aborted,
            "note": len(self.note),
        }
        return _with_tail(UPLOAD, self.offset, json.dumps(head).encode() + b"\n" + self.note + self.rest)

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """Raises: Malformed."""
        return _decoded(cls._from_bytes, stored)

    @classmethod
    def _from_bytes(cls, stored: bytes) -> Self:
        line, _, content = stored[:-TAIL_SIZE].partition(b"\n")
        head = json.loads(line)
        note_size = head["note"]
        state = cls(
            note=content[:note_size],
            segments=tuple(map(_segment, head["segments"])),
            targets=tuple(map(Target.from_json, head["targets"])),
            rest=content[note_size:],
            is_sealed=head["sealed"],
            is_closing=head["closing"],
            is_aborted=head["aborted"],
        )
        _refuse_size(state.offset, stored)
        return state


def _with_tail(kind: bytes, size: int, content: bytes) -> tuple[bytes, bytes]:
    nonce = secrets.token_bytes(16)
    return content + Tail(kind, size, nonce).to_bytes(), nonce
