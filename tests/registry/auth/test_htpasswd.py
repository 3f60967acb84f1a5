"""The file of users, and what a check of a password costs."""

import contextlib

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.auth import htpasswd as module
from registry.auth.htpasswd import NOBODY, HtpasswdInvalid, parse_htpasswd
from tests.registry.auth.logins import htpasswd

HASH = bcrypt.hashpw(b"secret", bcrypt.gensalt(4))


def test_a_file_of_htpasswd_is_read() -> None:
    users = parse_htpasswd(b"# people\n\n" + htpasswd({"alice": "secret", "zo\xeb": "p\xe4ss"}) + b"\r\n")

    assert set(users.hashes) == {"alice", "zo\xeb"}
    assert users.is_password("alice", b"secret")
    assert users.is_password("zo\xeb", "p\xe4ss".encode())
    assert not users.is_password("alice", b"Secret")
    assert not users.is_password("bob", b"secret")


@pytest.mark.parametrize("prefix", [b"$2a$", b"$2b$", b"$2y$"])
def test_every_prefix_of_bcrypt_is_taken(prefix: bytes) -> None:
    assert parse_htpasswd(b"alice:" + prefix + HASH[4:]).is_password("alice", b"secret")


def test_A_21_an_empty_file_is_nobody() -> None:
    assert parse_htpasswd(b"").hashes == {}
    assert not NOBODY.is_password("", b"")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"alice", "no colon"),
        (b":" + HASH, "a name has"),
        (b"a\x01b:" + HASH, "a name has"),
        (b"\xff:" + HASH, "not UTF-8"),
        (b"x" * 256 + b":" + HASH, "a name has"),
        (b"alice:secret", "not a bcrypt hash"),
        (b"alice:$apr1$abcdefgh$ijklmnopqrstuvwxyz012", "not a bcrypt hash"),
        (b"alice:{SHA}0DPiKuNIrrVmD8IUCuw1hQxNqZc=", "not a bcrypt hash"),
        (b"alice:$2x$" + HASH[4:], "not a bcrypt hash"),
        (b"alice:" + HASH + b":more", "not a bcrypt hash"),
        (b"alice:" + HASH[:-1], "not a bcrypt hash"),
        (b"alice:$2b$31$" + HASH[7:], "a cost of 31"),
        (b"alice:$2b$16$" + HASH[7:], "a cost of 16"),
    ],
    ids=range(13),  # the hash is another one each time
)
def test_A_21_a_line_that_cannot_be_meant_is_refused_by_its_number(line: bytes, said: str) -> None:
    with pytest.raises(HtpasswdInvalid, match=f"line 2: .*{said}") as caught:
        parse_htpasswd(b"bob:" + HASH + b"\n" + line)

    assert "secret" not in str(caught.value)
    assert HASH.decode()[7:] not in str(caught.value)


def test_a_user_who_stands_twice_is_refused() -> None:
    with pytest.raises(HtpasswdInvalid, match=r"line 2: .*already"):
        parse_htpasswd(b"alice:" + HASH + b"\nalice:" + HASH)


@given(st.binary(max_size=300))
def test_any_content_is_users_or_refused(content: bytes) -> None:
    with contextlib.suppress(HtpasswdInvalid):
        parse_htpasswd(content)


@pytest.mark.parametrize("size", [72, 73, 1000, 1024 * 1024])
def test_A_04_a_password_that_bcrypt_would_cut_is_wrong_and_no_error(size: int) -> None:
    users = parse_htpasswd(htpasswd({"alice": "x" * 72}))

    assert users.is_password("alice", b"x" * size) == (size == 72)


def test_A_04_another_normal_form_is_another_password() -> None:
    users = parse_htpasswd(htpasswd({"alice": "pa\xe4ss"}))

    assert users.is_password("alice", "pa\xe4ss".encode())
    assert not users.is_password("alice", "paa\u0308ss".encode())


@pytest.mark.parametrize("name", ["cheap", "dear", "unknown"])
def test_A_24_a_wrong_password_costs_the_same_whoever_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = htpasswd({"cheap": "a"}, cost=4) + htpasswd({"dear": "b"}, cost=7)
    users = parse_htpasswd(content)
    rounds = 0
    really = bcrypt.checkpw

    def counted(password: bytes, stored: bytes) -> bool:
        nonlocal rounds
        rounds += 2 ** int(stored[4:6])
        return really(password, stored)

    monkeypatch.setattr(module.bcrypt, "checkpw", counted)

    assert not users.is_password(name, b"wrong")
    assert rounds == 2**7


def test_A_24_a_right_password_is_not_made_to_wait_for_the_dearest() -> None:
    users = parse_htpasswd(htpasswd({"cheap": "a"}, cost=4) + htpasswd({"dear": "b"}, cost=5))

    assert users.is_password("cheap", b"a")


def test_a_version_changes_with_the_password_and_tells_nothing_of_it() -> None:
    first = parse_htpasswd(htpasswd({"alice": "a", "bob": "a"}))
    second = parse_htpasswd(htpasswd({"alice": "a"}))

    assert first.version_of("alice") == first.version_of("alice")
    assert first.version_of("alice") not in {first.version_of("bob"), second.version_of("alice"), None}
    assert first.version_of("nobody") is None
    assert first.hashes["alice"].decode()[7:] not in str(first.version_of("alice"))
