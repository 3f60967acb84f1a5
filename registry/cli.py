"""`modelkit-registry`: the server and its operations, from a shell.

Exit status: 0 done, 1 failed while running, 2 wrong usage or configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from kitspec.errors import NameInvalid, NameUnknown, OciError
from kitspec.names import RepositoryName
from registry.config import Config, Storage
from registry.config_sources import ConfigInvalid, LoadedConfig, json_schema, load_config
from registry.config_types import parse_address, parse_duration
from registry.garbage import Collected
from registry.logs import configure_logging, log_event
from registry.readiness import NotReady, address_to_ask, ask_ready
from registry.reload import ConfigSource, file_problems
from registry.workers import Serving, StartFailed, serve
from storage_backends.interface import StorageBackend, StorageError

LOGGER = logging.getLogger(__name__)

DISTRIBUTION = "modelkit-registry"
IMPORT_PACKAGES = ("registry", "storage_backends", "kitclient", "kitspec")
# Below this, aiohttp has known holes (request smuggling, unlimited trailers, pipelining without bound).
AIOHTTP_MINIMUM = (3, 14, 5)

EXIT_FAILED = 1
EXIT_USAGE = 2


class StorageLocation(click.ParamType[dict[str, object]]):
    """`FOLDER`, `file:///FOLDER`, `s3://BUCKET/PREFIX` or `memory:`."""

    name = "folder|url"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object]:
        text = str(value)
        url = urlsplit(text) if re.match(r"[a-z][a-z0-9+.-]+:", text) else None
        if url is None and text:
            return {"storage.filesystem.rootdirectory": text}
        if url and url.scheme == "file" and url.netloc in {"", "localhost"} and url.path:
            return {"storage.filesystem.rootdirectory": unquote(url.path)}
        if url and url.scheme == "memory" and not url.netloc and not url.path:
            return {"storage.inmemory": {}}
        if url and url.scheme == "s3" and url.netloc and not url.query and not url.fragment:
            root = {"storage.s3.rootdirectory": url.path} if url.path.strip("/") else {}
            return {"storage.s3.bucket": url.netloc, **root}
        return self.fail(f"{text!r} is not a folder, file:///FOLDER, s3://BUCKET or memory:", param, ctx)


class RepositoryParameter(click.ParamType[RepositoryName]):
    name = "repository"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> RepositoryName:
        try:
            return RepositoryName(str(value))
        except NameInvalid as error:
            return self.fail(str(error), param, ctx)


class DurationParameter(click.ParamType[float]):
    """`24h`, `90m`, `10s`, in seconds."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            return self.fail(f"{value!r}: {error}", param, ctx)


