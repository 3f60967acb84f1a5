"""The section `auth`: what carries over from Distribution, and what is refused with its reason."""

import re
from pathlib import Path

import pytest
import yaml

from registry.auth.auth_config import Auth
from registry.config import Config
from registry.config_sources import ConfigInvalid, load_config

ROOT = Path(__file__).parents[3]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(tmp_path: Path, text: str) -> Auth:
    auth = load_config(written(tmp_path, text)).config.auth
    assert auth is not None
    return auth


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        load_config(written(tmp_path, text))
    return "\n".join(caught.value.problems)


def test_without_the_section_there_is_no_authentication() -> None:
    assert Config().auth is None


def test_htpasswd_of_distribution_carries_over(tmp_path: Path) -> None:
    auth = loaded(tmp_path, "auth: {htpasswd: {realm: basic-realm, path: /auth/htpasswd}}")

    assert auth.htpasswd is not None
    assert (auth.htpasswd.realm, auth.htpasswd.path) == ("basic-realm", Path("/auth/htpasswd"))
    assert auth.token is None


@pytest.mark.parametrize(
    "keys", ["rootcertbundle: /c.pem", "jwks: /jwks.json, signingalgorithms: [ES256, RS256]"]
)
def test_a_token_server_of_distribution_carries_over(keys: str, tmp_path: Path) -> None:
    auth = loaded(
        tmp_path, f"auth: {{token: {{realm: 'https://auth/token', service: registry, issuer: me, {keys}}}}}"
    )

    assert auth.token is not None
    assert auth.token.is_external


def test_naming_token_and_apikeys_is_having_them(tmp_path: Path) -> None:
    auth = loaded(
        tmp_path,
        "http: {host: 'https://reg.example'}\nauth:\n  htpasswd: {path: /x}\n  token:\n  apikeys:\n",
    )

    assert auth.token is not None
    assert not auth.token.is_external
    assert auth.apikeys is not None


