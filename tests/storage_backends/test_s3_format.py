"""What objects in a bucket look like: whatever is written is read again, and a listing's sizes tell enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_backends.interface import Span
from storage_backends.s3_client import Part
from storage_backends.s3_format import (
    POINTER,
    POINTER_STEP,
    TAIL_SIZE,
    Malformed,
    Segment,
    Tail,
    Target,
    UploadState,
    data_id,
    data_key,
    mark_of_data,
    may_be_pointer,
    new_data_key,
    pieces_of,
    pointer_from_bytes,
    pointer_to_bytes,
    record_to_bytes,
    renewed,
    trash_from_bytes,
    trash_to_bytes,
    upload_mark,
)
from storage_backends.s3_parts import MEMORY_MAX, PART_COUNT_MAX, PART_SIZE_MIN, in_flight_max, part_size_of

sizes = st.integers(0, 5 * 1024**4)
data_keys = st.binary(min_size=32, max_size=32).map(data_key)
segments = st.lists(st.builds(Segment, data_keys, sizes, st.text("0123456789abcdef-", max_size=70)))
parts = st.lists(st.builds(Part, st.integers(1, PART_COUNT_MAX), sizes, st.just('"etag"'))).map(tuple)
targets = st.lists(st.builds(Target, data_keys, st.just("id"), st.integers(1, PART_COUNT_MAX), parts))
states = st.builds(
    UploadState,
    note=st.binary(max_size=99),
    segments=segments.map(tuple),
    targets=targets.map(tuple),
    rest=st.binary(max_size=99),
    is_sealed=st.booleans(),
    is_closing=st.booleans(),
    is_aborted=st.booleans(),
)


@given(st.binary(max_size=2000))
def test_a_record_is_its_bytes_and_a_tail_that_tells_their_size(content: bytes) -> None:
    stored, nonce = record_to_bytes(content)

    tail = Tail.from_bytes(stored)

    assert stored[:-TAIL_SIZE] == content
    assert (tail.size, tail.nonce) == (len(content), nonce)


def test_the_same_record_written_twice_is_two_objects() -> None:
    assert record_to_bytes(b"same")[0] != record_to_bytes(b"same")[0]


@given(segments)
def test_a_pointer_is_known_by_its_size_and_tells_that_of_the_content(listed: list[Segment]) -> None:
    stored, _ = pointer_to_bytes(listed)

    tail = Tail.from_bytes(stored)

    assert may_be_pointer(len(stored))
    assert (tail.kind, tail.size) == (POINTER, sum(segment.size for segment in listed))
    assert pointer_from_bytes(stored) == tuple(listed)


@given(segments)
def test_what_was_renewed_is_the_same_and_yet_another_object(listed: list[Segment]) -> None:
    stored, nonce = pointer_to_bytes(listed)

    again, other_nonce = renewed(stored)

    assert len(again) == len(stored)
    assert again[:-TAIL_SIZE] == stored[:-TAIL_SIZE]
    before, after = Tail.from_bytes(stored), Tail.from_bytes(again)
    assert (before.kind, before.size, before.nonce) == (after.kind, after.size, nonce)
    assert after.nonce == other_nonce != nonce


@given(segments)
def test_what_is_in_the_trash_is_told_as_it_was_put_there(listed: list[Segment]) -> None:
    assert trash_from_bytes(trash_to_bytes(listed)[0]) == tuple(data_id(segment.key) for segment in listed)


DECODERS = [pointer_from_bytes, trash_from_bytes, UploadState.from_bytes]


@pytest.mark.parametrize("decode", DECODERS)
@given(
    stored=st.one_of(
        st.binary(max_size=100), st.binary(max_size=100).map(lambda own: record_to_bytes(own)[0])
    )
)
def test_what_is_not_ours_is_malformed_and_nothing_else(
    decode: Callable[[bytes], object], stored: bytes
) -> None:
    with pytest.raises(Malformed):
        decode(stored)


@given(segments=segments.filter(bool), place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_bit_that_flips_in_a_pointer_changes_no_size_unseen(
    segments: list[Segment], place: int, bit: int
) -> None:
    stored = bytearray(pointer_to_bytes(segments)[0])
    stored[place % (len(stored) - TAIL_SIZE)] ^= 1 << bit

    try:
        read = pointer_from_bytes(bytes(stored))
    except Malformed:
        return

    assert len(read) == len(segments)
    assert all(data_id(segment.key) is not None for segment in read)
    assert sum(segment.size for segment in read) == sum(segment.size for segment in segments)


@given(st.text("abc-_0", min_size=1, max_size=64))
def test_a_data_key_is_new_and_tells_the_upload_that_it_is_of(upload_id: str) -> None:
    key = new_data_key(upload_id)

    assert key != new_data_key(upload_id)
    found = data_id(key)
    assert found is not None
    assert (len(found), data_key(found)) == (32, key)
    assert mark_of_data(found) == upload_mark(upload_id)
    assert mark_of_data(found) != upload_mark(upload_id + "x")


@pytest.mark.parametrize(
    "key",
    [
        "_store/data/ab/ab",
        "_store/data/ab/" + "0" * 64,
        "_store/data/ab/ab" + "0" * 61,
        "_store/data/ab/ab" + "0" * 63,
        "_store/data/AB/AB" + "0" * 62,
        "_store/data/ab" + "0" * 62,
        "_store/trash/ab/ab" + "0" * 62,
        "x_store/data/ab/ab" + "0" * 62,
        "_store/data/ab/ab" + "0" * 62 + "/x",
    ],
)
def test_another_key_is_not_that_of_data(key: str) -> None:
    assert data_id(key) is None


def test_a_pointer_to_one_object_is_read_with_its_tail_in_one_request() -> None:
    stored, _ = pointer_to_bytes([Segment(new_data_key("u"), 5 * 1024**4, "0" * 64 + "-10000")])

    assert len(stored) == POINTER_STEP


@given(states)
def test_the_state_of_an_upload_is_read_as_it_was_written(state: UploadState) -> None:
    stored, _ = state.to_bytes()

    assert UploadState.from_bytes(stored) == state
    assert Tail.from_bytes(stored).size == state.offset


@given(st.binary(max_size=100))
def test_what_others_wrote_is_refused(stored: bytes) -> None:
    with pytest.raises(Malformed):
        Tail.from_bytes(stored)


@given(st.lists(st.binary(max_size=9)), st.integers(0, 99), st.integers(0, 99))
def test_the_pieces_of_a_span_are_the_span(contents: list[bytes], start: int, length: int) -> None:
    whole = b"".join(contents)
    span = Span(min(start, len(whole)), min(start + length, len(whole)))
    listed = [Segment(str(index), len(content), "") for index, content in enumerate(contents)]

    pieces = list(pieces_of(listed, span))

    assert all(piece.start < piece.stop for _, piece in pieces)
    read = [contents[int(segment.key)][piece.start : piece.stop] for segment, piece in pieces]
    assert b"".join(read) == whole[span.start : span.stop]


@pytest.mark.parametrize("first_size", [PART_SIZE_MIN, 10 * 1024**2, 16 * 1024**2, 32 * 1024**2])
def test_parts_grow_and_keep_to_the_memory_of_an_upload(first_size: int) -> None:
    made = [part_size_of(number, first_size) for number in range(1, PART_COUNT_MAX + 1)]

    assert made == sorted(made)
    assert made[0] == first_size
    assert all((in_flight_max(size) + 1) * size <= MEMORY_MAX for size in set(made))
    assert sum(made) >= 190 * 1024**3
