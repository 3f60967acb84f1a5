"""fsck: is everything that is stored what its key says, and is everything there that something else needs? Changes nothing.

    content            listed: how much there is of each
    the catalogue
    repositories       each in one listing: links, manifests, tags, referrers, what was derived
    the rest           tables, the journal, records of the registry itself, keys of nobody
    leftovers          as the backend tells, and what is nobody's in its own place
    content            read and hashed, unless that is not wanted

While everything is being written. A listing is old when it is read: what does not fit is a suspicion only. Each suspicious object is
looked at again, alone and as the store has it now, and once more after a pause. What is found both times, at the same version of the
object, is a finding. That is sound because of the order of writes (docs/storage-layout.md): an object that was the same before and
after stood there while what it needs was missing, and but for the moment in which a push and a delete of the same manifest meet,
nothing points before, or longer than, what it points to is there.

In memory: 190 bytes for each blob of the store (its digest and size), and the keys of the four repositories that are looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kitspec.digest import ENCODED_LENGTH, Digest
from kitspec.errors import NameUnknown
from kitspec.names import RepositoryName
from registry import layout
from registry.fsck_checks import NOT_OURS, Check, Checks, Facts, StoreFacts
from registry.fsck_findings import Finding, Kind, Severity
from storage_backends.checks import INTERNAL
from storage_backends.interface import (
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    StorageBackend,
    StorageUnavailable,
)
from storage_backends.threads import Threads

__all__ = ["Checked", "Finding", "Fsck", "Kind", "Severity"]

T = TypeVar("T")
R = TypeVar("R")

_REPOSITORIES_AT_ONCE: Final = 4
# In each repository; a manifest has at most 4 MiB.
_OBJECTS_AT_ONCE: Final = 8
# Each keeps a processor busy.
_CONTENTS_AT_ONCE: Final = 4
# Two that agree are a finding; what is written all the time may need a few more until it stands still.
_LOOKS_MAX: Final = 5
_PAUSE_S: Final = 1.0
_FAMILIES: Final = (layout.BLOBS, layout.CATALOG, layout.REPOSITORIES)
_BROKEN_CONTENT: Final = frozenset({Kind.CONTENT_DIGEST, Kind.CONTENT_UNREADABLE, Kind.LINK_DANGLING})
# Greater than any key that begins with what stands before it, smaller than all that come behind those.
_END: Final = "\x7f"


@dataclass(slots=True)
class Checked:
    """What was looked at.

    Attributes:
        size: bytes of all content, or of what the repositories that were asked for link.
        hashed: bytes of content that were read; what does not fit is read again.
    """

    repositories: int = 0
    manifests: int = 0
    tags: int = 0
    blobs: int = 0
    size: int = 0
    hashed: int = 0


@dataclass(frozen=True, slots=True)
class _Suspect:
    check: Check
    key: str


class Fsck:
    """One run.

    Args:
        grace_s: garbage is what nothing refers to and is older than this, as for the collection.
        allow_sparse: manifests may list what is not here.
        with_content: read and hash all content.
        names: look at these repositories and what they link only; () for everything.
        pause_s: between two looks at what is suspicious.
        on_progress: called when bytes of content were hashed.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        grace_s: float,
        allow_sparse: bool = False,
        with_content: bool = True,
        names: Sequence[RepositoryName] = (),
        pause_s: float = _PAUSE_S,
        on_progress: Callable[[Checked], None] = lambda _: None,
    ) -> None:
        self.checked = Checked()
        self._backend = backend
        self._grace_s = grace_s
        self._with_content = with_content
        self._names = tuple(dict.fromkeys(names))
        self._pause_s = pause_s
        self._on_progress = on_progress
        self._threads = Threads(_CONTENTS_AT_ONCE, "fsck")
        self._checks = Checks(
            backend,
            self._threads,
            young=backend.now() - grace_s,
            allow_sparse=allow_sparse,
            with_content=with_content,
            on_read=self._has_read,
        )
        self._store = StoreFacts(backend)
        self._contents = _Contents()
        self._catalogue: set[str] = set()

    async def findings(self) -> AsyncIterator[Finding]:
        """Each as soon as it is certain. Once.

        Raises:
            NameUnknown: there is no such repository.
            StorageUnavailable: the store, not one object of it, cannot be read: nothing is known of the rest.
        """
        broken: set[Digest] = set()
        with closing(self._threads):
            async for finding in self._own_faults():
                if finding.kind in _BROKEN_CONTENT:
                    broken.add(_content_of(finding))
                yield finding
            if broken:
                async for finding in self._affected(broken):
                    yield finding

    async def _own_faults(self) -> AsyncIterator[Finding]:
        async for finding in self._confirmed(await self._suspects()):
            yield finding
        if not self._names:
            async for finding in self._unlinked():
                yield finding
            async for finding in self._strays():
                yield finding
            async for finding in self._leftovers():
                yield finding
        if self._with_content:
            async for some in _each(self._stored(), self._look_at_content, at_once=_CONTENTS_AT_ONCE):
                async for finding in self._confirmed(some):
                    yield finding

    async def _suspects(self) -> list[_Suspect]:
        """What does not fit, as the listings have it: but for the bytes of content, everything."""
        suspects = [suspect async for some in self._surroundings() for suspect in some]
        repositories = _each(self._repositories(), self._look_at_repository, at_once=_REPOSITORIES_AT_ONCE)
        suspects += [suspect async for some in repositories for suspect in some]
        if not self._names:
            others = _each(self._others(), self._look_at_other, at_once=_OBJECTS_AT_ONCE)
            suspects += [suspect async for some in others for suspect in some]
        return suspects

    def _has_read(self, size: int) -> None:
        self.checked.hashed += size
        self._on_progress(self.checked)

    # ---- the first look

    async def _surroundings(self) -> AsyncIterator[list[_Suspect]]:
        """Learn which content there is, and which names: before what points to them."""
        for name in self._names:
            await self._learn_name(name)
        if self._names:
            return
        async for info in self._backend.list(layout.BLOBS):
            digest = _content_at(info.key)
            if digest is None:
                yield [_Suspect(self._checks.content_name, info.key)]
            else:
                self._learn_content(digest, info.size)
        async for info in self._backend.list(layout.CATALOG):
            self._catalogue.add(info.key)
            yield await self._first_look(self._checks.catalog, info, self._store)

    async def _learn_name(self, name: RepositoryName) -> None:
        """Raises: NameUnknown."""
        key = layout.catalog_key(name)
        if await self._store.is_there(key):
            self._catalogue.add(key)
        elif not [info async for info in self._backend.list(_prefix_of(name))]:
            raise NameUnknown(f"no repository {name} here")

    def _learn_content(self, digest: Digest, size: int) -> None:
        if self._contents.size_of(digest) is None:
            self.checked.blobs += 1
            self.checked.size += size
        self._contents.add(digest, size)

    async def _repositories(self) -> AsyncIterator[_Listing]:
        """Keys of one repository stand together, its nested ones before or behind them."""
        for prefix in map(_prefix_of, self._names) if self._names else (layout.REPOSITORIES,):
            listing = _Listing("")
            async with _closed(self._backend.list(prefix)) as infos:
                async for info in infos:
                    path = info.key.partition("/_")[0]
                    if path != listing.path:
                        if listing.infos:
                            yield listing
                        listing = _Listing(path)
                    listing.add(info)
            if listing.infos:
                yield listing

    async def _look_at_repository(self, listing: _Listing) -> list[_Suspect]:
        self.checked.repositories += 1
        self.checked.manifests += len(listing.of("_manifests"))
        self.checked.tags += len(listing.of("_tags"))
        await self._learn_links(listing)
        facts = _ListedFacts(listing, self._catalogue, self._contents)
        suspects: list[_Suspect] = []
        checks: list[tuple[Check, ObjectInfo]] = [
            (self._checks.in_repository, info) for info in listing.infos
        ]
        checks += [
            (self._checks.catalogued, info) for info in listing.first_of("_blobs", "_manifests", "_tags")
        ]
        checks += [(self._checks.marked, info) for info in listing.first_of("_views", "_packs")]
        async for some in _each(
            _aiter(checks), lambda each: self._first_look(*each, facts), at_once=_OBJECTS_AT_ONCE
        ):
            suspects += some
        return suspects

    async def _learn_links(self, listing: _Listing) -> None:
        links = [_digest_in(info.key) for info in listing.of("_blobs")]
        for digest in links:
            self._contents.link(digest)
        if self._names:
            async for digest, size in _each(_aiter(links), self._ask_size, at_once=_OBJECTS_AT_ONCE):
                if size is not None:
                    self._learn_content(digest, size)

    async def _ask_size(self, digest: Digest) -> tuple[Digest, int | None]:
        try:
            return digest, await self._store.content_size(digest)
        except ObjectDamaged as error:
            return digest, error.info.size

    async def _others(self) -> AsyncIterator[ObjectInfo]:
        """Whatever is not in one of the three large families."""
        after: str | None = ""
        while after is not None:
            family = None
            async with _closed(self._backend.list("", after=after)) as infos:
                async for info in infos:
                    family = next((family for family in _FAMILIES if info.key.startswith(family)), None)
                    if family is not None:
                        break
                    yield info
            after = family + _END if family is not None else None

    async def _look_at_other(self, info: ObjectInfo) -> list[_Suspect]:
        return await self._first_look(self._checks.of(info.key), info, self._store)

    async def _stored(self) -> AsyncIterator[ObjectInfo]:
        """The content that is to be read."""
        if not self._names:
            async with _closed(self._backend.list(layout.BLOBS)) as infos:
                async for info in infos:
                    if _content_at(info.key) is not None:
                        yield info
            return
        for digest in self._contents:
            with suppress(ObjectMissing):
                yield await self._stat(layout.blob_key(digest))

    async def _look_at_content(self, info: ObjectInfo) -> list[_Suspect]:
        return await self._first_look(self._checks.content, info, self._store)

    async def _first_look(self, check: Check, info: ObjectInfo, facts: Facts) -> list[_Suspect]:
        return [_Suspect(check, info.key)] if await self._checks.look(check, info, facts) else []

    # ---- what is certain

    async def _confirmed(self, suspects: Sequence[_Suspect]) -> AsyncIterator[Finding]:
        """What two looks that follow each other agree on. What changes is not as it was found to be: it is being written."""
        before: dict[_Suspect, frozenset[Finding]] = {}
        for turn in range(_LOOKS_MAX):
            if turn:
                await asyncio.sleep(self._pause_s)
            unsettled: dict[_Suspect, frozenset[Finding]] = {}
            async for suspect, found in _each(_aiter(suspects), self._look_again, at_once=_OBJECTS_AT_ONCE):
                agreed = found & before.get(suspect, frozenset())
                for finding in sorted(agreed, key=lambda finding: finding.seen):
                    yield finding
                if found - agreed:
                    unsettled[suspect] = found - agreed
            if not unsettled:
                return
            suspects, before = tuple(unsettled), unsettled

    async def _look_again(self, suspect: _Suspect) -> tuple[_Suspect, frozenset[Finding]]:
        try:
            info = await self._stat(suspect.key)
        except ObjectMissing:
            return suspect, frozenset()
        return suspect, frozenset(await self._checks.look(suspect.check, info, self._store))

    async def _stat(self, key: str) -> ObjectInfo:
        """Also of what is damaged, for the check to say what that means. Raises: ObjectMissing."""
        try:
            return await self._backend.stat(key)
        except ObjectDamaged as error:
            return error.info

    async def _unlinked(self) -> AsyncIterator[Finding]:
        """Certain at once: see `Checks.unlinked`."""
        async for _, found in _each(
            _aiter(self._contents.unlinked()), self._look_at_unlinked, at_once=_OBJECTS_AT_ONCE
        ):
            for finding in found:
                yield finding

    async def _look_at_unlinked(self, digest: Digest) -> tuple[_Suspect, frozenset[Finding]]:
        return await self._look_again(_Suspect(self._checks.unlinked, layout.blob_key(digest)))

    async def _strays(self) -> AsyncIterator[Finding]:
        async with _closed(self._backend.strays()) as strays:
            async for stray in strays:
                if stray.damage:
                    yield Finding(Kind.INTERNAL_DAMAGED, stray.name, stray.damage)
                else:
                    yield Finding(Kind.KEY_FOREIGN, stray.name, "a name that is none of the registry's")

    async def _leftovers(self) -> AsyncIterator[Finding]:
        try:
            async for left in self._backend.sweep(age_s=self._grace_s, dry_run=True):
                yield Finding(
                    Kind.LEFTOVER, left.name, f"{left.size} bytes of a writer that is gone", size=left.size
                )
        except ObjectDamaged as error:
            yield Finding(Kind.LEFTOVERS_UNKNOWN, error.info.key, str(error), error.info.version)
        except StorageUnavailable as error:
            yield Finding(Kind.LEFTOVERS_UNKNOWN, INTERNAL, str(error))

    async def _affected(self, broken: set[Digest]) -> AsyncIterator[Finding]:
        """The manifests that list content which is missing or damaged."""

        async def affected_in(listing: _Listing) -> list[Finding]:
            return [finding async for finding in self._affected_in(listing, broken)]

        async for some in _each(self._repositories(), affected_in, at_once=_REPOSITORIES_AT_ONCE):
            for finding in some:
                yield finding

    async def _affected_in(self, listing: _Listing, broken: set[Digest]) -> AsyncIterator[Finding]:
        tags: dict[Digest, list[str]] | None = None
        for info in listing.of("_manifests"):
            part = layout.in_repository(info.key)
            assert part is not None
            assert part.digest is not None
            lost = await self._lost(part.name, part.digest, broken)
            if not lost:
                continue
            tags = await self._tags(listing) if tags is None else tags
            tagged = ", ".join(tags.get(part.digest, ())) or "nothing"
            yield Finding(Kind.MANIFEST_AFFECTED, info.key, f"tagged {tagged}; {lost}", info.version)

    async def _lost(self, name: RepositoryName, digest: Digest, broken: set[Digest]) -> str:
        """What of a manifest is broken, in words."""
        with suppress(ObjectMissing):
            read = await self._checks.read_manifest(name, digest)
            if read is not None:
                lost = (
                    f"{where} is {listed.digest}"
                    for where, listed in read[1].references()
                    if listed.digest in broken
                )
                return ", ".join(lost)
        return ""

    async def _tags(self, listing: _Listing) -> dict[Digest, list[str]]:
        tags: dict[Digest, list[str]] = {}
        for info in listing.of("_tags"):
            with suppress(ObjectMissing, ObjectDamaged, *NOT_OURS):
                target = await self._checks.tag_target(info.key)
                tags.setdefault(target, []).append(info.key.rpartition("/")[2])
        return tags


