"""`kitclient files` and `cat`: what a kit holds, and one file of it."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)

if TYPE_CHECKING:
    from kitclient.kit_files import KitFile
    from kitclient.single_files import FileList

_COLUMNS = ("MODE", "SIZE", "DIGEST", "PATH")


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.option(
    "-f",
    "--filter",
    "filters",
    metavar="FILTER",
    multiple=True,
    help="Only what such layers hold; as in unpack. Repeatable.",
)
@click.option(
    "--path",
    "paths",
    metavar="PATTERN",
    multiple=True,
    help="Only files whose path matches, such as *.json or 'model/**'. Repeatable.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people or for programs.",
)
@click.option(
    "--verify-layers",
    is_flag=True,
    help="Read whole layers and verify them, also where the registry has a list.",
)
@network_options
@global_options
@pass_application
@asynchronous
async def files(  # noqa: PLR0917  (click's)
    app: Application,
    /,
    reference: str,
    filters: tuple[str, ...],
    paths: tuple[str, ...],
    form: str,
    verify_layers: bool,  # noqa: FBT001  (click's)
) -> None:
    """List the files of a ModelKit: from the local store if it is there, else from its registry.

    A registry that has no such list must send whole layers for it; what that takes is said on stderr.

    \b
    kitclient files registry.example.com/team/model:v1
    kitclient files team/model:v1 --filter model --path '**/*.safetensors' --format json
    """
    from kitclient.single_files import list_files
    from kitspec.names import Reference
    from kitspec.selection import parse_filter

    parsed = Reference.parse(reference)
    if parsed.further_tags:
        raise click.UsageError("one tag or digest is wanted, not several")
    chosen = [parse_filter(text) for text in filters]
    stores = app.stores
    async with stores.find(parsed) as (place, label):
        listed = await list_files(
            place,
            label,
            filters=chosen,
            paths=paths,
            verify_layers=verify_layers,
            find=stores.find,
            progress=app.console.progress(),
            notice=app.console.warn,
        )
    app.console.answer(_as_json(listed) if form == "json" else _as_table(listed))


@click.command()
@click.argument("file", metavar="REFERENCE:PATH")
@click.option(
    "--verify-layers",
    is_flag=True,
    help="Read the file's whole layer and verify it, also where the file alone can be had.",
)
@network_options
@global_options
@pass_application
@asynchronous
async def cat(app: Application, file: str, *, verify_layers: bool) -> None:
    """Write one file of a ModelKit to stdout: from the local store if the kit is there, else from its registry.

    Up to 16 MiB are verified before the first byte is written; of a larger file the exit code says whether it is right.

    \b
    kitclient cat registry.example.com/team/model:v1:model/config.json
    """
    from kitclient.allocator import keep_large_buffers
    from kitclient.kit_files import parse_file_reference
    from kitclient.single_files import cat as cat_file

    reference, path = parse_file_reference(file)
    if reference.further_tags:
        raise click.UsageError("one tag or digest is wanted, not several")
    keep_large_buffers()
    output = sys.stdout.buffer
    stores = app.stores
    async with stores.find(reference) as (place, label):
        await cat_file(
            place,
            label,
            path,
            output.write,
            verify_layers=verify_layers,
            find=stores.find,
            progress=app.console.progress(),
            notice=app.console.warn,
        )
    await asyncio.to_thread(output.flush)


def _as_table(listed: FileList) -> str:
    from kitclient.terminal import visible

    rows = [_COLUMNS, *(_row(file) for file in listed.files)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS) - 1)]
    return "\n".join(
        "   ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), visible(row[-1])])
        for row in rows
    )


def _row(file: KitFile) -> tuple[str, str, str, str]:
    from kitclient.console import format_size

    if file.digest is None:
        return f"{file.mode:04o}", "-", "-", f"{file.path}/"
    return f"{file.mode:04o}", format_size(file.size), file.digest.encoded[:12], file.path


def _as_json(listed: FileList) -> str:
    """In the form of the registry's own list."""
    documents = [_document(file) for file in listed.files]
    text = json.dumps({"digest": listed.digest, "files": documents}, indent=2, ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _document(file: KitFile) -> dict[str, object]:
    document: dict[str, object] = {
        "path": file.path,
        "type": "directory" if file.is_folder else "file",
        "size": file.size,
        "mode": f"{file.mode:04o}",
    }
    if file.digest is not None:
        document["digest"] = file.digest
    document["layer"] = file.layer
    if file.offset is not None:
        document["offset"] = file.offset
    return document | {"section": file.section, "entry": file.entry}
