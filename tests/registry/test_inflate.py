"""A span of a compressed layer is those bytes of the whole, whatever wrote the layer, and costs little more than itself."""

from __future__ import annotations

import gzip
import itertools
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import inflate
from registry.checkpoints import Checkpoint, CheckpointsInvalid, CheckpointWriter
from registry.deflate_blocks import libz, stream_at
from registry.inflate import CHECKPOINT_SPACING, InflateFailed, InflateLimits, Inflation, inflated_span
from storage_backends.interface import StorageUnavailable

KIB, MIB = 1024, 1024 * 1024
BOTH = pytest.mark.parametrize("compression", ["gzip", "zstd"])
# Of zlib at its default memory level a block has at most 16,383 literals and repeats.
GZIP_BLOCK_MAX = 64 * KIB


class Stored:
    """A blob, and how much of it was read."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.read = 0

    def read_at(self, offset: int, size: int) -> bytes:
        assert 0 <= offset < len(self.blob)
        piece = self.blob[offset : offset + size]
        assert len(piece) == size, "asked for bytes behind the end"
        self.read += size
        return piece


def inflated(compression: Any, blob: bytes, *, spacing: int = CHECKPOINT_SPACING, **limits: int):
    """All bytes, and the checkpoints."""
    stored = Stored(blob)
    inflation = Inflation(
        compression, stored.read_at, len(blob), limits=InflateLimits(**limits), spacing=spacing
    )
    whole = b"".join(checked_pieces(inflation.pieces()))
    assert stored.read <= len(blob), "read twice"
    return whole, inflation.checkpoints()


def checked_pieces(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        assert 0 < len(piece) <= MIB
        yield piece


def span(compression: Any, blob: bytes, checkpoints: bytes, start: int, stop: int):
    """The bytes, and how many stored ones were read for them."""
    stored = Stored(blob)
    pieces = inflated_span(compression, stored.read_at, len(blob), checkpoints, start, stop)
    return b"".join(checked_pieces(pieces)), stored.read


def refused(compression: str, blob: bytes, words: str, **limits: int) -> None:
    with pytest.raises(InflateFailed, match=words) as caught:
        inflated(compression, blob, **limits)
    assert str(caught.value).isprintable()


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def text(size: int, seed: int = 1) -> bytes:
    """Bytes that compress, and repeat what is almost a window away."""
    words = noise(31_000, seed).hex().encode()[:31_000]
    return (words * (size // len(words) + 1))[:size]


# ---- writers


def gzip_members(parts: list[bytes], level: int = 6) -> bytes:
    return b"".join(gzip.compress(part, level) for part in parts)


def gzip_flushed(parts: list[bytes]) -> bytes:
    """One member, with a block's end and a byte's behind each part, as pigz and loggers leave them."""
    stream = zlib.compressobj(wbits=31)
    return (
        b"".join(stream.compress(part) + stream.flush(zlib.Z_SYNC_FLUSH) for part in parts) + stream.flush()
    )


def bgzip(parts: list[bytes]) -> bytes:
    """Members of 64 KiB with their own size in an extra field, and an empty one at the end."""

    def member(part: bytes) -> bytes:
        stream = zlib.compressobj(wbits=-15)
        body = stream.compress(part) + stream.flush()
        head = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<HccHH", 6, b"B", b"C", 2, len(body) + 25)
        return head + body + struct.pack("<II", zlib.crc32(part), len(part))

    pieces = [part[at : at + 0xFF00] for part in parts for at in range(0, len(part), 0xFF00)]
    return b"".join(map(member, [*pieces, b""]))


def skippable(content: bytes = b"not for you") -> bytes:
    return struct.pack("<II", 0x184D2A5E, len(content)) + content


def zstd_frames(parts: list[bytes], level: int = 3) -> bytes:
    compressor = zstandard.ZstdCompressor(level, write_checksum=True)
    return b"".join(compressor.compress(part) for part in parts)


def zstd_streamed(parts: list[bytes]) -> bytes:
    """One frame that does not say its size, with a block's end behind each part."""
    stream = zstandard.ZstdCompressor().compressobj()
    blocks = [stream.compress(part) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts]
    return b"".join(blocks) + stream.flush()


