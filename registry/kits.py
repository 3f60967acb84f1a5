"""ModelKits as the registry understands them: which files they hold, and where the bytes of each are.

Every view begins with `Kits.choose`, which turns a reference and a choice into a repository and the layers that will be read: that
somebody may read some layers only is kept there, and for what has a digest of its own in `layer_access.py`. Nothing here knows HTTP, and nothing is read from a layer but by way of
`ChosenKit.layers`.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    ContentInvalid,
    Denied,
    FileUnknown,
    FilterInvalid,
    ManifestInvalid,
    ManifestUnknown,
    QueryInvalid,
)
from kitspec.interface import StoredManifest
from kitspec.kitfile import CONFIG_SIZE_MAX, Kitfile, Section
from kitspec.layer_tar import BLOCK_SIZE, TRAILER, format_member, format_padding
from kitspec.manifest import Index, Manifest, parse_manifest
from kitspec.media_types import MANIFEST_TYPES, parse_layer_media_type
from kitspec.modelpack import kitfile_of
from kitspec.names import RepositoryName, Tag, ViewName, view_of
from kitspec.path_glob import PathGlob
from kitspec.selection import EntryLayer, Filter, LayerPlace, includes_kitfile, pair_layers, place_of
from kitspec.views import Kit, Place, choose_by_filter, choose_by_name, form_of, layers_of, places_of
from registry.auth.layers import LayerScope
from registry.content import Content, Literal, Piece, Segment
from registry.derived import DerivedRecords
from registry.hosted import HostedRegistry, Versions
from registry.member_index import MemberIndexes
from registry.member_table import MemberTable, TableMember
from storage_backends.interface import ObjectMissing
from storage_backends.threads import Threads

# Of one worker: bytes of manifests and configs that were read lately. As objects they take ten times as much.
_KITS_SIZE_MAX: Final = 4 * 1024 * 1024
_THREADS: Final = 2
# Files that are looked at before others have their turn.
_TURN_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class KitLayer:
    """A chosen layer and where its members go."""

    pair: EntryLayer
    place: LayerPlace

    @property
    def digest(self) -> Digest:
        return self.pair.layer.digest


@dataclass(frozen=True, slots=True)
class ChosenKit:
    """A kit of a repository, and the part of it that was asked for.

    Attributes:
        chosen: entries of the Kitfile.
        layers: of those entries, in the manifest's order.
        versions: the records that this rests on, as they were when it was looked up.
    """

    name: RepositoryName
    kit: Kit
    chosen: frozenset[Place]
    layers: tuple[KitLayer, ...]
    versions: Versions


@dataclass(frozen=True, slots=True)
class KitFile:
    """A file or a folder of a kit.

    Attributes:
        path: in the kit.
        mode: permission bits.
        digest: of its content; None for a folder, and in an archive also for what nobody has hashed yet.
        offset: of its content in the inflated layer.
    """

    path: str
    is_folder: bool
    mode: int
    size: int
    digest: Digest | None
    layer: KitLayer
    offset: int

    @property
    def content(self) -> Content:
        piece = Piece(self.layer.digest, self.layer.pair.layer_type, self.offset, self.offset + self.size)
        return Content([piece])


class Kits:
    """One for each worker; `close` it."""

    def __init__(self, registry: HostedRegistry, derived: DerivedRecords, indexes: MemberIndexes) -> None:
        self._registry = registry
        self._derived = derived
        self.indexes = indexes
        # Of our own: patterns from strangers are not to keep everybody's pool busy.
        self._threads = Threads(_THREADS, "kits")
        self._read: OrderedDict[tuple[RepositoryName, Digest], Kit] = OrderedDict()
        self._read_size = 0

    def close(self) -> None:
        self._threads.close()

    async def choose(
        self,
        name: RepositoryName,
        reference: Tag | Digest,
        filters: Sequence[Filter] = (),
        *,
        scope: LayerScope | None,
        is_narrowed: bool = False,
    ) -> ChosenKit:
        """A kit, and the part of it that a view's tag or filters choose.

        Args:
            reference: of a kit, or a tag that names a view: which form it asks for does not matter here.
            scope: what the reader may have of it; None for all.
            is_narrowed: of what is chosen leave away what the reader may not have, instead of refusing all of it.

        Raises:
            Denied: the reader may not have all of it, or, narrowed, none; the message names what they may have.
            ManifestUnknown: there is no such reference, it is no ModelKit, a selector chooses nothing, or there is no such form.
            QueryInvalid: a filter chooses nothing, or two things at once.
            ManifestInvalid: the kit is broken.
        """
        view = view_of(reference) if isinstance(reference, Tag) else None
        stored, versions = await self.find_manifest(name, view.base if view is not None else reference)
        kit = await self.read(name, stored)
        try:
            chosen = _chosen(kit, view, filters)
        except (ManifestUnknown, QueryInvalid) as error:
            if scope is None or scope.has_kitfile:
                raise
            # What it says names entries, and that is the Kitfile's to say.
            raise not_in_scope(name, reference, scope, kit.kitfile) from error
        if scope is not None:
            readable = frozenset(place for place in chosen if place[0] in scope.sections)
            if readable != chosen and not (is_narrowed and readable):
                raise not_in_scope(name, reference, scope, kit.kitfile)
            chosen = readable
        return _choice(name, kit, chosen, versions)

    async def choose_places(
        self, name: RepositoryName, digest: Digest, places: frozenset[Place]
    ) -> ChosenKit:
        """`choose` for a choice that was made before. Raises as `choose`."""
        stored, versions = await self.find_manifest(name, digest)
        return _choice(name, await self.read(name, stored), places, versions)

    async def find_manifest(
        self, name: RepositoryName, reference: Tag | Digest
    ) -> tuple[StoredManifest, Versions]:
        """A manifest that was pushed, or by its digest one that was derived; with the records that this rests on.

        Raises:
            ManifestUnknown, NameUnknown: there is neither.
        """
        try:
            return await self._registry.find_manifest(name, reference)
        except ManifestUnknown:
            if isinstance(reference, Tag):
                raise
            found = await self._derived.get(name, reference)
            if found is None or found[0].media_type not in MANIFEST_TYPES:
                raise
            derived, versions = found
            return StoredManifest(derived.content, derived.media_type, reference), versions

    async def read(self, name: RepositoryName, stored: StoredManifest) -> Kit:
        """The kit that a manifest describes.

        Raises:
            ManifestUnknown: it describes none.
            ManifestInvalid: it does, and is broken.
            BlobUnknown: its config is not here.
        """
        known = self._read.get((name, stored.digest))
        if known is not None:
            self._read.move_to_end((name, stored.digest))
            return known
        manifest = parse_manifest(stored.content, stored.media_type)
        if isinstance(manifest, Index):
            raise ManifestUnknown(
                f"{stored.digest} is an index, not a ModelKit; name one of its {len(manifest.manifests)} manifests by digest"
            )
        if manifest.family is None:
            raise ManifestUnknown(
                f"{stored.digest} is not a ModelKit: its config is {manifest.config.media_type[:128]!a}; "
                "views are made of ModelKits and ModelPacks"
            )
        try:
            config = manifest.config.data
            if config is None:
                config = await self._read_config(name, manifest.config.digest)
            kitfile = kitfile_of(manifest, config)
        except ContentInvalid as error:
            raise _broken(stored.digest, error) from error
        kit = Kit(stored.digest, stored.content, manifest, config, kitfile)
        if (name, stored.digest) in self._read:
            return kit  # somebody else was as fast
        self._read[name, stored.digest] = kit
        self._read_size += _size_of(kit)
        while self._read_size > _KITS_SIZE_MAX:
            _, forgotten = self._read.popitem(last=False)
            self._read_size -= _size_of(forgotten)
        return kit

    async def _read_config(self, name: RepositoryName, digest: Digest) -> bytes:
        try:
            async with self._registry.open_blob(name, digest) as body:
                # Of a sparse manifest the size may be anything, whatever the manifest says.
                if body.size > CONFIG_SIZE_MAX:
                    raise ContentInvalid(f"a config of {body.size} bytes; at most {CONFIG_SIZE_MAX} are read")
                return b"".join([chunk async for chunk in body])
        except BlobUnknown:
            found = await self._derived.get(name, digest)
            if found is None:
                raise
            return found[0].content

    def index_soon(self, manifest: Manifest | Index) -> None:
        """A manifest was pushed: if it is a kit's, views of it will be asked for."""
        if isinstance(manifest, Manifest) and manifest.family is not None:
            layers = [(layer.digest, parse_layer_media_type(layer.media_type)) for layer in manifest.layers]
            self.indexes.make_soon([(digest, kind) for digest, kind in layers if kind is not None])

    # ---- files

    async def files(
        self,
        choice: ChosenKit,
        *,
        prefix: str = "",
        after: str | None = None,
        globs: Sequence[PathGlob] = (),
    ) -> AsyncIterator[KitFile]:
        """Files and folders in the order of their paths' bytes; a folder that several layers list comes once.

        Args:
            globs: of the paths that are wanted; none for all.

        Raises:
            ManifestInvalid: a layer cannot be looked into.
            BlobUnknown: a layer is not in the repository.
        """
        tables = [(layer, await self._table(choice, layer, is_hashed=True)) for layer in choice.layers]
        listings = [_members(layer, table, prefix, after) for layer, table in tables]
        found = _unrepeated(heapq.merge(*listings, key=lambda file: file.path.encode()))
        turn = 1
        while files := list(islice(found, turn)):
            # Whoever asks for little waits for little; whoever asks for all leaves others their turn.
            turn = min(2 * turn, _TURN_MAX)
            if globs:
                files = await self._threads.run(_wanted, files, globs)
            else:
                await asyncio.sleep(0)
            for file in files:
                yield file

    async def find_file(self, choice: ChosenKit, path: str) -> KitFile:
        """The file at a path.

        Raises:
            FileUnknown: there is none among what was chosen.
            ManifestInvalid: two layers have different ones.
        """
        found: list[KitFile] = []
        for layer in choice.layers:
            within = _path_in_layer(layer, path)
            if within is None:
                continue
            member = (await self._table(choice, layer)).find(within)
            if member is not None:
                layer_type = layer.pair.layer_type
                found.append(_file(layer, await self.indexes.hashed_member(layer.digest, layer_type, member)))
        files = [file for file in found if not file.is_folder]
        if not files:
            if found:
                raise FileUnknown(f"{path[:200]!a} is a folder; its files are listed by ?prefix=")
            raise FileUnknown(f"no file {path[:200]!a} in what was chosen of {choice.kit.digest}")
        if len({file.digest for file in files}) > 1:
            raise ManifestInvalid(
                f"{len(files)} layers hold different files {path[:200]!a}: "
                f"{' and '.join(file.layer.digest for file in files[:2])}; choose one of them by a filter"
            )
        return files[0]

    async def find_digest(self, choice: ChosenKit, digest: Digest) -> KitFile | None:
        """A chosen file with this content, if there is one."""
        for layer in choice.layers:
            member = (await self._table(choice, layer, is_hashed=True)).find_digest(digest)
            if member is not None:
                return _file(layer, member)
        return None

    # ---- archives

    async def archive(self, choice: ChosenKit, globs: Sequence[PathGlob] = ()) -> Content:
        """A tar of what was chosen, layer by layer: where a layer's own bytes will do, they are what is sent.

        Args:
            globs: of the paths that are wanted; none for all.

        Raises:
            ManifestInvalid: a layer cannot be looked into.
            FileUnknown: no path is wanted by any of `globs`.
        """
        segments: list[Segment] = []
        for layer in choice.layers:
            segments += await self._threads.run(_archived, layer, await self._table(choice, layer), globs)
        if globs and not segments:
            raise FileUnknown("no path of what was chosen is wanted by any path= pattern")
        return Content([*segments, Literal(TRAILER)])

    async def tar_of(self, choice: ChosenKit, layer: KitLayer, *, is_readable: bool) -> Content:
        """A layer as a tar that was written anew: a raw layer as what it would be in a tar; modes that anybody may read.

        Args:
            is_readable: files get 0644 or 0755, folders 0755; otherwise modes stay.
        """
        table = await self._table(choice, layer)
        segments = await self._threads.run(_written_anew, layer, table, is_readable=is_readable)
        return Content([*segments, Literal(TRAILER)])

    async def diff_id(self, choice: ChosenKit, layer: KitLayer) -> Digest:
        """Digest of the inflated layer, as it was computed here."""
        return (await self._table(choice, layer)).diff_id or layer.digest

    async def _table(self, choice: ChosenKit, layer: KitLayer, *, is_hashed: bool = False) -> MemberTable:
        # A table is not the repository's: that the layer is, is what this asks.
        await self._registry.stat_blob(choice.name, layer.digest)
        table = self.indexes.hashed_table if is_hashed else self.indexes.table
        try:
            return await table(layer.digest, layer.pair.layer_type)
        except ObjectMissing as error:
            raise BlobUnknown(f"no blob {layer.digest} in {choice.name}: it was deleted just now") from error


