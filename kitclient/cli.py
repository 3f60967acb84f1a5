"""kitclient, the command line: finds the command, runs it, turns what went wrong into a sentence and an exit code.

Exit codes: 0 done, 1 anything that went wrong, also in part, 130 interrupted.
Start-up is short: a command's module is imported when it is called, and what it needs when it needs it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence

import click

from kitclient.commands.application import Application, Failed, global_options
from kitclient.console import Level

_COMMANDS = {
    "pack": "pack:pack",
    "unpack": "unpack:unpack",
    "files": "files:files",
    "cat": "files:cat",
    "push": "transfer:push",
    "pull": "transfer:pull",
    "list": "local:list_kits",
    "inspect": "show:inspect",
    "info": "show:info",
    "tag": "local:tag",
    "remove": "local:remove",
    "diff": "show:diff",
    "login": "session:login",
    "logout": "session:logout",
    "version": "about:version",
    "completion": "about:completion",
}
# As kit's library for flags takes them.
_FLAGS_OF_KIT = {
    "--tls-verify=true": "--tls-verify",
    "--tls-verify=false": "--no-tls-verify",
    "--plain-http=true": "--plain-http",
}
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        _ = ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        _ = ctx
        home = _COMMANDS.get(cmd_name)
        if home is None:
            return None
        module, _, name = home.partition(":")
        command: click.Command = getattr(importlib.import_module(f"kitclient.commands.{module}"), name)
        return command


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@global_options
def cli() -> None:
    """Pack, push, pull and unpack ModelKits, against any OCI registry.

    A reference is [registry/]repository[:tag|@digest]. Without a registry it is in the local store.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and exit."""
    app = Application()
    try:
        code = cli.main(
            args=[
                _FLAGS_OF_KIT.get(text, text) for text in (sys.argv[1:] if arguments is None else arguments)
            ],
            prog_name="kitclient",
            obj=app,
            standalone_mode=False,
        )
        sys.stdout.flush()
    except click.UsageError as error:
        app.console.error(error.format_message())
        if error.ctx is not None:
            click.echo(f"See '{error.ctx.command_path} --help'", err=True)
        sys.exit(EXIT_FAILURE)
    except Failed:
        sys.exit(EXIT_FAILURE)
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        app.console.error(
            "interrupted; nothing is half-written, and the same command goes on where this one stopped"
        )
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever reads us has had enough. Python would complain about it once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    except Exception as error:  # noqa: BLE001  (the one place)
        _explain(app, error)
        sys.exit(EXIT_FAILURE)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(app: Application, error: BaseException) -> None:
    from kitclient.errors import ClientError
    from kitspec.errors import ContentInvalid, OciError

    while isinstance(error, BaseExceptionGroup):
        # What came first stopped the others.
        error = error.exceptions[0]
    if app.console.level <= Level.DEBUG:
        import traceback

        app.console.debug("".join(traceback.format_exception(error)))
    if isinstance(error, OciError | ClientError | ContentInvalid):
        app.console.error(str(error))
    elif isinstance(error, click.ClickException):
        app.console.error(error.format_message())
    elif isinstance(error, OSError):
        name = f" {error.filename}" if error.filename else ""
        app.console.error(f"{error.strerror or error}{name}")
    else:
        app.console.error(f"this is a mistake of kitclient's: {type(error).__name__}: {error}; -v shows more")


if __name__ == "__main__":
    main()
