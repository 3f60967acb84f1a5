"""What was derived from a manifest of a repository, found again by its digest: on any worker, after any restart.

    a document      a manifest, an index or a config: its bytes
    a tar           the recipe of a layer that stands nowhere: which layer of which choice is to be written anew, and how

Kept as long as its source: when the manifest that it was derived from is gone from the repository, so is this.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Self

from kitspec.digest import Digest
from kitspec.errors import ServerError
from kitspec.kitfile import CONFIG_SIZE_MAX, Section
from kitspec.names import RepositoryName
from registry import layout
from registry.freshness import Freshness
from registry.hosted import Versions
from registry.records import RecordCache
from storage_backends.interface import ObjectMissing, StorageBackend

_CACHE_SIZE_MAX: Final = 8 * 1024 * 1024
_PLACES_MAX: Final = 4096
_RECORD_SIZE_MAX: Final = CONFIG_SIZE_MAX + 64 * 1024


@dataclass(frozen=True, slots=True)
class TarRecipe:
    """A layer that is written anew.

    Attributes:
        index: of the layer among all layers of its source.
    """

    index: int
    is_readable: bool


@dataclass(frozen=True, slots=True)
class Derived:
    """What was derived.

    Attributes:
        of: the manifest that it was derived from.
        content: of a document.
        recipe: of a tar.
        sections: of the Kitfile that it is made of; None where nobody has noted them: then it is for those who may read all.
    """

    of: Digest
    media_type: str
    content: bytes = b""
    recipe: TarRecipe | None = None
    sections: frozenset[Section] | None = None

    def to_bytes(self) -> bytes:
        head: dict[str, object] = {
            "of": self.of,
            "mediaType": self.media_type,
            "nonce": secrets.token_hex(8),
        }
        if self.recipe is not None:
            head["recipe"] = [self.recipe.index, self.recipe.is_readable]
        if self.sections is not None:
            head["sections"] = sorted(self.sections)
        return json.dumps(head).encode() + b"\n" + self.content

    @classmethod
    def from_bytes(cls, record: bytes) -> Self:
        head, _, content = record.partition(b"\n")
        document = json.loads(head)
        recipe = TarRecipe(*document["recipe"]) if "recipe" in document else None
        listed = document.get("sections")
        sections = frozenset(Section(text) for text in listed) if listed is not None else None
        return cls(Digest(document["of"]), document["mediaType"], content, recipe, sections)


class DerivedRecords:
    """One for each worker."""

    def __init__(self, backend: StorageBackend, freshness: Freshness) -> None:
        self._backend = backend
        self._freshness = freshness
        self._records: RecordCache[Derived] = RecordCache(
            backend, Derived.from_bytes, record_size_max=_RECORD_SIZE_MAX, size_max=_CACHE_SIZE_MAX
        )
        # Where a digest was found last: two kits that share a part may derive the same bytes.
        self._places: OrderedDict[tuple[RepositoryName, Digest], str] = OrderedDict()

    async def get(self, name: RepositoryName, digest: Digest) -> tuple[Derived, Versions] | None:
        """What was derived, with the records that this rests on; None when there is none, or no more."""
        if not await self.are_in(name):
            return None
        place = self._places.get((name, digest))
        if place is not None and (found := await self._read(name, digest, place)) is not None:
            return found
        async for info in self._backend.list(layout.view_prefix(name, digest)):
            if (found := await self._read(name, digest, info.key)) is not None:
                self._places[name, digest] = info.key
                if len(self._places) > _PLACES_MAX:
                    self._places.popitem(last=False)
                return found
        return None

    async def each(self, name: RepositoryName, digest: Digest) -> AsyncIterator[Derived]:
        """All that was derived with this digest: two kits that share a part may derive the same bytes of different sections."""
        if not await self.are_in(name):
            return
        async for info in self._backend.list(layout.view_prefix(name, digest)):
            if (found := await self._read(name, digest, info.key)) is not None:
                yield found[0]

    async def put(self, name: RepositoryName, digest: Digest, derived: Derived) -> None:
        """Keep what was derived, unless it is kept already."""
        key = layout.view_key(name, digest, derived.of)
        try:
            # Its source may have been gone, and come again while it is collected.
            await self._freshness.promise().rest_on(await self._backend.stat(key))
            if derived.sections is not None and (await self._records.get(key)).sections is None:
                await self._backend.write(key, derived.to_bytes())
        except ObjectMissing:
            if not await self.are_in(name):
                await self._backend.write(layout.viewed_key(name), b"")
            await self._backend.write(key, derived.to_bytes())

    async def are_in(self, name: RepositoryName) -> bool:
        """Whether anything was ever derived in a repository: most questions after a blob come before it is pushed."""
        try:
            await self._backend.stat(layout.viewed_key(name))
        except ObjectMissing:
            return False
        return True

    async def _read(self, name: RepositoryName, digest: Digest, key: str) -> tuple[Derived, Versions] | None:
        try:
            derived, version = await self._records.get_versioned(key)
            source = layout.manifest_key(name, derived.of)
            info = await self._backend.stat(source)
        except ObjectMissing:
            return None
        if derived.recipe is None and Digest.of(derived.content, digest.algorithm) != digest:
            raise ServerError(f"the derived document {digest} is damaged in the registry's storage")
        return derived, ((key, version), (source, info.version))
