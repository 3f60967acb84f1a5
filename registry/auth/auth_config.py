"""Who may log in, and with what: the section `auth` of the configuration.

`htpasswd` and `token` have Distribution's keys. What is ours: the built-in issuer of tokens (`token` without `jwks` and
`rootcertbundle`), `apikeys`, `oidc`, `clientcertificates`. Types only; files are opened by what uses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from registry.config_types import FilePath, Seconds, Section, Timeout, expanded

Algorithm = Literal["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA"]
"""Signatures with a public key. What is signed with a secret (HS256) is never taken: its key would be everybody's."""

# Printable ASCII without the two characters that would have to be escaped inside a challenge.
_QUOTABLE = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,256}", re.ASCII)
_PREFIX = re.compile(r"[\x21-\x7e]{0,64}", re.ASCII)
_URL = re.compile(r"https?://[\x21\x23-\x5b\x5d-\x7e]{1,2048}", re.ASCII)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _quotable(value: object) -> str:
    if isinstance(value, str) and _QUOTABLE.fullmatch(value):
        return value
    raise ValueError('should be printable ASCII without " and \\, at most 256 characters')


def _url(value: object) -> str:
    if isinstance(value, str) and _URL.fullmatch(value):
        parts = urlsplit(value)
        if parts.hostname and not parts.username and not parts.fragment:
            return value
    raise ValueError('should be an address like "https://auth.example/token"')


def checked_fetched_url(value: object) -> str:
    """A URL whose answer is believed: nobody on the way may change it."""
    url = _url(value)
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname in _LOOPBACK:
        return url
    raise ValueError("should begin with https:// (http:// only reaches this machine)")


def _file_or_url(value: object) -> str | Path:
    if isinstance(value, str) and re.match(r"[a-z]+://", value):
        return checked_fetched_url(value)
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return expanded(value)
    raise ValueError("should be the path of a file or an https:// address")


def _name_prefix(value: object) -> str:
    if isinstance(value, str) and _PREFIX.fullmatch(value):
        return value
    raise ValueError("should be at most 64 printable characters without spaces")


Quotable = Annotated[str, BeforeValidator(_quotable)]
Url = Annotated[str, BeforeValidator(_url)]
FetchedUrl = Annotated[str, BeforeValidator(checked_fetched_url)]
FileOrUrl = Annotated[str | Path, BeforeValidator(_file_or_url), WithJsonSchema({"type": "string"})]
NamePrefix = Annotated[str, BeforeValidator(_name_prefix)]


class Htpasswd(Section):
    path: FilePath
    realm: Quotable = "modelkit-registry"


class Token(Section):
    """Bearer tokens: issued here, or, with `jwks` or `rootcertbundle`, elsewhere."""

    realm: Url | None = None
    service: Quotable | None = None
    issuer: Quotable = "modelkit-registry"
    rootcertbundle: FilePath | None = None
    jwks: FileOrUrl | None = None
    cafile: FilePath | None = None
    signingalgorithms: list[Algorithm] = Field(default=["ES256", "ES384", "ES512", "RS256", "RS384", "RS512"])
    # The token specification: "For compatibility with older clients, a token should never be returned with less than
    # 60 seconds to live". What the policy takes away is gone at once, whatever a token says.
    expiration: Annotated[Seconds, Field(ge=60, le=24 * 3600)] = 1800.0
    refreshexpiration: Annotated[Seconds, Field(ge=60)] = 30 * 24 * 3600.0
    keyrotation: Annotated[Timeout, Field(ge=3600)] = 30 * 24 * 3600.0

    @property
    def is_external(self) -> bool:
        return self.jwks is not None or self.rootcertbundle is not None

    @model_validator(mode="after")
    def _an_issuer_elsewhere_is_named(self) -> Self:
        named = self.model_fields_set
        missing = [key for key in ("realm", "service", "issuer") if key not in named]
        if self.is_external and missing:
            raise ValueError(
                f"should have {' and '.join(missing)} beside jwks or rootcertbundle: somebody else issues tokens"
            )
        if self.jwks is not None and self.rootcertbundle is not None:
            raise ValueError("should have jwks or rootcertbundle, not both")
        if self.cafile is not None and not isinstance(self.jwks, str):
            raise ValueError("should have an https:// address as jwks beside cafile")
        return self