class _Contents:
    """Which content there is, and which of it nobody has been seen to link."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._unlinked: set[bytes] = set()

    def __iter__(self) -> Iterator[Digest]:
        return map(_unpacked, self._sizes)

    def add(self, digest: Digest, size: int) -> None:
        packed = bytes.fromhex(digest.encoded)
        self._sizes[packed] = size
        self._unlinked.add(packed)

    def link(self, digest: Digest) -> None:
        self._unlinked.discard(bytes.fromhex(digest.encoded))

    def size_of(self, digest: Digest) -> int | None:
        return self._sizes.get(bytes.fromhex(digest.encoded))

    def unlinked(self) -> Iterator[Digest]:
        return map(_unpacked, self._unlinked)


def _unpacked(packed: bytes) -> Digest:
    algorithm = next(name for name, length in ENCODED_LENGTH.items() if length == 2 * len(packed))
    return Digest(f"{algorithm}:{packed.hex()}")


class _Listing:
    """The keys of one repository, in their order: links before manifests, these before referrers and tags.

    Attributes:
        path: of the repository; it need not be a legal name.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.infos: list[ObjectInfo] = []
        self._of_kind: dict[str, list[ObjectInfo]] = {}

    def add(self, info: ObjectInfo) -> None:
        self.infos.append(info)
        if (part := layout.in_repository(info.key)) is not None:
            self._of_kind.setdefault(part.kind, []).append(info)

    def of(self, kind: str) -> Sequence[ObjectInfo]:
        """The objects of a kind, as `InRepository.kind` names it."""
        return self._of_kind.get(kind, ())

    def first_of(self, *kinds: str) -> Sequence[ObjectInfo]:
        """One object of any of these kinds, if there is one."""
        return [info for kind in kinds for info in self.of(kind)[:1]][:1]


