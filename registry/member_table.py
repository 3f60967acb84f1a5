"""What is in a layer, as a table that is searched without being unpacked: a row for each member, in the order of paths.

    {"format": 1, "kind": "members", …}\\n    how many rows, how many bytes of paths and checkpoints; what the layer inflates to
    rows                                     65 bytes each: where the path is, kind, mode, where the content is, SHA-256
    paths                                    UTF-8, one behind the other
    checkpoints                              where inflating can begin (registry/inflate.py); empty for a plain layer
    CRC-32                                   of all that; 4 bytes: what is damaged on the disk would serve other bytes than asked for

or, for a layer that nobody can look into, {"format": 1, "kind": "refused", "message": …}\\n and its CRC-32.

A table is a cache: it can be deleted, and is made again from the layer. So it has a format, and no history of formats.
"""

from __future__ import annotations

import json
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, LayerTarInvalid

_FORMAT = 1
# Offset and size of the path, mode, kind, start of the headers, offset and size of the content, SHA-256.
_ROW = struct.Struct("<IHHBQQQ32s")
_DIGEST_IN_ROW = _ROW.size - 32
_FILE, _FOLDER = 0, 1
_NO_DIGEST = bytes(32)
_CRC_SIZE = 4
# A million members with paths of 134 bytes. What deflates well could hold a million of 4,096, and take 4 GiB of memory here.
_PATHS_SIZE_MAX = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TableMember:
    """A file or a folder in a layer.

    Attributes:
        path: in the layer; "" for the one file that a raw layer is.
        mode: permission bits.
        start, offset: of the first of its headers and of its content, in the inflated layer.
        digest: of its content; None for a folder, and for a file whose content nobody has hashed yet.
    """

    path: str
    is_folder: bool
    mode: int
    start: int
    offset: int
    size: int
    digest: Digest | None


class TableDamaged(ValueError):
    """The bytes are no table of this format; make it again."""


class MemberTable:
    """The members of one layer.

    Attributes:
        inflated_size: bytes of the layer when inflated; its size if it is not compressed.
        diff_id: digest of the inflated layer; None if it is not compressed: then it is the layer's own.
        checkpoints: for `inflate.inflated_span`.
    """

    def __init__(
        self,
        rows: bytes | bytearray,
        paths: bytes,
        *,
        unhashed_count: int,
        inflated_size: int,
        diff_id: Digest | None = None,
        checkpoints: bytes = b"",
    ) -> None:
        self._rows = bytearray(rows)
        self._paths = paths
        self._unhashed_count = unhashed_count
        self.inflated_size = inflated_size
        self.diff_id = diff_id
        self.checkpoints = checkpoints

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    @property
    def weight(self) -> int:
        """Bytes of memory."""
        return len(self._rows) + len(self._paths) + len(self.checkpoints) + 512

    def at(self, index: int) -> TableMember:
        path_at, path_size, mode, kind, start, offset, size, digest = _ROW.unpack_from(
            self._rows, index * _ROW.size
        )
        return TableMember(
            self._paths[path_at : path_at + path_size].decode(),
            kind == _FOLDER,
            mode,
            start,
            offset,
            size,
            Digest(f"sha256:{digest.hex()}") if digest != _NO_DIGEST else None,
        )

    def find(self, path: str) -> TableMember | None:
        index = self._index_of(path)
        return None if index is None else self.at(index)

    def set_digest(self, path: str, sha256: bytes) -> None:
        """Say what the content of the file at `path` hashes to; what is known already stands."""
        index = self._index_of(path)
        assert index is not None
        start = index * _ROW.size + _DIGEST_IN_ROW
        if self._rows[start : start + 32] == _NO_DIGEST:
            self._rows[start : start + 32] = sha256
            self._unhashed_count -= 1

    @property
    def is_hashed(self) -> bool:
        """Whether every file has its digest."""
        return not self._unhashed_count

    def unhashed(self) -> list[TableMember]:
        """Files whose content nobody has hashed yet, in the order of the layer."""
        members = (self.at(index) for index in range(len(self)))
        return sorted(
            (member for member in members if not member.is_folder and member.digest is None),
            key=lambda member: member.offset,
        )

    def _index_of(self, path: str) -> int | None:
        wanted = path.encode()
        index = bisect_left(range(len(self)), wanted, key=self._path)
        return index if index < len(self) and self._path(index) == wanted else None

    def find_digest(self, digest: Digest) -> TableMember | None:
        """A file with this content, if there is one."""
        if digest.algorithm != "sha256":
            return None
        wanted = bytes.fromhex(digest.encoded)
        if wanted == _NO_DIGEST:
            return None
        position = self._rows.find(wanted)
        while position >= 0:
            index, within = divmod(position, _ROW.size)
            if within == _DIGEST_IN_ROW:
                member = self.at(index)
                if not member.is_folder:
                    return member
            position = self._rows.find(wanted, position + 1)
        return None

    def members(self, *, prefix: str = "", after: str | None = None) -> Iterator[TableMember]:
        """In the order of their paths' bytes: those that begin with `prefix` and are greater than `after`."""
        beginning = prefix.encode()
        index = bisect_left(range(len(self)), beginning, key=self._path)
        if after is not None:
            index = max(index, bisect_right(range(len(self)), after.encode(), key=self._path))
        while index < len(self) and self._path(index).startswith(beginning):
            yield self.at(index)
            index += 1

    def _path(self, index: int) -> bytes:
        path_at, path_size = struct.unpack_from("<IH", self._rows, index * _ROW.size)
        return self._paths[path_at : path_at + path_size]

    def to_bytes(self) -> bytes:
        head = {
            "format": _FORMAT,
            "kind": "members",
            "rows": len(self._rows),
            "paths": len(self._paths),
            "checkpoints": len(self.checkpoints),
            "unhashed": self._unhashed_count,
            "inflatedSize": self.inflated_size,
            "diffId": self.diff_id,
        }
        return _sealed(head, self._rows, self._paths, self.checkpoints)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self | Refusal:
        """
        Raises:
            TableDamaged: it is of another format, or damaged.
        """
        crc = zlib.crc32(memoryview(content)[:-_CRC_SIZE])
        if crc.to_bytes(_CRC_SIZE, "little") != content[-_CRC_SIZE:]:
            raise TableDamaged("a table with a wrong checksum")
        head, _, body = content[:-_CRC_SIZE].partition(b"\n")
        try:
            document = json.loads(head)
            if document["format"] != _FORMAT:
                raise TableDamaged(f"a table of format {document['format']}")
            if document["kind"] == "refused":
                return Refusal(str(document["message"]))
            rows, paths, checkpoints = document["rows"], document["paths"], document["checkpoints"]
            if rows + paths + checkpoints != len(body) or rows % _ROW.size:
                raise TableDamaged(f"a table of {len(body)} bytes, which says {rows + paths + checkpoints}")
            return cls(
                body[:rows],
                body[rows : rows + paths],
                unhashed_count=document["unhashed"],
                inflated_size=document["inflatedSize"],
                diff_id=None if document["diffId"] is None else Digest(document["diffId"]),
                checkpoints=body[rows + paths :],
            )
        except (ValueError, KeyError, TypeError, DigestInvalid) as error:
            raise TableDamaged(f"not a table: {error}") from error


