"""RemoteRegistry: a registry over HTTP, through the distribution specification and nothing else.

What the other side says is believed only as far as it can be checked: a manifest's digest is that of its bytes, a
digest in a header chooses at most the algorithm, `Location` and `Link` lead where `origin.follow` lets them.
A blob's bytes are checked by whoever keeps them (`blob_stream.verified`, or the layout's ingest).
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from aiohttp.abc import AbstractResolver
from multidict import CIMultiDictProxy
from yarl import URL

from kitclient.blob_stream import BlobSource
from kitclient.credentials import CredentialSource
from kitclient.errors import ServerMisbehaved
from kitclient.origin import follow, is_same_origin
from kitclient.progress import BlobProgress
from kitclient.remote_body import open_body
from kitclient.remote_upload import BlobPush, RemoteUpload, UploadNotes
from kitclient.tls import TlsOptions
from kitclient.transport import USER_AGENT, RetryPolicy, Transport, read_bounded
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    ContentInvalid,
    DigestInvalid,
    ManifestInvalid,
    ManifestTooLarge,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    OciError,
    TagInvalid,
    Unsupported,
)
from kitspec.http_fields import ByteSpan, parse_next_link
from kitspec.interface import BlobBody, OciRegistry, StoredManifest
from kitspec.manifest import MANIFEST_SIZE_MAX, Index, parse_manifest, referrer_of
from kitspec.media_types import MANIFEST_TYPES, OCI_INDEX, OCI_MANIFEST
from kitspec.names import RepositoryName, Tag, fallback_tag

# 10,000 tags of 128 characters are 1.3 MiB of JSON.
_PAGE_SIZE_MAX = 8 * 1024 * 1024
_PAGE_COUNT_MAX = 10_000
_PAGE = {"n": "1000"}
_ACCEPT = ", ".join([*MANIFEST_TYPES, "*/*;q=0.1"])


class RemoteRegistry:
    """A registry over HTTP; an async context manager.

    Args:
        host: `host[:port]`; `docker.io` means Docker Hub.
        plain_http: speak http. Never chosen by itself, for no host.
        proxy: URL of an HTTP proxy; None takes HTTP_PROXY, HTTPS_PROXY and NO_PROXY, and none for this machine.
        credentials: asked for `host` when the registry asks us, and never for another host.
        concurrency: requests under way at once.
        uploads: a folder where begun uploads are noted, so that a later process can go on with them.
        resolver: for tests.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool = False,
        tls: TlsOptions | None = None,
        proxy: str | None = None,
        credentials: CredentialSource | None = None,
        concurrency: int = 5,
        user_agent: str = USER_AGENT,
        retry: RetryPolicy | None = None,
        uploads: Path | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.transport = Transport(
            host,
            plain_http=plain_http,
            tls=tls,
            proxy=proxy,
            credentials=credentials,
            # An open download and a question about another blob: two for each transfer.
            connections=2 * concurrency,
            user_agent=user_agent,
            retry=retry,
            resolver=resolver,
        )
        self.host = self.transport.host
        self._notes = UploadNotes(uploads)

    async def __aenter__(self) -> Self:
        await self.transport.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transport.close()

    async def ping(self) -> None:
        """Ask whether a registry is there and takes our credentials.

        Raises:
            Unauthorized: it does not.
            ServerMisbehaved: something answers that is not a registry.
        """
        async with self.transport.request("GET", self.transport.url("/v2/"), scope="") as answer:
            if answer.status != 200:
                raise ServerMisbehaved(f"{self.host} answered {answer.status} to /v2/; wanted 200")

    async def log_in(self) -> bool:
        """Have the registry look at our credentials, also where it lets everybody in without.

        Returns:
            Whether it was shown them. An identity token is shown to who asks for it only.

        Raises:
            Unauthorized: it refuses them.
        """
        await self.ping()
        if not self.transport.authorizer.was_asked:
            if not await self.transport.authorizer.show_unasked():
                return False
            await self.ping()
        return True

    # ---- reading

    async def stat_blob(self, name: RepositoryName, digest: Digest) -> Descriptor:
        async with self.transport.request(
            "HEAD", self._blob_url(name, digest), scope=_pull(name), missing=(BlobUnknown,)
        ) as answer:
            size = answer.content_length
        if size is None:
            raise ServerMisbehaved(f"{self.host} does not say how large {digest} is")
        return Descriptor("application/octet-stream", digest, size)

    @asynccontextmanager
    async def open_blob(
        self, name: RepositoryName, digest: Digest, span: ByteSpan | None = None
    ) -> AsyncIterator[BlobBody]:
        """A body that breaks is gone on with where it broke, a bounded number of times.

        Raises:
            BlobUnknown, RangeInvalid: as the interface says.
            RegistryUnreachable: it broke too often.
        """
        async with open_body(self.transport, self._blob_url(name, digest), _pull(name), span) as body:
            yield body

    async def get_manifest(self, name: RepositoryName, reference: Tag | Digest) -> StoredManifest:
        """A manifest whose digest was computed from its bytes.

        Raises:
            ManifestUnknown: no such tag or digest; also for a repository that is not there, unless the registry says so.
            DigestInvalid: the bytes are not what was asked for.
            ServerMisbehaved: more than 4 MiB.
        """
        url = self._url(name, f"manifests/{reference}")
        async with self.transport.request(
            "GET", url, scope=_pull(name), headers={"Accept": _ACCEPT}, missing=(ManifestUnknown, NameUnknown)
        ) as answer:
            content = await read_bounded(answer, MANIFEST_SIZE_MAX, what=f"the manifest {name}@{reference}")
            announced = answer.headers.get("Docker-Content-Digest", "")
            media_type = _media_type(answer.headers.get("Content-Type", ""), content)
        if isinstance(reference, Digest):
            digest = Digest.of(content, reference.algorithm)
            if digest != reference:
                raise DigestInvalid(f"{self.host} answered with {digest} when asked for {reference}")
        else:
            # Of what is announced only the algorithm counts: the digest is that of the bytes.
            digest = Digest.of(content, "sha512" if announced.startswith("sha512:") else "sha256")
        return StoredManifest(content, media_type, digest)

    # ---- writing

    async def begin_upload(self, name: RepositoryName) -> RemoteUpload:
        return await RemoteUpload.begin(self.transport, name, _push(name))

    async def resume_upload(self, name: RepositoryName, location: str) -> RemoteUpload:
        return await RemoteUpload.resume(self.transport, name, _push(name), location)

    async def put_blob(
        self, name: RepositoryName, blob: Descriptor, read: BlobSource, progress: BlobProgress | None = None
    ) -> None:
        """Store a blob of known digest, in one request or in chunks that can be gone on with.

        Raises:
            DigestInvalid: what `read` gave is not the blob.
        """
        push = BlobPush(self.transport, name, _push(name), blob, read, progress=progress, notes=self._notes)
        await push.run()

    async def mount_blob(
        self, name: RepositoryName, digest: Digest, *, source: RepositoryName | None = None
    ) -> Descriptor | None:
        query = {"mount": str(digest)} | ({"from": str(source)} if source is not None else {})
        scope = _push(name) if source is None else f"{_push(name)} {_pull(source)}"
        async with self.transport.request(
            "POST", self._url(name, "blobs/uploads/", query), scope=scope
        ) as answer:
            status, upload = answer.status, RemoteUpload.of_answer(self.transport, name, _push(name), answer)
        if status == 201:
            return await self.stat_blob(name, digest)
        if upload is not None:
            await upload.cancel()
        return None

    async def put_manifest(
        self,
        name: RepositoryName,
        content: bytes,
        media_type: str,
        *,
        expect: Digest | None = None,
        tags: tuple[Tag, ...] = (),
    ) -> Descriptor:
        """As the interface says; a tag for a sha512 digest needs a registry of specification 1.2.

        For a manifest with a subject the fallback index is kept where the registry has no referrers API.
        """
        digest = Digest.of(content, expect.algorithm if expect is not None else "sha256")
        if expect is not None and digest != expect:
            raise DigestInvalid(f"the manifest hashes to {digest}, not to {expect}")
        if len(content) > MANIFEST_SIZE_MAX:
            raise ManifestTooLarge(
                f"a manifest of {len(content)} bytes; at most {MANIFEST_SIZE_MAX} are sent"
            )
        manifest = parse_manifest(content, media_type)
        stored = StoredManifest(content, media_type, digest)
        if digest.algorithm == "sha256" and tags:
            answers = [await self._put_manifest(name, tag, stored) for tag in dict.fromkeys(tags)]
            answer = answers[-1]
        else:
            query = "&".join(f"tag={quote(tag)}" for tag in dict.fromkeys(tags))
            answer = await self._put_manifest(name, f"{digest}?{query}" if query else str(digest), stored)
            accepted = {tag.strip() for field in answer.getall("OCI-Tag", []) for tag in field.split(",")}
            if not accepted.issuperset(tags):
                raise Unsupported(f"{self.host} stored {digest}, but cannot tag a {digest.algorithm} digest")
        if manifest.subject is not None and "OCI-Subject" not in answer:
            await self._change_fallback(
                name, manifest.subject.digest, add=referrer_of(manifest, stored.digest, len(stored.content))
            )
        return stored.descriptor

    # ---- deleting

    async def delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        async with self.transport.request(
            "DELETE", self._blob_url(name, digest), scope=_delete(name), missing=(BlobUnknown,)
        ):
            pass

    async def delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        """Raises: Unsupported where the registry cannot delete, or cannot delete tags."""
        subject = await self._subject(name, reference) if isinstance(reference, Digest) else None
        async with self.transport.request(
            "DELETE",
            self._url(name, f"manifests/{reference}"),
            scope=_delete(name),
            missing=(ManifestUnknown, NameUnknown),
        ):
            pass
        if subject is not None and isinstance(reference, Digest):
            await self._change_fallback(name, subject, drop=reference)

    # ---- listing

    async def repositories(self, *, after: str = "") -> AsyncIterator[RepositoryName]:
        url = self.transport.url("/v2/_catalog", _PAGE)
        found: set[RepositoryName] = set()
        async for page in self.pages(url, scope="registry:catalog:*"):
            found.update(RepositoryName(text) for text in _texts(page, "repositories") if text > after)
        for name in sorted(found):
            yield name

    async def tags(self, name: RepositoryName, *, after: str = "") -> AsyncIterator[Tag]:
        # From the beginning, and collected: registries sort in several ways, and `last` means a place in theirs.
        url = self._url(name, "tags/list", _PAGE)
        found: set[Tag] = set()
        async for page in self.pages(url, scope=_pull(name), missing=(NameUnknown,)):
            found.update(Tag(text) for text in _texts(page, "tags") if text > after)
        for tag in sorted(found):
            yield tag

    async def referrers(
        self, name: RepositoryName, subject: Digest, *, artifact_type: str | None = None
    ) -> AsyncIterator[Descriptor]:
        query = {"artifactType": artifact_type} if artifact_type is not None else None
        url = self._url(name, f"referrers/{subject}", query)
        seen: set[Digest] = set()
        try:
            async for page in self.pages(url, scope=_pull(name), missing=(_NoReferrers,)):
                for descriptor in _referrers(page.content, self.host):
                    if descriptor.digest not in seen and artifact_type in (None, descriptor.artifact_type):
                        seen.add(descriptor.digest)
                        yield descriptor
        except _NoReferrers:
            index = await self._fallback_index(name, subject)
            for descriptor in index.manifests if index is not None else ():
                if artifact_type in (None, descriptor.artifact_type):
                    yield descriptor

    # ---- pieces

    def _url(self, name: RepositoryName, rest: str, query: Mapping[str, str] | None = None) -> URL:
        return self.transport.url(f"/v2/{name}/{rest}", query)

    def _blob_url(self, name: RepositoryName, digest: Digest) -> URL:
        return self._url(name, f"blobs/{digest}")

    async def _put_manifest(
        self, name: RepositoryName, reference: str, stored: StoredManifest
    ) -> CIMultiDictProxy[str]:
        async with self.transport.request(
            "PUT",
            self._url(name, f"manifests/{reference}"),
            scope=_push(name),
            headers={"Content-Type": stored.media_type},
            body=lambda: io.BytesIO(stored.content),
        ) as answer:
            said = answer.headers.get("Docker-Content-Digest", "")
            if answer.status != 201 or (said.startswith(stored.digest.algorithm) and said != stored.digest):
                raise ServerMisbehaved(
                    f"{self.host} answered {answer.status} {said[:160]} to the manifest {stored.digest}"
                )
            return answer.headers

    async def pages(
        self, url: URL, *, scope: str, missing: tuple[type[OciError], ...] = ()
    ) -> AsyncIterator[_Page]:
        """Each page once; `Link` is followed on the same origin and the same path only."""
        visited: set[URL] = set()
        following: URL | None = url
        while following is not None:
            if following in visited or len(visited) >= _PAGE_COUNT_MAX:
                raise ServerMisbehaved(f"{self.host} lists {url.path} without end")
            visited.add(following)
            async with self.transport.request("GET", following, scope=scope, missing=missing) as answer:
                content = await read_bounded(answer, _PAGE_SIZE_MAX, what=f"a page of {url.path}")
                link = parse_next_link(", ".join(answer.headers.getall("Link", [])))
            yield _Page(content, self.host)
            if link is None:
                return
            current = following
            following = follow(current, link, origin=self.transport.origin, what="Link")
            if not is_same_origin(following, self.transport.origin) or following.path != url.path:
                raise ServerMisbehaved(
                    f"{self.host} continues {url.path} at {following.with_query(None)}; refused"
                )

    async def _fallback_index(self, name: RepositoryName, subject: Digest) -> Index | None:
        """What clients list under the fallback tag. distribution-spec 1.1.1, "Unavailable Referrers API"."""
        try:
            stored = await self.get_manifest(name, fallback_tag(subject))
        except (ManifestUnknown, NameUnknown):
            return None
        manifest = parse_manifest(stored.content, stored.media_type)
        return manifest if isinstance(manifest, Index) else None

    async def _change_fallback(
        self,
        name: RepositoryName,
        subject: Digest,
        *,
        add: Descriptor | None = None,
        drop: Digest | None = None,
    ) -> None:
        index = await self._fallback_index(name, subject)
        before = list(index.manifests) if index is not None else []
        after = [one for one in before if one.digest != drop]
        if add is not None and all(one.digest != add.digest for one in before):
            after.append(add)
        if after == before:
            return
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [descriptor.to_json() for descriptor in after],
        }
        content = json.dumps(document, separators=(",", ":")).encode()
        stored = StoredManifest(content, OCI_INDEX, Digest.of(content))
        await self._put_manifest(name, str(fallback_tag(subject)), stored)

    async def _subject(self, name: RepositoryName, digest: Digest) -> Digest | None:
        stored = await self.get_manifest(name, digest)
        try:
            manifest = parse_manifest(stored.content, stored.media_type)
        except ManifestInvalid:
            return None  # what cannot be read can still be deleted
        return manifest.subject.digest if manifest.subject is not None else None


