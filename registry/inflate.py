"""Any span of a compressed layer, without inflating all that comes before it.

A layer is inflated once from end to end, an `Inflation`, when its members are indexed. On the way checkpoints are taken,
and `inflated_span` begins at the last one before the span.

- gzip: wherever a member begins, and between any two deflate blocks, with the 32 KiB that came before, which later blocks
  may repeat. One every 16 MiB: the windows are 1/512 of what the layer inflates to, or less.
- zstd: where a frame begins, and nowhere else.

Everything here blocks, is of use to one thread at a time, and opens nothing: stored bytes come from the caller's `ReadAt`.
What is read and inflated at a time is bounded, whatever the layer: a few MiB, for zstd its window besides.
Why it is so, with figures: docs/adr/0014-inflated-spans.md.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import zstandard

from kitspec.errors import ContentInvalid
from registry.checkpoints import START, Checkpoint, CheckpointWriter, checkpoint_before
from registry.deflate_blocks import BlockStream, libz, stream_at
from registry.stored_reader import ReadAt
from storage_backends.interface import StorageUnavailable

Compression = Literal["gzip", "zstd"]
PIECE_SIZE_MAX: Final = 1024 * 1024
CHECKPOINT_SPACING: Final = 16 * 1024 * 1024
READ_SIZE: Final = 256 * 1024
"""Bytes that are asked of a `ReadAt` at a time, at most."""

# A checkpoint without a window takes 28 bytes; layers made for random access (bgzip, eStargz, our own zstd) have many.
_WINDOWLESS_PER_SPACING: Final = 16
# Python's zlib copies what is left of its input when a member ends: less input, less to copy.
_FEED_SIZE: Final = 64 * 1024
_GZIP_TRAILER_SIZE: Final = 8  # RFC 1952, 2.3: CRC32 and ISIZE

# Memory that the writer of a layer makes us take. `zstd --ultra --long` goes up to it; Go's encoder takes 8 MiB at most.
_ZSTD_WINDOW_SIZE_MAX: Final = 128 * 1024 * 1024
# 64 GiB are half a million full blocks. An empty one takes 3 bytes of the layer, and half a microsecond here.
_ZSTD_BLOCK_COUNT_MAX: Final = 16_000_000
_SKIPPABLE_MAGIC: Final = range(0x184D2A50, 0x184D2A60)  # RFC 8878, 3.1.2
_RLE_BLOCK: Final = 1  # RFC 8878, 3.1.1.2.2


class InflateFailed(ContentInvalid):
    """A layer is not what its compression says, or goes beyond the limits. Pushes and pulls do not mind."""


@dataclass(frozen=True, slots=True)
class InflateLimits:
    """What a layer may become, and how much work its form may make.

    Attributes:
        inflated_size_max: bytes of the whole.
        ratio_max: bytes of the whole for each stored one; does not count for a whole of up to `ratio_free_size` bytes.
        part_count_max: gzip members, or zstd frames and skippable frames. Two for each of the million members that a layer
            may have (eStargz and zstd:chunked begin one for each file); or 120 GiB in bgzip's members of 64 KiB. Empty ones
            take 3 microseconds each.
    """

    inflated_size_max: int = 64 * 1024**3
    ratio_max: int = 200
    ratio_free_size: int = 64 * 1024**2
    part_count_max: int = 2_000_000


class Inflation:
    """One pass over a whole layer.

    Args:
        size: of the stored blob, in bytes.
        spacing: bytes between checkpoints, inflated or stored, whichever are more; as far as the stream allows.
    """

    def __init__(
        self,
        compression: Compression,
        read_at: ReadAt,
        size: int,
        *,
        limits: InflateLimits,
        spacing: int = CHECKPOINT_SPACING,
    ) -> None:
        self._source = _Source(read_at, size)
        self._compression: Compression = compression
        self._limits = limits
        self._spacing = spacing
        self._checkpoints = CheckpointWriter(compression, size)
        self._last = START
        self._inflated_size = 0
        self._part_count = 0
        self._is_over = False

    def pieces(self) -> Iterator[bytes]:
        """All inflated bytes, in pieces of at most 1 MiB; once.

        Raises:
            InflateFailed: the stream is damaged, ends early, is followed by something else, or goes beyond the limits.
            StorageUnavailable: the stored blob is shorter than it should be.
        """
        is_gzip = self._compression == "gzip"
        for piece in self._gunzipped() if is_gzip else _frames(self._source, self._begin_part):
            self._inflated_size += len(piece)
            self._check_size()
            yield piece
        self._is_over = True

    def checkpoints(self) -> bytes:
        """What `inflated_span` wants of this layer, portable between machines; empty if none are needed.

        To be asked when the last piece has come.
        """
        assert self._is_over, "the checkpoints of an inflation that has not come to its end"
        return self._checkpoints.packed()

    def _check_size(self) -> None:
        limits, stored = self._limits, self._source.size
        if self._inflated_size > limits.inflated_size_max:
            raise InflateFailed(
                f"it inflates to more than {limits.inflated_size_max} bytes, which is the most that is read"
            )
        if self._inflated_size > max(limits.ratio_free_size, limits.ratio_max * stored):
            raise InflateFailed(
                f"its {stored} bytes inflate to more than {limits.ratio_max} times as many, which is the most that is read"
            )

    def _begin_part(self, position: int) -> None:
        """A gzip member or a zstd frame begins at byte `position` of the blob."""
        self._part_count += 1
        if self._part_count > self._limits.part_count_max:
            raise InflateFailed(
                f"it has more than {self._limits.part_count_max} {self._compression} streams in a row"
            )
        if self._distance(position) * _WINDOWLESS_PER_SPACING >= self._spacing:
            self._note(Checkpoint(self._inflated_size, position * 8))

    def _note(self, checkpoint: Checkpoint) -> None:
        self._checkpoints.add(checkpoint)
        self._last = checkpoint

    def _distance(self, position: int) -> int:
        """Bytes from the last checkpoint to byte `position` of the blob. Stored ones count too: a stream may give none."""
        return max(self._inflated_size - self._last.offset, position - self._last.position // 8)

    def _gunzipped(self) -> Iterator[bytes]:
        library = libz()
        if library is None:
            # Members are the only places to begin then; what is far behind one takes longer.
            yield from _members(self._source, START, self._begin_part)
            return
        stream = BlockStream(library, PIECE_SIZE_MAX)
        try:
            yield from self._members_by_block(stream)
        finally:
            stream.close()

    def _members_by_block(self, stream: BlockStream) -> Iterator[bytes]:
        source = self._source
        self._begin_part(0)
        while True:
            if stream.wants_input:
                stream.feed(source.chunk(READ_SIZE))
            left = self._spacing - self._distance(source.position - stream.input_left)
            is_due = left <= 0
            try:
                piece = stream.inflate(
                    PIECE_SIZE_MAX if is_due else min(PIECE_SIZE_MAX, left), stop_at_block=is_due
                )
            except zlib.error as error:
                raise _gzip_damaged(source.position, error) from error
            if piece:
                yield piece
            position = source.position - stream.input_left
            if stream.is_over:
                if position == source.size:
                    return
                self._begin_part(position)
                stream.begin_member()
            elif is_due and stream.is_at_block:
                self._note(
                    Checkpoint(self._inflated_size, position * 8 - stream.unused_bits, stream.window())
                )


def inflated_span(  # noqa: PLR0917  (what of, then which span)
    compression: Compression, read_at: ReadAt, size: int, checkpoints: bytes, start: int, stop: int
) -> Iterator[bytes]:
    """The inflated bytes `start` up to but without `stop`, in pieces of at most 1 MiB.

    Of the blob, no more is read than what lies between the checkpoint and `stop`, and 384 KiB. The bytes are those of the
    `Inflation`; they are checked again only where a zstd frame or a gzip member, begun at its beginning, ends in the span.

    Args:
        size: of the stored blob.
        checkpoints: of this very blob; may be empty.

    Raises:
        CheckpointsInvalid: make them again.
        InflateFailed: the layer is damaged or ends before `stop`; or the checkpoints are of another one.
        StorageUnavailable: the stored blob is shorter than it should be.
    """
    if start >= stop:
        return
    begin = checkpoint_before(start, checkpoints, compression, size)
    source = _Source(read_at, size, begin.position // 8)
    pieces = _members(source, begin) if compression == "gzip" else _frames(source)
    yield from _together(_cut(pieces, start - begin.offset, stop - begin.offset))


def _cut(pieces: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    """Bytes `start` to `stop` of what `pieces` give, and no step further."""
    offset = 0
    for piece in pieces:
        if wanted := piece[max(0, start - offset) : stop - offset]:
            yield wanted
        offset += len(piece)
        if offset >= stop:
            return
    raise InflateFailed(f"its stream ends {stop - offset} bytes before the end of what was asked for")


def _together(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces: each goes from thread to thread on its own."""
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > PIECE_SIZE_MAX:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(piece)
        size += len(piece)
    yield b"".join(batch)