def _sealed(head: dict[str, object], *parts: bytes | bytearray) -> bytes:
    pieces = (json.dumps(head).encode(), b"\n", *parts)
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return b"".join((*pieces, crc.to_bytes(_CRC_SIZE, "little")))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A layer that nobody can look into, and why."""

    message: str

    @property
    def weight(self) -> int:
        return len(self.message) + 512

    def to_bytes(self) -> bytes:
        return _sealed({"format": _FORMAT, "kind": "refused", "message": self.message})


class TableBuilder:
    """Members in the order of the layer, a table at the end."""

    def __init__(self) -> None:
        self._rows: list[bytes] = []
        self._paths: list[bytes] = []
        self._paths_size = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, path: str, *, is_folder: bool, mode: int, start: int, offset: int, size: int, sha256: bytes
    ) -> None:
        """
        Args:
            sha256: of a file's content, 32 bytes; b"" for a folder, and for what is to be hashed later.

        Raises:
            LayerTarInvalid: all paths together are too long.
        """
        self._paths.append(path.encode())
        self._paths_size += len(self._paths[-1])
        if self._paths_size > _PATHS_SIZE_MAX:
            raise LayerTarInvalid(f"the paths of its members have more than {_PATHS_SIZE_MAX} bytes in all")
        kind = _FOLDER if is_folder else _FILE
        self._rows.append(
            _ROW.pack(0, len(self._paths[-1]), mode, kind, start, offset, size, sha256 or _NO_DIGEST)
        )

    def build(
        self, *, inflated_size: int, diff_id: Digest | None = None, checkpoints: bytes = b""
    ) -> MemberTable:
        """
        Raises:
            LayerTarInvalid: two files have one path: which is meant depends on who reads.
        """
        rows = bytearray()
        paths = bytearray()
        unhashed_count = 0
        previous: int | None = None
        for index in sorted(range(len(self._rows)), key=self._paths.__getitem__):
            if previous is not None and self._paths[previous] == self._paths[index]:
                self._check_twins(previous, index)
                continue  # a folder that is listed again
            row = self._rows[index]
            unhashed_count += _ROW.unpack(row)[3] == _FILE and row.endswith(_NO_DIGEST)
            rows += struct.pack("<I", len(paths)) + row[4:]
            paths += self._paths[index]
            previous = index
        return MemberTable(
            rows,
            bytes(paths),
            unhashed_count=unhashed_count,
            inflated_size=inflated_size,
            diff_id=diff_id,
            checkpoints=checkpoints,
        )

    def _check_twins(self, first: int, second: int) -> None:
        kinds: Sequence[int] = [_ROW.unpack(self._rows[index])[3] for index in (first, second)]
        if kinds != [_FOLDER, _FOLDER]:
            path = ascii(self._paths[first].decode())
            raise LayerTarInvalid(f"two members are called {path[:200]}, and they are not both folders")