def not_in_scope(
    name: RepositoryName, reference: Tag | Digest, scope: LayerScope, kitfile: Kitfile | None
) -> Denied:
    """For a reader who may have some layers only; says what to ask for instead.

    Args:
        kitfile: of the kit that was asked for; None where it is no kit.
    """
    may = f"you may read {scope} of ModelKits in {name}"
    if kitfile is None:
        return Denied(f"{may}, and {reference} is no ModelKit")
    selectors = scope.selectors(kitfile)
    if not selectors:
        return Denied(f"{may}, and {reference} has none of that")
    if isinstance(reference, Digest):
        wanted = f"{reference}?filter={','.join(selectors)}"
        return Denied(f"{may}; ask for /v2/{name}/manifests/{wanted}", detail={"filter": ",".join(selectors)})
    view = view_of(reference)
    base, form = (view.base, view.form) if view is not None else (reference, None)
    only = f"{base}.only.{'.'.join(selectors)}" + (f".as.{form}" if form is not None else "")
    return Denied(f"{may}; pull {name}:{only}", detail={"tag": only})


def sections_of(kit: Kit) -> frozenset[Section] | None:
    """The sections that all of a kit is made of; None where a layer is in none, or the kit is broken."""
    try:
        pairs = pair_layers(kit.manifest, kit.kitfile)
    except ContentInvalid:
        return None
    if len(pairs) != len(kit.manifest.layers):
        return None
    return frozenset(section for (section, _), _ in places_of(kit.kitfile))


