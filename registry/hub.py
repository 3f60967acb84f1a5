"""A repository as the Hugging Face Hub's clients see it: revisions, commits, and which kits there are.

    revision             which manifest
    main                 the tag latest, else the tag main, else the tag that was written last of those that are kits
    a tag                that one; also of a slice, `v1.only.model`
    40 hex digits        the commit: the manifest whose digest begins with them
    64 hex digits        the manifest with that digest; also `sha256-…` and `sha256:…`
    refs/heads/main, refs/tags/<tag>

Clients ask once by name, are told the commit, and from then on ask by the commit: so it must name the same files for ever, and
the commit of a slice is that of the slice. Everything is looked up in the store on each request: nothing here can be stale.

Source: what huggingface_hub 0.23 to 2.4 send and expect (`X-Repo-Commit`: 40 hex digits).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from kitspec.digest import ENCODED_LENGTH, Digest
from kitspec.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    FilterInvalid,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    TagInvalid,
)
from kitspec.interface import StoredManifest
from kitspec.manifest import Manifest, parse_manifest
from kitspec.media_types import CREATED_ANNOTATION
from kitspec.names import RepositoryName, Tag, view_of
from kitspec.views import Kit, form_of
from registry import layout
from registry.auth.layers import LayerScope
from registry.hosted import HostedRegistry, Versions
from registry.hub_tree import HubRoot, HubTree, tree_of
from registry.kits import ChosenKit, Kits, not_in_scope, sections_of
from registry.views import Views
from storage_backends.interface import ObjectInfo, ObjectMissing

MAIN: Final = "main"
COMMIT_LENGTH: Final = 40

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_DIGEST = re.compile(r"(?:sha256[-:])?(?P<hex>[0-9a-f]{64})", re.ASCII)
# What clients keep for signatures and referrers beside the artifacts; never what somebody means by `main`.
_ATTACHED = re.compile(r"sha(?:256|512)-[0-9a-f]{64}", re.ASCII)
# Tags that are no kits, looked at before the search for the newest kit is given up.
_NEWEST_TRIES_MAX: Final = 64
_OFFERED_TAGS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A kit at a revision.

    Attributes:
        modified: when it was made, as its manifest says, else when the record was written that the revision names.
    """

    name: RepositoryName
    choice: ChosenKit
    tree: HubTree
    modified: datetime

    @property
    def kit(self) -> Kit:
        return self.choice.kit

    @property
    def commit(self) -> str:
        return commit_of(self.kit.digest)


@dataclass(frozen=True, slots=True)
class TaggedCommit:
    """Attributes: modified: when the tag was written."""

    tag: Tag
    commit: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class ListedKit:
    """What `main` of a repository is, without a look into its layers."""

    name: RepositoryName
    kit: Kit
    modified: datetime


def commit_of(digest: Digest) -> str:
    """What the Hub's clients take for a commit of git."""
    return digest.encoded[:COMMIT_LENGTH]