class Apikeys(Section):
    # 0 is for ever.
    expirationmax: Seconds = 0.0
    peruser: Annotated[int, Field(gt=0, le=1000)] = 50


class Claimmapping(Section):
    username: str = "sub"
    groups: str | None = None


class Oidc(Section):
    """Tokens that an OpenID provider gives to workloads: CI jobs, service accounts."""

    issuer: FetchedUrl
    audiences: Annotated[list[str], Field(min_length=1)]
    jwks: FileOrUrl | None = None
    cafile: FilePath | None = None
    signingalgorithms: list[Algorithm] = Field(default=["ES256", "ES384", "ES512", "RS256", "RS384", "RS512"])
    claimmapping: Claimmapping = Claimmapping()
    requiredclaims: dict[str, str] = Field(default_factory=dict)
    # With a colon no name of the htpasswd file can be the same: no workload becomes a person by its subject.
    prefix: NamePrefix = "oidc:"

    @field_validator("audiences")
    @classmethod
    def _audiences_have_names(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("should have no empty audience")
        return value


class Clientcertificates(Section):
    name: Literal["commonname", "dns", "email", "uri"] = "commonname"
    prefix: NamePrefix = ""


class Auth(Section):
    htpasswd: Htpasswd | None = None
    token: Token | None = None
    apikeys: Apikeys | None = None
    oidc: list[Oidc] = Field(default_factory=list)
    clientcertificates: Clientcertificates | None = None

    @model_validator(mode="before")
    @classmethod
    def _naming_one_is_having_it(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        named = ("htpasswd", "token", "apikeys", "clientcertificates")
        return {key: {} if key in named and item is None else item for key, item in value.items()}

    @field_validator("oidc")
    @classmethod
    def _issuers_are_different(cls, value: list[Oidc]) -> list[Oidc]:
        issuers = [provider.issuer for provider in value]
        if len(set(issuers)) != len(issuers):
            raise ValueError("should name each issuer once")
        return value

    @field_validator("oidc")
    @classmethod
    def _names_are_of_one_provider_each(cls, value: list[Oidc]) -> list[Oidc]:
        """Else one provider could call its workloads what policies call those of another."""
        for one, other in combinations([provider.prefix for provider in value], 2):
            if one.startswith(other) or other.startswith(one):
                raise ValueError(
                    f"should have a prefix each that none of the others begins with: {one!r} and {other!r}"
                )
        return value

    @model_validator(mode="after")
    def _somebody_can_log_in(self) -> Self:
        is_external = self.token is not None and self.token.is_external
        if not (self.htpasswd or self.oidc or self.clientcertificates or is_external):
            raise ValueError(
                "should have htpasswd, oidc, clientcertificates, or a token issuer elsewhere: nobody could log in"
            )
        if self.apikeys is not None and self.htpasswd is None:
            raise ValueError("should have htpasswd beside apikeys: those are made with a password")
        if self.token is not None and self.token.issuer in {provider.issuer for provider in self.oidc}:
            raise ValueError("should have another token.issuer than those of oidc")
        return self

    def may_give_group(self, name: str) -> bool:
        """Whether somebody who logs in could be in this group by what their provider says."""
        return any(
            provider.claimmapping.groups is not None
            and name.startswith(provider.prefix)
            and name != provider.prefix
            for provider in self.oidc
        )

    def problems(self, *, host: str | None, has_client_cas: bool) -> Iterator[str]:
        """What is wrong together with the section `http`.

        Args:
            host: `http.host`.
            has_client_cas: whether `http.tls.clientcas` names any.
        """
        if self.token is not None and self.token.realm is None and host is None:
            yield (
                "auth.token: clients must be told where tokens are to be had: "
                'give http.host, "https://registry.example", or auth.token.realm'
            )
        if self.clientcertificates is not None and not has_client_cas:
            yield "auth.clientcertificates: give http.tls.clientcas, whose certificates are believed"