def _size_of(kit: Kit) -> int:
    return len(kit.content) + len(kit.config)


def _choice(name: RepositoryName, kit: Kit, chosen: frozenset[Place], versions: Versions) -> ChosenKit:
    try:
        layers = tuple(KitLayer(pair, place_of(pair)) for pair in layers_of(kit, chosen))
    except ContentInvalid as error:
        raise _broken(kit.digest, error) from error
    return ChosenKit(name, kit, chosen, layers, versions)


def _chosen(kit: Kit, view: ViewName | None, filters: Sequence[Filter]) -> frozenset[Place]:
    try:
        named = choose_by_name(kit.kitfile, view.selectors if view is not None else ())
        if view is not None:
            form_of(view)
    except FilterInvalid as error:
        raise ManifestUnknown(str(error)) from error
    try:
        chosen = named & choose_by_filter(kit.kitfile, filters)
    except FilterInvalid as error:
        raise QueryInvalid(str(error)) from error
    if not chosen and not includes_kitfile(filters):
        raise QueryInvalid("the filters choose nothing of what the tag's selectors leave")
    return chosen


def _broken(digest: Digest, error: ContentInvalid) -> ManifestInvalid:
    return ManifestInvalid(f"the ModelKit {digest} is broken: {error}")


def _is_plain(layer: KitLayer) -> bool:
    """Whether the layer's own headers, as they stand, say where its members go."""
    return layer.pair.layer_type.packaging == "tar" and not layer.place.path


