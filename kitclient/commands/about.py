"""`kitclient version` and `completion`."""

from __future__ import annotations

import platform

import click

from kitclient import __version__
from kitclient.commands.application import Application, global_options, pass_application


@click.command()
@global_options
@pass_application
def version(app: Application) -> None:
    """Print the version."""
    app.console.answer(f"Version: {__version__}\nPython version: {platform.python_version()}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@global_options
@pass_application
@click.pass_context
def completion(context: click.Context, app: Application, shell: str) -> None:
    """Print a script that makes a shell complete kitclient's commands and options.

    \b
    kitclient completion bash > ~/.local/share/bash-completion/completions/kitclient
    kitclient completion zsh > "${fpath[1]}/_kitclient"
    kitclient completion fish > ~/.config/fish/completions/kitclient.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "kitclient", "_KITCLIENT_COMPLETE").source()
    click.echo(script)
    _ = app