def test_variables_reach_every_key() -> None:
    environ = {
        "REGISTRY_AUTH_HTPASSWD_PATH": "/x",
        "REGISTRY_AUTH_TOKEN_REALM": "https://reg.example/v2/token",
        "MODELREG_AUTH_TOKEN_EXPIRATION": "10m",
        "MODELREG_AUTH_OIDC_0_ISSUER": "https://ci.example",
        "MODELREG_AUTH_OIDC_0_AUDIENCES_0": "reg.example",
        "MODELREG_AUTH_OIDC_0_CLAIMMAPPING_USERNAME": "actor",
    }

    auth = load_config(environ=environ).config.auth

    assert auth is not None
    assert auth.token is not None
    assert auth.token.expiration == 600
    assert auth.oidc[0].claimmapping.username == "actor"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auth: {}", "nobody could log in"),
        ("auth: {token: {}}", "nobody could log in"),
        ("auth: {htpasswd: {}}", "auth.htpasswd.path"),
        ("auth: {htpasswd: {path: /x, realm: 'a\"b'}}", "auth.htpasswd.realm"),
        ("auth: {htpasswd: {path: /x}, token: {}}", "give http.host"),
        ("auth: {htpasswd: {path: /x}, token: {realm: 'ftp://x'}}", "auth.token.realm"),
        ("auth: {htpasswd: {path: /x}, token: {realm: 'https://u:p@x'}}", "auth.token.realm"),
        ("auth: {token: {jwks: /x}}", "should have realm and service and issuer"),
        (
            "auth: {token: {realm: 'https://a', service: s, issuer: i, jwks: /x, rootcertbundle: /y}}",
            "not both",
        ),
        (
            "auth: {token: {realm: 'https://a', service: s, issuer: i, jwks: 'http://keys.example'}}",
            "https://",
        ),
        ("auth: {token: {realm: 'https://a', service: s, issuer: i, jwks: /x, cafile: /y}}", "beside cafile"),
        (
            "auth: {token: {realm: 'https://a', service: s, issuer: i, jwks: /x, signingalgorithms: [HS256]}}",
            "signingalgorithms",
        ),
        (
            "auth: {token: {realm: 'https://a', service: s, issuer: i, jwks: /x, signingalgorithms: [none]}}",
            "signingalgorithms",
        ),
        (
            "auth: {htpasswd: {path: /x}, token: {expiration: 59s, realm: 'https://a'}}",
            "auth.token.expiration",
        ),
        ("auth: {apikeys: {}, oidc: [{issuer: 'https://a', audiences: [b]}]}", "htpasswd beside apikeys"),
        ("auth: {oidc: [{issuer: 'https://a'}]}", "auth.oidc.0.audiences"),
        ("auth: {oidc: [{issuer: 'https://a', audiences: []}]}", "auth.oidc.0.audiences"),
        ("auth: {oidc: [{issuer: 'https://a', audiences: [b, '']}]}", "auth.oidc.0.audiences"),
        ("auth: {oidc: [{issuer: 'http://a', audiences: [b]}]}", "auth.oidc.0.issuer"),
        (
            "auth: {oidc: [{issuer: 'https://a', audiences: [b]}, {issuer: 'https://a', audiences: [c]}]}",
            "each issuer once",
        ),
        (
            "auth: {oidc: [{issuer: 'https://a', audiences: [b]}, {issuer: 'https://c', audiences: [b]}]}",
            "auth.oidc: should have a prefix each that none of the others begins with: 'oidc:' and 'oidc:'",
        ),
        (
            "auth: {oidc: [{issuer: 'https://a', audiences: [b], prefix: 'oidc:ci:'}, {issuer: 'https://c', audiences: [b]}]}",
            "'oidc:ci:' and 'oidc:'",
        ),
        (
            "auth: {oidc: [{issuer: 'https://a', audiences: [b], prefix: ''}, {issuer: 'https://c', audiences: [b]}]}",
            "'' and 'oidc:'",
        ),
        ("auth: {clientcertificates: {}}", "http.tls.clientcas"),
        ("auth: {clientcertificates: {name: serial}}", "auth.clientcertificates.name"),
        ("auth: {htpasswd: {path: /x}, none: {}}", "leave auth away"),
        ("auth: {silly: {realm: x, service: y}}", "lets everybody in"),
        ("auth: {htpasswd: {path: /x}, token: {autoredirect: true}}", "not taken"),
        ("auth: {htpassword: {path: /x}}", "did you mean htpasswd?"),
        ("http: {tls: {clientcas: [/x]}}", "certificate and key beside clientcas"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_with_its_reason(text: str, said: str, tmp_path: Path) -> None:
    assert said in problem(tmp_path, text)


def test_several_providers_have_a_prefix_each(tmp_path: Path) -> None:
    auth = loaded(
        tmp_path,
        "auth: {oidc: [{issuer: 'https://a', audiences: [b], prefix: 'a:'}, {issuer: 'https://c', audiences: [b], prefix: 'c:'}]}",
    )

    assert [provider.prefix for provider in auth.oidc] == ["a:", "c:"]


def test_the_documents_have_every_key_of_auth() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    example = (ROOT / "deploy" / "config.example.yml").read_text(encoding="utf-8")
    sections = Auth.model_json_schema()["$defs"]
    keys = {key for section in sections.values() for key in section.get("properties", {})}

    assert {key for key in keys if f"{key}`" not in manual and f"`{key}." not in manual} == set()
    assert {key for key in keys if f"{key}:" not in example} == set()


def test_the_example_of_the_manual_is_a_configuration(tmp_path: Path) -> None:
    """What stands behind `#` in the example's section, taken out of its comment."""
    lines = (ROOT / "deploy" / "config.example.yml").read_text(encoding="utf-8").splitlines()
    begin = lines.index("# auth:")
    section = []
    for line in lines[begin:]:
        if not line.startswith("# "):
            break
        section.append(line[2:])
    document = yaml.safe_load("\n".join(section))

    assert set(document["auth"]) == set(Auth.model_fields)


POLICY = """
http:
  accessControl:
    groups: {ops: {users: [olga]}}
    repositories: {'team/**': {policies: [{groups: [ops, mll], actions: [read]}]}}
    adminPolicy: {groups: [oops], actions: [delete]}
    metrics: {groups: [ops]}
"""


def test_a_group_that_nobody_can_be_in_is_refused_by_the_path_of_its_key(tmp_path: Path) -> None:
    text = problem(tmp_path, POLICY + "auth: {htpasswd: {path: /x}}\n")

    assert "http.accessControl.repositories.team/**.policies.0.groups: nobody can be in 'mll'" in text
    assert "http.accessControl.adminPolicy.groups: nobody can be in 'oops'" in text
    assert "'ops'" not in text


@pytest.mark.parametrize(
    ("mapping", "prefix", "refused"),
    [
        ("{}", "''", ["mll", "oops"]),
        ("{groups: teams}", "''", []),
        ("{groups: teams}", "m", ["oops"]),
        ("{groups: teams}", "mll", ["mll", "oops"]),
    ],
)
def test_a_group_that_a_provider_may_give_is_none(
    tmp_path: Path, mapping: str, prefix: str, refused: list[str]
) -> None:
    provider = f"{{issuer: 'https://ci', audiences: [r], claimmapping: {mapping}, prefix: {prefix}}}"
    text = POLICY + f"auth: {{oidc: [{provider}]}}\n"

    if refused:
        assert re.findall(r"nobody can be in '(\w+)'", problem(tmp_path, text)) == refused
    else:
        loaded(tmp_path, text)
