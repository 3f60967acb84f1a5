"""The two kinds of places a reference can mean: the local store, and a registry over the network."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kitclient.credentials import Credential, Credentials, CredentialSource, canonical_host
from kitclient.errors import ClientError
from kitclient.image_layout import LayoutRegistry
from kitclient.locations import Locations
from kitclient.remote import RemoteRegistry
from kitclient.tls import TlsOptions, with_host_files
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.errors import ManifestUnknown, NameUnknown
from kitspec.names import LOCAL_REGISTRY, Reference, RepositoryName, Tag

# The repository of what was packed without a name.
UNNAMED = RepositoryName("unnamed")
LATEST = Tag("latest")
# A listener on this machine answers at once, or is not one.
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Network:
    """How registries are spoken to.

    Attributes:
        plain_http: http only. Without it https only, but for this very machine, where http is taken when TLS is not spoken
            and no authority or certificate was named.
        concurrency: transfers at once.
    """

    plain_http: bool = False
    tls: TlsOptions = field(default_factory=TlsOptions)
    concurrency: int = 5
    proxy: str | None = None


class ReferenceMissing(ClientError):
    """Nobody has what a reference names."""


@dataclass(frozen=True, slots=True)
class Stores:
    """Opens places."""

    locations: Locations
    network: Network = field(default_factory=Network)

    def local(self, host: str = LOCAL_REGISTRY) -> LayoutRegistry:
        """The local store's repositories of one host; an async context manager."""
        return LayoutRegistry(self.locations.storage, host)

    @asynccontextmanager
    async def remote(
        self, host: str, *, credential: Credential | None = None
    ) -> AsyncIterator[RemoteRegistry]:
        """A registry over the network.

        Args:
            credential: to be used in place of the one that is kept.

        Raises:
            ClientError: `host` is none, or cannot be reached.
        """
        if host == LOCAL_REGISTRY:
            raise ReferenceMissing(
                "the reference names no registry; wanted host/repository, such as localhost:5000/name"
            )
        folder = self.locations.certificates / canonical_host(host)
        tls = await asyncio.to_thread(with_host_files, self.network.tls, folder)
        # Who names an authority or a certificate means TLS.
        may_be_plain = is_loopback(host) and not tls.ca_files and tls.client_certificate is None
        plain_http = self.network.plain_http or (may_be_plain and not await _speaks_tls(host))
        registry = RemoteRegistry(
            host,
            plain_http=plain_http,
            tls=tls,
            proxy=self.network.proxy,
            credentials=self.credentials().get if credential is None else _only(credential),
            concurrency=self.network.concurrency,
            uploads=self.locations.uploads,
        )
        async with registry:
            yield registry

    @asynccontextmanager
    async def find(
        self, reference: Reference, *, default: Tag | None = LATEST
    ) -> AsyncIterator[tuple[Place, Tag | Digest]]:
        """The place that has a reference: the local store if it does, else its registry.

        Raises:
            ReferenceMissing: it has neither tag nor digest, or nobody has it.
            OciError, ClientError: its registry cannot be asked.
        """
        label, name = wanted(reference, default=default), name_of(reference)
        async with self.local(reference.registry) as local:
            try:
                await local.get_manifest(name, label)
            except (ManifestUnknown, NameUnknown) as error:
                if reference.registry == LOCAL_REGISTRY:
                    raise ReferenceMissing(f"model {reference.display} not found") from error
            else:
                yield Place(local, name), label
                return
        async with self.remote(reference.registry) as registry:
            yield Place(registry, name), label

    def credentials(self) -> Credentials:
        return Credentials(self.locations.credentials)


def _only(credential: Credential) -> CredentialSource:
    async def get(host: str) -> Credential:
        _ = host
        return credential

    return get


async def _speaks_tls(host: str) -> bool:
    """Whether what listens at `host[:port]` does; True when nothing listens, which is then said elsewhere."""
    name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdigit() else (host, "", "443")
    context = ssl.create_default_context()
    # Only a question: nothing is said over this connection, and the one that is used checks the certificate.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(name.strip("[]"), int(port), ssl=context)
    except (ssl.SSLError, ConnectionResetError, TimeoutError):
        return False
    except OSError:
        return True
    writer.transport.abort()
    return True


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine by its name: localhost, 127.0.0.0/8 or ::1, as docker has it."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def wanted(reference: Reference, *, default: Tag | None = LATEST) -> Tag | Digest:
    """The tag or digest that is meant.

    Raises:
        ReferenceMissing: neither was given, and there is no default.
    """
    found = reference.digest or reference.tag or default
    if found is None:
        raise ReferenceMissing(f"{reference.display} needs a tag or a digest")
    return found


def name_of(reference: Reference) -> RepositoryName:
    return reference.repository or UNNAMED
