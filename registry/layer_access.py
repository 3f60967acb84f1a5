"""What a reader who may have some layers only can have by its digest: manifests and blobs of a repository.

    a kit                      all that it holds is readable
    what was derived           all that it was made of is readable, which its record says
    a layer                    a kit of the repository holds it in a readable section
    the config of a kit        the kit is readable, or Kitfiles are
    a file of a ModelPack      it stands in a readable section of a kit
    anything else              not: images, signatures, what no kit lists

Digests are found in kits by looking through those of the repository, the newest first; what was found is remembered, and holds
while that kit is there.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    ContentInvalid,
    Denied,
    DigestInvalid,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
)
from kitspec.interface import StoredManifest
from kitspec.kitfile import Section
from kitspec.names import RepositoryName, Tag
from kitspec.selection import pair_layers
from kitspec.views import Kit
from registry import layout
from registry.auth.layers import LayerScope
from registry.derived import DerivedRecords
from registry.kits import Kits, not_in_scope, sections_of
from registry.views import Views
from storage_backends.interface import ObjectMissing, StorageBackend

# Of one worker: digests in remembered kits, about 200 bytes each; and what was asked for lately.
_LISTED_MAX: Final = 100_000
_PROOFS_MAX: Final = 4096
_LOOKS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class _Holdings:
    """What a manifest lists, as far as it is a kit.

    Attributes:
        layers: the sections that each is in.
        config: None where it is no kit.
        sections: all; None where something is in none.
    """

    layers: Mapping[Digest, frozenset[Section]]
    config: Digest | None = None
    sections: frozenset[Section] | None = None

    def lets_read(self, digest: Digest, scope: LayerScope) -> bool:
        """Whether a reader may have this digest because of this kit. One readable section is enough: the bytes are the same."""
        if digest == self.config:
            return scope.has_kitfile or (self.sections is not None and scope.includes(self.sections))
        return not scope.sections.isdisjoint(self.layers.get(digest, ()))


class LayerAccess:
    """One for each worker."""

    def __init__(self, backend: StorageBackend, derived: DerivedRecords, kits: Kits, views: Views) -> None:
        self._backend = backend
        self._derived = derived
        self._kits = kits
        self._views = views
        # A manifest never changes under its digest.
        self._holdings: OrderedDict[tuple[RepositoryName, Digest], _Holdings] = OrderedDict()
        self._listed = 0
        # In which kit something was found readable.
        self._proofs: OrderedDict[tuple[RepositoryName, Digest, LayerScope], Digest] = OrderedDict()

    async def require_manifest(
        self, name: RepositoryName, reference: Tag | Digest, stored: StoredManifest, scope: LayerScope
    ) -> None:
        """Refuse what a reader may not have.

        Args:
            reference: under which `stored` was asked for.

        Raises:
            Denied: not all of it is readable; the message names what is.
        """
        if await self.may_read_manifest(name, stored, scope):
            return
        kit = await self._kit_of(name, stored)
        raise not_in_scope(name, reference, scope, kit.kitfile if kit is not None else None)

    async def may_read_manifest(
        self, name: RepositoryName, stored: StoredManifest, scope: LayerScope
    ) -> bool:
        kit = await self._kit_of(name, stored)
        sections = sections_of(kit) if kit is not None else None
        if sections is not None and scope.includes(sections):
            return True
        return await self._is_derived_readable(name, stored.digest, scope)

    async def require_blob(self, name: RepositoryName, digest: Digest, scope: LayerScope) -> None:
        """Refuse what a reader may not have, and what is not there, in the same words.

        Raises:
            Denied: so.
        """
        if not await self.may_read_blob(name, digest, scope):
            only = ".".join(word for word in str(scope).split(", ") if word != "kitfile")
            raise Denied(
                f"no blob {digest} among what you may read in {name}, which is {scope} of ModelKits; "
                f"pull a slice such as <tag>.only.{only}"
            )

    async def may_read_blob(self, name: RepositoryName, digest: Digest, scope: LayerScope) -> bool:
        return (
            await self._is_in_kit(name, digest, scope)
            or await self._is_derived_readable(name, digest, scope)
            or await self._views.find_file(name, digest, scope) is not None
        )

    async def _is_derived_readable(self, name: RepositoryName, digest: Digest, scope: LayerScope) -> bool:
        async for derived in self._derived.each(name, digest):
            if derived.sections is not None and scope.includes(derived.sections):
                return True
        return False

    async def _is_in_kit(self, name: RepositoryName, digest: Digest, scope: LayerScope) -> bool:
        key = (name, digest, scope)
        proof = self._proofs.get(key)
        if proof is not None:
            if (await self._holdings_of(name, proof)).lets_read(digest, scope):
                return True
            self._proofs.pop(key, None)
        manifests = await self._newest_first(name)
        for begin in range(0, len(manifests), _LOOKS_AT_ONCE):
            some = manifests[begin : begin + _LOOKS_AT_ONCE]
            looks = await asyncio.gather(*(self._holdings_of(name, manifest) for manifest in some))
            for manifest, holdings in zip(some, looks, strict=True):
                if holdings.lets_read(digest, scope):
                    self._proofs[key] = manifest
                    if len(self._proofs) > _PROOFS_MAX:
                        self._proofs.popitem(last=False)
                    return True
        return False

    async def _newest_first(self, name: RepositoryName) -> Sequence[Digest]:
        """The manifests of a repository: readers ask for what was pushed lately."""
        prefix = layout.manifests_prefix(name)
        found: list[tuple[float, Digest]] = []
        async for info in self._backend.list(prefix):
            try:
                digest = Digest(info.key.removeprefix(prefix).replace("/", ":", 1))
            except DigestInvalid:
                continue  # not a key of ours
            found.append((info.modified, digest))
        return [digest for _, digest in sorted(found, reverse=True)]

    async def _holdings_of(self, name: RepositoryName, digest: Digest) -> _Holdings:
        """Of a manifest that is there right now; nothing of one that is not."""
        key = (name, digest)
        try:
            await self._backend.stat(layout.manifest_key(name, digest))
            if (known := self._holdings.get(key)) is not None:
                self._holdings.move_to_end(key)
                return known
            stored, _ = await self._kits.find_manifest(name, digest)
            holdings = await self._look_into(name, stored)
        except (ObjectMissing, ManifestUnknown, NameUnknown, BlobUnknown):
            return _Holdings({})  # may be otherwise next time
        if key not in self._holdings:
            self._listed += len(holdings.layers) + 1
        self._holdings[key] = holdings
        while self._listed > _LISTED_MAX:
            _, forgotten = self._holdings.popitem(last=False)
            self._listed -= len(forgotten.layers) + 1
        return holdings

    async def _look_into(self, name: RepositoryName, stored: StoredManifest) -> _Holdings:
        """Raises: BlobUnknown: the config is not there."""
        try:
            return _holdings(await self._kits.read(name, stored))
        except (ManifestUnknown, ManifestInvalid):
            return _Holdings({})

    async def _kit_of(self, name: RepositoryName, stored: StoredManifest) -> Kit | None:
        """The kit that a manifest describes; None for none, or a broken one."""
        try:
            return await self._kits.read(name, stored)
        except (ManifestUnknown, ManifestInvalid, BlobUnknown):
            return None


def _holdings(kit: Kit) -> _Holdings:
    layers: dict[Digest, frozenset[Section]] = {}
    try:
        for pair in pair_layers(kit.manifest, kit.kitfile):
            digest = pair.layer.digest
            layers[digest] = layers.get(digest, frozenset()) | {pair.section}
    except ContentInvalid:
        return _Holdings({})
    return _Holdings(layers, kit.manifest.config.digest, sections_of(kit))
