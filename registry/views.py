"""Views of ModelKits as things of their own: manifests that are made on request, and blobs that stand nowhere.

    tag v1.only.model.as.image ──► choose (kits.py) ──► derive (kitspec/views.py) ──► records (derived.py) ──► manifest
    digest of any of that      ──► records ──► the same bytes
    digest of a file           ──► the ModelPacks derived in this repository ──► which file of which layer

Whatever is derived is written down before it is first given out, so that every worker and replica knows it by its digest.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    ContentInvalid,
    DigestInvalid,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
)
from kitspec.interface import StoredManifest
from kitspec.kitfile import Section
from kitspec.manifest import Index, Manifest, parse_manifest
from kitspec.media_types import OCI_LAYER
from kitspec.names import RepositoryName, Tag, ViewName, view_of
from kitspec.selection import Filter
from kitspec.views import (
    VIEW_VERSION,
    Form,
    ImageLayer,
    PackFile,
    Place,
    View,
    form_of,
    image_of,
    modelpack_of,
    slice_of,
)
from registry import layout
from registry.auth.layers import LayerScope
from registry.content import Content, Literal
from registry.content_reader import ContentReader
from registry.derived import Derived, DerivedRecords, TarRecipe
from registry.hosted import HostedRegistry, Versions
from registry.kits import ChosenKit, KitFile, KitLayer, Kits
from registry.records import RecordCache
from storage_backends.interface import ObjectMissing, ObjectTooLarge, StorageBackend, StorageError

_REMEMBERED_MAX: Final = 1024
_TAR_RECORD_SIZE_MAX: Final = 4096
_PACK_SIZE_MAX: Final = 1024 * 1024
_PACKS_SIZE_MAX: Final = 4 * 1024 * 1024


_Asked = tuple[RepositoryName, Digest, str]


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest to give out.

    Attributes:
        of: the manifest that it is a view of; None for one that was pushed.
        versions: the records that it rests on.
    """

    manifest: StoredManifest
    of: Digest | None
    versions: Versions