class _Source:
    """The stored blob from `position` on, read as it is needed."""

    def __init__(self, read_at: ReadAt, size: int, position: int = 0) -> None:
        self.size = size
        self._read_at = read_at
        self._buffer = b""
        self._used = 0  # of the buffer
        self._read = position  # where the buffer ends

    @property
    def position(self) -> int:
        """Of the byte that comes next."""
        return self._read - len(self._buffer) + self._used

    def chunk(self, size: int) -> bytes:
        """The next bytes: at least one, at most `size`.

        Raises:
            InflateFailed: there are no more.
        """
        if self._used == len(self._buffer):
            self._fill()
        chunk = self._buffer[self._used : self._used + size]
        self._used += len(chunk)
        return chunk

    def give_back(self, count: int) -> None:
        """Let the last `count` bytes of the last chunk come once more."""
        self._used -= count

    def take(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            InflateFailed: there are fewer.
        """
        taken = b""
        while len(taken) < size:
            taken += self.chunk(size - len(taken))
        return taken

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, without reading those that are not here yet.

        Raises:
            InflateFailed: there are fewer.
        """
        target = self.position + count
        if target > self.size:
            raise self._ends_early()
        if target <= self._read:
            self._used += count
        else:
            self._buffer, self._used, self._read = b"", 0, target

    def _fill(self) -> None:
        if self._read >= self.size:
            raise self._ends_early()
        self._buffer = self._read_at(self._read, min(READ_SIZE, self.size - self._read))
        self._used = 0
        self._read += len(self._buffer)
        if not self._buffer:
            raise StorageUnavailable(f"a stored blob ends at byte {self._read}; it should have {self.size}")

    def _ends_early(self) -> InflateFailed:
        return InflateFailed(f"its compressed stream is cut off: more should follow its {self.size} bytes")


def _members(
    source: _Source, begin: Checkpoint, on_part: Callable[[int], None] = lambda _: None
) -> Iterator[bytes]:
    """What a gzip stream gives from `begin`, where `source` stands, to its end.

    Args:
        on_part: told the position of each member that begins on the way.
    """
    if begin.window is None:
        on_part(source.position)
        stream, chunk, trailer_size = _member()
    else:
        bits_before = begin.position % 8
        byte = source.take(1)[0] if bits_before else 0
        stream, chunk = stream_at(begin.window, bits_before=bits_before, byte=byte)
        trailer_size = _GZIP_TRAILER_SIZE  # no header, no trailer: to zlib it is a bare stream
    while True:
        chunk = chunk or source.chunk(_FEED_SIZE)
        try:
            piece = stream.decompress(chunk, PIECE_SIZE_MAX)
        except zlib.error as error:
            raise _gzip_damaged(source.position, error) from error
        if piece:
            yield piece
        chunk = stream.unconsumed_tail
        if stream.eof:
            source.give_back(len(stream.unused_data))
            source.take(trailer_size)
            if source.position == source.size:
                return
            on_part(source.position)
            stream, chunk, trailer_size = _member()


def _member() -> tuple[zlib._Decompress, bytes, int]:
    """What inflates a member from its header on; nothing to feed it first, and no trailer to skip."""
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), b"", 0


