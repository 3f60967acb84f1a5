"""`kitclient login` and `logout`."""

from __future__ import annotations

import sys

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)


@click.command()
@click.argument("registry", metavar="REGISTRY")
@click.option("-u", "--username", metavar="NAME", help="Asked for otherwise.")
@click.option(
    "-p",
    "--password",
    metavar="PASSWORD",
    help="Seen by everybody who lists processes; rather --password-stdin.",
)
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@network_options
@global_options
@pass_application
@asynchronous
async def login(
    app: Application, registry: str, username: str | None, password: str | None, *, password_stdin: bool
) -> None:
    """Check credentials with a registry and keep them.

    \b
    kitclient login registry.example.com -u ann
    pass registry | kitclient login registry.example.com -u ann --password-stdin
    """
    from kitclient.credentials import Credential, canonical_host

    if password is not None and password_stdin:
        raise click.UsageError("--password and --password-stdin exclude each other")
    if password is not None:
        app.console.warn(
            "a password among the arguments is seen by who lists processes; use --password-stdin"
        )
    host = canonical_host(registry)
    username, password = _ask(username, password, password_stdin=password_stdin)
    if not password:
        raise click.UsageError("a password is wanted")
    if ":" in username:
        raise click.UsageError(
            "a user name has no colon: nobody could tell where the password begins (RFC 7617)"
        )
    credential = Credential(username, password) if username else Credential(identity_token=password)
    stores = app.stores
    async with stores.remote(host, credential=credential) as remote:
        if not await remote.log_in():
            app.console.warn(
                f"{host} asks for no credentials; the token is kept, but nobody has looked at it"
            )
    await stores.credentials().store(host, credential)
    app.console.info("Log in successful")


@click.command()
@click.argument("registry", metavar="REGISTRY")
@global_options
@pass_application
@asynchronous
async def logout(app: Application, registry: str) -> None:
    """Forget the credentials of a registry.

    \b
    kitclient logout registry.example.com
    """
    from kitclient.credentials import canonical_host
    from kitclient.errors import CredentialsUnusable

    host, credentials = canonical_host(registry), app.stores.credentials()
    await credentials.erase(host)
    app.console.info(f"Successfully logged out from {registry}")
    try:
        origin = await credentials.origin(host)
    except CredentialsUnusable as error:
        app.console.warn(f"whether there is another credential for {host} cannot be told: {error}")
        return
    if origin is not None:
        # Docker's file is only read here, and asked after our own.
        app.console.warn(
            f"a credential for {host} is still found in {origin}, and is used from now on; "
            "if it is Docker's, `docker logout` removes it"
        )


def _ask(username: str | None, password: str | None, *, password_stdin: bool) -> tuple[str, str]:
    if password_stdin:
        # One line: what comes out of a password manager ends in a newline that is no part of it.
        return username or "", sys.stdin.readline(64 * 1024).rstrip("\r\n")
    if password is None and not sys.stdin.isatty():
        # The library would ask all the same, and show what is typed or piped in.
        raise click.UsageError(
            "there is no terminal to ask for a password at; pass it in with --password-stdin"
        )
    if username is None and password is None:
        username = click.prompt("Username", default="", show_default=False, err=True)
    if password is None:
        password = click.prompt("Password" if username else "Token", hide_input=True, err=True)
    return username or "", password