def _path_in_layer(layer: KitLayer, path: str) -> str | None:
    """What a path of the kit is called in a layer; None when the layer holds nothing there."""
    root = layer.place.path
    if layer.pair.layer_type.packaging == "raw":
        return "" if path == root else None
    if not root:
        return path
    return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else None


def _members(layer: KitLayer, table: MemberTable, prefix: str, after: str | None) -> Iterator[KitFile]:
    root = layer.place.path
    if not root:
        for member in table.members(prefix=prefix, after=after):
            yield _file(layer, member)
        return
    # Old kits and raw layers: the paths are others than the table's.
    for member in table.members():
        file = _file(layer, member)
        if file.path.startswith(prefix) and (after is None or file.path.encode() > after.encode()):
            yield file


def _file(layer: KitLayer, member: TableMember) -> KitFile:
    root = layer.place.path
    is_raw = layer.pair.layer_type.packaging == "raw"
    return KitFile(
        path=root if is_raw else f"{root}/{member.path}" if root else member.path,
        is_folder=member.is_folder,
        mode=layer.place.mode if is_raw else member.mode,
        size=member.size,
        digest=member.digest,
        layer=layer,
        offset=member.offset,
    )


def _unrepeated(files: Iterable[KitFile]) -> Iterator[KitFile]:
    """What several layers have at one path, the same in each, once."""
    previous: KitFile | None = None
    for file in files:
        if previous is None or (file.path, file.is_folder, file.digest) != (
            previous.path,
            previous.is_folder,
            previous.digest,
        ):
            yield file
        previous = file


