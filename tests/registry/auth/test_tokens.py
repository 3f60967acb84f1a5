"""Tokens: only what is signed, whole, for this registry and of now is believed."""

import base64
import contextlib
import json
import subprocess
import sys
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from registry.auth.identity import Grant
from registry.auth.tokens import (
    Claims,
    Rules,
    TokenInvalid,
    grants_of,
    parse_token,
    sign_token,
    verify_token,
)
from registry.auth.verification_keys import VerificationKey, verification_key
from tests.registry.auth.logins import ISSUER, SERVICE

NOW = 1_800_000_000.0
KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = verification_key(KEY.public_key())
ALL = frozenset({"ES256", "ES384", "ES512", "RS256", "PS256", "EdDSA"})
RULES = Rules(ISSUER, frozenset({SERVICE}), ALL)
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "sub": "alice",
    "aud": SERVICE,
    "iat": NOW - 10,
    "nbf": NOW - 10,
    "exp": NOW + 290,
}


def part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed(
    header: dict[str, Any] | bytes, claims: dict[str, Any] | bytes | None = None, key: Any = KEY
) -> str:
    """A token with exactly this header and these claims, signed as ES256 would be."""
    parts = [
        part(document if isinstance(document, bytes) else json.dumps(document).encode())
        for document in (header, CLAIMS if claims is None else claims)
    ]
    message = ".".join(parts)
    return f"{message}.{part(jwt.PyJWS().get_algorithm_by_name('ES256').sign(message.encode(), key))}"


def claiming(**claims: Any) -> str:
    changed = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not ...}
    return signed({"alg": "ES256", "typ": "JWT", "kid": "k"}, changed)


def believed(token: str, *, key: VerificationKey = PUBLIC, rules: Rules = RULES, now: float = NOW) -> Claims:
    return verify_token(parse_token(token), key, rules, now=now)


def refused(token: str, **more: Any) -> str:
    with pytest.raises(TokenInvalid) as caught:
        believed(token, **more)
    return str(caught.value)


def test_a_token_that_keeps_all_rules_is_believed() -> None:
    claims = believed(claiming())

    assert claims.subject == "alice"
    assert claims.expires == NOW + 290


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (rsa.generate_private_key(65537, 2048), "RS256"),
        (rsa.generate_private_key(65537, 2048), "PS256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_signed_with_each_algorithm_is_believed(private: Any, algorithm: str) -> None:
    token = sign_token(CLAIMS, private, algorithm, key_id="k")

    assert believed(token, key=verification_key(private.public_key())).subject == "alice"
    assert "signature" in refused(tampered(token), key=verification_key(private.public_key()))


def tampered(token: str) -> str:
    header, claims, signature = token.split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"sub": "root"}
    return f"{header}.{part(json.dumps(changed).encode())}.{signature}"


@pytest.mark.parametrize(
    "algorithm", ["none", "nOnE", "NONE", "", "HS256", "ES384", "RS256", "XX", None, 5, ["ES256"]]
)
def test_A_30_an_algorithm_that_is_not_the_keys_is_refused(algorithm: object) -> None:
    refused(signed({"alg": algorithm, "typ": "JWT"}))


def test_A_30_a_header_without_alg_is_refused() -> None:
    assert "no alg" in refused(signed({"typ": "JWT"}))


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_A_30_a_public_key_is_nobodys_secret(encoding: Encoding) -> None:
    secret = KEY.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
    message = ".".join(part(json.dumps(it).encode()) for it in ({"alg": "HS256", "typ": "JWT"}, CLAIMS))
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    token = f"{message}.{part(signature.sign(message.encode(), secret))}"

    refused(token)
    refused(token, rules=Rules(ISSUER, frozenset({SERVICE}), ALL | {"HS256", "none"}))


def test_A_30_a_P_384_key_is_not_taken_for_ES256() -> None:
    other = ec.generate_private_key(ec.SECP384R1())

    refused(signed({"alg": "ES256", "typ": "JWT"}, key=other), key=verification_key(other.public_key()))


def test_A_30_an_algorithm_outside_of_the_list_is_refused() -> None:
    rules = Rules(ISSUER, frozenset({SERVICE}), frozenset({"RS256"}))

    assert "not what the key is for" in refused(claiming(), rules=rules)


def test_V_03_A_31_a_key_in_the_header_is_never_taken() -> None:
    attacker = ec.generate_private_key(ec.SECP256R1())
    jwk = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256).to_jwk(
        attacker.public_key(), as_dict=True
    )

    assert "jwk" in refused(signed({"alg": "ES256", "typ": "JWT", "kid": "k", "jwk": jwk}, key=attacker))