class Views:
    """One for each worker.

    Args:
        backend: where records of what was derived are kept.
    """

    def __init__(
        self,
        registry: HostedRegistry,
        backend: StorageBackend,
        derived: DerivedRecords,
        kits: Kits,
        reader: ContentReader,
    ) -> None:
        self._registry = registry
        self.backend = backend
        self._derived = derived
        self._kits = kits
        self._reader = reader
        self._packs: RecordCache[Pack] = RecordCache(
            backend, Pack.from_bytes, record_size_max=_PACK_SIZE_MAX, size_max=_PACKS_SIZE_MAX
        )
        # What was derived lately: (repository, source, what was asked) -> digest of the root.
        self._roots: OrderedDict[_Asked, Digest] = OrderedDict()
        self._deriving: WeakValueDictionary[_Asked, asyncio.Lock] = WeakValueDictionary()
        # In which pack a file was found lately.
        self._files: OrderedDict[tuple[RepositoryName, Digest, LayerScope | None], Pack] = OrderedDict()

    # ---- manifests

    async def find_manifest(
        self,
        name: RepositoryName,
        reference: Tag | Digest,
        filters: Sequence[Filter] = (),
        *,
        scope: LayerScope | None,
    ) -> FoundManifest:
        """A manifest that was pushed, or a view.

        Args:
            filters: in the syntax of kit's `--filter`: a slice of what `reference` names.
            scope: what the reader may have of a view; of what is no view that is to be asked elsewhere (`layer_access.py`).

        Raises:
            Denied: the reader may not have all of the view.
            ManifestUnknown, NameUnknown: there is no such thing; the message says what was wrong with a view's name.
            QueryInvalid: a filter chooses nothing.
            ManifestInvalid: the kit, or a layer of it, is broken.
        """
        view = view_of(reference) if isinstance(reference, Tag) else None
        if view is None and not filters:
            stored, versions = await self._kits.find_manifest(name, reference)
            of = await self._source_of(name, stored.digest, versions)
            return FoundManifest(stored, of, versions)
        choice = await self._kits.choose(name, reference, filters, scope=scope)
        root = await self._derive(choice, view)
        found = await self._derived.get(name, root)
        if found is None:
            raise ManifestUnknown(f"no manifest {reference} in {name}")  # its source was deleted just now
        derived, versions = found
        manifest = StoredManifest(derived.content, derived.media_type, root)
        return FoundManifest(manifest, derived.of, (*choice.versions, *versions))

    async def _source_of(self, name: RepositoryName, digest: Digest, versions: Versions) -> Digest | None:
        """What a manifest was derived from; None if it was pushed."""
        if any(key == layout.manifest_key(name, digest) for key, _ in versions):
            return None
        found = await self._derived.get(name, digest)
        return None if found is None else found[0].of

    async def _derive(self, choice: ChosenKit, view: ViewName | None) -> Digest:
        form = form_of(view) if view is not None else None
        asked = f"{form} {sorted(choice.chosen)}"
        key = (choice.name, choice.kit.digest, asked)
        # However many ask at once, it is derived once.
        async with self._deriving.setdefault(key, asyncio.Lock()):
            root = self._roots.get(key)
            if root is not None and await self._derived.get(choice.name, root) is not None:
                return root
            return await self._derive_anew(choice, form, key)

    async def _derive_anew(self, choice: ChosenKit, form: Form | None, key: _Asked) -> Digest:
        source = await self._source_of(choice.name, choice.kit.digest, choice.versions) or choice.kit.digest
        try:
            derived = await self._view(choice, form, source)
        except ContentInvalid as error:
            raise ManifestInvalid(f"no view of {choice.kit.digest}: {error}") from error
        root = derived.root.descriptor.digest
        # A slice says of itself what was chosen, with layers or without; other forms hold layers alone.
        sections = frozenset(
            [section for section, _ in choice.chosen]
            if form is None
            else [layer.pair.section for layer in choice.layers]
        )
        if form == "modelpack":
            await self._put_pack(choice, root)
        # Parts first: who knows the root can have the rest.
        for document in (*derived.parts, derived.root):
            record = Derived(source, document.media_type, document.content, sections=sections)
            await self._derived.put(choice.name, document.descriptor.digest, record)
        self._roots[key] = root
        if len(self._roots) > _REMEMBERED_MAX:
            self._roots.popitem(last=False)
        return root

    async def _view(self, choice: ChosenKit, form: Form | None, source: Digest) -> View:
        match form:
            case None:
                return await asyncio.to_thread(slice_of, choice.kit, choice.chosen, source=source)
            case "image" | "readable":
                return await self._image(choice, is_readable=form == "readable")
            case "modelpack":
                files = [file async for file in self._pack_files(choice)]
                return await asyncio.to_thread(modelpack_of, choice.kit, files)

    # ---- images

    async def _image(self, choice: ChosenKit, *, is_readable: bool) -> View:
        layers: list[ImageLayer] = []
        for layer in choice.layers:
            pair = layer.pair
            note = f"ModelKit {pair.section} {pair.entry.path}"
            if is_readable or pair.layer_type.packaging == "raw" or layer.place.path:
                blob = await self._tar(choice, layer, is_readable=is_readable)
                layers.append(ImageLayer(blob, blob.digest, note))
                continue
            compression = pair.layer_type.compression
            media_type = OCI_LAYER + (f"+{compression}" if compression else "")
            blob = Descriptor(media_type, layer.digest, pair.layer.size)
            layers.append(ImageLayer(blob, await self._kits.diff_id(choice, layer), note))
        return image_of(choice.kit, layers)

    async def _tar(self, choice: ChosenKit, layer: KitLayer, *, is_readable: bool) -> Descriptor:
        """A layer that is written anew: hashed once, then known."""
        content = await self._kits.tar_of(choice, layer, is_readable=is_readable)
        index = next(i for i, other in enumerate(choice.kit.manifest.layers) if other is layer.pair.layer)
        about = [
            VIEW_VERSION,
            layer.digest,
            str(layer.pair.layer_type),
            layer.place.path,
            layer.place.mode,
            is_readable,
        ]
        key = layout.tar_key(Digest.of(json.dumps(about).encode()))
        digest: Digest | None = None
        with suppress(ObjectMissing, ObjectTooLarge, DigestInvalid, UnicodeDecodeError):
            record, _ = await self.backend.read(key, size_max=_TAR_RECORD_SIZE_MAX)
            digest = Digest(record.decode())
        if digest is None:
            digest = await self._reader.digest(content)
            with suppress(StorageError):  # it is found out again next time
                await self.backend.write(key, digest.encode())
        recipe = TarRecipe(index, is_readable)
        sections = frozenset((layer.pair.section,))
        record_of = Derived(choice.kit.digest, OCI_LAYER, recipe=recipe, sections=sections)
        await self._derived.put(choice.name, digest, record_of)
        return Descriptor(OCI_LAYER, digest, content.size)

    # ---- ModelPacks

    async def _pack_files(self, choice: ChosenKit) -> AsyncIterator[PackFile]:
        async for file in self._kits.files(choice):
            if file.digest is not None:
                yield PackFile(file.path, file.layer.pair.section, file.digest, file.size, file.mode & 0o777)

    async def _put_pack(self, choice: ChosenKit, root: Digest) -> None:
        """Note whose files may be asked for by their digests."""
        places = [[str(section), index] for section, index in sorted(choice.chosen)]
        record = {"of": choice.kit.digest, "places": places, "nonce": secrets.token_hex(8)}
        key = layout.pack_key(choice.name, root)
        try:
            await self.backend.stat(key)
        except ObjectMissing:
            await self.backend.write(key, json.dumps(record).encode())

    # ---- blobs

    async def find_blob(self, name: RepositoryName, digest: Digest) -> Content:
        """A blob that stands nowhere: a derived config, a layer written anew, or a file of a derived ModelPack.

        That the reader may have it is the caller's to know.

        Raises:
            BlobUnknown: there is no such thing in the repository.
        """
        found = await self._derived.get(name, digest)
        if found is not None and found[0].recipe is None:
            return Content([Literal(found[0].content)])
        if found is not None and found[0].recipe is not None:
            recipe = found[0].recipe
            choice = await self._kits.choose(name, found[0].of, scope=None)  # the caller may have the digest
            wanted = choice.kit.manifest.layers[recipe.index]
            layer = next(layer for layer in choice.layers if layer.pair.layer is wanted)
            return await self._kits.tar_of(choice, layer, is_readable=recipe.is_readable)
        file = await self.find_file(name, digest)
        if file is None:
            raise BlobUnknown(f"no blob {digest} in {name}", detail={"digest": digest})
        return file.content

    async def find_file(
        self, name: RepositoryName, digest: Digest, scope: LayerScope | None = None
    ) -> KitFile | None:
        """A file by its digest, in the kits that were looked at as ModelPacks.

        Args:
            scope: sections that it is to be in; None for any.
        """
        if not await self._derived.are_in(name):
            return None
        key = (name, digest, scope)
        lately = self._files.get(key)
        if lately is not None:
            found = await self._look_into(name, lately, digest, scope)
            if found is not None:
                return found
            self._files.pop(key, None)
        async for info in self.backend.list(layout.packs_prefix(name)):
            derived = await self._derived.get(name, layout.pack_at(info.key))
            # Its manifest lists the files: most packs are passed over by a search of its bytes.
            if derived is None or digest.encode() not in derived[0].content:
                continue
            pack = await self._packs.get(info.key)
            found = await self._look_into(name, pack, digest, scope)
            if found is not None:
                self._files[key] = pack
                if len(self._files) > _REMEMBERED_MAX:
                    self._files.popitem(last=False)
                return found
        return None

    async def _look_into(
        self, name: RepositoryName, pack: Pack, digest: Digest, scope: LayerScope | None
    ) -> KitFile | None:
        places = pack.places
        if scope is not None:
            places = frozenset(place for place in places if place[0] in scope.sections)
        try:
            choice = await self._kits.choose_places(name, pack.of, places)
            return await self._kits.find_digest(choice, digest)
        except (ManifestUnknown, ManifestInvalid, BlobUnknown):
            return None  # its source, or a layer of it, is gone

    async def materialise(self, name: RepositoryName, manifest: Manifest | Index) -> None:
        """Store what a pushed manifest lists and only a view has: whoever pushes it was told that it is here."""
        for _, reference in manifest.references():
            if isinstance(manifest, Index):
                await self._materialise_manifest(name, reference.digest)
            else:
                await self._materialise_blob(name, reference.digest)

    async def _materialise_manifest(self, name: RepositoryName, digest: Digest) -> None:
        try:
            stored, versions = await self._kits.find_manifest(name, digest)
        except (ManifestUnknown, NameUnknown):
            return  # the index is refused for it
        if await self._source_of(name, digest, versions) is None:
            return
        manifest = parse_manifest(stored.content, stored.media_type)
        await self.materialise(name, manifest)
        await self._registry.store_manifest(
            name, manifest, stored.content, stored.media_type, expect=digest, tags=()
        )

    async def _materialise_blob(self, name: RepositoryName, digest: Digest) -> None:
        try:
            await self._registry.stat_blob(name, digest)
        except BlobUnknown:
            try:
                found = await self.find_blob(name, digest)
            except BlobUnknown:
                return  # the manifest is refused for it
            upload = await self._registry.begin_upload(name)
            try:
                await upload.append(self._reader.chunks(found), size=found.size)
                await upload.commit(digest)
            finally:
                await upload.cancel()


@dataclass(frozen=True, slots=True)
class Pack:
    """Which choice of which kit a derived ModelPack holds the files of."""

    of: Digest
    places: frozenset[Place]

    @classmethod
    def from_bytes(cls, record: bytes) -> Pack:
        document = json.loads(record)
        places = frozenset((Section(section), index) for section, index in document["places"])
        return cls(Digest(document["of"]), places)
