"""`modelkit-registry health`: what it asks, and what it makes of the answer."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from registry import cli, readiness
from registry.readiness import address_to_ask
from tests.authority import Authority
from tests.registry.conftest import configured, served


def health(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["health", *arguments])


@contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """The address of what gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("prefix", ["/", "/models/"])
async def test_a_registry_that_serves_is_ready(tmp_path: Path, prefix: str) -> None:
    async with served(configured({"inmemory": {}}, http={"prefix": prefix})) as url:
        address = url.removeprefix("http://")
        file = tmp_path / "config.yml"
        file.write_text(json.dumps({"http": {"addr": address, "prefix": prefix}}))

        result = await asyncio.to_thread(health, "--config", str(file))

    assert (result.exit_code, result.output) == (0, f"{address}: ready\n")


@pytest.mark.parametrize(
    ("clientauth", "status", "said"),
    [
        ("verify-client-cert-if-given", 0, "ready"),
        ("require-and-verify-client-cert", 1, "it wants a certificate of whoever asks"),
    ],
)
async def test_tls_is_spoken_and_the_name_in_the_certificate_is_not_asked_for(
    tmp_path: Path, clientauth: str, status: int, said: str
) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue("registry.example")
    tls = {
        "certificate": str(certificate),
        "key": str(key),
        "clientcas": [str(authority.file)],
        "clientauth": clientauth,
    }
    file = tmp_path / "config.yml"
    file.write_text(json.dumps({"http": {"tls": tls}}))

    async with served(configured({"inmemory": {}}, http={"tls": tls})) as url:
        address = url.removeprefix("http://")
        result = await asyncio.to_thread(health, "--config", str(file), "--address", address)

    assert result.exit_code == status
    assert said in result.output


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (503, b'{"status": "unavailable", "reason": "draining"}', "not ready: draining"),
        (503, b"<html>", "not ready: status 503"),
        (404, b"[]", "not ready: status 404"),
        (302, b"{}", "not ready: status 302"),
    ],
)
def test_another_answer_than_200_is_not_ready_and_why(status: int, content: bytes, said: str) -> None:
    with answering(status, content) as address:
        result = health("--address", address)

    assert (result.exit_code, result.stderr) == (1, f"{address}: {said}\n")


def test_nobody_there_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

    result = health("--address", address)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"{address}: no answer: ")


def test_a_registry_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        result = health("--address", address)

    assert (result.exit_code, result.stderr) == (1, f"{address}: no answer: not within 0.1 s\n")


@pytest.mark.parametrize(
    ("listens_at", "asked"),
    [
        (":5000", "127.0.0.1:5000"),
        ("0.0.0.0:5000", "127.0.0.1:5000"),
        ("[::]:5000", "127.0.0.1:5000"),
        ("[::1]:5000", "[::1]:5000"),
        ("10.0.0.7:80", "10.0.0.7:80"),
        ("registry:80", "registry:80"),
    ],
)
def test_every_address_includes_loopback(listens_at: str, asked: str) -> None:
    assert address_to_ask(listens_at) == asked


def test_an_address_that_is_none_is_wrong_usage() -> None:
    result = health("--address", "nowhere")

    assert result.exit_code == 2
    assert "should be an address" in result.stderr
