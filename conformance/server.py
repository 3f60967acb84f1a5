"""A registry under test: a command, started on a free port with an empty store, and ended by its process id."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import bcrypt

from conformance import toolbox
from tests.replicas.cluster import Bucket, Cluster, ClusterFailed

_START_TIMEOUT_S = 30
_END_TIMEOUT_S = 15
_OURS = toolbox.HERE.parent / ".venv" / "bin" / "modelkit-registry"


class ServerFailed(Exception):
    """The server did not start, or ended by itself; the message has the end of its log."""


class Runnable(Protocol):
    """A registry that can be started: a `Subject`, or `Replicas`."""

    @property
    def name(self) -> str: ...

    @property
    def login(self) -> tuple[str, str] | None:
        """A user who may do everything, and the password; None where everybody may."""
        ...

    @property
    def finds_sources(self) -> bool:
        """Whether it mounts a blob of a repository that the client does not name."""
        ...

    def running(self, scratch: Path) -> AbstractContextManager[str]:
        """As `Subject.running`."""
        ...


@dataclass(frozen=True)
class Subject:
    """How to start a registry.

    Attributes:
        name: for reports.
        command: `{port}`, `{folder}` (its store, empty), `{config}` (a file holding `config`) and `{users}` (one holding `users`)
            are filled in.
        environment: beside the caller's own.
        config: text of a configuration file; the same words are filled in.
        users: text of an htpasswd file.
        login: of one of them.
        authority: file of the certificates that its own leads to; without it, it speaks plain HTTP.
        finds_sources: see `Runnable`. The suite's tokens are for the repository that it mounts into, and no more may be read by them.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    users: str = ""
    login: tuple[str, str] | None = None
    authority: Path | None = None
    finds_sources: bool = True

    @contextmanager
    def running(self, scratch: Path) -> Iterator[str]:
        """Start it with all that it writes under `scratch`; gives `host:port`.

        Raises:
            ServerFailed: it does not answer, did not outlive the block, or logged a stack trace.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        port = free_port()
        words = {"port": str(port), "folder": str(scratch / "store")}
        words |= {"config": str(scratch / "config.yml"), "users": str(scratch / "users")}
        (scratch / "users").write_text(self.users)
        (scratch / "config.yml").write_text(_fill(self.config, words))
        (scratch / "store").mkdir()
        log = scratch / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [_fill(word, words) for word in self.command],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_it_answers(process, port, log)
            yield f"127.0.0.1:{port}"
            if process.poll() is not None:
                raise ServerFailed(f"{self.name} ended by itself, status {process.returncode}\n{_tail(log)}")
            if b"Traceback (most recent call last)" in log.read_bytes():
                raise ServerFailed(f"{self.name} logged a stack trace\n{_tail(log)}")
        finally:
            _end(process)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        url = f"{'https' if self.authority else 'http'}://127.0.0.1:{port}/v2/"
        trusted = ssl.create_default_context(cafile=self.authority) if self.authority else None
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerFailed(f"{self.name} ended with status {process.returncode}\n{_tail(log)}")
            try:
                with urllib.request.urlopen(url, timeout=5, context=trusted) as reply:  # noqa: S310
                    if reply.status == 200:
                        return
            except urllib.error.HTTPError as error:
                if error.code == 401 and self.login is not None:
                    return
                time.sleep(0.05)
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise ServerFailed(f"{self.name} did not answer within {_START_TIMEOUT_S} s\n{_tail(log)}")


def ours(*, storage: str = "local", workers: int = 1, sparse: bool = False) -> Subject:
    """Our server on a folder (`local`) or on nothing (`memory`)."""
    store = {"local": "{folder}", "memory": "memory://"}[storage]
    command = (
        str(_OURS),
        "serve",
        "--listen",
        "127.0.0.1:{port}",
        "--storage",
        store,
        "--workers",
        str(workers),
    )
    environment = {"MODELREG_MANIFESTS_ALLOWSPARSE": "true"} if sparse else {}
    return Subject(f"ours, {storage}, {workers} worker{'s' if workers > 1 else ''}", command, environment)


def guarded(scheme: str, *, sparse: bool = False) -> Subject:
    """Our server on a folder, where one user may do everything, and nobody else anything.

    Args:
        scheme: by which it asks for credentials, `Basic` or `Bearer`.
    """
    password = secrets.token_urlsafe(16)
    line = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    token = "  token: {realm: 'http://127.0.0.1:{port}/v2/token'}\n" if scheme == "Bearer" else ""
    open_to_all = ours(sparse=sparse)
    return replace(
        open_to_all,
        name=f"{open_to_all.name}, {scheme}",
        command=(*open_to_all.command, "--config", "{config}"),
        config=f"auth:\n  htpasswd: {{path: '{{users}}'}}\n{token}",
        users=f"conformance:{line}\n",
        login=("conformance", password),
        finds_sources=scheme == "Basic",
    )


@dataclass(frozen=True)
class Replicas:
    """Our server on S3: one process, or several that share a bucket and are asked in turn, request by request."""

    count: int
    sparse: bool = False
    login: tuple[str, str] | None = None
    finds_sources: bool = True

    @property
    def name(self) -> str:
        return f"ours, S3, {self.count} replica{'s, each request to the next' if self.count > 1 else ''}"

    @contextmanager
    def running(self, scratch: Path) -> Iterator[str]:
        """As `Subject.running`; one replica is talked to without the proxy."""
        settings = {"MODELREG_MANIFESTS_ALLOWSPARSE": "true"} if self.sparse else {}
        try:
            with (
                object_store(scratch / "store") as bucket,
                Cluster(bucket, scratch / "replicas", replicas=self.count, settings=settings) as cluster,
            ):
                yield urlsplit(cluster.url if self.count > 1 else cluster.urls[0]).netloc
        except ClusterFailed as error:
            raise ServerFailed(f"{self.name}: {error}") from error


def olareg() -> Subject:
    command = (
        *(
            str(toolbox.go_tool("olareg")),
            "serve",
            "--addr",
            "127.0.0.1",
            "--port",
            "{port}",
            "--dir",
            "{folder}",
        ),
        *("--api-delete", "--api-blob-delete"),
    )
    return Subject(_named("olareg"), command)


def distribution() -> Subject:
    config = """\
