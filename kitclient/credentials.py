"""Who we are at which host: Docker's credential files and helpers, read and written as Docker and kit do.

Two files are asked in turn, kitclient's own and then Docker's (read only): the first that has an answer wins, and an
error stops the search, so that a broken file never silently means "anonymous". Within a file a host is looked up in
`credHelpers`, then `credsStore`, then `auths`. Only the exact host (and port) counts, after canonicalising: no other
host's credentials, no wildcard, no parent domain. Secrets never appear in a message or a repr.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import re
import secrets
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from kitclient.errors import CredentialsUnusable

_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_DOCKER_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_HELPER_NAME = re.compile(r"[a-zA-Z0-9_-]+", re.ASCII)
# A helper may ask its user to unlock a key ring; longer than this it hangs.
_HELPER_TIMEOUT_S = 30.0
_HELPER_OUTPUT_MAX = 64 * 1024
# A pipe takes so much, in any characters, though nobody reads it.
_HELPER_REQUEST_MAX = 16 * 1024
_FILE_SIZE_MAX = 4 * 1024 * 1024
# What every helper of Docker says, and macOS's own words, which its helper passes on when it erases.
_NOT_FOUND = frozenset(
    {"credentials not found in native keychain", "The specified item could not be found in the keychain."}
)
_SHOWN_LENGTH_MAX = 200
# The Username by which a helper says that its Secret is an identity token.
_TOKEN_USER = "<token>"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Credential:
    """What a registry, or its token service, is shown. Either a name and password, or one of the tokens.

    Attributes:
        identity_token: changed for access tokens at the token service.
        registry_token: shown to the registry as it is.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str | None:
        """The value of `Authorization: Basic`, if there is a name and a password."""
        if not self.username:
            return None
        return basic(self.username, self.password)


