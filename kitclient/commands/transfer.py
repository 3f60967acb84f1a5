"""`kitclient push` and `kitclient pull`."""

from __future__ import annotations

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="[DESTINATION]", required=False)
@network_options
@global_options
@pass_application
@asynchronous
async def push(app: Application, source: str, destination: str | None) -> None:
    """Upload a ModelKit from the local store to a registry.

    \b
    kitclient push localhost:5000/team/model:v1
    kitclient push team/model:v1 registry.example.com/team/model:v1
    """
    from kitclient.allocator import keep_large_buffers
    from kitclient.stores import LATEST, ReferenceMissing, name_of, wanted
    from kitclient.transfer import Place, copy
    from kitspec.errors import ManifestUnknown, NameUnknown
    from kitspec.names import LOCAL_REGISTRY, Reference

    keep_large_buffers()
    here = Reference.parse(source)
    there = Reference.parse(destination) if destination is not None else here
    if there.registry == LOCAL_REGISTRY:
        raise click.UsageError("registry is required when pushing")
    if here.further_tags or (destination is not None and there.digest is not None):
        raise click.UsageError("the source has one tag or digest, and the destination tags")
    label = wanted(here)
    app.console.info(f"Pushing {here.display}" + (f" to {there.display}" if destination is not None else ""))
    async with app.stores.local(here.registry) as local, app.stores.remote(there.registry) as remote:
        source_place = Place(local, name_of(here))
        try:
            await local.get_manifest(source_place.name, label)
        except (ManifestUnknown, NameUnknown) as error:
            raise ReferenceMissing(f"model {here.display} not found in the local store") from error
        tags = () if there.digest is not None else (there.tag or LATEST, *there.further_tags)
        copied = await copy(
            source_place,
            label,
            Place(remote, name_of(there)),
            tags=tags,
            concurrency=app.network["concurrency"],
            progress=app.console.progress(),
        )
    app.console.info(f"Pushed {copied.digest}")


@click.command()
@click.argument("reference", metavar="REFERENCE")
@network_options
@global_options
@pass_application
@asynchronous
async def pull(app: Application, reference: str) -> None:
    """Download a ModelKit, and those it builds on, to the local store.

    What is there already is not fetched again; what was interrupted goes on.

    \b
    kitclient pull registry.example.com/team/model:v1
    """
    from kitclient.allocator import keep_large_buffers
    from kitclient.modelkit import read_modelkit
    from kitclient.references import longer, parent_of
    from kitclient.stores import name_of, wanted
    from kitclient.transfer import Place, copy
    from kitspec.digest import Digest
    from kitspec.names import Reference

    keep_large_buffers()
    chain: list[str] = []
    following: str | None = reference
    while following is not None:
        chain = longer(chain, following)
        parsed = Reference.parse(following)
        if parsed.further_tags:
            raise click.UsageError("cannot pull multiple tags")
        label, name = wanted(parsed), name_of(parsed)
        async with app.stores.remote(parsed.registry) as remote, app.stores.local(parsed.registry) as local:
            app.console.info(f"Pulling {parsed.display}")
            kit = await read_modelkit(Place(remote, name), label)
            copied = await copy(
                Place(remote, name),
                # By digest: the tag may move meanwhile.
                kit.digest,
                Place(local, name),
                tags=() if isinstance(label, Digest) else (label,),
                concurrency=app.network["concurrency"],
                progress=app.console.progress(),
            )
        app.console.info(f"Pulled {copied.digest}")
        following = parent_of(kit.kitfile)