def zstd_with_skippable(parts: list[bytes]) -> bytes:
    return skippable() + b"".join(zstd_frames([part]) + skippable(b"") for part in parts)


WRITERS: dict[str, tuple[str, Callable[[list[bytes]], bytes]]] = {
    "members": ("gzip", gzip_members),
    "stored members": ("gzip", lambda parts: gzip_members(parts, 0)),
    "one member": ("gzip", lambda parts: gzip_members([b"".join(parts)])),
    "flushed member": ("gzip", gzip_flushed),
    "bgzip": ("gzip", bgzip),
    "frames": ("zstd", zstd_frames),
    "one frame": ("zstd", lambda parts: zstd_frames([b"".join(parts)])),
    "flushed frame": ("zstd", zstd_streamed),
    "skippable frames": ("zstd", zstd_with_skippable),
}
EACH_WRITER = pytest.mark.parametrize("writer", WRITERS)
# Parts that compress in every way: how, how long, from what seed.
KINDS: dict[str, Callable[[int, int], bytes]] = {
    "noise": noise,
    "text": text,
    "zeros": lambda size, _: bytes(size),
}
PARTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(KINDS)),
        st.sampled_from([0, 1, 100, 5_000, 70_000, 300_000]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


# ---- what comes out is what went in


@given(st.sampled_from(sorted(WRITERS)), PARTS, st.data())
@settings(max_examples=150)
def test_a_span_is_those_bytes_of_the_whole_and_reads_little_more(
    writer: str, kinds: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    compression, write = WRITERS[writer]
    parts = [KINDS[kind](size, seed) for kind, size, seed in kinds]
    plain, blob, spacing = b"".join(parts), write(parts), 64 * KIB
    frame_max = len(plain) if writer in ("one frame", "flushed frame") else max(map(len, parts))
    # How far the last place to begin may be; and with zstd, the block in which the span ends.
    unbroken_max = GZIP_BLOCK_MAX if compression == "gzip" else frame_max + 128 * KIB

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflate, "READ_SIZE", 1000)
        whole, checkpoints = inflated(compression, blob, spacing=spacing)
        assert whole == plain
        for _ in range(4):
            start = data.draw(st.integers(0, len(plain)))
            stop = data.draw(st.integers(start, min(len(plain), start + 100_000)))

            found, read = span(compression, blob, checkpoints, start, stop)

            assert found == plain[start:stop]
            # A member or frame takes at most 40 bytes more than it holds; bgzip writes 35 for 6 parts at most.
            assert read <= stop - start + spacing + unbroken_max + 1000 + 40 * 35


@EACH_WRITER
def test_every_offset_can_be_reached(writer: str) -> None:
    compression, write = WRITERS[writer]
    # A block's end after 16,383 literals, and repeats of what is before it: a window that is not full yet.
    plain = noise(17_000) * 3 + bytes(40_000) + text(90_000)
    blob = write([plain[:50_000], plain[50_000:]])

    whole, checkpoints = inflated(compression, blob, spacing=10_000)

    assert whole == plain
    for start in range(0, len(plain), 997):
        assert span(compression, blob, checkpoints, start, start + 10)[0] == plain[start : start + 10]


@pytest.mark.parametrize("level", range(10))
def test_every_level_of_gzip_is_read(level: int) -> None:
    plain = text(200_000) + noise(200_000)
    blob = gzip.compress(plain, level)

    whole, checkpoints = inflated("gzip", blob, spacing=64 * KIB)

    assert whole == plain
    assert span("gzip", blob, checkpoints, 350_000, 350_100)[0] == plain[350_000:350_100]


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
def test_levels_of_zstd_are_read(level: int) -> None:
    plain = text(200_000) + noise(200_000)

    assert inflated("zstd", zstd_frames([plain], level))[0] == plain


def test_headers_with_names_comments_and_extra_fields_are_read() -> None:
    plain = b"x" * 100
    body = gzip.compress(plain)[10:]
    extra = struct.pack("<H", 60_000) + bytes(60_000)
    blob = b"\x1f\x8b\x08\x1c" + bytes(6) + extra + b"name\0comment\0" + body

    assert inflated("gzip", blob)[0] == plain


@BOTH
def test_no_bytes_are_a_stream_too(compression: str) -> None:
    blob = gzip.compress(b"") if compression == "gzip" else zstd_frames([b""])

    assert inflated(compression, blob) == (b"", b"")


@pytest.mark.parametrize("bits", range(8))
def test_a_stream_begins_at_any_bit_of_a_byte(bits: int) -> None:
    window, plain = text(32_768), text(100_000)[32_768:]
    deflater = zlib.compressobj(wbits=-15, zdict=window)
    stream = deflater.compress(plain) + deflater.flush()
    shifted = (int.from_bytes(stream, "little") << bits | (1 << bits) - 1).to_bytes(len(stream) + 1, "little")

    inflating, lead = stream_at(window, bits_before=bits, byte=shifted[0])

    assert inflating.decompress(lead + (shifted[1:] if bits else shifted)) == plain
    assert inflating.eof


def test_a_span_goes_on_from_the_middle_of_a_member_into_the_next() -> None:
    plain = noise(300_000)
    blob = gzip_members([plain[:150_000], plain[150_000:200_000], plain[200_000:]])

    _, checkpoints = inflated("gzip", blob, spacing=50_000)

    assert span("gzip", blob, checkpoints, 140_000, 210_000)[0] == plain[140_000:210_000]


def test_an_empty_span_reads_nothing() -> None:
    assert span("gzip", gzip.compress(b"x"), b"", 1, 1) == (b"", 0)


@BOTH
def test_a_span_behind_the_end_is_refused(compression: str) -> None:
    blob = gzip.compress(b"x" * 10) if compression == "gzip" else zstd_frames([b"x" * 10])

    with pytest.raises(InflateFailed, match="ends 3 bytes before"):
        span(compression, blob, b"", 5, 13)


def test_pieces_of_a_span_are_few() -> None:
    plain = noise(4 * MIB)

    for compression, blob in (("gzip", gzip.compress(plain, 0)), ("zstd", zstd_frames([plain]))):
        pieces = list(
            checked_pieces(inflated_span(compression, Stored(blob).read_at, len(blob), b"", 10, 4 * MIB))
        )

        assert b"".join(pieces) == plain[10:]
        assert len(pieces) <= 6


# ---- checkpoints


def test_one_checkpoint_every_16_mib_takes_no_more_than_a_500th() -> None:
    plain = noise(MIB) * 50
    blob = gzip.compress(plain, 0)  # windows of noise cannot be made smaller

    whole, checkpoints = inflated("gzip", blob)

    assert whole == plain
    assert 3 * 32 * KIB < len(checkpoints) < len(plain) / 500
    for start in (0, 16 * MIB - 1, 30 * MIB, len(plain) - 1):
        found, read = span("gzip", blob, checkpoints, start, start + 1)
        assert found == plain[start : start + 1]
        assert read <= 17 * MIB + inflate.READ_SIZE


@BOTH
def test_a_short_layer_needs_no_checkpoints(compression: str) -> None:
    plain = noise(3 * MIB)
    blob = gzip.compress(plain, 0) if compression == "gzip" else zstd_frames([plain])

    assert inflated(compression, blob)[1] == b""


@pytest.mark.parametrize("writer", ["bgzip", "frames"])
def test_members_and_frames_cost_no_window_and_are_noted_more_often(writer: str) -> None:
    compression, write = WRITERS[writer]
    plain = noise(20 * MIB)
    parts = [plain[at : at + 60_000] for at in range(0, len(plain), 60_000)]
    blob = write(parts)

    _, checkpoints = inflated(compression, blob)

    assert len(checkpoints) == 28 + 19 * 28
    assert (
        span(compression, blob, checkpoints, 19 * MIB, 19 * MIB + 1)[1] < MIB + 60_000 + 2 * inflate.READ_SIZE
    )


def test_a_stream_that_gives_nothing_has_checkpoints_too() -> None:
    """Stored bytes are counted as well: to read past megabytes of empty blocks is work."""
    start = b"\x1f\x8b\x08" + bytes(7)
    stored = b"\0" + struct.pack("<HH", 5, 5 ^ 0xFFFF) + b"hello"
    last = b"\1" + struct.pack("<HH", 5, 5 ^ 0xFFFF) + b"world"
    plain = b"helloworld"
    blob = start + stored + b"\0\0\0\xff\xff" * 200_000 + last + struct.pack("<II", zlib.crc32(plain), 10)

    whole, checkpoints = inflated("gzip", blob, spacing=64 * KIB)

    assert whole == plain
    found, read = span("gzip", blob, checkpoints, 5, 10)
    assert found == b"world"
    assert read < 2 * inflate.READ_SIZE


def test_without_libz_members_are_the_places_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text(300_000)
    one, many = gzip.compress(plain), gzip_members([plain[:150_000], plain[150_000:]])
    monkeypatch.setattr(inflate, "libz", lambda: None)

    assert inflated("gzip", one, spacing=64 * KIB) == (plain, b"")
    whole, checkpoints = inflated("gzip", many, spacing=64 * KIB)
    assert whole == plain
    assert checkpoints
    assert span("gzip", many, checkpoints, 290_000, 290_010)[0] == plain[290_000:290_010]


def test_libz_is_found_here() -> None:
    assert libz() is not None


# ---- what is refused

GZIP = gzip.compress(text(5_000))
ZSTD = zstd_frames([text(5_000)])
BLOCK_TOO_LARGE = (2 << 1 | 1 | 200_000 << 3).to_bytes(3, "little")

REFUSED = {
    "nothing": ("gzip", b"", "cut off"),
    "nothing, zstd": ("zstd", b"", "cut off"),
    "not gzip": ("gzip", ZSTD, "incorrect header check"),
    "not zstd": ("zstd", GZIP, "no zstd frame"),
    "garbage behind": ("gzip", GZIP + b"garbage", "followed by something else.*incorrect header check"),
    "zeros behind": ("gzip", GZIP + bytes(512), "followed by something else"),
    "garbage behind zstd": ("zstd", ZSTD + b"garbage", "at byte [0-9]+ is no zstd frame"),
    "zeros behind zstd": ("zstd", ZSTD + bytes(512), "is no zstd frame"),
    "another method": ("gzip", b"\x1f\x8b\x07" + GZIP[3:], "unknown compression method"),
    "wrong CRC": ("gzip", GZIP[:-8] + b"abcd" + GZIP[-4:], "incorrect data check"),
    "wrong size": ("gzip", GZIP[:-4] + b"abcd", "incorrect length check"),
    "wrong CRC of the first": ("gzip", GZIP[:-8] + b"abcd" + GZIP[-4:] + GZIP, "incorrect data check"),
    "wrong checksum": ("zstd", ZSTD[:-4] + b"abcd", "damaged.*checksum"),
    "reserved bit of a frame": ("zstd", ZSTD[:4] + bytes([ZSTD[4] | 8]) + ZSTD[5:], "damaged"),
    "reserved type of a block": ("zstd", b"\x28\xb5\x2f\xfd\0\0" + b"\x07\0\0", "damaged"),
    "block too large": ("zstd", b"\x28\xb5\x2f\xfd\0\0" + BLOCK_TOO_LARGE + b"x" * 200_000, "damaged"),
    "dictionary": ("zstd", b"\x28\xb5\x2f\xfd\1\0\7" + b"\1\0\0", "dictionary 7"),
    "other size than said": ("zstd", b"\x28\xb5\x2f\xfd\x20\5" + b"\x19\0\0abc", "damaged"),
    "skippable frame cut off": ("zstd", ZSTD + skippable()[:-1], "cut off"),
    "skippable frame of 4 GiB": ("zstd", ZSTD + struct.pack("<II", 0x184D2A50, 2**32 - 1), "cut off"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_is_not_what_it_says_is_refused(case: str) -> None:
    compression, blob, words = REFUSED[case]

    refused(compression, blob, words)


@pytest.mark.parametrize("case", REFUSED)
def test_the_same_is_refused_without_libz(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "libz", lambda: None)

    refused(*REFUSED[case])


@pytest.mark.parametrize("writer", ["members", "flushed member", "frames", "skippable frames"])
def test_L_23_a_stream_that_is_cut_off_anywhere_is_refused(writer: str) -> None:
    compression, write = WRITERS[writer]
    first = write([text(700)])
    blob = first + write([noise(300)])

    for size in set(range(len(blob))) - {len(first)}:
        # Where only a skippable frame is missing, nothing is.
        if writer != "skippable frames" or size not in boundaries_of(blob):
            refused(compression, blob[:size], "cut off")


def boundaries_of(blob: bytes) -> set[int]:
    """Where the zstd frames of `blob` end."""
    found, position = set(), 0
    while position < len(blob):
        if blob[position : position + 4] == zstandard.FRAME_HEADER:
            stream = zstandard.ZstdDecompressor().decompressobj()
            stream.decompress(blob[position:])
            position = len(blob) - len(stream.unused_data)
        else:
            position += 8 + int.from_bytes(blob[position + 4 : position + 8], "little")
        found.add(position)
    return found


@given(st.sampled_from(["members", "flushed member", "bgzip", "frames"]), st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(writer: str, data: st.DataObject) -> None:
    compression, write = WRITERS[writer]
    parts = [text(700), noise(300), bytes(2_000)]
    blob = bytearray(write(parts))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    try:
        whole, _ = inflated(compression, bytes(blob), spacing=500)
    except InflateFailed:
        return

    assert whole == b"".join(parts)


@given(st.sampled_from(["gzip", "zstd"]), st.binary(max_size=200), st.booleans())
def test_any_bytes_are_inflated_or_refused(compression: str, content: bytes, has_magic: bool) -> None:
    magic = b"\x1f\x8b\x08\0" if compression == "gzip" else zstandard.FRAME_HEADER
    blob = magic + content if has_magic else content
    for work in (
        lambda: inflated(compression, blob, spacing=10),
        lambda: span(compression, blob, b"", 0, 100),
    ):
        try:
            work()
        except InflateFailed:
            continue


@BOTH
def test_a_store_that_gives_less_than_the_blob_is_no_fault_of_the_blob(compression: str) -> None:
    blob = GZIP if compression == "gzip" else ZSTD
    inflation = Inflation(
        compression, lambda offset, size: blob[offset:-5][:size], len(blob), limits=InflateLimits()
    )

    with pytest.raises(StorageUnavailable, match=f"should have {len(blob)}"):
        list(inflation.pieces())


# ---- limits


@BOTH
def test_T_30_more_than_a_layer_may_be_is_refused(compression: str) -> None:
    blob = WRITERS["one member" if compression == "gzip" else "one frame"][1]([noise(100_000)])

    assert len(inflated(compression, blob, inflated_size_max=100_000)[0]) == 100_000
    refused(compression, blob, "more than 99999 bytes", inflated_size_max=99_999)


@BOTH
def test_T_30_a_bomb_stops_at_the_ratio(compression: str) -> None:
    blob = WRITERS["one member" if compression == "gzip" else "one frame"][1]([bytes(5 * MIB)])

    assert inflated(compression, blob)[0] == bytes(5 * MIB)
    refused(compression, blob, "200 times as many", ratio_free_size=4 * MIB)


def test_the_ratio_is_of_the_whole_and_not_of_its_beginning() -> None:
    plain = bytes(5 * MIB) + noise(400_000)

    assert inflated("gzip", gzip.compress(plain), ratio_free_size=MIB, ratio_max=14)[0] == plain


@pytest.mark.parametrize("libz_is_there", [True, False])
@BOTH
def test_L_23_too_many_members_or_frames_are_refused(
    compression: str, libz_is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not libz_is_there:
        monkeypatch.setattr(inflate, "libz", lambda: None)
    write = gzip_members if compression == "gzip" else zstd_frames
    blob = write([b"x"] * 50)

    assert inflated(compression, blob, part_count_max=50)[0] == b"x" * 50
    refused(compression, blob, "more than 49", part_count_max=49)


def test_skippable_frames_are_counted() -> None:
    refused("zstd", skippable(b"") * 50 + ZSTD, "more than 50", part_count_max=50)


def test_bgzip_of_64_gib_has_fewer_members_than_are_allowed() -> None:
    limits = InflateLimits()

    assert limits.inflated_size_max / 0xFF00 < limits.part_count_max


def test_too_many_zstd_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "_ZSTD_BLOCK_COUNT_MAX", 1000)
    blob = zstandard.FRAME_HEADER + b"\0\0" + bytes(3) * 1000 + b"\1\0\0"

    refused("zstd", blob, "more than 1000 blocks")


def test_L_23_a_window_beyond_128_mib_is_refused() -> None:
    for window_log, is_refused in ((27, False), (28, True)):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        blob = stream.compress(b"x") + stream.flush()
        if is_refused:
            refused("zstd", blob, f"a window of {2**28} bytes")
        else:
            assert inflated("zstd", blob)[0] == b"x"


def one_block(size: int) -> bytes:
    """A member with zeros in a single block of fixed codes: 8 bits each, as RFC 1951, 3.2.6 has them."""
    bits = 0b011 | int.from_bytes(b"\x0c" * size, "little") << 3
    body = bits.to_bytes(size + 2, "little")
    return gzip.compress(b"")[:10] + body + struct.pack("<II", zlib.crc32(bytes(size)), size)


def test_a_block_without_end_is_read_from_its_beginning() -> None:
    plain = bytes(2 * MIB) + noise(100_000)
    blob = one_block(2 * MIB) + gzip.compress(plain[2 * MIB :])

    whole, checkpoints = inflated("gzip", blob, spacing=50_000)

    assert whole == plain
    assert span("gzip", blob, checkpoints, 2 * MIB - 5, 2 * MIB + 5)[0] == bytes(5) + plain[2 * MIB :][:5]


def test_a_long_header_is_read() -> None:
    blob = b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * MIB + b"\0" + GZIP[10:]

    assert inflated("gzip", blob, spacing=50_000)[0] == text(5_000)


@BOTH
def test_T_30_a_bomb_takes_no_memory(compression: str) -> None:
    size = 256 * MIB
    if compression == "gzip":
        stream = zlib.compressobj(9, wbits=31)
    else:
        stream = zstandard.ZstdCompressor().compressobj()
    blob = b"".join(stream.compress(bytes(MIB)) for _ in range(256)) + stream.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inflation = Inflation(
        compression, Stored(blob).read_at, len(blob), limits=InflateLimits(ratio_max=100_000)
    )

    assert sum(map(len, checked_pieces(inflation.pieces()))) == size
    pieces = inflated_span(
        compression, Stored(blob).read_at, len(blob), inflation.checkpoints(), size - 1, size
    )
    assert b"".join(pieces) == b"\0"

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * KIB


# ---- checkpoints that are not right

PLAIN = noise(150_000) + text(150_000)
BLOB = gzip.compress(PLAIN)
CHECKPOINTS = inflated("gzip", BLOB, spacing=50_000)[1]
assert len(CHECKPOINTS) > 32_000


@given(st.integers(0, len(CHECKPOINTS) - 1), st.integers(0, 7), st.integers(0, len(PLAIN) - 10))
@settings(max_examples=300)
def test_damaged_checkpoints_are_refused_or_not_needed(at: int, bit: int, start: int) -> None:
    damaged = bytearray(CHECKPOINTS)
    damaged[at] ^= 1 << bit

    try:
        found, _ = span("gzip", BLOB, bytes(damaged), start, start + 10)
    except CheckpointsInvalid:
        return

    assert found == PLAIN[start : start + 10]


def test_checkpoints_that_are_cut_off_are_refused_or_not_needed() -> None:
    for size in range(1, len(CHECKPOINTS), 1009):
        try:
            assert span("gzip", BLOB, CHECKPOINTS[:size], 10, 20)[0] == PLAIN[10:20]
        except CheckpointsInvalid:
            assert size < 1000


@pytest.mark.parametrize(
    ("compression", "size", "checkpoints", "words"),
    [
        ("gzip", len(BLOB) - 1, CHECKPOINTS, f"of {len(BLOB)} bytes"),
        ("zstd", len(BLOB), CHECKPOINTS, "not of .* zstd"),
        ("gzip", len(BLOB), b"x", "too few"),
        ("gzip", len(BLOB), b"x" * 100, "version 1"),
        ("gzip", len(BLOB), CHECKPOINTS[:4] + b"\2" + CHECKPOINTS[5:], "version 1"),
    ],
)
def test_checkpoints_of_something_else_are_refused(
    compression: str, size: int, checkpoints: bytes, words: str
) -> None:
    with pytest.raises(CheckpointsInvalid, match=words):
        list(inflated_span(compression, Stored(BLOB).read_at, size, checkpoints, 10, 20))


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        (Checkpoint(5, len(BLOB) * 8 + 1), "is at bit"),
        (Checkpoint(5, 8, bytes(32 * KIB + 1)), "too large"),
        (Checkpoint(5, 8, bytes(10**8)), "too large"),
    ],
    ids=["behind the end", "window", "bomb"],
)
def test_checkpoints_that_cannot_be_are_refused(forged: Checkpoint, words: str) -> None:
    writer = CheckpointWriter("gzip", len(BLOB))
    writer.add(forged)

    with pytest.raises(CheckpointsInvalid, match=words):
        span("gzip", BLOB, writer.packed(), 10, 20)


HOSTILE = st.lists(
    st.builds(
        Checkpoint,
        st.integers(0, 2**64 - 1) | st.integers(0, 400_000),
        st.integers(0, 2**64 - 1) | st.integers(0, len(BLOB) * 8 + 8),
        st.none() | st.binary(max_size=300) | st.sampled_from([bytes(32_768), bytes(32_769), bytes(10**6)]),
    ),
    min_size=1,
    max_size=4,
)


@given(st.sampled_from(["gzip", "zstd"]), HOSTILE, st.integers(0, 400_000), st.integers(0, 1000))
@settings(max_examples=300)
def test_forged_checkpoints_give_as_many_bytes_as_were_asked_for_or_an_error(
    compression: str, forged: list[Checkpoint], start: int, size: int
) -> None:
    """With every checksum right: whoever can write to the store. They can make bytes wrong, and nothing else."""
    blob = BLOB if compression == "gzip" else zstd_frames([PLAIN[:9_000]] * 10)
    writer = CheckpointWriter(compression, len(blob))
    for checkpoint in forged:
        writer.add(checkpoint)

    try:
        found, _ = span(compression, blob, writer.packed(), start, start + size)
    except (CheckpointsInvalid, InflateFailed):
        return

    assert len(found) == size


def test_checkpoints_are_the_same_bytes_on_every_machine() -> None:
    """Version 1, byte for byte: a registry after an upgrade, or beside this one, reads what this one wrote."""
    writer = CheckpointWriter("gzip", 1000)
    writer.add(Checkpoint(5_000, 801, b"w" * 10))
    writer.add(Checkpoint(9_000, 4_000))

    packed = writer.packed()

    window = zlib.compress(b"w" * 10)
    assert packed[:24] == b"MKCP\1gzip\0\0\0" + struct.pack("<QI", 1000, 2)
    assert (
        packed[28:]
        == struct.pack("<QQQIQQQI", 5_000, 801, 84, len(window), 9_000, 4_000, 84 + len(window), 0) + window
    )
    assert list(itertools.islice(packed, 24, 28)) == list(
        struct.pack("<I", zlib.crc32(packed[:24] + packed[28:84]))
    )
