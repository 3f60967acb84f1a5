"""A-23: what was right is remembered for a while, without itself, and never longer than it is right."""

import gc

import pytest

from registry.auth.credential_memo import AGE_MAX_S, ENTRIES_MAX, CredentialMemo
from registry.auth.http_auth import BasicCredentials, BearerToken
from registry.auth.login import Login
from tests.clock import Clock

ALICE = BasicCredentials("alice", b"secret")


@pytest.fixture
def memo(clock: Clock) -> CredentialMemo:
    return CredentialMemo(clock)


def test_A_23_what_was_right_is_known_for_five_minutes(memo: CredentialMemo, clock: Clock) -> None:
    key = memo.key_of(ALICE)
    memo.keep(key, Login("alice"), age_s=3600)

    clock.now += AGE_MAX_S - 1
    assert memo.find(key) == Login("alice")
    clock.now += 1
    assert memo.find(key) is None
    assert AGE_MAX_S <= 300


def test_A_23_what_is_not_current_any_more_is_forgotten_at_once(memo: CredentialMemo) -> None:
    is_current = True
    key = memo.key_of(ALICE)
    memo.keep(key, Login("alice", is_current=lambda: is_current))
    assert memo.find(key) is not None

    is_current = False
    assert memo.find(key) is None

    is_current = True
    assert memo.find(key) is None


def test_a_login_is_not_known_beyond_its_end(memo: CredentialMemo, clock: Clock) -> None:
    key = memo.key_of(ALICE)
    memo.keep(key, Login("alice", expires=clock.now + 10))

    clock.now += 9
    assert memo.find(key) is not None
    clock.now += 1
    assert memo.find(key) is None


def test_A_23_as_many_are_known_as_are_allowed_and_the_oldest_go(memo: CredentialMemo) -> None:
    for number in range(ENTRIES_MAX + 1):
        memo.keep(b"%d" % number, Login(f"user{number}"))

    assert memo.find(b"0") is None
    assert memo.find(b"1") is not None
    assert memo.find(b"%d" % ENTRIES_MAX) is not None


@pytest.mark.parametrize(
    "other",
    [
        BasicCredentials("alice", b"secre"),
        BasicCredentials("alic", b"esecret"),
        BasicCredentials("bob", b"secret"),
        BearerToken("alice:secret"),
        BearerToken("secret"),
    ],
    ids=["shorter", "moved", "another", "whole", "password"],
)
def test_other_credentials_have_another_key(
    memo: CredentialMemo, other: BasicCredentials | BearerToken
) -> None:
    assert memo.key_of(other) != memo.key_of(ALICE)


def test_another_process_has_another_key(memo: CredentialMemo) -> None:
    assert CredentialMemo().key_of(ALICE) != memo.key_of(ALICE)


def test_A_23_V_15_memory_holds_no_password_and_no_token(memo: CredentialMemo) -> None:
    password, token = b"canary-password-5f1c", "canary-token-77aa"
    for credentials in (BasicCredentials("alice", password), BearerToken(token)):
        memo.keep(memo.key_of(credentials), Login("alice"))
    del credentials

    reached: list[object] = [memo]
    seen: set[int] = set()
    while reached:
        item = reached.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        assert "canary" not in repr(item) if isinstance(item, str | bytes) else True
        if isinstance(item, dict | list | tuple | CredentialMemo | Login):
            reached += gc.get_referents(item)