class Hub:
    """Without a state of its own: made anew for each request.

    Of a kit that the reader may have some layers of, a tag names the slice that they may have, with a commit of its own; its own
    commit names nothing to them.

    Args:
        root: which files are shown at the root (registry/hub_tree.py).
        scope_of: what the reader may have of the kits of a repository that they may read; None for all.
    """

    def __init__(
        self,
        registry: HostedRegistry,
        kits: Kits,
        views: Views,
        *,
        root: HubRoot,
        scope_of: Callable[[RepositoryName], LayerScope | None],
    ) -> None:
        self._registry = registry
        self._kits = kits
        self._views = views
        self._root: HubRoot = root
        self._scope_of = scope_of

    async def snapshot(self, name: RepositoryName, revision: str | None) -> Snapshot:
        """The kit that a revision names.

        Args:
            revision: as the client says it; None for `main`.

        Raises:
            NameUnknown: there is no such repository.
            ManifestUnknown: there is no such revision, or it is no ModelKit; the message says what there is.
            ManifestInvalid: the kit is broken.
            Denied: the reader may have nothing of it, or not all and asks by its commit.
        """
        digest, versions = await self._find(name, MAIN if revision is None else revision)
        choice = await self._kits.choose(name, digest, scope=self._scope_of(name))
        modified = await self._modified(choice.kit, versions or choice.versions)
        return Snapshot(name, choice, await tree_of(self._kits, choice, self._root), modified)

    async def main_commit(self, name: RepositoryName) -> str | None:
        """The commit of `main`; None when that is no kit.

        Raises:
            NameUnknown: there is no such repository.
        """
        try:
            return commit_of((await self._main_kit(name)).kit.digest)
        except (ManifestUnknown, ManifestInvalid, BlobUnknown, Denied):
            return None

    async def tagged_commits(self, name: RepositoryName, *, count_max: int) -> list[TaggedCommit]:
        """The first tags of kits, in ASCII order, without those of signatures and the like.

        Raises:
            NameUnknown: there is no such repository.
        """
        found: list[TaggedCommit] = []
        async for info in self._tags(name):
            if len(found) == count_max:
                break
            await asyncio.sleep(0)  # others get their turn
            tag = _tag_at(name, info)
            try:
                stored, _ = await self._kits.find_manifest(name, tag)
                if not _is_kit(stored):
                    continue
                digest, _ = await self._find_tag(name, tag)
            except (ManifestUnknown, Denied):
                continue  # removed meanwhile, or nothing of it is for the reader
            found.append(TaggedCommit(tag, commit_of(digest), _moment(info.modified)))
        return found

    async def kits(
        self,
        *,
        below: str,
        after: str,
        may_read: Callable[[RepositoryName], bool],
        is_wanted: Callable[[RepositoryName], bool],
    ) -> AsyncIterator[ListedKit | RepositoryName]:
        """Repositories that may be read, whose names begin with `below` and are greater than `after`, in ASCII order.

        One that is not wanted, or whose `main` is no kit, comes as its name alone, so that the caller can count it.
        """
        async for name in self._registry.repositories(after=max(below, after)):
            if not name.startswith(below):
                break
            await asyncio.sleep(0)  # others get their turn
            if not may_read(name):
                continue  # not even its name comes back as a cursor
            kit: ListedKit | None = None
            if is_wanted(name):
                with suppress(ManifestUnknown, NameUnknown, ManifestInvalid, BlobUnknown, Denied):
                    kit = await self._main_kit(name)
            yield name if kit is None else kit

    async def _main_kit(self, name: RepositoryName) -> ListedKit:
        digest, versions = await self._find(name, MAIN)
        stored, _ = await self._kits.find_manifest(name, digest)
        kit = await self._kits.read(name, stored)
        return ListedKit(name, kit, await self._modified(kit, versions))

    # ---- revisions

    async def _find(self, name: RepositoryName, revision: str) -> tuple[Digest, Versions]:
        """The manifest of a revision, with the records that say so."""
        if _COMMIT.fullmatch(revision) is not None:
            return await self._find_commit(name, revision), ()
        digest = _DIGEST.fullmatch(revision)
        if digest is not None:
            return Digest(f"sha256:{digest['hex']}"), ()
        try:
            return await self._find_tag(name, _tag_meant(revision))
        except (TagInvalid, FilterInvalid, ManifestUnknown) as error:
            raise ManifestUnknown(f"{error}; {await self._offer(name)}") from error

    async def _find_tag(self, name: RepositoryName, tag: Tag) -> tuple[Digest, Versions]:
        """Of a view the slice: another form of it has the same files.

        Raises:
            Denied: of what the reader may not have.
            FilterInvalid: of a form that there is not.
        """
        view = view_of(tag)
        if view is not None:
            form_of(view)
        base = tag if view is None else view.base
        if base == MAIN:
            base = await self._main_tag(name)
        stored, versions = await self._kits.find_manifest(name, base)
        scope = self._scope_of(name)
        selectors = view.selectors if view is not None else ()
        if not selectors and scope is not None:
            selectors = await self._readable_selectors(name, base, stored, scope)
        if not selectors:
            return stored.digest, versions
        only = Tag(f"{base}.only.{'.'.join(selectors)}")
        return (await self._views.find_manifest(name, only, scope=scope)).manifest.digest, versions

    async def _readable_selectors(
        self, name: RepositoryName, tag: Tag, stored: StoredManifest, scope: LayerScope
    ) -> tuple[str, ...]:
        """What chooses all that the reader may have of a kit; none where that is the whole kit.

        Raises:
            Denied: they may have nothing of it.
        """
        kit = await self._kits.read(name, stored)
        sections = sections_of(kit)
        if sections is not None and scope.includes(sections):
            return ()
        selectors = scope.selectors(kit.kitfile)
        if not selectors:
            raise not_in_scope(name, tag, scope, kit.kitfile)
        return selectors

    async def _find_commit(self, name: RepositoryName, commit: str) -> Digest:
        """The manifest, pushed or derived, whose digest begins with a commit."""
        for algorithm, length in ENCODED_LENGTH.items():
            longest = Digest(f"{algorithm}:{commit.ljust(length, 'f')}")
            for key in (layout.manifest_key(name, longest), layout.view_prefix(name, longest).rstrip("/")):
                folder, _, _ = key.rpartition("/")
                async for info in self._views.backend.list(f"{folder}/{commit}"):
                    encoded = info.key.removeprefix(f"{folder}/").partition("/")[0]
                    try:
                        return Digest(f"{algorithm}:{encoded}")
                    except DigestInvalid:
                        continue  # not a key of ours
        raise ManifestUnknown(f"no commit {commit} in {name}; {await self._offer(name)}")

    async def _main_tag(self, name: RepositoryName) -> Tag:
        for text in ("latest", MAIN):
            try:
                await self._registry.backend.stat(layout.tag_key(name, Tag(text)))
            except ObjectMissing:
                continue
            return Tag(text)
        newest = await self._newest_tag(name)
        if newest is None:
            raise ManifestUnknown(
                f"{MAIN} names nothing in {name}: it has no tag latest or {MAIN}, and no ModelKit that was tagged last"
            )
        return newest

    async def _newest_tag(self, name: RepositoryName) -> Tag | None:
        """The tag that was written last of those that are kits; None when there is none, or two at the same moment differ."""
        infos = sorted([info async for info in self._tags(name)], key=lambda info: -info.modified)
        newest: tuple[float, Tag, Digest] | None = None
        for info in infos[:_NEWEST_TRIES_MAX]:
            if newest is not None and info.modified < newest[0]:
                break
            tag = _tag_at(name, info)
            try:
                stored, _ = await self._kits.find_manifest(name, tag)
                await self._kits.read(name, stored)
            except (ManifestUnknown, ManifestInvalid, BlobUnknown):
                continue
            if newest is not None and newest[2] != stored.digest:
                return None
            newest = newest or (info.modified, tag, stored.digest)
        return newest[1] if newest is not None else None

    async def _tags(self, name: RepositoryName) -> AsyncIterator[ObjectInfo]:
        """The records of the tags, without those of signatures and the like.

        Raises:
            NameUnknown: there is no such repository.
        """
        try:
            await self._registry.backend.stat(layout.catalog_key(name))
        except ObjectMissing as error:
            raise NameUnknown(f"no repository {name} here", detail={"name": name}) from error
        async for info in self._registry.backend.list(layout.tags_prefix(name)):
            if _ATTACHED.match(_tag_at(name, info)) is None:
                yield info

    async def _offer(self, name: RepositoryName) -> str:
        """Which tags there are."""
        tags: list[str] = []
        async for info in self._tags(name):
            if len(tags) == _OFFERED_TAGS_MAX:
                tags.append("and more")
                break
            tags.append(_tag_at(name, info))
        return f"there are the tags {', '.join(tags)}" if tags else "it has no tags"

    async def _modified(self, kit: Kit, versions: Versions) -> datetime:
        stated = _stated_moment(kit.manifest.annotations.get(CREATED_ANNOTATION, ""))
        if stated is not None:
            return stated
        for key, _ in versions:
            try:
                return _moment((await self._registry.backend.stat(key)).modified)
            except ObjectMissing:
                continue
        raise ManifestUnknown(f"{kit.digest} was removed just now")


def _is_kit(stored: StoredManifest) -> bool:
    manifest = parse_manifest(stored.content, stored.media_type)
    return isinstance(manifest, Manifest) and manifest.family is not None


def _tag_meant(revision: str) -> Tag:
    """
    Raises:
        TagInvalid: it is nothing that could be a tag.
    """
    return Tag(MAIN if revision == f"refs/heads/{MAIN}" else revision.removeprefix("refs/tags/"))


def _tag_at(name: RepositoryName, info: ObjectInfo) -> Tag:
    return Tag(info.key.removeprefix(layout.tags_prefix(name)))


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _stated_moment(text: str) -> datetime | None:
    """What an annotation says, if it is a moment."""
    try:
        moment = datetime.fromisoformat(text)
        return None if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
