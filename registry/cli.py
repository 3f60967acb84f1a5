"""`modelkit-registry`: the server and its operations, from a shell.

Exit status: 0 done, 1 failed while running, 2 wrong usage or configuration.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import ipaddress
import json
import logging
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from registry.config import Config, Storage
from registry.config_sources import ConfigInvalid, LoadedConfig, json_schema, load_config
from registry.logs import configure_logging, log_event
from registry.workers import ListenFailed, Serving, serve

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
            )
        )
    except ListenFailed as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.pass_context
def verify(context: click.Context, path: Path) -> None:
    """Check a configuration file; print "FILE: ok" or every problem."""
    try:
        load_config(path)
    except ConfigInvalid as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        context.exit(EXIT_FAILED)
    print(f"{path}: ok")


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
    if not _is_loopback(serving.host):
        log_event(
            LOGGER,
            logging.WARNING,
            "serving.open",
            problem="there are no accounts yet: whoever reaches this address can push, pull and delete",
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