class _NoReferrers(OciError):
    """The registry has no referrers API."""


@dataclass(frozen=True, slots=True)
class _Page:
    content: bytes
    host: str


def _pull(name: RepositoryName) -> str:
    return f"repository:{name}:pull"


def _push(name: RepositoryName) -> str:
    return f"repository:{name}:pull,push"


def _delete(name: RepositoryName) -> str:
    return f"repository:{name}:delete"


def _texts(page: _Page, key: str) -> list[str]:
    try:
        document: Any = json.loads(page.content)
        texts = document.get(key) or []
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            for text in texts:
                (Tag if key == "tags" else RepositoryName)(text)
            return texts
    except (ValueError, AttributeError, RecursionError, TagInvalid, NameInvalid) as error:
        raise ServerMisbehaved(f"{page.host} sent a list of {key} that is not one: {error}") from error
    raise ServerMisbehaved(f"{page.host} sent a list of {key} that is not one")


def _referrers(content: bytes, host: str) -> tuple[Descriptor, ...]:
    try:
        index = parse_manifest(content, OCI_INDEX)
    except (OciError, ContentInvalid) as error:
        raise ServerMisbehaved(f"{host} sent a list of referrers that is not an index: {error}") from error
    return index.manifests if isinstance(index, Index) else ()


def _media_type(field: str, content: bytes) -> str:
    """What the registry says it is, when that is a manifest's type; else what the document says; else OCI's."""
    media_type = field.partition(";")[0].strip().lower()
    if media_type in MANIFEST_TYPES:
        return media_type
    try:
        document = json.loads(content)
        stated = document.get("mediaType") if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        stated = None
    return stated if isinstance(stated, str) and stated in MANIFEST_TYPES else OCI_MANIFEST


_: type[OciRegistry] = RemoteRegistry
