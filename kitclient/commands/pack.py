"""`kitclient pack`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)

if TYPE_CHECKING:
    from kitclient.packing import Form, Packed
    from kitspec.names import Reference


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-f", "--file", "kitfile", metavar="FILE", help="The Kitfile; - reads stdin.  [default: Kitfile in DIR]"
)
@click.option("-t", "--tag", metavar="REF", help="[registry/]repository[:tag[,tag…]] for the result.")
@click.option(
    "--compression",
    type=click.Choice(["none", "gzip", "gzip-fastest", "zstd"]),
    default="none",
    show_default=True,
    help="How layers are compressed. Parts of uncompressed layers can be read by themselves.",
)
@click.option(
    "--layer-format",
    type=click.Choice(["tar", "raw"]),
    default="tar",
    show_default=True,
    help="raw: a layer is one file as it is; every path of the Kitfile must be a file.",
)
@click.option("--use-model-pack", is_flag=True, help="Write a CNCF ModelPack artifact.")
@click.option(
    "--kit-version",
    type=click.Choice(["1.7", "1.17"]),
    default="1.17",
    show_default=True,
    help="Which kit's manifest is written; 1.7 for readers of before 1.10.",
)
@click.option("--push", is_flag=True, help="Store the layers in the registry of the tag, and nothing here.")
@network_options
@global_options
@pass_application
@asynchronous
async def pack(
    app: Application,
    /,
    directory: Path,
    kitfile: str | None,
    tag: str | None,
    **options: Any,  # noqa: ANN401  (click's)
) -> None:
    """Pack a folder into a ModelKit, as its Kitfile says.

    \b
    kitclient pack . -t localhost:5000/team/model:v1
    kitclient pack . -f training.kitfile -t team/model:v1,latest
    """
    from kitclient.allocator import keep_large_buffers
    from kitclient.packing import PackStyle
    from kitclient.packing import pack as pack_folder
    from kitclient.references import parents_of
    from kitclient.stores import LATEST, UNNAMED, name_of
    from kitclient.transfer import Place
    from kitspec.kitfile import Kitfile
    from kitspec.kitfile_rules import check_kitfile, warnings_of
    from kitspec.names import LOCAL_REGISTRY, Reference

    reference = Reference.parse(tag) if tag is not None else None
    _check_options(reference, options)
    content = Kitfile.from_yaml(_read_kitfile(directory, kitfile))
    check_kitfile(content)
    for warning in warnings_of(content):
        app.console.warn(warning)
    keep_large_buffers()
    stores = app.stores
    host = reference.registry if reference is not None else LOCAL_REGISTRY
    name = name_of(reference) if reference is not None else UNNAMED
    parents = await parents_of(content, stores.find)
    async with stores.remote(host) if options["push"] else stores.local(host) as registry:
        packed = await pack_folder(
            directory,
            content,
            Place(registry, name),
            tags=() if reference is None else (reference.tag or LATEST, *reference.further_tags),
            style=PackStyle(_form(options), options["layer_format"], options["compression"]),
            parent_paths=parents,
            progress=app.console.progress(),
            warn=app.console.warn,
        )
    _report(app, packed, pushed=options["push"])


def _check_options(reference: Reference | None, options: Mapping[str, Any]) -> None:
    if reference is not None and reference.digest is not None:
        raise click.UsageError("a tag is wanted behind -t, not a digest")
    if options["use_model_pack"] and options["kit_version"] == "1.7":
        raise click.UsageError("--use-model-pack and --kit-version 1.7 exclude each other")
    if options["push"] and reference is None:
        raise click.UsageError("--push needs -t, to know where to")


def _form(options: Mapping[str, Any]) -> Form:
    if options["use_model_pack"]:
        return "modelpack"
    return "1.7" if options["kit_version"] == "1.7" else "current"


def _report(app: Application, packed: Packed, *, pushed: bool) -> None:
    from kitspec.media_types import parse_layer_media_type

    if not packed.layers:
        app.console.warn("ModelKit contains no layers")
    for layer, existed in packed.layers:
        layer_type = parse_layer_media_type(layer.media_type)
        kind = layer_type.kind if layer_type is not None else layer.media_type
        app.console.info(f"{'Already saved' if existed else 'Saved'} {kind} layer: {layer.digest}")
    app.console.info(f"Saved configuration: {packed.config.digest}")
    app.console.info(f"Saved manifest to {'registry' if pushed else 'storage'}: {packed.manifest.digest}")
    app.console.info(f"Model saved: {packed.manifest.digest}")


def _read_kitfile(directory: Path, chosen: str | None) -> bytes:
    """The Kitfile's bytes: from stdin, from the file that was named, or from the folder."""
    from kitspec.kitfile import FILE_NAMES, KITFILE_SIZE_MAX

    if chosen == "-":
        if sys.stdin.isatty():
            raise click.UsageError("-f - reads the Kitfile from stdin, and stdin is a terminal")
        return sys.stdin.buffer.read(KITFILE_SIZE_MAX + 1)
    if chosen is not None:
        # Where the user is comes first; kit looks in the folder that is packed.
        candidates = [Path(chosen), directory / chosen]
    else:
        candidates = [directory / name for name in FILE_NAMES]
    for path in candidates:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(KITFILE_SIZE_MAX + 1)
    if chosen is not None:
        raise click.UsageError(f"no Kitfile at {chosen}, neither here nor in {directory}")
    raise click.UsageError(f"No Kitfile found in {directory}. Consider using the -f flag to specify its path")