def basic(username: str, password: str) -> str:
    """The value of `Authorization` for a name and a password (RFC 7617), in UTF-8."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


CredentialSource = Callable[[str], Awaitable[Credential | None]]
"""Gives the credential for a `host[:port]`, or None."""


def canonical_host(text: str) -> str:
    """`host[:port]` in one spelling: lower case, no trailing dot, no scheme or path, no default port.

    Raises:
        CredentialsUnusable: not a host.
    """
    host, default_port = text.strip().lower(), "443"
    for scheme, port in (("https://", "443"), ("http://", "80")):
        if host.startswith(scheme):
            # A key with a path and no scheme is another tool's, for a part of a host: not ours to widen.
            host, default_port = host.removeprefix(scheme).partition("/")[0], port
    match = _HOST.fullmatch(host)
    if match is None:
        # A URL may come with a password before the @.
        shown = text[:200] if "@" not in text else f"…@{text.rpartition('@')[2][:200]}"
        raise CredentialsUnusable(f"not a registry host: {shown!a}; wanted host or host:port")
    name, port = match["name"].rstrip("."), match["port"]
    host = name if port in (None, default_port) else f"{name}:{port}"
    return "docker.io" if host in _DOCKER_HUB_HOSTS else host


class CredentialFile:
    """One file in the format of Docker's config.json, with the helpers that it names."""

    def __init__(self, path: Path, *, environment: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self._environment = environment

    async def get(self, host: str) -> Credential | None:
        """The credential for a host, or None.

        Raises:
            CredentialsUnusable: the file or the helper it names is broken.
        """
        host = canonical_host(host)
        document = await asyncio.to_thread(self._read)
        helper = self._helper(document, host)
        if helper is not None:
            return await self._ask_helper(helper, host)
        return self._plain(document, host)

    async def store(self, host: str, credential: Credential) -> None:
        """Remember a credential: with the helper that the file names for the host, else in the file.

        What the helper has stored is then no longer in the file: nobody would look for it there, or forget it.
        """
        host = canonical_host(host)
        document = await asyncio.to_thread(self._read)
        helper = self._helper(document, host)
        if helper is None:
            await asyncio.to_thread(
                self._change, lambda auths: auths.__setitem__(_key(host), _to_json(credential)), host
            )
            return
        username, secret = credential.username, credential.password
        if credential.identity_token:
            username, secret = _TOKEN_USER, credential.identity_token
        request = {"ServerURL": _key(host), "Username": username, "Secret": secret}
        await self._run_helper(helper, "store", json.dumps(request))
        # Docker leaves an empty entry for each host in its helper; a file that has nothing to forget may be read-only.
        if any(entry and _host_of(key) == host for key, entry in self._section(document, "auths").items()):
            await asyncio.to_thread(self._change, lambda _: None, host)

    async def erase(self, host: str) -> None:
        """Forget a host. Not an error when nothing is known of it.

        Raises:
            CredentialsUnusable: the file or the helper it names is broken, or the helper did not erase it; what the
                file itself had is gone then all the same.
        """
        host = canonical_host(host)
        document = await asyncio.to_thread(self._read)
        helper = self._helper(document, host)
        try:
            if helper is not None:
                await self._run_helper(helper, "erase", _key(host))
        finally:
            await asyncio.to_thread(self._change, lambda _: None, host)

    async def origin(self, host: str) -> str | None:
        """Where `get` finds a credential, in words: this file, or the helper that it names. None: it finds none."""
        host = canonical_host(host)
        if await self.get(host) is None:
            return None
        helper = self._helper(await asyncio.to_thread(self._read), host)
        return str(self.path) if helper is None else f"docker-credential-{helper}, which {self.path} names"

    # ---- the file

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb", opener=_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise CredentialsUnusable(f"{self.path} is not a regular file")
                content = file.read(_FILE_SIZE_MAX + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CredentialsUnusable(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) > _FILE_SIZE_MAX:
            raise CredentialsUnusable(f"{self.path} is larger than {_FILE_SIZE_MAX} bytes")
        if not content.strip():
            return {}
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            # Without the parser's words: they may quote what stands there.
            raise CredentialsUnusable(f"{self.path} is not JSON; mend or remove it") from None
        if not isinstance(document, dict):
            raise CredentialsUnusable(f"{self.path} is not a JSON object; mend or remove it")
        return document

    def _change(self, edit: Callable[[dict[str, Any]], None], host: str) -> None:
        """Replace the file: whole or not at all, 0600 from its first byte, what we do not know kept."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=30, mode=0o600):
                document = self._read()
                auths = self._section(document, "auths")
                document["auths"] = {key: value for key, value in auths.items() if _host_of(key) != host}
                edit(document["auths"])
                # A link is followed, so that a file kept elsewhere stays there.
                target = self.path.resolve()
                temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
                try:
                    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                        json.dump(document, file, indent="\t")
                        file.flush()
                        os.fsync(file.fileno())
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
        except (OSError, TimeoutError) as error:
            raise CredentialsUnusable(f"{self.path} cannot be written: {error}") from error

    def _section(self, document: dict[str, Any], key: str) -> dict[str, Any]:
        section = document.get(key)
        if section is None:
            return {}
        if not isinstance(section, dict):
            raise CredentialsUnusable(f"{self.path}: {key} is not an object")
        return section

    def _plain(self, document: dict[str, Any], host: str) -> Credential | None:
        auths = self._section(document, "auths")
        # The exact key first: a file may hold both `host` and `https://host/v1/`.
        for key in sorted(auths, key=lambda key: key != _key(host)):
            if _host_of(key) == host:
                credential = self._parse(auths[key], key)
                if credential is not None:
                    return credential
        return None

    def _parse(self, entry: object, key: str) -> Credential | None:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name, ""), str)
            for name in ("auth", "username", "password", "identitytoken", "registrytoken")
        ):
            raise CredentialsUnusable(f"{self.path}: the entry of {key!a} is not understood")
        username, password = entry.get("username", ""), entry.get("password", "")
        if entry.get("auth"):
            try:
                username, colon, password = (
                    base64.b64decode(entry["auth"], validate=True).decode().partition(":")
                )
            except (binascii.Error, UnicodeDecodeError):
                colon = ""
            if not colon:
                raise CredentialsUnusable(
                    f"{self.path}: the `auth` of {key!a} is not base64 of name:password"
                ) from None
            password = password.rstrip("\0")
        credential = Credential(
            username, password, entry.get("identitytoken", ""), entry.get("registrytoken", "")
        )
        return None if credential == Credential() else credential

    # ---- helpers

    def _helper(self, document: dict[str, Any], host: str) -> str | None:
        helpers = self._section(document, "credHelpers").items()
        helper = next((name for key, name in helpers if _host_of(key) == host), document.get("credsStore"))
        if not helper:
            return None
        if not isinstance(helper, str) or _HELPER_NAME.fullmatch(helper) is None:
            raise CredentialsUnusable(
                f"{self.path}: not the name of a credential helper: {str(helper)[:100]!a}"
            )
        return helper

    async def _ask_helper(self, helper: str, host: str) -> Credential | None:
        answer = await self._run_helper(helper, "get", _key(host))
        if answer is None:
            return None
        try:
            document = json.loads(answer)
            username, secret = document["Username"], document["Secret"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CredentialsUnusable(
                f"docker-credential-{helper} get: the answer is not understood"
            ) from None
        if not isinstance(username, str) or not isinstance(secret, str):
            raise CredentialsUnusable(f"docker-credential-{helper} get: the answer is not understood")
        if username == _TOKEN_USER:
            return Credential(identity_token=secret)
        return Credential(username, secret) if username or secret else None

    async def _run_helper(self, helper: str, action: str, request: str) -> bytes | None:
        """The helper's output; None when it knows nothing of the host."""
        if any(character in request for character in "\r\n\0"):
            raise CredentialsUnusable(f"line breaks cannot be given to docker-credential-{helper}")
        if len(request) > _HELPER_REQUEST_MAX:
            raise CredentialsUnusable(
                f"docker-credential-{helper} is given at most {_HELPER_REQUEST_MAX} characters"
            )
        status, output = await asyncio.to_thread(self._converse, helper, action, request)
        if len(output) > _HELPER_OUTPUT_MAX:
            raise CredentialsUnusable(
                f"docker-credential-{helper} {action} said more than {_HELPER_OUTPUT_MAX} bytes"
            )
        if status == 0:
            return output
        said = output.decode(errors="replace").strip()
        if said in _NOT_FOUND:
            return None
        failed = f"docker-credential-{helper} {action} failed with status {status}"
        if action == "erase":
            # Shown for this action only, which gives a helper no secret and asks it for none.
            words = f"said {said[:_SHOWN_LENGTH_MAX]!a}" if said else "said nothing"
            raise CredentialsUnusable(
                f"{failed} and {words}: it may still have the credential of {request}; "
                "mend that and log out again, or remove it there"
            )
        raise CredentialsUnusable(failed)

    def _converse(self, helper: str, action: str, request: str) -> tuple[int, bytes]:
        """Run the helper; its status, and its output up to one byte over the limit."""
        program = shutil.which(f"docker-credential-{helper}", path=self._environment.get("PATH", os.defpath))
        if program is None or not Path(program).is_absolute():
            raise CredentialsUnusable(
                f"{self.path} names the helper docker-credential-{helper}, which is not on the PATH"
            )
        with subprocess.Popen(  # noqa: S603 (the name was checked, the place is the PATH's)
            [program, action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(self._environment),
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            deadline = time.monotonic() + _HELPER_TIMEOUT_S
            try:
                with contextlib.suppress(BrokenPipeError):  # it need not read what it does not want to know
                    process.stdin.write(request.encode())
                    process.stdin.close()
                output = _read_until(process.stdout.fileno(), deadline)
                if len(output) <= _HELPER_OUTPUT_MAX:
                    process.wait(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                process.kill()
                raise CredentialsUnusable(
                    f"docker-credential-{helper} {action} gave no answer in {_HELPER_TIMEOUT_S:.0f} s"
                ) from error
            if len(output) > _HELPER_OUTPUT_MAX:
                process.kill()
        return process.returncode, output


class Credentials:
    """kitclient's own file, and behind it Docker's."""

    def __init__(self, own: Path, *, environment: Mapping[str, str] = os.environ) -> None:
        self._own = CredentialFile(own, environment=environment)
        docker = environment.get("DOCKER_CONFIG")
        folder = Path(docker) if docker else Path(environment.get("HOME", "~")).expanduser() / ".docker"
        self._docker = CredentialFile(folder / "config.json", environment=environment)

    async def get(self, host: str) -> Credential | None:
        return await self._own.get(host) or await self._docker.get(host)

    async def store(self, host: str, credential: Credential) -> None:
        await self._own.store(host, credential)

    async def erase(self, host: str) -> None:
        """Forget a host in our own file; Docker's is Docker's."""
        await self._own.erase(host)

    async def origin(self, host: str) -> str | None:
        """Where `get` finds a credential, in words; None: it finds none."""
        return await self._own.origin(host) or await self._docker.origin(host)


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe, too, at once: nobody may be there to write to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_until(file: int, deadline: float) -> bytes:
    """What is written to a pipe until its end, or until it is too much; not `communicate`, which takes any amount."""
    output = b""
    while len(output) <= _HELPER_OUTPUT_MAX:
        if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(file, 65536)
        if not piece:
            break
        output += piece
    return output


def _key(host: str) -> str:
    """What a host is filed under; Docker Hub has a name of its own there."""
    return _DOCKER_HUB_KEY if host == "docker.io" else host


def _host_of(key: str) -> str | None:
    try:
        return canonical_host(key)
    except CredentialsUnusable:
        return None


def _to_json(credential: Credential) -> dict[str, str]:
    entry: dict[str, str] = {}
    if credential.username:
        entry["auth"] = base64.b64encode(f"{credential.username}:{credential.password}".encode()).decode()
    if credential.identity_token:
        entry["identitytoken"] = credential.identity_token
    if credential.registry_token:
        entry["registrytoken"] = credential.registry_token
    return entry