def _wanted(files: Sequence[KitFile], globs: Sequence[PathGlob]) -> list[KitFile]:
    """In a thread: whoever asks chooses what patterns cost."""
    return [file for file in files if any(glob.matches(file.path) for glob in globs)]


def _archived(layer: KitLayer, table: MemberTable, globs: Sequence[PathGlob]) -> list[Segment]:
    """What an archive has of a layer."""
    wanted = [
        (file, member)
        for file, member in _in_order(layer, table)
        if not globs or any(glob.matches(file.path) for glob in globs)
    ]
    return list(_as_stored(wanted) if _is_plain(layer) else _anew(wanted))


def _written_anew(layer: KitLayer, table: MemberTable, *, is_readable: bool) -> list[Segment]:
    return list(_anew(_in_order(layer, table), is_readable=is_readable))


def _in_order(layer: KitLayer, table: MemberTable) -> list[tuple[KitFile, TableMember]]:
    """The members as they stand in the layer."""
    members = sorted(table.members(), key=lambda member: member.start)
    return [(_file(layer, member), member) for member in members]


def _as_stored(wanted: Sequence[tuple[KitFile, TableMember]]) -> Iterator[Segment]:
    """The layer's own bytes, headers and all; members that stand one behind the other are one piece."""
    begin = end = 0
    for file, member in wanted:
        if member.start != end:
            if end > begin:
                yield Piece(file.layer.digest, file.layer.pair.layer_type, begin, end)
            begin = member.start
        end = member.offset + member.size + -member.size % BLOCK_SIZE
    if end > begin:
        file = wanted[0][0]
        yield Piece(file.layer.digest, file.layer.pair.layer_type, begin, end)


def _anew(wanted: Sequence[tuple[KitFile, TableMember]], *, is_readable: bool = False) -> Iterator[Segment]:
    for file, _ in wanted:
        mode = _readable(file) if is_readable else file.mode
        yield Literal(format_member(file.path, size=file.size, mode=mode, is_directory=file.is_folder))
        if file.size:
            yield Piece(file.layer.digest, file.layer.pair.layer_type, file.offset, file.offset + file.size)
            yield Literal(format_padding(file.size))


def _readable(file: KitFile) -> int:
    return 0o755 if file.is_folder or file.mode & 0o100 else 0o644