version: 0.1
log: {accesslog: {disabled: true}, level: warn}
storage: {filesystem: {rootdirectory: "{folder}"}, delete: {enabled: true}}
http: {addr: "127.0.0.1:{port}"}
"""
    command = (str(toolbox.go_tool("registry")), "serve", "{config}")
    return Subject(
        _named("registry").replace("registry", "Distribution"),
        command,
        {"OTEL_TRACES_EXPORTER": "none"},
        config,
    )


@contextmanager
def object_store(folder: Path) -> Iterator[Bucket]:
    """A bucket in versitygw, which keeps it in `folder`."""
    # To versitygw a folder of its folder is a bucket.
    (folder / "registry").mkdir(parents=True)
    bucket = Bucket(
        f"http://127.0.0.1:{free_port()}", "registry", secrets.token_hex(8), secrets.token_hex(16)
    )
    address = urlsplit(bucket.endpoint).netloc
    gateway = str(toolbox.go_tool("versitygw"))
    command = [gateway, "--port", address, "--keep-alive", "--quiet", "posix", str(folder)]
    log = folder.parent / "versitygw.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                "ROOT_ACCESS_KEY": bucket.access_key,
                "ROOT_SECRET_KEY": bucket.secret_key,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_it_listens(process, address, log)
        yield bucket
    finally:
        _end(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise ServerFailed(f"versitygw does not listen on {address}\n{_tail(log)}")


def _named(tool: str) -> str:
    pins = toolbox.VERSIONS["go"]
    pin = pins["locked"].get(tool) or pins["installed"][tool]
    return f"{tool} {pin['version'].removeprefix('v')}"


def _fill(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"{{{word}}}", value)
    return text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
