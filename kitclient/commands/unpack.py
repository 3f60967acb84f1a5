"""`kitclient unpack`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)

_SIZE = re.compile(r"(?P<number>[0-9]{1,15})(?P<unit>[KMGT]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECTIONS = ("kitfile", "model", "code", "datasets", "docs")


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        match = _SIZE.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{value!r} is not a size; wanted a number and perhaps K, M, G or T", parameter, context
            )
        return int(match["number"]) * _UNITS[match["unit"].upper()]


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.option(
    "-d", "--dir", "directory", metavar="DIR", default=".", help="Where to; made if needed.  [default: here]"
)
@click.option(
    "-f",
    "--filter",
    "filters",
    metavar="FILTER",
    multiple=True,
    help="TYPE[,TYPE…][:NAME-OR-PATH,…]; types are kitfile, model, datasets, code, docs, prompts, mcpservers. Repeatable.",
)
@click.option(
    "--path",
    "paths",
    metavar="PATTERN",
    multiple=True,
    help="Of that, only files whose path matches, such as *.json or 'model/**'. Repeatable.",
)
@click.option(
    "--verify-layers",
    is_flag=True,
    help="With --path: fetch whole layers and verify them, also where single files can be had.",
)
@click.option("-o", "--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("-i", "--ignore-existing", is_flag=True, help="Leave files that exist as they are.")
@click.option(
    "--max-unpacked",
    metavar="SIZE",
    type=_Size(),
    help="Write at most this, and believe any compression ratio.  [default: what fits, ratio 1000]",
)
@click.option("--kitfile", is_flag=True, hidden=True)
@click.option("--model", is_flag=True, hidden=True)
@click.option("--code", is_flag=True, hidden=True)
@click.option("--datasets", is_flag=True, hidden=True)
@click.option("--docs", is_flag=True, hidden=True)
@network_options
@global_options
@pass_application
@asynchronous
async def unpack(  # noqa: PLR0917  (click's)
    app: Application,
    /,
    reference: str,
    directory: str,
    filters: tuple[str, ...],
    paths: tuple[str, ...],
    verify_layers: bool,  # noqa: FBT001
    overwrite: bool,  # noqa: FBT001  (click's)
    ignore_existing: bool,  # noqa: FBT001
    max_unpacked: int | None,
    **sections: bool,
) -> None:
    """Make files of a ModelKit, or of a part of it: from the local store if it is there, else straight from its registry.

    Everything is verified before anything is shown; on an error nothing is left behind.

    \b
    kitclient unpack registry.example.com/team/model:v1 -d out
    kitclient unpack team/model:v1 --filter model --filter datasets:train -d out
    kitclient unpack registry.example.com/team/model:v1 --path 'model/*.json' -d out
    """
    from kitclient.allocator import keep_large_buffers
    from kitclient.staging import Existing
    from kitclient.unpacking import unpack as unpack_kit
    from kitspec.names import Reference
    from kitspec.selection import parse_filter

    parsed = Reference.parse(reference)
    if parsed.further_tags:
        raise click.UsageError("can not unpack multiple tags")
    if overwrite and ignore_existing:
        raise click.UsageError("--overwrite and --ignore-existing exclude each other")
    if not filters:
        filters = tuple(section for section in _SECTIONS if sections[section])
    chosen = [parse_filter(text) for text in filters]
    existing = Existing.REPLACE if overwrite else Existing.SKIP if ignore_existing else Existing.REFUSE
    keep_large_buffers()
    stores = app.stores
    async with stores.find(parsed) as (place, label):
        unpacked = await unpack_kit(
            place,
            label,
            Path(directory),
            filters=chosen,
            paths=paths,
            verify_layers=verify_layers,
            existing=existing,
            max_unpacked=max_unpacked,
            find=stores.find,
            progress=app.console.progress(),
            notice=app.console.info,
            warn=app.console.warn,
        )
    for path in unpacked.kept:
        app.console.debug(f"{path} exists and was left as it is")
    if unpacked.kept:
        app.console.info(f"Left {len(unpacked.kept)} existing files as they were")
