"""What is in a tar, found out from its bytes: as they stream past, or by walking from header to header.

Which bytes hash to what is another question, and a dearer one: hashing every byte a second time in the pass that stores a layer
takes a third of the push's rate (docs/adr/0013-member-index.md). A compressed layer is hashed while it is inflated, since
that costs more than the hashing; a plain one later.
"""

from __future__ import annotations

import hashlib
from typing import Final

from kitspec.errors import LayerTarInvalid
from kitspec.layer_tar import LayerTarReader, Member
from registry.member_table import MemberTable, TableBuilder
from registry.stored_reader import ReadAt
from storage_backends.interface import StorageUnavailable

# A member costs some 30 us of Python, whatever its size; below this many bytes each, that would be felt in the push.
_SMALL_MEMBER_SIZE: Final = 128 * 1024
_MEMBERS_TOLERATED: Final = 64
# Holds the headers of many small members; of a large one the rest is left out.
_WALK_SIZE: Final = 64 * 1024


class TarIndexer:
    """The bytes of a tar in, a table of its members out. One thread at a time.

    Args:
        hash_members: also hash the content of each file.
    """

    def __init__(self, *, hash_members: bool) -> None:
        self._reader = LayerTarReader()
        self._builder = TableBuilder()
        self._hash_members = hash_members
        self._member: Member | None = None
        self._left = 0
        self._hasher = hashlib.sha256()
        self.size = 0
        """Bytes that were fed."""

    @property
    def is_of_small_members(self) -> bool:
        count = len(self._builder)
        return count > _MEMBERS_TOLERATED and self.size < count * _SMALL_MEMBER_SIZE

    def feed(self, piece: bytes | memoryview) -> None:
        """
        Raises:
            LayerTarInvalid: not a tar, or one that no layer may be.
        """
        self.size += len(piece)
        for event in self._reader.feed(piece):
            if isinstance(event, Member):
                self._begin(event)
            else:
                if self._hash_members:
                    self._hasher.update(event)
                self._left -= len(event)
            if self._member is not None and not self._left:
                self._end(self._member)

    def skip(self) -> int:
        """Leave out the rest of the content that is being fed; how many bytes that are."""
        assert not self._hash_members
        count = self._reader.skip()
        if self._member is not None:
            self._end(self._member)
        self.size += count
        return count

    def finish(self) -> TableBuilder:
        """
        Raises:
            LayerTarInvalid: the tar is not whole.
        """
        self._reader.finish()
        return self._builder

    def _begin(self, member: Member) -> None:
        self._member = member
        self._left = member.size
        if self._hash_members and not member.is_directory:
            self._hasher = hashlib.sha256()

    def _end(self, member: Member) -> None:
        self._member = None
        is_hashed = self._hash_members and not member.is_directory
        self._builder.add(
            member.path,
            is_folder=member.is_directory,
            mode=member.mode,
            start=member.start,
            offset=member.offset,
            size=member.size,
            sha256=self._hasher.digest() if is_hashed else b"",
        )


def walk_tar(read_at: ReadAt, size: int) -> MemberTable:
    """The table of a plain tar, read from header to header. Blocks: for a thread.

    Raises:
        LayerTarInvalid: not a tar, or one that no layer may be.
        StorageUnavailable: the stored layer is shorter than it should be, which says nothing about the tar.
    """
    indexer = TarIndexer(hash_members=False)
    while indexer.size < size:
        piece = read_at(indexer.size, min(_WALK_SIZE, size - indexer.size))
        if not piece:
            raise StorageUnavailable(f"a stored layer ends at byte {indexer.size}; it should have {size}")
        indexer.feed(piece)
        indexer.skip()
    if indexer.size > size:
        raise LayerTarInvalid(f"the layer is cut off after {size} bytes")
    return indexer.finish().build(inflated_size=size)


class PassIndexer:
    """Watches a blob being stored, and has its table at the end if the blob is a plain tar of large members.

    Never raises: what is no tar, or a hostile one, is stored all the same.

    Attributes:
        offset: bytes that were seen.
    """

    def __init__(self) -> None:
        self._indexer: TarIndexer | None = TarIndexer(hash_members=False)
        self.offset = 0

    @property
    def is_watching(self) -> bool:
        return self._indexer is not None

    def observe(self, piece: bytes | memoryview) -> None:
        self.offset += len(piece)
        if self._indexer is None:
            return
        try:
            self._indexer.feed(piece)
        except LayerTarInvalid:
            self._indexer = None
            return
        if self._indexer.is_of_small_members:
            self._indexer = None

    def table(self) -> MemberTable | None:
        """The table of all that was seen; None where there is none to be had."""
        if self._indexer is None:
            return None
        try:
            return self._indexer.finish().build(inflated_size=self.offset)
        except LayerTarInvalid:
            return None
