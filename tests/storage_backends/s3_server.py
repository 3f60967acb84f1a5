"""An object store for tests: versitygw on loopback over a temporary folder, or the one that $S3_ENDPOINT names.

`make test-s3` builds versitygw and names it in $VERSITYGW. With $S3_ENDPOINT, the keys are $AWS_ACCESS_KEY_ID and
$AWS_SECRET_ACCESS_KEY, and each test leaves a bucket behind.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from storage_backends.s3_client import S3Client, S3Settings
from storage_backends.s3_parts import PART_SIZE_MIN

_START_TIMEOUT_S = 20.0


class Buckets:
    """A store that runs."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str) -> None:
        self._settings = S3Settings(
            "none",
            region="us-east-1",
            endpoint=endpoint,
            access_key=access_key,
            secret_key=secret_key,
            part_size=PART_SIZE_MIN,
        )
        self._client = S3Client(self._settings, connections=1)

    def new(self) -> S3Settings:
        """Settings for a bucket that nobody else uses."""
        settings = replace(self._settings, bucket=f"t-{secrets.token_hex(8)}")
        self._client._client.create_bucket(Bucket=settings.bucket)
        return settings

    def close(self) -> None:
        self._client.close()


@contextmanager
def object_store() -> Iterator[Buckets]:
    """A store that runs until the end of the block."""
    if endpoint := os.environ.get("S3_ENDPOINT"):
        keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        with closing(Buckets(endpoint, *keys)) as buckets:
            yield buckets
        return
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, _gateway(Path(folder)) as buckets:
        yield buckets


@contextmanager
def _gateway(folder: Path) -> Iterator[Buckets]:
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key}
    command = [_versitygw(), "--port", address, "--keep-alive", "--quiet", "posix", str(folder)]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_it_listens(server, address, Path(log.name))
        with closing(Buckets(f"http://{address}", access_key, secret_key)) as buckets:
            yield buckets
    finally:
        server.terminate()
        server.wait()
        Path(log.name).unlink()


def _versitygw() -> str:
    if named := os.environ.get("VERSITYGW"):
        return named
    pytest.skip("no object store: `make test-s3` builds one")


def _wait_until_it_listens(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"versitygw does not listen: {log.read_text(errors='replace')[-2000:]}")
