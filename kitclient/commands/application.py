"""What every command is given: the console, the folders, the registries; and the options that many of them take."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from kitclient.console import Console, Level, ProgressStyle
from kitclient.locations import Locations, locations

if TYPE_CHECKING:
    from kitclient.stores import Stores

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Command = Callable[_P, _R]


@dataclass
class Application:
    """One call of the command line."""

    console: Console = field(default_factory=Console)
    root: str | None = None
    network: dict[str, Any] = field(default_factory=dict)

    @property
    def locations(self) -> Locations:
        return locations(self.root)

    @property
    def stores(self) -> Stores:
        from kitclient.stores import Network, Stores
        from kitclient.tls import TlsOptions

        given = self.network
        tls = TlsOptions(
            verify=given.get("tls_verify", True),
            ca_files=tuple(map(Path, given.get("tls_cert", ()))),
            client_certificate=Path(given["cert"]) if given.get("cert") else None,
            client_key=Path(given["key"]) if given.get("key") else None,
        )
        network = Network(
            plain_http=given.get("plain_http", False),
            tls=tls,
            concurrency=given.get("concurrency", 5),
            proxy=given.get("proxy"),
        )
        return Stores(self.locations, network)

    def run(self, work: Coroutine[Any, Any, _R]) -> _R:
        return asyncio.run(work)


class Failed(click.ClickException):
    """The command has failed in part, and has said where; nothing more is to be said."""

    def __init__(self) -> None:
        super().__init__("")


pass_application = click.make_pass_decorator(Application, ensure=True)


def global_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that stand before or behind a command's name."""
    options = [
        click.option(
            "--config",
            metavar="DIR",
            expose_value=False,
            callback=_set_root,
            help="Folder for the local store and credentials.  [default: $KITCLIENT_HOME, or the user's data folder]",
        ),
        click.option(
            "--log-level",
            type=click.Choice([level.name.lower() for level in Level]),
            expose_value=False,
            callback=_set_level,
            help="How much is said.  [default: info]",
        ),
        click.option(
            "--progress",
            type=click.Choice(["none", "plain", "fancy"]),
            expose_value=False,
            callback=_set_progress,
            help="How progress is shown.  [default: fancy on a terminal, plain elsewhere]",
        ),
        click.option(
            "-v",
            "--verbose",
            count=True,
            expose_value=False,
            callback=_set_verbose,
            help="Say more; -vv: all.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a registry is spoken to."""
    options = [
        _network(
            "--plain-http",
            is_flag=True,
            default=False,
            help="Speak http; a registry on this machine is found without.",
        ),
        _network(
            "--tls-verify/--no-tls-verify",
            default=True,
            show_default=True,
            help="Check the registry's certificate.",
        ),
        _network(
            "--tls-cert",
            metavar="FILE",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False),
            help="Trust this certificate authority, too. Repeatable.",
        ),
        _network(
            "--cert",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            envvar="KITCLIENT_CLIENT_CERT",
            help="Our certificate, where the registry asks for one.",
        ),
        _network(
            "--key",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            envvar="KITCLIENT_CLIENT_KEY",
            help="The key of --cert.",
        ),
        _network(
            "--concurrency",
            metavar="N",
            type=click.IntRange(min=1),
            default=5,
            show_default=True,
            help="Transfers at once.",
        ),
        _network("--proxy", metavar="URL", help="An HTTP proxy.  [default: $HTTPS_PROXY, $HTTP_PROXY]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _network(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # noqa: ANN401  (click's)
    def remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
        assert parameter.name is not None
        context.ensure_object(Application).network[parameter.name] = value

    return click.option(name, expose_value=False, callback=remember, **settings)


def _set_root(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Application).root = value


def _set_level(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Application).console.level = Level[value.upper()]


def _set_verbose(context: click.Context, _: click.Parameter, value: int) -> None:
    if value:
        context.ensure_object(Application).console.level = Level.DEBUG if value == 1 else Level.TRACE


def _set_progress(context: click.Context, _: click.Parameter, value: ProgressStyle | None) -> None:
    if value is not None:
        context.ensure_object(Application).console.progress_style = value


def asynchronous(command: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, _R]:
    """Run a coroutine function as a command."""

    @functools.wraps(command)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _R:
        return asyncio.run(command(*arguments, **options))

    return run