def _gzip_damaged(position: int, error: zlib.error) -> InflateFailed:
    return InflateFailed(
        f"its gzip stream is damaged, or followed by something else, before byte {position}: {error}"
    )


def _frames(source: _Source, on_part: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """What a zstd stream gives from here, where a frame begins, to its end; in pieces of at most 128 KiB.

    Frames are taken apart as far as to their blocks (RFC 8878, 3.1.1): so nothing of the next frame is fed to a reader, and
    no reader gives more at a time than a block.

    Args:
        on_part: told the position of each frame.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_SIZE_MAX)
    block_numbers = itertools.count(1)
    while True:
        position = source.position
        on_part(position)
        magic = source.take(4)
        if int.from_bytes(magic, "little") in _SKIPPABLE_MAGIC:
            source.skip(int.from_bytes(source.take(4), "little"))
        elif magic == zstandard.FRAME_HEADER:
            try:
                yield from _frame(source, decompressor, block_numbers)
            except zstandard.ZstdError as error:
                raise InflateFailed(f"its zstd frame at byte {position} is damaged: {error}") from error
        else:
            raise InflateFailed(f"what it has at byte {position} is no zstd frame")
        if source.position == source.size:
            return


def _frame(
    source: _Source, decompressor: zstandard.ZstdDecompressor, block_numbers: Iterator[int]
) -> Iterator[bytes]:
    """What the frame gives whose magic number was taken."""
    header = zstandard.FRAME_HEADER + source.take(1)
    header += source.take(zstandard.frame_header_size(header) - len(header))
    parameters = zstandard.get_frame_parameters(header)
    if parameters.window_size > _ZSTD_WINDOW_SIZE_MAX:
        raise InflateFailed(
            f"a zstd frame of it wants a window of {parameters.window_size} bytes; {_ZSTD_WINDOW_SIZE_MAX} is the most"
        )
    if parameters.dict_id:
        raise InflateFailed(
            f"a zstd frame of it wants the dictionary {parameters.dict_id}, which is not here"
        )
    stream = decompressor.decompressobj()
    stream.decompress(header)
    is_last = False
    while not is_last:
        if next(block_numbers) > _ZSTD_BLOCK_COUNT_MAX:
            raise InflateFailed(f"its zstd frames have more than {_ZSTD_BLOCK_COUNT_MAX} blocks")
        block_header = source.take(3)
        fields = int.from_bytes(block_header, "little")
        is_last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
        if piece := stream.decompress(block_header + source.take(1 if kind == _RLE_BLOCK else size)):
            yield piece
    if parameters.has_checksum:
        stream.decompress(source.take(4))
    assert stream.eof, "a frame whose last block has come"
