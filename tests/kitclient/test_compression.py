"""zstd layers that we pack can be read from the middle, and by everybody."""

from __future__ import annotations

import random
import shutil
import subprocess
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kitclient import compression
from kitclient.compression import deflater, inflater

FRAME_SIZE = 8 * 1024 * 1024


def packed(*pieces: bytes) -> bytes:
    stream = deflater("zstd")
    assert stream is not None
    return b"".join([*map(stream.compress, pieces), stream.flush()])


def unpacked(blob: bytes) -> bytes:
    reader = inflater("zstd")
    plain = b"".join(reader.pieces(blob))
    reader.end()
    return plain


def frames_of(blob: bytes) -> list[int]:
    """What each frame inflates to, in bytes."""
    sizes = []
    while blob:
        stream = zstandard.ZstdDecompressor().decompressobj()
        sizes.append(len(stream.decompress(blob)))
        assert stream.eof
        blob = stream.unused_data
    return sizes


def noise(size: int) -> bytes:
    return random.Random(1).randbytes(size)


@pytest.mark.parametrize(
    ("size", "frames"),
    [
        (0, [0]),
        (1, [1]),
        (FRAME_SIZE, [FRAME_SIZE]),
        (FRAME_SIZE + 1, [FRAME_SIZE, 1]),
        (2 * FRAME_SIZE, [FRAME_SIZE] * 2),
        (20_000_000, [FRAME_SIZE, FRAME_SIZE, 20_000_000 - 2 * FRAME_SIZE]),
    ],
)
def test_a_frame_ends_every_8_mib_and_none_is_empty(size: int, frames: list[int]) -> None:
    blob = packed(noise(size))

    assert frames_of(blob) == frames
    assert unpacked(blob) == noise(size)


@given(st.integers(0, 5_000), st.lists(st.integers(0, 5_000)))
def test_any_cutting_into_pieces_gives_the_same_blob(size: int, cuts: list[int]) -> None:
    plain = noise(size)[: size // 2].hex().encode()
    edges = [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_ZSTD_FRAME_SIZE", 1000)
        pieces = [plain[start:stop] for start, stop in pairwise(edges)]

        assert packed(*pieces) == packed(plain)
        assert unpacked(packed(*pieces)) == plain


def test_pieces_of_another_size_give_the_same_blob_over_many_frames() -> None:
    plain = noise(3_000_000).hex().encode() * 3

    assert packed(*(plain[at : at + 999_983] for at in range(0, len(plain), 999_983))) == packed(plain)


def test_every_frame_has_a_checksum() -> None:
    blob = packed(noise(FRAME_SIZE + 10))
    second = blob.rindex(zstandard.FRAME_HEADER)

    assert zstandard.get_frame_parameters(blob).has_checksum
    assert zstandard.get_frame_parameters(blob[second:]).has_checksum


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not here")
def test_zstd_itself_reads_what_we_pack() -> None:
    plain = noise(FRAME_SIZE) + b"x" * 1000

    done = subprocess.run(["zstd", "-d", "-c"], input=packed(plain), capture_output=True, check=True)

    assert done.stdout == plain


def test_skippable_frames_are_passed_over() -> None:
    skippable = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"

    assert unpacked(skippable + packed(b"a") + skippable + packed(b"b") + skippable) == b"ab"