@pytest.mark.parametrize(
    "more",
    [
        {"jwk": {}},
        {"jku": "https://evil.example/jwks"},
        {"x5u": "file:///etc/passwd"},
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False},
        {"zip": "DEF"},
        {"kid": "k" * 10_240},
        {"kid": 5},
        {"kid": ""},
        {"typ": ["JWT"]},
        {"typ": "refresh+jwt"},
        {"x5c": "MII"},
        {"x5c": [5]},
        {"x5c": ["not base64!"]},
        {"x5c": ["AAAA"] * 11},
    ],
    ids=str,
)
def test_A_31_V_68_a_header_that_is_not_understood_is_refused(more: dict[str, Any]) -> None:
    refused(signed({"alg": "ES256", "typ": "JWT", **more}))


def test_A_31_no_file_and_no_network_is_touched() -> None:
    headers = [
        {"jku": "https://127.0.0.1:1/jwks"},
        {"x5u": "file:///etc/passwd"},
        {"kid": "../../../etc/passwd"},
        {"kid": "' OR 1=1 --\0"},
        {"x5c": ["AAAA"]},
    ]
    tokens = [signed({"alg": "ES256", "typ": "JWT", **header}) for header in headers]
    source = (
        "import sys\n"
        "from registry.auth.tokens import TokenInvalid, parse_token\n"
        "touched = []\n"
        "sys.addaudithook(lambda event, arguments: touched.append(event) if event in "
        "{'open', 'socket.connect', 'socket.getaddrinfo', 'subprocess.Popen'} else None)\n"
        "for token in sys.argv[1:]:\n"
        "    try:\n"
        "        parse_token(token)\n"
        "    except TokenInvalid:\n"
        "        pass\n"
        "sys.exit(', '.join(touched) or None)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", source, *tokens], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_A_32_a_signature_in_another_shape_is_refused() -> None:
    message, _, signature = claiming().rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
    assert decode_dss_signature(encode_dss_signature(r, s)) == (r, s)
    zero = bytes(32)
    shapes = {
        "empty": b"",
        "truncated": raw[:-1],
        "half": raw[:32],
        "longer": raw + b"\0",
        "DER": encode_dss_signature(r, s),
        "r = 0": zero + raw[32:],
        "s = 0": raw[:32] + zero,
        "both 0": zero + zero,
        "swapped": raw[32:] + raw[:32],
        "all ones": b"\xff" * 64,
    }

    for content in shapes.values():
        refused(f"{message}.{part(content)}")


@pytest.mark.parametrize("change", ["=", "==", " ", "\n", "+", "/", "~", "%3D"])
def test_A_32_base64_in_another_spelling_is_refused(change: str) -> None:
    refused(claiming() + change)


def test_A_32_bits_that_mean_nothing_are_refused() -> None:
    token = claiming()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 64 bytes are 86 characters, of which the last one has four bits too many.
    twin = token[:-1] + alphabet[alphabet.index(token[-1]) | 1]
    assert twin != token
    assert base64.urlsafe_b64decode(twin.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(
        token.rpartition(".")[2] + "=="
    )

    refused(twin)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "...",
        "a.b",
        "a.b.c.d",
        "." * 1_000_000,
        "a" * 100_000,
        "a." * 50_000,
        "e30.e30.",
        "e30.e30.e30",
        "W10.W10.W10",
        "bnVsbA.bnVsbA.bnVsbA",
    ],
    ids=lambda text: text[:12],
)
def test_V_35_what_is_no_token_is_refused_before_it_is_taken_apart(text: str) -> None:
    with pytest.raises(TokenInvalid):
        believed(text)


@pytest.mark.parametrize(
    ("claims", "is_believed"),
    [
        ({"exp": ...}, False),
        ({"exp": None}, False),
        ({"exp": NOW - 59}, True),
        ({"exp": NOW - 61}, False),
        ({"exp": NOW + 59.5}, True),
        ({"exp": str(int(NOW + 60))}, False),
        ({"exp": True}, False),
        ({"exp": [NOW + 60]}, False),
        ({"exp": -1}, False),
        ({"exp": 10**300}, False),
        ({"nbf": ...}, True),
        ({"nbf": NOW + 59}, True),
        ({"nbf": NOW + 61}, False),
        ({"nbf": "now"}, False),
        ({"iat": NOW + 59}, True),
        ({"iat": NOW + 61}, False),
        ({"iat": ...}, False),
        ({"iat": "1"}, False),
        ({"aud": ...}, False),
        ({"aud": "other.example"}, False),
        ({"aud": SERVICE + ".evil.example"}, False),
        ({"aud": SERVICE.upper()}, False),
        ({"aud": [SERVICE]}, True),
        ({"aud": ["other.example", SERVICE]}, True),
        ({"aud": []}, False),
        ({"aud": [SERVICE, 5]}, False),
        ({"aud": {SERVICE: 1}}, False),
        ({"aud": ["x"] * 100 + [SERVICE]}, False),
        ({"iss": ...}, False),
        ({"iss": ISSUER + ".evil"}, False),
        ({"iss": ISSUER[:-1]}, False),
        ({"iss": ISSUER + "/"}, False),
        ({"iss": [ISSUER]}, False),
        ({"sub": ...}, True),
        ({"sub": ""}, True),
        ({"sub": 5}, False),
        ({"sub": "a\nb"}, False),
        ({"sub": "x" * 256}, False),
    ],
    ids=str,
)
def test_A_33_claims_are_exact(claims: dict[str, Any], is_believed: bool) -> None:
    token = claiming(**claims)

    with contextlib.nullcontext() if is_believed else pytest.raises(TokenInvalid):
        believed(token)


