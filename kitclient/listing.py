"""What ModelKits a place holds, each with what a list shows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kitclient.image_layout import LayoutRegistry
from kitclient.modelkit import ModelKit, NotAModelKit, read_modelkit
from kitclient.stores import UNNAMED
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.names import LOCAL_REGISTRY, Tag
from kitspec.selection import Filter, select_layers

NONE = "<none>"


@dataclass(frozen=True, slots=True)
class Listed:
    """One kit.

    Attributes:
        repository: as it is shown: without `localhost/`; `<none>` for what was packed without a name.
        size: bytes of all layers.
    """

    repository: str
    digest: Digest
    tags: tuple[str, ...]
    name: str
    size: int
    author: str


async def list_local(registry: LayoutRegistry, filters: Sequence[Filter] = ()) -> list[Listed]:
    """All kits of one host in the local store, repository by repository, by digest."""
    listed: list[Listed] = []
    names = [name async for name in registry.repositories()]
    for name in names:
        shown = NONE if name == UNNAMED and registry.host == LOCAL_REGISTRY else f"{registry.host}/{name}"
        manifests = [manifest async for manifest in registry.manifests(name)]
        for descriptor, tags in sorted(manifests, key=lambda manifest: manifest[0].digest):
            try:
                kit = await read_modelkit(Place(registry, name), descriptor.digest)
            except NotAModelKit:
                continue
            if _is_wanted(kit, filters):
                listed.append(_listed(shown.removeprefix(f"{LOCAL_REGISTRY}/"), kit, tags))
    return listed


async def list_remote(
    place: Place, tags: Sequence[Tag] | None, filters: Sequence[Filter] = (), *, concurrency: int = 5
) -> list[Listed]:
    """The kits of one repository, all tags or some; what is no kit is passed over."""
    labels = tags if tags is not None else [tag async for tag in place.registry.tags(place.name)]
    turns = asyncio.Semaphore(concurrency)

    async def read(tag: Tag) -> ModelKit | None:
        async with turns:
            try:
                return await read_modelkit(place, tag)
            except NotAModelKit:
                return None

    kits = await asyncio.gather(*(read(tag) for tag in labels))
    by_digest: dict[Digest, tuple[ModelKit, list[Tag]]] = {}
    for tag, kit in zip(labels, kits, strict=True):
        if kit is not None and _is_wanted(kit, filters):
            by_digest.setdefault(kit.digest, (kit, []))[1].append(tag)
    return [_listed(place.name, kit, tuple(found)) for _, (kit, found) in sorted(by_digest.items())]


def _listed(repository: str, kit: ModelKit, tags: Sequence[str]) -> Listed:
    package = kit.kitfile.package
    return Listed(
        repository,
        kit.digest,
        tuple(tags),
        package.name or NONE,
        kit.size,
        package.authors[0] if package.authors else NONE,
    )


def _is_wanted(kit: ModelKit, filters: Sequence[Filter]) -> bool:
    return not filters or bool(select_layers(kit.manifest, kit.kitfile, filters))
