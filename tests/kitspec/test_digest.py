import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest, check_algorithm
from kitspec.errors import DigestInvalid

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_digest_is_its_text(algorithm):
    digest = Digest.of(b"x", algorithm)

    assert digest == f"{algorithm}:{hashlib.new(algorithm, b'x').hexdigest()}"
    assert (digest.algorithm, digest.encoded) == (algorithm, hashlib.new(algorithm, b"x").hexdigest())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "xyz",
        "sha256:",
        "sha256:zz",
        f"sha256:{HEX.upper()}",
        f"SHA256:{HEX}",
        f"sha256:{HEX}0",
        f"sha256:{HEX[1:]}",
        f"sha256:{HEX}\n",
        f" sha256:{HEX}",
        f"sha256:{HEX[:-1]}٣",
        f"sha512:{HEX}",
        f"sha384:{HEX}{HEX[:32]}",
        f"md5:{HEX[:32]}",
        f"sha256-{HEX}",
        "sha256:../../etc/passwd",
        "sha256:" + "a" * 1_000_000,
    ],
)
def test_B_15_B_36_B_42_what_is_no_digest_is_refused(text):
    with pytest.raises(DigestInvalid) as caught:
        Digest(text)
    assert len(caught.value.message) < 1000


@given(st.binary(), st.lists(st.integers(0, 64)))
def test_chunking_never_changes_the_digest(content, cuts):
    chunks, rest = [], content
    for cut in cuts:
        chunks.append(rest[:cut])
        rest = rest[cut:]

    assert Digest.of_chunks([*chunks, rest]) == Digest.of(content)


@given(st.text())
def test_text_is_a_digest_or_refused(text):
    try:
        assert Digest(text) == text
    except DigestInvalid:
        assert (
            not text.startswith("sha256:") or len(text) != 71 or not set(text[7:]) <= set("0123456789abcdef")
        )


def test_an_algorithm_is_spoken_or_refused():
    assert check_algorithm("sha512") == "sha512"
    with pytest.raises(DigestInvalid):
        check_algorithm("sha384")