@pytest.mark.parametrize("number", ["1e400", "NaN", "Infinity", "-1e400", "1" * 5000])
def test_A_33_numbers_that_are_none_are_refused(number: str) -> None:
    claims = json.dumps({**CLAIMS, "exp": 0}).replace('"exp": 0', f'"exp": {number}').encode()

    refused(signed({"alg": "ES256", "typ": "JWT"}, claims))


def test_A_33_a_key_that_stands_twice_is_refused() -> None:
    claims = json.dumps(CLAIMS).encode()[:-1] + b', "sub": "root"}'

    assert "twice" in refused(signed({"alg": "ES256", "typ": "JWT"}, claims))
    assert "twice" in refused(signed(b'{"alg": "ES256", "alg": "none"}'))


def test_V_25_a_token_without_iat_is_refused() -> None:
    assert "iat" in refused(claiming(iat=...))


@pytest.mark.parametrize("skew", [45, -45])
def test_A_37_clocks_may_differ_by_less_than_a_minute(skew: int) -> None:
    moment = NOW + skew
    believed(claiming(iat=moment, nbf=moment, exp=moment + 1))


def test_A_37_a_larger_difference_is_refused_and_says_clock() -> None:
    assert "clock" in refused(claiming(iat=NOW + 90, nbf=NOW + 90, exp=NOW + 390))
    assert "clock" in refused(claiming(exp=NOW - 90))


@pytest.mark.parametrize(
    "access",
    [
        ...,
        None,
        {},
        "repository:a/b:pull",
        [None],
        ["repository:a/b:pull"],
        [{}],
        [{"type": "repository", "name": "a/b"}],
        [{"type": "repository", "name": "a/b", "actions": "pull"}],
        [{"type": "repository", "name": "a/b", "actions": []}],
        [{"type": "repository", "name": "a/b", "actions": ["PULL", 5, None]}],
        [{"type": "repository", "name": "*", "actions": ["pull"]}],
        [{"type": "repository", "name": "a/*", "actions": ["pull"]}],
        [{"type": "repository", "name": "../a", "actions": ["pull"]}],
        [{"type": "repository", "name": "A/B", "actions": ["pull"]}],
        [{"type": "repository", "name": "a/b\n", "actions": ["pull"]}],
        [{"type": "repository", "name": ["a/b"], "actions": ["pull"]}],
        [{"type": "Repository", "name": "a/b", "actions": ["pull"]}],
        [{"type": "repository(plugin)", "name": "a/b", "actions": ["pull"]}],
        [{"type": "registry", "name": "a/b", "actions": ["*"]}],
        [{"type": "registry", "name": "*", "actions": ["*"]}],
    ],
    ids=str,
)
def test_A_34_a_malformed_entry_grants_nothing(access: object) -> None:
    assert grants_of(believed(claiming(access=access))) == ()


def test_A_34_a_malformed_entry_does_not_take_the_others_with_it() -> None:
    access = [
        {"type": "repository", "name": "../b", "actions": ["pull"]},
        {"type": "repository", "name": "a/b", "actions": ["pull", "push", "fly"]},
        {"type": "registry", "name": "catalog", "actions": ["*"]},
    ]

    assert grants_of(believed(claiming(access=access))) == (
        Grant("repository", "a/b", frozenset({"pull", "push"})),
        Grant("registry", "catalog", frozenset({"*"})),
    )


def test_A_34_too_many_entries_grant_nothing() -> None:
    entry = {"type": "repository", "name": "a/b", "actions": ["pull"]}
    claims = Claims("alice", NOW, {"access": [entry] * 100_000})

    assert grants_of(claims) == ()


@given(st.text(max_size=300))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with contextlib.suppress(TokenInvalid):
        believed(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda children: (
            st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_claims_are_believed_or_refused(value: object) -> None:
    for name in ("iss", "sub", "aud", "iat", "nbf", "exp", "access"):
        with contextlib.suppress(TokenInvalid):
            grants_of(believed(claiming(**{name: value})))
