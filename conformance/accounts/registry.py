"""A registry as a company has it: with accounts and rights, over HTTPS, its certificate by an authority of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import bcrypt

from conformance.relay import Proxy
from conformance.server import Subject, ours
from tests.authority import Authority, Issued

SCHEMES = ("Basic", "Bearer")
# Of the block that is for documentation (RFC 5737): nobody's, and needs no name server.
_ADDRESS = "192.0.2.1"


@dataclass(frozen=True)
class Account:
    name: str
    password: str


@dataclass(frozen=True)
class PrivateRegistry:
    """One that is running.

    Attributes:
        host: by which clients call it, as `host:port`; they reach it through the proxy only.
        proxy: URL of the proxy.
        authority: file of the certificate that they must trust.
        writer: may read and push everywhere.
        reader: may only read.
    """

    host: str
    proxy: str
    authority: Path
    writer: Account
    reader: Account


@contextmanager
def running(scratch: Path) -> Iterator[Mapping[str, PrivateRegistry]]:
    """One for each scheme, by the scheme.

    Raises:
        ServerFailed: as `Subject.running`.
    """
    (folder := scratch / "certificates").mkdir(parents=True)
    authority = Authority(folder)
    certificate = authority.issue("127.0.0.1", _ADDRESS)
    writer, reader = (Account(name, secrets.token_urlsafe(16)) for name in ("writer", "reader"))
    with ExitStack() as stack:
        registries = {}
        for scheme in SCHEMES:
            subject = _subject(scheme, authority, certificate, writer, reader)
            real = stack.enter_context(subject.running(scratch / scheme.lower()))
            proxy = Proxy(real, _ADDRESS)
            stack.enter_context(proxy.running())
            host = f"{_ADDRESS}:{real.rpartition(':')[2]}"
            registries[scheme] = PrivateRegistry(host, f"http://{proxy.host}", authority.file, writer, reader)
        yield registries


def _subject(
    scheme: str, authority: Authority, certificate: Issued, writer: Account, reader: Account
) -> Subject:
    token = f"  token: {{realm: 'https://{_ADDRESS}:{{port}}/v2/token'}}\n" if scheme == "Bearer" else ""
    config = f"""\
auth:
  htpasswd: {{path: '{{users}}'}}
{token}\
http:
  tls: {{certificate: '{certificate.certificate}', key: '{certificate.key}'}}
  accessControl:
    repositories:
      "**":
        policies:
        - {{users: [{writer.name}], actions: [read, create]}}
        - {{users: [{reader.name}], actions: [read]}}
"""
    open_to_all = ours()
    return replace(
        open_to_all,
        name=f"{open_to_all.name}, {scheme}, HTTPS",
        command=(*open_to_all.command, "--config", "{config}"),
        config=config,
        users="".join(f"{account.name}:{_hashed(account.password)}\n" for account in (writer, reader)),
        login=(writer.name, writer.password),
        authority=authority.file,
    )


def _hashed(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
