"""Which manifests refer to a subject.

An entry is written before its manifest and removed after it, so a manifest never lacks its entry; an entry without a
manifest, left by a crash, is passed over. Who deletes a manifest removes the entry only as it was before: `add` writes another
version, and `renew` one more behind the manifest, for a deletion that had seen the first one already. Manifests pushed by clients that keep the fallback tag
(distribution-spec 1.1.1, "Referrers Tag Schema") are merged in.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import TooManyRequests
from kitspec.names import RepositoryName
from registry import layout
from storage_backends.interface import ObjectInfo, ObjectMissing, PreconditionFailed, StorageBackend

# A referrer's annotations come whole from its manifest, which is at most 4 MiB.
_ENTRY_SIZE_MAX = 5 * 1024 * 1024


class ReferrerIndex:
    """
    Args:
        count_max: referrers that one subject may have.
    """

    def __init__(self, backend: StorageBackend, *, count_max: int) -> None:
        self._backend = backend
        self._count_max = count_max

    async def add(self, name: RepositoryName, subject: Digest, referrer: Descriptor) -> None:
        """
        Raises:
            TooManyRequests: the subject has as many referrers as are allowed.
        """
        key = layout.referrer_key(name, subject, referrer.digest)
        others = [
            info.key
            async for info in self._backend.list(layout.referrers_prefix(name, subject))
            if info.key != key
        ]
        if len(others) >= self._count_max:
            raise TooManyRequests(
                f"{subject} has {len(others)} referrers, which is as many as this registry allows; delete some"
            )
        await self.renew(name, subject, referrer)

    async def renew(self, name: RepositoryName, subject: Digest, referrer: Descriptor) -> None:
        """Write an entry of `add` anew, so that whoever has seen it before does not remove it."""
        key = layout.referrer_key(name, subject, referrer.digest)
        await self._backend.write(key, json.dumps(referrer.to_json()).encode())

    async def seen(self, name: RepositoryName, subject: Digest, referrer: Digest) -> ObjectInfo | None:
        """The entry, for `remove`; None where there is none."""
        try:
            return await self._backend.stat(layout.referrer_key(name, subject, referrer))
        except ObjectMissing:
            return None

    async def remove(self, entry: ObjectInfo) -> None:
        """Remove an entry, unless it was written anew since it was `seen`."""
        with suppress(PreconditionFailed):
            await self._backend.delete(entry.key, expect=entry.version)

    async def entries(self, name: RepositoryName, subject: Digest) -> AsyncIterator[Descriptor]:
        """In the order of their digests; their manifests may be missing."""
        async for info in self._backend.list(layout.referrers_prefix(name, subject)):
            try:
                content, _ = await self._backend.read(info.key, size_max=_ENTRY_SIZE_MAX)
            except ObjectMissing:
                continue
            yield _descriptor(json.loads(content))


def _descriptor(document: dict[str, Any]) -> Descriptor:
    """What `add` wrote."""
    return Descriptor(
        media_type=document["mediaType"],
        digest=Digest(document["digest"]),
        size=document["size"],
        annotations=document.get("annotations", {}),
        artifact_type=document.get("artifactType"),
        data=base64.b64decode(document["data"]) if "data" in document else None,
    )
