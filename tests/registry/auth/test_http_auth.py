"""`Authorization` and `WWW-Authenticate`: what is taken, and what is refused without an error of ours."""

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import Unauthorized
from kitspec.http_fields import parse_challenges
from registry.auth.http_auth import (
    BasicCredentials,
    BearerToken,
    format_challenge,
    format_scope,
    parse_authorization,
)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_no_field_is_no_credentials() -> None:
    assert parse_authorization([]) is None


def test_neither_a_name_nor_a_password_is_no_credentials() -> None:
    assert parse_authorization([f"Basic {encoded(b':')}"]) is None


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("spaces", [" ", "  "])
def test_A_02_the_scheme_is_not_case_sensitive(scheme: str, spaces: str) -> None:
    assert parse_authorization([f"{scheme}{spaces}abc.def"]) == BearerToken("abc.def")


@pytest.mark.parametrize(
    "field",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer\tabc",
        "Bearer a b",
        "Bearer a,b",
        " Bearer abc",
        "Bearer abc ",
        "Bearer abc\n",
        "Bearer é",
        'Bearer "abc"',
        "Basic",
        "Basic ",
        "Negotiate abc",
        "Digest username=x",
        "Bearer=abc",
        "Bearer =",
        f"Bearer {'x' * 70_000}",
        f"{'b' * 10_000} abc",
    ],
)
def test_A_02_what_is_malformed_is_refused(field: str) -> None:
    with pytest.raises(Unauthorized):
        parse_authorization([field])


def test_A_02_two_fields_are_refused() -> None:
    with pytest.raises(Unauthorized, match="2 Authorization fields"):
        parse_authorization(["Bearer a", "Bearer b"])


@pytest.mark.parametrize(
    ("content", "user", "password"),
    [
        (b"alice:secret", "alice", b"secret"),
        (b"alice:", "alice", b""),
        (b"alice:a:b:c", "alice", b"a:b:c"),
        ("zoë:pässword".encode(), "zoë", "pässword".encode()),
        (b"alice:p\xe4ss", "alice", b"p\xe4ss"),
        (b"alice:" + b"x" * 73, "alice", b"x" * 73),
    ],
)
def test_A_04_a_password_is_all_that_is_behind_the_first_colon(
    content: bytes, user: str, password: bytes
) -> None:
    assert parse_authorization([f"Basic {encoded(content)}"]) == BasicCredentials(user, password)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"alice",
        b":secret",
        b"\xe4lice:secret",
        b"alice\0:secret",
        b"alice:sec\0ret",
        b"alice:sec\nret",
        b"al\x7fice:secret",
        b"x" * 256 + b":secret",
    ],
)
def test_A_04_what_nobody_can_be_called_is_refused(content: bytes) -> None:
    with pytest.raises(Unauthorized):
        parse_authorization([f"Basic {encoded(content)}"])


@pytest.mark.parametrize(
    "token68", ["YWxpY2U6c2VjcmV0=", "YWxpY2U6c2VjcmV0===", "a", "YWxp-2U6c2VjcmV0", "="]
)
def test_A_04_what_is_not_base64_is_refused(token68: str) -> None:
    with pytest.raises(Unauthorized):
        parse_authorization([f"Basic {token68}"])


@given(st.text(max_size=200))
def test_any_field_is_credentials_or_refused(field: str) -> None:
    with contextlib.suppress(Unauthorized):
        parse_authorization([field])


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=":"), min_size=1, max_size=40),
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=100),
)
def test_name_and_password_arrive_as_they_were_sent(user: str, password: str) -> None:
    field = f"Basic {encoded(f'{user}:{password}'.encode())}"

    assert parse_authorization([field]) == BasicCredentials(user, password.encode())


def test_V_15_credentials_do_not_show_themselves() -> None:
    shown = f"{BasicCredentials('alice', b'hunter2')!r} {BearerToken('eyJhbGciOi')!r}"

    assert "hunter2" not in shown
    assert "eyJhbGciOi" not in shown


@pytest.mark.parametrize("byte", [*range(0x20), 0x22, 0x5C, *range(0x7F, 0x100)])
def test_A_39_nothing_in_a_challenge_needs_an_escape(byte: int) -> None:
    with pytest.raises(ValueError, match="cannot stand in a challenge"):
        format_challenge("Bearer", realm="https://reg.example", scope=f"a{chr(byte)}b")


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters='"\\'), max_size=80))
def test_A_39_a_challenge_parses_back_to_what_it_was_made_of(text: str) -> None:
    (challenge,) = parse_challenges(
        format_challenge("Bearer", realm="https://reg.example/v2/token", scope=text)
    )

    assert challenge.scheme == "bearer"
    assert challenge.parameters == {"realm": "https://reg.example/v2/token", "scope": text}


def test_several_scopes_stand_in_one_parameter() -> None:
    scope = [("repository", "a/b", ("pull", "push")), ("registry", "catalog", ("*",))]

    assert format_scope(scope) == "repository:a/b:pull,push registry:catalog:*"
