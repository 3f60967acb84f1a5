"""A hash whose state is kept gives what hashlib gives."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import hash_state


def kept(hasher: hash_state.Hasher) -> bytes:
    assert isinstance(hasher, hash_state.KeepableSha256)
    return hasher.keep()


def test_libcrypto_is_found_and_passes_its_self_test() -> None:
    assert hash_state.load()


@given(st.lists(st.binary(max_size=200)))
def test_any_cutting_with_the_state_kept_at_each_cut_gives_the_same_hash(pieces: list[bytes]) -> None:
    hasher = hash_state.begin("sha256")
    for piece in pieces:
        hasher.update(piece)
        taken_up = hash_state.take_up(kept(hasher))
        assert taken_up is not None
        hasher = taken_up

    assert hasher.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_the_hash_so_far_can_be_asked_and_more_can_follow() -> None:
    hasher = hash_state.begin("sha256")
    hasher.update(b"a")

    assert hasher.hexdigest() == hashlib.sha256(b"a").hexdigest()
    hasher.update(b"b")
    assert hasher.hexdigest() == hashlib.sha256(b"ab").hexdigest()


def test_a_count_of_more_than_32_bits_is_kept() -> None:
    """2**29 bytes are 2**32 bits, where the low word of the count ends."""
    hasher, plain = hash_state.begin("sha256"), hashlib.sha256()
    piece = bytes(1 << 20)
    for _ in range(513):
        hasher.update(piece)
        plain.update(piece)

    taken_up = hash_state.take_up(kept(hasher))

    assert taken_up is not None
    assert taken_up.hexdigest() == plain.hexdigest()


@pytest.mark.parametrize("state", [b"", b"\x01", b"\x02" + bytes(112), b"\x01" + bytes(200)], ids=len)
def test_a_state_that_is_not_ours_is_not_taken_up(state: bytes) -> None:
    assert hash_state.take_up(state) is None


def test_sha512_is_hashed_but_not_kept() -> None:
    hasher = hash_state.begin("sha512")
    hasher.update(b"x")

    assert hasher.hexdigest() == hashlib.sha512(b"x").hexdigest()
    assert not isinstance(hasher, hash_state.KeepableSha256)