class _ListedFacts:
    """As a listing of the repository showed it."""

    def __init__(self, listing: _Listing, catalogue: set[str], contents: _Contents) -> None:
        self._keys = {info.key for info in listing.infos}
        self._views = {_digest_in(info.key) for info in listing.of("_views")}
        self._catalogue = catalogue
        self._contents = contents

    async def is_there(self, key: str) -> bool:
        return key in self._keys or key in self._catalogue

    async def content_size(self, digest: Digest) -> int | None:
        return self._contents.size_of(digest)

    async def is_derived(self, _: RepositoryName, digest: Digest) -> bool:
        return digest in self._views


def _prefix_of(name: RepositoryName) -> str:
    """Of the keys of one repository, without those of the repositories below it."""
    return f"{layout.REPOSITORIES}{name}/_"


def _content_at(key: str) -> Digest | None:
    """The digest that a key below `layout.BLOBS` stands for."""
    digest = layout.digest_of(key)
    return digest if digest is not None and layout.blob_key(digest) == key else None


def _digest_in(key: str) -> Digest:
    """Of the key of a link, or of what was derived: the digest that it stands for."""
    part = layout.in_repository(key)
    assert part is not None
    assert part.digest is not None
    return part.digest


def _content_of(finding: Finding) -> Digest:
    """What a finding of `_BROKEN_CONTENT` is about."""
    return _content_at(finding.key) or _digest_in(finding.key)


async def _aiter(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


async def _each(
    items: AsyncIterable[T], work: Callable[[T], Coroutine[Any, Any, R]], *, at_once: int
) -> AsyncIterator[R]:
    """What `work` makes of each, as it comes; all have ended when one has failed, and `items` too."""
    tasks: set[asyncio.Task[R]] = set()
    try:
        async with _closed(items):
            async for item in items:
                tasks.add(asyncio.create_task(work(item)))
                if len(tasks) == at_once:
                    for task in await _ended(tasks):
                        tasks.discard(task)
                        yield task.result()
        while tasks:
            for task in await _ended(tasks):
                tasks.discard(task)
                yield task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _closed(items: AsyncIterable[T]) -> AsyncIterator[AsyncIterable[T]]:
    """What is left of a generator when the block ends is closed then, and not at some later moment by nobody."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _ended(tasks: set[asyncio.Task[R]]) -> list[asyncio.Task[R]]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return list(done)