class AddressParameter(click.ParamType[str]):
    """`HOST:PORT`."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return parse_address(value)
        except ValueError as error:
            return self.fail(f"{value!r}: {error}", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """An OCI registry that understands ModelKits."""


@main.command("serve")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration, in the shape of Distribution's config.yml.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.  [default: 127.0.0.1:5000]",
)
@click.option(
    "--storage",
    type=StorageLocation(),
    metavar="FOLDER|URL",
    help="Where everything is kept: a folder, s3://BUCKET/PREFIX, or memory: for a try.  [default: var/registry]",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    metavar="N",
    help="Processes that serve; 0 is one for each core, at most 4.  [default: 0]",
)
@click.option(
    "--hints", is_flag=True, help="Print three kitclient lines to try; a terminal gets them anyway."
)
@click.pass_context
def serve_command(  # noqa: PLR0917 - click passes by name
    context: click.Context,
    path: Path | None,
    listen: str | None,
    storage: dict[str, object] | None,
    workers: int | None,
    hints: bool,  # noqa: FBT001 - click's way
) -> None:
    """Serve the registry until SIGTERM or Ctrl-C.

    Without a file everything has a sensible default. Any key of the file can also be given as a variable:
    MODELREG_STORAGE_DELETE_ENABLED=false, or with Distribution's prefix, REGISTRY_.
    """
    overrides: dict[str, object] = dict(storage or {})
    if listen is not None:
        overrides["http.addr"] = listen
    if workers is not None:
        overrides["workers"] = workers
    loaded = _load_or_exit(path, overrides)
    configure_logging(loaded.config.log)
    if problem := unsound_installation():
        raise click.ClickException(problem)
    for warning in loaded.warnings:
        log_event(LOGGER, logging.WARNING, "config.warning", problem=warning)

    from registry.app import run_worker  # the application is loaded only by what serves it

    try:
        context.exit(
            serve(
                loaded.config,
                run_worker,
                on_serving=lambda serving: _announce(loaded.config, serving, hints=hints),
                source=ConfigSource(loaded.config, path, environ=dict(os.environ), overrides=overrides),
            )
        )
    except StartFailed as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.pass_context
def verify(context: click.Context, path: Path) -> None:
    """Check a configuration file with the variables that are set, and the files it names; print "FILE: ok" or every problem."""
    try:
        loaded = load_config(path, environ=os.environ)
    except ConfigInvalid as error:
        problems = error.problems
    else:
        problems = file_problems(loaded.config)
        for warning in loaded.warnings:
            print(warning, file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        context.exit(EXIT_FAILED)
    print(f"{path}: ok")


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="As of serve.")
@click.option(
    "--address",
    type=AddressParameter(),
    metavar="HOST:PORT",
    help="Where it listens.  [default: http.addr; 127.0.0.1 if that is every address]",
)
@click.pass_context
def health(context: click.Context, path: Path | None, address: str | None) -> None:
    """Ask the registry that runs here whether it can serve (GET /readyz). Exit status 1: it cannot, or does not answer.

    For health checks of containers. The same configuration as the registry's says where and how to ask.
    """
    http_config = _load_or_exit(path, {}).config.http
    asked = address or address_to_ask(http_config.addr)
    try:
        ask_ready(http_config, asked)
    except NotReady as error:
        print(error, file=sys.stderr)
        context.exit(EXIT_FAILED)
    print(f"{asked}: ready")


@main.command("garbage-collect")
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="As of serve.")
@click.option("--storage", type=StorageLocation(), metavar="FOLDER|URL", help="As of serve.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and write nothing.")
@click.option(
    "--grace",
    type=DurationParameter(),
    metavar="TIME",
    help="Keep what nothing refers to for so long (24h, 90m) after somebody was told that it is here.  "
    "[default: storage.maintenance.garbagecollection.grace]",
)
@click.option(
    "--offline",
    is_flag=True,
    help="No registry serves this storage right now: --grace may be less than what is configured.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
@click.pass_context
def garbage_collect(  # noqa: PLR0917 - click passes by name
    context: click.Context,
    path: Path | None,
    storage: dict[str, object] | None,
    dry_run: bool,  # noqa: FBT001 - click's way
    grace: float | None,
    offline: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Remove what no manifest refers to: blobs, their links, what was derived, uploads that nobody goes on with.

    Safe while registries serve the same storage; they collect by themselves, too. Each object that goes is a line of the log.
    """
    config = _load_or_exit(path, dict(storage or {})).config
    configure_logging(config.log)
    promised = config.storage.maintenance.garbagecollection.grace
    if grace is not None and grace < promised and not offline:
        raise click.UsageError(
            f"--grace {grace:g}s is less than the {promised:g}s that registries which serve this storage rely on "
            "(storage.maintenance.garbagecollection.grace): lower that first, everywhere, or stop them and say --offline"
        )

    from registry.app import collect_once
    from registry.garbage import CollectionBusy

    try:
        collected = asyncio.run(collect_once(config, grace_s=grace, dry_run=dry_run))
    except (CollectionBusy, OciError, StorageError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print(json.dumps(dataclasses.asdict(collected) | {"dryRun": dry_run}))
    else:
        print(_collected_line(collected, dry_run=dry_run))
    if collected.unreadable:
        context.exit(EXIT_FAILED)


def _collected_line(collected: Collected, *, dry_run: bool) -> str:
    things = ", ".join(f"{count} {kind}" for kind, count in collected.removed.items() if count) or "nothing"
    would = "would remove" if dry_run else "removed"
    line = (
        f"{would} {things}; {collected.size} bytes of content "
        f"({collected.repositories} repositories, {collected.manifests} manifests read)"
    )
    if collected.unreadable:
        line += (
            f"\n{collected.unreadable} objects cannot be read and stay, manifests with all blobs of their repositories: "
            "the log names them; see `modelkit-registry fsck`"
        )
    return line


@main.command("fsck")
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="As of serve.")
@click.option("--storage", type=StorageLocation(), metavar="FOLDER|URL", help="As of serve.")
@click.option(
    "--repository",
    "names",
    type=RepositoryParameter(),
    multiple=True,
    metavar="NAME",
    help="Look at this repository and what it links only; may be given again.",
)
@click.option("--no-content", is_flag=True, help="Do not read and hash the content itself.")
@click.option(
    "--grace",
    type=DurationParameter(),
    metavar="TIME",
    help="Garbage is what nothing refers to and is older than this.  "
    "[default: storage.maintenance.garbagecollection.grace]",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each finding, a summary at the end.")
@click.pass_context
def fsck_command(  # noqa: PLR0917 - click passes by name
    context: click.Context,
    path: Path | None,
    storage: dict[str, object] | None,
    names: tuple[RepositoryName, ...],
    no_content: bool,  # noqa: FBT001 - click's way
    grace: float | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Compare everything that is stored with what refers to it, and content with its digest. Changes nothing.

    May run while registries serve the same storage. Exit status 1: something is wrong, or could not be read.
    """
    config = _load_or_exit(path, dict(storage or {})).config
    configure_logging(config.log)

    _refuse_no_storage(config.storage)

    from registry.fsck import Fsck
    from registry.fsck_report import Report

    async def compare(report: Report) -> None:
        async with _opened_to_read(config) as backend:
            fsck = Fsck(
                backend,
                grace_s=config.storage.maintenance.garbagecollection.grace if grace is None else grace,
                allow_sparse=config.manifests.allowsparse,
                with_content=not no_content,
                names=names,
                on_progress=report.progress,
            )
            async for finding in fsck.findings():
                report.tell(finding)
        report.end(fsck.checked)

    with Report(is_json=as_json) as report:
        try:
            asyncio.run(compare(report))
        except NameUnknown as error:
            raise click.UsageError(str(error)) from error
        except StorageError as error:
            raise click.ClickException(
                f"the storage cannot be read, and not all was looked at: {error}"
            ) from error
    context.exit(EXIT_FAILED if report.has_errors else 0)


@asynccontextmanager
async def _opened_to_read(config: Config) -> AsyncIterator[StorageBackend]:
    """The storage that is configured, for a command that changes nothing."""
    from registry.app import make_backend

    backend = make_backend(config)
    try:
        # A folder is read as it stands: its start would clean up, and needs a folder that can be written.
        if config.storage.filesystem is None:
            await backend.start()
        yield backend
    finally:
        await backend.close()


def _refuse_no_storage(storage: Storage) -> None:
    """A folder that serve would make is none to be looked at."""
    if storage.filesystem is None:
        return
    from storage_backends.local_folder import refuse_no_store

    root = storage.filesystem.rootdirectory
    try:
        refuse_no_store(root)
    except StorageError as error:
        raise click.ClickException(f"{root}: {error}") from error


@main.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    print(json.dumps(json_schema(), indent=2))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Also what it runs on, as JSON.")
def version(as_json: bool) -> None:  # noqa: FBT001 - click's way
    """Print the version."""
    own = importlib.metadata.version(DISTRIBUTION)
    if not as_json:
        print(f"{DISTRIBUTION} {own}")
        return
    libraries = {
        name: importlib.metadata.version(name) for name in ("aiohttp", "pydantic", "PyYAML", "zstandard")
    }
    print(
        json.dumps(
            {
                "version": own,
                "python": platform.python_version(),
                "platform": platform.platform(),
                **libraries,
            }
        )
    )


def unsound_installation() -> str | None:
    """Why this installation must not serve, if so."""
    import aiohttp

    if tuple(int(part) for part in re.findall(r"\d+", aiohttp.__version__)[:3]) < AIOHTTP_MINIMUM:
        wanted = ".".join(map(str, AIOHTTP_MINIMUM))
        return f"aiohttp {aiohttp.__version__} has known security holes: install aiohttp>={wanted}"
    if not _has_c_parser():
        return (
            "aiohttp runs without its C parser (the Python one is open to request smuggling): install a wheel of "
            "aiohttp for this Python, and unset AIOHTTP_NO_EXTENSIONS"
        )
    owners = importlib.metadata.packages_distributions()
    for package in IMPORT_PACKAGES:
        if others := set(owners.get(package, ())) - {DISTRIBUTION}:
            return f"another distribution, {', '.join(sorted(others))}, also installs {package!r}: install {DISTRIBUTION} where it is alone"
    return None


def _has_c_parser() -> bool:
    from aiohttp import http_parser

    return http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


def _load_or_exit(path: Path | None, overrides: dict[str, object]) -> LoadedConfig:
    try:
        return load_config(path, environ=os.environ, overrides=overrides)
    except ConfigInvalid as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _announce(config: Config, serving: Serving, *, hints: bool) -> None:
    address = f"[{serving.host}]:{serving.port}" if ":" in serving.host else f"{serving.host}:{serving.port}"
    log_event(
        LOGGER,
        logging.INFO,
        "serving",
        address=address,
        storage=_place(config.storage),
        durability=config.storage.durability,
        workers=serving.workers,
        deletes=config.storage.delete.enabled,
    )
    if config.auth is None and config.http.accessControl is None and not _is_loopback(serving.host):
        log_event(
            LOGGER,
            logging.WARNING,
            "serving.open",
            problem="nobody is asked who they are (auth): whoever reaches this address can push, pull and delete",
        )
    if hints or sys.stdout.isatty():
        everywhere = serving.host in {"::", "0.0.0.0"}  # noqa: S104 - compared, not bound
        with contextlib.suppress(OSError):  # nobody reads it
            print(_lines_to_try(f"127.0.0.1:{serving.port}" if everywhere else address), flush=True)


def _place(storage: Storage) -> str:
    if storage.s3 is not None:
        return f"s3://{storage.s3.bucket}/{storage.s3.rootdirectory}".rstrip("/")
    return "memory" if storage.filesystem is None else str(storage.filesystem.rootdirectory.absolute())


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _lines_to_try(address: str) -> str:
    kitclient = "kitclient"
    beside = Path(sys.executable).with_name("kitclient")
    if shutil.which(kitclient) is None and beside.exists():
        kitclient = os.path.relpath(beside)
    reference = f"{address}/team/demo:v1"
    return f"""
Try, in another terminal:
  {kitclient} pack . -t {reference}
  {kitclient} push {reference}
  {kitclient} unpack {reference} --filter model --dir demo
"""
