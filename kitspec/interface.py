"""What a registry can do, wherever it is: in this process, over HTTP, in a folder.

`HostedRegistry` (the server's core), `RemoteRegistry` (HTTP) and `LayoutRegistry` (an OCI image layout) are three;
one contract suite, tests/contracts/registry_contract.py, holds for all of them.
Push is copy(folder -> remote), pull is copy(remote -> folder).
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.http_fields import ByteSpan
from kitspec.names import RepositoryName, Tag


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest's bytes as they were pushed, with what they were pushed as."""

    content: bytes
    media_type: str
    digest: Digest

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, len(self.content))


class BlobBody(Protocol):
    """The bytes of a blob, or of a span of it, once.

    The bytes are as they came from the other side: whoever keeps them checks the digest.
    """

    @property
    def size(self) -> int:
        """Bytes that the iteration will give."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class BlobUpload(Protocol):
    """A blob on its way in: begun, appended to, then committed or cancelled."""

    @property
    def location(self) -> str:
        """Opaque; gives the upload back to `resume_upload`."""
        ...

    @property
    def offset(self) -> int:
        """Bytes received and kept so far."""
        ...

    async def append(self, chunks: AsyncIterable[bytes], *, at: int | None = None) -> int:
        """Add bytes at the end; the new offset.

        What had arrived before `chunks` failed is kept where the registry can keep it: ask `offset`.

        Args:
            at: the offset that the caller believes in.

        Raises:
            UploadOutOfOrder: `at` is not where the upload ends, or somebody else is appending.
            BlobUploadUnknown: the upload ended, expired or never was.
        """
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Close the upload and make its bytes readable as `digest`.

        All or nothing. After `DigestInvalid` the upload is gone; after any other error it can be resumed.

        Args:
            digest: of the whole blob, not of the last chunk.

        Raises:
            DigestInvalid: the bytes hash to something else.
            BlobUploadUnknown: the upload ended, expired or never was.

        Spec: distribution-spec 1.1.1, end-6.
        """
        ...

    async def cancel(self) -> None:
        """Forget the upload and its bytes. May be called again, and after commit."""
        ...


class RegistryReader(Protocol):
    async def stat_blob(self, name: RepositoryName, digest: Digest) -> Descriptor:
        """Size of a blob; the media type is `application/octet-stream`, a registry does not know better.

        Raises:
            BlobUnknown: the repository does not hold it.
        """
        ...

    def open_blob(
        self, name: RepositoryName, digest: Digest, span: ByteSpan | None = None
    ) -> AbstractAsyncContextManager[BlobBody]:
        """The bytes of a blob, streamed.

        Raises:
            BlobUnknown: the repository does not hold it.
            RangeInvalid: `span` does not begin inside the blob.
        """
        ...

    async def get_manifest(self, name: RepositoryName, reference: Tag | Digest) -> StoredManifest:
        """A manifest, whole.

        Raises:
            ManifestUnknown: no such tag or digest in the repository.
            NameUnknown: no such repository.
        """
        ...


class RegistryWriter(Protocol):
    async def begin_upload(self, name: RepositoryName) -> BlobUpload: ...

    async def resume_upload(self, name: RepositoryName, location: str) -> BlobUpload:
        """Take an upload up again.

        Raises:
            BlobUploadUnknown: it ended, expired or never was, or it belongs to another repository.
        """
        ...

    async def mount_blob(
        self, name: RepositoryName, digest: Digest, *, source: RepositoryName | None = None
    ) -> Descriptor | None:
        """Make a blob of another repository readable in this one; None when that cannot be done: upload it.

        Spec: distribution-spec 1.1.1, end-11.
        """
        ...

    async def put_manifest(
        self,
        name: RepositoryName,
        content: bytes,
        media_type: str,
        *,
        expect: Digest | None = None,
        tags: tuple[Tag, ...] = (),
    ) -> Descriptor:
        """Store a manifest as received and point `tags` at it, in that order.

        Args:
            expect: when given it must match, and it chooses the algorithm; sha256 otherwise.

        Raises:
            ManifestInvalid, ManifestBlobUnknown, DigestInvalid, TagInvalid: nothing was stored.
        """
        ...


class RegistryDeleter(Protocol):
    async def delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        """Raises: BlobUnknown."""
        ...

    async def delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        """By tag only the tag goes; by digest the manifest and every tag that points at it.

        Raises:
            ManifestUnknown: no such tag or digest in the repository.
        """
        ...


class RegistryLister(Protocol):
    def repositories(self, *, after: str = "") -> AsyncIterator[RepositoryName]:
        """Names greater than `after`, in ASCII order."""
        ...

    def tags(self, name: RepositoryName, *, after: str = "") -> AsyncIterator[Tag]:
        """Tags greater than `after`, in ASCII order.

        Raises:
            NameUnknown: no such repository.
        """
        ...

    def referrers(
        self, name: RepositoryName, subject: Digest, *, artifact_type: str | None = None
    ) -> AsyncIterator[Descriptor]:
        """Manifests whose subject is `subject`, which need not exist.

        Spec: distribution-spec 1.1.1, end-12.
        """
        ...


class OciRegistry(RegistryReader, RegistryWriter, RegistryDeleter, RegistryLister, Protocol):
    """All of it."""
