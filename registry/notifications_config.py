"""Who is told of writes: the section `notifications` of the configuration.

`endpoints` has Distribution's keys. What is ours: `format`, `secret`, `secret_file`, `allowprivate`. Types only.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Final, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from registry.config_types import Count, FilePath, Section, Timeout

Action = Literal["push", "pull", "mount", "delete"]

# A name is part of a key in the store.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*", re.ASCII)
_URL = re.compile(r"https?://[\x21-\x7e]{1,2048}", re.ASCII)
# What a delivery says of itself.
_OWN_HEADERS: Final = frozenset(
    {"connection", "content-length", "content-type", "host", "transfer-encoding", "x-hub-signature-256"}
)
# IPv6 addresses that stand for one of IPv4: its last 32 bits.
_STANDING_FOR_IPV4: Final = tuple(map(ipaddress.ip_network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))


class Ignore(Section):
    mediatypes: list[str] = Field(default_factory=list)
    actions: list[Action] = Field(default_factory=list)


class Endpoint(Section):
    """Somebody who is told, by POST."""

    name: str
    url: str
    disabled: bool = False
    format: Literal["docker", "cloudevents"] = "docker"
    headers: dict[str, list[SecretStr]] = Field(default_factory=dict)
    secret: SecretStr | None = None
    secret_file: FilePath | None = None
    allowprivate: bool = False
    # The lease of who delivers is kept between two attempts, so one must be shorter than that lease.
    timeout: Annotated[Timeout, Field(le=30)] = 5.0
    threshold: Count = 5
    backoff: Timeout = 1.0
    ignoredmediatypes: list[str] = Field(default_factory=list)
    ignore: Ignore = Ignore()

    @field_validator("name")
    @classmethod
    def _name_is_part_of_a_key(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("should be at most 63 letters, digits, dots, dashes and underscores")
        return value

    @field_validator("headers", mode="before")
    @classmethod
    def _headers_are_sound(cls, value: object) -> object:
        """Messages name the field, never its value: it may be a credential."""
        if not isinstance(value, dict):
            return value or {}
        headers = {name: [text] if isinstance(text, str) else text for name, text in value.items()}
        for name, texts in headers.items():
            if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"should have names of headers: {name!r}")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"{name} is the delivery's own; leave it out")
            if not isinstance(texts, list) or not all(
                isinstance(text, str) and _HEADER_VALUE.fullmatch(text) for text in texts
            ):
                raise ValueError(f"{name} should be a printable text, or a list of them")
        return headers

    # Of the whole endpoint, so that the message does not show a URL: its query may be a credential.
    @model_validator(mode="after")
    def _url_leads_somewhere(self) -> Self:
        try:
            parts = self.address
        except ValueError as error:
            raise ValueError(
                'url should be an address like "https://ci.example/hook", without a user, a password or a fragment'
            ) from error
        if not self.allowprivate and not is_public_literal(parts.hostname or ""):
            raise ValueError(
                "url names an address of this machine or of a private network: say allowprivate: true to send there"
            )
        return self

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("should have secret or secret_file, not both")
        if self.secret is not None and not self.secret.get_secret_value():
            raise ValueError("secret should not be empty")
        return self

    @property
    def address(self) -> SplitResult:
        """The parts of `url`.

        Raises:
            ValueError: it is not one; never of an endpoint that was made.
        """
        parts = urlsplit(self.url)
        if (
            not _URL.fullmatch(self.url)
            or not parts.hostname
            or parts.port == 0
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise ValueError("not a clean URL")
        return parts

    @property
    def ignored_media_types(self) -> frozenset[str]:
        return frozenset((*self.ignoredmediatypes, *self.ignore.mediatypes))


class Notifications(Section):
    endpoints: list[Endpoint] = Field(default_factory=list)

    @field_validator("endpoints")
    @classmethod
    def _names_are_different(cls, value: list[Endpoint]) -> list[Endpoint]:
        names = [endpoint.name for endpoint in value]
        if len(set(names)) != len(names):
            raise ValueError("should have endpoints with different names")
        return value


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole Internet's, also where it stands for one of IPv4 (mapped, 6to4, Teredo, NAT64).

    Raises:
        ValueError: it is no IP address.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not parsed.is_multicast
    inner = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
    if any(parsed in network for network in _STANDING_FOR_IPV4):
        inner.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    if embedded := [each for each in inner if each is not None]:
        return all(each.is_global and not each.is_multicast for each in embedded)
    return parsed.is_global and not parsed.is_multicast and not parsed.is_site_local


def is_public_literal(host: str) -> bool:
    """False for an IP address that is not `is_public`; True for one that is, and for names: what they mean is asked later."""
    try:
        return is_public(host)
    except ValueError:
        return host.rstrip(".") != "localhost" and not host.rstrip(".").endswith(".localhost")
