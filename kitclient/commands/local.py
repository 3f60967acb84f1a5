"""`kitclient list`, `tag` and `remove`: what there is, and what it is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from kitclient.commands.application import (
    Application,
    Failed,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)

if TYPE_CHECKING:
    from kitclient.image_layout import LayoutRegistry
    from kitclient.listing import Listed
    from kitspec.descriptor import Descriptor
    from kitspec.names import Reference, RepositoryName, Tag

_COLUMNS = ("REPOSITORY", "TAG", "MAINTAINER", "NAME", "SIZE", "DIGEST")


@click.command("list")
@click.argument("reference", metavar="[REPOSITORY]", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people or for programs.",
)
@click.option(
    "-f",
    "--filter",
    "filters",
    metavar="FILTER",
    multiple=True,
    help="Only kits that have such layers; as in unpack. Repeatable.",
)
@network_options
@global_options
@pass_application
@asynchronous
async def list_kits(app: Application, reference: str | None, form: str, filters: tuple[str, ...]) -> None:
    """List the ModelKits of the local store, or of a repository in a registry.

    \b
    kitclient list
    kitclient list registry.example.com/team/model --format json
    """
    from kitclient.listing import list_local, list_remote
    from kitclient.stores import name_of
    from kitclient.transfer import Place
    from kitspec.names import Reference
    from kitspec.selection import parse_filter

    chosen = [parse_filter(text) for text in filters]
    listed: list[Listed] = []
    if reference is None:
        for host in await hosts(app):
            async with app.stores.local(host) as local:
                listed += await list_local(local, chosen)
    else:
        parsed = Reference.parse(reference)
        tags = [parsed.tag, *parsed.further_tags] if parsed.tag is not None else None
        async with app.stores.remote(parsed.registry) as remote:
            place = Place(remote, name_of(parsed))
            listed = await list_remote(place, tags, chosen, concurrency=app.network["concurrency"])
    app.console.answer(_as_json(listed) if form == "json" else _as_table(listed))


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION")
@global_options
@pass_application
@asynchronous
async def tag(app: Application, source: str, destination: str) -> None:
    """Give a ModelKit of the local store another name.

    \b
    kitclient tag team/model:v1 registry.example.com/team/model:v1
    """
    from kitclient.stores import LATEST, ReferenceMissing, name_of, wanted
    from kitclient.transfer import Place, copy
    from kitspec.errors import ManifestUnknown, NameUnknown
    from kitspec.names import Reference

    here, there = Reference.parse(source), Reference.parse(destination)
    if here.further_tags:
        raise click.UsageError("one source is wanted, not several tags")
    if there.digest is not None or there.repository is None:
        raise click.UsageError("the destination is a name with a tag; a digest is nobody's to choose")
    stores = app.stores
    async with stores.local(here.registry) as source_store, stores.local(there.registry) as store:
        try:
            label = wanted(here)
            await source_store.get_manifest(name_of(here), label)
        except (ManifestUnknown, NameUnknown) as error:
            raise ReferenceMissing(f"model {here.display} not found in the local store") from error
        tags = (there.tag or LATEST, *there.further_tags)
        await copy(Place(source_store, name_of(here)), label, Place(store, name_of(there)), tags=tags)
    named = replace(there, tag=tags[0])
    app.console.info(
        f"Modelkit {here if here.tag or here.digest else replace(here, tag=LATEST)} tagged as {named}"
    )


@click.command()
@click.argument("reference", metavar="[REFERENCE]", required=False)
@click.option("-f", "--force", is_flag=True, help="By tag, remove the kit and its other tags, too.")
@click.option("-a", "--all", "everything", is_flag=True, help="Remove what has no tag; with -f, everything.")
@click.option(
    "-r", "--remote", is_flag=True, help="In the registry: by tag the tag, by digest or with -f the kit."
)
@network_options
@global_options
@pass_application
@asynchronous
async def remove(
    app: Application, reference: str | None, *, force: bool, everything: bool, remote: bool
) -> None:
    """Remove a ModelKit from the local store, or from a registry.

    \b
    kitclient remove team/model:v1
    kitclient remove -r registry.example.com/team/model:v1
    kitclient remove --all --force
    """
    from kitspec.names import Reference

    if (reference is None) != everything:
        raise click.UsageError("one of a reference and --all is wanted")
    if everything:
        if remote:
            raise click.UsageError("--all is for the local store")
        await _remove_all(app, force=force)
        return
    assert reference is not None
    parsed = Reference.parse(reference)
    if remote:
        await _remove_remote(app, parsed, force=force)
        return
    failed = False
    async with app.stores.local(parsed.registry) as local:
        for one in _single(parsed):
            failed |= not await _remove_one(app, local, one, force=force)
    if failed:
        raise Failed


async def hosts(app: Application) -> list[str]:
    """All whose repositories the local store has."""
    import asyncio

    from kitclient.layout_folder import ImageLayout

    layout = ImageLayout(app.locations.storage)
    entries = await asyncio.to_thread(layout.entries)
    return sorted({entry.repository.partition("/")[0] for entry in entries if entry.repository})


def _as_table(listed: Sequence[Listed]) -> str:
    from kitclient.console import format_size
    from kitclient.terminal import visible

    rows = [_COLUMNS]
    for kit in listed:
        for label in kit.tags or ("<none>",):
            shown = (kit.repository, label, kit.author, kit.name, format_size(kit.size), kit.digest)
            rows.append(tuple(map(visible, shown)))  # type: ignore[arg-type]  # six of them
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _as_json(listed: Sequence[Listed]) -> str:
    documents = [
        {
            "repo": kit.repository,
            "digest": kit.digest,
            "tags": list(kit.tags),
            "modelName": kit.name,
            "size": kit.size,
            "author": kit.author,
        }
        for kit in listed
    ]
    text = json.dumps(documents, indent=2, ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _single(reference: Reference) -> list[Reference]:
    """Each of its tags by itself."""
    from kitclient.stores import LATEST

    if reference.digest is not None:
        return [reference]
    tags = [reference.tag or LATEST, *reference.further_tags]
    return [replace(reference, tag=label, further_tags=()) for label in tags]


async def _remove_one(app: Application, local: LayoutRegistry, reference: Reference, *, force: bool) -> bool:
    from kitclient.stores import name_of, wanted
    from kitspec.digest import Digest
    from kitspec.errors import ManifestUnknown, NameUnknown

    name, label = name_of(reference), wanted(reference)
    try:
        found = await local.get_manifest(name, label)
    except (ManifestUnknown, NameUnknown):
        app.console.error(f"Failed to remove: model {reference.display} not found")
        return False
    tags = [tags async for manifest, tags in local.manifests(name) if manifest.digest == found.digest]
    others = [tag for listed in tags for tag in listed if tag != label]
    if isinstance(label, Digest) or force or not others:
        await local.delete_manifest(name, found.digest)
        app.console.info(f"Removed {reference.display} (digest {found.digest})")
    else:
        await local.delete_manifest(name, label)
        app.console.info(f"Untagged {reference.display} (digest {found.digest} has other tags)")
    return True


async def _remove_all(app: Application, *, force: bool) -> None:
    for host in await hosts(app):
        async with app.stores.local(host) as local:
            for name in [name async for name in local.repositories()]:
                for manifest, tags in [found async for found in local.manifests(name)]:
                    if force or not tags:
                        await _remove_listed(app, local, name, manifest, tags)


async def _remove_listed(
    app: Application, local: LayoutRegistry, name: RepositoryName, manifest: Descriptor, tags: Sequence[Tag]
) -> None:
    from kitclient.stores import UNNAMED
    from kitspec.names import LOCAL_REGISTRY

    shown = "" if name == UNNAMED else f"{local.host}/{name}".removeprefix(f"{LOCAL_REGISTRY}/")
    await local.delete_manifest(name, manifest.digest)
    for label in tags:
        app.console.info(f"Untagged {shown}:{label}")
    app.console.info(f"Removed {shown}@{manifest.digest}" if shown else f"Removed {manifest.digest}")


async def _remove_remote(app: Application, reference: Reference, *, force: bool) -> None:
    from kitclient.stores import ReferenceMissing, name_of, wanted
    from kitspec.errors import ManifestUnknown, NameUnknown, OciError, Unsupported

    name = name_of(reference)
    async with app.stores.remote(reference.registry) as registry:
        for one in _single(reference):
            label = wanted(one)
            try:
                found = await registry.get_manifest(name, label)
                await registry.delete_manifest(name, found.digest if force else label)
            except (ManifestUnknown, NameUnknown) as error:
                raise ReferenceMissing(f"model {one.display} not found") from error
            except Unsupported as error:
                what = (
                    "untagging; -f removes the whole kit"
                    if one.digest is None and not force
                    else "removing models"
                )
                raise OciError(f"remote registry does not support {what}") from error
            app.console.info(
                f"{'Removed' if force or one.digest else 'Untagged'} {one.display} (digest {found.digest})"
            )
